"""Predict the latency of a config's backbone on a device; runs nothing and needs no device.

las_mm predict configs/mask_rcnn_lasnet_r101.py --device tx2 --shape 800 1344 --rate 0.5

Per stage: milliseconds per image of the static and of the dynamic network, and their ratio, by the
analytical model (docs/latency_model.md). --depth-of-tree shows where they go.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Table

from las_mm.cli.output import Output
from las_mm.cli.parser import check_files, check_size
from las_mm.configs import load_config, usual_size
from las_mm.errors import UserError, as_user_errors
from las_mm.fileio import write_atomically
from las_mm.latency import NetworkShape, Report, find_network, load_device, predict
from las_mm.latency.device import AnyDevice
from las_mm.latency.prediction import backbone_configs
from las_mm.network import MODES
from las_mm.network.operator import CHANNEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("config", help="a config with a dynamic backbone")
    add("--device", required=True, help="a shipped device (v100, tx2, ...) or a device file")
    add(
        "--shape",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of an image; default: 224 224 for mmpretrain's configs, else 800 1344",
    )
    add("--batch", type=int, help="images per batch; default: the device file's")
    add("--rate", type=float, nargs="+", help="of all blocks, or one per block; default: 0.5")
    add(
        "--channel-rate",
        type=float,
        nargs="+",
        help="likewise, of channels kept; default: 1, --rate if only channels are skipped",
    )
    add("--rate-dilated", type=float, nargs="+", help="conv1's; default: --rate, as in the papers")
    add("--mode", choices=MODES, nargs="+", help="of all stages, or one per stage")
    add("--granularity", type=int, nargs="+", help="patch side S: one, or one per stage or block")
    add("--depth-of-tree", type=int, help="also print the dynamic network down to this level")
    add("--json", type=Path, help="write both trees, in seconds, into this file")


def read_network(args: argparse.Namespace) -> NetworkShape:
    """The shape of the config's backbone, with the command line's mode and granularity.

    Raises:
        UserError: The config has none, or an argument does not fit it.
    """
    cfg = load_config(args.config)
    if args.shape is None:
        args.shape = usual_size(cfg)
    overrides = {key: getattr(args, key) for key in ("mode", "granularity")}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if overrides:
        backbones = backbone_configs(cfg)
        if len(backbones) != 1:
            raise UserError(
                f"--{next(iter(overrides))} needs exactly one dynamic backbone in {args.config} "
                f"such as las_mm.LASResNet, found {len(backbones)}"
            )
        for key, value in overrides.items():
            backbones[0][key] = value[0] if len(value) == 1 else value
    return find_network(cfg, args.shape)


def make_table(dynamic: Report, static: Report, network: NetworkShape) -> Table:
    """One row per stage, and the backbone's."""
    table = Table()
    for column in ("", "blocks", "mode"):
        table.add_column(column)
    for column in ("static ms", "dynamic ms", "ratio"):
        table.add_column(column, justify="right")

    def add_row(name: str, blocks: str, mode: str, whole: Report, part: Report) -> None:
        ratio = part.latency_s / whole.latency_s
        times = [f"{1e3 * report.latency_s:.3f}" for report in (whole, part)]
        table.add_row(name, blocks, mode, *times, f"{ratio:.3f}")

    modes = {}
    for stage, blocks in network.stages().items():
        labels = (b.label for b in blocks)
        modes[f"stage{stage}"] = (str(len(blocks)), ", ".join(dict.fromkeys(labels)))
    for part, whole in zip(dynamic.children, static.children):
        add_row(part.name, *modes.get(part.name, ("", "static")), whole, part)
    table.add_section()
    add_row("backbone", str(len(network.blocks)), "", static, dynamic)
    return table


def settle_rates(args: argparse.Namespace, network: NetworkShape) -> list[str]:
    """Fill in the defaults of --rate and --channel-rate; returns what to say of each."""
    channels = CHANNEL in network.axes
    others = bool(set(network.axes) - {CHANNEL})  # positions, layers, tokens, heads, ...
    said = []
    if not others and args.channel_rate is None:  # --rate can only mean channels
        args.rate, args.channel_rate = None, args.rate
    for name, is_read, default in (
        ("rate", others, 0.5),
        ("channel_rate", channels, 1.0 if others else 0.5),
    ):
        rates, label = getattr(args, name), name.replace("_", " ")
        if not is_read:
            if rates is not None:
                option = label.replace(" ", "-")
                said.append(f"no block has a {label} (--{option} is not used)")
            continue
        if rates is None:
            rates = [default]
            setattr(args, name, rates)
        said.append(f"{label} {rates[0]:g}" if len(rates) == 1 else f"a {label} per block")
    return said


def conditions(
    args: argparse.Namespace, device: AnyDevice, network: NetworkShape, rates: list[str]
) -> str:
    """What was predicted, in one line."""
    batch = device.batch_size if args.batch is None else args.batch
    height, width = network.input_hw
    parts = [
        f"{network.name} on {device.name}",
        f"batch {batch} of {height} x {width}",
        *rates,
        "per image",
    ]
    return ", ".join(parts)


def check_args(args: argparse.Namespace) -> None:
    """What can be wrong in the arguments alone.

    Raises:
        UserError: Something is.
    """
    check_size(args.shape)
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch must be a positive integer, got {args.batch}")
    if args.depth_of_tree is not None and args.depth_of_tree < 0:
        raise UserError(f"--depth-of-tree must be at least 0, got {args.depth_of_tree}")
    check_files(args, "json")


def run(args: argparse.Namespace) -> None:
    """Predict, print, write.

    Raises:
        UserError: An argument or the config is wrong.
    """
    check_args(args)
    with as_user_errors(ValueError):
        device = load_device(args.device)
        network = read_network(args)
        batch = device.batch_size if args.batch is None else args.batch
        shape = (batch, network.channels, *network.input_hw)
        said = settle_rates(args, network)
        rates, dilated, channel = (
            values[0] if values is not None and len(values) == 1 else values
            for values in (args.rate, args.rate_dilated, args.channel_rate)
        )
        dynamic = predict(network, device, shape, rates, dilated, rates_channel=channel)
        static = predict(network.static(), device, shape)
    if args.json is not None:
        content = dict(
            config=args.config,
            device=device.name,
            kind=device.kind,
            input_shape=shape,
            rate=rates,
            rate_dilated=dilated,
            rate_channel=channel,
            mode=[block.mode for block in network.blocks],
            granularity=[block.granularity for block in network.blocks],
            ratio=dynamic.latency_s / static.latency_s,
            static=static.to_dict(),
            dynamic=dynamic.to_dict(),
        )
        write_atomically(args.json, json.dumps(content, indent=2).encode())
    output = Output()
    output.say(conditions(args, device, network, said))
    output.print(make_table(dynamic, static, network))
    output.say(device.note)
    if args.depth_of_tree is not None:
        output.say(dynamic.table(args.depth_of_tree), markup=False)
    if args.json is not None:
        output.say(f"wrote {args.json}")
