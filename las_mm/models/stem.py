"""The shapes of what stands before the first block, whatever it was replaced by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from mmcv.cnn import is_norm
from torch import nn

from las_mm.network.operator import Conv, Operator, Pool

_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_UNKNOWN = (
    "no module whose FLOPs and latency are known: nn.Conv2d with a square kernel, norms, "
    "activations, nn.MaxPool2d and nn.AvgPool2d are"
)


def stem_shapes(
    parts: Sequence[nn.Module], channels: int, hw: tuple[int, int]
) -> tuple[tuple[Operator, ...], tuple[int, int]]:
    """The convolutions and poolings inside modules that run one after the other.

    Args:
        parts: The modules, in order.
        channels: Channels of the input, where no convolution says it.
        hw: Rows and columns of the input.

    Returns:
        Their shapes, and rows and columns of the output.

    Raises:
        ValueError: A module of another kind, whose size or FLOPs nobody knows.
    """
    shapes: list[Operator] = []
    for leaf in (leaf for part in parts for leaf in _leaves(part)):
        before = hw
        if isinstance(leaf, nn.Conv2d):
            channels, (rows, columns) = leaf.out_channels, leaf.kernel_size
            hw = _conv_size(leaf, hw)
            if rows != columns:
                raise ValueError(f"the stem's {leaf} is {_UNKNOWN}")
            count = sum(isinstance(shape, Conv) for shape in shapes) + 1
            shapes.append(conv_shape(f"stem.conv{count}", leaf, hw))
        elif not is_norm(leaf) and not isinstance(leaf, nn.PReLU):
            hw = _size_after(leaf, channels, hw)
            if isinstance(leaf, _POOLS):
                kernel, stride = _first(leaf.kernel_size), _first(leaf.stride)
                name = "stem.maxpool" if type(leaf) is nn.MaxPool2d else "stem.pool"
                shapes.append(Pool(name, channels, kernel, stride, *hw))
            elif hw != before or any(weight.dim() > 1 for weight in leaf.parameters()):
                raise ValueError(f"the stem's {leaf} is {_UNKNOWN}")
    return tuple(shapes), hw


def conv_shape(name: str, conv: nn.Conv2d, out_hw: tuple[int, int]) -> Conv:
    """The shape of a square convolution with an output of ``out_hw``."""
    return Conv(
        name=name,
        c_in=conv.in_channels,
        c_out=conv.out_channels,
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        groups=conv.groups,
        h_out=out_hw[0],
        w_out=out_hw[1],
    )


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Convolutions, and modules without children, in order."""
    children = list(module.children())
    if isinstance(module, nn.Conv2d) or not children:
        yield module
        return
    for child in children:
        yield from _leaves(child)


def _conv_size(conv: nn.Conv2d, hw: tuple[int, int]) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        if conv.padding == "same":
            return hw
        padding: Sequence[int] = (0, 0)
    else:
        padding = conv.padding
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(hw, padding, conv.dilation, conv.kernel_size, conv.stride)
    )
    return rows, columns


def _size_after(leaf: nn.Module, channels: int, hw: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of what a module without parameters makes of ``hw``; no hook is called."""
    try:
        x = torch.empty(1, channels, *hw, device="meta")
        rows, columns = type(leaf).forward(leaf, x).shape[-2:]
    except Exception as error:
        raise ValueError(f"the stem's {leaf} is {_UNKNOWN} ({error})") from None
    return rows, columns


def _first(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]
