"""What the dynamic blocks of a network did in their last forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from mmengine import dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from las_mm.latency.shapes import NetworkShape


@dataclass(frozen=True)
class Activation:
    """What one dynamic block did in one forward pass.

    The rates are means over the images of the batch and over real output positions (not over
    patches, which may be ragged). In training they carry straight-through gradients to the masker.

    Attributes:
        rate: Share of output positions that conv2 and conv3 compute, shape ().
        rate_dilated: Share of conv1's output positions that conv2 reads from them, shape ().
        rate_channel: Share of the bottleneck's channels that are computed, shape (); 1 without
            a channel masker.
        mask: Hard decision per patch, shape (N, 1, h, w), detached; ``None`` for a static block.
    """

    rate: Tensor
    rate_dilated: Tensor
    rate_channel: Tensor
    mask: Tensor | None = None

    @classmethod
    def full(cls, like: Tensor) -> Activation:
        """The record of a static block: everything is computed."""
        one = torch.ones((), device=like.device)
        return cls(rate=one, rate_dilated=one, rate_channel=one)


@dataclass(frozen=True)
class NetworkActivation:
    """The activations of all blocks of one backbone, in network order, as stacked tensors.

    Attributes:
        shape: What the network would compute statically at this input size.
        rates: (n_blocks,) share of computed positions, see :class:`Activation`.
        rates_dilated: (n_blocks,) conv1's share.
        rates_channel: (n_blocks,) channel share.
        masks: Per block the hard patch mask (N, 1, h, w) or ``None``.
    """

    shape: NetworkShape
    rates: Tensor
    rates_dilated: Tensor
    rates_channel: Tensor
    masks: tuple[Tensor | None, ...]

    @property
    def dynamic(self) -> list[int]:
        """Indices of the blocks that may skip computation."""
        return [i for i, block in enumerate(self.shape.blocks) if block.mode != "static"]

    @property
    def mean_rate(self) -> Tensor:
        """Mean activation rate of the dynamic blocks, shape (); 1 for a static network."""
        return self.rates[self.dynamic].mean() if self.dynamic else self.rates.new_ones(())

    def stage_rates(self) -> dict[int, Tensor]:
        """Mean activation rate of each stage's blocks: {1: tensor(), 2: ...}."""
        stages = sorted({block.stage for block in self.shape.blocks})
        return {
            stage: self.rates[
                [i for i, block in enumerate(self.shape.blocks) if block.stage == stage]
            ].mean()
            for stage in stages
        }

    def detach(self) -> NetworkActivation:
        """The same figures without their graph."""
        return replace(
            self,
            rates=self.rates.detach(),
            rates_dilated=self.rates_dilated.detach(),
            rates_channel=self.rates_channel.detach(),
        )

    def reduce_mean(self) -> NetworkActivation:
        """Average the rates over all processes, so that a nonlinear loss sees the global batch.

        The value is the global mean, the gradient that of the local mean. DDP averages gradients
        over processes, which turns it into exactly the gradient of a loss on the global mean.
        """
        if dist.get_world_size() == 1:
            return self
        local = torch.stack([self.rates, self.rates_dilated, self.rates_channel])
        mean = local.detach().clone()
        dist.all_reduce(mean, op="mean")
        rates, rates_dilated, rates_channel = mean + (local - local.detach())
        return replace(self, rates=rates, rates_dilated=rates_dilated, rates_channel=rates_channel)


def find_dynamic_backbones(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All dynamic backbones inside ``model`` with their module names, e.g. [('backbone', ...)].

    A dynamic backbone is a module with a ``network_activation()`` method.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "network_activation", None))
    ]


def find_dynamic_backbone(model: nn.Module) -> nn.Module:
    """The one dynamic backbone inside ``model`` (a detector, classifier, DDP wrapper, ...).

    Raises:
        ValueError: There is none, or more than one.
    """
    found = find_dynamic_backbones(model)
    if len(found) != 1:
        names = ", ".join(name or "the model itself" for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} must contain exactly one dynamic backbone such as "
            f"las_mm.LASResNet, found {names}; set model.backbone.type='las_mm.LASResNet' or "
            f"remove the las_mm hooks from this config."
        )
    return found[0][1]


def collect_activations(model: nn.Module) -> NetworkActivation:
    """Read what the dynamic backbone inside ``model`` did in its last forward pass.

    Args:
        model: Any module that contains exactly one dynamic backbone.

    Returns:
        The rates of all its blocks in network order, with gradients in training.

    Raises:
        ValueError: No or several dynamic backbones.
        RuntimeError: The backbone has not run yet.
    """
    return find_dynamic_backbone(model).network_activation()
