"""An mmengine metric of what a dynamic network computed, for ``save_best``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from torch import nn

from las_mm.hooks.latency import PredictedLatencyHook
from las_mm.hooks.passes import Passes
from las_mm.models.flops import count_macs, flops_report
from las_mm.registry import METRICS


@METRICS.register_module()
class ActivationMetric(BaseMetric):
    """Rates, FLOPs ratio and predicted latency of validation or test, as metrics.

    ``PredictedLatencyHook`` logs the same; a metric can also choose checkpoints
    (``save_best='las_mm/latency_ratio', rule='less'``), which hooks cannot. A metric does not see
    the model, so that hook, which must be among ``custom_hooks``, shows it the backbone; the
    prediction is for the hook's device and batch size. Keys: ``las_mm/flops_ratio``,
    ``las_mm/activation_rate``, where blocks decide about channels ``las_mm/channel_rate``,
    ``las_mm/latency_ms``, ``las_mm/static_latency_ms`` and ``las_mm/latency_ratio``; ratios are of
    sums over all images.

    Args:
        kwargs: Arguments of ``BaseMetric``. ``prefix`` defaults to ``'las_mm'``.

    Examples:
        >>> val_evaluator = [dict(type='Accuracy'), dict(type='las_mm.ActivationMetric')]
        >>> custom_hooks = [dict(type='las_mm.PredictedLatencyHook', device='v100')]
    """

    default_prefix = "las_mm"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._passes = Passes()
        self._hook: PredictedLatencyHook | None = None

    def watch_backbone(self, backbone: nn.Module, hook: PredictedLatencyHook) -> None:
        """Record this backbone until the metrics are computed; ``hook`` predicts its latency."""
        self._passes.start(backbone)
        self._hook = hook

    def process(self, data_batch: Any, data_samples: Sequence) -> None:
        """Take what the backbone did for this batch.

        Raises:
            RuntimeError: No ``PredictedLatencyHook`` shows the backbone, or it did not run.
        """
        if self._hook is None:
            raise RuntimeError(
                "ActivationMetric sees the backbone through a hook: add "
                "dict(type='las_mm.PredictedLatencyHook') to custom_hooks"
            )
        passes = self._passes.take()
        if not passes:
            raise RuntimeError(
                "the backbone that ActivationMetric watches did not run for this batch; val_module "
                "of PredictedLatencyHook names the one that does"
            )
        total = sum(images for images, _ in passes)
        entry: dict[str, float] = {}
        for images, activation in passes:
            counts = count_macs(activation.shape)
            static = counts.stem + float(counts.static_blocks.sum())
            prediction = self._hook.predict(activation)
            found = dict(
                macs=static * flops_report(activation).ratio.item(),
                static_macs=static,
                latency_ms=1e3 * prediction.total_s,
                static_latency_ms=1e3 * prediction.static_s,
            )
            for name, axes in activation.named_rates().items():
                found[name] = activation.mean_of(*axes).item()
            for key, value in found.items():
                entry[key] = entry.get(key, 0.0) + value * images / total
        # One an image, so that what mmengine repeats to fill the last batch can be dropped.
        self.results += [entry] * len(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Means over the images."""
        self._passes.stop()
        mean = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
        static_macs, static_ms = mean.pop("static_macs"), mean["static_latency_ms"]
        return {
            "flops_ratio": mean.pop("macs") / static_macs,
            **mean,
            "latency_ratio": mean["latency_ms"] / static_ms,
        }
