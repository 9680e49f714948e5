"""Loaded weights stay as loaded, however a config says that they are loaded."""

import copy

import pytest
import torch
from mmengine.model import PretrainedInit
from mmengine.runner import load_checkpoint
from torch import nn

from las_mm.models import LASRegNet, LASResNet
from las_mm.models.initialization import loads_weights, split
from las_mm.models.maskers import is_masker

SMALL = dict(
    base_channels=4, stem_channels=4, mode="both", channel_masker="conv_linear", channel_reduction=2
)
KAIMING = dict(type="Kaiming", layer=["Conv2d"])


def trained(**kwargs) -> LASResNet:
    """A network no weight of which is what initialisation makes it."""
    torch.manual_seed(0)
    net = LASResNet(50, **{**SMALL, **kwargs})
    for p in net.state_dict().values():
        if p.is_floating_point():
            nn.init.uniform_(p, 0.1, 0.9)
    return net


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": trained().state_dict()}, path)
    return str(path)


def differing(net: nn.Module, other: nn.Module) -> list[str]:
    weights = other.state_dict()
    return [key for key, value in net.state_dict().items() if not torch.equal(value, weights[key])]


@pytest.mark.parametrize("kind", ["Pretrained", "mmengine.Pretrained", PretrainedInit])
@pytest.mark.parametrize("listed", ["alone", "in a list", "after others", "before others"])
def test_loaded_weights_stay(kind, listed, source):
    entry = dict(type=kind, checkpoint=source)
    init_cfg = {
        "alone": entry,
        "in a list": [entry],
        "after others": [KAIMING, entry],
        "before others": [entry, KAIMING],
    }[listed]
    net = LASResNet(50, init_cfg=copy.deepcopy(init_cfg), **SMALL)
    net.init_weights()
    assert differing(net, trained()) == []
    assert net.init_cfg == init_cfg


@pytest.mark.parametrize("kind", ["Pretrained", "mmengine.Pretrained"])
def test_static_weights_leave_maskers_mostly_on(kind, tmp_path):
    static = trained(mode="static")
    torch.save(static.state_dict(), tmp_path / "static.pth")
    entry = dict(type=kind, checkpoint=str(tmp_path / "static.pth"))
    net = LASResNet(50, init_cfg=[dict(type="Kaiming", layer=["Conv2d", "Linear"]), entry], **SMALL)
    net.init_weights()
    weights = static.state_dict()
    for key, value in net.state_dict().items():
        assert is_masker(key) or torch.equal(value, weights[key]), key
    assert all(
        (m.last if hasattr(m, "last") else m.conv).weight.std() < 0.03 for m in net.maskers()
    )


def test_a_part_that_is_loaded_stays(source):
    part = dict(type="Pretrained", name="layer2", checkpoint=source, prefix="layer2.")
    net = LASResNet(50, init_cfg=[dict(**KAIMING, override=part)], **SMALL)
    net.init_weights()
    expected = trained()
    assert differing(net.layer2, expected.layer2) == []
    assert net.layer1[0].norm3.weight.abs().max() == 0  # zero_init_residual, as for the rest
    assert differing(net.layer1, expected.layer1)


def test_a_second_call_changes_nothing(source):
    net = LASResNet(50, **SMALL)
    net.init_weights()
    load_checkpoint(net, source, map_location="cpu")  # as load_from does
    net.init_weights()
    assert differing(net, trained()) == []


def test_frozen_stages_keep_what_was_loaded(source):
    net = LASResNet(
        50, frozen_stages=2, init_cfg=[dict(type=PretrainedInit, checkpoint=source)], **SMALL
    )
    net.init_weights()
    net.train()
    assert differing(net, trained()) == []


def test_regnet_without_weights_zeroes_and_resets():
    net = LASRegNet("regnetx_400mf", mode="spatial", init_cfg=KAIMING)
    net.init_weights()
    assert all(block.norm3.weight.abs().max() == 0 for block in net.blocks())
    assert all(m.conv.weight.std() < 0.05 for m in net.maskers())


def test_what_loads_is_told_apart():
    assert not loads_weights(KAIMING) and not loads_weights(None) and not loads_weights({})
    assert split(None) == ([], [])
    entry = dict(type="Pretrained", checkpoint="a.pth")
    part = dict(type="Constant", val=1, name="norm3")
    own = dict(**KAIMING, override=[part, dict(name="layer1", **entry)])
    assert split((own, entry)) == (
        [dict(**KAIMING, override=[part])],
        [("layer1", entry), ("", entry)],
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_norms_of_maskers_train_unless_frozen(freeze):
    net = LASResNet(50, norm_eval=True, frozen_stages=1, freeze_maskers=freeze, **SMALL).train()
    before = copy.deepcopy(net.state_dict())
    net(torch.rand(2, 3, 64, 64))
    moved = {
        key.split(".")[0]
        for key, value in net.state_dict().items()
        if "running_mean" in key and not torch.equal(value, before[key])
    }
    masked = {f"layer{stage}" for stage in ((2, 3, 4) if freeze else (1, 2, 3, 4))}
    assert moved == masked
    assert not net.layer3[0].norm1.training and not net.norm1.training  # norm_eval holds for these
    net.eval()
    assert not any(module.training for module in net.modules())
