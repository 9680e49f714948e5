"""``las_mm explain``: the report of las_mm.explain for a config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from las_mm import cli, ops
from las_mm.cli import explain as command
from las_mm.configs import build_model, load_config, reset_scope

pytestmark = pytest.mark.skipif(not ops.native_available(), reason="NATIVE OPS NOT BUILT")
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
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=4, in_channels=256),
)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    yield path
    reset_scope()


def say(*arguments: object) -> None:
    cli.main(["explain", *map(str, arguments)])


def test_noise(config, capsys):
    say(config, "--shape", 64, 96)
    printed = capsys.readouterr().out
    assert "LASResNet-50 on 1x3x64x96" in printed
    rows = [line for line in printed.splitlines() if line.startswith("│ layer")]
    assert len(rows) == 16 and all("spatial" in row for row in rows)
    assert "decided by: " in printed and "the weights are random" in printed


def test_an_image_and_weights(config, tmp_path, monkeypatch):
    model = build_model(load_config(str(config)))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "weights.pth")
    Image.new("RGB", (30, 20), (200, 110, 50)).save(tmp_path / "a.png")
    seen = []

    def explain(backbone, image, quiet):
        seen.append((backbone, image))
        return original(backbone, image, quiet=quiet)

    original = command.explain
    monkeypatch.setattr(command, "explain", explain)
    arguments = [config, tmp_path / "a.png", "--checkpoint", tmp_path / "weights.pth"]
    say(*arguments, "--dtype", "bf16", "--cfg-options", "model.backbone.runtime=sparse")
    ((backbone, image),) = seen
    assert image.shape == (1, 3, 224, 224) and image.dtype == torch.bfloat16
    np.testing.assert_allclose(image[0, :, 5, 5].float(), [2.0, 0.0, -1.0])
    assert backbone.runtime == "sparse"
    assert torch.equal(backbone.conv1.weight, model.backbone.conv1.weight.bfloat16())


def test_refusals(config, tmp_path, refused):
    def refusal(*arguments: object) -> str:
        return refused(say, config, *arguments)

    Path(tmp_path / "text.png").write_text("no image")
    assert "text.png is no image that can be read" in refusal(tmp_path / "text.png")
    assert "gone.png is no image that can be read" in refusal("gone.png")
    assert "checkpoint gone.pth does not exist" in refusal("--checkpoint", "gone.pth")
    assert "must be a local file" in refusal("--checkpoint", "https://host/weights.pth")
    assert "names no dynamic backbone" in refusal("--module", "teacher", "--shape", 32, 32)
    assert "device 'nowhere' cannot be used" in refusal("--device", "nowhere", "--shape", 32, 32)
    assert "float32 or bfloat16" in refusal("--dtype", "fp16", "--shape", 32, 32)
    config.write_text(CONFIG.replace("las_mm.LASResNet", "ResNet"))
    assert "exactly one dynamic backbone such as las_mm.LASResNet" in refusal("--shape", 32, 32)
    config.write_text("default_scope = 'mmpretrain'\n")
    assert "config.py has no model" in refusal()
