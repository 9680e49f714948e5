"""Operators that compute all of their output."""

from __future__ import annotations

from ...report import Report
from ..checks import check_sizes, images_of
from ..conv_size import ConvSize
from ..device import Device
from ..tiling import search_conv, search_map_op, search_value_op

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
    images = images_of(device, batch_size)
    size = ConvSize(c_in, c_out, kernel, h_out, w_out, stride, groups, dilation)
    size.check(name, batch_size=images)
    return Report(name, *search_conv(device, size, images), device.launch_s)


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
    images = images_of(device, batch_size)
    ConvSize(c_in, c_out, 1, h_out, w_out, stride).check(name, batch_size=images)
    size = ConvSize(c_in, c_out + 1, 1, h_out, w_out, stride)
    times = search_conv(device, size, images, has_output=False)
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
    check_sizes(name, channels=channels, h=h, w=w, batch_size=images_of(device, batch_size))
    return Report(
        name,
        *search_map_op(device, channels, h, w, 1, 0, 1, images_of(device, batch_size)),
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
        batch_size=images_of(device, batch_size),
    )
    times = search_map_op(
        device,
        channels,
        h_out,
        w_out,
        kernel * kernel,
        kernel,
        stride,
        images_of(device, batch_size),
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
    images = images_of(device, batch_size)
    check_sizes(name, c_in=c_in, c_out=c_out, rows=rows, batch_size=images)
    times = search_conv(device, ConvSize(c_in, c_out, 1, 1, rows * images), 1)
    return Report(name, *times, device.launch_s)


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
    images = images_of(device, batch_size)
    check_sizes(name, channels=channels, h=h, w=w, batch_size=images)
    times = search_value_op(device, channels, h, w, operations, reads, writes, images)
    return Report(name, *times, device.launch_s)
