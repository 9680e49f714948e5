#!/usr/bin/env python
"""Find the fastest granularity S and G per stage for a device, by the latency model.

python tools/search_granularity.py configs/mask_rcnn_lasnet_r101.py --device v100 \\
    --shape 800 1344 --batch 1 --rate 0.5 --plot search.png --write my_config.py
python tools/search_granularity.py CONFIG --devices v100 tx2 --shape 224 224 --plot devices.png

The first form ranks all S (patches) and G (channels) per stage, the second compares devices. What
the model leaves out, such as accuracy, which coarse patches cost: las_mm/latency/search.py.
"""

from __future__ import annotations

import argparse
import json
import os.path as osp
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from las_mm.fileio import write_atomically
from las_mm.latency import SearchResult, find_network, search_granularity
from las_mm.latency.analytical.costs import PATCH_COUNTS
from las_mm.latency.prediction import backbone_configs
from las_mm.latency.search import Setting, StageSearch, latency_against_rate
from las_mm.preflight import Parser, UserError, load_config

MARKER = '"""S per stage found by tools/search_granularity.py.'  # what --write begins with
SUFFIXES = (".png", ".pdf", ".svg", ".jpg")
RATES = np.linspace(0, 1, 101)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="search_granularity.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("config", help="a config with a dynamic backbone")
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument("--device", help="a shipped device (v100, tx2, ...) or a device file")
    devices.add_argument("--devices", nargs="+", help="several, to compare")
    add("--shape", type=int, nargs=2, required=True, metavar=("H", "W"), help="of an image")
    add("--batch", type=int, help="images per batch; default: the device file's")
    add("--rate", type=float, default=0.5, help="expected activation rate of all blocks")
    add("--channel-rate", type=float, default=0.5, help="expected share of channels kept")
    add("--min-patches", type=int, default=2, help="least number of patches in a map")
    add("--patches", choices=PATCH_COUNTS, default="mean", help="'whole': round up, as published")
    add("--exact", action="store_true", help="only S that divide the map")
    add("--tolerance", type=float, default=0.01, help="latencies this close: the finer S is chosen")
    add("--top", type=int, default=5, help="rows to show per stage, and settings")
    add("--json", type=Path, help="write everything found, in seconds, into this file")
    add("--plot", type=Path, help="draw it into this file")
    add("--write", type=Path, help="write a config with the chosen granularity")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong in the arguments alone.

    Raises:
        UserError: Something is.
    """
    if min(args.shape) < 1:
        raise UserError(f"--shape must be two positive integers H W, got {list(args.shape)}")
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch must be a positive integer, got {args.batch}")
    if args.plot is not None and args.plot.suffix not in SUFFIXES:
        raise UserError(f"--plot must end in one of {', '.join(SUFFIXES)}, got {args.plot}")
    if args.write is not None and args.devices is not None:
        raise UserError("--write needs --device: several devices choose several granularities")
    if args.write is not None and args.write.suffix != ".py":
        raise UserError(f"--write must end in .py, got {args.write}")
    if args.write is not None and args.write.is_file():
        # A config of one's own, perhaps even the one that this one inherits, must not be lost.
        if not args.write.read_text(errors="replace").startswith(MARKER):
            raise UserError(
                f"--write {args.write} exists and was not written by this tool: name another file"
            )
        if args.write.resolve() == Path(args.config).resolve():
            raise UserError(f"--write {args.write} is the config that it would inherit")
    for name in ("json", "plot", "write"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder; name a file")


# ---- tables


def stage_table(found: StageSearch, top: int) -> Table:
    """The ``top`` fastest granularities of a stage."""
    height, width = found.map_hw
    title = (
        f"stage {found.stage}, map {height} x {width}: static {1e3 * found.static_s:.3f} ms, "
        f"skipping layers {1e3 * found.layer_s:.3f} ms"
    )
    table = Table(title=title, title_justify="left", min_width=76)
    table.add_column("")
    columns = {
        "spatial": ("S", "patches"),
        "channel": ("G",),
    }.get(found.mode, ("S", "G", "patches"))
    for column in (*columns, "ms", "ratio", "break-even rate"):
        table.add_column(column, justify="right")
    shown = list(found.choices[:top])
    if found.chosen not in shown:
        shown.append(found.chosen)
    for choice in shown:
        cells = {
            "S": str(choice.granularity),
            "G": str(choice.channel_granularity),
            "patches": f"{choice.rows} x {choice.columns}" + (", cut off" if choice.ragged else ""),
        }
        table.add_row(
            "chosen" if choice is found.chosen else "",
            *(cells[column] for column in columns),
            f"{1e3 * choice.latency_s:.3f}",
            f"{choice.ratio:.3f}",
            f"{choice.break_even:.3f}",
        )
    return table


def settings_table(result: SearchResult) -> Table:
    """The best settings of the whole network, the chosen one and the config's own."""
    title = f"backbone, static {1e3 * result.static_s:.3f} ms per image"
    table = Table(title=title, title_justify="left", min_width=76)
    table.add_column("")
    table.add_column("granularity per stage" if skips_channels(result) else "S per stage")
    for column in ("ms", "ratio"):
        table.add_column(column, justify="right")
    labels: dict[str, list[str]] = {}
    settings = {title_of(result, setting): setting for setting in result.settings}
    for label, setting in (("chosen", result.chosen), ("config", result.current)):
        if setting is not None:
            settings[title_of(result, setting)] = setting
            labels.setdefault(title_of(result, setting), []).append(label)
    for setting in sorted(settings.values(), key=lambda s: s.latency_s):
        table.add_row(
            ", ".join(labels.get(title_of(result, setting), [])),
            title_of(result, setting),
            f"{1e3 * setting.latency_s:.3f}",
            f"{setting.ratio:.3f}",
        )
    return table


