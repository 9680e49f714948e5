"""Checkpoints of T2T-ViT's and AdaViT's authors -> our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

T2T = "las_mm.LAUDT2TViT"
THRESHOLDS = dict(token=0.6, head=0.5, layer=0.5)
"""AdaViT keeps what has a sigmoid above these."""

_PARTS = {
    "norm1.": "ln1.",
    "norm2.": "ln2.",
    "attn.qkv.": "attn.qkv.",
    "attn.proj.": "attn.proj.",
    "attn.token_select.mlp_head.": "masker_token.linear.",
    "head_select.mlp_head.": "masker_head.linear.",
    "layer_select.mlp_head.": "masker_layer.linear.",
    "mlp.fc1.": "ffn.layers.0.0.",
    "mlp.fc2.": "ffn.layers.1.",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_STEM = re.compile(r"tokens_to_token\.attention([12])\.")
_SPLIT = re.compile(r"attn\.(query|key|value)\.(weight|bias)$")
_SELECT = re.compile(r"(token|head|layer)_select\.mlp_head\.bias$")


def is_transformer(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a T2T-ViT under its authors' or AdaViT's names, or ours."""
    return any("tokens_to_token." in key for key in weights)


def is_released(key: str) -> bool:
    """Whether a key of a T2T-ViT is one of its authors' or AdaViT's."""
    return _BLOCK.match(key) is not None


