"""Shapes of a network, as the latency model reads them.

All sizes are counts: channels, and rows and columns of maps.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MODES = ("static", "spatial", "channel", "layer", "both")
CHANNEL_MASKERS = ("mlp", "conv_linear")
_EXPANSION = 4  # a ResNet bottleneck's output channels per inner channel
_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class ConvShape:
    """A dense convolution to a ``c_out`` x ``h_out`` x ``w_out`` map.

    Raises:
        ValueError: A size is not a positive integer.
    """

    name: str
    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int
    h_out: int
    w_out: int

    def __post_init__(self) -> None:
        _positive(self, "c_in", "c_out", "kernel", "stride", "groups", "h_out", "w_out")
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(
                f"{self.name}: groups must divide c_in={self.c_in} and "
                f"c_out={self.c_out}, got {self.groups}"
            )


@dataclass(frozen=True)
class PoolShape:
    """A pooling to a ``channels`` x ``h_out`` x ``w_out`` map.

    Raises:
        ValueError: A size is not a positive integer.
    """

    name: str
    channels: int
    kernel: int
    stride: int
    h_out: int
    w_out: int

    def __post_init__(self) -> None:
        _positive(self, "channels", "kernel", "stride", "h_out", "w_out")


@dataclass(frozen=True)
class BlockShape:
    """A bottleneck block: conv1 1x1, conv2 3x3, conv3 1x1, residual addition.

    RegNet's block is one too, with ``c_out == width``, groups in conv2 and, in RegNetY, SE.

    Args:
        name: Name to show.
        stage: Stage that it belongs to, from 1.
        mode: 'static', 'spatial', 'channel', 'layer' or 'both' (spatial and channel).
        granularity: Side S of a patch, in outputs of the block; read in spatial and both.
        c_in: Input channels.
        width: Channels between the convolutions.
        c_out: Output channels.
        h_in: Input rows.
        w_in: Input columns.
        stride: Stride of the block.
        conv1_stride: The part of the stride that conv1 has: 1 (style 'pytorch', conv2 strides)
            or ``stride`` (style 'caffe'). Defaults to 1.
        groups: Groups of conv2. Defaults to 1.
        dilation: Dilation of conv2. Defaults to 1.
        downsample: Whether the shortcut has a 1x1 convolution. Defaults to False.
        downsample_pool: Whether the shortcut averages ``stride`` x ``stride`` pixels first, so
            that its convolution has stride 1. Defaults to False.
        channel_granularity: Channels G that share a decision; read in channel and both.
            Defaults to 1.
        channel_masker: 'mlp' or 'conv_linear'; read in channel and both. Defaults to 'mlp'.
        channel_masker_layers: Layers of an 'mlp', 1 or 2. Defaults to 2.
        channel_reduction: Divisor of the channel masker's hidden channels. Defaults to 16.
        se_width: Channels between the two layers of squeeze-and-excitation (SE), which follows
            conv2; 0 without SE. Defaults to 0.

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
    conv1_stride: int = 1
    groups: int = 1
    dilation: int = 1
    downsample: bool = False
    downsample_pool: bool = False
    channel_granularity: int = 1
    channel_masker: str = "mlp"
    channel_masker_layers: int = 2
    channel_reduction: int = 16
    se_width: int = 0

    def __post_init__(self) -> None:
        _check_mode(self.name, self.mode)
        _positive(
            self,
            "c_in",
            "width",
            "c_out",
            "h_in",
            "w_in",
            "stride",
            "conv1_stride",
            "groups",
            "dilation",
        )
        if self.has_patches:
            _positive(self, "granularity")
        if self.has_channels:
            self._check_channels()
        if self.se_width:
            _positive(self, "se_width")
        if self.conv1_stride not in (1, self.stride):
            raise ValueError(
                f"{self.name}: conv1_stride must be 1 or the stride {self.stride}, "
                f"got {self.conv1_stride}"
            )
        if self.width % self.groups:
            raise ValueError(
                f"{self.name}: groups must divide width={self.width}, got {self.groups}"
            )
        if self.downsample_pool and not self.downsample:
            raise ValueError(f"{self.name}: downsample_pool=True needs downsample=True")

    def _check_channels(self) -> None:
        _positive(self, "channel_granularity")
        if self.width % self.channel_granularity:
            raise ValueError(
                f"{self.name}: channel_granularity must divide width={self.width}, "
                f"got {self.channel_granularity}"
            )
        if self.channel_masker not in CHANNEL_MASKERS:
            raise ValueError(
                f"{self.name}: channel_masker must be one of {', '.join(CHANNEL_MASKERS)}, "
                f"got {self.channel_masker!r}"
            )
        _positive(self, "channel_masker_layers", "channel_reduction")

    @property
    def has_patches(self) -> bool:
        """Whether it decides per patch."""
        return self.mode in ("spatial", "both")

    @property
    def has_channels(self) -> bool:
        """Whether it decides per group of channels."""
        return self.mode in ("channel", "both")

    @property
    def decides_positions(self) -> bool:
        """Whether it may leave out positions: patches, or all of them."""
        return self.has_patches or self.mode == "layer"

    @property
    def channel_groups(self) -> int:
        """Decisions about channels; 0 for a block without."""
        return self.width // self.channel_granularity if self.has_channels else 0

    @property
    def channel_hidden(self) -> int:
        """Channels between the layers of the channel masker; 0 for one layer or no masker."""
        if not self.has_channels:
            return 0
        return channel_hidden(
            self.channel_masker,
            self.channel_masker_layers,
            self.c_in,
            self.channel_groups,
            self.channel_reduction,
        )

    @property
    def label(self) -> str:
        """Mode and granularities: 'static', 'spatial S=4', 'channel G=2', 'both S=4 G=2'."""
        side = f" S={self.granularity}" if self.has_patches else ""
        group = f" G={self.channel_granularity}" if self.has_channels else ""
        return f"{self.mode}{side}{group}"

    @property
    def h_mid(self) -> int:
        """Rows of conv1's output."""
        return _ceil_div(self.h_in, self.conv1_stride)

    @property
    def w_mid(self) -> int:
        """Columns of conv1's output."""
        return _ceil_div(self.w_in, self.conv1_stride)

    @property
    def h_out(self) -> int:
        """Rows of the block's output."""
        return _ceil_div(self.h_in, self.stride)

    @property
    def w_out(self) -> int:
        """Columns of the block's output."""
        return _ceil_div(self.w_in, self.stride)

    @property
    def conv2_stride(self) -> int:
        """Stride of conv2."""
        return self.stride // self.conv1_stride

    @property
    def n_patches(self) -> int:
        """Patches of the block's output; 1 for a layer block, 0 where no position is left out."""
        return self._positions(self.h_out, self.w_out)

    @property
    def n_patches_conv1(self) -> int:
        """Patch positions on conv1's output, patches having the same side S there."""
        return self._positions(self.h_mid, self.w_mid)

    def _positions(self, height: int, width: int) -> int:
        if not self.has_patches:
            return int(self.mode == "layer")
        return _ceil_div(height, self.granularity) * _ceil_div(width, self.granularity)


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
    stem: tuple[ConvShape | PoolShape, ...]
    blocks: tuple[BlockShape, ...]

    def __post_init__(self) -> None:
        _check_hw(self.name, self.input_hw)
        if not self.blocks:
            raise ValueError(f"{self.name}: blocks must hold at least one block")
        for key, kinds in (("stem", (ConvShape, PoolShape)), ("blocks", (BlockShape,))):
            for item in getattr(self, key):
                if not isinstance(item, kinds):
                    names = " or ".join(kind.__name__ for kind in kinds)
                    raise ValueError(f"{self.name}: {key} must hold {names}, got {item!r}")

    @property
    def channels(self) -> int:
        """Channels of the input."""
        first = self.stem[0] if self.stem else self.blocks[0]
        return first.channels if isinstance(first, PoolShape) else first.c_in

    def stages(self) -> dict[int, tuple[BlockShape, ...]]:
        """The blocks of each stage, in order: {1: (...), 2: ...}."""
        stages: dict[int, tuple[BlockShape, ...]] = {}
        for block in self.blocks:
            stages[block.stage] = (*stages.get(block.stage, ()), block)
        return stages

    def static(self) -> NetworkShape:
        """The same network with every block static."""
        return replace(self, blocks=tuple(replace(b, mode="static") for b in self.blocks))

    def with_granularity(self, granularity: Mapping[int, int]) -> NetworkShape:
        """The same network with another S in the patches of some stages' blocks: {stage: S}."""
        blocks = (
            replace(b, granularity=granularity[b.stage])
            if b.has_patches and b.stage in granularity
            else b
            for b in self.blocks
        )
        return replace(self, blocks=tuple(blocks))

    def with_channel_granularity(self, granularity: Mapping[int, int]) -> NetworkShape:
        """The same network with another G in the channels of some stages' blocks: {stage: G}."""
        blocks = (
            replace(b, channel_granularity=granularity[b.stage])
            if b.has_channels and b.stage in granularity
            else b
            for b in self.blocks
        )
        return replace(self, blocks=tuple(blocks))


