"""The block of ResNet-18 and ResNet-34: two 3x3 convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .block import BlockShape, check_mode
from .bottleneck import (
    channel_masker,
    check_channels,
    gates_of_positions,
    position_masker,
    shortcut,
)
from .operator import CHANNEL_IN, CHANNEL_OUT, POSITION, Add, Conv, Operator, positive


@dataclass(frozen=True)
class BasicShape(BlockShape):
    """A basic block: conv1 3x3, conv2 3x3, residual addition (arXiv 1512.03385, figure 5, left).

    Channels are gated between the convolutions: conv1 puts out, and conv2 reads, the kept ones.

    Args:
        name, stage, mode, granularity, c_in, c_out, h_in, w_in, stride, downsample,
            downsample_pool, channel_granularity, channel_masker, channel_masker_layers,
            channel_reduction: See :class:`.bottleneck.BottleneckShape`.
        width: Channels between the convolutions.
        dilation: Dilation of conv1. Defaults to 1.

    Raises:
        ValueError: The mode is unknown, a size is not a positive integer, or sizes do not fit
            together.
    """

    name: str
    stage: int
    mode: str
    granularity: int
    c_in: int
    width: int
    c_out: int
    h_in: int
    w_in: int
    stride: int
    dilation: int = 1
    downsample: bool = False
    downsample_pool: bool = False
    channel_granularity: int = 1
    channel_masker: str = "mlp"
    channel_masker_layers: int = 2
    channel_reduction: int = 16

    def __post_init__(self) -> None:
        check_mode(self.name, self.mode)
        positive(self, "c_in", "width", "c_out", "h_in", "w_in", "stride", "dilation")
        if self.mode in ("spatial", "both"):
            positive(self, "granularity")
        if self.mode in ("channel", "both"):
            check_channels(self, self.width)
        if self.downsample_pool and not self.downsample:
            raise ValueError(f"{self.name}: downsample_pool=True needs downsample=True")

    @property
    def gated_channels(self) -> int:
        """Those between the convolutions."""
        return self.width

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Maskers, conv1, conv2, the addition, and the shortcut."""
        size = (self.h_out, self.w_out)
        dilated, kept = gates_of_positions(self.mode)
        channels = self.mode in ("channel", "both")
        patched = POSITION in kept
        side = self.granularity if patched else 1
        groups = self.width // self.channel_granularity if channels else 0
        conv1 = Conv(
            "conv1",
            self.c_in,
            self.width,
            3,
            self.stride,
            1,
            *size,
            self.dilation,
            gates=dilated + ((CHANNEL_OUT,) if channels else ()),
            module="conv1",
            granularity=side,
            channel_groups=groups,
        )
        conv2 = Conv(
            "conv2",
            self.width,
            self.c_out,
            3,
            1,
            1,
            *size,
            gates=kept + ((CHANNEL_IN,) if channels else ()),
            module="conv2",
            granularity=side,
            channel_groups=groups,
        )
        name = "scatter_add" if patched else "add"
        return (
            *position_masker(self, conv1),
            conv1,
            conv2,
            Add(name, self.c_out, *size, gates=kept, granularity=side),
            *(channel_masker(self) if channels else ()),
            *(shortcut(self, self.downsample_pool) if self.downsample else ()),
        )
