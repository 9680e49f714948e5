"""What `make demo` promises: the demo config learns, within its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import needs

ROOT = Path(__file__).resolve().parents[1]


@needs.MMDET
@pytest.mark.slow
def test_demo_learns(tmp_path):
    environment = {
        **os.environ,
        "LAS_MM_COCO": str(tmp_path / "coco"),
        "LAS_MM_PRETRAINED": "none",
    }

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)

    config = "configs/mask_rcnn_lasnet_r101_demo.py"
    run("tools/make_demo_coco.py", "--out", str(tmp_path / "coco"))
    run("tools/train.py", config, "--work-dir", str(tmp_path / "work"))
    run(
        "tools/test.py",
        config,
        str(tmp_path / "work" / "epoch_20.pth"),
        "--work-dir",
        str(tmp_path / "test"),
        "--show-dir",
        str(tmp_path / "pictures"),
    )
    (log,) = [path for path in (tmp_path / "test").glob("*/*.json")]
    metrics = json.loads(log.read_text())
    assert metrics["coco/bbox_mAP_50"] > 0.3
    assert metrics["coco/segm_mAP_50"] > 0.3
    assert metrics["las_mm/flops_ratio"] == pytest.approx(0.5, abs=0.1)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 12
