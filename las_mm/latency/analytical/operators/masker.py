"""conv1 that finds out what is kept in the same pass over its input."""

from __future__ import annotations

from typing import Any

from ...report import Report
from ..channels import (
    ChannelMask,
)
from ..conv_size import ConvSize
from ..device import Device
from ..tiling import PatchCost
from .dynamic import channel_conv, channel_conv_cost, dynamic_conv_cost
from .static import MASKER_OUTPUTS, static_conv


def masker_conv1(
    device: Device,
    c_in: int,
    c_out: int,
    h_out: int,
    w_out: int,
    *,
    granularity: int,
    n_patches: int,
    stride: int = 1,
    batch_size: int | None = None,
    name: str = "masker_conv1",
) -> Report:
    """The masker fused with a 1x1 conv1, in the cheaper of two ways.

    Either one dense convolution with one more output, or a dense masker followed by conv1 on
    ``n_patches`` patches of its output.

    Raises:
        ValueError: As :func:`dynamic_conv`.
    """
    fused, masker, conv1 = masker_conv1_costs(
        device,
        c_in,
        c_out,
        h_out,
        w_out,
        stride=stride,
        granularity=granularity,
        batch_size=batch_size,
    )
    apart = Report.group(name, [masker, conv1.report(n_patches)])
    if fused.latency_s <= apart.latency_s:
        return Report.group(name, [fused])
    return apart


def masker_conv1_costs(
    device: Device,
    c_in: int,
    c_out: int,
    h_out: int,
    w_out: int,
    *,
    granularity: int,
    stride: int = 1,
    batch_size: int | None = None,
    channel_groups: int = 0,
    channel_rate: float = 1.0,
) -> tuple[Report, Report, PatchCost]:
    """Both ways of :func:`masker_conv1`: the fused dense conv; the masker and the dynamic conv1.

    With ``channel_groups`` both leave out conv1's skipped channels, at ``channel_rate``.
    """
    if channel_groups:
        mask = ChannelMask(channel_groups, inputs=False, outputs=True)
    fused_args = (device, c_in, c_out + 1, 1, h_out, w_out)
    fused_options: dict[str, Any] = dict(stride=stride, batch_size=batch_size, name="dense_fused")
    if channel_groups:
        fused = channel_conv(*fused_args, rate=channel_rate, mask=mask, **fused_options)
    else:
        fused = static_conv(*fused_args, **fused_options)
    masker = static_conv(
        device,
        c_in,
        MASKER_OUTPUTS,
        1,
        h_out,
        w_out,
        stride=stride,
        batch_size=batch_size,
        name="masker",
    )
    size = ConvSize(c_in, c_out, 1, h_out, w_out, stride)
    options: dict[str, Any] = dict(granularity=granularity, batch_size=batch_size, name="conv1")
    if channel_groups:
        conv1 = channel_conv_cost(device, size, mask=mask, **options).at(channel_rate)
    else:
        conv1 = dynamic_conv_cost(device, size, **options)
    return fused, masker, conv1
