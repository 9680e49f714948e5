"""Checkpoints of other code -> ours, with an account of every key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from las_mm.models.maskers import is_masker
from las_mm.models.released.names import convert_densenet, convert_regnet, convert_resnet
from las_mm.models.released.recognition import recognise
from las_mm.models.released.specification import backbone_config
from las_mm.models.released.transformer import (
    T2T,
    THRESHOLDS,
    convert_t2t,
    is_transformer,
    recognise_t2t,
    t2t_key,
)
from las_mm.registry import MODELS

BACKBONE, HEAD = "backbone.", "head."
_WRAPPERS = (
    "state_dict",
    "state_dict_ema",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
)
# One weight that every supported network has, and how such names are converted.
_ANCHORS = {
    "layer1.0.conv1.weight": convert_resnet,
    "trunk_output.block1.block1-0.f.a.0.weight": convert_regnet,
    "s1.b1.conv1.conv.weight": convert_regnet,
    "features.denseblock1.denselayer1.conv1.weight": convert_densenet,
    "features.denseblock1.denselayer1.conv.1.weight": convert_densenet,
    "stages.0.block.0.conv1.weight": convert_densenet,
}
_OWN_PART = re.compile(r"(conv1|bn1|stem|layer\d+|trunk_output|s\d+|features|stages|transitions)\b")
_HEADS = ("head", "head.fc", "head.layers.head")  # of T2T-ViT's authors, ours, mmpretrain's
_COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and what became of each key.

    Attributes:
        backbone: Config of the backbone, ``type`` included.
        weights: Under the names of mmpretrain's ``ImageClassifier``: ``backbone.*`` and, where
            there was a classifier, ``head.fc.weight`` and ``head.fc.bias``.
        used: Key in the source -> key in ``weights``.
        unused: Keys of the source that no part of the network reads.
        missing: Weights of the network that the source lacks: those of maskers, in static
            checkpoints. They start mostly on.
        added: Counters of BN updates, which old checkpoints lack, set to 0.
    """

    backbone: dict
    weights: dict[str, Tensor]
    used: dict[str, str]
    unused: list[str]
    missing: list[str]
    added: list[str]

    @property
    def num_classes(self) -> int | None:
        """Classes of the classifier; ``None`` without one."""
        weight = self.weights.get(f"{HEAD}fc.weight")
        return None if weight is None else len(weight)

    def bare(self) -> dict[str, Tensor]:
        """The weights of the backbone without prefix."""
        return {
            key.removeprefix(BACKBONE): value
            for key, value in self.weights.items()
            if key.startswith(BACKBONE)
        }


def convert(
    checkpoint: Mapping,
    spec: dict | None = None,
    *,
    mode: str | Sequence | None = None,
    granularity: int | Sequence | None = None,
    **settings: object,
) -> Conversion:
    """Convert a released (LASNet, LAUDNet), torchvision, timm or mmpretrain checkpoint.

    ResNet-18 to 152, the RegNets that :class:`LASRegNet` knows, and DenseNets; the weights may be
    inside ``{'state_dict': ...}`` or ``{'model': ...}`` and have prefixes such as ``module.``.

    Args:
        checkpoint: What ``torch.load`` returned.
        spec: The network's specification, see :mod:`las_mm.models.released.specification`.
            Without one the keys and shapes say what they can, see
            :func:`~las_mm.models.released.recognition.recognise`.
        mode: Without ``spec``: what the blocks do, where the keys leave it open. ``'layer'`` and
            ``'spatial'`` have the same keys, and static weights may start any mode.
        granularity: Without ``spec``: S of spatial and both, which no key tells.
        settings: Without ``spec``: other arguments of the backbone, instead of what was recognised.

    Raises:
        ValueError: The checkpoint is not recognised, belongs to another network than ``spec``
            says, or leaves open what is not given; the message says what.
    """
    found = _inner(checkpoint)
    if is_transformer(found):
        return _convert_t2t(found, spec, mode, settings)
    prefix, anchor = _prefix(found)
    names = _names(found, prefix, anchor)
    head = {key: f"{HEAD}fc.{key.rpartition('.')[2]}" for key in found if _is_head(key, prefix)}
    weights = {ours: found[theirs] for theirs, ours in names.items()}
    if spec is None:
        config = _complete(recognise(weights), mode, granularity, settings)
    elif mode is not None or granularity is not None or settings:
        raise ValueError("mode, granularity and other settings are the specification's: give one")
    else:
        config = backbone_config(spec)
    own = _template(config)
    # A classifier's `fc` lies beside the backbone's parts in torchvision's names.
    names = {theirs: ours for theirs, ours in names.items() if ours in own}
    _check(own, found, names, head, prefix)
    converted = {BACKBONE + ours: found[theirs] for theirs, ours in names.items()}
    absent = [key for key in own if BACKBONE + key not in converted]
    added = [key for key in absent if key.endswith(_COUNTER) and not is_masker(key)]
    converted.update({BACKBONE + key: torch.tensor(0) for key in added})
    converted.update((ours, found[theirs]) for theirs, ours in head.items())
    used = {theirs: BACKBONE + ours for theirs, ours in names.items()} | head
    return Conversion(
        backbone=config,
        weights=converted,
        used=used,
        unused=[key for key in found if key not in used],
        missing=[key for key in absent if key not in added],
        added=added,
    )


