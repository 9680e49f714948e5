"""The library ``las_mm::`` and the native extension that registers kernels in it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import torch
from mmengine.logging import print_log

from las_mm.compat import register_fake

LIBRARY = torch.library.Library("las_mm", "DEF")
_BUILD_COMMAND = "pip install -e . --no-build-isolation"


def register(schema: str, reference: Callable, fake: Callable) -> None:
    """Define an op by its schema, with the implementation for every device and the one of shapes.

    Args:
        schema: ``name(arguments) -> results``.
        reference: Plain PyTorch; a native kernel takes precedence where there is one.
        fake: Checks the arguments and returns empty tensors of the right shapes.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    register_fake(f"las_mm::{name}", fake, lib=LIBRARY)


def load_native() -> bool:
    """Import ``las_mm._C``, which registers the native kernels; log the reason if it fails."""
    try:
        importlib.import_module("las_mm._C")
    except ModuleNotFoundError as error:
        if error.name != "las_mm._C":
            raise
        print_log(
            "las_mm: the native ops are not built, their (slower) PyTorch reference "
            f"implementations run; build them with `{_BUILD_COMMAND}` in the las_mm checkout.",
            logger="current",
            level=logging.WARNING,
        )
        return False
    except (ImportError, OSError) as error:  # typically built against another torch
        print_log(
            f"las_mm: the native ops are built but CANNOT BE LOADED: {error}. The (slower) PyTorch "
            f"reference implementations run. Rebuild against torch {torch.__version__} with "
            f"`{_BUILD_COMMAND}` in the las_mm checkout.",
            logger="current",
            level=logging.ERROR,
        )
        return False
    return True
