"""The residual block of ResNet-18 and ResNet-34, computed only where its maskers say so."""

from __future__ import annotations

import torch
from mmpretrain.models.backbones.resnet import BasicBlock
from torch import Tensor, nn

from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import register
from las_mm.models.executors.basic_block import SparseBasicBlock
from las_mm.models.settings import BlockSettings
from las_mm.network.basic import BasicShape


@register
class DynamicBasicBlock(DynamicBlock, BasicBlock):
    """mmpretrain's ``BasicBlock`` with maskers; equation 1 of LASNet (arXiv 2210.06223).

    What changes against the parent: positions that the spatial masker drops take the value of the
    shortcut. Channels that the channel masker drops are left out of what conv1 puts out.

    Args:
        mode: See :class:`~las_mm.models.settings.BlockSettings`, as for ``settings``.
            Defaults to ``'spatial'``.
        granularity: Side S of a patch in output pixels. Defaults to 1.
        settings: Its other fields: ``channel_granularity``, ``channel_masker``, ...
        kwargs: Arguments of the parent.
    """

    conv2_stride = 1

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

    @property
    def conv1_stride(self) -> int:
        """The block's stride."""
        return self.stride

    @property
    def _reader(self) -> tuple[int, int]:
        return 1, 1  # conv2, which has no dilation

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> BasicShape:
        """See the base class."""
        shortcut = self.downsample
        return BasicShape(
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
            dilation=self.dilation,
            downsample=shortcut is not None,
            downsample_pool=isinstance(shortcut, nn.Sequential)
            and isinstance(shortcut[0], nn.AvgPool2d),
            **self._channel_masker_shape(),
        )

    def _make_executor(self) -> SparseBasicBlock:
        return SparseBasicBlock.of(self)

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        out = self._gated(self.conv1(x), self.conv1, self.norm1, channels)
        out = self.drop_path(self.norm2(self.conv2(out)))
        identity = x if self.downsample is None else self.downsample(x)
        if mask is None:
            out = out + identity
        else:
            # One pass for "times mask, plus identity".
            out = torch.addcmul(identity, out, mask.to(out.dtype))
        return self.relu(out)
