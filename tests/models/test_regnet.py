"""RegNets: torchvision's networks, dynamic, and their sparse path."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn

import las_mm
from las_mm import ops
from las_mm.benchmark.subject import fold_batchnorm, randomize
from las_mm.benchmark.twins import plain_twin
from las_mm.drawn_masks import force_masks
from las_mm.latency import predict
from las_mm.models import LASRegNet, collect_activations, flops_report, plan, sparse
from las_mm.models.excitation import SqueezeExcitation
from las_mm.models.released import convert_regnet, regnet_arguments
from las_mm.network.architectures import regnet_shape
from las_mm.registry import MODELS

GOLDEN = Path(os.environ.get("LAS_MM_GOLDEN", "../shared/golden"))
ALL = (0, 1, 2, 3)
TINY = dict(w0=16, wa=16.0, wm=2.0, group_w=8, depth=5, bot_mul=1.0)  # 16, 32 and 64 channels
TINY_Y = dict(TINY, se_ratio=0.25)
needs_native = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The plan of every test: nothing is measured, or written to the user's folder."""

    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def tiny(arch=TINY_Y, seed=0, **kwargs):
    """A RegNet of three stages in eval mode whose masks keep some and drop some."""
    stages = dict(strides=(2, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2))
    torch.manual_seed(seed)
    net = LASRegNet(arch, **{**stages, "granularity": (4, 2, 1), **kwargs})
    randomize(net, seed)
    for masker in net.maskers():
        for name, parameter in masker.named_parameters():
            nn.init.normal_(parameter, std=0.5) if "weight" in name else nn.init.zeros_(parameter)
    return net.eval()


