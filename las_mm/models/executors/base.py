"""What executors of all blocks have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.bounded import Recent
from las_mm.models.activation import Activation, channel_rates
from las_mm.models.coverage import (
    Unsupported,
    check_plain,
)
from las_mm.models.plan import Choice
from las_mm.network.operator import CHANNEL, DILATED, LAYER, POSITION

Record = Activation | Callable[[], Activation]  # the latter counts when asked


class SparseBlock:
    """What the packed forms of all blocks have in common: their decisions and their record.

    A subclass is a dataclass with these fields, and gives :meth:`_choose` and ``__call__``.

    Attributes:
        strides: Of the convolution that conv1 is and of the one that reads around kept positions.
        dilation: Of the latter.
        groups: Of the convolution between gated channels.
        one: 1, on the block's device.
        masker: With its weight and bias, not copied; ``None`` without.
        masker_channel: Likewise a channel masker.
        channel_layers: Weights and biases of masker_channel where one op does its work.
        choice: The last one made; torch.compile and torch.export keep it.
        channels_last: Whether dense convolutions with its weights put out channels_last.
        packs: Whether it holds weights derived from the block's.
        form: What it is called in reports, where it has no forms to choose between.
    """

    packs = True
    form = ""

    strides: tuple[int, int]
    dilation: int
    groups: int
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None
    masker_channel: nn.Module | None
    channel_layers: tuple[list[Tensor], list[Tensor]] | None
    choice: Choice
    channels_last: bool

    def __post_init__(self) -> None:
        self._choices: Recent[tuple[int, ...], Choice] = Recent()

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, which inputs must have."""
        raise NotImplementedError

    def plan(self, block: nn.Module, x: Tensor) -> Choice:
        """The form for inputs like ``x``; packs what that form needs before anyone sees it."""
        if compat.is_compiling():
            return self.choice
        leave(block, "input_hw", (x.shape[-2], x.shape[-1]))
        size = (*x.shape, torch.get_num_threads())
        self.choice = self._choices.get(size, lambda: self._choose(block, x))
        return self.choice

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        raise NotImplementedError

    def _positions(self, block: nn.Module, x: Tensor) -> tuple[Tensor | None, int, Record | None]:
        """Decisions about positions, S, and what is known of the block's activation by them.

        The last is ``None`` where nothing may be left in the block: older versions of torch.compile
        could not even make it.
        """
        granularity = block.granularity if block.mode in ("spatial", "both") else ops.LAYER
        records = not compat.is_exporting()
        if self.masker is None:
            return None, granularity, Activation(self.one) if records else None
        masker, weight, bias = self.masker
        axes = (LAYER,) if block.mode == "layer" else (POSITION, DILATED)
        offset = masker.offset
        if offset is not None:
            side = self.strides[1] * granularity  # ceil(ceil(n / a) / b) is ceil(n / (a * b))
            grid = (-(-n // (self.strides[0] * side)) for n in x.shape[2:])
            offset = masker.offset_for((len(x), 1, *grid))
        arguments = (weight, bias, offset, granularity, self.strides, self.dilation)
        if x.is_cuda and not (compat.is_compiling() or compat.is_exporting()):
            # Rates take launches of their own there, which nobody may ask for.
            mask = torch.ops.las_mm.patch_mask(x, *arguments)
            geometry = (tuple(x.shape[2:]), granularity, self.strides, self.dilation)
            return mask, granularity, partial(_spatial_activation, self.one, mask, axes, *geometry)
        mask, found = ops.spatial_mask(x, *arguments)
        if not records:
            return mask, granularity, None
        known = Activation(self.one, dict(zip(axes, found.unbind())), {axes[0]: mask})
        return mask, granularity, known

    def _channels(self, block: nn.Module, x: Tensor, known: Record | None) -> Tensor:
        """Decisions about channels, (N, groups) bool; leaves ``block.activation``."""
        assert self.masker_channel is not None
        if self.channel_layers is None:
            groups = self.masker_channel(x)
        else:
            offset = self.masker_channel.offset_for((len(x), self.masker_channel.groups))
            groups = ops.channel_mask(x, *self.channel_layers, offset)
        if known is not None:
            record = partial(
                _channel_activation,
                known,
                groups,
                tuple(x.shape[2:]),
                block.granularity,
                self.strides,
                self.dilation,
                self.groups,
                block.channel_granularity,
            )
            # Ten small operations that nobody may ask for.
            leave(block, "_activation", record() if compat.is_compiling() else record)
        return groups.bool()


def leave(block: nn.Module, name: str, value: object) -> None:
    """Set an attribute of a block that is no parameter, buffer or module.

    ``nn.Module.__setattr__`` looks for these first, 3 us for every block of every image.
    torch.compile knows no other way.
    """
    if compat.is_compiling():
        setattr(block, name, value)
    else:
        block.__dict__[name] = value


def _spatial_activation(
    one: Tensor,
    mask: Tensor,
    axes: Sequence[str],
    input_hw: tuple[int, int],
    granularity: int,
    strides: Sequence[int],
    dilation: int,
) -> Activation:
    """What ``ops.spatial_mask`` would have counted, for those who ask."""
    size = [-(-n // strides[0]) for n in input_hw]
    _, counts = ops.dilate_mask(mask, granularity, size, strides[1], dilation)
    areas = counts.new_tensor([math.prod(-(-n // strides[1]) for n in size), math.prod(size)])
    rates = (counts.sum(dim=0) / (areas * max(len(mask), 1))).float()
    return Activation(one, dict(zip(axes, rates.unbind())), {axes[0]: mask})


def _channel_activation(
    known: Record,
    groups_mask: Tensor,
    input_hw: tuple[int, int],
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    groups: int,
    channel_granularity: int,
) -> Activation:
    """``known`` with the decisions about channels, and the rates of each image."""
    if callable(known):
        known = known()
    mask, decisions = known.mask, groups_mask.float()
    rates = dict(known.rates)
    if mask is not None and len(decisions) > 1:
        size = [-(-n // strides[0]) for n in input_hw]
        _, counts = ops.dilate_mask(mask, granularity, size, strides[1], dilation)
        outputs = [-(-n // strides[1]) for n in size]
        areas = counts.new_tensor([math.prod(outputs), math.prod(size)])
        rates = dict(zip((POSITION, DILATED), (counts.float() / areas).unbind(1)))
    channels = decisions
    if groups > 1:
        channels = decisions.repeat_interleave(channel_granularity, dim=1)
    rates.update(channel_rates(channels, groups))
    return replace(known, rates=rates, decisions={**known.decisions, CHANNEL: decisions})


def layers_of(masker: nn.Module | None) -> tuple[list[Tensor], list[Tensor]] | None:
    """What ``ops.channel_mask`` takes of a channel masker; ``None`` where it cannot do its work.

    In bfloat16 the masker rounds between its layers, which the op does not. A masker of other
    layers, e.g. quantised ones, runs as the module that it is.
    """
    if masker is None or masker.kind != "mlp":
        return None
    layers, types = [masker.conv], [nn.Linear]
    try:
        if masker.layers == 2:
            check_plain(masker.conv, "", nn.Sequential)
            layers, types = list(masker.conv), [nn.Linear, nn.ReLU, nn.Linear]
        for layer, kind in zip(layers, types):
            check_plain(layer, "", kind)
    except Unsupported:
        return None
    if len(layers) != len(types):
        return None
    layers = layers[::2]
    weights = [layer.weight for layer in layers]
    if weights[0].dtype != torch.float32 or not ops.has_channel_mask(weights[0].device.type):
        return None
    if any(
        type(w) not in (nn.Parameter, Tensor) or layer.bias is None
        for layer, w in zip(layers, weights)
    ):
        return None
    return weights, [layer.bias for layer in layers]
