"""T2T-ViT: tokens, heads, attention and MLP that are left out, on both paths."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SCALE, TOLERANCE
from hypothesis import given, settings
from hypothesis import strategies as st
from mmpretrain.models.backbones import T2T_ViT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import las_mm
from las_mm import ops
from las_mm.benchmark.subject import make_subject
from las_mm.budget import set_budget
from las_mm.cli import main as las_mm_command
from las_mm.drawn_masks import draw_token_masks, force_masks, set_token_offsets
from las_mm.hooks import BudgetHook
from las_mm.latency import predict
from las_mm.losses import BudgetLoss
from las_mm.models import (
    LAUDT2TViT,
    TransformerSettings,
    collect_activations,
    flops_report,
    released,
    sparse,
)
from las_mm.network.transformer import AXES, axes_of_mode, mode_of_axes
from las_mm.registry import MODELS
from las_mm.visualization import computed_share, draw_masks

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
ROOT = Path(__file__).resolve().parents[2]
TINY = dict(embed_dims=32, num_layers=3, num_heads=4)
SIDE = 64  # 4 x 4 tokens
ALL = "token+head+layer"
MODES = ("static", "token", "head", "layer", "attention", "mlp", "token+head", ALL)
SOFTMAX = dict(use_performer=False, token_dims=16)


def make(mode=ALL, seed=0, arch=TINY, **kwargs):
    """A small network in eval mode whose maskers are undecided and whose layers do something."""
    torch.manual_seed(seed)
    net = LAUDT2TViT(arch, mode=mode, **dict(dict(img_size=SIDE, out_type="raw"), **kwargs))
    with torch.no_grad():
        net.cls_token.normal_()
        for name, parameter in net.named_parameters():
            if "masker" in name:
                (nn.init.zeros_ if "bias" in name else nn.init.normal_)(parameter)
            elif "encoder" in name and parameter.dim() == 2:
                nn.init.normal_(parameter, std=1.5 / math.sqrt(parameter.shape[1]))
            elif "encoder" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval()


def images(count, height=SIDE, width=SIDE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)


def run(net, x):
    with torch.no_grad():
        out = net(x)[-1]
    return out, collect_activations(net)


def run_masked_dense(net, x):
    with sparse.masked_dense():
        return run(net, x)


def check(net, x):
    """The sparse path equals masked-dense, in values and in what it says of itself."""
    expected, record = run_masked_dense(net, x)
    actual, own = run(net, x)
    assert {block.why_dense for block in net.blocks()} == {None}
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= TOLERANCE[x.dtype], float(error)
    torch.testing.assert_close(own.shares, record.shares)
    for ours, theirs in zip(own.decisions, record.decisions):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[axis], made) for axis, made in theirs.items())
    return actual, own


def force(net, **axes):
    """Keep everything but what is said, zeros and ones: tokens (N, 16), heads (N, 4), halves (N,).

    Where one image is given, all do the same.
    """
    kept = {axis: torch.as_tensor(value).float() for axis, value in axes.items()}
    for block in net.blocks():
        if block.masker_token is not None:
            block.masker_token.offset = signs(kept.get("token", torch.ones(1, 16)))
        if block.masker_head is not None:
            block.masker_head.offset = signs(kept.get("head", torch.ones(1, 4)))
        if block.masker_layer is not None:
            halves = [kept.get(axis, torch.ones(1)) for axis in ("attention", "mlp")]
            halves = torch.stack(torch.broadcast_tensors(*halves), dim=1)
            block.masker_layer.offset = signs(halves)


def signs(kept):
    return torch.where(kept > 0, torch.inf, -torch.inf)


# The static network ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["static", ALL])
def test_everything_kept_is_mmpretrains_network(mode):
    net = make(mode, t2t_cfg=SOFTMAX, out_type="cls_token")
    twin = T2T_ViT(
        img_size=SIDE,
        embed_dims=32,
        num_layers=3,
        t2t_cfg=SOFTMAX,
        layer_cfgs=dict(num_heads=4, feedforward_channels=96),
    )
    twin.eval()
    weights = {k: v for k, v in net.state_dict().items() if "masker" not in k}
    twin.load_state_dict(weights)
    assert not net.load_state_dict(twin.state_dict(), strict=False).unexpected_keys
    for masker in net.maskers():
        masker.offset = torch.tensor(torch.inf)
    x = images(2, 96, 64)
    with torch.no_grad():
        (expected,) = twin(x)
        actual = [net(x)[0]]
        with sparse.masked_dense():
            actual.append(net(x)[0])
    for out in actual:
        assert (out - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("arch, published", [("t2t-vit-14", 4.8e9), ("t2t-vit-19", 8.5e9)])
def test_published_flops(arch, published):
    shape = LAUDT2TViT(arch, mode="static").network_shape((224, 224))
    macs = sum(op.macs() for op in shape.stem)
    macs += sum(op.macs() for block in shape.blocks for op in block.operators)
    assert macs == pytest.approx(published, rel=0.01)


def test_flops_are_what_torch_counts():
    """With softmax attention written out as products, which torch's counter sees."""
    net = make("static", t2t_cfg=SOFTMAX)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sparse.masked_dense(), counter:
        net(images(1, 96, 80))
    report = flops_report(collect_activations(net))
    assert float(report.static) == counter.get_total_flops() / 2 == float(report.dynamic)


