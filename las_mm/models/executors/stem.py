"""Stems in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from las_mm import ops
from las_mm.models.coverage import (
    Unsupported,
    check_plain,
    is_channels_last,
)
from las_mm.models.executors.folding import (
    fold,
)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclass
class FusedStem:
    """The packed form of a ResNet's 7x7 stem; see ``ops.conv_pool_stem``."""

    weight: Tensor
    bias: Tensor
    in_channels: int
    channels_last: bool  # whether a dense convolution with its weight puts out channels_last

    @classmethod
    def of(cls, backbone: nn.Module) -> FusedStem:
        """Fold and pack the stem of ``backbone``.

        Raises:
            Unsupported: A deep stem, or one with other parts than usual.
        """
        if backbone.deep_stem:
            raise Unsupported("its stem is deep")
        return cls.of_parts(backbone.conv1, backbone.norm1, backbone.relu, backbone.maxpool)

    @classmethod
    def of_parts(
        cls, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module
    ) -> FusedStem:
        """Fold and pack a stem of these modules.

        Raises:
            Unsupported: One of them is another one than usual.
        """
        check_plain(activation, "its activation", nn.ReLU)
        check_plain(pool, "its pooling", nn.MaxPool2d)
        sizes = [_pair(n) for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        if sizes != [(3, 3), (2, 2), (1, 1), (1, 1)] or pool.ceil_mode or pool.return_indices:
            raise Unsupported(f"its pooling is {pool}")
        weight, bias = fold(
            conv,
            norm,
            "conv1",
            kernel_size=(7, 7),
            stride=(2, 2),
            padding=(3, 3),
            dilation=(1, 1),
            groups=1,
        )
        if not ops.has_stem_kernel(weight.device.type):
            raise Unsupported(f"there is no kernel for it on {weight.device.type}")
        return cls(ops.pack_stem(weight), bias, conv.in_channels, is_channels_last(conv.weight))

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """The stem's output for ``x``; ``bias``: :attr:`bias` or a checked copy of it."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape (N, {self.in_channels}, H, W), got {list(x.shape)}"
            )
        return ops.conv_pool_stem(x, self.weight, bias)


@dataclass
class FusedConvStem:
    """The folded form of a RegNet's stem: a 3x3 convolution of stride 2 and ReLU."""

    weight: Tensor
    bias: Tensor
    channels_last: bool  # as of a FusedStem

    @classmethod
    def of(cls, backbone: nn.Module) -> FusedConvStem:
        """Fold the stem of ``backbone``.

        Raises:
            Unsupported: It has other parts than usual.
        """
        check_plain(backbone.relu, "its activation", nn.ReLU)
        weight, bias = fold(
            backbone.conv1,
            backbone.norm1,
            "conv1",
            kernel_size=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
            dilation=(1, 1),
            groups=1,
        )
        last = is_channels_last(backbone.conv1.weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(weight, bias.to(weight.dtype), last)

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """The stem's output for ``x``; ``bias``: :attr:`bias` or a checked copy of it."""
        return F.conv2d(x, self.weight, bias, stride=2, padding=1).relu_()
