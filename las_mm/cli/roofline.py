"""Print how fast GPUs could run a dynamic ResNet at best; needs no GPU.

las_mm roofline --shape 1 3 800 1344 --rate 0.5 --dtype fp16

Per stage: bytes to and from device memory, FLOPs, and the roofline floor in milliseconds at the
given rate / of the static network; see las_mm/benchmark/roofline.py for what is counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from las_mm import drawn_masks as masks
from las_mm.benchmark import roofline
from las_mm.benchmark.roofline import BYTES, GPUS, Kernel
from las_mm.cli.output import Output
from las_mm.errors import UserError, as_user_errors
from las_mm.network import MODES, resnet_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--shape", type=int, nargs=4, required=True, metavar=("N", "3", "H", "W"))
    add("--rate", type=float, required=True, help="share of patches (layer mode: blocks) kept")
    add("--dtype", choices=tuple(BYTES), default="fp32")
    add("--depth", type=int, default=101, help="50, 101 or 152")
    add("--mode", choices=MODES, default="spatial", help="of all stages")
    add("--granularity", type=int, nargs=4, default=(4, 4, 2, 1), help="patch side S per stage")
    add("--masks", choices=("blob", "random"), default="blob", help="decides how much conv1 does")
    add("--seed", type=int, default=0, help="of the masks")


def make_table(dynamic: Sequence[Kernel], static: Sequence[Kernel], dtype: str) -> Table:
    """One row per stage, and their sum."""
    table = Table()
    for column in ("", "MB", "GFLOP", *(f"{gpu.name} ms" for gpu in GPUS)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def add_row(name: str, *pair: Sequence[Kernel]) -> None:
        def cell(values: Sequence[float | None], digits: int) -> str:
            return " / ".join("-" if v is None else f"{v:.{digits}f}" for v in values)

        table.add_row(
            name,
            cell([1e-6 * sum(k.bytes for k in kernels) for kernels in pair], 0),
            cell([1e-9 * sum(k.flops for k in kernels) for kernels in pair], 1),
            *(cell([roofline.floor_ms(k, gpu, dtype) for k in pair], 2) for gpu in GPUS),
        )

    for stage in sorted({kernel.stage for kernel in static}):
        pair = ([k for k in kernels if k.stage == stage] for kernels in (dynamic, static))
        add_row(f"stage {stage}" if stage else "stem", *pair)
    table.add_section()
    add_row("total", dynamic, static)
    return table


def run(args: argparse.Namespace) -> None:
    """Count and print.

    Raises:
        UserError: An argument is wrong.
    """
    if min(args.shape) < 1 or args.shape[1] != 3:
        raise UserError(f"--shape must be N 3 H W, all positive, got {args.shape}")
    if not 0 <= args.rate <= 1:
        raise UserError(f"--rate must be from 0 to 1, got {args.rate}")
    batch, _, height, width = args.shape
    with as_user_errors(ValueError):
        shape = resnet_shape(args.depth, (height, width), args.mode, args.granularity)
    if shape.blocks[-1].has_channels:
        raise UserError(
            f"--mode {args.mode}: no floor is known for blocks that skip channels, as how much "
            "they read depends on each image's choice; use --mode spatial, layer or static"
        )
    drawn = masks.draw_masks(shape.blocks, batch, args.rate, args.masks, args.seed)
    shares = roofline.mask_shares(shape.blocks, drawn)
    dynamic = roofline.network_kernels(shape, batch, args.dtype, *shares)
    static = roofline.network_kernels(shape, batch, args.dtype)
    table = make_table(dynamic, static, args.dtype)
    size = " x ".join(map(str, args.shape))
    table.title = f"{shape.name}, {size}, {args.dtype}: rate {args.rate:g} / static"
    output = Output()
    output.print(table)
    kept, read = (sum(share) / len(share) for share in shares)
    output.say(
        f"{args.masks} masks: mean over the blocks of kept outputs {kept:.3f}, of conv1's outputs "
        f"that these read {read:.3f}"
    )
