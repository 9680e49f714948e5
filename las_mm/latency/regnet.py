"""Shapes of RegNets (Radosavovic et al., arXiv 2003.13678), as the latency model reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .shapes import BlockShape, ConvShape, NetworkShape, stage_settings

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
SE_RATIO = 0.25
"""Channels inside the SE of a RegNetY, per input channel of its block."""


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
    stem = ConvShape("stem", 3, _STEM, 3, 2, 1, height, width)
    blocks, c_in = [], _STEM
    for stage, ((count, channels, per_group), setting) in enumerate(zip(stages, settings), 1):
        for i in range(count):
            block = BlockShape(
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
    return NetworkShape(f"regnet_{arch}", tuple(input_hw), (stem,), tuple(blocks))


def _divisible(width: int, by: int) -> int:
    """The multiple of ``by`` nearest to ``width``, but not 10 % below it."""
    rounded = max(by, (width + by // 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded
