"""Which granularity each stage should have on a device: a search with the latency model.

S is the side of a patch, G the channels that share a decision.

What is searched. A stage's latency is the sum of its blocks', and in the model no block depends on
another, so neither do stages: each is searched alone, and the best settings of the network are
sums of the stages' rankings. Candidates are all S from 1 to the longer side of the stage's map
that matter: of the S that cut the map into the same number of rows and columns of patches only
the smallest is kept, since the others compute the same patches with more padding.

Where channels are skipped, candidates for G are the powers of two that divide the width of all
blocks of the stage and leave at least two groups; where both are, all pairs of S and G.

What the model leaves out, and a person has to weigh:

- *Accuracy.* A mask of coarse patches follows the image worse, so at the same rate it keeps less
  of what matters, or needs a higher rate for the same accuracy. The search compares latencies at
  equal rates, where the coarsest patches often win; ``min_patches`` sets a limit. A single patch
  per map is not considered by default: it is layer skipping, which mode 'layer' does for less.
- *Halos.* conv1 computes what conv2 reads: the kept patches and a rim of one pixel. The rim is
  the larger against the patch the finer S is (up to 9 positions per kept one at S=1, 1.6 at S=8,
  for isolated patches; less where neighbours are kept). Here conv1 has the rate of the block, as
  in the published figures, which flatters fine patches.
- *Channels.* In the model G changes how evenly the active channels fall on tiles (fine ones more
  evenly) and the size of the masker, both little; what gathering single channels costs a kernel
  is not modelled, nor what coarse groups do to accuracy.
- *Edges.* Where S does not divide the map, the last row or column of patches is cut off. The
  model charges whole patches, so such an S is judged a little too dear.

How rates become patches. A rate r of P patches counts as r P patches, whose cost is interpolated
between whole counts, as for images of which some keep one patch more than others. The published
figures, and :func:`las_mm.latency.predict`, round up to whole patches (``patches='whole'``): with
few patches that is a staircase, on which a search at r = 0.5 would find the S whose step happens
to end there, 1.5 times dearer at r = 0.51. Where r P is a whole number both agree.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from las_mm.network.block import BlockShape, NetworkShape
from las_mm.network.operator import CHANNEL

from .analytical.costs import check_patches
from .blocks import block_seconds, by_axis, default_dilated_rate, stem_report
from .candidates import candidates, channel_candidates
from .device import AnyDevice, load_device
from .search_result import Choice, SearchResult, Setting, StageSearch

_RESOLUTION = 1000  # break-even rates are found to 1/1000
_CHANNEL_RATES = np.linspace(0, 1, 41)  # between which a curve over the channel rate is a line


def search_granularity(
    device: str | Path | AnyDevice,
    network: NetworkShape,
    rate: float = 0.5,
    batch_size: int | None = None,
    min_patches: int = 2,
    ragged: bool = True,
    top: int = 5,
    tolerance: float = 0.01,
    patches: str = "mean",
    rate_channel: float = 0.5,
) -> SearchResult:
    """Find the fastest granularity of every stage; see this module for the limits.

    Chosen is, per stage, the finest S, then G, within ``tolerance`` of the fastest: the model is
    not exact to a percent, and finer masks follow the image better.

    Args:
        device: A device, its name or its file.
        network: The network at the input size to search for. Stages that are static or skip
            layers stay what they are.
        rate: Expected activation rate of every block, in [0, 1]. Defaults to 0.5.
        batch_size: Images per batch. Defaults to the device's.
        min_patches: Least number of patches in a map. Defaults to 2.
        ragged: Whether to consider S that do not divide the map. Defaults to True.
        top: Settings of the whole network to return, at least 1. Defaults to 5.
        tolerance: Share of a stage's latency that counts as equal. Defaults to 0.01.
        patches: ``'mean'`` or ``'whole'``, see this module and :class:`LatencyTable`. Defaults to
            ``'mean'``.
        rate_channel: Expected channel rate of the blocks that skip channels. Defaults to 0.5.

    Raises:
        ValueError: No stage skips patches or channels, no S has ``min_patches``, or an argument is
            out of range.
    """
    device = load_device(device)
    for name, share in dict(rate=rate, rate_channel=rate_channel).items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {share!r}")
    for name, value in dict(min_patches=min_patches, top=top).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}")
    check_patches(patches)
    images = device.batch_size if batch_size is None else batch_size
    curves = _Curves(device, rate, rate_channel, images, patches)
    fixed_s = stem_report(device, network, images).latency_s / images
    static_s = fixed_s
    found = []
    for stage, blocks in network.stages().items():
        latency, stage_static = curves.stage(blocks)
        static_s += stage_static
        if any(block.has_patches or block.has_channels for block in blocks):
            found.append(_search_stage(curves, stage, blocks, min_patches, ragged, tolerance))
        else:
            fixed_s += float(latency[-1])
    if not found:
        raise ValueError(
            f"{network.name} has no spatial stage and none that skips channels, so there is no "
            "granularity to choose: set mode to 'spatial' for some or all stages"
        )

    def setting(chosen: Sequence[Choice]) -> Setting:
        latency = fixed_s + sum(choice.latency_s for choice in chosen)
        of_stage = {stage.stage: choice for stage, choice in zip(found, chosen)}
        sides, groups = [], []
        for stage in network.stages():
            choice = of_stage.get(stage)
            sides.append(choice.granularity if choice else 1)
            groups.append(choice.channel_granularity if choice else 1)
        return Setting(tuple(sides), tuple(groups), latency, latency / static_s)

    return SearchResult(
        device,
        network,
        images,
        float(rate),
        float(rate_channel),
        static_s,
        tuple(found),
        tuple(setting(chosen) for chosen in _best_combinations(found, top)),
        setting([stage.chosen for stage in found]),
        _current_setting(network, curves, fixed_s, static_s),
    )


def latency_against_rate(
    device: str | Path | AnyDevice,
    network: NetworkShape,
    granularity: Sequence[int],
    rates: np.ndarray,
    batch_size: int | None = None,
    patches: str = "mean",
    channel_granularity: Sequence[int] | None = None,
    rate_channel: float = 0.5,
) -> tuple[np.ndarray, float]:
    """Latency of one setting at many rates.

    Args:
        device: A device, its name or its file.
        network: The network; its spatial stages get the given granularity.
        granularity: S per stage.
        rates: Rates of all blocks, shape (points,), in [0, 1]; of blocks that skip channels only,
            their channel rates.
        batch_size: Images per batch. Defaults to the device's.
        patches: ``'mean'`` or ``'whole'``. Defaults to ``'mean'``.
        channel_granularity: G per stage. Defaults to None: the network's own.
        rate_channel: Channel rate of the blocks that skip patches too. Defaults to 0.5.

    Returns:
        (latency, static latency): seconds per image, stem included, shape (points,) and one.

    Raises:
        ValueError: A granularity has not one entry per stage.
    """
    device, rates = load_device(device), np.asarray(rates, dtype=float)
    images = device.batch_size if batch_size is None else batch_size
    stages = network.stages()
    if len(granularity) != len(stages):
        raise ValueError(
            f"granularity needs one S per stage ({len(stages)}), got {tuple(granularity)}"
        )
    chosen = network.with_granularity(dict(zip(stages, granularity)))
    if channel_granularity is not None:
        if len(channel_granularity) != len(stages):
            raise ValueError(
                f"channel_granularity needs one G per stage ({len(stages)}), "
                f"got {tuple(channel_granularity)}"
            )
        chosen = chosen.with_channel_granularity(dict(zip(stages, channel_granularity)))
    stem = stem_report(device, network, images).latency_s / images
    latency, static = np.full(len(rates), stem), stem
    memo: dict[BlockShape, tuple[np.ndarray, float]] = {}
    for block in chosen.blocks:
        key = block.anonymous()
        if key not in memo:
            curve, whole = _block_seconds(device, key, rates, rate_channel, images, patches)
            memo[key] = (curve / images, whole / images)
        latency = latency + memo[key][0]
        static += memo[key][1]
    return latency, static


def _block_seconds(
    device: AnyDevice,
    block: BlockShape,
    rates: np.ndarray,
    rate_channel: float,
    images: int,
    patches: str,
) -> tuple[np.ndarray, float]:
    """Seconds of the batch at many rates, and of the static block.

    The rates are channel rates where only channels are skipped; there the curve is interpolated.
    """
    static = float(block_seconds(device, block.in_mode("static"), {}, images))
    if block.decides_positions or not block.has_channels:
        dilated = default_dilated_rate(device, block, rates)
        by_rate = by_axis(block.axes, rates, dilated, np.asarray(rate_channel))
        seconds = block_seconds(device, block, by_rate, images, patches)
        return np.broadcast_to(seconds, rates.shape), static
    values = block_seconds(device, block, {CHANNEL: _CHANNEL_RATES}, images, patches)
    return np.interp(rates, _CHANNEL_RATES, values), static


class _Curves:
    """Latencies of stages at a fine grid of rates and, as the last entry, at the expected one.

    The rates of a stage that skips channels only are channel rates.
    """

    def __init__(
        self, device: AnyDevice, rate: float, rate_channel: float, images: int, patches: str
    ) -> None:
        self.device, self.images, self.patches = device, images, patches
        self.rate_channel = rate_channel
        self.rates = np.append(np.arange(_RESOLUTION + 1) / _RESOLUTION, rate)
        self._blocks: dict[BlockShape, tuple[np.ndarray, float]] = {}

    def stage(self, blocks: Sequence[BlockShape]) -> tuple[np.ndarray, float]:
        """Seconds per image at all rates, and of the static stage."""
        parts = [self._block(block.anonymous()) for block in blocks]
        return np.sum([part[0] for part in parts], axis=0), sum(part[1] for part in parts)

    def _block(self, key: BlockShape) -> tuple[np.ndarray, float]:
        if key not in self._blocks:
            rates = self.rates
            if key.has_channels and not key.decides_positions:
                rates = np.append(rates[:-1], self.rate_channel)
            curve, static = _block_seconds(
                self.device, key, rates, self.rate_channel, self.images, self.patches
            )
            self._blocks[key] = (curve / self.images, static / self.images)
        return self._blocks[key]

    def break_even(self, latency: np.ndarray, static_s: float) -> float:
        """The first rate of the grid at which a stage is no faster than ``static_s``; 1: none."""
        slower = latency[:-1] >= static_s
        return float(self.rates[int(np.argmax(slower))]) if slower.any() else 1.0


def _search_stage(
    curves: _Curves,
    stage: int,
    blocks: Sequence[BlockShape],
    min_patches: int,
    ragged: bool,
    tolerance: float,
) -> StageSearch:
    height, width = blocks[-1].h_out, blocks[-1].w_out
    sides, groups = [1], [1]
    patched = any(block.has_patches for block in blocks)
    if patched:
        sides = candidates((height, width), min_patches, ragged)
    if any(block.has_channels for block in blocks):
        groups = channel_candidates([b.gated_channels for b in blocks if b.has_channels])
    if not sides:
        raise ValueError(
            f"stage {stage} has a map of {height} x {width}, too small for min_patches="
            f"{min_patches} patches"
        )
    choices = []
    for side, group in itertools.product(sides, groups):
        latency, static_s = curves.stage([b.with_granularity(side, group) for b in blocks])
        choices.append(
            Choice(
                granularity=side,
                channel_granularity=group,
                rows=-(-height // side) if patched else 1,
                columns=-(-width // side) if patched else 1,
                ragged=patched and bool(height % side or width % side),
                latency_s=float(latency[-1]),
                ratio=float(latency[-1]) / static_s,
                break_even=curves.break_even(latency, static_s),
            )
        )
    layer, static_s = curves.stage([block.in_mode("layer") for block in blocks])

    def finest(choice: Choice) -> tuple[int, int]:
        return choice.granularity, choice.channel_granularity

    choices.sort(key=lambda choice: (choice.latency_s, *finest(choice)))
    limit = choices[0].latency_s * (1 + tolerance)
    chosen = min((c for c in choices if c.latency_s <= limit), key=finest)
    modes = {block.mode for block in blocks if block.has_patches or block.has_channels}
    mode = modes.pop() if len(modes) == 1 else "mixed"
    return StageSearch(
        stage, (height, width), static_s, float(layer[-1]), tuple(choices), chosen, mode
    )


def _best_combinations(found: Sequence[StageSearch], top: int) -> list[tuple[Choice, ...]]:
    # The best `top` sums take only the best `top` of each stage.
    ranked = itertools.product(*(stage.choices[:top] for stage in found))
    return heapq.nsmallest(top, ranked, key=lambda chosen: sum(c.latency_s for c in chosen))


def _current_setting(
    network: NetworkShape, curves: _Curves, fixed_s: float, static_s: float
) -> Setting | None:
    sides, groups, latency = [], [], fixed_s
    for blocks in network.stages().values():
        own = {block.granularity for block in blocks if block.has_patches}
        own_groups = {block.channel_granularity for block in blocks if block.has_channels}
        if len(own) > 1 or len(own_groups) > 1:
            return None  # one granularity per block
        if own or own_groups:
            latency += float(curves.stage(blocks)[0][-1])
        sides.append(own.pop() if own else 1)
        groups.append(own_groups.pop() if own_groups else 1)
    return Setting(tuple(sides), tuple(groups), latency, latency / static_s)
