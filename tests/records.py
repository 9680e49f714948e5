"""Records of forward passes that did not happen."""

from __future__ import annotations

import torch

from las_mm.latency import NetworkShape
from las_mm.latency.blocks import by_axis
from las_mm.models.activation import NetworkActivation


def record(
    shape: NetworkShape, rates, dilated=None, channel=None, decisions=()
) -> NetworkActivation:
    """What a network did whose blocks have these rates, (n_blocks,) each."""
    rates = torch.as_tensor(rates)
    ones = torch.ones_like(rates)
    dilated = rates if dilated is None else torch.as_tensor(dilated, dtype=rates.dtype)
    by = by_axis(shape.axes or ("position",), rates, dilated, ones if channel is None else channel)
    return NetworkActivation.at(shape, by, decisions)
