"""The block of docs/add_a_backbone.md, made outside of the package, gets all that follows."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import las_mm
import needs
from las_mm import ops
from las_mm.hooks import BudgetHook, PredictedLatencyHook
from las_mm.latency import LatencyTable, load_device, operator_cost, predict
from las_mm.latency.analytical.operators import static_conv
from las_mm.models import collect_activations, flops_report, sparse
from las_mm.registry import MODELS
from las_mm.visualization import computed_share, draw_masks

ROOT = Path(__file__).resolve().parents[1]
DYNAMIC = ("spatial", "layer", "channel", "both")


def example() -> str:
    """The lines of the document."""
    text = (ROOT / "docs/add_a_backbone.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("example") / "attention_net.py"
    path.write_text(example())
    spec = importlib.util.spec_from_file_location("attention_net", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    yield made
    MODELS._module_dict.pop("AttentionNet")


def make(mode="spatial", **kwargs):
    torch.manual_seed(0)
    small = dict(base_channels=16, stem_channels=16, out_indices=(0, 1, 2, 3))
    net = MODELS.build(dict(type="AttentionNet", depth=10, mode=mode, **small, **kwargs))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.1)
    for masker in net.maskers():
        for name, parameter in masker.named_parameters():
            nn.init.normal_(parameter, std=0.7) if "weight" in name else nn.init.zeros_(parameter)
    return net.eval()


def run(net, x):
    with torch.no_grad():
        outs = net(x)
    return outs, collect_activations(net)


IMAGES = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_the_example_is_short():
    assert len([line for line in example().splitlines() if line.strip()]) < 90


@needs.FLOPS
def test_flops_of_the_static_network_are_what_torch_counts():
    net = make("static")
    with FlopCounterMode(display=False) as counter:
        _, record = run(net, IMAGES[:1])
    pool = next(op.macs() for op in record.shape.stem if op.name.endswith("pool"))
    report = flops_report(record)
    assert report.static.item() == counter.get_total_flops() / 2 + pool
    assert report.ratio.item() == 1 and not net.maskers()


@pytest.mark.parametrize("mode", DYNAMIC)
def test_flops_are_what_the_decisions_leave(mode):
    _, record = run(make(mode), IMAGES)
    total = sum(op.macs() for op in record.shape.stem)
    for block, made in zip(record.shape.blocks, record.decisions):
        ones = torch.ones(3, dtype=torch.float64)
        heads = made["head"].double().mean(1)
        assert set(made["head"].unique().tolist()) <= {0.0, 1.0}
        layer = made["layer"].flatten().double() if mode == "layer" else ones
        for op in block.operators:
            if op.name in ("qkv", "attention", "proj"):
                total += op.macs() * (layer * heads).mean()
            elif op.name not in ("conv1", "conv2"):
                total += op.macs()
    gated = sum(
        op.macs() * share
        for block, own in zip(record.shape.blocks, shares_by_block(record))
        for op in block.operators
        if op.name in ("conv1", "conv2")
        for share in [own[op.term]]
    )
    assert flops_report(record).dynamic.item() == pytest.approx(float(total + gated), rel=1e-6)
    assert 0 < record.mean_of("head") < 1


def shares_by_block(record):
    shares = iter(record.shares.double().tolist())
    return [{term: next(shares) for term in block.terms} for block in record.shape.blocks]


@pytest.mark.parametrize("mode", DYNAMIC)
def test_latency_is_predicted_per_operator(mode):
    net, device = make(mode), load_device("v100")
    _, record = run(net, IMAGES)
    report = predict(net, device, (1, 3, 64, 96))
    first = report.children[1].children[0]
    found = {child.name: child for child in first.children}
    assert {"qkv", "attention", "proj", "head_masker"} <= found.keys()
    shape = record.shape.blocks[0]
    size = dict(kernel=1, h_out=shape.h_out * shape.w_out, w_out=1, batch_size=1)
    parts = [
        static_conv(device, 16, size["h_out"], **size),
        static_conv(device, size["h_out"], 16, **size),
    ]
    rate = record.axes["head"][0].item() * (
        record.axes["layer"][0].item() if mode == "layer" else 1
    )
    work = sum(part.compute_s + part.memory_s for part in parts)
    launches = sum(part.launch_s for part in parts)
    assert found["attention"].latency_s == pytest.approx(rate * work + launches, rel=1e-6)
    table = LatencyTable(device, record.shape, batch_size=1)
    rates = {axis: values.double().numpy() for axis, values in record.axes.items()}
    assert table.predict_axes(rates).total_s == pytest.approx(report.latency_s, rel=0.1)
    full = predict(net, device, (1, 3, 64, 96), rates=1.0).latency_s
    half = predict(net, device, (1, 3, 64, 96), rates=0.5, rates_channel=0.5).latency_s
    assert half < full


def test_an_operator_without_a_cost_is_refused(module):
    class Unknown(module.Operator):
        def macs(self):
            return 1

    with pytest.raises(ValueError, match="no latency model for gizmo, a Unknown"):
        operator_cost(Unknown("gizmo"), load_device("v100"), 1)


@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("mode", DYNAMIC)
def test_training_logs_and_gradients(mode, with_cp):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = make(mode, with_cp=with_cp)

        def forward(self, x):
            return dict(loss=self.backbone(x)[-1].square().mean())

    model = Model().train()
    BudgetHook(dict(type="las_mm.BudgetLoss", target=0.3)).attach(model)
    losses = model(IMAGES.clone().requires_grad_())
    record = collect_activations(model)
    assert losses["head_rate"].item() == pytest.approx(record.axes["head"].mean().item())
    for stage in range(4):
        rate = losses[f"head_rate_stage{stage + 1}"].item()
        assert rate == pytest.approx(record.axes["head"][stage].item())
        assert rate == pytest.approx(record.decisions[stage]["head"].mean().item())
    (losses["loss"] + 100 * losses["loss_budget"]).backward()
    for block in model.backbone.blocks():
        assert any(p.grad.any() for p in block.masker_head.parameters())
    assert 0 < PredictedLatencyHook("v100").predict(record.detach()).ratio < 1.5
    assert len(model.backbone.maskers()) == (12 if mode == "both" else 8)


@pytest.mark.parametrize("mode", DYNAMIC)
def test_pictures(mode):
    _, record = run(make(mode), IMAGES)
    for image in range(3):
        share = computed_share(record, image)
        expected = 0.0
        for block, made in zip(record.shape.blocks, record.decisions):
            means = [m[image].float().mean().item() for m in made.values()]
            if "position" in made:
                fine = made["position"][image, 0].float()
                fine = fine.repeat_interleave(block.granularity, 0)
                fine = fine.repeat_interleave(block.granularity, 1)
                kept = fine[: block.h_out, : block.w_out].mean().item()
                means[list(made).index("position")] = kept
            expected += torch.tensor(means).prod().item() / len(record.decisions)
        assert share.mean() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    pytest.importorskip("matplotlib")
    picture = draw_masks((torch.rand(64, 96, 3) * 255).byte().numpy(), record)
    assert picture.shape[2] == 3


@pytest.mark.skipif(not ops.has_block_kernels("cpu"), reason="NATIVE OPS NOT BUILT")
@pytest.mark.parametrize("mode", DYNAMIC)
def test_it_runs_masked_dense_and_explain_says_why(mode):
    net = las_mm.prepare(make(mode))
    with sparse.masked_dense():
        expected, _ = run(net, IMAGES)
    actual, _ = run(net, IMAGES)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    explanation = las_mm.explain(net, IMAGES[:1], quiet=True)
    for block, row in zip(net.blocks(), explanation.blocks[1:]):
        assert "AttentionBlock" in block.why_dense
        assert row.choice.startswith("masked-dense") and block.why_dense in row.choice


def test_it_is_built_from_a_config():
    config = dict(
        model=dict(type="mmpretrain.ImageClassifier", backbone=dict(type="AttentionNet", depth=10))
    )
    assert predict(Config(config), "v100", (1, 3, 64, 64), rates=0.5).latency_s > 0
