"""What each kind of operator costs; which masker is fused with which convolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

from las_mm.network.block import BlockShape, ceil_div
from las_mm.network.operator import (
    CHANNEL,
    CHANNEL_IN,
    CHANNEL_OUT,
    DILATED,
    LAYER,
    POSITION,
    Add,
    Conv,
    GlobalPool,
    Linear,
    MapOperator,
    Masker,
    Operator,
    Pool,
    Scale,
)

from ..report import Report
from . import operators as ops
from .channels import ChannelCost
from .costs import POSITION_AXES, Cost, GroupCost, LayerCost, MaskedConvCost, PatchesCost, ShareCost
from .device import Device
from .tiling import PatchCost


@singledispatch
def operator_cost(op: Operator, device: Device, batch_size: int | None) -> Cost:
    """The cost of one operator.

    Register the cost of a new kind with ``operator_cost.register``.

    Raises:
        ValueError: There is no model for its kind, or for a size.
    """
    raise ValueError(f"there is no latency model for {op.name}, a {type(op).__name__}")


@operator_cost.register
def _conv(op: Conv, device: Device, batch_size: int | None) -> Cost:
    sizes = (op.c_in, op.c_out, op.kernel, op.h_out, op.w_out)
    size = ops.ConvSize(*sizes, op.stride, op.groups, op.dilation)
    options: dict = dict(batch_size=batch_size, name=op.name)
    channels = [gate for gate in op.gates if gate in (CHANNEL_IN, CHANNEL_OUT)]
    patched = any(axis in POSITION_AXES for axis in op.axes)
    cost: PatchCost | ChannelCost
    if channels:
        mask = ops.ChannelMask(op.channel_groups, CHANNEL_IN in channels, CHANNEL_OUT in channels)
        options["granularity"] = op.granularity if patched else None
        cost = ops.channel_conv_cost(device, size, mask=mask, gathered=op.gathered, **options)
    elif patched:
        options.update(granularity=op.granularity, gathered=op.gathered)
        cost = ops.dynamic_conv_cost(device, size, **options)
    else:
        options.update(stride=op.stride, groups=op.groups, dilation=op.dilation)
        return _scaled(op, ops.static_conv(device, *sizes, **options))
    _only(op, POSITION, DILATED, CHANNEL)
    return PatchesCost(cost, op.axes)


@operator_cost.register
def _add(op: Add, device: Device, batch_size: int | None) -> Cost:
    sizes = (device, op.channels, op.h_out, op.w_out)
    if not any(axis in POSITION_AXES for axis in op.axes):
        return _scaled(op, ops.elementwise_add(*sizes, batch_size=batch_size, name=op.name))
    _only(op, POSITION, DILATED)
    cost = ops.scatter_add_cost(
        *sizes, granularity=op.granularity, batch_size=batch_size, name=op.name
    )
    return PatchesCost(cost, op.axes)


@operator_cost.register
def _pool(op: Pool, device: Device, batch_size: int | None) -> Cost:
    found = ops.max_pool(
        device,
        op.channels,
        op.kernel,
        op.h_out,
        op.w_out,
        stride=op.stride,
        batch_size=batch_size,
        name=op.name,
    )
    return _scaled(op, found)


@operator_cost.register(GlobalPool)
@operator_cost.register(Scale)
def _values(op: MapOperator, device: Device, batch_size: int | None) -> Cost:
    cost = ops.global_average_pool if isinstance(op, GlobalPool) else ops.scale_channels
    sizes = (device, op.channels, op.h_out, op.w_out)
    return _scaled(op, cost(*sizes, batch_size=batch_size, name=op.name))


@operator_cost.register
def _linear(op: Linear, device: Device, batch_size: int | None) -> Cost:
    found = ops.fully_connected(device, op.c_in, op.c_out, batch_size=batch_size, name=op.name)
    return _scaled(op, found)


@operator_cost.register
def _masker(op: Masker, device: Device, batch_size: int | None) -> Cost:
    size = (op.h_out, op.w_out)
    options: dict = dict(stride=op.stride, batch_size=batch_size, name=op.name)
    if op.whole:
        return Cost(ops.layer_masker(device, op.c_in, op.beside, *size, **options))
    return Cost(ops.static_conv(device, op.c_in, ops.MASKER_OUTPUTS, 1, *size, **options))


def _scaled(op: Operator, full: Report) -> Cost:
    """``full``, or its share where there are gates."""
    if not op.gates:
        return Cost(full)
    if op.axes == (LAYER,):
        return LayerCost(full, op.axes)
    side = getattr(op, "granularity", 1)
    positions = 1
    if any(axis in POSITION_AXES for axis in op.axes):
        positions = ceil_div(op.h_out, side) * ceil_div(op.w_out, side)  # type: ignore[attr-defined]
    return ShareCost(full, op.axes, positions)


def _only(op: Operator, *axes: str) -> None:
    others = [axis for axis in op.axes if axis not in axes]
    if others:
        raise ValueError(
            f"there is no latency model for {op.name}, a {type(op).__name__}, with the gates "
            f"{', '.join(op.gates)}"
        )


def operator_costs(
    operators: Sequence[Operator], device: Device, batch_size: int | None
) -> list[Cost]:
    """The costs of operators that run one after the other.

    Raises:
        ValueError: There is no model for one of them.
    """
    return list(_costs(operators, device, batch_size))


def block_costs(block: BlockShape, device: Device, batch_size: int | None) -> list[Cost]:
    """The costs of a block's operators; see :func:`operator_costs`."""
    return operator_costs(block.operators, device, batch_size)


def _costs(operators: Sequence[Operator], device: Device, batch_size: int | None) -> Iterator[Cost]:
    def cost(op: Operator) -> Cost:
        return operator_cost(op, device, batch_size)

    i = 0
    while i < len(operators):
        op = operators[i]
        following = operators[i + 1] if i + 1 < len(operators) else None
        if op.group:
            end = i
            while end < len(operators) and operators[end].group == op.group:
                end += 1
            yield GroupCost(op.group, [cost(part) for part in operators[i:end]])
            i = end
        elif isinstance(op, Masker) and isinstance(following, Conv) and _fuses(op, following):
            fused = _fused(following, device, batch_size)
            yield MaskedConvCost(fused, cost(op), cost(following))
            i += 2
        else:
            yield cost(op)
            i += 1


def _fuses(masker: Masker, conv: Conv) -> bool:
    return not masker.whole and conv.kernel == 1 and DILATED in conv.gates


def _fused(conv: Conv, device: Device, batch_size: int | None) -> Cost:
    """The dense convolution with one more output, which decides."""
    sizes = (conv.c_in, conv.c_out + 1, 1, conv.h_out, conv.w_out)
    options: dict = dict(batch_size=batch_size, name="dense_fused")
    if CHANNEL_OUT not in conv.gates:
        return Cost(ops.static_conv(device, *sizes, stride=conv.stride, **options))
    mask = ops.ChannelMask(conv.channel_groups, inputs=False, outputs=True)
    size = ops.ConvSize(*sizes, conv.stride)
    return PatchesCost(ops.channel_conv_cost(device, size, mask=mask, **options), (CHANNEL,))