def join(granularity: Sequence[int]) -> str:
    """As the papers write it: 4-4-2-1."""
    return "-".join(map(str, granularity))


def title_of(result: SearchResult, setting: Setting) -> str:
    """A setting in a few letters: S as in the papers, and G where the network has use for it."""
    if not skips_channels(result):
        return join(setting.granularity)
    groups = f"G={join(setting.channel_granularity)}"
    if all(stage.mode == "channel" for stage in result.stages):
        return groups
    return f"S={join(setting.granularity)} {groups}"


def conditions(result: SearchResult) -> str:
    """What was searched, in one line."""
    height, width = result.network.input_hw
    return (
        f"{result.network.name} on {result.device.name}, batch {result.batch_size} of "
        f"{height} x {width}, rate {result.rate:g}"
        + (f", channel rate {result.rate_channel:g}" if skips_channels(result) else "")
    )


def skips_channels(result: SearchResult) -> bool:
    """Whether any stage does."""
    return any(stage.mode != "spatial" for stage in result.stages)


# ---- files


def comparison(results: Sequence[SearchResult], patches: str) -> dict[str, Any]:
    """Latency against rate of each device's chosen setting, and the config's, on every device."""
    found = [result.chosen for result in results]
    found += [result.current for result in results if result.current is not None]
    settings = {(setting.granularity, setting.channel_granularity): setting for setting in found}
    devices = {}
    for result in results:
        curves = {}
        for key in sorted(settings, reverse=True):
            latency, static = latency_against_rate(
                result.device,
                result.network,
                key[0],
                RATES,
                result.batch_size,
                patches,
                channel_granularity=key[1],
                rate_channel=result.rate_channel,
            )
            curves[title_of(result, settings[key])] = latency.tolist()
        devices[result.device.name] = dict(static_s=static, latency_s=curves)
    return dict(rates=RATES.tolist(), devices=devices)


def label_of_sides(result: SearchResult) -> str:
    """What the axis of granularities shows."""
    parts = []
    if any(stage.mode != "channel" for stage in result.stages):
        parts.append("S, side of a patch in outputs")
    if any(stage.mode == "channel" for stage in result.stages):
        parts.append("G, channels per decision")
    return "; ".join(parts)


