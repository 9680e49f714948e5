"""BudgetLoss: holds a dynamic network to a share of its static cost."""

from __future__ import annotations

import math

from torch import Tensor, nn

from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import FlopsReport, flops_report
from las_mm.registry import MODELS


@MODELS.register_module()
class BudgetLoss(nn.Module):
    """Squared distance of the FLOPs ratio to a target, plus bounds that keep blocks alive early.

    ``network_weight * (F_dyn / F_static - t)^2 + bounds_weight * mean over dynamic blocks of
    [max(0, p - u)^2 + max(0, l - p)^2]`` with p a block's FLOPs ratio, u = 1 - g(1 - t), l = g t
    and g = cos^2(pi/2 * min(1, progress / release)): the bounds hold every block at the target at
    first and are released over the first third of training. LASNet section 3.4; the bounds are
    the authors' training recipe. ``bounds_weight=0`` gives the COCO recipe.

    Args:
        target: t in (0, 1], the wanted F_dyn / F_static.
        network_weight: Weight of the network's term. Defaults to 1.
        bounds_weight: Weight of the blocks' bounds. Defaults to 0.
        release: Share of training after which the bounds are gone. Defaults to 0.33.
        loss_weight: Weight of the sum. Defaults to 1.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        target: float,
        network_weight: float = 1.0,
        bounds_weight: float = 0.0,
        release: float = 0.33,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in dict(target=target, release=release).items():
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
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

    def bounds(self, progress: float) -> tuple[float, float]:
        """(lower, upper) bound of a block's FLOPs ratio at ``progress`` in [0, 1] of training."""
        tightness = math.cos(math.pi / 2 * min(1.0, progress / self.release)) ** 2
        return tightness * self.target, 1 - tightness * (1 - self.target)

    def forward(
        self,
        activation: NetworkActivation,
        progress: float = 1.0,
        report: FlopsReport | None = None,
    ) -> Tensor:
        """The loss, shape (), float32.

        Args:
            activation: Rates of the training forward pass.
            progress: Share of training done, in [0, 1].
            report: ``flops_report(activation)`` where the caller has it already.
        """
        report = flops_report(activation) if report is None else report
        loss = self.network_weight * (report.ratio - self.target).square()
        if self.bounds_weight and activation.dynamic:
            lower, upper = self.bounds(progress)
            ratios = report.block_ratios[activation.dynamic]
            excess = (ratios - upper).clamp(min=0).square() + (lower - ratios).clamp(min=0).square()
            loss = loss + self.bounds_weight * excess.mean()
        return (self.loss_weight * loss).float()

    def extra_repr(self) -> str:
        return (
            f"target={self.target}, network_weight={self.network_weight}, "
            f"bounds_weight={self.bounds_weight}, loss_weight={self.loss_weight}"
        )
