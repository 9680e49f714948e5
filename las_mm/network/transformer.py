"""The layer of a vision transformer: attention among tokens and an MLP, each added to its input."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .block import BlockShape
from .operator import Add, Conv, Linear, MapOperator, Operator, positive

TOKEN, HEAD, ATTENTION, MLP = "token", "head", "attention", "mlp"
AXES = (TOKEN, HEAD, ATTENTION, MLP)
HALVES = "layer"  # both halves, the attention and the MLP, each decided about for itself
HEAD_IN_MLP = ("none", "input", "hidden")


def axes_of_mode(mode: object) -> tuple[str, ...]:
    """What a layer decides about: ``'token+head+layer'`` -> the axes, in their fixed order.

    Raises:
        ValueError: It is no mode.
    """
    if mode == "static":
        return ()
    words = mode.split("+") if isinstance(mode, str) else []
    if mode == "all":
        words = [TOKEN, HEAD, HALVES]
    known = (*AXES, HALVES)
    if not words or any(word not in known for word in words) or len(set(words)) < len(words):
        raise ValueError(
            "mode of a transformer layer must be 'static', 'all' or some of "
            f"{', '.join(known)} joined by '+', such as 'token+head+layer', got {mode!r}"
        )
    if HALVES in words:
        words += [ATTENTION, MLP]
    return tuple(axis for axis in AXES if axis in words)


def mode_of_axes(axes: tuple[str, ...]) -> str:
    """The inverse of :func:`axes_of_mode`, in its usual form."""
    words = [axis for axis in axes if axis in (TOKEN, HEAD)]
    halves = [axis for axis in axes if axis in (ATTENTION, MLP)]
    words += [HALVES] if len(halves) == 2 else halves
    return "+".join(words) or "static"


@dataclass(frozen=True)
class LayerNorm(MapOperator):
    """Normalisation of tokens, ``h_out`` x ``w_out`` of ``channels`` values."""

    def macs(self) -> int:
        """None: published counts are of matrix products."""
        return 0


@dataclass(frozen=True)
class Attention(Operator):
    """Softmax attention of ``heads`` heads among ``tokens`` tokens: scores, softmax and mix.

    Args:
        heads, head_dim, tokens: Sizes.
        stride: Of the map that the tokens make, as everything before the first block has one.
    """

    heads: int
    head_dim: int
    tokens: int
    stride: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive(self, "heads", "head_dim", "tokens")

    def macs(self) -> int:
        """The two products; exponentials and sums are not counted."""
        return 2 * self.heads * self.head_dim * self.tokens**2


@dataclass(frozen=True)
class LinearAttention(Operator):
    """Attention through ``features`` random features, linear in ``tokens`` (arXiv 2009.14794).

    Args:
        channels, features, tokens: Sizes.
        stride: See :class:`Attention`.
    """

    channels: int
    features: int
    tokens: int
    stride: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive(self, "channels", "features", "tokens")

    def macs(self) -> int:
        """Features of keys and queries, what keys and values sum to, the mix and its norm."""
        return self.tokens * self.features * (4 * self.channels + 1)


@dataclass(frozen=True)
class TransformerLayerShape(BlockShape):
    """A layer on the ``h_in`` x ``w_in`` tokens of a map and one class token.

    Gates are what it decides about, any subset of ``token``, ``head``, ``attention`` and ``mlp``
    (LAUDNet, arXiv 2308.15949, on T2T-ViT, arXiv 2101.11986): a token that is left out takes part
    in nothing, so that attention among the kept ones shrinks with the square of their share.

    Args:
        name, stage, h_in, w_in: See :class:`.block.BlockShape`.
        mode: See :func:`axes_of_mode`.
        heads: Attention heads.
        c_in: Channels of a token.
        hidden: Channels inside the MLP.
        head_in_mlp: Whether heads that are left out close their channels in the MLP too: in its
            ``'input'``, in its ``'hidden'`` channels, or ``'none'``.

    Raises:
        ValueError: The mode is unknown, or a size is not a positive integer.
    """

    name: str
    stage: int
    mode: str
    heads: int
    c_in: int
    hidden: int
    h_in: int
    w_in: int
    head_in_mlp: str = "none"
    granularity: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        axes_of_mode(self.mode)
        positive(self, "heads", "c_in", "hidden", "h_in", "w_in")

    @property
    def c_out(self) -> int:  # type: ignore[override]
        """Channels of a token behind it."""
        return self.c_in

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return self.h_in * self.w_in + 1

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """Maskers, and the two halves."""
        decided = axes_of_mode(self.mode)
        dim, tokens = self.c_in, self.tokens

        def linear(name: str, c_in: int, c_out: int, module: str, *gates: str) -> Conv:
            gates = tuple(gate for gate in gates if gate in decided)
            return Conv(name, c_in, c_out, 1, 1, 1, tokens, 1, gates=gates, module=module)

        def gated(*gates: str) -> tuple[str, ...]:
            return tuple(gate for gate in gates if gate in decided)

        first, second = (ATTENTION, TOKEN), (MLP, TOKEN)
        # The masker of tokens reads all of them, normalised.
        norm1 = () if TOKEN in decided else gated(ATTENTION)
        fc1 = (HEAD,) if self.head_in_mlp != "none" else ()
        fc2 = (HEAD,) if self.head_in_mlp == "hidden" else ()
        sizes = (self.heads, dim // self.heads, tokens)
        return (
            *self._maskers_of_images(decided),
            LayerNorm("norm1", dim, tokens, 1, gates=norm1),
            *self._masker_of_tokens(decided),
            linear("qkv", dim, 3 * dim, "attn.qkv", *first, HEAD),
            Attention("attention", *sizes, gates=gated(ATTENTION, TOKEN, TOKEN, HEAD)),
            linear("proj", dim, dim, "attn.proj", *first, HEAD),
            Add("add1", dim, tokens, 1, gates=gated(*first)),
            LayerNorm("norm2", dim, tokens, 1, gates=gated(*second)),
            linear("fc1", dim, self.hidden, "ffn.layers.0.0", *second, *fc1),
            linear("fc2", self.hidden, dim, "ffn.layers.1", *second, *fc2),
            Add("add2", dim, tokens, 1, gates=gated(*second)),
        )

    def _maskers_of_images(self, decided: tuple[str, ...]) -> tuple[Operator, ...]:
        halves = sum(axis in decided for axis in (ATTENTION, MLP))
        found = [("head_masker", self.heads, "masker_head")] if HEAD in decided else []
        found += [("layer_masker", halves, "masker_layer")] if halves else []
        return tuple(
            Linear(name, self.c_in, count, masker=True, module=module)
            for name, count, module in found
        )

    def _masker_of_tokens(self, decided: tuple[str, ...]) -> tuple[Operator, ...]:
        if TOKEN not in decided:
            return ()
        sizes = (self.c_in, 1, 1, 1, 1, self.tokens - 1, 1)
        return (Conv("token_masker", *sizes, masker=True, module="masker_token"),)
