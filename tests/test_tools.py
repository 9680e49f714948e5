"""tools/train.py and tools/test.py: what they refuse, in one line, and one run of both.

And of the tools that predict latency, what they print and write.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import needs
from conftest import load_tool
from las_mm import preflight
from las_mm.hooks import PredictedLatencyHook
from las_mm.latency import predict, resnet_shape, search_granularity
from las_mm.models import LASResNet
from las_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1200  # seconds that a process may take on a busy machine


@pytest.fixture
def configure(monkeypatch):
    """``configure('train', *arguments)``: the config that the tool would run."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def call(name: str, *arguments: object) -> Config:
        tool = load_tool(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return tool.configure(tool.parse_args())

    return call


@pytest.fixture
def refusal(monkeypatch, refused):
    """``refusal('train', *arguments)``: the message with which the tool exits before any work."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def call(name: str, *arguments: object) -> str:
        tool = load_tool(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(tool.Runner, "from_cfg", lambda cfg: pytest.fail("work has begun"))
        message = refused(tool.main)
        assert message.startswith(f"{name}.py: error: ")
        return message

    return call


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> Path:
    return tiny_config(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def weights(config) -> dict[str, torch.Tensor]:
    return preflight.build_model(Config.fromfile(config)).state_dict()


@pytest.fixture
def checkpoint(weights, tmp_path) -> Path:
    """Weights that fit ``config``, with the training state that resuming needs."""
    state = dict(meta=dict(epoch=1, iter=3), message_hub={}, optimizer={}, param_schedulers=[])
    torch.save(dict(state_dict=weights, **state), tmp_path / "epoch_1.pth")
    return tmp_path / "epoch_1.pth"


# ---- config and data


def test_missing_config(refusal, tmp_path):
    assert "config file nowhere.py does not exist" in refusal("train", "nowhere.py")


def test_unreadable_config(refusal, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    assert f"config {broken} cannot be read: " in refusal("train", broken)
    broken.write_text("_base_ = './gone.py'\n")
    assert "gone.py" in refusal("train", broken)


def test_options_that_do_not_fit(refusal, config):
    message = refusal("train", config, "--cfg-options", "model.backbone.depth.more=1")
    assert f"--cfg-options do not fit {config}: " in message


@needs.MMDET
@pytest.mark.parametrize("tool", ["train", "test"])
def test_missing_data(tool, refusal, monkeypatch, tmp_path):
    monkeypatch.setenv("LAS_MM_COCO", str(tmp_path / "no_coco"))
    monkeypatch.setenv("LAS_MM_PRETRAINED", "none")
    rest = ["some.pth"] if tool == "test" else []
    message = refusal(tool, ROOT / "configs" / "mask_rcnn_lasnet_r101.py", *rest)
    split = "val2017" if tool == "test" else "train2017"
    assert f"{tmp_path}/no_coco/annotations/instances_{split}.json does not exist" in message
    assert "LAS_MM_COCO" in message
    assert "make_demo_coco.py" in message


def test_missing_images(refusal, config):
    option = "val_dataloader.dataset.data_prefix.img=val1999/"
    message = refusal("train", config, "--cfg-options", option)
    assert "val1999/ does not exist (val_dataloader, data_root" in message


def test_missing_tensorboard(refusal, config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    option = "visualizer.vis_backends.0.type=TensorboardVisBackend"
    assert "pip install tensorboard" in refusal("train", config, "--cfg-options", option)


# ---- model and hooks


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "mode=diagonal",
            "stage 1: mode must be one of static, spatial, channel, layer, both, got",
        ),
        ("mode=[spatial,layer]", "mode needs one value or 4"),
        ("granularity=[4,0,2,1]", "stage 2: granularity must be a positive integer"),
        ("granularity=[4,2,1]", "granularity needs one value or 4"),
        ("granularity=1.5", "stage 1: granularity must be a positive integer"),
        ("depth=20", "depth of LASResNet must be one of 18, 34, 50, 101, 152, got 20"),
        ("type=las_mm.NoNet", "las_mm.NoNet"),
        ("colour=red", "colour"),
    ],
)
def test_wrong_backbone(option, words, refusal, config):
    assert words in refusal("train", config, "--cfg-options", f"model.backbone.{option}")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("1.start=-1", "start of TemperatureHook must be a number > 0, got -1"),
        ("1.type=las_mm.NoHook", "las_mm.NoHook"),
        ("2.loss.target=1.5", "target of BudgetLoss must be in (0, 1], got 1.5"),
        ("3.device=v1000", "v1000"),
    ],
)
def test_wrong_hook(option, words, refusal, config):
    message = refusal("train", config, "--cfg-options", f"custom_hooks.{option}")
    assert message.startswith("train.py: error: custom_hooks of the config, las_mm.")
    assert words in message


def test_hooks_without_a_dynamic_backbone(refusal, config, tmp_path):
    cfg = Config.fromfile(config)
    for key in ("mode", "granularity", "freeze_maskers"):
        cfg.model.backbone.pop(key, None)
    cfg.model.backbone.type = "mmpretrain.ResNet"
    cfg.dump(tmp_path / "static.py")
    message = refusal("train", tmp_path / "static.py")
    assert "las_mm.LASResNet" in message
    assert "remove the las_mm hooks" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="AMP works here")
def test_amp_without_a_gpu(refusal, config):
    assert "--amp needs a GPU" in refusal("train", config, "--amp")


def test_auto_scale_lr_without_a_base_batch_size(refusal, config, tmp_path):
    cfg = Config.fromfile(config)
    cfg.pop("auto_scale_lr")
    cfg.dump(tmp_path / "no_base.py")
    message = refusal("train", tmp_path / "no_base.py", "--auto-scale-lr")
    assert "base_batch_size" in message


# ---- weights


@needs.MMDET
@pytest.mark.parametrize("damage", ["missing", "no checkpoint"])
def test_unreadable_initial_weights(damage, refusal, demo_coco, monkeypatch, tmp_path):
    source = tmp_path / "resnet101.pth"
    if damage == "no checkpoint":
        source.write_text("<html>404</html>")
    monkeypatch.setenv("LAS_MM_COCO", str(demo_coco))
    monkeypatch.setenv("LAS_MM_PRETRAINED", str(source))
    message = refusal("train", ROOT / "configs" / "retinanet_lasnet_r101.py")
    assert f"initial weights {source} cannot be loaded" in message
    assert "set LAS_MM_PRETRAINED to a checkpoint file or URL, or to none" in message


def test_initial_weights_of_another_architecture(
    refusal, weights, demo_coco, monkeypatch, tmp_path
):
    monkeypatch.setenv("LAS_MM_COCO", str(demo_coco))
    monkeypatch.setenv("LAS_MM_PRETRAINED", str(tmp_path / "weights.pth"))
    config = ROOT / "configs" / "retinanet_lasnet_r101.py"
    torch.save({"foo.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    message = refusal("train", config)
    assert "are of another architecture" in message and "conv1.weight" in message
    assert "LAS_MM_PRETRAINED" in message and "none" in message

    net = LASResNet(101, mode="static")
    static = net.state_dict()
    torch.save(
        {f"backbone.{key}": value for key, value in static.items()}, tmp_path / "weights.pth"
    )
    assert "init_cfg.prefix=backbone." in refusal("train", config)
    static["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    torch.save(static, tmp_path / "weights.pth")
    assert "1 have another shape, e.g. layer1.0.conv1.weight" in refusal("train", config)


@needs.MMDET
def test_static_initial_weights_with_a_classifier_fit(configure, demo_coco, monkeypatch, tmp_path):
    monkeypatch.setenv("LAS_MM_COCO", str(demo_coco))
    monkeypatch.setenv("LAS_MM_PRETRAINED", str(tmp_path / "weights.pth"))
    static = LASResNet(101, mode="static").state_dict()
    torch.save({**static, "fc.weight": torch.zeros(10, 2048)}, tmp_path / "weights.pth")
    cfg = configure("train", ROOT / "configs" / "retinanet_lasnet_r101.py")
    assert cfg.model.backbone.init_cfg.checkpoint == str(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "hook, words",
    [
        (dict(device="v100"), "needs type="),
        (dict(type=PredictedLatencyHook, device="v1000"), "las_mm.PredictedLatencyHook: "),
    ],
)
def test_hooks_without_a_registered_name(hook, words, config):
    cfg = Config.fromfile(config)
    cfg.custom_hooks = [hook]
    with pytest.raises(preflight.UserError, match=words):
        preflight.check_hooks(cfg, preflight.build_model(cfg))


def resumed(tool: str, path: object) -> list:
    return ["--resume", path] if tool == "train" else [path]


both_tools = pytest.mark.parametrize("tool", ["train", "test"])


@both_tools
def test_missing_checkpoint(tool, refusal, config):
    message = refusal(tool, config, *resumed(tool, "gone.pth"))
    assert "checkpoint gone.pth does not exist" in message


@both_tools
@pytest.mark.parametrize("change", ["width", "maskers"])
def test_checkpoint_of_another_architecture(tool, change, refusal, config, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    weights = content["state_dict"]
    if change == "width":
        key = "backbone.conv1.weight"
        weights[key] = torch.zeros(16, 3, 7, 7)
        words = "(16, 3, 7, 7) instead of (8, 3, 7, 7)"
    else:
        content["state_dict"] = {k: v for k, v in weights.items() if "masker" not in k}
        words = f"32 of {len(weights)} weights are missing, e.g. backbone.layer1.0.masker"
    torch.save(content, checkpoint)
    message = refusal(tool, config, *resumed(tool, checkpoint))
    assert f"checkpoint {checkpoint} is of another architecture" in message
    assert words in message
    assert "use the config it was trained with" in message


@both_tools
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_checkpoint(tool, kept, refusal, config, checkpoint):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data))])
    message = refusal(tool, config, *resumed(tool, checkpoint))
    assert f"checkpoint {checkpoint} is damaged: " in message


@both_tools
def test_file_that_is_no_checkpoint(tool, refusal, config, tmp_path):
    path = tmp_path / "notes.pth"
    path.write_text("not weights at all\n" * 100)
    message = refusal(tool, config, *resumed(tool, path))
    assert f"checkpoint {path} is damaged: it is no file that torch.save writes" in message
    torch.save([torch.ones(1)], path)
    assert "holds no state_dict" in refusal(tool, config, *resumed(tool, path))


class Foreign:
    """Writes a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self):
        return open, (self.witness, "w")


