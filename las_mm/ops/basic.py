"""A basic block (two 3x3 convolutions and a shortcut) as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.bottleneck import check_in_place, check_shortcut_map
from las_mm.ops.convolution import (
    CHANNELS_LAST,
    check_mask,
    check_packed,
    conv_size,
    convolve,
    empty_map,
    expand,
)
from las_mm.ops.library import register
from las_mm.ops.masks import check_kind, check_map, check_stride, check_vector
from las_mm.ops.packing import pack_conv, pack_winograd, unpack_winograd

_SCHEMA = (
    "Tensor? mask, Tensor? shortcut, Tensor[] weights, Tensor[] biases, Tensor[] winograd, "
    "Tensor[] dense, int[3] geometry, float[2] plan"
)


class BasicPack(NamedTuple):
    """The convolutions of a basic block, of conv1, conv2 and, where there is one, the shortcut's.

    :func:`pack_basic` makes it, once; :func:`sparse_basic` checks that it fits.

    Attributes:
        weights: Packed by :func:`~las_mm.ops.pack_conv`; those of conv1 and conv2 may be empty if
            ``winograd`` has them.
        biases: float32, with BN folded in.
        winograd: Empty, or conv1's and conv2's weights packed by
            :func:`~las_mm.ops.pack_winograd`, each may be empty; float32, stride and dilation 1.
        dense: Empty, or all weights as they are, for dense convolutions.
        stride: Of conv1 (and the downsample convolution).
        dilation: Dilation and padding of conv1; conv2 has 1.
        winograd_cost: Time of a multiplication in the Winograd form relative to the direct form;
            decides which of the two serves a mask that cuts through 2x2 tiles.
        dense_above: If ``dense`` is given, dense convolutions run where a larger share of the
            outputs is kept.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    winograd: Sequence[Tensor] = ()
    dense: Sequence[Tensor] = ()
    stride: int = 1
    dilation: int = 1
    winograd_cost: float = 1.0
    dense_above: float = 1.0


