"""Anneals the Gumbel-softmax temperature of all maskers, and fades its noise where wanted."""

from __future__ import annotations

from mmengine.hooks import Hook
from torch import nn

from las_mm.models.finding import find_dynamic_backbone, find_dynamic_backbones, unwrap
from las_mm.registry import HOOKS

SCHEDULES = ("constant", "exponential")


@HOOKS.register_module()
class TemperatureHook(Hook):
    """Sets the maskers' temperature and noise before every training iteration.

    The value follows from the iteration alone, so resuming needs no state. The ImageNet recipe is
    exponential from 5.0 to 0.1 over training, the COCO recipe constant 0.1.

    Args:
        start: Temperature of the first iteration. Defaults to 5.0.
        end: Temperature of the last iteration (exponential only). Defaults to 0.1.
        schedule: ``'exponential'`` (the same factor every step) or ``'constant'``.
        noise_fade: Shares of training (begin, end) between which the Gumbel noise fades linearly
            to nothing, so that training ends deciding as inference does. Short trainings need it:
            with noise to the end the maskers' logits stay near the threshold, and the rate of
            inference is not that of training. Defaults to ``None``: full noise throughout, the
            papers' recipe.
        module: Only the maskers of this dynamic backbone, e.g. ``'student.backbone'``. Defaults to
            those of all.

    Raises:
        ValueError: A temperature <= 0, an unknown schedule, or a ``noise_fade`` that is not
            0 <= begin < end <= 1. At the start of training: no dynamic backbone, or not that.

    Examples:
        >>> custom_hooks = [dict(type='las_mm.TemperatureHook', start=0.1, schedule='constant')]
    """

    priority = "NORMAL"

    def __init__(
        self,
        start: float = 5.0,
        end: float = 0.1,
        schedule: str = "exponential",
        noise_fade: tuple[float, float] | None = None,
        module: str | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule of TemperatureHook must be one of {', '.join(SCHEDULES)}, "
                f"got {schedule!r}"
            )
        for name, value in dict(start=start, end=end).items():
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} of TemperatureHook must be a number > 0, got {value!r}")
        if noise_fade is not None:
            pair = isinstance(noise_fade, (list, tuple)) and len(noise_fade) == 2
            if not pair or not 0 <= noise_fade[0] < noise_fade[1] <= 1:
                raise ValueError(
                    f"noise_fade of TemperatureHook must be (begin, end) with "
                    f"0 <= begin < end <= 1, got {noise_fade!r}"
                )
        self.module = module
        self.noise_fade = noise_fade
        self.start = start
        self.end = end if schedule == "exponential" else start

    def temperature(self, iteration: int, max_iters: int) -> float:
        """Temperature of an iteration, counted from 0."""
        progress = min(iteration / max(max_iters - 1, 1), 1.0)
        return self.start * (self.end / self.start) ** progress

    def noise(self, iteration: int, max_iters: int) -> float:
        """Scale of the Gumbel noise in an iteration, counted from 0."""
        if self.noise_fade is None:
            return 1.0
        begin, end = self.noise_fade
        return min(1.0, max(0.0, (end - iteration / max_iters) / (end - begin)))

    def before_train(self, runner) -> None:
        self._maskers = [
            masker for backbone in self.backbones(runner.model) for masker in backbone.maskers()
        ]

    def check(self, model: nn.Module) -> None:
        """The model has maskers whose temperature this hook can set.

        Raises:
            ValueError: It has not.
        """
        self.backbones(model)

    def backbones(self, model: nn.Module) -> list[nn.Module]:
        """Those whose temperature this hook sets."""
        found = [backbone for _, backbone in find_dynamic_backbones(unwrap(model))]
        if self.module is None and found:
            return found
        return [find_dynamic_backbone(model, self.module)]

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        value = self.temperature(runner.iter, runner.max_iters)
        noise = self.noise(runner.iter, runner.max_iters)
        for masker in self._maskers:
            masker.temperature = value
            masker.noise = noise
        runner.message_hub.update_scalar("train/temperature", value)
