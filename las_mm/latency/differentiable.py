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
class _Curves:
    """A table as tensors: by axes the blocks, and their seconds at the grid."""

    table: LatencyTable
    curves: dict[tuple[str, ...], tuple[Tensor, Tensor]]
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
        last = len(known.table.grid) - 1
        blocks = known.fixed
        for axes, (index, values) in known.curves.items():
            rows = torch.arange(len(index), device=index.device)
            for axis in axes:  # the leading one each time
                # Seconds of one block are small against those of the network: float64.
                position = activation.axes[axis].double()[index] * last
                left = position.detach().long().clamp_(0, last - 1)
                start, end = values[rows, left], values[rows, left + 1]
                weight = (position - left).reshape(-1, *[1] * (start.dim() - 1))
                values = start + weight * (end - start)
            blocks = blocks.index_add(0, index, values)
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

    return _Curves(
        table=table,
        curves={axes: (tensor(i), tensor(s)) for axes, (i, s) in table.curves.items()},
        fixed=tensor(table.fixed_s),
        static_blocks=tensor(table.static_block_s),
        static=tensor(np.float64(table.static_s)),
    )
