"""Turn a released LASNet or LAUDNet checkpoint, or a torchvision or timm one, into one of ours.

las_mm convert laud_resnet101.pth laudnet_r101.pth
las_mm convert las_resnet50.pth lasnet_r50.pth --granularity 4 4 2 1
las_mm convert SRC DST --spec spec.json --report report.json

Depth or arch, width, modes, channel maskers and G are read off the keys and shapes. S is not in
them, and skipped layers look like patches: --granularity and --mode layer say which. A
specification (las_mm/models/released/specification.py; a JSON file, or one with it under "spec")
says everything. DST holds the weights as mmpretrain's ImageClassifier names them and, under "meta",
the backbone's config.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch

from las_mm.checkpoints import load_checkpoint
from las_mm.cli.parser import add_trust
from las_mm.errors import UserError
from las_mm.fileio import write_atomically
from las_mm.models.released import Conversion, convert
from las_mm.models.released.conversion import BACKBONE
from las_mm.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("source", metavar="SRC", help="the checkpoint to read")
    add("destination", metavar="DST", type=Path, help="the file to write")
    add("--spec", type=Path, help="JSON file that describes the network")
    add("--mode", help="without --spec: mode of all blocks (layer) where keys leave it open")
    add("--granularity", type=int, nargs="+", help="without --spec: S, one, 4 or one per block")
    add("--bare", action="store_true", help="only the backbone, its keys without prefix")
    add("--report", type=Path, help="write what became of every key into this JSON file")
    add_trust(parser)


def read_spec(path: Path) -> dict:
    """The specification in a JSON file.

    Raises:
        UserError: There is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--spec {path} cannot be read: {error}") from error
    spec = content.get("spec", content) if isinstance(content, dict) else content
    if not isinstance(spec, dict):
        raise UserError(f"--spec {path} must hold a JSON object, got {type(spec).__name__}")
    return spec


def converted(args: argparse.Namespace) -> Conversion:
    """The conversion that the arguments ask for.

    Raises:
        UserError: The file cannot be read, or is not recognised.
    """
    for name in ("destination", "report"):
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if path is not None and path.resolve() == Path(args.source).resolve():
            raise UserError(f"{path} would replace the source; name another file")
    granularity = args.granularity
    if granularity is not None and len(granularity) == 1:
        (granularity,) = granularity
    spec = None if args.spec is None else read_spec(args.spec)
    checkpoint = load_checkpoint(args.source, args.trust_checkpoint)
    try:
        return convert(checkpoint, spec, mode=args.mode, granularity=granularity)
    except ValueError as error:
        raise UserError(f"{args.source} is not converted: {error}") from error


def content(found: Conversion, args: argparse.Namespace) -> bytes:
    """What is written into the destination."""
    meta = dict(las_mm_version=__version__, source=Path(args.source).name)
    meta.update(backbone=found.backbone, num_classes=None if args.bare else found.num_classes)
    buffer = io.BytesIO()
    weights = found.bare() if args.bare else found.weights
    torch.save(dict(meta=meta, state_dict=weights), buffer)
    return buffer.getvalue()


def report(found: Conversion, args: argparse.Namespace) -> dict:
    """What became of every key."""
    told = ("backbone", "num_classes", "used", "unused", "missing", "added")
    files = dict(source=str(args.source), destination=str(args.destination))
    return {**files, **{name: getattr(found, name) for name in told}}


def usage(found: Conversion, args: argparse.Namespace) -> str:
    """Lines of a config that use the destination."""
    prefix = "" if args.bare else f', prefix="{BACKBONE}"'
    arguments = [f"    {name}={_quoted(value)}," for name, value in found.backbone.items()]
    initial = f'dict(type="Pretrained", checkpoint="{args.destination}"{prefix})'
    lines = [
        "As the backbone of any mm model:",
        "backbone = dict(",
        *arguments,
        f"    init_cfg={initial},",
        ")",
        "In our configs:",
        f"LAS_MM_PRETRAINED={args.destination}"
        + ("" if args.bare else f" LAS_MM_PRETRAINED_PREFIX={BACKBONE}"),
    ]
    if found.num_classes is not None and not args.bare:
        lines += ["As a whole classifier of mmpretrain:", f'load_from = "{args.destination}"']
    return "\n".join(lines)


def _quoted(value: object) -> str:
    return json.dumps(value) if isinstance(value, (str, list)) else repr(value)


def run(args: argparse.Namespace) -> None:
    """Convert, write, and say how the result is used.

    Raises:
        UserError: The source is not converted, or a file cannot be used.
    """
    found = converted(args)
    write_atomically(args.destination, content(found, args))
    if args.report is not None:
        write_atomically(args.report, json.dumps(report(found, args), indent=2).encode())
    print(
        f"{args.source}: {len(found.used)} keys used, {len(found.unused)} unused, "
        f"{len(found.missing)} missing, {len(found.added)} counters added"
    )
    for name in ("unused", "missing"):
        keys = getattr(found, name)
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            note = "; maskers start mostly on" if name == "missing" else ""
            print(f"{name}: {', '.join(keys[:3])}{more}{note}")
    written = [args.destination] + ([args.report] if args.report is not None else [])
    print(f"wrote {', '.join(map(str, written))}\n{usage(found, args)}")
