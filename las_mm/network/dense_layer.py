"""The layer of DenseNet: 1x1, 3x3, appended to its input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .block import BlockShape, check_mode
from .bottleneck import gates_of_positions, position_masker
from .operator import POSITION, Conv, Operator, Pool, positive

MODES = ("static", "spatial", "layer")


@dataclass(frozen=True)
class DenseLayerShape(BlockShape):
    """A dense layer: conv1 1x1 and conv2 3x3 on all features so far (arXiv 1608.06993, section 3).

    What it skips contributes zeros to the concatenation. The transition behind the last layer of a
    dense block counts with that layer, since it is always computed in full.

    Args:
        name, stage, mode, granularity, h_in, w_in: See :class:`.bottleneck.BottleneckShape`;
            modes are 'static', 'spatial' and 'layer'.
        c_in: Channels of all features so far.
        width: Channels between the convolutions.
        c_out: Channels that it adds.
        transition: Channels that a 1x1 convolution and a 2x2 average pooling behind it make of all
            features; 0 without. Defaults to 0.

    Raises:
        ValueError: The mode is unknown, or a size is not a positive integer.
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
    stride: int = 1
    transition: int = 0

    def __post_init__(self) -> None:
        check_mode(self.name, self.mode, MODES)
        positive(self, "c_in", "width", "c_out", "h_in", "w_in")
        if self.mode == "spatial":
            positive(self, "granularity")
        if self.transition:
            positive(self, "transition")

    @property
    def stride_behind(self) -> int:  # type: ignore[override]
        """2 with a transition."""
        return 2 if self.transition else 1

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Masker, conv1, conv2, and the transition."""
        size = (self.h_in, self.w_in)
        dilated, kept = gates_of_positions(self.mode)
        side = self.granularity if POSITION in kept else 1
        sizes = (self.c_in, self.width, 1, 1, 1, *size)
        conv1 = Conv("conv1", *sizes, gates=dilated, module="conv1", granularity=side)
        sizes = (self.width, self.c_out, 3, 1, 1, *size)
        conv2 = Conv("conv2", *sizes, gates=kept, module="conv2", granularity=side)
        return (*position_masker(self, conv1), conv1, conv2, *self._transition())

    def _transition(self) -> tuple[Operator, ...]:
        if not self.transition:
            return ()
        rows, columns = max(self.h_in // 2, 1), max(self.w_in // 2, 1)
        channels = self.c_in + self.c_out
        return (
            Conv("transition", channels, self.transition, 1, 1, 1, self.h_in, self.w_in),
            Pool("transition_pool", self.transition, 2, 2, rows, columns),
        )