def pack_basic(
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int = 1,
    dilation: int = 1,
    *,
    direct: bool = True,
    winograd: bool = True,
    dense: bool = False,
    winograd_cost: float = 1.0,
    dense_above: float = 1.0,
) -> BasicPack:
    """Pack a basic block for :func:`sparse_basic`.

    Args:
        kernels: Weights of conv1 (C, C_in, 3, 3), conv2 (C_out, C, 3, 3) and, where the block has
            one, the downsample convolution (C_out, C_in, 1, 1), BN folded in; float32 or bfloat16.
        biases: Their biases.
        stride: Of conv1 and the downsample convolution.
        dilation: Of conv1.
        direct: Whether to keep the direct form of a convolution that has a Winograd form too.
        winograd: Whether to make the Winograd form where there is one: float32, stride and
            dilation 1.
        dense: Whether to keep the weights for dense convolutions.
        winograd_cost: See :class:`BasicPack`.
        dense_above: See :class:`BasicPack`.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    tiled = [winograd and kernels[0].dtype == torch.float32] * 2
    tiled[0] = tiled[0] and stride == dilation == 1
    empty = kernels[0].new_empty(0)
    return BasicPack(
        weights=[
            empty if i < 2 and tiled[i] and not direct else pack_conv(kernel)
            for i, kernel in enumerate(kernels)
        ],
        biases=[bias.float() for bias in biases],
        winograd=[pack_winograd(kernels[i]) if tiled[i] else empty for i in range(2)]
        if any(tiled)
        else [],
        dense=list(kernels) if dense else [],
        stride=stride,
        dilation=dilation,
        winograd_cost=winograd_cost,
        dense_above=dense_above,
    )


class _Arguments(NamedTuple):
    """All arguments after ``x``."""

    mask: Tensor | None
    shortcut: Tensor | None
    pack: BasicPack
    granularity: int


def _arguments(
    mask: Tensor | None,
    shortcut: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    winograd: Sequence[Tensor],
    dense: Sequence[Tensor],
    geometry: Sequence[int],
    plan: Sequence[float],
) -> _Arguments:
    if len(geometry) != 3:
        raise ValueError(f"geometry must be (granularity, stride, dilation), got {list(geometry)}")
    if len(plan) != 2:
        raise ValueError(f"plan must be (winograd_cost, dense_above), got {list(plan)}")
    pack = BasicPack(weights, biases, winograd, dense, *geometry[1:], *plan)
    return _Arguments(mask, shortcut, pack, geometry[0])


def check_conv3x3(
    x: Tensor,
    weights: Sequence[Tensor],
    winograd: Sequence[Tensor],
    i: int,
    depth: int,
    out: int,
    tiled: bool,
) -> None:
    """Raise ValueError unless weight ``i`` is that of a 3x3 convolution in one form or both.

    ``tiled``: whether its stride and dilation allow the Winograd form.
    """
    has_tiles = len(winograd) > 0 and winograd[i].numel() > 0
    if has_tiles:
        if x.dtype != torch.float32 or not tiled:
            raise ValueError(
                f"winograd[{i}] must be empty unless the convolution is float32 with stride and "
                f"dilation 1, got {x.dtype}"
            )
        check_packed(winograd[i], f"winograd[{i}]", out, depth, 16, 1, x)
    if not has_tiles or weights[i].numel():
        check_packed(weights[i], f"weights[{i}]", out, depth, 9, 1, x)


def _check(x: Tensor, a: _Arguments) -> list[int]:
    """Raise ValueError as ops/common/basic_arguments.cpp does; return (H, W) of the output."""
    pack = a.pack
    check_map(x, "x")
    check_stride(pack.stride, "stride")
    if pack.dilation <= 0:
        raise ValueError(f"dilation must be positive, got {pack.dilation}")
    if len(pack.weights) not in (2, 3) or len(pack.biases) != len(pack.weights):
        raise ValueError(
            "weights and biases must be those of conv1, conv2 and, where there is one, the "
            f"downsample convolution, got {len(pack.weights)} and {len(pack.biases)}"
        )
    if len(pack.winograd) not in (0, 2):
        raise ValueError(
            f"winograd must be empty or hold conv1's and conv2's weights, got {len(pack.winograd)}"
        )
    if not pack.winograd_cost >= 0:
        raise ValueError(f"winograd_cost must be a number from 0 up, got {pack.winograd_cost}")
    hidden, c_out = pack.biases[0].numel(), pack.biases[1].numel()
    for i, bias in enumerate(pack.biases):
        check_vector(bias, f"biases[{i}]", c_out if i else hidden, torch.float32, x)
    tiled = pack.stride == pack.dilation == 1
    check_conv3x3(x, pack.weights, pack.winograd, 0, x.shape[1], hidden, tiled)
    check_conv3x3(x, pack.weights, pack.winograd, 1, hidden, c_out, True)
    size = conv_size(x, pack.stride)
    side = _check_shortcut(x, a, size)
    if pack.dense:
        _check_dense(x, pack, side)
    if a.mask is not None:
        check_mask(a.mask, "mask", x, size, a.granularity)
    return size


def _check_shortcut(x: Tensor, a: _Arguments, size: list[int]) -> int:
    """Return the channels that the downsample convolution reads."""
    c_out = a.pack.biases[1].numel()
    if len(a.pack.weights) == 2:
        if a.shortcut is not None:
            raise ValueError("shortcut must be None without a downsample convolution")
        if c_out != x.shape[1] or a.pack.stride != 1:
            raise ValueError(
                "weights must have a downsample convolution unless the stride is 1 and the output "
                f"has {x.shape[1]} channels, got {a.pack.stride} and {c_out}"
            )
        return x.shape[1]
    source = x if a.shortcut is None else a.shortcut
    check_shortcut_map(source, x, size if a.shortcut is not None else x.shape[2:])
    check_packed(a.pack.weights[2], "weights[2]", c_out, source.shape[1], 1, 1, x)
    return source.shape[1]


def _check_dense(x: Tensor, pack: BasicPack, side: int) -> None:
    if len(pack.dense) != len(pack.weights):
        raise ValueError(
            f"dense must be empty or hold {len(pack.weights)} weights as weights does, got "
            f"{len(pack.dense)}"
        )
    hidden, c_out = pack.biases[0].numel(), pack.biases[1].numel()
    shapes = [[hidden, x.shape[1], 3, 3], [c_out, hidden, 3, 3], [c_out, side, 1, 1]]
    for i, (weight, shape) in enumerate(zip(pack.dense, shapes)):
        if list(weight.shape) != shape:
            raise ValueError(f"dense[{i}] must have shape {shape}, got {list(weight.shape)}")
        check_kind(weight, f"dense[{i}]", x.dtype, x)


def convolve3x3(
    x: Tensor,
    weights: Sequence[Tensor],
    winograd: Sequence[Tensor],
    i: int,
    bias: Tensor,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    """The 3x3 convolution of weight ``i`` in float32, from the form that there is."""
    if weights[i].numel():
        return convolve(x, weights[i], bias, 3, stride, dilation, 1)
    kernel = unpack_winograd(winograd[i], bias.numel(), x.shape[1])
    return F.conv2d(x, kernel, bias, padding=1)


def _reference(x: Tensor, *arguments) -> Tensor:
    a = _arguments(*arguments)
    return compute(x, a, _check(x, a))


def compute(
    x: Tensor, a: _Arguments, size: list[int], skip: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """What the op returns, densely; ``skip`` may change conv1's output."""
    pack = a.pack
    forms = pack.weights, pack.winograd
    out = convolve3x3(x, *forms, 0, pack.biases[0], pack.stride, pack.dilation).relu()
    out = (skip(out) if skip else out).to(x.dtype)
    out = convolve3x3(out, *forms, 1, pack.biases[1])
    if a.mask is not None:
        kept = expand(a.mask, "mask", size, a.granularity)
        out = torch.where(kept, out, out.new_zeros(()))
    if len(pack.weights) == 2:
        side = x.float()
    elif a.shortcut is not None:
        side = convolve(a.shortcut, pack.weights[2], pack.biases[2], 1, 1, 1, 1)
    else:
        side = convolve(x, pack.weights[2], pack.biases[2], 1, pack.stride, 1, 1)
    return (out + side).relu().to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def _reference_(x: Tensor, *arguments) -> None:
    a = _arguments(*arguments)
    check_in_place(a.pack.weights, 3)
    out = _reference(x, *arguments)
    if a.mask is not None:
        out = torch.where(expand(a.mask, "mask", x.shape[2:], a.granularity), out, x)
    x.copy_(out)


