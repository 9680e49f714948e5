"""Reading checkpoints in the format of the authors' released code."""

from __future__ import annotations

import re

from torch import Tensor


def convert_lasnet_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a released LASNet-ResNet checkpoint -> those of :class:`LASResNet`.

    Convolutions and norms carry torchvision's names in both; a released masker's 1x1 convolution
    is called ``conv2``, ours ``conv``. The classifier (``fc.*``) is kept as it is.

    Args:
        weights: The released ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {
        key.removeprefix("module.").replace(".masker.conv2.", ".masker.conv."): value
        for key, value in weights.items()
    }


_REGNET_PARTS = {
    "proj.0.": "downsample.0.",
    "proj.1.": "downsample.1.",
    "f.a.0.": "conv1.",
    "f.a.1.": "bn1.",
    "f.b.0.": "conv2.",
    "f.b.1.": "bn2.",
    "f.se.": "se.",
    "f.c.0.": "conv3.",
    "f.c.1.": "bn3.",
    "f.masker_spatial.": "masker.",
    "f.masker_channel.": "channel_masker.",
}
_REGNET_STEM = {"stem.0.": "conv1.", "stem.1.": "bn1."}
_REGNET_BLOCK = re.compile(r"trunk_output\.block(\d+)\.block\1-(\d+)\.")


def convert_regnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a torchvision or released RegNet checkpoint -> those of :class:`LASRegNet`.

    ============================================  ==========================================
    torchvision and released                      ours
    ============================================  ==========================================
    ``stem.0``, ``stem.1``                        ``conv1``, ``bn1``
    ``trunk_output.blockI.blockI-J``              ``layerI.J``, and inside of it:
    ``f.a``, ``f.b``, ``f.c`` ``.0``, ``.1``      ``conv1``, ``bn1``, ... ``conv3``, ``bn3``
    ``f.se.fc1``, ``f.se.fc2``                    ``se.fc1``, ``se.fc2``
    ``proj.0``, ``proj.1``                        ``downsample.0``, ``downsample.1``
    ``f.masker_spatial.conv``                     ``masker.conv``
    ``f.masker_channel.*``                        ``channel_masker.*``
    ============================================  ==========================================

    Other keys (the classifier, ``fc.*``) keep their names.

    Args:
        weights: The ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {_regnet_key(key.removeprefix("module.")): value for key, value in weights.items()}


def _regnet_key(key: str) -> str:
    block = _REGNET_BLOCK.match(key)
    start = f"layer{block[1]}.{block[2]}." if block else ""
    rest = key[block.end() :] if block else key
    for theirs, ours in (_REGNET_PARTS if block else _REGNET_STEM).items():
        if rest.startswith(theirs):
            return start + ours + rest.removeprefix(theirs)
    return key
