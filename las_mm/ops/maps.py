"""Ops on whole maps: the stem before the first block, the memory format after the last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.convolution import CHANNELS_LAST, check_packed, empty_map
from las_mm.ops.library import register
from las_mm.ops.masks import ceil_div, check_map, check_vector
from las_mm.ops.packing import unpack_conv

STEM_KERNEL = 7

# conv_pool_stem ----------------------------------------------------------------------------------


def _conv_pool_stem_check(x: Tensor, weight: Tensor, bias: Tensor) -> list[int]:
    check_map(x, "x")
    check_vector(bias, "bias", bias.numel(), torch.float32, x)
    depth = x.shape[1] * STEM_KERNEL
    check_packed(weight, "weight", bias.numel(), depth, STEM_KERNEL, 1, x)
    return [ceil_div(ceil_div(n, 2), 2) for n in x.shape[2:]]


def _conv_pool_stem_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _conv_pool_stem_check(x, weight, bias)
    rows = unpack_conv(weight, bias.numel(), STEM_KERNEL * x.shape[1], STEM_KERNEL, 1)
    kernel = rows.unflatten(1, (STEM_KERNEL, -1)).permute(0, 2, 3, 1).float()
    out = F.conv2d(x.float(), kernel, bias, stride=2, padding=STEM_KERNEL // 2).relu()
    out = F.max_pool2d(out, 3, stride=2, padding=1)
    return out.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def _conv_pool_stem_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return empty_map(x, bias.numel(), _conv_pool_stem_check(x, weight, bias))


register(
    "conv_pool_stem(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _conv_pool_stem_reference,
    _conv_pool_stem_fake,
)


def conv_pool_stem(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ResNet's stem in one pass: 7x7 convolution of stride 2, bias, ReLU, 3x3 max pool of stride 2.

    Args:
        x: Images, (N, C_in, H, W), float32 or bfloat16.
        weight: The 7x7 kernel packed by :func:`~las_mm.ops.pack_stem`, dtype of ``x``.
        bias: (C,), float32.

    Returns:
        (N, C, H_out, W_out), the size halved twice, each time rounded up.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    return torch.ops.las_mm.conv_pool_stem(x, weight, bias)


# to_nchw -----------------------------------------------------------------------------------------


def _to_nchw_reference(x: Tensor) -> Tensor:
    check_map(x, "x")
    return x.clone(memory_format=torch.contiguous_format)


def _to_nchw_fake(x: Tensor) -> Tensor:
    check_map(x, "x")
    return x.new_empty(x.shape)


register("to_nchw(Tensor x) -> Tensor", _to_nchw_reference, _to_nchw_fake)


def to_nchw(x: Tensor) -> Tensor:
    """Copy a channels_last map into contiguous memory, faster than ``Tensor.contiguous`` does.

    Args:
        x: (N, C, H, W), float32 or bfloat16.

    Returns:
        The same values, contiguous.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    return torch.ops.las_mm.to_nchw(x)
