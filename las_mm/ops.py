"""The ops of ``las_mm::``: schemas, reference implementations, fake kernels, public functions.

The reference implementation of an op is plain PyTorch and registered for every back end; a native
kernel (ops/, built as ``las_mm._C``) takes precedence where the dispatcher has one. Importing this
module loads the extension, or says once why the reference implementations run instead.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

__all__ = ["dilate_mask", "native_available"]

_LIBRARY = torch.library.Library("las_mm", "DEF")
_BUILD_COMMAND = "pip install -e . --no-build-isolation"
_MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def _load_native() -> bool:
    """Import ``las_mm._C``, which registers the native kernels; log the reason if it fails."""
    try:
        importlib.import_module("las_mm._C")
    except ModuleNotFoundError as error:
        if error.name != "las_mm._C":
            raise
        print_log(
            "las_mm: the native ops are not built, their (slower) PyTorch reference "
            f"implementations run; build them with `{_BUILD_COMMAND}` in the las_mm checkout.",
            logger="current",
            level=logging.WARNING,
        )
        return False
    except (ImportError, OSError) as error:  # typically built against another torch
        print_log(
            f"las_mm: the native ops are built but CANNOT BE LOADED: {error}. The (slower) PyTorch "
            f"reference implementations run. Rebuild against torch {torch.__version__} with "
            f"`{_BUILD_COMMAND}` in the las_mm checkout.",
            logger="current",
            level=logging.ERROR,
        )
        return False
    return True


def native_available() -> bool:
    """Whether the native kernels are loaded; if not, the reference implementations run."""
    return _NATIVE


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


# dilate_mask -------------------------------------------------------------------------------------


def _dilate_mask_check(
    mask: Tensor, granularity: int, size: Sequence[int], stride: int, dilation: int
) -> tuple[int, int]:
    """Raise ValueError as ops/common/checks.h does; return the (H, W) of the outputs."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"mask must have shape (N, 1, h, w), got {list(mask.shape)}")
    if mask.dtype not in _MASK_DTYPES:
        raise ValueError(f"mask must be bool, uint8 or floating point, got {mask.dtype}")
    if granularity <= 0:
        raise ValueError(f"granularity must be positive, got {granularity}")
    if len(size) != 2 or size[0] <= 0 or size[1] <= 0:
        raise ValueError(f"size must be a positive (height, width), got {list(size)}")
    if stride <= 0:
        raise ValueError(f"stride must be positive, got {stride}")
    if dilation <= 0:
        raise ValueError(f"dilation must be positive, got {dilation}")
    out_h, out_w = _ceil_div(size[0], stride), _ceil_div(size[1], stride)
    grid_h, grid_w = _ceil_div(out_h, granularity), _ceil_div(out_w, granularity)
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


_LIBRARY.define(
    "dilate_mask(Tensor mask, int granularity, SymInt[2] size, int stride, int dilation) "
    "-> (Tensor halo, Tensor counts)"
)
_LIBRARY.impl("dilate_mask", _dilate_mask_reference, "CompositeExplicitAutograd")
torch.library.register_fake("las_mm::dilate_mask", _dilate_mask_fake, lib=_LIBRARY)


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


_NATIVE = _load_native()
