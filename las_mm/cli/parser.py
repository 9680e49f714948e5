"""What the command lines of all subcommands and tools share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from las_mm.errors import UserError, fail


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line; shows a description as it is written."""

    def __init__(self, **kwargs) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options KEY=VALUE ...``."""
    from mmengine.config import DictAction

    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override config entries: key=value, nested keys with dots, lists as key=[a,b]",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust-checkpoint``."""
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that holds more than weights (runs code from the file)",
    )


def check_files(args: argparse.Namespace, *names: str) -> None:
    """What is to be written is no folder.

    Raises:
        UserError: It is; the message names the option.
    """
    for name in names:
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder; name a file")


def check_picture(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """A picture's name has a known suffix.

    Raises:
        UserError: It has not.
    """
    if path is not None and path.suffix not in suffixes:
        raise UserError(f"{option} must end in one of {', '.join(suffixes)}, got {path}")


def check_size(shape: list[int] | None) -> None:
    """``--shape H W`` is a size.

    Raises:
        UserError: It is none.
    """
    if shape is not None and min(shape) < 1:
        raise UserError(f"--shape must be two positive integers H W, got {list(shape)}")
