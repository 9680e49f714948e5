"""Latency of whole networks: as a report, and tabulated for use at every training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np

from las_mm.bounded import Recent
from las_mm.network.architectures import resnet_shape
from las_mm.network.block import NetworkShape

from .analytical.costs import check_patches
from .blocks import by_axis, costs_of, default_dilated_rate, report_at, stem_report
from .device import AnyDevice, load_device
from .report import Report

Values = Union[float, Sequence[float], np.ndarray]


def network_report(
    device: str | Path | AnyDevice,
    network: NetworkShape,
    rates: Values | Mapping[str, Values],
    rates_dilated: Values | None = None,
    batch_size: int | None = None,
    include_stem: bool = True,
    per_image: bool = True,
    rates_channel: Values = 1.0,
) -> Report:
    """Latency of a network, as a tree of stem and stages, blocks and operators.

    Args:
        device: A device, its name or its file.
        network: The network.
        rates: Rate of every block, or one for all, of positions, layers and whatever else it
            decides about but channels. Those of static blocks are not used. Or all of them by
            axis (1 where an axis is not there), in which case the next two are not used.
        rates_dilated: conv1's rate of every block, or one for all. Defaults to None: ``rates``.
        batch_size: Images per batch. Defaults to the device's.
        include_stem: Whether to count the stem. Defaults to True.
        per_image: Whether to divide the batch latency by the batch size, as the published
            figures do. Defaults to True.
        rates_channel: Channel rate of every block, or one for all. Only those of blocks that
            skip channels are used. Defaults to 1.

    Raises:
        ValueError: Rates of the wrong number or outside [0, 1], a bad ``batch_size``, or a block
            without a model on the device.
    """
    device = load_device(device)
    count = len(network.blocks)
    if isinstance(rates, Mapping):
        known = {axis: _rates(axis, values, count) for axis, values in rates.items()}
    else:
        known = _spread(device, network, rates, rates_dilated, rates_channel)
    groups = [stem_report(device, network, batch_size)] if include_stem and network.stem else []
    stages: dict[int, list[Report]] = {}
    for i, block in enumerate(network.blocks):
        own = {axis: float(known[axis][i]) for axis in block.axes if axis in known}
        stages.setdefault(block.stage, []).append(report_at(device, block, own, batch_size))
    groups += [Report.group(f"stage{stage}", blocks) for stage, blocks in stages.items()]
    report = Report.group(network.name, groups)
    images = device.batch_size if batch_size is None else batch_size
    return report * (1 / images) if per_image else report


def paper_report(
    device: str | Path | AnyDevice,
    depth: int = 101,
    granularity: Sequence[int] = (4, 4, 2, 1),
    mode: str | Sequence[str] = "spatial",
    rate: float = 0.5,
    rate_channel: float = 1.0,
) -> Report:
    """Seconds per image of a ResNet at 224 x 224 as the published figures count it.

    The four stages only, without the first stage's shortcut convolution, one rate for
    everything, at the device's batch size (arXiv 2308.15949).

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    network = resnet_shape(depth, mode=mode, granularity=granularity, stage1_downsample=False)
    return network_report(device, network, rate, include_stem=False, rates_channel=rate_channel)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds per image.

    Args:
        total_s: The network.
        static_s: The same network with every block static.
        block_s: Every block, shape (n_blocks,).
    """

    total_s: float
    static_s: float
    block_s: np.ndarray

    @property
    def ratio(self) -> float:
        """Latency relative to the static network."""
        return self.total_s / self.static_s


class LatencyTable:
    """Latency curves of a network's blocks, tabulated once for use at every training step.

    A block's latency is a sum over its operators, each a function of the rates of its own axes: of
    none, of one, or of two (positions and channels). The sum over the operators of the same axes is
    tabulated at ``grid`` along each of them and interpolated linearly. Table entries are exact;
    between them the true latency is a staircase, since both patches and rounds of patches are whole
    numbers. For ResNet-101 at 224 x 224 the network is off by under 1 % at mixed rates, and by up
    to 6 % where all blocks share one rate and step together; :func:`network_report` gives the
    staircase. Layer and static blocks are exact.

    All times are seconds per image.

    Attributes:
        grid: Rates of the entries, shape (points,), from 0 to 1 in equal steps.
        fixed_s: What no rate changes, shape (n_blocks,).
        curves: By axes the blocks that have operators of just these, shape (rows,), and their
            seconds, shape (rows, points) or (rows, points, points).
        static_block_s: Every block if it were static, shape (n_blocks,).
        stem_s: The stem.
        static_s: The network with all blocks static, with its stem.

    Args:
        device: A device, its name or its file.
        network: The network.
        batch_size: Images per batch. Defaults to the device's.
        points: Entries per curve, at least 2. Defaults to 33.
        include_stem: Whether to count the stem. Defaults to True.
        patches: ``'whole'`` or ``'mean'``, see :meth:`.analytical.costs.Cost.seconds`. Defaults to
            ``'whole'``.

    Raises:
        ValueError: ``points``, ``batch_size`` or ``patches`` is out of range, or there is no model
            for a block on the device.
    """

    def __init__(
        self,
        device: str | Path | AnyDevice,
        network: NetworkShape,
        batch_size: int | None = None,
        points: int = 33,
        include_stem: bool = True,
        patches: str = "whole",
    ) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 2:
            raise ValueError(f"points must be an integer >= 2, got {points!r}")
        check_patches(patches)
        self.device = load_device(device)
        self.network = network
        self.batch_size = self.device.batch_size if batch_size is None else batch_size
        self.grid = np.linspace(0.0, 1.0, points)
        # Networks repeat their blocks, which differ in name and stage only.
        keys = [block.anonymous() for block in network.blocks]
        kinds = {key: self._tabulate(key, patches) for key in dict.fromkeys(keys)}
        self.fixed_s, self.static_block_s = np.zeros((2, len(keys)))
        rows: dict[tuple[str, ...], list[tuple[int, np.ndarray]]] = {}
        for i, key in enumerate(keys):
            static_s, curves = kinds[key]
            self.static_block_s[i] = static_s
            for axes, seconds in curves.items():
                if axes:
                    rows.setdefault(axes, []).append((i, seconds))
                else:
                    self.fixed_s[i] = float(seconds)
        self.curves = {
            axes: (np.array([i for i, _ in found]), np.stack([seconds for _, seconds in found]))
            for axes, found in rows.items()
        }
        self.stem_s = 0.0
        if include_stem and network.stem:
            stem = stem_report(self.device, network, self.batch_size)
            self.stem_s = stem.latency_s / self.batch_size
        self.static_s = self.stem_s + float(self.static_block_s.sum())

    def _tabulate(self, block, patches: str) -> tuple[float, dict[tuple[str, ...], np.ndarray]]:
        """Seconds per image of the static block, and by axes the curves of the block."""
        static = costs_of(self.device, block.in_mode("static"), self.batch_size)
        curves: dict[tuple[str, ...], np.ndarray] = {}
        for cost in costs_of(self.device, block, self.batch_size):
            count = len(cost.axes)
            rates = {
                axis: self.grid.reshape([-1 if i == j else 1 for j in range(count)])
                for i, axis in enumerate(cost.axes)
            }
            seconds = np.broadcast_to(cost.seconds(rates, patches), [len(self.grid)] * count)
            curves[cost.axes] = curves.get(cost.axes, 0.0) + seconds / self.batch_size
        static_s = sum(float(cost.seconds({})) for cost in static)
        return static_s / self.batch_size, curves

    def predict(
        self,
        rates: Values,
        rates_dilated: Values | None = None,
        rates_channel: Values = 1.0,
    ) -> Prediction:
        """Latency at the given rates.

        Args:
            rates: Rate of every block, shape (n_blocks,), or one for all: of positions, layers and
                whatever else it decides about but channels. Those of static blocks are not used.
            rates_dilated: conv1's rates likewise. Defaults to None: ``rates``, or on a calibrated
                device the halo of coherent masks.
            rates_channel: Channel rates likewise. Defaults to 1.

        Raises:
            ValueError: Rates of the wrong number or outside [0, 1].
        """
        return self.predict_axes(
            _spread(self.device, self.network, rates, rates_dilated, rates_channel)
        )

    def predict_axes(self, rates: Mapping[str, np.ndarray]) -> Prediction:
        """Latency at the rates of every block by axis, each of shape (n_blocks,), in [0, 1]."""
        block_s = self.fixed_s.copy()
        last = len(self.grid) - 1
        for axes, (blocks, values) in self.curves.items():
            for axis in axes:  # the leading one each time
                position = np.asarray(rates[axis], dtype=float)[blocks] * last
                left = np.minimum(position.astype(np.intp), last - 1)
                rows = np.arange(len(blocks))
                start, end = values[rows, left], values[rows, left + 1]
                weight = (position - left).reshape(-1, *[1] * (start.ndim - 1))
                values = start + weight * (end - start)
            block_s[blocks] += values
        return Prediction(self.stem_s + float(block_s.sum()), self.static_s, block_s)


class LatencyTables:
    """:class:`LatencyTable` of whatever shape a training comes along with, each built once.

    Args:
        device: A device, its name or its file.
        batch_size: Images per batch. Defaults to the device's.
        options: Other arguments of :class:`LatencyTable`: ``points``, ``include_stem``,
            ``patches``.
    """

    def __init__(
        self, device: str | Path | AnyDevice, batch_size: int | None = None, **options: Any
    ) -> None:
        self.device = load_device(device)
        self.batch_size = batch_size
        self.options = options
        self._tables: Recent[NetworkShape, LatencyTable] = Recent()
        self._last: LatencyTable | None = None

    def __call__(self, network: NetworkShape) -> LatencyTable:
        """The table of ``network``: the network at one input size."""
        # A backbone keeps its shapes, and hashing one takes longer than reading a table.
        if self._last is None or self._last.network is not network:
            self._last = self._tables.get(
                network,
                lambda: LatencyTable(
                    self.device, network, batch_size=self.batch_size, **self.options
                ),
            )
        return self._last


def _spread(
    device: AnyDevice,
    network: NetworkShape,
    rates: Values,
    rates_dilated: Values | None,
    rates_channel: Values,
) -> dict[str, np.ndarray]:
    """Rates of every block by axis, each (n_blocks,), checked."""
    count = len(network.blocks)
    active = _rates("rates", rates, count)
    if rates_dilated is None:
        pairs = zip(network.blocks, active)
        dilated = np.array(
            [float(default_dilated_rate(device, b, np.asarray(r))) for b, r in pairs]
        )
    else:
        dilated = _rates("rates_dilated", rates_dilated, count)
    channel = _rates("rates_channel", rates_channel, count)
    return by_axis(network.axes, active, dilated, channel)


def _rates(name: str, values: Values, count: int) -> np.ndarray:
    """``values`` as an array of shape (count,), checked."""
    try:
        rates = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in [0, 1], got {values!r}") from None
    if rates.ndim == 0:
        rates = np.full(count, float(rates))
    if rates.shape != (count,):
        raise ValueError(f"{name} must have one entry per block ({count}), got shape {rates.shape}")
    wrong = ~((rates >= 0) & (rates <= 1))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(f"{name} must lie in [0, 1], got {rates[index]} for block {index}")
    return rates
