"""Operators: sizes, and the gates that say which share of their work is done.

All sizes are counts: channels, and rows and columns of maps.

A gate names an axis that a masker decides about, and where it matters the side of it: a
convolution that leaves out input channels has the gate ``'channel_in'``, one that leaves out
outputs ``'channel_out'``; both are of the axis ``'channel'``. The share of an operator's work is
the product of its gates' rates, image by image. One axis is not decided about but follows:
``'position_dilated'`` is what a wider kernel reads from the kept ``'position'``.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field

POSITION, DILATED, LAYER, CHANNEL = "position", "position_dilated", "layer", "channel"
CHANNEL_IN, CHANNEL_OUT = "channel_in", "channel_out"


def axis_of(gate: str) -> str:
    """The axis that a gate is about."""
    return gate.removesuffix("_in").removesuffix("_out")


@dataclass(frozen=True)
class Operator:
    """What every operator has.

    A subclass gives :meth:`macs` and may add fields; a device model has to know it, or raises.

    Args:
        name: Name to show.
        gates: What scales its work; empty: all of it is done, always.
        module: Name, inside its block, of the module whose parameters it uses; empty: none.
        group: Name of the operators that reports show together; empty: it stands alone.
        masker: Whether it decides, i.e. is not there in the static network.

    Raises:
        ValueError: A size is not a positive integer.
    """

    name: str
    gates: tuple[str, ...] = field(default=(), kw_only=True)
    module: str = field(default="", kw_only=True)
    group: str = field(default="", kw_only=True)
    masker: bool = field(default=False, kw_only=True)

    def macs(self) -> int:
        """Multiply-accumulates for one image with everything computed."""
        raise NotImplementedError

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its gates, each once."""
        return tuple(dict.fromkeys(map(axis_of, self.gates)))

    @property
    def term(self) -> tuple[tuple[str, ...], int]:
        """Gates and groups: operators of the same term do the same share of their work.

        In a grouped convolution an output channel reads the kept channels of its own group only.
        """
        both = CHANNEL_IN in self.gates and CHANNEL_OUT in self.gates
        return tuple(sorted(self.gates)), getattr(self, "groups", 1) if both else 1


@dataclass(frozen=True)
class Conv(Operator):
    """A convolution to a ``c_out`` x ``h_out`` x ``w_out`` map.

    Args:
        granularity: Side S of the patches of its outputs, where positions are left out.
        gathered: Whether its input holds kept positions only, one after the other.
        channel_groups: Decisions of the masker about its channels, where channels are left out.
    """

    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int
    h_out: int
    w_out: int
    dilation: int = 1
    granularity: int = field(default=1, kw_only=True)
    gathered: bool = field(default=False, kw_only=True)
    channel_groups: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        sizes = ("c_in", "c_out", "kernel", "stride", "groups", "h_out", "w_out", "dilation")
        positive(self, *sizes)
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(
                f"{self.name}: groups must divide c_in={self.c_in} and "
                f"c_out={self.c_out}, got {self.groups}"
            )

    def macs(self) -> int:
        """See the base class."""
        outputs = self.c_out * self.h_out * self.w_out
        return outputs * (self.c_in // self.groups) * self.kernel**2


@dataclass(frozen=True)
class Pool(Operator):
    """A max or average pooling to a ``channels`` x ``h_out`` x ``w_out`` map."""

    channels: int
    kernel: int
    stride: int
    h_out: int
    w_out: int

    def __post_init__(self) -> None:
        positive(self, "channels", "kernel", "stride", "h_out", "w_out")

    def macs(self) -> int:
        """One per value that goes into an output."""
        return self.channels * self.h_out * self.w_out * self.kernel**2


@dataclass(frozen=True)
class MapOperator(Operator):
    """An operator on the values of a ``channels`` x ``h_out`` x ``w_out`` map."""

    channels: int
    h_out: int
    w_out: int
    granularity: int = field(default=1, kw_only=True)  # side of its patches, where it has some

    def __post_init__(self) -> None:
        positive(self, "channels", "h_out", "w_out")

    def macs(self) -> int:
        """One per value."""
        return self.channels * self.h_out * self.w_out


@dataclass(frozen=True)
class Add(MapOperator):
    """The addition of a branch to its shortcut; of patches to a map, where positions are gated."""

    def macs(self) -> int:
        """None: additions alone are not counted."""
        return 0


@dataclass(frozen=True)
class GlobalPool(MapOperator):
    """The mean of every channel."""


@dataclass(frozen=True)
class Scale(MapOperator):
    """Every channel times a number of its own."""


@dataclass(frozen=True)
class Linear(Operator):
    """A fully connected layer on one vector per image."""

    c_in: int
    c_out: int

    def __post_init__(self) -> None:
        positive(self, "c_in", "c_out")

    def macs(self) -> int:
        """See the base class."""
        return self.c_in * self.c_out


@dataclass(frozen=True)
class Masker(Operator):
    """A masker about positions: it averages its input over each patch and decides by two scores.

    Args:
        c_in, h_in, w_in: Its input.
        decisions: Patches of an image, or 1.
        pools: Whether a patch has more than one pixel of the input.
        whole: Whether it decides about the whole block.
        beside: Channels of the convolution that reads the same input and could decide beside them.
        stride: Of that convolution.
        h_out, w_out: Its map.
    """

    c_in: int
    h_in: int
    w_in: int
    decisions: int
    pools: bool
    whole: bool
    beside: int
    stride: int
    h_out: int
    w_out: int
    masker: bool = field(default=True, kw_only=True)

    def macs(self) -> int:
        """Every input value is added once while pooling, then two scores per patch."""
        pooling = self.c_in * self.h_in * self.w_in if self.pools else 0
        return pooling + 2 * self.c_in * self.decisions


def positive(shape: object, *keys: str) -> None:
    """Raise ValueError unless the attributes ``keys`` of ``shape`` are positive integers."""
    for key in keys:
        value = getattr(shape, key)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            name = getattr(shape, "name", "")
            raise ValueError(f"{name}: {key} must be a positive integer, got {value!r}")
