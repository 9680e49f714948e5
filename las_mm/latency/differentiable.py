"""Predicted latency as a function of the activation rates that has gradients.

Needs torch, which the rest of :mod:`las_mm.latency` does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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
    """A table as tensors. Segment i of curve j is ``start[j, i] + slope[j, i] * rate``."""

    table: LatencyTable
    lines: Tensor  # (2 * n_blocks * segments, 2): start and slope, conv1's curves first
    first: Tensor  # (2, n_blocks): row of each curve's first segment
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
        self._lines: dict[tuple[NetworkShape, torch.device], _Lines] = {}
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
        start, slope = curves.lines[curves.first + segment].unbind(-1)
        blocks = (start + slope * rates).sum(0) + curves.fixed
        return LatencyReport(
            dynamic=blocks.sum() + curves.table.stem_s,
            static=curves.static,
            block_ratios=blocks / curves.static_blocks,
        )

    def _curves(self, network: NetworkShape, device: torch.device) -> _Lines:
        last = self._last
        if last is None or last.table.network is not network or last.lines.device != device:
            key = (network, device)
            if key not in self._lines:
                self._lines[key] = _tabulate(self.tables(network), device)
            last = self._last = self._lines[key]
        return last


def _tabulate(table: LatencyTable, device: torch.device) -> _Lines:
    curves = np.stack([table.conv1_s, table.rest_s])  # (2, n_blocks, points)
    slope = np.diff(curves) / np.diff(table.grid)
    start = curves[..., :-1] - slope * table.grid[:-1]
    first = np.arange(0, slope.size, slope.shape[-1]).reshape(slope.shape[:-1])

    def tensor(values: np.ndarray | float) -> Tensor:
        return torch.as_tensor(values, device=device)

    return _Lines(
        table=table,
        lines=tensor(np.stack([start.ravel(), slope.ravel()], axis=-1)),
        first=tensor(first),
        fixed=tensor(table.fixed_s),
        static_blocks=tensor(table.static_block_s),
        static=tensor(np.float64(table.static_s)),
    )
