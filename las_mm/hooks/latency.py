"""Logs the latency that the analytical model predicts for what the network really skipped."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine import dist
from mmengine.hooks import Hook
from torch import nn

from las_mm.hooks.passes import Passes
from las_mm.latency import LatencyTable, LatencyTables
from las_mm.models.activation import NetworkActivation
from las_mm.models.finding import find_dynamic_backbone
from las_mm.network.operator import DILATED, POSITION
from las_mm.registry import HOOKS
from las_mm.summary import DatasetSummary

SETTINGS = ("full", "paper")


@HOOKS.register_module()
class PredictedLatencyHook(Hook):
    """Logs predicted milliseconds per image of the backbone, the static network's, and the ratio.

    The prediction is of stem and stages at the batch's true input size, with the true dilated
    rate for conv1, on the device of the analytical model (LAUDNet, arXiv 2308.15949, section 4).
    In training the keys ``latency_ms``, ``static_latency_ms`` and ``latency_ratio`` go to the
    message hub and so to terminal, JSON log and TensorBoard (where BudgetHook trains to latency,
    ``latency_ratio`` is its own, for its device and batch); in validation and test the means over
    the data set do, together with ``flops_ratio`` and the activation rates, and a table per stage
    is printed. With test-time augmentation these are means over all views of all images.

    Args:
        device: A shipped device (see :func:`las_mm.latency.load_device`) or the path of a device
            file. Defaults to ``'v100'``.
        batch_size: Images per batch that the prediction assumes. Defaults to the device's.
        interval: Training iterations between two predictions. Defaults to 10.
        setting: ``'full'`` as above, or ``'paper'``: the four stages only, and the block's rate
            for conv1 too, as the published figures count. Defaults to ``'full'``.
        module: Where the model has several dynamic backbones, the one to log, e.g.
            ``'student.backbone'`` of a semi-supervised detector.
        val_module: The same for validation and test, where such detectors run their teacher:
            ``'teacher.backbone'``. Defaults to ``module``.

    Raises:
        ValueError: Unknown device or setting, or ``batch_size`` or ``interval`` that is no
            positive integer.

    Examples:
        >>> custom_hooks = [dict(type='las_mm.PredictedLatencyHook', device='tx2', batch_size=1)]
    """

    priority = "NORMAL"

    def __init__(
        self,
        device: str | Path = "v100",
        batch_size: int | None = None,
        interval: int = 10,
        setting: str = "full",
        module: str | None = None,
        val_module: str | None = None,
    ) -> None:
        if setting not in SETTINGS:
            raise ValueError(
                f"setting of PredictedLatencyHook must be one of {', '.join(SETTINGS)}, "
                f"got {setting!r}"
            )
        for name, value in dict(batch_size=batch_size, interval=interval).items():
            valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not valid and not (name == "batch_size" and value is None):
                raise ValueError(
                    f"{name} of PredictedLatencyHook must be a positive integer, got {value!r}"
                )
        self.interval = interval
        self.module = module
        self.val_module = module if val_module is None else val_module
        self.paper = setting == "paper"
        self.tables = LatencyTables(device, batch_size, include_stem=not self.paper)
        self.device = self.tables.device
        self._summary = DatasetSummary()
        self._passes = Passes()

    def table(self, activation: NetworkActivation) -> LatencyTable:
        """The tabulated predictor for this network at this input size, built once each."""
        return self.tables(activation.shape)

    def predict(self, activation: NetworkActivation):
        """Predicted seconds per image at the recorded rates."""
        # One transfer; straight-through arithmetic may leave a rate a rounding error above 1.
        values = [activation.rate(axis) for axis in activation.shape.axes]
        stacked = torch.stack(values) if values else activation.shares.new_ones(0)
        found = stacked.detach().clamp(0, 1).cpu().double().numpy()
        rates = dict(zip(activation.shape.axes, found))
        if self.paper and DILATED in rates:
            rates[DILATED] = rates[POSITION]
        return self.table(activation).predict_axes(rates)

    def check(self, model: nn.Module) -> None:
        """The model has the dynamic backbones that this hook reads.

        Raises:
            ValueError: It has not.
        """
        find_dynamic_backbone(model, self.module)
        find_dynamic_backbone(model, self.val_module)

    def before_run(self, runner) -> None:
        self.check(runner.model)  # fail before any work

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if not (self.every_n_train_iters(runner, self.interval) or runner.iter == 0):
            return
        backbone = find_dynamic_backbone(runner.model, self.module)
        prediction = self.predict(backbone.network_activation().detach())
        for key, value in dict(
            latency_ms=1e3 * prediction.total_s,
            static_latency_ms=1e3 * prediction.static_s,
            latency_ratio=prediction.ratio,
        ).items():
            if isinstance(outputs, dict) and key in outputs:
                continue  # logged by BudgetHook
            runner.message_hub.update_scalar(f"train/{key}", value)

    def before_val_epoch(self, runner) -> None:
        self._start_summary(runner, runner.val_dataloader)
        self._lend(runner.model, getattr(runner, "val_evaluator", None))

    def before_test_epoch(self, runner) -> None:
        self._start_summary(runner, runner.test_dataloader)
        self._lend(runner.model, getattr(runner, "test_evaluator", None))

    def _lend(self, model: nn.Module, evaluator) -> None:
        """Show the backbone to every ``ActivationMetric``, as metrics do not see the model."""
        for metric in getattr(evaluator, "metrics", ()):
            if callable(getattr(metric, "watch_backbone", None)):
                metric.watch_backbone(find_dynamic_backbone(model, self.val_module), self)

    def _start_summary(self, runner, loader) -> None:
        self._summary = DatasetSummary()
        self._what = "images"
        # mmengine's sampler deals images out in turn and repeats some to fill the last round.
        self._images_left = len(range(dist.get_rank(), len(loader.dataset), dist.get_world_size()))
        self._passes.start(find_dynamic_backbone(runner.model, self.val_module))

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        batch = len(outputs) if outputs is not None else 1
        images = min(batch, self._images_left)
        self._images_left -= images
        passes = self._passes.take()
        if sum(count for count, _ in passes) > batch:
            self._what = "views"  # of test-time augmentation, or windows of a large image
        for count, activation in passes:
            table = self.table(activation)
            self._summary.add(
                activation,
                self.predict(activation),
                table.static_block_s,
                table.stem_s,
                # Of a batch's views as of its images, repetitions are not counted; may be 0, as
                # reduce() needs the stages from every process.
                images=count * images / batch,
            )

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._publish(runner, "val")

    def after_test_epoch(self, runner, metrics=None) -> None:
        self._publish(runner, "test")

    def _publish(self, runner, mode: str) -> None:
        self._passes.stop()
        if not self._summary.stages:
            runner.logger.warning(
                f"PredictedLatencyHook: {self.val_module or 'the dynamic backbone'} did not run in "
                f"{mode}, so there is no latency to log; val_module names the backbone that does"
            )
            return
        self._summary.reduce()
        for key, value in self._summary.metrics().items():
            # A name of its own: loggers drop the mode, and validation counts steps in epochs.
            runner.message_hub.update_scalar(f"{mode}/las_mm/{key}", value)
        runner.logger.info("\n" + self._summary.table(self.device.name, self._what))
