"""Memory that the C library keeps after it was freed, and what lies in the caches."""

from __future__ import annotations

import ctypes

import torch

_EVICT_BYTES = 64 << 20  # more than the caches of most machines


class Eviction:
    """When called, pushes everything else out of the caches.

    Between two runs of a block a network runs its other blocks, whose weights (hundreds of
    megabytes) do the same to this block's.

    Args:
        device_type: ``'cpu'`` or ``'cuda'``.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._data = torch.zeros(_EVICT_BYTES // 4, device=device_type, dtype=torch.float32)

    def __call__(self) -> None:
        self._data.add_(1.0)


def release_freed() -> None:
    """Give memory that was freed back to the system where the C library can (glibc).

    Packing weights leaves holes between the packed tensors, 150 MiB for a ResNet-101, that glibc
    would otherwise keep for this process.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or not a POSIX system
        return
