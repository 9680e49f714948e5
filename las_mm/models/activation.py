"""What the dynamic blocks of a network did in their last forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from mmengine import dist
from mmengine.model import BaseTTAModel, is_model_wrapper
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
        mask: Hard decision per patch, shape (N, 1, h, w), detached, bool or zeros and ones in
            float32, whichever the form that ran works with; ``None`` where all positions are
            computed.
        mask_channel: Hard decision per group of channels, shape (N, groups), detached, zeros and
            ones in float32; ``None`` where all channels are computed.
        shares: Share of conv1's, conv2's and conv3's multiply-accumulates, shape (3,), see
            :func:`work_shares`; ``None`` without a channel masker, where the rates say it.
    """

    rate: Tensor
    rate_dilated: Tensor
    rate_channel: Tensor
    mask: Tensor | None = None
    mask_channel: Tensor | None = None
    shares: Tensor | None = None

    @classmethod
    def full(cls, like: Tensor) -> Activation:
        """The record of a static block: everything is computed."""
        one = torch.ones((), device=like.device)
        return cls(rate=one, rate_dilated=one, rate_channel=one)

    def work(self) -> Tensor:
        """:attr:`shares`, or what the rates make of them, shape (3,)."""
        if self.shares is not None:
            return self.shares
        return rate_products(self.rate, self.rate_dilated, self.rate_channel)


def rate_products(rate: Tensor, rate_dilated: Tensor, rate_channel: Tensor) -> Tensor:
    """Shares of conv1, conv2 and conv3 of one image: (3, ...) from rates of shape (...)."""
    return torch.stack(
        [rate_dilated * rate_channel, rate * rate_channel.square(), rate * rate_channel]
    )


def work_shares(rate: Tensor, rate_dilated: Tensor, channels: Tensor, groups: int = 1) -> Tensor:
    """Share of each convolution's multiply-accumulates that a batch computes.

    Products are taken per image and then averaged: the mean of rho^2 is more than the square of
    the mean where images differ. In a grouped conv2 an output channel reads the computed channels
    of its own group only.

    Args:
        rate: Share of positions that conv2 and conv3 compute, (N,).
        rate_dilated: Conv1's, (N,).
        channels: Zeros and ones per channel, (N, width).
        groups: Groups of conv2.

    Returns:
        Of conv1, conv2 and conv3, (3,).
    """
    channel = channels.mean(dim=1)
    square = channels.unflatten(1, (groups, -1)).mean(dim=2).square().mean(dim=1)
    shares = torch.stack([rate_dilated * channel, rate * square, rate * channel])
    return shares.mean(dim=1)


@dataclass(frozen=True)
class NetworkActivation:
    """The activations of all blocks of one backbone, in network order, as stacked tensors.

    Attributes:
        shape: What the network would compute statically at this input size.
        rates: (n_blocks,) share of computed positions, see :class:`Activation`.
        rates_dilated: (n_blocks,) conv1's share.
        rates_channel: (n_blocks,) channel share.
        masks: Per block the hard patch mask (N, 1, h, w) or ``None``.
        masks_channel: Per block the hard mask of channel groups (N, groups) or ``None``; empty
            where nobody recorded them.
        shares: (3, n_blocks) shares of conv1's, conv2's and conv3's multiply-accumulates, see
            :func:`work_shares`; ``None``: the products of the rates.
    """

    shape: NetworkShape
    rates: Tensor
    rates_dilated: Tensor
    rates_channel: Tensor
    masks: tuple[Tensor | None, ...]
    masks_channel: tuple[Tensor | None, ...] = ()
    shares: Tensor | None = None

    @classmethod
    def of(cls, shape: NetworkShape, blocks: Sequence[Activation]) -> NetworkActivation:
        """Stack the records of all blocks."""
        shares = None
        if any(a.shares is not None for a in blocks):
            shares = torch.stack([a.work() for a in blocks], dim=1)
        return cls(
            shape=shape,
            rates=torch.stack([a.rate for a in blocks]),
            rates_dilated=torch.stack([a.rate_dilated for a in blocks]),
            rates_channel=torch.stack([a.rate_channel for a in blocks]),
            masks=tuple(a.mask for a in blocks),
            masks_channel=tuple(a.mask_channel for a in blocks),
            shares=shares,
        )

    def work(self) -> Tensor:
        """:attr:`shares`, or what the rates make of them, (3, n_blocks)."""
        if self.shares is not None:
            return self.shares
        return rate_products(self.rates, self.rates_dilated, self.rates_channel)

    @property
    def dynamic(self) -> list[int]:
        """Indices of the blocks that may skip computation."""
        return [i for i, block in enumerate(self.shape.blocks) if block.mode != "static"]

    @property
    def positional(self) -> list[int]:
        """Indices of the blocks that may leave out positions: spatial, layer and both."""
        return [i for i, block in enumerate(self.shape.blocks) if block.decides_positions]

    @property
    def channelwise(self) -> list[int]:
        """Indices of the blocks that may leave out channels: channel and both."""
        return [i for i, block in enumerate(self.shape.blocks) if block.has_channels]

    @property
    def mean_rate(self) -> Tensor:
        """Mean activation rate of the blocks that may leave out positions, shape (); 1 if none."""
        return self._mean(self.rates, self.positional)

    @property
    def mean_rate_channel(self) -> Tensor:
        """Mean channel rate of the blocks that may leave out channels, shape (); 1 if none."""
        return self._mean(self.rates_channel, self.channelwise)

    def stage_rates(self) -> dict[int, Tensor]:
        """Mean activation rate of each stage's blocks: {1: tensor(), 2: ...}."""
        return {stage: self._mean(self.rates, index) for stage, index in self._stages().items()}

    def stage_rates_channel(self) -> dict[int, Tensor]:
        """Mean channel rate of each stage's blocks: {1: tensor(), 2: ...}."""
        return {
            stage: self._mean(self.rates_channel, index) for stage, index in self._stages().items()
        }

    def _stages(self) -> dict[int, list[int]]:
        stages: dict[int, list[int]] = {}
        for i, block in enumerate(self.shape.blocks):
            stages.setdefault(block.stage, []).append(i)
        return dict(sorted(stages.items()))

    @staticmethod
    def _mean(values: Tensor, index: list[int]) -> Tensor:
        return values[index].mean() if index else values.new_ones(())

    def detach(self) -> NetworkActivation:
        """The same figures without their graph."""
        return replace(
            self,
            rates=self.rates.detach(),
            rates_dilated=self.rates_dilated.detach(),
            rates_channel=self.rates_channel.detach(),
            shares=None if self.shares is None else self.shares.detach(),
        )

    def reduce_mean(self) -> NetworkActivation:
        """Average the rates over all processes, so that a nonlinear loss sees the global batch.

        The value is the global mean, the gradient that of the local mean. DDP averages gradients
        over processes, which turns it into exactly the gradient of a loss on the global mean.
        """
        if dist.get_world_size() == 1:
            return self
        local = torch.stack([self.rates, self.rates_dilated, self.rates_channel, *self.work()])
        mean = local.detach().clone()
        dist.all_reduce(mean, op="mean")
        rates, rates_dilated, rates_channel, *shares = mean + (local - local.detach())
        return replace(
            self,
            rates=rates,
            rates_dilated=rates_dilated,
            rates_channel=rates_channel,
            shares=torch.stack(shares),
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def find_dynamic_backbones(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All dynamic backbones inside ``model`` with their module names, e.g. [('backbone', ...)].

    A dynamic backbone is a module with a ``network_activation()`` method.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "network_activation", None))
    ]


