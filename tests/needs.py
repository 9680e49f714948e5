"""Marks of tests that need what not every stack has; each skip says what is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils import flop_counter

TORCH = f"torch {torch.__version__}"
NO_MMDET = "mmdet is not installed"
HAS_MMDET = importlib.util.find_spec("mmdet") is not None
_recent = hasattr(torch.compiler, "is_exporting")  # torch 2.7

MMDET = pytest.mark.skipif(not HAS_MMDET, reason=NO_MMDET)
OPCHECK = pytest.mark.skipif(
    not hasattr(torch.library, "opcheck"), reason=f"{TORCH} has no torch.library.opcheck"
)
RAISE = pytest.mark.skipif(
    not _recent, reason=f"{TORCH}: torch.compile drops the message of what a traced function raises"
)
EXPORT = pytest.mark.skipif(
    not _recent,
    reason=f"{TORCH}: torch.export takes no module that sets an attribute, or that holds tensors "
    "besides parameters and buffers",
)
FLOPS = pytest.mark.skipif(
    not hasattr(flop_counter, "flop_registry"),
    reason=f"{TORCH}: FlopCounterMode takes only formulas of shapes",
)
ONE_COMPILATION = pytest.mark.skipif(
    not _recent, reason=f"{TORCH}: torch.compile compiles anew after every las_mm.prepare"
)
ONE_DYNAMIC_GRAPH = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),  # 2.11 does not, 2.14 does
    reason=f"{TORCH}: torch.compile(dynamic=True) makes two graphs where 2.14 makes one",
)
