"""A convolution of a whole map with packed weights, for what stands around a dynamic backbone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from las_mm.ops.basic import check_conv3x3, convolve3x3
from las_mm.ops.convolution import CHANNELS_LAST, check_packed, conv_size, convolve, empty_map
from las_mm.ops.library import register
from las_mm.ops.masks import check_map, check_stride, check_vector
from las_mm.ops.packing import pack_conv, pack_winograd


class ConvPack(NamedTuple):
    """A convolution; :func:`pack_conv2d` makes it, once.

    Attributes:
        weight: Packed by :func:`~las_mm.ops.pack_conv`; empty if ``winograd`` has it.
        winograd: Packed by :func:`~las_mm.ops.pack_winograd`, or empty.
        bias: (C_out,), float32.
        kernel: 1, or 3 with a padding of ``dilation``.
        stride: Of the convolution.
        dilation: Of the convolution.
    """

    weight: Tensor
    winograd: Tensor
    bias: Tensor
    kernel: int
    stride: int = 1
    dilation: int = 1


def pack_conv2d(
    kernel: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    *,
    winograd: bool = True,
) -> ConvPack:
    """Pack a convolution for :func:`packed_conv2d`.

    Args:
        kernel: Its weight, (C_out, C_in, 1, 1) or (C_out, C_in, 3, 3), float32 or bfloat16.
        bias: (C_out,); ``None``: zero.
        stride: Of the convolution.
        dilation: Of the convolution; a 3x3 one is padded by as much.
        winograd: Whether to take the Winograd form where there is one: float32, 3x3, stride and
            dilation 1.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    if kernel.dim() != 4 or kernel.shape[2] != kernel.shape[3] or kernel.shape[2] not in (1, 3):
        raise ValueError(
            f"kernel must have shape (O, I, 1, 1) or (O, I, 3, 3), got {list(kernel.shape)}"
        )
    side = kernel.shape[2]
    empty = kernel.new_empty(0)
    tiled = winograd and kernel.dtype == torch.float32 and side == 3 and stride == dilation == 1
    return ConvPack(
        weight=empty if tiled else pack_conv(kernel),
        winograd=pack_winograd(kernel) if tiled else empty.float(),
        bias=kernel.new_zeros(len(kernel)).float() if bias is None else bias.float(),
        kernel=side,
        stride=stride,
        dilation=dilation,
    )


def _check(
    x: Tensor,
    weight: Tensor,
    winograd: Tensor,
    bias: Tensor,
    kernel: int,
    stride: int,
    dilation: int,
) -> None:
    """Raise ValueError as ops/common/arguments.cpp does."""
    check_map(x, "x")
    if kernel not in (1, 3):
        raise ValueError(f"kernel must be 1 or 3, got {kernel}")
    check_stride(stride, "stride")
    if dilation <= 0:
        raise ValueError(f"dilation must be positive, got {dilation}")
    check_vector(bias, "bias", bias.numel(), torch.float32, x)
    if kernel == 3:
        tiled = stride == dilation == 1
        check_conv3x3(x, [weight], [winograd], 0, x.shape[1], bias.numel(), tiled)
        return
    if winograd.numel():
        raise ValueError("winograd[0] must be empty for a 1x1 convolution")
    check_packed(weight, "weights[0]", bias.numel(), x.shape[1], 1, 1, x)


def _reference(
    x: Tensor,
    weight: Tensor,
    winograd: Tensor,
    bias: Tensor,
    kernel: int,
    stride: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    _check(x, weight, winograd, bias, kernel, stride, dilation)
    if kernel == 3:
        out = convolve3x3(x.float(), [weight], [winograd], 0, bias, stride, dilation)
    else:
        out = convolve(x, weight, bias, 1, stride, 1, 1)
    out = out.relu() if relu else out
    return out.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def _fake(x: Tensor, weight: Tensor, winograd: Tensor, bias: Tensor, *geometry) -> Tensor:
    _check(x, weight, winograd, bias, *geometry[:3])
    return empty_map(x, bias.numel(), conv_size(x, geometry[1]))


register(
    "packed_conv2d(Tensor x, Tensor weight, Tensor winograd, Tensor bias, int kernel, int stride, "
    "int dilation, bool relu) -> Tensor",
    _reference,
    _fake,
)


def packed_conv2d(x: Tensor, pack: ConvPack, relu: bool = False) -> Tensor:
    """A 1x1 or 3x3 convolution and its bias, optionally followed by ReLU. No gradient.

    Args:
        x: (N, C_in, H, W), float32 or bfloat16.
        pack: The convolution.
        relu: Whether ReLU follows.

    Returns:
        (N, C_out, ceil(H/stride), ceil(W/stride)), channels_last.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    return torch.ops.las_mm.packed_conv2d(x, *pack, relu)