def find_dynamic_backbone(model: nn.Module, module: str | None = None) -> nn.Module:
    """The one dynamic backbone inside ``model`` (a detector, classifier, DDP wrapper, ...).

    Args:
        model: The model; DDP and test-time augmentation are opened first.
        module: Which one where there are several, as in a semi-supervised detector: the dotted
            name of the backbone, or of a part that has only one, e.g. ``'student.backbone'`` or
            ``'student'``. Defaults to the only one.

    Raises:
        ValueError: There is none, or more than one that could be meant.
    """
    model = unwrap(model)
    found = find_dynamic_backbones(model)
    names = ", ".join(name or "the model itself" for name, _ in found) or "none"
    if module is not None and not isinstance(module, str):
        raise ValueError(f"module must be a name such as 'student.backbone', got {module!r}")
    if not found or (module is None and len(found) > 1):
        way_out = (
            "set model.backbone.type='las_mm.LASResNet' or remove the las_mm hooks from this config"
        )
        if found:
            way_out = "name one with module='...'"
        raise ValueError(
            f"{type(model).__name__} must contain exactly one dynamic backbone such as "
            f"las_mm.LASResNet, found {names}; {way_out}"
        )
    if module:
        found = [(n, b) for n, b in found if n == module or n.startswith(f"{module}.")]
    if len(found) != 1:
        count = f"{len(found)} dynamic backbones" if found else "no dynamic backbone"
        raise ValueError(
            f"module={module!r} names {count} of {type(model).__name__}; it must name one of: "
            f"{names}"
        )
    return found[0][1]


def collect_activations(model: nn.Module, module: str | None = None) -> NetworkActivation:
    """Read what the dynamic backbone inside ``model`` did in its last forward pass.

    Args:
        model: Any module that contains a dynamic backbone.
        module: Which one, where there are several; see :func:`find_dynamic_backbone`.

    Returns:
        The rates of all its blocks in network order, with gradients in training.

    Raises:
        ValueError: No dynamic backbone, or several that could be meant.
        RuntimeError: The backbone has not run yet.
    """
    return find_dynamic_backbone(model, module).network_activation()


def require_gradients(backbone: nn.Module) -> None:
    """Check that a loss on the last forward pass' rates reaches every masker that shall learn.

    Re-entrant activation checkpointing runs a forward pass without recording it for gradients, so
    that the rates become constants, which a budget cannot move.

    Raises:
        RuntimeError: It does not; the message names a block.
    """
    names = {block: name for name, block in backbone.named_modules()}
    for block in backbone.blocks():
        learns = any(p.requires_grad for masker in block.maskers() for p in masker.parameters())
        if learns and block.activation is not None and not block.activation.work().requires_grad:
            raise RuntimeError(
                f"the activation rate of {names[block]} has no gradient, though its masker shall "
                "learn: re-entrant activation checkpointing, which mmengine's "
                "activation_checkpointing is, loses it (or the masker is in eval mode); set "
                "with_cp=True of the backbone instead, which saves the same memory"
            )
