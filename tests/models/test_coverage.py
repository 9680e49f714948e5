"""The sparse path computes what the modules say, or does not run, whatever anyone puts in there."""

import types
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
import torch.multiprocessing
from mmcv.cnn import fuse_conv_bn
from torch import nn
from torch.utils import flop_counter

import las_mm
import needs
from las_mm import ops
from las_mm.bounded import Recent
from las_mm.models import (
    DynamicBottleneck,
    LASRegNet,
    LASResNet,
    collect_activations,
    coverage,
    plan,
    sparse,
)
from las_mm.models.coverage import is_channels_last
from las_mm.models.flops import flops_report, masker_macs
from las_mm.network.operator import GlobalPool, Pool, Scale

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
SMALL = dict(
    base_channels=8,
    stem_channels=8,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(0, 1),
)
MODES = {
    "spatial": dict(mode="spatial"),
    "channel": dict(mode="channel"),
    "channel before_norm": dict(mode="channel", channel_position="before_norm"),
    "both": dict(mode="both"),
    "layer": dict(mode="layer"),
    "static": dict(mode="static"),
}


def make(mode="spatial", cls=LASResNet, **kwargs):
    """A small network in eval mode that keeps some and drops some."""
    torch.manual_seed(0)
    if cls is LASRegNet:
        arch = dict(w0=16, wa=16, wm=2.0, group_w=8, depth=6, bot_mul=1.0, se_ratio=0.25)
        net = LASRegNet(arch, out_indices=(0, 1, 2, 3), **MODES[mode], **kwargs)
    else:
        small = dict(SMALL, granularity=(4, 2))
        net = LASResNet(50, **{**small, **MODES[mode], **kwargs})
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for masker in net.maskers():
        last = masker.conv if mode in ("spatial", "layer") else getattr(masker, "last", masker.conv)
        nn.init.normal_(last.weight, std=0.5)
        nn.init.zeros_(last.bias)
    return net.eval()


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Nothing is measured, or written to the user's folder."""

    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def images(*shape, seed=1):
    """(N or 1, 3, H, W) noise around another mean in every image and channel."""
    count, *size = shape if len(shape) == 3 else (1, *shape)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, *size, generator=generator)
    return noise + 2 * torch.randn(count, 3, 1, 1, generator=generator)


def run(net, x):
    """The outputs of the path that the network picks without gradients."""
    with torch.no_grad():
        return net(x)


def run_masked_dense(net, x):
    with sparse.masked_dense():
        return run(net, x)


def assert_close(actual, expected):
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-4 * e.abs().max().item())


def check(net, x=None, same_as=None):
    """Both paths agree; returns the outputs. ``same_as``: outputs that they must not equal."""
    x = images(2, 40, 48) if x is None else x
    expected, actual = run_masked_dense(net, x), run(net, x)
    assert_close(actual, expected)
    if same_as is not None:
        assert any((a - b).abs().max() > 1e-5 for a, b in zip(actual, same_as)), "no effect"
    return actual


def reasons(net):
    return {block.why_dense for block in net.blocks()} - {None}


# Anything replaced -------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Another module in the place of one; passes on what others read from it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args) * 1.5

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@contextmanager
def wrapped(parent, name):
    module = parent._modules[name]
    parent._modules[name] = Doubled(module)
    yield
    parent._modules[name] = module


@contextmanager
def subclassed(parent, name):
    module, cls = parent._modules[name], type(parent._modules[name])
    changed = {"forward": lambda self, *args: cls.forward(self, *args) * 1.5}
    module.__class__ = type("Other", (cls,), changed)
    yield
    module.__class__ = cls


@contextmanager
def method_replaced(parent, name):
    module, cls = parent._modules[name], type(parent._modules[name])
    module.forward = types.MethodType(lambda self, *args: cls.forward(self, *args) * 1.5, module)
    yield
    del module.forward


