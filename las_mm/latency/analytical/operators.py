"""The cost of one operator on one device, as a :class:`Report`.

Implements the analytical model of docs/latency_model.md (the simulator of LAUDNet, arXiv
2308.15949): an operator's output is split into tiles, and its latency is
``launch + min over tilings of (compute + memory)``. All times are seconds for the whole batch,
all sizes are counts of FP32 values.
"""

from __future__ import annotations

import numbers
from typing import Any

from ..report import Report
from .channels import (
    ChannelCost,
    ChannelMask,
    search_channel_conv,
    search_dynamic_channel_conv,
)
from .device import Device
from .tiling import (
    PatchCost,
    search_conv,
    search_dynamic_conv,
    search_map_op,
    search_scatter_add,
    search_value_op,
)

__all__ = [
    "ChannelCost",
    "ChannelMask",
    "PatchCost",
    "Report",
    "channel_conv",
    "channel_conv_cost",
    "dynamic_conv",
    "dynamic_conv_cost",
    "elementwise_add",
    "fully_connected",
    "global_average_pool",
    "layer_masker",
    "masker_conv1",
    "masker_conv1_costs",
    "max_pool",
    "resize",
    "scale_channels",
    "scatter_add",
    "scatter_add_cost",
    "static_conv",
]
MASKER_OUTPUTS = 2  # logits "keep" and "skip"


def static_conv(
    device: Device,
    c_in: int,
    c_out: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    batch_size: int | None = None,
    name: str = "conv",
) -> Report:
    """A dense convolution to a ``c_out`` x ``h_out`` x ``w_out`` map.

    ``dilation`` (our extension) widens a tile's input window by ``(kernel - 1) * dilation``.

    Raises:
        ValueError: A size is not a positive integer, or ``groups`` does not divide the channels.
    """
    check_sizes(
        name,
        c_in=c_in,
        c_out=c_out,
        kernel=kernel,
        h_out=h_out,
        w_out=w_out,
        stride=stride,
        groups=groups,
        dilation=dilation,
        batch_size=_batch(device, batch_size),
    )
    _check_groups(name, c_in, c_out, groups)
    times = search_conv(
        device,
        c_in,
        c_out,
        kernel,
        h_out,
        w_out,
        stride,
        groups,
        dilation,
        _batch(device, batch_size),
        True,
    )
    return Report(name, *times, device.launch_s)


def layer_masker(
    device: Device,
    c_in: int,
    c_out: int,
    h_out: int,
    w_out: int,
    *,
    stride: int = 1,
    batch_size: int | None = None,
    name: str = "masker",
) -> Report:
    """The masker of a layer-skipping block: conv1 with one more output, at zero output density.

    Only the input is read, and the weights where a batch shares them. ``c_out``, ``h_out`` and
    ``w_out`` are conv1's.

    Raises:
        ValueError: A size is not a positive integer.
    """
    check_sizes(
        name,
        c_in=c_in,
        c_out=c_out,
        h_out=h_out,
        w_out=w_out,
        stride=stride,
        batch_size=_batch(device, batch_size),
    )
    times = search_conv(
        device, c_in, c_out + 1, 1, h_out, w_out, stride, 1, 1, _batch(device, batch_size), False
    )
    return Report(name, *times, device.launch_s)


def elementwise_add(
    device: Device,
    channels: int,
    h: int,
    w: int,
    *,
    batch_size: int | None = None,
    name: str = "add",
) -> Report:
    """Addition of two ``channels`` x ``h`` x ``w`` maps.

    Raises:
        ValueError: A size is not a positive integer.
    """
    check_sizes(name, channels=channels, h=h, w=w, batch_size=_batch(device, batch_size))
    return Report(
        name,
        *search_map_op(device, channels, h, w, 1, 0, 1, _batch(device, batch_size)),
        device.launch_s,
    )


def max_pool(
    device: Device,
    channels: int,
    kernel: int,
    h_out: int,
    w_out: int,
    *,
    stride: int = 1,
    batch_size: int | None = None,
    name: str = "pool",
) -> Report:
    """Max or average pooling to a ``channels`` x ``h_out`` x ``w_out`` map.

    Not in the published model; our extension of its element-wise add: ``kernel**2`` operations
    per output value, and per tile the exact input window and the output through device memory.

    Raises:
        ValueError: A size is not a positive integer.
    """
    check_sizes(
        name,
        channels=channels,
        kernel=kernel,
        h_out=h_out,
        w_out=w_out,
        stride=stride,
        batch_size=_batch(device, batch_size),
    )
    times = search_map_op(
        device, channels, h_out, w_out, kernel * kernel, kernel, stride, _batch(device, batch_size)
    )
    return Report(name, *times, device.launch_s)


