"""las_mm.explain: what each block did and took."""

from types import SimpleNamespace

import pytest
import torch

import las_mm
from las_mm import ops
from las_mm.models import LASDenseNet, LASResNet, interception

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="NATIVE OPS NOT BUILT")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LASResNet(50, base_channels=8, stem_channels=8, mode=("spatial", "layer") * 2)


def test_rows_and_table(model, capsys):
    explanation = las_mm.explain(model, torch.randn(3, 64, 96))
    assert model.training  # as before
    assert [b.name for b in explanation.blocks[:3]] == ["stem", "layer1.0", "layer1.1"]
    assert len(explanation.blocks) == 17
    for row, block in zip(explanation.blocks[1:], model.blocks()):
        assert row.mode == block.mode
        assert row.granularity == (block.granularity if block.mode == "spatial" else None)
        assert row.rate == pytest.approx(float(block.activation.rate))
        assert row.choice in ("winograd", "direct", "dense")
        assert row.measured_ms > 0
    total = sum(row.measured_ms for row in explanation.blocks)
    assert explanation.measured_ms == pytest.approx(total)
    printed = capsys.readouterr().out
    assert "LASResNet-50 on 1x3x64x96" in printed and "layer4.2" in printed
    assert "layer4.2" in str(explanation)
    reasons = [row.decided_by for row in explanation.blocks[1:]]
    assert set(reasons) == {"measured", "too small to measure"}
    for reason in set(reasons):
        assert f"{reason} ({reasons.count(reason)})" in str(explanation)


def test_prediction_where_the_block_is_large_enough(model):
    model = LASResNet(50, mode="static").eval()
    explanation = las_mm.explain(model, torch.randn(1, 3, 64, 64), quiet=True)
    assert all(row.predicted_ms and row.predicted_ms > 0 for row in explanation.blocks[1:])


def test_block_without_fast_form_says_why():
    model = LASResNet(50, base_channels=8, stem_channels=8, norm_cfg=dict(type="GN", num_groups=4))
    explanation = las_mm.explain(model, torch.randn(3, 64, 64), quiet=True)
    assert "GroupNorm" in explanation.blocks[1].choice
    assert explanation.blocks[1].choice.startswith("masked-dense")


def test_channel_rates_are_shown():
    torch.manual_seed(0)
    mode = ("both", "channel", "static", "static")
    net = LASResNet(50, base_channels=8, stem_channels=8, mode=mode, granularity=2)
    explanation = las_mm.explain(net, torch.randn(3, 64, 64), quiet=True)
    both, channel, static = (explanation.blocks[i] for i in (1, 4, 8))
    assert (both.granularity, both.channel_granularity, both.rate_channel) == (2, 2, 1.0)
    assert (channel.granularity, channel.channel_granularity) == (None, 2)
    assert (static.channel_granularity, static.rate_channel) == (None, None)
    assert "channels" in str(explanation)


def test_stems_and_blocks_say_which_of_two_reasons_it_is():
    small = dict(base_channels=8, stem_channels=8)
    net, image = LASResNet(50, **small), torch.randn(3, 64, 64)

    def runs():
        rows = las_mm.explain(net, image, quiet=True).blocks
        return rows[0].choice, rows[1].choice

    assert runs()[0] == "one pass"
    hooks = [m.register_forward_hook(lambda *_: None) for m in (net.conv1, net.layer1[0].conv2)]
    assert runs() == (
        "as its modules: modules inside have hooks",
        "masked-dense: modules inside have hooks",
    )
    for hook in hooks:
        hook.remove()
    net.maxpool = torch.nn.AvgPool2d(3, 2, 1)
    assert runs()[0] == "as its modules: its pooling is AvgPool2d, not MaxPool2d"
    net.runtime = "dense"
    assert runs() == ("as its modules: runtime='dense'", "masked-dense: runtime='dense'")
    net = LASResNet(50, deep_stem=True, **small)
    assert runs()[0] == "as its modules: its stem is deep"
    net = LASDenseNet(dict(growth_rate=8, depths=[1, 1], init_channels=8))
    assert runs()[0] == "one pass"
    net.stem[3] = torch.nn.AvgPool2d(3, 2, 1)
    assert runs()[0] == "as its modules: its pooling is AvgPool2d, not MaxPool2d"


def test_quiet(model, capsys):
    las_mm.explain(model, torch.randn(1, 3, 32, 32), quiet=True)
    assert capsys.readouterr().out == ""


def test_errors(model):
    with pytest.raises(ValueError, match=r"image must have the 3 channels .* got \(1, 4, 8, 8\)"):
        las_mm.explain(model, torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="float64"):
        las_mm.explain(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"image must have at least one pixel, got \(0, 3, 8, 8\)"):
        las_mm.explain(model, torch.randn(0, 3, 8, 8))
    with pytest.raises(ValueError, match="image must be a tensor, got NoneType"):
        las_mm.explain(model, None)
    with pytest.raises(ValueError, match="exactly one dynamic backbone"):
        las_mm.explain(torch.nn.Conv2d(3, 3, 1), torch.randn(3, 8, 8))


def test_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        las_mm.explian  # noqa: B018


@pytest.mark.parametrize(
    "dtype, capability, refused",
    [
        (torch.float16, (7, 0), "from compute capability 7.5 on, and this GPU has 7.0"),
        (torch.float16, (7, 5), None),
        (torch.bfloat16, (7, 5), "from compute capability 8.0 on, and this GPU has 7.5"),
        (torch.bfloat16, (9, 0), None),
        (torch.float32, (7, 0), None),
    ],
)
def test_gpu_without_tensor_cores_for_a_dtype(dtype, capability, refused, monkeypatch):
    monkeypatch.setattr(interception, "_capability", lambda index: capability)
    x = SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(index=0))
    reason = interception._slow_on_card(x)
    assert reason is None if refused is None else refused in reason
