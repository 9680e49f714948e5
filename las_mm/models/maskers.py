"""Maskers: small networks that decide, per image, which parts of a block are computed.

Geometry (exact for any size, DESIGN decision 3): a block's H_out x W_out output is cut into
ceil(H_out/S) x ceil(W_out/S) patches of S x S outputs; patches at the right and bottom edges may
be smaller. Where S divides the map this is the definition of LASNet, section 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from las_mm import ops
from las_mm.models.coverage import register
from las_mm.network.block import CHANNEL_MASKERS
from las_mm.network.bottleneck import channel_hidden

_MASKER = re.compile(r"(^|\.)masker(_[a-z]+)?\.")


def is_masker(name: str) -> bool:
    """Whether a module, parameter or ``state_dict`` key of a backbone belongs to a masker."""
    return _MASKER.search(name) is not None


def gumbel_difference(reference: Tensor) -> Tensor:
    """The difference of two standard Gumbel variables, i.e. standard logistic noise.

    For two classes the Gumbel-softmax depends on the noise through this difference only.

    Args:
        reference: Gives shape and device.

    Returns:
        float32 noise shaped like ``reference``.
    """
    eps = torch.finfo(torch.float32).eps
    uniform = torch.rand(reference.shape, device=reference.device, dtype=torch.float32)
    uniform = uniform.clamp_(eps, 1 - eps)
    return torch.log(uniform) - torch.log1p(-uniform)


def global_mean(x: Tensor) -> Tensor:
    """Global average pool (N, C, H, W) -> (N, C), by the native op where it can run."""
    native = (
        not torch.is_grad_enabled()
        and ops.supports(x.dtype, x.device.type)
        and ops.has_channel_kernels(x.device.type)
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
    )
    return ops.channel_mean(x).to(x.dtype) if native else x.mean(dim=(2, 3))


class Masker(nn.Module):
    """What all maskers share: from the difference of two logits to a decision.

    Training draws a hard Gumbel-softmax sample with straight-through gradients; eval mode keeps
    where logit 0 >= logit 1. LASNet (arXiv 2210.06223), section 3.2, equation 4.

    Attributes:
        temperature: Gumbel-softmax temperature tau, set by ``TemperatureHook``.
        noise: Scale of the Gumbel noise, set by ``TemperatureHook``; 1 is the papers' sampling,
            0 decides in training as in eval mode.
        offset: Added to the difference of the logits: a tensor of its shape, of its shape with one
            image, or of shape () for all decisions alike (:func:`las_mm.set_budget`); or ``None``.
            An infinite value forces a decision while the masker still does (and costs) its work.
            It is in no checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.noise = 1.0
        self.offset: Tensor | None = None

    def decide(self, keep: Tensor) -> Tensor:
        """Logit 0 minus logit 1 -> zeros and ones, float32, of the same shape."""
        offset = self.offset_for(keep.shape)
        if offset is not None:
            keep = keep + offset.to(keep)
        if not self.training:
            return self.hard(keep)
        keep = keep + self.noise * gumbel_difference(keep)
        hard = self.hard(keep)
        soft = torch.sigmoid(keep / self.temperature)
        return hard + (soft - soft.detach())

    def offset_for(self, shape: Sequence[int]) -> Tensor | None:
        """:attr:`offset` for decisions of this shape, a scalar one repeated for one image.

        Raises:
            ValueError: It is neither ``None`` nor a tensor of a shape that fits.
        """
        offset = self.offset
        if offset is None:
            return None
        if isinstance(offset, Tensor):
            if offset.dim() == 0:
                return offset.expand(1, *shape[1:]).contiguous()
            same = offset.dim() == len(shape) and tuple(offset.shape[1:]) == tuple(shape[1:])
            if same and offset.shape[0] in (1, shape[0]):
                return offset
        images, *rest = shape
        inner = ", ".join(map(str, rest))
        got = f"shape {tuple(offset.shape)}" if isinstance(offset, Tensor) else repr(offset)
        raise ValueError(
            f"offset of {type(self).__name__} must be None or a tensor of shape () or "
            f"(1 or {images}, {inner}), got {got}"
        )

    def hard(self, keep: Tensor) -> Tensor:
        """Zeros and ones, float32; NaN skips."""
        return (keep >= 0).float()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:.4g}"