@both_tools
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_foreign_pickles_need_trust(tool, zipped, refusal, configure, config, checkpoint, tmp_path):
    witness = tmp_path / "code_has_run"
    content = {**torch.load(checkpoint, weights_only=True), "extra": Foreign(witness)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    message = refusal(tool, config, *resumed(tool, checkpoint))
    assert "add --trust-checkpoint" in message
    assert not witness.exists()
    configure(tool, config, *resumed(tool, checkpoint), "--trust-checkpoint")
    assert witness.exists()


def test_resume_from_bare_weights(refusal, config, weights, tmp_path):
    path = tmp_path / "released.pth"
    torch.save(dict(state_dict=weights), path)
    message = refusal("train", config, "--resume", path)
    assert f"{path} holds no training state" in message
    assert f"load_from={path}" in message


def test_marker_of_a_lost_checkpoint(refusal, config, tmp_path):
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_7.pth"))
    message = refusal("train", config, "--work-dir", tmp_path, "--resume")
    assert "epoch_7.pth does not exist" in message


def test_resuming_needs_no_initial_weights(configure, refusal, config, checkpoint, tmp_path):
    cfg = Config.fromfile(config)
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="lost.pth")
    cfg.dump(tmp_path / "pretrained.py")
    start = ["train", tmp_path / "pretrained.py", "--work-dir", tmp_path]
    assert "initial weights lost.pth" in refusal(*start)
    assert "initial weights lost.pth" in refusal(*start, "--resume")  # nothing to resume yet
    (tmp_path / "last_checkpoint").write_text(str(checkpoint))
    cfg = configure(*start, "--resume")
    MODELS.build(cfg.model).init_weights()  # what mmengine's runner does before it resumes


