"""The cost of transformer blocks, which may skip tokens, heads, or their halves.

Not in the published model's text; our extension with its operators (docs/latency_model.md). A
linear layer on tokens is a 1x1 convolution of a map of one row; a product per image and head is a
grouped one, with a group per head and image. Each operator is a kernel of its own: attention that
keeps scores on the chip would read and write less.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from pathlib import Path

from ..device import load_analytic_device
from ..report import Report
from . import operators as ops
from .conv_size import ConvSize
from .device import Device
from .tiling import search_conv

_NORM_OPERATIONS = 4  # mean, variance, normalise, scale and shift
_SOFTMAX_OPERATIONS = 5  # maximum, difference, exponential, sum, quotient


@dataclass(frozen=True)
class TransformerShape:
    """A transformer block: normalised attention and normalised MLP, each added to its input.

    Args:
        name: Name to show.
        tokens: Tokens of an image, a class token included.
        dim: Channels of a token.
        heads: Attention heads.
        head_dim: Channels of a head.
        hidden: Channels inside the MLP.

    Raises:
        ValueError: A size is not a positive integer.
    """

    name: str
    tokens: int
    dim: int
    heads: int
    head_dim: int
    hidden: int

    def __post_init__(self) -> None:
        for key in ("tokens", "dim", "heads", "head_dim", "hidden"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{self.name}: {key} must be a positive integer, got {value!r}")


def layer_norm(
    device: Device,
    tokens: int,
    dim: int,
    *,
    batch_size: int | None = None,
    name: str = "norm",
) -> Report:
    """Normalisation of ``tokens`` vectors of ``dim`` values per image: each read and written once.

    Raises:
        ValueError: A size is not a positive integer.
    """
    return ops.value_op(device, dim, 1, tokens, _NORM_OPERATIONS, 1, True, batch_size, name)


def softmax(
    device: Device,
    rows: int,
    length: int,
    *,
    batch_size: int | None = None,
    name: str = "softmax",
) -> Report:
    """Softmax of ``rows`` vectors of ``length`` values per image: each read and written once.

    Raises:
        ValueError: A size is not a positive integer.
    """
    return ops.value_op(device, rows, 1, length, _SOFTMAX_OPERATIONS, 1, True, batch_size, name)


def matmul(
    device: Device, count: int, rows: int, depth: int, columns: int, name: str = "matmul"
) -> Report:
    """``count`` products of a rows x depth and a depth x columns matrix of their own.

    Raises:
        ValueError: A size is not a positive integer.
    """
    ops.check_sizes(name, count=count, rows=rows, depth=depth, columns=columns)
    size = ConvSize(count * depth, count * columns, 1, 1, rows, groups=count)
    times = search_conv(device, size, 1)
    return Report(name, *times, device.launch_s)


def attention(
    device: Device,
    shape: TransformerShape,
    rate_tokens: float = 1.0,
    rate_heads: float = 1.0,
    batch_size: int | None = None,
    name: str = "attention",
) -> Report:
    """Multi-head self-attention among the kept tokens, with the kept heads.

    Queries, keys and values are of ``ceil(rate_tokens * tokens)`` tokens. Heads are groups of
    channels that every image skips on its own: qkv leaves out their outputs and the projection
    their inputs (:mod:`.channels`), and the batch computes ``ceil(rate_heads * heads * batch)``
    products.

    Raises:
        ValueError: A rate outside [0, 1], or a bad ``batch_size``.
    """
    tokens, images = _kept(shape, rate_tokens), _images(device, batch_size)
    _check_rate("rate_heads", rate_heads)
    heads = math.ceil(rate_heads * shape.heads * images - 1e-9)
    names = ("qkv", "scores", "softmax", "mix", "proj")
    if not tokens or not heads:
        return _nothing(device, name, names)
    inner = shape.heads * shape.head_dim
    batch = dict(batch_size=images)

    def linear(c_in: int, c_out: int, label: str, groups: int, inputs: bool) -> Report:
        mask = ops.ChannelMask(groups, inputs=inputs, outputs=not inputs)
        return ops.channel_conv(
            device, c_in, c_out, 1, 1, tokens, rate=rate_heads, mask=mask, name=label, **batch
        )

    return Report.group(
        name,
        [
            linear(shape.dim, 3 * inner, "qkv", 3 * shape.heads, False),
            matmul(device, heads, tokens, shape.head_dim, tokens, "scores"),
            softmax(device, heads * tokens, tokens, batch_size=1),
            matmul(device, heads, tokens, tokens, shape.head_dim, "mix"),
            linear(inner, shape.dim, "proj", shape.heads, True),
        ],
    )


def mlp(
    device: Device,
    shape: TransformerShape,
    rate_tokens: float = 1.0,
    batch_size: int | None = None,
    name: str = "mlp",
) -> Report:
    """Two linear layers on the kept tokens; the activation between them goes with the first.

    Raises:
        ValueError: A rate outside [0, 1], or a bad ``batch_size``.
    """
    tokens = _kept(shape, rate_tokens)
    if not tokens:
        return _nothing(device, name, ("fc1", "fc2"))
    sizes = ((shape.dim, shape.hidden), (shape.hidden, shape.dim))
    return Report.group(
        name,
        [
            ops.static_conv(device, *size, 1, 1, tokens, batch_size=batch_size, name=f"fc{i}")
            for i, size in enumerate(sizes, 1)
        ],
    )


def transformer_report(
    device: str | Path | Device,
    shape: TransformerShape,
    rate_tokens: float = 1.0,
    rate_heads: float = 1.0,
    rate_attention: float = 1.0,
    rate_mlp: float = 1.0,
    batch_size: int | None = None,
    maskers: bool = True,
) -> Report:
    """Latency of one transformer block, seconds for the whole batch, as a tree.

    Args:
        device: A device, its name or its file.
        shape: The block.
        rate_tokens: Share of the tokens that both halves compute.
        rate_heads: Share of the heads.
        rate_attention: Share of the images that do not skip the attention.
        rate_mlp: Share of the images that do not skip the MLP.
        batch_size: Images per batch. Defaults to the device's.
        maskers: Whether to count a linear layer per token and one per image that decide. Defaults
            to True; False gives the static block.

    Raises:
        ValueError: A rate outside [0, 1], or a bad ``batch_size``.
    """
    device = load_analytic_device(device)
    for key, rate in dict(rate_attention=rate_attention, rate_mlp=rate_mlp).items():
        _check_rate(key, rate)
    tokens = _kept(shape, rate_tokens)
    parts = []
    if maskers:
        outputs = 2 * shape.heads + 4  # heads, and the two halves
        parts = [
            Report.group(
                "maskers",
                [
                    ops.static_conv(
                        device,
                        shape.dim,
                        2,
                        1,
                        1,
                        shape.tokens,
                        batch_size=batch_size,
                        name="token",
                    ),
                    ops.fully_connected(
                        device, shape.dim, outputs, batch_size=batch_size, name="image"
                    ),
                ],
            )
        ]
    halves = (
        (rate_attention, attention(device, shape, rate_tokens, rate_heads, batch_size)),
        (rate_mlp, mlp(device, shape, rate_tokens, batch_size)),
    )
    for i, (rate, half) in enumerate(halves, 1):
        around = _nothing(device, "", (f"norm{i}", f"add{i}")).children
        if tokens:
            around = (
                layer_norm(device, tokens, shape.dim, batch_size=batch_size, name=f"norm{i}"),
                ops.elementwise_add(
                    device, shape.dim, 1, tokens, batch_size=batch_size, name=f"add{i}"
                ),
            )
        parts += [part * rate for part in (around[0], half, around[1])]
    return Report.group(shape.name, parts)


def _kept(shape: TransformerShape, rate: float) -> int:
    _check_rate("rate_tokens", rate)
    return math.ceil(rate * shape.tokens - 1e-9)


def _images(device: Device, batch_size: int | None) -> int:
    images = device.batch_size if batch_size is None else batch_size
    ops.check_sizes("attention", batch_size=images)
    return images


def _nothing(device: Device, name: str, parts: tuple[str, ...]) -> Report:
    """Kernels with nothing to do, which are launched all the same."""
    return Report.group(name, [Report(part, 0.0, 0.0, device.launch_s) for part in parts])


def _check_rate(name: str, rate: float) -> None:
    number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if not number or not 0 <= rate <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {rate!r}")