@register
class SpatialMasker(Masker):
    """Decides per patch: average pool to the patch grid, then a 1x1 convolution to two logits.

    Args:
        in_channels: Channels of the block input that the masker reads.
        keep_bias: Initial bias of the "keep" logit. The default lets 99.3 % of all patches
            through, so a network loaded from static weights starts as (almost) that network.
    """

    def __init__(self, in_channels: int, keep_bias: float = 5.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2, kernel_size=1)
        self.keep_bias = keep_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to "mostly on", whatever the scale of the features."""
        nn.init.normal_(self.conv.weight, std=0.01)
        with torch.no_grad():
            self.conv.bias.copy_(self.conv.bias.new_tensor([self.keep_bias, 0.0]))

    def logits(self, x: Tensor, patch: int | None) -> Tensor:
        """Logits of the patch grid.

        Args:
            x: Block input, (N, C, H, W).
            patch: Side of a patch in *input* pixels, i.e. S times the block's stride; ``None``
                pools the whole map (layer mode).

        Returns:
            float32 logits, (N, 2, ceil(H/patch), ceil(W/patch)), or (N, 2, 1, 1).
        """
        if patch is None:
            pooled = x.mean(dim=(2, 3), keepdim=True)
        elif patch == 1:
            pooled = x
        else:
            # Ragged edge patches average over their real pixels only.
            pooled = F.avg_pool2d(x, patch, patch, ceil_mode=True, count_include_pad=False)
        return self.conv(pooled).float()

    def forward(self, x: Tensor, patch: int | None) -> Tensor:
        """The decision per patch, see :meth:`logits`: (N, 1, h, w) float32 of zeros and ones."""
        logits = self.logits(x, patch)
        return self.decide(logits[:, :1] - logits[:, 1:])


@register
class ChannelMasker(Masker):
    """Decides per image and group of channels, from the whole block input.

    LAUDNet (arXiv 2308.15949), section 3.2. The children bear the names that the authors' released
    checkpoints have: ``conv`` and, of a ``'conv_linear'``, ``linear``. Of the 2 * groups logits
    the first half says "keep", the second "skip".

    Args:
        in_channels: Channels of the block input that the masker reads.
        groups: Decisions per image.
        kind: ``'mlp'``: global average pool, then fully connected layers; ``'conv_linear'``: 1x1
            convolution to ``in_channels // reduction``, BN, ReLU, global average pool, one fully
            connected layer. Defaults to ``'mlp'``.
        layers: Fully connected layers of an ``'mlp'``: 2, with max(groups // reduction, 16)
            hidden channels and a ReLU between, or 1. Defaults to 2.
        reduction: Divisor of the hidden channels. Defaults to 16.
        keep_bias: Initial bias of the "keep" logits; the "skip" logits start at minus that. The
            default lets 98.2 % of all groups through.

    Raises:
        ValueError: An unknown ``kind`` or number of layers, or a ``conv_linear`` without hidden
            channels.
    """

    def __init__(
        self,
        in_channels: int,
        groups: int,
        kind: str = "mlp",
        layers: int = 2,
        reduction: int = 16,
        keep_bias: float = 2.0,
    ) -> None:
        super().__init__()
        if kind not in CHANNEL_MASKERS:
            raise ValueError(
                f"channel_masker must be one of {', '.join(CHANNEL_MASKERS)}, got {kind!r}"
            )
        if layers not in (1, 2):
            raise ValueError(f"channel_masker_layers must be 1 or 2, got {layers!r}")
        if kind == "conv_linear" and layers == 1:
            raise ValueError("channel_masker_layers of a conv_linear masker must be 2, got 1")
        self.groups = groups
        self.kind = kind
        self.layers = layers
        self.reduction = reduction
        hidden = channel_hidden(kind, layers, in_channels, groups, reduction)
        self.keep_bias = keep_bias
        if kind == "conv_linear":
            if hidden == 0:
                raise ValueError(
                    f"channel_reduction of a conv_linear masker must be at most its {in_channels} "
                    f"input channels, got {reduction}"
                )
            self.conv = nn.Sequential(
                nn.Conv2d(in_channels, hidden, kernel_size=1, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
            )
            self.linear = nn.Linear(hidden, 2 * groups)
        elif layers == 1:
            self.conv = nn.Linear(in_channels, 2 * groups)
        else:
            self.conv = nn.Sequential(
                nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * groups)
            )
        self.reset_parameters()

    @property
    def last(self) -> nn.Linear:
        """The layer that makes the logits."""
        if self.kind == "conv_linear":
            return self.linear
        return self.conv[-1] if isinstance(self.conv, nn.Sequential) else self.conv

    def reset_parameters(self) -> None:
        """Back to "mostly on", whatever the scale of the features."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.normal_(self.last.weight, std=0.01)
        with torch.no_grad():
            self.last.bias[: self.groups] = self.keep_bias
            self.last.bias[self.groups :] = -self.keep_bias

    def logits(self, x: Tensor) -> Tensor:
        """Block input (N, C, H, W) -> float32 logits (N, 2, groups)."""
        if self.kind == "conv_linear":
            flat = self.linear(self.conv(x).mean(dim=(2, 3)))
        else:
            flat = self.conv(global_mean(x))
        return flat.float().unflatten(1, (2, self.groups))

    def forward(self, x: Tensor) -> Tensor:
        """The decision per group: (N, groups) float32 of zeros and ones."""
        keep, skip = self.logits(x).unbind(1)
        return self.decide(keep - skip)

    def hard(self, keep: Tensor) -> Tensor:
        """Zeros and ones, float32; NaN keeps.

        A NaN anywhere in the image makes its mean one. Without channels the block would pass it on
        at its own position only, or, where a strided shortcut jumps over that, not at all.
        """
        return (keep < 0).logical_not().float()

    def extra_repr(self) -> str:
        return f"groups={self.groups}, {super().extra_repr()}"


def expand_channels(mask: Tensor, granularity: int) -> Tensor:
    """(N, groups) -> (N, groups * G, 1, 1): channel c belongs to group c // G."""
    if granularity != 1:
        mask = mask.repeat_interleave(granularity, dim=1)
    return mask[:, :, None, None]


def expand_mask(mask: Tensor, granularity: int, size: tuple[int, int]) -> Tensor:
    """Repeat each patch decision over its S x S outputs and cut the ragged edge.

    Args:
        mask: (N, 1, ceil(H/S), ceil(W/S)).
        granularity: S.
        size: (H, W) of the output map.

    Returns:
        (N, 1, H, W), differentiable in ``mask``.
    """
    if granularity != 1:
        mask = F.interpolate(mask, scale_factor=granularity, mode="nearest")
    return mask[:, :, : size[0], : size[1]]


def dilate_mask(mask: Tensor, size: tuple[int, int], stride: int, dilation: int) -> Tensor:
    """The input positions that a padded 3x3 convolution reads for the kept outputs.

    Args:
        mask: Kept outputs, (N, 1, ceil(H/stride), ceil(W/stride)).
        size: (H, W) of the convolution's input.
        stride: Stride of the convolution.
        dilation: Its dilation, equal to its padding.

    Returns:
        (N, 1, H, W) of zeros and ones, differentiable in ``mask``.
    """
    if stride != 1:
        spread = mask.new_zeros(mask.shape[0], 1, *size)
        spread[:, :, ::stride, ::stride] = mask  # output o sits at input position stride * o
        mask = spread
    if dilation == 1:
        return F.max_pool2d(mask, 3, stride=1, padding=1)
    # max_pool2d's own padding is limited to half the undilated kernel.
    return F.max_pool2d(F.pad(mask, [dilation] * 4), 3, stride=1, dilation=dilation)