def _convert_t2t(
    found: dict[str, Tensor], spec: dict | None, mode: object, settings: dict[str, object]
) -> Conversion:
    """The same of a T2T-ViT, whose query, key and value become one weight."""
    anchor = "tokens_to_token.project.weight"
    prefix = next((k.removesuffix(anchor) for k in found if k.endswith(anchor)), "")
    inside = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    thresholds = THRESHOLDS if spec is None else spec["transformer"].get("threshold", THRESHOLDS)
    ours = convert_t2t(inside, thresholds)
    if spec is None:
        given = dict(settings) if mode is None else dict(settings, mode=mode)
        arch = given.get("arch")
        heads = arch.get("num_heads", 0) if isinstance(arch, dict) else 0
        config = dict(type=T2T, **{**recognise_t2t(ours, heads), **given})
    else:
        config = backbone_config(spec)
    own = _template(config)
    performer = "tokens_to_token.attention1.kqv.weight" in inside
    names = {prefix + key: t2t_key(key, performer) for key in inside}
    names = {theirs: name for theirs, name in names.items() if name in own}
    outer = prefix.removesuffix(BACKBONE)
    head = {f"{outer}{n}.{p}": f"{HEAD}fc.{p}" for n in _HEADS for p in ("weight", "bias")}
    head = {key: name for key, name in head.items() if key in found and key not in names}
    values = {theirs: ours[name] for theirs, name in names.items()}
    _check(own, values, names, head, prefix)
    used = {theirs: BACKBONE + name for theirs, name in names.items()} | head
    weights = {BACKBONE + name: ours[name] for name in names.values()}
    weights.update((name, found[key]) for key, name in head.items())
    left = [key for key in found if key not in used]
    missing = [key for key in own if BACKBONE + key not in weights]
    return Conversion(config, weights, used, left, missing, [])


def _inner(checkpoint: object) -> dict[str, Tensor]:
    """The weights inside the wrappers of a checkpoint."""
    inside = checkpoint
    while isinstance(inside, Mapping):
        weights = {k: v for k, v in inside.items() if isinstance(k, str) and torch.is_tensor(v)}
        wrapped = [key for key in _WRAPPERS if isinstance(inside.get(key), Mapping)]
        if not wrapped and weights:
            return weights
        if not wrapped:
            break
        inside = inside[wrapped[0]]
    listed = sorted(map(str, inside)) if isinstance(inside, Mapping) else type(inside).__name__
    raise ValueError(
        f"no weights are found: expected a state_dict, or a dict with one of "
        f"{', '.join(_WRAPPERS)}, got {listed}"
    )


