#!/usr/bin/env python
"""Print how fast GPUs could run a dynamic ResNet at best; needs no GPU.

python tools/roofline.py --shape 1 3 800 1344 --rate 0.5 --dtype fp16

Per stage: bytes to and from device memory, FLOPs, and the roofline floor in milliseconds at the
given rate / of the static network; see las_mm/benchmark/roofline.py for what is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from las_mm.benchmark import masks, roofline
from las_mm.benchmark.roofline import BYTES, GPUS, Kernel
from las_mm.network import MODES, resnet_shape


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--shape", type=int, nargs=4, required=True, metavar=("N", "3", "H", "W"))
    add("--rate", type=float, required=True, help="share of patches (layer mode: blocks) kept")
    add("--dtype", choices=tuple(BYTES), default="fp32")
    add("--depth", type=int, default=101, help="50, 101 or 152")
    add("--mode", choices=MODES, default="spatial", help="of all stages")
    add("--granularity", type=int, nargs=4, default=(4, 4, 2, 1), help="patch side S per stage")
    add("--masks", choices=("blob", "random"), default="blob", help="decides how much conv1 does")
    add("--seed", type=int, default=0, help="of the masks")
    args = parser.parse_args(argv)
    if min(args.shape) < 1 or args.shape[1] != 3:
        parser.error(f"--shape must be N 3 H W, all positive, got {args.shape}")
    if not 0 <= args.rate <= 1:
        parser.error(f"--rate must be from 0 to 1, got {args.rate}")
    return args


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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    batch, _, height, width = args.shape
    try:
        shape = resnet_shape(args.depth, (height, width), args.mode, args.granularity)
    except ValueError as error:
        sys.exit(f"roofline.py: error: {error}")
    if shape.blocks[-1].has_channels:
        sys.exit(
            f"roofline.py: error: --mode {args.mode}: no floor is known for blocks that skip "
            "channels, as how much they read depends on each image's choice; use --mode spatial, "
            "layer or static"
        )
    drawn = masks.draw_masks(shape.blocks, batch, args.rate, args.masks, args.seed)
    shares = roofline.mask_shares(shape.blocks, drawn)
    dynamic = roofline.network_kernels(shape, batch, args.dtype, *shares)
    static = roofline.network_kernels(shape, batch, args.dtype)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log's lines may be longer than 80 characters
    table = make_table(dynamic, static, args.dtype)
    size = " x ".join(map(str, args.shape))
    table.title = f"{shape.name}, {size}, {args.dtype}: rate {args.rate:g} / static"
    console.print(table)
    kept, read = (sum(share) / len(share) for share in shares)
    console.print(
        f"{args.masks} masks: mean over the blocks of kept outputs {kept:.3f}, of conv1's outputs "
        f"that these read {read:.3f}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
