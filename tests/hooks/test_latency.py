"""PredictedLatencyHook: the analytical model's figures, at what the network really skipped."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner

import needs
from las_mm.hooks import PredictedLatencyHook
from las_mm.hooks import latency as latency_module
from las_mm.latency import NetworkShape, network_report, paper_report, resnet_shape
from las_mm.latency import table as table_module
from las_mm.models import LASResNet, collect_activations
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import flops_report
from records import record

KEYS = ("latency_ms", "static_latency_ms", "latency_ratio")


def activation(shape: NetworkShape, rates, rates_dilated=None) -> NetworkActivation:
    rates = torch.as_tensor(rates, dtype=torch.float32).expand(len(shape.blocks))
    dilated = rates if rates_dilated is None else torch.as_tensor(rates_dilated)
    return record(shape, rates, dilated.float())


def static(shape: NetworkShape) -> NetworkShape:
    return replace(shape, blocks=tuple(replace(block, mode="static") for block in shape.blocks))


def fake_runner(model, iteration: int, name: str) -> SimpleNamespace:
    hub, logger = MessageHub.get_instance(name), MMLogger.get_instance("latency")
    return SimpleNamespace(model=model, iter=iteration, message_hub=hub, logger=logger)


@pytest.fixture
def backbone() -> LASResNet:
    torch.manual_seed(0)
    model = LASResNet(50, base_channels=8, stem_channels=8).train()
    for masker in model.maskers():
        torch.nn.init.constant_(masker.conv.bias, 0.0)
    return model


@pytest.fixture
def tables(monkeypatch) -> list:
    """The tables that a hook builds."""
    built = []

    class Counted(table_module.LatencyTable):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            built.append(self.network.input_hw)

    monkeypatch.setattr(table_module, "LatencyTable", Counted)
    return built


@pytest.mark.parametrize("device", ["v100", "rtx3090", "tx2", "nano"])
def test_prediction_is_the_reports_within_the_documented_error(device):
    shape = resnet_shape(101)
    rng = np.random.default_rng(0)
    hook = PredictedLatencyHook(device=device)
    for _ in range(3):
        rates = rng.uniform(0.1, 0.9, 33)
        dilated = np.minimum(rates * rng.uniform(1, 1.5, 33), 1)
        found = hook.predict(activation(shape, rates, dilated))
        exact = network_report(device, shape, rates, dilated).latency_s
        assert found.total_s == pytest.approx(exact, rel=0.01)
        assert found.static_s == pytest.approx(network_report(device, static(shape), 1).latency_s)
        assert found.ratio == pytest.approx(found.total_s / found.static_s)
    for rate in (0.37, 0.61):  # all blocks step together
        exact = network_report(device, shape, rate).latency_s
        assert hook.predict(activation(shape, rate)).total_s == pytest.approx(exact, rel=0.06)


@pytest.mark.parametrize("mode", ["spatial", "layer"])
def test_prediction_is_exact_at_the_tables_entries(mode):
    shape = resnet_shape(50, (96, 128), mode=mode)
    hook = PredictedLatencyHook(device="tx2", batch_size=1)
    for rate in (0.0, 0.25, 1.0):
        exact = network_report("tx2", shape, rate, batch_size=1).latency_s
        assert hook.predict(activation(shape, rate)).total_s == pytest.approx(exact)


def test_dilated_rate_counts_for_conv1():
    shape = resnet_shape(50)
    hook = PredictedLatencyHook(device="v100")
    narrow = hook.predict(activation(shape, 0.25))
    wide = hook.predict(activation(shape, 0.25, torch.full((16,), 0.75)))
    assert wide.total_s > 1.01 * narrow.total_s


def test_paper_setting_counts_stages_and_one_rate_per_block():
    shape = resnet_shape(101, stage1_downsample=False)
    hook = PredictedLatencyHook(device="v100", setting="paper")
    record = activation(shape, 0.5, torch.full((33,), 0.9))  # the paper has no dilated rate
    exact = paper_report("v100", 101, rate=0.5).latency_s
    assert hook.predict(record).total_s == pytest.approx(exact)
    assert PredictedLatencyHook(device="v100").predict(record).total_s > 1.01 * exact


def test_rate_a_rounding_error_above_one_is_one():
    shape = resnet_shape(50)
    hook = PredictedLatencyHook()
    above = hook.predict(activation(shape, 1 + 1e-6))
    assert above.total_s == hook.predict(activation(shape, 1.0)).total_s


def test_training_scalars(backbone):
    hook = PredictedLatencyHook(device="rtx3090", batch_size=4, interval=1)
    runner = fake_runner(backbone, 0, "latency-scalars")
    hook.before_run(runner)
    backbone(torch.rand(2, 3, 96, 64))
    hook.after_train_iter(runner, 0)
    record = collect_activations(backbone).detach()
    assert 0.2 < record.rates.mean() < 0.8
    prediction = hook.predict(record)
    found = {key: runner.message_hub.get_scalar(f"train/{key}").current() for key in KEYS}
    expected = (1e3 * prediction.total_s, 1e3 * prediction.static_s, prediction.ratio)
    assert tuple(found.values()) == pytest.approx(expected)
    shape = backbone.network_shape((96, 64))  # not of the first input but of this one
    report = network_report("rtx3090", static(shape), 1.0, batch_size=4)
    assert found["static_latency_ms"] == pytest.approx(1e3 * report.latency_s)


def test_ratio_that_training_goes_by_is_left_alone(backbone):
    """BudgetHook logs ``latency_ratio`` under the same key, for its own device."""
    hook = PredictedLatencyHook(interval=1)
    runner = fake_runner(backbone, 0, "latency-budget")
    backbone(torch.rand(1, 3, 64, 64))
    hook.after_train_iter(runner, 0, outputs=dict(loss=1.0, latency_ratio=0.5))
    assert "train/latency_ms" in runner.message_hub.log_scalars
    assert "train/latency_ratio" not in runner.message_hub.log_scalars
    hook.after_train_iter(runner, 0, outputs=dict(loss=1.0))
    assert "train/latency_ratio" in runner.message_hub.log_scalars


def test_work_per_iteration(backbone, tables, monkeypatch):
    """A table per input size, a prediction per interval: the cost of logging is bounded."""
    hook = PredictedLatencyHook(interval=5)
    predicted = []
    predict = hook.predict
    monkeypatch.setattr(hook, "predict", lambda record: predicted.append(1) or predict(record))
    iterations = []
    for iteration in range(20):
        backbone(torch.rand(1, 3, 64, 64 if iteration < 12 else 96))
        before = len(predicted)
        hook.after_train_iter(fake_runner(backbone, iteration, "latency-work"), iteration)
        iterations += [iteration] * (len(predicted) - before)
    assert iterations == [0, 4, 9, 14, 19]
    assert tables == [(64, 64), (64, 96)]
    # The network is costed when a table is built, never again.
    monkeypatch.setattr("las_mm.latency.table.report_at", lambda *_, **__: pytest.fail())
    monkeypatch.setattr("las_mm.latency.table.costs_of", lambda *_: pytest.fail())
    hook.after_train_iter(fake_runner(backbone, 0, "latency-work"), 0)


def test_images_that_fill_up_the_last_round_are_not_counted(backbone, monkeypatch):
    """3 images on 2 processes: each runs 2, the last one of rank 1 is a repetition."""
    counts = []
    backbone.eval()
    for rank in (0, 1):
        monkeypatch.setattr(latency_module.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(latency_module.dist, "get_world_size", lambda: 2)
        hook = PredictedLatencyHook()
        runner = fake_runner(backbone, 0, "latency-padding")
        runner.val_dataloader = SimpleNamespace(dataset=range(3))
        hook.before_val_epoch(runner)
        for i in range(2):
            backbone(torch.rand(1, 3, 64, 64))
            hook.after_val_iter(runner, i, outputs=[object()])
        counts.append(hook._summary.images)
    assert counts == [2, 1]


@needs.MMDET
def test_logs_of_training_and_validation(tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{"train_cfg.max_epochs": 1, "train_dataloader.num_workers": 0})
    cfg = Config.fromfile(config)
    for hook in cfg.custom_hooks:
        if hook.type == "las_mm.PredictedLatencyHook":
            hook.update(interval=1, device="nano")
        if hook.type == "las_mm.BudgetHook":
            hook.loss.loss_weight = 50.0
    cfg.launcher, cfg.experiment_name = "none", "latency_logs"
    runner = Runner.from_cfg(cfg)
    seen = []

    def watch(module, args, output) -> None:
        if not module.training:
            record = module.network_activation()
            counts = flops_report(record)
            seen.append((counts.dynamic.item(), counts.static.item(), record.mean_rate.item()))

    runner.model.backbone.register_forward_hook(watch)
    runner.train()

    (log,) = tmp_path.glob("*/vis_data/scalars.json")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    train, val = [e for e in entries if "loss" in e], [e for e in entries if "loss" not in e]
    assert (len(train), len(val)) == (3, 1)
    for entries, prefix in ((train, ""), (val, "las_mm/")):
        for entry in entries:
            ratio = entry[f"{prefix}latency_ms"] / entry[f"{prefix}static_latency_ms"]
            assert entry[f"{prefix}latency_ratio"] == pytest.approx(ratio, rel=1e-4)
    # One name, one step axis: training counts iterations, validation epochs.
    assert not {"latency_ms", "flops_ratio"} & val[0].keys()
    assert all("flops_ratio" in entry and "temperature" in entry for entry in train)
    dynamic, whole, rates = np.array(seen).T
    assert len(seen) == 3
    assert val[0]["las_mm/flops_ratio"] == pytest.approx(dynamic.sum() / whole.sum(), rel=1e-5)
    assert val[0]["las_mm/activation_rate"] == pytest.approx(rates.mean(), rel=1e-5)
    for stage in (1, 2, 3, 4):
        assert 0 <= val[0][f"las_mm/activation_rate_stage{stage}"] <= 1
    scalars = runner.message_hub.log_scalars
    assert scalars["val/las_mm/latency_ms"].current() == pytest.approx(val[0]["las_mm/latency_ms"])

    (text,) = (path.read_text() for path in tmp_path.glob("*/*.log"))
    assert "3 images, latency predicted for" in text
    assert all(f"stage {stage}" in text for stage in (1, 2, 3, 4))
    assert "latency_ms: " in text


def test_static_detector_is_refused():
    with pytest.raises(ValueError, match="las_mm.LASResNet"):
        PredictedLatencyHook().before_run(fake_runner(torch.nn.Conv2d(3, 3, 1), 0, "refused"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="v1000"), "v1000"),
        (dict(setting="mine"), "must be one of full, paper, got 'mine'"),
        (dict(interval=0), "interval of PredictedLatencyHook must be a positive integer, got 0"),
        (dict(interval=True), "interval .* got True"),
        (dict(batch_size=-1), "batch_size .* got -1"),
        (dict(batch_size=2.0), "batch_size .* got 2.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PredictedLatencyHook(**arguments)
