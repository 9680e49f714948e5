"""Reading what the authors' released code wrote: key names, and how a network is described."""

from __future__ import annotations

import re

from torch import Tensor

# What a specification calls the arguments of LASResNet, where the names differ.
_ARGUMENTS = dict(
    mode="mode",
    granularity="granularity",
    channel_granularity="channel_granularity",
    channel_masker="channel_masker",
    channel_masker_layers="channel_masker_layers",
    channel_reduction="channel_reduction",
    channel_mask_position="channel_position",
)
_STEM_CHANNELS = 64


def resnet_arguments(spec: dict) -> dict:
    """The arguments of :class:`LASResNet` that a specification of a released ResNet amounts to.

    Args:
        spec: ``family`` ('resnet'), ``depth`` and ``mode``; optional are ``width`` (times 64
            channels in the stem), ``granularity`` (S) and, of channel and both,
            ``channel_granularity`` (G), ``channel_masker``, ``channel_masker_layers``,
            ``channel_reduction`` and ``channel_mask_position`` (by default 'before_norm', where
            the released ResNets have it). Each of them is one value, or one per stage or block;
            ``None`` is as good as absent.

    Raises:
        ValueError: Another family, or no depth or mode.
    """
    if spec.get("family") != "resnet":
        raise ValueError(
            f"family of the specification must be 'resnet', got {spec.get('family')!r}"
        )
    for key in ("depth", "mode"):
        if key not in spec:
            raise ValueError(f"the specification must name its {key}, got {sorted(spec)}")
    channels = round(_STEM_CHANNELS * spec.get("width", 1))
    given = {theirs: value for theirs, value in spec.items() if value is not None}
    found = {ours: given[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in given}
    found = {"channel_position": "before_norm", "granularity": 1, **found}
    return dict(
        depth=spec["depth"], stem_channels=channels, base_channels=channels, **_lower(found)
    )


def convert_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a released LASNet or LAUDNet ResNet checkpoint -> those of :class:`LASResNet`.

    Convolutions and norms carry torchvision's names in all. A masker of positions is called
    ``masker`` with a 1x1 convolution ``conv2`` by LASNet and ``masker_spatial`` by LAUDNet, ours
    ``masker`` with ``conv``; ``masker_channel`` is the same. The classifier (``fc.*``) is kept.

    Args:
        weights: The released ``state_dict``, with or without DDP's ``module.`` prefix.

    Returns:
        The same tensors under our names.
    """
    return {
        key.removeprefix("module.")
        .replace(".masker.conv2.", ".masker.conv.")
        .replace(".masker_spatial.", ".masker."): value
        for key, value in weights.items()
    }


def regnet_arguments(spec: dict) -> dict:
    """The arguments of :class:`LASRegNet` that a specification of a released RegNet amounts to.

    Args:
        spec: ``family`` ('regnet'), ``arch`` (``'regnety_400mf'``, or as torchvision writes it,
            ``'regnet_y_400mf'``) and ``mode``; the others as for :func:`resnet_arguments`, with
            ``channel_mask_position`` by default 'after_act' and ``se_pool`` by default 'all',
            as the released RegNets have them.

    Raises:
        ValueError: Another family, no arch or mode, or an unknown arch.
    """
    family, arch = spec.get("family"), str(spec.get("arch"))
    if family not in ("regnet", "regnetx", "regnety"):
        raise ValueError(f"family of the specification must be 'regnet', got {family!r}")
    for key in ("arch", "mode"):
        if key not in spec:
            raise ValueError(f"the specification must name its {key}, got {sorted(spec)}")
    found = _REGNET_ARCH.fullmatch(arch.lower())
    if found is None:
        raise ValueError(f"arch of the specification must be like 'regnety_400mf', got {arch!r}")
    letter, size, unit = found.groups()
    size = size.replace("_", ".").removesuffix(".0")
    if unit is None:
        unit = "mf" if float(size) >= 100 else "gf"
    arguments = {ours: spec[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in spec}
    return dict(
        arch=f"regnet{letter}_{size}{unit}",
        se_pool=spec.get("se_pool", "all"),
        **_lower({"channel_position": "after_act", "granularity": 1, **arguments}),
    )


_REGNET_ARCH = re.compile(r"(?:regnet)?[_-]?([xy])[_-]?(\d+(?:[._]\d+)?)(mf|gf)?")
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
}
_REGNET_STEM = {"stem.0.": "conv1.", "stem.1.": "bn1."}
_REGNET_BLOCK = re.compile(r"trunk_output\.block(\d+)\.block\1-(\d+)\.")


def convert_regnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of a torchvision or released RegNet checkpoint -> those of :class:`LASRegNet`.

    - ``stem.0``, ``stem.1``: ``conv1``, ``bn1``
    - ``trunk_output.blockI.blockI-J``: ``layerI.J``, and inside of it:
    - ``f.a.0``, ``f.a.1`` (likewise b, c): ``conv1``, ``bn1`` (2, 3)
    - ``f.se.fc1``, ``f.se.fc2``: ``se.fc1``, ``se.fc2``
    - ``proj.0``, ``proj.1``: ``downsample.0``, ``downsample.1``
    - ``f.masker_spatial.conv``: ``masker.conv``
    - ``f.masker_channel.*``: ``masker_channel.*``

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


def _lower(arguments: dict) -> dict:
    """The released code writes 'MLP'."""
    kind = arguments.get("channel_masker")
    if isinstance(kind, str):
        return {**arguments, "channel_masker": kind.lower()}
    if isinstance(kind, (list, tuple)):
        return {**arguments, "channel_masker": [entry.lower() for entry in kind]}
    return arguments
