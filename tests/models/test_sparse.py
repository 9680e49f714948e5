"""The sparse path of a backbone equals its masked-dense form, and nobody notices it otherwise."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import las_mm
import needs
from las_mm import ops
from las_mm.models import DynamicBottleneck, LASResNet, collect_activations, plan, sparse
from las_mm.models.executors import base, bottleneck, stem

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
SMALL = dict(base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
DILATED = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
CONFIGS = {
    "spatial": {},
    "layer": dict(mode="layer"),
    "static": dict(mode="static"),
    "mixed": dict(mode=["static", "spatial", "layer", "spatial"]),
    "caffe": dict(style="caffe"),
    "dilated": DILATED,
    "dilated caffe": dict(style="caffe", **DILATED),
    "dilated layer": dict(mode="layer", **DILATED),
    "deep stem": dict(deep_stem=True),
    "avg_down": dict(deep_stem=True, avg_down=True),
    "avg_down mixed": dict(avg_down=True, mode=["spatial", "layer", "spatial", "static"]),
    "odd granularity": dict(granularity=(3, 5, 1, 7)),
    "per block": dict(granularity=(4, [8, 3, 4, 2], 2, [1, 2, 1])),
    "strided": dict(strides=(2, 2, 1, 2)),
}
MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The plan of every test: nothing is measured, or written to the user's folder."""
    return choose(monkeypatch, lambda kind: plan.Choice(winograd=kind.tiled))


def choose(monkeypatch, lookup):
    """Let ``lookup(kind)`` decide how blocks run."""

    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return lookup(kind)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def make(seed=0, depth=50, **kwargs):
    """A network in eval mode whose features vary and whose masks keep some and drop some."""
    torch.manual_seed(seed)
    net = LASResNet(depth, **{**SMALL, **kwargs})
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for masker in net.maskers():
        nn.init.normal_(masker.conv.weight, std=0.5)
        nn.init.zeros_(masker.conv.bias)
    return net.eval()


def images(*shape, seed=1):
    """Noise around another mean in every image and channel, so that decisions differ."""
    count, *size = shape if len(shape) == 3 else (1, *shape)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, *size, generator=generator)
    return noise + 2 * torch.randn(count, 3, 1, 1, generator=generator)


def run(net, x):
    """Outputs and activations of the form that the network picks without gradients."""
    with torch.no_grad():
        outs = net(x)
    return outs, collect_activations(net)


def run_masked_dense(net, x):
    with sparse.masked_dense():
        return run(net, x)


def assert_close(actual, expected, tolerance=None):
    assert len(actual) == len(expected)
    for stage, (a, e) in enumerate(zip(actual, expected), start=1):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = a.double(), e.double()
        error = ((a - e).abs().max() / e.abs().max()).item()
        assert error <= (tolerance or TOLERANCE[actual[0].dtype]), f"stage {stage}: {error:.3g}"


