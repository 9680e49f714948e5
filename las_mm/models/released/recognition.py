"""What the keys and shapes of a checkpoint say about its network."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from las_mm.network.architectures import ARCHS, DENSENETS, regnet_stages
from las_mm.network.bottleneck import channel_hidden

_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.")
_DENSE_LAYER = re.compile(r"stages\.(\d+)\.block\.(\d+)\.")
_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_BASIC_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
# The usual ones first: several may give the same number of hidden channels.
_REDUCTIONS = dict.fromkeys((16, 8, 4, 32, 2, 1, 64, *range(3, 64)))


def recognise(weights: dict[str, Tensor]) -> dict:
    """The config of the backbone that these weights belong to, as far as they tell.

    Depth or arch, width, the maskers of each block, G and the masker's layers and reduction follow
    from names and shapes. Positions and layers have the same masker: such blocks are called
    ``'spatial'`` and their S, which no shape tells, is left out. Where the channel mask sits and
    what the squeeze-and-excitation of a dynamic network averages over is taken to be as in the
    authors' networks.

    Args:
        weights: Under our names, see :mod:`las_mm.models.released.names`.

    Returns:
        Arguments of the backbone with its ``type``; ``mode`` is ``'static'`` without maskers.

    Raises:
        ValueError: No such network has these names and shapes; the message says which of them.
    """
    if "stages.0.block.0.conv1.weight" in weights:
        return _densenet(weights)
    stages = _stages(weights)
    first = weights["conv1.weight"]
    if first.ndim != 4 or first.shape[1] != 3 or first.shape[2] not in (3, 7):
        raise ValueError(
            "the first convolution must read 3 channels with 7x7 (ResNet) or 3x3 (RegNet) taps, "
            f"got weights of shape {tuple(first.shape)}"
        )
    config = _resnet(weights, stages) if first.shape[2] == 7 else _regnet(weights, stages)
    config |= _settings(weights, stages)
    if "layer1.0.se.fc1.weight" in weights and config["mode"] != "static":
        # Of a static network both means are the same: it may start one with the default.
        config["se_pool"] = "all"
    return config


def _stages(weights: dict[str, Tensor]) -> list[int]:
    """Blocks per stage."""
    found: dict[int, int] = {}
    for key in weights:
        match = _BLOCK.match(key)
        if match:
            stage, block = int(match[1]), int(match[2])
            found[stage] = max(found.get(stage, 0), block + 1)
    if sorted(found) != [1, 2, 3, 4] or "conv1.weight" not in weights:
        raise ValueError(
            "it is neither a ResNet (keys layer1.0.conv1.weight, ...) nor a RegNet (keys "
            "trunk_output.block1.block1-0.f.a.0.weight, ... or s1.b1.conv1.conv.weight, ...) of "
            f"four stages; it holds {', '.join(sorted(weights)[:3])}, ..."
        )
    blocks = [found[stage] for stage in sorted(found)]
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            convs = [f"conv{n}" for n in (1, 2, 3)][: 2 if _is_basic(weights) else 3]
            for conv in convs:
                if f"layer{stage}.{i}.{conv}.weight" not in weights:
                    raise ValueError(
                        f"block {i} of stage {stage} has no {conv}, unlike the first block"
                    )
    return blocks


def _is_basic(weights: dict[str, Tensor]) -> bool:
    """Whether the first block has two convolutions."""
    return "layer1.0.conv3.weight" not in weights


def _resnet(weights: dict[str, Tensor], stages: list[int]) -> dict:
    basic = _is_basic(weights)
    depths = _BASIC_DEPTHS if basic else _DEPTHS
    if tuple(stages) not in depths:
        known = ", ".join("-".join(map(str, blocks)) for blocks in depths)
        what = "basic blocks (18, 34 layers)" if basic else "bottlenecks (50, 101, 152 layers)"
        raise ValueError(f"a ResNet must have {known} {what}, got {'-'.join(map(str, stages))}")
    conv2 = weights["layer1.0.conv2.weight"]
    if conv2.shape[0] != conv2.shape[1]:
        raise ValueError("conv2 has groups: ResNeXts have no dynamic form here")
    width = len(weights["layer1.0.conv1.weight"])
    widened = len(weights[f"layer1.0.conv{2 if basic else 3}.weight"])
    if widened != (width if basic else 4 * width):
        raise ValueError(
            f"a block must have {'' if basic else '4 times '}as many outputs as inner channels, "
            f"got {widened} and {width}: wide ResNets have no dynamic form here"
        )
    return dict(
        type="las_mm.LASResNet",
        depth=depths[tuple(stages)],
        stem_channels=weights["conv1.weight"].shape[0],
        base_channels=weights["layer1.0.conv1.weight"].shape[0],
    )


def _densenet(weights: dict[str, Tensor]) -> dict:
    found: dict[int, int] = {}
    for match in filter(None, map(_DENSE_LAYER.match, weights)):
        stage, layer = int(match[1]), int(match[2])
        found[stage] = max(found.get(stage, 0), layer + 1)
    depths = tuple(found[stage] for stage in sorted(found))
    first = "stages.0.block.0."
    growth, width = len(weights[f"{first}conv2.weight"]), len(weights[f"{first}conv1.weight"])
    stem = weights.get("stem.0.weight")
    if stem is None or stem.ndim != 4 or stem.shape[1:] != (3, 7, 7) or width != 4 * growth:
        raise ValueError(
            "a DenseNet must have a stem of 7x7 taps on 3 channels, and 4 times as many channels "
            f"between a layer's convolutions as it adds, got {width} and {growth}"
        )
    sizes = (growth, depths, len(stem))
    name = next((arch for arch, known in DENSENETS.items() if known == sizes), None)
    if name is None:
        raise ValueError(
            f"no DenseNet that is known has {'-'.join(map(str, depths))} layers that add {growth} "
            f"channels to {len(stem)}; known: {', '.join(DENSENETS)}"
        )
    modes = [
        [
            "spatial" if f"stages.{i}.block.{j}.masker.conv.weight" in weights else "static"
            for j in range(depth)
        ]
        for i, depth in enumerate(depths)
    ]
    return dict(type="las_mm.LASDenseNet", arch=name, mode=shorten(modes))


def _regnet(weights: dict[str, Tensor], stages: list[int]) -> dict:
    found = [
        (count, *weights[f"layer{stage}.0.conv2.weight"].shape[:2])
        for stage, count in enumerate(stages, start=1)
    ]
    letter = "y" if "layer1.0.se.fc1.weight" in weights else "x"
    for name in ARCHS:
        if name.startswith(letter) and regnet_stages(name) == found:
            return dict(type="las_mm.LASRegNet", arch=f"regnet{name}")
    shown = ", ".join(f"{blocks} x {width} (groups of {group})" for blocks, width, group in found)
    raise ValueError(
        f"no RegNet{letter.upper()} that is known has stages of {shown}; known: "
        f"{', '.join(name for name in ARCHS if name.startswith(letter))}"
    )


def _settings(weights: dict[str, Tensor], stages: list[int]) -> dict:
    blocks = [
        [_block(weights, f"layer{stage}.{i}.") for i in range(count)]
        for stage, count in enumerate(stages, start=1)
    ]
    names = sorted({name for stage in blocks for block in stage for name in block})
    defaults = dict(
        channel_granularity=2, channel_masker="mlp", channel_masker_layers=2, channel_reduction=16
    )
    found = {
        name: shorten(
            [[block.get(name, defaults.get(name)) for block in stage] for stage in blocks]
        )
        for name in names
    }
    if any("channel_granularity" in block for stage in blocks for block in stage):
        regnet = weights["conv1.weight"].shape[2] == 3
        found["channel_position"] = "after_act" if regnet else "before_norm"
    return found


def _block(weights: dict[str, Tensor], name: str) -> dict:
    """Mode and channel settings of one block."""
    position = weights.get(f"{name}masker.conv.weight")
    if position is not None and position.shape[0] != 2:
        raise ValueError(
            f"{name}masker has {position.shape[0]} logits: masks that differ between groups of "
            "output channels have no form here; 2 logits are needed"
        )
    channel = _channel_masker(weights, name)
    if channel is None:
        return dict(mode="static" if position is None else "spatial")
    return dict(mode="channel" if position is None else "both", **channel)


def _channel_masker(weights: dict[str, Tensor], name: str) -> dict | None:
    masker = f"{name}masker_channel."
    if not any(key.startswith(masker) for key in weights):
        return None
    get = weights.get
    if get(f"{masker}linear.weight") is not None:
        kind, layers, last = "conv_linear", 2, get(f"{masker}linear.weight")
        hidden = last.shape[1]
    elif get(f"{masker}conv.2.weight") is not None:
        kind, layers, last = "mlp", 2, get(f"{masker}conv.2.weight")
        hidden = last.shape[1]
    elif get(f"{masker}conv.weight") is not None:
        kind, layers, last, hidden = "mlp", 1, get(f"{masker}conv.weight"), 0
    else:
        raise ValueError(
            f"{masker[:-1]} is no channel masker that is known: it needs conv.weight (1 layer), "
            "conv.0 and conv.2 (2 layers) or conv and linear (conv_linear)"
        )
    width, groups = len(weights[f"{name}conv1.weight"]), last.shape[0] // 2
    if last.shape[0] % 2 or not groups or width % groups:
        raise ValueError(
            f"{masker[:-1]} has {last.shape[0]} logits, which is not twice a divisor of the "
            f"block's {width} channels"
        )
    c_in = weights[f"{name}conv1.weight"].shape[1]
    fits = [r for r in _REDUCTIONS if channel_hidden(kind, layers, c_in, groups, r) == hidden]
    if not fits:
        raise ValueError(f"{masker[:-1]} has {hidden} hidden channels, which no reduction gives")
    return dict(
        channel_granularity=width // groups,
        channel_masker=kind,
        channel_masker_layers=layers,
        channel_reduction=fits[0],
    )


def shorten(values: Sequence[Sequence]) -> object:
    """[stage][block] -> one value, one per stage, or as it is."""
    stages = [stage[0] if len(set(stage)) == 1 else list(stage) for stage in values]
    if all(not isinstance(stage, list) for stage in stages) and len(set(stages)) == 1:
        return stages[0]
    return stages
