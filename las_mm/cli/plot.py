"""Draw the curves of trainings.

las_mm plot work_dirs/demo [--out curves.png]

Losses, FLOPs ratio with activation rates, and predicted latency, from the JSON logs of one or more
work folders (several are drawn over each other, to compare runs).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from las_mm.cli.output import SUFFIXES, new_figure, save
from las_mm.cli.parser import check_picture
from las_mm.errors import UserError

Curves = dict[str, list[tuple[float, float]]]


def read_logs(work_dir: Path) -> Curves:
    """All scalars of a work folder's runs, {key: [(iteration, value), ...]}, resumed runs joined.

    Raises:
        UserError: There is no log.
    """
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    points: dict[str, dict[int, float]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a killed run's last line
                continue
            if "loss" not in entry:
                continue
            for key, value in entry.items():
                points.setdefault(key, {})[entry["step"]] = value
    if not points:
        raise UserError(f"no training log in {work_dir} (*/vis_data/scalars.json)")
    return {key: sorted(values.items()) for key, values in points.items()}


def draw(runs: dict[str, Curves], out: Path) -> None:
    """One row of three panels."""
    figure = new_figure((15, 4))
    losses, rates, latency = figure.subplots(1, 3)
    ratio = latency.twinx()
    ratio.set_ylabel("ratio to the static network", color="C0")
    ratio.set_ylim(0, 1.6)
    styles = ("-", "--", ":", "-.")
    for style, (name, curves) in zip(styles * len(runs), runs.items()):
        prefix = f"{name}: " if len(runs) > 1 else ""
        keys = [key for key in curves if key.startswith("loss") and "budget" not in key]
        for colour, key in enumerate(sorted(keys, key=lambda k: (k != "loss", k))):
            losses.plot(*zip(*curves[key]), style, color=f"C{colour}", label=prefix + key)
        for colour, key in enumerate(k for k in curves if k.startswith("activation_rate")):
            label = prefix + key.replace("activation_rate", "rate").replace("_", " ")
            rates.plot(*zip(*curves[key]), style, color=f"C{colour + 1}", alpha=0.6, label=label)
        for key, axes in (("flops_ratio", rates), ("latency_ms", latency)):
            if key in curves:
                label = prefix + key.replace("_", " ")
                axes.plot(*zip(*curves[key]), style, color="black", linewidth=2, label=label)
        if "static_latency_ms" in curves:
            label = prefix + "static latency ms"
            latency.plot(*zip(*curves["static_latency_ms"]), style, color="C3", label=label)
            # Input sizes differ from batch to batch: the ratio is what training moves.
            ratio.plot(*zip(*curves["latency_ratio"]), style, color="C0", alpha=0.8)
            latency.plot([], [], style, color="C0", label=prefix + "ratio (right)")
    losses.set(title="losses", yscale="log")
    rates.set(title="FLOPs ratio and activation rates", ylim=(0, 1.05))
    latency.set(title="predicted latency", ylabel="ms per image")
    latency.set_ylim(bottom=0)
    for axes in (losses, rates, latency):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small", framealpha=0.5)
    save(figure, out)


def describe(name: str, curves: Curves) -> str:
    """One line: where the run began and where it ended."""
    parts = [f"loss {curves['loss'][0][1]:.3f} -> {curves['loss'][-1][1]:.3f}"]
    if "flops_ratio" in curves:
        first, last = curves["flops_ratio"][0][1], curves["flops_ratio"][-1][1]
        parts.append(f"FLOPs ratio {first:.3f} -> {last:.3f}")
    if "latency_ms" in curves:
        first, last = curves["latency_ms"][0][1], curves["latency_ms"][-1][1]
        static = curves["static_latency_ms"][-1][1]
        parts.append(
            f"predicted latency {first:.3f} -> {last:.3f} ms per image "
            f"({last / static:.2f} of the static network's {static:.3f} ms)"
        )
    return f"{name}: {', '.join(parts)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("work_dirs", nargs="+", type=Path, help="work folders of trainings")
    parser.add_argument(
        "--out", type=Path, default=Path("curves.png"), help="the picture (default: curves.png)"
    )


def run(args: argparse.Namespace) -> None:
    """Draw, and say where each training began and ended.

    Raises:
        UserError: A folder has no log, or the picture cannot be written.
    """
    check_picture("--out", args.out, SUFFIXES)
    runs = {folder.resolve().name: read_logs(folder) for folder in args.work_dirs}
    if len(runs) < len(args.work_dirs):
        raise UserError("work folders to compare must differ in their last name")
    draw(runs, args.out)
    for name, curves in runs.items():
        print(describe(name, curves))
    print(f"wrote {args.out}")
