import copy

import pytest
import torch
from mmpretrain.models.backbones import ResNet
from mmpretrain.models.backbones.resnet import ResNetV1d

from las_mm.models import LASResNet, collect_activations, flops_report
from las_mm.models.settings import BlockSettings

SMALL = dict(base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))


def randomize(net: LASResNet, seed: int = 0) -> LASResNet:
    """Features and masks that vary, so that equalities mean something."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
    for masker in net.maskers():
        torch.nn.init.normal_(masker.conv.weight, std=0.5)
        torch.nn.init.zeros_(masker.conv.bias)
    return net


@pytest.mark.parametrize("mode", ["static", "spatial", "layer", ["static", "spatial"] * 2])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@pytest.mark.parametrize("size", [(64, 96), (67, 93)])
def test_shapes_follow_the_static_network(mode, style, size):
    net = LASResNet(50, mode=mode, style=style, **SMALL).eval()
    static = ResNet(50, style=style, **SMALL)
    static.eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert [o.shape for o in net(images)] == [o.shape for o in static(images)]
    shape = net.network_shape(size)
    assert len(shape.blocks) == 16
    assert (shape.blocks[-1].h_out, shape.blocks[-1].w_out) == net(images)[-1].shape[-2:]


@pytest.mark.parametrize("kwargs", [{}, dict(deep_stem=True, avg_down=True)])
def test_static_checkpoint_loads_and_starts_as_the_static_network(kwargs):
    torch.manual_seed(0)
    static = ResNet(50, **SMALL, **kwargs)
    static.init_weights()
    static.eval()
    net = LASResNet(50, **SMALL, **kwargs)
    missing, unexpected = net.load_state_dict(static.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".masker." in key for key in missing)
    images = torch.randn(2, 3, 64, 64)
    net.eval()
    with torch.no_grad():
        for ours, theirs in zip(net(images), static(images)):
            torch.testing.assert_close(ours, theirs)
    assert collect_activations(net).rates.min() == 1


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_dropped_positions_take_the_shortcut(style):
    net = randomize(LASResNet(50, granularity=(4, 4, 2, 1), style=style, **SMALL)).eval()
    block = net.layer2[1]
    x = torch.randn(3, block.in_channels, 13, 18)
    with torch.no_grad():
        out = block(x)
        mask = block.activation.mask
        keep = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :13, :18].bool()
        block.make_dynamic(BlockSettings())
        full = block.eval()(x)
    assert 0 < keep.float().mean() < 1
    torch.testing.assert_close(out, torch.where(keep, full, x.relu()))


def test_masks_are_per_image():
    """Each image of a batch gives what it gives alone."""
    net = randomize(LASResNet(50, mode=["spatial", "spatial", "layer", "spatial"], **SMALL)).eval()
    images = torch.randn(3, 3, 70, 90)
    with torch.no_grad():
        together = net(images)
        rates = collect_activations(net).rates
        alone, alone_rates = [], []
        for image in images:
            alone.append(net(image[None]))
            alone_rates.append(collect_activations(net).rates)
    for level, out in enumerate(together):
        expected = torch.cat([outs[level] for outs in alone])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rates, torch.stack(alone_rates).mean(0))
    assert 0 < rates.mean() < 1


def test_rates_count_real_outputs_not_patches():
    net = LASResNet(50, granularity=4, **SMALL).eval()
    block = net.layer1[1]
    x = torch.zeros(1, block.in_channels, 5, 6)  # a 2 x 2 grid; the last patch is 1 x 2
    decisions = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
    block.masker.forward = lambda x, patch: decisions
    block(x)
    assert block.activation.rate.item() == pytest.approx(2 / 30)
    assert block.activation.rate_dilated.item() == pytest.approx(2 * 3 / 30)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(depth=20), ["depth", "20", "18, 34, 50, 101, 152"]),
        (dict(out_indices=(0, 7)), ["out_indices", "7", "0 to 3"]),
        (dict(frozen_stages=5), ["frozen_stages", "5"]),
        (dict(mode="channels"), ["mode", "channels", "spatial"]),
        (dict(mode=["spatial"] * 3), ["mode", "one per stage"]),
        (dict(granularity=0), ["granularity", "0"]),
        (dict(granularity=(4, 4, 2)), ["granularity", "4"]),
        (dict(granularity=(4, 4, 2, 1.5)), ["granularity", "1.5", "stage 4"]),
        (dict(granularity=(4, 4, (2, 2), 1)), ["granularity", "stage 3", "6 values"]),
    ],
)
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        LASResNet(**{"depth": 50, **kwargs})
    assert all(word in str(error.value) for word in words)


def test_granularity_per_block():
    flat = [4] * 3 + [4] * 4 + [2] * 6 + [1] * 3
    net = LASResNet(50, granularity=flat, **SMALL)
    assert [block.granularity for block in net.blocks()] == flat
    nested = LASResNet(50, granularity=(4, [8, 4, 4, 2], 2, 1), **SMALL)
    assert [block.granularity for block in nested.layer2] == [8, 4, 4, 2]
    assert "S=8-4-4-2" in nested.extra_repr()
    assert "mode=spatial, S=8" in repr(nested.layer2[0])


def test_frozen_stages_and_their_maskers():
    frozen = LASResNet(50, frozen_stages=1, norm_eval=True, **SMALL).train()
    assert not any(p.requires_grad for p in frozen.layer1.parameters())
    free = LASResNet(50, frozen_stages=1, norm_eval=True, freeze_maskers=False, **SMALL).train()
    for name, parameter in free.layer1.named_parameters():
        assert parameter.requires_grad == ("masker" in name)
    assert free.layer1[0].masker.training and not free.layer1[0].training
    assert not free.layer2[0].norm1.training
    assert free.eval() is free and not free.layer1[0].masker.training


def test_pretrained_dynamic_weights_are_not_reset(tmp_path):
    source = randomize(LASResNet(50, **SMALL))
    torch.save(source.state_dict(), tmp_path / "dynamic.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "dynamic.pth"))
    net = LASResNet(50, init_cfg=init_cfg, **SMALL)
    net.init_weights()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key])
    fresh = randomize(LASResNet(50, **SMALL))
    fresh.init_weights()
    assert all(m.conv.bias.tolist() == [5.0, 0.0] for m in fresh.maskers())


def test_flops_ratio_counts_what_runs():
    net = LASResNet(50, **SMALL).eval()
    images = torch.randn(1, 3, 96, 96)
    for masker in net.maskers():
        torch.nn.init.zeros_(masker.conv.weight)
    net(images)
    full = flops_report(collect_activations(net))
    assert full.ratio > 1  # everything, and the maskers on top
    for masker in net.maskers():
        torch.nn.init.constant_(masker.conv.bias[0:1], -1.0)
    net(images)
    empty = flops_report(collect_activations(net))
    assert empty.block_ratios[1] < 0.1  # no downsample: the masker only
    assert empty.dynamic < 0.5 * full.dynamic
    static = LASResNet(50, mode="static", **SMALL).eval()
    static(images)
    report = flops_report(collect_activations(static))
    assert report.ratio == 1 and report.static == full.static


def test_torchvision_layout_of_resnet101():
    """MACs of the plain network: 7.8 G at 224 x 224, as published (without the classifier)."""
    net = LASResNet(101, mode="static")
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 224, 224))
    report = flops_report(collect_activations(net))
    assert float(report.static) / 1e9 == pytest.approx(7.80, abs=0.03)


def test_no_activation_before_the_first_forward():
    with pytest.raises(RuntimeError, match="forward"):
        collect_activations(LASResNet(50, **SMALL))
    with pytest.raises(ValueError, match="las_mm.LASResNet"):
        collect_activations(ResNet(50, **SMALL))


def test_v1d_matches_parent_geometry():
    kwargs = dict(deep_stem=True, avg_down=True, **SMALL)
    net = LASResNet(50, mode="static", **kwargs)
    assert net.load_state_dict(ResNetV1d(depth=50, **SMALL).state_dict()).missing_keys == []
    shape = net.network_shape((64, 64))
    assert [layer.name for layer in shape.stem][-1] == "stem.maxpool" and len(shape.stem) == 4
    assert shape.blocks[3].downsample_pool and not shape.blocks[0].downsample_pool


def test_copies_after_a_training_step():
    net = LASResNet(50, **SMALL).train()
    net(torch.randn(2, 3, 64, 64))
    twin = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match="forward"):
        collect_activations(twin)
    collect_activations(net)  # the original keeps its record
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images), net.eval()(images))


def test_tracing_as_flops_counters_do():
    net = randomize(LASResNet(50, **SMALL)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(net, images, check_trace=False)
        torch.testing.assert_close(traced(images), net(images))
