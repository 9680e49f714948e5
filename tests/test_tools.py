"""tools/train.py and tools/test.py: what they refuse, in one line, and one run of both."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from las_mm import preflight
from las_mm.hooks import PredictedLatencyHook
from las_mm.models import LASResNet
from las_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1200  # seconds that a process may take on a busy machine


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(f"las_mm_tool_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def refusal(monkeypatch):
    """``refusal('train', *arguments)``: the message with which the tool exits before any work."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def call(name: str, *arguments: object) -> str:
        tool = load_tool(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(tool.Runner, "from_cfg", lambda cfg: pytest.fail("work has begun"))
        with pytest.raises(SystemExit) as end:
            tool.main()
        message = end.value.code  # a text: printed to stderr, and the exit code is 1
        assert message.startswith(f"{name}.py: error: ")
        assert "\n" not in message
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
        ("mode=diagonal", "mode of stage 1 must be one of static, spatial, layer, got 'diagonal'"),
        ("mode=[spatial,layer]", "mode needs one value or 4"),
        ("granularity=[4,0,2,1]", "positive integers"),
        ("granularity=[4,2,1]", "granularity needs one value or 4"),
        ("granularity=1.5", "got 1.5 in stage 1"),
        ("depth=18", "depth of LASResNet must be one of 50, 101, 152, got 18"),
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
        (dict(type=PredictedLatencyHook, device="a100"), "las_mm.PredictedLatencyHook: "),
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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tools/train.py", "{config}", "--resume", "/gone.pth"], "/gone.pth does not exist"),
        (["tools/test.py", "{config}", "x.pth", "--out", "x.txt"], "--out must end in .pkl"),
    ],
    ids=["train", "test"],
)
def test_errors_are_one_line_and_an_exit_code(arguments, words, config):
    done = run(*(argument.format(config=config) for argument in arguments))
    assert done.returncode == 1
    output = done.stdout + done.stderr
    (line,) = (line for line in output.splitlines() if "error:" in line)
    assert words in line
    assert "Traceback" not in output


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
