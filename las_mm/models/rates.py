"""Rates of single images, counted from the decisions of their masks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from las_mm.models.activation import Activation, NetworkActivation, channel_rates
from las_mm.models.maskers import dilate_mask, expand_channels, expand_mask
from las_mm.network.block import BlockShape
from las_mm.network.operator import CHANNEL, DILATED, POSITION, Conv


def image_rates(block: BlockShape, decisions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rates of every image by axis, (N,), of a block that decided so.

    Args:
        block: The block.
        decisions: See :class:`~las_mm.models.activation.Activation`.
    """
    rates = {axis: made.float().flatten(1).mean(dim=1) for axis, made in decisions.items()}
    if POSITION in decisions:
        size = (block.h_out, block.w_out)
        kept = expand_mask(decisions[POSITION].float(), block.granularity, size)
        rates[POSITION] = kept.mean(dim=(1, 2, 3))
        reader = block.reader
        read = next((op for op in block.operators if DILATED in op.gates), None)
        if isinstance(read, Conv) and reader is not None:
            halo = dilate_mask(kept, (read.h_out, read.w_out), reader.stride, reader.dilation)
            rates[DILATED] = halo.mean(dim=(1, 2, 3))
    if CHANNEL in decisions:
        channels = expand_channels(decisions[CHANNEL].float(), block.channel_granularity)
        groups = max((groups for _, groups in block.terms), default=1)
        rates.update(channel_rates(channels.flatten(1), groups))
    return rates


def image_activation(activation: NetworkActivation, image_index: int) -> NetworkActivation:
    """The record of one image of a batch, its rates counted again from its masks.

    A block without a mask keeps the batch's figures.

    Args:
        activation: What the network did, of a batch.
        image_index: Image of the batch, from 0.
    """
    one, blocks = activation.shares.new_ones(()), []
    for i, (block, decisions) in enumerate(zip(activation.shape.blocks, activation.decisions)):
        own = {axis: made[image_index : image_index + 1] for axis, made in decisions.items()}
        rates = {axis: activation.axes[axis][i] for axis in block.axes}
        blocks.append(Activation(one, {**rates, **image_rates(block, own)}, own))
    return NetworkActivation.of(activation.shape, blocks)
