"""What a benchmark found, as JSON for programs, a table and a plot for people."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.table import Table

from las_mm.benchmark.contest import Contestant
from las_mm.errors import UserError
from las_mm.version import __version__

PLOT_SUFFIXES = (".png", ".pdf", ".svg", ".jpg")


def require_matplotlib() -> None:
    """Raise a :class:`UserError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--plot needs matplotlib, which is not installed: pip install las_mm[benchmark]"
        )


def physical_cores() -> int:
    """Cores that this process may use, hardware threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(topology.read_text().strip() if topology.is_file() else str(cpu))
    return len(cores)


def cpu_name() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(**settings: object) -> dict:
    """Machine, versions and date, with the benchmark's own settings."""
    return dict(
        cpu=cpu_name(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=_version("onnxruntime"),
        openvino=_version("openvino"),
        las_mm=__version__,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **settings,
    )


def times(contestant: Contestant) -> dict:
    """A contestant's times in milliseconds."""
    return dict(
        engine=contestant.engine,
        median_ms=1e3 * contestant.median,
        min_ms=1e3 * contestant.fastest,
        rounds_ms=[1e3 * seconds for seconds in contestant.rounds],
    )


def compare(dynamic: Contestant, best: Contestant, flops_ratio: float) -> dict:
    """The dynamic network against the best static engine.

    ``latency_ratio`` is dynamic over static time; ``efficiency`` the share of the saving in FLOPs
    that arrives as a saving in time: flops_ratio / latency_ratio.
    """
    ratio = dynamic.median / best.median
    return dict(
        dynamic=times(dynamic),
        flops_ratio=flops_ratio,
        latency_ratio=ratio,
        efficiency=flops_ratio / ratio,
    )


def rivals(contestants: Sequence[Contestant], dtype: str) -> list[Contestant]:
    """The static engines that the dynamic network is compared with: for int8 the quantised ones."""
    static = (c for c in contestants if c.kind == "static")
    return [c for c in static if (c.precision == "int8") == (dtype == "int8")]


def best_static(contestants: Sequence[Contestant], dtype: str) -> Contestant:
    """The static engine with the smallest median."""
    return min(rivals(contestants, dtype), key=lambda c: c.median)


def make_rows(
    contestants: Sequence[Contestant], static_macs: float, best: Contestant
) -> list[dict]:
    """One JSON row per contestant, beginning with the static engines.

    Args:
        contestants: All timed.
        static_macs: Multiply-accumulates of the static network for the whole batch.
        best: The fastest static engine, whose time is the 1.
    """
    rows = []
    for contestant in contestants:
        dense = contestant.kind == "static" or contestant.engine.startswith("las_mm-static")
        rate = 2e-9 * static_macs / contestant.median if dense else None
        rows.append(
            dict(
                times(contestant),
                kind=contestant.kind,
                precision=contestant.precision,
                ratio=contestant.median / best.median,
                gflops_per_s=rate,
                rel_error=contestant.rel_error,
                note=contestant.note,
            )
        )
    return rows


def _machine(result: dict) -> str:
    """Where the engines ran, for a title."""
    device = result["device"]
    if device["type"] == "cpu":
        return f"{result['environment']['threads']} threads"
    return device["name"]


def make_table(result: dict) -> Table:
    """The rows of a result and the engines that did not run, for a terminal."""
    env = result["environment"]
    shape = " x ".join(map(str, env["shape"]))
    table = Table(title=f"{env['what']}, {shape}, {env['dtype']}, {_machine(result)}")
    mixed = env["dtype"] == "int8"  # las_mm multiplies in fp32 beside int8; else the title says it
    for column in ("engine", "kind", *(["precision"] if mixed else [])):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "min ms", "to best static", "GFLOP/s", "rel. error"):
        table.add_column(column, justify="right", no_wrap=True)
    floor = result.get("roofline", {}).get("gpu")
    if floor:
        table.add_column(f"floor ms ({floor})", justify="right", no_wrap=True)
    table.add_column("note")
    for row in result["rows"]:
        error, speed = row["rel_error"], row["gflops_per_s"]
        floors = [_milliseconds(row["floor_ms"])] if floor else []
        table.add_row(
            row["engine"],
            row["kind"],
            *([row["precision"]] if mixed else []),
            f"{row['median_ms']:.2f}",
            f"{row['min_ms']:.2f}",
            f"{row['ratio']:.3f}",
            "" if speed is None else f"{speed:.0f}",
            "" if error is None else f"{error:.1e}",
            *floors,
            row["note"],
        )
    for entry in result["skipped"]:
        blanks = [""] * (len(table.columns) - 3)
        table.add_row(entry["engine"], "skipped", *blanks, entry["reason"])
    return table


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _floors(what: str, count: dict) -> str:
    """The floors of one network on all GPUs, in the benchmark's own precision."""
    (precision, floors), *_ = count["floor_ms"].items()
    known = ", ".join(f"{gpu} {ms:.2f}" for gpu, ms in floors.items() if ms is not None)
    return f"roofline floor, {what}, {precision}, ms: {known}"


def summary(result: dict) -> list[str]:
    """The lines below the table."""
    best = result["best_static"]
    lines = [f"best static: {best['engine']}, {best['median_ms']:.2f} ms"]
    for point in result["sweep"]:
        lines.append(
            f"rate {point['rate']:.3f}: las_mm {point['dynamic']['median_ms']:.2f} ms, "
            f"FLOPs ratio {point['flops_ratio']:.3f}, latency ratio {point['latency_ratio']:.3f}, "
            f"efficiency {point['efficiency']:.3f}"
        )
    if "roofline" in result:
        lines.append(_floors("static", result["roofline"]["static"]))
        for count in result["roofline"]["sweep"]:
            lines.append(_floors(f"rate {count['rate']:.3f}", count))
    if "whole_model" in result:
        whole = result["whole_model"]
        lines.append(
            f"whole model: static eager {whole['static']['median_ms']:.2f} ms, "
            f"las_mm {whole['dynamic']['median_ms']:.2f} ms, ratio {whole['latency_ratio']:.3f}"
        )
        if "note" in whole:
            lines.append(f"({whole['note']})")
    if "peak_memory_mb" in result:
        peaks = (f"{name} {peak:.0f} MiB" for name, peak in result["peak_memory_mb"].items())
        lines.append(f"peak memory: {', '.join(peaks)}")
    return lines


def draw(result: dict, path: Path) -> None:
    """Latency ratio over FLOPs ratio, and both over the rate."""
    from matplotlib.figure import Figure

    points = sorted(result["sweep"], key=lambda point: point["rate"])
    rates, flops, latency = (
        [point[key] for point in points] for key in ("rate", "flops_ratio", "latency_ratio")
    )
    env, best = result["environment"], result["best_static"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    top = 1.05 * max(1.0, *latency, *flops)
    left.plot([0, 1], [0, 1], "--", color="grey", label="saves as much time as FLOPs")
    left.plot(flops, latency, "o-", label="las_mm")
    left.set_xlabel("FLOPs, dynamic / static")
    right.plot(rates, latency, "o-", label="latency ratio")
    right.plot(rates, flops, "s--", color="grey", label="FLOPs ratio")
    right.set_xlabel(f"activation rate ({env['masks']} masks)")
    for axes in (left, right):
        axes.axhline(1, color="C3", linewidth=1, label=f"best static engine ({best['engine']})")
        axes.set(ylim=(0, top), xlim=(0, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    left.set_ylabel("latency, dynamic / best static")
    shape = " x ".join(map(str, env["shape"]))
    figure.suptitle(
        f"{env['what']}, {shape}, {env['dtype']}, {_machine(result)}"
        + (f", {env['cpu']}" if result["device"]["type"] == "cpu" else "")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
