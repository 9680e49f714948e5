"""BudgetHook on models whose classes know nothing of it: a classifier and a detector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample
from torch import nn

import needs
from las_mm.hooks import BudgetHook
from las_mm.models import DynamicBottleneck, SpatialMasker, collect_activations, maskers
from las_mm.models.flops import flops_report
from las_mm.registry import MODELS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TARGET = 0.4
BACKBONE = dict(
    type="las_mm.LASResNet",
    depth=50,
    base_channels=8,
    stem_channels=8,
    norm_eval=True,
    zero_init_residual=False,
)


def undecided(model: nn.Module) -> nn.Module:
    """Initialise: maskers keep about half of all patches, blocks add little to the shortcut."""
    model.init_weights()
    for module in model.modules():
        if isinstance(module, SpatialMasker):
            nn.init.constant_(module.conv.bias, 0.0)
        if isinstance(module, DynamicBottleneck):
            nn.init.constant_(module.norm3.weight, 0.2)
    return model.train()


def classifier(**backbone) -> nn.Module:
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    return undecided(
        MODELS.build(
            dict(
                type="mmpretrain.ImageClassifier",
                backbone={**BACKBONE, **backbone},
                neck=dict(type="mmpretrain.GlobalAveragePooling"),
                head=dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=256),
            )
        )
    )


def retinanet() -> nn.Module:
    init_default_scope("mmdet")
    torch.manual_seed(0)
    cfg = Config.fromfile(CONFIGS / "retinanet_lasnet_r101.py")
    cfg.merge_from_dict(
        dict(
            model=dict(
                backbone=dict(
                    _delete_=True, out_indices=(0, 1, 2, 3), **{**BACKBONE, "norm_eval": False}
                ),
                neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
                bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1),
            )
        )
    )
    return undecided(MODELS.build(cfg.model))


def images(model: nn.Module, count: int = 2, seed: int = 0) -> dict:
    """Input of ``model(**images(model), mode='loss')``."""
    inputs = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    if not hasattr(model, "bbox_head"):
        samples = [DataSample().set_gt_label(i % 5) for i in range(count)]
        return dict(inputs=inputs, data_samples=samples)
    from mmdet.structures import DetDataSample

    shape = dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64))
    shape.update(scale_factor=(1.0, 1.0), pad_shape=(64, 64))
    boxes = torch.tensor([[4.0, 6.0, 50.0, 60.0]])
    samples = []
    for _ in range(count):
        sample = DetDataSample(metainfo=shape)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3]))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def attach(model: nn.Module, iteration: int = 0, **loss) -> BudgetHook:
    hook = BudgetHook(loss=dict(type="las_mm.BudgetLoss", target=TARGET, **loss))
    runner = SimpleNamespace(model=model, iter=iteration, max_iters=10)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    return hook


def losses_of(model: nn.Module, seed: int = 0, **kwargs) -> dict:
    torch.manual_seed(seed)  # the noise
    return model(**images(model, **kwargs), mode="loss")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(
    params=[classifier, pytest.param(retinanet, marks=needs.MMDET)],
    ids=["classifier", "retinanet"],
)
def model(request) -> nn.Module:
    return request.param()


def test_term_and_rates_appear(model):
    plain = losses_of(model)
    attach(model)
    losses = losses_of(model)
    stages = {f"activation_rate_stage{i}" for i in (1, 2, 3, 4)}
    added = {"loss_budget", "flops_ratio", "activation_rate", *stages}
    assert set(losses) - set(plain) == added
    activation = collect_activations(model)
    ratio = flops_report(activation).ratio.item()
    assert losses["flops_ratio"].item() == pytest.approx(ratio)
    assert losses["loss_budget"].item() == pytest.approx((ratio - TARGET) ** 2, rel=1e-5)
    rates = activation.rates
    assert losses["activation_rate"].item() == pytest.approx(rates.mean().item())
    assert losses["activation_rate_stage2"].item() == pytest.approx(rates[3:7].mean().item())
    assert 0.2 < rates.mean() < 0.8
    assert not any(losses[key].requires_grad for key in added - {"loss_budget"})


def test_term_is_summed_and_rates_are_only_logged(model):
    plain, _ = model.parse_losses(losses_of(model))
    attach(model)
    losses = losses_of(model)
    total, log = model.parse_losses(losses)
    expected = plain.item() + losses["loss_budget"].item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert losses["loss_budget"].item() > 1e-5 * total.item()  # or the line above says nothing
    for key in ("flops_ratio", "activation_rate", "activation_rate_stage4", "loss_budget"):
        assert log[key].item() == losses[key].item()


def test_progress_releases_the_bounds():
    model = classifier()
    values = {}
    for iteration in (0, 2, 9):
        hook = attach(model, iteration, bounds_weight=5.0)
        values[iteration] = losses_of(model)["loss_budget"].item()
        hook.remove()
    ratio = flops_report(collect_activations(model)).ratio.item()
    assert values[0] > values[2] > values[9] == pytest.approx((ratio - TARGET) ** 2, rel=1e-5)


@pytest.mark.parametrize("mode", ["spatial", "layer"])
def test_term_alone_trains_every_masker(mode):
    model = classifier(mode=mode)
    attach(model)
    losses_of(model)["loss_budget"].backward()
    found = [module for module in model.modules() if isinstance(module, SpatialMasker)]
    assert len(found) == 16
    for masker in found:
        for parameter in masker.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().max() > 0
    # Too much is computed, so a step against the gradient must lower every "keep" bias.
    assert flops_report(collect_activations(model)).ratio > TARGET
    for masker in found:
        keep, drop = masker.conv.bias.grad
        assert keep > 0 > drop


def test_channel_rates_are_logged():
    model = classifier(mode=["static", "both", "channel", "layer"])
    attach(model)
    losses = losses_of(model)
    activation = collect_activations(model)
    assert losses["activation_rate"].item() == pytest.approx(
        activation.rates[[3, 4, 5, 6, 13, 14, 15]].mean().item()
    )
    assert losses["channel_rate"].item() == pytest.approx(
        activation.rates_channel[3:13].mean().item()
    )
    stages = [losses[f"channel_rate_stage{stage}"].item() for stage in (1, 2, 3, 4)]
    assert stages[0] == stages[3] == 1 and 0 < stages[1] < 1 and 0 < stages[2] < 1
    assert losses["activation_rate_stage3"] == 1


def test_activation_checkpointing_changes_no_gradient(monkeypatch):
    calls = dict(compute=0, masker=0)
    compute, decide = DynamicBottleneck._compute, SpatialMasker.forward

    def count(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(DynamicBottleneck, "_compute", count("compute", compute))
    monkeypatch.setattr(SpatialMasker, "forward", count("masker", decide))
    results = {}
    for with_cp in (False, True):
        calls.update(compute=0, masker=0)
        model = classifier(with_cp=with_cp)
        attach(model)
        losses = losses_of(model)
        total, _ = model.parse_losses(losses)
        total.backward()
        assert calls == dict(compute=32 if with_cp else 16, masker=16)
        results[with_cp] = (losses, gradients(model))
    plain, checkpointed = results[False], results[True]
    for key, value in plain[0].items():
        assert checkpointed[0][key].item() == pytest.approx(value.item(), rel=1e-6)
    assert set(plain[1]) == set(checkpointed[1])
    for key, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_gradient_accumulation_equals_the_doubled_batch(monkeypatch):
    # The term is not linear in the rates, so this holds where both halves have the same rates:
    # decisions come from the noise alone here, and the halves get the same noise.
    calls = []

    def noise(reference):
        generator = torch.Generator().manual_seed(len(calls) % 16)
        calls.append(reference.shape)
        half = torch.randn((2, *reference.shape[1:]), generator=generator)
        return half.repeat(len(reference) // 2, 1, 1, 1)

    monkeypatch.setattr(maskers, "gumbel_difference", noise)

    def train(batches: list[dict], counts: int) -> dict[str, torch.Tensor]:
        model = classifier()
        for masker in model.backbone.maskers():
            nn.init.zeros_(masker.conv.weight)
        attach(model, bounds_weight=1.0)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = OptimWrapper(sgd, accumulative_counts=counts)
        wrapper.initialize_count_status(model, 0, counts)
        start = {key: value.clone() for key, value in model.state_dict().items()}
        for batch in batches:
            model.train_step(batch, wrapper)
        return {key: value - start[key] for key, value in model.state_dict().items()}

    model = classifier()
    first, second = images(model, seed=1), images(model, seed=2)
    both = dict(
        inputs=torch.cat([first["inputs"], second["inputs"]]),
        data_samples=first["data_samples"] + second["data_samples"],
    )
    accumulated, doubled = train([first, second], 2), train([both], 1)
    assert len(calls) == 3 * 16
    for key, step in doubled.items():
        torch.testing.assert_close(accumulated[key], step, rtol=1e-4, atol=1e-6)
    assert doubled["backbone.layer3.0.masker.conv.bias"].abs().max() > 1e-4


def test_autocast(model):
    attach(model)
    exact = losses_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model)
        total, log = model.parse_losses(losses)
    assert all(value.isfinite() for value in log.values())
    for key in ("loss_budget", "activation_rate", "activation_rate_stage1"):
        assert losses[key].dtype == torch.float32
    activation = collect_activations(model)
    assert activation.rates.dtype == activation.rates_dilated.dtype == torch.float32
    # A rate is a whole number of patches; bfloat16 would round it to 3 digits.
    assert losses["activation_rate"].item() == activation.rates.mean().item()
    assert losses["flops_ratio"].item() == pytest.approx(exact["flops_ratio"].item(), rel=0.05)
    total.backward()
    # Not the neck: torch's bfloat16 weight gradient of a strided 3x3 convolution on a map of
    # 1 x 1, which the last level of this small input is, reads uninitialised memory (torch 2.14).
    backbone = {key: g for key, g in gradients(model).items() if key.startswith("backbone.")}
    assert len(backbone) > 100
    assert all(gradient.isfinite().all() for gradient in backbone.values())


def test_static_model_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="(?s)found none.*las_mm.LASResNet.*remove the las_mm"):
        BudgetHook().before_train(SimpleNamespace(model=model))


def test_detached_after_training_and_attached_once():
    model = classifier()
    runner = SimpleNamespace(model=model, iter=0, max_iters=1)
    hook = BudgetHook()
    hook.before_train(runner)
    hook.before_train(runner)  # a second training with the same hook
    assert len(model._forward_hooks) == 1
    assert "loss_budget" in losses_of(model)
    hook.after_train(runner)
    assert not model._forward_hooks
    assert "loss_budget" not in losses_of(model)


def test_other_modes_are_untouched(model):
    data = images(model)
    model.eval()
    before = model(**data, mode="predict")
    expected = model(**data, mode="tensor")
    attach(model)
    after = model(**data, mode="predict")
    assert [type(sample) for sample in after] == [type(sample) for sample in before]
    tensors = model(**data, mode="tensor")
    torch.testing.assert_close(tensors, expected)
    assert "loss_budget" not in model(**data, mode="loss")  # a validation loss


def test_nothing_to_budget():
    model = classifier(mode="static")
    with pytest.raises(ValueError, match="every stage of the backbone is static"):
        BudgetHook().attach(model)
    with pytest.raises(ValueError, match="loss of BudgetHook.*0.5"):
        BudgetHook(loss=0.5)
