"""Latency of whatever a user has: a model, a config, or a network's shape."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from las_mm.network.block import NetworkShape
from las_mm.network.operator import CHANNEL, DILATED, Conv

from .device import AnyDevice, load_device
from .report import Report
from .table import network_report

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

Source = Union["nn.Module", "Config", str, Path, NetworkShape]
Rates = Union[float, Sequence[float], np.ndarray]


def predict(
    source: Source,
    device: str | Path | AnyDevice,
    input_shape: Sequence[int] | None = None,
    rates: Rates | None = None,
    rates_dilated: Rates | None = None,
    per_image: bool = True,
    rates_channel: Rates | None = None,
) -> Report:
    """Predicted latency of a dynamic backbone: stem and stages, their blocks, their operators.

    Each node of the tree has seconds of compute, memory and launch; reports add, and
    ``to_dict()`` gives JSON. Only the backbone is costed: necks and heads have no model here.

    Args:
        source: What to cost: a module with a LASResNet inside (detector, classifier, backbone),
            a config or its path, or a network's shape.
        device: A device, its name or its file; see :func:`load_device` for what its numbers rest
            on.
        input_shape: (N, C, H, W), or (H, W) for the device's batch size. Defaults to None: the
            size a shape was made for, or a model's last input.
        rates: Rate of every block, shape (n_blocks,) (those of static blocks are not used), or
            one for all, in [0, 1]. Defaults to None: what the model's blocks did in its last
            forward pass, at whatever size that was.
        rates_dilated: conv1's rates likewise. Defaults to None: as recorded, or ``rates`` where
            these are given (the papers' setting, without a halo).
        per_image: Whether to divide by the batch size, as the papers do. Defaults to True.
        rates_channel: Channel rates likewise, of the blocks that skip channels. Defaults to None:
            as recorded, or 1 where ``rates`` are given.

    Raises:
        ValueError: No model of latency for something in ``source``, an ``input_shape`` that is
            none or not the shape's, no rates to go by, or rates out of range.
        TypeError: ``source`` is nothing of the kind.
        las_mm.preflight.UserError: The config cannot be read or its model not be built.

    Examples:
        >>> from las_mm.latency import predict, resnet_shape
        >>> report = predict(resnet_shape(101), "v100", (128, 3, 224, 224), rates=0.5)
        >>> [stage.name for stage in report.children]
        ['stem', 'stage1', 'stage2', 'stage3', 'stage4']
        >>> f"{1e3 * report.latency_s:.3f} ms per image"
        '1.437 ms per image'
    """
    device = load_device(device)
    batch, size = _split(input_shape)
    by_axis: dict[str, Rates] | None = None
    is_model = not isinstance(source, NetworkShape) and not _is_config(source)
    if is_model and rates is not None and size is None:
        size = _backbone_of(source)._input_hw
    if is_model and rates is None:
        recorded, size = _recorded(source, size)
        given = {DILATED: rates_dilated, CHANNEL: rates_channel}
        if recorded is not None:
            by_axis = {**recorded, **{axis: r for axis, r in given.items() if r is not None}}
    network = find_network(source, size)
    if input_shape is not None and len(input_shape) == 4 and input_shape[1] != network.channels:
        raise ValueError(
            f"input_shape must have the {network.channels} channels that {network.name} takes, got "
            f"{tuple(input_shape)}"
        )
    if rates is None and by_axis is None:
        if set(network.axes) - {CHANNEL} or (network.axes and rates_channel is None):
            raise ValueError(
                f"{network.name} has dynamic blocks, so its latency depends on their rates: give "
                "rates (e.g. rates=0.5; rates_channel=0.5 for skipped channels), or a model that "
                "has run on an image"
            )
    known = 1.0 if rates is None else rates
    return network_report(
        device,
        network,
        known if by_axis is None else by_axis,
        rates_dilated,
        batch_size=batch,
        per_image=per_image,
        rates_channel=1.0 if rates_channel is None else rates_channel,
    )


def find_network(source: Source, input_hw: Sequence[int] | None = None) -> NetworkShape:
    """The shape of the dynamic backbone in ``source``, for an input of (H, W) pixels.

    Args:
        source: See :func:`predict`.
        input_hw: Rows and columns of the input. A shape needs none.

    Raises:
        ValueError, TypeError, las_mm.preflight.UserError: See :func:`predict`.
    """
    if isinstance(source, NetworkShape):
        if input_hw is not None and tuple(input_hw) != tuple(source.input_hw):
            raise ValueError(
                f"{source.name} is the shape of the network for {source.input_hw}, not for "
                f"{tuple(input_hw)}: make one for that size"
            )
        return source
    if input_hw is None:
        raise ValueError(
            "input_shape is needed: (N, C, H, W), or (H, W) for the device's batch size"
        )
    if _is_config(source):
        backbone = _build_backbone(source)
    else:
        backbone = _backbone_of(source)
    network: NetworkShape = backbone.network_shape(tuple(input_hw))
    _check_covered(backbone, network)
    return network


def backbone_configs(cfg: Any) -> list[Any]:
    """The configs of dynamic backbones anywhere below ``cfg.model``: parts of ``cfg``, not copies.

    Only types of this package and classes are recognised.
    """
    from las_mm import models  # noqa: F401  fills the registry
    from las_mm.registry import MODELS

    def is_dynamic(kind: Any) -> bool:
        if isinstance(kind, str):
            scope, _, name = kind.rpartition(".")
            kind = MODELS.module_dict.get(name) if scope in ("", "las_mm") else None
        return inspect.isclass(kind) and callable(getattr(kind, "network_shape", None))

    def walk(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if is_dynamic(node.get("type")):
                yield node
            for child in node.values():
                yield from walk(child)
        elif isinstance(node, (list, tuple)):
            for child in node:
                yield from walk(child)

    return list(walk(cfg.get("model")))


def _is_config(source: Any) -> bool:
    from mmengine.config import Config

    return isinstance(source, (str, Path, Mapping, Config))


def _split(input_shape: Sequence[int] | None) -> tuple[int | None, tuple[int, int] | None]:
    """(batch size, (H, W)) of an input's shape; None where it does not say."""
    if input_shape is None:
        return None, None
    numbers = tuple(input_shape) if isinstance(input_shape, Iterable) else ()
    whole = all(isinstance(n, (int, np.integer)) and n > 0 for n in numbers)
    if whole and len(numbers) == 2:
        return None, (int(numbers[0]), int(numbers[1]))
    if whole and len(numbers) == 4:
        return int(numbers[0]), (int(numbers[2]), int(numbers[3]))
    raise ValueError(
        "input_shape must be (N, C, H, W), or (H, W) for the device's batch size, all positive "
        f"integers, got {input_shape!r}"
    )


def _recorded(
    model: Any, size: tuple[int, int] | None
) -> tuple[dict[str, np.ndarray] | None, tuple[int, int] | None]:
    """Rates by axis and input size of a model's last pass, as far as known."""
    backbone = _backbone_of(model)
    try:
        activation = backbone.network_activation().detach()
    except RuntimeError as error:
        if not backbone.maskers() and size is not None:
            return None, size
        raise ValueError(
            f"{type(model).__name__} has not run yet, so its blocks have no rates: run it on an "
            f"image, or give {'' if size else 'input_shape and '}rates, e.g. rates=0.5"
        ) from error
    # Straight-through arithmetic may leave a rate a rounding error above 1.
    rates = {a: r.clamp(0, 1).double().cpu().numpy() for a, r in activation.axes.items()}
    return rates, activation.shape.input_hw if size is None else size


def _backbone_of(model: Any) -> Any:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise TypeError(
            "latency is predicted for a module, a config, the path of one or a NetworkShape, "
            f"got {type(model).__name__}"
        )
    from las_mm.models.finding import find_dynamic_backbones

    found = find_dynamic_backbones(model)
    if len(found) != 1:
        names = ", ".join(name or "the model itself" for name, _ in found) or "none"
        raise ValueError(
            f"{type(model).__name__} has no backbone with a latency model: exactly one dynamic "
            f"backbone such as las_mm.LASResNet (mode='static' for the static network) is "
            f"needed, found {names}"
        )
    return found[0][1]


def _build_backbone(source: Any) -> Any:
    """The backbone of a config or its path, with random weights."""
    import torch
    from mmengine.config import Config

    from las_mm import configs

    if isinstance(source, (str, Path)):
        cfg = configs.load_config(str(source))
    else:
        cfg = source if isinstance(source, Config) else Config(dict(source))
    if not cfg.get("model"):
        raise ValueError("the config has no model to predict the latency of")
    found = backbone_configs(cfg)
    if len(found) != 1:
        # None or several: the model itself knows best.
        return _backbone_of(configs.build_model(cfg))
    # Not build_model, which would change the default scope of a running process.
    with torch.random.fork_rng(devices=[]):  # a prediction changes no random numbers
        return configs.build(dict(found[0], init_cfg=None), "backbone")


def _check_covered(backbone: Any, network: NetworkShape) -> None:
    """Every layer with weights is an operator of the shape, or is fused into one.

    Raises:
        ValueError: Some layer would cost nothing.
    """
    names = {module: name for name, module in backbone.named_modules()}
    inside = {part for block in backbone.blocks() for part in block.modules()}
    # A backbone's own parameters, such as a class token, are added to something.
    stem = [names[m] for m in _weighted(backbone) if m not in inside and m is not backbone]
    between = [op for block in network.blocks for op in block.operators if not op.module]
    convs = sum(isinstance(op, Conv) for op in (*network.stem, *between))
    if len(stem) != convs:
        raise ValueError(
            f"{type(backbone).__name__} has the layers {', '.join(stem)} outside of its blocks, "
            f"its shape counts {convs} there: there is no latency model for the others"
        )
    for block, shape in zip(backbone.blocks(), network.blocks):
        operators = [op.module for op in shape.operators if op.module and not op.masker]
        maskers = {part for masker in block.maskers() for part in masker.modules()}
        found: list[str] = []
        for layer in _weighted(block):
            name = names[layer].removeprefix(names[block] + ".")
            if layer in maskers:
                continue
            own = [m for m in operators if name == m or name.startswith(m + ".")]
            if not own or len(own) <= found.count(own[0]):
                raise ValueError(
                    f"{names[layer]} of {type(backbone).__name__} is a {type(layer).__name__} that "
                    "its block does not describe, so there is no latency model for it"
                )
            found.append(own[0])
        missing = next((m for m in operators if found.count(m) < operators.count(m)), None)
        if missing is not None:
            raise ValueError(
                f"{names[block]} of {type(backbone).__name__} describes {missing}, which has no "
                "layer with weights: there is no latency model for what took its place"
            )


def _weighted(module: Any) -> list[Any]:
    """The modules inside with parameters of their own but norms, which multiply no matrix."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return [
        part
        for part in module.modules()
        if list(part.parameters(recurse=False)) and not isinstance(part, norms)
    ]
