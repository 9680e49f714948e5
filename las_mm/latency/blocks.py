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

import numpy as np

from . import operators as ops
from .device import Device, load_device
from .report import Report
from .shapes import PREDICTED_MODES, BlockShape, NetworkShape, PoolShape
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
) -> Report:
    """Latency of one block, seconds for the whole batch, as a tree of its operators.

    Args:
        device: A device, its name or its file.
        block: The block. A static block does not depend on the rates.
        rate: Share of the patches (spatial) or of the images (layer) computed, 0 to 1.
        rate_dilated: Share of conv1's patches computed by a spatial block. Defaults to None,
            the paper's setting: the same as ``rate``.
        batch_size: Images per batch. Defaults to the device's.

    Raises:
        ValueError: A rate is not a number in [0, 1], ``batch_size`` is not positive, or the block
            skips channels, whose latency is not modelled.
    """
    device = load_device(device)
    if block.mode not in PREDICTED_MODES:
        raise ValueError(
            f"{block.name}: the latency model covers the modes {', '.join(PREDICTED_MODES)}, not "
            f"{block.mode!r}; count FLOPs instead (las_mm.models.flops_report)"
        )
    rate = _rate("rate", rate)
    rate_dilated = rate if rate_dilated is None else _rate("rate_dilated", rate_dilated)
    if block.mode == "spatial":
        fused, masker, conv1, rest = spatial_costs(device, block, batch_size)
        apart = Report.group(
            "masker_conv1", [masker, conv1.report(int(patch_count(rate_dilated, conv1.positions)))]
        )
        first = apart
        if fused.latency_s <= apart.latency_s:
            first = Report.group("masker_conv1", [fused])
        parts = [first, *(cost.report(int(patch_count(rate, cost.positions))) for cost in rest)]
    else:
        parts = _dense_parts(device, block, batch_size)
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
    return Report.group(block.name, parts + downsample_parts(device, block, batch_size))


def spatial_costs(
    device: Device, block: BlockShape, batch_size: int | None
) -> tuple[Report, Report, PatchCost, list[PatchCost]]:
    """Dense fused masker and conv1; the masker and dynamic conv1; what follows them."""
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
    )
    rest = [
        ops.dynamic_conv_cost(
            device,
            block.width,
            block.width,
            3,
            block.h_out,
            block.w_out,
            granularity=side,
            stride=block.conv2_stride,
            groups=block.groups,
            dilation=block.dilation,
            batch_size=batch_size,
            name="conv2",
        ),
        ops.dynamic_conv_cost(
            device,
            block.width,
            block.c_out,
            1,
            block.h_out,
            block.w_out,
            granularity=side,
            gathered=True,
            batch_size=batch_size,
            name="conv3",
        ),
        ops.scatter_add_cost(
            device, block.c_out, block.h_out, block.w_out, granularity=side, batch_size=batch_size
        ),
    ]
    return fused, masker, conv1, rest


def _dense_parts(device: Device, block: BlockShape, batch_size: int | None) -> list[Report]:
    return [
        ops.static_conv(
            device,
            block.c_in,
            block.width,
            1,
            block.h_mid,
            block.w_mid,
            stride=block.conv1_stride,
            batch_size=batch_size,
            name="conv1",
        ),
        ops.static_conv(
            device,
            block.width,
            block.width,
            3,
            block.h_out,
            block.w_out,
            stride=block.conv2_stride,
            groups=block.groups,
            dilation=block.dilation,
            batch_size=batch_size,
            name="conv2",
        ),
        ops.static_conv(
            device,
            block.width,
            block.c_out,
            1,
            block.h_out,
            block.w_out,
            batch_size=batch_size,
            name="conv3",
        ),
        ops.elementwise_add(device, block.c_out, block.h_out, block.w_out, batch_size=batch_size),
    ]


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
        else:
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
