"""What an operator costs on a device as a function of the rates of its gates.

The "paper" setting is a single rate per block, used by the published figures: conv1 gets the same
rate as conv2 and conv3, without the halo that conv2 needs. How rates become patches: an operator
whose map is H x W has ``P = ceil(H/S) * ceil(W/S)`` patch positions and computes
``n = ceil(rate * P)`` of them. conv1 is charged on patches of the same side S on *its own* output
map, so a stride-2 block of style 'pytorch' has about ``4 * P`` positions there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np

from las_mm.network.operator import (
    CHANNEL,
    DILATED,
    LAYER,
    POSITION,
)

from ..report import Report
from .channels import ChannelCost
from .tiling import PatchCost

PATCH_COUNTS = ("whole", "mean")
# Rates measured as count / positions in float32 are off by this much: without the slack,
# 3/49 of 49 positions would be 4 patches.
_RATE_SLACK = 1e-7
POSITION_AXES = (POSITION, DILATED)
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
            if axis in POSITION_AXES and patches == "whole":
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
        self._position = next((axis for axis in axes if axis in POSITION_AXES), "")

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


# Blocks ------------------------------------------------------------------------------------------


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
