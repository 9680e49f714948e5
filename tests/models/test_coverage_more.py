"""Faults that users found in "exact, or says why not": each was silent, or a crash, once."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from mmengine.model.utils import _BatchNormXd
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
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import las_mm
import needs
from las_mm import ops
from las_mm.models import plan
from las_mm.models.interception import foreign, obstacle
from las_mm.models.maskers import SpatialMasker
from las_mm.models.settings import BlockSettings

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


# Tensors that are read in another way ------------------------------------------------------------


def transposed(parameter):
    parameter.data = parameter.data.transpose(-1, -2)


@pytest.mark.parametrize(
    "name, change",
    [
        ("conv1.weight", transposed),
        ("layer2.1.conv2.weight", transposed),
        ("layer2.1.conv2.weight", lambda p: setattr(p, "data", p.data.permute(1, 0, 2, 3))),
        ("layer1.1.conv2.weight", lambda p: setattr(p, "data", p.data.clone().flip(0))),
    ],
)
@pytest.mark.parametrize("prepare", [False, True])
def test_strides_of_weights(name, change, prepare):
    net = make("static")
    before = check(net)
    change(net.get_parameter(name))
    if prepare:
        las_mm.prepare(net)
    check(net, same_as=before)
    assert not reasons(net)


def test_strides_of_an_excitation():
    from las_mm.models import LASRegNet

    net = make("static", LASRegNet)
    before = check(net)
    for block in net.blocks():
        weight = block.se.fc1.weight
        weight.data = weight.data.as_strided(weight.shape, (1, len(weight), 1, 1))
    check(net, same_as=before)
    assert not reasons(net)


# Settings of blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, name, value, message",
    [
        ("spatial", "mode", "static", r"mode cannot become 'static'.*make_dynamic"),
        ("spatial", "mode", "channel", "mode cannot become 'channel'"),
        ("both", "mode", "layer", "mode cannot become 'layer'"),
        ("static", "mode", "spatial", "mode cannot become 'spatial'"),
        ("spatial", "mode", "foo", "mode must be one of static, .* got 'foo'"),
        ("both", "channel_position", "before_norms", "channel_position must be one of"),
        ("both", "channel_granularity", 4, "groups of 2 channels.*make_dynamic"),
        ("both", "channel_granularity", 3, "groups of 2 channels.*make_dynamic"),
        ("spatial", "granularity", 2.0, "granularity must be a positive integer.*got 2.0"),
        ("spatial", "granularity", "4", "granularity must be a positive integer.*got '4'"),
        ("spatial", "granularity", None, "granularity must be a positive integer.*got None"),
        ("spatial", "granularity", 10**9, "granularity must be at most 1024.*mode='layer'"),
        ("spatial", "runtime", "junk", "runtime must be one of auto, sparse, dense, got 'junk'"),
    ],
)
def test_settings_that_do_not_fit(mode, name, value, message):
    net = make(mode)
    before = check(net)
    with pytest.raises(ValueError, match=message):
        setattr(net.layer2[1], name, value)
    assert_close(check(net), before)


def test_settings_that_fit():
    net = make("both")
    before = check(net)
    block = net.layer2[1]
    block.channel_position = "before_norm"
    check(net, same_as=before)
    block.make_dynamic(BlockSettings(mode="channel", channel_granularity=4))
    block.eval()
    block.granularity, block.channel_granularity = 8, 4
    check(net)
    net = make("spatial")
    net.layer2[1].mode = "layer"
    check(net)
    assert not reasons(net) and "mode=layer" in repr(net.layer2[1])


def test_other_names_of_norms():
    net = make("static")
    before = check(net)
    net.layer2[1].norm1_name = "bn2"
    check(net, same_as=before)
    net.add_module("other", copy.deepcopy(net.bn1))
    net.other.bias.data.add_(1)
    net.norm1_name = "other"
    check(net)


# Interception below modules ----------------------------------------------------------------------


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 1.5 if function is F.conv2d else out


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        return out * 1.5 if operation is torch.ops.aten.convolution.default else out


@pytest.mark.parametrize("mode", [Functions, Operations])
def test_modes(mode):
    net = make("both")
    before = check(net)
    with mode():
        check(net, same_as=before)
        with pytest.raises(ValueError, match=f"a {mode.__name__} is at work"):
            las_mm.explain(net, images(40, 48)[0], quiet=True)
    assert_close(check(net), before)


@pytest.mark.parametrize(
    "owner, name",
    [(F, name) for name in ("conv2d", "batch_norm", "relu", "max_pool2d", "linear")]
    + [(torch, "conv2d"), (torch, "addcmul")],
)
def test_patched_functions(monkeypatch, owner, name):
    net, original = make("both"), getattr(owner, name)
    before = check(net)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * -1.5)
        check(net)
        assert f"{name} has been replaced" in obstacle(images(40, 48))
    assert_close(check(net), before)


class Loud(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs)
        return out * 1.5 if function is F.conv2d else out


class Quiet(torch.Tensor):
    pass


def test_kinds_of_tensors():
    net = make("both")
    x = images(2, 40, 48)
    before = check(net, x)
    check(net, x.as_subclass(Loud), same_as=before)
    assert "its input is a Loud" in obstacle(x.as_subclass(Loud))
    for same in (x.as_subclass(Quiet), nn.Parameter(x)):
        assert obstacle(same) is None
        assert_close(check(net, same), before)


def test_a_kind_of_tensor_from_a_module_in_between():
    class Between(nn.Module):
        def forward(self, x):
            return x.as_subclass(Loud)

    net = make("static")
    net.layer1.append(Between())
    check(net)


def test_images_of_torchvision():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    net, x = make("both"), images(2, 40, 48)
    image = tv_tensors.Image(x)
    assert foreign(image) is None
    assert_close(check(net, image), check(net, x))


def test_modes_that_change_nothing():
    net, x = make("both"), images(2, 40, 48)
    before = check(net, x)
    with torch.device("cpu"):
        assert obstacle(x) is None
        assert_close(check(make("both"), x), before)
    with flop_counter.FlopCounterMode(display=False):
        assert obstacle(x) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert obstacle(x) is None
    with torch.device("meta"):
        assert_close(run(net, x), before)
        net.layer2[1].bn1.eps = 1e-3
        assert net.layer2[1].stale()
        run(net, x)
    check(net, x)


# Norms -------------------------------------------------------------------------------------------


def norm_like(cls, norm):
    other = cls(norm.num_features).eval()
    other.load_state_dict(norm.state_dict())
    return other


def scaled(self, x):
    x.mul_(1.5)


@pytest.mark.parametrize(
    "cls",
    [
        type("Mine", (nn.BatchNorm2d,), {"__call__": lambda self, x: self.forward(x) * 1.5}),
        type("Mine", (nn.BatchNorm2d,), {"_check_input_dim": scaled}),
        type("Mine", (nn.BatchNorm2d,), {"forward": lambda self, x: x * 1.5}),
        type("Mine", (nn.BatchNorm2d,), {"eps": property(lambda self: 1.0, lambda self, v: None)}),
    ],
)
def test_norms_of_other_classes(cls):
    net = make("static")
    before = check(net)
    net.layer2[1].bn1 = norm_like(cls, net.layer2[1].bn1)
    check(net, same_as=before)
    assert "Mine" in net.layer2[1].why_dense


@pytest.mark.parametrize(
    "cls", [nn.SyncBatchNorm, _BatchNormXd, type("Mine", (nn.BatchNorm2d,), {"__doc__": "Mine"})]
)
def test_norms_that_compute_the_same(cls):
    net = make("static")
    before = check(net)
    net.layer2[1].bn1 = norm_like(cls, net.layer2[1].bn1)
    assert_close(run(net, images(2, 40, 48)), before)
    assert not reasons(net)


def test_parametrized_norms():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = [1.0]

        def forward(self, weight):
            return weight * self.by[0]

    net, scale = make("static"), Scale()
    before = check(net)
    parametrize.register_parametrization(net.layer2[1].bn1, "weight", scale)
    check(net)
    assert "its weight" in net.layer2[1].why_dense
    scale.by[0] = 1.5
    check(net, same_as=before)


# What stands before the shortcut's convolution ---------------------------------------------------


class Viewing(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, c, h * w).view(n, c, h, w)


@pytest.mark.parametrize(
    "module, reason", [(nn.Hardtanh(0, 0.5, inplace=True), "Hardtanh"), (Viewing(), "Viewing")]
)
def test_modules_before_the_convolution_of_a_shortcut(module, reason):
    net = make("static", avg_down=True)
    check(net)
    net.layer2[0].downsample.insert(0, module)
    check(net)
    assert reason in net.layer2[0].why_dense


# Maskers -----------------------------------------------------------------------------------------


def test_a_class_of_maskers_patched_later():
    cls = type("Mine", (SpatialMasker,), {})
    net = make()
    for masker in net.maskers():
        masker.__class__ = cls
    before = check(net)
    assert not reasons(net)
    cls.hard = lambda self, keep: (keep < 0).float()
    check(net, same_as=before)
    assert any("which has a hard of its own" in reason for reason in reasons(net))
    del cls.hard
    assert_close(check(net), before)
    assert not reasons(net)


def test_one_attribute_of_a_masker_for_another():
    net = make()
    for masker in net.maskers():
        masker.foo = 1
    before = check(net)
    for masker in net.maskers():
        del masker.foo
        masker.hard = lambda keep: (keep < 0).float()
    check(net, same_as=before)


# Copies and threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.copy, lambda m: m._replicate_for_data_parallel()])
def test_copies_start_anew(how):
    net = make()
    check(net)
    for part in (how(net), how(net.layer2[1])):
        assert part._snapshot is None and part.__dict__.get("_executor") is None
        assert part.__dict__.get("_stem_executor") is None
    assert net._snapshot is not None and net.layer2[1]._executor is not None


def test_another_thread_switches(monkeypatch):
    net, x = make(), images(2, 40, 48)
    before = check(net, x)
    from las_mm.models.snapshot import Snapshot

    original = Snapshot.stale

    def stale(self, *args):
        out = original(self, *args)
        thread = threading.Thread(target=net.eval)
        thread.start()
        thread.join()
        return out

    monkeypatch.setattr(Snapshot, "stale", stale)
    for _ in range(2):
        assert_close(run(net, x), before)


@needs.RAISE
def test_compiled_before_it_was_prepared():
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match=r"las_mm\.prepare\(model\.eval\(\)\)"):
        torch.compile(make(), backend="eager")(images(1, 40, 48))
    torch._dynamo.reset()


# Modules that are not Python's -------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["static", "both"])
@pytest.mark.parametrize(
    "name", ["conv1", "layer2.1.conv1", "layer2.1.conv2", "layer2.0.downsample"]
)
def test_scripted_modules(name, mode):
    net = make(mode)
    check(net)
    parent, _, child = name.rpartition(".")
    module = net.get_submodule(name)
    setattr(net.get_submodule(parent), child, torch.jit.script(module))
    check(net)
    check(net)
    if parent:
        assert "Script" in net.get_submodule(parent).why_dense
    else:
        assert "Script" in net.why_stem_dense


def test_mkldnn_modules():
    from torch.utils import mkldnn

    net = make("static")
    check(net)
    x = images(2, 40, 48)
    net = mkldnn.to_mkldnn(net)
    try:
        expected = run_masked_dense(net, x.to_mkldnn())
    except Exception as error:  # it has no such operation
        with pytest.raises(type(error)):
            run(net, x.to_mkldnn())
        return
    assert_close([o.to_dense() for o in run(net, x.to_mkldnn())], [o.to_dense() for o in expected])


# Pruned widths -----------------------------------------------------------------------------------


def narrowed(block, first, second):
    conv1, conv2, conv3 = block.conv1, block.conv2, block.conv3
    with torch.no_grad():
        conv1.weight = nn.Parameter(conv1.weight[:first].clone())
        conv2.weight = nn.Parameter(conv2.weight[:second, :first].clone())
        conv3.weight = nn.Parameter(conv3.weight[:, :second].clone())
    for norm, width in ((block.bn1, first), (block.bn2, second)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name).detach()[:width].clone()
            setattr(norm, name, nn.Parameter(value) if name in ("weight", "bias") else value)


@pytest.mark.parametrize("mode", ["static", "spatial"])
@pytest.mark.parametrize("first, second", [(10, 13), (11, 11)])
def test_pruned_widths(mode, first, second):
    net = make(mode)
    check(net)
    narrowed(net.layer2[1], first, second)
    check(net)
    if first == second:
        assert not reasons(net)
    else:
        assert net.layer2[1].why_dense == "conv1 and conv2 put out 10 and 13 channels"


def test_reasons_name_the_module_of_a_class_of_the_same_name():
    class Conv2d(nn.Conv2d):
        pass

    net = make("static")
    check(net)
    net.layer2[1].conv1.__class__ = Conv2d
    check(net)
    assert "test_coverage_more.Conv2d, not torch.nn.modules.conv.Conv2d" in (
        net.layer2[1].why_dense
    )


# NaN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one_in_the_stem(dtype):
    net, x = make("static").to(dtype), images(1, 40, 48).to(dtype)
    for row, column in ((21, 23), (0, 0), (39, 47), (20, 20)):
        image = x.clone()
        image[0, :, row, column] = torch.nan
        for actual, expected in zip(run(net, image), run_masked_dense(net, image)):
            assert torch.equal(actual.isnan(), expected.isnan())


@pytest.mark.parametrize("mode", ["spatial", "both"])
def test_another_default_dtype(monkeypatch, mode):
    """What is made without a dtype has the default one, which scripts set to float64."""
    monkeypatch.undo()  # with measuring: its weights are made without one too
    monkeypatch.setattr(plan, "_plan", plan.Plan(None))
    net, x = make(mode), images()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            net(x.float())
    finally:
        torch.set_default_dtype(torch.float32)
    for block in net.blocks():
        known = block.activation
        rates = (known.rate, known.rate_dilated, known.rate_channel)
        assert {torch.as_tensor(rate).dtype for rate in rates} == {torch.float32}
