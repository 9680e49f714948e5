"""Adds the budget loss and the activation rates to the losses of whatever model is trained."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from las_mm.losses import BudgetLoss
from las_mm.models.finding import find_dynamic_backbone, require_gradients, unwrap
from las_mm.models.flops import flops_report
from las_mm.registry import HOOKS, MODELS


@HOOKS.register_module()
class BudgetHook(Hook):
    """Adds ``loss_budget`` to the losses dict that a model's loss-mode forward returns.

    A forward hook on the model does it, so the model's class is untouched, and the term is part
    of the wrapped forward: DDP sees it, autocast and gradient accumulation treat it like any
    other loss. Also logged: ``flops_ratio``, ``activation_rate`` (of positions),
    ``activation_rate_stage1`` ..., likewise the rates of other axes that blocks decide about, as
    ``channel_rate`` and ``channel_rate_stage1`` (keys without "loss" are not summed), and
    ``latency_ratio`` where the loss has ``metric='latency'``. mmpretrain's classifiers call their
    own term ``loss``, which hides the total in the log; it is optimised all the same.

    Args:
        loss: Config of a budget loss, or the loss. Defaults to
            ``dict(type='las_mm.BudgetLoss', target=0.5)``.
        module: Where the model has several dynamic backbones, the one that is held to the budget,
            e.g. ``'student.backbone'`` of a semi-supervised detector. Of several forward passes in
            an iteration the last one counts.

    Raises:
        ValueError: The model has no dynamic backbone, or several and ``module`` names none.
        RuntimeError: In training, if the rates carry no gradient: see
            :func:`~las_mm.models.finding.require_gradients`.

    Examples:
        >>> custom_hooks = [
        ...     dict(type='las_mm.BudgetHook', loss=dict(type='las_mm.BudgetLoss', target=0.4))]
    """

    # After ParamScheduler etc., before LoggerHook; only before_train matters.
    priority = "NORMAL"

    def __init__(self, loss: dict | BudgetLoss | None = None, module: str | None = None) -> None:
        loss = dict(type="las_mm.BudgetLoss", target=0.5) if loss is None else loss
        self.loss: BudgetLoss = MODELS.build(loss) if isinstance(loss, dict) else loss
        if not callable(self.loss):
            raise ValueError(
                f"loss of BudgetHook must be a config such as dict(type='las_mm.BudgetLoss', "
                f"target=0.5), got {loss!r}"
            )
        self.module = module
        self._progress = 0.0
        self._handle = None

    def before_train(self, runner) -> None:
        self.attach(unwrap(runner.model))

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._progress = runner.iter / runner.max_iters

    def after_train(self, runner) -> None:
        self.remove()

    def attach(self, model: nn.Module) -> None:
        """Add the losses to what ``model`` returns in loss mode, until :meth:`remove`.

        Raises:
            ValueError: The model has no dynamic backbone, or one whose stages are all static.
        """
        if not find_dynamic_backbone(model, self.module).maskers():
            raise ValueError(
                "every stage of the backbone is static, so BudgetHook has nothing to hold to a "
                "budget: set mode of the backbone to 'spatial', 'channel', 'both' or 'layer', or "
                "remove the hook"
            )
        self.remove()
        self._handle = model.register_forward_hook(self._add_losses, with_kwargs=True)

    def remove(self) -> None:
        """Detach from the model."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add_losses(self, model: nn.Module, args: tuple, kwargs: dict, losses):
        if not isinstance(losses, dict) or not model.training:
            return losses  # predict and tensor mode
        return {**losses, **self.budget_losses(model)}

    def budget_losses(self, model: nn.Module) -> dict[str, Tensor]:
        """``loss_budget`` and the rates, from the model's last forward pass, over all ranks."""
        backbone = find_dynamic_backbone(model, self.module)
        if torch.is_grad_enabled():
            require_gradients(backbone)
        activation = backbone.network_activation().reduce_mean()
        flops = flops_report(activation)
        losses = {"flops_ratio": flops.ratio.detach()}
        for name, axes in activation.named_rates().items():
            losses[name] = activation.mean_of(*axes).detach()
        if getattr(self.loss, "metric", "flops") == "latency":
            latency = self.loss.latency_report(activation)
            losses["loss_budget"] = self.loss(activation, self._progress, flops, latency)
            losses["latency_ratio"] = latency.ratio.detach()
        else:
            losses["loss_budget"] = self.loss(activation, self._progress, flops)
        for name, axes in activation.named_rates().items():
            for stage, rate in activation.stage_rates(*axes).items():
                losses[f"{name}_stage{stage}"] = rate.detach()
        return losses