def images(*shape, seed=1):
    """Noise around another mean in every image and channel, so that decisions differ."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape[0], 3, *shape[1:], generator=generator)
    return noise + 2 * torch.randn(shape[0], 3, 1, 1, generator=generator)


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for stage, (a, e) in enumerate(zip(actual, expected), start=1):
        assert a.shape == e.shape and a.dtype == e.dtype
        error = ((a.double() - e.double()).abs().max() / e.double().abs().max()).item()
        assert error <= tolerance, f"stage {stage}: {error:.3g}"


# The same network as torchvision's ---------------------------------------------------------------


def torchvision_net(arch):
    torch.manual_seed(0)
    name = arch.replace("regnet", "regnet_").replace(".", "_")
    net = getattr(torchvision.models, name)(weights=None)
    randomize(net)
    with torch.no_grad():
        for stage in net.trunk_output:
            for block in stage:
                block.f.c[1].weight.mul_(0.2)  # the sum over all blocks must stay small
    return net.eval()


@pytest.mark.parametrize("mode", ["static", "spatial", "channel"])
@pytest.mark.parametrize("arch", ["regnetx_400mf", "regnety_400mf"])
def test_torchvision_weights_give_torchvisions_features(arch, mode):
    theirs = torchvision_net(arch)
    net = LASRegNet(arch, mode=mode, out_indices=ALL).eval()
    missing, unexpected = net.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == ["fc.weight", "fc.bias"] and all("masker" in key for key in missing)
    x = images(2, 64, 96)
    with torch.no_grad():
        expected, outs = theirs.stem(x), []
        for stage in theirs.trunk_output:
            expected = stage(expected)
            outs.append(expected)
        with sparse.masked_dense():
            assert_close(net(x), outs, 1e-6)
        assert_close(net(x), outs, 1e-5)
    assert collect_activations(net).rates.min() == 1


@pytest.mark.parametrize("arch", LASRegNet.arch_settings)
def test_architectures_are_torchvisions_and_the_latency_models(monkeypatch, arch):
    for name in ("normal_", "kaiming_uniform_"):  # what takes the time
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    name = arch.replace("regnet", "regnet_").replace(".", "_")
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    net = LASRegNet(arch, mode="static")
    converted = {k: v for k, v in convert_regnet(theirs).items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    expected = regnet_shape(arch.removeprefix("regnet"), (97, 130), mode="static").blocks
    blocks = net.network_shape((97, 130)).blocks
    assert [replace(b, name="") for b in blocks] == [replace(b, name="") for b in expected]


def test_torchvision_checkpoints_load_through_mmengine():
    theirs = torchvision_net("regnety_400mf")
    classifier = nn.ModuleDict(dict(backbone=LASRegNet("regnety_400mf", mode="static")))
    weights = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    _load_checkpoint_to_model(classifier, weights)
    actual = classifier.backbone.layer4[0].se.fc1.weight
    assert torch.equal(actual, theirs.trunk_output[3][0].f.se.fc1.weight)


@pytest.mark.skipif(not (GOLDEN / "laud_regnety400_keys.json").is_file(), reason="no such file")
def test_every_released_key_has_a_place():
    listed = json.loads((GOLDEN / "laud_regnety400_keys.json").read_text())
    settings = {
        "laud_regnety400_spatial_4421": dict(mode="spatial"),
        "laud_regnety400_both_4421_g1_mlp1": dict(
            mode="both", channel_granularity=1, channel_masker_layers=1
        ),
        "laud_regnety400_channel_g2_mlp2": dict(mode="channel", channel_granularity=2),
    }
    assert set(listed) == set(settings)
    for name, keys in listed.items():
        with torch.device("meta"):
            net = LASRegNet("regnety_400mf", **settings[name])
            released = {key: torch.empty(shape) for key, shape in keys.items()}
        converted = convert_regnet({f"module.{key}": v for key, v in released.items()})
        converted = {k: v.shape for k, v in converted.items() if not k.startswith("fc.")}
        assert converted == {k: v.shape for k, v in net.state_dict().items()}


def test_arguments_of_a_specification():
    spec = dict(family="regnet", arch="RegNet_Y_400MF", mode="both", granularity=[4, 4, 2, 1])
    net = LASRegNet(**regnet_arguments({**spec, "channel_granularity": 1}))
    assert net.arch == "regnety_400mf" and net.se_pool == "all"
    assert net.blocks()[0].channel_position == "after_act"
    assert regnet_arguments(dict(spec, arch="regnetx_1_6gf"))["arch"] == "regnetx_1.6gf"
    for wrong in (dict(family="resnet"), dict(arch="regnetz_1gf")):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            regnet_arguments({**spec, **wrong})


@pytest.mark.parametrize("arch", ["regnety_400mf", TINY])
def test_the_benchmarks_twin_is_the_same_network(arch):
    stages = {} if isinstance(arch, str) else dict(strides=(2, 2, 2), dilations=(1, 1, 1))
    config = dict(arch=arch, mode="static", out_indices=(1, 2), **stages)
    net = LASRegNet(**config)
    randomize(net)
    twin = plain_twin(net, config)
    twin.load_state_dict(net.state_dict())
    twin.eval()  # mmpretrain's returns nothing
    with torch.no_grad(), sparse.masked_dense():
        assert_close(twin(images(2, 64, 64)), net.eval()(images(2, 64, 64)), 1e-6)
        assert_close(fold_batchnorm(twin)(images(2, 64, 64)), net(images(2, 64, 64)), 1e-5)


# Squeeze-and-excitation --------------------------------------------------------------------------


def test_excitation_pools_over_kept_positions():
    torch.manual_seed(0)
    ours, x = SqueezeExcitation(8, 2), torch.randn(3, 8, 5, 6)
    theirs = torchvision.ops.SqueezeExcitation(8, 2)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    mask = torch.zeros(3, 1, 5, 6)
    mask[0, :, :2], mask[1] = 1, 1  # the third image keeps nothing
    out = ours(x, mask)
    torch.testing.assert_close(out[0, :, :2], theirs(x[:1, :, :2])[0])
    torch.testing.assert_close(out[1], theirs(x)[1])
    assert out[2].isfinite().all()
    everything = SqueezeExcitation(8, 2, pool="all")
    everything.load_state_dict(ours.state_dict())
    torch.testing.assert_close(everything(x, mask), theirs(x))


def test_excitation_lets_gradients_through_to_the_mask():
    mask = torch.rand(2, 1, 4, 4, requires_grad=True)
    SqueezeExcitation(4, 2)(torch.randn(2, 4, 4, 4), mask).sum().backward()
    assert mask.grad.abs().max() > 0


def test_dropped_positions_have_no_say():
    """Whatever the block's input is where nothing kept reads it, kept outputs are the same."""
    net = tiny(mode="spatial")
    block = net.layer3[1]
    x = torch.randn(1, block.in_channels, 8, 8).relu()
    decisions = torch.zeros(1, 1, 8, 8)
    decisions[..., :3] = 1
    block.masker.forward = lambda x, patch: decisions
    other = x.clone()
    other[..., 5:] += 1  # column 3 is halo, column 4 its neighbour
    with torch.no_grad(), sparse.masked_dense():
        first, second = block(x), block(other)
    assert torch.equal(first[..., :3], second[..., :3])
    assert not torch.equal(first[..., 5:], second[..., 5:])