def convert_t2t(
    weights: Mapping[str, Tensor], thresholds: Mapping[str, float] = THRESHOLDS
) -> dict[str, Tensor]:
    """Key names of a released T2T-ViT or AdaViT checkpoint -> those of our ``LAUDT2TViT``.

    - ``blocks.I``: ``encoder.I``, and inside of it:
    - ``attn.query``, ``key``, ``value``: one after the other in ``attn.qkv``
    - ``attn.token_select.mlp_head``: ``masker_token.linear``; likewise ``head_select``,
      ``layer_select``. Our maskers keep where the logit is not negative: the threshold goes into
      the bias.
    - ``mlp.fc1``, ``mlp.fc2``: ``ffn.layers.0.0``, ``ffn.layers.1``

    Other keys (the classifier ``head``, the tokens-to-token module's, mmpretrain's) keep theirs.

    Args:
        weights: The ``state_dict``, with or without DDP's ``module.`` prefix.
        thresholds: Of the sigmoids, by kind: token, head, layer.

    Raises:
        ValueError: One of a query, a key and a value is missing, or a threshold is not in (0, 1).
    """
    for kind, value in thresholds.items():
        if not 0 < value < 1:
            raise ValueError(f"the threshold of {kind} must be in (0, 1), got {value!r}")
    performer = any(key.endswith("attention1.kqv.weight") for key in weights)
    found: dict[str, Tensor] = {}
    together: dict[str, dict[str, Tensor]] = {}
    for theirs, value in weights.items():
        key = theirs.removeprefix("module.")
        select = _SELECT.search(key)
        if select is not None:
            level = thresholds.get(select[1], 0.5)
            value = value - math.log(level / (1 - level))
        split = _SPLIT.search(key)
        name = t2t_key(key, performer)
        if split is None or not is_released(key):
            found[name] = value
        else:
            together.setdefault(name, {})[split[1]] = value
    for name, parts in together.items():
        if len(parts) != 3:
            raise ValueError(f"{name} needs a query, a key and a value, found {', '.join(parts)}")
        found[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return found


def t2t_key(key: str, performer: bool) -> str:
    """Our name of a weight.

    Args:
        key: Its name in the source.
        performer: Whether the tokens-to-token module has performers, whose names are ours.
    """
    block, start = _BLOCK.match(key), _STEM.match(key)
    split = _SPLIT.search(key)
    if block is not None and split is not None:
        return f"encoder.{block[1]}.attn.qkv.{split[2]}"
    match, before = block, f"encoder.{block[1]}." if block is not None else ""
    if block is None and start is not None and not performer:
        match, before = start, start[0]
    if match is None:
        return key
    rest = key[match.end() :]
    part = next((theirs for theirs in _PARTS if rest.startswith(theirs)), "")
    return before + _PARTS.get(part, "") + rest.removeprefix(part)


def t2t_arguments(spec: Mapping) -> dict:
    """The arguments of ``LAUDT2TViT`` that the settings of a released T2T-ViT amount to.

    Args:
        spec: ``embed_dim``, ``depth``, ``num_heads``; ``mlp_ratio`` (3), ``img_size`` (224),
            ``tokens_type`` ('performer'), ``token_dim`` (64); and of AdaViT ``ada_token``,
            ``ada_token_with_mlp``, ``ada_head``, ``ada_head_v2``, ``ada_layer`` (False) and
            ``keep_layers`` (1), the first layers that decide about tokens only.

    Raises:
        ValueError: A size is missing, or tokens are dropped in the attention alone.
    """
    missing = [key for key in ("embed_dim", "depth", "num_heads") if key not in spec]
    if missing:
        raise ValueError(f"the settings of a T2T-ViT must name {', '.join(missing)}")
    if spec.get("ada_token") and not spec.get("ada_token_with_mlp", True):
        raise ValueError("tokens that are dropped in the attention but not the MLP have no form")
    depth, keep = spec["depth"], spec.get("keep_layers", 1)
    own = [kind for kind in ("token", "head", "layer") if spec.get(f"ada_{kind}")]
    later = "+".join(own) or "static"
    mode = ["token" if "token" in own else "static"] * keep + [later] * (depth - keep)
    arch = dict(
        embed_dims=spec["embed_dim"],
        num_layers=depth,
        num_heads=spec["num_heads"],
        feedforward_channels=int(spec["embed_dim"] * spec.get("mlp_ratio", 3.0)),
    )
    closed = "hidden" if spec.get("ada_head_v2") else "input"
    stem = dict(
        token_dims=spec.get("token_dim", 64),
        use_performer=spec.get("tokens_type", "performer") == "performer",
    )
    return dict(
        arch=arch,
        mode=mode,
        head_in_mlp=closed if spec.get("ada_head") else "none",
        img_size=spec.get("img_size", 224),
        t2t_cfg=stem,
        attention_scale="published",
    )


def recognise_t2t(weights: Mapping[str, Tensor], heads: int = 0) -> dict:
    """The arguments of ``LAUDT2TViT`` that weights under our names tell.

    Whether heads close channels in the MLP is in no weight: as in AdaViT without ``ada_head_v2``
    their channels close in its input.

    Args:
        weights: Under our names.
        heads: Attention heads; 0: maskers or the width of a published network tell.

    Raises:
        ValueError: Nothing tells the number of heads.
    """
    prefix = "encoder."
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(prefix))
    dim = weights["cls_token"].shape[-1]
    hidden, _ = weights[f"{prefix}0.ffn.layers.0.0.weight"].shape
    for key, value in weights.items():
        if not heads and key.endswith("masker_head.linear.bias"):
            heads = len(value)
    heads = heads or {384: 6, 448: 7, 512: 8}.get(dim, 0)
    if not heads:
        raise ValueError(
            f"no key tells the heads of a T2T-ViT of {dim} channels: give the settings"
        )
    modes = []
    for i in range(depth):
        own = {kind for kind in THRESHOLDS if f"{prefix}{i}.masker_{kind}.linear.bias" in weights}
        modes.append("+".join(kind for kind in THRESHOLDS if kind in own) or "static")
    start = "tokens_to_token.attention1."
    performer = f"{start}kqv.weight" in weights
    rows = weights[f"{start}kqv.weight" if performer else f"{start}attn.qkv.weight"]
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) * 16
    return dict(
        arch=dict(embed_dims=dim, num_layers=depth, num_heads=heads, feedforward_channels=hidden),
        mode="static" if set(modes) == {"static"} else modes,
        head_in_mlp="input" if any("head" in mode for mode in modes) else "none",
        img_size=side,
        t2t_cfg=dict(token_dims=len(rows) // 3, use_performer=performer),
        attention_scale="published",
    )


def convert_on_load(state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Rename the authors' keys of a ``state_dict`` that is being loaded into a ``LAUDT2TViT``."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if not any(is_released(key.removeprefix(prefix)) for key in mine):
        return
    weights = {key.removeprefix(prefix): state_dict.pop(key) for key in mine}
    converted = convert_t2t(weights)
    classifier = ("head.weight", "head.bias")
    state_dict.update((prefix + k, v) for k, v in converted.items() if k not in classifier)
