"""TemperatureHook: a value that follows from the iteration alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from las_mm.hooks import TemperatureHook
from las_mm.models import LASResNet


def fake_runner(model: nn.Module, iteration: int, max_iters: int = 11) -> SimpleNamespace:
    hub = MessageHub.get_instance(f"temperature-{id(model)}")
    return SimpleNamespace(model=model, iter=iteration, max_iters=max_iters, message_hub=hub)


@pytest.fixture
def backbone() -> LASResNet:
    return LASResNet(50, base_channels=8, stem_channels=8, mode=["static"] + ["spatial"] * 3)


def test_exponential_schedule():
    hook = TemperatureHook(start=5.0, end=0.1)
    values = [hook.temperature(i, 11) for i in range(11)]
    assert values[0] == pytest.approx(5.0)
    assert values[-1] == pytest.approx(0.1)
    assert values[5] == pytest.approx((5.0 * 0.1) ** 0.5)  # the geometric mean, half-way
    factors = [after / before for before, after in zip(values, values[1:])]
    assert factors == pytest.approx([factors[0]] * 10)


def test_ends_of_training():
    hook = TemperatureHook(start=2.0, end=0.5)
    assert hook.temperature(0, 1) == pytest.approx(2.0)  # a single iteration
    assert hook.temperature(99, 10) == pytest.approx(0.5)  # never beyond the end


def test_rising_temperature_and_constant():
    assert TemperatureHook(start=0.1, end=1.0).temperature(9, 10) == pytest.approx(1.0)
    constant = TemperatureHook(start=0.7, end=0.1, schedule="constant")
    assert [constant.temperature(i, 3) for i in range(3)] == pytest.approx([0.7] * 3)


def test_every_masker_and_the_log_get_it(backbone):
    model = nn.ModuleDict(dict(backbone=backbone))
    hook = TemperatureHook(start=4.0, end=1.0)
    hook.before_train(fake_runner(model, 0))
    assert len(backbone.maskers()) == 13
    for iteration in (0, 4, 10):
        runner = fake_runner(model, iteration)
        hook.before_train_iter(runner, iteration)
        expected = 4.0 * 0.25 ** (iteration / 10)
        assert [m.temperature for m in backbone.maskers()] == pytest.approx([expected] * 13)
        logged = runner.message_hub.get_scalar("train/temperature").current()
        assert logged == pytest.approx(expected)


def test_resuming_needs_no_state(backbone):
    resumed = TemperatureHook()
    resumed.before_train(fake_runner(backbone, 7))
    resumed.before_train_iter(fake_runner(backbone, 7), 0)  # the first iteration that it sees
    assert backbone.maskers()[0].temperature == pytest.approx(5.0 * 0.02**0.7)


def test_noise_fades_to_nothing(backbone):
    hook = TemperatureHook(noise_fade=(0.4, 0.8))
    hook.before_train(fake_runner(backbone, 0))
    noise = []
    for iteration in range(10):
        hook.before_train_iter(fake_runner(backbone, iteration, 10), iteration)
        (value,) = {masker.noise for masker in backbone.maskers()}
        noise.append(value)
    assert noise == pytest.approx([1.0] * 5 + [0.75, 0.5, 0.25] + [0.0] * 2)
    masker, x = (
        backbone.maskers()[0].train(),
        torch.randn(1, backbone.maskers()[0].conv.in_channels, 8, 8),
    )
    torch.nn.init.normal_(masker.conv.weight)
    torch.nn.init.zeros_(masker.conv.bias)
    sampled = [masker(x, 1) for _ in range(2)]
    assert torch.equal(sampled[0], sampled[1])
    assert torch.equal(sampled[0].round(), masker.eval()(x, 1))  # training decides like inference
    assert 0.1 < sampled[0].mean() < 0.9


def test_noise_stays_without_a_fade():
    assert [TemperatureHook().noise(i, 10) for i in range(10)] == [1.0] * 10


def test_model_without_a_dynamic_backbone_is_refused():
    with pytest.raises(ValueError, match="las_mm.LASResNet"):
        TemperatureHook().before_train(fake_runner(nn.Conv2d(3, 3, 1), 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(start=0.0), "start of TemperatureHook must be a number > 0, got 0.0"),
        (dict(end=-0.1), "end of TemperatureHook must be a number > 0, got -0.1"),
        (dict(start=float("nan")), "start of TemperatureHook must be a number > 0, got nan"),
        (dict(noise_fade=(0.8, 0.4)), "noise_fade of TemperatureHook must be"),
        (dict(noise_fade=(0.5, 1.2)), "noise_fade of TemperatureHook must be"),
        (dict(schedule="linear"), "one of constant, exponential, got 'linear'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemperatureHook(**arguments)
