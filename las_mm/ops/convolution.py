"""The three ops of the paper: convolutions at kept positions only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.library import register
from las_mm.ops.masks import (
    MASK_DTYPES,
    _dilate_mask_reference,
    _spatial_mask_fake,
    _spatial_mask_reference,
    ceil_div,
    check_map,
    check_stride,
    check_vector,
)
from las_mm.ops.packing import packed_numel, unpack_conv

CHANNELS_LAST = torch.channels_last


def check_packed(
    packed: Tensor, name: str, out: int, depth: int, taps: int, groups: int, like: Tensor
) -> None:
    """Raise ValueError unless ``packed`` is what ``pack_conv`` makes of this convolution."""
    numel = packed_numel(out, depth, taps, groups, like.dtype)
    if packed.dim() != 1 or packed.numel() != numel:
        raise ValueError(
            f"{name} must be packed by pack_conv for {depth} -> {out} channels, {taps} taps and "
            f"{groups} groups ({numel} values), got {list(packed.shape)}"
        )
    check_vector(packed, name, numel, like.dtype, like)


def check_mask(
    mask: Tensor, name: str, like: Tensor, size: Sequence[int], granularity: int
) -> None:
    """Raise ValueError unless ``mask`` covers ``size`` outputs of the images of ``like``."""
    if granularity <= 0:
        raise ValueError(f"granularity must be positive, got {granularity}")
    if mask.dtype not in MASK_DTYPES:
        raise ValueError(f"{name} must be bool, uint8 or floating point, got {mask.dtype}")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {mask.device}")
    shape = [like.shape[0], 1, ceil_div(size[0], granularity), ceil_div(size[1], granularity)]
    if list(mask.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape} ({size[0]}x{size[1]} outputs, granularity "
            f"{granularity}), got {list(mask.shape)}"
        )


def expand(mask: Tensor, name: str, size: Sequence[int], granularity: int) -> Tensor:
    """Decision per output position, bool (N, 1, H, W); ValueError if the mask is not finite."""
    if mask.is_floating_point() and not mask.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    rows = torch.arange(size[0], device=mask.device) // granularity
    columns = torch.arange(size[1], device=mask.device) // granularity
    return (mask > 0.5).index_select(2, rows).index_select(3, columns)


def convolve(
    x: Tensor, packed: Tensor, bias: Tensor, kernel: int, stride: int, dilation: int, groups: int
) -> Tensor:
    """A dense convolution of packed weights in float32, padding as in a ResNet."""
    depth = x.shape[1] // groups
    weight = unpack_conv(packed, bias.numel(), depth, kernel * kernel, groups)
    weight = weight.unflatten(2, (kernel, kernel)).float()
    dilation = min(dilation, max(x.shape[2:]))  # farther taps read only padding
    padding = dilation * (kernel // 2)
    return F.conv2d(x.float(), weight, bias, stride, padding, dilation, groups)


def conv_size(x: Tensor, stride: int) -> list[int]:
    """(H, W) after a padded convolution of ``stride``."""
    return [ceil_div(n, stride) for n in x.shape[2:]]


def empty_map(x: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """What a fake kernel returns for a map of features."""
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)


# masker_conv1x1 ----------------------------------------------------------------------------------


def _masker_conv1x1_check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> None:
    check_map(x, "x")
    check_vector(bias, "bias", bias.numel(), torch.float32, x)
    check_packed(weight, "weight", bias.numel(), x.shape[1], 1, 1, x)


def _masker_conv1x1_reference(
    x: Tensor,
    masker_weight: Tensor,
    masker_bias: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    strides: Sequence[int],
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _masker_conv1x1_check(x, weight, bias)
    mask, rates = _spatial_mask_reference(
        x, masker_weight, masker_bias, offset, granularity, strides, dilation, "masker_"
    )
    size = conv_size(x, strides[0])
    halo, _ = _dilate_mask_reference(mask, granularity, size, strides[1], dilation)
    hidden = convolve(x, weight, bias, 1, strides[0], 1, 1).relu()
    hidden = torch.where(halo, hidden, hidden.new_zeros(()))
    return mask, rates, hidden.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def _masker_conv1x1_fake(
    x: Tensor,
    masker_weight: Tensor,
    masker_bias: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    _masker_conv1x1_check(x, weight, bias)
    decided = _spatial_mask_fake(x, masker_weight, masker_bias, offset, *geometry, "masker_")
    _, strides, _ = geometry
    return (*decided, empty_map(x, bias.numel(), conv_size(x, strides[0])))


register(
    "masker_conv1x1(Tensor x, Tensor masker_weight, Tensor masker_bias, Tensor? offset, "
    "Tensor weight, Tensor bias, int granularity, int[2] strides, int dilation) "
    "-> (Tensor mask, Tensor rates, Tensor hidden)",
    _masker_conv1x1_reference,
    _masker_conv1x1_fake,
)


def masker_conv1x1(
    x: Tensor,
    masker_weight: Tensor,
    masker_bias: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    granularity: int = 1,
    strides: Sequence[int] = (1, 1),
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide per patch, then run conv1, its bias and ReLU where a kept output will read it.

    LASNet (arXiv 2210.06223), section 3.3, the fused masker-conv1x1. No gradient.

    Args:
        x: Block input, (N, C_in, H, W), float32 or bfloat16.
        masker_weight, masker_bias, offset, granularity, strides, dilation: See
            :func:`~las_mm.ops.spatial_mask`.
        weight: conv1's weight packed by :func:`~las_mm.ops.pack_conv`, dtype of ``x``.
        bias: conv1's bias, (M,), float32.

    Returns:
        Mask and rates as :func:`~las_mm.ops.spatial_mask` returns them, and the hidden map
        (N, M, ceil(H/strides[0]), ceil(W/strides[0])), zero where no kept output reads it.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    return torch.ops.las_mm.masker_conv1x1(
        x, masker_weight, masker_bias, offset, weight, bias, granularity, strides, dilation
    )


# gather_conv3x3 ----------------------------------------------------------------------------------


def _gather_conv3x3_check(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    stride: int,
    dilation: int,
    groups: int,
) -> list[int]:
    check_map(hidden, "hidden")
    check_stride(stride, "stride")
    if dilation <= 0:
        raise ValueError(f"dilation must be positive, got {dilation}")
    channels = hidden.shape[1]
    if groups <= 0 or channels % groups or bias.numel() % groups:
        raise ValueError(
            f"groups must be positive and divide {channels} input and {bias.numel()} output "
            f"channels, got {groups}"
        )
    check_vector(bias, "bias", bias.numel(), torch.float32, hidden)
    check_packed(weight, "weight", bias.numel(), channels // groups, 9, groups, hidden)
    size = conv_size(hidden, stride)
    check_mask(mask, "mask", hidden, size, granularity)
    return size


def _gather_conv3x3_reference(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    stride: int,
    dilation: int,
    groups: int,
) -> Tensor:
    size = _gather_conv3x3_check(hidden, mask, weight, bias, granularity, stride, dilation, groups)
    kept = expand(mask, "mask", size, granularity)
    out = convolve(hidden, weight, bias, 3, stride, dilation, groups).relu()
    out = torch.where(kept, out, out.new_zeros(()))
    return out.to(hidden.dtype).contiguous(memory_format=CHANNELS_LAST)


def _gather_conv3x3_fake(
    hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *geometry
) -> Tensor:
    size = _gather_conv3x3_check(hidden, mask, weight, bias, *geometry)
    return empty_map(hidden, bias.numel(), size)


register(
    "gather_conv3x3(Tensor hidden, Tensor mask, Tensor weight, Tensor bias, int granularity, "
    "int stride, int dilation, int groups) -> Tensor",
    _gather_conv3x3_reference,
    _gather_conv3x3_fake,
)


def gather_conv3x3(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    granularity: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """A 3x3 convolution (``padding == dilation``), its bias and ReLU at kept outputs only.

    LASNet (arXiv 2210.06223), section 3.3. No gradient.

    Args:
        hidden: (N, M, H, W), float32 or bfloat16.
        mask: Decision per patch, (N, 1, ceil(H_out/S), ceil(W_out/S)).
        weight: Packed by :func:`~las_mm.ops.pack_conv`, dtype of ``hidden``.
        bias: (M_out,), float32.
        granularity: S in output pixels.
        stride, dilation, groups: Of the convolution.

    Returns:
        (N, M_out, ceil(H/stride), ceil(W/stride)), zero at dropped outputs.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the mask is not finite.
    """
    return torch.ops.las_mm.gather_conv3x3(
        hidden, mask, weight, bias, granularity, stride, dilation, groups
    )


# conv1x1_scatter_add_ ----------------------------------------------------------------------------


def _conv1x1_scatter_add_check(
    residual: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, granularity: int
) -> None:
    check_map(residual, "residual", bias.numel())
    check_map(x, "x")
    if x.dtype != residual.dtype or x.device != residual.device:
        raise ValueError(
            f"x must be {residual.dtype} on {residual.device} as residual is, got {x.dtype} on "
            f"{x.device}"
        )
    if x.shape[0] != residual.shape[0] or x.shape[2:] != residual.shape[2:]:
        raise ValueError(
            f"x must have the images and size of residual {list(residual.shape)}, got "
            f"{list(x.shape)}"
        )
    check_vector(bias, "bias", residual.shape[1], torch.float32, x)
    check_packed(weight, "weight", bias.numel(), x.shape[1], 1, 1, x)
    check_mask(mask, "mask", x, x.shape[2:], granularity)


def _conv1x1_scatter_add_reference(
    residual: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, granularity: int
) -> None:
    _conv1x1_scatter_add_check(residual, x, mask, weight, bias, granularity)
    kept = expand(mask, "mask", x.shape[2:], granularity)
    out = (convolve(x, weight, bias, 1, 1, 1, 1) + residual.float()).relu()
    residual.copy_(torch.where(kept, out, residual.float()))


register(
    "conv1x1_scatter_add_(Tensor(a!) residual, Tensor x, Tensor mask, Tensor weight, Tensor bias, "
    "int granularity) -> ()",
    _conv1x1_scatter_add_reference,
    _conv1x1_scatter_add_check,
)


def conv1x1_scatter_add_(
    residual: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, granularity: int = 1
) -> Tensor:
    """Add a 1x1 convolution to ``residual`` at kept positions, in place, followed by ReLU.

    Dropped positions are left as they are. LASNet (arXiv 2210.06223), section 3.3. No gradient.

    Args:
        residual: (N, C, H, W), float32 or bfloat16; updated.
        x: (N, M, H, W), dtype of ``residual``.
        mask: Decision per patch, (N, 1, ceil(H/S), ceil(W/S)).
        weight: Packed by :func:`~las_mm.ops.pack_conv`, dtype of ``x``.
        bias: (C,), float32.
        granularity: S in pixels.

    Returns:
        ``residual``.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the mask is not finite.
    """
    torch.ops.las_mm.conv1x1_scatter_add_(residual, x, mask, weight, bias, granularity)
    return residual