def _fake(x: Tensor, *arguments) -> Tensor:
    a = _arguments(*arguments)
    return empty_map(x, a.pack.biases[1].numel(), _check(x, a))


def _fake_(x: Tensor, *arguments) -> None:
    a = _arguments(*arguments)
    check_in_place(a.pack.weights, 3)
    _check(x, a)


register(f"sparse_basic(Tensor x, {_SCHEMA}) -> Tensor", _reference, _fake)
register(f"sparse_basic_(Tensor(a!) x, {_SCHEMA}) -> ()", _reference_, _fake_)


def _unpacked(pack: BasicPack, granularity: int) -> tuple:
    geometry, plan = (
        (granularity, pack.stride, pack.dilation),
        (pack.winograd_cost, pack.dense_above),
    )
    return pack.weights, pack.biases, pack.winograd, pack.dense, geometry, plan


def sparse_basic(
    x: Tensor,
    mask: Tensor | None,
    pack: BasicPack,
    granularity: int = 1,
    shortcut: Tensor | None = None,
) -> Tensor:
    """relu(shortcut + mask * conv2(relu(conv1(x)))), computed at kept outputs only.

    The basic block of ResNet (arXiv 1512.03385, figure 5, left) under equation 1 of LASNet (arXiv
    2210.06223); conv1 runs where a kept output reads it. No gradient.

    Args:
        x: Block input, (N, C_in, H, W), float32 or bfloat16.
        mask: Decision per patch, (N, 1, ceil(H_out/S), ceil(W_out/S)), or ``None``: all are kept.
        pack: The block's convolutions.
        granularity: S in output pixels; :data:`~las_mm.ops.LAYER` for one decision per image.
        shortcut: What the downsample convolution reads if that is not ``x`` with the block's
            stride: (N, C, H_out, W_out), e.g. an average-pooled ``x``.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the mask is not finite.
    """
    return torch.ops.las_mm.sparse_basic(x, mask, shortcut, *_unpacked(pack, granularity))


def sparse_basic_(x: Tensor, mask: Tensor | None, pack: BasicPack, granularity: int = 1) -> Tensor:
    """:func:`sparse_basic` of a block without downsample convolution, written into ``x``.

    Dropped positions cost nothing: they are left as they are, which is what the block computes as
    long as ``x`` is not negative there, i.e. the output of a ReLU. (Where dense convolutions run,
    see ``dense_above``, they become its ReLU.)

    Returns:
        ``x``.
    """
    torch.ops.las_mm.sparse_basic_(x, mask, None, *_unpacked(pack, granularity))
    return x
