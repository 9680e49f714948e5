"""Files that are never half-written, and where measurements of this machine are kept."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$LAS_MM_CACHE``, ``$XDG_CACHE_HOME/las_mm`` or ``~/.cache/las_mm``.

    A user without a home (no ``$HOME``, an id without an entry, as in many containers) gets a
    temporary folder of his own, with a warning.
    """
    folder = os.environ.get("LAS_MM_CACHE")
    if folder:
        return Path(folder)
    caches = os.environ.get("XDG_CACHE_HOME")
    if caches:
        return Path(caches) / "las_mm"
    try:
        return Path.home() / ".cache" / "las_mm"
    except (RuntimeError, KeyError):
        return _homeless_folder()


@functools.cache
def _homeless_folder() -> Path:
    """A folder in the system's temporary one that nobody else can have put files into."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"las_mm-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        mine = status.st_mode & 0o077 == 0 and (status.st_uid == user or not hasattr(os, "getuid"))
    except OSError:
        mine = False
    if not mine or folder.is_symlink():
        folder = Path(tempfile.mkdtemp(prefix="las_mm-"))
    from mmengine.logging import print_log

    print_log(
        f"las_mm: this user has no home folder, so measurements are kept in {folder}; set "
        "LAS_MM_CACHE to a folder that lasts",
        logger="current",
        level=logging.WARNING,
    )
    return folder


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