def resnet_shape(
    depth: int,
    input_hw: tuple[int, int] = (224, 224),
    mode: str | Sequence[str] = "spatial",
    granularity: Sequence[int] = (4, 4, 2, 1),
    base_channels: int = 64,
    stage1_downsample: bool = True,
    channel_granularity: Sequence[int] = (2, 2, 2, 2),
) -> NetworkShape:
    """The shapes of a ResNet with bottlenecks (style 'pytorch', 7x7 stem and 3x3 max-pool).

    Args:
        depth: 50, 101 or 152.
        input_hw: Rows and columns of the image. Defaults to (224, 224).
        mode: Mode of all blocks, or one per stage. Defaults to 'spatial'.
        granularity: Patch side S per stage. Defaults to (4, 4, 2, 1).
        base_channels: Channels of the stem. Defaults to 64.
        stage1_downsample: Whether the first block has the 1x1 convolution of its shortcut that
            real networks have; the published figures leave it out. Defaults to True.
        channel_granularity: Channels G per decision and stage, where channels are skipped.
            Defaults to (2, 2, 2, 2).

    Raises:
        ValueError: An argument is unknown, not positive, or of the wrong length.
    """
    if depth not in _DEPTHS:
        raise ValueError(f"depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth!r}")
    _check_hw("input_hw", input_hw)
    if not isinstance(base_channels, numbers.Integral) or base_channels < 1:
        raise ValueError(f"base_channels must be a positive integer, got {base_channels!r}")
    settings = stage_settings(mode, granularity, channel_granularity)
    name = f"resnet{depth}"
    height, width = (_ceil_div(n, 2) for n in input_hw)
    conv = ConvShape("conv1", 3, base_channels, 7, 2, 1, height, width)
    height, width = _ceil_div(height, 2), _ceil_div(width, 2)
    pool = PoolShape("maxpool", base_channels, 3, 2, height, width)
    blocks = []
    c_in = base_channels
    for stage, count in enumerate(_DEPTHS[depth], 1):
        inner = base_channels * 2 ** (stage - 1)
        for i in range(count):
            stride = 2 if i == 0 and stage > 1 else 1
            block = BlockShape(
                f"stage{stage}.{i}",
                stage,
                c_in=c_in,
                width=inner,
                c_out=inner * _EXPANSION,
                h_in=height,
                w_in=width,
                stride=stride,
                downsample=i == 0 and (stage > 1 or stage1_downsample),
                **settings[stage - 1],
            )
            blocks.append(block)
            c_in, height, width = block.c_out, block.h_out, block.w_out
    return NetworkShape(name, tuple(input_hw), (conv, pool), tuple(blocks))