def assert_same_activations(actual, expected):
    for name in ("rates", "rates_dilated", "rates_channel"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert len(actual.masks) == len(expected.masks)
    for ours, theirs in zip(actual.masks, expected.masks):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.equal(ours.bool(), theirs.bool())


@pytest.fixture
def calls(monkeypatch):
    """Counts how often sparse paths run: {'SparseBottleneck': ..., 'FusedStem': ...}."""
    counter = Counter()

    def spy(cls):
        original = cls.__call__

        def counting(self, *args, **kwargs):
            counter[cls.__name__] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__call__", counting)

    spy(bottleneck.SparseBottleneck)
    spy(stem.FusedStem)
    return counter


# The same results --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 67, 93)], ids=["even", "odd batch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_masked_dense(calls, name, shape):
    net, x = make(**CONFIGS[name]), images(*shape)
    expected, activation = run_masked_dense(net, x)
    assert not calls
    assert 0.02 < activation.mean_rate < 0.98 or name == "static"
    actual, fast_activation = run(net, x)
    assert calls["SparseBottleneck"] == 16 and calls["FusedStem"] == (not net.deep_stem)
    assert all(block.why_dense is None for block in net.blocks())
    assert_close(actual, expected)
    assert_same_activations(fast_activation, activation)
    if shape[0] > 1 and name != "static":
        masks = [mask for mask in fast_activation.masks if mask is not None]
        assert any((mask[0] != mask[1]).any() for mask in masks)
        assert any((mask[1] != mask[2]).any() for mask in masks)


def force_masks(net, shape):
    """Random decisions whatever the features are, so that rounding turns none."""
    generator = torch.Generator().manual_seed(7)
    for block, geometry in zip(net.blocks(), net.network_shape(shape[1:]).blocks):
        if block.masker is not None:
            side = block.granularity if block.mode == "spatial" else max(shape)
            grid = -(-geometry.h_out // side), -(-geometry.w_out // side)
            coin = torch.rand(shape[0], 1, *grid, generator=generator) < 0.6
            block.masker.offset = torch.where(coin, torch.inf, -torch.inf)


@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 67, 93)], ids=["even", "odd batch"])
@pytest.mark.parametrize("name", ["spatial", "mixed", "dilated caffe", "avg_down", "strided"])
def test_bfloat16(calls, name, shape):
    net = make(**CONFIGS[name]).bfloat16()
    force_masks(net, shape)
    x = images(*shape).bfloat16()
    expected, activation = run_masked_dense(net, x)
    actual, fast_activation = run(net, x)
    assert calls["SparseBottleneck"] == 16 and actual[0].dtype == torch.bfloat16
    assert_close(actual, expected)
    assert_same_activations(fast_activation, activation)


CHOICES = {
    "direct": plan.Choice(winograd=False),
    "winograd": plan.Choice(winograd=True, winograd_cost=0.0),
    "dense": plan.Choice(winograd=False, dense_above=0.0),
    "dense above 0.5": plan.Choice(winograd=True, dense_above=0.5),
}


@pytest.mark.parametrize("name", ["spatial", "mixed", "dilated", "avg_down", "odd granularity"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_the_plan(monkeypatch, choice, name):
    def lookup(kind, device_type="cpu"):
        wanted = CHOICES[choice]
        return plan.Choice(
            winograd=wanted.winograd and kind.tiled,
            winograd_cost=wanted.winograd_cost,
            dense_above=wanted.dense_above,
        )

    choose(monkeypatch, lookup)
    net, x = make(**CONFIGS[name]), images(2, 67, 70)
    expected, activation = run_masked_dense(net, x)
    for _ in range(2):
        actual, fast_activation = run(net, x)
        assert_close(actual, expected)
        assert_same_activations(fast_activation, activation)


def test_plan_that_changes_with_the_size(monkeypatch):
    """What one size did not need is packed when another size needs it."""
    choices = {}

    def lookup(kind, device_type="cpu"):
        choices[kind.side] = choice = [
            plan.Choice(winograd=kind.tiled),
            plan.Choice(winograd=False),
            plan.Choice(winograd=kind.tiled, dense_above=0.3),
        ][len(choices) % 3]
        return choice

    choose(monkeypatch, lookup)
    net = make()
    for size in [(32, 32), (64, 64), (96, 128), (32, 32), (160, 96), (64, 64)]:
        x = images(*size)
        assert_close(run(net, x)[0], run_masked_dense(net, x)[0])


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (32, 200), (33, 17)])
def test_odd_sizes(size):
    net, x = make(mode=["spatial", "layer", "spatial", "spatial"]), images(2, *size)
    expected, activation = run_masked_dense(net, x)
    actual, fast_activation = run(net, x)
    assert_close(actual, expected)
    assert_same_activations(fast_activation, activation)


