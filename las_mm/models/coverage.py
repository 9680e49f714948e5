"""What the sparse path may take over: modules that are exactly what its ops compute.

The sparse path replaces the ``forward`` of a block, of its children and of the stem. So it has to
know that nobody has put something else there: a subclass that overrides a method, a method replaced
on one instance or on a class, a child of another type or with other settings, a child that it has
never heard of. What it does not know runs masked-dense, with the reason.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model.utils import _BatchNormXd
from mmpretrain.models.backbones.resnet import ResLayer
from torch import Tensor, nn

from las_mm import ops

# What building, describing, saving and training mode do is no part of what a forward pass computes.
_NOT_COMPUTING = {
    "__abstractmethods__",
    "__annotations__",
    "__annotations_cache__",
    "__annotate__",
    "__annotate_func__",
    "__constants__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__getstate__",
    "__init__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__repr__",
    "__setstate__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
    "_apply",
    "_load_from_state_dict",
    "_replicate_for_data_parallel",
    "_version",
    "extra_repr",
    "init_weights",
    "make_dynamic",
    "reset_parameters",
    "reset_running_stats",
    "runtime",
    "train",
}
_MACHINERY = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")
_known: dict[type, Mapping[str, object]] = {}
# Held by norms; a property of that name computes something else, e.g. a parametrization.
_OF_NORMS = ("weight", "bias", "running_mean", "running_var", "eps", "training", "momentum")
# Classes of others that the ops stand for, beside those that are registered.
_FOREIGN = (
    nn.Conv2d,
    nn.Linear,
    nn.LayerNorm,
    nn.GELU,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Identity,
    nn.Sequential,
    ResLayer,
    DropPath,
)
# (class, name, value) of what computes, as it was on import.
TRUSTED: list[tuple[Any, str, object]] = [
    (cls, name, getattr(cls, name))
    for cls in _FOREIGN
    for name in ("forward", "_conv_forward", "__iter__", *_MACHINERY)
    if hasattr(cls, name)
]
# Functions that the masked-dense form calls, and that people patch.
TRUSTED += [
    (owner, name, getattr(owner, name))
    for owner, names in (
        (F, "conv2d batch_norm relu relu_ max_pool2d avg_pool2d linear interpolate pad"),
        (F, "layer_norm gelu scaled_dot_product_attention"),
        (torch, "conv2d batch_norm relu relu_ max_pool2d addcmul sigmoid"),
        (Tensor, "__add__ __mul__ __sub__ mean sum relu"),
    )
    for name in names.split()
]


class Unsupported(Exception):
    """Why a module has no sparse path; it runs masked-dense instead."""


def register(cls: type) -> type:
    """Class decorator: instances of ``cls`` compute what the sparse path does, as it is now."""
    names = {
        name
        for base in cls.__mro__
        if base not in (object, nn.Module)
        for name in vars(base)
        if name not in _NOT_COMPUTING
    }
    _known[cls] = {name: inspect.getattr_static(cls, name, None) for name in (*names, *_MACHINERY)}
    for name in _known[cls]:
        value = getattr(cls, name)
        stable = getattr(cls, name) is value  # unlike a class method
        if stable and (callable(value) or isinstance(value, property)):
            TRUSTED.append((cls, name, value))
    return cls


for _norm in (nn.BatchNorm2d, nn.SyncBatchNorm, _BatchNormXd):
    register(_norm)


def check_class(module: nn.Module, what: str) -> None:
    """``module`` is an instance of a registered class, and nothing that computes was overridden.

    Args:
        module: The module in question.
        what: Name for the message, such as ``'its masker'``.

    Raises:
        Unsupported: A subclass, the class or the instance has another method.
    """
    cls = type(module)
    base = next((base for base in cls.__mro__ if base in _known), None)
    if base is None:
        raise Unsupported(f"{what} is a {cls.__name__}")
    for name, value in _known[base].items():
        if inspect.getattr_static(cls, name, None) is not value:
            raise Unsupported(f"{what} is a {cls.__name__}, which has a {name} of its own")
    _check_instance(module, what)


def unknown_bases(cls: type) -> Iterable[type]:
    """``cls`` and its bases down to the first one that :func:`obstacle` watches by itself."""
    if not any(base in _known for base in cls.__mro__):
        return ()  # never packed
    return itertools.takewhile(lambda base: base not in _known, cls.__mro__)


def _check_instance(module: nn.Module, what: str) -> None:
    """Nothing was put over what the class of ``module`` has, or where torch does not count it."""
    for name, value in list(module.__dict__.items()):  # other threads set attributes meanwhile
        if callable(value) and hasattr(type(module), name) and name != "_compiled_call_impl":
            raise Unsupported(f"{what} had its {name} replaced")
        if isinstance(value, Tensor) and name != "offset":
            raise Unsupported(f"{what} has a {name} that is neither a parameter nor a buffer")


def shadowed(module: nn.Module, names: Iterable[str] = ("forward",)) -> str | None:
    """A method among ``names`` that was replaced on this very instance."""
    for name in names:  # no generator: torch 2.4 cannot compile one
        if name in module.__dict__ and callable(module.__dict__[name]):
            return name
    return None


def check_plain(module: nn.Module, what: str, *types: type) -> None:
    """``module`` is of exactly one of ``types``, and its methods are those of its class.

    Raises:
        Unsupported: It is not.
    """
    if type(module) not in types:
        short = type(module).__name__ not in [t.__name__ for t in types]
        actual, *names = (
            t.__name__ if short else f"{t.__module__}.{t.__name__}" for t in (type(module), *types)
        )
        raise Unsupported(f"{what} is {actual}, not {' or '.join(names)}")
    _check_instance(module, what)


def check_conv(conv: nn.Module, what: str, **wanted: object) -> None:
    """``conv`` is a plain ``nn.Conv2d`` with zero padding and these attributes.

    Args:
        conv: The module in question.
        what: Its name for the message.
        wanted: Attributes such as ``stride=(1, 1)``.

    Raises:
        Unsupported: It is not.
    """
    check_plain(conv, what, nn.Conv2d)
    assert isinstance(conv, nn.Conv2d)
    _check_tensors(what, conv.weight, conv.bias)
    for name, value in {"padding_mode": "zeros", **wanted}.items():
        if getattr(conv, name) != value:
            raise Unsupported(f"{what} has {name} {getattr(conv, name)}, not {value}")


def _check_tensors(what: str, *tensors: object) -> None:
    """None of ``tensors`` is of another kind, e.g. quantised."""
    for tensor in tensors:
        if type(tensor) not in (nn.Parameter, Tensor, type(None)):
            raise Unsupported(f"{what} has a {type(tensor).__name__} for a parameter")
        if tensor is not None and tensor.layout is not torch.strided:
            raise Unsupported(f"{what} has a parameter of layout {tensor.layout}")


def check_norm(norm: nn.Module, what: str) -> None:
    """``norm`` is a BN in eval mode with running statistics, or was folded away.

    Raises:
        Unsupported: It is not.
    """
    _check_instance(norm, what)
    if type(norm) is nn.Identity:
        return
    # mmengine's accepts inputs of any dimensions.
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm, _BatchNormXd)):
        raise Unsupported(f"{what} is {type(norm).__name__}, not a BatchNorm of maps")
    check_class(norm, what)
    for name in _OF_NORMS:
        if hasattr(type(norm), name):
            raise Unsupported(f"{what}, a {type(norm).__name__}, computes its {name}")
    check_children(norm, _OF_NORMS + ("num_batches_tracked",))
    _check_tensors(what, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if norm.running_mean is None:
        raise Unsupported(f"{what} has no running statistics")
    if norm.training:
        raise Unsupported(f"{what}, a {type(norm).__name__}, is in training mode")


def check_children(module: nn.Module, consumed: Collection[str]) -> None:
    """All children, parameters and buffers of ``module`` are among those that the ops compute.

    Raises:
        Unsupported: There is another one.
    """
    stores = (module._modules, module._parameters, module._buffers)
    for store in stores:
        for name, value in list(store.items()):
            if value is not None and name not in consumed:
                raise Unsupported(f"it has a {name} ({type(value).__name__}) beside its own parts")


# Memory formats ----------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether dense convolutions take ``x`` (N, C, H, W) for channels_last, as torch decides it.

    Strides decide, also where several memory formats would describe the same memory (one channel,
    one pixel) or where ``x`` is a view of a larger map.
    """
    if x.dim() != 4 or x.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` as a dense convolution would have put it out, strides included."""
    n, c, h, w = x.shape
    if channels_last and h * w != 1:  # one pixel is the same in both, and comes out as NCHW
        x = x.contiguous(memory_format=torch.channels_last)
        strides = (h * w * c, 1, w * c, c)
    else:
        x = x if x.is_contiguous() else ops.to_nchw(x)
        strides = (c * h * w, h * w, w, 1)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)
