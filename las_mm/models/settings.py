"""How the blocks of a backbone skip: what a config says, checked and spread over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from las_mm.network.block import CHANNEL_MASKERS, MODES

POSITIONS = ("after_act", "before_norm")


@dataclass(frozen=True)
class BlockSettings:
    """How one block skips.

    Args:
        mode: ``'static'``, ``'spatial'`` (patches), ``'channel'`` (channels of the bottleneck),
            ``'both'`` (patches and channels) or ``'layer'`` (the block).
        granularity: Side S of a patch in output pixels; read by spatial and both.
        channel_granularity: Channels G that share a decision; read by channel and both.
        channel_masker: ``'mlp'`` or ``'conv_linear'``, see
            :class:`~las_mm.models.maskers.ChannelMasker`.
        channel_masker_layers: 1 or 2 fully connected layers of an ``'mlp'``; a ``'conv_linear'``
            has 2 layers.
        channel_reduction: Divisor of the masker's hidden channels.
        channel_position: Where a skipped channel becomes what it is: ``'after_act'`` (0) or
            ``'before_norm'`` (ReLU(BN(0)), as in the authors' released ResNets).

    Raises:
        ValueError: A value outside its range; the message names it.
    """

    mode: str = "static"
    granularity: int = 1
    channel_granularity: int = 2
    channel_masker: str = "mlp"
    channel_masker_layers: int = 2
    channel_reduction: int = 16
    channel_position: str = "after_act"

    def __post_init__(self) -> None:
        known = dict(mode=MODES, channel_masker=CHANNEL_MASKERS, channel_position=POSITIONS)
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}"
                )
        _positive("granularity", self.granularity, "the side S of a patch in output pixels")
        _positive("channel_granularity", self.channel_granularity, "channels that share a decision")
        _positive("channel_reduction", self.channel_reduction, "the divisor of hidden channels")
        if self.channel_masker_layers not in (1, 2):
            raise ValueError(
                f"channel_masker_layers must be 1 or 2, got {self.channel_masker_layers!r}"
            )
        if self.channel_masker == "conv_linear" and self.channel_masker_layers == 1:
            raise ValueError(
                "channel_masker_layers=1 has no effect on a 'conv_linear' masker, which has a "
                "convolution and a linear layer: leave it out, or use channel_masker='mlp'"
            )

    @property
    def spatial(self) -> bool:
        """Whether a masker decides about positions: patches, or the whole map."""
        return self.mode in ("spatial", "layer", "both")

    @property
    def channel(self) -> bool:
        """Whether a masker decides about channels."""
        return self.mode in ("channel", "both")


SETTINGS = tuple(field.name for field in fields(BlockSettings))


def block_settings(
    stage_blocks: Sequence[int], **values: object
) -> tuple[tuple[BlockSettings, ...], ...]:
    """The settings of every block, as [stage][block].

    Args:
        stage_blocks: Blocks per stage.
        values: Arguments of :class:`BlockSettings`, each one value for all blocks, one per stage,
            per stage a list of one per block, or one per block (flat).

    Raises:
        ValueError: A list of the wrong length, or a value outside its range; the message names
            the argument, the value and the stage.
    """
    spread = {name: per_block(name, value, stage_blocks) for name, value in values.items()}
    stages = []
    for stage, count in enumerate(stage_blocks):
        blocks = []
        for i in range(count):
            own = {name: value[stage][i] for name, value in spread.items()}
            blocks.append(in_stage(stage, lambda own=own: BlockSettings(**own)))
        stages.append(tuple(blocks))
    return tuple(stages)


def per_block(name: str, value: object, stage_blocks: Sequence[int]) -> list[list]:
    """``value`` as [stage][block]: one, one per stage, one per block (flat) or nested."""
    stages, count = len(stage_blocks), sum(stage_blocks)
    if not isinstance(value, (list, tuple)):
        value = [value] * stages
    elif len(value) == count != stages:
        flat = iter(value)
        value = [[next(flat) for _ in range(n)] for n in stage_blocks]
    if len(value) != stages:
        raise ValueError(
            f"{name} needs one value or {stages} (one per stage), got {list(value)}; one per block "
            f"({count}) or a list per stage of one per block is possible too"
        )
    nested = []
    for stage, (entry, n) in enumerate(zip(value, stage_blocks), start=1):
        blocks = list(entry) if isinstance(entry, (list, tuple)) else [entry] * n
        if len(blocks) != n:
            raise ValueError(
                f"{name} of stage {stage} needs {n} values (one per block), got {blocks}"
            )
        nested.append(blocks)
    return nested


def in_stage(stage: int, function: Callable):
    """Call ``function``; the stage, counted from 0, goes into the message of its ValueError."""
    try:
        return function()
    except ValueError as error:
        raise ValueError(f"stage {stage + 1}: {error}") from None


def describe_stage(blocks: Sequence[BlockSettings]) -> str:
    """A stage in few words: "static", "spatial S=4", "spatial S=8-4-4-2", "channel G=2", ..."""
    modes = _join(block.mode for block in blocks)
    text = modes
    if any(block.mode in ("spatial", "both") for block in blocks):
        text += f" S={_join(block.granularity for block in blocks)}"
    if any(block.channel for block in blocks):
        text += f" G={_join(block.channel_granularity for block in blocks)}"
    return text


def _join(values) -> str:
    listed = [str(value) for value in values]
    return listed[0] if len(set(listed)) == 1 else "-".join(listed)


def _positive(name: str, value: object, meaning: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer ({meaning}), got {value!r}")
