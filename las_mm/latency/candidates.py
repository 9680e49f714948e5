"""The granularities that a search compares."""

from __future__ import annotations

from collections.abc import Sequence


def candidates(map_hw: Sequence[int], min_patches: int = 1, ragged: bool = True) -> list[int]:
    """The granularities that matter on a map of (H, W) outputs, ascending.

    Args:
        map_hw: Rows and columns of the map.
        min_patches: Least number of patches that the map is cut into.
        ragged: Whether S may leave cut-off patches at the edges.
    """
    height, width = map_hw
    sides: dict[tuple[int, int], int] = {}
    for side in range(1, max(height, width) + 1):
        rows, columns = -(-height // side), -(-width // side)
        if rows * columns >= min_patches and (ragged or not (height % side or width % side)):
            sides.setdefault((rows, columns), side)
    return sorted(sides.values())


def channel_candidates(widths: Sequence[int]) -> list[int]:
    """Powers of two that divide all ``widths`` into at least two groups; 1 is always one."""
    limit = max(min(widths) // 2, 1)
    sizes = [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]
    return [size for size in sizes if all(width % size == 0 for width in widths)]
