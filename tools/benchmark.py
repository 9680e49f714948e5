#!/usr/bin/env python
"""Time a dynamic backbone against the best static engines of this machine.

python tools/benchmark.py configs/mask_rcnn_lasnet_r101.py --shape 1 3 800 1216 --rate 0.5 \\
    --masks blob --json benchmark.json

All engines have the same weights, input and threads and run in turns in one process. What they
compute is compared before anything is timed. --device cuda runs the engines of a GPU instead of
those of the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import Progress
from torch import nn

from las_mm import ops
from las_mm.benchmark import contest, cuda_engines, engines, masks, report, roofline
from las_mm.benchmark.subject import DTYPES, Candidate, Subject, load_candidate, make_subject
from las_mm.benchmark.whole_model import build_whole
from las_mm.fileio import write_atomically
from las_mm.models.flops import count_macs
from las_mm.preflight import Parser, UserError

ENGINES = {"cpu": engines.CPU, "cuda": cuda_engines.CUDA}


def known_engines(known: engines.EngineSet) -> str:
    """What ``--engines`` may be on one kind of device."""
    return ", ".join([*known.aliases, *known.builders])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    known = "; ".join(f"on {device}: {known_engines(e)}" for device, e in ENGINES.items())
    add = parser.add_argument
    add("config", help="a config with a dynamic backbone")
    add("--checkpoint", help="weights; without, they are random")
    add("--trust-checkpoint", action="store_true", help="see train.py")
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
    add("--mode", choices=("spatial", "channel", "layer", "both"), help="of all stages")
    add("--device", choices=tuple(ENGINES), default="cpu", help="where the engines run")
    add("--dtype", choices=tuple(DTYPES), default="fp32", help="fp16 on cuda only")
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
    add("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    add("--memory-child", help=argparse.SUPPRESS)  # the engine whose memory to measure
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.known = ENGINES[args.device]
    return args


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
    if args.json.is_dir():
        raise UserError(f"--json {args.json} is a folder; name a file")
    if args.plot is not None:
        if args.plot.suffix not in report.PLOT_SUFFIXES:
            known = ", ".join(report.PLOT_SUFFIXES)
            raise UserError(f"--plot must end in one of {known}, got {args.plot}")
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


def candidate_of(args: argparse.Namespace) -> Candidate:
    """The model that the arguments describe."""
    candidate = load_candidate(
        args.config,
        args.cfg_options,
        args.checkpoint,
        args.mode,
        args.granularity,
        args.trust_checkpoint,
        args.seed,
    )
    takes = candidate.backbone.network_shape(tuple(args.shape[2:])).channels
    if args.shape[1] != takes:
        raise UserError(f"--shape must have the {takes} channels of the model, got {args.shape}")
    return candidate


def make_input(args: argparse.Namespace, cfg: Config) -> torch.Tensor:
    """The batch of the contest: real images for ``--masks model``, else noise."""
    if args.masks == "model":
        images = masks.find_images(args.images, args.shape[0])
        return masks.load_images(images, tuple(args.shape[2:]), cfg)
    return torch.randn(args.shape, generator=torch.Generator().manual_seed(args.seed))


def build_subject(args: argparse.Namespace, candidate: Candidate, work_dir: str) -> Subject:
    """All forms of the candidate's backbone, and the input."""
    x = make_input(args, candidate.cfg)
    backbone, config = candidate.backbone, candidate.backbone_cfg
    work_dir = Path(work_dir)
    return make_subject(backbone, config, x, args.dtype, args.threads, work_dir, args.known.device)


def mask_setters(args: argparse.Namespace, backbone: nn.Module) -> list:
    """Per rate a function that sets the masks."""
    if args.masks == "model":
        return [partial(masks.release_masks, backbone)]
    setters = []
    for rate in args.rate:
        channel_rate = rate if args.channel_rate is None else args.channel_rate
        drawn = (
            masks.make_masks(backbone, args.shape, rate, args.masks, args.seed),
            masks.make_channel_masks(backbone, args.shape, channel_rate, args.seed),
        )
        offsets = [masks.make_offsets(made, args.known.device) for made in drawn]
        setters.append(partial(masks.set_offsets, backbone, *offsets))
    return setters


def time_whole(args: argparse.Namespace, candidate: Candidate, subject, rows, setter, say) -> dict:
    """Time the whole model with its static and with its dynamic backbone."""
    eager = [row for row in rows if row["engine"] in args.known.aliases["eager"]]
    nchw = eager and min(eager, key=lambda row: row["median_ms"])["engine"] == "eager-nchw"
    layout = torch.contiguous_format if nchw else torch.channels_last
    twin = engines.eager_twin(subject, layout)
    mode = "predict" if args.checkpoint else "tensor"
    pair = build_whole(candidate.model, candidate.path, twin, subject.x, setter, mode)
    contest.time_contestants(pair, args.rounds, args.warmup, say)
    static, dynamic = pair
    ratio = dynamic.median / static.median
    times = dict(static=report.times(static), dynamic=report.times(dynamic), latency_ratio=ratio)
    if not args.checkpoint:
        times["note"] = "random weights: the heads' time depends on random boxes; use --checkpoint"
    return times


