"""From (network shapes, activation rates, device) to latency.

How a block's rates become patches and seconds is in :mod:`las_mm.latency.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .blocks import block_report, fixed_parts, patch_count, spatial_costs, stem_report
from .device import Device, load_device
from .report import Report
from .shapes import BlockShape, NetworkShape, resnet_shape
from .tiling import PatchCost

__all__ = [
    "LatencyTable",
    "Prediction",
    "block_curves",
    "block_report",
    "network_report",
    "paper_report",
]

PATCH_COUNTS = ("whole", "mean")


def network_report(
    device: str | Path | Device,
    network: NetworkShape,
    rates: float | Sequence[float] | np.ndarray,
    rates_dilated: float | Sequence[float] | np.ndarray | None = None,
    batch_size: int | None = None,
    include_stem: bool = True,
    per_image: bool = True,
    rates_channel: float | Sequence[float] | np.ndarray = 1.0,
) -> Report:
    """Latency of a network, as a tree of stem and stages, blocks and operators.

    Args:
        device: A device, its name or its file.
        network: The network.
        rates: Rate of every block, or one for all. Those of static blocks are not used.
        rates_dilated: conv1's rate of every block, or one for all. Defaults to None: ``rates``.
        batch_size: Images per batch. Defaults to the device's.
        include_stem: Whether to count the stem. Defaults to True.
        per_image: Whether to divide the batch latency by the batch size, as the published
            figures do. Defaults to True.
        rates_channel: Channel rate of every block, or one for all. Only those of blocks that
            skip channels are used. Defaults to 1.

    Raises:
        ValueError: Rates of the wrong number or outside [0, 1], or a bad ``batch_size``.
    """
    device = load_device(device)
    count = len(network.blocks)
    active = _rates("rates", rates, count)
    dilated = active if rates_dilated is None else _rates("rates_dilated", rates_dilated, count)
    channel = _rates("rates_channel", rates_channel, count)
    groups = [stem_report(device, network, batch_size)] if include_stem and network.stem else []
    stages: dict[int, list[Report]] = {}
    for block, *rates_of_block in zip(network.blocks, active, dilated, channel):
        rate, rate_dilated, rate_channel = map(float, rates_of_block)
        report = block_report(device, block, rate, rate_dilated, batch_size, rate_channel)
        stages.setdefault(block.stage, []).append(report)
    groups += [Report.group(f"stage{stage}", blocks) for stage, blocks in stages.items()]
    report = Report.group(network.name, groups)
    images = device.batch_size if batch_size is None else batch_size
    return report * (1 / images) if per_image else report


def paper_report(
    device: str | Path | Device,
    depth: int = 101,
    granularity: Sequence[int] = (4, 4, 2, 1),
    mode: str | Sequence[str] = "spatial",
    rate: float = 0.5,
    rate_channel: float = 1.0,
) -> Report:
    """Seconds per image of a ResNet at 224 x 224 as the published figures count it.

    The four stages only, without the first stage's shortcut convolution, one rate for
    everything, at the device's batch size (arXiv 2308.15949).

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    network = resnet_shape(depth, mode=mode, granularity=granularity, stage1_downsample=False)
    return network_report(device, network, rate, include_stem=False, rates_channel=rate_channel)


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds per image.

    Args:
        total_s: The network.
        static_s: The same network with every block static.
        block_s: Every block, shape (n_blocks,).
    """

    total_s: float
    static_s: float
    block_s: np.ndarray

    @property
    def ratio(self) -> float:
        """Latency relative to the static network."""
        return self.total_s / self.static_s


class LatencyTable:
    """Latency curves of a network's blocks, tabulated once for use at every training step.

    A block costs ``fixed_s + f(rate_dilated) + g(rate)``: f is masker and conv1 of a spatial
    block, g the rest that depends on the rate. Both are tabulated at ``grid`` and interpolated
    linearly. Table entries are exact; between them the true latency is a staircase, since both
    patches and rounds of patches are whole numbers. For ResNet-101 at 224 x 224 the network is
    off by under 1 % at mixed rates, and by up to 6 % where all blocks share one rate and step
    together; :func:`network_report` gives the staircase. Layer and static blocks are exact.

    A block that skips channels costs ``f(rate_dilated, rate_channel) + g(rate, rate_channel)``,
    tabulated at ``grid`` along both axes and interpolated bilinearly.

    All times are seconds per image.

    Attributes:
        grid: Rates of the entries, shape (points,), from 0 to 1 in equal steps.
        conv1_s: f at the grid and at channel rate 1, shape (n_blocks, points).
        rest_s: g likewise, shape (n_blocks, points).
        fixed_s: What no rate changes, shape (n_blocks,).
        channel_blocks: Indices of the blocks that skip channels, shape (n_channel,).
        channel_conv1_s: Their f, shape (n_channel, points, points): rate, channel rate.
        channel_rest_s: Their g, what no rate changes included, of the same shape.
        static_block_s: Every block if it were static, shape (n_blocks,).
        stem_s: The stem.
        static_s: The network with all blocks static, with its stem.

    Args:
        device: A device, its name or its file.
        network: The network.
        batch_size: Images per batch. Defaults to the device's.
        points: Entries per curve, at least 2. Defaults to 33.
        include_stem: Whether to count the stem. Defaults to True.
        patches: ``'whole'``: a rate r of P positions is ceil(r P) patches, as the papers count.
            ``'mean'``: it is r P patches, whose cost lies on the line between the whole counts
            below and above, as for images of which some keep one patch more than others: without
            the steps, which few patches make long, a gradient exists. Defaults to ``'whole'``.

    Raises:
        ValueError: ``points``, ``batch_size`` or ``patches`` is out of range.
    """

    def __init__(
        self,
        device: str | Path | Device,
        network: NetworkShape,
        batch_size: int | None = None,
        points: int = 33,
        include_stem: bool = True,
        patches: str = "whole",
    ) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 2:
            raise ValueError(f"points must be an integer >= 2, got {points!r}")
        self.device = load_device(device)
        self.network = network
        self.batch_size = self.device.batch_size if batch_size is None else batch_size
        self.grid = np.linspace(0.0, 1.0, points)
        # Networks repeat their blocks, which differ in name and stage only.
        keys = [replace(block, name="block", stage=0) for block in network.blocks]
        curves = {
            key: block_curves(self.device, key, self.grid, self.batch_size, patches)
            for key in dict.fromkeys(keys)
        }
        columns = [
            np.stack(column) / self.batch_size for column in zip(*(curves[key] for key in keys))
        ]
        self.conv1_s, self.rest_s, self.fixed_s, self.static_block_s = columns
        self.channel_blocks = np.array(
            [i for i, block in enumerate(network.blocks) if block.has_channels], dtype=int
        )
        surfaces = {
            key: channel_surfaces(self.device, key, self.grid, self.batch_size, patches)
            for key in dict.fromkeys(keys[i] for i in self.channel_blocks)
        }
        self.channel_conv1_s, self.channel_rest_s = np.zeros((2, 0, points, points))
        if surfaces:
            self.channel_conv1_s, self.channel_rest_s = (
                np.stack(part) / self.batch_size
                for part in zip(*(surfaces[keys[i]] for i in self.channel_blocks))
            )
        self.stem_s = 0.0
        if include_stem and network.stem:
            stem = stem_report(self.device, network, self.batch_size)
            self.stem_s = stem.latency_s / self.batch_size
        self.static_s = self.stem_s + float(self.static_block_s.sum())

    def predict(
        self,
        rates: float | Sequence[float] | np.ndarray,
        rates_dilated: float | Sequence[float] | np.ndarray | None = None,
        rates_channel: float | Sequence[float] | np.ndarray = 1.0,
    ) -> Prediction:
        """Latency at the given rates.

        Args:
            rates: Rate of every block, shape (n_blocks,), or one for all. Those of static
                blocks are not used.
            rates_dilated: conv1's rates likewise. Defaults to None: ``rates``.
            rates_channel: Channel rates likewise. Defaults to 1.

        Raises:
            ValueError: Rates of the wrong number or outside [0, 1].
        """
        count = len(self.network.blocks)
        active = _rates("rates", rates, count)
        dilated = active
        if rates_dilated is not None:
            dilated = _rates("rates_dilated", rates_dilated, count)
        block_s = (
            self.fixed_s
            + self._interpolate(self.rest_s, active)
            + self._interpolate(self.conv1_s, dilated)
        )
        channel = _rates("rates_channel", rates_channel, count)
        rows = self.channel_blocks
        if rows.size:
            block_s[rows] = self._bilinear(
                self.channel_rest_s, active[rows], channel[rows]
            ) + self._bilinear(self.channel_conv1_s, dilated[rows], channel[rows])
        return Prediction(self.stem_s + float(block_s.sum()), self.static_s, block_s)

    def _bilinear(
        self, surfaces: np.ndarray, rates: np.ndarray, rates_channel: np.ndarray
    ) -> np.ndarray:
        position = rates_channel * (len(self.grid) - 1)
        left = np.minimum(position.astype(np.intp), len(self.grid) - 2)
        rows = np.arange(len(rates))
        start, end = (self._interpolate(surfaces[rows, :, i], rates) for i in (left, left + 1))
        return start + (position - left) * (end - start)

    def _interpolate(self, curves: np.ndarray, rates: np.ndarray) -> np.ndarray:
        position = rates * (len(self.grid) - 1)
        left = np.minimum(position.astype(np.intp), len(self.grid) - 2)
        rows = np.arange(len(rates))
        start = curves[rows, left]
        return start + (position - left) * (curves[rows, left + 1] - start)


def block_curves(
    device: Device,
    block: BlockShape,
    rates: np.ndarray,
    batch_size: int | None = None,
    patches: str = "whole",
    rate_channel: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """One block's latency at many rates; its tilings are searched once.

    Args:
        device: The device.
        block: The block.
        rates: Rates in [0, 1], shape (points,).
        batch_size: Images per batch. Defaults to the device's.
        patches: See :class:`LatencyTable`.
        rate_channel: Channel rate, where the block skips channels. Defaults to 1.

    Returns:
        (conv1_s, rest_s, fixed_s, static_s), seconds for the whole batch: masker and conv1 of a
        spatial block at ``rates`` of conv1, shape (points,); what else depends on the rate, at
        ``rates``, shape (points,); what no rate changes; the same block if it were static.

    Raises:
        ValueError: ``patches`` or ``batch_size`` is out of range.
    """
    if patches not in PATCH_COUNTS:
        raise ValueError(f"patches must be one of {', '.join(PATCH_COUNTS)}, got {patches!r}")
    static = block_report(device, replace(block, mode="static"), batch_size=batch_size).latency_s
    rates = np.asarray(rates, dtype=float)
    conv1 = np.zeros_like(rates)
    rest = np.zeros_like(rates)
    if block.has_patches:
        fused, masker, dynamic, others = spatial_costs(device, block, batch_size, rate_channel)
        conv1 = np.minimum(
            fused.latency_s, masker.latency_s + _patch_seconds(dynamic, rates, patches)
        )
        for cost in others:
            rest += _patch_seconds(cost, rates, patches)
        fixed = sum(r.latency_s for r in fixed_parts(device, block, batch_size))
    else:
        full, empty = (
            block_report(
                device, block, rate, batch_size=batch_size, rate_channel=rate_channel
            ).latency_s
            for rate in (1.0, 0.0)
        )
        rest = rates * (full - empty)
        fixed = empty
    return conv1, rest, fixed, static


def channel_surfaces(
    device: Device,
    block: BlockShape,
    rates: np.ndarray,
    batch_size: int | None = None,
    patches: str = "whole",
) -> tuple[np.ndarray, np.ndarray]:
    """One block's latency at many rates and channel rates: those of ``rates``, on both axes.

    Returns:
        (conv1_s, rest_s), seconds for the whole batch, shape (points, points) of rate and channel
        rate: as of :func:`block_curves`, what no rate changes counted with the rest.
    """
    found = [
        block_curves(device, block, rates, batch_size, patches, float(rate)) for rate in rates
    ]
    conv1 = np.stack([curves[0] for curves in found], axis=-1)
    rest = np.stack([curves[1] + curves[2] for curves in found], axis=-1)
    return conv1, rest


def _patch_seconds(cost: PatchCost, rates: np.ndarray, patches: str) -> np.ndarray:
    if patches == "whole":
        return cost.seconds(patch_count(rates, cost.positions))
    below = np.floor(rates * cost.positions)
    above = np.minimum(below + 1, cost.positions)
    start = cost.seconds(below)
    return start + (rates * cost.positions - below) * (cost.seconds(above) - start)


def _rates(name: str, values: float | Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    """``values`` as an array of shape (count,), checked."""
    try:
        rates = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in [0, 1], got {values!r}") from None
    if rates.ndim == 0:
        rates = np.full(count, float(rates))
    if rates.shape != (count,):
        raise ValueError(f"{name} must have one entry per block ({count}), got shape {rates.shape}")
    wrong = ~((rates >= 0) & (rates <= 1))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(f"{name} must lie in [0, 1], got {rates[index]} for block {index}")
    return rates
