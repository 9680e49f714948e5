"""The sparse path of transformer layers: kept tokens, kept heads, halves that run.

Linear layers run on the kept tokens of all images at once, one after the other and without
padding; attention runs per image, among its kept tokens. Skipped heads leave rows out of the
weights that make q, k and v and columns out of those of the projection.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.wrappers import Linear
from mmengine.model import Sequential
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.models.utils.attention import scaled_dot_product_attention_pyimpl
from torch import Tensor, nn

from las_mm.models.activation import Activation
from las_mm.models.coverage import Unsupported, check_children, check_class, check_plain
from las_mm.models.executors.base import SparseBlock, leave
from las_mm.models.plan import Choice
from las_mm.network.transformer import AXES

Masks = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
# Above this share of kept heads one product for all of them is the faster one.
_FEW = 0.8


def record(masks: Masks, empty: Activation) -> Activation:
    """The record of a layer that decided so: of tokens, heads, attention, MLP."""
    for axis, made in zip(AXES, masks):
        if made is not None:
            empty = empty.about(axis, made)
    return empty


class SparseTransformerLayer(SparseBlock):
    """The sparse form of one ``DynamicTransformerLayer``; it reads the layer's own weights."""

    packs = False
    form = "what is kept"
    strides = (1, 1)
    dilation = groups = 1
    masker = masker_channel = channel_layers = None
    channels_last = False

    def __init__(self, layer: nn.Module) -> None:
        self.__post_init__()
        self.one = torch.ones((), device=layer.ln1.weight.device, dtype=torch.float32)
        self.choice = Choice(winograd=False, decided_by="")
        self._dtype = layer.attn.qkv.weight.dtype
        self.scale = _scale(layer.attn)

    @classmethod
    def of(cls, layer: nn.Module) -> SparseTransformerLayer:
        """The sparse form of ``layer``.

        Raises:
            Unsupported: It has a part without a sparse path.
        """
        check_class(layer, "it")
        own = ("ln1", "attn", "ln2", "ffn", "masker_token", "masker_head", "masker_layer")
        check_children(layer, own)
        for masker in layer.maskers():
            check_class(masker, "its masker")
            check_children(masker, ("linear",))
            check_plain(masker.linear, "its masker's layer", nn.Linear)
        for name in ("ln1", "ln2"):
            check_plain(getattr(layer, name), name, nn.LayerNorm)
        attn, ffn = layer.attn, layer.ffn
        check_plain(attn, "attn", MultiheadAttention)
        check_children(attn, ("qkv", "proj", "proj_drop", "out_drop", "gamma1"))
        check_plain(ffn, "ffn", FFN)
        check_children(ffn, ("layers", "dropout_layer", "gamma2"))
        check_plain(ffn.layers, "ffn.layers", Sequential)
        if len(ffn.layers) != 3 or len(ffn.layers[0]) != 3 or not ffn.add_identity:
            raise Unsupported("its MLP has other than two layers and a shortcut")
        check_plain(ffn.layers[0], "ffn.layers.0", Sequential)
        check_plain(ffn.layers[0][1], "its activation", nn.GELU)
        for linear in (attn.qkv, attn.proj, ffn.layers[0][0], ffn.layers[1]):
            check_plain(linear, "a linear layer", nn.Linear, Linear)
            if type(linear.weight) not in (nn.Parameter, Tensor):
                raise Unsupported(f"a linear layer has a {type(linear.weight).__name__}")
        for part in (attn.gamma1, ffn.gamma2):
            check_plain(part, "a layer scale", nn.Identity)
        # In eval mode these do nothing.
        for part in (attn.proj_drop, attn.out_drop, ffn.layers[0][2], ffn.layers[2]):
            check_plain(part, "a dropout", nn.Dropout, nn.Identity, DropPath)
        check_plain(ffn.dropout_layer, "a dropout", nn.Dropout, nn.Identity, DropPath)
        if attn.v_shortcut:
            raise Unsupported("its values are a shortcut")
        return cls(layer)

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self._dtype

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        return self.choice

    def __call__(self, block: nn.Module, x: Tensor, in_place: bool) -> Tensor:
        """What the layer makes of ``x``, (N, L, C); leaves ``block.activation``."""
        normed = None if block.masker_token is None else block.ln1(x)
        masks = block.decide(x, normed)
        # Ten small operations that nobody may ask for.
        leave(block, "_activation", partial(record, masks, Activation(self.one)))
        token, heads, attention, mlp = masks
        out = x if in_place and x.is_contiguous() else x.clone(memory_format=_CONTIGUOUS)
        kept = None if token is None else token.bool()
        images = [None if half is None else half.flatten().tolist() for half in (attention, mlp)]
        rows = _Rows.of(x, kept, images[0])
        if rows.total:
            values = rows.take(out if normed is None else normed)
            values = values if normed is not None else block.ln1(values)
            rows.add(out, self._attend(block, values, rows, _lists(heads)))
        if images[0] != images[1]:
            rows = _Rows.of(x, kept, images[1])
        if rows.total:
            gates = heads if block.settings.gates_mlp else None
            rows.add(out, _mlp(block, block.ln2(rows.take(out)), rows, gates))
        return out

    def _attend(
        self, block: nn.Module, x: Tensor, rows: _Rows, heads: list[list[int]] | None
    ) -> Tensor:
        """Attention, with its projection, of normalised tokens (total, C)."""
        attn, number = block.attn, block.num_heads
        if heads is not None and sum(map(len, heads)) <= _FEW * number * len(heads):
            return torch.cat(
                [self._attend_few(block, x[start:end], heads[i]) for i, start, end in rows.images()]
            )
        qkv = attn.qkv(x).view(len(x), 3, number, -1)
        if rows.index is None:
            parts = qkv.view(len(rows.counts), -1, *qkv.shape[1:])
            mixed = self._softmax(parts).reshape(len(x), number, -1)
        else:
            mixed = torch.cat(
                [self._softmax(qkv[None, start:end])[0] for _, start, end in rows.images()]
            )
        if heads is not None:
            gate = mixed.new_zeros(len(mixed), number, 1)
            for i, start, end in rows.images():
                gate[start:end, heads[i]] = 1
            mixed = mixed * gate
        return attn.proj(mixed.flatten(1))

    def _attend_few(self, block: nn.Module, x: Tensor, heads: list[int]) -> Tensor:
        """The same for one image with ``heads``, whose parts of the weights are not copied."""
        qkv, proj = block.attn.qkv, block.attn.proj
        size = proj.in_features // block.num_heads
        inner = len(heads) * size
        parts = x.new_empty(len(x), 3, inner)
        at = 0
        for start, end in _runs(heads, size):
            for i in range(3):
                rows = slice(i * proj.in_features + start, i * proj.in_features + end)
                out = parts[:, i, at : at + end - start]
                torch.mm(x, qkv.weight[rows].T, out=out)
                if qkv.bias is not None:
                    out += qkv.bias[rows]
            at += end - start
        mixed = parts
        if heads:
            mixed = self._softmax(parts.view(1, len(x), 3, len(heads), size))[0].flatten(1)
        return _columns(mixed, proj, _runs(heads, size))

    def _softmax(self, qkv: Tensor) -> Tensor:
        """(N, L, 3, heads, D) -> (N, L, heads, D)."""
        parts = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(*parts, scale=self.scale).transpose(1, 2)


