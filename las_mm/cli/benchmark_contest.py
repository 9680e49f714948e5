"""From the arguments of ``las_mm benchmark`` to its result."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from las_mm import drawn_masks as masks
from las_mm.benchmark import contest, engines, report, roofline, static_engines
from las_mm.benchmark.subject import Candidate, Subject, load_candidate, make_subject
from las_mm.benchmark.whole_model import build_whole
from las_mm.errors import UserError
from las_mm.models.flops import count_macs


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
        tokens = (backbone, args.shape, rate, args.masks, args.seed)
        setters.append(partial(_set, (backbone, *offsets), tokens))
    return setters


def _set(offsets: tuple, tokens: tuple) -> None:
    masks.set_offsets(*offsets)
    masks.force_tokens(*tokens)


def time_whole(args: argparse.Namespace, candidate: Candidate, subject, rows, setter, say) -> dict:
    """Time the whole model with its static and with its dynamic backbone."""
    eager = [row for row in rows if row["engine"] in args.known.aliases["eager"]]
    nchw = eager and min(eager, key=lambda row: row["median_ms"])["engine"] == "eager-nchw"
    layout = torch.contiguous_format if nchw else torch.channels_last
    twin = static_engines.eager_twin(subject, layout)
    mode = "predict" if args.checkpoint else "tensor"
    pair = build_whole(candidate.model, candidate.path, twin, subject.x, setter, mode)
    contest.time_contestants(pair, args.rounds, args.warmup, say)
    static, dynamic = pair
    ratio = dynamic.median / static.median
    times = dict(static=report.times(static), dynamic=report.times(dynamic), latency_ratio=ratio)
    if not args.checkpoint:
        times["note"] = (
            "random weights: both forms get the same boxes, as many as the heads take, and no "
            "post-processing; use --checkpoint for those of your images"
        )
    return times


def measure_memory(args: argparse.Namespace, say) -> dict[str, float]:
    """Peak memory of static eager mode and las_mm in MiB, each in a fresh process."""
    peaks = {}
    for name in ("eager-nhwc", "las_mm"):
        say(f"memory of {name}")
        command = [sys.executable, "-m", "las_mm", "benchmark", *args.argv, "--memory-child", name]
        done = subprocess.run(command, capture_output=True, text=True)
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
    best = report.best_static(contestants, args.dtype)
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
        rows=report.make_rows([*contestants, *dynamic.points[0].contestants], macs, best),
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
