"""Basic blocks and dense layers: what holds for either, on the sparse path and in training."""

import copy
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from families import (
    DYNAMIC,
    MODES,
    SCALE,
    TINY,
    FixedPlan,
    assert_close,
    check,
    force,
    images,
    make,
    run,
    run_masked_dense,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import las_mm
import needs
from las_mm import ops
from las_mm.benchmark import engines
from las_mm.benchmark.contest import relative_error
from las_mm.benchmark.subject import make_subject
from las_mm.cli import main as las_mm_command
from las_mm.hooks import BudgetHook
from las_mm.latency import predict, search_granularity
from las_mm.losses import BudgetLoss
from las_mm.models import (
    collect_activations,
    flops_report,
    plan,
    sparse,
)
from las_mm.models.settings import BlockSettings
from las_mm.visualization import computed_share, draw_masks

pytestmark = pytest.mark.skipif(
    not ops.has_block_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
FAMILIES = tuple(MODES)
both_families = pytest.mark.parametrize("family", FAMILIES)
dynamic = pytest.mark.parametrize("family, mode", DYNAMIC)
FIRST = {"basic": "layer1.1", "dense": "stages.0.block.1"}


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr("las_mm.models.plan.current_plan", FixedPlan)


# The same results --------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """A family, arguments of its network, and the shape of a batch."""
    family = draw(st.sampled_from(FAMILIES))
    arguments = dict(
        mode=[draw(st.sampled_from(MODES[family])) for _ in range(4)],
        granularity=[draw(st.sampled_from([1, 2, 3, 4, 7])) for _ in range(4)],
        in_channels=draw(st.sampled_from([1, 3])),
    )
    low = 32
    if family == "basic":
        low = 1
        arguments.update(
            channel_granularity=draw(st.sampled_from([1, 2, 8])),
            channel_position=draw(st.sampled_from(["after_act", "before_norm"])),
            avg_down=draw(st.booleans()),
            deep_stem=draw(st.booleans()),
        )
        if draw(st.booleans()):
            arguments.update(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    size = [draw(st.integers(1, 3)), *(draw(st.integers(low, 75)) for _ in range(2))]
    return family, arguments, size


@settings(max_examples=max(1, int(60 * SCALE)), deadline=None)
@given(
    case=cases(),
    rate=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_masked_dense(case, rate, dtype, channels_last, seed):
    family, arguments, size = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("las_mm.models.plan.current_plan", FixedPlan)
        net = make(family, seed, **arguments).to(dtype)
        x = images(*size, channels=arguments["in_channels"], seed=seed).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        force(net, x, rate, seed)
        check(net, x)
        assert {block.why_dense for block in net.blocks()} == {None}


@dynamic
def test_own_decisions(family, mode):
    net = make(family, mode=mode)
    _, record = check(net, images(3, 67, 93))
    assert 0.02 < record.shares.mean() < 0.98
    made = [m for decisions in record.decisions for m in decisions.values()]
    assert any(not torch.equal(m[0], m[1]) for m in made)


@pytest.mark.parametrize(
    "choice",
    [
        plan.Choice(winograd=False),
        plan.Choice(winograd=True, winograd_cost=0.0),
        plan.Choice(winograd=False, dense_above=0.0),
        plan.Choice(winograd=True, dense_above=0.5),
    ],
)
@pytest.mark.parametrize("mode", MODES["basic"])
def test_every_choice_of_the_plan(monkeypatch, mode, choice):
    fixed = SimpleNamespace(lookup=lambda kind, device_type="cpu": choice)
    monkeypatch.setattr("las_mm.models.plan.current_plan", lambda: fixed)
    net, x = make("basic", mode=mode, granularity=(4, 4, 2, 2)), images(2, 67, 70)
    force(net, x)
    for _ in range(2):
        check(net, x)


@both_families
@pytest.mark.parametrize("out_indices", [(3,), (0, 2)])
def test_out_indices(family, out_indices):
    x = images(2, 64, 64)
    everything, _ = run_masked_dense(make(family), x)
    outs, _ = run(make(family, out_indices=out_indices), x)
    assert_close(outs, [everything[i] for i in out_indices])


@both_families
def test_no_images(family):
    for mode in MODES[family]:
        with torch.no_grad():
            outs = make(family, mode=mode)(torch.zeros(0, 3, 64, 64))
        assert [len(out) for out in outs] == [0] * 4


@dynamic
def test_nothing_that_others_hold_is_overwritten(family, mode):
    net = las_mm.prepare(make(family, mode=mode))
    first, second = images(2, 64, 70, seed=1), images(2, 64, 70, seed=2)
    before = first.clone()
    outs, record = run(net, first)
    copies = [out.clone() for out in outs]
    made = [{axis: m.clone() for axis, m in d.items()} for d in record.decisions]
    other, _ = run(net, second)
    assert torch.equal(first, before)
    assert all(torch.equal(out, copied) for out, copied in zip(outs, copies))
    pointers = {out.untyped_storage().data_ptr() for out in (*outs, *other)}
    assert len(pointers) == 8
    for ours, theirs in zip(record.decisions, made):
        assert all(torch.equal(m, theirs[axis]) for axis, m in ours.items())
    for out in other:
        out.zero_()  # nor does the network read what it has given out
    assert_close(run(net, first)[0], copies)


@both_families
def test_layouts_of_the_input(family):
    net, x = make(family), images(2, 45, 50)
    wide = torch.stack([x, torch.full_like(x, 1e6)], -1)
    for given_x in (wide[..., 0], x.transpose(2, 3).contiguous().transpose(2, 3)):
        before = given_x.clone()
        check(net, given_x)
        assert torch.equal(given_x, before)
    check(net.to(memory_format=torch.channels_last), x)


@both_families
def test_a_block_alone(family):
    net = make(family)
    block = net.get_submodule(FIRST[family])
    x = torch.randn(2, block.in_channels, 9, 11).relu()
    before = x.clone()
    with torch.no_grad():
        actual = block(x)
        with sparse.masked_dense():
            expected = block(x)
    assert_close([actual], [expected])
    assert torch.equal(x, before) and block.why_dense is None


# What changes is noticed -------------------------------------------------------------------------


def in_place(block, net):
    with torch.no_grad():
        block.conv2.weight.mul_(1.5)


def through_data(block, net):
    block.conv1.weight.data.mul_(-1)


def statistics(block, net):
    norm = block.norm2
    norm.running_mean.add_(0.5)


def load_other(block, net):
    net.load_state_dict(make("dense" if hasattr(net, "transitions") else "basic", 5).state_dict())


def other_module(block, net):
    torch.manual_seed(9)
    old = block.conv2
    block.conv2 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=True)


def other_mode(block, net):
    block.make_dynamic(BlockSettings(mode="layer"))
    nn.init.normal_(block.masker.conv.weight)
    block.masker.offset = torch.full((1, 1, 1, 1), -torch.inf)
    block.eval()


def other_granularity(block, net):
    for one in net.blocks():
        one.granularity = 3


def other_masker(block, net):
    with torch.no_grad():
        block.masker.conv.bias[0] += 100


CHANGES = [
    in_place,
    through_data,
    statistics,
    load_other,
    other_module,
    other_mode,
    other_granularity,
    other_masker,
]


@both_families
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(family, change):
    net, x = las_mm.prepare(make(family)), images(2, 64, 64)
    before, _ = run(net, x)
    change(net.get_submodule(FIRST[family]), net)
    outs, _ = check(net, x)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(outs, before))
    assert {block.why_dense for block in net.blocks()} == {None}


def test_a_changed_transition_is_noticed():
    net, x = las_mm.prepare(make("dense")), images(2, 64, 64)
    before, _ = run(net, x)
    for change in (
        lambda: net.transitions[0].conv.weight.data.mul_(-1),
        lambda: net.transitions[1].norm.running_mean.add_(1),
        lambda: net.stem[0].weight.data.mul_(-1),
    ):
        change()
        outs, _ = check(net, x)
        assert (outs[3] - before[3]).abs().max() > 1e-3
        before = outs


@both_families
def test_copies_carry_no_packed_weights(family):
    fresh, net, x = make(family), las_mm.prepare(make(family)), images(2, 64, 64)
    expected, _ = run(net, x)
    run_masked_dense(fresh, x)
    assert len(pickle.dumps(net)) == pytest.approx(len(pickle.dumps(fresh)), rel=0.01)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_close(run(twin, x)[0], expected)
        in_place(twin.get_submodule(FIRST[family]), twin)
        check(twin, x)
    assert_close(run(net, x)[0], expected)


# What the sparse path does not know --------------------------------------------------------------


def extra_child(block):
    block.attention = nn.Conv2d(4, 4, 1)


def gelu(block):
    setattr(block, "act" if hasattr(block, "act") else "relu", nn.GELU())


def group_norm(block):
    width = block.norm2.num_features
    name = block.norm2_name if hasattr(block, "norm2_name") else "norm2"
    setattr(block, name, nn.GroupNorm(2, width))


def own_forward(block):
    block._compute = lambda x, mask, channels: type(block)._compute(block, x, mask, channels) * 2


def grouped(block):
    old = block.conv2
    block.conv2 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, groups=2, bias=False)


def replaced_norm(block):
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    name = block.norm2_name if hasattr(block, "norm2_name") else "norm2"
    setattr(block, name, Norm(block.norm2.num_features).eval())


@both_families
@pytest.mark.parametrize(
    "kind", [extra_child, gelu, group_norm, own_forward, grouped, replaced_norm]
)
def test_what_is_unknown_runs_masked_dense_with_the_reason(family, kind):
    net, x = las_mm.prepare(make(family)), images(2, 64, 64)
    block = net.get_submodule(FIRST[family])
    torch.manual_seed(0)
    kind(block)
    check(net, x)
    assert block.why_dense
    assert sum(b.why_dense is not None for b in net.blocks()) == 1
    explanation = las_mm.explain(net, x[:1], quiet=True)
    rows = [row for row in explanation.blocks if block.why_dense in row.choice]
    assert [row.name for row in rows] == [FIRST[family]] and "masked-dense" in str(explanation)


@both_families
def test_hooks_see_what_the_masked_dense_path_shows(family):
    names = [FIRST[family], f"{FIRST[family]}.conv2", f"{FIRST[family]}.masker"]
    names += {
        "basic": ["layer2", "layer3.0", "relu"],
        "dense": ["stages.1", "transitions.0", "stem"],
    }[family]
    for name in names:
        net, x, seen = las_mm.prepare(make(family)), images(2, 64, 70), []
        module = net.get_submodule(name)
        handle = module.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.clone()))
        expected, _ = run_masked_dense(net, x)
        theirs = seen.copy()
        seen.clear()
        actual, _ = run(net, x)
        assert_close(actual, expected)
        assert len(seen) == len(theirs) > 0
        for a, e in zip(seen, theirs):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)
        handle.remove()
        module.register_forward_hook(lambda m, i, out: out * 0.5)
        if not name.endswith("masker"):
            check(net, x)


