"""Checkpoints of other code -> ours: every key accounted for, the rest refused."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import torchvision
from mmengine.runner import load_checkpoint
from mmpretrain.models import ImageClassifier

from conftest import load_tool
from las_mm.models import LASDenseNet, LASRegNet, LASResNet, released
from las_mm.models.released import build, convert, load
from las_mm.registry import MODELS

GOLDEN = Path(os.environ.get("LAS_MM_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
SMALL = dict(family="resnet", depth=50, width=1 / 16, num_classes=3)


def spec_of(mode, **kwargs) -> dict:
    return dict(SMALL, mode=mode, granularity=[4, 4, 2, 1], channel_reduction=4, **kwargs)


def checkpoint_of(net, first_paper=False) -> dict:
    """The released names of one of our networks' weights."""
    masker = ".masker.conv2." if first_paper else ".masker_spatial.conv."
    return {
        key.removeprefix("backbone.").replace(".masker.conv.", masker): value
        for key, value in net.state_dict().items()
    }


def timm_regnet(weights: dict) -> dict:
    """timm's names of our RegNet weights."""
    renamed = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] in ("conv1", "bn1"):
            parts = ["stem", "conv" if parts[0] == "conv1" else "bn", *parts[1:]]
        elif parts[0].startswith("layer"):
            parts[:2] = [f"s{parts[0][-1]}", f"b{int(parts[1]) + 1}"]
            if parts[2].startswith(("conv", "bn")):
                kind, number = parts[2][:-1], parts[2][-1]
                parts[2:3] = [f"conv{number}", kind]
            elif parts[2] == "downsample":
                parts[3] = ("conv", "bn")[int(parts[3])]
        renamed[".".join(parts)] = value
    return renamed


# Released ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_wrappers_and_prefixes(prefix, wrapper):
    spec = spec_of("both")
    net = build(spec)
    weights = {}
    for key, value in checkpoint_of(net).items():
        outer = prefix.removesuffix("backbone.") + "head." if "backbone" in prefix else prefix
        weights[(outer if key.startswith("fc.") else prefix) + key] = value
    found = convert(weights if wrapper is None else {wrapper: weights, "epoch": 3}, spec)
    assert not found.unused and not found.missing and not found.added
    assert len(found.used) == len(weights) == len(found.weights)
    for theirs, ours in found.used.items():
        assert torch.equal(weights[theirs], found.weights[ours])
    expected = {k.replace("fc.", "head.fc.") if k[:2] == "fc" else k for k in net.state_dict()}
    assert found.weights.keys() == expected
    assert found.num_classes == 3
    assert found.bare().keys() == net.backbone.state_dict().keys()


@pytest.mark.parametrize(
    "mode, settings",
    [
        ("spatial", {}),
        ("layer", {}),
        ("channel", dict(channel_granularity=4, channel_masker="MLP", channel_masker_layers=1)),
        ("both", dict(channel_granularity=1, channel_masker="conv_linear")),
        (["spatial", "channel", "both", "static"], dict(channel_granularity=[2, 1, 2, 4])),
    ],
)
def test_keys_tell_the_network(mode, settings):
    spec = spec_of(mode, **settings)
    net = build(spec).eval()
    given = dict(mode="layer") if mode == "layer" else dict(granularity=[4, 4, 2, 1])
    again = load(checkpoint_of(net), **({} if mode == "channel" else given))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(x)[0], again(x)[0])
    assert again.total_macs() == net.total_macs()
    assert again.total_macs("exact") == net.total_macs("exact")


def test_names_of_the_first_paper():
    net = build(spec_of("spatial"))
    found = convert(checkpoint_of(net, first_paper=True), spec_of("spatial"))
    assert not found.unused and not found.missing
    key = "trunk_output.block2.block2-0.masker.conv2.weight"
    renamed = released.convert_regnet({key: torch.zeros(2)})
    assert list(renamed) == ["layer2.0.masker.conv.weight"]


@pytest.mark.skipif(not (GOLDEN / "laud_regnety400_keys.json").is_file(), reason="no such file")
def test_no_released_key_is_left_over():
    for name, keys in json.loads((GOLDEN / "laud_regnety400_keys.json").read_text()).items():
        weights = {key: torch.zeros(shape) for key, shape in keys.items()}
        channel = "_channel_" in name
        found = convert(weights, granularity=None if channel else [4, 4, 2, 1])
        assert len(found.used) == len(keys) and not (found.unused or found.missing or found.added)
        assert found.backbone["arch"] == "regnety_400mf" and found.backbone["se_pool"] == "all"
        assert found.backbone["mode"] == name.split("_")[2]


@pytest.mark.parametrize(
    "spec",
    [
        dict(family="regnet", arch="lad_regnet_y_400mf", mode="spatial", channel_masker=None),
        dict(family="RegNetY", arch="400mf", mode="spatial", width=1),
        dict(family="regnet_y", arch="regnety400", mode="spatial", granularity=1),
    ],
)
def test_specifications_of_regnets(spec):
    assert released.backbone_config(spec) == dict(
        type="las_mm.LASRegNet",
        arch="regnety_400mf",
        mode="spatial",
        granularity=1,
        se_pool="all",
        channel_position="after_act",
    )


