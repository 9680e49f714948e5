"""Files that are never half-written, and where measurements of this machine are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$LAS_MM_CACHE``, ``$XDG_CACHE_HOME/las_mm`` or ``~/.cache/las_mm``."""
    folder = os.environ.get("LAS_MM_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "las_mm"


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that ``path`` holds either its old content or all of ``data``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
