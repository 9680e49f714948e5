"""One trained network, many budgets: an offset on its maskers, calibrated on images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from las_mm.models.finding import find_dynamic_backbone
from las_mm.models.flops import flops_report

TOLERANCE = 0.002  # of the FLOPs ratio
LARGEST = 1024.0  # offsets beyond that differ from infinity in nothing


@dataclass(frozen=True)
class Budget:
    """What :func:`set_budget` found.

    Attributes:
        offset: Added to the keep-minus-skip logit of every decision; 0 without a budget.
        flops_ratio: Mean FLOPs ratio on the images with it; ``None`` without a budget.
    """

    offset: float
    flops_ratio: float | None


@torch.no_grad()
def set_budget(
    model: nn.Module,
    rate: float | None,
    images: Tensor | Iterable[Tensor] | None = None,
    module: str | None = None,
) -> Budget:
    """Move a trained network to another FLOPs ratio without training it.

    One number is added to the logits of all maskers' decisions, found by bisection so that the
    mean FLOPs ratio on ``images`` hits ``rate``; other images take more or less, as before. It is
    no part of checkpoints and holds until the next call. Decisions come in steps (a layer block
    has one per image), so give enough images; the nearest ratio found is kept. Small moves cost
    little accuracy, large ones much more than training to the target would (docs/accuracy.md).

    Args:
        model: A model (detector, classifier, backbone) in eval mode.
        rate: The wanted mean FLOPs ratio of the backbone in (0, 1], or ``None``: back to the
            decisions that it was trained for.
        images: What the backbone takes, preprocessed: (N, 3, H, W) or batches of these. Some
            hundred; each of about 15 passes runs all of them.
        module: Which dynamic backbone, where there are several; see
            :func:`~las_mm.models.find_dynamic_backbone`.

    Returns:
        The offset and the ratio that it gives.

    Raises:
        ValueError: No dynamic backbone or no maskers, a rate outside (0, 1] or out of reach, or no
            images.
        RuntimeError: The model is in training mode.

    Examples:
        >>> from las_mm.models import LASResNet
        >>> network = LASResNet(50, base_channels=16).eval()
        >>> round(set_budget(network, 0.8, torch.randn(4, 3, 64, 64)).flops_ratio, 1)
        0.8
    """
    backbone = find_dynamic_backbone(model, module)
    maskers = backbone.maskers()
    if not maskers:
        raise ValueError("every block of the backbone is static, so it has one budget only")
    if rate is None:
        for masker in maskers:
            masker.offset = None
        return Budget(0.0, None)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise ValueError(f"rate of set_budget must be in (0, 1] or None, got {rate!r}")
    if backbone.training:
        raise RuntimeError("set_budget needs the model in eval mode; call .eval()")
    batches = _batches(images)
    before = [masker.offset for masker in maskers]
    try:
        offset, ratio = _search(backbone, rate, batches)
    except BaseException:
        for masker, value in zip(maskers, before):
            masker.offset = value
        raise
    _set(backbone, offset)
    return Budget(offset, ratio)


def _batches(images: Tensor | Iterable[Tensor] | None) -> Sequence[Tensor]:
    if isinstance(images, Tensor):
        batches = list(images.split(64)) if images.dim() == 4 else []
    else:
        batches = list(images or ())
    good = all(isinstance(batch, Tensor) and batch.dim() == 4 and len(batch) for batch in batches)
    if not batches or not good:
        raise ValueError(
            "images of set_budget must be (N, 3, H, W) or batches of these, with N at least 1"
        )
    return batches


def _set(backbone: nn.Module, offset: float) -> None:
    device = next(backbone.parameters()).device
    for masker in backbone.maskers():
        masker.offset = torch.tensor(offset, dtype=torch.float32, device=device)


def _ratio(backbone: nn.Module, offset: float, batches: Sequence[Tensor]) -> float:
    """Mean FLOPs ratio over all images."""
    _set(backbone, offset)
    total = 0.0
    for batch in batches:
        backbone(batch)
        total += flops_report(backbone.network_activation()).ratio.item() * len(batch)
    return total / sum(map(len, batches))


def _search(backbone: nn.Module, rate: float, batches: Sequence[Tensor]) -> tuple[float, float]:
    """The offset whose ratio is the nearest to ``rate``, and the ratio."""
    tried = {0.0: _ratio(backbone, 0.0, batches)}
    more = tried[0.0] < rate
    inside, outside = 0.0, 0.5 if more else -0.5
    while True:
        tried[outside] = _ratio(backbone, outside, batches)
        if (tried[outside] < rate) != more:
            break
        if abs(outside) >= LARGEST:
            if abs(tried[outside] - rate) <= TOLERANCE:
                return outside, tried[outside]
            raise ValueError(
                f"rate {rate:g} of set_budget is out of reach: with "
                f"{'everything' if more else 'nothing'} kept the FLOPs ratio of this backbone is "
                f"{tried[outside]:.3f}"
            )
        inside, outside = outside, 2 * outside
    for _ in range(16):
        best = min(tried, key=lambda offset: abs(tried[offset] - rate))
        if abs(tried[best] - rate) <= TOLERANCE:
            break
        middle = (inside + outside) / 2
        tried[middle] = _ratio(backbone, middle, batches)
        if (tried[middle] < rate) == more:
            inside = middle
        else:
            outside = middle
    best = min(tried, key=lambda offset: abs(tried[offset] - rate))
    return best, tried[best]
