"""Published architectures: ResNet (arXiv 1512.03385) and RegNet (arXiv 2003.13678)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from .basic import BasicShape
from .block import BlockShape, NetworkShape, ceil_div, check_hw, check_mode
from .bottleneck import BottleneckShape
from .operator import Conv, Pool

_EXPANSION = 4  # a ResNet bottleneck's output channels per inner channel
_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

_STEM = 32
_MULTIPLE = 8  # widths are multiples of this
# (depth, w_0, w_a, w_m, group width) of the paper's models, as torchvision has them.
ARCHS: dict[str, tuple[int, int, float, float, int]] = {
    "x_400mf": (22, 24, 24.48, 2.54, 16),
    "x_800mf": (16, 56, 35.73, 2.28, 16),
    "x_1.6gf": (18, 80, 34.01, 2.25, 24),
    "x_3.2gf": (25, 88, 26.31, 2.25, 48),
    "x_8gf": (23, 80, 49.56, 2.88, 120),
    "y_400mf": (16, 48, 27.89, 2.09, 8),
    "y_800mf": (14, 56, 38.84, 2.4, 16),
    "y_1.6gf": (27, 48, 20.71, 2.65, 24),
    "y_3.2gf": (21, 80, 42.63, 2.66, 24),
    "y_8gf": (17, 192, 76.82, 2.19, 56),
}
# (growth rate, layers of each dense block, channels of the stem); arXiv 1608.06993.
DENSENETS: dict[str, tuple[int, tuple[int, ...], int]] = {
    "121": (32, (6, 12, 24, 16), 64),
    "161": (48, (6, 12, 36, 24), 96),
    "169": (32, (6, 12, 32, 32), 64),
    "201": (32, (6, 12, 48, 32), 64),
}
SE_RATIO = 0.25
"""Channels inside the SE of a RegNetY, per input channel of its block."""


def resnet_shape(
    depth: int,
    input_hw: tuple[int, int] = (224, 224),
    mode: str | Sequence[str] = "spatial",
    granularity: Sequence[int] = (4, 4, 2, 1),
    base_channels: int = 64,
    stage1_downsample: bool = True,
    channel_granularity: Sequence[int] = (2, 2, 2, 2),
) -> NetworkShape:
    """The shapes of a ResNet (style 'pytorch', 7x7 stem and 3x3 max-pool).

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
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
    check_hw("input_hw", input_hw)
    if not isinstance(base_channels, numbers.Integral) or base_channels < 1:
        raise ValueError(f"base_channels must be a positive integer, got {base_channels!r}")
    settings = stage_settings(mode, granularity, channel_granularity)
    name = f"resnet{depth}"
    height, width = (ceil_div(n, 2) for n in input_hw)
    conv = Conv("conv1", 3, base_channels, 7, 2, 1, height, width)
    height, width = ceil_div(height, 2), ceil_div(width, 2)
    pool = Pool("maxpool", base_channels, 3, 2, height, width)
    blocks: list[BlockShape] = []
    c_in = base_channels
    make, expansion = (BasicShape, 1) if depth < 50 else (BottleneckShape, _EXPANSION)
    for stage, count in enumerate(_DEPTHS[depth], 1):
        inner = base_channels * 2 ** (stage - 1)
        for i in range(count):
            stride = 2 if i == 0 and stage > 1 else 1
            block = make(
                name=f"stage{stage}.{i}",
                stage=stage,
                c_in=c_in,
                width=inner,
                c_out=inner * expansion,
                h_in=height,
                w_in=width,
                stride=stride,
                downsample=i == 0 and (stage > 1 or (stage1_downsample and expansion > 1)),
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
        check_mode(f"stage {stage}", name)
        setting = dict(mode=name, granularity=0 if name == "static" else side)
        if name in ("channel", "both"):
            setting["channel_granularity"] = group
        settings.append(setting)
    return settings


def regnet_stages(arch: str) -> list[tuple[int, int, int]]:
    """(blocks, width, channels per group of conv2) of each of the four stages.

    Raises:
        ValueError: ``arch`` is none of :data:`ARCHS`.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    depth, w_0, w_a, w_m, group = ARCHS[arch]
    widths = []
    for i in range(depth):
        power = round(math.log((w_0 + w_a * i) / w_0) / math.log(w_m))
        widths.append(round(w_0 * w_m**power / _MULTIPLE) * _MULTIPLE)
    stages = []
    for width in sorted(set(widths)):
        per_group = min(group, width)
        stages.append((widths.count(width), _divisible(width, per_group), per_group))
    return stages


def regnet_shape(
    arch: str,
    input_hw: tuple[int, int] = (224, 224),
    mode: str | Sequence[str] = "spatial",
    granularity: Sequence[int] = (4, 4, 2, 1),
    channel_granularity: Sequence[int] = (2, 2, 2, 2),
) -> NetworkShape:
    """The shapes of a RegNetX or RegNetY: a 3x3 stem and four stages of stride 2.

    Args:
        arch: One of :data:`ARCHS`, e.g. ``'y_800mf'``.
        input_hw: Rows and columns of the image. Defaults to (224, 224).
        mode: Mode of all blocks, or one per stage. Defaults to 'spatial'.
        granularity: Patch side S per stage. Defaults to (4, 4, 2, 1).
        channel_granularity: Channels G per decision and stage. Defaults to (2, 2, 2, 2).

    Raises:
        ValueError: An argument is unknown, not positive, or of the wrong length.
    """
    stages = regnet_stages(arch)
    settings = stage_settings(mode, granularity, channel_granularity)
    height, width = (-(-n // 2) for n in input_hw)
    stem = Conv("stem", 3, _STEM, 3, 2, 1, height, width)
    blocks, c_in = [], _STEM
    for stage, ((count, channels, per_group), setting) in enumerate(zip(stages, settings), 1):
        for i in range(count):
            block = BottleneckShape(
                f"stage{stage}.{i}",
                stage,
                c_in=c_in,
                width=channels,
                c_out=channels,
                h_in=height,
                w_in=width,
                stride=2 if i == 0 else 1,
                groups=channels // per_group,
                downsample=i == 0,
                se_width=round(SE_RATIO * c_in) if arch.startswith("y") else 0,
                **setting,
            )
            blocks.append(block)
            c_in, height, width = block.c_out, block.h_out, block.w_out
    return NetworkShape(f"regnet_{arch}", (input_hw[0], input_hw[1]), (stem,), tuple(blocks))


def _divisible(width: int, by: int) -> int:
    """The multiple of ``by`` nearest to ``width``, but not 10 % below it."""
    rounded = max(by, (width + by // 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded
