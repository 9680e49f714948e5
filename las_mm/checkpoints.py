"""Checkpoints are data, not programs: what torch.save wrote is read without running any of it."""

from __future__ import annotations

import codecs
import os.path as osp
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from las_mm import compat

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
        return compat.load_weights(str(path), _allowed())
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


def _named(value: Any, module: str, name: str) -> Any:
    """``value``, found by torch where a file names it so."""
    value.__module__, value.__name__, value.__qualname__ = module, name, name
    return value


_named(_LogHistory, "mmengine.logging.history_buffer", "HistoryBuffer")
_named(_statistic, "builtins", "getattr")


def _allowed() -> list:
    """What checkpoints of mmengine's runner name, besides what every torch allows."""
    array, scalar = (value.__reduce__()[0] for value in (np.zeros(1), np.float64(0)))
    made = dict(_reconstruct=array, scalar=scalar)
    return [
        _LogHistory,
        _statistic,
        codecs.encode,
        np.ndarray,
        np.dtype,
        slice,
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
        # numpy 2 moved them, and either reads what the other wrote.
        *(
            _named(partial(function), f"numpy.{core}.multiarray", name)
            for core in ("core", "_core")
            for name, function in made.items()
        ),
    ]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
