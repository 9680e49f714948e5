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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from las_mm.latency.measured.terms import Numbers, Probes, Term, quantities
from las_mm.network.bottleneck import BottleneckShape

_LARGEST_CORRECTION = 0.5  # of the logarithm; beyond lies what disturbed measurements taught


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
