"""las_mm/benchmark and tools/benchmark.py: masks, checks and figures, never wall-clock times."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load_tool
from las_mm import drawn_masks as masks
from las_mm import preflight
from las_mm.benchmark import (
    contest,
    cuda_engines,
    engines,
    report,
    static_engines,
    whole_model,
)
from las_mm.benchmark.contest import Contestant
from las_mm.benchmark.static_engines import export_onnx
from las_mm.benchmark.subject import fold_batchnorm, load_candidate, randomize
from las_mm.cli import benchmark as command
from las_mm.errors import UserError
from las_mm.models import LASDenseNet, LASRegNet, LASResNet, LAUDT2TViT, collect_activations

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 3, 64, 96)
CONFIG = """
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=True),
    backbone=dict(
        type="las_mm.LASResNet",
        depth=50,
        base_channels=8,
        stem_channels=8,
        out_indices=(0, 1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=4, in_channels=256),
)
"""


@pytest.fixture
def tool(monkeypatch):
    """las_mm.cli.benchmark, hurried, and what it changes in the process put back."""
    monkeypatch.setattr(contest, "ENOUGH", 0.0)
    monkeypatch.setattr(contest, "PAUSE", 0.0)
    threads = torch.get_num_threads()
    yield command
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    preflight.reset_scope()


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def benchmark(tool, config, tmp_path):
    """``benchmark(*arguments)``: the JSON of a short run; defaults come first."""

    def call(*arguments: object, rate: tuple = ("--rate", 0.5)) -> dict:
        out = tmp_path / "out.json"
        defaults = ["--shape", 1, 3, 64, 64, *rate, "--rounds", 2, "--warmup", 0, "--threads", 1]
        if "--engines" not in arguments:
            defaults += ["--engines", "eager", "las_mm-static", "masked-dense"]
        main = load_tool("benchmark").main
        main(list(map(str, [config, *defaults, "--json", out, *arguments])))
        return json.loads(out.read_text())

    return call


@pytest.fixture
def refusal(benchmark, refused):
    """``refusal(*arguments)``: the one line with which the tool exits."""

    def call(*arguments: object, **keywords) -> str:
        message = refused(partial(benchmark, **keywords), *arguments)
        assert message.startswith("benchmark.py: error: ")
        return message

    return call


def small(**kwargs) -> LASResNet:
    kwargs = {"out_indices": (0, 1, 2, 3), "base_channels": 8, "stem_channels": 8, **kwargs}
    backbone = LASResNet(50, **kwargs).eval()
    randomize(backbone)
    return backbone


# masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blob", "random"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_spatial_masks_have_the_exact_rate(kind, rate):
    backbone = small(granularity=(4, 4, 2, 1))
    made = masks.make_masks(backbone, SHAPE, rate, kind)
    shapes = backbone.network_shape(SHAPE[2:]).blocks
    for mask, shape in zip(made, shapes):
        grid = (-(-shape.h_out // shape.granularity), -(-shape.w_out // shape.granularity))
        assert mask.shape == (SHAPE[0], 1, *grid)
        assert mask.flatten(1).sum(1).tolist() == [round(rate * mask[0].numel())] * SHAPE[0]


def test_masks_force_the_maskers_until_released():
    backbone = small()
    made = masks.make_masks(backbone, SHAPE, 0.5, "blob", seed=3)
    masks.force_masks(backbone, SHAPE, 0.5, "blob", seed=3)
    with torch.inference_mode():
        backbone(torch.randn(SHAPE))
        for mask, done in zip(made, collect_activations(backbone).masks):
            assert torch.equal(mask, done.bool())
        masks.release_masks(backbone)
        backbone(torch.randn(SHAPE))
    assert collect_activations(backbone).mean_rate == 1  # maskers start mostly on


def _agreement(mask: torch.Tensor) -> float:
    """Share of horizontal neighbours that are decided alike."""
    return (mask[..., 1:] == mask[..., :-1]).float().mean().item()


def test_blobs_are_coherent_and_differ():
    made = {
        kind: masks.spatial_mask(4, (50, 76), 0.5, kind, torch.Generator().manual_seed(0))
        for kind in ("blob", "random")
    }
    assert _agreement(made["blob"]) > 0.85
    assert 0.4 < _agreement(made["random"]) < 0.6
    for mask in made.values():
        assert not torch.equal(mask[0], mask[1])
    blocks = masks.make_masks(small(), SHAPE, 0.5, "blob")
    assert not torch.equal(blocks[1], blocks[2])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rate", [0.0, 0.37, 1.0])
def test_layer_masks_are_exact_and_balanced(batch, rate):
    backbone = small(mode="layer")
    made = torch.stack(masks.make_masks(backbone, (batch, 3, 64, 64), rate, "blob")).flatten(1)
    assert made.sum() == round(rate * made.numel())
    assert made.sum(1).max() - made.sum(1).min() <= 1


@pytest.mark.parametrize("mode", ["channel", "both"])
def test_channel_masks_have_the_exact_rate(mode):
    backbone = small(mode=mode)
    made = masks.make_channel_masks(backbone, SHAPE, 0.62, seed=3)
    masks.force_masks(backbone, SHAPE, 0.5, "random", seed=3, channel_rate=0.62)
    with torch.inference_mode():
        backbone(torch.randn(SHAPE))
    activation = collect_activations(backbone)
    for mask, done in zip(made, activation.masks_channel):
        assert torch.equal(mask, done.bool())
        assert mask.sum(1).tolist() == [round(0.62 * mask.shape[1])] * SHAPE[0]
    assert any((mask[0] != mask[-1]).any() for mask in made) or SHAPE[0] == 1
    assert (activation.mean_rate < 1) == (mode == "both")


# engines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, dict(deep_stem=True, avg_down=True)], ids=str)
def test_folding_keeps_the_outputs(kwargs):
    backbone = small(mode="static", **kwargs)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = backbone(x)
        folded = fold_batchnorm(backbone)(x)
    assert contest.relative_error(folded, expected) < engines.STATIC_TOLERANCE["fp32"] / 10
    assert not [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_relative_error():
    a = torch.tensor([1.0, -4.0])
    assert contest.relative_error([a], [a]) == 0
    assert contest.relative_error([a, a + 1], [a, a]) == 0.25
    assert contest.relative_error([a * float("nan")], [a]) == float("inf")
    assert contest.relative_error([a], [a, a]) == float("inf")


def _timed(engine: str, kind: str, *seconds: float) -> Contestant:
    return Contestant(engine, kind, tuple, rounds=list(seconds), fastest=min(seconds))


def test_ratios():
    slow, fast = _timed("eager-nchw", "static", 4.0), _timed("openvino", "static", 2.0, 2.0, 9.0)
    dynamic = _timed("las_mm", "ours", 1.0, 1.5, 1.5)
    everybody = [slow, fast, dynamic]
    assert report.best_static([*everybody, _timed("las_mm-static", "ours", 0.1)], "fp32") is fast
    entry = report.compare(dynamic, fast, flops_ratio=0.6)
    assert entry["latency_ratio"] == 0.75
    assert entry["efficiency"] == pytest.approx(0.8)
    assert entry["dynamic"]["median_ms"] == 1500 and entry["dynamic"]["min_ms"] == 1000
    rows = report.make_rows(everybody, 4e9, fast)
    assert [row["ratio"] for row in rows] == [2.0, 1.0, 0.75]
    assert [row["gflops_per_s"] for row in rows] == [2.0, 4.0, None]


def test_int8_is_compared_with_quantised_engines():
    dense, quantised = _timed("openvino", "static", 2.0), _timed("openvino-int8", "static", 1.0)
    for contestant in (dense, quantised):
        contestant.precision = engines.precision_of(contestant.engine, "int8")
    assert (dense.precision, quantised.precision) == ("fp32", "int8")
    assert report.best_static([dense, quantised], "int8") is quantised
    assert report.best_static([dense, quantised], "fp32") is dense
    assert "openvino-int8" in engines.CPU.names("int8")
    assert "openvino-int8" not in engines.CPU.names("fp32")
    for name in engines.CPU.names("int8"):
        assert engines.precision_of(name, "int8") in engines.CPU.static_tolerance


def test_everybody_takes_turns(monkeypatch):
    monkeypatch.setattr(contest, "ENOUGH", 0.0)
    order = []
    pair = [Contestant(name, "static", lambda: None) for name in "ab"]
    for contestant in pair:
        contestant.prepare = lambda name=contestant.engine: order.append(name)
    contest.time_contestants(pair, rounds=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert all(len(c.rounds) == 2 and c.fastest <= c.median for c in pair)


def test_the_timer_times_and_nothing_else_does(monkeypatch):
    monkeypatch.setattr(contest, "PAUSE", 0.0)
    seconds = iter([9.0, 0.3, 9.0, 0.1, 0.25])  # the first of short calls does not count
    monkeypatch.setattr(contest, "SHORT", 10.0)
    done = []

    @contextlib.contextmanager
    def inside():
        done.append("enter")
        yield
        done.append("leave")

    def timer(run):
        run()
        return next(seconds)

    contestant = Contestant("a", "static", lambda: done.append("run"), inside=inside)
    contestant.prepare = lambda: done.append("prepare")
    contest.time_contestants([contestant], rounds=2, warmup=0, timer=timer)
    turn = ["prepare", "enter", "run", "run", "leave"]
    assert done == [*turn, *turn[:-1], "run", "leave"]
    assert contestant.rounds == [0.3, pytest.approx(0.175)] and contestant.fastest == 0.1


# the tool ----------------------------------------------------------------------------------------


def test_result_and_sweep(benchmark, tmp_path):
    plot = tmp_path / "plot.png"
    result = benchmark("--plot", plot, "--whole-model", rate=("--rate", 0.5, 0.0))
    engines_run = ["eager-nchw", "eager-nhwc", "las_mm-static", "masked-dense", "las_mm"]
    assert [row["engine"] for row in result["rows"]] == engines_run
    assert {row["kind"] for row in result["rows"]} == set(contest.KINDS)
    for row in result["rows"]:
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert len(row["rounds_ms"]) == 2
    static = {row["engine"]: row for row in result["rows"] if row["kind"] == "static"}
    best = result["best_static"]
    assert best["median_ms"] == min(row["median_ms"] for row in static.values())
    assert best["median_ms"] == static[best["engine"]]["median_ms"]

    assert [point["rate"] for point in result["sweep"]] == [0.5, 0.0]
    for point in result["sweep"]:
        ratio = point["dynamic"]["median_ms"] / best["median_ms"]
        assert point["latency_ratio"] == pytest.approx(ratio)
        assert point["efficiency"] == pytest.approx(point["flops_ratio"] / ratio)
    half, nothing = result["sweep"]
    assert nothing["activation_rate"] == 0 < nothing["flops_ratio"] < half["flops_ratio"] < 1
    for key in ("dynamic", "flops_ratio", "latency_ratio", "efficiency"):
        assert result[key] == half[key]

    env = result["environment"]
    keys = "cpu threads torch onnxruntime openvino las_mm date dtype shape config masks rate mode"
    assert set(keys.split()) | {"granularity"} <= env.keys()
    assert (env["threads"], env["shape"], env["mode"]) == (1, [1, 3, 64, 64], ["spatial"])
    assert result["skipped"] == []
    assert result["whole_model"]["latency_ratio"] > 0
    assert "random" in result["whole_model"]["note"]
    assert plot.stat().st_size > 0


def test_both_forms_of_the_whole_model_continue_with_the_same_features(config):
    candidate = load_candidate(str(config))
    x = torch.randn(1, 3, 64, 64)
    twin = candidate.backbone.__class__(depth=50, base_channels=8, stem_channels=8).eval()
    seen: list[list[torch.Tensor]] = []
    candidate.model.neck.register_forward_pre_hook(lambda neck, args: seen.append(args[0]))
    calls: list[str] = []
    twin.register_forward_hook(lambda *_: calls.append("static"))
    candidate.backbone.register_forward_hook(lambda *_: calls.append("dynamic"))
    arguments = candidate.model, candidate.path, twin, x, lambda: None, "tensor"
    pair = whole_model.build_whole(*arguments)
    calls.clear()
    for contestant in pair:
        contestant.prepare()
        contestant.run()
    assert calls == ["static", "dynamic"]  # each does its own work
    assert len(seen) == 2 and all(a is b for a, b in zip(*seen))

    def spoil(neck, args):
        args[0][0].add_(1)

    candidate.model.neck.register_forward_pre_hook(spoil)
    pair[0].run()
    with pytest.raises(UserError, match="writes to its backbone's feature maps"):
        pair[1].prepare()


def test_layer_mode_and_bf16(benchmark):
    result = benchmark("--mode", "layer", "--dtype", "bf16", "--engines", "eager", "las_mm-static")
    assert result["environment"]["mode"] == ["layer"]
    assert result["dynamic"]["median_ms"] > 0
    assert 0 < result["rows"][0]["rel_error"] < engines.STATIC_TOLERANCE["bf16"]


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_other_engines_agree(benchmark, package):
    pytest.importorskip(package)
    result = benchmark("--engines", package, "masked-dense")
    assert result["best_static"]["engine"] == package
    assert result["rows"][0]["rel_error"] < engines.STATIC_TOLERANCE["fp32"]


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_quantised_engines(benchmark, package):
    pytest.importorskip("onnxruntime")
    pytest.importorskip(package)
    result = benchmark("--dtype", "int8", "--engines", package, f"{package}-int8", "las_mm-static")
    rows = {row["engine"]: row for row in result["rows"]}
    assert result["best_static"]["engine"] == f"{package}-int8"
    assert rows[f"{package}-int8"]["precision"] == "int8"
    assert rows[package]["precision"] == rows["las_mm"]["precision"] == "fp32"
    assert 1e-4 < rows[f"{package}-int8"]["rel_error"] < 0.5  # it does round
    median = rows["las_mm"]["median_ms"] / rows[f"{package}-int8"]["median_ms"]
    assert result["latency_ratio"] == pytest.approx(median)


def test_int8_needs_a_quantised_engine(refusal):
    message = refusal("--dtype", "int8", "--engines", "eager")
    assert "no static int8 engine can run" in message


def test_the_models_own_masks_on_images(benchmark, tool, config, tmp_path):
    model = load_candidate(str(config)).model
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "weights.pth")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), (200, 110, 50)).save(folder / "a.png")
    arguments = ("--masks", "model", "--checkpoint", tmp_path / "weights.pth", "--images", folder)
    result = benchmark(*arguments, rate=())
    assert result["sweep"][0]["activation_rate"] == 1
    assert result["environment"]["rate"] == 1

    cfg = preflight.load_config(str(config))
    x = masks.load_images([folder / "a.png"], (4, 6), cfg)
    assert x.shape == (1, 3, 4, 6)
    np.testing.assert_allclose(x[0, :, 2, 2], [2.0, 0.0, -1.0])


def _wrong(builder):
    def build(subject):
        contestant = builder(subject)
        contestant.read = lambda outputs: [1.1 * output for output in outputs]
        return contestant

    return build


@pytest.mark.parametrize("engine", ["eager-nhwc", "las_mm"])
def test_wrong_outputs_are_an_error(refusal, monkeypatch, engine, tmp_path):
    monkeypatch.setitem(engines.BUILDERS, engine, _wrong(engines.BUILDERS[engine]))
    message = refusal()
    assert engine in message and "relative error 0.1" in message
    assert not (tmp_path / "out.json").exists()


def test_engines_that_cannot_run_are_named(benchmark, refusal, monkeypatch):
    def broken(subject):
        raise RuntimeError("no such instruction\nat line 1")

    def absent(subject):
        static_engines._require("no_such_engine")

    for name in set(engines.BUILDERS) - {"eager-nhwc", "masked-dense", "las_mm"}:
        monkeypatch.setitem(engines.BUILDERS, name, absent if name == "openvino" else broken)
    result = benchmark("--engines")  # all
    reasons = {entry["engine"]: entry["reason"] for entry in result["skipped"]}
    assert reasons["openvino"] == "not installed: pip install las_mm[benchmark]"
    assert reasons["compile"] == "RuntimeError: no such instruction"
    assert [row["engine"] for row in result["rows"]] == ["eager-nhwc", "masked-dense", "las_mm"]
    assert "engine openvino cannot run: not installed" in refusal("--engines", "openvino")
    assert "engine compile cannot run" in refusal("--engines", "compile")


@pytest.mark.parametrize(
    ("arguments", "rate", "words"),
    [
        (("--shape", 1, 3, 0, 64), ("--rate", 0.5), "[1, 3, 0, 64]"),
        ((), ("--rate", 0.5, 1.5), "1.5"),
        ((), (), "--rate"),
        (("--masks", "model"), (), "--checkpoint"),
        (("--masks", "model", "--checkpoint", "x.pth"), (), "--images"),
        (("--engines", "tensorrt"), ("--rate", 0.5), "tensorrt"),
        (("--engines", "las_mm"), ("--rate", 0.5), "static engine"),
        (("--granularity", 4, 4, 2), ("--rate", 0.5), "[4, 4, 2]"),
        (("--granularity", 4, 4, 2, 0), ("--rate", 0.5), "[4, 4, 2, 0]"),
        (("--rounds", 0), ("--rate", 0.5), "--rounds"),
        (("--threads", -1), ("--rate", 0.5), "-1"),
        (("--mode", "tokens"), ("--rate", 0.5), "tokens"),
        (("--mode", "both", "--channel-rate", 1.5), ("--rate", 0.5), "1.5"),
        (("--plot", "x.txt"), ("--rate", 0.5), "x.txt"),
        (("--images", "x"), ("--rate", 0.5), "--images"),
        (("--whole-model", "--dtype", "bf16"), ("--rate", 0.5), "bf16"),
        (("--whole-model", "--device", "cuda", "--engines"), ("--rate", 0.5), "on cuda"),
        (("--dtype", "fp16"), ("--rate", 0.5), "fp16"),
        (("--engines", "graph"), ("--rate", 0.5), "graph"),
        (("--device", "cuda", "--engines", "winograd"), ("--rate", 0.5), "compile-max-tf32"),
    ],
    ids=str,
)
def test_refusals_before_any_work(refusal, tool, monkeypatch, arguments, rate, words):
    monkeypatch.setattr(tool, "benchmark", lambda *args: pytest.fail("work has begun"))
    assert words in refusal(*arguments, rate=rate)


@pytest.fixture
def fake_gpu(tool, monkeypatch):
    """``--device cuda`` whose engines run on the CPU; ``fake_gpu(**builders)`` replaces some."""

    def fake(**builders) -> None:
        described = dict(type="cuda", name="NVIDIA A100-SXM4-80GB", capability="8.0")
        absent = cuda_engines.cpu_only("not in tests")
        compilers = dict.fromkeys(cuda_engines.CUDA.aliases["compilers"], absent)
        known = replace(
            cuda_engines.CUDA,
            device="cpu",
            builders={**cuda_engines.CUDA.builders, **compilers, **builders},
            timer=contest.wall_time,
            describe=lambda: described,
            check=lambda dtype: None,
        )
        monkeypatch.setitem(tool.ENGINES, "cuda", known)

    monkeypatch.setattr(cuda_engines, "Replay", lambda run: run)
    fake()
    return fake


def test_result_of_a_gpu(benchmark, fake_gpu, capsys):
    result = benchmark("--device", "cuda", "--engines", rate=("--rate", 0.5, 0.0))
    pairs = ["eager-nchw", "eager-nhwc", "graph", "las_mm-static", "las_mm", "las_mm-graph"]
    names = [name + suffix for name in pairs for suffix in ("", "-tf32")]
    names.insert(names.index("las_mm-static"), "masked-dense")
    rows = {row["engine"]: row for row in result["rows"]}
    assert sorted(rows) == sorted(names)
    skipped = {entry["engine"]: entry["reason"] for entry in result["skipped"]}
    assert set(skipped) == {*cuda_engines.CUDA.aliases["compilers"], "onnxruntime", "openvino"}
    assert "CPU" in skipped["onnxruntime"]
    cpu = benchmark()
    assert result.keys() - cpu.keys() == {"roofline"} and cpu["device"]["type"] == "cpu"
    assert result["device"]["name"] == "NVIDIA A100-SXM4-80GB"
    assert rows["las_mm-static-tf32"]["gflops_per_s"] > 0
    floors = result["roofline"]["sweep"][0]["floor_ms"]
    assert set(floors["fp32"]) == {"V100", "A100", "H100", "TX2"}
    assert rows["las_mm-graph-tf32"]["floor_ms"] == floors["tf32"]["A100"]
    for i, point in enumerate(result["sweep"]):  # the fastest of las_mm's forms
        assert point["dynamic"]["engine"] in cuda_engines.CUDA.dynamic
        ours = [rows[name]["median_ms"] for name in cuda_engines.CUDA.dynamic]
        assert i or point["dynamic"]["median_ms"] == min(ours)
    printed = capsys.readouterr().out
    assert "floor ms (A100)" in printed and "roofline floor, rate 0.500, fp32, ms: V100" in printed


def test_forms_that_cannot_run_on_a_gpu(benchmark, refusal, fake_gpu, monkeypatch):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_engines, "Replay", fails)
    arguments = ("--device", "cuda", "--dtype", "bf16")
    result = benchmark(*arguments, "--engines", rate=("--rate", 0.5, 0.0))
    assert not [row for row in result["rows"] if "-tf32" in row["engine"]]
    reasons = [s["reason"] for s in result["skipped"] if s["engine"] == "las_mm-graph"]
    assert reasons == ["RuntimeError: operation not permitted when stream is capturing"]
    message = refusal(*arguments, "--engines", "eager", "las_mm-graph")
    assert "engine las_mm-graph cannot run" in message
    assert "TF32 is a form of fp32" in refusal(*arguments, "--engines", "eager-nhwc-tf32")
    fake_gpu(las_mm=_wrong(cuda_engines.BUILDERS["las_mm"]))
    assert "las_mm computes something else" in refusal(*arguments, "--engines", "eager")


def test_refusals_of_the_config(refusal, config):
    assert "missing.pth" in refusal("--checkpoint", "missing.pth")
    config.write_text(CONFIG.replace("las_mm.LASResNet", "ResNet"))
    assert "LASResNet" in refusal()
    config.write_text(CONFIG.replace("depth=50", "depth=51"))
    assert "51" in refusal()


@pytest.mark.parametrize("mode", ["channel", "both"])
def test_a_gpu_runs_networks_that_skip_channels(benchmark, fake_gpu, mode):
    fake_gpu()
    ours = ("las_mm", "las_mm-tf32", "las_mm-graph", "las_mm-graph-tf32")
    result = benchmark("--device", "cuda", "--mode", mode, "--engines", "eager-nhwc", *ours)
    assert result["environment"]["mode"] == [mode]
    times = {row["engine"]: row["median_ms"] for row in result["rows"]}
    assert set(ours) < set(times) and min(times.values()) > 0
    assert "roofline" not in json.dumps(result)  # no floor is known for them


@pytest.mark.parametrize("mode", ["channel", "both"])
def test_a_gpu_without_the_kernels_that_skip_channels(fake_gpu, refusal, tool, monkeypatch, mode):
    fake_gpu()
    monkeypatch.setattr(tool.ops, "has_channel_kernels", lambda device: False)
    message = refusal("--device", "cuda", "--mode", mode, "--engines")
    assert f"--mode {mode} needs the kernels that skip channels" in message
    assert "FORCE_CUDA=1 pip install" in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: LAUDT2TViT(
            dict(embed_dims=64, num_layers=1, num_heads=2), mode="static", img_size=64
        ),
        lambda: LASResNet(18, base_channels=8, stem_channels=8, mode="static"),
        lambda: LASRegNet("regnety_400mf", mode="static"),
        lambda: LASDenseNet("121", mode="static"),
    ],
    ids=["T2T-ViT", "ResNet", "RegNetY", "DenseNet"],
)
def test_static_networks_can_be_exported_for_the_rivals(make, tmp_path):
    """An engine that cannot take part would leave the comparison to slower ones."""
    path = tmp_path / "static.onnx"
    try:
        export_onnx(make().eval(), torch.randn(1, 3, 64, 64), path, ["y"])
    except Exception as error:  # every operation had its ONNX form by then
        assert "onnx is not installed" in str(error)
    else:
        assert path.stat().st_size > 10_000
