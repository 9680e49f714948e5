"""How a released network is described, as arguments of our backbones.

A specification is a dict (of a JSON file, say):

=============================  ====================================================================
``family``                     ``'resnet'`` or ``'regnet'`` (``'regnetx'``, ``'regnety'``)
``depth`` or ``arch``          18, 34, 50, 101, 152, or ``'resnet50'``; ``'regnety_400mf'``,
                               ``'regnet_y_1_6gf'``, ``'lad_regnet_y_400mf'``, ...
``mode``                       ``'static'``, ``'spatial'``, ``'channel'``, ``'both'``, ``'layer'``
``width``                      of a ResNet: stem channels over 64; default 1
``granularity``                S of spatial and both; default 1
``channel_granularity``        G of channel and both, as all below; default 2
``channel_masker``             ``'mlp'`` (or ``'MLP'``), ``'conv_linear'``; default ``'mlp'``
``channel_masker_layers``      1 or 2, of an MLP; default 2
``channel_reduction``          divisor of the masker's hidden channels; default 16
``channel_mask_position``      ``'before_norm'``, the default of ResNets, or ``'after_act'``, of
                               RegNets
``se_pool``                    of a RegNetY: ``'all'`` (default) or ``'kept'``
``num_classes``                default 1000
=============================  ====================================================================

``mode`` and all from ``granularity`` to ``channel_mask_position`` are one value, one per stage or
one per block; ``None`` is as good as absent, and entries of other names are not read.

A T2T-ViT is described by ``{'transformer': settings}``, see
:func:`~las_mm.models.released.transformer.t2t_arguments`.
"""

from __future__ import annotations

import re

from las_mm.models.released.transformer import t2t_arguments

# What a specification calls the arguments of the backbones, where the names differ.
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
_RESNET_ARCH = re.compile(r"(?:.*_)?resnet[_-]?(\d+)")
_REGNET_ARCH = re.compile(r"(?:lad_|dyn_)?(?:regnet)?[_-]?([xy]?)[_-]?(\d+(?:[._]\d+)?)(mf|gf)?")


def backbone_config(spec: dict) -> dict:
    """The config of the backbone that a specification describes, ``type`` included.

    Raises:
        ValueError: Not a specification, or one of an unknown family, arch, ...
    """
    if isinstance(spec, dict) and "transformer" in spec:
        return dict(type="las_mm.LAUDT2TViT", **t2t_arguments(spec["transformer"]))
    if not isinstance(spec, dict) or not isinstance(spec.get("family"), str):
        raise ValueError(
            "a specification is a dict with at least family ('resnet' or 'regnet'), depth or arch, "
            f"and mode, got {spec!r}"
        )
    if "regnet" in spec["family"].lower():
        return dict(type="las_mm.LASRegNet", **regnet_arguments(spec))
    return dict(type="las_mm.LASResNet", **resnet_arguments(spec))


def num_classes(spec: dict) -> int:
    """Classes of the network, by default ImageNet's 1000."""
    found = spec.get("transformer", spec).get("num_classes")
    return 1000 if found is None else found


def resnet_arguments(spec: dict) -> dict:
    """The arguments of :class:`LASResNet` that a specification of a released ResNet amounts to.

    Args:
        spec: See the module's description.

    Raises:
        ValueError: Another family, or no depth or mode.
    """
    if spec.get("family") != "resnet":
        raise ValueError(
            f"family of the specification must be 'resnet', got {spec.get('family')!r}"
        )
    arch = _RESNET_ARCH.fullmatch(str(spec.get("arch", "")).lower())
    if arch is not None:
        spec = {"depth": int(arch[1]), **spec}
    found = _settings(spec, "depth")
    width = spec.get("width")
    channels = round(_STEM_CHANNELS * (1 if width is None else width))
    return dict(
        depth=spec["depth"],
        stem_channels=channels,
        base_channels=channels,
        **{"channel_position": "before_norm", **found},
    )


def regnet_arguments(spec: dict) -> dict:
    """The arguments of :class:`LASRegNet` that a specification of a released RegNet amounts to.

    Args:
        spec: See the module's description.

    Raises:
        ValueError: Another family, no arch or mode, an unknown arch, or a width.
    """
    family, arch = str(spec.get("family")), str(spec.get("arch"))
    kind = re.fullmatch(r"regnet[_-]?([xy]?)", family.lower())
    if kind is None:
        raise ValueError(f"family of the specification must be 'regnet', got {family!r}")
    found = _settings(spec, "arch")
    match = _REGNET_ARCH.fullmatch(arch.lower())
    letter = (match[1] or kind[1]) if match else ""
    if match is None or not letter or (kind[1] and letter != kind[1]):
        raise ValueError(
            f"arch of the specification must be like 'regnety_400mf', got {arch!r} in the family "
            f"{family!r}"
        )
    if spec.get("width") not in (None, 1):
        raise ValueError(
            f"width of the specification of a RegNet must be 1, got {spec['width']!r}: RegNets are "
            "scaled by their arch"
        )
    size, unit = match[2].replace("_", ".").removesuffix(".0"), match[3]
    if unit is None:
        unit = "mf" if float(size) >= 100 else "gf"
    pool = spec.get("se_pool")
    if pool is None and letter == "y":
        pool = "all"
    return dict(
        arch=f"regnet{letter}_{size}{unit}",
        **({} if pool is None else {"se_pool": pool}),
        **{"channel_position": "after_act", **found},
    )


def _settings(spec: dict, needed: str) -> dict:
    """What a specification says of the blocks, under our names."""
    for key in (needed, "mode"):
        if spec.get(key) is None:
            raise ValueError(f"the specification must name its {key}, got {sorted(spec)}")
    found = {ours: spec[key] for key, ours in _ARGUMENTS.items() if spec.get(key) is not None}
    if "channel_masker" in found:
        found["channel_masker"] = _lower(found["channel_masker"])
    return {"granularity": 1, **found}


def _lower(kind: object) -> object:
    """The released code writes 'MLP'."""
    if isinstance(kind, (list, tuple)):
        return [_lower(entry) for entry in kind]
    return kind.lower() if isinstance(kind, str) else kind
