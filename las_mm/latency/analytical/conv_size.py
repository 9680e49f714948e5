"""The sizes of a convolution, as its costs count them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .axes import window
from .checks import check_sizes


@dataclass(frozen=True)
class ConvSize:
    """A convolution to a ``c_out`` x ``h_out`` x ``w_out`` map.

    Args:
        c_in: Input channels.
        c_out: Output channels.
        kernel: Kernel size.
        h_out: Rows of the whole output map.
        w_out: Columns of the whole output map.
        stride: Stride.
        groups: Groups.
        dilation: Dilation, which widens a tile's input window by ``(kernel - 1) * dilation``. Our
            extension.
    """

    c_in: int
    c_out: int
    kernel: int
    h_out: int
    w_out: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    def check(self, name: str, **others: int) -> None:
        """Raise ValueError unless all sizes, and ``others``, are positive integers that fit."""
        check_sizes(name, **asdict(self), **others)
        if self.c_in % self.groups or self.c_out % self.groups:
            raise ValueError(
                f"{name}: groups must divide the channels, got groups={self.groups}, "
                f"c_in={self.c_in}, c_out={self.c_out}"
            )

    @property
    def depth(self) -> int:
        """Input channels that an output reads."""
        return self.c_in // self.groups

    @property
    def weight(self) -> int:
        """Weights of an output channel."""
        return self.depth * self.kernel * self.kernel

    @property
    def source(self) -> int:
        """Values of the input map."""
        return self.c_in * self.h_out * self.stride * self.w_out * self.stride

    def window(self, h: Any, w: Any) -> Any:
        """Input values per channel under h x w outputs."""
        return window(h, w, self.kernel, self.stride, self.dilation)

    def read(self, c: np.ndarray, h: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Input values that a tile of c channels and h x w outputs reads."""
        return np.ceil(c / (self.c_out // self.groups)) * self.depth * self.window(h, w)
