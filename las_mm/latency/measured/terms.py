"""The terms of the measured model: what a block computes, reads and writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Union

import numpy as np

from las_mm.network.bottleneck import BottleneckShape

Numbers = Union[float, np.ndarray]
_PANEL, _LANES = 64, 16  # output channels that a kernel computes together, and per register

_BYTES = 4


_CACHED_BYTES = 16 << 20  # of the input just written that a cache may still hold


_TILE_PRODUCTS = 4  # per output, of a Winograd tile


_ODD_TILE = 0.45  # of a halo's positions are in tiles that a mask of odd S cuts; 3/8 to 1/2


class Term(NamedTuple):
    """A summand: the operator and the kind of time it is reported as, and what scales it."""

    operator: str
    kind: str  # compute, memory or launch
    rate: str  # fixed; dilated: with conv1's rate; rate: with the block's


def tiled(block: BottleneckShape) -> bool:
    """Whether conv2 runs as Winograd tiles (float32)."""
    return (block.conv2_stride, block.dilation, block.groups) == (1, 1, 1) and not block.se_width


def quantities(
    block: BottleneckShape,
    batch: int,
    probes: Probes,
    rate: Numbers = 1.0,
    dilated: Numbers = 1.0,
    channel: float = 1.0,
    tiles: bool = True,
) -> dict[str, np.ndarray]:
    """The terms of a block, in seconds of a machine at its peak.

    Args:
        block: The block.
        batch: Images.
        probes: The machine.
        rate, dilated: Rates, numbers or arrays of one shape; 1 for a block that computes all.
        channel: Channel rate.
        tiles: Whether the runtime has the Winograd form at all (float32 on a CPU).
    """
    if not block.decides_positions:
        rate = dilated = np.ones_like(rate, dtype=float)
    outputs = batch * block.h_out * block.w_out
    hidden = batch * block.h_mid * block.w_mid
    inputs = batch * block.h_in * block.w_in
    width, groups, c_in, c_out = block.width, block.groups, block.c_in, block.c_out
    depth = width // groups
    kept = width if not block.has_channels else max(channel * width, 1.0)
    in_bytes, out_bytes = inputs * c_in * _BYTES, outputs * c_out * _BYTES
    hidden_bytes = hidden * kept * _BYTES
    product = 1.0 / probes.macs_per_s
    if block.has_channels and batch >= probes.parallel:
        # Every thread takes whole images, whose channels differ: an odd one keeps one thread.
        product *= math.ceil(batch / probes.parallel) * probes.parallel / batch

    def padded(n: float) -> float:
        return -(-n // _LANES) * _LANES

    def panels(n: float) -> float:
        return -(-n // _PANEL) * _PANEL

    def nanoseconds(count: Numbers) -> Numbers:
        return 1e-9 * count

    middle: float  # values of conv2's weights that are read
    each: Numbers
    found: dict[str, Numbers] = {
        "call": probes.call_s,
        "lists": nanoseconds(outputs),
        "conv1": hidden * dilated * c_in * padded(kept) * product,
        "conv1_panels": hidden * dilated * c_in * panels(kept) * product,
        "conv1_read": probes.transfer_s(inputs * c_in * _BYTES * dilated, in_bytes),
        "conv1_write": probes.transfer_s(hidden_bytes * dilated, hidden_bytes),
        "conv3": outputs * rate * kept * padded(c_out) * product,
        "conv3_panels": outputs * rate * kept * panels(c_out) * product,
        "conv3_add": probes.transfer_s(2 * out_bytes * rate, out_bytes),
    }
    decisions = batch * max(block.n_patches, 1)
    any_kept = np.minimum(1.0, rate * decisions)
    if block.decides_positions:
        found["masker_call"] = probes.call_s
        found["masker_patches"] = nanoseconds(decisions)
        # The part that the block before left in the caches, and the rest.
        near = min(in_bytes, _CACHED_BYTES)
        name = "masker" if block.has_patches else "layer_masker"
        found[name + "_near"] = probes.transfer_s(near, near)
        found[name + "_far"] = probes.transfer_s(in_bytes - near, 1e12)
    if tiled(block) and tiles:
        odd = block.has_patches and block.granularity % 2 == 1
        each = outputs * _TILE_PRODUCTS * kept * product
        whole = rate * (1 - _ODD_TILE) if odd else rate
        found["tiles"] = whole * each * padded(kept)
        found["tiles_panels"] = whole * each * panels(kept)
        found["tiles_transforms"] = nanoseconds(outputs * whole * kept)
        if odd:
            found["cut_tiles"] = dilated * _ODD_TILE * each * padded(kept)
        middle = 16 * kept * kept
    elif groups == 1:
        each = outputs * rate * 9 * kept * product
        found["conv2"] = each * padded(kept)
        found["conv2_panels"] = each * panels(kept)
        found["conv2_rows"] = nanoseconds(outputs * rate * kept)
        middle = 9 * kept * kept
    else:
        each = outputs * rate * 9 * kept * product
        found["grouped"] = each * padded(depth * kept / width)
        found["grouped_panels"] = each * panels(depth * kept / width)
        found["grouped_calls"] = nanoseconds(outputs * rate * 9 * groups)
        middle = 9 * kept * depth
    if block.has_channels:
        found["channel_masker_call"] = probes.call_s
        found["channel_masker_read"] = probes.transfer_s(in_bytes, in_bytes)
        hidden_units, logits = block.channel_hidden, 2 * block.channel_groups
        layers = hidden_units * (c_in + logits) if hidden_units else c_in * logits
        found["channel_masker_layers"] = batch * layers * product
        copied = batch * (c_in * kept + middle) * _BYTES
        found["gather_weights"] = any_kept * probes.transfer_s(copied, 1e12)
    if block.se_width:
        found["se_call"] = any_kept * probes.call_s
        found["se_rows"] = probes.transfer_s(outputs * rate * kept * _BYTES, out_bytes)
        found["se_layers"] = any_kept * 2 * batch * block.se_width * width * product
    found["phases"] = any_kept * probes.call_s
    found["weights"] = any_kept * probes.transfer_s(
        (c_in * width + middle + width * c_out) * _BYTES, 1e12
    )
    if block.downsample:
        found["downsample"] = outputs * c_in * padded(c_out) * product
        found["downsample_write"] = probes.transfer_s(out_bytes, out_bytes)
        found["fixed_weights"] = probes.transfer_s(c_in * c_out * _BYTES, 1e12)
        if block.decides_positions:
            found["dropped"] = probes.transfer_s(out_bytes * (1 - rate), out_bytes)
    return {name: np.asarray(value, dtype=float) for name, value in found.items()}


@dataclass(frozen=True)
class Probes:
    """What the machine can do at most, measured.

    Attributes:
        macs_per_s: Multiply-accumulates per second of a large matrix product, all threads.
        macs_per_s_one: The same of one thread.
        bandwidth: (bytes, bytes/s): how fast this much is read and written again and again, for
            rising sizes, so through the levels of the cache to memory.
        call_s: Seconds of one call of an op that does next to nothing.
    """

    macs_per_s: float
    macs_per_s_one: float
    bandwidth: tuple[tuple[float, float], ...]
    call_s: float

    @property
    def parallel(self) -> int:
        """Threads that compute at the same time."""
        return max(1, round(self.macs_per_s / self.macs_per_s_one))

    def transfer_s(self, size: Numbers, working_set: Numbers) -> np.ndarray:
        """Seconds to move ``size`` bytes of data that is ``working_set`` bytes large."""
        sizes, rates = np.array(self.bandwidth).T
        known = np.log(np.maximum(working_set, 1.0))
        return np.asarray(size / np.exp(np.interp(known, np.log(sizes), np.log(rates))))
