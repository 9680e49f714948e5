"""Networks that skip channels: the sparse path equals the masked-dense form, rates included."""

import pytest
import torch
from torch import nn

from las_mm import ops
from las_mm.drawn_masks import force_masks
from las_mm.models import LASResNet, collect_activations, plan, sparse

pytestmark = pytest.mark.skipif(
    not ops.has_channel_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
SMALL = dict(base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
CONFIGS = {
    "channel": dict(mode="channel"),
    "before_norm": dict(mode="channel", channel_position="before_norm"),
    "both": dict(mode="both"),
    "both before_norm": dict(mode="both", channel_position="before_norm", channel_granularity=1),
    "odd S": dict(mode="both", granularity=(3, 5, 1, 7)),
    "mixed": dict(mode=["both", "spatial", "channel", "layer"], channel_granularity=(1, 2, 4, 8)),
    "conv_linear": dict(mode="channel", channel_masker="conv_linear", channel_reduction=2),
    "dilated": dict(
        mode="both",
        channel_position="before_norm",
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        style="caffe",
        avg_down=True,
    ),
}


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def make(**kwargs):
    """A network in eval mode whose features vary."""
    torch.manual_seed(0)
    net = LASResNet(50, **{**SMALL, **kwargs})
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def check(net, x, tolerance):
    with torch.no_grad():
        with sparse.masked_dense():
            expected = net(x)
        before = collect_activations(net)
        actual = net(x)
        after = collect_activations(net)
    assert all(block.why_dense is None for block in net.blocks())
    for ours, theirs in zip(actual, expected):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= tolerance
    for name in ("rates", "rates_dilated", "rates_channel"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=1e-6)
    torch.testing.assert_close(after.shares, before.shares, rtol=0, atol=1e-6)
    for ours, theirs in zip(after.masks_channel, before.masks_channel):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    return after


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (3, 3, 67, 93)], ids=["even", "odd batch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_masked_dense(name, shape):
    net = make(**CONFIGS[name])
    force_masks(net, shape, 0.6, "random")
    activation = check(net, torch.randn(shape), 1e-4)
    assert 0.3 < activation.mean_rate_channel < 0.8
    if shape[0] > 1:
        masks = [mask for mask in activation.masks_channel if mask is not None]
        assert any((mask[0] != mask[1]).any() for mask in masks)


@pytest.mark.parametrize("name", ["both", "before_norm"])
def test_bfloat16(name):
    net = make(**CONFIGS[name]).bfloat16()
    force_masks(net, (2, 3, 67, 93), 0.6, "random")
    check(net, torch.randn(2, 3, 67, 93).bfloat16(), 5e-2)


@pytest.mark.parametrize("name", ["both before_norm", "conv_linear"])
def test_own_decisions(name):
    net = make(**CONFIGS[name])
    for masker in net.maskers():
        last = masker.last if hasattr(masker, "last") else masker.conv
        nn.init.normal_(last.weight, std=1.0)
        nn.init.normal_(last.bias, std=0.1)
    activation = check(net, torch.randn(2, 3, 64, 64), 1e-4)
    assert 0.05 < activation.mean_rate_channel < 0.95


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("name", ["channel", "both before_norm"])
def test_no_channels_and_all(name, rate):
    net = make(**CONFIGS[name])
    force_masks(net, (2, 3, 64, 64), 0.6, "random", channel_rate=rate)
    assert check(net, torch.randn(2, 3, 64, 64), 1e-4).mean_rate_channel == rate


def test_constants_follow_the_norms():
    net = make(**CONFIGS["before_norm"])
    force_masks(net, (1, 3, 64, 64), 0.6, "random")
    x = torch.randn(1, 3, 64, 64)
    check(net, x, 1e-4)
    with torch.no_grad():
        for block in net.blocks():
            block.norm1.bias.add_(0.5)
            block.norm2.running_mean.sub_(0.5)
    check(net, x, 1e-4)
