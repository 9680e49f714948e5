"""Which machine, and which build of the kernels, measurements hold for."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from pathlib import Path

import torch

from las_mm import ops
from las_mm.version import __version__

_FORMAT = 2


def machine() -> dict[str, object]:
    """What a file of measurements is valid for."""
    return {
        "format": _FORMAT,
        "cpu": cpu_name(),
        "isa": ops.cpu_isa() if ops.native_available() else "none",
        "torch": str(torch.__version__),
        "las_mm": __version__,
        "kernels": kernels_id(),
    }


def processor(device_type: str) -> str | None:
    """Name of the CPU or of the current GPU; ``None`` where there is no GPU."""
    if device_type != "cuda":
        return cpu_name()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_name() -> str:
    """The CPU's own name, e.g. ``'AMD EPYC 9654 96-Core Processor'``."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def kernels_id() -> str:
    """Of the compiled library: another one after every change of a kernel, compiler or flag.

    ``'none'`` where the native ops are not built.
    """
    library = getattr(sys.modules.get("las_mm._C"), "__file__", None)
    if library is None:
        return "none"
    digest = hashlib.blake2b(digest_size=6)
    with open(library, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
