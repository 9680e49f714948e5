"""LASNet's ResNet: mmpretrain's ResNet with dynamic bottlenecks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmpretrain.models.backbones import ResNet
from mmpretrain.models.backbones.resnet import ResLayer
from torch import Tensor, nn

from las_mm import ops
from las_mm.latency.shapes import BlockShape, ConvShape, NetworkShape, PoolShape
from las_mm.models import sparse
from las_mm.models.activation import NetworkActivation
from las_mm.models.bottleneck import MODES, DynamicBottleneck
from las_mm.models.maskers import SpatialMasker
from las_mm.models.snapshot import Snapshot, has_hooks
from las_mm.registry import MODELS


def _per_stage(name: str, value: object, num_stages: int) -> list:
    """One value for all stages, or a list with one per stage."""
    if isinstance(value, (list, tuple)):
        if len(value) != num_stages:
            raise ValueError(
                f"{name} needs one value or {num_stages} (one per stage), got {list(value)}"
            )
        return list(value)
    return [value] * num_stages


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _per_block(granularity: object, stage_blocks: Sequence[int]) -> list[list[int]]:
    """Granularity as [stage][block] from one value, one per stage, one per block or nested."""
    count = sum(stage_blocks)
    if isinstance(granularity, (list, tuple)) and len(granularity) == count != len(stage_blocks):
        values = iter(granularity)
        granularity = [[next(values) for _ in range(n)] for n in stage_blocks]
    nested = []
    for stage, (value, n) in enumerate(
        zip(_per_stage("granularity", granularity, len(stage_blocks)), stage_blocks), start=1
    ):
        blocks = list(value) if isinstance(value, (list, tuple)) else [value] * n
        if len(blocks) != n:
            raise ValueError(
                f"granularity of stage {stage} needs {n} values (one per block), got {blocks}"
            )
        for entry in blocks:
            if not _positive_int(entry):
                raise ValueError(
                    f"granularity must be positive integers (the side S of a patch in output "
                    f"pixels), got {entry!r} in stage {stage}; an example is (4, 4, 2, 1)"
                )
        nested.append(blocks)
    return nested


@MODELS.register_module()
class LASResNet(ResNet):
    """ResNet whose blocks decide per image which patches, or whether at all, to compute.

    LASNet (arXiv 2210.06223). What changes against mmpretrain's ``ResNet``: bottlenecks are
    :class:`~las_mm.models.bottleneck.DynamicBottleneck`; a static checkpoint (torchvision naming)
    loads, its maskers then start mostly on. Use it in any mm project as
    ``backbone=dict(type='las_mm.LASResNet', depth=101, out_indices=(0, 1, 2, 3))``.

    Args:
        depth: 50, 101 or 152.
        mode: ``'static'``, ``'spatial'`` or ``'layer'``, for all stages or one per stage.
            Defaults to ``'spatial'``.
        granularity: Side S of a patch in output pixels, read by spatial blocks: one value, one
            per stage, one per block (flat), or per stage a list of one per block.
            Defaults to ``(4, 4, 2, 1)``.
        freeze_maskers: Whether ``frozen_stages`` freezes the maskers of these stages too. Set it
            to ``False`` to train the maskers of frozen, statically pretrained stages.
            Defaults to ``True``.
        kwargs: Arguments of the parent: ``out_indices``, ``frozen_stages``, ``norm_eval``,
            ``with_cp``, ``style``, ``deep_stem``, ``avg_down``, ``base_channels``, ...

    Raises:
        ValueError: Wrong depth, mode or granularity; the message names the value.

    Example:
        >>> import torch
        >>> from las_mm.models import LASResNet, collect_activations
        >>> backbone = LASResNet(50, granularity=(4, 4, 2, 1), out_indices=(0, 1, 2, 3))
        >>> outs = backbone(torch.rand(1, 3, 64, 96))
        >>> [tuple(out.shape) for out in outs]
        [(1, 256, 16, 24), (1, 512, 8, 12), (1, 1024, 4, 6), (1, 2048, 2, 3)]
        >>> collect_activations(backbone).rates.shape
        torch.Size([16])
    """

    arch_settings = {
        depth: (DynamicBottleneck, blocks)
        for depth, (_, blocks) in ResNet.arch_settings.items()
        if depth >= 50  # shallower ResNets have no bottleneck
    }

    fast_stem = sparse.FastStem

    def __init__(
        self,
        depth: int,
        mode: str | Sequence[str] = "spatial",
        granularity: int | Sequence = (4, 4, 2, 1),
        freeze_maskers: bool = True,
        **kwargs,
    ) -> None:
        if depth not in self.arch_settings:
            known = ", ".join(map(str, self.arch_settings))
            raise ValueError(f"depth of LASResNet must be one of {known}, got {depth!r}")
        num_stages = kwargs.get("num_stages", 4)
        self._set_dynamic(
            self.arch_settings[depth][1][:num_stages], mode, granularity, freeze_maskers, kwargs
        )
        super().__init__(depth, **kwargs)

    def _set_dynamic(
        self,
        stage_blocks: Sequence[int],
        mode: str | Sequence[str],
        granularity: int | Sequence,
        freeze_maskers: bool,
        kwargs: dict,
    ) -> None:
        """What the parent's constructor does not know, checked, and what of ``kwargs`` it does not.

        Args:
            stage_blocks: Number of blocks per stage.
            mode, granularity, freeze_maskers, kwargs: See the class.
        """
        num_stages = len(stage_blocks)
        self.modes = _per_stage("mode", mode, num_stages)
        for stage, value in enumerate(self.modes, start=1):
            if value not in MODES:
                raise ValueError(
                    f"mode of stage {stage} must be one of {', '.join(MODES)}, got {value!r}"
                )
        if isinstance(granularity, (list, tuple)) and len(granularity) == 4 > num_stages:
            granularity = granularity[:num_stages]  # the default serves shorter networks too
        self.granularity = _per_block(granularity, stage_blocks)
        for index in kwargs.get("out_indices", ()):
            if index not in range(num_stages):
                raise ValueError(
                    f"out_indices must name stages 0 to {num_stages - 1}, got {index!r}"
                )
        if kwargs.get("frozen_stages", -1) > num_stages:
            raise ValueError(
                f"frozen_stages must be -1 to {num_stages}, got {kwargs['frozen_stages']}"
            )
        self.freeze_maskers = freeze_maskers
        self._input_hw: tuple[int, int] | None = None
        self._shapes: dict[tuple[int, int], NetworkShape] = {}
        self._fast_stem: sparse.FastStem | sparse.FastConvStem | None = None
        self._snapshot: Snapshot | None = None

    def make_res_layer(self, **kwargs) -> ResLayer:
        """The parent's stage builder, with this stage's mode and each block's granularity."""
        stage = len(self.res_layers)
        layer = ResLayer(mode=self.modes[stage], **kwargs)
        for block, granularity in zip(layer, self.granularity[stage]):
            block.granularity = granularity
        return layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) -> the feature maps of ``out_indices``; any H and W."""
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
        compiling = torch.compiler.is_compiling()
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
                    mine = not hooked and (compiling or not block.hooked_inside())
                    if observe is not None:
                        observe(block)
            if i in self.out_indices:
                outs.append(ops.to_nchw(x) if contiguous and not x.is_contiguous() else x)
        return tuple(outs)

    def _dense_stem(self, x: Tensor) -> Tensor:
        if self.deep_stem:
            return self.maxpool(self.stem(x))
        return self.maxpool(self.relu(self.norm1(self.conv1(x))))

    def prepare(self) -> None:
        """Fold and pack all weights for inference; see :func:`las_mm.models.sparse.prepare`."""
        self._prepare_stem()
        for block in self.blocks():
            block.prepare()

    def _prepare_stem(self) -> sparse.FastStem | sparse.FastConvStem | None:
        if torch.compiler.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(sparse.PREPARE_FIRST)
            return self._fast_stem
        if self._snapshot is None or self._snapshot.stale():
            try:
                self._fast_stem = self.fast_stem.of(self)
            except sparse.Unsupported:
                self._fast_stem = None
            parts = ["stem"] if self.deep_stem else ["conv1", self.norm1_name, "relu"]
            self._snapshot = Snapshot(self, [*parts, "maxpool"])
        return None if self._snapshot.hooked() else self._fast_stem

    def _apply(self, *args, **kwargs) -> LASResNet:
        self._fast_stem = self._snapshot = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fast_stem": None, "_snapshot": None}

    def blocks(self) -> list[DynamicBottleneck]:
        """All blocks in network order."""
        return [block for name in self.res_layers for block in getattr(self, name)]

    def maskers(self) -> list[SpatialMasker]:
        """All maskers in network order."""
        return [block.masker for block in self.blocks() if block.masker is not None]

    def network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        """Every operator's shape for an input of ``input_hw`` (height, width)."""
        input_hw = tuple(input_hw)
        if input_hw not in self._shapes:
            self._shapes[input_hw] = _network_shape(self, input_hw)
        return self._shapes[input_hw]

    def network_activation(self) -> NetworkActivation:
        """What the blocks did in the last forward pass.

        Raises:
            RuntimeError: No forward pass yet.
        """
        activations = [block.activation for block in self.blocks()]
        if self._input_hw is None or None in activations:
            raise RuntimeError(
                f"{type(self).__name__} has no activations before its first forward pass; run it on "
                "an input"
            )
        return NetworkActivation(
            shape=self.network_shape(self._input_hw),
            rates=torch.stack([a.rate for a in activations]),
            rates_dilated=torch.stack([a.rate_dilated for a in activations]),
            rates_channel=torch.stack([a.rate_channel for a in activations]),
            masks=tuple(a.mask for a in activations),
        )

    def init_weights(self) -> None:
        """The parent's initialisation, which must not touch the maskers' "mostly on"."""
        pretrained = isinstance(self.init_cfg, dict) and self.init_cfg["type"] == "Pretrained"
        super().init_weights()
        if not pretrained:
            for masker in self.maskers():
                masker.reset_parameters()

    def train(self, mode: bool = True) -> LASResNet:
        """The parent's, but returning the module like every other ``nn.Module``."""
        self._fast_stem = self._snapshot = None  # made anew, as weights may be swapped in between
        super().train(mode)
        return self

    def _freeze_stages(self) -> None:
        super()._freeze_stages()
        if self.freeze_maskers:
            return
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            for block in getattr(self, name):
                if block.masker is not None:
                    block.masker.requires_grad_(True).train(self.training)

    def extra_repr(self) -> str:
        stages = []
        for mode, values in zip(self.modes, self.granularity):
            if mode != "spatial":
                stages.append(mode)
            elif len(set(values)) == 1:
                stages.append(f"spatial S={values[0]}")
            else:
                stages.append("spatial S=" + "-".join(map(str, values)))
        return f"{self.variant}, stages=[{'; '.join(stages)}]"

    @property
    def variant(self) -> str:
        """Which member of the family this is, e.g. ``'depth=50'``."""
        return f"depth={self.depth}"

    @property
    def shape_name(self) -> str:
        """Name of the network in reports, e.g. ``'LASResNet-50'``."""
        return f"LASResNet-{self.depth}"

    def stem_shape(self, input_hw: tuple[int, int]) -> list[ConvShape | PoolShape]:
        """The operators before the first block, for an input of ``input_hw``."""
        hw = _half(input_hw)
        convs = [module.conv for module in self.stem] if self.deep_stem else [self.conv1]
        channels = convs[-1].out_channels
        height, width = _half(hw)
        return [
            *(conv_shape(f"stem.conv{i}", conv, hw) for i, conv in enumerate(convs, start=1)),
            PoolShape("stem.maxpool", channels, kernel=3, stride=2, h_out=height, w_out=width),
        ]


def _half(hw: tuple[int, int]) -> tuple[int, int]:
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


def _network_shape(backbone: LASResNet, input_hw: tuple[int, int]) -> NetworkShape:
    stem = backbone.stem_shape(input_hw)
    hw = (stem[-1].h_out, stem[-1].w_out)
    blocks = []
    for stage, name in enumerate(backbone.res_layers, start=1):
        for i, block in enumerate(getattr(backbone, name)):
            shape = BlockShape(
                name=f"{name}.{i}",
                stage=stage,
                mode=block.mode,
                granularity=block.granularity if block.mode == "spatial" else 0,
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
                downsample_pool=backbone.avg_down and block.stride != 1,
                se_width=block.squeeze_channels,
            )
            blocks.append(shape)
            hw = (shape.h_out, shape.w_out)
    return NetworkShape(
        name=backbone.shape_name,
        input_hw=input_hw,
        stem=tuple(stem),
        blocks=tuple(blocks),
    )
