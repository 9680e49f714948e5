"""Anneals the Gumbel-softmax temperature of all maskers."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from las_mm.models.activation import find_dynamic_backbone
from las_mm.registry import HOOKS

SCHEDULES = ("constant", "exponential")


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Sets the maskers' temperature before every training iteration.

    The value follows from the iteration alone, so resuming needs no state. The ImageNet recipe is
    exponential from 5.0 to 0.1 over training, the COCO recipe constant 0.1.

    Args:
        start: Temperature of the first iteration. Defaults to 5.0.
        end: Temperature of the last iteration (exponential only). Defaults to 0.1.
        schedule: ``'exponential'`` (the same factor every step) or ``'constant'``.

    Raises:
        ValueError: A temperature <= 0 or an unknown schedule.

    Example:
        >>> custom_hooks = [dict(type='las_mm.TemperatureHook', start=0.1, schedule='constant')]
    """

    priority = "NORMAL"

    def __init__(self, start: float = 5.0, end: float = 0.1, schedule: str = "exponential") -> None:
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule of TemperatureHook must be one of {', '.join(SCHEDULES)}, "
                f"got {schedule!r}"
            )
        for name, value in dict(start=start, end=end).items():
            if not value > 0:
                raise ValueError(f"{name} of TemperatureHook must be > 0, got {value!r}")
        self.start = start
        self.end = end if schedule == "exponential" else start

    def temperature(self, iteration: int, max_iters: int) -> float:
        """Temperature of an iteration, counted from 0."""
        progress = min(iteration / max(max_iters - 1, 1), 1.0)
        return self.start * (self.end / self.start) ** progress

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._maskers = find_dynamic_backbone(model).maskers()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        value = self.temperature(runner.iter, runner.max_iters)
        for masker in self._maskers:
            masker.temperature = value
        runner.message_hub.update_scalar("train/temperature", value)
