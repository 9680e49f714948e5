"""What an operator costs on a device as a function of the rates of its gates.

The "paper" setting is a single rate per block, used by the published figures: conv1 gets the same
rate as conv2 and conv3, without the halo that conv2 needs. How rates become patches: an operator
whose map is H x W has ``P = ceil(H/S) * ceil(W/S)`` patch positions and computes
``n = ceil(rate * P)`` of them. conv1 is charged on patches of the same side S on *its own* output
map, so a stride-2 block of style 'pytorch' has about ``4 * P`` positions there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch
from typing import Union

import numpy as np

from las_mm.network.block import BlockShape, ceil_div
from las_mm.network.operator import (
    CHANNEL,
    CHANNEL_IN,
    CHANNEL_OUT,
    DILATED,
    LAYER,
    POSITION,
    Add,
    Conv,
    GlobalPool,
    Linear,
    MapOperator,
    Masker,
    Operator,
    Pool,
    Scale,
)

from ..report import Report
from . import operators as ops
from .channels import ChannelCost
from .device import Device
from .tiling import PatchCost

PATCH_COUNTS = ("whole", "mean")
# Rates measured as count / positions in float32 are off by this much: without the slack,
# 3/49 of 49 positions would be 4 patches.
_RATE_SLACK = 1e-7
_POSITIONS = (POSITION, DILATED)
Rates = Mapping[str, Union[float, np.ndarray]]


class Cost:
    """Seconds of an operator for the whole batch, by the rates of its axes; here: fixed.

    Attributes:
        axes: What it depends on.
    """

    def __init__(self, full: Report, axes: Sequence[str] = ()) -> None:
        self.full = full
        self.axes = tuple(axes)

    def report(self, rates: Rates) -> Report:
        """At one rate of each axis; those that are not given are 1."""
        return self.full

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """At arrays of rates that broadcast against one another.

        Args:
            rates: By axis; those that are not given are 1.
            patches: ``'whole'``: a rate r of P positions is ceil(r P) patches, as the papers
                count. ``'mean'``: it is r P patches, whose cost lies on the line between the whole
                counts below and above, as for images of which some keep one patch more than
                others: without the steps, which few patches make long, a gradient exists.
        """
        return np.asarray(self.full.latency_s)


class LayerCost(Cost):
    """An operator of a block that is skipped for some of the images."""

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        return self.full * float(rates.get(LAYER, 1.0))

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        return np.asarray(rates.get(LAYER, 1.0)) * self.full.latency_s


class ShareCost(Cost):
    """An operator whose arithmetic and traffic shrink with the product of all rates.

    Args:
        full: The operator with everything computed.
        axes: What it depends on.
        positions: Patch positions, where one of the axes is of patches.
    """

    def __init__(self, full: Report, axes: Sequence[str], positions: int = 1) -> None:
        super().__init__(full, axes)
        self.positions = positions

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        share = float(self._share(rates, "whole"))
        full = self.full
        return Report(full.name, full.compute_s * share, full.memory_s * share, full.launch_s)

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        work = self.full.compute_s + self.full.memory_s
        return self.full.launch_s + self._share(rates, patches) * work

    def _share(self, rates: Rates, patches: str) -> np.ndarray:
        share = np.asarray(1.0)
        for axis in self.axes:
            rate = np.asarray(rates.get(axis, 1.0), dtype=float)
            if axis in _POSITIONS and patches == "whole":
                rate = patch_count(rate, self.positions) / self.positions
            share = share * rate
        return share


class PatchesCost(Cost):
    """An operator on patches, or on channels, or on the channels of patches.

    Args:
        cost: Its cost by the number of patches, or by the channel rate that.
        axes: What it depends on: of positions, of channels.
    """

    def __init__(self, cost: PatchCost | ChannelCost, axes: Sequence[str]) -> None:
        self.cost = cost
        super().__init__(self._at(1.0).report(cost.positions), axes)
        self._position = next((axis for axis in axes if axis in _POSITIONS), "")

    def _at(self, rate_channel: float) -> PatchCost:
        return self.cost.at(rate_channel) if isinstance(self.cost, ChannelCost) else self.cost

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        rate = float(rates.get(self._position, 1.0))
        cost = self._at(float(rates.get(CHANNEL, 1.0)))
        return cost.report(int(patch_count(rate, cost.positions)))

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        rate = np.asarray(rates.get(self._position, 1.0), dtype=float)
        if not isinstance(self.cost, ChannelCost):
            return _patch_seconds(self.cost, rate, patches)
        rate, channel = np.broadcast_arrays(rate, rates.get(CHANNEL, 1.0))
        found = np.empty(rate.shape)
        for value in np.unique(channel):
            of = channel == value
            found[of] = _patch_seconds(self._at(float(value)), rate[of], patches)
        return found


class MaskedConvCost(Cost):
    """A masker and the 1x1 convolution that reads the same input, in the cheaper of two ways.

    Args:
        fused: One dense convolution with one more output.
        masker: The masker alone.
        conv: The convolution on the patches that it keeps.
    """

    def __init__(self, fused: Cost, masker: Cost, conv: Cost) -> None:
        self.fused, self.masker, self.conv = fused, masker, conv
        super().__init__(self.report({}), conv.axes)

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        name = "masker_conv1"
        apart = Report.group(name, [self.masker.report(rates), self.conv.report(rates)])
        fused = self.fused.report(rates)
        return Report.group(name, [fused]) if fused.latency_s <= apart.latency_s else apart

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        apart = self.masker.seconds(rates) + self.conv.seconds(rates, patches)
        return np.minimum(self.fused.seconds(rates), apart)


class GroupCost(Cost):
    """Operators that are shown as one."""

    def __init__(self, name: str, parts: Sequence[Cost]) -> None:
        self.name, self.parts = name, parts
        axes = dict.fromkeys(axis for part in parts for axis in part.axes)
        super().__init__(self.report({}), tuple(axes))

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        return Report.group(self.name, [part.report(rates) for part in self.parts])

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        return sum((part.seconds(rates, patches) for part in self.parts), np.asarray(0.0))


# Operators ---------------------------------------------------------------------------------------


@singledispatch
def operator_cost(op: Operator, device: Device, batch_size: int | None) -> Cost:
    """The cost of one operator.

    Register the cost of a new kind with ``operator_cost.register``.

    Raises:
        ValueError: There is no model for its kind, or for a size.
    """
    raise ValueError(f"there is no latency model for {op.name}, a {type(op).__name__}")


@operator_cost.register
def _conv(op: Conv, device: Device, batch_size: int | None) -> Cost:
    sizes = (device, op.c_in, op.c_out, op.kernel, op.h_out, op.w_out)
    options: dict = dict(
        stride=op.stride,
        groups=op.groups,
        dilation=op.dilation,
        batch_size=batch_size,
        name=op.name,
    )
    channels = [gate for gate in op.gates if gate in (CHANNEL_IN, CHANNEL_OUT)]
    patched = any(axis in _POSITIONS for axis in op.axes)
    cost: PatchCost | ChannelCost
    if channels:
        mask = ops.ChannelMask(op.channel_groups, CHANNEL_IN in channels, CHANNEL_OUT in channels)
        options["granularity"] = op.granularity if patched else None
        cost = ops.channel_conv_cost(*sizes, mask=mask, gathered=op.gathered, **options)
    elif patched:
        options.update(granularity=op.granularity, gathered=op.gathered)
        cost = ops.dynamic_conv_cost(*sizes, **options)
    else:
        return _scaled(op, ops.static_conv(*sizes, **options))
    _only(op, POSITION, DILATED, CHANNEL)
    return PatchesCost(cost, op.axes)


@operator_cost.register
def _add(op: Add, device: Device, batch_size: int | None) -> Cost:
    sizes = (device, op.channels, op.h_out, op.w_out)
    if not any(axis in _POSITIONS for axis in op.axes):
        return _scaled(op, ops.elementwise_add(*sizes, batch_size=batch_size, name=op.name))
    _only(op, POSITION, DILATED)
    cost = ops.scatter_add_cost(
        *sizes, granularity=op.granularity, batch_size=batch_size, name=op.name
    )
    return PatchesCost(cost, op.axes)


@operator_cost.register
def _pool(op: Pool, device: Device, batch_size: int | None) -> Cost:
    found = ops.max_pool(
        device,
        op.channels,
        op.kernel,
        op.h_out,
        op.w_out,
        stride=op.stride,
        batch_size=batch_size,
        name=op.name,
    )
    return _scaled(op, found)


@operator_cost.register(GlobalPool)
@operator_cost.register(Scale)
def _values(op: MapOperator, device: Device, batch_size: int | None) -> Cost:
    cost = ops.global_average_pool if isinstance(op, GlobalPool) else ops.scale_channels
    sizes = (device, op.channels, op.h_out, op.w_out)
    return _scaled(op, cost(*sizes, batch_size=batch_size, name=op.name))


@operator_cost.register
def _linear(op: Linear, device: Device, batch_size: int | None) -> Cost:
    found = ops.fully_connected(device, op.c_in, op.c_out, batch_size=batch_size, name=op.name)
    return _scaled(op, found)


@operator_cost.register
def _masker(op: Masker, device: Device, batch_size: int | None) -> Cost:
    size = (op.h_out, op.w_out)
    options: dict = dict(stride=op.stride, batch_size=batch_size, name=op.name)
    if op.whole:
        return Cost(ops.layer_masker(device, op.c_in, op.beside, *size, **options))
    return Cost(ops.static_conv(device, op.c_in, ops.MASKER_OUTPUTS, 1, *size, **options))


def _scaled(op: Operator, full: Report) -> Cost:
    """``full``, or its share where there are gates."""
    if not op.gates:
        return Cost(full)
    if op.axes == (LAYER,):
        return LayerCost(full, op.axes)
    side = getattr(op, "granularity", 1)
    positions = 1
    if any(axis in _POSITIONS for axis in op.axes):
        positions = ceil_div(op.h_out, side) * ceil_div(op.w_out, side)  # type: ignore[attr-defined]
    return ShareCost(full, op.axes, positions)


def _only(op: Operator, *axes: str) -> None:
    others = [axis for axis in op.axes if axis not in axes]
    if others:
        raise ValueError(
            f"there is no latency model for {op.name}, a {type(op).__name__}, with the gates "
            f"{', '.join(op.gates)}"
        )


# Blocks ------------------------------------------------------------------------------------------


def operator_costs(
    operators: Sequence[Operator], device: Device, batch_size: int | None
) -> list[Cost]:
    """The costs of operators that run one after the other.

    Raises:
        ValueError: There is no model for one of them.
    """
    return list(_costs(operators, device, batch_size))


def block_costs(block: BlockShape, device: Device, batch_size: int | None) -> list[Cost]:
    """The costs of a block's operators; see :func:`operator_costs`."""
    return operator_costs(block.operators, device, batch_size)