def places(net):
    """(parent, name) of modules of every kind that the sparse path might take over."""
    blocks = net.blocks()
    found = [(net, name) for name in ("conv1", "bn1", "relu", "maxpool") if name in net._modules]
    for block in (blocks[3 if len(blocks) > 6 else 2], blocks[4]):  # which keep something
        found += [(block, name) for name, child in block._modules.items() if child is not None]
        for child in ("downsample", "se"):
            inner = block._modules.get(child)
            found += [(inner, name) for name in inner._modules] if inner is not None else []
        for masker in block.maskers():
            found += [(masker, name) for name in masker._modules]
    stage = net.res_layers[1]
    return [*found, (getattr(net, stage), "0"), (net, stage)]


@pytest.mark.parametrize("how", [wrapped, subclassed, method_replaced])
@pytest.mark.parametrize(
    "mode, cls",
    [(mode, LASResNet) for mode in MODES] + [("both", LASRegNet), ("spatial", LASRegNet)],
)
def test_replaced_modules(mode, cls, how):
    """One after the other, after the sparse path ran, and put back."""
    net = make(mode, cls)
    before = check(net)
    for parent, name in places(net):
        masker = "masker" in name or parent in net.maskers()
        if how is wrapped and name == "masker":
            continue  # its own forward is called with more than features
        with how(parent, name):
            check(net, same_as=None if masker else before)
    assert_close(run(net, images(2, 40, 48)), before)
    assert not reasons(net)


@pytest.mark.parametrize(
    "name", ["_compute", "_excite", "_gated", "_forward", "_decide", "forward"]
)
@pytest.mark.parametrize("where", ["subclass", "instance", "class"])
@pytest.mark.parametrize("mode", ["spatial", "both"])
def test_overridden_methods(monkeypatch, mode, where, name):
    net = make(mode)
    before = check(net)
    block = net.layer2[1]
    original = getattr(DynamicBottleneck, name)

    def changed(self, *args):
        out = original(self, *args)
        if name != "_decide":
            return out * 1.5
        return tuple(None if mask is None else torch.ones_like(mask) for mask in out)

    if where == "subclass":
        block.__class__ = type("Mine", (DynamicBottleneck,), {name: changed})
    elif where == "instance":
        setattr(block, name, types.MethodType(changed, block))
    else:
        monkeypatch.setattr(DynamicBottleneck, name, changed)
    check(net, same_as=before)


def test_subclass_with_modules_of_its_own():
    """What the sparse path does not know is neither lost nor silent."""

    class Attentive(DynamicBottleneck):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.attention = nn.Conv2d(self.mid_channels, self.mid_channels, 1)

        def _excite(self, out, mask):
            return out * torch.sigmoid(self.attention(out))

    class Net(LASResNet):
        arch_settings = {50: (Attentive, (3, 4, 6, 3))}

    torch.manual_seed(0)
    net = Net(50, **SMALL).eval()
    check(net)
    assert all("Attentive" in reason and "_excite" in reason for reason in reasons(net))
    rows = las_mm.explain(net, images(40, 48)[0], quiet=True).blocks
    assert "masked-dense" in rows[1].choice and "_excite" in rows[1].choice


def test_subclass_that_changes_nothing_stays_sparse():
    class Mine(DynamicBottleneck):
        """Only a name, and how it is initialised."""

        def init_weights(self):
            super().init_weights()

    class Net(LASResNet):
        arch_settings = {50: (Mine, (3, 4, 6, 3))}

    net = Net(50, **SMALL).eval()
    check(net)
    assert not reasons(net)


def test_a_child_beside_the_known_ones():
    net = make()
    net.layer2[1].extra = nn.Linear(1, 1)
    check(net)
    assert "extra" in net.layer2[1].why_dense and net.layer2[0].why_dense is None


