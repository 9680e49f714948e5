"""Maskers of transformer layers: which tokens, which heads, whether attention and MLP run.

As AdaViT (arXiv 2111.15668) decides, on which LAUDNet (arXiv 2308.15949, section 3) builds its
T2T-ViT: one linear layer each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from las_mm.models.coverage import register
from las_mm.models.maskers import Masker


class _LinearMasker(Masker):
    """Decides by the sign of one linear layer's outputs.

    Args:
        in_channels: Channels of a token.
        decisions: Outputs.
        keep_bias: Initial bias: the default lets 99.3 % through.
    """

    def __init__(self, in_channels: int, decisions: int, keep_bias: float = 5.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, decisions)
        self.keep_bias = keep_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to "mostly on", whatever the scale of the features."""
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.constant_(self.linear.bias, self.keep_bias)


@register
class TokenMasker(_LinearMasker):
    """Decides per token from the normalised input of the attention; the class token stays.

    Args:
        in_channels: Channels of a token.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C), the class token first -> (N, L) float32 of zeros and ones, (n, 0) is 1."""
        kept = self.decide(self.linear(x[:, 1:]).float().squeeze(-1))
        return torch.cat([kept.new_ones(len(kept), 1), kept], dim=1)


@register
class ClassTokenMasker(_LinearMasker):
    """Decides per image from the class token of the layer's input: about heads, about halves.

    Args:
        in_channels: Channels of a token.
        decisions: Per image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, C), the class token first -> (N, decisions) float32 of zeros and ones."""
        return self.decide(self.linear(x[:, 0]).float())
