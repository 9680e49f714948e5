"""Latency of a block on a measured machine: a formula with fitted constants, and a correction.

The formula. A block's time is a sum of terms, each a quantity of the analytical kind (LAUDNet,
arXiv 2308.15949, section 4: multiply-accumulates over the peak, bytes over the bandwidth of the
level of memory that holds them, calls) times a constant that says how far the kernels are from
that ideal. Quantities follow how the sparse runtime works: outputs in panels of 64 channels, 3x3
convolutions of stride 1 as Winograd tiles of 2x2 outputs (16 products in place of 36), conv1 at
the dilated rate, weights read once from memory.

The correction. What the formula leaves out (remainders, caches, how threads share few rows) is
learned: a Gaussian process on the logarithm of measured over predicted time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

import numpy as np

from las_mm.network.bottleneck import BottleneckShape

Numbers = Union[float, np.ndarray]
_BYTES = 4
_CACHED_BYTES = 16 << 20  # of the input just written that a cache may still hold
_LARGEST_CORRECTION = 0.5  # of the logarithm; beyond lies what disturbed measurements taught
_PANEL, _LANES = 64, 16  # output channels that a kernel computes together, and per register
_TILE_PRODUCTS = 4  # per output, of a Winograd tile
_ODD_TILE = 0.45  # of a halo's positions are in tiles that a mask of odd S cuts; 3/8 to 1/2


class Term(NamedTuple):
    """A summand: the operator and the kind of time it is reported as, and what scales it."""

    operator: str
    kind: str  # compute, memory or launch
    rate: str  # fixed; dilated: with conv1's rate; rate: with the block's


TERMS: dict[str, Term] = {
    "call": Term("block", "launch", "fixed"),
    "phases": Term("block", "launch", "rate"),
    "lists": Term("block", "launch", "fixed"),
    "masker_call": Term("masker", "launch", "fixed"),
    "masker_patches": Term("masker", "compute", "fixed"),
    "masker_near": Term("masker", "memory", "fixed"),
    "masker_far": Term("masker", "memory", "fixed"),
    "layer_masker_near": Term("masker", "memory", "fixed"),
    "layer_masker_far": Term("masker", "memory", "fixed"),
    "channel_masker_call": Term("channel_masker", "launch", "fixed"),
    "channel_masker_read": Term("channel_masker", "memory", "fixed"),
    "channel_masker_layers": Term("channel_masker", "compute", "fixed"),
    "gather_weights": Term("gather", "memory", "rate"),
    "conv1": Term("conv1", "compute", "dilated"),
    "conv1_panels": Term("conv1", "compute", "dilated"),
    "conv1_read": Term("conv1", "memory", "dilated"),
    "conv1_write": Term("conv1", "memory", "dilated"),
    "conv2": Term("conv2", "compute", "rate"),
    "conv2_panels": Term("conv2", "compute", "rate"),
    "conv2_rows": Term("conv2", "memory", "rate"),
    "grouped": Term("conv2", "compute", "rate"),
    "grouped_panels": Term("conv2", "compute", "rate"),
    "grouped_calls": Term("conv2", "launch", "rate"),
    "tiles": Term("conv2", "compute", "rate"),
    "tiles_panels": Term("conv2", "compute", "rate"),
    "tiles_transforms": Term("conv2", "memory", "rate"),
    "cut_tiles": Term("conv2", "compute", "dilated"),
    "se_call": Term("se", "launch", "rate"),
    "se_rows": Term("se", "memory", "rate"),
    "se_layers": Term("se", "compute", "rate"),
    "conv3": Term("conv3", "compute", "rate"),
    "conv3_panels": Term("conv3", "compute", "rate"),
    "conv3_add": Term("conv3", "memory", "rate"),
    "dropped": Term("scatter_add", "memory", "rate"),
    "downsample": Term("downsample", "compute", "fixed"),
    "downsample_write": Term("downsample", "memory", "fixed"),
    "weights": Term("weights", "memory", "rate"),
    "fixed_weights": Term("weights", "memory", "fixed"),
}


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


INPUTS = (
    "outputs",
    "kept products",
    "batch",
    "width",
    "c_in",
    "expansion",
    "depth",
    "shorter side",
    "stride",
    "downsample",
    "decides",
    "patches",
    "granularity",
    "rate",
    "channels",
    "channel rate",
    "se",
)
"""What the correction depends on; most of it on a logarithmic scale."""


def correction_inputs(
    block: BottleneckShape, batch: int, rate: Numbers, channel: float = 1.0
) -> np.ndarray:
    """:data:`INPUTS` of a block at the rates of an array (points,): (points, inputs)."""
    rate = np.atleast_1d(np.asarray(rate, dtype=float))
    if not block.decides_positions:
        rate = np.ones_like(rate)
    outputs = batch * block.h_out * block.w_out
    depth = block.width // block.groups
    columns: Sequence[Numbers] = (
        np.log(outputs),
        np.log(outputs * rate * block.width * depth + 1e5),
        np.log(batch),
        np.log(block.width),
        np.log(block.c_in),
        np.log(block.c_out / block.width),
        np.log(depth),
        np.log(min(block.h_out, block.w_out)),
        block.stride - 1,
        block.downsample,
        block.decides_positions,
        block.has_patches,
        np.log(block.granularity) if block.has_patches else 0.0,
        rate,
        block.has_channels,
        channel if block.has_channels else 1.0,
        block.se_width > 0,
    )
    return np.stack([np.broadcast_to(column, rate.shape) for column in columns], axis=1)


@dataclass(frozen=True)
class Correction:
    """The mean of a Gaussian process with an anisotropic squared-exponential kernel.

    Attributes:
        center, scale: Of the inputs, shape (inputs,).
        points: Inputs that it was fitted to, divided by scale and length, (points, inputs).
        weights: Of the points, shape (points,).
        amplitude: Variance of the kernel.
    """

    center: np.ndarray
    scale: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    amplitude: float

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """The logarithm of measured over formula's time: (n, inputs) -> (n,)."""
        scaled = (inputs - self.center) / self.scale
        distance = (
            (scaled**2).sum(1)[:, None] + (self.points**2).sum(1)[None] - 2 * scaled @ self.points.T
        )
        found = self.amplitude * np.exp(-0.5 * np.maximum(distance, 0.0)) @ self.weights
        return np.clip(found, -_LARGEST_CORRECTION, _LARGEST_CORRECTION)


