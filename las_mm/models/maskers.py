"""Maskers: small networks that decide, per image, which parts of a block are computed.

Geometry (exact for any size, DESIGN decision 3): a block's H_out x W_out output is cut into
ceil(H_out/S) x ceil(W_out/S) patches of S x S outputs; patches at the right and bottom edges may
be smaller. Where S divides the map this is the definition of LASNet, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gumbel_difference(reference: Tensor) -> Tensor:
    """The difference of two standard Gumbel variables, i.e. standard logistic noise.

    For two classes the Gumbel-softmax depends on the noise through this difference only.

    Args:
        reference: Gives shape and device.

    Returns:
        float32 noise shaped like ``reference``.
    """
    eps = torch.finfo(torch.float32).eps
    uniform = torch.rand(reference.shape, device=reference.device).clamp_(eps, 1 - eps)
    return torch.log(uniform) - torch.log1p(-uniform)


class SpatialMasker(nn.Module):
    """Decides per patch: average pool to the patch grid, then a 1x1 convolution to two logits.

    Training draws a hard Gumbel-softmax sample with straight-through gradients; in eval mode a
    patch is kept where logit 0 >= logit 1. LASNet (arXiv 2210.06223), section 3.2, equation 4.

    Args:
        in_channels: Channels of the block input that the masker reads.
        keep_bias: Initial bias of the "keep" logit. The default lets 99.3 % of all patches
            through, so a network loaded from static weights starts as (almost) that network.

    Attributes:
        temperature: Gumbel-softmax temperature tau, set by ``TemperatureHook``.
        noise: Scale of the Gumbel noise, set by ``TemperatureHook``; 1 is the papers' sampling,
            0 decides in training as in eval mode.
        offset: Added to the difference of the logits, (N or 1, 1, h, w) or ``None``; an infinite
            value forces the decision of a patch while the masker still does (and costs) its work.
            A tool for benchmarks and pictures, so it is in no checkpoint.
    """

    def __init__(self, in_channels: int, keep_bias: float = 5.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2, kernel_size=1)
        self.keep_bias = keep_bias
        self.temperature = 1.0
        self.noise = 1.0
        self.offset: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to "mostly on", whatever the scale of the features."""
        nn.init.normal_(self.conv.weight, std=0.01)
        with torch.no_grad():
            self.conv.bias.copy_(self.conv.bias.new_tensor([self.keep_bias, 0.0]))

    def logits(self, x: Tensor, patch: int | None) -> Tensor:
        """Logits of the patch grid.

        Args:
            x: Block input, (N, C, H, W).
            patch: Side of a patch in *input* pixels, i.e. S times the block's stride; ``None``
                pools the whole map (layer mode).

        Returns:
            float32 logits, (N, 2, ceil(H/patch), ceil(W/patch)), or (N, 2, 1, 1).
        """
        if patch is None:
            pooled = x.mean(dim=(2, 3), keepdim=True)
        elif patch == 1:
            pooled = x
        else:
            # Ragged edge patches average over their real pixels only.
            pooled = F.avg_pool2d(x, patch, patch, ceil_mode=True, count_include_pad=False)
        return self.conv(pooled).float()

    def forward(self, x: Tensor, patch: int | None) -> Tensor:
        """The decision per patch, see :meth:`logits`: (N, 1, h, w) float32 of zeros and ones."""
        logits = self.logits(x, patch)
        keep = logits[:, :1] - logits[:, 1:]
        if self.offset is not None:
            keep = keep + self.offset.to(keep)
        if not self.training:
            return (keep >= 0).float()
        keep = keep + self.noise * gumbel_difference(keep)
        hard = (keep >= 0).float()
        soft = torch.sigmoid(keep / self.temperature)
        return hard + (soft - soft.detach())

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.4g}"


def expand_mask(mask: Tensor, granularity: int, size: tuple[int, int]) -> Tensor:
    """Repeat each patch decision over its S x S outputs and cut the ragged edge.

    Args:
        mask: (N, 1, ceil(H/S), ceil(W/S)).
        granularity: S.
        size: (H, W) of the output map.

    Returns:
        (N, 1, H, W), differentiable in ``mask``.
    """
    if granularity != 1:
        mask = F.interpolate(mask, scale_factor=granularity, mode="nearest")
    return mask[:, :, : size[0], : size[1]]


def dilate_mask(mask: Tensor, size: tuple[int, int], stride: int, dilation: int) -> Tensor:
    """The input positions that a padded 3x3 convolution reads for the kept outputs.

    Args:
        mask: Kept outputs, (N, 1, ceil(H/stride), ceil(W/stride)).
        size: (H, W) of the convolution's input.
        stride: Stride of the convolution.
        dilation: Its dilation, equal to its padding.

    Returns:
        (N, 1, H, W) of zeros and ones, differentiable in ``mask``.
    """
    if stride != 1:
        spread = mask.new_zeros(mask.shape[0], 1, *size)
        spread[:, :, ::stride, ::stride] = mask  # output o sits at input position stride * o
        mask = spread
    if dilation == 1:
        return F.max_pool2d(mask, 3, stride=1, padding=1)
    # max_pool2d's own padding is limited to half the undilated kernel.
    return F.max_pool2d(F.pad(mask, [dilation] * 4), 3, stride=1, dilation=dilation)
