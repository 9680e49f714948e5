"""The search for the cheapest tiling, and the efficiencies it weighs (docs/latency_model.md).

A tile is a (c, h, w) box of output values; for spatially dynamic operators it also handles q
patches at a time. Arrays below are broadcast over the axes (c, h, w) or (c, h, w, q), one entry
per tiling, and n is the number of patches of one image. Results are cached, since networks repeat
their blocks.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import numpy as np

from ..report import Report
from .axes import CACHE, Axes, cheapest, grid, lane, patch_axes, request
from .conv_size import ConvSize
from .device import Device

GATHER_LIMIT = 256  # a dynamic convolution considers at most this many patches per tile
_Size = np.ndarray  # one axis of the tile, broadcast against the others
_Times = tuple[np.ndarray, np.ndarray]  # seconds of compute, of memory


@dataclass(frozen=True)
class PatchCost:
    """The cost of a spatially dynamic operator as a function of the number of patches n.

    Once its tiling is chosen, an operator costs
    ``launch + memory_fixed + n * memory_per_patch + ceil(n / patches_per_tile) * compute``,
    so a whole curve over n costs no further search. All times in seconds per batch.
    """

    name: str
    positions: int
    launch_s: float
    memory_fixed_s: float
    memory_per_patch_s: float
    compute_per_round_s: float
    patches_per_tile: int

    def report(self, n_patches: int) -> Report:
        """The cost at ``n_patches`` active patches per image, 0 to ``positions``.

        Raises:
            ValueError: ``n_patches`` is no integer in that range.
        """
        if (
            isinstance(n_patches, bool)
            or not isinstance(n_patches, numbers.Integral)
            or not 0 <= n_patches <= self.positions
        ):
            raise ValueError(
                f"{self.name}: n_patches must be an integer from 0 to "
                f"{self.positions}, got {n_patches!r}"
            )
        rounds = -(-int(n_patches) // self.patches_per_tile)
        return Report(
            self.name,
            rounds * self.compute_per_round_s,
            self.memory_fixed_s + n_patches * self.memory_per_patch_s,
            self.launch_s,
        )

    def seconds(self, n_patches: np.ndarray) -> np.ndarray:
        """Latency for an array of patch counts, of the same shape."""
        return (
            self.launch_s
            + self.memory_fixed_s
            + n_patches * self.memory_per_patch_s
            + np.ceil(n_patches / self.patches_per_tile) * self.compute_per_round_s
        )


@lru_cache(maxsize=CACHE)
def search_conv(
    device: Device, size: ConvSize, batch_size: int, has_output: bool = True
) -> tuple[float, float]:
    """Seconds of (compute, memory) of a dense convolution.

    ``has_output=False`` is the masker of a skipped layer: the input is read, nothing is computed
    or written, and the weights are read only for a batch.
    """
    c_out, h_out, w_out = size.c_out, size.h_out, size.w_out
    c, h, w = grid(c_out, h_out, w_out)
    n_tiles = np.ceil(c_out / c) * np.ceil(h_out / h) * np.ceil(w_out / w)
    weight = size.weight * (has_output or batch_size > 1)
    output = batch_size * has_output
    compute = (
        output
        * c
        * h
        * w
        * size.weight
        / device.macs_per_s_per_pe
        / lane(device, c * h * w)
        * np.ceil(n_tiles / device.n_pe)
    )
    tile = c * weight + c * h * w * output + size.read(c, h, w) * batch_size
    dram = c_out * weight + size.source * batch_size + c_out * h_out * w_out * output
    memory = dram / device.dram_values_per_s + n_tiles * tile / device.l2_values_per_s / request(
        device, w, w_out - w
    )
    return cheapest(compute, memory)


@lru_cache(maxsize=CACHE)
def search_map_op(
    device: Device,
    channels: int,
    h_out: int,
    w_out: int,
    operations: int,
    kernel: int,
    stride: int,
    batch_size: int,
) -> tuple[float, float]:
    """Seconds of (compute, memory) of an element-wise add (``kernel`` 0) or of a pooling."""
    c, h, w = grid(channels, h_out, w_out)
    n_tiles = np.ceil(channels / c) * np.ceil(h_out / h) * np.ceil(w_out / w)
    compute = (
        batch_size
        * c
        * h
        * w
        * operations
        / device.macs_per_s_per_pe
        / lane(device, c * h * w)
        * np.ceil(n_tiles / device.n_pe)
    )
    if kernel:
        reads = ((h - 1) * stride + kernel) * ((w - 1) * stride + kernel)
    else:
        reads = 2 * h * w
    memory = n_tiles * c * (reads + h * w) * batch_size / device.dram_values_per_s
    return cheapest(compute, memory)


@lru_cache(maxsize=CACHE)
def search_value_op(
    device: Device,
    channels: int,
    height: int,
    width: int,
    operations: int,
    reads: int,
    writes: bool,
    batch_size: int,
) -> tuple[float, float]:
    """Seconds of (compute, memory) of an operator on the values of a map.

    Per value of the map ``operations`` are done and ``reads`` values read; every value is written
    (``writes``), or one per channel and tile, as by a sum over the map.
    """
    c, h, w = grid(channels, height, width)
    n_tiles = np.ceil(channels / c) * np.ceil(height / h) * np.ceil(width / w)
    compute = (
        batch_size
        * c
        * h
        * w
        * operations
        / device.macs_per_s_per_pe
        / lane(device, c * h * w)
        * np.ceil(n_tiles / device.n_pe)
    )
    written = h * w if writes else 1
    memory = n_tiles * c * (reads * h * w + written) * batch_size / device.dram_values_per_s
    return cheapest(compute, memory)


@lru_cache(maxsize=CACHE)
def search_dynamic_conv(
    device: Device, size: ConvSize, granularity: int, gathered: bool, batch_size: int, name: str
) -> PatchCost:
    """The cost curve of a convolution on patches, its tiling chosen at the mean patch count."""
    side = granularity

    def times(n: float, c: _Size, h: _Size, w: _Size, q: _Size) -> _Times:
        n_tiles = np.ceil(size.c_out / c) * np.ceil(side / h) * np.ceil(side / w)
        compute = (
            c
            * h
            * w
            * size.weight
            * q
            / device.macs_per_s_per_pe
            / lane(device, c * h * w * batch_size * q)
            * np.ceil(n / q)
            * batch_size
            * np.ceil(n_tiles / device.n_pe)
        )
        tile = c * size.weight + size.read(c, h, w) * n * batch_size + c * h * w * n * batch_size
        source = size.source * batch_size
        if gathered:
            source = n * size.c_in * size.window(side, side) * batch_size
        dram = size.c_out * size.weight + source + n * size.c_out * side * side * batch_size
        memory = dram / device.dram_values_per_s + n_tiles * tile / device.l2_values_per_s
        return compute, memory

    axes = patch_axes(size.c_out, side, GATHER_LIMIT)
    positions = -(-size.h_out // side) * -(-size.w_out // side)
    return search_patches(name, device, positions, axes, times)


@lru_cache(maxsize=CACHE)
def search_scatter_add(
    device: Device,
    channels: int,
    height: int,
    width: int,
    granularity: int,
    batch_size: int,
    name: str,
) -> PatchCost:
    """The cost curve of a scatter-add, its tiling chosen at the mean patch count."""
    side = granularity

    def times(n: float, c: _Size, h: _Size, w: _Size, q: _Size) -> _Times:
        n_tiles = np.ceil(channels / c) * np.ceil(side / h) * np.ceil(side / w)
        compute = (
            c
            * h
            * w
            * q
            / device.macs_per_s_per_pe
            / lane(device, c * h * w * batch_size * q)
            * np.ceil(n / q)
            * batch_size
            * np.ceil(n_tiles / device.n_pe)
        )
        dram = (n * channels * side * side + 2 * channels * height * width) * batch_size
        tile = 3 * c * h * w * n * batch_size
        memory = (
            dram / device.dram_values_per_s
            + n_tiles * tile / device.l2_values_per_s / request(device, w, side - w)
        )
        return compute, memory

    positions = -(-height // side) * -(-width // side)
    return search_patches(name, device, positions, patch_axes(channels, side, positions), times)


def search_patches(
    name: str, device: Device, positions: int, axes: Axes, times: Callable[..., _Times]
) -> PatchCost:
    """Choose the tiling for the mean count over 1..positions, which need not be an integer.

    Tilings often tie at that count and differ elsewhere. The reference takes the first of the
    least rounded totals, so ``times`` keeps the document's order of operations and the axes
    ascend; a tidier expression changes the published figures by up to 1 %.
    """
    compute, memory = times((positions + 1) / 2, *np.meshgrid(*axes, indexing="ij", sparse=True))
    total = compute + memory
    index = np.unravel_index(int(np.argmin(total)), total.shape)
    tile = [np.asarray(axis[i]) for axis, i in zip(axes, index)]
    fixed = float(times(0, *tile)[1])
    slope = (float(times(positions, *tile)[1]) - fixed) / positions
    return PatchCost(
        name, positions, device.launch_s, fixed, slope, float(times(1, *tile)[0]), int(tile[3])
    )
