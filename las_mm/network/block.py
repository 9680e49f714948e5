"""What a block says of itself, and networks of blocks."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .operator import CHANNEL, LAYER, POSITION, Conv, Operator, Pool

MODES = ("static", "spatial", "channel", "layer", "both")
CHANNEL_MASKERS = ("mlp", "conv_linear")
# Gates and groups of operators that do the same share of their work; see Operator.term.
Term = tuple[tuple[str, ...], int]


class BlockShape:
    """A block: its sizes and its operators, in order; all else follows from these.

    A subclass is a frozen dataclass with the fields below and whatever its operators need, and
    gives :attr:`operators`. FLOPs, predicted latency, logs, tables, pictures and search know no
    more of a block.

    Attributes:
        name: Name to show.
        stage: Stage that it belongs to, from 1.
        mode: ``'static'``, or what it skips.
        granularity: Side S of a patch in outputs of the block; read where it has patches.
        c_in, h_in, w_in: Its input.
        c_out, h_out, w_out: Its output.
        stride: Input over output side.
        channel_granularity: Channels G that share a decision; read where it leaves out channels.
    """

    name: str
    stage: int
    mode: str
    granularity: int
    c_in: int
    c_out: int
    h_in: int
    w_in: int
    stride: int
    channel_granularity: int = 1
    stride_behind: int = 1  # what its output shrinks by before the next block reads it

    @property
    def operators(self) -> tuple[Operator, ...]:
        """Its operators in the order in which they run."""
        raise NotImplementedError

    @property
    def gated_channels(self) -> int:
        """Channels that the channel masker decides about, computed or not."""
        return 0

    @property
    def h_out(self) -> int:
        """Rows of the block's output."""
        return ceil_div(self.h_in, self.stride)

    @property
    def w_out(self) -> int:
        """Columns of the block's output."""
        return ceil_div(self.w_in, self.stride)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """What scales its work, in the order of its operators."""
        return tuple(dict.fromkeys(axis for op in self.operators for axis in op.axes))

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms of its gated operators that multiply, each once."""
        return tuple(dict.fromkeys(op.term for op in self.operators if op.gates and op.macs()))

    @cached_property
    def reader(self) -> Conv | None:
        """The convolution at kept positions that reads around them; ``None`` without one."""
        for op in self.operators:
            if isinstance(op, Conv) and op.kernel > 1 and POSITION in op.gates:
                return op
        return None

    @property
    def has_patches(self) -> bool:
        """Whether it decides per patch."""
        return POSITION in self.axes

    @property
    def has_channels(self) -> bool:
        """Whether it decides per group of channels."""
        return CHANNEL in self.axes

    @property
    def decides_positions(self) -> bool:
        """Whether it may leave out positions: patches, or all of them."""
        return self.has_patches or LAYER in self.axes

    @property
    def channel_groups(self) -> int:
        """Decisions about channels; 0 for a block without."""
        return self.gated_channels // self.channel_granularity if self.has_channels else 0

    @property
    def n_patches(self) -> int:
        """Patches of the block's output; 1 for a layer block, 0 where no position is left out."""
        if not self.has_patches:
            return int(self.decides_positions)
        return ceil_div(self.h_out, self.granularity) * ceil_div(self.w_out, self.granularity)

    @property
    def label(self) -> str:
        """Mode and granularities: 'static', 'spatial S=4', 'channel G=2', 'both S=4 G=2'."""
        side = f" S={self.granularity}" if self.has_patches else ""
        group = f" G={self.channel_granularity}" if self.has_channels else ""
        return f"{self.mode}{side}{group}"

    def in_mode(self, mode: str) -> BlockShape:
        """The same block in another mode, such as ``'static'``."""
        return replace(self, mode=mode)  # type: ignore[type-var]

    def with_granularity(self, side: int | None = None, group: int | None = None) -> BlockShape:
        """The same block with other S and G, where it has them."""
        changes: dict[str, Any] = {}
        if side is not None and self.has_patches:
            changes["granularity"] = side
        if group is not None and self.has_channels:
            changes["channel_granularity"] = group
        return replace(self, **changes) if changes else self  # type: ignore[type-var]

    def anonymous(self) -> BlockShape:
        """The same block without name and stage: networks repeat their blocks."""
        return replace(self, name="block", stage=0)  # type: ignore[type-var]


@dataclass(frozen=True)
class NetworkShape:
    """A stem of dense operators followed by blocks.

    Args:
        name: Name to show.
        input_hw: Rows and columns of the input image.
        stem: Operators before the first block.
        blocks: Blocks in order.

    Raises:
        ValueError: There is no block, or ``input_hw`` is not two positive integers.
    """

    name: str
    input_hw: tuple[int, int]
    stem: tuple[Operator, ...]
    blocks: tuple[BlockShape, ...]

    def __post_init__(self) -> None:
        check_hw(self.name, self.input_hw)
        if not self.blocks:
            raise ValueError(f"{self.name}: blocks must hold at least one block")
        for key, kind in (("stem", Operator), ("blocks", BlockShape)):
            for item in getattr(self, key):
                if not isinstance(item, kind):
                    raise ValueError(f"{self.name}: {key} must hold {kind.__name__}s, got {item!r}")

    @property
    def channels(self) -> int:
        """Channels of the input."""
        first = next((op for op in self.stem if isinstance(op, (Conv, Pool))), self.blocks[0])
        return first.channels if isinstance(first, Pool) else first.c_in  # type: ignore[union-attr]

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of all blocks."""
        return tuple(dict.fromkeys(axis for block in self.blocks for axis in block.axes))

    def stages(self) -> dict[int, tuple[BlockShape, ...]]:
        """The blocks of each stage, in order: {1: (...), 2: ...}."""
        stages: dict[int, tuple[BlockShape, ...]] = {}
        for block in self.blocks:
            stages[block.stage] = (*stages.get(block.stage, ()), block)
        return stages

    def having(self, *axes: str) -> list[int]:
        """Indices of the blocks that decide about one of ``axes``; about any, without."""
        return [
            i for i, b in enumerate(self.blocks) if (set(axes) & set(b.axes) if axes else b.axes)
        ]

    def static(self) -> NetworkShape:
        """The same network with every block static."""
        return replace(self, blocks=tuple(b.in_mode("static") for b in self.blocks))

    def with_granularity(self, granularity: Mapping[int, int]) -> NetworkShape:
        """The same network with another S in the patches of some stages' blocks: {stage: S}."""
        blocks = tuple(b.with_granularity(granularity.get(b.stage)) for b in self.blocks)
        return replace(self, blocks=blocks)

    def with_channel_granularity(self, granularity: Mapping[int, int]) -> NetworkShape:
        """The same network with another G in the channels of some stages' blocks: {stage: G}."""
        blocks = tuple(b.with_granularity(None, granularity.get(b.stage)) for b in self.blocks)
        return replace(self, blocks=blocks)


def ceil_div(n: int, by: int) -> int:
    """``n / by``, rounded up."""
    return -(-n // by)


def check_mode(name: str, mode: str, modes: Sequence[str] = MODES) -> None:
    """Raise ValueError unless ``mode`` is one of ``modes``."""
    if mode not in modes:
        raise ValueError(f"{name}: unknown mode {mode!r}; known modes: {', '.join(modes)}")


def check_hw(name: str, value: Sequence[int]) -> None:
    """Raise ValueError unless ``value`` is two positive integers."""
    if len(value) != 2 or not all(isinstance(n, numbers.Integral) and n > 0 for n in value):
        raise ValueError(f"{name}: input_hw must be two positive integers, got {value!r}")