def layouts(x):
    wide = torch.stack([x, torch.full_like(x, 1e6)], -1)
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "every other": wide[..., 0],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("deep_stem", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other", "transposed"])
@pytest.mark.parametrize("channels_last_model", [False, True])
def test_memory_formats(layout, channels_last_model, deep_stem):
    net, x = make(deep_stem=deep_stem), images(2, 45, 50)
    expected, _ = run_masked_dense(net, x)
    if channels_last_model:
        net = net.to(memory_format=torch.channels_last)
    given = layouts(x)[layout]
    before = given.clone()
    assert_close(run(net, given)[0], expected)
    assert torch.equal(given, before)


@pytest.mark.parametrize("out_indices", [(3,), (0, 2), (1, 2, 3)])
def test_out_indices(out_indices):
    x = images(64, 64)
    everything, _ = run_masked_dense(make(), x)
    outs, _ = run(make(out_indices=out_indices), x)
    assert_close(outs, [everything[i] for i in out_indices])


def test_no_images():
    net = make(mode=["spatial", "layer", "static", "spatial"])
    with torch.no_grad():
        shapes = [tuple(out.shape) for out in net(torch.zeros(0, 3, 64, 64))]
    assert shapes == [(0, 32, 16, 16), (0, 64, 8, 8), (0, 128, 4, 4), (0, 256, 2, 2)]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_prepared_in_inference_mode(context):
    """Tensors made there must serve outside too."""
    net, x = make(), images(64, 64)
    expected, _ = run_masked_dense(net, x)
    with torch.inference_mode():
        first = net(x)
    with context():
        second = net(x)
    assert_close(first, expected)
    assert_close(second, expected)
    assert_close([out.detach() for out in net(x)], expected)  # with autograd


# The masked-dense path stays ---------------------------------------------------------------------


def test_state_dict_stays():
    net = make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    names = [name for name, _ in net.named_modules()]
    las_mm.prepare(net)
    run(net, images(64, 64))
    after = net.state_dict()
    assert list(after) == list(before) and [name for name, _ in net.named_modules()] == names
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert len(list(net.parameters())) == len(list(make().parameters()))


def step(net, x):
    """One training step's outputs and gradients."""
    torch.manual_seed(3)
    outs = net(x)
    sum(out.square().mean() for out in outs).backward()
    return outs, [p.grad for p in net.parameters()]


def test_training_goes_on():
    plain, net, x = make(), make(), images(2, 64, 64)
    las_mm.prepare(net)
    run(net, x)
    expected, expected_grads = step(plain.train(), x)
    actual, grads = step(net.train(), x)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    for grad, other in zip(grads, expected_grads):
        assert torch.equal(grad, other) and grad.isfinite().all()
    assert collect_activations(net).rates.requires_grad
    with torch.no_grad():
        for model in (plain, net):
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    assert_close(run(net.eval(), x)[0], run_masked_dense(plain.eval(), x)[0])


def change_in_place(net):
    with torch.no_grad():
        net.layer2[1].conv2.weight.mul_(1.5)
        net.conv1.weight.mul_(-1)


def change_statistics(net):
    net.norm1.running_mean.add_(0.5)
    net.layer3[0].downsample[-1].running_var.mul_(3)


def change_bias_and_masker(net):
    with torch.no_grad():
        net.layer1[0].norm3.bias.add_(0.5)
        net.layer1[1].masker.conv.bias[0] += 100


def load_other(net):
    net.load_state_dict(make(seed=5).state_dict())


def assign_other(net):
    net.load_state_dict(make(seed=5).state_dict(), assign=True)


def replace_parameter(net):
    block = net.layer4[2]
    block.conv1.weight = nn.Parameter(-block.conv1.weight.detach())
    net.conv1.weight = nn.Parameter(-net.conv1.weight.detach())


def replace_module(net):
    torch.manual_seed(9)
    net.layer1[1].conv3 = nn.Conv2d(8, 32, 1, bias=False)
    net.layer1[0].downsample[-1] = nn.BatchNorm2d(32).eval()


def replace_stem(net):
    torch.manual_seed(9)
    net.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_statistics,
        change_bias_and_masker,
        load_other,
        assign_other,
        replace_parameter,
        replace_module,
        replace_stem,
    ],
)
def test_changed_weights_are_noticed(calls, change):
    net, x = las_mm.prepare(make()), images(64, 64)
    before, _ = run(net, x)
    change(net)
    expected, activation = run_masked_dense(net, x)
    assert max((a - b).abs().max() for a, b in zip(before, expected)) > 1e-2
    calls.clear()
    actual, fast_activation = run(net, x)
    assert calls == {"SparseBottleneck": 16, "FusedStem": 1}
    assert_close(actual, expected)
    assert_same_activations(fast_activation, activation)


