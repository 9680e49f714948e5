"""Checkpoints of T2T-ViT's and AdaViT's authors -> our names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    found, together = {}, {}
    for key, value in weights.items():
        key = key.removeprefix("module.")
        select = _SELECT.search(key)
        if select is not None:
            level = thresholds.get(select[1], 0.5)
            value = value - math.log(level / (1 - level))
        block, split = _BLOCK.match(key), _SPLIT.search(key)
        if block is None:
            found[key] = value
        elif split is not None:
            name = f"encoder.{block[1]}.attn.qkv.{split[2]}"
            together.setdefault(name, {})[split[1]] = value
        else:
            rest = key[block.end() :]
            start = next((theirs for theirs in _PARTS if rest.startswith(theirs)), "")
            rest = _PARTS.get(start, "") + rest.removeprefix(start)
            found[f"encoder.{block[1]}.{rest}"] = value
    for name, parts in together.items():
        if len(parts) != 3:
            raise ValueError(f"{name} needs a query, a key and a value, found {', '.join(parts)}")
        found[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return found


def convert_on_load(state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Rename the authors' keys of a ``state_dict`` that is being loaded into a ``LAUDT2TViT``."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if not any(is_released(key.removeprefix(prefix)) for key in mine):
        return
    weights = {key.removeprefix(prefix): state_dict.pop(key) for key in mine}
    converted = convert_t2t(weights)
    classifier = ("head.weight", "head.bias")
    state_dict.update((prefix + k, v) for k, v in converted.items() if k not in classifier)