# Counting ----------------------------------------------------------------------------------------


def test_flops_of_a_static_network_are_those_of_its_layers():
    net = LASRegNet("regnety_800mf", mode="static").eval()
    macs = []

    def count(module, inputs, output):
        macs.append(output.numel() * module.weight[0].numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 96))
    released = flops_report(collect_activations(net), "released")
    assert released.static.item() == sum(macs) and released.ratio.item() == 1
    exact = flops_report(collect_activations(net))
    maps = sum(2 * b.width * b.h_out * b.w_out for b in net.network_shape((64, 96)).blocks)
    assert exact.static.item() == sum(macs) + maps and exact.ratio.item() == 1


def test_a_skipped_block_skips_its_excitation():
    net = tiny(mode="layer")
    for masker in net.maskers():
        masker.offset = torch.full((1, 1, 1, 1), -torch.inf)
    with torch.no_grad():
        net(images(1, 64, 64))
    report = flops_report(collect_activations(net))
    shape = net.network_shape((64, 64))
    shortcuts = sum(b.c_in * b.c_out * b.h_out * b.w_out for b in shape.blocks if b.downsample)
    maskers = sum(b.c_in * (b.h_in * b.w_in + 2) for b in shape.blocks)
    stem = shape.stem[0]
    expected = shortcuts + maskers + 27 * stem.c_out * stem.h_out * stem.w_out
    assert report.dynamic.item() == expected


def test_latency_is_predicted():
    net = tiny(mode=["spatial", "channel", "layer"])
    report = predict(net, "v100", (1, 3, 64, 64), rates=0.5)
    plain = predict(tiny(TINY, mode=["spatial", "channel", "layer"]), "v100", (1, 3, 64, 64), 0.5)
    assert report.latency_s > plain.latency_s > 0


# As a backbone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("mode", ["spatial", "layer", "channel", "both"])
def test_training_step(mode, with_cp):
    net = tiny(mode=mode, with_cp=with_cp).train()
    outs = net(images(2, 64, 64))
    (sum(out.square().mean() for out in outs) + collect_activations(net).rates.sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_frozen_stages_and_norm_eval():
    net = tiny(frozen_stages=1, norm_eval=True, freeze_maskers=False).train()
    for name, parameter in net.named_parameters():
        frozen = name.startswith(("conv1.", "bn1.", "layer1."))
        assert parameter.requires_grad == (not frozen or ".masker." in name)
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert net.eval() is net


def test_built_from_configs_of_mmpretrain_and_mmdet():
    backbone = dict(type="las_mm.LASRegNet", arch=TINY_Y, strides=(2, 2, 2), dilations=(1, 1, 1))
    classifier = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(backbone, out_indices=(2,)),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=64),
        )
    ).eval()
    with torch.no_grad():
        (pooled,) = classifier.extract_feat(images(2, 64, 64))
        assert pooled.shape == (2, 64) and classifier.head((pooled,)).shape == (2, 5)
    pytest.importorskip("mmdet.models")
    neck = MODELS.build(
        dict(type="mmdet.FPN", in_channels=[16, 32, 64], out_channels=8, num_outs=4)
    )
    with torch.no_grad():
        levels = neck(MODELS.build(dict(backbone, out_indices=(0, 1, 2))).eval()(images(1, 64, 96)))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(arch="regnety_1gf"), ["arch", "regnety_1gf", "regnety_800mf"]),
        (dict(arch=dict(TINY, width=1)), ["arch", "width"]),
        (dict(arch=TINY), ["strides", "3", "(2, 2, 2, 2)"]),
        (dict(arch={"w0": 8}), ["arch", "missing", "group_w"]),
        (dict(se_pool="none"), ["se_pool", "none", "kept"]),
        (dict(mode="channels"), ["mode", "channels"]),
        (dict(granularity=(4, 4)), ["granularity", "4"]),
        (dict(out_indices=(4,)), ["out_indices", "4"]),
        (dict(frozen_stages=5), ["frozen_stages", "5"]),
        (dict(mode="channel", channel_granularity=5), ["channel_granularity", "48", "5"]),
    ],
)
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        LASRegNet(**{"arch": "regnety_400mf", **kwargs})
    assert all(word in str(error.value) for word in words)


