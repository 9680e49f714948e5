#!/usr/bin/env python
"""Say which figures of the documentation are older than the sources that they speak of.

python dev/docs_figures.py            (make docs-figures)

A comment before a table says at which commit it was measured and what it depends on:

    <!-- figures: 1a2b3c4 ops/cpu las_mm/models/executors -->

Paths may be files or folders of the repository. It exits with 1 if a comment names a commit or a
path that does not exist, with 0 otherwise: an older figure is a reason to measure, not an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COMMENT = re.compile(r"<!--\s*figures:\s*(\S+)\s+(.*?)\s*-->")


@dataclass(frozen=True)
class Figures:
    """One comment: where it stands, the commit and the paths that it names."""

    path: Path
    line: int
    commit: str
    sources: tuple[str, ...]

    @property
    def place(self) -> str:
        """As an editor takes it."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    def wrong(self) -> str | None:
        """What the comment names that does not exist."""
        if _git("cat-file", "-e", f"{self.commit}^{{commit}}") is None:
            return f"there is no commit {self.commit}"
        missing = [source for source in self.sources if not (ROOT / source).exists()]
        return f"there is no {', '.join(missing)}" if missing else None

    def newer(self) -> list[str]:
        """Commits since then that changed the sources, newest first."""
        log = _git(
            "log",
            "--format=%h %ad %s",
            "--date=short",
            f"{self.commit}..HEAD",
            "--",
            *self.sources,
        )
        return (log or "").splitlines()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def find(paths: list[Path]) -> list[Figures]:
    """All comments of these Markdown files."""
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            match = COMMENT.search(line)
            if match:
                found.append(Figures(path, number, match[1], tuple(match[2].split())))
    return found


def main() -> int:
    """Print the table."""
    found = find([ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    table = Table()
    for column in ("figures", "measured at", "changes since", "newest change"):
        table.add_column(column, overflow="fold")
    errors = []
    for figures in found:
        wrong = figures.wrong()
        if wrong:
            errors.append(f"{figures.place}: {wrong}")
            continue
        newer = figures.newer()
        table.add_row(
            figures.place,
            _git("log", "-1", "--format=%h %ad", "--date=short", figures.commit),
            str(len(newer)) if newer else "none",
            newer[0] if newer else "",
        )
    Console(width=140).print(table)
    for error in errors:
        print(error, file=sys.stderr)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
