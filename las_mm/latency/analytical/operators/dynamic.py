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
from ..device import Device
from ..tiling import PatchCost, search_dynamic_conv, search_scatter_add
from .checks import check_groups, check_sizes, images_of


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
    cost = channel_conv_cost(
        device,
        c_in,
        c_out,
        kernel,
        h_out,
        w_out,
        mask=mask,
        stride=stride,
        groups=groups,
        dilation=dilation,
        batch_size=batch_size,
        name=name,
    )
    return cost.at(float(rate)).report(1)


def channel_conv_cost(
    device: Device,
    c_in: int,
    c_out: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    mask: ChannelMask,
    granularity: int | None = None,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    gathered: bool = False,
    batch_size: int | None = None,
    name: str = "conv",
) -> ChannelCost:
    """A convolution that skips channels, as a function of the channel rate (and the patches).

    Args:
        device, c_in, c_out, kernel, h_out, w_out, stride, groups, dilation, gathered, batch_size,
            name: As in :func:`dynamic_conv`.
        mask: What the channel mask covers.
        granularity: Side S of a patch, in outputs. Defaults to None: the whole map.

    Raises:
        ValueError: As :func:`dynamic_conv`.
    """
    images = images_of(device, batch_size)
    sizes = dict(c_in=c_in, c_out=c_out, kernel=kernel, h_out=h_out, w_out=w_out, stride=stride)
    check_sizes(name, **sizes, groups=groups, dilation=dilation, batch_size=images)
    check_sizes(
        name, mask_groups=mask.groups, granularity=1 if granularity is None else granularity
    )
    check_groups(name, c_in, c_out, groups)
    common = (stride, groups, dilation)
    if granularity is None:
        return search_channel_conv(
            device, c_in, c_out, kernel, h_out, w_out, *common, images, mask, name
        )
    return search_dynamic_channel_conv(
        device,
        c_in,
        c_out,
        kernel,
        h_out,
        w_out,
        granularity,
        *common,
        gathered,
        images,
        mask,
        name,
    )


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
        c_in: Input channels.
        c_out: Output channels.
        kernel: Kernel size.
        h_out: Rows of the whole output map; with ``w_out`` it gives the patch positions.
        w_out: Columns of the whole output map.
        granularity: Side S of a patch, in outputs.
        n_patches: Active patches per image, 0 to ``ceil(h_out/S) * ceil(w_out/S)``.
        stride: Stride.
        groups: Groups.
        dilation: Dilation (our extension, as in :func:`static_conv`).
        gathered: Whether the input is already gathered; otherwise the gather is fused and the
            whole input map is charged.
        batch_size: Images per batch. Defaults to the device's.
        name: Name of the report.

    Raises:
        ValueError: A size is not a positive integer, ``groups`` does not divide the channels, or
            ``n_patches`` is out of range.
    """
    return dynamic_conv_cost(
        device,
        c_in,
        c_out,
        kernel,
        h_out,
        w_out,
        granularity=granularity,
        stride=stride,
        groups=groups,
        dilation=dilation,
        gathered=gathered,
        batch_size=batch_size,
        name=name,
    ).report(n_patches)


def dynamic_conv_cost(
    device: Device,
    c_in: int,
    c_out: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    granularity: int,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    gathered: bool = False,
    batch_size: int | None = None,
    name: str = "conv",
) -> PatchCost:
    """:func:`dynamic_conv` as a function of the number of patches."""
    check_sizes(
        name,
        c_in=c_in,
        c_out=c_out,
        kernel=kernel,
        h_out=h_out,
        w_out=w_out,
        stride=stride,
        granularity=granularity,
        groups=groups,
        dilation=dilation,
        batch_size=images_of(device, batch_size),
    )
    check_groups(name, c_in, c_out, groups)
    return search_dynamic_conv(
        device,
        c_in,
        c_out,
        kernel,
        h_out,
        w_out,
        granularity,
        stride,
        groups,
        dilation,
        gathered,
        images_of(device, batch_size),
        name,
    )


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
