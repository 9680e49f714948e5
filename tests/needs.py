"""Marks of tests that need what not every torch has; each skip says what is missing."""

from __future__ import annotations

import pytest
import torch

TORCH = f"torch {torch.__version__}"

OPCHECK = pytest.mark.skipif(
    not hasattr(torch.library, "opcheck"),
    reason=f"{TORCH} has no torch.library.opcheck (2.4 has)",
)
RAISE = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"),
    reason=f"what a traced function raises is lost in the Dynamo of {TORCH} (not in 2.4's)",
)
EXPORT = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason=f"the torch.export of {TORCH} takes no tensors but parameters and buffers (2.7's does)",
)
ONE_DYNAMIC_GRAPH = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"),
    reason=f"{TORCH} compiles a function of dynamic shapes twice (2.4 once)",
)
