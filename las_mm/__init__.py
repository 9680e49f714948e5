"""las_mm: networks that compute only where an image needs it, for OpenMMLab projects.

Importing the package registers ``las_mm.*`` with mmengine's registries, which mmengine also
does by itself as soon as a config says ``type='las_mm.LASResNet'``.
"""

from las_mm.registry import HOOKS, MODELS
from las_mm.version import __version__

__all__ = ["HOOKS", "MODELS", "__version__"]
