"""Check a calibration of this machine against blocks, networks and granularities it has not seen.

las_mm calibrate --device cpu
las_mm validate --device cpu --write docs/latency.md

About 20 minutes on an idle machine. Prints tables; --write puts them between the markers of a
Markdown file, with a picture beside it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from las_mm.cli.output import Output
from las_mm.errors import UserError, as_user_errors
from las_mm.fileio import write_atomically
from las_mm.latency import CalibratedDevice, load_device
from las_mm.latency.measured.calibrate import Settings
from las_mm.latency.measured.calibrated import calibration_path
from las_mm.latency.measured.validation import (
    BlockResults,
    NetworkResult,
    SearchCheck,
    validate_blocks,
    validate_networks,
    validate_search,
)

BEGIN, END = "<!-- validation: begin -->", "<!-- validation: end -->"
SEARCHES = ((50, (1, 800, 1344)), (50, (8, 224, 224)))
PARTS = ("blocks", "networks", "search")
PART = "<!-- validation: {} -->"
INTERRUPTED = "; the same command goes on from here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("--device", default="cpu", help="a calibration: cpu, or its file (default: cpu)")
    add("--cases", type=int, default=320, help="blocks to measure (default: 320)")
    add("--visits", type=int, default=5, help="times to come back to each (default: 5)")
    add("--seed", type=int, default=2, help="of the drawing of blocks (default: 2)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--write", type=Path, help="Markdown file with the markers, e.g. docs/latency.md")
    add("--restart", action="store_true", help="forget interrupted measurements")
    add("--reuse", action="store_true", help="take the blocks' measurements of the last run")


def read_device(name: str) -> CalibratedDevice:
    """The calibration; sets torch's threads to its own.

    Raises:
        UserError: It is none, or of another kind of device.
    """
    with as_user_errors(ValueError):
        device = load_device(name)
    if not isinstance(device, CalibratedDevice):
        raise UserError(f"--device {name} is {device.kind}: there is nothing here to measure it on")
    if device.machine["device"] != "cpu":
        raise UserError(
            f"--device {name} is of a {device.machine['device']}; only a CPU is checked"
        )
    torch.set_num_threads(device.machine["threads"])
    return device


def check_target(path: Path | None) -> str:
    """The text of the Markdown file.

    Raises:
        UserError: It is missing or has no markers.
    """
    if path is None:
        return ""
    if not path.is_file():
        raise UserError(f"--write {path} does not exist")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"--write {path} must hold the markers {BEGIN} and {END}, once each")
    return text


def merge(text: str, found: dict[str, list[str]], path: Path) -> str:
    """The Markdown file with the parts that were measured, the others as they are.

    Raises:
        UserError: The file does not say which of its tables belong to which part.
    """
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    kept: dict[str, str] = {}
    for part in reversed(PARTS):
        head, marker, section = old.partition(PART.format(part))
        if marker:
            kept[part], old = section.strip("\n"), head
    if old.strip() and set(found) != set(PARTS):
        raise UserError(
            f"--write {path}: its tables do not say which parts they are, so the others than "
            f"{', '.join(found)} would be lost; measure all parts once (leave --parts out)"
        )
    new = []
    for part in PARTS:
        section = "\n".join(found[part]).strip("\n") if part in found else kept.get(part)
        if section:
            new.append(f"{PART.format(part)}\n{section}\n")
    return before + BEGIN + "\n" + "\n".join(new) + END + after


def block_table(results: BlockResults) -> list[str]:
    """Accuracy by group, as Markdown."""
    lines = [
        "| blocks | number | RMS error | within 10 % | median error | rank correlation |",
        "|---|---|---|---|---|---|",
    ]
    for name, a in results.groups().items():
        lines.append(
            f"| {name} | {a.cases} | {100 * a.rmspe:.1f} % | {100 * a.within_10_percent:.0f} % | "
            f"{100 * a.bias:+.1f} % | {a.rank_correlation:.4f} |"
        )
    return lines


def network_table(results: list[NetworkResult]) -> list[str]:
    """Networks, as Markdown."""
    lines = [
        "| network | input | mode, rate | predicted ms | measured ms | error |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        rate = "static" if r.rate is None else f"{r.mode} {r.rate:g}"
        lines.append(
            f"| ResNet-{r.depth} | {'x'.join(map(str, r.input_shape))} | {rate} | "
            f"{1e3 * r.predicted_s:.1f} | {1e3 * r.measured_s:.1f} | {100 * r.error:+.1f} % |"
        )
    errors = [100 * r.error for r in results]
    middle = statistics.median(errors)
    exact, around = (sum(abs(e - at) <= 7 for e in errors) for at in (0.0, middle))
    lines += [
        "",
        f"{exact} of {len(errors)} within 7 %; median error {middle:+.1f} %, {around} within 7 % "
        "of that: a machine that is busier than during its calibration shifts all of them.",
    ]
    return lines


def search_table(check: SearchCheck) -> list[str]:
    """Settings of one search, as Markdown."""
    size = "x".join(map(str, check.input_shape))
    lines = [
        f"ResNet-{check.depth} at {size}, rate {check.rate:g}: the chosen setting is "
        f"{100 * check.loss:.1f} % slower than the fastest measured one.",
        "",
        "| S | predicted ms | measured ms |",
        "|---|---|---|",
    ]
    for r in check.results:
        name = "-".join(map(str, r.granularity))
        name = f"**{name}** (chosen)" if r.granularity == check.chosen else name
        lines.append(f"| {name} | {1e3 * r.predicted_s:.1f} | {1e3 * r.measured_s:.1f} |")
    return lines


def draw(results: BlockResults, networks: list[NetworkResult], path: Path) -> None:
    """Predicted against measured, in a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 6.4))
    measured, predicted = 1e3 * results.measured, 1e3 * results.predicted
    colors = dict(static="gray", spatial="blue", layer="orange", channel="green", both="purple")
    for mode, color in colors.items():
        chosen = [o.block.mode == mode for o in results.observed]
        axes.scatter(
            measured[chosen], predicted[chosen], s=9, color=f"tab:{color}", label=f"{mode} blocks"
        )
    if networks:
        axes.scatter(
            [1e3 * r.measured_s for r in networks],
            [1e3 * r.predicted_s for r in networks],
            s=28,
            marker="s",
            facecolors="none",
            edgecolors="tab:red",
            label="ResNet-50 and -101",
        )
    low, high = axes.get_xlim()
    low, high = measured.min() / 1.5, max(high, measured.max())
    for factor, style in ((1.0, "-"), (1.1, ":"), (1 / 1.1, ":")):
        axes.plot([low, high], [factor * low, factor * high], "k" + style, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms")
    axes.set_title("Calibrated predictions (dotted: 10 %)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write.

    Raises:
        UserError: See the parts.
    """
    for option in ("cases", "visits"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be positive, got {getattr(args, option)}")
    text = check_target(args.write)
    device = read_device(args.device)
    console = Output()
    console.say(device.note)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    head = [f"Measured with `las_mm validate`; {device.note}.", ""]
    found: dict[str, list[str]] = {}
    if args.write is not None:
        merge(text, dict.fromkeys(args.parts, []), args.write)  # before minutes of measuring
    blocks, networks = None, []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        if "blocks" in args.parts:
            task = bar.add_task("blocks")
            settings = Settings(
                "cpu",
                device.machine["dtype"],
                device.machine["threads"],
                args.cases,
                args.visits,
                args.seed,
            )
            record = calibration_path("cpu").with_name("validation.measurements.jsonl")
            measured = record.with_name("validation.measured.jsonl")
            if args.restart:
                record.unlink(missing_ok=True)
            if args.reuse:
                if not measured.is_file():
                    raise UserError(f"--reuse: there are no measurements at {measured}")
                record = measured
            with as_user_errors(ValueError, RuntimeError):
                blocks = validate_blocks(
                    device,
                    settings,
                    record,
                    args.cases,
                    lambda done, total: bar.update(task, completed=done, total=total),
                )
            record.replace(measured)
            found["blocks"] = head + block_table(blocks)
        if "networks" in args.parts:
            networks_task = bar.add_task("networks")
            networks = validate_networks(
                device,
                progress=lambda done, total: bar.update(networks_task, completed=done, total=total),
            )
            found["networks"] = head + network_table(networks)
        if "search" in args.parts:
            search_task = bar.add_task("searches", total=len(SEARCHES))
            found["search"] = list(head)
            for depth, shape in SEARCHES:
                found["search"] += [*search_table(validate_search(device, depth, shape)), ""]
                bar.advance(search_task)
    print("\n\n".join("\n".join(lines) for lines in found.values()))
    if args.write is not None:
        if blocks is not None:
            picture = args.write.with_suffix(".png")
            draw(blocks, networks, picture)
            found["blocks"] += ["", f"![predicted against measured]({picture.name})"]
        write_atomically(args.write, merge(text, found, args.write).encode())
