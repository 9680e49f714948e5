"""A whole bottleneck as one op, so that a back end can keep its intermediates in cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.bottleneck_pack import BottleneckPack
from las_mm.ops.convolution import (
    CHANNELS_LAST,
    check_mask,
    check_packed,
    convolve,
    empty_map,
    expand,
)
from las_mm.ops.library import register
from las_mm.ops.masks import ceil_div, check_kind, check_map, check_strides, check_vector
from las_mm.ops.packing import unpack_winograd

_SCHEMA = (
    "Tensor? mask, Tensor[] weights, Tensor[] biases, Tensor? winograd, Tensor? shortcut, "
    "int granularity, int[2] strides, int dilation, int groups, float winograd_cost, "
    "Tensor[]? dense=None, float dense_above=1.0, Tensor[]? excitation=None"
)


class _Arguments(NamedTuple):
    """All arguments after ``x``."""

    mask: Tensor | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    winograd: Tensor | None
    shortcut: Tensor | None
    granularity: int
    strides: Sequence[int]
    dilation: int
    groups: int
    winograd_cost: float
    dense: Sequence[Tensor] | None = None
    dense_above: float = 1.0
    excitation: Sequence[Tensor] | None = None


def _check(x: Tensor, a: _Arguments) -> list[int]:
    """Raise ValueError as ops/cpu/sparse_bottleneck.cpp does; return (H, W) of the output."""
    check_map(x, "x")
    check_strides(a.strides, a.dilation)
    if len(a.weights) not in (3, 4) or len(a.biases) != len(a.weights):
        raise ValueError(
            "weights and biases must be those of conv1, conv2, conv3 and, where there is one, the "
            f"downsample convolution, got {len(a.weights)} and {len(a.biases)}"
        )
    width, c_out = a.biases[0].numel(), a.biases[2].numel()
    if a.groups <= 0 or width % a.groups:
        raise ValueError(f"groups must be positive and divide {width} channels, got {a.groups}")
    for i, bias in enumerate(a.biases):
        check_vector(bias, f"biases[{i}]", width if i < 2 else c_out, torch.float32, x)
    if not a.winograd_cost >= 0:
        raise ValueError(f"winograd_cost must be a number from 0 up, got {a.winograd_cost}")
    if a.dense is not None:
        _check_dense(x, a, width, c_out)
    check_packed(a.weights[0], "weights[0]", width, x.shape[1], 1, 1, x)
    check_packed(a.weights[2], "weights[2]", c_out, width, 1, 1, x)
    if a.winograd is not None:
        if x.dtype != torch.float32 or (a.strides[1], a.dilation, a.groups) != (1, 1, 1):
            raise ValueError(
                "winograd must be None unless conv2 is float32 with stride, dilation and groups 1, "
                f"got {x.dtype}, stride {a.strides[1]}, dilation {a.dilation}, groups {a.groups}"
            )
        check_packed(a.winograd, "winograd", width, width, 16, 1, x)
    if a.winograd is None or a.weights[1].numel():  # one of the two forms may be left out
        check_packed(a.weights[1], "weights[1]", width, width // a.groups, 9, a.groups, x)
    size = [ceil_div(ceil_div(n, a.strides[0]), a.strides[1]) for n in x.shape[2:]]
    _check_shortcut(x, a, c_out, size)
    if a.excitation is not None:
        _check_excitation(x, a, width)
    if a.mask is not None:
        check_mask(a.mask, "mask", x, size, a.granularity)
    return size


def _check_excitation(x: Tensor, a: _Arguments, width: int) -> None:
    assert a.excitation is not None
    if len(a.excitation) != 4:
        raise ValueError(
            "excitation must be None or weight and bias of fc1 and of fc2, got "
            f"{len(a.excitation)} tensors"
        )
    if a.winograd is not None:
        raise ValueError("winograd must be None with excitation")
    squeezed = a.excitation[1].numel()
    check_vector(a.excitation[1], "excitation[1]", squeezed, torch.float32, x)
    check_vector(a.excitation[3], "excitation[3]", width, torch.float32, x)
    for i, shape in ((0, [squeezed, width]), (2, [width, squeezed])):
        weight = a.excitation[i]
        if list(weight.shape) != shape:
            raise ValueError(f"excitation[{i}] must have shape {shape}, got {list(weight.shape)}")
        check_kind(weight, f"excitation[{i}]", torch.float32, x)


def _check_dense(x: Tensor, a: _Arguments, width: int, c_out: int) -> None:
    assert a.dense is not None
    if len(a.dense) != len(a.weights):
        raise ValueError(
            f"dense must be None or hold {len(a.weights)} weights as weights does, got "
            f"{len(a.dense)}"
        )
    side = x.shape[1] if a.shortcut is None else a.shortcut.shape[1]
    shapes = [
        [width, x.shape[1], 1, 1],
        [width, width // a.groups, 3, 3],
        [c_out, width, 1, 1],
        [c_out, side, 1, 1],
    ]
    for i, (weight, shape) in enumerate(zip(a.dense, shapes)):
        if list(weight.shape) != shape:
            raise ValueError(f"dense[{i}] must have shape {shape}, got {list(weight.shape)}")
        check_kind(weight, f"dense[{i}]", x.dtype, x)


def check_shortcut_map(shortcut: Tensor, x: Tensor, size: Sequence[int]) -> None:
    """Raise ValueError unless ``shortcut`` holds maps of ``size`` of the images of ``x``."""
    check_map(shortcut, "shortcut")
    if shortcut.dtype != x.dtype or shortcut.device != x.device:
        raise ValueError(
            f"shortcut must be {x.dtype} on {x.device} as x is, got {shortcut.dtype} on "
            f"{shortcut.device}"
        )
    if [shortcut.shape[0], *shortcut.shape[2:]] != [x.shape[0], *size]:
        raise ValueError(
            f"shortcut must have {x.shape[0]} images of {size[0]}x{size[1]}, got "
            f"{list(shortcut.shape)}"
        )


def _check_shortcut(x: Tensor, a: _Arguments, c_out: int, size: list[int]) -> None:
    if len(a.weights) == 3:
        if a.shortcut is not None:
            raise ValueError("shortcut must be None without a downsample convolution")
        if c_out != x.shape[1] or list(a.strides) != [1, 1]:
            raise ValueError(
                "weights must have a downsample convolution unless strides are [1, 1] and the "
                f"output has {x.shape[1]} channels, got {list(a.strides)} and {c_out}"
            )
        return
    source = x if a.shortcut is None else a.shortcut
    check_shortcut_map(source, x, size if a.shortcut is not None else x.shape[2:])
    check_packed(a.weights[3], "weights[3]", c_out, source.shape[1], 1, 1, x)


def check_in_place(weights: Sequence[Tensor], most: int) -> None:
    """Raise ValueError if there are ``most`` weights, so that the last one is the shortcut's."""
    if len(weights) == most:
        raise ValueError("weights must have no downsample convolution to work in place")