def test_converted_weights_are_noticed(calls):
    net, x = las_mm.prepare(make(mode="static")), images(64, 64)
    expected, _ = run(net, x)
    assert_close(run(net.bfloat16(), x.bfloat16())[0], [e.bfloat16() for e in expected])
    assert calls == {"SparseBottleneck": 32, "FusedStem": 2}
    actual, _ = run(net.double(), x.double())
    assert calls["SparseBottleneck"] == 32  # the kernels know no float64
    assert_close(actual, [e.double() for e in expected], 5e-2)
    assert_close(run(net.float(), x)[0], run_masked_dense(net, x)[0])
    assert calls["SparseBottleneck"] == 48


def test_norm_in_training_mode_uses_the_batch():
    """As the masked-dense path does: batch statistics, and running ones that move."""
    nets, x = [las_mm.prepare(make()), las_mm.prepare(make())], images(2, 64, 64)
    for net in nets:
        net.layer2[1].norm2.train()
    assert_close(run(nets[0], x)[0], run_masked_dense(nets[1], x)[0])
    ours, theirs = (net.layer2[1].norm2.running_mean for net in nets)
    torch.testing.assert_close(ours, theirs)


def copies():
    def through_pickle(net):
        return pickle.loads(pickle.dumps(net))

    def through_torch(net):
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return [copy.deepcopy, through_pickle, through_torch]


@pytest.mark.parametrize("duplicate", copies())
def test_copies_carry_no_packed_weights(duplicate):
    fresh, net, x = make(), las_mm.prepare(make()), images(64, 64)
    expected, _ = run(net, x)
    twin = duplicate(net)
    assert len(pickle.dumps(net)) == pytest.approx(len(pickle.dumps(fresh)), rel=0.01)
    tensors = [t for m in twin.modules() for t in packed_tensors(m)]
    assert not tensors
    assert_close(run(twin, x)[0], expected)
    change_in_place(twin)
    assert_close(run(net, x)[0], expected)
    assert_close(run(twin, x)[0], run_masked_dense(twin, x)[0])


def packed_tensors(module):
    """Tensors that hang on a module beside its parameters and buffers."""
    for value in vars(module).values():
        for entry in vars(value).values() if isinstance(value, FORMS) else [value]:
            for tensor in entry if isinstance(entry, (list, tuple)) else [entry]:
                if isinstance(tensor, torch.Tensor):
                    yield tensor


FORMS = (bottleneck.SparseBottleneck, stem.FusedStem)


# Where it is not used ----------------------------------------------------------------------------


def test_gradients_in_eval_mode(calls):
    plain, net, x = make(), las_mm.prepare(make()), images(2, 64, 64)
    run(net, x)
    calls.clear()
    expected, expected_grads = step(plain, x)
    actual, grads = step(net, x)
    assert not calls
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))
    for grad, other in zip(grads, expected_grads):
        assert (grad is None) == (other is None)
        assert grad is None or torch.equal(grad, other)


