"""The dynamic backbones inside a model, and what they did last."""

from __future__ import annotations

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from las_mm.models.activation import NetworkActivation


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def find_dynamic_backbones(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All dynamic backbones inside ``model`` with their module names, e.g. [('backbone', ...)].

    A dynamic backbone is a module with a ``network_activation()`` method.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if callable(getattr(module, "network_activation", None))
    ]


def find_dynamic_backbone(model: nn.Module, module: str | None = None) -> nn.Module:
    """The one dynamic backbone inside ``model`` (a detector, classifier, DDP wrapper, ...).

    Args:
        model: The model; DDP and test-time augmentation are opened first.
        module: Which one where there are several, as in a semi-supervised detector: the dotted
            name of the backbone, or of a part that has only one, e.g. ``'student.backbone'`` or
            ``'student'``. Defaults to the only one.

    Raises:
        ValueError: There is none, or more than one that could be meant.
    """
    model = unwrap(model)
    found = find_dynamic_backbones(model)
    names = ", ".join(name or "the model itself" for name, _ in found) or "none"
    if module is not None and not isinstance(module, str):
        raise ValueError(f"module must be a name such as 'student.backbone', got {module!r}")
    if not found or (module is None and len(found) > 1):
        way_out = (
            "set model.backbone.type='las_mm.LASResNet' or remove the las_mm hooks from this config"
        )
        if found:
            way_out = "name one with module='...'"
        raise ValueError(
            f"{type(model).__name__} must contain exactly one dynamic backbone such as "
            f"las_mm.LASResNet, found {names}; {way_out}"
        )
    if module:
        found = [(n, b) for n, b in found if n == module or n.startswith(f"{module}.")]
    if len(found) != 1:
        count = f"{len(found)} dynamic backbones" if found else "no dynamic backbone"
        raise ValueError(
            f"module={module!r} names {count} of {type(model).__name__}; it must name one of: "
            f"{names}"
        )
    return found[0][1]


def collect_activations(model: nn.Module, module: str | None = None) -> NetworkActivation:
    """Read what the dynamic backbone inside ``model`` did in its last forward pass.

    Args:
        model: Any module that contains a dynamic backbone.
        module: Which one, where there are several; see :func:`find_dynamic_backbone`.

    Returns:
        The rates of all its blocks in network order, with gradients in training.

    Raises:
        ValueError: No dynamic backbone, or several that could be meant.
        RuntimeError: The backbone has not run yet.
    """
    return find_dynamic_backbone(model, module).network_activation()


def require_gradients(backbone: nn.Module) -> None:
    """Check that a loss on the last forward pass' rates reaches every masker that shall learn.

    Re-entrant activation checkpointing runs a forward pass without recording it for gradients, so
    that the rates become constants, which a budget cannot move.

    Raises:
        RuntimeError: It does not; the message names a block.
    """
    names = {block: name for name, block in backbone.named_modules()}
    for block in backbone.blocks():
        learns = any(p.requires_grad for masker in block.maskers() for p in masker.parameters())
        if learns and block.activation is not None and not block.activation.requires_grad:
            raise RuntimeError(
                f"the activation rate of {names[block]} has no gradient, though its masker shall "
                "learn: re-entrant activation checkpointing, which mmengine's "
                "activation_checkpointing is, loses it (or the masker is in eval mode); set "
                "with_cp=True of the backbone instead, which saves the same memory"
            )
