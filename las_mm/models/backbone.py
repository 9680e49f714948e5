"""What every dynamic backbone has, whatever it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmengine.model import BaseModule, initialize
from mmpretrain.models.backbones.resnet import ResLayer
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.bounded import Recent
from las_mm.models import sparse
from las_mm.models.activation import NetworkActivation
from las_mm.models.arguments import dilations_of_blocks
from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import Unsupported, is_channels_last, shadowed
from las_mm.models.executors.stem import FusedConvStem, FusedStem
from las_mm.models.initialization import split
from las_mm.models.maskers import ChannelMasker, SpatialMasker
from las_mm.models.settings import BlockSettings, describe_stage, in_stage
from las_mm.models.snapshot import Snapshot, changed, checked, compared_together, watch
from las_mm.models.stage import Stream, block_shapes, check_sizes
from las_mm.models.stem import stem_shapes
from las_mm.network.block import NetworkShape


class DynamicBackbone(nn.Module):
    """Mixed into a static backbone whose stages are sequences of :class:`DynamicBlock`, before it.

    A subclass sets :attr:`settings` before the constructor of the static backbone runs, which calls
    :meth:`make_res_layer` for each stage, and gives :attr:`architecture`, :meth:`_dense_stem` and,
    where the stem has a sparse path, :attr:`stem_class` and :meth:`_stem_parts`. It reads
    ``depth``, ``out_indices``, ``res_layers`` (names of the stages), ``frozen_stages``,
    ``freeze_maskers`` and, as mmseg's ResNet has them, ``contract_dilation`` and ``multi_grid``.

    Attributes:
        settings: How every block skips, [stage][block].
        stem_class: Class of the stem's sparse path.
        static_forward: The static backbone's ``forward``, which the sparse path replaces.
        runtime: How blocks run in eval mode without gradients: ``'auto'``, each in the form that
            the plan says is the fastest here, measured when it is first met; ``'sparse'``, on the
            sparse path, without measuring; ``'dense'``, masked-dense, as in training.
        why_stem_dense: Why the stem runs dense; ``None`` if it does not.
    """

    stem_class: type[FusedStem] | type[FusedConvStem] | None = None
    static_forward: Callable
    why_stem_dense: str | None = None
    freeze_maskers = True
    contract_dilation = False
    multi_grid: Sequence[int] | None = None
    _stem_executor: FusedStem | FusedConvStem | None = None
    _snapshot: Snapshot | None = None
    _made_for: list[str] | None = None
    _key: str | None = None
    _input_hw: tuple[int, int] | None = None
    _saw_sizes = False  # whether the blocks noted the sizes of their inputs in the last forward
    _shapes: Recent | None = None
    _known = _known_stages = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) -> the feature maps of ``out_indices``; any H and W."""
        self._input_hw = (x.shape[-2], x.shape[-1])
        self._saw_sizes = not compat.is_compiling()
        dense = self.training or self.runtime == "dense" or not sparse.wanted(x)
        if dense or not self.known_forward():
            return super().forward(x)
        if compat.is_compiling() or ops.has_fingerprint(x.device.type):
            return self._infer(x)
        self._drop_changed()
        with compared_together():
            return self._infer(x)

    def known_forward(self) -> bool:
        """Whether nobody has put another ``forward`` between this class and the static backbone."""
        if compat.is_compiling():  # which does not see that two functions are one
            return self._known and self._known_stages
        self._known = super().forward.__func__ is type(self).static_forward
        return self._known

    def _infer(
        self, x: Tensor, observe: Callable[[nn.Module], None] | None = None
    ) -> tuple[Tensor, ...]:
        """``forward`` on the sparse path, see :class:`~las_mm.models.stage.Stream`.

        ``observe`` is called after the stem, with the backbone, and after each block or other
        module of a stage, with it.
        """
        channels_last = is_channels_last(x)
        stem = self._prepare_stem()
        if stem is not None and x.dtype == stem.weight.dtype:
            channels_last |= stem.channels_last
            x = stem(x, self._checked(stem.bias))
        else:
            x = self._dense_stem(x)
            channels_last = is_channels_last(x)
        if observe is not None:
            observe(self)
        stream = Stream(x, channels_last, observe)
        outs = []
        for i, name in enumerate(self.res_layers):
            stream.run(self.get_submodule(name))
            if i in self.out_indices:
                outs.append(stream.output())
        return tuple(outs)

    def _drop_changed(self) -> None:
        """Forget packed weights whose sources' contents have changed, where that means to wait."""
        parts = (self, *self.blocks())
        self._turn = getattr(self, "_turn", 0) + 1
        snapshots = [s for s in (part._snapshot for part in parts) if s is not None]
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not capturing and changed(snapshots, self._turn):
            for part in parts:
                part._snapshot = None

    def prepare(self) -> None:
        """Fold and pack all weights for inference; see :func:`las_mm.models.sparse.prepare`."""
        self.known_forward()
        stages = [m for name in self.res_layers for m in self.get_submodule(name).modules()]
        self._known_stages = all(
            shadowed(m) is None for m in stages if isinstance(m, nn.Sequential)
        )
        self._prepare_stem()
        for block in self.blocks():
            block.prepare()

    def _prepare_stem(self) -> FusedStem | FusedConvStem | None:
        """What runs the stem, made anew if weights have changed; ``None``: its modules do.

        Raises:
            RuntimeError: Inside ``torch.compile`` or ``torch.export`` before the first call.
        """
        if self.stem_class is None or self.runtime == "dense":
            return None
        if compat.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(ops.PREPARE_FIRST)
            return self._stem_executor
        # Another thread may call .eval() or .to() at any time, which forgets both.
        executor, snapshot, parts = self._stem_executor, self._snapshot, self._stem_parts()
        if snapshot is None or parts != self._made_for or snapshot.stale():
            executor = why = None
            try:
                executor = self.stem_class.of(self)
            except Unsupported as reason:
                why = str(reason)
            snapshot = Snapshot(self, parts, executor is not None)
            self._made_for, self.why_stem_dense = parts, why
            self._stem_executor, self._snapshot = executor, snapshot
            self._key = watch(self, self._key)
        return None if snapshot.hooked() else executor

    def stale(self, positions: int | None = None) -> bool:
        """Whether the stem differs from the one whose weights are packed, or none are.

        Its few weights are always compared in full, whatever the number of ``positions``.
        """
        snapshot = self._snapshot
        return snapshot is None or self._stem_parts() != self._made_for or snapshot.stale()

    def _checked(self, value: Tensor) -> Tensor:
        """``value``, a packed one; in a compiled program only as long as it is up to date."""
        if not compat.is_compiling():
            return value
        return checked(value, self, self._snapshot, self._key, 1, self._stem_parts())

    def _stem_parts(self) -> list[str]:
        """Names of the modules that the sparse path of the stem is made of."""
        raise NotImplementedError

    def _apply(self, *args, **kwargs) -> DynamicBackbone:
        self._stem_executor = self._snapshot = None
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> DynamicBackbone:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__ = DynamicBackbone.__getstate__(replica)  # its tensors are others
        return replica

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_stem_executor": None, "_snapshot": None, "_key": None}

    def train(self, mode: bool = True) -> DynamicBackbone:
        """The parent's, but returning the module like every other ``nn.Module``."""
        self._stem_executor = self._snapshot = None  # as weights may be swapped
        super().train(mode)
        # norm_eval is about statistics that came with static weights: maskers have none of these.
        # Theirs train like their other weights, and stand still in frozen stages.
        for masker in self.maskers():
            masker.train(masker.training)
        return self

    def _dense_stem(self, x: Tensor) -> Tensor:
        """Everything before the first block."""
        raise NotImplementedError

    def make_res_layer(self, block: type[DynamicBlock], **kwargs) -> ResLayer:
        """The parent's stage builder; each block gets the maskers of its settings.

        Raises:
            ValueError: A setting that does not fit the stage's channels.
        """
        stage = len(self.res_layers)
        settings = iter(self._asked[stage])
        grid = self.multi_grid if stage == len(self._asked) - 1 else None
        dilation, number = kwargs.get("dilation", 1), len(self._asked[stage])
        dilations = iter(dilations_of_blocks(number, dilation, self.contract_dilation, grid))

        def build(**arguments) -> DynamicBlock:
            arguments["dilation"] = next(dilations)
            made = block(mode="static", **arguments)
            in_stage(stage, lambda: made.make_dynamic(next(settings)))
            return made

        layer = ResLayer(build, **kwargs)
        layer.block = block  # what it says it is made of; a local function could not be pickled
        return layer

    @property
    def settings(self) -> tuple[tuple[BlockSettings, ...], ...]:
        """How every block skips, [stage][block]: as the blocks are now."""
        if "_modules" not in self.__dict__:
            return self._asked
        stages = [self.blocks_of(name) for name in self.res_layers]
        return tuple(tuple(block.settings for block in blocks) for blocks in stages)

    @settings.setter
    def settings(self, asked: tuple[tuple[BlockSettings, ...], ...]) -> None:
        self.__dict__["_asked"] = asked  # nn.Module's constructor has not run yet

    @property
    def granularity(self) -> list[list[int]]:
        """Side S of a patch, [stage][block]."""
        return [[block.granularity for block in blocks] for blocks in self.settings]

    @property
    def runtime(self) -> str:
        """See the class."""
        return self.__dict__.get("_runtime", "auto")

    @runtime.setter
    def runtime(self, value: str) -> None:
        self._runtime = sparse.check_runtime(value)
        for block in self.blocks():
            block.runtime = value

    def blocks(self) -> list[DynamicBlock]:
        """All blocks in network order."""
        return [block for name in self.res_layers for block in self.blocks_of(name)]

    def blocks_of(self, name: str) -> list[DynamicBlock]:
        """The blocks of the stage ``name``, whatever else is in it."""
        return [m for m in self.get_submodule(name).modules() if isinstance(m, DynamicBlock)]

    @property
    def channels(self) -> int:
        """Channels of the last stage's features."""
        return self.blocks()[-1].out_channels

    def packed(self) -> list[nn.Module]:
        """Modules between the blocks that run on the sparse path, in a packed form."""
        return []

    def maskers(self) -> list[SpatialMasker | ChannelMasker]:
        """All maskers in network order."""
        return [masker for block in self.blocks() for masker in block.maskers()]

    def network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        """Every operator's shape for an input of ``input_hw`` (height, width).

        Raises:
            ValueError: A part of the stem was replaced by one whose shape nobody knows.
        """
        hw = (int(input_hw[0]), int(input_hw[1]))
        if self._shapes is None:
            self._shapes = Recent(64)
        blocks = tuple(block.describe("", 0, (1, 1)) for block in self.blocks())
        stem = tuple(repr(getattr(self, name)) for name in self._stem_parts())
        return self._shapes.get((hw, blocks, stem), lambda: self._network_shape(hw))

    def network_activation(self) -> NetworkActivation:
        """What the blocks did in the last forward pass.

        Raises:
            RuntimeError: No forward pass yet, or a module between the blocks changed sizes.
        """
        activations = [block.activation for block in self.blocks()]
        if self._input_hw is None or None in activations:
            raise RuntimeError(
                f"{type(self).__name__} has no activations before its first forward pass; run it "
                "on an input"
            )
        shape = self.network_shape(self._input_hw)
        if self._saw_sizes:
            check_sizes(shape, self.blocks())
        return NetworkActivation.of(shape, activations)

    def init_weights(self) -> None:
        """The parent's initialisation; maskers start "mostly on", loaded weights come last.

        The parents know loaded weights by ``init_cfg=dict(type='Pretrained')`` only, and zero the
        last norm of each block after any other way of loading. Once initialised nothing changes.
        """
        if self.is_init:
            BaseModule.init_weights(self)  # says that it was called before
            return
        init_cfg = self.init_cfg
        self.init_cfg, loaded = split(init_cfg)
        try:
            whole = any(not part for part, _ in loaded)
            BaseModule.init_weights(self) if whole else super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for masker in self.maskers():
            masker.reset_parameters()
        for part, entry in loaded:
            initialize(self.get_submodule(part), entry)

    def extra_repr(self) -> str:
        stages = "; ".join(map(describe_stage, self.settings))
        return f"depth={self.depth}, stages=[{stages}]"

    @property
    def architecture(self) -> str:
        """What the network is called in reports."""
        raise NotImplementedError

    def _network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        parts = [getattr(self, name) for name in self._stem_parts()]
        stem, hw = stem_shapes(parts, self.blocks()[0].in_channels, input_hw)
        stages = [(name, self.blocks_of(name)) for name in self.res_layers]
        return NetworkShape(self.architecture, input_hw, stem, block_shapes(stages, hw))

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.freeze_maskers:
            return
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            for block in self.blocks_of(name):
                for masker in block.maskers():
                    masker.requires_grad_(True).train(self.training)
