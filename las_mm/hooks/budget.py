"""Adds the budget loss and the activation rates to the losses of whatever model is trained."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from las_mm.losses import BudgetLoss
from las_mm.models.activation import collect_activations, find_dynamic_backbone
from las_mm.models.flops import flops_report
from las_mm.registry import HOOKS, MODELS


@HOOKS.register_module()
class BudgetHook(Hook):
    """Adds ``loss_budget`` to the losses dict that a model's loss-mode forward returns.

    A forward hook on the model does it, so the model's class is untouched, and the term is part
    of the wrapped forward: DDP sees it, autocast and gradient accumulation treat it like any
    other loss. Also logged: ``flops_ratio``, ``activation_rate`` (of positions),
    ``activation_rate_stage1`` ..., where blocks skip channels ``channel_rate`` and
    ``channel_rate_stage1`` ... (keys without "loss" are not summed), and ``latency_ratio`` where
    the loss has ``metric='latency'``. mmpretrain's classifiers
    call their own term ``loss``, which hides the total in the log; it is optimised all the same.

    Args:
        loss: Config of a budget loss, or the loss. Defaults to
            ``dict(type='las_mm.BudgetLoss', target=0.5)``.

    Raises:
        ValueError: The model has no dynamic backbone.

    Example:
        >>> custom_hooks = [
        ...     dict(type='las_mm.BudgetHook', loss=dict(type='las_mm.BudgetLoss', target=0.4))]
    """

    # After ParamScheduler etc., before LoggerHook; only before_train matters.
    priority = "NORMAL"

    def __init__(self, loss: dict | BudgetLoss | None = None) -> None:
        loss = dict(type="las_mm.BudgetLoss", target=0.5) if loss is None else loss
        self.loss: BudgetLoss = MODELS.build(loss) if isinstance(loss, dict) else loss
        if not callable(self.loss):
            raise ValueError(
                f"loss of BudgetHook must be a config such as dict(type='las_mm.BudgetLoss', "
                f"target=0.5), got {loss!r}"
            )
        self._progress = 0.0
        self._handle = None

    def before_train(self, runner) -> None:
        self.attach(runner.model.module if is_model_wrapper(runner.model) else runner.model)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._progress = runner.iter / runner.max_iters

    def after_train(self, runner) -> None:
        self.remove()

    def attach(self, model: nn.Module) -> None:
        """Add the losses to what ``model`` returns in loss mode, until :meth:`remove`.

        Raises:
            ValueError: The model has no dynamic backbone, or one whose stages are all static.
        """
        if not find_dynamic_backbone(model).maskers():
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
        activation = collect_activations(model).reduce_mean()
        flops = flops_report(activation)
        losses = {
            "flops_ratio": flops.ratio.detach(),
            "activation_rate": activation.mean_rate.detach(),
        }
        if getattr(self.loss, "metric", "flops") == "latency":
            latency = self.loss.latency_report(activation)
            losses["loss_budget"] = self.loss(activation, self._progress, flops, latency)
            losses["latency_ratio"] = latency.ratio.detach()
        else:
            losses["loss_budget"] = self.loss(activation, self._progress, flops)
        for stage, rate in activation.stage_rates().items():
            losses[f"activation_rate_stage{stage}"] = rate.detach()
        if activation.channelwise:
            losses["channel_rate"] = activation.mean_rate_channel.detach()
            for stage, rate in activation.stage_rates_channel().items():
                losses[f"channel_rate_stage{stage}"] = rate.detach()
        return losses
