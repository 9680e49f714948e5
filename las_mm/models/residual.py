"""What dynamic blocks with a shortcut share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import shadowed
from las_mm.models.settings import BlockSettings


class ResidualBlock(DynamicBlock):
    """A dynamic block whose skipped positions take the value of the shortcut.

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

    def _settings(self) -> tuple:
        own = type(self)._add_shortcut, shadowed(self, ("_add_shortcut",))
        return (*super()._settings(), *own)

    def _sizes(self, name: str, stage: int, hw: tuple[int, int]) -> dict:
        """The fields that the shapes of all such blocks have."""
        shortcut = self.downsample
        pools = isinstance(shortcut, nn.Sequential) and isinstance(shortcut[0], nn.AvgPool2d)
        return dict(
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
            downsample_pool=pools,
            **self._channel_masker_shape(),
        )

    def _add_shortcut(self, x: Tensor, out: Tensor, mask: Tensor | None) -> Tensor:
        """Equation 1 of LASNet (arXiv 2210.06223): relu(shortcut + mask * out)."""
        identity = x if self.downsample is None else self.downsample(x)
        if mask is None:
            out = out + identity
        else:
            # One pass for "times mask, plus identity".
            out = torch.addcmul(identity, out, mask.to(out.dtype))
        return self.relu(out)