def draw_search(result: SearchResult, out: Path) -> None:
    """Latency and break-even rate against S, one line per stage."""
    figure = new_figure((11, 4.6))
    ratio, even = figure.subplots(1, 2)
    most = 1
    for index, stage in enumerate(result.stages):
        # Of a stage with both, S is drawn at the chosen G.
        key = "channel_granularity" if stage.mode == "channel" else "granularity"
        group = stage.chosen.channel_granularity
        choices = [
            c for c in stage.choices if key != "granularity" or c.channel_granularity == group
        ]
        choices.sort(key=lambda choice: getattr(choice, key))
        sides = [getattr(choice, key) for choice in choices]
        most = max(most, *sides)
        height, width = stage.map_hw
        label = f"stage {stage.stage} ({height} x {width}), static {1e3 * stage.static_s:.3g} ms"
        colour, chosen = f"C{index}", stage.chosen
        for axes, column in ((ratio, "ratio"), (even, "break_even")):
            values = [getattr(choice, column) for choice in choices]
            axes.plot(sides, values, "o-", color=colour, markersize=3, label=label)
            mark = dict(color=colour, markersize=10, fillstyle="none", markeredgewidth=1.8)
            axes.plot([getattr(chosen, key)], [getattr(chosen, column)], "o", **mark)
    line = dict(color="black", linewidth=1, linestyle="--")
    ratio.axhline(1, label="static", **line)
    ratio.set(title=f"latency at rate {result.rate:g}", ylabel="latency / static stage's")
    even.axhline(result.rate, label="expected rate", **line)
    even.set(title="break-even rate: dynamic is faster below", ylabel="activation rate")
    even.set_ylim(top=1.04)
    ticks = [2**i for i in range(12)]
    for axes in (ratio, even):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(0.85, 1.18 * most)
        axes.set_xlabel(f"{label_of_sides(result)} (circled: chosen)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(f"{conditions(result)} ({result.device.kind} device)")
    save(figure, out)


def draw_comparison(results: Sequence[SearchResult], curves: dict[str, Any], out: Path) -> None:
    """Latency against rate of the same settings, one panel per device."""
    columns = 2 if len(results) == 4 else min(len(results), 3)
    rows = -(-len(results) // columns)
    figure = new_figure((1 + 4.4 * columns, 4.2 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    chosen_by: dict[str, list[str]] = {}
    for result in results:
        chosen_by.setdefault(title_of(result, result.chosen), []).append(result.device.name)
        if result.current is not None:
            own = chosen_by.setdefault(title_of(result, result.current), [])
            if "config" not in own:
                own.insert(0, "config")
    for axes in panels[len(results) :]:
        axes.axis("off")
    for axes, result in zip(panels, results):
        found = curves["devices"][result.device.name]
        for index, (setting, latency) in enumerate(found["latency_s"].items()):
            best = setting == title_of(result, result.chosen)
            prefix = "" if skips_channels(result) else "S="
            axes.plot(
                curves["rates"],
                [1e3 * value for value in latency],
                color=f"C{index}",
                linewidth=2.6 if best else 1.3,
                label=f"{prefix}{setting} ({', '.join(chosen_by[setting])})",
            )
        axes.axhline(1e3 * found["static_s"], color="black", linestyle="--", label="static")
        axes.axvline(result.rate, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="activation rate", ylabel="ms per image", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        name, kind = result.device.name, result.device.kind
        axes.set_title(f"{name} ({kind}), batch {result.batch_size}")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    height, width = results[0].network.input_hw
    figure.suptitle(
        f"{results[0].network.name} at {height} x {width}; thick: chosen for the device at rate "
        f"{results[0].rate:g}"
    )
    save(figure, out)


def new_figure(size: tuple[float, float]) -> Any:
    """A figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib: `pip install matplotlib`, or leave it out"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save(figure: Any, out: Path) -> None:
    """Write a figure into a file, whose folder is made where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def snippet(result: SearchResult, config: str, out: Path) -> str:
    """A config that inherits ``config`` and sets the chosen granularity."""
    base = osp.relpath(osp.abspath(config), osp.abspath(out.parent))
    settings = f"granularity={result.chosen.granularity}"
    if skips_channels(result):
        settings += f", channel_granularity={result.chosen.channel_granularity}"
    return (
        f"{MARKER}\n\n"
        f"{conditions(result)}.\nPredicted: {1e3 * result.chosen.latency_s:.3f} ms per image, "
        f"{result.chosen.ratio:.3f} of the static backbone's; {result.device.kind} device.\n"
        f'"""\n\n'
        f"_base_ = {json.dumps(base)}\n\n"
        f"model = dict(backbone=dict({settings}))\n"
    )


def check_writable(cfg: Config, config: str) -> None:
    """The config's ``model.backbone`` is the one that a snippet would change.

    Raises:
        UserError: It is not.
    """
    found = backbone_configs(cfg)
    if len(found) != 1 or cfg.model.get("backbone") is not found[0]:
        raise UserError(
            f"--write sets model.backbone.granularity, and model.backbone of {config} is no "
            "dynamic backbone: leave --write out and set the granularity by hand"
        )


# ---- main


def search(args: argparse.Namespace) -> list[SearchResult]:
    """The searches that the arguments ask for.

    Raises:
        UserError, ValueError, OSError: An argument is wrong.
    """
    cfg = load_config(args.config)
    if args.write is not None:
        check_writable(cfg, args.config)
    network = find_network(cfg, args.shape)
    return [
        search_granularity(
            device,
            network,
            rate=args.rate,
            batch_size=args.batch,
            min_patches=args.min_patches,
            ragged=not args.exact,
            top=args.top,
            tolerance=args.tolerance,
            patches=args.patches,
            rate_channel=args.channel_rate,
        )
        for device in (args.devices or [args.device])
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log's lines may be longer than 80 characters
    written = []
    try:
        check_args(args)
        results = search(args)
        content: dict[str, Any] = dict(results=[result.to_dict() for result in results])
        if args.devices is not None:
            content["comparison"] = comparison(results, args.patches)
        if args.json is not None:
            write_atomically(args.json, json.dumps(content, indent=2).encode())
            written.append(args.json)
        if args.plot is not None and args.devices is not None:
            draw_comparison(results, content["comparison"], args.plot)
        elif args.plot is not None:
            draw_search(results[0], args.plot)
        written += [args.plot] if args.plot is not None else []
        if args.write is not None:
            text = snippet(results[0], args.config, args.write)
            write_atomically(args.write, text.encode())
            written.append(args.write)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"search_granularity.py: error: {error}")
    for result in results:
        console.print(conditions(result), style="bold", highlight=False, soft_wrap=True)
        if args.devices is None:
            for found in result.stages:
                console.print(stage_table(found, args.top))
        console.print(settings_table(result))
        console.print(result.device.note, highlight=False, soft_wrap=True)
    console.print(
        "equal rates are compared: coarse patches follow the image worse (--min-patches limits S)",
        highlight=False,
        soft_wrap=True,
    )
    if written:
        console.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