_CONTIGUOUS = torch.contiguous_format


class _Rows:
    """The tokens that a half computes, image after image.

    Attributes:
        index: Of the (N * L) tokens of the batch; ``None``: all of them.
        counts: Per image.
        total: Of the batch.
    """

    def __init__(self, index: Tensor | None, counts: list[int]) -> None:
        self.index, self.counts, self.total = index, counts, sum(counts)

    @classmethod
    def of(cls, x: Tensor, kept: Tensor | None, images: list[float] | None) -> _Rows:
        """Those of the images whose half is kept, and of these the kept tokens.

        Args:
            x: (N, L, C).
            kept: bool (N, L) of tokens; ``None``: all are.
            images: Zeros and ones, of images; ``None``: all are.
        """
        n, length, _ = x.shape
        if images is not None and all(images):
            images = None
        if images is not None and not any(images):
            return cls(None, [0] * n)
        if kept is None and images is None:
            return cls(None, [length] * n)
        if kept is None:
            kept = x.new_ones(n, length, dtype=torch.bool)
        if images is not None:
            kept = kept & kept.new_tensor(images)[:, None]
        counts = kept.sum(dim=1).tolist() if n > 1 else None
        index = kept.flatten().nonzero().squeeze(1)
        counts = [len(index)] if counts is None else counts
        return cls(None if len(index) == n * length else index, counts)

    def take(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (total, C)."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.index is None else flat.index_select(0, self.index)

    def add(self, x: Tensor, values: Tensor) -> None:
        """Add (total, C) to these tokens of the contiguous ``x``."""
        flat = x.view(-1, x.shape[-1])
        if self.index is None:
            flat.add_(values)
        else:
            flat.index_add_(0, self.index, values)

    def images(self) -> list[tuple[int, int, int]]:
        """(image, first row, row behind the last) of every image with rows."""
        found, start = [], 0
        for i, count in enumerate(self.counts):
            if count:
                found.append((i, start, start + count))
            start += count
        return found


def _scale(attn: nn.Module) -> float | None:
    """What the attention's scores are multiplied by; ``None``: the usual 1 / sqrt(D).

    mmpretrain 1.x hands 1 / sqrt(D) to a function of its own that *divides* by it.

    Raises:
        Unsupported: Its function is another one.
    """
    function = attn.scaled_dot_product_attention
    if function is F.scaled_dot_product_attention:
        return None
    if isinstance(function, partial) and function.func is scaled_dot_product_attention_pyimpl:
        if not function.args and list(function.keywords) == ["scale"]:
            return 1 / function.keywords["scale"]
    raise Unsupported("its attention has a function of its own")


def _lists(heads: Tensor | None) -> list[list[int]] | None:
    """The kept heads of every image; ``None``: all of all."""
    if heads is None:
        return None
    kept = [[i for i, one in enumerate(image) if one] for image in heads.tolist()]
    return None if all(len(own) == heads.shape[1] for own in kept) else kept


def _mlp(block: nn.Module, x: Tensor, rows: _Rows, heads: Tensor | None) -> Tensor:
    """The MLP of normalised tokens (total, C), without the channels of skipped heads."""
    (first, act, _), second, _ = block.ffn.layers
    lists = _lists(heads)
    if lists is None:
        return second(act(first(x)))
    hidden = block.settings.head_in_mlp == "hidden"
    outs = []
    for i, start, end in rows.images():
        outs.append(_mlp_few(x[start:end], first, act, second, lists[i], block.num_heads, hidden))
    return torch.cat(outs)


def _mlp_few(
    x: Tensor,
    first: nn.Linear,
    act: nn.Module,
    second: nn.Linear,
    heads: list[int],
    number: int,
    hidden: bool,
) -> Tensor:
    """The MLP of one image, whose skipped heads close input or hidden channels."""
    if len(heads) == number:
        return second(act(first(x)))
    runs = _runs(heads, (first.out_features if hidden else first.in_features) // number)
    if not hidden:
        kept = [x[:, start:end] for start, end in runs]
        return second(act(_columns(torch.cat(kept, dim=1) if kept else x[:, :0], first, runs)))
    inside = [
        F.linear(x, first.weight[a:b], None if first.bias is None else first.bias[a:b])
        for a, b in runs
    ]
    return _columns(act(torch.cat(inside, dim=1)) if inside else x[:, :0], second, runs)


def _runs(heads: list[int], size: int) -> list[tuple[int, int]]:
    """First channel and the one behind the last of heads that follow one another."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        start, end = head * size, (head + 1) * size
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _columns(x: Tensor, linear: nn.Linear, runs: list[tuple[int, int]]) -> Tensor:
    """A linear layer of which only the input channels of ``runs`` are there, side by side."""
    shape = (len(x), linear.out_features)
    out = x.new_zeros(shape) if linear.bias is None else linear.bias.repeat(len(x), 1)
    at = 0
    for start, end in runs:
        out.addmm_(x[:, at : at + end - start], linear.weight[:, start:end].T)
        at += end - start
    return out
