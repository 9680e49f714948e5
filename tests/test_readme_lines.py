"""README's five lines on mmdet's own config train, evaluate and detect, and change nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import needs
from las_mm import LASResNet
from las_mm.models.sparse import masked_dense

ROOT = Path(__file__).resolve().parents[1]
pytestmark = needs.MMDET


def five_lines() -> str:
    """The config that README shows first."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(_base_ = .*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_coco):
    """Weights of a "pretrained" ResNet-101, then two iterations: the runner's folder and config."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    backbone = LASResNet(101, granularity=(4, 4, 2, 1), zero_init_residual=False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics as a trained network has them
    for block in backbone.blocks():
        nn.init.constant_(block.norm3.weight, 0.2)
    with torch.no_grad():
        backbone.train()(torch.randn(4, 3, 64, 64))
    for masker in backbone.maskers():  # decides for each patch, about half of them
        nn.init.normal_(masker.conv.weight, std=0.5)
        nn.init.zeros_(masker.conv.bias)
    weights = folder / "backbone.pth"
    torch.save(backbone.state_dict(), weights)
    path = folder / "readme.py"
    path.write_text(five_lines())
    cfg = Config.fromfile(str(path))
    small = (128, 128)
    for loader, name in (("train", "train2017"), ("val", "val2017"), ("test", "val2017")):
        dataset = cfg[f"{loader}_dataloader"].dataset
        dataset.data_root = f"{demo_coco}/"
        for step in dataset.pipeline:
            if step.type == "Resize":
                step.scale = small
        cfg[f"{loader}_dataloader"].update(num_workers=0, persistent_workers=False)
        if loader != "train":
            cfg[f"{loader}_evaluator"].ann_file = f"{demo_coco}/annotations/instances_{name}.json"
    cfg.merge_from_dict(
        dict(
            work_dir=str(folder / "work"),
            randomness=dict(seed=0),
            model=dict(
                backbone=dict(init_cfg=dict(checkpoint=str(weights))),
                train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=16))),
                test_cfg=dict(
                    rpn=dict(max_per_img=50),
                    rcnn=dict(score_thr=0.0, max_per_img=20),  # it has learnt nothing
                ),
            ),
            train_cfg=dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=2),
            default_hooks=dict(
                checkpoint=dict(by_epoch=False, interval=2, save_optimizer=False),
                logger=dict(interval=1),
            ),
            log_processor=dict(by_epoch=False),
            visualizer=dict(name="readme_lines"),  # mmengine has one per name and process
        )
    )
    Runner.from_cfg(cfg).train()
    return folder / "work", cfg


def test_trains_and_evaluates(trained):
    folder, _ = trained
    (scalars,) = folder.glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in scalars.read_text().splitlines()]
    steps, (result,) = rows[:-1], rows[-1:]
    assert len(steps) == 2
    for row in steps:
        assert np.isfinite(row["loss"]) and np.isfinite(row["loss_budget"])
        assert 0 < row["latency_ratio"]
    assert "coco/bbox_mAP" in result and "coco/segm_mAP" in result


def test_detects_the_same_in_both_forms(trained, demo_coco):
    from mmdet.apis import DetInferencer

    folder, cfg = trained
    cfg.model.backbone.init_cfg = None
    inferencer = DetInferencer(
        model=cfg, weights=str(folder / "iter_2.pth"), device="cpu", show_progress=False
    )
    images = [str(path) for path in sorted((demo_coco / "val2017").iterdir())]

    def detect() -> list[dict]:
        return inferencer(images, no_save_vis=True)["predictions"]

    fast = detect()
    rates = [float(b.activation.rate) for b in inferencer.model.backbone.blocks()]
    with masked_dense():
        dense = detect()
    assert 0.2 < np.mean(rates) < 0.8
    for a, b in zip(fast, dense):
        assert a["labels"] == b["labels"] and len(a["labels"]) == 20
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-3)
        np.testing.assert_allclose(a["bboxes"], b["bboxes"], atol=0.05)
