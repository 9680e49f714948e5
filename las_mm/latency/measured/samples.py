"""Blocks to measure: drawn from the families of networks that people use.

Widths are those of the published architectures: ResNet (arXiv 1512.03385) with its usual and half
its channels, RegNetX and RegNetY (arXiv 2003.13678) from 400 MF to 8 GF. Everything else is drawn:
input size, batch, mode, patch side, channels per decision, rates, coherent or scattered masks.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from las_mm.network.architectures import ARCHS, SE_RATIO, regnet_stages
from las_mm.network.bottleneck import BottleneckShape
from las_mm.network.operator import Conv

_RESNET_WIDTHS = ((64, 128, 256, 512), (32, 64, 128, 256))
_REGNET_STEM = 32
_BATCHES = (1, 1, 1, 2, 3, 4, 6, 8)
_MODES = ("static", "static", "spatial", "spatial", "spatial", "layer", "channel", "both")
_CHANNEL_GRANULARITIES = (1, 2, 2, 4)
_SMALLEST_INPUT, _LARGEST_INPUT, _INPUT_STEP = 224, 1344, 32
_LARGEST_GRANULARITY = 14
_FEWEST_MACS = 2e6


@dataclass(frozen=True)
class Case:
    """A block in a situation.

    Attributes:
        block: Its shape; the family is its name.
        batch: Images.
        rate: Wanted activation rate; masks of few patches come as near as they can.
        channel_rate: Wanted share of channels.
        masks: ``'blob'`` or ``'random'``, see :mod:`las_mm.drawn_masks`.
        seed: Of the masks.
    """

    block: BottleneckShape
    batch: int
    rate: float
    channel_rate: float = 1.0
    masks: str = "blob"
    seed: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates with everything computed."""
        b = self.block
        per_output = 9 * b.width * b.width // b.groups + b.width * b.c_out
        if b.downsample:
            per_output += b.c_in * b.c_out
        hidden = b.h_mid * b.w_mid * b.c_in * b.width
        return self.batch * (hidden + b.h_out * b.w_out * per_output)


@dataclass(frozen=True)
class StemCase:
    """A stem: a convolution and, in a ResNet, its max-pooling."""

    conv: Conv
    pool: bool
    batch: int


def draw_cases(
    seed: int, most_macs: float, exclude: Collection[tuple[BottleneckShape, int]] = ()
) -> Iterator[Case]:
    """Cases without end, the same for the same seed.

    Args:
        seed: Of the drawing.
        most_macs: Multiply-accumulates of the largest case; a limit on its time.
        exclude: (block, batch) that are not to come.
    """
    rng = random.Random(seed)
    unwanted = set(exclude)
    while True:
        case = _draw(rng)
        if case is None or not _FEWEST_MACS <= case.macs <= most_macs:
            continue
        if (case.block, case.batch) not in unwanted:
            unwanted.add((case.block, case.batch))
            yield case


def _draw(rng: random.Random) -> Case | None:
    height = _input_side(rng)
    width = height if rng.random() < 0.5 else _input_side(rng)
    stage = rng.randrange(4)
    family = rng.choice(("resnet", "resnet", "regnet"))
    first = rng.random() < 0.25
    if family == "resnet":
        widths = rng.choice(_RESNET_WIDTHS)
        inner, c_out, groups = widths[stage], 4 * widths[stage], 1
        c_before = widths[0] if stage == 0 else 2 * inner
        stride = 2 if first and stage else 1
    else:
        arch = rng.choice(sorted(ARCHS))
        stages = regnet_stages(arch)
        _, inner, per_group = stages[stage]
        c_out, groups = inner, inner // per_group
        c_before = stages[stage - 1][1] if stage else _REGNET_STEM
        stride = 2 if first else 1
        family = f"regnet{arch[0]}"
    reduction = 4 * 2**stage // stride  # of the block's input
    if family != "resnet" and stage == 0 and first:
        reduction = 2
    h_in, w_in = -(-height // reduction), -(-width // reduction)
    batch = rng.choice(_BATCHES)
    mode = rng.choice(_MODES)
    granularity = rng.randint(1, _LARGEST_GRANULARITY)
    if mode in ("spatial", "both") and granularity > max(-(-h_in // stride), -(-w_in // stride)):
        return None  # all of the map in one patch: that is layer skipping
    rate = rng.choice((0.0, 1.0)) if rng.random() < 0.1 else rng.random()
    channel_rate = rng.uniform(0.1, 1.0)
    channels = mode in ("channel", "both")
    c_in = c_before if first else c_out
    block = BottleneckShape(
        name=family,
        stage=stage + 1,
        mode=mode,
        granularity=granularity if mode in ("spatial", "both") else 0,
        c_in=c_in,
        width=inner,
        c_out=c_out,
        h_in=h_in,
        w_in=w_in,
        stride=stride,
        groups=groups,
        downsample=first,
        channel_granularity=rng.choice(_CHANNEL_GRANULARITIES) if channels else 1,
        channel_masker_layers=rng.choice((1, 2)) if channels else 2,
        se_width=round(SE_RATIO * c_in) if family == "regnety" else 0,
    )
    return Case(
        block=block,
        batch=batch,
        rate=rate if block.decides_positions else 1.0,
        channel_rate=channel_rate if channels else 1.0,
        masks=rng.choice(("blob", "blob", "random")),
        seed=rng.randrange(2**31),
    )


def _input_side(rng: random.Random) -> int:
    # Small inputs are as frequent as large ones.
    side = _SMALLEST_INPUT * (_LARGEST_INPUT / _SMALLEST_INPUT) ** rng.random()
    return round(side / _INPUT_STEP) * _INPUT_STEP


def stem_cases() -> list[StemCase]:
    """Stems at sizes and batches that span the usual ones."""
    cases = []
    for side, batch in ((224, 1), (224, 3), (224, 8), (448, 1), (640, 2), (896, 1), (1120, 1)):
        half = -(-side // 2)
        for channels, kernel, pool in ((64, 7, True), (32, 7, True), (_REGNET_STEM, 3, False)):
            conv = Conv("stem", 3, channels, kernel, 2, 1, half, half)
            cases.append(StemCase(conv, pool, batch))
    return cases
