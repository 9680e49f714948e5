"""The layer of a vision transformer, computed only for what its maskers keep."""

from __future__ import annotations

from dataclasses import replace

import torch
from mmpretrain.models.backbones.t2t_vit import T2TTransformerLayer
from torch import Tensor, nn

from las_mm import compat
from las_mm.models import sparse
from las_mm.models.activation import Activation
from las_mm.models.block import DynamicBlock
from las_mm.models.coverage import register, shadowed
from las_mm.models.executors import transformer_layer as executors
from las_mm.models.token_maskers import ClassTokenMasker, TokenMasker
from las_mm.models.token_settings import TransformerSettings
from las_mm.network.transformer import ATTENTION, HEAD, MLP, TOKEN, TransformerLayerShape

_METHODS = ("decide", "_attend")


@register
class DynamicTransformerLayer(DynamicBlock, T2TTransformerLayer):
    """mmpretrain's ``T2TTransformerLayer`` with maskers of tokens, heads and its two halves.

    A token that is left out takes part in nothing and is passed on as it is; a head that is left
    out is zero in the input of the projection; a half that is left out adds nothing. Decisions
    about heads and halves are made on the class token of the layer's input, those about tokens on
    their normalised selves (AdaViT, arXiv 2111.15668).

    Args:
        embed_dims: Channels of a token.
        num_heads: Attention heads.
        feedforward_channels: Channels inside the MLP.
        settings: What it decides about. Defaults to nothing.
        with_cp: Whether to recompute the layer in the backward pass, to save memory.
        kwargs: Other arguments of the parent but ``input_dims``.

    Raises:
        ValueError: Heads cannot be left out of the MLP, whose channels they do not divide.
    """

    stride = conv1_stride = conv2_stride = dilation = 1
    masker_token: TokenMasker | None
    masker_head: ClassTokenMasker | None
    masker_layer: ClassTokenMasker | None

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        settings: TransformerSettings | None = None,
        with_cp: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(embed_dims, num_heads, feedforward_channels, **kwargs)
        self.in_channels = self.out_channels = embed_dims
        self.mid_channels = feedforward_channels
        self.num_heads = num_heads
        self.with_cp = with_cp
        self.make_dynamic(settings or TransformerSettings())

    def make_dynamic(self, settings: TransformerSettings) -> None:  # type: ignore[override]
        """See the base class."""
        width = {"input": self.in_channels, "hidden": self.mid_channels}.get(settings.head_in_mlp)
        if settings.gates_mlp and (width or 0) % self.num_heads:
            raise ValueError(
                f"head_in_mlp={settings.head_in_mlp!r} needs channels that the {self.num_heads} "
                f"heads divide, got {width}"
            )
        super().make_dynamic(settings)  # type: ignore[arg-type]
        self._own, axes, dim = settings, settings.axes, self.in_channels
        halves = sum(axis in axes for axis in (ATTENTION, MLP))
        self.masker_token = TokenMasker(dim) if TOKEN in axes else None
        self.masker_head = ClassTokenMasker(dim, self.num_heads) if HEAD in axes else None
        self.masker_layer = ClassTokenMasker(dim, halves) if halves else None

    @property
    def settings(self) -> TransformerSettings:  # type: ignore[override]
        """How the layer skips."""
        return self._own

    def _check(self, name: str, value: object) -> None:
        if name != "mode" or replace(self._own, mode=value).axes != self._own.axes:  # type: ignore[arg-type]
            raise ValueError(
                f"{name} of a transformer layer cannot become {value!r}: call "
                "layer.make_dynamic(TransformerSettings(mode=...))"
            )

    def maskers(self) -> list:
        """See the base class."""
        own = (self.masker_token, self.masker_head, self.masker_layer)
        return [masker for masker in own if masker is not None]

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> TransformerLayerShape:
        """See the base class; ``hw`` are rows and columns of the map that the tokens make."""
        return TransformerLayerShape(
            name=name,
            stage=stage,
            mode=self.mode,
            heads=self.num_heads,
            c_in=self.in_channels,
            hidden=self.mid_channels,
            h_in=hw[0],
            w_in=hw[1],
            head_in_mlp=self._own.head_in_mlp if self._own.gates_mlp else "none",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, L, C), the class token first -> (N, L, C)."""
        dense = self.training or self.runtime == "dense" or compat.is_compiling()
        if not dense and sparse.wanted(x):
            return self.infer(x)
        return self._forward(x)

    def _settings(self) -> tuple:
        own = (self._own, self.masker_token, self.masker_head, self.masker_layer, self.num_heads)
        methods = [getattr(type(self), name) for name in _METHODS]
        return (*super()._settings(), *own, *methods, shadowed(self, _METHODS))

    def _positions(self, x: Tensor) -> int:
        return x.shape[0] * x.shape[1]

    def _make_executor(self) -> executors.SparseTransformerLayer:
        return executors.SparseTransformerLayer.of(self)

    def _forward(self, x: Tensor) -> Tensor:
        masks = self._decide(x)
        if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self._compute, x, *masks, use_reentrant=False)
        return self._compute(x, *masks)

    def decide(
        self, x: Tensor, normed: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(N, L) of tokens, (N, heads), (N, 1) of the attention, (N, 1) of the MLP; or ``None``.

        Args:
            x: The layer's input.
            normed: What ``ln1`` makes of it, where that is known.
        """
        token = heads = attention = mlp = None
        if self.masker_head is not None:
            heads = self.masker_head(x)
        if self.masker_layer is not None:
            halves, axes = self.masker_layer(x), self._own.axes
            attention = halves[:, :1] if ATTENTION in axes else None
            mlp = halves[:, -1:] if MLP in axes else None
        if self.masker_token is not None:
            token = self.masker_token(self.ln1(x) if normed is None else normed)
        return token, heads, attention, mlp

    def _decide(self, x: Tensor) -> tuple[Tensor | None, ...]:
        masks = self.decide(x)
        self.activation = executors.record(masks, Activation.full(x))
        return masks

    def _compute(  # type: ignore[override]
        self,
        x: Tensor,
        token: Tensor | None,
        heads: Tensor | None,
        attention: Tensor | None,
        mlp: Tensor | None,
    ) -> Tensor:
        """The layer with everything computed, times the masks.

        Args:
            x: (N, L, C).
            token: (N, L) of zeros and ones; ``None``: all tokens are kept.
            heads: (N, heads) likewise.
            attention, mlp: (N, 1) likewise.
        """
        if token is heads is attention is mlp is None:
            return T2TTransformerLayer.forward(self, x)
        out = self._attend(self.ln1(x), token, heads)
        x = x + _masked(out, token, attention)
        out = self.ln2(x)
        gate = None if heads is None or not self._own.gates_mlp else heads.to(x.dtype)
        if gate is not None and self._own.head_in_mlp == "input":
            out = _times_heads(out, gate)
        first, *rest = self.ffn.layers
        out = first(out)
        if gate is not None and self._own.head_in_mlp == "hidden":
            out = _times_heads(out, gate)
        for layer in rest:
            out = layer(out)
        return x + _masked(self.ffn.dropout_layer(self.ffn.gamma2(out)), token, mlp)

    def _attend(self, x: Tensor, token: Tensor | None, heads: Tensor | None) -> Tensor:
        attn = self.attn
        n, length, _ = x.shape
        qkv = attn.qkv(x).view(n, length, 3, self.num_heads, -1)
        allowed = None
        if token is not None:
            # A token that is left out attends to itself; what it makes is masked later.
            kept = token.detach().bool()
            allowed = kept[:, :, None] & kept[:, None, :]
            allowed = (allowed | torch.eye(length, dtype=torch.bool, device=x.device))[:, None]
            allowed = x.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
        out = attn.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4).unbind(0),
            attn_mask=allowed,
            dropout_p=attn.attn_drop if self.training else 0.0,
        ).transpose(1, 2)
        if heads is not None:
            out = out * heads.to(out.dtype)[:, None, :, None]
        out = attn.proj(out.reshape(n, length, -1))
        return attn.out_drop(attn.gamma1(attn.proj_drop(out)))


def _masked(out: Tensor, token: Tensor | None, half: Tensor | None) -> Tensor:
    """What a half adds, where it is kept."""
    if token is not None:
        out = out * token.to(out.dtype)[..., None]
    return out if half is None else out * half.to(out.dtype)[..., None]


def _times_heads(x: Tensor, heads: Tensor) -> Tensor:
    """(N, L, C) times (N, heads): consecutive channels belong to a head."""
    gate: Tensor = heads.repeat_interleave(x.shape[-1] // heads.shape[1], dim=1)
    return x * gate[:, None]


def as_dynamic(
    static: nn.Module, settings: TransformerSettings, with_cp: bool, arguments: dict
) -> DynamicTransformerLayer:
    """A dynamic layer of the same kind as ``static``, which was built with ``arguments``."""
    drop_path = getattr(static.attn.out_drop, "drop_prob", 0.0)
    known = {**arguments, "drop_path_rate": drop_path}
    return DynamicTransformerLayer(**known, settings=settings, with_cp=with_cp)
