"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the ops: what masks let through.

Two FLOPs per multiply-accumulate, as torch counts them. Maskers' and channels' means, which are no
products, count nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from las_mm import compat
from las_mm.ops.maps import STEM_KERNEL
from las_mm.ops.masks import ceil_div, dilate_mask


def _positions(
    mask: Tensor | None,
    images: int,
    size: Sequence[int],
    granularity: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Computed outputs and outputs of conv1 that these read, of each image, (N,) float64."""
    out = [ceil_div(n, stride) for n in size]
    if mask is None:
        full = torch.ones(images, dtype=torch.float64)
        return full * (out[0] * out[1]), full * (size[0] * size[1])
    _, counts = dilate_mask(mask, granularity, list(size), stride, dilation)
    kept, halo = counts.double().cpu().unbind(1)
    return kept, halo


def _products(weights: Sequence[Tensor] | None) -> int:
    """Multiply-accumulates for one image of fully connected layers among weights and biases."""
    return sum(weight.numel() for weight in weights or () if weight.dim() == 2)


def _wanted(channel_mask: Tensor | None, images: int, width: int) -> Tensor:
    """1 for every wanted channel, else 0; (N, width) float64."""
    if channel_mask is None:
        return torch.ones(images, width, dtype=torch.float64)
    decisions = (channel_mask.detach().cpu().double() > 0.5).double()
    return decisions.repeat_interleave(width // decisions.shape[1], dim=1)


def _bottleneck(
    x: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    winograd: Tensor | None,
    shortcut: Tensor | None,
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    groups: int,
    winograd_cost: float,
    dense: Sequence[Tensor] | None = None,
    dense_above: float = 1.0,
    excitation: Sequence[Tensor] | None = None,
    channel_mask: Tensor | None = None,
    **_: Any,
) -> int:
    images, c_in = x.shape[:2]
    width, c_out = biases[0].numel(), biases[2].numel()
    size = [ceil_div(n, strides[0]) for n in x.shape[2:]]
    kept, halo = _positions(mask, images, size, granularity, strides[1], dilation)
    each = _wanted(channel_mask, images, width)
    wanted = each.sum(1)
    pairs = each.unflatten(1, (groups, -1)).sum(2).square().sum(1)  # channels of conv2 that meet
    macs = halo * c_in * wanted + kept * 9 * pairs + kept * wanted * c_out
    total = int(macs.sum()) + images * _products(excitation)
    if len(biases) == 4:  # the shortcut's convolution is computed everywhere
        outputs = ceil_div(size[0], strides[1]) * ceil_div(size[1], strides[1])
        depth = c_in if shortcut is None else shortcut.shape[1]
        total += images * outputs * depth * c_out
    return 2 * total


def _channel_bottleneck(
    x: Tensor,
    mask: Tensor | None,
    channel_mask: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: Sequence[Tensor] | None,
    *rest: Any,
    **keywords: Any,
) -> int:
    names = ("winograd", "shortcut", "granularity", "strides", "dilation", "groups")
    given = dict(zip((*names, "winograd_cost", "excitation"), rest), **keywords)
    return _bottleneck(x, mask, weights, biases, channel_mask=channel_mask, **given)


def _basic(
    x: Tensor,
    mask: Tensor | None,
    shortcut: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    winograd: Sequence[Tensor],
    dense: Sequence[Tensor],
    geometry: Sequence[int],
    plan: Sequence[float],
    channel_mask: Tensor | None = None,
    **_: Any,
) -> int:
    granularity, stride, _dilation = geometry
    images, c_in = x.shape[:2]
    hidden, c_out = biases[0].numel(), biases[1].numel()
    wanted = _wanted(channel_mask, images, hidden).sum(1)
    size = [ceil_div(n, stride) for n in x.shape[2:]]
    kept, halo = _positions(mask, images, size, granularity, 1, 1)
    total = int(((halo * c_in + kept * c_out) * wanted).sum()) * 9
    if len(biases) == 3:  # the shortcut's convolution is computed everywhere
        total += (
            images * size[0] * size[1] * (c_in if shortcut is None else shortcut.shape[1]) * c_out
        )
    return 2 * total


def _channel_basic(
    x: Tensor,
    channel_mask: Tensor,
    constant: Tensor | None,
    mask: Tensor | None,
    shortcut: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    winograd: Sequence[Tensor],
    geometry: Sequence[int],
    winograd_cost: float,
    **_: Any,
) -> int:
    forms = weights, biases, winograd, ()
    plan = (winograd_cost, 1.0)
    return _basic(x, mask, shortcut, *forms, geometry, plan, channel_mask=channel_mask)


def _dense_layer(
    buffer: Tensor,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    winograd: Sequence[Tensor],
    granularity: int,
    winograd_cost: float,
    **_: Any,
) -> int:
    c_in, hidden, growth = (vectors[i].numel() for i in (0, 2, 3))
    kept, halo = _positions(mask, buffer.shape[0], buffer.shape[2:], granularity, 1, 1)
    return 2 * hidden * int((halo * c_in + kept * 9 * growth).sum())


def _dense_transition(
    out: Tensor, buffer: Tensor, weight: Tensor, vectors: Sequence[Tensor], **_: Any
) -> int:
    outputs = out.shape[0] * out.shape[2] * out.shape[3]
    return 2 * outputs * vectors[0].numel() * vectors[2].numel()


def _spatial_mask(x: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    return 2 * out_val[0].numel() * x.shape[1] * 2  # two logits per patch


def _patch_mask(x: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    return _spatial_mask(x, out_val=(out_val,))


def _channel_mask(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * _products(weights)


def _conv_pool_stem(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> int:
    outputs = ceil_div(x.shape[2], 2) * ceil_div(x.shape[3], 2)
    return 2 * x.shape[0] * outputs * x.shape[1] * STEM_KERNEL**2 * bias.numel()


def _masker_conv1x1(
    x: Tensor,
    masker_weight: Tensor,
    masker_bias: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    out_val: Any,
    **_: Any,
) -> int:
    mask, size = out_val[0], [ceil_div(n, strides[0]) for n in x.shape[2:]]
    halo = _positions(mask, x.shape[0], size, granularity, strides[1], dilation)[1]
    return _spatial_mask(x, out_val=out_val) + 2 * int(halo.sum()) * x.shape[1] * bias.numel()


def _gather_conv3x3(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    stride: int,
    dilation: int,
    groups: int,
    **_: Any,
) -> int:
    kept = _positions(mask, hidden.shape[0], hidden.shape[2:], granularity, stride, dilation)[0]
    return 2 * int(kept.sum()) * 9 * (hidden.shape[1] // groups) * bias.numel()


def _conv1x1_scatter_add(
    residual: Tensor,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    granularity: int,
    **_: Any,
) -> int:
    kept = _positions(mask, x.shape[0], x.shape[2:], granularity, 1, 1)[0]
    return 2 * int(kept.sum()) * x.shape[1] * bias.numel()


def _packed_conv2d(
    x: Tensor,
    weight: Tensor,
    winograd: Tensor,
    bias: Tensor,
    kernel: int,
    stride: int,
    *_: Any,
    **__: Any,
) -> int:
    outputs = x.shape[0] * ceil_div(x.shape[2], stride) * ceil_div(x.shape[3], stride)
    return 2 * outputs * kernel**2 * x.shape[1] * bias.numel()


FORMULAS: dict[str, Callable[..., int]] = {
    "sparse_bottleneck": _bottleneck,
    "sparse_bottleneck_": _bottleneck,
    "channel_bottleneck": _channel_bottleneck,
    "channel_bottleneck_": _channel_bottleneck,
    "channel_basic": _channel_basic,
    "channel_basic_": _channel_basic,
    "sparse_basic": _basic,
    "sparse_basic_": _basic,
    "sparse_dense_layer_": _dense_layer,
    "dense_transition_": _dense_transition,
    "spatial_mask": _spatial_mask,
    "patch_mask": _patch_mask,
    "packed_conv2d": _packed_conv2d,
    "channel_mask": _channel_mask,
    "conv_pool_stem": _conv_pool_stem,
    "masker_conv1x1": _masker_conv1x1,
    "gather_conv3x3": _gather_conv3x3,
    "conv1x1_scatter_add_": _conv1x1_scatter_add,
}


def register() -> None:
    """Tell torch how to count, where its version asks."""
    for name, formula in FORMULAS.items():
        compat.register_flops(getattr(torch.ops.las_mm, name), formula)