# Static ------------------------------------------------------------------------------------------


def test_static_weights_start_any_mode():
    net = LASResNet(50, mode="static", base_channels=4, stem_channels=4)
    weights = net.state_dict()
    plain = convert(weights)
    assert plain.backbone["mode"] == "static" and not plain.missing and plain.num_classes is None
    found = convert({k: v for k, v in weights.items() if "tracked" not in k}, mode="spatial")
    assert len(found.missing) == 2 * 16 and all("masker.conv" in key for key in found.missing)
    assert len(found.added) == sum("tracked" in key for key in weights)
    assert (
        LASResNet(50, base_channels=4, stem_channels=4)
        .load_state_dict(found.bare(), strict=False)
        .unexpected_keys
        == []
    )


@pytest.mark.parametrize("naming", ["torchvision", "timm"])
def test_static_regnets(naming):
    weights = torchvision.models.regnet_y_400mf(weights=None).state_dict()
    if naming == "timm":
        renamed = released.convert_regnet(weights)
        weights = timm_regnet({k: v for k, v in renamed.items() if not k.startswith("fc.")})
        weights["head.fc.weight"], weights["head.fc.bias"] = torch.zeros(7, 440), torch.zeros(7)
    found = convert(weights)
    assert found.backbone == dict(type="las_mm.LASRegNet", arch="regnety_400mf", mode="static")
    assert not found.unused and found.num_classes == (7 if naming == "timm" else 1000)
    assert LASRegNet("regnety_400mf", mode="static").load_state_dict(found.bare())


@pytest.mark.parametrize("depth", [18, 34])
def test_static_basic_blocks(depth):
    weights = getattr(torchvision.models, f"resnet{depth}")(weights=None).state_dict()
    found = convert(weights, mode="both", granularity=[4, 4, 2, 1])
    assert (found.backbone["type"], found.backbone["depth"]) == ("las_mm.LASResNet", depth)
    assert not found.unused and found.num_classes == 1000
    assert not LASResNet(depth, mode="both").load_state_dict(found.bare(), strict=False)[1]


@pytest.mark.parametrize("mode", ["static", "both", "channel"])
def test_basic_blocks_are_recognised_with_their_maskers(mode):
    net = LASResNet(18, mode=mode, base_channels=16, stem_channels=16, channel_granularity=4)
    found = convert(net.state_dict(), granularity=2 if mode == "both" else None)
    assert found.backbone["mode"] == mode and found.backbone["base_channels"] == 16
    assert mode == "static" or found.backbone["channel_granularity"] == 4
    net.load_state_dict(found.bare())


@pytest.mark.parametrize("naming", ["torchvision", "old", "mmpretrain"])
def test_static_densenets(naming):
    weights = torchvision.models.densenet121(weights=None).state_dict()
    if naming == "old":  # as the files that torchvision offers have it
        dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d)")
        weights = {dotted.sub(r"\1.\2", key): value for key, value in weights.items()}
    elif naming == "mmpretrain":
        renamed = released.convert_densenet(weights)
        head = {f"head.fc.{k[11:]}": v for k, v in renamed.items() if k.startswith("classifier.")}
        weights = {f"backbone.{k}": v for k, v in renamed.items() if k[:11] != "classifier."}
        weights |= head
    found = convert(weights)
    assert found.backbone == dict(type="las_mm.LASDenseNet", arch="121", mode="static")
    assert not found.unused and found.num_classes == 1000
    assert LASDenseNet("121", mode="static").load_state_dict(found.bare())


def test_other_densenets_are_refused():
    net = LASDenseNet(dict(growth_rate=8, depths=[2, 2, 2, 2], init_channels=16), mode="static")
    with pytest.raises(ValueError, match="no DenseNet that is known has 2-2-2-2 layers"):
        convert(net.state_dict())


# Refused -----------------------------------------------------------------------------------------


def resnet(**changes) -> dict:
    weights = dict(checkpoint_of(build(spec_of("channel"))))
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del weights[key]
        else:
            weights[key] = value
    return weights


