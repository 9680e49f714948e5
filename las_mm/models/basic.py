"""The residual block of ResNet-18 and ResNet-34, computed only where its maskers say so."""

from __future__ import annotations

from mmpretrain.models.backbones.resnet import BasicBlock
from torch import Tensor

from las_mm.models.coverage import register
from las_mm.models.executors.basic_block import SparseBasicBlock
from las_mm.models.residual import ResidualBlock
from las_mm.network.basic import BasicShape


@register
class DynamicBasicBlock(ResidualBlock, BasicBlock):
    """mmpretrain's ``BasicBlock`` with maskers; equation 1 of LASNet (arXiv 2210.06223).

    What changes against the parent: positions that the spatial masker drops take the value of the
    shortcut. Channels that the channel masker drops are left out of what conv1 puts out.

    Args:
        args, mode, granularity, settings, kwargs: See :class:`ResidualBlock`.
    """

    conv2_stride = 1

    @property
    def conv1_stride(self) -> int:
        """The block's stride."""
        return self.stride

    @property
    def _reader(self) -> tuple[int, int]:
        return 1, 1  # conv2, which has no dilation

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> BasicShape:
        """See the base class."""
        return BasicShape(**self._sizes(name, stage, hw))

    def _make_executor(self) -> SparseBasicBlock:
        return SparseBasicBlock.of(self)

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        out = self._gated(self.conv1(x), self.conv1, self.norm1, channels)
        out = self.drop_path(self.norm2(self.conv2(out)))
        return self._add_shortcut(x, out, mask)
