"""The configs of docs/other_tasks.md train a step and infer, where their packages are installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from las_mm import ops, preflight
from las_mm.benchmark.subject import randomize
from las_mm.models import collect_activations, flops_report, plan
from las_mm.models.sparse import masked_dense
from las_mm.registry import HOOKS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not ops.has_block_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def example(package: str, folder: Path) -> Config:
    """The config that stands on one of ``package``, with few channels and random weights."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install onedl-{package}")
    text = (ROOT / "docs" / "other_tasks.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf'```python\n(_base_ = "{package}::.*?)```', text, re.DOTALL)
    # Not every mmengine finds every package by its name.
    code = code.replace(f"{package}::", f"{Path(spec.origin).parent}/.mim/configs/")
    (folder / "config.py").write_text(code)
    cfg = Config.fromfile(str(folder / "config.py"))
    cfg.model.backbone.update(base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1)
    return cfg


def step_and_infer(cfg: Config, labels: list, outputs) -> None:
    """A step of training moves the maskers; sparse inference equals masked-dense."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(preflight.build_model(cfg))
    randomize(model.backbone)
    images = torch.rand(2, 3, 64, 64)
    (budget,) = [HOOKS.build(dict(h)) for h in cfg.custom_hooks if "Budget" in h["type"]]
    budget.attach(model.train())
    total, log = model.parse_losses(model(images, labels, mode="loss"))
    assert torch.isfinite(total) and {"loss_budget", "flops_ratio"} <= log.keys()
    total.backward()
    budget.remove()
    for masker in model.backbone.maskers():
        assert all(p.grad.abs().sum() > 0 for p in masker.parameters())
        nn.init.normal_(masker.conv.weight)
        nn.init.zeros_(masker.conv.bias)
    model.eval()
    randomize(model.backbone)
    with torch.no_grad():
        sparse = outputs(model, images)
        assert {block.why_dense for block in model.backbone.blocks()} == {None}
        assert flops_report(collect_activations(model)).ratio < 0.95
        with masked_dense():
            dense = outputs(model, images)
    for ours, theirs in zip(sparse, dense):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_segmentation(tmp_path):
    cfg = example("mmseg", tmp_path)
    from mmseg.structures import SegDataSample

    cfg.model.decode_head.update(in_channels=256, channels=8, num_classes=3)
    cfg.model.auxiliary_head.update(in_channels=128, channels=8, num_classes=3)
    labels = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
        labels.append(sample)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, 64, 64)))

    def outputs(model, images):
        results = model(images, labels, mode="predict")
        assert [tuple(r.pred_sem_seg.data.shape) for r in results] == [(1, 64, 64)] * 2
        return [result.seg_logits.data for result in results]

    step_and_infer(cfg, labels, outputs)


def test_rotated_detection(tmp_path):
    cfg = example("mmrotate", tmp_path)
    from mmdet.structures import DetDataSample
    from mmrotate.structures.bbox import RotatedBoxes
    from mmrotate.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg.model.neck.update(in_channels=[32, 64, 128, 256], out_channels=8)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1)
    labels = []
    for _ in range(2):
        shape = dict(img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64))
        sample = DetDataSample(metainfo=dict(shape, ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(
            bboxes=RotatedBoxes(torch.tensor([[30.0, 30.0, 30.0, 20.0, 0.3]])),
            labels=torch.zeros(1, dtype=torch.long),
        )
        labels.append(sample)

    def outputs(model, images):
        assert len(model(images, labels, mode="predict")) == 2
        return model.backbone(images)

    step_and_infer(cfg, labels, outputs)
