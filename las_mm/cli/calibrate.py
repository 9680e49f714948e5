"""Measure this machine so that latency can be predicted for it.

las_mm calibrate --device cpu

About 9 minutes; let nothing else run meanwhile. The device file goes to ~/.cache/las_mm/cpu.yaml
(or $LAS_MM_CACHE, or --out), where the name 'cpu' finds it:

las_mm predict configs/mask_rcnn_lasnet_r101.py --device cpu --rate 0.5

Interrupted (Ctrl-C), it goes on where it stopped when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from las_mm.cli.output import Output
from las_mm.errors import UserError, as_user_errors
from las_mm.fileio import write_atomically
from las_mm.latency.device import MEASURED
from las_mm.latency.measured.calibrate import (
    CASES,
    DTYPES,
    VISITS,
    Settings,
    calibrate,
    recorded_settings,
)
from las_mm.latency.measured.calibrated import POOR, calibration_path
from las_mm.latency.measured.fitting import FEWEST

INTERRUPTED = "; the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--device", choices=MEASURED, default="cpu", help="what to measure (default: cpu)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="of weights and features")
    add("--threads", type=int, help="torch's threads (default: torch's own number)")
    add("--out", type=Path, help="device file to write (default: in ~/.cache/las_mm)")
    add("--name", help="of the device in tables (default: --device)")
    add("--cases", type=int, default=CASES, help=f"blocks to measure, at least {FEWEST} ({CASES})")
    add("--visits", type=int, default=VISITS, help=f"times to come back to each ({VISITS})")
    add("--restart", action="store_true", help="forget an interrupted calibration")
    add("--refit", action="store_true", help="fit the last measurements anew, all of them")


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong in the arguments alone.

    Raises:
        UserError: Something is.
    """
    for option in ("threads", "cases", "visits"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be positive, got {value}")
    if args.cases < FEWEST:
        raise UserError(f"--cases must be at least {FEWEST}, got {args.cases}")
    if args.out is not None and args.out.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--out must end in .yaml or .yml, got {args.out}")


def run(args: argparse.Namespace) -> None:
    """Measure, fit and write.

    Raises:
        UserError: The device is not there, or a file cannot be used.
    """
    check_args(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or calibration_path(args.device)
    record = out.with_name(f"{out.stem}.measurements.jsonl")
    measured = out.with_name(f"{out.stem}.measured.jsonl")
    if args.restart:
        record.unlink(missing_ok=True)
    if args.refit:
        if not measured.is_file():
            raise UserError(f"--refit: there are no measurements at {measured}")
        record = measured
        try:
            settings = recorded_settings(record)
        except (ValueError, OSError) as error:
            raise UserError(f"--refit: {error}") from error
        torch.set_num_threads(settings.threads)
    else:
        threads = torch.get_num_threads()
        settings = Settings(args.device, args.dtype, threads, args.cases, args.visits)
    console = Output()
    console.say(
        f"{'Fitting' if args.refit else 'Measuring'} {settings.cases} blocks and some stems, "
        f"{settings.visits} visits each ({settings.threads} threads, {settings.dtype})"
        + (". " if args.refit else "; let nothing else run meanwhile. ")
        + f"Record: {record}"
    )
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if not console.is_terminal and 20 * done // total > shown:  # a log shows no bar
            shown = 20 * done // total
            console.say(f"{done} of {total}")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with as_user_errors(ValueError, RuntimeError, ImportError):
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("measuring")
            today = datetime.date.today().isoformat()
            device = calibrate(settings, record, args.name or args.device, today, show)
    write_atomically(out, device.to_yaml().encode())
    record.replace(measured)  # for --refit
    probes, accuracy = device.model.probes, device.accuracy
    table = Table(show_header=False)
    table.add_row(
        "peak",
        f"{2e-9 * probes.macs_per_s:.0f} GFLOP/s, one thread "
        f"{2e-9 * probes.macs_per_s_one:.0f} GFLOP/s",
    )
    levels = (f"{1e-9 * rate:.0f} GB/s at {size / 2**20:g} MiB" for size, rate in probes.bandwidth)
    table.add_row("bandwidth", ", ".join(list(levels)[::3]))
    table.add_row("a call", f"{1e6 * probes.call_s:.1f} us")
    table.add_row(
        "unseen blocks",
        f"{100 * accuracy['rmspe']:.1f} % RMS error, {100 * accuracy['within_10_percent']:.0f} % "
        f"within 10 %, rank correlation {accuracy['rank_correlation']:.4f}",
    )
    console.print(table)
    if accuracy["rmspe"] > POOR:
        console.say(
            f"[bold]This is a poor fit[/bold]: predictions are off by "
            f"{100 * accuracy['rmspe']:.0f} %. Calibrate again while nothing else runs, with the "
            "default --cases and --visits."
        )
    console.say(f"wrote {out}")
