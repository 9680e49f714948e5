"""What every dynamic backbone has, whatever it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmpretrain.models.backbones.resnet import ResLayer
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.latency.shapes import BlockShape, ConvShape, NetworkShape
from las_mm.models import sparse
from las_mm.models.activation import NetworkActivation
from las_mm.models.block import DynamicBlock
from las_mm.models.maskers import ChannelMasker, SpatialMasker
from las_mm.models.settings import BlockSettings, describe_stage, in_stage
from las_mm.models.snapshot import Snapshot, has_hooks


class DynamicBackbone(nn.Module):
    """Mixed into a static backbone whose stages are sequences of :class:`DynamicBlock`.

    Put before the static backbone among the bases. A subclass sets :attr:`settings` before the
    constructor of the static backbone runs, which calls :meth:`make_res_layer` for each stage,
    and gives :meth:`_network_shape`, :meth:`_dense_stem` and, where the stem has a fast form,
    :attr:`fast_stem` and :meth:`_stem_parts`. It reads ``depth``, ``out_indices``,
    ``res_layers`` (names of the stages), ``frozen_stages`` and ``freeze_maskers``.

    Attributes:
        settings: How every block skips, [stage][block].
        fast_stem: Class of the stem's fast form.
    """

    settings: tuple[tuple[BlockSettings, ...], ...]
    fast_stem: type[sparse.FastStem] | type[sparse.FastConvStem] | None = None
    freeze_maskers = True
    _fast_stem: sparse.FastStem | sparse.FastConvStem | None = None
    _snapshot: Snapshot | None = None
    _input_hw: tuple[int, int] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) -> the feature maps of ``out_indices``; any H and W."""
        self._input_hw = (x.shape[-2], x.shape[-1])
        if not self.training and sparse.wanted(x):
            return self._infer(x)
        return super().forward(x)

    def _infer(
        self, x: Tensor, observe: Callable[[nn.Module], None] | None = None
    ) -> tuple[Tensor, ...]:
        """``forward`` on the fast forms; the stream of features is updated in place in a stage.

        ``observe`` is called after the stem, with the backbone, and after each block, with it.
        """
        # Outputs have the memory format of the input, as those of dense convolutions have: some
        # consumers (mmcv's RoIAlign on a CPU) read wrong values from channels_last maps.
        contiguous = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        stem = self._prepare_stem()
        if stem is not None and x.dtype == stem.weight.dtype:
            x = stem(x)
        else:
            x = self._dense_stem(x)
        if observe is not None:
            observe(self)
        outs = []
        compiling = compat.is_compiling()
        for i, name in enumerate(self.res_layers):
            stage = getattr(self, name)
            if has_hooks(stage):
                x = stage(x)
            else:
                mine = False  # the stage's input belongs to the stage before
                for block in stage:
                    hooked = has_hooks(block)
                    x = block(x) if hooked else block.infer(x, in_place=mine)
                    # A hook may have kept the output.
                    kept = not compat.COMPILES_MUTATION if compiling else block.hooked_inside()
                    mine = not hooked and not kept
                    if observe is not None:
                        observe(block)
            if i in self.out_indices:
                outs.append(ops.to_nchw(x) if contiguous and not x.is_contiguous() else x)
        return tuple(outs)

    def prepare(self) -> None:
        """Fold and pack all weights for inference; see :func:`las_mm.models.sparse.prepare`."""
        self._prepare_stem()
        for block in self.blocks():
            block.prepare()

    def _prepare_stem(self) -> sparse.FastStem | sparse.FastConvStem | None:
        """The fast form of the stem, made anew if weights have changed; ``None`` if there is none.

        Raises:
            RuntimeError: Inside ``torch.compile`` or ``torch.export`` before the first call.
        """
        if self.fast_stem is None:
            return None
        if compat.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(sparse.PREPARE_FIRST)
            return self._fast_stem
        if self._snapshot is None or self._snapshot.stale():
            try:
                self._fast_stem = self.fast_stem.of(self)
            except sparse.Unsupported:
                self._fast_stem = None
            self._snapshot = Snapshot(self, self._stem_parts())
        return None if self._snapshot.hooked() else self._fast_stem

    def _stem_parts(self) -> list[str]:
        """Names of the modules that the fast form of the stem is made of."""
        raise NotImplementedError

    def _apply(self, *args, **kwargs) -> DynamicBackbone:
        self._fast_stem = self._snapshot = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fast_stem": None, "_snapshot": None}

    def train(self, mode: bool = True) -> DynamicBackbone:
        """The parent's, but returning the module like every other ``nn.Module``."""
        self._fast_stem = self._snapshot = None  # made anew, as weights may be swapped in between
        super().train(mode)
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
        settings = iter(self.settings[stage])

        def build(**arguments) -> DynamicBlock:
            made = block(mode="static", **arguments)
            in_stage(stage, lambda: made.make_dynamic(next(settings)))
            return made

        layer = ResLayer(build, **kwargs)
        layer.block = block  # what it says it is made of; a local function could not be pickled
        return layer

    @property
    def granularity(self) -> list[list[int]]:
        """Side S of a patch, [stage][block]."""
        return [[block.granularity for block in blocks] for blocks in self.settings]

    def blocks(self) -> list[DynamicBlock]:
        """All blocks in network order."""
        return [block for name in self.res_layers for block in getattr(self, name)]

    def maskers(self) -> list[SpatialMasker | ChannelMasker]:
        """All maskers in network order."""
        return [masker for block in self.blocks() for masker in block.maskers()]

    def network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        """Every operator's shape for an input of ``input_hw`` (height, width)."""
        input_hw = tuple(input_hw)
        shapes: dict = self.__dict__.setdefault("_shapes", {})
        if input_hw not in shapes:
            shapes[input_hw] = self._network_shape(input_hw)
        return shapes[input_hw]

    def network_activation(self) -> NetworkActivation:
        """What the blocks did in the last forward pass.

        Raises:
            RuntimeError: No forward pass yet.
        """
        activations = [block.activation for block in self.blocks()]
        if self._input_hw is None or None in activations:
            raise RuntimeError(
                f"{type(self).__name__} has no activations before its first forward pass; run it "
                "on an input"
            )
        return NetworkActivation.of(self.network_shape(self._input_hw), activations)

    def init_weights(self) -> None:
        """The parent's initialisation, which must not touch the maskers' "mostly on"."""
        pretrained = isinstance(self.init_cfg, dict) and self.init_cfg["type"] == "Pretrained"
        super().init_weights()
        if not pretrained:
            for masker in self.maskers():
                masker.reset_parameters()

    def extra_repr(self) -> str:
        stages = "; ".join(describe_stage(blocks) for blocks in self.settings)
        return f"depth={self.depth}, stages=[{stages}]"

    def _network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        raise NotImplementedError

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.freeze_maskers:
            return
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            for block in getattr(self, name):
                for masker in block.maskers():
                    masker.requires_grad_(True).train(self.training)


