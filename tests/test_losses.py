import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch.utils._python_dispatch import TorchDispatchMode

import needs
import records
from las_mm import losses
from las_mm.latency import LatencyTable, predict, resnet_shape, table
from las_mm.losses import BudgetLoss
from las_mm.models.activation import NetworkActivation
from las_mm.models.finding import collect_activations
from las_mm.models.flops import flops_report


def activation(rate: float, requires_grad: bool = False) -> NetworkActivation:
    shape = resnet_shape(50, (64, 64), base_channels=8)
    rates = torch.full((16,), rate, requires_grad=requires_grad)
    return records.record(shape, rates)


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
        rates = torch.full((16,), rate, requires_grad=True)
        record = records.record(resnet_shape(50, (64, 64), base_channels=8), rates)
        BudgetLoss(0.5, bounds_weight=1.0)(record, progress=0.1).backward()
        assert (rates.grad * sign > 0).all()


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


# ---- metric='latency'


def latency_record(rates, dilated=None, shape=None) -> NetworkActivation:
    """Rates of a ResNet-50 at 96 x 128; its stages have 24 to 48 patches."""
    shape = resnet_shape(50, (96, 128), granularity=(4, 2, 1, 1)) if shape is None else shape
    count = len(shape.blocks)
    rates = torch.as_tensor(rates, dtype=torch.float32).expand(count)
    dilated = rates if dilated is None else torch.as_tensor(dilated, dtype=torch.float32)
    return records.record(shape, rates, dilated)


def test_latency_term_is_the_tables():
    loss = BudgetLoss(0.6, metric="latency", device="tx2", batch_size=2, loss_weight=3.0)
    rates = np.random.default_rng(0).uniform(0.1, 0.9, 16)
    dilated = np.minimum(rates * 1.3, 1)
    record = latency_record(rates, dilated)
    table = LatencyTable("tx2", record.shape, batch_size=2, patches="mean")
    exact = table.predict(record.rates.double().numpy(), record.rates_dilated.double().numpy())
    report = loss.latency_report(record)
    assert report.ratio.item() == pytest.approx(exact.ratio, rel=1e-9)
    assert report.dynamic.item() == pytest.approx(exact.total_s, rel=1e-9)
    assert report.static.item() == pytest.approx(exact.static_s, rel=1e-9)
    blocks = exact.block_s / table.static_block_s
    assert report.block_ratios.numpy() == pytest.approx(blocks, rel=1e-9)
    value = loss(record)
    assert value.dtype == torch.float32 and value.shape == ()
    assert value.item() == pytest.approx(3 * (exact.ratio - 0.6) ** 2, rel=1e-5)
    assert loss(record, latency=report).item() == value.item()


def test_latency_is_near_the_exact_staircase():
    shape = resnet_shape(101)
    loss = BudgetLoss(0.6, metric="latency", device="v100")
    for rate in (0.25, 0.5, 0.75):
        found = loss.latency_report(latency_record(rate, shape=shape)).dynamic.item()
        exact = predict(shape, "v100", rates=rate).latency_s  # 12.25 patches of 49 count as 13
        assert 0.97 * exact < found <= exact


@pytest.mark.parametrize("mode", ["spatial", "layer", ("static", "spatial", "layer", "spatial")])
def test_latency_gradient_against_finite_differences(mode):
    shape = resnet_shape(50, (96, 128), mode=mode, granularity=(4, 2, 1, 1))
    loss = BudgetLoss(0.5, metric="latency", device="v100", batch_size=4)
    generator = torch.Generator().manual_seed(0)
    # Inside the tables' segments of 1/32, where the function is smooth.
    cells = torch.randint(0, 32, (2, 16), generator=generator)
    values = ((cells + 0.5) / 32).double().requires_grad_()

    def ratio(both: torch.Tensor) -> torch.Tensor:
        record = records.record(shape, both[0], both[1])
        return (loss.latency_report(record).ratio - 0.5).square()

    assert torch.autograd.gradcheck(ratio, (values,), eps=1e-4, atol=1e-9, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ratio(values), values)
    dynamic = torch.tensor([block.mode != "static" for block in shape.blocks])
    assert (gradient[0][dynamic] != 0).all()
    assert not gradient[:, ~dynamic].any()


