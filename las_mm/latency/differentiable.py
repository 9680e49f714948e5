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
from las_mm.network.block import NetworkShape

from .table import LatencyTable, LatencyTables

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
class _Cells:
    """Curves, or surfaces, as polynomials: one per segment, or cell, of the grid.

    Attributes:
        block: The block of each, (rows,).
        axis: Number of each of its k axes, (rows,).
        strides: Cells from one segment to the next along each axis.
        first: Its first segment or cell, (rows,).
        terms: Coefficients, (rows * segments^k, 2^k); the last axis' powers change first.
    """

    block: Tensor
    axis: tuple[Tensor, ...]
    strides: tuple[int, ...]
    first: Tensor
    terms: Tensor


@dataclass(frozen=True)
class _Curves:
    """A table as tensors."""

    table: LatencyTable
    cells: tuple[_Cells, ...]
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
        self._known: Recent[tuple[NetworkShape, torch.device], _Curves] = Recent()
        self._last: _Curves | None = None

    def report(self, activation: NetworkActivation) -> LatencyReport:
        """The latency that the recorded rates amount to.

        Args:
            activation: Rates of a forward pass, whose shape (the network at the input's size) is
                the one that is costed. Rates of static blocks are not used.
        """
        known = self._curves(activation.shape, activation.shares.device)
        segments = len(known.table.grid) - 1
        # Seconds of one block are small against those of the network: float64, as for FLOPs.
        by_axis = [activation.axes[axis] for axis in activation.shape.axes]
        rates = torch.stack(by_axis).double() if by_axis else known.fixed[None]
        blocks = known.fixed
        for cells in known.cells:
            own = [rates[axis, cells.block] for axis in cells.axis]
            cell = cells.first
            for rate, stride in zip(own, cells.strides):
                segment = (rate.detach() * segments).long().clamp_(0, segments - 1)
                cell = cell.add(segment, alpha=stride)
            terms = list(cells.terms[cell].unbind(-1))
            for rate in reversed(own):
                terms = [torch.addcmul(a, b, rate) for a, b in zip(terms[::2], terms[1::2])]
            blocks = blocks.index_add(0, cells.block, terms[0])
        return LatencyReport(
            dynamic=blocks.sum() + known.table.stem_s,
            static=known.static,
            block_ratios=blocks / known.static_blocks,
        )

    def _curves(self, network: NetworkShape, device: torch.device) -> _Curves:
        last = self._last
        if last is None or last.table.network is not network or last.fixed.device != device:
            make = functools.partial(_tensors, self.tables(network), device)
            last = self._last = self._known.get((network, device), make)
        return last


def _tensors(table: LatencyTable, device: torch.device) -> _Curves:
    def tensor(values: np.ndarray | float) -> Tensor:
        return torch.as_tensor(values, device=device)

    cells = []
    for count in sorted({len(axes) for axes in table.curves}):
        found = [(axes, *own) for axes, own in table.curves.items() if len(axes) == count]
        numbers = [[table.network.axes.index(axis) for axis in axes] for axes, _, _ in found]
        rows = [len(blocks) for _, blocks, _ in found]
        terms = np.concatenate([_polynomials(seconds, table.grid) for _, _, seconds in found])
        per_row = (len(table.grid) - 1) ** count
        cells.append(
            _Cells(
                block=tensor(np.concatenate([blocks for _, blocks, _ in found])),
                axis=tuple(map(tensor, np.repeat(np.array(numbers).T, rows, axis=1))),
                strides=tuple((len(table.grid) - 1) ** i for i in reversed(range(count))),
                first=tensor(np.arange(sum(rows)) * per_row),
                terms=tensor(terms.reshape(-1, 2**count)),
            )
        )
    return _Curves(
        table=table,
        cells=tuple(cells),
        fixed=tensor(table.fixed_s),
        static_blocks=tensor(table.static_block_s),
        static=tensor(np.float64(table.static_s)),
    )


def _polynomials(seconds: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(rows, points, ...) of k axes -> (rows, segments, ..., 2^k): see :class:`_Cells`."""
    parts = [seconds]
    for axis in range(1, seconds.ndim):
        parts = [found for part in parts for found in _fit(part, grid, axis)]
    return np.stack(parts, axis=-1)


def _fit(values: np.ndarray, grid: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(value at 0, slope) of each segment along an axis."""
    values = np.moveaxis(values, axis, -1)
    slope = np.diff(values) / np.diff(grid)
    start = values[..., :-1] - slope * grid[:-1]
    return np.moveaxis(start, -1, axis), np.moveaxis(slope, -1, axis)
