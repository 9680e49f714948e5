"""The ``las_mm`` command. The scripts in tools/ run the same subcommands under other names.

A subcommand is a module of this package with ``add_arguments(parser)`` and ``run(args)``;
``args.argv`` is the command line itself. It is imported when it is called, so that
``las_mm --help`` comes without torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from las_mm.cli.parser import Parser
from las_mm.errors import told
from las_mm.version import __version__

COMMANDS = {
    "predict": "the latency of a config's backbone on a device, which need not be here",
    "search": "the fastest granularity S and G per stage for a device",
    "calibrate": "measure this machine, so that latency can be predicted for it",
    "validate": "check a calibration against what it has not seen",
    "benchmark": "time a dynamic backbone against the best static engines",
    "explain": "what each block of a backbone did with an image, and how long it took",
    "masks": "draw what a detector finds in images, and where it computed",
    "convert": "turn a released checkpoint into one of ours",
    "roofline": "how fast GPUs could run a dynamic ResNet at best",
    "plot": "draw the curves of trainings",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``las_mm COMMAND ...``.

    Raises:
        SystemExit: See :func:`run`.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return run(argv[0], argv[1:])
    listed = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="las_mm",
        description="Latency-aware dynamic networks for OpenMMLab.",
        epilog=f"commands:\n{listed}",
    )
    parser.add_argument("--version", action="version", version=f"las_mm {__version__}")
    parser.add_argument(
        "command", metavar="COMMAND", choices=COMMANDS, help="its own --help says what it takes"
    )
    parser.parse_args(argv)


def run(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run one subcommand.

    Args:
        command: One of :data:`COMMANDS`.
        argv: Its arguments; default: the process's.
        prog: What it is called in messages; default: ``las_mm COMMAND``.

    Raises:
        SystemExit: Something is wrong that the user can mend, see :func:`las_mm.errors.told`; or
            help was asked for, or Ctrl-C pressed.
    """
    prog = prog or f"las_mm {command}"
    with told(prog):
        module = import_module(f"las_mm.cli.{command}")
        parser = Parser(prog=prog, description=module.__doc__)
        module.add_arguments(parser)
        argv = sys.argv[1:] if argv is None else list(argv)
        args = parser.parse_args(argv, argparse.Namespace(argv=argv))
        try:
            module.run(args)
        except KeyboardInterrupt:
            sys.exit(f"{prog}: interrupted{getattr(module, 'INTERRUPTED', '')}")
