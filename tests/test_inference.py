"""The lines of docs/inference.md: OpenMMLab's inference interfaces and SAHI on dynamic models."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

import needs
from las_mm import ops, preflight
from las_mm.models import collect_activations
from las_mm.models.sparse import masked_dense

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not ops.has_block_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


def lines(about: str) -> str:
    """The code of docs/inference.md that speaks of ``about``."""
    text = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if about in code
    ]
    return found


def undecided(cfg: Config, folder: Path, name: str) -> None:
    """Write weights whose maskers keep about half, and whose blocks do something."""
    torch.manual_seed(0)
    model = preflight.build_model(cfg)
    model.init_weights()
    if hasattr(model, "roi_head"):  # SAHI refuses masks of scattered pixels: these fill their boxes
        nn.init.constant_(model.roi_head.mask_head.conv_logits.bias, 20.0)
    for part, parameter in model.backbone.named_parameters():
        if "masker" in part:
            (nn.init.zeros_ if "bias" in part else nn.init.normal_)(parameter)
    for block in model.backbone.blocks():
        if hasattr(block, "norm3_name"):
            nn.init.constant_(block.norm3.weight, 0.2)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / name)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (128, 96), interpolation=cv2.INTER_CUBIC))
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory, tiny_config) -> dict[str, str]:
    """A small Mask R-CNN that puts out whatever it finds."""
    folder = tmp_path_factory.mktemp("detector")
    overrides = {"model.test_cfg.rcnn.score_thr": 0.0, "model.test_cfg.rcnn.max_per_img": 5}
    path = tiny_config(folder, **overrides)
    undecided(Config.fromfile(str(path)), folder, "checkpoint.pth")
    return {"config.py": str(path), "checkpoint.pth": str(folder / "checkpoint.pth")}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> dict[str, str]:
    """A small T2T-ViT with the test pipeline of the CIFAR-10 config."""
    folder = tmp_path_factory.mktemp("classifier")
    cfg = Config.fromfile(str(ROOT / "configs" / "laudnet_t2tvit_cifar10_flops.py"))
    cfg.model.backbone.arch = dict(embed_dims=32, num_layers=3, num_heads=4)
    cfg.model.head.update(in_channels=32, num_classes=3)
    cfg.dump(str(folder / "classifier.py"))
    undecided(cfg, folder, "classifier.pth")
    return {name: str(folder / name) for name in ("classifier.py", "classifier.pth")}


def run(code: str, files: dict[str, str]) -> dict:
    """What the lines leave, with the files that are there in the place of those that they name."""
    for name, path in files.items():
        code = code.replace(f'"{name}"', repr(path))
    found: dict = {}
    exec(compile(code, "inference.md", "exec"), found)
    return found


def check(code: str, files: dict[str, str]) -> None:
    """The sparse path ran, skipped something, and gives what the masked-dense path gives."""
    sparse = run(code, files)
    blocks = sparse["model"].backbone.blocks()
    assert {block.why_dense for block in blocks} == {None}
    assert all(block._executor is not None for block in blocks)
    assert 0.05 < float(collect_activations(sparse["model"]).shares.mean()) < 0.95
    with masked_dense():
        dense = run(code, files)
    assert all(block._executor is None for block in dense["model"].backbone.blocks())
    assert len(np.ravel(sparse["labels"]))
    np.testing.assert_array_equal(sparse["labels"], dense["labels"])
    np.testing.assert_allclose(sparse["scores"], dense["scores"], rtol=1e-3, atol=1e-5)
    if "boxes" in sparse:
        np.testing.assert_allclose(sparse["boxes"], dense["boxes"], atol=0.05)


@needs.MMDET
@pytest.mark.parametrize("about", ["DetInferencer", "inference_detector"])
def test_detectors(about, detector, image):
    check(lines(about), {**detector, "image.jpg": str(image)})


def test_classifiers(classifier, image):
    check(lines("ImageClassificationInferencer"), {**classifier, "image.jpg": str(image)})


@needs.MMDET
def test_slices(detector, image):
    pytest.importorskip("sahi", reason="sahi is not installed: pip install sahi")
    check(lines("AutoDetectionModel"), {**detector, "image.jpg": str(image)})
