"""What the dynamic blocks of a network did in their last forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from mmengine import dist
from torch import Tensor

from las_mm.network.block import NetworkShape, Term
from las_mm.network.operator import CHANNEL, DILATED, LAYER, POSITION, axis_of
from las_mm.network.transformer import TOKEN

PLACES = (POSITION, LAYER, TOKEN)
"""What of an image is computed where: a network has one of these, or positions and layers."""

PAIRS = "channel_pairs"
"""Rate of what a grouped convolution multiplies, whose outputs read the kept channels of their own
group only: the mean over its groups of the channel rate squared."""


@dataclass(frozen=True)
class Activation:
    """What one dynamic block did in one forward pass: rates and decisions per axis.

    Rates are over real output positions (not over patches, which may be ragged). In training they
    carry straight-through gradients to the masker.

    Attributes:
        one: 1, shape (), on the block's device.
        rates: Share computed by axis (see :mod:`las_mm.network.operator`): of each image, (N,), or
            where no product of rates needs these, the mean, (). An axis that is not there is
            computed in full.
        decisions: Hard decisions by axis, detached, ones or zeros or bool, whichever the path that
            ran works with: (N, 1, h, w) per patch, (N, 1, 1, 1) for a layer, (N, groups) for
            channels.
    """

    one: Tensor
    rates: Mapping[str, Tensor] = field(default_factory=dict)
    decisions: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def full(cls, like: Tensor) -> Activation:
        """The record of a static block: everything is computed."""
        return cls(torch.ones((), device=like.device, dtype=torch.float32))

    def about(self, axis: str, decisions: Tensor) -> Activation:
        """The same record with what was decided about one more axis.

        Args:
            axis: As in the gates of the block's operators.
            decisions: Zeros and ones, (N, ...), with the gradient to the masker; the rate of an
                image is their mean.
        """
        return replace(
            self,
            rates={**self.rates, axis: decisions.flatten(1).mean(dim=1)},
            decisions={**self.decisions, axis: decisions.detach()},
        )

    def rate_of(self, axis: str) -> Tensor:
        """Mean rate of an axis, shape ()."""
        found = self.rates.get(axis)
        return self.one if found is None else found.mean()

    def share(self, term: Term) -> Tensor:
        """Share of the work of a term's operators, shape ().

        Products are taken per image and then averaged: the mean of rho^2 is more than the square
        of the mean where images differ.
        """
        gates, groups = term
        axes = [axis_of(gate) for gate in gates]
        if groups > 1 and PAIRS in self.rates:
            axes = [axis for axis in axes if axis != CHANNEL] + [PAIRS]
        factors = [self.rates[axis] for axis in axes if axis in self.rates]
        return math.prod(factors[1:], start=factors[0]).mean() if factors else self.one

    @property
    def requires_grad(self) -> bool:
        """Whether a loss on the rates reaches a masker."""
        return any(rate.requires_grad for rate in self.rates.values())

    @property
    def rate(self) -> Tensor:
        """Share of output positions, tokens, or images of a layer block, that are computed, ()."""
        return self.rate_of(next((a for a in (LAYER, TOKEN) if a in self.rates), POSITION))

    @property
    def rate_dilated(self) -> Tensor:
        """Share of the positions that are computed for the kept ones to read, ()."""
        return self.rate_of(LAYER if LAYER in self.rates else DILATED)

    @property
    def rate_channel(self) -> Tensor:
        """Share of the channels that are computed, ()."""
        return self.rate_of(CHANNEL)

    @property
    def mask(self) -> Tensor | None:
        """Decisions about positions; ``None`` where all are computed."""
        return self.decisions.get(POSITION, self.decisions.get(LAYER))

    @property
    def mask_channel(self) -> Tensor | None:
        """Decisions about channels; ``None`` where all are computed."""
        return self.decisions.get(CHANNEL)


def channel_rates(channels: Tensor, groups: int) -> dict[str, Tensor]:
    """Rates of a block's channels, per image, for convolutions of ``groups`` groups.

    Args:
        channels: Zeros and ones per channel, (N, width).
        groups: Of the convolution that reads and writes such channels.
    """
    rates = {CHANNEL: channels.mean(dim=1)}
    if groups > 1:
        rates[PAIRS] = channels.unflatten(1, (groups, -1)).mean(dim=2).square().mean(dim=1)
    return rates


@dataclass(frozen=True)
class NetworkActivation:
    """The activations of all blocks of one backbone, in network order, as stacked tensors.

    Attributes:
        shape: What the network would compute statically at this input size.
        axes: Mean rate of every block by axis, (n_blocks,); 1 where a block has no such axis.
        shares: Share of the work of every term of every block, in order, (n_terms,).
        decisions: Per block its hard decisions by axis.
    """

    shape: NetworkShape
    axes: Mapping[str, Tensor]
    shares: Tensor
    decisions: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def of(cls, shape: NetworkShape, blocks: Sequence[Activation]) -> NetworkActivation:
        """Stack the records of all blocks."""
        shares = [a.share(term) for block, a in zip(shape.blocks, blocks) for term in block.terms]
        one = blocks[0].one
        return cls(
            shape=shape,
            axes={axis: torch.stack([a.rate_of(axis) for a in blocks]) for axis in shape.axes},
            shares=torch.stack(shares) if shares else one.new_ones(0),
            decisions=tuple(a.decisions for a in blocks),
        )

    @classmethod
    def at(
        cls,
        shape: NetworkShape,
        rates: Mapping[str, Tensor],
        decisions: Sequence[Mapping[str, Tensor]] = (),
    ) -> NetworkActivation:
        """What blocks with these rates do, (n_blocks,) by axis, every image with the same."""
        one = next(iter(rates.values())).new_ones(())
        blocks = [
            Activation(
                one,
                {axis: values[i] for axis, values in rates.items() if axis in block.axes},
                decisions[i] if decisions else {},
            )
            for i, block in enumerate(shape.blocks)
        ]
        return cls.of(shape, blocks)

    def rate(self, *axes: str) -> Tensor:
        """Rate of every block, (n_blocks,), of the first of ``axes`` that it has."""
        columns = [self.axes[axis] for axis in axes if axis in self.axes]
        if not columns:
            device = next((v.device for v in self.axes.values()), self.shares.device)
            return torch.ones(len(self.shape.blocks), device=device, dtype=torch.float32)
        # Only one of them is less than 1.
        return columns[0] if len(columns) == 1 else torch.stack(columns).prod(dim=0)

    @property
    def rates(self) -> Tensor:
        """Share of computed positions or tokens (of images, in layer blocks), (n_blocks,)."""
        return self.rate(*PLACES)

    @property
    def rates_dilated(self) -> Tensor:
        """The share that is computed for these to read, (n_blocks,)."""
        return self.rate(DILATED, LAYER)

    @property
    def rates_channel(self) -> Tensor:
        """Channel share, (n_blocks,)."""
        return self.rate(CHANNEL)

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Per block the hard mask of positions (N, 1, h, w) or ``None``."""
        return tuple(d.get(POSITION, d.get(LAYER)) for d in self.decisions)

    @property
    def masks_channel(self) -> tuple[Tensor | None, ...]:
        """Per block the hard mask of channel groups (N, groups) or ``None``."""
        return tuple(d.get(CHANNEL) for d in self.decisions)

    @property
    def dynamic(self) -> list[int]:
        """Indices of the blocks that may skip computation."""
        return self.shape.having()

    def named_rates(self) -> dict[str, tuple[str, ...]]:
        """What is logged, and the axes that it is the rate of: those that are decided about.

        Positions, tokens and whole layers are one, ``'activation_rate'``; others, and tokens
        again, are called by their axis, as ``'channel_rate'``.
        """
        others = [axis for axis in self.shape.axes if axis not in (POSITION, LAYER, DILATED)]
        return {"activation_rate": PLACES, **{f"{a}_rate": (a,) for a in others}}

    def mean_of(self, *axes: str) -> Tensor:
        """Mean rate of the blocks that decide about one of ``axes``, shape (); 1 if none."""
        return self._mean(self.rate(*axes), self.shape.having(*axes))

    @property
    def mean_rate(self) -> Tensor:
        """Mean activation rate of the blocks that may leave out positions, shape (); 1 if none."""
        return self.mean_of(*PLACES)

    @property
    def mean_rate_channel(self) -> Tensor:
        """Mean channel rate of the blocks that may leave out channels, shape (); 1 if none."""
        return self.mean_of(CHANNEL)

    def stage_rates(self, *axes: str) -> dict[int, Tensor]:
        """Mean rate of each stage's blocks, {1: tensor(), 2: ...}; of positions by default."""
        stages: dict[int, list[int]] = {}
        for i, block in enumerate(self.shape.blocks):
            stages.setdefault(block.stage, []).append(i)
        rates = self.rate(*(axes or PLACES))
        return {stage: self._mean(rates, index) for stage, index in sorted(stages.items())}

    @staticmethod
    def _mean(values: Tensor, index: list[int]) -> Tensor:
        return values[index].mean() if index else values.new_ones(())

    def _map(self, function) -> NetworkActivation:
        values = torch.cat([*self.axes.values(), self.shares])
        sizes = [len(self.shape.blocks)] * len(self.axes) + [len(self.shares)]
        *axes, shares = function(values).split(sizes)
        return replace(self, axes=dict(zip(self.axes, axes)), shares=shares)

    def detach(self) -> NetworkActivation:
        """The same figures without their graph."""
        return self._map(Tensor.detach)

    def reduce_mean(self) -> NetworkActivation:
        """Average the rates over all processes, so that a nonlinear loss sees the global batch.

        The value is the global mean, the gradient that of the local mean. DDP averages gradients
        over processes, which turns it into exactly the gradient of a loss on the global mean.
        """
        if dist.get_world_size() == 1:
            return self

        def mean(local: Tensor) -> Tensor:
            found = local.detach().clone()
            dist.all_reduce(found, op="mean")
            return found + (local - local.detach())

        return self._map(mean)
