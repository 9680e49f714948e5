"""What differs between the versions of torch that las_mm runs on (2.1 and newer), and nothing else.

ops/common/compat.h is its twin in C++, :mod:`las_mm.dependencies` says which packages are needed.
No other module asks for a version.
"""

from __future__ import annotations

import codecs
import collections
import functools
import pickle
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Whether torch.compile or torch.export reads the caller now. Those two ask for the function itself.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling
    if hasattr(torch.compiler, "is_compiling")
    else torch._dynamo.external_utils.is_compiling  # named here only: it imports all of dynamo, 3 s
)
# Whether it is torch.export, which forbids to leave anything in a module. Before torch 2.7 nobody
# can tell them apart, so under torch.compile nothing is left either: activations stay as they were.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", is_compiling)
# Whether torch.compile looks at what a module holds: reads its ``__dict__`` and compiles anew when
# its attributes change. If not (torch 2.1), a program is out of date for good once weights change.
COMPILE_SEES_MODULES = hasattr(torch.compiler, "is_compiling")
# Whether torch.export takes these networks: what they hold besides parameters and buffers, and that
# they set attributes of their own.
EXPORTS = hasattr(torch.compiler, "is_exporting")
# Whether torch.compile takes custom ops that write to an argument.
COMPILES_MUTATION = hasattr(torch.library, "register_fake")


def register_fake(name: str, kernel: Callable | None = None, *, lib: torch.library.Library) -> Any:
    """``torch.library.register_fake``: the kernel that only tells shapes, also as a decorator."""
    if hasattr(torch.library, "register_fake"):
        return torch.library.register_fake(name, kernel, lib=lib)
    if kernel is None:  # torch 2.1 to 2.3: fake tensors run the kernels of meta tensors
        return functools.partial(register_fake, name, lib=lib)
    lib.impl(name, kernel, "Meta")
    return kernel


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Tell ``FlopCounterMode`` what ``op`` computes; torch 2.1 knows only formulas of shapes.

    Not with torch's own ``register_flop_formula``, which before 2.5 takes the overloads of custom
    ops and then looks for the ops.
    """
    from torch.utils import flop_counter

    if hasattr(flop_counter, "flop_registry"):
        flop_counter.flop_registry[op] = formula


def is_autocast_enabled(device_type: str) -> bool:
    """Whether operations on devices of this type, such as ``'cpu'``, choose their own dtype."""
    if hasattr(torch, "get_autocast_dtype"):  # with which the argument came, in torch 2.4
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def load_weights(path: str, allowed: Sequence[Any]) -> Any:
    """``torch.load`` to the CPU of data alone: tensors, plain containers, and what is allowed.

    Args:
        path: A local file.
        allowed: Classes and functions that the file may name besides torch's own.

    Raises:
        pickle.UnpicklingError: The file names something else.
    """
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    # Before torch 2.5 the strict reader takes no names but its own.
    known = dict(torch._weights_only_unpickler._get_allowed_globals())
    for value in (*_LATER_ALLOWED, *allowed):
        known[f"{value.__module__}.{value.__qualname__}"] = value

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module = "builtins" if module == "__builtin__" else module  # what Python 2 called it
            try:
                return known[f"{module}.{name}"]
            except KeyError:
                raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}") from None

    strict = types.ModuleType("strict_pickle")
    strict.Unpickler, strict.load = Unpickler, lambda *args, **kw: Unpickler(*args, **kw).load()
    return torch.load(path, map_location="cpu", pickle_module=strict, weights_only=False)


# What newer versions of torch add to the names that every file may use.
_LATER_ALLOWED = (collections.Counter, codecs.encode, bytearray, set, complex)
