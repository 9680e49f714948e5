"""How subcommands print, and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from las_mm.errors import UserError

SUFFIXES = (".png", ".pdf", ".svg", ".jpg")


class Output(Console):
    """The terminal, or a log, whose lines may be longer than 80 characters."""

    def __init__(self) -> None:
        super().__init__()
        if not self.is_terminal:
            super().__init__(width=120)

    def say(self, text: str, **style: Any) -> None:
        """Print a line of text that is not wrapped."""
        self.print(text, highlight=False, soft_wrap=True, **style)


def new_figure(size: tuple[float, float]) -> Any:
    """A figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: `pip install matplotlib`") from error
    return Figure(figsize=size, layout="constrained")


def save(figure: Any, out: Path) -> None:
    """Write a figure into a file, whose folder is made where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
