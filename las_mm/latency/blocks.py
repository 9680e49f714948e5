"""The cost of one block, from its shape and its activation rates.

The "paper" setting is a single rate per block, used by the published figures: conv1 gets the
same rate as conv2 and conv3, without the halo that conv2 needs. Give ``rate_dilated`` to charge
conv1 its true rate. How rates become patches: a block whose output map is H x W has
``P = ceil(H/S) * ceil(W/S)`` patch positions and computes ``n = ceil(rate * P)`` of them. conv1
is charged on patches of the same side S on *its own* output map, so a stride-2 block of style
'pytorch' has about ``4 * P`` positions there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from . import operators as ops
from .device import Device, load_device
from .report import Report
from .shapes import BlockShape, ConvShape, NetworkShape, PoolShape
from .tiling import PatchCost

# Rates measured as count / positions in float32 are off by this much: without the slack,
# 3/49 of 49 positions would be 4 patches.
_RATE_SLACK = 1e-7


def block_report(
    device: str | Path | Device,
    block: BlockShape,
    rate: float = 1.0,
    rate_dilated: float | None = None,
    batch_size: int | None = None,
    rate_channel: float = 1.0,
) -> Report:
    """Latency of one block, seconds for the whole batch, as a tree of its operators.

    Args:
        device: A device, its name or its file.
        block: The block. A static block does not depend on the rates.
        rate: Share of the patches (spatial, both) or of the images (layer) computed, 0 to 1.
            Not used by a channel block.
        rate_dilated: Share of conv1's patches computed by a spatial block. Defaults to None,
            the paper's setting: the same as ``rate``.
        batch_size: Images per batch. Defaults to the device's.
        rate_channel: Share of the channels computed by a block that skips channels. Defaults
            to 1.

    Raises:
        ValueError: A rate is not a number in [0, 1], or ``batch_size`` is not positive.
    """
    device = load_device(device)
    rate = _rate("rate", rate)
    rate_dilated = rate if rate_dilated is None else _rate("rate_dilated", rate_dilated)
    rate_channel = _rate("rate_channel", rate_channel)
    if block.has_patches:
        fused, masker, conv1, rest = spatial_costs(device, block, batch_size, rate_channel)
        apart = Report.group(
            "masker_conv1", [masker, conv1.report(int(patch_count(rate_dilated, conv1.positions)))]
        )
        first = apart
        if fused.latency_s <= apart.latency_s:
            first = Report.group("masker_conv1", [fused])
        parts = [first, *(cost.report(int(patch_count(rate, cost.positions))) for cost in rest)]
    else:
        parts = _dense_parts(device, block, batch_size, rate_channel)
        if block.mode == "layer":
            masker = ops.layer_masker(
                device,
                block.c_in,
                block.width,
                block.h_mid,
                block.w_mid,
                stride=block.conv1_stride,
                batch_size=batch_size,
            )
            parts = [masker, *(part * rate for part in parts)]
    return Report.group(block.name, parts + fixed_parts(device, block, batch_size))


def spatial_costs(
    device: Device, block: BlockShape, batch_size: int | None, rate_channel: float = 1.0
) -> tuple[Report, Report, PatchCost, list[PatchCost]]:
    """Dense fused masker and conv1; the masker and dynamic conv1; what follows them.

    ``rate_channel`` is the channel rate of a block that skips channels as well.
    """
    side = block.granularity
    fused, masker, conv1 = ops.masker_conv1_costs(
        device,
        block.c_in,
        block.width,
        block.h_mid,
        block.w_mid,
        stride=block.conv1_stride,
        granularity=side,
        batch_size=batch_size,
        channel_groups=block.channel_groups,
        channel_rate=rate_channel,
    )

    def conv(c_out: int, kernel: int, **options: Any) -> PatchCost:
        args = (device, block.width, c_out, kernel, block.h_out, block.w_out)
        options.update(granularity=side, batch_size=batch_size)
        if block.mode != "both":
            return ops.dynamic_conv_cost(*args, **options)
        mask = ops.ChannelMask(block.channel_groups, inputs=True, outputs=kernel == 3)
        return ops.channel_conv_cost(*args, mask=mask, **options).at(rate_channel)

    rest = [
        conv(
            block.width,
            3,
            stride=block.conv2_stride,
            groups=block.groups,
            dilation=block.dilation,
            name="conv2",
        ),
        *se_costs(device, block, block.n_patches, rate_channel, batch_size),
        conv(block.c_out, 1, gathered=True, name="conv3"),
        ops.scatter_add_cost(
            device, block.c_out, block.h_out, block.w_out, granularity=side, batch_size=batch_size
        ),
    ]
    return fused, masker, conv1, rest


def _dense_parts(
    device: Device, block: BlockShape, batch_size: int | None, rate_channel: float
) -> list[Report]:
    """The block's operators on whole maps, in order; a channel block's at its channel rate."""

    def conv(c_in: int, c_out: int, kernel: int, h: int, w: int, **options: Any) -> Report:
        options["batch_size"] = batch_size
        if block.mode != "channel":
            return ops.static_conv(device, c_in, c_out, kernel, h, w, **options)
        mask = ops.ChannelMask(
            block.channel_groups,
            inputs=options["name"] != "conv1",
            outputs=options["name"] != "conv3",
        )
        return ops.channel_conv(
            device, c_in, c_out, kernel, h, w, rate=rate_channel, mask=mask, **options
        )

    width, h_out, w_out = block.width, block.h_out, block.w_out
    se = se_costs(device, block, 1, rate_channel, batch_size)
    return [
        conv(
            block.c_in,
            width,
            1,
            block.h_mid,
            block.w_mid,
            stride=block.conv1_stride,
            name="conv1",
        ),
        conv(
            width,
            width,
            3,
            h_out,
            w_out,
            stride=block.conv2_stride,
            groups=block.groups,
            dilation=block.dilation,
            name="conv2",
        ),
        *(cost.report(1) for cost in se),
        conv(width, block.c_out, 1, h_out, w_out, name="conv3"),
        ops.elementwise_add(device, block.c_out, h_out, w_out, batch_size=batch_size),
    ]


def se_costs(
    device: Device,
    block: BlockShape,
    positions: int,
    rate_channel: float,
    batch_size: int | None,
) -> list[PatchCost]:
    """Squeeze-and-excitation of conv2's output as functions of the number of kept patches.

    Pooling and scaling cost the kept share of positions and channels, the two layers between
    them what they cost on all channels. Empty without SE.
    """
    if not block.se_width:
        return []
    if not block.has_channels:
        rate_channel = 1.0
    sizes = (block.width, block.h_out, block.w_out)
    pool = ops.global_average_pool(device, *sizes, batch_size=batch_size, name="se_pool")
    scale = ops.scale_channels(device, *sizes, batch_size=batch_size, name="se_scale")
    layers = [
        ops.fully_connected(device, c_in, c_out, batch_size=batch_size, name=name)
        for c_in, c_out, name in (
            (block.width, block.se_width, "se_fc1"),
            (block.se_width, block.width, "se_fc2"),
        )
    ]

    def per_patch(report: Report) -> PatchCost:
        share = rate_channel / positions
        compute, memory = report.compute_s * share, report.memory_s * share
        return PatchCost(report.name, positions, report.launch_s, 0.0, memory, compute, 1)

    def fixed(report: Report) -> PatchCost:
        seconds = report.compute_s + report.memory_s
        return PatchCost(report.name, positions, report.launch_s, seconds, 0.0, 0.0, 1)

    return [per_patch(pool), *map(fixed, layers), per_patch(scale)]


def fixed_parts(device: Device, block: BlockShape, batch_size: int | None) -> list[Report]:
    """What no rate changes: the channel masker and the shortcut."""
    return channel_masker_parts(device, block, batch_size) + downsample_parts(
        device, block, batch_size
    )


def channel_masker_parts(
    device: Device, block: BlockShape, batch_size: int | None
) -> list[Report]:
    """The channel masker, a report of its operators; empty without one."""
    if not block.has_channels:
        return []
    c_in, hidden, logits = block.c_in, block.channel_hidden, 2 * block.channel_groups
    convolves = block.channel_masker == "conv_linear"
    h, w = block.h_in, block.w_in
    parts = []
    if convolves:
        parts.append(
            ops.static_conv(device, c_in, hidden, 1, h, w, batch_size=batch_size, name="conv")
        )
        c_in = hidden
    parts.append(ops.global_average_pool(device, c_in, h, w, batch_size=batch_size, name="pool"))
    layers = [(c_in, logits)] if convolves or not hidden else [(c_in, hidden), (hidden, logits)]
    parts += [
        ops.fully_connected(device, *sizes, batch_size=batch_size, name=f"fc{i}")
        for i, sizes in enumerate(layers, 1)
    ]
    return [Report.group("channel_masker", parts)]


def downsample_parts(device: Device, block: BlockShape, batch_size: int | None) -> list[Report]:
    if not block.downsample:
        return []
    parts, stride = [], block.stride
    if block.downsample_pool:
        parts.append(
            ops.max_pool(
                device,
                block.c_in,
                stride,
                block.h_out,
                block.w_out,
                stride=stride,
                batch_size=batch_size,
                name="downsample_pool",
            )
        )
        stride = 1
    parts.append(
        ops.static_conv(
            device,
            block.c_in,
            block.c_out,
            1,
            block.h_out,
            block.w_out,
            stride=stride,
            batch_size=batch_size,
            name="downsample",
        )
    )
    return parts


def stem_report(device: Device, network: NetworkShape, batch_size: int | None) -> Report:
    parts = []
    for item in network.stem:
        if isinstance(item, PoolShape):
            parts.append(
                ops.max_pool(
                    device,
                    item.channels,
                    item.kernel,
                    item.h_out,
                    item.w_out,
                    stride=item.stride,
                    batch_size=batch_size,
                    name=item.name,
                )
            )
        elif isinstance(item, ConvShape):
            parts.append(
                ops.static_conv(
                    device,
                    item.c_in,
                    item.c_out,
                    item.kernel,
                    item.h_out,
                    item.w_out,
                    stride=item.stride,
                    groups=item.groups,
                    batch_size=batch_size,
                    name=item.name,
                )
            )
        else:
            raise ValueError(f"there is no latency model for {item!r} of {network.name}")
    return Report.group("stem", parts)


def patch_count(rate: np.ndarray | float, positions: int) -> np.ndarray:
    """Active patches at a rate: ``ceil(rate * positions)``."""
    return np.ceil((np.asarray(rate, dtype=float) - _RATE_SLACK) * positions).clip(0, positions)


def _rate(name: str, value: float) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}") from None
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return rate
