"""One residual block that computes only where its maskers say so."""

from __future__ import annotations

import torch
from mmpretrain.models.backbones.resnet import Bottleneck
from torch import Tensor, nn

from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import register
from las_mm.models.executors.bottleneck import SparseBottleneck
from las_mm.models.settings import BlockSettings
from las_mm.network.block import MODES
from las_mm.network.bottleneck import BottleneckShape

__all__ = ["MODES", "DynamicBottleneck"]


@register
class DynamicBottleneck(DynamicBlock, Bottleneck):
    """mmpretrain's ``Bottleneck`` with maskers; equation 1 of LASNet (arXiv 2210.06223).

    What changes against the parent: positions that the spatial masker drops take the value of the
    shortcut. Channels that the channel masker drops are left out of what conv1 and conv2 put out,
    by one mask for both (LAUDNet, arXiv 2308.15949).

    Args:
        mode: See :class:`~las_mm.models.settings.BlockSettings`, as for ``settings``.
            Defaults to ``'spatial'``.
        granularity: Side S of a patch in output pixels. Defaults to 1.
        settings: Its other fields: ``channel_granularity``, ``channel_masker``, ...
        kwargs: Arguments of the parent.
    """

    def __init__(
        self,
        *args,
        mode: str = "spatial",
        granularity: int = 1,
        settings: dict | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.make_dynamic(BlockSettings(mode=mode, granularity=granularity, **(settings or {})))

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> BottleneckShape:
        """See the base class."""
        shortcut = self.downsample
        pools = isinstance(shortcut, nn.Sequential) and isinstance(shortcut[0], nn.AvgPool2d)
        return BottleneckShape(
            name=name,
            stage=stage,
            mode=self.mode,
            granularity=self.granularity if self.mode in ("spatial", "both") else 0,
            c_in=self.in_channels,
            width=self.mid_channels,
            c_out=self.out_channels,
            h_in=hw[0],
            w_in=hw[1],
            stride=self.stride,
            conv1_stride=self.conv1_stride,
            groups=self.conv2.groups,
            dilation=self.dilation,
            downsample=shortcut is not None,
            downsample_pool=pools,
            se_width=getattr(self, "squeeze_channels", 0),
            **self._channel_masker_shape(),
        )

    def _make_executor(self) -> SparseBottleneck:
        return SparseBottleneck.of(self)

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        out = self._gated(self.conv1(x), self.conv1, self.norm1, channels)
        out = self._gated(self.conv2(out), self.conv2, self.norm2, channels)
        out = self._excite(out, mask)
        out = self.drop_path(self.norm3(self.conv3(out)))
        identity = x if self.downsample is None else self.downsample(x)
        if mask is None:
            out = out + identity
        else:
            # One pass for "times mask, plus identity".
            out = torch.addcmul(identity, out, mask.to(out.dtype))
        return self.relu(out)
