"""Checkpoints are data, not programs: what torch.save wrote is read without running any of it."""

from __future__ import annotations

import codecs
import os.path as osp
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from las_mm import compat
from las_mm.errors import UserError, last_line

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
        raise CheckpointError(f"checkpoint {path} is damaged: {last_line(error)}") from error
    except Exception as error:  # damaged bytes may raise anything, depending on where they are
        raise CheckpointError(f"checkpoint {path} is damaged: {last_line(error)}") from error


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


def state_dict(checkpoint: object, source: str) -> dict[str, torch.Tensor]:
    """The weights inside a checkpoint, without a DDP prefix.

    Raises:
        UserError: It holds none.
    """
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any(torch.is_tensor(v) for v in weights.values()):
        raise UserError(f"{source} is no checkpoint: it holds no state_dict of tensors")
    return {
        key[len("module.") :] if key.startswith("module.") else key: value
        for key, value in weights.items()
    }


def load_checkpoint(path: str, trust: bool = False) -> dict:
    """Read a local checkpoint as data, not as a program.

    Args:
        path: The file.
        trust: Also accept arbitrary pickled objects.

    Raises:
        UserError: The file is missing, damaged or needs trust.
    """
    try:
        if not trust:
            return read_checkpoint(path)
        check_file(path)
        return torch.load(path, map_location="cpu", weights_only=False)
    except NeedsTrust as error:
        raise UserError(f"{error}; if you trust its origin, add --trust-checkpoint") from error
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # a pickle is a program: anything may come out of it
        raise UserError(f"checkpoint {path} is damaged: {last_line(error)}") from error


def check_checkpoint(model: nn.Module, path: str, trust: bool = False, strict: bool = True) -> dict:
    """The checkpoint belongs to this model.

    Args:
        model: The built model.
        path: A local file; URLs are left to mmengine.
        trust: See :func:`load_checkpoint`.
        strict: Every weight of the model must be there; otherwise (initial weights) at least one.

    Returns:
        The checkpoint; empty for a URL.

    Raises:
        UserError: Keys are missing or shapes differ; the message counts them and names one.
    """
    if is_remote(path):
        return {}
    checkpoint = load_checkpoint(path, trust)
    weights = state_dict(checkpoint, path)
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if shapes:
        key = shapes[0]
        raise UserError(
            f"checkpoint {path} is of another architecture: {len(shapes)} of {len(own)} weights "
            f"have another shape, e.g. {key} {tuple(weights[key].shape)} instead of "
            f"{tuple(own[key].shape)}; use the config it was trained with"
        )
    if len(missing) == len(own) or (strict and missing):
        raise UserError(
            f"checkpoint {path} is of another architecture: {len(missing)} of {len(own)} weights "
            f"are missing, e.g. {missing[0]}; use the config it was trained with"
        )
    return checkpoint


def is_remote(path: str) -> bool:
    """Whether a path is a URL, which mmengine fetches."""
    return "://" in path


def load_weights(model: nn.Module, path: str, trust: bool = False) -> dict:
    """Load a local checkpoint that belongs to this model.

    Returns:
        The whole checkpoint.

    Raises:
        UserError: See :func:`check_checkpoint`; or ``path`` is a URL.
    """
    if is_remote(path):
        raise UserError(f"--checkpoint must be a local file, got {path}")
    checkpoint = check_checkpoint(model, path, trust)
    model.load_state_dict(state_dict(checkpoint, path), strict=False)
    return checkpoint


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
