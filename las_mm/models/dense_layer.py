"""The layer of DenseNet, computed only where its masker says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones.densenet import DenseBlock, DenseLayer
from torch import Tensor, nn

from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import register
from las_mm.models.executors import dense_layer as executors
from las_mm.models.settings import BlockSettings
from las_mm.network.dense_layer import MODES, DenseLayerShape


@register
class DynamicDenseLayer(DynamicBlock, DenseLayer):
    """mmpretrain's ``DenseLayer`` with a masker.

    A residual block falls back to its shortcut where it is skipped; a dense layer has none. What it
    skips contributes zeros to the concatenation: later layers read "nothing new here", in a form
    that their first norm maps to a constant.

    Args:
        in_channels: Channels of all features so far.
        growth_rate: Channels that the layer adds.
        bn_size: Channels between its convolutions, over ``growth_rate``.
        settings: How it skips: ``'static'``, ``'spatial'`` or ``'layer'``.
        kwargs: Other arguments of the parent.

    Raises:
        ValueError: Another mode.
    """

    stride = conv1_stride = conv2_stride = dilation = 1

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        settings: BlockSettings | None = None,
        **kwargs,
    ) -> None:
        super().__init__(in_channels, growth_rate, bn_size, **kwargs)
        self.in_channels, self.out_channels = in_channels, growth_rate
        self.mid_channels = bn_size * growth_rate
        self.with_cp = self.memory_efficient
        self.make_dynamic(settings or BlockSettings())

    def make_dynamic(self, settings: BlockSettings) -> None:
        """See the base class."""
        if settings.mode not in MODES:
            raise ValueError(
                f"mode of a dense layer must be one of {', '.join(MODES)}, got {settings.mode!r}"
            )
        super().make_dynamic(settings)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """Features so far, (N, C_in, H, W) or a list whose channels add up -> (N, growth, H, W)."""
        x = features if isinstance(features, Tensor) else torch.cat(list(features), 1)
        return super().forward(x)

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> DenseLayerShape:
        """See the base class; without a transition."""
        return DenseLayerShape(
            name=name,
            stage=stage,
            mode=self.mode,
            granularity=self.granularity if self.mode == "spatial" else 0,
            c_in=self.in_channels,
            width=self.mid_channels,
            c_out=self.out_channels,
            h_in=hw[0],
            w_in=hw[1],
        )

    def _make_executor(self) -> executors.SparseDenseLayer:
        return executors.SparseDenseLayer.of(self)

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        out = self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x))))))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        return out if mask is None else out * mask.to(out.dtype)


class DynamicDenseBlock(DenseBlock):
    """mmpretrain's ``DenseBlock`` of given layers."""

    def __init__(self, layers: Sequence[DynamicDenseLayer]) -> None:
        nn.Module.__init__(self)
        self.block = nn.ModuleList(layers)
