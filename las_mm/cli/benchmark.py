"""Time a dynamic backbone against the best static engines of this machine.

las_mm benchmark configs/mask_rcnn_lasnet_r101.py --shape 1 3 800 1216 --rate 0.5 --masks blob \\
    --json benchmark.json

All engines have the same weights, input and threads and run in turns in one process. What they
compute is compared before anything is timed. --device cuda runs the engines of a GPU instead of
those of the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
from rich.progress import Progress

from las_mm import drawn_masks as masks
from las_mm import ops
from las_mm.benchmark import cuda_engines, engines, report
from las_mm.benchmark.subject import DTYPES
from las_mm.cli.benchmark_contest import benchmark, memory_child
from las_mm.cli.output import Output
from las_mm.cli.parser import add_cfg_options, add_trust, check_files, check_picture
from las_mm.errors import UserError
from las_mm.fileio import write_atomically

ENGINES = {"cpu": engines.CPU, "cuda": cuda_engines.CUDA}


def known_engines(known: engines.EngineSet) -> str:
    """What ``--engines`` may be on one kind of device."""
    return ", ".join([*known.aliases, *known.builders])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    known = "; ".join(f"on {device}: {known_engines(e)}" for device, e in ENGINES.items())
    add = parser.add_argument
    add("config", help="a config with a dynamic backbone")
    add("--checkpoint", help="weights; without, they are random")
    add("--shape", type=int, nargs=4, required=True, metavar=("N", "C", "H", "W"))
    add(
        "--rate",
        type=float,
        nargs="+",
        help="share of patches (layer mode: blocks, channel mode: channels) to compute",
    )
    add("--channel-rate", type=float, help="share of channels in mode both; default: --rate")
    add("--masks", choices=masks.KINDS, default="blob", help="'model': its own, on --images")
    add("--granularity", type=int, nargs="+", help="patch side S per stage instead of the config's")
    modes = ("spatial", "channel", "layer", "both", "token", "head", "all")
    add("--mode", choices=modes, help="of all stages; the last three of transformers")
    add("--device", choices=tuple(ENGINES), default="cpu", help="where the engines run")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="fp32",
        help="fp16 on cuda only; int8, on cpu only: against quantised engines, las_mm in fp32",
    )
    add("--engines", nargs="*", help=f"default: all; las_mm always runs; {known}")
    add("--threads", type=int, help="default: the physical cores that this process may use")
    add("--rounds", type=int, default=9, help="timed rounds")
    add("--warmup", type=int, default=2, help="untimed rounds before them")
    add("--images", nargs="+", help="images or folders of images for --masks model")
    add("--seed", type=int, default=0, help="of random weights, input and masks")
    add("--plot", type=Path, help="also draw latency over FLOPs and rate into this file")
    add("--whole-model", action="store_true", help="also time the whole model in eager mode")
    add("--memory", action="store_true", help="also measure peak memory in processes of their own")
    add("--json", type=Path, required=True, help="the result for programs")
    add_trust(parser)
    add_cfg_options(parser)
    add("--memory-child", help=argparse.SUPPRESS)  # the engine whose memory to measure


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong in the arguments alone; fills in defaults.

    Raises:
        UserError: Something is.
    """
    if min(args.shape) < 1:
        raise UserError(f"--shape must be N C H W, all positive, got {args.shape}")
    if args.masks == "model" and args.shape[1] != 3:
        raise UserError(f"--masks model reads images, which have 3 channels: got {args.shape}")
    for rate in args.rate or ():
        if not 0 <= rate <= 1:
            raise UserError(f"--rate must be from 0 to 1, got {rate}")
    if args.channel_rate is not None and not 0 <= args.channel_rate <= 1:
        raise UserError(f"--channel-rate must be from 0 to 1, got {args.channel_rate}")
    if args.masks == "model":
        if args.checkpoint is None:
            raise UserError("--masks model needs --checkpoint: random weights decide nothing")
        if args.images is None:
            raise UserError("--masks model needs --images, on which the model decides")
        if args.rate:
            raise UserError("--masks model has its own rate: leave out --rate")
    elif args.rate is None:
        raise UserError(f"--masks {args.masks} needs --rate, e.g. --rate 0.5")
    elif args.images is not None:
        raise UserError(f"--images are for --masks model, got --masks {args.masks}")
    granularity = args.granularity
    if granularity is not None and (len(granularity) != 4 or min(granularity) < 1):
        raise UserError(f"--granularity must be four positive integers, got {granularity}")
    for name, least in (("threads", 1), ("rounds", 1), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    args.threads = args.threads or report.physical_cores()
    if args.dtype not in args.known.dtypes:
        known = ", ".join(args.known.dtypes)
        raise UserError(f"--dtype on {args.device} must be one of {known}, got {args.dtype}")
    check_engines(args)
    check_files(args, "json")
    check_picture("--plot", args.plot, report.PLOT_SUFFIXES)
    if args.plot is not None:
        report.require_matplotlib()
    if args.whole_model and (args.dtype, args.device) != ("fp32", "cpu"):
        raise UserError(
            f"--whole-model needs --dtype fp32 on --device cpu, got {args.dtype} on {args.device}"
        )
    args.known.check(args.dtype)
    if args.mode in ("channel", "both") and not ops.has_channel_kernels(args.known.device):
        raise UserError(
            f"--mode {args.mode} needs the kernels that skip channels on {args.device}, which are "
            "not built: FORCE_CUDA=1 pip install -e . --no-build-isolation"
        )


def check_engines(args: argparse.Namespace) -> None:
    """Spell out ``--engines`` in the order of the table; ``explicit`` are those asked for by name.

    Raises:
        UserError: One is unknown, or there is no rival.
    """
    known, usual = args.known, args.known.names(args.dtype)
    asked: set[str] = set()
    for name in args.engines or ():
        if name in known.aliases:
            asked |= {member for member in known.aliases[name] if member in usual}
        elif name in known.builders:
            asked.add(name)
        else:
            raise UserError(f"--engines knows {known_engines(known)}, got {name!r}")
    args.explicit = asked
    asked = {*asked, known.dynamic[0]} if asked else set(usual)
    if not asked & set(known.static):
        rivals = ", ".join(known.static)
        raise UserError(f"--engines needs a static engine to compare with ({rivals})")
    args.engines = [name for name in known.builders if name in asked]


def run(args: argparse.Namespace) -> None:
    """Time, print, write.

    Raises:
        UserError: An argument is wrong, or an engine computes something else.
    """
    args.known = ENGINES[args.device]
    logging.disable(logging.INFO)  # what every layer's initialisation is, and the like
    warnings.simplefilter("ignore")  # exporters', about their own internals
    check_args(args)
    if args.images is not None:
        masks.find_images(args.images, args.shape[0])
    torch.set_num_threads(args.threads)
    if args.memory_child is not None:
        print(f"peak {memory_child(args)}")
        return
    output = Output()
    # No refreshing in the background, which would take time from the contestants.
    with Progress(console=output, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=None)
        result = benchmark(args, lambda text: progress.update(task, description=text, refresh=True))
    write_atomically(args.json, json.dumps(result, indent=2, default=str).encode())
    if args.plot is not None:
        report.draw(result, args.plot)
    output.print(report.make_table(result))
    for line in report.summary(result):
        output.say(line)
    output.say(f"wrote {args.json}" + (f" and {args.plot}" if args.plot else ""))
