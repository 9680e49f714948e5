"""The step from one dense block of a DenseNet to the next as one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops.convolution import check_packed, convolve
from las_mm.ops.library import register
from las_mm.ops.masks import check_kind, check_map, check_vector
from las_mm.ops.packing import pack_conv


class TransitionPack(NamedTuple):
    """The parameters of a transition; :func:`pack_dense_transition` makes it, once.

    Attributes:
        weight: Of the 1x1 convolution, packed by :func:`~las_mm.ops.pack_conv`.
        vectors: Scale and shift of the norm and bias of the convolution, float32.
    """

    weight: Tensor
    vectors: Sequence[Tensor]


def pack_dense_transition(kernel: Tensor, vectors: Sequence[Tensor]) -> TransitionPack:
    """Pack a transition for :func:`dense_transition_`.

    Args:
        kernel: Weight of the convolution, (C_out, C_in, 1, 1), float32 or bfloat16.
        vectors: Scale and shift (C_in,) of the norm, which is relu(x * scale + shift), then the
            bias of the convolution (C_out,).

    Raises:
        ValueError: A wrong shape or dtype.
    """
    return TransitionPack(pack_conv(kernel), [vector.float() for vector in vectors])


def _check(out: Tensor, buffer: Tensor, weight: Tensor, vectors: Sequence[Tensor]) -> None:
    """Raise ValueError as ops/common/arguments.cpp does."""
    check_map(buffer, "buffer")
    check_map(out, "out")
    check_kind(out, "out", buffer.dtype, buffer)
    size = [buffer.shape[0], buffer.shape[2] // 2, buffer.shape[3] // 2]
    if [out.shape[0], *out.shape[2:]] != size:
        raise ValueError(
            f"out must have {size[0]} images of {size[1]}x{size[2]}, got {list(out.shape)}"
        )
    if len(vectors) != 3:
        raise ValueError(f"vectors must be scale, shift and bias, got {len(vectors)}")
    c_in, c_out = vectors[0].numel(), vectors[2].numel()
    for i, vector_size in enumerate((c_in, c_in, c_out)):
        check_vector(vectors[i], f"vectors[{i}]", vector_size, torch.float32, buffer)
    if c_in > buffer.shape[1]:
        raise ValueError(f"buffer must have {c_in} channels or more, got {buffer.shape[1]}")
    if c_out > out.shape[1]:
        raise ValueError(f"out must have room for {c_out} channels, got {out.shape[1]}")
    check_packed(weight, "weight", c_out, c_in, 1, 1, buffer)


def _reference(out: Tensor, buffer: Tensor, weight: Tensor, vectors: Sequence[Tensor]) -> None:
    _check(out, buffer, weight, vectors)
    scale, shift, bias = vectors
    x = buffer[:, : scale.numel()].float()
    x = torch.addcmul(shift[:, None, None], x, scale[:, None, None]).relu()
    x = F.avg_pool2d(x, 2).to(buffer.dtype)
    out[:, : bias.numel()] = convolve(x, weight, bias, 1, 1, 1, 1).to(out.dtype)


def _fake(out: Tensor, buffer: Tensor, weight: Tensor, vectors: Sequence[Tensor]) -> None:
    _check(out, buffer, weight, vectors)


register(
    "dense_transition_(Tensor(a!) out, Tensor buffer, Tensor weight, Tensor[] vectors) -> ()",
    _reference,
    _fake,
)


def dense_transition_(out: Tensor, buffer: Tensor, pack: TransitionPack) -> Tensor:
    """avg_pool2d(conv(relu(norm(x))), 2) written to the first channels of the next buffer.

    The transition of DenseNet (arXiv 1608.06993, section 3). The convolution runs after the mean,
    which is the same and a quarter of the work. No gradient.

    Args:
        out: The next block's buffer, (N, C', floor(H/2), floor(W/2)), best channels_last (or some
            channels of such a map), else it is copied twice; its first C_out channels are written.
        buffer: What a dense block has made, (N, C, H, W), float32 or bfloat16, whose first C_in
            channels are read.
        pack: The transition's parameters.

    Returns:
        ``out``.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    torch.ops.las_mm.dense_transition_(out, buffer, pack.weight, pack.vectors)
    return out