# ---- arguments


def test_out_must_be_a_pickle(refusal, config):
    assert "--out must end in .pkl, got preds.json" in refusal(
        "test", config, "some.pth", "--out", "preds.json"
    )


def test_unknown_device(refusal, config, checkpoint):
    message = refusal("test", config, checkpoint, "--device", "v1000")
    assert "v1000" in message


def test_masks_of_a_static_model(refusal, config, tmp_path):
    option = ["--cfg-options", "custom_hooks=[]", "model.backbone.type=mmpretrain.ResNet"]
    cfg = Config.fromfile(config)
    for key in ("mode", "granularity", "freeze_maskers"):
        cfg.model.backbone.pop(key, None)
    cfg.dump(tmp_path / "config.py")
    arguments = [tmp_path / "config.py", "some.pth", "--show-dir", tmp_path, *option]
    assert "no dynamic backbone" in refusal("test", *arguments)


def test_device_replaces_the_configs(configure, config, checkpoint):
    cfg = configure("test", config, checkpoint, "--device", "tx2")
    devices = [h.device for h in cfg.custom_hooks if h["type"] == "las_mm.PredictedLatencyHook"]
    assert devices == ["tx2"]


def test_work_dir(configure, config, tmp_path):
    assert configure("train", config).work_dir == str(config.parent)
    assert configure("train", config, "--work-dir", tmp_path).work_dir == str(tmp_path)
    bare = tmp_path / "bare.py"
    bare.write_text(f"_base_ = {str(config)!r}\nwork_dir = None\n")
    assert configure("train", bare).work_dir == os.path.join("work_dirs", "bare")


