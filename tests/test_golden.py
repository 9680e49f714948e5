"""Reference outputs in LAS_MM_GOLDEN: ``simulator_*``, ``adavit_*``, and models with a ``spec``.

By default those beside the checkout, else those in tests/golden. A reference whose
mode is not built yet is skipped by name.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from las_mm import ops
from las_mm.latency import BottleneckShape, block_report
from las_mm.models import released, sparse
from las_mm.registry import MODELS

# Beside a checkout there may be more of them than in it.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"
DEFAULT = BESIDE if BESIDE.is_dir() else Path(__file__).resolve().parent / "golden"
GOLDEN = Path(os.environ.get("LAS_MM_GOLDEN", DEFAULT))
FORMS = ("masked_dense", "sparse")
ABSENT = f"no reference outputs: {GOLDEN} is absent; set LAS_MM_GOLDEN to their directory"


def simulator_rows() -> list:
    params = []
    for path in sorted(GOLDEN.glob("simulator_*.json")):
        for i, row in enumerate(json.loads(path.read_text())):
            parts = (row["device"], f"s{row['stage']}", row["mode"], row["granularity"])
            label = "-".join(map(str, (path.stem, i, *parts, row["rate"])))
            params.append(pytest.param(row, id=label))
    return params or [pytest.param(None, id="simulator", marks=pytest.mark.skip(reason=ABSENT))]


def models() -> list:
    params = []
    for path in sorted(GOLDEN.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "spec" in content:
            params.append(pytest.param(path, id=path.stem))
    return params or [pytest.param(None, id="models", marks=pytest.mark.skip(reason=ABSENT))]


@pytest.mark.parametrize("row", simulator_rows())
def test_simulator(row: dict) -> None:
    mode = row["mode"]
    block = BottleneckShape(
        name="golden",
        stage=row["stage"],
        mode=mode,
        granularity=row["granularity"] if mode == "spatial" else 0,
        c_in=row["cin"],
        width=row["cout"] // 4,
        c_out=row["cout"],
        h_in=row["hin"],
        w_in=row["hin"],
        stride=row["stride"],
        # The published figures leave out the first stage's shortcut convolution.
        downsample=row["first"] and row["stride"] > 1,
    )
    report = block_report(row["device"], block, row["rate"], batch_size=row["batch"])
    assert report.latency_s == pytest.approx(row["latency_s"], rel=1e-3)


def transformers() -> list:
    params = []
    for path in sorted(GOLDEN.glob("adavit_*.json")):
        params += [pytest.param(path, form, id=f"{path.stem}-{form}") for form in FORMS]
    skip = pytest.mark.skip(reason=ABSENT)
    return params or [pytest.param(None, None, id="adavit", marks=skip)]


def relative_error(ours: torch.Tensor, reference: np.ndarray) -> float:
    """Largest difference over largest reference value, in the reference's precision."""
    expected = torch.from_numpy(reference)
    ours = ours.to(expected.dtype).float()
    return float((ours - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("path", models())
def test_model(path: Path) -> None:
    reference = json.loads(path.read_text())
    spec = reference["spec"]
    net = released.load(path.with_suffix(".pth"), spec)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits, features = net(images)
    arrays = np.load(path.with_suffix(".npz"))
    assert relative_error(logits, arrays["logits"]) < 1e-4
    for i, feature in enumerate(features, start=1):
        assert relative_error(feature, arrays[f"feat{i}"]) < 1e-4, f"stage {i}"

    activation = net.activation()
    for key, ours in dict(
        rate=activation.rates,
        rate_dilated=activation.rates_dilated,
        rate_conv3=activation.rates,
        rate_conv2=activation.rates,
        rate_conv1=activation.rates_dilated,
        rate_channel=activation.rates_channel,
        flops_perc=net.flops_percentages(),
    ).items():
        if key in reference:
            expected = np.hstack(reference[key])  # per block, or per stage and block
            assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-6), key
    assert float(net.total_macs()) == pytest.approx(reference["flops"], rel=1e-6)


@pytest.mark.parametrize("path", models())
def test_keys_tell_the_same_network(path: Path) -> None:
    """What is read off keys and shapes is what the specification says, where it says something."""
    spec = json.loads(path.read_text())["spec"]
    checkpoint = torch.load(path.with_suffix(".pth"), weights_only=True)
    expected = released.backbone_config(spec)
    # S is in no key, and skipped layers look like patches.
    net = MODELS.build(dict(expected))
    modes = {block.mode for stage in net.settings for block in stage}
    given = dict(mode=spec["mode"]) if "layer" in modes else {}
    if modes & {"spatial", "both"}:
        given["granularity"] = net.granularity
    found = released.convert(checkpoint, **given)
    assert not found.unused and not found.missing
    read = [
        [{name: getattr(block, name) for name in fields_of(block)} for block in sum(settings, ())]
        for settings in (MODELS.build(dict(found.backbone)).settings, net.settings)
    ]
    assert read[0] == read[1]
    assert found.backbone.get("se_pool", "all") == expected.get("se_pool", "all")


def fields_of(block) -> list[str]:
    """The settings that a block of its mode reads, but the reduction, which may be ambiguous."""
    names = ["mode"]
    if block.mode in ("spatial", "both"):
        names.append("granularity")
    if block.channel:
        names += ["channel_granularity", "channel_masker", "channel_position"]
        names += ["channel_masker_layers"] if block.channel_masker == "mlp" else []
    return names


@pytest.mark.parametrize("path, form", transformers())
def test_transformer(path: Path, form: str) -> None:
    """AdaViT's T2T-ViT: logits, the class token, and every decision."""
    net = released.load(path.with_suffix(".pth"), json.loads(path.read_text()))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(7))
    context = sparse.masked_dense() if form == "masked_dense" else nullcontext()
    with torch.no_grad(), context:
        logits, (token,) = net(images)
    if form == "sparse" and ops.has_kernels("cpu"):
        layers = net.backbone.blocks()
        assert all(layer._executor is not None and layer.why_dense is None for layer in layers)
    arrays = np.load(path.with_suffix(".npz"))
    assert relative_error(logits, arrays["logits"]) < 1e-4
    assert relative_error(token, arrays["cls"]) < 1e-4
    decisions = net.activation().decisions
    for key, axes in dict(token=["token"], head=["head"], layer=["attention", "mlp"]).items():
        made = [
            torch.cat([own[axis] for axis in axes], dim=1) for own in decisions if axes[0] in own
        ]
        assert bool(made) == (key in arrays), key
        if made:
            assert np.array_equal(torch.stack(made, dim=1).numpy(), arrays[key]), key


@pytest.mark.parametrize("path, form", [p for p in transformers() if "sparse" in str(p.id)])
def test_keys_tell_the_same_transformer(path: Path, form: str) -> None:
    """Without the settings the keys tell all but the number of heads, where none decide."""
    spec = json.loads(path.read_text())
    checkpoint = torch.load(path.with_suffix(".pth"), weights_only=True)
    expected = released.convert(checkpoint, spec)
    if not spec["transformer"]["ada_head"]:
        with pytest.raises(ValueError, match="no key tells the heads"):
            released.convert(checkpoint)
        return
    found = released.convert(checkpoint)
    assert not found.unused and not found.missing
    wanted = dict(expected.backbone, head_in_mlp=found.backbone["head_in_mlp"])
    assert found.backbone == wanted
