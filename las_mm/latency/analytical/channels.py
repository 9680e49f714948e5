"""Convolutions that skip channels: their tilings and costs (docs/latency_model.md).

Each image has a mask of its own over groups of channels. A tile covers c channels of the full
output for all images of the batch, computes those that are active, and a round of tiles takes as
long as its busiest tile. Which channels are active is modelled as drawn without replacement at
the given rate, so the active ones in a tile are hypergeometric, and the busiest tile's number is
the expected maximum over the tiles of a round that cover different channels: exact sums over the
distribution, no random numbers. At rate 1 everything equals the operator without a mask.

The papers' text gives no formula for this; the form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .axes import candidates, grid, lane, patch_axes, request
from .conv_size import ConvSize
from .device import Device
from .tiling import GATHER_LIMIT, PatchCost

_CACHE = 4096
_SPREAD = 9.0  # standard deviations beyond which a hypergeometric distribution is cut off


@dataclass(frozen=True)
class ChannelMask:
    """Which channels of a convolution a channel mask covers.

    Args:
        groups: Decisions of the mask.
        inputs: Whether skipped input channels are left out.
        outputs: Whether skipped output channels are left out.
    """

    groups: int
    inputs: bool
    outputs: bool

    def shares(
        self, rate: float, images: int, tile_groups: int, tiles: int
    ) -> tuple[float, float, float, float]:
        """What a channel rate leaves of (weights, inputs, outputs, work of the busiest tile).

        A batch reads the weights that any of its images needs.
        """
        inputs = rate if self.inputs else 1.0
        outputs = rate if self.outputs else 1.0
        weights = 1.0 - (1.0 - inputs * outputs) ** images
        busiest = outputs
        if self.outputs:
            busiest = busiest_share(self.groups, rate, images, tile_groups, tiles)
        return weights, inputs, outputs, inputs * busiest


@dataclass(frozen=True)
class ChannelCost:
    """The cost of a convolution that skips channels, its tiling chosen.

    At a channel rate it is a :class:`PatchCost` (:meth:`at`). Times in seconds per batch with
    everything computed; one without patches counts as one patch.
    """

    name: str
    positions: int
    launch_s: float
    weights_s: float
    input_fixed_s: float
    input_per_patch_s: float
    output_per_patch_s: float
    compute_per_round_s: float
    patches_per_tile: int
    mask: ChannelMask
    images: int
    tile_groups: int
    tiles: int

    def at(self, rate: float) -> PatchCost:
        """The cost over patches at one channel rate, 0 to 1."""
        weights, inputs, outputs, work = self.mask.shares(
            rate, self.images, self.tile_groups, self.tiles
        )
        return PatchCost(
            self.name,
            self.positions,
            self.launch_s,
            self.weights_s * weights + self.input_fixed_s * inputs,
            self.input_per_patch_s * inputs + self.output_per_patch_s * outputs,
            self.compute_per_round_s * work,
            self.patches_per_tile,
        )


def busiest_share(groups: int, rate: float, images: int, tile_groups: int, tiles: int) -> float:
    """Active share of the busiest of ``tiles`` tiles of ``tile_groups`` groups of channels.

    Of ``images * groups`` decisions ``rate`` are active. Between whole numbers of active
    decisions the share is interpolated.
    """
    population, drawn = images * groups, images * tile_groups
    marked = rate * population
    below = min(int(marked), population)
    share = _expected_max(population, below, drawn, tiles)
    if marked > below:
        above = _expected_max(population, below + 1, drawn, tiles)
        share += (marked - below) * (above - share)
    return share / drawn


@lru_cache(maxsize=1 << 16)
def _expected_max(population: int, marked: int, drawn: int, copies: int) -> float:
    """Expected maximum of independent hypergeometric variables, ``sum over x of 1 - F(x)^copies``.

    Args:
        population: Decisions.
        marked: Active ones.
        drawn: Decisions in a tile.
        copies: Tiles. In truth they share out the same active channels; without a copy's
            knowledge of the others the maximum is a little high.
    """
    low, high = max(0, drawn + marked - population), min(marked, drawn)
    if low == high:
        return float(low)
    rate = marked / population
    mean = drawn * rate
    variance = mean * (1 - rate) * (population - drawn) / (population - 1)
    reach = _SPREAD * variance**0.5 + 3
    first, last = max(low, int(mean - reach)), min(high, int(mean + reach) + 1)
    x = np.arange(first, last, dtype=float)
    steps = (marked - x) * (drawn - x) / ((x + 1) * (population - marked - drawn + x + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(steps))])
    density = np.exp(logs - logs.max())
    below = np.minimum(np.cumsum(density / density.sum())[:-1], 1.0)
    return float(last - (below**copies).sum())


@lru_cache(maxsize=_CACHE)
def search_channel_conv(
    device: Device, size: ConvSize, batch_size: int, mask: ChannelMask, name: str
) -> ChannelCost:
    """The cost of a convolution on the whole map, its tiling chosen at the mean channel rate."""
    c_out, h_out, w_out, weight = size.c_out, size.h_out, size.w_out, size.weight
    c, h, w = grid(c_out, h_out, w_out)
    n_tiles = np.ceil(c_out / c) * np.ceil(h_out / h) * np.ceil(w_out / w)
    compute = (
        batch_size
        * c
        * h
        * w
        * weight
        / device.macs_per_s_per_pe
        / lane(device, c * h * w)
        * np.ceil(n_tiles / device.n_pe)
    )
    tile_in = size.read(c, h, w)
    l2 = n_tiles / device.l2_values_per_s / request(device, w, w_out - w)
    dram = 1 / device.dram_values_per_s
    weights = c_out * weight * dram + c * weight * l2
    inputs = (size.source * dram + tile_in * l2) * batch_size
    outputs = (c_out * h_out * w_out * dram + c * h * w * l2) * batch_size
    per_c = [_tile_groups(mask, tile, c_out, device) for tile in candidates(c_out)]
    shares = np.array([mask.shares(_mean_rate(mask), batch_size, *tile) for tile in per_c])
    kept = [column[:, None, None] for column in shares.T]
    total = weights * kept[0] + inputs * kept[1] + outputs * kept[2] + compute * kept[3]
    index = np.unravel_index(int(np.argmin(total)), total.shape)
    chosen = [
        float(np.broadcast_to(part, total.shape)[index])
        for part in (weights, inputs, outputs, compute)
    ]
    return ChannelCost(
        name=name,
        positions=1,
        launch_s=device.launch_s,
        weights_s=chosen[0],
        input_fixed_s=chosen[1],
        input_per_patch_s=0.0,
        output_per_patch_s=chosen[2],
        compute_per_round_s=chosen[3],
        patches_per_tile=1,
        mask=mask,
        images=batch_size,
        tile_groups=per_c[index[0]][0],
        tiles=per_c[index[0]][1],
    )


@lru_cache(maxsize=_CACHE)
def search_dynamic_channel_conv(
    device: Device,
    size: ConvSize,
    granularity: int,
    gathered: bool,
    batch_size: int,
    mask: ChannelMask,
    name: str,
) -> ChannelCost:
    """The cost of a convolution on patches; tiling chosen at the mean patch count and rate.

    Where nothing is skipped, the terms are those of :func:`.tiling.search_dynamic_conv`.
    """
    side = granularity
    c_out, weight = size.c_out, size.weight
    positions = -(-size.h_out // side) * -(-size.w_out // side)
    axes = patch_axes(c_out, side, GATHER_LIMIT)
    c, h, w, q = np.meshgrid(*axes, indexing="ij", sparse=True)
    n_tiles = np.ceil(c_out / c) * np.ceil(side / h) * np.ceil(side / w)
    compute = (
        c
        * h
        * w
        * weight
        * q
        / device.macs_per_s_per_pe
        / lane(device, c * h * w * batch_size * q)
        * batch_size
        * np.ceil(n_tiles / device.n_pe)
    )
    tile_in = size.read(c, h, w)
    l2 = n_tiles / device.l2_values_per_s
    dram = 1 / device.dram_values_per_s
    weights = c_out * weight * dram + c * weight * l2
    whole = 0.0
    patch = tile_in * batch_size * l2
    if gathered:
        patch = patch + size.c_in * size.window(side, side) * batch_size * dram
    else:
        whole = size.source * batch_size * dram
    outputs = (c_out * side * side * dram + c * h * w * l2) * batch_size
    mean = (positions + 1) / 2
    per_c = [_tile_groups(mask, tile, c_out, device) for tile in candidates(c_out)]
    shares = np.array([mask.shares(_mean_rate(mask), batch_size, *tile) for tile in per_c])
    kept = [column[:, None, None, None] for column in shares.T]
    total = (
        weights * kept[0]
        + (whole + mean * patch) * kept[1]
        + mean * outputs * kept[2]
        + np.ceil(mean / q) * compute * kept[3]
    )
    index = np.unravel_index(int(np.argmin(total)), total.shape)
    chosen = [
        float(np.broadcast_to(part, total.shape)[index])
        for part in (weights, patch, outputs, compute)
    ]
    return ChannelCost(
        name=name,
        positions=positions,
        launch_s=device.launch_s,
        weights_s=chosen[0],
        input_fixed_s=whole,
        input_per_patch_s=chosen[1],
        output_per_patch_s=chosen[2],
        compute_per_round_s=chosen[3],
        patches_per_tile=int(axes[3][index[3]]),
        mask=mask,
        images=batch_size,
        tile_groups=per_c[index[0]][0],
        tiles=per_c[index[0]][1],
    )


def _tile_groups(mask: ChannelMask, c: float, c_out: int, device: Device) -> tuple[int, int]:
    """(groups of channels in a tile of c channels, tiles of a round with different channels)."""
    tile_groups = min(int(np.ceil(c * mask.groups / c_out)), mask.groups)
    return tile_groups, min(int(np.ceil(c_out / c)), device.n_pe)


def _mean_rate(mask: ChannelMask) -> float:
    """The mean over 1..groups active groups, as for patches."""
    return (mask.groups + 1) / (2 * mask.groups)
