"""Activation checkpointing: the same gradients, of the budget too, or an error."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.utils.checkpoint import checkpoint

from las_mm.hooks import BudgetHook
from las_mm.models import LASResNet

MODES = ["spatial", "both", "layer", "channel"]
BLOCKS = ("layer1.1", "layer2.0", "layer3.0", "layer4.2")
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Model(nn.Module):
    """Loss-mode forward of a model with a backbone."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = LASResNet(
            50, mode=MODES, base_channels=8, stem_channels=8, drop_path_rate=0.2, **kwargs
        )
        for masker in self.backbone.maskers():
            nn.init.zeros_((masker.last if hasattr(masker, "last") else masker.conv).bias)

    def forward(self, x: torch.Tensor) -> dict:
        return dict(loss=self.backbone(x)[-1].square().mean())


def wrap(module: nn.Module, reentrant: bool) -> None:
    forward = module.forward
    module.forward = lambda *args: checkpoint(forward, *args, use_reentrant=reentrant)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of a task loss and the budget, with the noise of one seed."""
    model.train()
    hook = BudgetHook(dict(type="las_mm.BudgetLoss", target=0.3, bounds_weight=1.0))
    hook.before_train(SimpleNamespace(model=model))
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    losses = model(x)
    (losses["loss"] + 100 * losses["loss_budget"]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("where", [BLOCKS, STAGES, ("",)], ids=["blocks", "stages", "backbone"])
@pytest.mark.parametrize("with_cp", [False, True])
def test_recomputing_draws_the_same_noise(where, with_cp):
    expected = gradients(Model())
    model = Model(with_cp=with_cp)
    for name in where:
        wrap(model.backbone.get_submodule(name), reentrant=False)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert any(expected[f"backbone.layer{i}.1.masker.conv.weight"].any() for i in (1, 2, 3))


def test_with_cp_alone_is_exact():
    expected, found = gradients(Model()), gradients(Model(with_cp=True))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("where", [BLOCKS, STAGES, ("",)], ids=["blocks", "stages", "backbone"])
def test_a_budget_without_gradient_is_an_error(where):
    model = Model()
    for name in where:
        wrap(model.backbone.get_submodule(name), reentrant=True)
    with pytest.raises(RuntimeError, match=r"rate of layer1\.\d has no gradient.*with_cp=True"):
        gradients(model)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_what_mmengine_turns_on_is_exact_or_an_error():
    model = Model()
    expected = gradients(copy.deepcopy(model))
    turn_on_activation_checkpointing(model, ["backbone.layer1", "backbone.layer3"])
    try:
        found = gradients(model)
    except RuntimeError as error:
        assert "with_cp=True" in str(error)
    else:
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_frozen_maskers_need_no_gradient():
    model = Model(frozen_stages=1)
    wrap(model.backbone.layer1, reentrant=True)
    gradients_of_the_rest = gradients(model)
    assert gradients_of_the_rest["backbone.layer1.0.masker.conv.weight"] is None
