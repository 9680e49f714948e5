"""Every config under configs/ builds, and says what the recipe says."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from las_mm import preflight

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py"))
RECIPES = {  # FLOPs target, backbone lr multiplier
    "mask_rcnn": (0.4, 0.5),
    "faster_rcnn": (0.5, 0.5),
    "retinanet": (0.5, 0.2),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LAS_MM_PRETRAINED", "none")
    monkeypatch.setenv("LAS_MM_COCO", "/data/somewhere")


@pytest.mark.parametrize("name", CONFIGS)
def test_builds(name):
    cfg = Config.fromfile(ROOT / "configs" / name)
    model = preflight.build_model(cfg)
    preflight.check_hooks(cfg, model)
    assert cfg.train_dataloader.dataset.data_root == "/data/somewhere/"
    assert cfg.val_evaluator.ann_file.startswith("/data/somewhere/annotations/")


@pytest.mark.parametrize("detector", RECIPES)
def test_recipe(detector):
    target, lr_mult = RECIPES[detector]
    cfg = Config.fromfile(ROOT / "configs" / f"{detector}_lasnet_r101.py")
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    assert hooks["las_mm.BudgetHook"]["loss"]["target"] == target
    assert hooks["las_mm.TemperatureHook"] == dict(
        type="las_mm.TemperatureHook", start=0.1, schedule="constant"
    )
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.backbone == dict(lr_mult=lr_mult, decay_mult=0.9)
    assert tuple(cfg.model.backbone.granularity) == (4, 4, 2, 1)
    assert cfg.train_cfg.max_epochs == 12
    twin = Config.fromfile(ROOT / "configs" / f"{detector}_resnet_r101.py")
    assert twin.model.backbone.mode == "static"
    init_default_scope("mmdet")
    assert not MODELS.build(twin.model).backbone.maskers()


def test_pretrained_weights_freeze_what_they_justify(monkeypatch):
    path = ROOT / "configs" / "mask_rcnn_lasnet_r101.py"
    scratch = Config.fromfile(path).model.backbone
    assert scratch.init_cfg is None and scratch.frozen_stages == -1 and not scratch.norm_eval
    monkeypatch.delenv("LAS_MM_PRETRAINED")
    static = Config.fromfile(path).model.backbone
    assert static.init_cfg.checkpoint == "torchvision://resnet101"
    assert static.frozen_stages == 1 and static.norm_eval
    monkeypatch.setenv("LAS_MM_PRETRAINED", "weights.pth")
    assert Config.fromfile(path).model.backbone.init_cfg.checkpoint == "weights.pth"


def test_data_root_defaults(monkeypatch):
    monkeypatch.delenv("LAS_MM_COCO")
    cfg = Config.fromfile(ROOT / "configs" / "mask_rcnn_lasnet_r101.py")
    assert cfg.train_dataloader.dataset.data_root == "data/coco/"
