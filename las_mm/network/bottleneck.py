"""The block of ResNet-50 and deeper, and of RegNet: 1x1, 3x3, 1x1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .block import CHANNEL_MASKERS, BlockShape, ceil_div, check_mode
from .operator import (
    CHANNEL_IN,
    CHANNEL_OUT,
    DILATED,
    LAYER,
    POSITION,
    Add,
    Conv,
    GlobalPool,
    Linear,
    Masker,
    Operator,
    Pool,
    Scale,
    positive,
)

# Per mode the gates of positions: of what conv2 reads, and of conv2 and all behind it.
_POSITIONS = {"spatial": (DILATED, POSITION), "both": (DILATED, POSITION), "layer": (LAYER, LAYER)}


@dataclass(frozen=True)
class BottleneckShape(BlockShape):
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
        check_mode(self.name, self.mode)
        sizes = ("c_in", "width", "c_out", "h_in", "w_in", "stride", "conv1_stride", "groups")
        positive(self, *sizes, "dilation")
        if self.mode in ("spatial", "both"):
            positive(self, "granularity")
        if self.mode in ("channel", "both"):
            check_channels(self, self.width)
        if self.se_width:
            positive(self, "se_width")
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

    @property
    def gated_channels(self) -> int:
        """Those between the convolutions."""
        return self.width

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
    def conv2_stride(self) -> int:
        """Stride of conv2."""
        return self.stride // self.conv1_stride

    @property
    def h_mid(self) -> int:
        """Rows of conv1's output."""
        return ceil_div(self.h_in, self.conv1_stride)

    @property
    def w_mid(self) -> int:
        """Columns of conv1's output."""
        return ceil_div(self.w_in, self.conv1_stride)

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Maskers, conv1, conv2, SE, conv3, the addition, and the shortcut."""
        width, c_out, h_out, w_out = self.width, self.c_out, self.h_out, self.w_out
        dilated, kept = ((gate,) for gate in _POSITIONS.get(self.mode, ("", "")))
        if not kept[0]:
            dilated = kept = ()
        channels = self.mode in ("channel", "both")
        outputs, inputs = ((CHANNEL_OUT,), (CHANNEL_IN,)) if channels else ((), ())
        groups = width // self.channel_granularity if channels else 0
        patched = POSITION in kept
        options = dict(granularity=self.granularity if patched else 1, channel_groups=groups)
        conv1 = Conv(
            "conv1",
            self.c_in,
            width,
            1,
            self.conv1_stride,
            1,
            self.h_mid,
            self.w_mid,
            gates=dilated + outputs,
            module="conv1",
            **options,
        )
        return (
            *position_masker(self, conv1),
            conv1,
            Conv(
                "conv2",
                width,
                width,
                3,
                self.conv2_stride,
                self.groups,
                h_out,
                w_out,
                self.dilation,
                gates=kept + inputs + outputs,
                module="conv2",
                **options,
            ),
            *self._excitation(kept, channels),
            Conv(
                "conv3",
                width,
                c_out,
                1,
                1,
                1,
                h_out,
                w_out,
                gates=kept + inputs,
                module="conv3",
                gathered=patched,
                **options,
            ),
            Add(
                "scatter_add" if patched else "add",
                c_out,
                h_out,
                w_out,
                gates=kept,
                granularity=options["granularity"],
            ),
            *(channel_masker(self) if channels else ()),
            *(shortcut(self, self.downsample_pool) if self.downsample else ()),
        )

    def _excitation(self, kept: tuple[str, ...], channels: bool) -> tuple[Operator, ...]:
        if not self.se_width:
            return ()
        gates = kept + ((CHANNEL_IN,) if channels else ())
        layers = kept if LAYER in kept else ()  # a skipped block skips them too
        sizes = (self.width, self.h_out, self.w_out)
        side = self.granularity if POSITION in kept else 1
        return (
            GlobalPool("se_pool", *sizes, gates=gates, granularity=side),
            Linear("se_fc1", self.width, self.se_width, gates=layers, module="se.fc1"),
            Linear("se_fc2", self.se_width, self.width, gates=layers, module="se.fc2"),
            Scale("se_scale", *sizes, gates=gates, granularity=side),
        )


def position_masker(block: BlockShape, conv: Conv) -> tuple[Operator, ...]:
    """The masker about positions of a block whose first convolution is ``conv``, if it has one.

    A 1x1 convolution may decide on its way, so reports show both together.
    """
    if block.mode not in ("spatial", "both", "layer"):
        return ()
    layer = block.mode == "layer"
    rows, columns = (ceil_div(n, block.granularity or 1) for n in (block.h_out, block.w_out))
    return (
        Masker(
            "masker",
            block.c_in,
            block.h_in,
            block.w_in,
            decisions=1 if layer else rows * columns,
            whole=layer,
            pools=layer or block.granularity * block.stride > 1,
            beside=conv.c_out,
            stride=conv.stride,
            h_out=conv.h_out,
            w_out=conv.w_out,
            module="masker",
        ),
    )


def channel_masker(block: BlockShape) -> tuple[Operator, ...]:
    """The layers of a block's channel masker; reads ``channel_masker`` and so on of the block."""
    kind, h, w = block.channel_masker, block.h_in, block.w_in  # type: ignore[attr-defined]
    groups = block.gated_channels // block.channel_granularity
    hidden = channel_hidden(
        kind,
        block.channel_masker_layers,
        block.c_in,
        groups,
        block.channel_reduction,  # type: ignore[attr-defined]
    )
    c_in, logits = block.c_in, 2 * groups
    parts: list[Operator] = []
    options = dict(group="channel_masker", masker=True, module="masker_channel")
    if kind == "conv_linear":
        parts.append(Conv("conv", c_in, hidden, 1, 1, 1, h, w, **options))
        c_in = hidden
    parts.append(GlobalPool("pool", c_in, h, w, **{**options, "module": ""}))
    layers = [(c_in, logits)]
    if kind == "mlp" and hidden:
        layers = [(c_in, hidden), (hidden, logits)]
    parts += [Linear(f"fc{i}", *sizes, **options) for i, sizes in enumerate(layers, 1)]
    return tuple(parts)


def shortcut(block: BlockShape, pool: bool) -> tuple[Operator, ...]:
    """The 1x1 convolution of a shortcut, after an average pooling if ``pool``."""
    size, stride = (block.h_out, block.w_out), block.stride
    conv = Conv(
        "downsample",
        block.c_in,
        block.c_out,
        1,
        1 if pool else stride,
        1,
        *size,
        module="downsample",
    )
    if not pool:
        return (conv,)
    return (Pool("downsample_pool", block.c_in, stride, stride, *size), conv)


def check_channels(block: BlockShape, width: int) -> None:
    """Raise ValueError unless what says how ``block`` skips channels fits its ``width``."""
    positive(block, "channel_granularity")
    if width % block.channel_granularity:
        raise ValueError(
            f"{block.name}: channel_granularity must divide width={width}, "
            f"got {block.channel_granularity}"
        )
    kind = block.channel_masker  # type: ignore[attr-defined]
    if kind not in CHANNEL_MASKERS:
        raise ValueError(
            f"{block.name}: channel_masker must be one of {', '.join(CHANNEL_MASKERS)}, "
            f"got {kind!r}"
        )
    positive(block, "channel_masker_layers", "channel_reduction")


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