def _prefix(weights: dict[str, Tensor]) -> tuple[str, str]:
    """What stands before the names of the network's weights, and which naming they have."""
    found = [
        (key.removesuffix(anchor), anchor)
        for anchor in _ANCHORS
        for key in weights
        if key == anchor or key.endswith(f".{anchor}")
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        shown = ", ".join(sorted(weights)[:3])
        raise ValueError(
            "it is no ResNet, RegNet or DenseNet in the names of torchvision, timm, mmpretrain or "
            f"the authors' code: none of {', '.join(_ANCHORS)} is among the keys {shown}, ..."
        )
    raise ValueError(
        "it holds several networks: there are "
        f"{' and '.join(prefix + anchor for prefix, anchor in found)}; keep one of them"
    )


def _names(weights: dict[str, Tensor], prefix: str, anchor: str) -> dict[str, str]:
    """Names in the source -> names in the backbone, of all that has the prefix."""
    convert_names = _ANCHORS[anchor]
    inside = [key for key in weights if key.startswith(prefix)]
    names = {}
    for key in inside:
        (ours,) = convert_names({key.removeprefix(prefix): weights[key]})
        names[key] = ours
    return names


def _is_head(key: str, prefix: str) -> bool:
    """Whether it belongs to the classifier: beside or, in torchvision's names, in the network."""
    outer = prefix.removesuffix(BACKBONE)
    layer, _, part = key.removeprefix(outer).rpartition(".")
    known = layer in ("fc", "head.fc", "classifier") and part in ("weight", "bias")
    return key.startswith(outer) and known


def _complete(config: dict, mode: object, granularity: object, settings: dict[str, object]) -> dict:
    """What the keys leave open, filled from what the caller gave."""
    blocks = config["mode"]
    flat = {
        entry
        for stage in (blocks if isinstance(blocks, list) else [blocks])
        for entry in (stage if isinstance(stage, list) else [stage])
    }
    positions = flat & {"spatial", "both"}
    if positions and granularity is None and mode != "layer":
        way_out = "" if "both" in positions else ", or mode='layer' where whole blocks are skipped"
        raise ValueError(
            "the checkpoint has maskers of positions, and no key tells the side S of their "
            f"patches: give granularity, such as 4 4 2 1{way_out}, or a specification"
        )
    if granularity is not None and not positions and mode is None:
        raise ValueError(
            f"granularity {granularity!r} was given, but the checkpoint has no maskers of "
            "positions; give mode='spatial' too to start such a network from it"
        )
    given = dict(mode=mode, granularity=granularity, **settings)
    return {**config, **{key: value for key, value in given.items() if value is not None}}


def _template(config: dict) -> dict[str, Tensor]:
    """The names and shapes of a backbone's weights."""
    backbone = MODELS.get(config["type"])
    arguments = {key: value for key, value in config.items() if key != "type"}
    return dict(backbone(**arguments).state_dict())


def _check(
    own: dict[str, Tensor],
    found: dict[str, Tensor],
    names: dict[str, str],
    head: dict[str, str],
    prefix: str,
) -> None:
    """Everything but maskers is there, finite, has its shape, and nothing of the network is left.

    Raises:
        ValueError: It does not.
    """
    shapes = [key for key, ours in names.items() if found[key].shape != own[ours].shape]
    absent = set(own) - set(names.values())
    dynamic = any(is_masker(ours) for ours in names.values())
    missing = [key for key in absent if dynamic or not is_masker(key)]
    missing = sorted(key for key in missing if is_masker(key) or not key.endswith(_COUNTER))
    inside = (key for key in found if key.startswith(prefix) and key not in names)
    left = [key for key in inside if _OWN_PART.match(key.removeprefix(prefix))]
    if shapes:
        key = shapes[0]
        raise ValueError(
            f"{len(shapes)} of {len(own)} weights have another shape than the network has, e.g. "
            f"{key}: {tuple(found[key].shape)} instead of {tuple(own[names[key]].shape)}"
        )
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(own)} weights of the network are missing, e.g. {missing[0]}"
        )
    if left:
        raise ValueError(
            f"{len(left)} weights have no place in the network, e.g. {left[0]}: it is another "
            "network than the one recognised or specified"
        )
    used = [key for key in (*names, *head) if key in found]
    damaged = [
        key
        for key in used
        if not torch.isfinite(found[key]).all()
        or (key.endswith("running_var") and (found[key] < 0).any())
    ]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(used)} weights contain NaN, infinity or a "
            f"negative variance, e.g. {damaged[0]}: the file is damaged, or its training diverged"
        )
