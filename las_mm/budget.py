"""One trained network, many budgets: an offset on its maskers, calibrated on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from las_mm.latency.table import LatencyTables
from las_mm.models.finding import find_dynamic_backbone
from las_mm.models.flops import flops_report
from las_mm.pictures import as_the_model_reads

TOLERANCE = 0.002  # of the FLOPs ratio
LARGEST = 1024.0  # offsets beyond that differ from infinity in nothing


@dataclass(frozen=True)
class Budget:
    """What :func:`set_budget` found.

    Attributes:
        offset: Added to the keep-minus-skip logit of every decision; 0 without a budget.
        flops_ratio: Mean FLOPs ratio on the images with it; ``None`` without a budget.
        latency_ms: The predicted latency that the limit is about; ``None`` without a limit.
    """

    offset: float
    flops_ratio: float | None
    latency_ms: float | None = None


@torch.no_grad()
def set_budget(
    model: nn.Module,
    rate: float | None = None,
    images: Tensor | Iterable[Tensor] | str | Path | None = None,
    module: str | None = None,
    *,
    max_latency_ms: float | None = None,
    device: Any = None,
    percentile: float = 100,
) -> Budget:
    """Move a trained network to another FLOPs ratio, or below a latency, without training it.

    One number is added to the logits of all maskers' decisions, found by bisection so that the
    mean FLOPs ratio on ``images`` hits ``rate``; other images take more or less, as before. It is
    no part of checkpoints and holds until the next call. Decisions come in steps (a layer block
    has one per image), so give enough images; the nearest ratio found is kept. Small moves cost
    little accuracy, large ones much more than training to the target would (docs/accuracy.md).

    With ``max_latency_ms`` the number is the largest, 0 at most, with which the predicted latency
    of every image, run by itself, stays within the limit.

    Args:
        model: A model (detector, classifier, backbone) in eval mode.
        rate: The wanted mean FLOPs ratio of the backbone in (0, 1], or ``None``: back to the
            decisions that it was trained for.
        images: What the backbone takes, preprocessed: (N, 3, H, W) or batches of these. Or a
            folder of image files, which the test pipeline of the config that ``model`` was built
            from reads (mmdet's ``init_detector`` and mmpretrain's ``get_model`` keep it). Some
            hundred; each of about 15 passes runs all of them.
        module: Which dynamic backbone, where there are several; see
            :func:`~las_mm.models.find_dynamic_backbone`.
        max_latency_ms: In place of ``rate``: milliseconds that the backbone may take for an image.
        device: What predicts them: a device of the latency model, its name or its file.
        percentile: Of the images' latencies, what has to stay within the limit: 100, the worst.

    Returns:
        The offset, the ratio that it gives and, with a limit, the latency.

    Raises:
        ValueError: No dynamic backbone or no maskers, a rate outside (0, 1] or out of reach, a
            limit below what the network takes with all skipped, both or a limit without a device,
            or no images.
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
    _check_limit(rate, max_latency_ms, device, percentile)
    if rate is None and max_latency_ms is None:
        for masker in maskers:
            masker.offset = None
        return Budget(0.0, None)
    bad = isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1
    if max_latency_ms is None and bad:
        raise ValueError(f"rate of set_budget must be in (0, 1] or None, got {rate!r}")
    if backbone.training:
        raise RuntimeError("set_budget needs the model in eval mode; call .eval()")
    tables = None if max_latency_ms is None else LatencyTables(device, batch_size=1)
    if isinstance(images, (str, Path)):
        images = as_the_model_reads(model, images)
    batches = _batches(images)
    before = [masker.offset for masker in maskers]
    try:
        if tables is None:
            budget = Budget(*_search(backbone, rate, batches))
        else:
            budget = _limit(backbone, tables, max_latency_ms, percentile, batches)
    except BaseException:
        for masker, value in zip(maskers, before):
            masker.offset = value
        raise
    _set(backbone, budget.offset)
    return budget


def _check_limit(rate: object, limit: object, device: object, percentile: object) -> None:
    if limit is None:
        if device is not None:
            raise ValueError("device of set_budget predicts latency: give max_latency_ms too")
        return
    if rate is not None:
        raise ValueError("set_budget takes a rate or max_latency_ms, got both")
    if device is None:
        raise ValueError(
            "max_latency_ms of set_budget needs a device to predict it for, e.g. device='v100' or "
            "the file that las_mm calibrate wrote"
        )
    for name, value, most in (("max_latency_ms", limit, np.inf), ("percentile", percentile, 100)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= most:
            raise ValueError(
                f"{name} of set_budget must be a number in (0, {most:g}], got {value!r}"
            )


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


def _limit(
    backbone: nn.Module,
    tables: LatencyTables,
    limit: float,
    percentile: float,
    batches: Sequence[Tensor],
) -> Budget:
    """The largest offset, 0 at most, whose latency is within ``limit``."""
    images = [image for batch in batches for image in batch.split(1)]

    def run(offset: float) -> Budget:
        _set(backbone, offset)
        seconds, ratio = [], 0.0
        for image in images:
            backbone(image)
            activation = backbone.network_activation().detach()
            rates = {a: r.clamp(0, 1).double().cpu().numpy() for a, r in activation.axes.items()}
            seconds.append(tables(activation.shape).predict_axes(rates).total_s)
            ratio += flops_report(activation).ratio.item() / len(images)
        # The nearest latency of an image from above, not a value between two.
        found = float(np.percentile(seconds, percentile, method="higher"))
        return Budget(offset, ratio, 1e3 * found)

    return _largest(run, limit)


def _largest(run: Callable[[float], Budget], limit: float) -> Budget:
    best = run(0.0)
    if best.latency_ms <= limit:
        return best
    high, low = 0.0, -0.5
    while (best := run(low)).latency_ms > limit:
        if low <= -LARGEST:
            raise ValueError(
                f"max_latency_ms {limit:g} of set_budget is out of reach: with nothing kept this "
                f"backbone is predicted to take {best.latency_ms:.3g} ms"
            )
        high, low = low, 2 * low
    for _ in range(12):
        middle = (low + high) / 2
        found = run(middle)
        if found.latency_ms <= limit:
            best, low = found, middle
        else:
            high = middle
    return best
