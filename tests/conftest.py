"""Fixtures for everything that needs data or a whole detector, small enough for one CPU core."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

import needs

ROOT = Path(__file__).resolve().parents[1]
STUBS = str(ROOT / "tests" / "stubs")  # for this process and for those that tests start
sys.path.insert(0, STUBS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [STUBS, os.environ.get("PYTHONPATH")]))
try:
    import las_mm  # noqa: F401
except ImportError:
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
# Measurements taken beside other tests must not end up in the user's plan.
os.environ.setdefault("LAS_MM_CACHE", tempfile.mkdtemp(prefix="las_mm_cache_"))

PIXELS = 96  # side of the images that the tiny detector sees
FLIP = dict(type="RandomFlip", prob=0.5)


def load_tool(name: str):
    """The module tools/NAME.py, which is no part of the package."""
    path = ROOT / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"las_mm_tool_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refused(capsys):
    """``refused(program, *arguments)``: the line with which it ends on a user's error."""

    def call(program: Callable, *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program(*arguments)
        assert end.value.code == 2
        said = capsys.readouterr().err
        (line,) = (line for line in said.splitlines() if ": error: " in line)
        assert said.endswith(f"{line}\n") and "Traceback" not in said
        return line

    return call


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_other_files() -> None:
    """No scope and no visualizer, as in a new process: files run in any order."""
    for kind in (DefaultScope, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


@pytest.fixture(scope="session")
def demo_coco(tmp_path_factory) -> Path:
    """A folder in COCO's layout: 6 training and 3 validation images of at most 128 pixels."""
    pytest.importorskip("skimage", reason="the photographs are in the scikit-image wheel")
    out = tmp_path_factory.mktemp("data") / "coco"
    tool = [sys.executable, str(ROOT / "tools" / "make_demo_coco.py"), "--out", str(out)]
    subprocess.run([*tool, "--train", "6", "--val", "3", "--size", "128"], check=True)
    return out


@pytest.fixture(scope="session")
def tiny_config(demo_coco):
    """Writes the config of a Mask R-CNN of about 0.3 M weights that trains in 0.1 s a step.

    ``tiny_config(work_dir, **overrides)`` returns the path of ``work_dir/config.py``: the
    over-fitting config with few channels, 96-pixel images, batches of 2 (3 a training epoch), 2
    epochs, every iteration logged unsmoothed, random flips, one data worker, all seeds set by
    ``IterationSeedHook`` and a checkpoint every epoch, all inside ``work_dir``. It trains on
    train2017 and evaluates on val2017. An override is a config key, dots allowed:
    ``tiny_config(tmp_path, **{"train_cfg.max_epochs": 4})``.
    """
    if not needs.HAS_MMDET:
        pytest.skip(needs.NO_MMDET)

    def write(work_dir: Path, **overrides) -> Path:
        from mmengine.config import Config

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LAS_MM_COCO", f"{demo_coco}/")
            patch.setenv("LAS_MM_PRETRAINED", "none")
            cfg = Config.fromfile(str(ROOT / "configs" / "mask_rcnn_lasnet_r50_overfit.py"))
        cfg.merge_from_dict(_tiny(cfg, Path(work_dir)))
        cfg.merge_from_dict(overrides)
        path = Path(work_dir) / "config.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(str(path))
        return path

    return write


def _tiny(cfg, work_dir: Path) -> dict:
    """The overrides that make the over-fitting config tiny."""
    scale = (PIXELS, PIXELS)
    train, test = (
        [{**step, "scale": scale} if step["type"] == "Resize" else step for step in pipeline]
        for pipeline in (cfg.train_pipeline, cfg.test_pipeline)
    )
    train = [step for step in train if step["type"] != "RandomFlip"]
    train.insert(-1, FLIP)
    hooks = [hook for hook in cfg.custom_hooks if hook["type"] != "las_mm.IterationSeedHook"]
    val = dict(
        num_workers=0,
        persistent_workers=False,
        batch_size=1,
        dataset=dict(
            ann_file="annotations/instances_val2017.json",
            data_prefix=dict(img="val2017/"),
            pipeline=test,
        ),
    )
    evaluator = dict(ann_file=cfg.data_root + "annotations/instances_val2017.json")
    model = dict(
        backbone=dict(base_channels=8, stem_channels=8),
        neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=16),
            bbox_head=dict(in_channels=16, fc_out_channels=32),
            mask_roi_extractor=dict(out_channels=16),
            mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16),
        ),
        train_cfg=dict(
            rpn=dict(sampler=dict(num=64)),
            rpn_proposal=dict(nms_pre=100, max_per_img=50),
            rcnn=dict(sampler=dict(num=32)),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=100, max_per_img=50),
            rcnn=dict(score_thr=0.0, max_per_img=20),  # there are always detections
        ),
    )
    return dict(
        work_dir=str(work_dir),
        model=model,
        train_dataloader=dict(
            batch_size=2, num_workers=1, persistent_workers=False, dataset=dict(pipeline=train)
        ),
        val_dataloader=val,
        test_dataloader=val,
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        train_cfg=dict(max_epochs=2, val_interval=1000),  # and after the last epoch
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=10),
        ],
        default_hooks=dict(
            logger=dict(interval=1),
            checkpoint=dict(type="las_mm.AtomicCheckpointHook", interval=1, max_keep_ckpts=-1),
        ),
        log_processor=dict(window_size=1),
        custom_hooks=[dict(type="las_mm.IterationSeedHook"), *hooks],
        visualizer=dict(vis_backends=[dict(type="LocalVisBackend")]),
    )
