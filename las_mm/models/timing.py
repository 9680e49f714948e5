"""How long the forms of a kind of block take on this machine, as inside a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from las_mm import ops
from las_mm.memory import Eviction
from las_mm.models.conv_forms import ConvKind

RATES = (0.25, 1.0)
_ROUNDS = 6


@dataclass(frozen=True)
class BlockKind:
    """What the speed of a block's forms depends on, besides the machine.

    Attributes:
        c_in, width, c_out: Channels of the input, of conv1 and conv2, of the output.
        strides: Of conv1 and conv2.
        dilation, groups: Of conv2.
        downsample: Whether the shortcut has a convolution.
        dtype: ``'float32'`` or ``'bfloat16'``.
        threads: torch's threads.
        side: Side of a square map with about as many output positions as all images have.
        block: ``'bottleneck'`` or ``'basic'``.
    """

    c_in: int
    width: int
    c_out: int
    strides: tuple[int, int]
    dilation: int
    groups: int
    downsample: bool
    dtype: str
    threads: int
    side: int
    block: str = "bottleneck"

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position when all is computed."""
        side = self.c_in * self.c_out if self.downsample else 0
        if self.block == "basic":
            return 9 * self.width * (self.c_in + self.c_out) + side
        stride = self.strides[1] ** 2
        return (
            self.c_in * self.width * stride
            + 9 * self.width * self.width // self.groups
            + self.width * self.c_out
            + side
        )

    @property
    def key(self) -> str:
        """The kind as a key of the file."""
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def tiled_macs(self) -> int:
        """Those of :attr:`macs` that the Winograd form has fewer of."""
        if self.block == "basic":
            both = self.c_in * (self.strides[0] == self.dilation == 1) + self.c_out
            return 9 * self.width * both
        return 9 * self.width * self.width // self.groups

    @property
    def tiled(self) -> bool:
        """Whether conv2 has a Winograd form."""
        if self.block == "basic":
            return self.dtype == "float32"
        plain = (self.strides[1], self.dilation, self.groups) == (1, 1, 1)
        return plain and self.dtype == "float32"

    def small(self) -> BlockKind:
        """A kind that the same code runs in microseconds."""
        groups = min(self.groups, 2)
        width = 64 if groups == 1 else 2 * self.width // self.groups
        return replace(self, c_in=64, width=width, c_out=64, groups=groups, side=7)

    def forms(self) -> _Forms:
        """What is timed of it."""
        return _Forms(self)


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one kind on its map of ``side`` x ``side`` outputs.

    Attributes:
        dense: Dense convolutions, masked.
        direct: The sparse op at rates 0.25 and 1 with conv2 in direct form.
        winograd: The same in Winograd form, or ``None`` if it has none.
    """

    dense: float
    direct: tuple[float, float]
    winograd: tuple[float, float] | None


# Whatever the defaults are that the user's program has set.
_HERE: dict = dict(dtype=torch.float32, device="cpu")
# (mask, whether in Winograd form, dense_above) -> what to time.
_Make = Callable[[Tensor, bool, float], Callable[[], Tensor]]


class _Forms:
    """Everything that is timed of one kind, on random weights and masks.

    Attributes:
        runs: The dense form; the direct form at :data:`RATES`; the Winograd form likewise, if the
            kind has one.
    """

    def __init__(self, kind: BlockKind) -> None:
        dtype = getattr(torch, kind.dtype)
        random = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            fan_in = shape[1] * shape[2] * shape[3]
            return (torch.randn(shape, generator=random, **_HERE) / fan_in**0.5).to(dtype)

        side = kind.side * kind.strides[0] * kind.strides[1]
        source = torch.rand(1, kind.c_in, side, side, generator=random, **_HERE).to(dtype)
        self._source = source.contiguous(memory_format=torch.channels_last)
        self._x = self._source.clone()
        grid = -(-kind.side // 2)
        low = torch.rand(1, 1, grid, grid, generator=random, **_HERE) < RATES[0]
        masks = [low, torch.ones_like(low)]
        make = self._basic if kind.block == "basic" else self._bottleneck
        run = make(kind, weight)
        self.runs = [run(low, False, -1.0), *(run(mask, False, 1.0) for mask in masks)]
        if kind.tiled:
            self.runs += [run(mask, True, 1.0) for mask in masks]

    def _bottleneck(self, kind: BlockKind, weight: Callable[..., Tensor]) -> _Make:
        x = self._x
        kernels = [
            weight(kind.width, kind.c_in, 1, 1),
            weight(kind.width, kind.width // kind.groups, 3, 3),
            weight(kind.c_out, kind.width, 1, 1),
        ]
        if kind.downsample:
            kernels.append(weight(kind.c_out, kind.c_in, 1, 1))
        kernels = [w.contiguous(memory_format=torch.channels_last) for w in kernels]
        biases = [torch.zeros(len(kernel), **_HERE) for kernel in kernels]
        geometry = kind.strides, kind.dilation, kind.groups
        full = ops.pack_bottleneck(kernels, biases, *geometry, dense=True, winograd_cost=0.0)

        def run(mask: Tensor, winograd: bool, dense_above: float) -> Callable[[], Tensor]:
            pack = full._replace(
                winograd=full.winograd if winograd else None,
                dense=full.dense if dense_above < 0 else None,
                dense_above=dense_above,
            )
            if kind.downsample:
                return lambda: ops.sparse_bottleneck(x, mask, pack, 2)
            # In place, as inside a stage.
            return lambda: ops.sparse_bottleneck_(x, mask, pack, 2)

        return run

    def _basic(self, kind: BlockKind, weight: Callable[..., Tensor]) -> _Make:
        x = self._x
        kernels = [weight(kind.width, kind.c_in, 3, 3), weight(kind.c_out, kind.width, 3, 3)]
        if kind.downsample:
            kernels.append(weight(kind.c_out, kind.c_in, 1, 1))
        kernels = [w.contiguous(memory_format=torch.channels_last) for w in kernels]
        biases = [torch.zeros(len(kernel), **_HERE) for kernel in kernels]
        geometry = kind.strides[0], kind.dilation
        full = ops.pack_basic(kernels, biases, *geometry, dense=True, winograd_cost=0.0)

        def run(mask: Tensor, winograd: bool, dense_above: float) -> Callable[[], Tensor]:
            pack = full._replace(
                winograd=full.winograd if winograd else (),
                dense=full.dense if dense_above < 0 else (),
                dense_above=dense_above,
            )
            if kind.downsample:
                return lambda: ops.sparse_basic(x, mask, pack, 2)
            return lambda: ops.sparse_basic_(x, mask, pack, 2)

        return run

    def refill(self) -> None:
        """Write the input, as the block before does."""
        self._x.copy_(self._source)


def measure(kind: BlockKind | ConvKind) -> Timing:
    """Time the forms of ``kind`` with cold weights, a warm input and warm code.

    So they are inside a network: between two images it streams its other weights through the
    caches, the block before has just written the input, and all blocks share the code.
    """
    forms, small, evict = kind.forms(), kind.small().forms(), Eviction()
    seconds: list[list[float]] = [[] for _ in forms.runs]
    for _ in range(_ROUNDS):  # in turns, so that all meet the same moods of the machine
        for record, run, warm in zip(seconds, forms.runs, small.runs):
            evict()
            forms.refill()
            warm()
            start = time.perf_counter()
            run()
            record.append(time.perf_counter() - start)
    # Other work on the machine only ever adds time.
    dense, *sparse = (min(record) for record in seconds)
    return Timing(
        dense=dense,
        direct=(sparse[0], sparse[1]),
        winograd=(sparse[2], sparse[3]) if kind.tiled else None,
    )
