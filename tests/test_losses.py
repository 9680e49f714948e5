import math

import pytest
import torch

from las_mm.latency import resnet_shape
from las_mm.losses import BudgetLoss
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import flops_report


def activation(rate: float, requires_grad: bool = False) -> NetworkActivation:
    shape = resnet_shape(50, (64, 64), base_channels=8)
    rates = torch.full((16,), rate, requires_grad=requires_grad)
    return NetworkActivation(shape, rates, rates, torch.ones(16), (None,) * 16)


def test_network_term():
    record = activation(0.3)
    ratio = flops_report(record).ratio.item()
    assert BudgetLoss(0.5)(record).item() == pytest.approx((ratio - 0.5) ** 2)
    weighted = BudgetLoss(0.5, network_weight=2.0, loss_weight=3.0)(record)
    assert weighted.item() == pytest.approx(6 * (ratio - 0.5) ** 2)


def test_bounds_relax_over_the_first_third():
    loss = BudgetLoss(0.4, bounds_weight=1.0)
    assert loss.bounds(0.0) == pytest.approx((0.4, 0.4))
    half = math.cos(math.pi / 4) ** 2
    assert loss.bounds(0.165) == pytest.approx((half * 0.4, 1 - half * 0.6))
    assert loss.bounds(0.33) == pytest.approx((0.0, 1.0))
    assert loss.bounds(0.9) == pytest.approx((0.0, 1.0))


def test_bounds_term():
    record = activation(0.9)
    ratios = flops_report(record).block_ratios
    loss = BudgetLoss(0.5, network_weight=0.0, bounds_weight=1.0)
    expected = (ratios - 0.5).clamp(min=0).square() + (0.5 - ratios).clamp(min=0).square()
    assert loss(record, progress=0.0).item() == pytest.approx(expected.mean().item())
    over = (ratios - 1).clamp(min=0).square().mean().item()  # maskers cost a little on top
    assert loss(record, progress=0.5).item() == pytest.approx(over, abs=1e-12)


def test_gradient_pushes_towards_the_target():
    for rate, sign in ((0.9, 1), (0.1, -1)):
        record = activation(rate, requires_grad=True)
        BudgetLoss(0.5, bounds_weight=1.0)(record, progress=0.1).backward()
        assert (record.rates.grad * sign > 0).all()


@pytest.mark.parametrize(
    "kwargs, name",
    [
        (dict(target=0), "target"),
        (dict(target=1.2), "target"),
        (dict(target=0.5, release=0), "release"),
        (dict(target=0.5, bounds_weight=-1), "bounds_weight"),
        (dict(target=0.5, loss_weight=float("nan")), "loss_weight"),
    ],
)
def test_wrong_arguments(kwargs, name):
    with pytest.raises(ValueError, match=name):
        BudgetLoss(**kwargs)