def _costs(operators: Sequence[Operator], device: Device, batch_size: int | None) -> Iterator[Cost]:
    def cost(op: Operator) -> Cost:
        return operator_cost(op, device, batch_size)

    i = 0
    while i < len(operators):
        op = operators[i]
        following = operators[i + 1] if i + 1 < len(operators) else None
        if op.group:
            end = i
            while end < len(operators) and operators[end].group == op.group:
                end += 1
            yield GroupCost(op.group, [cost(part) for part in operators[i:end]])
            i = end
        elif isinstance(op, Masker) and isinstance(following, Conv) and _fuses(op, following):
            fused = _fused(following, device, batch_size)
            yield MaskedConvCost(fused, cost(op), cost(following))
            i += 2
        else:
            yield cost(op)
            i += 1


def _fuses(masker: Masker, conv: Conv) -> bool:
    return not masker.whole and conv.kernel == 1 and DILATED in conv.gates


def _fused(conv: Conv, device: Device, batch_size: int | None) -> Cost:
    """The dense convolution with one more output, which decides."""
    sizes = (device, conv.c_in, conv.c_out + 1, 1, conv.h_out, conv.w_out)
    options: dict = dict(stride=conv.stride, batch_size=batch_size, name="dense_fused")
    if CHANNEL_OUT not in conv.gates:
        return Cost(ops.static_conv(*sizes, **options))
    mask = ops.ChannelMask(conv.channel_groups, inputs=False, outputs=True)
    return PatchesCost(ops.channel_conv_cost(*sizes, mask=mask, **options), (CHANNEL,))


def patch_count(rate: np.ndarray | float, positions: int) -> np.ndarray:
    """Active patches at a rate: ``ceil(rate * positions)``."""
    return np.ceil((np.asarray(rate, dtype=float) - _RATE_SLACK) * positions).clip(0, positions)


def _patch_seconds(cost: PatchCost, rates: np.ndarray, patches: str) -> np.ndarray:
    if patches == "whole":
        return cost.seconds(patch_count(rates, cost.positions))
    below = np.floor(rates * cost.positions)
    above = np.minimum(below + 1, cost.positions)
    start = cost.seconds(below)
    return start + (rates * cost.positions - below) * (cost.seconds(above) - start)


def check_patches(patches: str) -> None:
    """Raise ValueError unless ``patches`` is one of :data:`PATCH_COUNTS`."""
    if patches not in PATCH_COUNTS:
        raise ValueError(f"patches must be one of {', '.join(PATCH_COUNTS)}, got {patches!r}")