def measure_memory(args: argparse.Namespace, say) -> dict[str, float]:
    """Peak memory of static eager mode and las_mm in MiB, each in a fresh process."""
    peaks = {}
    for name in ("eager-nhwc", "las_mm"):
        say(f"memory of {name}")
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            *args.argv,
            "--memory-child",
            name,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        found = re.search(r"^peak (\S+)$", done.stdout, re.MULTILINE)
        if done.returncode or found is None:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"measuring the memory of {name} failed: {reason}")
        peaks[name] = float(found[1])
    return peaks


def memory_child(args: argparse.Namespace) -> float:
    """Peak memory of one contestant, which is alone in this process."""
    with tempfile.TemporaryDirectory() as work_dir:
        candidate = candidate_of(args)
        subject = build_subject(args, candidate, work_dir)
        contestant = args.known.builders[args.memory_child](subject)
        if args.memory_child == "las_mm":
            contestant.prepare = mask_setters(args, candidate.backbone)[0]
        del candidate, subject
        return args.known.peak_memory(contestant)


def benchmark(args: argparse.Namespace, say) -> dict:
    """Everything between the arguments and the report."""
    say("building the model")
    candidate, known = candidate_of(args), args.known
    with tempfile.TemporaryDirectory() as work_dir:
        subject = build_subject(args, candidate, work_dir)
        setters = mask_setters(args, subject.dynamic)
        asked = (args.engines, args.explicit)
        dynamic = engines.enter_dynamic(subject, setters, say, *asked, known)
        contestants, skipped = engines.enter_static(subject, *asked, say, known)
        if "masked-dense" in args.engines:
            contestants.append(dynamic.reference)
        everybody = [*contestants, *dynamic.contestants]
        contest.time_contestants(everybody, args.rounds, args.warmup, say, known.timer)
    shape = subject.dynamic.network_shape(tuple(args.shape[2:]))
    counts = count_macs(shape)
    macs = args.shape[0] * (counts.stem + counts.static_blocks.sum())
    best = report.best_static(contestants)
    rates = args.rate or [dynamic.points[0].mean_rate]
    sweep = [
        dict(
            report.compare(point.fastest, best, point.flops_ratio),
            rate=rate,
            activation_rate=point.mean_rate,
            channel_rate=point.mean_rate_channel,
            rel_error=point.fastest.rel_error,
        )
        for rate, point in zip(rates, dynamic.points)
    ]
    first = {
        key: sweep[0][key] for key in ("dynamic", "flops_ratio", "latency_ratio", "efficiency")
    }
    result = dict(
        rows=report.make_rows([*contestants, *dynamic.points[0].contestants], macs),
        best_static=dict(engine=best.engine, median_ms=1e3 * best.median),
        **first,
        sweep=sweep,
        skipped=[*skipped, *dynamic.skipped],
        device=known.describe(),
        environment=report.environment(
            what=shape.name,
            config=args.config,
            checkpoint=args.checkpoint,
            cfg_options=args.cfg_options,
            shape=args.shape,
            dtype=args.dtype,
            threads=args.threads,
            masks=args.masks,
            rate=rates[0],
            channel_rate=args.channel_rate,
            mode=sorted({block.mode for block in shape.blocks}),
            granularity=subject.dynamic.granularity,
            static_gmacs=macs / 1e9,
            rounds=args.rounds,
            warmup=args.warmup,
            seed=args.seed,
        ),
    )
    known_kernels = not any(block.has_channels for block in shape.blocks)
    if args.device == "cuda" and known_kernels:  # no floor of a CPU is known
        activations = [point.activation for point in dynamic.points]
        roofline.annotate(result, shape, activations)
    if args.whole_model:
        rows = result["rows"]
        result["whole_model"] = time_whole(args, candidate, subject, rows, setters[0], say)
    if args.memory:
        result["peak_memory_mb"] = measure_memory(args, say)
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.disable(logging.INFO)  # what every layer's initialisation is, and the like
    warnings.simplefilter("ignore")  # exporters', about their own internals
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log's lines may be longer than 80 characters
    try:
        check_args(args)
        if args.images is not None:
            masks.find_images(args.images, args.shape[0])
        torch.set_num_threads(args.threads)
        if args.memory_child is not None:
            print(f"peak {memory_child(args)}")
            return
        # No refreshing in the background, which would take time from the contestants.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=None)
            result = benchmark(
                args, lambda text: progress.update(task, description=text, refresh=True)
            )
        write_atomically(args.json, json.dumps(result, indent=2, default=str).encode())
        if args.plot is not None:
            report.draw(result, args.plot)
    except (UserError, OSError) as error:
        sys.exit(f"benchmark.py: error: {error}")
    console.print(report.make_table(result))
    for line in report.summary(result):
        console.print(line, highlight=False, soft_wrap=True)
    written = f"wrote {args.json}" + (f" and {args.plot}" if args.plot else "")
    console.print(written, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
