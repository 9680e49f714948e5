"""The tokens-to-token module: performer attention, and the shapes of what it computes."""

from __future__ import annotations

import math

import torch
from mmpretrain.models.backbones.t2t_vit import T2TModule, T2TTransformerLayer
from torch import Tensor, nn

from las_mm.network.operator import Conv, Operator
from las_mm.network.transformer import Attention, LayerNorm, LinearAttention


class PerformerLayer(nn.Module):
    """A layer of the tokens-to-token module whose attention is linear in the tokens.

    Random positive features stand for the softmax (arXiv 2009.14794, lemma 1), of one head; the
    values are its shortcut, as its input has another width (T2T-ViT, arXiv 2101.11986). The
    parameters bear the names of the authors' checkpoints.

    Args:
        input_dims: Channels of a token before.
        embed_dims: Channels behind.
        feature_ratio: Random features over ``embed_dims``. Defaults to 0.5.
    """

    def __init__(self, input_dims: int, embed_dims: int, feature_ratio: float = 0.5) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.norm1 = nn.LayerNorm(input_dims)
        self.kqv = nn.Linear(input_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dims, embed_dims), nn.GELU(), nn.Linear(embed_dims, embed_dims)
        )
        features = int(embed_dims * feature_ratio)
        rows = nn.init.orthogonal_(torch.empty(features, embed_dims))
        self.register_buffer("w", rows * math.sqrt(features))

    def _features(self, x: Tensor) -> Tensor:
        """exp(w x - |x|^2 / 2) / sqrt(m): (N, L, C) -> (N, L, m)."""
        half = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ self.w.transpose(-2, -1) - half) / math.sqrt(len(self.w))

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, input_dims) -> (N, L, embed_dims)."""
        keys, queries, values = self.kqv(self.norm1(x)).split(self.embed_dims, dim=-1)
        keys, queries = self._features(keys), self._features(queries)
        total = queries @ keys.sum(dim=1)[..., None]
        mixed = queries @ (keys.transpose(-2, -1) @ values) / (total + 1e-8)
        out = values + self.proj(mixed)
        return out + self.mlp(self.norm2(out))


def use_performer(module: T2TModule) -> None:
    """Give a tokens-to-token module performer attention, which mmpretrain's has not."""
    for name in ("attention1", "attention2"):
        static = getattr(module, name)
        setattr(module, name, PerformerLayer(static.attn.input_dims, static.attn.embed_dims))


def token_stem_shapes(
    module: T2TModule, channels: int, hw: tuple[int, int]
) -> tuple[tuple[Operator, ...], tuple[int, int]]:
    """The operators of a tokens-to-token module, and rows and columns of its tokens.

    A linear layer on soft splits is a convolution of their kernel and stride.

    Args:
        module: The module.
        channels: Channels of the image.
        hw: Its rows and columns.

    Raises:
        ValueError: An attention in it was replaced by one whose FLOPs nobody knows.
    """
    operators: list[Operator] = []
    for step in range(3):
        split = getattr(module, f"soft_split{step}")
        hw = module._get_unfold_size(split, hw)
        kernel, stride = _side(split.kernel_size), _side(split.stride)
        if step == 2:
            width = module.project.out_features
            operators.append(Conv("project", channels, width, kernel, stride, 1, *hw))
            continue
        layer = getattr(module, f"attention{step + 1}")
        name = f"attention{step + 1}"
        width = layer.attn.embed_dims if isinstance(layer, T2TTransformerLayer) else 0
        width = layer.embed_dims if isinstance(layer, PerformerLayer) else width
        if not width:
            raise ValueError(
                f"tokens_to_token.{name} is a {type(layer).__name__}, whose FLOPs nobody knows"
            )
        tokens = hw[0] * hw[1]
        attention: Operator
        if isinstance(layer, PerformerLayer):
            hidden = layer.mlp[0].out_features
            attention = LinearAttention(f"{name}.attention", width, len(layer.w), tokens)
        else:
            hidden = layer.ffn.feedforward_channels
            attention = Attention(f"{name}.attention", 1, width, tokens)
        operators += [
            _Norm(f"{name}.norm1", channels * kernel**2, *hw),
            Conv(f"{name}.kqv", channels, 3 * width, kernel, stride, 1, *hw),
            attention,
            Conv(f"{name}.proj", width, width, 1, 1, 1, *hw),
            _Norm(f"{name}.norm2", width, *hw),
            Conv(f"{name}.fc1", width, hidden, 1, 1, 1, *hw),
            Conv(f"{name}.fc2", hidden, width, 1, 1, 1, *hw),
        ]
        channels = width
    return tuple(operators), hw


class _Norm(LayerNorm):
    """A norm before the first block, where everything has a stride."""

    stride = 1


def _side(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]
