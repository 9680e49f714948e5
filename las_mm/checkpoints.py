"""Checkpoints are data, not programs: what torch.save wrote is read without running any of it."""

from __future__ import annotations

import contextlib
import os.path as osp
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch

# What mmengine's HistoryBuffer registers as its statistics, and so pickles.
_STATISTICS = ("min", "max", "current", "mean")


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the message names it and says why."""


class NeedsTrust(CheckpointError):
    """It holds objects other than weights and mmengine's log history."""


def read_checkpoint(path: str | Path) -> dict:
    """Read a local checkpoint as data: weights, and what mmengine's runner keeps beside them.

    Of the runner's log history the names are left, without the values.

    Raises:
        CheckpointError: The file is missing, damaged or, as :class:`NeedsTrust`, a program.
    """
    check_file(path)
    try:
        with safe_reading():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise NeedsTrust(f"checkpoint {path} holds objects other than weights") from error
        raise CheckpointError(f"checkpoint {path} is damaged: {_last_line(error)}") from error
    except Exception as error:  # damaged bytes may raise anything, depending on where they are
        raise CheckpointError(f"checkpoint {path} is damaged: {_last_line(error)}") from error


def check_file(path: str | Path) -> None:
    """Raise a :class:`CheckpointError` unless there is a file that torch.save may have written."""
    if not osp.isfile(path):
        problem = "is a folder; name the file in it" if osp.isdir(path) else "does not exist"
        raise CheckpointError(f"checkpoint {path} {problem}")
    with open(path, "rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip file, or torch's old pickles
            raise CheckpointError(
                f"checkpoint {path} is damaged: it is no file that torch.save writes"
            )


class _LogHistory:
    """Stands for a HistoryBuffer of mmengine, and keeps nothing of it.

    The real one takes what a file says are its statistics into its class, for all to call.
    """

    def __setstate__(self, state: dict) -> None:
        pass


def _statistic(owner: object, name: str) -> str:
    """What a log history asks ``getattr`` for: the names of its statistics, and nothing else.

    Raises:
        UnpicklingError: It asks for something else.
    """
    if owner is not _LogHistory or name not in _STATISTICS:
        raise pickle.UnpicklingError(
            f"Unsupported: getattr of {name!r}, which is no statistic of mmengine's HistoryBuffer"
        )
    return name


# torch finds what a file asks for by these two, and files ask for them by their usual names.
_LogHistory.__module__ = "mmengine.logging.history_buffer"
_LogHistory.__qualname__ = "HistoryBuffer"
_statistic.__module__, _statistic.__qualname__ = "builtins", "getattr"


@contextlib.contextmanager
def safe_reading() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` pass over the log history of mmengine's runner."""
    import numpy as np

    core = np._core if hasattr(np, "_core") else np.core
    kinds = ("float64", "float32", "int64", "int32", "uint32")
    arrays = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, slice]
    dtypes = [type(np.dtype(kind)) for kind in kinds]
    with torch.serialization.safe_globals([_LogHistory, _statistic, *arrays, *dtypes]):
        yield


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
