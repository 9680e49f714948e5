"""The sparse path of a trained backbone: BN folded, weights packed, run by the sparse ops.

In eval mode without gradients a dynamic backbone takes this path by itself; :func:`prepare` only
does the work ahead of the first image. Parameters, names and ``state_dict`` stay, ``.train()`` goes
back to the masked-dense path, and weights that change are folded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.models.finding import find_dynamic_backbones
from las_mm.models.interception import obstacle

RUNTIMES = ("auto", "sparse", "dense")


def check_runtime(value: object) -> str:
    """``value``, one of :data:`RUNTIMES`.

    Raises:
        ValueError: It is none.
    """
    if value not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {value!r}")
    return str(value)


_masked_dense = False  # set by masked_dense()


@contextmanager
def masked_dense() -> Iterator[None]:
    """Run the masked-dense form (dense convolutions, masks multiplied) in this process meanwhile.

    For comparisons: both forms compute the same.
    """
    global _masked_dense
    before, _masked_dense = _masked_dense, True
    try:
        yield
    finally:
        _masked_dense = before


def wanted(x: Tensor) -> bool:
    """Whether a module in eval mode should run its sparse path on ``x``.

    Not under autograd (the sparse path has no gradients), autocast, tracing or ONNX export, only
    where the back end has native kernels, and where nobody has a hand in all modules; see
    :func:`~las_mm.models.interception.obstacle`.
    """
    return (
        not torch.is_grad_enabled()
        and not _masked_dense
        and ops.has_kernels(x.device.type)
        and ops.supports(x.dtype, x.device.type)
        and not compat.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and (compat.is_compiling() or obstacle(x) is None)
    )


def prepare(model: nn.Module, surroundings: bool = True) -> nn.Module:
    """Fold and pack all dynamic backbones inside ``model`` now, not in the first forward pass.

    Needed before ``torch.compile`` and ``torch.export``, optional otherwise. The convolutions
    around the backbones, of necks and heads, get the same kernels, which they do not have without:
    they compute what they did, faster.

    Args:
        model: A model (detector, classifier, backbone) in eval mode.
        surroundings: ``False``: convolutions outside of dynamic backbones stay as they were built.

    Returns:
        ``model``.

    Raises:
        ValueError: No dynamic backbone inside.
        RuntimeError: The model is in training mode.
    """
    backbones = find_dynamic_backbones(model)
    if not backbones:
        raise ValueError(
            f"{type(model).__name__} contains no dynamic backbone such as las_mm.LASResNet"
        )
    for name, backbone in backbones:
        if backbone.training:
            raise RuntimeError(
                f"{name or type(backbone).__name__} is in training mode; call .eval()"
            )
        with torch.no_grad():
            backbone.prepare()
    from las_mm.models.surroundings import pack_surroundings

    pack_surroundings(model, [backbone for _, backbone in backbones], surroundings)
    return model
