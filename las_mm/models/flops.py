"""Multiply-accumulate counts of dynamic networks: of operators, and what their gates leave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from las_mm.models.activation import NetworkActivation
from las_mm.network.block import BlockShape, NetworkShape, Term
from las_mm.network.operator import Conv, GlobalPool, Linear, Masker, Operator, Scale, axis_of

COUNTINGS = ("exact", "released")


def masker_macs(block: BlockShape, counting: str = "exact") -> int:
    """Multiply-accumulates of a block's maskers for one image.

    Args:
        block: The block; a static block has no masker.
        counting: ``'exact'``: what is computed. ``'released'``: what the authors' code counts, 4*C
            per patch, and the 1x1 convolution of a ``conv_linear`` masker once instead of per
            pixel.
    """
    return sum(_macs(op, counting, block) for op in block.operators if op.masker)


def _macs(op: Operator, counting: str, block: BlockShape) -> int:
    if counting == "exact":
        return op.macs()
    if isinstance(op, Masker):
        return 4 * op.c_in * op.decisions
    reduction = getattr(block, "channel_reduction", None)
    if op.masker and isinstance(op, Conv) and reduction is not None:
        return op.c_in * op.c_in // reduction
    if not op.masker and isinstance(op, (GlobalPool, Scale)):
        return 0
    return op.macs()


@dataclass(frozen=True)
class MacCounts:
    """Multiply-accumulates per image of a network, float64.

    Attributes:
        stem: Everything before the first block.
        masker: The maskers' own, (n_blocks,).
        fixed: What no gate scales, maskers included, (n_blocks,).
        gated: What the gates of each term scale, in the order of
            :attr:`~las_mm.models.activation.NetworkActivation.shares`, (n_terms,).
        owner: The block of each term, (n_terms,).
        terms: The terms.
    """

    stem: int
    masker: np.ndarray
    fixed: np.ndarray
    gated: np.ndarray
    owner: np.ndarray
    terms: tuple[Term, ...]

    @property
    def static_blocks(self) -> np.ndarray:
        """What the same blocks cost without maskers and with everything computed."""
        blocks = self.fixed - self.masker
        np.add.at(blocks, self.owner, self.gated)
        return blocks


@lru_cache(maxsize=256)
def count_macs(shape: NetworkShape, counting: str = "exact") -> MacCounts:
    """Count a network once per input size.

    Args:
        shape: The network at one input size.
        counting: See :func:`masker_macs`. ``'released'`` leaves out the layers of
            squeeze-and-excitation, which those of :func:`flops_report` add to the total only.

    Raises:
        ValueError: Unknown ``counting``.
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting must be one of {', '.join(COUNTINGS)}, got {counting!r}")
    masker, fixed = np.zeros((2, len(shape.blocks)))
    gated: list[float] = []
    owner: list[int] = []
    terms: list[Term] = []
    for i, block in enumerate(shape.blocks):
        own = dict.fromkeys(block.terms, 0)
        for op in block.operators:
            macs = _macs(op, counting, block)
            masker[i] += macs * op.masker
            if counting == "released" and _is_apart(op):
                continue
            if op.term in own:
                own[op.term] += macs
            else:
                fixed[i] += macs
        terms += own
        gated += own.values()
        owner += [i] * len(own)
    stem = sum(op.macs() for op in shape.stem)
    return MacCounts(
        stem, masker, fixed, np.array(gated, dtype=float), np.array(owner, dtype=int), tuple(terms)
    )


def _is_apart(op: Operator) -> bool:
    """Whether the authors count it for the whole network, not for its block."""
    return isinstance(op, Linear) and not op.masker


def _on_device(shape: NetworkShape, counting: str, device: torch.device) -> tuple[Tensor, ...]:
    """A network's fixed, gated and static counts, and the owners of its terms, on a device."""
    counts = count_macs(shape, counting)
    static = counts.static_blocks + (counts.masker if counting == "released" else 0)
    arrays = (counts.fixed, counts.gated, static, counts.owner)
    with torch.inference_mode(False):
        return tuple(torch.as_tensor(array, device=device) for array in arrays)


# A copy per step would have the host wait for the device, and no CUDA graph could capture it.
_kept_on_device = lru_cache(maxsize=256)(_on_device)


@dataclass(frozen=True)
class FlopsReport:
    """Dynamic against static multiply-accumulates per image, differentiable in the rates.

    Attributes:
        dynamic: Of the whole network, stem included, shape ().
        static: Of the same network with every block static, shape ().
        block_ratios: Dynamic over static per block, shape (n_blocks,).
    """

    dynamic: Tensor
    static: Tensor
    block_ratios: Tensor

    @property
    def ratio(self) -> Tensor:
        """F_dyn / F_static, shape ()."""
        return self.dynamic / self.static


def flops_report(activation: NetworkActivation, counting: str = "exact") -> FlopsReport:
    """Multiply-accumulates that the recorded rates amount to; LASNet section 3.4.

    Per block the sum over its operators of their count times the product of their gates' rates:
    for a bottleneck conv1 * r_dilated * rho + conv2 * r * rho^2 + conv3 * r * rho + masker +
    downsample, with r the spatial and rho the channel rate.

    Args:
        activation: Rates of a forward pass.
        counting: ``'exact'`` means these products over the images, each with its own rates, and
            takes the groups of convolutions as they are; it divides by the network without
            maskers. ``'released'`` counts like the authors' code: products of the batch's mean
            rates, of which rho^2 is less where images differ, and maskers included in the static
            count of each block.
    """
    counts = count_macs(activation.shape, counting)
    # Counts beyond 2^24 are not exact in float32.
    shares = activation.shares.double()
    if counting == "released":
        shares = _products_of_means(activation, counts)
    copies = _on_device if shares.device.type == "cpu" else _kept_on_device
    fixed, gated, static_blocks, owner = copies(activation.shape, counting, shares.device)
    blocks = fixed.index_add(0, owner, gated * shares)
    extra = counts.stem
    if counting == "released":
        ops = (op for block in activation.shape.blocks for op in block.operators)
        extra += sum(op.macs() for op in ops if _is_apart(op))
    return FlopsReport(
        dynamic=blocks.sum() + extra,
        static=static_blocks.sum() + extra,
        block_ratios=blocks / static_blocks,
    )


def _products_of_means(activation: NetworkActivation, counts: MacCounts) -> Tensor:
    """(n_terms,) float64: the products of every term's mean rates."""
    products = []
    for (gates, _), i in zip(counts.terms, counts.owner):
        product = activation.shares.new_ones((), dtype=torch.float64)
        for gate in gates:
            product = product * activation.axes[axis_of(gate)][i].double()
        products.append(product)
    return torch.stack(products) if products else activation.shares.double()