# Training ----------------------------------------------------------------------------------------


@dynamic
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_step(family, mode, checkpointed):
    name = {"basic": "with_cp", "dense": "memory_efficient"}[family]
    nets = [make(family, mode=mode), make(family, mode=mode, **{name: checkpointed})]
    x, found = images(2, 64, 64), []
    for net in nets:
        model = Model(net).train()
        hook = BudgetHook(dict(type="las_mm.BudgetLoss", target=0.3, bounds_weight=1.0))
        hook.attach(model)
        torch.manual_seed(3)
        losses = model(x.clone().requires_grad_())
        assert {"loss_budget", "flops_ratio"} <= losses.keys()
        (losses["loss"] + 100 * losses["loss_budget"]).backward()
        found.append({n: p.grad for n, p in net.named_parameters()})
    for key, gradient in found[1].items():
        assert gradient is not None and gradient.isfinite().all(), key
        torch.testing.assert_close(gradient, found[0][key], rtol=1e-4, atol=1e-6)
    for block in net.blocks():
        learns = [any(p.grad.any() for p in masker.parameters()) for masker in block.maskers()]
        # A block that keeps no position does not notice its channels.
        assert all(learns) or (mode == "both" and any(learns))


class Model(nn.Module):
    """Loss-mode forward of a model with a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return dict(loss=self.backbone(x)[-1].square().mean())


@both_families
def test_a_budget_without_gradient_is_an_error(family):
    model = Model(make(family)).train()
    block = model.backbone.get_submodule(FIRST[family])
    forward = block.forward
    block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=True)
    hook = BudgetHook()
    hook.attach(model)
    with pytest.raises(RuntimeError, match="has no gradient"):
        model(images(2, 64, 64).requires_grad_())


@both_families
def test_frozen_stages(family):
    net = make(family, frozen_stages=1, freeze_maskers=False).train()
    prefix = {"basic": "layer1.", "dense": "stages.0."}[family]
    for name, parameter in net.named_parameters():
        if name.startswith(prefix):
            assert parameter.requires_grad == (".masker." in name), name
    first = net.get_submodule(FIRST[family])
    assert not first.norm1.training and first.masker.training
    assert net.eval() is net


@both_families
def test_gradients_in_eval_mode(family):
    plain, net, x = make(family), las_mm.prepare(make(family)), images(2, 64, 64)
    run(net, x)
    grads = []
    for one in (plain, net):
        outs = one(x)
        sum(out.square().mean() for out in outs).backward()
        grads.append([p.grad for p in one.parameters()])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*grads))


# Counting and predicting -------------------------------------------------------------------------


@both_families
@needs.FLOPS
def test_flops_of_a_static_network_are_those_that_torch_counts(family):
    net, x = make(family, mode="static"), images(1, 75, 98)
    with sparse.masked_dense(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    report = flops_report(collect_activations(net))
    shape = net.network_shape((75, 98))
    operators = [*shape.stem, *(op for block in shape.blocks for op in block.operators)]
    pools = sum(op.macs() for op in operators if type(op).__name__ == "Pool")
    counted = counter.get_total_flops() / 2 + pools
    assert report.static.item() == pytest.approx(counted, rel=1e-6)
    assert report.ratio.item() == 1


@dynamic
def test_flops_are_what_the_decisions_leave(family, mode):
    """A direct count from masks: every kept output of every image, and the halo that it reads."""
    net, x = make(family, mode=mode, granularity=3), images(3, 64, 70)
    force(net, x, 0.4)
    _, record = run(net, x)
    total = torch.zeros((), dtype=torch.float64)
    for shape, made in zip(record.shape.blocks, record.decisions):
        h, w = shape.h_out, shape.w_out
        kept = halo = torch.ones(3, dtype=torch.float64)
        share = torch.ones(3, dtype=torch.float64)
        if mode == "layer":
            kept = halo = made["layer"].flatten().double()
        elif mode in ("spatial", "both"):
            fine = made["position"].float()
            fine = fine.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, :, :h, :w]
            kept = fine.double().mean((1, 2, 3))
            halo = nn.functional.max_pool2d(fine, 3, 1, 1).double().mean((1, 2, 3))
        if "channel" in made:
            share = made["channel"].double().mean(1)
        for op in shape.operators:
            conv1, conv2 = op.name == "conv1", op.name == "conv2"
            part = halo * share if conv1 else kept * share if conv2 else torch.ones(3)
            total += op.macs() * part.double().mean()
    total += sum(op.macs() for op in record.shape.stem)
    assert flops_report(record).dynamic.item() == pytest.approx(total.item(), rel=1e-6)


@dynamic
def test_latency_is_predicted_and_searched(family, mode):
    net, x = make(family, mode=mode), images(2, 64, 64)
    run(net, x)
    full, half = (predict(net, "v100", (1, 3, 224, 224), r, None, True, r) for r in (1.0, 0.5))
    assert 0 < half.latency_s < full.latency_s
    assert [child.name for child in half.children][1:] == [f"stage{i}" for i in (1, 2, 3, 4)]
    assert predict(net, "v100").latency_s > 0  # as recorded
    shape = net.network_shape((224, 224))
    if mode != "layer":
        result = search_granularity("v100", shape, rate=0.5)
        assert len(result.stages) == 4 and result.stages[0].choices
    loss = BudgetLoss(target=0.5, metric="latency", device="v100")
    trained = record(net)
    report = loss.latency_report(trained)
    report.dynamic.backward()
    assert report.ratio > 0
    assert all(m.parameters().__next__().grad is not None for m in net.maskers())


def record(net):
    """A record with gradients."""
    net.train()
    net(images(2, 64, 64))
    return collect_activations(net)


@dynamic
def test_pictures(family, mode):
    net, x = make(family, mode=mode), images(2, 64, 96)
    force(net, x, 0.5, seed=3)
    _, activation = run(net, x)
    for image in range(2):
        share = computed_share(activation, image)
        assert share.shape == (64, 96) and 0.1 < share.mean() < 0.9
    pytest.importorskip("matplotlib")
    picture = draw_masks((x[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy(), activation)
    assert picture.ndim == 3


# Compiled and exported ---------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dynamic
def test_compile(dynamo, family, mode):
    net, x = make(family, mode=mode), images(2, 64, 70)
    force(net, x)
    las_mm.prepare(net)
    expected, _ = run(net, x)
    compiled, before = torch.compile(net, backend="eager", fullgraph=True, dynamic=False), x.clone()
    for _ in range(2):
        with torch.no_grad():
            assert_close(compiled(x), expected)
        assert torch.equal(x, before)


@needs.EXPORT
@both_families
def test_export(dynamo, family):
    net, x = las_mm.prepare(make(family)), images(2, 64, 70)
    expected, _ = run(net, x)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        assert_close(program.module()(x), expected)
    name = {"basic": "las_mm.sparse_basic", "dense": "las_mm.sparse_dense_layer"}[family]
    count = Counter(name in str(node.target) for node in program.graph.nodes)[True]
    assert count == len(net.blocks())
    assert_close(run(net, x)[0], expected)


# Tools -------------------------------------------------------------------------------------------


@both_families
def test_predict_command(family, tmp_path, capsys):
    backbone = {
        "basic": "dict(type='las_mm.LASResNet', depth=18, mode='both')",
        "dense": "dict(type='las_mm.LASDenseNet', arch='121')",
    }[family]
    config = tmp_path / "config.py"
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        f"model = dict(type='ImageClassifier', backbone={backbone},\n"
        "    head=dict(type='LinearClsHead', num_classes=10, in_channels=512))\n"
    )
    las_mm_command(
        ["predict", str(config), "--device", "v100", "--shape", "224", "224", "--rate", "0.5"]
    )
    said = capsys.readouterr().out
    assert "stage4" in said


@pytest.mark.parametrize("mode", ["spatial", "layer"])
@both_families
def test_engines_of_the_benchmark(family, mode, tmp_path):
    config = {
        "basic": dict(type="las_mm.LASResNet", depth=18, base_channels=16, stem_channels=16),
        "dense": dict(type="las_mm.LASDenseNet", arch=TINY),
    }[family]
    config = ConfigDict(config, mode=mode, out_indices=(1, 3))
    net, x = make(family, mode=mode, out_indices=(1, 3)), images(2, 64, 64)
    subject = make_subject(net, config, x, "fp32", 1, tmp_path)
    norms = [m for m in subject.twin.modules() if isinstance(m, nn.BatchNorm2d)]
    first = {"basic": 0, "dense": len(net.blocks()) + 4}  # those that precede convolutions
    assert len(norms) == first[family]
    for name in ("eager-nchw", "eager-nhwc", "las_mm-static"):
        outputs = engines.BUILDERS[name](subject).outputs()
        assert relative_error(outputs, subject.expected) < 1e-4
    force(net, x)
    dense, ours = (engines.BUILDERS[name](subject).outputs() for name in ("masked-dense", "las_mm"))
    assert relative_error(ours, dense) < 1e-4
