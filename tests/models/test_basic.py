"""ResNet-18 and -34: the static network is mmpretrain's and torchvision's."""

import pytest
import torch
import torchvision
from families import FixedPlan, assert_close, basic, images
from mmpretrain.models.backbones import ResNet
from torch import nn

from las_mm.benchmark.subject import randomize
from las_mm.latency import resnet_shape
from las_mm.models import DynamicBasicBlock, LASResNet, collect_activations, sparse


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr("las_mm.models.plan.current_plan", FixedPlan)


@pytest.mark.parametrize("mode", ["static", "spatial", "both"])
@pytest.mark.parametrize("depth", [18, 34])
def test_torchvision_weights_give_torchvisions_features(depth, mode):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    randomize(theirs)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torchvision.models.resnet.BasicBlock):
                module.bn2.weight.mul_(0.3)  # the sum over all blocks must stay small
    net = LASResNet(depth, mode=mode, out_indices=(3,)).eval()
    missing, unexpected = net.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == ["fc.weight", "fc.bias"] and all("masker" in key for key in missing)
    x = images(2, 64, 96)
    with torch.no_grad():
        trunk = nn.Sequential(*list(theirs.children())[:-2])
        with sparse.masked_dense():
            assert_close(net(x), [trunk(x)], 1e-5)
        assert_close(net(x), [trunk(x)], 1e-4)
    assert collect_activations(net).rates.min() == 1


@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(avg_down=True, deep_stem=True), dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))],
)
def test_the_static_network_is_mmpretrains(kwargs):
    net = basic(mode="static", **kwargs)
    arguments = dict(base_channels=16, stem_channels=16, out_indices=(0, 1, 2, 3))
    theirs = ResNet(18, **arguments, **kwargs)
    assert list(theirs.state_dict()) == list(net.state_dict())
    randomize(net)
    theirs.load_state_dict(net.state_dict())
    theirs.eval()
    x = images(2, 45, 70)
    with torch.no_grad(), sparse.masked_dense():
        assert_close(net.eval()(x), theirs(x), 1e-6)


@pytest.mark.parametrize("depth", [18, 34])
def test_described_as_the_latency_models_network(depth):
    net = LASResNet(depth, mode=["spatial", "both", "layer", "channel"])
    mode = ["spatial", "both", "layer", "channel"]
    expected = resnet_shape(depth, (97, 130), mode=mode, stage1_downsample=False).blocks
    blocks = net.network_shape((97, 130)).blocks
    ours = [block.anonymous().operators for block in blocks]
    assert ours == [block.anonymous().operators for block in expected]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(depth=20), ["depth", "18", "34", "20"]),
        (dict(depth=18, mode="channel", channel_granularity=7), ["channel_granularity", "64", "7"]),
        (dict(depth=18, mode="token"), ["mode", "token"]),
        (dict(depth=18, out_indices=(4,)), ["out_indices", "4"]),
    ],
)
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        LASResNet(**kwargs)
    assert all(word in str(error.value) for word in words)


def test_a_block_needs_other_maskers_for_another_mode():
    block = DynamicBasicBlock(16, 16, mode="spatial")
    block.mode = "layer"
    with pytest.raises(ValueError, match="make_dynamic"):
        block.mode = "channel"
