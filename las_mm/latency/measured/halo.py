"""How much of conv1 coherent masks need: the rate of the dilated mask, from the mask's rate.

conv2 reads a rim around the kept patches. How long that rim is depends on how the patches lie;
where no recorded rate says it, they are taken to lie as objects do: the level sets of a smooth
random field, four patches wide, as the benchmark's ``'blob'`` masks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from las_mm.network.block import BlockShape

_PATCHES, _COARSE = 128, 4  # side of the field, patches between its independent values
_FIELDS = 3
_RATES = np.linspace(0.0, 1.0, 65)


def expected_dilated_rate(block: BlockShape, rates: np.ndarray) -> np.ndarray:
    """Rates of conv1, for coherent masks of ``rates``; the same unless the block has patches.

    Args:
        block: The block.
        rates: Rates in [0, 1], any shape.
    """
    rates = np.asarray(rates, dtype=float)
    reader = block.reader
    if reader is None:
        return rates
    cell = block.granularity * reader.stride
    # Positions of a cell that the outputs of the cell before, and of the one behind, read too.
    reach = reader.kernel // 2 * reader.dilation
    before = min(max(reach - reader.stride + 1, 0), cell)
    behind = min(reach, cell)
    both = max(before + behind - cell, 0)
    axes = []
    for size in (block.h_out, block.w_out):
        patches = -(-size // block.granularity)
        inner = (patches - 1) / patches  # cells that have such a neighbour
        three = both / cell * inner
        two = (before + behind - 2 * both) / cell * inner
        axes.append({1: 1 - two - three, 2: two, 3: three})
    found = np.zeros_like(rates)
    for rows, row_share in axes[0].items():
        for columns, column_share in axes[1].items():
            if row_share and column_share:
                found += row_share * column_share * _any_kept(rows, columns, rates)
    return np.clip(found, rates, 1.0)


def _any_kept(rows: int, columns: int, rates: np.ndarray) -> np.ndarray:
    """Share of the windows of rows x columns patches with a kept patch."""
    if rows == columns == 1:
        return rates
    return np.interp(rates, _RATES, _windows()[rows, columns])


@lru_cache(maxsize=1)
def _windows() -> dict[tuple[int, int], np.ndarray]:
    """Share of windows with a kept patch at :data:`_RATES`, by the window's size."""
    random = np.random.default_rng(0)
    coarse = _PATCHES // _COARSE + 2
    spread = _cubic_interpolation(coarse, _PATCHES)
    curves: dict[tuple[int, int], np.ndarray] = {}
    for _ in range(_FIELDS):
        field = spread @ random.standard_normal((coarse, coarse)) @ spread.T
        # The rank of a value is the rate from which on its patch is kept.
        order = (-field).ravel().argsort().argsort().reshape(field.shape) / field.size
        for rows in (1, 2, 3):
            for columns in (1, 2, 3):
                views = np.lib.stride_tricks.sliding_window_view(order, (rows, columns))
                first = np.sort(views.min(axis=(2, 3)).ravel())
                share = np.searchsorted(first, _RATES) / first.size
                curves[rows, columns] = curves.get((rows, columns), 0.0) + share / _FIELDS
    return curves


def _cubic_interpolation(known: int, wanted: int) -> np.ndarray:
    """The (wanted, known) matrix of cubic convolution with end points aligned, a = -0.75."""
    a = -0.75
    matrix = np.zeros((wanted, known))
    for i, place in enumerate(np.linspace(0, known - 1, wanted)):
        for j in range(int(place) - 1, int(place) + 3):
            t = abs(place - j)
            if t <= 1:
                weight = ((a + 2) * t - (a + 3)) * t * t + 1
            elif t < 2:
                weight = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            else:
                continue
            matrix[i, min(max(j, 0), known - 1)] += weight
    return matrix
