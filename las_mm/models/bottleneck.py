"""One residual block that computes only where its maskers say so."""

from __future__ import annotations

from mmpretrain.models.backbones.resnet import Bottleneck
from torch import Tensor

from las_mm.models.coverage import register
from las_mm.models.executors.bottleneck import SparseBottleneck
from las_mm.models.residual import ResidualBlock
from las_mm.network.block import MODES
from las_mm.network.bottleneck import BottleneckShape

__all__ = ["MODES", "DynamicBottleneck"]


@register
class DynamicBottleneck(ResidualBlock, Bottleneck):
    """mmpretrain's ``Bottleneck`` with maskers; equation 1 of LASNet (arXiv 2210.06223).

    What changes against the parent: positions that the spatial masker drops take the value of the
    shortcut. Channels that the channel masker drops are left out of what conv1 and conv2 put out,
    by one mask for both (LAUDNet, arXiv 2308.15949).

    Args:
        args, mode, granularity, settings, kwargs: See :class:`ResidualBlock`.
    """

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> BottleneckShape:
        """See the base class."""
        return BottleneckShape(
            **self._sizes(name, stage, hw),
            conv1_stride=self.conv1_stride,
            groups=self.conv2.groups,
            se_width=getattr(self, "squeeze_channels", 0),
        )

    def _make_executor(self) -> SparseBottleneck:
        return SparseBottleneck.of(self)

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        out = self._gated(self.conv1(x), self.conv1, self.norm1, channels)
        out = self._gated(self.conv2(out), self.conv2, self.norm2, channels)
        out = self._excite(out, mask)
        out = self.drop_path(self.norm3(self.conv3(out)))
        return self._add_shortcut(x, out, mask)