class BlockCurves(NamedTuple):
    """Seconds of a block for the whole batch at the rates of an array.

    Attributes:
        dilated: What goes with conv1's rate, at conv1's rates.
        rate: All else, at the block's rates.
    """

    dilated: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True)
class FittedModel:
    """What was fitted to the measurements of one machine.

    Attributes:
        probes: The machine.
        constants: Factor of every term.
        correction: Learned correction.
        stem_s: Constants of stems: seconds per call, and per multiply-accumulate of a stem with
            pooling (ResNet's) and without.
        tiles: Whether conv2 has a Winograd form.
    """

    probes: Probes
    constants: Mapping[str, float]
    correction: Correction
    stem_s: Mapping[str, float]
    tiles: bool

    def parts(
        self,
        block: BottleneckShape,
        batch: int,
        rate: Numbers,
        dilated: Numbers,
        channel: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Seconds of every term of a block, correction included; see :func:`quantities`."""
        rate, dilated = np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(value, dtype=float)) for value in (rate, dilated))
        )
        found = quantities(block, batch, self.probes, rate, dilated, channel, self.tiles)
        by_rate = {
            key: np.exp(self.correction(correction_inputs(block, batch, values, channel)))
            for key, values in (("rate", rate), ("dilated", dilated))
        }
        by_rate["fixed"] = by_rate["rate"]
        return {
            name: self.constants[name] * value * by_rate[TERMS[name].rate]
            for name, value in found.items()
        }

    def seconds(
        self,
        block: BottleneckShape,
        batch: int,
        rate: Numbers,
        dilated: Numbers,
        channel: float = 1.0,
    ) -> np.ndarray:
        """Seconds of a block for the whole batch, at rates of shape (points,)."""
        curves = self.curves(block, batch, rate, dilated, channel)
        return curves.dilated + curves.rate

    def curves(
        self,
        block: BottleneckShape,
        batch: int,
        rate: Numbers,
        dilated: Numbers,
        channel: float = 1.0,
    ) -> BlockCurves:
        """Seconds of a block, in the part that goes with conv1's rate and the rest."""
        parts = self.parts(block, batch, rate, dilated, channel)
        zero = np.zeros(np.broadcast(np.atleast_1d(rate), np.atleast_1d(dilated)).shape)
        conv1 = sum((s for n, s in parts.items() if TERMS[n].rate == "dilated"), zero)
        rest = sum((s for n, s in parts.items() if TERMS[n].rate != "dilated"), zero)
        return BlockCurves(conv1, rest)