@pytest.mark.parametrize("mode", ["channel", "both", ("static", "both", "layer", "channel")])
def test_latency_gradient_in_the_channel_rates(mode):
    shape = resnet_shape(50, (96, 128), mode=mode, granularity=(4, 2, 1, 1))
    loss = BudgetLoss(0.5, metric="latency", device="tx2")
    cells = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(0))
    values = ((cells + 0.5) / 32).double().requires_grad_()

    def ratio(rates: torch.Tensor) -> torch.Tensor:
        return loss.latency_report(records.record(shape, *rates)).ratio

    table = LatencyTable("tx2", shape, patches="mean")
    assert ratio(values).item() == pytest.approx(table.predict(*values.detach().numpy()).ratio)
    assert torch.autograd.gradcheck(ratio, (values,), eps=1e-4, atol=1e-9, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ratio(values), values)
    channels = torch.tensor([block.has_channels for block in shape.blocks])
    assert (gradient[2][channels] > 0).all()
    assert not gradient[2][~channels].any()


def test_latency_gradient_at_few_patches():
    """Four patches: rounding up would leave a quarter of the range at a time without a slope."""
    shape = resnet_shape(50, (64, 64), granularity=(8, 4, 2, 1))
    assert {block.n_patches for block in shape.blocks} == {4}
    loss = BudgetLoss(0.3, metric="latency", device="v100")
    for rate in torch.linspace(0.01, 0.99, 25):
        rates = torch.full((16,), rate.item(), requires_grad=True)
        loss.latency_report(latency_record(rates, shape=shape)).dynamic.backward()
        assert (rates.grad > 0).all()


def test_latency_beyond_the_ends_still_has_a_gradient():
    loss = BudgetLoss(0.5, metric="latency", device="tx2")
    for rate in (-1e-7, 0.0, 1.0, 1 + 1e-6):
        rates = torch.full((16,), rate, requires_grad=True)
        ratio = loss.latency_report(latency_record(rates)).ratio
        ratio.backward()
        inside = loss.latency_report(latency_record(min(max(rate, 0.0), 1.0))).ratio
        assert ratio.item() == pytest.approx(inside.item(), rel=1e-5)
        assert (rates.grad > 0).all()


@pytest.mark.parametrize("device, target", [("tx2", 0.8), ("v100", 0.9)])
def test_latency_minimum_is_at_the_target(device, target):
    loss = BudgetLoss(target, metric="latency", device=device)
    logits = torch.linspace(-1, 2, 16).requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.03)
    for _ in range(300):
        rates = logits.sigmoid()
        value = loss(latency_record(rates, (rates * 1.2).clamp(max=1)))
        adam.zero_grad()
        value.backward()
        adam.step()
    assert value.item() < 1e-6
    rates = logits.sigmoid().detach()
    report = loss.latency_report(latency_record(rates, (rates * 1.2).clamp(max=1)))
    assert report.ratio.item() == pytest.approx(target, abs=2e-3)


def test_bounds_stay_on_flops():
    record = latency_record(0.9)
    common = dict(target=0.5, network_weight=0.0, bounds_weight=1.0)
    flops = BudgetLoss(**common)(record, progress=0.1)
    latency = BudgetLoss(**common, metric="latency", device="v100")(record, progress=0.1)
    assert latency.item() == flops.item() > 0


def test_flops_stay_the_default_and_unchanged():
    record = activation(0.4)
    assert BudgetLoss(0.5).metric == "flops"
    assert BudgetLoss(0.5, metric="flops")(record).item() == BudgetLoss(0.5)(record).item()
    with pytest.raises(ValueError, match="needs metric='latency'"):
        BudgetLoss(0.5).latency_report(record)


