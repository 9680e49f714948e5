"""Masks: the decision of a masker, and the area that a mask makes a block compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.library import register

LAYER = 1 << 30
"""Granularity of a block that decides for the whole image (layer mode)."""

MAX_STRIDE = 1 << 15  # products of strides and sizes stay in range

MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def ceil_div(numerator: int, denominator: int) -> int:
    """Rounded up, for positive arguments."""
    return -(-numerator // denominator)


def _dilate_mask_check(
    mask: Tensor, granularity: int, size: Sequence[int], stride: int, dilation: int
) -> tuple[int, int]:
    """Raise ValueError as ops/common/checks.h does; return the (H, W) of the outputs."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask must have shape (N, 1, h, w), got {list(mask.shape)}")
    if mask.dtype not in MASK_DTYPES:
        raise ValueError(f"mask must be bool, uint8 or floating point, got {mask.dtype}")
    if granularity <= 0:
        raise ValueError(f"granularity must be positive, got {granularity}")
    if len(size) != 2 or size[0] <= 0 or size[1] <= 0:
        raise ValueError(f"size must be a positive (height, width), got {list(size)}")
    if stride <= 0:
        raise ValueError(f"stride must be positive, got {stride}")
    if dilation <= 0:
        raise ValueError(f"dilation must be positive, got {dilation}")
    out_h, out_w = ceil_div(size[0], stride), ceil_div(size[1], stride)
    grid_h, grid_w = ceil_div(out_h, granularity), ceil_div(out_w, granularity)
    if mask.shape[2] != grid_h or mask.shape[3] != grid_w:
        raise ValueError(
            f"mask must cover {out_h}x{out_w} outputs with a grid of {grid_h}x{grid_w} patches "
            f"(granularity {granularity}), got {mask.shape[2]}x{mask.shape[3]}"
        )
    return out_h, out_w


