"""How long the forms of a convolution of a whole map take on this machine, as inside a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm import ops


@dataclass(frozen=True)
class ConvKind:
    """What the speed of a convolution's forms depends on, besides the machine.

    Attributes:
        c_in, c_out: Its channels.
        kernel: 1 or 3.
        stride, dilation: Of the convolution.
        nchw: Whether its input is NCHW, and its output therefore too.
        dtype: ``'float32'`` or ``'bfloat16'``.
        threads: torch's threads.
        side: Side of a square map with about as many output positions as all images have.
    """

    c_in: int
    c_out: int
    kernel: int
    stride: int
    dilation: int
    nchw: bool
    dtype: str
    threads: int
    side: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position."""
        return self.c_in * self.c_out * self.kernel**2

    @property
    def key(self) -> str:
        """The kind as a key of the plan's file."""
        return "conv," + ",".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def tiled(self) -> bool:
        """Whether it has a Winograd form."""
        plain = (self.kernel, self.stride, self.dilation) == (3, 1, 1)
        return plain and self.dtype == "float32"

    @property
    def tiled_macs(self) -> int:
        """Those of :attr:`macs` that the Winograd form has fewer of."""
        return self.macs if self.tiled else 0

    def small(self) -> ConvKind:
        """A kind that the same code runs in microseconds."""
        return replace(self, c_in=64, c_out=64, side=7)

    def forms(self) -> ConvForms:
        """What is timed of it."""
        return ConvForms(self)


class ConvForms:
    """Everything that is timed of one kind, on random values.

    Attributes:
        runs: The dense form; the direct form twice, as nothing is skipped; the Winograd form
            likewise, if the kind has one.
    """

    def __init__(self, kind: ConvKind) -> None:
        # Whatever the defaults are that the user's program has set.
        here: dict = dict(dtype=torch.float32, device="cpu")
        dtype, random = getattr(torch, kind.dtype), torch.Generator().manual_seed(0)
        shape = kind.c_out, kind.c_in, kind.kernel, kind.kernel
        weight = torch.randn(shape, generator=random, **here).to(dtype)
        side = kind.side * kind.stride
        self._source = torch.rand(1, kind.c_in, side, side, generator=random, **here).to(dtype)
        if not kind.nchw:
            self._source = self._source.contiguous(memory_format=torch.channels_last)
        self._x = x = self._source.clone()
        bias = torch.zeros(kind.c_out, **here)
        own_bias, geometry = bias.to(dtype), (kind.stride, kind.dilation)
        padding = kind.dilation * (kind.kernel // 2)

        def packed(winograd: bool) -> Callable[[], Tensor]:
            pack = ops.pack_conv2d(weight, bias, *geometry, winograd=winograd)
            if kind.nchw:
                return lambda: ops.to_nchw(ops.packed_conv2d(x, pack))
            return lambda: ops.packed_conv2d(x, pack)

        direct = packed(False)
        self.runs: list[Callable[[], Tensor]] = [
            lambda: F.conv2d(x, weight, own_bias, kind.stride, padding, kind.dilation),
            direct,
            direct,
        ]
        if kind.tiled:
            self.runs += [packed(True)] * 2

    def refill(self) -> None:
        """Write the input, as the layer before does."""
        self._x.copy_(self._source)
