"""The cost of the operators that only transformer layers have.

Our extension of the published model, see :mod:`.tokens`, whose kernels these are. Fewer tokens and
heads shrink arithmetic and traffic in proportion; attention among the kept tokens shrinks with the
square of their share.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from las_mm.network.operator import Operator, axis_of
from las_mm.network.transformer import Attention, LayerNorm, LinearAttention

from ..report import Report
from . import operators as ops
from .costs import Cost, Rates, ShareCost
from .device import Device
from .rules import operator_cost
from .tokens import layer_norm, matmul, softmax


class PowerCost(Cost):
    """An operator whose work shrinks with rates of which some count more than once.

    Args:
        full: The operator with everything computed.
        gates: Gates of the operator, as often as they scale its work.
    """

    def __init__(self, full: Report, gates: tuple[str, ...]) -> None:
        self.powers = Counter(map(axis_of, gates))
        super().__init__(full, tuple(self.powers))

    def _share(self, rates: Rates) -> np.ndarray:
        share = np.asarray(1.0)
        for axis, power in self.powers.items():
            share = share * np.asarray(rates.get(axis, 1.0), dtype=float) ** power
        return share

    def report(self, rates: Rates) -> Report:
        """See the base class."""
        share = float(self._share(rates))
        return Report.group(
            self.full.name,
            [
                Report(part.name, part.compute_s * share, part.memory_s * share, part.launch_s)
                for part in self.full.children
            ],
        )

    def seconds(self, rates: Rates, patches: str = "whole") -> np.ndarray:
        """See the base class."""
        work = self.full.compute_s + self.full.memory_s
        return self.full.launch_s + self._share(rates) * work


@operator_cost.register
def _attention(op: Attention, device: Device, batch_size: int | None) -> Cost:
    images = device.batch_size if batch_size is None else batch_size
    ops.check_sizes(op.name, batch_size=images)
    count, tokens, depth = op.heads * images, op.tokens, op.head_dim
    parts = [
        matmul(device, count, tokens, depth, tokens, "scores"),
        softmax(device, count * tokens, tokens, batch_size=1),
        matmul(device, count, tokens, tokens, depth, "mix"),
    ]
    return PowerCost(Report.group(op.name, parts), op.gates)


@operator_cost.register
def _linear_attention(op: LinearAttention, device: Device, batch_size: int | None) -> Cost:
    _ungated(op)
    images = device.batch_size if batch_size is None else batch_size
    ops.check_sizes(op.name, batch_size=images)
    tokens, width, features = op.tokens, op.channels, op.features
    parts = [
        matmul(device, 2 * images, tokens, width, features, "features"),
        matmul(device, images, features, tokens, width + 1, "sums"),
        matmul(device, images, tokens, features, width, "mix"),
    ]
    return Cost(Report.group(op.name, parts))


@operator_cost.register
def _layer_norm(op: LayerNorm, device: Device, batch_size: int | None) -> Cost:
    tokens = op.h_out * op.w_out
    found = layer_norm(device, tokens, op.channels, batch_size=batch_size, name=op.name)
    return ShareCost(found, op.axes) if op.gates else Cost(found)


def _ungated(op: Operator) -> None:
    if op.gates:
        raise ValueError(f"there is no latency model for {op.name} with the gates {op.gates}")
