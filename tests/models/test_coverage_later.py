"""What is changed after the sparse path ran, on one module or on all of them, is heard."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.utils.prune
from mmcv.cnn import fuse_conv_bn
from test_coverage import (
    assert_close,
    check,
    images,
    make,
    no_measuring,  # noqa: F401 (a fixture)
    reasons,
    run,
    run_masked_dense,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

import las_mm
from las_mm import ops
from las_mm.models import collect_activations, sparse
from las_mm.models.flops import flops_report
from las_mm.models.maskers import SpatialMasker
from las_mm.models.snapshot import Snapshot

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


def dilate(net):
    net.layer2[1].conv2.dilation = net.layer2[1].conv2.padding = (2, 2)


def pad_with(conv):
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [conv.padding[0]] * 4


def patch_conv(conv):
    """As tricks do that make pictures tile."""
    conv._conv_forward = functools.partial(type(conv)._conv_forward, conv)
    conv._conv_forward = lambda x, w, b, forward=conv._conv_forward: forward(x, w * 1.5, b)


def untracked(net):
    """A weight that is a plain attribute, and written to."""
    conv = net.layer2[1].conv2
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight
    check(net)
    conv.weight.mul_(1.5)


def grown(net):
    """A child in a place that was empty."""
    net.layer2[1].downsample = nn.Identity()
    net.layer2[1].downsample = None
    check(net)
    net.layer2[1].downsample = nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)).eval()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda net: setattr(net.layer2[1].bn2, "eps", 1.0), None),
        (lambda net: setattr(net.bn1, "eps", 1.0), None),
        (dilate, "conv2 has padding"),
        (lambda net: pad_with(net.layer2[1].conv2), "padding_mode circular"),
        (lambda net: pad_with(net.conv1), None),
        (lambda net: patch_conv(net.layer2[1].conv2), "conv2 had its _conv_forward replaced"),
        (lambda net: patch_conv(net.conv1), None),
        (lambda net: setattr(net.maxpool, "ceil_mode", True), None),
        (lambda net: setattr(net.maxpool, "padding", 0), None),
        (untracked, "neither a parameter nor a buffer"),
        (grown, None),
    ],
)
def test_settings_of_layers(change, reason):
    net = make()
    before = check(net)
    change(net)
    resized = run_masked_dense(net, images(2, 40, 48))[0].shape != before[0].shape
    check(net, same_as=None if resized else before)
    assert reason is None and not reasons(net) or any(reason in said for said in reasons(net))


@pytest.mark.parametrize("name", ["logits", "decide", "hard"])
@pytest.mark.parametrize("mode", ["spatial", "channel", "both"])
def test_methods_of_maskers(mode, name):
    net = make(mode)
    before = check(net)
    for masker in net.maskers():
        method = getattr(masker, name)
        # Decisions are turned round, or one more than wanted is told.
        change = (lambda out: 1 - out) if name != "logits" else (lambda out: -out)
        setattr(masker, name, lambda *args, f=method, change=change: change(f(*args)))
    check(net, same_as=before)
    assert all(f"had its {name} replaced" in said for said in reasons(net))


@pytest.mark.parametrize(
    "cls, name",
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.ReLU, "forward"),
        (nn.MaxPool2d, "forward"),
        (_BatchNorm, "forward"),
        (nn.Sequential, "forward"),
        (nn.Module, "__call__"),
        (SpatialMasker, "logits"),
    ],
)
def test_classes_patched_after_import(monkeypatch, cls, name):
    net = make()
    before, method = check(net), getattr(cls, name)

    def changed(self, *args, **kwargs):
        out = method(self, *args, **kwargs)
        return out * -1.5 if isinstance(out, torch.Tensor) else out

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, changed)
        check(net, same_as=before)
        with pytest.raises(ValueError, match=rf"\.{name} has been replaced"):
            las_mm.explain(net, images(40, 48)[0], quiet=True)
    assert_close(check(net), before)


@pytest.mark.parametrize("before_it", [False, True])
def test_hooks_of_every_module(before_it):
    net = make()
    before = check(net)
    if before_it:
        hook = register_module_forward_pre_hook(
            lambda module, args: (args[0] * 1.5,) if isinstance(module, nn.Conv2d) else None
        )
    else:
        hook = register_module_forward_hook(
            lambda module, _, out: out * 1.5 if isinstance(module, nn.Conv2d) else None
        )
    try:
        check(net, same_as=before)
    finally:
        hook.remove()
    assert_close(check(net), before)


def test_pruned_weights():
    net = make()
    before = check(net)
    torch.nn.utils.prune.l1_unstructured(net.layer2[1].conv2, "weight", 0.9)
    check(net, same_as=before)
    torch.nn.utils.prune.remove(net.layer2[1].conv2, "weight")
    check(net, same_as=before)
    assert not reasons(net)


@pytest.mark.parametrize("mode", ["static", "both"])
def test_forward_mode_differentiation(mode):
    net, x = make(mode), images(2, 40, 48)
    with torch.no_grad():
        net(x)
        _, tangents = torch.func.jvp(net, (x,), (torch.ones_like(x),))
        with sparse.masked_dense():
            _, expected = torch.func.jvp(net, (x,), (torch.ones_like(x),))
        assert_close(tangents, expected)
        with forward_ad.dual_level():
            out = net(forward_ad.make_dual(x, torch.ones_like(x)))[1]
            assert_close([forward_ad.unpack_dual(out).tangent], expected[1:])
    assert expected[1].abs().max() > 0


def test_vmap():
    net, x = make("static"), images(2, 40, 48)
    expected = run(net, x)
    with torch.no_grad():
        actual = torch.func.vmap(lambda image: tuple(out[0] for out in net(image[None])))(x)
    assert_close(actual, expected)


@pytest.mark.parametrize("mode", ["spatial", "both"])
def test_tensors_without_contents(mode):
    net, x = make(mode), images(2, 40, 48)
    shapes = [out.shape for out in run(net, x)]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert [out.shape for out in run(net, fake.from_tensor(x))] == shapes
    check(net, x)
    assert [out.shape for out in run(net.to("meta"), x.to("meta"))] == shapes


def test_nothing_is_packed_again_without_need(monkeypatch):
    made = []
    original = Snapshot.__init__
    net = make("both")
    check(net)
    monkeypatch.setattr(
        Snapshot, "__init__", lambda self, *args, **kw: (made.append(self), original(self, *args))
    )
    for masker in net.maskers():
        masker.temperature, masker.offset = 0.5, None
    for size in (40, 48), (64, 64):
        run(net, images(*size))
        run_masked_dense(net, images(*size))
    assert not made


# What the network says of itself -----------------------------------------------------------------


def small_images(net):
    net.conv1, net.maxpool = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Identity()


@pytest.mark.parametrize(
    "change, stem, size",
    [
        (lambda net: None, ["stem.conv1", "stem.maxpool"], (10, 12)),
        (small_images, ["stem.conv1"], (40, 48)),
        (lambda net: setattr(net, "maxpool", nn.Sequential()), ["stem.conv1"], (20, 24)),
        (
            lambda net: setattr(net, "maxpool", nn.AvgPool2d(2)),
            ["stem.conv1", "stem.pool"],
            (10, 12),
        ),
        (
            lambda net: setattr(net.maxpool, "padding", 0),
            ["stem.conv1", "stem.maxpool"],
            (9, 11),
        ),
        (
            lambda net: setattr(
                net, "conv1", nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(), nn.Conv2d(4, 8, 5))
            ),
            ["stem.conv1", "stem.conv2", "stem.maxpool"],
            (18, 22),
        ),
    ],
)
@pytest.mark.parametrize("runtime", ["auto", "dense"])
def test_the_shape_of_another_stem(change, stem, size, runtime):
    net = make("both")
    net.runtime = runtime
    check(net)
    assert collect_activations(net).shape.blocks[0].h_in == 10
    change(net)
    check(net)
    shape = collect_activations(net).shape
    assert [part.name for part in shape.stem] == stem
    first = net.blocks()[0]
    assert (shape.blocks[0].h_in, shape.blocks[0].w_in) == first.input_hw == size
    assert first.activation.mask.shape[2:] == tuple(-(-n // first.granularity) for n in size)
    assert flops_report(collect_activations(net)).dynamic > 0


def test_a_stem_that_nobody_can_describe():
    net = make()
    for part in (nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, (3, 1)), nn.Upsample(None, 2)):
        net.maxpool = part
        check(net)
        with pytest.raises(ValueError, match=f"the stem's {type(part).__name__}.* is no module"):
            collect_activations(net)


@pytest.mark.parametrize("training", [False, True])
def test_a_module_that_changes_sizes_between_blocks(training):
    net = make("channel").train(training)
    net.layer1.append(nn.AvgPool2d(2))
    x = images(2, 40, 48)
    net(x) if training else check(net, x)
    with pytest.raises(RuntimeError, match=r"layer2\.0 got features of 5x6, .* make 10x12"):
        collect_activations(net)


def test_a_deep_stem_is_described_after_fusing():
    net = make(deep_stem=True)
    before = net.network_shape((40, 48))
    assert [part.name for part in before.stem][-2:] == ["stem.conv3", "stem.maxpool"]
    fuse_conv_bn(net)
    assert net.network_shape((40, 48)) == before
    net.stem = nn.Conv2d(3, 8, 4, 4)
    run(net, images(1, 40, 48))
    assert collect_activations(net).shape.stem[0].kernel == 4