@pytest.mark.parametrize(
    "change",
    [
        dict(maxpool=nn.AvgPool2d(3, 2, 1)),
        dict(maxpool=nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        dict(maxpool=nn.MaxPool2d(3, 2, 1, dilation=1), keeps=True),
        dict(maxpool=nn.MaxPool2d((3, 3), (2, 2), (1, 1)), keeps=True),
        dict(maxpool=nn.Sequential()),
        dict(maxpool=nn.Identity()),
        dict(relu=nn.GELU()),
        dict(conv1=nn.Conv2d(3, 8, 7, 2, 3, padding_mode="reflect", bias=False)),
        dict(conv1=nn.Conv2d(3, 8, 5, 2, 2)),
    ],
)
def test_another_stem(change):
    net = make()
    run(net, images(2, 40, 48))
    change = dict(change)
    keeps = change.pop("keeps", False)
    for name, module in change.items():
        setattr(net, name, module)
    check(net)
    assert (net._stem_executor is not None) == keeps


def test_another_forward_of_the_network():
    class Mine(LASResNet):
        def forward(self, x):
            return tuple(out + 1 for out in super().forward(x * 2))

    net = make()
    net.__class__ = Mine
    check(net)
    assert not reasons(net)


def test_a_replaced_forward_of_the_static_parent(monkeypatch):
    from mmpretrain.models.backbones import ResNet

    original, net = ResNet.forward, make()
    before = check(net)
    monkeypatch.setattr(ResNet, "forward", lambda self, x: tuple(o * 2 for o in original(self, x)))
    check(net, same_as=before)
    assert las_mm.explain(net, images(40, 48)[0], quiet=True).blocks[0].measured_ms is None


def test_negative_values_are_not_taken_for_those_of_a_relu():
    net = make()
    for block in net.blocks()[3:5]:
        block.relu = nn.GELU()
    check(net)
    assert "GELU" in net.blocks()[3].why_dense


class Plain(nn.Module):
    """A module that knows nothing of las_mm, and only NCHW."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x):
        n, c, h, w = x.shape
        return x + (x.view(n, c, h * w).flip(2) * self.scale[:, None]).view(n, c, h, w)


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_modules_inside_a_stage(channels_last):
    net = make()
    run(net, images(2, 40, 48))
    net.layer1.append(nn.Conv2d(32, 32, 3, padding=1))
    net.layer2.insert(1, nn.Identity() if channels_last else Plain(64))
    net.layer1 = nn.Sequential(nn.Sequential(net.layer1))
    net.layer2 = nn.Sequential(net.layer2, nn.BatchNorm2d(64).eval())
    x = images(2, 40, 48)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(net, x)
    assert not reasons(net) and len(net.blocks()) == 7
    rows = las_mm.explain(net, x, quiet=True).blocks
    assert len(rows) == 1 + 7 + 3 and all(row.measured_ms is not None for row in rows)
    assert [row.choice for row in rows].count("as it is: no block of las_mm") == 3
    assert len(collect_activations(net).rates) == 7


def test_a_stage_with_a_forward_of_its_own_compiles():
    torch._dynamo.reset()
    net, x = make(), images(2, 40, 48)
    before = run(net, x)
    cls = type(net.layer2)
    net.layer2.forward = types.MethodType(lambda self, x: cls.forward(self, x) * 2, net.layer2)
    compiled = torch.compile(las_mm.prepare(net), backend="eager")
    actual = run(compiled, x)
    assert_close(actual, run_masked_dense(net, x))
    assert_close(actual[:1], before[:1])
    assert (actual[1] - before[1]).abs().max() > 1e-3


def test_a_stage_of_an_unknown_kind():
    class Stage(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.blocks = stage

        def forward(self, x):
            return self.blocks(x) * 2

    net = make()
    net.layer2 = Stage(net.layer2)
    check(net)
    rows = {row.name: row for row in las_mm.explain(net, images(40, 48)[0], quiet=True).blocks}
    assert rows["layer2.blocks.0"].measured_ms is None and "Stage" in " ".join(rows)


# Folded norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", [{}, dict(deep_stem=True, avg_down=True)])
@pytest.mark.parametrize("mode", MODES)
def test_fused_norms(mode, stem):
    net = make(mode, **stem)
    before = check(net)
    fuse_conv_bn(net)
    assert isinstance(net.layer2[0].bn1, nn.Identity)
    after = check(net)
    assert_close(after, before)
    assert not reasons(net) and (net._stem_executor is None) == bool(stem)


def test_fused_norms_of_a_regnet():
    net = make("both", LASRegNet)
    before = check(net)
    fuse_conv_bn(net)
    assert_close(check(net), before)
    assert not reasons(net)


# Memory formats ----------------------------------------------------------------------------------


def inputs():
    wide = torch.randn(2, 4, 70, 80)
    last = wide.contiguous(memory_format=torch.channels_last)
    return {
        "NCHW": wide[:, :3].contiguous(),
        "channels_last": last[:, :3].contiguous(memory_format=torch.channels_last),
        "one channel": wide[:, :1].contiguous(),
        "one channel channels_last": wide[:, :1].contiguous(memory_format=torch.channels_last),
        "cropped": wide[:, :3, 3:50, 5:70],
        "cropped channels_last": last[:, :3, 3:50, 5:70],
        "one image": wide[:1, :3],
        "expanded": wide[:1, :3].expand(3, -1, -1, -1),
        "expanded channels_last": last[:1, :3].expand(3, -1, -1, -1),
        "transposed": wide[:, :3].transpose(2, 3),
        "one pixel": wide[:, :3, :1, :1].contiguous(),
        "one row": wide[:, :3, :1].contiguous(),
        "one pixel at the end": wide[:, :3, :8, :8].contiguous(),
        "one pixel at the end, channels_last": last[:, :3, :8, :8].clone(),
        "one column channels_last": last[:, :3, :, :1].contiguous(
            memory_format=torch.channels_last
        ),
    }


@pytest.mark.parametrize("weights", ["NCHW", "channels_last", "one"])
@pytest.mark.parametrize("mode", ["spatial", "channel"])
def test_outputs_have_the_format_of_dense_convolutions(mode, weights):
    for name, x in inputs().items():
        net = make(mode, in_channels=x.shape[1], deep_stem=mode == "channel")
        if weights == "channels_last":
            net.to(memory_format=torch.channels_last)
        elif weights == "one":
            net.layer2[1].conv2.to(memory_format=torch.channels_last)
        expected, actual = run_masked_dense(net, x), run(net, x)
        assert_close(actual, expected)
        assert not reasons(net)
        for a, e in zip(actual, expected):
            assert is_channels_last(a) == is_channels_last(e), name
            if (name, weights) != ("one row", "one"):  # there torch mixes the two formats
                assert a.stride() == e.stride(), name
        block = net.layer2[1]
        features = torch.rand(2, 64, 6, 7)
        with torch.no_grad(), sparse.masked_dense():
            stride = block(features).stride()
        with torch.no_grad():
            assert block(features).stride() == stride


# What is switched --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["spatial", "channel", "both", "layer"])
def test_maskers_that_sample_in_eval_mode(mode):
    net, x = make(mode), images(2, 40, 48)
    run(net, x)
    for masker in net.maskers():
        masker.train()
    with torch.no_grad():
        torch.manual_seed(3)
        actual = net(x)
        torch.manual_seed(3)
        with sparse.masked_dense():
            expected = net(x)
        torch.manual_seed(4)
        other = net(x)
    assert_close(actual, expected)
    assert any((a - o).abs().max() > 1e-3 for a, o in zip(actual, other))
    assert "training mode" in net.layer2[1].why_dense


def test_drop_path_in_training_mode():
    net, x = make(drop_path_rate=0.5), images(2, 40, 48)
    check(net, x)
    assert not reasons(net)
    for block in net.blocks():
        block.drop_path.train()
    with torch.no_grad():
        torch.manual_seed(3)
        actual = net(x)
        torch.manual_seed(3)
        with sparse.masked_dense():
            expected = net(x)
    assert_close(actual, expected)
    assert any("DropPath" in reason for reason in reasons(net))


def test_other_settings_change_what_is_counted():
    net, x = make(), images(2, 40, 48)
    check(net, x)
    for block in net.layer2:
        block.granularity = 8
    net.layer1[0].make_dynamic(net.layer1[0].settings.__class__(mode="static"))
    net.layer1[0].eval()
    check(net, x)
    shape = net.network_shape((40, 48))
    assert [b.granularity for b in shape.blocks if b.stage == 2] == [8] * 4
    assert shape.blocks[0].mode == "static" and net.granularity[1] == [8] * 4
    assert "S=8" in repr(net) and net.settings[0][0].mode == "static"
    assert collect_activations(net).shape is shape  # made once
    for size in range(40, 140):
        net.network_shape((size, size))
    assert len(net._shapes) <= 64


def test_recent_forgets_the_oldest():
    recent = Recent(2)
    made = []
    for key in (1, 2, 1, 3, 2):
        recent.get(key, lambda key=key: made.append(key))
    assert made == [1, 2, 3, 2] and len(recent) == 2


def test_recent_makes_anew_what_another_thread_drops():
    class Dropping(OrderedDict):
        def __contains__(self, key):
            there = super().__contains__(key)
            self.clear()
            return there

        def move_to_end(self, key, last=True):
            self.clear()
            super().move_to_end(key, last)

    recent = Recent(2)
    recent.get(1, lambda: "first")
    recent._values = Dropping(recent._values)
    assert recent.get(1, lambda: "second") == "second"


def test_dynamically_quantised_maskers():
    for mode in ("channel", "both"):
        net = make(mode)
        net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        assert type(net.layer2[1].masker_channel.last) is not nn.Linear
        check(net)
        assert not reasons(net)


# Other processes ---------------------------------------------------------------------------------


def keep(queue, done):
    x = queue.get()
    first = x.clone()
    done.wait(60)
    assert torch.equal(x, first), "another forward wrote over it"


def test_a_map_in_another_process_stays_as_it_is():
    net, context = make(), torch.multiprocessing.get_context("fork")
    queue, done = context.SimpleQueue(), context.Event()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no worker threads
    try:
        child = context.Process(target=keep, args=(queue, done))
        child.start()
        with torch.no_grad():
            queue.put(net(images(2, 40, 48))[0])
            while not queue.empty():
                pass
            for seed in range(20):
                net(images(2, 40, 48, seed=seed))
        done.set()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)


def test_memory_that_moved_is_not_used_again():
    net = make()
    with torch.no_grad():
        out = net(images(2, 40, 48))[0]
        shared = out.share_memory_().untyped_storage()._share_filename_cpu_()
        del out
        reopened = torch.UntypedStorage._new_shared_filename_cpu(*shared)
        before = bytes(reopened.tolist()[:4096])
        for seed in range(20):
            net(images(2, 40, 48, seed=seed))
    assert bytes(reopened.tolist()[:4096]) == before


# Channels of the image, FLOPs --------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_channels(channels):
    net = make(in_channels=channels)
    x = torch.randn(1, channels, 40, 48)
    check(net, x)
    rows = las_mm.explain(net, x[0], quiet=True).blocks
    assert len(rows) == 8
    with pytest.raises(ValueError, match=f"the {channels} channels"):
        las_mm.explain(net, torch.randn(3, 40, 48))
    report = las_mm.latency.predict(net, "v100", (1, channels, 40, 48), rates=0.5)
    assert report.latency_s > 0
    with pytest.raises(ValueError, match=f"the {channels} channels"):
        las_mm.latency.predict(net, "v100", (1, 3, 40, 48), rates=0.5)


NO_PRODUCTS = (GlobalPool, Pool, Scale)  # what torch's counter takes no notice of


@needs.FLOPS
@pytest.mark.parametrize(
    "mode, cls",
    [(mode, LASResNet) for mode in MODES] + [("both", LASRegNet), ("spatial", LASRegNet)],
)
def test_flop_counter(mode, cls):
    net, x = make(mode, cls), images(3, 40, 48)
    run(net, x)
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        net(x)
    activation = collect_activations(net)
    macs = float(flops_report(activation).dynamic) * len(x)
    shape = activation.shape
    others = [op for block in shape.blocks for op in block.operators if not op.masker]
    others = [op.macs() for op in (*shape.stem, *others) if isinstance(op, NO_PRODUCTS)]
    others = (sum(others) + sum(map(masker_macs, shape.blocks))) * len(x)
    assert macs - others <= counter.get_total_flops() / 2 <= macs * 1.001
    assert not reasons(net) and ops.has_kernels("cpu")


def test_an_attribute_that_another_thread_sets_while_a_module_is_checked():
    class Setting(type):
        """Stands for the thread: is asked in the middle of the check."""

        def __getattr__(cls, name):
            module.__dict__["input_hw"] = (1, 1)
            raise AttributeError(name)

    class Module(nn.Module, metaclass=Setting):
        pass

    module = Module()
    module.__dict__["late"] = print
    coverage.check_plain(module, "it", Module)
    assert module.input_hw == (1, 1)
