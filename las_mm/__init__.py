"""las_mm: networks that compute only where an image needs it, for OpenMMLab projects.

Importing the package registers ``las_mm.*`` with mmengine's registries, which mmengine also
does by itself as soon as a config says ``type='las_mm.LASResNet'``.
"""

from typing import Any

from las_mm.registry import HOOKS, MODELS
from las_mm.version import __version__

_BACKBONES = ["LASRegNet", "LASResNet"]
__all__ = ["HOOKS", "MODELS", "__version__", "explain", "prepare", *_BACKBONES]


def __getattr__(name: str) -> Any:
    # These need mmpretrain, which a project that only reads device files may lack.
    if name == "explain":
        from las_mm.explanation import explain

        return explain
    if name == "prepare":
        from las_mm.models.sparse import prepare

        return prepare
    if name in _BACKBONES:
        from las_mm import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
