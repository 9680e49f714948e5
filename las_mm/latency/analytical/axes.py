"""Sizes of tiles and what one of them costs, as arrays over all tilings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .device import Device

CACHE = 4096
Axes = tuple[tuple[float, ...], ...]  # candidates for (c, h, w, q)


@lru_cache(maxsize=CACHE)
def candidates(n: int) -> tuple[float, ...]:
    """Tile sizes to try on an axis of size ``n``, ascending; a tile may overhang the axis."""
    sizes = {1 << i for i in range(8) if 1 << i <= 2 * n}
    sizes.update(-(-n // i) for i in range(1, min(n, 8)))
    sizes.update(range(2, min(n, 8)))
    return tuple(float(size) for size in sorted(sizes))


def grid(*sizes: int) -> tuple[np.ndarray, ...]:
    return tuple(np.meshgrid(*(candidates(n) for n in sizes), indexing="ij", sparse=True))


def patch_axes(channels: int, side: int, patches: int) -> Axes:
    # Unlike a tile of a map, a tile of a patch does not overhang it.
    sides = tuple(size for size in candidates(side) if size <= side)
    return candidates(channels), sides, sides, candidates(patches)


def window(h: Any, w: Any, kernel: int, stride: int, dilation: int) -> Any:
    """Input values per channel under an h x w output tile, as the model counts them."""
    halo = (kernel - 1) * dilation
    return (h + halo) * stride * (w + halo) * stride


def lane(device: Device, size: np.ndarray) -> np.ndarray:
    """Share of a processing engine's in-flight slots that ``size`` operations fill."""
    slots = device.macs_in_flight_per_lane * device.lanes
    return size / (np.ceil(size / slots) * slots)


def request(device: Device, w: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Useful share of the memory requests for rows of ``w`` values, ``gap`` values apart."""
    wide = device.request_width
    gap = np.maximum(gap, 0)
    short = np.where(w + gap > wide, w / wide, w / (w + gap))
    return np.where(w > wide, w / (np.ceil(w / wide) * wide), short)


def cheapest(compute: np.ndarray, memory: np.ndarray) -> tuple[float, float]:
    """(compute, memory) of the first tiling of least total."""
    compute, memory = np.broadcast_arrays(compute, memory)
    best = int(np.argmin(compute + memory))
    return float(compute.flat[best]), float(memory.flat[best])