class Counter(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_latency_takes_about_as_many_operations_as_flops():
    record = latency_record(torch.full((16,), 0.5, requires_grad=True))
    counts = {}
    for metric in ("flops", "latency"):
        loss = BudgetLoss(0.5, metric=metric)
        loss(record)  # set-up, once per input size
        with Counter() as counter:
            loss(record).backward()
        counts[metric] = counter.count
    assert 0 < counts["latency"] <= 1.1 * counts["flops"]


def test_one_table_per_input_size(monkeypatch):
    built = []

    class Counted(table.LatencyTable):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            built.append(self.network.input_hw)

    monkeypatch.setattr(table, "LatencyTable", Counted)
    loss = BudgetLoss(0.7, metric="latency", device="tx2")
    for size in ((64, 64), (64, 96), (64, 64), (64, 96), (64, 64)):
        record = latency_record(0.5, shape=resnet_shape(50, size, granularity=(4, 2, 1, 1)))
        static = predict(record.shape.static(), "tx2").latency_s
        assert loss.latency_report(record).static.item() == pytest.approx(static)
    assert built == [(64, 64), (64, 96)]


def test_target_out_of_reach_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(losses, "print_log", lambda text, **_: said.append(text))
    for target, count in ((0.6, 0), (0.05, 1)):
        loss = BudgetLoss(target, metric="latency", device="tx2")
        for rate in (0.2, 0.8):
            loss(latency_record(rate))
        assert len(said) == count
    assert "target 0.05 is out of reach: on tx2 at 96 x 128, batch 1" in said[0]


def test_copies_and_pickles():
    loss = BudgetLoss(0.6, metric="latency", device="tx2")
    value = loss(latency_record(0.5)).item()
    assert copy.deepcopy(loss)(latency_record(0.5)).item() == value
    assert pickle.loads(pickle.dumps(loss))(latency_record(0.5)).item() == value
    assert not loss.state_dict()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(metric="seconds"), "metric of BudgetLoss must be one of flops, latency"),
        (dict(device="v100"), "device and batch_size of BudgetLoss need metric='latency'"),
        (dict(batch_size=1), "need metric='latency'"),
        (dict(metric="latency", device="v1000"), "unknown device 'v1000'"),
        (dict(metric="latency", batch_size=0), "batch_size .* positive integer, got 0"),
        (dict(metric="latency", batch_size=True), "positive integer, got True"),
    ],
)
def test_wrong_latency_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BudgetLoss(0.5, **kwargs)


# ---- through the config


@needs.MMDET
def test_training_to_latency_through_the_config(tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{"train_cfg.max_epochs": 1, "train_dataloader.num_workers": 0})
    cfg = Config.fromfile(config)
    for hook in cfg.custom_hooks:
        if hook.type == "las_mm.BudgetHook":
            hook.loss.update(metric="latency", device="tx2", target=0.6, bounds_weight=1.0)
        if hook.type == "las_mm.PredictedLatencyHook":
            hook.update(interval=1, device="tx2", batch_size=1)
    cfg.launcher, cfg.experiment_name = "none", "train_to_latency"
    cfg.visualizer.name = "train_to_latency"  # mmengine keeps one visualizer per name
    runner = Runner.from_cfg(cfg)
    backbone = runner.model.backbone
    before = [masker.conv.weight.detach().clone() for masker in backbone.maskers()]
    runner.train()
    assert any(not torch.equal(m.conv.weight, old) for m, old in zip(backbone.maskers(), before))
    (log,) = tmp_path.glob("*/vis_data/scalars.json")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    assert len(entries) == 3
    loss = next(h.loss for h in runner.hooks if type(h).__name__ == "BudgetHook")
    for entry in entries:
        assert 0 < entry["flops_ratio"] <= 1.1
        # Both hooks predict; the loss's ratio is the one that is logged.
        rounded_up = entry["latency_ms"] / entry["static_latency_ms"]
        assert entry["latency_ratio"] == pytest.approx(rounded_up, rel=0.05)
        assert entry["loss_budget"] >= loss.loss_weight * (entry["latency_ratio"] - 0.6) ** 2 * 0.99
    # The log window is one iteration, and the record of the last one is still there.
    record = collect_activations(runner.model).detach()
    assert record.shape.input_hw == (96, 96)