def global_average_pool(
    device: Device,
    channels: int,
    h: int,
    w: int,
    *,
    batch_size: int | None = None,
    name: str = "global_pool",
) -> Report:
    """The mean of every channel of a ``channels`` x ``h`` x ``w`` map. Our extension.

    One operation per value; the map is read once, and each tile writes a sum per channel.

    Raises:
        ValueError: A size is not a positive integer.
    """
    return value_op(device, channels, h, w, 1, 1, False, batch_size, name)


def scale_channels(
    device: Device,
    channels: int,
    h: int,
    w: int,
    *,
    batch_size: int | None = None,
    name: str = "scale",
) -> Report:
    """Every channel of a ``channels`` x ``h`` x ``w`` map times a number. Our extension.

    Raises:
        ValueError: A size is not a positive integer.
    """
    return value_op(device, channels, h, w, 1, 1, True, batch_size, name)


def resize(
    device: Device,
    channels: int,
    h_out: int,
    w_out: int,
    *,
    batch_size: int | None = None,
    name: str = "resize",
) -> Report:
    """Bilinear interpolation to a ``channels`` x ``h_out`` x ``w_out`` map. Our extension.

    Four values read, and as many operations, per output value.

    Raises:
        ValueError: A size is not a positive integer.
    """
    return value_op(device, channels, h_out, w_out, 4, 4, True, batch_size, name)


def fully_connected(
    device: Device,
    c_in: int,
    c_out: int,
    *,
    rows: int = 1,
    batch_size: int | None = None,
    name: str = "fc",
) -> Report:
    """A linear layer on ``rows`` vectors per image: a 1x1 convolution of one row of pixels.

    The vectors of the whole batch are one matrix, whose rows tiles share. Our extension.

    Raises:
        ValueError: A size is not a positive integer.
    """
    images = _batch(device, batch_size)
    check_sizes(name, c_in=c_in, c_out=c_out, rows=rows, batch_size=images)
    times = search_conv(device, c_in, c_out, 1, 1, rows * images, 1, 1, 1, 1, True)
    return Report(name, *times, device.launch_s)


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
    images = _batch(device, batch_size)
    sizes = dict(c_in=c_in, c_out=c_out, kernel=kernel, h_out=h_out, w_out=w_out, stride=stride)
    check_sizes(name, **sizes, groups=groups, dilation=dilation, batch_size=images)
    check_sizes(
        name, mask_groups=mask.groups, granularity=1 if granularity is None else granularity
    )
    _check_groups(name, c_in, c_out, groups)
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
        batch_size=_batch(device, batch_size),
    )
    _check_groups(name, c_in, c_out, groups)
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
        _batch(device, batch_size),
        name,
    )


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
    conv1_args = (device, c_in, c_out, 1, h_out, w_out)
    conv1_options: dict[str, Any] = dict(
        granularity=granularity, stride=stride, batch_size=batch_size, name="conv1"
    )
    if channel_groups:
        conv1 = channel_conv_cost(*conv1_args, mask=mask, **conv1_options).at(channel_rate)
    else:
        conv1 = dynamic_conv_cost(*conv1_args, **conv1_options)
    return fused, masker, conv1


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
        batch_size=_batch(device, batch_size),
    )
    return search_scatter_add(device, channels, h, w, granularity, _batch(device, batch_size), name)


def value_op(
    device: Device,
    channels: int,
    h: int,
    w: int,
    operations: int,
    reads: int,
    writes: bool,
    batch_size: int | None,
    name: str,
) -> Report:
    images = _batch(device, batch_size)
    check_sizes(name, channels=channels, h=h, w=w, batch_size=images)
    times = search_value_op(device, channels, h, w, operations, reads, writes, images)
    return Report(name, *times, device.launch_s)


def _batch(device: Device, batch_size: int | None) -> int:
    if not isinstance(device, Device):
        raise TypeError(
            f"operators are costed one by one for a Device of the analytical model, got "
            f"{type(device).__name__}; a calibrated device predicts blocks and networks"
        )
    return device.batch_size if batch_size is None else batch_size


def check_sizes(name: str, **sizes: int) -> None:
    """Raise ValueError for a size that is not a positive integer."""
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}: {key} must be a positive integer, got {value!r}")


def _check_groups(name: str, c_in: int, c_out: int, groups: int) -> None:
    if c_in % groups or c_out % groups:
        raise ValueError(
            f"{name}: groups must divide the channels, got groups={groups}, "
            f"c_in={c_in}, c_out={c_out}"
        )
