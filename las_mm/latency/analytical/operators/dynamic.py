"""Operators that compute what masks of patches or channels keep."""

from __future__ import annotations

import numbers

from ...report import Report
from ..channels import (
    ChannelCost,
    ChannelMask,
    search_channel_conv,
    search_dynamic_channel_conv,
)
from ..checks import check_sizes, images_of
from ..conv_size import ConvSize
from ..device import Device
from ..tiling import PatchCost, search_dynamic_conv, search_scatter_add


def channel_conv(
    device: Device,
    c_in: int,
    c_out: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    rate: float,
    mask: ChannelMask,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    batch_size: int | None = None,
    name: str = "conv",
) -> Report:
    """A convolution on the whole map that leaves out skipped channels; see :mod:`.channels`.

    Args:
        device, c_in, c_out, kernel, h_out, w_out, stride, groups, dilation, batch_size, name: As
            in :func:`static_conv`.
        rate: Share of the masked channels that is computed, 0 to 1.
        mask: What the channel mask covers.

    Raises:
        ValueError: As :func:`static_conv`, or a ``rate`` out of range.
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate <= 1:
        raise ValueError(f"{name}: rate must be a number in [0, 1], got {rate!r}")
    size = ConvSize(c_in, c_out, kernel, h_out, w_out, stride, groups, dilation)
    cost = channel_conv_cost(device, size, mask=mask, batch_size=batch_size, name=name)
    return cost.at(float(rate)).report(1)


def channel_conv_cost(
    device: Device,
    size: ConvSize,
    *,
    mask: ChannelMask,
    granularity: int | None = None,
    gathered: bool = False,
    batch_size: int | None = None,
    name: str = "conv",
) -> ChannelCost:
    """A convolution that skips channels, as a function of the channel rate (and the patches).

    Args:
        device, gathered, batch_size, name: As in :func:`dynamic_conv`.
        size: The convolution.
        mask: What the channel mask covers.
        granularity: Side S of a patch, in outputs. Defaults to None: the whole map.

    Raises:
        ValueError: As :func:`dynamic_conv`.
    """
    images = images_of(device, batch_size)
    side = 1 if granularity is None else granularity
    size.check(name, batch_size=images, mask_groups=mask.groups, granularity=side)
    if granularity is None:
        return search_channel_conv(device, size, images, mask, name)
    return search_dynamic_channel_conv(device, size, side, gathered, images, mask, name)


def dynamic_conv(
    device: Device,
    c_in: int,
    c_out: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    granularity: int,
    n_patches: int,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    gathered: bool = False,
    batch_size: int | None = None,
    name: str = "conv",
) -> Report:
    """A convolution on ``n_patches`` patches of ``granularity`` x ``granularity`` outputs.

    Args:
        device: The device.
        c_in, c_out, kernel, stride, groups, dilation: See :class:`.conv_size.ConvSize`.
        h_out: Rows of the whole output map; with ``w_out`` it gives the patch positions.
        w_out: Columns of the whole output map.
        granularity: Side S of a patch, in outputs.
        n_patches: Active patches per image, 0 to ``ceil(h_out/S) * ceil(w_out/S)``.
        gathered: Whether the input is already gathered; otherwise the gather is fused and the
            whole input map is charged.
        batch_size: Images per batch. Defaults to the device's.
        name: Name of the report.

    Raises:
        ValueError: A size is not a positive integer, ``groups`` does not divide the channels, or
            ``n_patches`` is out of range.
    """
    size = ConvSize(c_in, c_out, kernel, h_out, w_out, stride, groups, dilation)
    cost = dynamic_conv_cost(
        device,
        size,
        granularity=granularity,
        gathered=gathered,
        batch_size=batch_size,
        name=name,
    )
    return cost.report(n_patches)


def dynamic_conv_cost(
    device: Device,
    size: ConvSize,
    *,
    granularity: int,
    gathered: bool = False,
    batch_size: int | None = None,
    name: str = "conv",
) -> PatchCost:
    """:func:`dynamic_conv` as a function of the number of patches."""
    images = images_of(device, batch_size)
    size.check(name, granularity=granularity, batch_size=images)
    return search_dynamic_conv(device, size, granularity, gathered, images, name)


def scatter_add(
    device: Device,
    channels: int,
    h: int,
    w: int,
    *,
    granularity: int,
    n_patches: int,
    batch_size: int | None = None,
    name: str = "scatter_add",
) -> Report:
    """Addition of ``n_patches`` patches into a ``channels`` x ``h`` x ``w`` residual.

    Raises:
        ValueError: A size is not a positive integer, or ``n_patches`` is out of range.
    """
    return scatter_add_cost(
        device, channels, h, w, granularity=granularity, batch_size=batch_size, name=name
    ).report(n_patches)


def scatter_add_cost(
    device: Device,
    channels: int,
    h: int,
    w: int,
    *,
    granularity: int,
    batch_size: int | None = None,
    name: str = "scatter_add",
) -> PatchCost:
    """:func:`scatter_add` as a function of the number of patches."""
    check_sizes(
        name,
        channels=channels,
        h=h,
        w=w,
        granularity=granularity,
        batch_size=images_of(device, batch_size),
    )
    return search_scatter_add(
        device, channels, h, w, granularity, images_of(device, batch_size), name
    )
