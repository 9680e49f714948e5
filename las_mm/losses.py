"""BudgetLoss: holds a dynamic network to a share of its static cost."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from mmengine.logging import print_log
from torch import Tensor, nn

from las_mm.latency import AnyDevice, LatencyTables, NetworkShape
from las_mm.latency.differentiable import DifferentiableLatency, LatencyReport
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import FlopsReport, flops_report
from las_mm.registry import MODELS

METRICS = ("flops", "latency")


@MODELS.register_module()
class BudgetLoss(nn.Module):
    """Squared distance of the FLOPs or latency ratio to a target, plus bounds for early training.

    ``network_weight * (C_dyn / C_static - t)^2 + bounds_weight * mean over dynamic blocks of
    [max(0, p - u)^2 + max(0, l - p)^2]`` with C the network's FLOPs or its predicted latency, p a
    block's FLOPs ratio, u = 1 - g(1 - t), l = g t and g = cos^2(pi/2 * min(1, progress /
    release)): the bounds hold every block at the target at first and are released over the first
    third of training. LASNet section 3.4; the bounds are the authors' training recipe.
    ``bounds_weight=0`` gives the COCO recipe.

    With ``metric='latency'`` C is what the analytical model (LAUDNet, arXiv 2308.15949, section
    4) predicts for ``device``: stem and blocks at the training input's size, conv1 at its dilated
    rate, piecewise linear in the rates through tabulated blocks. A rate between two whole numbers
    of patches costs the mean of both, where :class:`PredictedLatencyHook` rounds up: its ratio is
    a little higher. The bounds stay on FLOPs: they keep a block's *rate* from collapsing early,
    of which its FLOPs ratio is the measure on every device. The latency ratios that a block can
    reach at all differ by device and granularity (in stage 1 on a V100 at S=1 from about 0.4 with
    nothing left to compute to 2.9 with everything), so bounds on them would ask for the
    impossible.

    Args:
        target: t in (0, 1], the wanted C_dyn / C_static.
        network_weight: Weight of the network's term. Defaults to 1.
        bounds_weight: Weight of the blocks' bounds. Defaults to 0.
        release: Share of training after which the bounds are gone. Defaults to 0.33.
        loss_weight: Weight of the sum. Defaults to 1.
        metric: ``'flops'`` or ``'latency'``. Defaults to ``'flops'``.
        device: Only with ``metric='latency'``: a device of the latency model, its name or its
            file. Defaults to ``'v100'``.
        batch_size: Only with ``metric='latency'``: images per batch at inference that the
            prediction assumes. Defaults to the device's.

    Raises:
        ValueError: A value outside its range, or an unknown device.

    Examples:
        >>> loss = dict(type='las_mm.BudgetLoss', target=0.6, metric='latency', device='tx2')
    """

    def __init__(
        self,
        target: float,
        network_weight: float = 1.0,
        bounds_weight: float = 0.0,
        release: float = 0.33,
        loss_weight: float = 1.0,
        metric: str = "flops",
        device: str | Path | AnyDevice | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in dict(target=target, release=release).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= 1:
                raise ValueError(f"{name} of BudgetLoss must be in (0, 1], got {value!r}")
        weights = dict(
            network_weight=network_weight, bounds_weight=bounds_weight, loss_weight=loss_weight
        )
        for name, value in weights.items():
            number = isinstance(value, (int, float))
            if not number or not value >= 0 or math.isinf(value):
                raise ValueError(f"{name} of BudgetLoss must be finite and >= 0, got {value!r}")
        self.target = target
        self.network_weight = network_weight
        self.bounds_weight = bounds_weight
        self.release = release
        self.loss_weight = loss_weight
        self.metric = metric
        if metric not in METRICS:
            raise ValueError(
                f"metric of BudgetLoss must be one of {', '.join(METRICS)}, got {metric!r}"
            )
        if metric == "flops":
            if device is not None or batch_size is not None:
                raise ValueError(
                    "device and batch_size of BudgetLoss need metric='latency', as FLOPs are the "
                    f"same everywhere, got device={device!r}, batch_size={batch_size!r}"
                )
            return
        positive = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size is not None and not (positive and batch_size > 0):
            raise ValueError(
                f"batch_size of BudgetLoss must be a positive integer, got {batch_size!r}"
            )
        # Rounding up to whole patches would leave long stretches of a rate without a gradient.
        tables = LatencyTables("v100" if device is None else device, batch_size, patches="mean")
        self._latency = DifferentiableLatency(tables)
        self._checked: set[NetworkShape] = set()

    def bounds(self, progress: float) -> tuple[float, float]:
        """(lower, upper) bound of a block's FLOPs ratio at ``progress`` in [0, 1] of training."""
        tightness = math.cos(math.pi / 2 * min(1.0, progress / self.release)) ** 2
        return tightness * self.target, 1 - tightness * (1 - self.target)

    def forward(
        self,
        activation: NetworkActivation,
        progress: float = 1.0,
        report: FlopsReport | None = None,
        latency: LatencyReport | None = None,
    ) -> Tensor:
        """The loss, shape (), float32.

        Args:
            activation: Rates of the training forward pass.
            progress: Share of training done, in [0, 1].
            report: ``flops_report(activation)`` where the caller has it already.
            latency: ``self.latency_report(activation)`` likewise.
        """
        if self.metric == "latency":
            ratio = (latency or self.latency_report(activation)).ratio
        else:
            report = report or flops_report(activation)
            ratio = report.ratio
        loss = self.network_weight * (ratio - self.target).square()
        if self.bounds_weight and activation.dynamic:
            report = report or flops_report(activation)
            lower, upper = self.bounds(progress)
            ratios = report.block_ratios
            # A list as index is copied to the device and waited for.
            if len(activation.dynamic) < len(ratios):
                ratios = ratios[activation.dynamic]
            excess = (ratios - upper).clamp(min=0).square() + (lower - ratios).clamp(min=0).square()
            loss = loss + self.bounds_weight * excess.mean()
        return (self.loss_weight * loss).float()

    def latency_report(self, activation: NetworkActivation) -> LatencyReport:
        """Predicted latency of the recorded rates, differentiable; ``metric='latency'`` only.

        Raises:
            ValueError: The metric is another one.
        """
        if self.metric != "latency":
            raise ValueError(
                f"latency_report of BudgetLoss needs metric='latency', not {self.metric!r}"
            )
        report = self._latency.report(activation)
        if activation.shape not in self._checked:
            self._checked.add(activation.shape)
            self._warn_if_unreachable(activation.shape)
        return report

    def _warn_if_unreachable(self, network: NetworkShape) -> None:
        table = self._latency.tables(network)
        least, most = (table.predict(r, rates_channel=r).ratio for r in (0.0, 1.0))
        if not least <= self.target <= most:
            height, width = network.input_hw
            print_log(
                f"BudgetLoss: the target {self.target} is out of reach: on {table.device.name} at "
                f"{height} x {width}, batch {table.batch_size}, the predicted latency ratio goes "
                f"from {least:.3f} (nothing computed) to {most:.3f} (everything); "
                "`las_mm search` finds granularities that gain more",
                logger="current",
                level=logging.WARNING,
            )

    def extra_repr(self) -> str:
        return (
            f"target={self.target}, network_weight={self.network_weight}, "
            f"bounds_weight={self.bounds_weight}, loss_weight={self.loss_weight}, "
            f"metric={self.metric!r}"
        )
