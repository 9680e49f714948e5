"""What executors read off modules: norms folded into convolutions, and checks of what is there."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from las_mm.models.coverage import (
    Unsupported,
    check_children,
    check_class,
    check_conv,
    check_norm,
    check_plain,
)


def fold(conv: nn.Module, norm: nn.Module, what: str, **wanted: object) -> tuple[Tensor, Tensor]:
    """Weight (dtype of ``conv``) and float32 bias of a convolution followed by a BN in eval mode.

    Args:
        conv, norm: The two; an ``nn.Identity`` stands for a BN that was folded before.
        what: Name of ``conv`` for messages.
        wanted: Attributes that ``conv`` must have.

    Raises:
        Unsupported: Not a plain ``nn.Conv2d`` followed by a BN with running statistics.
    """
    check_conv(conv, what, **wanted)
    check_norm(norm, f"the norm after {what}")
    if isinstance(norm, nn.Identity):
        weight = conv.weight.clone()
        return weight, weight.new_zeros(len(weight)).float() if conv.bias is None else (
            conv.bias.detach().float().clone()
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.float() * scale.float()[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.float()


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift that a BN in eval mode is, float32.

    Raises:
        Unsupported: It is another norm.
    """
    check_norm(norm, "a norm")
    if isinstance(norm, nn.Identity):
        raise Unsupported("a norm before its convolution was folded away")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.float(), shift.float()


def norm_of_zero(conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """What the norm after ``conv`` makes of zeros in eval mode, (C,), float32.

    Where it was folded into ``conv``, that is the bias which it left there.
    """
    if isinstance(norm, nn.Identity):
        bias = conv.bias
        return conv.weight.new_zeros(conv.out_channels).float() if bias is None else bias.float()
    shift = -norm.running_mean.double() * (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        shift = shift * norm.weight.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return shift.float()


_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.Identity)


POINTWISE = dict(kernel_size=(1, 1), padding=(0, 0), groups=1)


def leading(block: nn.Module) -> list[nn.Module]:
    """The convolutions whose weights' memory format the output of a dense block has.

    A sum has the format of its first term: the shortcut, or without a mask the branch.
    """
    if block.masker is None:
        return [m for name, m in block.named_children() if name.startswith("conv")]
    return [] if block.downsample is None else [block.downsample[-2]]


def check_maskers(block: nn.Module) -> None:
    """The block's maskers decide as the ops do.

    Raises:
        Unsupported: One has a part that the ops do not know, or samples.
    """
    for masker in block.maskers():
        check_class(masker, "its masker")
        if masker.training:  # it samples
            raise Unsupported("its masker is in training mode")
    if block.masker is not None:
        check_conv(block.masker.conv, "its masker's conv", **POINTWISE, stride=(1, 1))
        if block.masker.conv.bias is None:
            raise Unsupported("its masker's conv has no bias")


def check_block(block: nn.Module, convs: Sequence[str]) -> None:
    """The block and its children compute what the ops compute, and nothing else.

    Args:
        block: The block.
        convs: Names of its convolutions; each ``convN`` is followed by ``block.normN``.

    Raises:
        Unsupported: A part that the ops do not know.
    """
    check_class(block, "it")
    check_plain(block.relu, "its activation", nn.ReLU)
    check_plain(block.drop_path, "its drop_path", nn.Identity, DropPath)
    if block.drop_path.training and type(block.drop_path) is DropPath:
        raise Unsupported("its DropPath is in training mode")
    check_maskers(block)
    norms = [getattr(block, f"norm{name[-1]}_name") for name in convs]
    parts = (*convs, *norms, "relu", "downsample", "drop_path")
    check_children(block, (*parts, "masker", "masker_channel", "se"))


def fold_shortcut(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the shortcut's convolution, the last but one of its modules.

    Raises:
        Unsupported: It has another end, or modules before it that might write into ``x``, which
            the branch reads later.
    """
    check_plain(block.downsample, "its shortcut", nn.Sequential)
    if len(block.downsample) < 2:
        raise Unsupported("its shortcut is no convolution followed by a norm")
    for pool in list(block.downsample)[:-2]:
        check_plain(pool, "what precedes its shortcut's convolution", *_POOLS)
    stride = (block.stride,) * 2 if len(block.downsample) == 2 else (1, 1)
    last = tuple(block.downsample)[-2:]
    return fold(*last, "the shortcut's convolution", **dict(POINTWISE, stride=stride))


def check_channel_groups(block: nn.Module, width: int) -> None:
    """Of the masker of ``width`` gated channels, which pruning may have changed.

    Raises:
        Unsupported: It decides about another number of channels.
    """
    masker = block.masker_channel
    if masker is not None and masker.groups * block.channel_granularity != width:
        raise Unsupported(
            f"its masker decides about {masker.groups} groups of {block.channel_granularity} "
            f"channels, of {width}"
        )