@pytest.mark.parametrize(
    "checkpoint, kwargs, message",
    [
        (dict(epoch=3), {}, "no weights are found"),
        ([1, 2], {}, "no weights are found.* got list"),
        (dict(a=torch.zeros(2)), {}, "no ResNet, RegNet or DenseNet"),
        (torchvision.models.vgg11, {}, "no ResNet, RegNet or DenseNet"),
        (dict(layer1__0__conv3__weight=None), {}, "another shape .* layer1.0.conv1.weight"),
        (dict(layer1__1__conv3__weight=None), {}, "block 1 of stage 1 has no conv3"),
        (torchvision.models.resnext50_32x4d, {}, "conv2 has groups"),
        (torchvision.models.wide_resnet50_2, {}, "wide ResNets have no dynamic form"),
        (dict(layer1__0__conv2__weight=None), {}, "block 0 of stage 1 has no conv2"),
        (
            dict(layer3__2__bn1__bias=None),
            {},
            "1 of 382 weights .* missing, e.g. layer3.2.bn1.bias",
        ),
        (dict(layer3__2__extra=torch.zeros(1)), {}, "no place in the network"),
        (
            dict(layer2__0__bn1__running_var=torch.full((8,), -1.0)),
            {},
            "negative variance, e.g. layer2.0.bn1.running_var",
        ),
        (
            dict(fc__bias=torch.full((1000,), torch.nan)),
            {},
            "1 of .* NaN.*, e.g. fc.bias",
        ),
        (dict(layer1__0__masker_spatial__conv__weight=torch.zeros(4, 4, 1, 1)), {}, "4 logits"),
        ({}, dict(granularity=4), "has no maskers of positions"),
        ({}, dict(spec=spec_of("both")), "missing"),
        ({}, dict(spec=spec_of("spatial")), "no place|missing"),
        ({}, dict(spec=spec_of("channel", channel_granularity=1)), "another shape"),
        ({}, dict(spec=spec_of("channel"), mode="channel"), "are the specification's"),
        ({}, dict(spec=[1]), "a specification is a dict"),
    ],
)
def test_refused(checkpoint, kwargs, message):
    if callable(checkpoint):
        with torch.device("meta"):
            checkpoint = checkpoint(weights=None).state_dict()
    elif not checkpoint or any("__" in key for key in checkpoint if isinstance(key, str)):
        checkpoint = resnet(**checkpoint)
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, **kwargs)


def test_unknown_regnets_are_refused():
    weights = LASRegNet("regnety_400mf", mode="static").state_dict()
    weights["layer1.0.conv2.weight"] = torch.zeros(48, 16, 3, 3)
    with pytest.raises(ValueError, match=r"no RegNetY .* stages of 1 x 48 \(groups of 16\)"):
        convert(weights)


def test_two_networks_are_refused():
    weights = resnet()
    both = {f"{name}.{key}": value for name in ("ema", "net2") for key, value in weights.items()}
    with pytest.raises(ValueError, match="several networks"):
        convert(both)


# The tool ----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(3)
    net = build(spec_of("channel"))
    weights = {f"module.{key}": value for key, value in checkpoint_of(net).items()}
    torch.save(dict(state_dict=weights, epoch=7), tmp_path / "source.pth")
    (tmp_path / "spec.json").write_text(json.dumps(dict(spec=spec_of("channel"), flops=1)))
    return tmp_path / "source.pth", net


def test_tool(source, tmp_path, capsys):
    path, net = source
    tool, out = load_tool("convert_checkpoint"), tmp_path / "out.pth"
    report = tmp_path / "report.json"
    tool.main([str(path), str(out), "--spec", str(tmp_path / "spec.json"), "--report", str(report)])
    printed = capsys.readouterr().out
    assert "384 keys used, 0 unused, 0 missing, 0 counters added" in printed
    assert 'prefix="backbone."' in printed and f"LAS_MM_PRETRAINED={out}" in printed
    account = json.loads(report.read_text())
    assert len(account["used"]) == len(net.state_dict()) and account["missing"] == []
    saved = torch.load(out, weights_only=True)
    backbone = saved["meta"]["backbone"]
    assert saved["meta"]["num_classes"] == 3

    init_cfg = dict(type="Pretrained", checkpoint=str(out), prefix="backbone.")
    initialised = MODELS.build(dict(backbone, init_cfg=init_cfg))
    initialised.init_weights()
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(initialised.state_dict()[key], value)

    head = dict(type="LinearClsHead", num_classes=3, in_channels=128)
    classifier = ImageClassifier(backbone, dict(type="GlobalAveragePooling"), head)
    load_checkpoint(classifier, str(out), strict=True)
    assert torch.equal(classifier.head.fc.weight, net.fc.weight)

    tool.main([str(path), str(out), "--bare"])
    assert "prefix" not in capsys.readouterr().out.lower().replace("pretrained_prefix", "")
    initialised = MODELS.build(dict(backbone, init_cfg=dict(init_cfg, prefix=None)))
    initialised.init_weights()
    assert torch.equal(initialised.conv1.weight, net.backbone.conv1.weight)


def test_tool_refuses(source, tmp_path, refused):
    path, _ = source
    tool = load_tool("convert_checkpoint")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "list.json").write_text("[1]")
    for arguments, message in [
        ([tmp_path / "lost.pth", tmp_path / "out.pth"], "lost.pth does not exist"),
        ([tmp_path / "other.pth", tmp_path / "out.pth"], "no ResNet, RegNet or DenseNet"),
        ([path, path], "would replace the source"),
        ([path, tmp_path], "is a folder"),
        ([path, tmp_path / "out.pth", "--spec", tmp_path / "lost.json"], "cannot be read"),
        ([path, tmp_path / "out.pth", "--spec", tmp_path / "list.json"], "must hold a JSON object"),
        ([path, tmp_path / "out.pth", "--granularity", 4], "no maskers of positions"),
    ]:
        assert message in refused(tool.main, [str(argument) for argument in arguments])
    assert not (tmp_path / "out.pth").exists()
