"""The convolutions of a bottleneck as one argument of the ops that run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from las_mm.ops.packing import pack_conv, pack_winograd


class BottleneckPack(NamedTuple):
    """The convolutions of a bottleneck: conv1, conv2, conv3 and, where it has one, its shortcut.

    :func:`pack_bottleneck` makes it, once; the ops that take it check that it fits.

    Attributes:
        weights: Packed by :func:`~las_mm.ops.pack_conv`, dtype of the features; conv2's may be
            empty if ``winograd`` is given.
        biases: float32, with BN folded in.
        winograd: conv2's weight packed by :func:`~las_mm.ops.pack_winograd`, or ``None``; float32
            blocks with stride, dilation and groups 1 only.
        dense: All weights as they are, for dense convolutions, or ``None``.
        excitation: Squeeze-and-excitation between conv2 and conv3, pooled over the kept positions
            of each image: weight (Q, M) and bias (Q,) of its first layer, weight (M, Q) and bias
            (M,) of its second, float32, where M are the channels of conv2. Not with ``winograd``;
            not on a GPU.
        strides: Of conv1 and conv2.
        dilation: Dilation and padding of conv2.
        groups: Groups of conv2.
        winograd_cost: Time of a multiplication in the Winograd form relative to the direct form;
            decides which of the two serves a mask that cuts through 2x2 tiles.
        dense_above: If ``dense`` is given, dense convolutions run where a larger share of the
            outputs is kept.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    winograd: Tensor | None = None
    dense: Sequence[Tensor] | None = None
    excitation: Sequence[Tensor] | None = None
    strides: Sequence[int] = (1, 1)
    dilation: int = 1
    groups: int = 1
    winograd_cost: float = 1.0
    dense_above: float = 1.0


def pack_bottleneck(
    kernels: Sequence[Tensor],
    biases: Sequence[Tensor],
    strides: Sequence[int] = (1, 1),
    dilation: int = 1,
    groups: int = 1,
    *,
    excitation: Sequence[Tensor] | None = None,
    direct: bool = True,
    winograd: bool = True,
    dense: bool = False,
    winograd_cost: float = 1.0,
    dense_above: float = 1.0,
) -> BottleneckPack:
    """Pack a bottleneck for :func:`~las_mm.ops.sparse_bottleneck`.

    Args:
        kernels: Weights of conv1 (M, C_in, 1, 1), conv2 (M, M / groups, 3, 3), conv3 (C_out, M, 1,
            1) and, where the block has one, the downsample convolution (C_out, C_in, 1, 1), BN
            folded in; float32 or bfloat16.
        biases: Their biases.
        strides: Of conv1 and conv2.
        dilation: Of conv2.
        groups: Of conv2.
        excitation: See :class:`BottleneckPack`.
        direct: Whether to keep the direct form of conv2 if it has a Winograd form too.
        winograd: Whether to make the Winograd form of conv2 where there is one.
        dense: Whether to keep the weights for dense convolutions.
        winograd_cost: See :class:`BottleneckPack`.
        dense_above: See :class:`BottleneckPack`.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    plain = (strides[1], dilation, groups) == (1, 1, 1) and excitation is None
    tiled = winograd and plain and kernels[0].dtype == torch.float32
    return BottleneckPack(
        weights=[
            kernel.new_empty(0)
            if i == 1 and tiled and not direct
            else pack_conv(kernel, groups if i == 1 else 1)
            for i, kernel in enumerate(kernels)
        ],
        biases=[bias.float() for bias in biases],
        winograd=pack_winograd(kernels[1]) if tiled else None,
        dense=list(kernels) if dense else None,
        excitation=excitation,
        strides=tuple(strides),
        dilation=dilation,
        groups=groups,
        winograd_cost=winograd_cost,
        dense_above=dense_above,
    )
