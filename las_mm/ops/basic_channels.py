"""Channel skipping: a basic block of which every image computes the channels that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from las_mm.ops import basic
from las_mm.ops.basic import BasicPack
from las_mm.ops.bottleneck import check_in_place
from las_mm.ops.convolution import empty_map, expand
from las_mm.ops.library import register
from las_mm.ops.masks import check_channel_mask, check_vector

_SCHEMA = (
    "Tensor channel_mask, Tensor? constant, Tensor? mask, Tensor? shortcut, Tensor[] weights, "
    "Tensor[] biases, Tensor[] winograd, int[3] geometry, float winograd_cost"
)


class _Arguments(NamedTuple):
    """All arguments after ``x``."""

    channel_mask: Tensor
    constant: Tensor | None
    mask: Tensor | None
    shortcut: Tensor | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    winograd: Sequence[Tensor]
    geometry: Sequence[int]
    winograd_cost: float

    @property
    def block(self) -> basic._Arguments:
        """Those that :func:`~las_mm.ops.sparse_basic` takes."""
        forms = self.weights, self.biases, self.winograd, ()
        return basic._arguments(
            self.mask, self.shortcut, *forms, self.geometry, (self.winograd_cost, 1.0)
        )


def _check(x: Tensor, a: _Arguments) -> list[int]:
    """Raise ValueError as ops/cpu/channel_basic.cpp does; return (H, W) of the output."""
    size = basic._check(x, a.block)
    width = a.biases[0].numel()
    check_channel_mask(a.channel_mask, x, width)
    if a.constant is not None:
        check_vector(a.constant, "constant", width, torch.float32, x)
    return size


def _reference(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    size, width = _check(x, a), a.biases[0].numel()
    wanted = a.channel_mask
    if wanted.is_floating_point() and not wanted.isfinite().all():
        raise ValueError("channel_mask must be finite, got NaN or infinity")
    wanted = (wanted > 0.5).repeat_interleave(width // wanted.shape[1], 1)[:, :, None, None]

    def skip(hidden: Tensor) -> Tensor:
        constant = hidden.new_zeros(width) if a.constant is None else a.constant
        return torch.where(wanted, hidden, constant[:, None, None])

    return basic.compute(x, a.block, size, skip)


def _reference_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    check_in_place(a.weights, 3)
    out = _reference(x, *arguments)
    if a.mask is not None:
        out = torch.where(expand(a.mask, "mask", x.shape[2:], a.geometry[0]), out, x)
    x.copy_(out)


def _fake(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    return empty_map(x, a.biases[1].numel(), _check(x, a))


def _fake_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    check_in_place(a.weights, 3)
    _check(x, a)


register(f"channel_basic(Tensor x, {_SCHEMA}) -> Tensor", _reference, _fake)
register(f"channel_basic_(Tensor(a!) x, {_SCHEMA}) -> ()", _reference_, _fake_)


def _unpacked(pack: BasicPack, granularity: int) -> tuple:
    geometry = granularity, pack.stride, pack.dilation
    return pack.weights, pack.biases, pack.winograd, geometry, pack.winograd_cost


def channel_basic(
    x: Tensor,
    channel_mask: Tensor,
    mask: Tensor | None,
    pack: BasicPack,
    granularity: int = 1,
    shortcut: Tensor | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    """:func:`~las_mm.ops.sparse_basic` of which every image computes some hidden channels only.

    LAUDNet (arXiv 2308.15949), section 3.2, where a channel mask gates conv1's outputs: conv1
    computes the wanted ones, conv2 reads these. No gradient; ``pack.dense`` is not used.

    Args:
        x: As there.
        channel_mask: Decision per image and group of consecutive channels, (N, k); k divides the
            channels of conv1's output, a group has C / k of them.
        mask: As there.
        pack: As there.
        granularity: As there.
        shortcut: As there.
        constant: What skipped channels of conv1's output hold, float32 (C,), after the ReLU; zero
            if ``None``. relu(BN(0)) where the mask comes before the norm.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        ValueError: A shape, dtype or device does not fit, or a mask is not finite.
    """
    arguments = (channel_mask, constant, mask, shortcut, *_unpacked(pack, granularity))
    return torch.ops.las_mm.channel_basic(x, *arguments)


def channel_basic_(
    x: Tensor,
    channel_mask: Tensor,
    mask: Tensor | None,
    pack: BasicPack,
    granularity: int = 1,
    constant: Tensor | None = None,
) -> Tensor:
    """:func:`channel_basic` of a block without downsample convolution, written into ``x``.

    Dropped positions are left as they are, see :func:`~las_mm.ops.sparse_basic_`.

    Returns:
        ``x``.
    """
    arguments = (channel_mask, constant, mask, None, *_unpacked(pack, granularity))
    torch.ops.las_mm.channel_basic_(x, *arguments)
    return x
