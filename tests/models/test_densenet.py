"""DenseNets: the static network is mmpretrain's and torchvision's; skipped positions are zero."""

import pytest
import torch
import torchvision
from families import TINY, assert_close, dense, images, make, run
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmpretrain.models.backbones import DenseNet
from torch import nn

import las_mm
from las_mm import ops
from las_mm.benchmark.subject import randomize
from las_mm.models import LASDenseNet, LASResNet, collect_activations, released, sparse
from las_mm.registry import MODELS


@pytest.mark.parametrize("mode", ["static", "spatial", "layer"])
def test_torchvision_weights_give_torchvisions_features(mode):
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121(weights=None).eval()
    randomize(theirs)
    net = LASDenseNet("121", mode=mode).eval()
    missing, unexpected = net.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all("masker" in key for key in missing)
    x = images(2, 64, 96)
    with torch.no_grad():
        expected = [theirs.features(x).relu()]
        with sparse.masked_dense():
            assert_close(net(x), expected, 1e-5)
        assert_close(net(x), expected, 1e-4)
    assert collect_activations(net).rates.min() == 1


@pytest.mark.parametrize("arch", ["121", "161", "169", "201"])
def test_architectures_are_torchvisions(monkeypatch, arch):
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"densenet{arch}")(weights=None).state_dict()
        net = LASDenseNet(arch, mode="static")
    shapes = [v.shape for k, v in theirs.items() if not k.startswith("classifier")]
    assert sorted(shapes) == sorted(v.shape for v in net.state_dict().values())
    blocks = net.network_shape((224, 224)).blocks
    assert (blocks[-1].h_in, blocks[-1].w_in) == (7, 7)


def test_checkpoints_load_through_mmengine():
    theirs = torchvision.models.densenet121(weights=None)
    classifier = nn.ModuleDict(dict(backbone=LASDenseNet("121", mode="static")))
    weights = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    _load_checkpoint_to_model(classifier, weights)
    actual = classifier.backbone.stages[2].block[3].conv2.weight
    assert torch.equal(actual, theirs.features.denseblock3.denselayer4.conv2.weight)


def test_the_static_network_is_mmpretrains():
    net, theirs = dense(mode="static"), DenseNet(arch=TINY, out_indices=(0, 1, 2, 3))
    assert list(theirs.state_dict()) == list(net.state_dict())
    randomize(net)
    theirs.load_state_dict(net.state_dict())
    theirs.eval()
    x = images(2, 45, 70)
    with torch.no_grad(), sparse.masked_dense():
        assert_close(net.eval()(x), theirs(x), 1e-6)


@pytest.mark.parametrize("mode", ["spatial", "layer"])
def test_what_is_skipped_contributes_zeros(mode):
    net, x = make("dense", mode=mode), torch.randn(2, 24, 12, 12)
    layer = net.stages[0].block[1]
    decisions = torch.zeros(2, 1, *((3, 3) if mode == "spatial" else (1, 1)))
    decisions[0, :, :1] = 1
    layer.masker.offset = torch.where(decisions > 0, torch.inf, -torch.inf)
    for context in (sparse.masked_dense(), torch.no_grad()):
        with context, torch.no_grad():
            out = layer(x)
        assert not out[1].any() and out[0, :, :4].any()
        assert mode == "layer" or not out[0, :, 4:].any()


def test_drop_rate_and_frozen_stages():
    net = dense(drop_rate=0.5, frozen_stages=2).train()
    outs = net(images(2, 64, 64))
    outs[3].sum().backward()
    assert net.stages[1].block[0].conv1.weight.grad is None
    assert net.stages[2].block[0].conv1.weight.grad is not None


def test_built_from_configs_of_mmpretrain_and_mmdet():
    backbone = dict(type="las_mm.LASDenseNet", arch=TINY)
    classifier = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=backbone,
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=34),
        )
    ).eval()
    with torch.no_grad():
        (pooled,) = classifier.extract_feat(images(2, 64, 64))
        assert pooled.shape == (2, 34) and classifier.head((pooled,)).shape == (2, 5)
    pytest.importorskip("mmdet.models")
    neck = MODELS.build(
        dict(type="mmdet.FPN", in_channels=[16, 20, 18, 34], out_channels=8, num_outs=5)
    )
    net = MODELS.build(dict(backbone, out_indices=(0, 1, 2, 3))).eval()
    levels = neck(run(net, images(1, 64, 96))[0])
    assert [tuple(v.shape[2:]) for v in levels] == [(8, 12), (4, 6), (2, 3), (2, 3), (1, 2)]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(arch="122"), ["arch", "122", "121"]),
        (dict(mode="channel"), ["mode", "channel", "spatial"]),
        (dict(granularity=(4, 4)), ["granularity", "4"]),
        (dict(out_indices=(4,)), ["out_indices", "4"]),
        (dict(frozen_stages=5), ["frozen_stages", "5"]),
        (dict(arch={"depths": [1]}), ["arch", "growth_rate"]),
    ],
)
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        LASDenseNet(**{"arch": "121", **kwargs})
    assert all(word in str(error.value) for word in words)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="memory_eficient.*memory_efficient"):
        LASDenseNet("121", memory_eficient=True)
    with pytest.raises(TypeError, match="base_chanels"):
        LASResNet(18, base_chanels=8)


def test_norm_eval_is_not_about_maskers():
    net = dense(norm_eval=True, frozen_stages=1).train()
    norms = {n: m.training for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms and not any(norms.values())
    assert all(masker.training for masker in net.stages[1].block[0].maskers())
    assert any(m.training for m in dense().train().modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.skipif(not ops.has_block_kernels("cpu"), reason="NATIVE OPS NOT BUILT")
def test_explain_tells_transitions_from_layers():
    net = make("dense")
    explanation = las_mm.explain(net, images(1, 64, 64), quiet=True)
    rows = {row.name.split()[0]: row.choice for row in explanation.blocks}
    assert [rows[f"transitions.{i}"].split(":")[0] for i in range(4)] == ["packed"] * 3 + [
        "as it is"
    ]
    assert list(rows)[:4] == ["stem", "stages.0.block.0", "stages.0.block.1", "transitions.0"]
    nn.init.ones_(net.transitions[1].norm.weight)
    net.transitions[1].act = nn.GELU()
    explanation = las_mm.explain(net, images(1, 64, 64), quiet=True)
    rows = {row.name.split()[0]: row.choice for row in explanation.blocks}
    assert rows["transitions.1"].startswith("as it is") and rows["transitions.0"] == "packed"


def test_a_static_checkpoint_is_a_released_network():
    theirs = torchvision.models.densenet121(weights=None).eval()
    randomize(theirs)
    net, x = released.load(theirs.state_dict()), images(1, 64, 64)
    with torch.no_grad():
        logits, features = net(x)
        torch.testing.assert_close(logits, theirs(x), rtol=1e-3, atol=1e-3)
    assert len(features) == 4 and net.flops_percentages().min() == 1
