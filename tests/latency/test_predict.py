"""predict(): a model, a config or a shape, at given or recorded rates, as a tree that adds up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from las_mm.latency import find_network, network_report, paper_report, predict, resnet_shape
from las_mm.models import LASResNet, collect_activations
from las_mm.preflight import UserError
from las_mm.registry import MODELS

SMALL = dict(base_channels=8, stem_channels=8)


def backbone(**kwargs) -> LASResNet:
    torch.manual_seed(0)
    model = LASResNet(50, **{**SMALL, **kwargs}).eval()
    for masker in model.maskers():
        nn.init.constant_(masker.conv.bias, 0.0)
    return model


def config(**changes) -> Config:
    net = dict(type="las_mm.LASResNet", depth=50, **SMALL, **changes)
    head = dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=256)
    neck = dict(type="mmpretrain.GlobalAveragePooling")
    model = dict(type="mmpretrain.ImageClassifier", backbone=net, neck=neck, head=head)
    return Config(dict(model=model, default_scope="mmpretrain"))


def check_sums(report) -> None:
    for key in ("compute_s", "memory_s", "launch_s", "latency_s"):
        if report.children:
            parts = math.fsum(getattr(child, key) for child in report.children)
            assert getattr(report, key) == pytest.approx(parts)
    for child in report.children:
        check_sums(child)
    if not report.children:
        assert report.launch_s > 0 and report.memory_s > 0  # no operator is free


def test_tree_of_a_shape():
    report = predict(resnet_shape(101), "v100", (64, 3, 224, 224), rates=0.5)
    assert report == network_report("v100", resnet_shape(101), 0.5, batch_size=64)
    assert [child.name for child in report.children] == ["stem"] + [
        f"stage{i}" for i in range(1, 5)
    ]
    block = report.children[3].children[1]
    assert [child.name for child in block.children] == [
        "masker_conv1",
        "conv2",
        "conv3",
        "scatter_add",
    ]
    check_sums(report)
    stages = sum(report.children[1:])
    assert stages.latency_s == pytest.approx(report.latency_s - report.children[0].latency_s)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["latency_s"] == report.latency_s
    assert read["children"][1]["name"] == "stage1"


def test_published_figure():
    report = predict(resnet_shape(101, stage1_downsample=False), "v100", (224, 224), rates=0.5)
    stages = sum(report.children[1:])  # the papers leave the stem out
    assert stages.latency_s == pytest.approx(paper_report("v100", rate=0.5).latency_s)
    assert 1e3 * stages.latency_s == pytest.approx(1.39, rel=5e-3)


def test_batch_comes_with_the_input():
    net = resnet_shape(50)
    for shape, batch in (((8, 3, 224, 224), 8), ((224, 224), 128), (None, 128)):
        found = predict(net, "v100", shape, rates=0.5)
        assert found == network_report("v100", net, 0.5, batch_size=batch)
    whole = predict(net, "v100", (8, 3, 224, 224), rates=0.5, per_image=False)
    each = predict(net, "v100", (8, 3, 224, 224), rates=0.5)
    assert whole.latency_s == pytest.approx(8 * each.latency_s)


def test_module_config_and_shape_agree(tmp_path):
    cfg = config(granularity=(4, 2, 2, 1), mode=["spatial", "static", "layer", "spatial"])
    init_default_scope("mmpretrain")
    classifier = MODELS.build(cfg.model)
    net = classifier.backbone.network_shape((96, 64))
    expected = network_report("tx2", net, 0.4, batch_size=2)
    cfg.dump(tmp_path / "config.py")
    for source in (cfg, tmp_path / "config.py", str(tmp_path / "config.py"), classifier,
                   classifier.backbone, net):  # fmt: skip
        assert predict(source, "tx2", (2, 3, 96, 64), rates=0.4) == expected
    assert find_network(cfg, (96, 64)) == net


def test_a_prediction_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    predict(config(), "v100", (64, 64), rates=0.5)
    assert torch.equal(torch.rand(4), expected)


def test_rates_for_a_model_that_has_run_are_for_its_last_size():
    model = backbone()
    with pytest.raises(ValueError, match="input_shape is needed"):
        predict(model, "tx2", rates=0.5)
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 128))
    expected = network_report("tx2", model.network_shape((96, 128)), 0.5)
    assert predict(model, "tx2", rates=0.5) == expected
    expected = network_report("tx2", model.network_shape((64, 64)), 0.5)
    assert predict(model, "tx2", (64, 64), rates=0.5) == expected


def test_recorded_rates():
    model = backbone()
    with torch.no_grad():
        model(torch.randn(2, 3, 96, 128))
    record = collect_activations(model)
    assert 0.2 < record.rates.mean() < 0.8
    rates, dilated = (t.double().numpy() for t in (record.rates, record.rates_dilated))
    expected = network_report("tx2", record.shape, rates, dilated)
    assert predict(model, "tx2") == expected  # at the recorded size
    assert predict(model, "tx2", (96, 128)) == expected
    larger = network_report("tx2", model.network_shape((192, 256)), rates, dilated, batch_size=4)
    assert predict(model, "tx2", (4, 3, 192, 256)) == larger
    # Rates of one's own replace both.
    assert predict(model, "tx2", (96, 128), rates=0.3) == network_report("tx2", record.shape, 0.3)
    own = np.linspace(0, 1, 16)
    assert predict(model, "tx2", (96, 128), own, own**0.5) == network_report(
        "tx2", record.shape, own, own**0.5
    )


def test_training_records_have_gradients_that_stay_out():
    model = backbone().train()
    model(torch.randn(1, 3, 64, 64))
    assert predict(model, "v100").latency_s > 0


@pytest.mark.parametrize("source", ["model", "config", "shape"])
def test_no_rates_name_the_way_out(source):
    made = dict(model=backbone, config=config, shape=lambda: resnet_shape(50, (64, 64)))[source]()
    with pytest.raises(ValueError, match="rates=0.5"):
        predict(made, "v100", (64, 64))


def test_static_networks_need_no_rates():
    shape = resnet_shape(50, (64, 64), mode="static")
    expected = predict(shape.static(), "v100", rates=1.0)
    assert predict(shape, "v100") == expected
    for source in (backbone(mode="static"), config(mode="static")):
        assert predict(source, "v100", (64, 64)).latency_s > 0


class Stranger(nn.Module):
    def __init__(self, **_) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)


def with_linear() -> LASResNet:
    model = backbone()
    model.layer2[0].gate = nn.Linear(4, 4)
    return model


def with_another_convolution() -> LASResNet:
    model = backbone()
    model.layer2[0].extra = nn.Conv2d(4, 4, 3)
    return model


def without_an_operator() -> LASResNet:
    model = backbone()
    model.layer1[0].conv2 = nn.Identity()
    model.layer1[0].conv2.groups = 1
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (Stranger, "Stranger has no backbone with a latency model.*found none"),
        (lambda: nn.ModuleList([backbone(), backbone()]), "found 0, 1"),
        (with_linear, "layer2.0.gate of LASResNet is a Linear that its block does not describe"),
        (
            with_another_convolution,
            "layer2.0.extra of LASResNet is a Conv2d that its block",
        ),
        (without_an_operator, "layer1.0 of LASResNet describes conv2, which has no layer"),
    ],
)
def test_what_has_no_model_raises(make, message):
    with pytest.raises(ValueError, match=message):
        predict(make(), "v100", (64, 64), rates=0.5)


def test_configs_without_a_dynamic_backbone():
    cfg = config()
    cfg.model.backbone = dict(type="mmpretrain.ResNet", depth=50)
    with pytest.raises(ValueError, match="ImageClassifier has no backbone with a latency model"):
        predict(cfg, "v100", (64, 64), rates=0.5)
    with pytest.raises(ValueError, match="has no model"):
        predict(Config(dict(a=1)), "v100", (64, 64), rates=0.5)
    with pytest.raises(UserError, match="stage 1: mode must be one of"):
        predict(config(mode="diagonal"), "v100", (64, 64), rates=0.5)
    with pytest.raises(UserError, match="gone.py does not exist"):
        predict("gone.py", "v100", (64, 64), rates=0.5)


@pytest.mark.parametrize("shape", [(64,), (0, 3, 64, 64), (64, 64.0), (64, -1)])
def test_wrong_input_shapes(shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), or \(H, W\)"):
        predict(backbone(), "v100", shape, rates=0.5)


def test_wrong_arguments():
    net = resnet_shape(50, (64, 64))
    with pytest.raises(ValueError, match=r"for \(64, 64\), not for \(96, 64\)"):
        predict(net, "v100", (96, 64), rates=0.5)
    with pytest.raises(ValueError, match="input_shape is needed"):
        predict(backbone(), "v100", rates=0.5)
    with pytest.raises(ValueError, match="one entry per block"):
        predict(net, "v100", rates=[0.5])
    with pytest.raises(ValueError, match="unknown device"):
        predict(net, "v1000", rates=0.5)
    with pytest.raises(TypeError, match="got int"):
        predict(3, "v100", (64, 64), rates=0.5)
