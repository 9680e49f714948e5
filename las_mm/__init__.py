"""las_mm: networks that compute only where an image needs it, for OpenMMLab projects.

Importing the package registers ``las_mm.*`` with mmengine's registries, which mmengine also
does by itself as soon as a config says ``type='las_mm.LASResNet'``.
"""

import sys
from pathlib import Path
from typing import Any

from las_mm.version import __version__

# The command tells what it can do without torch, and imports what the rest needs when it needs it.
if not sys.argv or Path(sys.argv[0]).stem not in ("las_mm", "-m"):
    from las_mm.registry import HOOKS, MODELS

_BACKBONES = ["LASRegNet", "LASResNet", "LAUDT2TViT"]
__all__ = [
    "HOOKS",
    "MODELS",
    "ActivationMetric",
    "__version__",
    "explain",
    "prepare",
    "set_budget",
    *_BACKBONES,
]


def __getattr__(name: str) -> Any:
    if name in ("HOOKS", "MODELS"):
        from las_mm import registry

        return getattr(registry, name)
    # These need mmpretrain, which a project that only reads device files may lack.
    if name == "explain":
        from las_mm.explanation import explain

        return explain
    if name == "prepare":
        from las_mm.models.sparse import prepare

        return prepare
    if name == "set_budget":
        from las_mm.budget import set_budget

        return set_budget
    if name == "ActivationMetric":
        from las_mm.hooks import ActivationMetric

        return ActivationMetric
    if name in _BACKBONES:
        from las_mm import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
