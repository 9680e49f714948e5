"""Channel skipping: a bottleneck of which every image computes the channels that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm.ops import bottleneck
from las_mm.ops.bottleneck_pack import BottleneckPack
from las_mm.ops.convolution import convolve, empty_map, expand
from las_mm.ops.library import register
from las_mm.ops.masks import check_channel_mask, check_kind, check_map, check_vector
from las_mm.ops.packing import unpack_winograd

_SCHEMA = (
    "Tensor? mask, Tensor channel_mask, Tensor[] weights, Tensor[] biases, Tensor[]? constants, "
    "Tensor? winograd, Tensor? shortcut, int granularity, int[2] strides, int dilation, "
    "int groups, float winograd_cost, Tensor[]? excitation=None"
)

# channel_bottleneck ------------------------------------------------------------------------------


class _Arguments(NamedTuple):
    """All arguments after ``x``."""

    mask: Tensor | None
    channel_mask: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    constants: Sequence[Tensor] | None
    winograd: Tensor | None
    shortcut: Tensor | None
    granularity: int
    strides: Sequence[int]
    dilation: int
    groups: int
    winograd_cost: float
    excitation: Sequence[Tensor] | None = None

    @property
    def without_channels(self) -> bottleneck._Arguments:
        """Those that :func:`~las_mm.ops.sparse_bottleneck` takes."""
        values = self._asdict()
        del values["channel_mask"], values["constants"]
        return bottleneck._Arguments(**values)


def _check(x: Tensor, a: _Arguments) -> list[int]:
    """Raise ValueError as ops/cpu/channel_bottleneck.cpp does; return (H, W) of the output."""
    size = bottleneck._check(x, a.without_channels)
    width = a.biases[0].numel()
    check_channel_mask(a.channel_mask, x, width)
    if a.constants is not None:
        if len(a.constants) != 2:
            raise ValueError(
                "constants must be None or those of conv1's and conv2's outputs, got "
                f"{len(a.constants)}"
            )
        for i, constant in enumerate(a.constants):
            check_vector(constant, f"constants[{i}]", width, torch.float32, x)
        if a.excitation is not None:
            raise ValueError("constants must be None with excitation")
    return size


def _reference(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    size = _check(x, a)
    width = a.biases[0].numel()
    wanted = a.channel_mask
    if wanted.is_floating_point() and not wanted.isfinite().all():
        raise ValueError("channel_mask must be finite, got NaN or infinity")
    wanted = (wanted > 0.5).repeat_interleave(width // wanted.shape[1], 1)[:, :, None, None]

    def skip(out: Tensor, which: int) -> Tensor:
        constant = out.new_zeros(width) if a.constants is None else a.constants[which]
        return torch.where(wanted, out.relu(), constant[:, None, None]).to(x.dtype)

    out = skip(convolve(x, a.weights[0], a.biases[0], 1, a.strides[0], 1, 1), 0)
    if a.winograd is not None and not a.weights[1].numel():
        out = F.conv2d(out, unpack_winograd(a.winograd, width, width), a.biases[1], padding=1)
    else:
        out = convolve(out, a.weights[1], a.biases[1], 3, a.strides[1], a.dilation, a.groups)
    out = skip(out, 1)
    if a.excitation is not None:
        kept = bottleneck._kept(a.without_channels, size)
        out = bottleneck._excite(out, kept, a.excitation)
    out = convolve(out, a.weights[2], a.biases[2], 1, 1, 1, 1)
    return bottleneck._add_shortcut(x, out, a.without_channels, size)


def _reference_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    bottleneck.check_in_place(a.weights, 4)
    out = _reference(x, *arguments)
    if a.mask is not None:
        out = torch.where(expand(a.mask, "mask", x.shape[2:], a.granularity), out, x)
    x.copy_(out)


def _fake(x: Tensor, *arguments) -> Tensor:
    a = _Arguments(*arguments)
    return empty_map(x, a.biases[2].numel(), _check(x, a))


def _fake_(x: Tensor, *arguments) -> None:
    a = _Arguments(*arguments)
    bottleneck.check_in_place(a.weights, 4)
    _check(x, a)


register(f"channel_bottleneck(Tensor x, {_SCHEMA}) -> Tensor", _reference, _fake)
register(f"channel_bottleneck_(Tensor(a!) x, {_SCHEMA}) -> ()", _reference_, _fake_)


def channel_bottleneck(
    x: Tensor,
    channel_mask: Tensor,
    mask: Tensor | None,
    pack: BottleneckPack,
    granularity: int = 1,
    shortcut: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
) -> Tensor:
    """:func:`~las_mm.ops.sparse_bottleneck` of which every image computes some channels only.

    LAUDNet (arXiv 2308.15949), section 3.2: one channel mask gates the outputs of conv1 and of
    conv2, with BN folded into the convolutions. With the share rho of the channels wanted, conv1
    and conv3 cost rho and conv2 rho^2 of the whole; with ``mask`` also only at kept outputs. No
    gradient; ``pack.dense`` is not used.

    Args:
        x: As there.
        channel_mask: Decision per image and group of consecutive channels, (N, k); k divides the
            width of the block, a group has width / k channels.
        mask: As there.
        pack: As there; skipped channels enter the means of its excitation as zeros.
        granularity: As there.
        shortcut: As there.
        constants: What skipped channels of conv1's and of conv2's output hold, two float32 vectors
            of the block's width, e.g. relu(BN(0)) where the mask lies before the norm; ``None``:
            zero. conv2's padding is zero all the same. Not with excitation.

    Returns:
        (N, C_out, H_out, W_out), channels_last.

    Raises:
        ValueError: A shape, dtype or device does not fit, or a mask is not finite.
    """
    arguments = _unpacked(channel_mask, mask, pack, granularity, shortcut, constants)
    return torch.ops.las_mm.channel_bottleneck(x, *arguments)


def channel_bottleneck_(
    x: Tensor,
    channel_mask: Tensor,
    mask: Tensor | None,
    pack: BottleneckPack,
    granularity: int = 1,
    constants: Sequence[Tensor] | None = None,
) -> Tensor:
    """:func:`channel_bottleneck` of a block without downsample convolution, written into ``x``.

    Dropped positions are left as they are, see :func:`~las_mm.ops.sparse_bottleneck_`.

    Returns:
        ``x``.
    """
    arguments = _unpacked(channel_mask, mask, pack, granularity, None, constants)
    torch.ops.las_mm.channel_bottleneck_(x, *arguments)
    return x


def _unpacked(
    channel_mask: Tensor,
    mask: Tensor | None,
    pack: BottleneckPack,
    granularity: int,
    shortcut: Tensor | None,
    constants: Sequence[Tensor] | None,
) -> tuple:
    tensors = mask, channel_mask, pack.weights, pack.biases, constants, pack.winograd, shortcut
    geometry = granularity, pack.strides, pack.dilation, pack.groups
    return *tensors, *geometry, pack.winograd_cost, pack.excitation


# channel_mean ------------------------------------------------------------------------------------


def _channel_mean_reference(x: Tensor) -> Tensor:
    check_map(x, "x")
    return x.float().mean((2, 3))


def _channel_mean_fake(x: Tensor) -> Tensor:
    check_map(x, "x")
    return x.new_empty(x.shape[:2], dtype=torch.float32)


register("channel_mean(Tensor x) -> Tensor", _channel_mean_reference, _channel_mean_fake)


def channel_mean(x: Tensor) -> Tensor:
    """Global average pool, what a channel masker reads, in one pass over a channels_last map.

    Args:
        x: (N, C, H, W), float32 or bfloat16, on a GPU also float16.

    Returns:
        (N, C), float32. No gradient.

    Raises:
        ValueError: A wrong shape or dtype.
    """
    return torch.ops.las_mm.channel_mean(x)


# channel_mask ------------------------------------------------------------------------------------


def _channel_mask_check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], offset: Tensor | None
) -> int:
    """Raise ValueError as ops/common/arguments.cpp does; return the number of decisions."""
    check_map(x, "x")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases must be those of the same linear layers, got {len(weights)} and "
            f"{len(biases)}"
        )
    width = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{i}] must have shape (out, {width}), got {list(weight.shape)}"
            )
        check_kind(weight, f"weights[{i}]", torch.float32, x)
        width = weight.shape[0]
        check_vector(bias, f"biases[{i}]", width, torch.float32, x)
    if width == 0 or width % 2:
        raise ValueError(f"weights must end in two logits per decision, got {width}")
    if offset is not None:
        fits = offset.dim() == 2 and offset.shape[0] in (1, x.shape[0])
        if not fits or offset.shape[1] != width // 2:
            raise ValueError(
                f"offset must have shape (1 or {x.shape[0]}, {width // 2}), got "
                f"{list(offset.shape)}"
            )
        check_kind(offset, "offset", torch.float32, x)
    return width // 2


def _channel_mask_reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], offset: Tensor | None
) -> Tensor:
    decisions = _channel_mask_check(x, weights, biases, offset)
    out = x.float().mean((2, 3))
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        out = F.linear(out if i == 0 else out.relu(), weight, bias)
    keep, skip = out.unflatten(1, (2, decisions)).unbind(1)
    keep = keep - skip
    return ((keep if offset is None else keep + offset) < 0).logical_not()


def _channel_mask_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], offset: Tensor | None
) -> Tensor:
    decisions = _channel_mask_check(x, weights, biases, offset)
    return x.new_empty((x.shape[0], decisions), dtype=torch.bool)


register(
    "channel_mask(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? offset) -> Tensor",
    _channel_mask_reference,
    _channel_mask_fake,
)


def channel_mask(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    offset: Tensor | None = None,
) -> Tensor:
    """Decide per group of channels, as ``ChannelMasker('mlp')`` does in eval mode.

    Global average pool, linear layers with ReLU between them, and a group is kept where logit 0 >=
    logit 1, or where these are NaN: an image with a NaN computes all channels and shows it.
    LAUDNet (arXiv 2308.15949), section 3.2. This op has no gradient.

    Args:
        x: Block input, (N, C, H, W), float32 or bfloat16.
        weights: Of the linear layers, float32, (out, in) each; the last has 2 * groups outputs,
            first all "keep" logits, then all "skip" logits.
        biases: Of the linear layers, float32, (out,) each.
        offset: Added to the difference of the logits, float32, (N or 1, groups); an infinite
            value forces the decision.

    Returns:
        The mask, bool, (N, groups).

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    return torch.ops.las_mm.channel_mask(x, weights, biases, offset)
