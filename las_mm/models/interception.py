"""Who has a hand in every operation: modes, patched functions, tensor subclasses."""

from __future__ import annotations

from functools import cache

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as all_modules
from torch.utils import flop_counter
from torch.utils._device import DeviceContext

from las_mm.models.coverage import TRUSTED

# Modes under which operations are what they are: torch's FLOP counter has formulas for the ops.
_HARMLESS = tuple(
    getattr(flop_counter, name)
    for name in ("FlopCounterMode", "_FlopCounterMode")
    if hasattr(flop_counter, name)
)


def foreign(x: Tensor) -> str | None:
    """Why ``x`` may do something else than a tensor does, under the same operations."""
    cls = type(x)
    if cls is Tensor or cls is nn.Parameter:
        return None if x.layout is torch.strided else f"its input has the layout {x.layout}"
    if isinstance(x, FakeTensor):
        return "fake tensors have no contents"
    function = cls.__torch_function__
    plain = function is torch._C._disabled_torch_function_impl or (
        getattr(function, "__func__", None) is Tensor.__torch_function__.__func__
        # These only say which of its operations give tensors of their kind.
        or function.__module__.startswith("torchvision.tv_tensors")
    )
    if plain and getattr(cls, "__torch_dispatch__", None) in _NO_DISPATCH:
        return None
    return f"its input is a {cls.__name__}, which has operations of its own"


_NO_DISPATCH = (None, getattr(Tensor, "__torch_dispatch__", None))


def obstacle(x: Tensor) -> str | None:
    """Why no module at all may run on the sparse path for ``x`` now; ``None``: nothing is known."""
    # This runs for every image, so no static look-ups.
    for cls, name, value in TRUSTED:
        if getattr(cls, name, None) is not value:
            return f"{cls.__name__}.{name} has been replaced"
    for hooks in (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks):
        # Torch's FLOP counter keeps the path of the module at work with hooks that change nothing.
        if any(
            getattr(hook, "__module__", "") != "torch.utils.module_tracker"
            for hook in hooks.values()
        ):
            return "there are forward hooks for every module"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation is at work"
    for i in range(torch._C._len_torch_function_stack()):
        mode = type(torch._C._get_function_stack_at(i))
        if mode is not DeviceContext:  # which chooses where new tensors are made
            return f"a {mode.__name__} is at work"
    for i in range(torch._C._len_torch_dispatch_stack()):
        mode = type(torch._C._get_dispatch_stack_at(i))
        if mode not in _HARMLESS:
            return f"a {mode.__name__} is at work"
    return foreign(x) or _slow_on_card(x)


# Below, las_mm's kernels run on plain float32 arithmetic, which loses against a dense network.
_TENSOR_CORES = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}


def _slow_on_card(x: Tensor) -> str | None:
    if not x.is_cuda or x.dtype not in _TENSOR_CORES:
        return None
    least, capability = _TENSOR_CORES[x.dtype], _capability(x.device.index)
    if capability >= least:
        return None
    return (
        f"las_mm multiplies {str(x.dtype).removeprefix('torch.')} on tensor cores from compute "
        f"capability {least[0]}.{least[1]} on, and this GPU has {capability[0]}.{capability[1]}"
    )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