def _reference(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    size = _check(x, a)
    out = convolve(x, a.weights[0], a.biases[0], 1, a.strides[0], 1, 1).relu().to(x.dtype)
    if a.winograd is not None and not a.weights[1].numel():
        kernel = unpack_winograd(a.winograd, out.shape[1], out.shape[1])
        out = F.conv2d(out, kernel, a.biases[1], padding=1)
    else:
        out = convolve(out, a.weights[1], a.biases[1], 3, a.strides[1], a.dilation, a.groups)
    out = out.relu().to(x.dtype)
    if a.excitation is not None:
        out = _excite(out, _kept(a, size), a.excitation)
    out = convolve(out, a.weights[2], a.biases[2], 1, 1, 1, 1)
    return _add_shortcut(x, out, a, size)


def _kept(a: _Arguments, size: list[int]) -> Tensor | None:
    """Kept outputs, bool (N, 1, H, W); ``None``: all."""
    return None if a.mask is None else expand(a.mask, "mask", size, a.granularity)


def _add_shortcut(x: Tensor, out: Tensor, a: _Arguments, size: list[int]) -> Tensor:
    """What a block returns, from conv3's output at all positions."""
    kept = _kept(a, size)
    if kept is not None:
        out = torch.where(kept, out, out.new_zeros(()))
    if len(a.weights) == 3:
        out = out + x.float()
    elif a.shortcut is not None:
        out = out + convolve(a.shortcut, a.weights[3], a.biases[3], 1, 1, 1, 1)
    else:
        out = out + convolve(x, a.weights[3], a.biases[3], 1, a.strides[0] * a.strides[1], 1, 1)
    return out.relu().to(x.dtype).contiguous(memory_format=CHANNELS_LAST)


def _excite(x: Tensor, kept: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """Squeeze-and-excitation (arXiv 1709.01507) pooled over kept positions."""
    if kept is None:
        mean = x.float().mean(dim=(2, 3))
    else:
        total = torch.where(kept, x.float(), x.new_zeros((), dtype=torch.float32)).sum(dim=(2, 3))
        mean = total / kept.sum(dim=(2, 3)).clamp(min=1)
    hidden = F.linear(mean, weights[0], weights[1]).relu()
    scale = F.linear(hidden, weights[2], weights[3]).sigmoid()
    return (x * scale[:, :, None, None]).to(x.dtype)


def _reference_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    check_in_place(a.weights, 4)
    out = _reference(x, *arguments)
    if a.mask is not None:
        out = torch.where(expand(a.mask, "mask", x.shape[2:], a.granularity), out, x)
    x.copy_(out)


def _fake(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    return empty_map(x, a.biases[2].numel(), _check(x, a))


def _fake_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    check_in_place(a.weights, 4)
    _check(x, a)


register(f"sparse_bottleneck(Tensor x, {_SCHEMA}) -> Tensor", _reference, _fake)
register(f"sparse_bottleneck_(Tensor(a!) x, {_SCHEMA}) -> ()", _reference_, _fake_)


def sparse_bottleneck(
    x: Tensor,
    mask: Tensor | None,
    pack: BottleneckPack,
    granularity: int = 1,
    shortcut: Tensor | None = None,
) -> Tensor:
    """relu(shortcut + mask * conv3(relu(conv2(relu(conv1(x)))))), computed at kept outputs only.

    Equation 1 of LASNet (arXiv 2210.06223) with BN folded into the convolutions. No gradient.

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
    arguments = mask, *_unpacked(pack, granularity, shortcut)
    return torch.ops.las_mm.sparse_bottleneck(x, *arguments)


def sparse_bottleneck_(
    x: Tensor, mask: Tensor | None, pack: BottleneckPack, granularity: int = 1
) -> Tensor:
    """:func:`sparse_bottleneck` of a block without downsample convolution, written into ``x``.

    Dropped positions cost nothing: they are left as they are, which is what the block computes as
    long as ``x`` is not negative there, i.e. the output of a ReLU. (Where dense convolutions run,
    see ``dense_above``, they become its ReLU.)

    Returns:
        ``x``.
    """
    torch.ops.las_mm.sparse_bottleneck_(x, mask, *_unpacked(pack, granularity, None))
    return x


def _unpacked(pack: BottleneckPack, granularity: int, shortcut: Tensor | None) -> tuple:
    """What follows the mask in the schema."""
    geometry = granularity, pack.strides, pack.dilation, pack.groups
    dense = pack.dense, pack.dense_above
    tensors = pack.weights, pack.biases, pack.winograd, shortcut
    return *tensors, *geometry, pack.winograd_cost, *dense, pack.excitation
