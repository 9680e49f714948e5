"""Key names of other code's checkpoints -> ours."""

from __future__ import annotations

import re

from torch import Tensor

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
    "f.masker_channel.": "masker_channel.",
    "masker.conv2.": "masker.conv.",
}
_REGNET_STEM = {"stem.0.": "conv1.", "stem.1.": "bn1."}
_REGNET_BLOCK = re.compile(r"trunk_output\.block(\d+)\.block\1-(\d+)\.")
_TIMM_PARTS = {
    "conv1.conv.": "conv1.",
    "conv1.bn.": "bn1.",
    "conv2.conv.": "conv2.",
    "conv2.bn.": "bn2.",
    "se.": "se.",
    "conv3.conv.": "conv3.",
    "conv3.bn.": "bn3.",
    "downsample.conv.": "downsample.0.",
    "downsample.bn.": "downsample.1.",
}
_TIMM_STEM = {"stem.conv.": "conv1.", "stem.bn.": "bn1."}
_TIMM_BLOCK = re.compile(r"s(\d+)\.b(\d+)\.")

_DENSE_BLOCK = re.compile(r"features\.denseblock(\d+)\.")
# Old checkpoints of torchvision have a dot more: norm.1, conv.2.
_DENSE_LAYER = re.compile(r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?(\d)")
_DENSE_TRANSITION = re.compile(r"features\.transition(\d+)\.")


def convert_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a released LASNet or LAUDNet ResNet checkpoint -> those of :class:`LASResNet`.

    Convolutions and norms carry torchvision's names in all, timm's included. A masker of positions
    is called ``masker`` with a 1x1 convolution ``conv2`` by LASNet and ``masker_spatial`` by
    LAUDNet, ours ``masker`` with ``conv``; ``masker_channel`` is the same. The classifier
    (``fc.*``) is kept.

    Args:
        weights: The released ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {_resnet_key(key.removeprefix("module.")): value for key, value in weights.items()}


def convert_regnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a torchvision, released or timm RegNet checkpoint -> those of our LASRegNet.

    - ``stem.0``, ``stem.1``: ``conv1``, ``bn1``
    - ``trunk_output.blockI.blockI-J``: ``layerI.J``, and inside of it:
    - ``f.a.0``, ``f.a.1`` (likewise b, c): ``conv1``, ``bn1`` (2, 3)
    - ``f.se.fc1``, ``f.se.fc2``: ``se.fc1``, ``se.fc2``
    - ``proj.0``, ``proj.1``: ``downsample.0``, ``downsample.1``
    - ``f.masker_spatial.conv`` (LAUDNet), ``masker.conv2`` (LASNet): ``masker.conv``
    - ``f.masker_channel.*``: ``masker_channel.*``

    and in timm's ``stem.conv``, ``stem.bn``, ``sI.bJ`` (J from 1), ``conv1.conv``, ``conv1.bn``,
    ``downsample.conv``, ... Other keys (the classifier) keep their names.

    Args:
        weights: The ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {_regnet_key(key.removeprefix("module.")): value for key, value in weights.items()}


def convert_densenet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a torchvision or timm DenseNet checkpoint -> those of our LASDenseNet.

    - ``features.conv0``, ``norm0``: ``stem.0``, ``stem.1``
    - ``features.denseblockI.denselayerJ``: ``stages.(I-1).block.(J-1)``
    - ``features.transitionI``: ``transitions.(I-1)``
    - ``features.norm5``: ``0`` of the last of the ``transitions``

    Other keys (the classifier, mmpretrain's) keep their names.

    Args:
        weights: The ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    found = {key.removeprefix("module."): value for key, value in weights.items()}
    blocks = [int(match[1]) for match in map(_DENSE_BLOCK.match, found) if match]
    # A single key is one of a published network's, which has four.
    last = max(blocks) if len(found) > 1 and blocks else 4
    return {_densenet_key(key, last): value for key, value in found.items()}


def _densenet_key(key: str, last: int) -> str:
    layer, transition = _DENSE_LAYER.match(key), _DENSE_TRANSITION.match(key)
    if layer is not None:
        stage, block, part, number = layer.groups()
        return f"stages.{int(stage) - 1}.block.{int(block) - 1}.{part}{number}{key[layer.end() :]}"
    if transition is not None:
        return f"transitions.{int(transition[1]) - 1}.{key[transition.end() :]}"
    fixed = dict(conv0="stem.0", norm0="stem.1", norm5=f"transitions.{last - 1}.0")
    for theirs, ours in fixed.items():
        if key.startswith(f"features.{theirs}."):
            return ours + key.removeprefix(f"features.{theirs}")
    return key


def _resnet_key(key: str) -> str:
    return key.replace(".masker.conv2.", ".masker.conv.").replace(".masker_spatial.", ".masker.")


def _regnet_key(key: str) -> str:
    block, parts, first = _REGNET_BLOCK.match(key), _REGNET_PARTS, 0
    if block is None:
        block, parts, first = _TIMM_BLOCK.match(key), _TIMM_PARTS, 1
    if block is None:
        start, rest, parts = "", key, {**_REGNET_STEM, **_TIMM_STEM}
    else:
        start, rest = f"layer{block[1]}.{int(block[2]) - first}.", key[block.end() :]
    for theirs, ours in parts.items():
        if rest.startswith(theirs):
            return start + ours + rest.removeprefix(theirs)
    return key