# The sparse path ---------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 67, 93)], ids=["even", "odd batch"])
@pytest.mark.parametrize("mode", ["static", "spatial", "layer", ["layer", "spatial", "static"]])
@pytest.mark.parametrize("arch", [TINY, TINY_Y, dict(TINY_Y, group_w=16, bot_mul=0.5)])
def test_fast_form_equals_masked_dense(arch, mode, shape, dtype):
    net, x = tiny(arch, mode=mode).to(dtype), images(*shape).to(dtype)
    force_masks(net, x.shape, 0.5, "random")
    with torch.no_grad():
        with sparse.masked_dense():
            expected, activation = net(x), collect_activations(net)
        actual, fast_activation = net(x), collect_activations(net)
    assert all(block.why_dense is None for block in net.blocks())
    assert_close(actual, expected, 1e-4 if dtype == torch.float32 else 5e-2)
    torch.testing.assert_close(fast_activation.rates, activation.rates)
    torch.testing.assert_close(fast_activation.rates_dilated, activation.rates_dilated)
    if mode != "static":
        assert 0.2 < activation.mean_rate < 0.8


@needs_native
@pytest.mark.parametrize("keep", [False, True])
def test_empty_and_full_masks(keep):
    net, x = tiny(), images(2, 64, 64)
    force_masks(net, x.shape, float(keep), "random")
    for masker in net.maskers()[::2]:
        masker.offset[1] = -masker.offset[1]  # the other image the other way round
    with torch.no_grad():
        with sparse.masked_dense():
            expected = net(x)
        assert_close(net(x), expected, 1e-4)


@needs_native
@pytest.mark.parametrize("dense_above", [0.0, 0.5])
def test_dense_choice_of_the_plan(monkeypatch, dense_above):
    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=False, dense_above=dense_above)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)
    net, x = tiny(mode=["spatial", "layer", "static"]), images(2, 64, 64)
    force_masks(net, x.shape, 0.5, "random")
    with torch.no_grad():
        with sparse.masked_dense():
            expected = net(x)
        assert_close(net(x), expected, 1e-4)


@needs_native
def test_pooling_over_all_positions_has_no_fast_form_where_some_are_dropped():
    net, x = tiny(mode=["spatial", "layer", "static"], se_pool="all"), images(2, 64, 64)
    with torch.no_grad():
        with sparse.masked_dense():
            expected = net(x)
        assert_close(net(x), expected, 1e-4)
    reasons = [{block.why_dense for block in getattr(net, f"layer{i}")} for i in (1, 2, 3)]
    assert "se_pool" in reasons[0].pop() and reasons[1:] == [{None}, {None}]


@needs_native
def test_changed_excitation_is_noticed():
    net, x = las_mm.prepare(tiny()), images(1, 64, 64)
    force_masks(net, x.shape, 0.5, "random")
    with torch.no_grad():
        before = net(x)
        net.layer2[0].se.fc2.bias.sub_(2)
        with sparse.masked_dense():
            expected = net(x)
        assert (before[1] - expected[1]).abs().max() > 1e-2
        assert_close(net(x), expected, 1e-4)


@needs_native
def test_explain():
    explanation = las_mm.explain(tiny(), images(1, 64, 64), quiet=True)
    assert [row.name for row in explanation.blocks][:2] == ["stem", "layer1.0"]
    assert "LASRegNet-custom" in explanation.title
