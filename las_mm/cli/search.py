"""Find the fastest granularity S and G per stage for a device, by the latency model.

las_mm search configs/mask_rcnn_lasnet_r101.py --device v100 --shape 800 1344 --batch 1 \\
    --rate 0.5 --plot search.png --write my_config.py
las_mm search CONFIG --devices v100 tx2 --shape 224 224 --plot devices.png

The first form ranks all S (patches) and G (channels) per stage, the second compares devices.
Accuracy, which coarse patches cost, is not part of the model.
"""

from __future__ import annotations

import argparse
import json
import os.path as osp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from las_mm.cli.output import SUFFIXES, Output
from las_mm.cli.parser import check_files, check_picture, check_size
from las_mm.cli.search_pictures import draw_comparison, draw_search
from las_mm.cli.search_tables import (
    conditions,
    settings_table,
    skips_channels,
    stage_table,
    title_of,
)
from las_mm.configs import load_config
from las_mm.errors import UserError, as_user_errors
from las_mm.fileio import write_atomically
from las_mm.latency import SearchResult, find_network, search_granularity
from las_mm.latency.analytical.costs import PATCH_COUNTS
from las_mm.latency.prediction import backbone_configs
from las_mm.latency.search import latency_against_rate

MARKER = '"""S per stage found by '  # what --write begins with
RATES = np.linspace(0, 1, 101)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
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


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong in the arguments alone.

    Raises:
        UserError: Something is.
    """
    check_size(args.shape)
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch must be a positive integer, got {args.batch}")
    check_picture("--plot", args.plot, SUFFIXES)
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
    check_files(args, "json", "plot", "write")


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


def snippet(result: SearchResult, config: str, out: Path) -> str:
    """A config that inherits ``config`` and sets the chosen granularity."""
    base = osp.relpath(osp.abspath(config), osp.abspath(out.parent))
    settings = f"granularity={result.chosen.granularity}"
    if skips_channels(result):
        settings += f", channel_granularity={result.chosen.channel_granularity}"
    return (
        f"{MARKER}las_mm search.\n\n"
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


def run(args: argparse.Namespace) -> None:
    """Search, print, write.

    Raises:
        UserError: An argument or the config is wrong.
    """
    check_args(args)
    written = []
    with as_user_errors(ValueError):
        results = search(args)
        content: dict[str, Any] = dict(results=[result.to_dict() for result in results])
        if args.devices is not None:
            content["comparison"] = comparison(results, args.patches)
    if args.json is not None:
        write_atomically(args.json, json.dumps(content, indent=2).encode())
        written.append(args.json)
    if args.plot is not None:
        if args.devices is not None:
            draw_comparison(results, content["comparison"], args.plot)
        else:
            draw_search(results[0], args.plot)
        written.append(args.plot)
    if args.write is not None:
        text = snippet(results[0], args.config, args.write)
        write_atomically(args.write, text.encode())
        written.append(args.write)
    output = Output()
    for result in results:
        output.say(conditions(result), style="bold")
        if args.devices is None:
            for found in result.stages:
                output.print(stage_table(found, args.top))
        output.print(settings_table(result))
        output.say(result.device.note)
    output.say(
        "equal rates are compared: coarse patches follow the image worse (--min-patches limits S)"
    )
    if written:
        output.say(f"wrote {', '.join(map(str, written))}")
