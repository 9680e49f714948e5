"""Reading what the authors' released code wrote: key names, and how a network is described."""

from __future__ import annotations

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


def _lower(arguments: dict) -> dict:
    """The released code writes 'MLP'."""
    kind = arguments.get("channel_masker")
    if isinstance(kind, str):
        return {**arguments, "channel_masker": kind.lower()}
    if isinstance(kind, (list, tuple)):
        return {**arguments, "channel_masker": [entry.lower() for entry in kind]}
    return arguments
