"""Weights in the order in which the kernels read them, the same for every instruction set."""

from __future__ import annotations

import torch
from torch import Tensor

from las_mm.compat import register_fake
from las_mm.ops.library import LIBRARY
from las_mm.ops.masks import ceil_div, check_dtype

PANEL = 64  # output channels that a kernel computes together: four AVX-512 registers
LANES = 16  # the last panel of a group is rounded up to this


def panel_columns(out_channels: int) -> int:
    """Output channels of one group after rounding up the last panel."""
    return ceil_div(out_channels, LANES) * LANES


def packed_numel(
    out_channels: int, in_channels: int, taps: int, groups: int, dtype: torch.dtype
) -> int:
    """Values of a packed convolution.

    Args:
        out_channels: Of all groups.
        in_channels: Of one group.
        taps: Kernel positions, e.g. 9.
        groups: Groups of the convolution.
        dtype: float32, or one of 16 bits, whose input channels are packed in pairs.
    """
    depth = in_channels if dtype == torch.float32 else 2 * ceil_div(in_channels, 2)
    return groups * taps * depth * panel_columns(out_channels // groups)


def _pack_conv_check(weight: Tensor, groups: int) -> None:
    if weight.dim() != 4 or min(weight.shape) <= 0:
        raise ValueError(f"weight must have shape (O, I, kh, kw), got {list(weight.shape)}")
    check_dtype(weight, "weight")
    if groups <= 0 or weight.shape[0] % groups:
        raise ValueError(
            f"groups must be positive and divide {weight.shape[0]} output channels, got {groups}"
        )


def _pack_conv_reference(weight: Tensor, groups: int) -> Tensor:
    _pack_conv_check(weight, groups)
    out, depth = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, out, depth, -1).permute(0, 3, 2, 1)  # (g, tap, k, column)
    columns = panel_columns(out)
    odd = depth % 2 if weight.dtype != torch.float32 else 0
    grouped = torch.nn.functional.pad(grouped, (0, columns - out, 0, odd))
    pieces = []
    for group in grouped:
        for start in range(0, columns, PANEL):
            panel = group[..., start : start + PANEL]
            if weight.dtype != torch.float32:  # pairs of input channels lie side by side
                panel = panel.unflatten(1, (-1, 2)).transpose(2, 3)
            pieces.append(panel.reshape(-1))
    return torch.cat(pieces)


def unpack_conv(
    packed: Tensor, out_channels: int, in_channels: int, taps: int, groups: int
) -> Tensor:
    """The inverse of :func:`pack_conv`: (O, I, taps); for the reference implementations."""
    out = out_channels // groups
    pairs = packed.dtype != torch.float32
    depth = 2 * ceil_div(in_channels, 2) if pairs else in_channels
    weights = []
    for group in packed.view(groups, -1):
        panels, start = [], 0
        for first in range(0, panel_columns(out), PANEL):
            columns = min(PANEL, panel_columns(out) - first)
            panel = group[start : start + taps * depth * columns]
            start += panel.numel()
            if pairs:
                panel = panel.view(taps, depth // 2, columns, 2).transpose(2, 3)
            panels.append(panel.reshape(taps, depth, columns))
        weights.append(torch.cat(panels, dim=2)[:, :in_channels, :out].permute(2, 1, 0))
    return torch.cat(weights)


LIBRARY.define("pack_conv(Tensor weight, int groups) -> Tensor")
LIBRARY.impl("pack_conv", _pack_conv_reference, "CompositeExplicitAutograd")


@register_fake("las_mm::pack_conv", lib=LIBRARY)
def _pack_conv_fake(weight: Tensor, groups: int) -> Tensor:
    _pack_conv_check(weight, groups)
    out, depth, height, width = weight.shape
    return weight.new_empty(packed_numel(out, depth, height * width, groups, weight.dtype))


def pack_conv(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack the weight of a convolution for the sparse kernels.

    The order is group, panel of 64 output channels, kernel position, input channel (16-bit types:
    pair of input channels), output channel (of the pair). The last panel of a group is
    padded with zeros to a multiple of 16 output channels, an odd last pair with a zero.

    Args:
        weight: (C_out, C_in / groups, kh, kw), float32 or bfloat16, on a GPU also float16.
        groups: Groups of the convolution.

    Returns:
        One dimension, dtype of ``weight``.

    Raises:
        ValueError: Wrong shape or dtype, or ``groups`` does not divide C_out.
    """
    return torch.ops.las_mm.pack_conv(weight, groups)


def pack_winograd(weight: Tensor) -> Tensor:
    """Transform a 3x3 kernel for F(2x2, 3x3) (arXiv 1509.09308, section 4.1) and pack it.

    Two rows by two columns of outputs then cost 16 multiplications in place of 36.

    Args:
        weight: (C_out, C_in, 3, 3), float32.

    Returns:
        :func:`pack_conv` of the 4x4 transformed kernel.

    Raises:
        ValueError: Not a float32 3x3 kernel.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.dtype != torch.float32:
        raise ValueError(
            f"weight must be float32 (C_out, C_in, 3, 3), got {weight.dtype} {list(weight.shape)}"
        )
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
    # Panels are independent of each other; one at a time keeps the intermediates small.
    return torch.cat(
        [
            pack_conv(torch.einsum("ia,ocab,jb->ocij", g, panel.double(), g).float())
            for panel in weight.split(PANEL)
        ]
    )


def unpack_winograd(packed: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """The inverse of :func:`pack_winograd`: (O, I, 3, 3); for the reference implementations."""
    transformed = unpack_conv(packed, out_channels, in_channels, 16, 1).unflatten(2, (4, 4))
    inverse = packed.new_tensor([[1, 0, 0, 0], [0, 1, -1, 0], [0, 0, 0, 1]])
    return torch.einsum("ia,ocab,jb->ocij", inverse, transformed, inverse)


def pack_stem(weight: Tensor) -> Tensor:
    """Pack a stem convolution so that one kernel row of all input channels is one run of memory.

    Args:
        weight: (C_out, C_in, kh, kw), float32 or bfloat16.

    Returns:
        :func:`pack_conv` of the kernel seen as kh taps of kw * C_in channels.
    """
    _pack_conv_check(weight, 1)
    out, depth, height, width = weight.shape
    rows = weight.permute(0, 3, 1, 2).reshape(out, width * depth, height, 1)
    return pack_conv(rows)