def test_attention_scale_is_said():
    assert make().attention_scale == "published"
    assert make(t2t_cfg=SOFTMAX).attention_scale == "mmpretrain"
    one, other = (make(t2t_cfg=SOFTMAX, attention_scale=s) for s in ("published", "mmpretrain"))
    x = images(1)
    for masker in one.maskers() + other.maskers():
        masker.offset = torch.tensor(torch.inf)
    assert (check(one, x)[0] - check(other, x)[0]).norm() > 1e-3
    stem = one.tokens_to_token.attention1.attn
    q, k, v = torch.randn(3, 1, 1, 5, 16).unbind(0)
    weights = torch.softmax(q @ k.mT / 147**0.5, dim=-1)  # 7 x 7 pixels of 3 channels
    torch.testing.assert_close(stem.scaled_dot_product_attention(q, k, v), weights @ v)
    with pytest.raises(ValueError, match="attention_scale must be None or one of published"):
        make(attention_scale="sqrt")


# Both paths --------------------------------------------------------------------------------------


@settings(max_examples=max(1, int(60 * SCALE)), deadline=None)
@given(
    modes=st.lists(st.sampled_from(MODES), min_size=3, max_size=3),
    head_in_mlp=st.sampled_from(["none", "input", "hidden"]),
    rate=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.tuples(st.integers(1, 3), st.integers(16, 90), st.integers(16, 90)),
    softmax=st.booleans(),
    qkv_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_masked_dense(modes, head_in_mlp, rate, dtype, size, softmax, qkv_bias, seed):
    stem = dict(t2t_cfg=SOFTMAX) if softmax else {}
    cfgs = dict(layer_cfgs=dict(qkv_bias=qkv_bias))
    if dtype == torch.bfloat16:  # mmpretrain's scale makes softmaxes that blow up any rounding
        cfgs["attention_scale"] = "published"
    net = make(modes, seed, head_in_mlp=head_in_mlp, **stem, **cfgs).to(dtype)
    x = images(*size, seed=seed).to(dtype)
    force_masks(net, x.shape, rate, "random", seed)
    check(net, x)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("head_in_mlp", ["none", "input", "hidden"])
def test_own_decisions(mode, head_in_mlp):
    net = make(mode, head_in_mlp=head_in_mlp)
    _, record = check(net, images(4))
    made = [m for decisions in record.decisions for m in decisions.values()]
    assert any(not torch.equal(m[0], m[1]) for m in made)
    assert 0.02 < float(flops_report(record).ratio) < 1


EXTREMES = {
    "all kept": {},
    "only the class token": dict(token=[[0] * 16]),
    "no head": dict(head=[[0] * 4]),
    "one head": dict(head=[[0, 0, 1, 0]]),
    "no attention": dict(attention=[0]),
    "no MLP": dict(mlp=[0]),
    "nothing": dict(attention=[0], mlp=[0]),
    "another of each image": dict(
        token=[[1] * 16, [0] * 16, [0, 1] * 8],
        head=[[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]],
        attention=[1, 0, 1],
        mlp=[1, 1, 0],
    ),
}


@pytest.mark.parametrize("head_in_mlp", ["none", "input", "hidden"])
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes(case, head_in_mlp):
    net, x = make(head_in_mlp=head_in_mlp, static_layers=0), images(3)
    force(net, **EXTREMES[case])
    check(net, x)


def test_nothing_computed_passes_tokens_on():
    net, x = make(static_layers=0, final_norm=False), images(2)
    force(net, attention=[0, 0], mlp=[0, 0])
    out, _ = run(net, x)
    with torch.no_grad():
        tokens, _ = net.tokens_to_token(x)
    assert torch.equal(out[:, 1:], tokens + net.pos_embed[:, 1:])
    force(net, token=torch.zeros(2, 16))  # only the class token is computed
    dropped, _ = run(net, x)
    assert torch.equal(dropped[:, 1:], out[:, 1:])
    assert (dropped[:, 0] - out[:, 0]).norm() > 1e-3


def test_dropped_tokens_are_not_read():
    net, x = make("token", static_layers=0), images(1)
    force(net, token=[[1, 0] * 8])
    block = net.encoder[1]
    tokens = torch.randn(1, 17, 32)
    other = tokens.clone()
    other[:, 2::2] = torch.randn(1, 8, 32)
    with torch.no_grad():
        for context in (sparse.masked_dense, torch.no_grad):
            with context():
                a, b = block(tokens), block(other)
                assert torch.equal(b[:, 2::2], other[:, 2::2])
                torch.testing.assert_close(a[:, 1::2], b[:, 1::2])
    run(net, x)


@pytest.mark.parametrize(
    "axes, share",
    [
        (dict(attention=[0]), dict(qkv=0, proj=0)),
        (dict(mlp=[0]), dict(fc1=0, fc2=0)),
        (dict(token=[[0] * 16]), dict.fromkeys(("qkv", "proj", "fc1", "fc2"), 1 / 17)),
        (dict(head=[[1, 0, 0, 1]]), dict(qkv=0.5, proj=0.5)),
    ],
)
def test_only_what_is_kept_is_multiplied(axes, share):
    """Torch counts the products of linear layers; attention runs in a kernel that it does not."""
    net, x = make(static_layers=0), images(1)
    force(net, **axes)
    run(net, x)  # another thing than products may happen the first time
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(x)
    shape = net.network_shape((SIDE, SIDE))
    stem = sum(op.macs() for op in shape.stem)
    expected = 0.0
    for op in shape.blocks[0].operators:
        if op.name in ("qkv", "proj", "fc1", "fc2") or op.masker:
            expected += share.get(op.name, 1) * op.macs()
    counted = counter.get_total_flops() / 2
    # Sums over keys are products with a vector, which are few.
    assert counted == pytest.approx(stem + 3 * expected, rel=0.01)


def test_what_is_given_out_is_not_overwritten():
    net, x = make(out_indices=[0, 1, 2]), images(2)
    with torch.no_grad():
        outs = net(x)
        copies = [out.clone() for out in outs]
        net(images(2, seed=5))
        with sparse.masked_dense():
            expected = net(x)
    for out, copied, dense in zip(outs, copies, expected):
        assert torch.equal(out, copied)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


def test_no_images():
    with torch.no_grad():
        assert make()(images(0))[0].shape == (0, 17, 32)


def test_changes_are_noticed_and_copies_work():
    net, x = las_mm.prepare(make()), images(2)
    before, _ = check(net, x)
    net.encoder[1].ffn.layers[1].weight.data.mul_(-1)
    after, _ = check(net, x)
    assert (after - before).norm() > 1e-3
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(check(twin, x)[0], after)
    net.encoder[1].make_dynamic(TransformerSettings("head"))
    net.eval()
    check(net, x)


def extra_child(layer):
    layer.adapter = nn.Linear(4, 4)


def relu(layer):
    layer.ffn.layers[0][1] = nn.ReLU()


def own_attention(layer):
    layer.attn.scaled_dot_product_attention = lambda q, k, v, attn_mask, dropout_p: v


def own_norm(layer):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    layer.ln2 = Norm(32)


def own_method(layer):
    layer._attend = lambda x, token, heads: x


@pytest.mark.parametrize("change", [extra_child, relu, own_attention, own_norm, own_method])
def test_what_is_unknown_runs_masked_dense_with_the_reason(change):
    net, x = las_mm.prepare(make()), images(2)
    change(net.encoder[1])
    expected, _ = run_masked_dense(net, x)
    actual, _ = run(net, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    reasons = [block.why_dense for block in net.blocks()]
    assert reasons[1] and reasons[0] is reasons[2] is None
    rows = las_mm.explain(net, x[:1], quiet=True).blocks
    assert rows[2].choice == f"masked-dense: {reasons[1]}"


def test_hooks_see_their_layer():
    net, x, seen = make(), images(2), []
    run(net, x)
    net.encoder[1].attn.proj.register_forward_hook(lambda module, args, out: seen.append(out))
    net.encoder[2].register_forward_hook(lambda module, args, out: seen.append(out))
    expected, _ = run_masked_dense(net, x)
    before = list(seen)
    actual, _ = run(net, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(seen[2:], before):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(seen) == 4


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cp", [False, True])
def test_a_step_reaches_every_masker(with_cp):
    net = make(with_cp=with_cp, static_layers=0, head_in_mlp="input").train()
    x = images(2).requires_grad_()
    loss = net(x)[0].square().mean() + BudgetLoss(0.5)(net.network_activation())
    loss.backward()
    for masker in net.maskers():
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in masker.parameters())


def test_checkpointing_changes_no_gradient():
    grads = []
    for with_cp in (False, True):
        net = make(with_cp=with_cp).train()
        torch.manual_seed(3)
        net(images(2).requires_grad_())[0].square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_budget_hook_logs_every_axis():
    from mmpretrain.structures import DataSample

    arch = dict(type="las_mm.LAUDT2TViT", arch=TINY, img_size=SIDE)
    head = dict(
        type="LinearClsHead", num_classes=3, in_channels=32, loss=dict(type="CrossEntropyLoss")
    )
    model = MODELS.build(dict(type="mmpretrain.ImageClassifier", backbone=arch, head=head))
    hook = BudgetHook(loss=dict(type="las_mm.BudgetLoss", target=0.5))
    hook.attach(model)
    labels = [DataSample().set_gt_label(i) for i in range(2)]
    losses = model.train()(images(2), labels, mode="loss")
    names = {"loss_budget", "flops_ratio", *(f"{axis}_rate" for axis in AXES)}
    assert names <= losses.keys()
    assert losses["activation_rate"] == losses["token_rate"]
    hook.remove()


def test_starts_mostly_on():
    torch.manual_seed(0)
    net = LAUDT2TViT(TINY, img_size=SIDE)
    net.init_weights()
    _, record = run(net.eval(), images(4))
    assert float(flops_report(record).ratio) > 0.97


# What follows from the description ---------------------------------------------------------------


def test_flops_by_hand():
    net, x = make(static_layers=0, head_in_mlp="input"), images(3)
    _, record = run(net, x)
    tokens, dim, total = 17, 32, 0
    for own in record.decisions:
        for i in range(3):
            kept, heads = float(own["token"][i].sum()), float(own["head"][i].mean())
            attention = kept * 4 * dim**2 * heads + 2 * kept**2 * dim * heads
            mlp = kept * 3 * dim**2 * (heads + 1)
            total += attention * float(own["attention"][i]) + mlp * float(own["mlp"][i])
            total += dim * (tokens - 1 + 4 + 2)
    stem = sum(op.macs() for op in record.shape.stem)
    assert float(flops_report(record).dynamic) == pytest.approx(stem + total / 3, rel=1e-6)


@pytest.mark.parametrize("device", ["v100", "tx2"])
def test_latency(device):
    net = make()
    full, half = (predict(net, device, (8, 3, 64, 64), rates=r).latency_s for r in (1.0, 0.5))
    static = predict(make("static"), device, (8, 3, 64, 64)).latency_s
    assert half < full and static < full
    run(net, images(2))
    assert 0 < predict(net, device, (8, 3, 64, 64)).latency_s < full
    loss = BudgetLoss(0.5, metric="latency", device=device)
    net.train()(images(2))
    loss(net.network_activation()).backward()
    assert all(p.grad is not None for m in net.maskers() for p in m.parameters())


def test_commands(capsys):
    config = str(ROOT / "configs" / "imagenet" / "laudnet_t2tvit14_all.py")
    for rate, least, most in (("0.5", 0.2, 0.9), ("1", 1.0, 1.5)):
        las_mm_command(
            ["predict", config, "--device", "tx2", "--shape", "224", "224", "--rate", rate]
        )
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "backbone" in line]
        assert least < float(line.split()[-2]) <= most
    with pytest.raises(SystemExit):
        las_mm_command(["search", config, "--device", "tx2", "--shape", "224", "224"])
    assert "there is no granularity to choose" in capsys.readouterr().err


def test_set_budget():
    net = make(arch=dict(embed_dims=64, num_layers=6, num_heads=4), t2t_cfg=dict(token_dims=8))
    found = set_budget(net, 0.8, images(8))
    assert found.flops_ratio == pytest.approx(0.8, abs=0.02) and found.offset
    check(net, images(2))


def test_pictures():
    net, x = make("token", static_layers=0), images(2, 70, 64)
    kept = torch.zeros(1, 20)
    kept[0, :4] = 1  # the first row of tokens
    force(net, token=kept)
    _, record = run(net, x)
    share = computed_share(record, 1)
    assert share.shape == (70, 64)
    assert share[:16].min() == 1 and share[16:].max() == 0
    net = make(static_layers=0)
    force(net, head=[[1, 1, 0, 0]], mlp=[0])
    share = computed_share(run(net, images(1))[1], 0)
    assert np.allclose(share, 0.25)  # half of the heads, and no MLP
    picture = draw_masks(np.zeros((64, 64, 3), np.uint8), run(make(), images(1))[1])
    assert picture.ndim == 3


def test_drawn_masks_have_the_rate():
    shape = make(static_layers=0).network_shape((SIDE, SIDE))
    drawn = draw_token_masks(shape.blocks, 2, 0.5, "blob", 3)
    for own in drawn:
        assert own["token"].sum(dim=1).tolist() == [8, 8]
        assert own["head"].sum(dim=1).tolist() == [2, 2]
    assert sum(int(own["mlp"].sum()) for own in drawn) == 3
    net = make(static_layers=0)
    set_token_offsets(net, drawn)
    _, record = run(net, images(2))
    for own, made in zip(drawn, record.decisions):
        assert torch.equal(made["token"][:, 1:].bool(), own["token"])
        assert torch.equal(made["attention"].bool(), own["attention"])


def test_benchmark_has_static_forms(tmp_path):
    config = dict(type="las_mm.LAUDT2TViT", arch=TINY, img_size=SIDE)
    for stem in ({}, dict(t2t_cfg=SOFTMAX)):
        net = MODELS.build(dict(config, **stem))
        subject = make_subject(net, dict(config, **stem), images(1), "fp32", 1, tmp_path)
        for masker in subject.dynamic.maskers():
            masker.offset = torch.tensor(torch.inf)
        torch.testing.assert_close(run(subject.dynamic, images(1))[0], subject.expected[0])
        assert type(subject.twin) is T2T_ViT


# Checkpoints of others ---------------------------------------------------------------------------


def theirs(net, qkv_in_one):
    """The weights under T2T-ViT's (in one) or AdaViT's names."""
    found = {}
    for key, value in net.state_dict().items():
        if "masker" in key:
            continue
        for old, new in (
            ("encoder.", "blocks."),
            ("ffn.layers.0.0", "mlp.fc1"),
            ("ffn.layers.1", "mlp.fc2"),
            (".ln", ".norm"),
        ):
            key = key.replace(old, new)
        if "blocks" in key and "qkv" in key and not qkv_in_one:
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                found[key.replace("qkv", name)] = part
        else:
            found[key] = value
    return {**found, "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}


@pytest.mark.parametrize("stem", [{}, dict(t2t_cfg=dict(SOFTMAX, token_dims=64))])
@pytest.mark.parametrize("qkv_in_one", [True, False])
def test_authors_names(stem, qkv_in_one):
    net = make("static", attention_scale="published", out_type="cls_token", **stem)
    weights = theirs(net, qkv_in_one)
    other = make(ALL, seed=5, attention_scale="published", out_type="cls_token", **stem)
    found = other.load_state_dict(dict(weights), strict=False)
    assert not found.unexpected_keys
    assert all("masker" in key for key in found.missing_keys)
    with pytest.raises(ValueError, match="no key tells the heads of a T2T-ViT of 32 channels"):
        released.convert({"state_dict": weights})
    arch = dict(TINY, feedforward_channels=96)
    read = released.load({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, arch=arch)
    assert read.backbone.settings == ((TransformerSettings(),) * 3,)
    x = images(1)
    with torch.no_grad():
        logits, features = read(x)
    assert logits.shape == (1, 5)
    torch.testing.assert_close(features[0], run(net, x)[0])


def test_distillation_from_a_static_network(tmp_path):
    torch.manual_seed(0)
    backbone = dict(type="las_mm.LAUDT2TViT", arch=TINY, img_size=SIDE)
    head = dict(
        type="LinearClsHead", num_classes=5, in_channels=32, loss=dict(type="CrossEntropyLoss")
    )
    static = make("static", attention_scale="published", out_type="cls_token")
    torch.save({"state_dict_ema": theirs(static, True)}, tmp_path / "t2t.pth")
    model = MODELS.build(
        dict(
            type="las_mm.DistilledClassifier",
            backbone=backbone,
            head=head,
            static_checkpoint=str(tmp_path / "t2t.pth"),
        )
    )
    model.init_weights()
    for key, value in static.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    x = images(2)
    with torch.no_grad():
        features, _ = run(static, x)
        torch.testing.assert_close(model.teacher.extract_feat(x)[0], features)


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    axes = axes_of_mode(mode)
    assert mode_of_axes(axes) == mode
    net = make(mode)
    assert net.encoder[0].settings.axes == ()
    assert net.encoder[2].settings.axes == axes
    assert net.encoder[2].mode == mode
    assert set(net.network_shape((SIDE, SIDE)).axes) == set(axes)


def test_one_mode_per_layer():
    net = make(["token", "static", "head+mlp"])
    assert [layer.mode for layer in net.encoder] == ["token", "static", "head+mlp"]
    assert make("all", static_layers=0).encoder[0].mode == ALL


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(mode="tokens"), "layer 1: mode of a transformer layer must be 'static', 'all' or"),
        (dict(mode=["token"]), r"mode needs one value or 3 \(one per layer\), got \['token'\]"),
        (dict(mode="head+head"), "mode of a transformer layer must be"),
        (dict(static_layers=4), "static_layers must be from 0 to 3, got 4"),
        (dict(head_in_mlp="both"), "head_in_mlp must be one of none, input, hidden, got 'both'"),
        (dict(arch="t2t-vit-7"), "arch of LAUDT2TViT must be one of t2t-vit-14, t2t-vit-19"),
        (dict(arch=dict(embed_dims=32)), "arch of LAUDT2TViT must be"),
        (dict(arch=dict(TINY, num_heads=5)), "num_heads of arch must divide"),
        (dict(with_cls_token=False), "with_cls_token must be True"),
        (dict(with_cp="no"), "with_cp must be True or False, got 'no'"),
        (dict(embed_dims=4), "embed_dims is part of arch"),
        (dict(runtime="fast"), "runtime must be one of"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    arguments = {"arch": TINY, "img_size": SIDE, **kwargs}
    with pytest.raises(ValueError, match=message):
        LAUDT2TViT(**arguments)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="drop_rat"):
        LAUDT2TViT(TINY, drop_rat=0.1)
    with pytest.raises(ValueError, match="mode of a transformer layer cannot become 'head'"):
        make("token").encoder[1].mode = "head"
    with pytest.raises(ValueError, match="head_in_mlp='hidden' needs channels that the 4 heads"):
        arch = dict(embed_dims=32, num_layers=1, num_heads=4, feedforward_channels=30)
        LAUDT2TViT(arch, static_layers=0, head_in_mlp="hidden")