def test_not_under_autocast(calls):
    net, x = las_mm.prepare(make()), images(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = run_masked_dense(net, x)
        actual, _ = run(net, x)
    assert not calls
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_not_while_tracing(calls):
    net, x = las_mm.prepare(make()), images(64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(net, x, check_trace=False)
        assert not calls
        assert not any("las_mm" in node.kind() for node in traced.inlined_graph.nodes())
        assert_close(traced(x), net(x))


def test_not_in_masked_dense_which_nests(calls):
    net, x = las_mm.prepare(make()), images(64, 64)
    with sparse.masked_dense(), torch.no_grad():
        net(x)
        with pytest.raises(ZeroDivisionError), sparse.masked_dense():
            raise ZeroDivisionError
        net(x)
        net.layer1(torch.randn(1, 8, 8, 8))
    assert not calls
    run(net, x)
    assert calls


def test_not_in_training_mode_without_gradients(calls):
    net = las_mm.prepare(make()).train()
    with torch.no_grad():
        net(images(2, 64, 64))
    assert not calls


@pytest.mark.parametrize("group_norm", [True, False], ids=["GroupNorm", "GELU"])
def test_parts_without_a_fast_form(calls, group_norm):
    if group_norm:
        net = make(norm_cfg=dict(type="GN", num_groups=4, requires_grad=True))
    else:
        net = make()
        for block in net.blocks():
            block.relu = nn.GELU()
    x = images(2, 64, 70)
    expected, activation = run_masked_dense(net, x)
    las_mm.prepare(net)
    actual, own = run(net, x)
    assert calls == ({} if group_norm else {"FusedStem": 1})
    for block in net.blocks():
        assert ("GroupNorm" if group_norm else "GELU") in block.why_dense
    assert_close(actual, expected, 1e-6 if group_norm else None)
    assert_same_activations(own, activation)


def test_a_block_alone():
    for config, reason in [({}, None), (dict(act_cfg=dict(type="GELU")), "GELU")]:
        torch.manual_seed(0)
        block = DynamicBottleneck(32, 32, granularity=2, **config).eval()
        nn.init.normal_(block.masker.conv.weight)
        nn.init.zeros_(block.masker.conv.bias)
        x = torch.randn(2, 32, 9, 11).relu()
        before = x.clone()
        with torch.no_grad():
            actual = block(x)
            with sparse.masked_dense():
                expected = block(x)
        assert block.why_dense is None if reason is None else reason in block.why_dense
        assert_close([actual], [expected])
        assert torch.equal(x, before) and actual.data_ptr() != x.data_ptr()


# Hooks and memory that others hold ---------------------------------------------------------------

HOOKED = [
    "layer1",
    "layer2",
    "layer1.0",
    "layer2.1",
    "layer4.2",
    "layer1.1.conv1",
    "layer3.2.conv2",
    "layer3.4.conv3",
    "layer4.2.bn3",
    "layer2.1.relu",
    "layer2.1.masker",
    "layer3.0.downsample",
    "layer3.0.downsample.0",
    "conv1",
    "relu",
    "maxpool",
]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("pre", [False, True], ids=["hook", "pre-hook"])
def test_hooks_see_what_the_training_form_shows(name, pre):
    net, x = las_mm.prepare(make()), images(2, 64, 70)
    module = net.get_submodule(name)
    kept = []

    def keep(copied):
        def hook(module, inputs, output=None):
            # An activation in place has overwritten its input when the hook runs.
            tensors = [t for t in inputs if torch.is_tensor(t)] if pre else [output]
            kept.append([t.clone() if copied else t for t in tensors])

        if pre:
            return module.register_forward_pre_hook(hook)
        return module.register_forward_hook(hook)

    handle = keep(copied=True)
    expected, _ = run_masked_dense(net, x)
    handle.remove()
    expected_kept, kept = kept, []
    mutated_by_the_block_itself = pre and name.endswith("relu")
    handle = keep(copied=mutated_by_the_block_itself)
    actual, _ = run(net, x)
    assert_close(actual, expected)
    assert len(kept) == len(expected_kept) > 0
    for ours, theirs in zip(kept, expected_kept):
        assert_close(ours, theirs)
    handle.remove()
    assert_close(run(net, x)[0], expected)


def test_hook_that_replaces_the_output():
    net, x = las_mm.prepare(make()), images(64, 64)
    net.layer2[1].register_forward_hook(lambda module, inputs, output: output * 0.5)
    net.layer3.register_forward_hook(lambda module, inputs, output: output + 1)
    net.layer1[1].conv2.register_forward_hook(lambda module, inputs, output: output + 1)
    net.layer4[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    assert_close(run(net, x)[0], run_masked_dense(net, x)[0])


def test_hooks_with_keyword_arguments():
    net, x, seen = las_mm.prepare(make()), images(64, 64), []

    def hook(module, inputs, kwargs, output):
        seen.append(output)

    net.layer2[1].register_forward_hook(hook, with_kwargs=True)
    outs, _ = run(net, x)
    with torch.no_grad():
        rest = seen[0]
        for block in list(net.layer2)[2:]:
            rest = block(rest)
    assert_close([rest], [outs[1]])


@pytest.mark.parametrize("name", ["spatial", "layer", "static", "avg_down", "dilated"])
def test_nothing_that_others_hold_is_overwritten(name):
    net = las_mm.prepare(make(**CONFIGS[name]))
    first, second = images(2, 64, 64, seed=1), images(2, 64, 64, seed=2)
    first_before = first.clone()
    outs, activation = run(net, first)
    copies = [out.clone() for out in outs]
    masks = [None if mask is None else mask.clone() for mask in activation.masks]
    rates = activation.rates.clone()
    other, _ = run(net, second)
    assert torch.equal(first, first_before)
    assert all(torch.equal(out, copy) for out, copy in zip(outs, copies))
    assert not any(torch.equal(a, b) for a, b in zip(outs, other))
    pointers = [out.untyped_storage().data_ptr() for out in (*outs, *other)]
    assert len(set(pointers)) == 8
    assert_close(outs, run_masked_dense(net, first)[0])
    assert torch.equal(activation.rates, rates)
    for mask, before in zip(activation.masks, masks):
        assert mask is None or torch.equal(mask, before)


def test_stages_called_one_by_one_leave_their_input():
    net = las_mm.prepare(make())
    features = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)).relu()
    with torch.no_grad():
        for name in net.res_layers:
            before = features.clone()
            out = getattr(net, name)(features)
            assert torch.equal(features, before)
            with sparse.masked_dense():
                assert_close([out], [getattr(net, name)(features)])
            features = out


# prepare() ---------------------------------------------------------------------------------------


def test_prepare():
    net, x = make(), images(64, 64)
    wrapper = nn.ModuleDict({"backbone": net, "head": nn.Linear(2, 2)}).eval()
    assert las_mm.prepare(wrapper) is wrapper and sparse.prepare is las_mm.prepare
    packed = [block._executor for block in net.blocks()]
    assert None not in packed
    run(net, x)
    assert [block._executor for block in net.blocks()] == packed  # the same objects


def test_prepare_errors():
    with pytest.raises(ValueError, match="Linear contains no dynamic backbone.*LASResNet"):
        las_mm.prepare(nn.Linear(2, 2).eval())
    with pytest.raises(RuntimeError, match=r"LASResNet is in training mode; call .eval\(\)"):
        las_mm.prepare(make().train())
    with pytest.raises(RuntimeError, match="backbone is in training mode"):
        las_mm.prepare(nn.ModuleDict({"backbone": make().train()}))


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mixed", "avg_down"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(dynamo, backend, name):
    net, x = las_mm.prepare(make(**CONFIGS[name])), images(2, 64, 70)
    expected, activation = run(net, x)
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
    before = x.clone()
    for _ in range(2):
        with torch.no_grad():
            actual = compiled(x)
        assert_close(actual, expected)
        assert torch.equal(x, before)
    assert_same_activations(collect_activations(net), activation)


@needs.RAISE
@pytest.mark.parametrize("deep_stem", [False, True])
def test_compile_needs_prepare(dynamo, deep_stem):
    net = make(deep_stem=deep_stem)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="las_mm.prepare"), torch.no_grad():
        compiled(images(64, 64))


