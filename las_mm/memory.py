"""Memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes


def release_freed() -> None:
    """Give memory that was freed back to the system where the C library can (glibc).

    Packing weights leaves holes between the packed tensors, 150 MiB for a ResNet-101, that glibc
    would otherwise keep for this process.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or not a POSIX system
        return