def check_stages(num_stages: int, kwargs: dict) -> None:
    """Raise ValueError where ``out_indices`` or ``frozen_stages`` in ``kwargs`` name no stage."""
    for index in kwargs.get("out_indices", ()):
        if index not in range(num_stages):
            raise ValueError(f"out_indices must name stages 0 to {num_stages - 1}, got {index!r}")
    if kwargs.get("frozen_stages", -1) > num_stages:
        raise ValueError(f"frozen_stages must be -1 to {num_stages}, got {kwargs['frozen_stages']}")


def half_size(hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after a padded layer of stride 2."""
    return -(-hw[0] // 2), -(-hw[1] // 2)


def conv_shape(name: str, conv: nn.Conv2d, out_hw: tuple[int, int]) -> ConvShape:
    """The shape of a square convolution with an output of ``out_hw``."""
    return ConvShape(
        name=name,
        c_in=conv.in_channels,
        c_out=conv.out_channels,
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        groups=conv.groups,
        h_out=out_hw[0],
        w_out=out_hw[1],
    )


def block_shapes(
    stages: Sequence[tuple[str, Sequence[DynamicBlock]]],
    hw: tuple[int, int],
    downsample_pool: Callable[[DynamicBlock], bool] = lambda block: False,
) -> tuple[BlockShape, ...]:
    """The shapes of all blocks in network order.

    Args:
        stages: Name and blocks of each stage.
        hw: Rows and columns of the first block's input.
        downsample_pool: Whether a block's shortcut averages before its convolution.
    """
    shapes = []
    for stage, (name, blocks) in enumerate(stages, start=1):
        for i, block in enumerate(blocks):
            shape = BlockShape(
                name=f"{name}.{i}",
                stage=stage,
                mode=block.mode,
                granularity=block.granularity if block.mode in ("spatial", "both") else 0,
                c_in=block.in_channels,
                width=block.mid_channels,
                c_out=block.out_channels,
                h_in=hw[0],
                w_in=hw[1],
                stride=block.stride,
                conv1_stride=block.conv1_stride,
                groups=block.conv2.groups,
                dilation=block.dilation,
                downsample=block.downsample is not None,
                downsample_pool=downsample_pool(block),
                se_width=getattr(block, "squeeze_channels", 0),
                **_channel_shape(block),
            )
            shapes.append(shape)
            hw = (shape.h_out, shape.w_out)
    return tuple(shapes)


def _channel_shape(block: DynamicBlock) -> dict:
    masker = block.masker_channel
    if masker is None:
        return {}
    return dict(
        channel_granularity=block.channel_granularity,
        channel_masker=masker.kind,
        channel_masker_layers=masker.layers,
        channel_reduction=masker.reduction,
    )