def stage_settings(
    mode: str | Sequence[str], granularity: Sequence[int], channel_granularity: Sequence[int]
) -> list[dict[str, Any]]:
    """What the blocks of each of four stages have in common, as arguments of BlockShape.

    Raises:
        ValueError: A mode is unknown, or an argument has not four entries.
    """
    modes = (mode,) * 4 if isinstance(mode, str) else tuple(mode)
    sides, groups = tuple(granularity), tuple(channel_granularity)
    for key, values in dict(mode=modes, granularity=sides, channel_granularity=groups).items():
        if len(values) != 4:
            raise ValueError(f"{key} must have one entry per stage (4), got {values!r}")
    settings = []
    for stage, (name, side, group) in enumerate(zip(modes, sides, groups), 1):
        _check_mode(f"stage {stage}", name)
        setting = dict(mode=name, granularity=0 if name == "static" else side)
        if name in ("channel", "both"):
            setting["channel_granularity"] = group
        settings.append(setting)
    return settings


def channel_hidden(kind: str, layers: int, c_in: int, groups: int, reduction: int) -> int:
    """Channels between the layers of a channel masker, 0 for a single layer.

    Args:
        kind: 'mlp' or 'conv_linear'.
        layers: Of an MLP, 1 or 2.
        c_in: Channels of the block's input.
        groups: Decisions per image.
        reduction: What the groups (MLP) or input channels (conv_linear) are divided by.
    """
    if kind == "conv_linear":
        return c_in // reduction
    return max(groups // reduction, 16) if layers == 2 else 0


def _ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def _check_mode(name: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{name}: unknown mode {mode!r}; known modes: {', '.join(MODES)}")


def _check_hw(name: str, value: Sequence[int]) -> None:
    if len(value) != 2 or not all(isinstance(n, numbers.Integral) and n > 0 for n in value):
        raise ValueError(f"{name}: input_hw must be two positive integers, got {value!r}")


def _positive(shape: ConvShape | PoolShape | BlockShape, *keys: str) -> None:
    for key in keys:
        value = getattr(shape, key)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{shape.name}: {key} must be a positive integer, got {value!r}")