def _dilate_mask_reference(
    mask: Tensor, granularity: int, size: Sequence[int], stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    out_h, out_w = _dilate_mask_check(mask, granularity, size, stride, dilation)
    rows = torch.arange(out_h, device=mask.device) // granularity
    columns = torch.arange(out_w, device=mask.device) // granularity
    kept = (mask > 0.5).index_select(2, rows).index_select(3, columns)
    halo = kept.new_zeros((mask.shape[0], 1, *size))
    halo[:, :, ::stride, ::stride] = kept  # output o sits at position stride * o
    reach = min(dilation, max(size))  # farther taps read only padding
    padded = F.pad(halo, (0, 0, reach, reach))
    halo = padded[:, :, : -2 * reach] | halo | padded[:, :, 2 * reach :]
    padded = F.pad(halo, (reach, reach))
    halo = padded[..., : -2 * reach] | halo | padded[..., 2 * reach :]
    return halo, torch.stack([kept.sum((1, 2, 3)), halo.sum((1, 2, 3))], dim=1)


def _dilate_mask_fake(
    mask: Tensor, granularity: int, size: Sequence[int], stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    _dilate_mask_check(mask, granularity, size, stride, dilation)
    images = mask.shape[0]
    return (
        mask.new_empty((images, 1, *size), dtype=torch.bool),
        mask.new_empty((images, 2), dtype=torch.int64),
    )


register(
    "dilate_mask(Tensor mask, int granularity, SymInt[2] size, int stride, int dilation) "
    "-> (Tensor halo, Tensor counts)",
    _dilate_mask_reference,
    _dilate_mask_fake,
)


def dilate_mask(
    mask: Tensor, granularity: int, size: Sequence[int], stride: int = 1, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """Which positions of conv1's output a block needs, and how many: the exact areas, in one pass.

    Equals ``maskers.dilate_mask(maskers.expand_mask(mask, ...), ...)``, the differentiable path
    of training; this op is the path of inference and has no gradient. A 3x3 convolution with
    ``padding == dilation`` turns H x W positions into ceil(H/stride) x ceil(W/stride) outputs;
    the mask keeps or drops these in patches of S x S, ragged at the right and bottom edges.
    LASNet (arXiv 2210.06223), section 3.2.

    Args:
        mask: Decision per patch, (N, 1, ceil(H_out/S), ceil(W_out/S)); bool, uint8 or floating
            point. A patch is kept where the value is above 0.5, so NaN drops it.
        granularity: S, in output pixels. At least max(H_out, W_out) means one decision per image.
        size: (H, W) of the convolution's input.
        stride: Stride of the convolution.
        dilation: Its dilation, equal to its padding.

    Returns:
        A bool tensor (N, 1, H, W), true where a kept output reads the position, and an int64
        tensor (N, 2): per image the number of kept outputs and of true positions.

    Raises:
        ValueError: An argument is not positive, the mask has a wrong shape or dtype, or its grid
            does not fit ``size``, ``stride`` and ``granularity``.
    """
    return torch.ops.las_mm.dilate_mask(mask, granularity, size, stride, dilation)


# spatial_mask ------------------------------------------------------------------------------------


def supports(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the ops compute in ``dtype`` there; float16 has no arithmetic on CPUs."""
    half = dtype == torch.float16 and device_type == "cuda"
    return half or dtype in (torch.float32, torch.bfloat16)


def check_dtype(x: Tensor, name: str) -> None:
    """Raise ValueError unless the ops compute in the dtype of ``x`` on its device."""
    if not supports(x.dtype, x.device.type):
        raise ValueError(
            f"{name} must be float32 or bfloat16 (on a GPU also float16), got {x.dtype}"
        )


def check_map(x: Tensor, name: str, channels: int | None = None) -> None:
    """Raise ValueError unless ``x`` is a (N, C, H, W) map that the ops compute on, none empty."""
    if x.dim() != 4 or min(x.shape[1:]) <= 0:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {list(x.shape)}")
    check_dtype(x, name)
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]}")


def check_channel_mask(channel_mask: Tensor, x: Tensor, width: int) -> None:
    """Raise ValueError unless ``channel_mask`` decides about ``width`` channels of the images."""
    shape = channel_mask.shape
    if len(shape) != 2 or shape[0] != x.shape[0] or shape[1] <= 0 or width % shape[1]:
        raise ValueError(
            f"channel_mask must have shape ({x.shape[0]}, k) with k dividing {width} channels, "
            f"got {list(shape)}"
        )
    if channel_mask.dtype not in MASK_DTYPES:
        raise ValueError(
            f"channel_mask must be bool, uint8 or floating point, got {channel_mask.dtype}"
        )
    if channel_mask.device != x.device:
        raise ValueError(f"channel_mask must be on {x.device}, got {channel_mask.device}")


def check_vector(v: Tensor, name: str, size: int, dtype: torch.dtype, like: Tensor) -> None:
    """Raise ValueError unless ``v`` is (size,) of ``dtype`` on the device of ``like``."""
    if list(v.shape) != [size]:
        raise ValueError(f"{name} must have shape [{size}], got {list(v.shape)}")
    check_kind(v, name, dtype, like)


def check_kind(v: Tensor, name: str, dtype: torch.dtype, like: Tensor) -> None:
    """Raise ValueError unless ``v`` has ``dtype`` and lies on the device of ``like``."""
    if v.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {v.dtype}")
    if v.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {v.device}")


def check_stride(stride: int, name: str) -> None:
    """Raise ValueError unless ``stride`` is 1 to :data:`MAX_STRIDE`."""
    if not 0 < stride <= MAX_STRIDE:
        raise ValueError(f"{name} must be 1 to {MAX_STRIDE}, got {stride}")


def check_strides(strides: Sequence[int], dilation: int) -> None:
    """Raise ValueError unless the block's strides and dilation are positive and sane."""
    if len(strides) != 2:
        raise ValueError(f"strides must be (stride of conv1, stride of conv2), got {list(strides)}")
    for stride in strides:
        check_stride(stride, "strides")
    if dilation <= 0:
        raise ValueError(f"dilation must be positive, got {dilation}")


def _spatial_mask_check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    prefix: str = "",
) -> tuple[list[int], list[int]]:
    """Return the size of conv1's output and of the patch grid."""
    check_map(x, "x")
    if weight.numel() != 2 * x.shape[1]:
        raise ValueError(
            f"{prefix}weight must have shape [2, {x.shape[1]}, 1, 1], got {list(weight.shape)}"
        )
    check_kind(weight, f"{prefix}weight", x.dtype, x)
    check_vector(bias, f"{prefix}bias", 2, x.dtype, x)
    if granularity <= 0:
        raise ValueError(f"granularity must be positive, got {granularity}")
    check_strides(strides, dilation)
    size = [ceil_div(n, strides[0]) for n in x.shape[2:]]
    grid = [ceil_div(ceil_div(n, strides[1]), granularity) for n in size]
    if offset is not None:
        fits = offset.dim() == 4 and offset.shape[0] in (1, x.shape[0])
        if not fits or list(offset.shape[1:]) != [1, *grid]:
            raise ValueError(
                f"offset must have shape (1 or {x.shape[0]}, 1, {grid[0]}, {grid[1]}), got "
                f"{list(offset.shape)}"
            )
        if offset.dtype != torch.float32:
            raise ValueError(f"offset must be float32, got {offset.dtype}")
        if offset.device != x.device:
            raise ValueError(f"offset must be on {x.device}, got {offset.device}")
    return size, grid


def _spatial_mask_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    prefix: str = "",
) -> tuple[Tensor, Tensor]:
    size, grid = _spatial_mask_check(
        x, weight, bias, offset, granularity, strides, dilation, prefix
    )
    difference = weight.float().view(2, -1)
    # The masker is linear: one map of per-position scores, pooled afterwards, is the same.
    scores = torch.einsum("nchw,c->nhw", x.float(), difference[0] - difference[1])[:, None]
    patch = min(granularity * strides[0] * strides[1], max(x.shape[2:]))
    keep = F.avg_pool2d(scores, patch, ceil_mode=True, count_include_pad=False)
    keep = keep[:, :, : grid[0], : grid[1]] + (bias[0].float() - bias[1].float())
    if offset is not None:
        keep = keep + offset
    mask = keep >= 0
    _, counts = _dilate_mask_reference(mask, granularity, size, strides[1], dilation)
    outputs = [ceil_div(n, strides[1]) for n in size]
    areas = counts.new_tensor([outputs[0] * outputs[1], size[0] * size[1]]).double()
    return mask, (counts / areas).sum(dim=0).div(max(x.shape[0], 1)).float()


def _spatial_mask_fake(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    _, grid = _spatial_mask_check(x, *arguments)
    mask = x.new_empty((x.shape[0], 1, *grid), dtype=torch.bool)
    return mask, x.new_empty((2,), dtype=torch.float32)


register(
    "spatial_mask(Tensor x, Tensor weight, Tensor bias, Tensor? offset, int granularity, "
    "int[2] strides, int dilation) -> (Tensor mask, Tensor rates)",
    _spatial_mask_reference,
    _spatial_mask_fake,
)


def _patch_mask_default(*arguments: Any) -> Tensor:
    return torch.ops.las_mm.spatial_mask(*arguments)[0]


# Without the rates, which a GPU counts in launches of their own.
register(
    "patch_mask(Tensor x, Tensor weight, Tensor bias, Tensor? offset, int granularity, "
    "int[2] strides, int dilation) -> Tensor mask",
    _patch_mask_default,
    lambda *arguments: _spatial_mask_fake(*arguments)[0],
)


def spatial_mask(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None = None,
    granularity: int = 1,
    strides: Sequence[int] = (1, 1),
    dilation: int = 1,
) -> tuple[Tensor, Tensor]:
    """Decide per patch in one pass over the features, as ``SpatialMasker`` does in eval mode.

    A patch is kept where the mean of ``x`` over its real input pixels gives logit 0 >= logit 1.
    LASNet (arXiv 2210.06223), section 3.2. This op has no gradient.

    Args:
        x: Block input, (N, C, H, W), float32 or bfloat16.
        weight: Weight of the masker's 1x1 convolution, (2, C, 1, 1), dtype of ``x``.
        bias: Its bias, (2,), dtype of ``x``.
        offset: Added to the difference of the logits, float32, (N or 1, 1, h, w); an infinite
            value forces the decision.
        granularity: S in output pixels; :data:`LAYER` decides for the whole image.
        strides: Strides of conv1 and conv2.
        dilation: Dilation of conv2, which decides how far conv1 has to reach.

    Returns:
        The mask, bool, (N, 1, h, w), and float32 (2,): the mean over the images of the share of
        outputs that are kept, and of conv1's outputs that these read.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    return torch.ops.las_mm.spatial_mask(x, weight, bias, offset, granularity, strides, dilation)
