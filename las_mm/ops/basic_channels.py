"""Channel skipping in a basic block: every image computes the channels that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from las_mm.compat import register_fake
from las_mm.ops import basic
from las_mm.ops.basic import BasicPack
from las_mm.ops.channels import check_channel_mask, wanted_channels
from las_mm.ops.convolution import empty_map, expand
from las_mm.ops.library import LIBRARY
from las_mm.ops.masks import check_vector

_SCHEMA = (
    "Tensor? mask, Tensor channel_mask, Tensor? shortcut, Tensor[] weights, Tensor[] biases, "
    "Tensor[] winograd, Tensor? constants, int[3] geometry, float winograd_cost"
)


class _Arguments(NamedTuple):
    """All arguments after ``x``."""

    mask: Tensor | None
    channel_mask: Tensor
    shortcut: Tensor | None
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    winograd: Sequence[Tensor]
    constants: Tensor | None
    geometry: Sequence[int]
    winograd_cost: float

    @property
    def without_channels(self) -> basic._Arguments:
        """Those of :func:`~las_mm.ops.sparse_basic`."""
        plan = (self.winograd_cost, 1.0)
        lists = self.weights, self.biases, self.winograd, []
        return basic._arguments(self.mask, self.shortcut, *lists, self.geometry, plan)


def _check(x: Tensor, a: _Arguments) -> list[int]:
    """Raise ValueError as ops/cpu/channel_basic.cpp does; return (H, W) of the output."""
    size = basic._check(x, a.without_channels)
    hidden = a.biases[0].numel()
    check_channel_mask(a.channel_mask, x, hidden)
    if a.constants is not None:
        check_vector(a.constants, "constants", hidden, torch.float32, x)
    return size


def _reference(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    _check(x, a)
    hidden = a.biases[0].numel()
    wanted = wanted_channels(a.channel_mask, hidden)
    constants = x.new_zeros(hidden) if a.constants is None else a.constants

    def skip(out: Tensor) -> Tensor:
        return torch.where(wanted, out, constants[:, None, None])

    return basic.reference(x, a.without_channels, skip)


def _reference_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    basic._check_in_place(a.without_channels)
    out = _reference(x, *arguments)
    if a.mask is not None:
        out = torch.where(expand(a.mask, "mask", x.shape[2:], a.geometry[0]), out, x)
    x.copy_(out)


def _fake(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    return empty_map(x, a.biases[1].numel(), _check(x, a))


def _fake_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    basic._check_in_place(a.without_channels)
    _check(x, a)


LIBRARY.define(f"channel_basic(Tensor x, {_SCHEMA}) -> Tensor")
LIBRARY.impl("channel_basic", _reference, "CompositeExplicitAutograd")
register_fake("las_mm::channel_basic", _fake, lib=LIBRARY)
LIBRARY.define(f"channel_basic_(Tensor(a!) x, {_SCHEMA}) -> ()")
LIBRARY.impl("channel_basic_", _reference_, "CompositeExplicitAutograd")
register_fake("las_mm::channel_basic_", _fake_, lib=LIBRARY)


def channel_basic(
    x: Tensor,
    mask: Tensor | None,
    channel_mask: Tensor,
    pack: BasicPack,
    granularity: int = 1,
    shortcut: Tensor | None = None,
    constants: Tensor | None = None,
) -> Tensor:
    """:func:`~las_mm.ops.sparse_basic` of which every image computes some hidden channels only.

    LAUDNet (arXiv 2308.15949), section 3.2, in a basic block: the channel mask gates the outputs of
    conv1. With the share rho of the channels wanted, both convolutions cost rho of the whole; with
    ``mask`` also only at kept outputs. No gradient.

    Args:
        x, mask, pack, granularity, shortcut: See :func:`~las_mm.ops.sparse_basic`; ``dense`` of the
            pack is not used.
        channel_mask: Decision per image and group of consecutive channels, (N, k); k divides the
            channels C of conv1's output, a group has C / k channels.
        constants: What skipped channels of conv1's output hold, float32 (C,), e.g. relu(BN(0))
            where the mask lies before the norm; ``None``: zero. conv2's padding is zero all the
            same.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        ValueError: A shape, dtype or device does not fit, or a mask is not finite.
    """
    lists = pack.weights, pack.biases, pack.winograd
    geometry = granularity, pack.stride, pack.dilation
    return torch.ops.las_mm.channel_basic(
        x, mask, channel_mask, shortcut, *lists, constants, geometry, pack.winograd_cost
    )


def channel_basic_(
    x: Tensor,
    mask: Tensor | None,
    channel_mask: Tensor,
    pack: BasicPack,
    granularity: int = 1,
    constants: Tensor | None = None,
) -> Tensor:
    """:func:`channel_basic` of a block without downsample convolution, written into ``x``.

    Dropped positions are left as they are, see :func:`~las_mm.ops.sparse_basic_`.

    Returns:
        ``x``.
    """
    lists = pack.weights, pack.biases, pack.winograd
    geometry = granularity, pack.stride, pack.dilation
    torch.ops.las_mm.channel_basic_(
        x, mask, channel_mask, None, *lists, constants, geometry, pack.winograd_cost
    )
    return x
