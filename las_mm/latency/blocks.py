"""The cost of one block, from its operators and its activation rates, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from las_mm.network.block import BlockShape, NetworkShape
from las_mm.network.operator import CHANNEL, DILATED

from .analytical import transformer  # noqa: F401  registers its operators' costs
from .analytical.operators import check_sizes
from .analytical.rules import block_costs, operator_costs
from .device import AnyDevice, load_device
from .measured.calibrated import CalibratedDevice
from .report import Report

_T = TypeVar("_T")


class Curve(Protocol):
    """A part of a block's latency, see :class:`.analytical.costs.Cost`."""

    @property
    def axes(self) -> tuple[str, ...]:
        """What it depends on."""

    def seconds(self, rates: Mapping[str, float | np.ndarray], patches: str = ...) -> np.ndarray:
        """At arrays of rates by axis."""


def block_report(
    device: str | Path | AnyDevice,
    block: BlockShape,
    rate: float = 1.0,
    rate_dilated: float | None = None,
    batch_size: int | None = None,
    rate_channel: float = 1.0,
) -> Report:
    """Latency of one block, seconds for the whole batch, as a tree of its operators.

    Args:
        device: A device, its name or its file.
        block: The block. A static block does not depend on the rates.
        rate: Share of the patches or of the images (layer) computed, 0 to 1, and the rate of
            whatever else the block decides about but channels.
        rate_dilated: Share of conv1's patches computed by a spatial block. Defaults to None,
            the paper's setting: the same as ``rate``; on a calibrated device, the halo of
            coherent masks.
        batch_size: Images per batch. Defaults to the device's.
        rate_channel: Share of the channels computed by a block that skips channels. Defaults
            to 1.

    Raises:
        ValueError: A rate is not a number in [0, 1], ``batch_size`` is not positive, or there is
            no model for the block on the device.
    """
    device = load_device(device)
    rate = _rate("rate", rate)
    if rate_dilated is None:
        rate_dilated = float(default_dilated_rate(device, block, np.asarray(rate)))
    rate_dilated = _rate("rate_dilated", rate_dilated)
    rate_channel = _rate("rate_channel", rate_channel)
    rates = by_axis(block.axes, rate, rate_dilated, rate_channel)
    return report_at(device, block, rates, batch_size)


def report_at(
    device: AnyDevice, block: BlockShape, rates: Mapping[str, float], batch_size: int | None
) -> Report:
    """:func:`block_report` at rates by axis; those that are not given are 1."""
    batch = check_batch(block.name, device, batch_size)
    if isinstance(device, CalibratedDevice):
        return device.block_report(block, rates, batch)
    costs = block_costs(block, device, batch)
    return Report.group(block.name, [cost.report(rates) for cost in costs])


def costs_of(device: AnyDevice, block: BlockShape, batch_size: int | None) -> list[Curve]:
    """The costs that a block's latency is the sum of, seconds for the whole batch.

    Raises:
        ValueError: There is no model for the block on the device.
    """
    batch = check_batch(block.name, device, batch_size)
    if isinstance(device, CalibratedDevice):
        return [*device.block_costs(block, batch)]
    return [*block_costs(block, device, batch)]


def by_axis(axes: Iterable[str], rate: _T, rate_dilated: _T, rate_channel: _T) -> dict[str, _T]:
    """Three rates spread over the axes that they are given for."""
    named = {DILATED: rate_dilated, CHANNEL: rate_channel}
    return {axis: named.get(axis, rate) for axis in axes}


def block_seconds(
    device: AnyDevice,
    block: BlockShape,
    rates: Mapping[str, float | np.ndarray],
    batch_size: int | None = None,
    patches: str = "whole",
) -> np.ndarray:
    """Latency of a block for the whole batch at arrays of rates by axis, which broadcast."""
    costs = costs_of(device, block, batch_size)
    return sum((cost.seconds(rates, patches) for cost in costs), np.asarray(0.0))


def stem_report(device: AnyDevice, network: NetworkShape, batch_size: int | None) -> Report:
    """Latency of what stands before the first block, seconds for the whole batch.

    Raises:
        ValueError: It holds something without a model.
    """
    batch = check_batch("stem", device, batch_size)
    if isinstance(device, CalibratedDevice):
        return device.stem_report(network, batch)
    costs = operator_costs(network.stem, device, batch)
    return Report.group("stem", [cost.report({}) for cost in costs])


def default_dilated_rate(device: AnyDevice, block: BlockShape, rates: np.ndarray) -> np.ndarray:
    """conv1's rates where only the block's are known: the papers charge no halo."""
    return device.dilated(block, rates) if isinstance(device, CalibratedDevice) else rates


def check_batch(name: str, device: AnyDevice, batch_size: int | None) -> int:
    """The batch size: what is given, else the device's.

    Raises:
        ValueError: It is not a positive integer.
    """
    batch = device.batch_size if batch_size is None else batch_size
    check_sizes(name, batch_size=batch)
    return batch


def _rate(name: str, value: float) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}") from None
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return rate
