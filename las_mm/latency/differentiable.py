"""Predicted latency as a function of the activation rates that has gradients.

Needs torch, which the rest of :mod:`las_mm.latency` does without.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from las_mm.bounded import Recent

from .predictor import LatencyTable
from .shapes import NetworkShape
from .tables import LatencyTables

if TYPE_CHECKING:
    from las_mm.models.activation import NetworkActivation


@dataclass(frozen=True)
class LatencyReport:
    """Dynamic against static predicted latency, differentiable in the rates; float64.

    Attributes:
        dynamic: Seconds per image of the network at its rates, stem included, shape ().
        static: Seconds per image of the same network with every block static, shape ().
        block_ratios: Dynamic over static per block, shape (n_blocks,).
    """

    dynamic: Tensor
    static: Tensor
    block_ratios: Tensor

    @property
    def ratio(self) -> Tensor:
        """Dynamic over static, shape ()."""
        return self.dynamic / self.static


@dataclass(frozen=True)
class _Lines:
    """A table as tensors.

    Segment i of curve j is ``start[j, i] + slope[j, i] * rate``. Where blocks skip channels, cell
    (i, k) of surface j is ``start + slope * rate + (slope_channel + both * rate) * rate_channel``.
    """

    table: LatencyTable
    lines: Tensor  # (2 * n_blocks * segments (* segments), 2 or 4); conv1's come first
    first: Tensor  # (2, n_blocks): row of each curve's first segment, or surface's first cell
    fixed: Tensor  # (n_blocks,)
    static_blocks: Tensor  # (n_blocks,)
    static: Tensor  # ()


class DifferentiableLatency:
    """Latency of recorded rates through the tabulated blocks, piecewise linear in the rates.

    The gradient is the slope of the table's segment that a rate lies in; at an entry, of the
    segment to its right. A rate that rounding has pushed beyond 0 or 1 continues the last segment.

    Args:
        tables: Tables of the device; ``patches='mean'`` gives them slopes that mean something.
    """

    def __init__(self, tables: LatencyTables) -> None:
        self.tables = tables
        self._lines: Recent[tuple[NetworkShape, torch.device], _Lines] = Recent()
        self._last: _Lines | None = None

    def report(self, activation: NetworkActivation) -> LatencyReport:
        """The latency that the recorded rates amount to.

        Args:
            activation: Rates of a forward pass, whose shape (the network at the input's size) is
                the one that is costed. Rates of static blocks are not used.
        """
        curves = self._curves(activation.shape, activation.rates.device)
        segments = len(curves.table.grid) - 1
        # Seconds of one block are small against those of the network: float64, as for FLOPs.
        rates = torch.stack([activation.rates_dilated, activation.rates]).double()
        segment = (rates.detach() * segments).long().clamp_(0, segments - 1)
        if curves.table.channel_blocks.size:
            channel = activation.rates_channel.double()
            other = (channel.detach() * segments).long().clamp_(0, segments - 1)
            cell = curves.first + segment * segments + other
            start, slope, slope_channel, both = curves.lines[cell].unbind(-1)
            parts = start + slope * rates + (slope_channel + both * rates) * channel
        else:
            start, slope = curves.lines[curves.first + segment].unbind(-1)
            parts = start + slope * rates
        blocks = parts.sum(0) + curves.fixed
        return LatencyReport(
            dynamic=blocks.sum() + curves.table.stem_s,
            static=curves.static,
            block_ratios=blocks / curves.static_blocks,
        )

    def _curves(self, network: NetworkShape, device: torch.device) -> _Lines:
        last = self._last
        if last is None or last.table.network is not network or last.lines.device != device:
            make = functools.partial(_tabulate, self.tables(network), device)
            last = self._last = self._lines.get((network, device), make)
        return last


def _tabulate(table: LatencyTable, device: torch.device) -> _Lines:
    curves = np.stack([table.conv1_s, table.rest_s])  # (2, n_blocks, points)
    slope, start = _fit(curves, table.grid)
    lines, fixed = [start, slope], table.fixed_s
    if table.channel_blocks.size:
        lines, fixed = _surfaces(table, curves)
    first = np.arange(0, lines[0].size, lines[0][0, 0].size).reshape(curves.shape[:2])

    def tensor(values: np.ndarray | float) -> Tensor:
        return torch.as_tensor(values, device=device)

    return _Lines(
        table=table,
        lines=tensor(np.stack([part.ravel() for part in lines], axis=-1)),
        first=tensor(first),
        fixed=tensor(fixed),
        static_blocks=tensor(table.static_block_s),
        static=tensor(np.float64(table.static_s)),
    )


def _fit(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slope, value at 0) of each segment of curves along the last axis."""
    slope = np.diff(values) / np.diff(grid)
    return slope, values[..., :-1] - slope * grid[:-1]


def _surfaces(table: LatencyTable, curves: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Coefficients of the cells, each (2, n_blocks, segments, segments), and the fixed seconds.

    Blocks that skip no channels have surfaces that are flat along the channel rate.
    """
    points = len(table.grid)
    values = np.repeat(curves[..., None], points, axis=-1)  # rate, channel rate
    values[:, table.channel_blocks] = np.stack([table.channel_conv1_s, table.channel_rest_s])
    fixed = table.fixed_s.copy()
    fixed[table.channel_blocks] = 0  # in the surfaces
    # First along the channel rate, then each coefficient along the rate.
    lines = []
    for part in reversed(_fit(values, table.grid)):  # value at channel rate 0, then its slope
        slope, start = _fit(part.swapaxes(-1, -2), table.grid)
        lines += [start.swapaxes(-1, -2), slope.swapaxes(-1, -2)]
    return lines, fixed
