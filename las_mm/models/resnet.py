"""LASNet's ResNet: mmpretrain's ResNet with dynamic bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmpretrain.models.backbones import ResNet
from torch import Tensor

from las_mm.latency.shapes import ConvShape, NetworkShape, PoolShape
from las_mm.models import sparse
from las_mm.models.backbone import DynamicBackbone, block_shapes
from las_mm.models.bottleneck import DynamicBottleneck
from las_mm.models.settings import block_settings
from las_mm.models.snapshot import Snapshot
from las_mm.registry import MODELS


@MODELS.register_module()
class LASResNet(DynamicBackbone, ResNet):
    """ResNet whose blocks decide per image which patches and channels, or whether, to compute.

    LASNet (arXiv 2210.06223) and LAUDNet (arXiv 2308.15949). What changes against mmpretrain's
    ``ResNet``: bottlenecks are :class:`~las_mm.models.bottleneck.DynamicBottleneck`; a static
    checkpoint (torchvision naming) loads, its maskers then start mostly on. Use it in any mm
    project as
    ``backbone=dict(type='las_mm.LASResNet', depth=101, out_indices=(0, 1, 2, 3))``.

    Args:
        depth: 50, 101 or 152.
        mode: ``'static'``, ``'spatial'`` (patches), ``'channel'``, ``'both'`` (patches and
            channels) or ``'layer'`` (blocks): one for all, one per stage, one per block (flat), or
            per stage a list of one per block, as ``['spatial', 'both', ['channel'] * 5 +
            ['layer'], 'channel']``. Defaults to ``'spatial'``.
        granularity: Side S of a patch in output pixels, read by spatial and both; given like
            ``mode``. Defaults to ``(4, 4, 2, 1)``.
        channel_granularity: Channels G that share a decision, read by channel and both; given
            like ``mode``, as are the following. Defaults to 2.
        channel_masker: ``'mlp'`` or ``'conv_linear'``, see
            :class:`~las_mm.models.maskers.ChannelMasker`. Defaults to ``'mlp'``.
        channel_masker_layers: 1 or 2 fully connected layers of an ``'mlp'``. Defaults to 2.
        channel_reduction: Divisor of the masker's hidden channels. Defaults to 16.
        channel_position: ``'after_act'``: a skipped channel is 0; ``'before_norm'``: it is
            ReLU(BN(0)), as in the authors' released ResNets. Defaults to ``'after_act'``.
        freeze_maskers: Whether ``frozen_stages`` freezes the maskers of these stages too. Set it
            to ``False`` to train the maskers of frozen, statically pretrained stages.
            Defaults to ``True``.
        kwargs: Arguments of the parent: ``out_indices``, ``frozen_stages``, ``norm_eval``,
            ``with_cp``, ``style``, ``deep_stem``, ``avg_down``, ``base_channels``, ...

    Raises:
        ValueError: Wrong depth, mode, granularity, ...; the message names the value.

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

    def __init__(
        self,
        depth: int,
        mode: str | Sequence = "spatial",
        granularity: int | Sequence = (4, 4, 2, 1),
        freeze_maskers: bool = True,
        channel_granularity: int | Sequence = 2,
        channel_masker: str | Sequence = "mlp",
        channel_masker_layers: int | Sequence = 2,
        channel_reduction: int | Sequence = 16,
        channel_position: str | Sequence = "after_act",
        **kwargs,
    ) -> None:
        if depth not in self.arch_settings:
            known = ", ".join(map(str, self.arch_settings))
            raise ValueError(f"depth of LASResNet must be one of {known}, got {depth!r}")
        num_stages = kwargs.get("num_stages", 4)
        if isinstance(granularity, (list, tuple)) and len(granularity) == 4 > num_stages:
            granularity = granularity[:num_stages]  # the default serves shorter networks too
        self.settings = block_settings(
            self.arch_settings[depth][1][:num_stages],
            mode=mode,
            granularity=granularity,
            channel_granularity=channel_granularity,
            channel_masker=channel_masker,
            channel_masker_layers=channel_masker_layers,
            channel_reduction=channel_reduction,
            channel_position=channel_position,
        )
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
        self._fast_stem: sparse.FastStem | None = None
        self._snapshot: Snapshot | None = None
        super().__init__(depth, **kwargs)

    def _dense_stem(self, x: Tensor) -> Tensor:
        if self.deep_stem:
            return self.maxpool(self.stem(x))
        return self.maxpool(self.relu(self.norm1(self.conv1(x))))

    def _prepare_stem(self) -> sparse.FastStem | None:
        if torch.compiler.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(sparse.PREPARE_FIRST)
            return self._fast_stem
        if self._snapshot is None or self._snapshot.stale():
            try:
                self._fast_stem = sparse.FastStem.of(self)
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

    def train(self, mode: bool = True) -> LASResNet:
        """The parent's, but returning the module like every other ``nn.Module``."""
        self._fast_stem = self._snapshot = None  # made anew, as weights may be swapped in between
        super().train(mode)
        return self

    def _network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        stem, hw = _stem_shape(self, input_hw)
        return NetworkShape(
            name=f"LASResNet-{self.depth}",
            input_hw=input_hw,
            stem=stem,
            blocks=block_shapes(
                [(name, getattr(self, name)) for name in self.res_layers],
                hw,
                downsample_pool=lambda block: self.avg_down and block.stride != 1,
            ),
        )


def _stem_shape(
    backbone: LASResNet, input_hw: tuple[int, int]
) -> tuple[tuple[ConvShape | PoolShape, ...], tuple[int, int]]:
    """The layers before the first block, and rows and columns of their output."""

    def half(hw: tuple[int, int]) -> tuple[int, int]:
        return -(-hw[0] // 2), -(-hw[1] // 2)

    hw = half(input_hw)
    if backbone.deep_stem:
        convs = [module.conv for module in backbone.stem]
    else:
        convs = [backbone.conv1]
    stem: list[ConvShape | PoolShape] = [
        ConvShape(
            name=f"stem.conv{i}",
            c_in=conv.in_channels,
            c_out=conv.out_channels,
            kernel=conv.kernel_size[0],
            stride=conv.stride[0],
            groups=conv.groups,
            h_out=hw[0],
            w_out=hw[1],
        )
        for i, conv in enumerate(convs, start=1)
    ]
    hw = half(hw)
    channels = convs[-1].out_channels
    stem.append(
        PoolShape(
            name="stem.maxpool", channels=channels, kernel=3, stride=2, h_out=hw[0], w_out=hw[1]
        )
    )
    return tuple(stem), hw
