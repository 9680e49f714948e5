"""Networks and checkpoints of the authors' released code, of torchvision, timm and AdaViT.

- :func:`load` and :func:`build`: a released network from a checkpoint, from a specification.
- :func:`convert`: a checkpoint -> our names, with an account of every key;
  ``las_mm convert`` is its command line.
- :mod:`~las_mm.models.released.specification`: how networks are described.

Released ResNets mask channels before the norm, released RegNets after the activation, and their
squeeze-and-excitation averages over the whole map (``se_pool='all'``): :func:`build`, :func:`load`
and :func:`convert` set all three. FLOPs as the authors count them:
``flops_report(activation, counting='released')``.
"""

from las_mm.models.released.names import convert_densenet, convert_regnet, convert_resnet
from las_mm.models.released.specification import (
    backbone_config,
    regnet_arguments,
    resnet_arguments,
)
from las_mm.models.released.transformer import convert_t2t, t2t_arguments

__all__ = [
    "Conversion",
    "ReleasedNetwork",
    "backbone_config",
    "build",
    "convert",
    "convert_densenet",
    "convert_regnet",
    "convert_resnet",
    "convert_t2t",
    "load",
    "regnet_arguments",
    "resnet_arguments",
    "t2t_arguments",
]

_LAZY = dict(
    Conversion="conversion",
    convert="conversion",
    ReleasedNetwork="network",
    build="network",
    load="network",
)


def __getattr__(name: str) -> object:
    """The backbones import the names above; what is built from backbones is imported on use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
