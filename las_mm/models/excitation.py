"""Squeeze-and-excitation inside a dynamic block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from las_mm.models.coverage import register

POOLS = ("kept", "all")


@register
class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507) that can leave dropped positions out.

    Equal to torchvision's module of the same name, parameter names included, where no mask drops
    anything.

    Args:
        channels: Channels of the map.
        squeeze: Channels between the two 1x1 convolutions.
        pool: What the map is averaged over: ``'kept'`` positions only, so that nothing else has to
            be computed, or ``'all'``, as the authors' code does, for which the whole map has to.

    Raises:
        ValueError: Unknown ``pool``, or a channel count that is not positive.
    """

    def __init__(self, channels: int, squeeze: int, pool: str = "kept") -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"se_pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if channels < 1 or squeeze < 1:
            raise ValueError(
                f"squeeze-and-excitation needs at least one channel, got {channels} and {squeeze}: "
                "use a larger se_ratio"
            )
        self.pool = pool
        self.fc1 = nn.Conv2d(channels, squeeze, kernel_size=1)
        self.fc2 = nn.Conv2d(squeeze, channels, kernel_size=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scale each channel of each image.

        Args:
            x: (N, C, H, W).
            mask: Kept positions, (N, 1, H, W) of zeros and ones, or one decision per image
                (N, 1, 1, 1); ``None``: all.

        Returns:
            (N, C, H, W). An image without kept positions is pooled to zeros.
        """
        # One decision per image drops all or nothing, and what is dropped is not read.
        if mask is None or self.pool == "all" or mask.shape[2:] != x.shape[2:]:
            pooled = x.mean(dim=(2, 3), keepdim=True)
        else:
            mask = mask.to(x.dtype)
            count = mask.sum(dim=(2, 3), keepdim=True, dtype=torch.float32).clamp(min=1)
            pooled = (x * mask).sum(dim=(2, 3), keepdim=True, dtype=torch.float32) / count
            pooled = pooled.to(x.dtype)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))

    def extra_repr(self) -> str:
        return f"pool={self.pool}"
