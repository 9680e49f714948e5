"""For mkdocs (`make docs`): pages that lie beside docs/, and links that lead out of it."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "configs/README.md",
    "ops/README.md",
)
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config) -> Files:
    """Add the pages of :data:`BESIDE` under their paths in the repository."""
    for path in BESIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turn links between files of the repository into links between pages.

    What is in the repository but no page, a source file or a folder, stays as its name; what is not
    there at all stays a link, so that the build fails.
    """
    beside = page.file.src_uri in BESIDE
    folder = ROOT if beside else ROOT / "docs"
    here = Path(page.file.src_uri).parent

    def turn(found: re.Match) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (folder / here / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            return found[0]
        inside = path.relative_to(ROOT)
        uri = inside.relative_to("docs") if inside.parts[:1] == ("docs",) else inside
        if files.get_file_from_path(uri.as_posix()) is None:
            return f"]({_SOURCE}{inside.as_posix()})"
        return found[1] + posixpath.relpath(uri.as_posix(), here.as_posix()) + found[3]

    turned = _LINK.sub(turn, markdown)
    return re.sub(rf"\[([^\]]*)\]\({_SOURCE}([^)]*)\)", r"\1 (`\2`)", turned)


_SOURCE = "source:"
