"""A layer of a DenseNet as one op that writes behind the channels that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from las_mm.ops.basic import check_conv3x3, convolve3x3
from las_mm.ops.convolution import check_mask, check_packed, convolve, expand
from las_mm.ops.library import register
from las_mm.ops.masks import check_map, check_vector
from las_mm.ops.packing import pack_conv, pack_winograd


class DenseLayerPack(NamedTuple):
    """The parameters of a dense layer; :func:`pack_dense_layer` makes it, once.

    Attributes:
        weights: conv1 (1x1) and conv2 (3x3), packed by :func:`~las_mm.ops.pack_conv`, the second
            norm folded into conv1; conv2's may be empty if ``winograd`` has it.
        vectors: Scale and shift of the first norm, biases of conv1 and conv2, float32.
        winograd: Empty, or conv2's weight packed by :func:`~las_mm.ops.pack_winograd`, float32.
        winograd_cost: Time of a multiplication in the Winograd form relative to the direct form;
            decides which of the two serves a mask that cuts through 2x2 tiles.
    """

    weights: Sequence[Tensor]
    vectors: Sequence[Tensor]
    winograd: Sequence[Tensor] = ()
    winograd_cost: float = 1.0


def pack_dense_layer(
    kernels: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    direct: bool = True,
    winograd: bool = True,
    winograd_cost: float = 1.0,
) -> DenseLayerPack:
    """Pack a dense layer for :func:`sparse_dense_layer_`.

    Args:
        kernels: Weights of conv1 (C, C_in, 1, 1), the second norm folded in, and conv2
            (growth, C, 3, 3); float32 or bfloat16.
        vectors: Scale and shift (C_in,) of the first norm, which is relu(x * scale + shift), then
            the biases of conv1 (C,) and conv2 (growth,).
        direct: Whether to keep the direct form of conv2 if it has a Winograd form too.
        winograd: Whether to make the Winograd form of conv2, if float32.
        winograd_cost: See :class:`DenseLayerPack`.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    tiled = winograd and kernels[1].dtype == torch.float32
    conv2 = pack_conv(kernels[1]) if direct or not tiled else kernels[1].new_empty(0)
    return DenseLayerPack(
        weights=[pack_conv(kernels[0]), conv2],
        vectors=[vector.float() for vector in vectors],
        winograd=[pack_winograd(kernels[1])] if tiled else [],
        winograd_cost=winograd_cost,
    )


class _Arguments(NamedTuple):
    """All arguments after ``buffer``."""

    mask: Tensor | None
    weights: Sequence[Tensor]
    vectors: Sequence[Tensor]
    winograd: Sequence[Tensor]
    granularity: int
    winograd_cost: float


def _check(buffer: Tensor, a: _Arguments) -> None:
    """Raise ValueError as ops/common/dense_layer_arguments.cpp does."""
    check_map(buffer, "buffer")
    if len(a.weights) != 2:
        raise ValueError(f"weights must be those of conv1 and conv2, got {len(a.weights)}")
    if len(a.vectors) != 4:
        raise ValueError(
            "vectors must be scale and shift of the first norm and the biases of conv1 and conv2, "
            f"got {len(a.vectors)}"
        )
    if len(a.winograd) > 1:
        raise ValueError(f"winograd must be empty or hold conv2's weight, got {len(a.winograd)}")
    if not a.winograd_cost >= 0:
        raise ValueError(f"winograd_cost must be a number from 0 up, got {a.winograd_cost}")
    c_in, hidden, growth = (a.vectors[i].numel() for i in (0, 2, 3))
    for i, size in enumerate((c_in, c_in, hidden, growth)):
        check_vector(a.vectors[i], f"vectors[{i}]", size, torch.float32, buffer)
    if c_in + growth > buffer.shape[1]:
        raise ValueError(
            f"buffer must have room for {c_in} + {growth} channels, got {buffer.shape[1]}"
        )
    check_packed(a.weights[0], "weights[0]", hidden, c_in, 1, 1, buffer)
    check_conv3x3(buffer, a.weights, [*a.winograd, *a.winograd], 1, hidden, growth, True)
    if a.mask is not None:
        check_mask(a.mask, "mask", buffer, buffer.shape[2:], a.granularity)


def _reference(buffer: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    _check(buffer, a)
    scale, shift, *biases = a.vectors
    c_in, growth = scale.numel(), biases[1].numel()
    x = buffer[:, :c_in].float()
    x = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).relu().to(buffer.dtype)
    x = convolve(x, a.weights[0], biases[0], 1, 1, 1, 1).relu().to(buffer.dtype)
    x = convolve3x3(x, a.weights, [*a.winograd, *a.winograd], 1, biases[1])
    if a.mask is not None:
        kept = expand(a.mask, "mask", buffer.shape[2:], a.granularity)
        x = torch.where(kept, x, x.new_zeros(()))
    buffer[:, c_in : c_in + growth] = x.to(buffer.dtype)


def _fake(buffer: Tensor, *arguments) -> None:
    _check(buffer, _Arguments(*arguments))


register(
    "sparse_dense_layer_(Tensor(a!) buffer, Tensor? mask, Tensor[] weights, Tensor[] vectors, "
    "Tensor[] winograd, int granularity, float winograd_cost) -> ()",
    _reference,
    _fake,
)


def sparse_dense_layer_(
    buffer: Tensor, mask: Tensor | None, pack: DenseLayerPack, granularity: int = 1
) -> Tensor:
    """conv2(relu(conv1(relu(norm1(x))))), computed at kept positions, appended to its input.

    The bottleneck layer of DenseNet (arXiv 1608.06993, section 3) under LASNet's masks (arXiv
    2210.06223). ``x`` are the first C_in channels of the buffer, the result is the next ``growth``;
    it is zero at dropped positions. The norm is applied while rows are read and conv1 runs where a
    kept position reads it, so nothing of the buffer is copied. No gradient.

    Args:
        buffer: What a dense block has so far, with room for more: (N, C, H, W), best with the
            channels of a position side by side (channels_last, or some channels of such a map),
            else it is copied twice; float32 or bfloat16.
        mask: Decision per patch, (N, 1, ceil(H/S), ceil(W/S)), or ``None``: all are kept.
        pack: The layer's parameters.
        granularity: S in pixels; :data:`~las_mm.ops.LAYER` for one decision per image.

    Returns:
        ``buffer``.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the mask is not finite.
    """
    torch.ops.las_mm.sparse_dense_layer_(
        buffer, mask, pack.weights, pack.vectors, pack.winograd, granularity, pack.winograd_cost
    )
    return buffer