# ---- whole processes


def run(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
    paths = [str(ROOT), os.environ["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **kwargs,
    )


def test_errors_are_one_line_and_an_exit_code(config):
    done = run("tools/train.py", config, "--resume", "/gone.pth")
    assert done.returncode == 2
    output = done.stdout + done.stderr
    (line,) = (line for line in output.splitlines() if "error:" in line)
    assert "/gone.pth does not exist" in line
    assert "Traceback" not in output


@needs.MMDET
def test_train_then_test(tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{"train_cfg.max_epochs": 1, "train_dataloader.num_workers": 0})
    done = run("tools/train.py", config)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "folder" / "predictions.pkl"
    arguments = [config, tmp_path / "epoch_1.pth", "--out", out, "--work-dir", tmp_path / "test"]
    done = run("tools/test.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for stage, side in enumerate((4, 4, 2, 1), start=1):
        assert any(f"│ stage {stage} " in line and f"S={side}" in line for line in lines)
    assert any(line.startswith("│ backbone") for line in lines)
    metrics = next(line for line in reversed(lines) if "coco/bbox_mAP:" in line)
    for key in ("coco/segm_mAP", "flops_ratio", "activation_rate_stage4", "latency_ms"):
        assert f"{key}: " in metrics
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 3
    assert {"img_id", "pred_instances"} <= set(predictions[0])


# ---- tools/predict_latency.py and tools/search_granularity.py


LASNET = ROOT / "configs" / "mask_rcnn_lasnet_r101.py"


@pytest.fixture
def say(monkeypatch, capsys):
    """``say('predict_latency', *arguments)``: what the tool prints, or the error it exits with."""
    monkeypatch.setenv("LAS_MM_PRETRAINED", "none")

    def call(name: str, *arguments: object) -> str:
        try:
            load_tool(name).main(list(map(str, arguments)))
        except SystemExit as end:
            assert end.code == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"{name}.py: error: ")
            return line
        return capsys.readouterr().out

    return call


def cells(text: str, first: str) -> list[str]:
    """The cells of the row of a table that begins with ``first``."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in row.strip("│").split("│")]


@needs.MMDET
def test_predict_latency(say, tmp_path):
    out = tmp_path / "folder" / "prediction.json"
    arguments = [LASNET, "--device", "v100", "--shape", 224, 224, "--rate", 0.5]
    text = say("predict_latency", *arguments, "--depth-of-tree", 2, "--json", out)
    found = json.loads(out.read_text())
    report = predict(resnet_shape(101), "v100", rates=0.5)
    assert found["dynamic"]["latency_s"] == pytest.approx(report.latency_s)
    assert found["ratio"] == pytest.approx(
        report.latency_s / predict(resnet_shape(101).static(), "v100").latency_s
    )
    assert "batch 128 of 224 x 224, rate 0.5" in text
    assert "v100: published" in text
    for name, part, whole in zip(
        ["stem", "stage1", "stage2", "stage3", "stage4"],
        found["dynamic"]["children"],
        found["static"]["children"],
    ):
        times = [f"{1e3 * report['latency_s']:.3f}" for report in (whole, part)]
        ratio = f"{part['latency_s'] / whole['latency_s']:.3f}"
        assert cells(text, name)[3:] == [*times, ratio]
    assert cells(text, "backbone")[-1] == f"{found['ratio']:.3f}"
    assert cells(text, "stage3")[1:3] == ["23", "spatial S=2"]
    assert any(line.startswith("    layer3.0") for line in text.splitlines())  # the tree
    assert "masker_conv1" not in text  # a level below


@needs.MMDET
def test_predict_latency_with_another_mode_and_granularity(say, tmp_path):
    out = tmp_path / "prediction.json"
    arguments = ["--device", "h100", "--shape", 64, 96, "--batch", 2, "--json", out]
    modes = ["--mode", "spatial", "static", "layer", "spatial", "--granularity", 8, 4, 2, 2]
    text = say("predict_latency", LASNET, *arguments, *modes, "--rate", 0.4, "--rate-dilated", 0.6)
    assert [cells(text, f"stage{i}")[2] for i in range(1, 5)] == [
        "spatial S=8", "static", "layer", "spatial S=2",
    ]  # fmt: skip
    shape = resnet_shape(101, (64, 96), modes[1:5], (8, 4, 2, 2))
    expected = predict(shape, "h100", (2, 3, 64, 96), rates=0.4, rates_dilated=0.6)
    assert json.loads(out.read_text())["dynamic"]["latency_s"] == pytest.approx(expected.latency_s)
    assert "h100: datasheet (from data sheets; L2 and launch estimated" in text


@needs.MMDET
def test_predict_latency_says_which_rates_count(say):
    shape = ["--device", "v100", "--shape", 64, 64, "--rate", 0.4]
    assert "rate 0.4, per image" in say("predict_latency", LASNET, *shape)
    text = say("predict_latency", LASNET, *shape, "--mode", "channel", "--channel-rate", 0.6)
    assert "no block has a rate (--rate is not used), channel rate 0.6, per image" in text
    text = say("predict_latency", LASNET, *shape, "--mode", "channel", "--rate", 0.3)
    assert "channel rate 0.3, per image" in text and "not used" not in text
    text = say("predict_latency", LASNET, *shape, "--channel-rate", 0.6)
    assert "rate 0.4, no block has a channel rate (--channel-rate is not used)" in text


@needs.MMDET
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "v1000"], "unknown device 'v1000'; shipped devices: a100,"),
        (["--device", "none.yaml"], "no device file at none.yaml"),
        (["--device", "v100", "--rate", "1.5"], "rates must lie in [0, 1], got 1.5"),
        (["--device", "v100", "--rate", "0.5", "0.5"], "one entry per block (33)"),
        (["--device", "v100", "--shape", "0", "5"], "--shape must be two positive integers"),
        (["--device", "v100", "--batch", "0"], "--batch must be a positive integer"),
        (["--device", "v100", "--granularity", "3", "3"], "granularity needs one value or 4"),
        (["--device", "v100", "--depth-of-tree", "-1"], "--depth-of-tree must be at least 0"),
        (["--device", "v100", "--json", "{tmp}"], "is a folder; name a file"),
        ([], "required: --device"),
    ],
)
def test_predict_latency_refuses(arguments, words, say, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert words in say("predict_latency", LASNET, *arguments)


@pytest.mark.parametrize("tool", ["predict_latency", "search_granularity"])
def test_latency_tools_need_a_config_with_a_dynamic_backbone(tool, say, tmp_path):
    shape = ["--device", "v100", "--shape", 64, 64]
    assert "config file gone.py does not exist" in say(tool, "gone.py", *shape)
    assert f"{tmp_path} is a folder; name a file in it" in say(tool, tmp_path, *shape)
    static = tmp_path / "static.py"
    static.write_text("model = dict(type='mmpretrain.ResNet', depth=50)\n")
    assert "ResNet has no backbone with a latency model" in say(tool, static, *shape)


@needs.MMDET
def test_search_granularity(say, tmp_path):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "out" / name for name in ("found.json", "plot.png", "best.py")}
    text = say(
        "search_granularity", LASNET, "--device", "v100", "--shape", 224, 224, "--top", 3,
        *("--json", files["found.json"], "--plot", files["plot.png"], "--write", files["best.py"]),
    )  # fmt: skip
    expected = search_granularity("v100", resnet_shape(101), top=3)
    (found,) = json.loads(files["found.json"].read_text())["results"]
    assert found["chosen"]["granularity"] == list(expected.chosen.granularity)
    assert found["chosen"]["latency_s"] == pytest.approx(expected.chosen.latency_s)
    assert len(found["settings"]) == 3
    for stage in expected.stages:
        assert f"stage {stage.stage}, map {stage.map_hw[0]} x {stage.map_hw[1]}" in text
    rows = [line for line in text.splitlines() if line.startswith("│ chosen")]
    assert [row.split("│")[2].strip() for row in rows[:4]] == [
        str(side) for side in expected.chosen.granularity
    ]
    assert "-".join(map(str, expected.chosen.granularity)) in rows[4]
    assert cells(text, "config")[1] == "4-4-2-1"
    assert "v100: published" in text
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")

    cfg = Config.fromfile(files["best.py"])
    base = Config.fromfile(LASNET)
    assert cfg.model.backbone.granularity == expected.chosen.granularity
    cfg.model.backbone.granularity = base.model.backbone.granularity
    assert cfg.model == base.model  # nothing else has changed
    prediction = tmp_path / "again.json"
    again = [files["best.py"], "--device", "v100", "--shape", 224, 224, "--json", prediction]
    say("predict_latency", *again)
    dynamic = json.loads(prediction.read_text())["dynamic"]["latency_s"]
    assert dynamic == pytest.approx(expected.chosen.latency_s, rel=0.01)


@needs.MMDET
def test_search_granularity_on_several_devices(say, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--devices", "v100", "tx2", "orin", "h100", "--shape", 96, 128, "--batch", 2]
    out, plot = tmp_path / "found.json", tmp_path / "plot.png"
    text = say("search_granularity", LASNET, *arguments, "--json", out, "--plot", plot)
    content = json.loads(out.read_text())
    assert [found["device"] for found in content["results"]] == ["v100", "tx2", "orin", "h100"]
    curves = content["comparison"]
    for found in content["results"]:
        assert f"{found['device']}: {found['kind']}" in text
        own = curves["devices"][found["device"]]
        assert own["static_s"] == pytest.approx(found["static_s"])
        setting = "-".join(map(str, found["chosen"]["granularity"]))
        half = own["latency_s"][setting][curves["rates"].index(0.5)]
        assert half == pytest.approx(found["chosen"]["latency_s"])
        assert "4-4-2-1" in own["latency_s"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs.MMDET
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "v1000"], "unknown device 'v1000'"),
        (["--device", "v100", "--devices", "tx2"], "not allowed with argument"),
        (["--device", "v100", "--rate", "2"], "rate must be a number in [0, 1], got 2.0"),
        (["--device", "v100", "--plot", "a.txt"], "--plot must end in one of .png"),
        (["--device", "v100", "--write", "a.yaml"], "--write must end in .py"),
        (["--devices", "v100", "tx2", "--write", "a.py"], "--write needs --device"),
        (["--device", "v100", "--min-patches", "9999"], "too small for min_patches=9999"),
        (["--device", "v100", "--top", "0"], "top must be a positive integer"),
        (["--device", "v100", "--batch", "-1"], "--batch must be a positive integer"),
    ],
)
def test_search_granularity_refuses(arguments, words, say):
    assert words in say("search_granularity", LASNET, "--shape", "224", "224", *arguments)


@needs.MMDET
def test_search_granularity_of_static_networks(say):
    twin = ROOT / "configs" / "mask_rcnn_resnet_r101.py"
    text = say("search_granularity", twin, "--device", "v100", "--shape", 64, 64)
    assert "no spatial stage" in text and "set mode to 'spatial'" in text


def test_search_granularity_writes_only_what_the_config_has(say, tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text("model = dict(type='las_mm.LASResNet', depth=50)\n")
    arguments = [bare, "--device", "v100", "--shape", 64, 64]
    assert "chosen" in say("search_granularity", *arguments)
    text = say("search_granularity", *arguments, "--write", tmp_path / "best.py")
    assert "--write sets model.backbone.granularity" in text
    assert not (tmp_path / "best.py").exists()


@needs.MMDET
def test_search_granularity_overwrites_only_its_own(say, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("model = dict()\n")
    arguments = (LASNET, "--device", "tx2", "--shape", 224, 224, "--write")
    assert "was not written by this tool" in say("search_granularity", *arguments, mine)
    assert mine.read_text() == "model = dict()\n"
    found = tmp_path / "found.py"
    say("search_granularity", *arguments, found)
    before = found.read_text()
    say("search_granularity", *arguments, found)
    assert found.read_text() == before
    itself = (found, "--device", "tx2", "--shape", 224, 224, "--write", found)
    assert "would inherit" in say("search_granularity", *itself)
