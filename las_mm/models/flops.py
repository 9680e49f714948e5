"""Multiply-accumulate counts of dynamic networks, static parts and the parts a mask scales."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from las_mm.latency.shapes import BlockShape, ConvShape, NetworkShape, PoolShape
from las_mm.models.activation import NetworkActivation, rate_products

COUNTINGS = ("exact", "released")


def stem_macs(layer: ConvShape | PoolShape) -> int:
    """Multiply-accumulates of one stem layer for one image; a pool counts k*k per output value."""
    if isinstance(layer, ConvShape):
        taps = layer.c_in // layer.groups * layer.kernel**2
        return layer.c_out * layer.h_out * layer.w_out * taps
    return layer.channels * layer.h_out * layer.w_out * layer.kernel**2


def masker_macs(block: BlockShape, counting: str = "exact") -> int:
    """Multiply-accumulates of a block's masker for one image.

    Args:
        block: The block; a static block has no masker.
        counting: ``'exact'``: what is computed. For positions every input value is added once
            while pooling (none for patches of one input pixel), then 2*C per patch; for channels
            the pooling and the products of all layers. ``'released'``: what the authors' code
            counts, 4*C per patch, and the 1x1 convolution of a ``conv_linear`` masker once
            instead of per pixel.
    """
    return _spatial_masker_macs(block, counting) + _channel_masker_macs(block, counting)


def _spatial_masker_macs(block: BlockShape, counting: str) -> int:
    if not block.decides_positions:
        return 0
    if counting == "released":
        return 4 * block.c_in * block.n_patches
    pools = block.mode == "layer" or block.granularity * block.stride > 1
    pooling = block.c_in * block.h_in * block.w_in if pools else 0
    return pooling + 2 * block.c_in * block.n_patches


def se_macs(block: BlockShape, counting: str = "exact") -> tuple[int, int]:
    """Multiply-accumulates of squeeze-and-excitation for one image: (per map, of its two layers).

    Args:
        block: The block.
        counting: ``'exact'``: every value is added once while pooling and multiplied once.
            ``'released'``: the two layers only.
    """
    if not block.se_width:
        return 0, 0
    values = block.width * block.h_out * block.w_out
    return 2 * values if counting == "exact" else 0, 2 * block.width * block.se_width


def _channel_masker_macs(block: BlockShape, counting: str) -> int:
    if not block.has_channels:
        return 0
    pixels, hidden, logits = block.h_in * block.w_in, block.channel_hidden, 2 * block.channel_groups
    if block.channel_masker == "conv_linear":
        conv = block.c_in * hidden * pixels
        if counting == "released":
            conv = block.c_in * block.c_in // block.channel_reduction
        return conv + hidden * pixels + hidden * logits
    fully_connected = hidden * (block.c_in + logits) if hidden else block.c_in * logits
    return block.c_in * pixels + fully_connected


@dataclass(frozen=True)
class MacCounts:
    """Multiply-accumulates per image of a network; arrays are float64, one value per block.

    Attributes:
        stem: Everything before the first block.
        conv1, conv2, conv3: The bottleneck's convolutions when everything is computed.
        downsample: The shortcut's convolution, always dense.
        masker: The masker's own cost.
        se_map, se_layers: See :func:`se_macs`.
    """

    stem: int
    conv1: np.ndarray
    conv2: np.ndarray
    conv3: np.ndarray
    downsample: np.ndarray
    masker: np.ndarray
    se_map: np.ndarray
    se_layers: np.ndarray

    @property
    def static_blocks(self) -> np.ndarray:
        """What the same blocks cost without maskers and with everything computed."""
        convs = self.conv1 + self.conv2 + self.conv3 + self.downsample
        return convs + self.se_map + self.se_layers


def block_macs(block: BlockShape) -> tuple[int, int, int, int]:
    """(conv1, conv2, conv3, downsample) multiply-accumulates of a static block for one image."""
    h_conv1, w_conv1 = -(-block.h_in // block.conv1_stride), -(-block.w_in // block.conv1_stride)
    outputs = block.h_out * block.w_out
    return (
        block.c_in * block.width * h_conv1 * w_conv1,
        block.width * block.width // block.groups * 9 * outputs,
        block.width * block.c_out * outputs,
        block.c_in * block.c_out * outputs if block.downsample else 0,
    )


@lru_cache(maxsize=256)
def count_macs(shape: NetworkShape, counting: str = "exact") -> MacCounts:
    """Count a network once per input size.

    Args:
        shape: The network at one input size.
        counting: See :func:`masker_macs`.

    Raises:
        ValueError: Unknown ``counting``.
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting must be one of {', '.join(COUNTINGS)}, got {counting!r}")
    parts = np.array([block_macs(block) for block in shape.blocks], dtype=np.float64).T
    masker = np.array([masker_macs(block, counting) for block in shape.blocks], dtype=np.float64)
    se = np.array([se_macs(block, counting) for block in shape.blocks], dtype=np.float64).T
    stem = sum(stem_macs(layer) for layer in shape.stem)
    return MacCounts(stem, *parts, masker=masker, se_map=se[0], se_layers=se[1])


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

    Per block: conv1 * r_dilated * rho + conv2 * r * rho^2 + conv3 * r * rho + masker + downsample,
    with r the spatial and rho the channel rate; squeeze-and-excitation as :func:`se_macs` says.

    Args:
        activation: Rates of a forward pass.
        counting: ``'exact'`` means these products over the images, each with its own rates, and
            takes the groups of conv2 as they are (:func:`~las_mm.models.activation.work_shares`);
            it divides by the network without maskers. ``'released'`` counts like the authors'
            code: products of the batch's mean rates, of which rho^2 is less where images differ,
            and maskers included in the static count of each block.
    """
    counts = count_macs(activation.shape, counting)
    table = np.stack([counts.conv1, counts.conv2, counts.conv3, counts.masker + counts.downsample])
    conv1, conv2, conv3, fixed = torch.as_tensor(
        table, dtype=torch.float64, device=activation.rates.device
    )
    # Counts beyond 2^24 are not exact in float32.
    if counting == "released":
        rates = activation.rates, activation.rates_dilated, activation.rates_channel
        shares = rate_products(*(values.double() for values in rates))
    else:
        shares = activation.work().double()
    blocks = conv1 * shares[0] + conv2 * shares[1] + conv3 * shares[2] + fixed
    static_blocks = blocks.new_tensor(counts.static_blocks)
    # Squeeze-and-excitation: a skipped block skips its layers too.
    se_map, se_layers = blocks.new_tensor(np.stack([counts.se_map, counts.se_layers]))
    skips = blocks.new_tensor([block.mode == "layer" for block in activation.shape.blocks])
    se = se_map * shares[2] + se_layers * torch.where(skips > 0, shares[2], 1)
    extra = counts.stem
    if counting == "released":  # its layers count in the total only
        static_blocks = static_blocks - se_layers + blocks.new_tensor(counts.masker)
        extra += counts.se_layers.sum()
    else:
        blocks = blocks + se
    return FlopsReport(
        dynamic=blocks.sum() + extra,
        static=static_blocks.sum() + extra,
        block_ratios=blocks / static_blocks,
    )