@needs.EXPORT
def test_export_needs_prepare(dynamo):
    with pytest.raises(RuntimeError, match="las_mm.prepare"), torch.no_grad():
        torch.export.export(make(), (images(64, 64),))


LOADER = """
import sys, torch
import las_mm.ops
program, example, out = sys.argv[1:]
with torch.no_grad():
    torch.save(torch.export.load(program).module()(torch.load(example)), out)
"""


@needs.EXPORT
def test_exported_program_runs_elsewhere(dynamo, tmp_path):
    net, x = las_mm.prepare(make(**CONFIGS["mixed"])), images(2, 64, 70)
    expected, activation = run(net, x)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("las_mm.sparse_bottleneck" in target for target in targets) == 16
    assert_close(run(net, x)[0], expected)  # and the network itself is as it was
    assert_same_activations(collect_activations(net), activation)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", LOADER, *files], check=True, timeout=120)
    assert_close(torch.load(tmp_path / "out.pt"), expected)


# Long runs and threads ---------------------------------------------------------------------------


@pytest.mark.parametrize("alternate", [False, True], ids=["one form", "forms by size"])
def test_threads_share_a_model(monkeypatch, alternate):
    if alternate:  # what one thread chooses or packs late must not disturb the other

        def lookup(kind, device_type="cpu"):
            if threading.current_thread().name == "second":
                return plan.Choice(winograd=False)
            return plan.Choice(winograd=kind.tiled, dense_above=0.5)

        choose(monkeypatch, lookup)
    inputs = [images(64, 96), images(2, 33, 40, seed=2)]
    expected = [run_masked_dense(make(), x)[0] for x in inputs]
    net, errors, barrier = make(), [], threading.Barrier(2)

    def work(x, reference):
        try:
            barrier.wait(60)
            with torch.no_grad():
                for _ in range(50):
                    assert_close(net(x), reference)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [
            threading.Thread(target=work, name=name, args=pair)
            for name, *pair in zip(["first", "second"], inputs, expected)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_half_made_choice_of_another_thread(monkeypatch):
    """One thread packs what its choice needs while another, which needs it not, is in the block."""

    def lookup(kind, device_type="cpu"):
        return plan.Choice(winograd=threading.current_thread().name != "other")

    def fold(block):
        packing.set()
        finished.wait(5)
        return original_fold(block)

    def spatial_mask(*arguments):
        if threading.current_thread() is not other and not other.ident:
            other.start()
            packing.wait(5)
        return original_mask(*arguments)

    def work():
        try:
            with torch.no_grad():
                results.append(block(small))
        finally:
            packing.set()

    choose(monkeypatch, lookup)
    block, results = make().layer1[1], []
    small, large = (torch.randn(1, 32, n, n).relu() for n in (6, 8))
    with torch.no_grad(), sparse.masked_dense():
        expected = [block(large), block(small)]
    with torch.no_grad():
        block(large)  # conv2's direct weights are not packed
        packing, finished = threading.Event(), threading.Event()
        other = threading.Thread(target=work, name="other")
        original_fold, original_mask = bottleneck._fold_block, ops.spatial_mask
        monkeypatch.setattr(bottleneck, "_fold_block", fold)
        monkeypatch.setattr(ops, "spatial_mask", spatial_mask)
        try:
            results.append(block(large))
        finally:
            finished.set()
            other.join()
    assert_close(results, expected)


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32)])
def test_wrong_input_is_named(shape):
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must have shape \(N, 3, H, W\)"):
        make()(torch.zeros(shape))


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize("forwards", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(forwards):
    net = las_mm.prepare(make(mode=["spatial", "layer", "spatial", "spatial"], avg_down=True))
    inputs = [images(32, 40), images(24, 24), images(2, 16, 16)]
    warm_up = 200
    with torch.no_grad():
        for i in range(warm_up + forwards):
            if i == warm_up:
                before = resident_bytes()
            net(inputs[i % len(inputs)])
    grown = resident_bytes() - before
    assert grown < 2 * MEBIBYTE, f"{forwards} forwards grew by {grown / MEBIBYTE:.1f} MiB"


def test_memory_stays_flat_when_weights_change():
    net, x = make(), images(24, 24)
    for i in range(60):
        if i == 20:
            before = resident_bytes()
        change_in_place(net) if i % 2 else net.load_state_dict(net.state_dict())
        run(net, x)
        with nullcontext() if i % 10 else sparse.masked_dense():
            run(net, x)
    assert resident_bytes() - before < 4 * MEBIBYTE


def test_outputs_keep_the_memory_format_of_the_input():
    """mmcv's RoIAlign on a CPU reads wrong values from channels_last maps."""
    net = LASResNet(50, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3)).eval()
    x = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        plain = net(x)
        last = net(x.contiguous(memory_format=torch.channels_last))
    for a, b in zip(plain, last):
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["spatial", "layer"])
def test_rates_counted_when_asked_for(mode):
    """What a GPU does, where rates cost launches: the same as those of ``spatial_mask``."""
    torch.manual_seed(0)
    net = LASResNet(50, base_channels=8, stem_channels=8, mode=mode).eval()
    with torch.inference_mode():
        net(torch.randn(2, 3, 64, 96))
    for block in net.blocks():
        known = block.activation
        granularity = ops.LAYER if mode == "layer" else block.granularity
        strides = (block.conv1_stride, block.conv2_stride)
        geometry = (block.input_hw, granularity, strides, block.dilation)
        mask, axes = known.mask, tuple(known.rates)
        asked = base._spatial_activation(torch.ones(()), mask, axes, *geometry)
        assert asked.rates.keys() == known.rates.keys()
        torch.testing.assert_close(dict(asked.rates), dict(known.rates))
