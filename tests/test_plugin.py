"""The backbone drops into stock models, built from config, by its name alone."""

import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import needs

BACKBONE = dict(type="las_mm.LASResNet", depth=50, base_channels=8, stem_channels=8)


def train_step(model, data) -> dict:
    model.train()
    before = [masker.conv.bias.clone() for masker in model.backbone.maskers()]
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = model.train_step(data, wrapper)
    after = [masker.conv.bias for masker in model.backbone.maskers()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before)), "maskers must learn"
    return losses


def test_mmpretrain_classifier():
    init_default_scope("mmpretrain")
    model = MODELS.build(
        dict(
            type="mmpretrain.ImageClassifier",
            backbone=BACKBONE,
            neck=dict(type="GlobalAveragePooling"),
            head=dict(type="LinearClsHead", num_classes=10, in_channels=256),
        )
    )
    from mmpretrain.structures import DataSample

    images = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    losses = train_step(model, dict(inputs=torch.stack(images), data_samples=samples))
    assert losses["loss"].isfinite()
    model.eval()
    result = model.test_step(dict(inputs=torch.stack(images), data_samples=samples))
    assert result[0].pred_score.shape == (10,)


@needs.MMDET
def test_mmdet_retinanet():
    init_default_scope("mmdet")
    cfg = Config.fromfile("configs/retinanet_lasnet_r101.py")
    cfg.model.backbone = dict(BACKBONE, out_indices=(0, 1, 2, 3))
    cfg.model.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    model = MODELS.build(cfg.model)
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=(96, 128), scale_factor=(1, 1)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 60.0, 70.0]]), labels=torch.tensor([3])
    )
    image = torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    losses = train_step(model, dict(inputs=[image], data_samples=[sample]))
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("scope", ["mmdet", "mmpretrain", "mmengine"])
def test_found_without_custom_imports(scope):
    """mmengine finds las_mm.LASResNet from any scope in a fresh process."""
    code = (
        "from mmengine.registry import MODELS, init_default_scope\n"
        f"init_default_scope('{scope}')\n"
        "net = MODELS.build(dict(type='las_mm.LASResNet', depth=50, base_channels=8))\n"
        "print(type(net).__module__)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("las_mm.models.resnet")


def test_missing_dependency_is_named(monkeypatch):
    from las_mm import dependencies

    monkeypatch.setitem(dependencies.MINIMUM, "mmnothing", (1, 0))
    with pytest.raises(dependencies.MissingDependencyError, match="pip install 'mmnothing>=1.0'"):
        dependencies.require("mmnothing", "this test")
    monkeypatch.setitem(dependencies.MINIMUM, "mmengine", (99, 0))
    with pytest.raises(dependencies.MissingDependencyError, match="99.0, found 0"):
        dependencies.require("mmengine", "this test")


def run_import(folder, module: str = "las_mm") -> str:
    """The last line that importing a module prints where ``folder`` hides the real packages."""
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def fake_package(folder, name: str, version: str, code: str = "") -> None:
    package = folder / name
    package.mkdir()
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    (package / "__init__.py").write_text(f"from .version import __version__\n{code}")


def test_packages_that_refuse_one_another_are_named(tmp_path):
    """As mmdet 3.3.0 refuses mmcv 2.2.0: said at import, not where mmdet is first needed."""
    fake_package(tmp_path, "mmcv", "2.2.0")
    check = (
        "import mmcv\n"
        "assert mmcv.__version__ < '2.2.0', (\n"
        "    f'MMCV=={mmcv.__version__} is used but incompatible. '\n"
        "    'Please install mmcv>=2.0.0rc4, <2.2.0.')\n"
    )
    fake_package(tmp_path, "mmdet", "3.3.0", check)
    line = run_import(tmp_path)
    assert "MissingDependencyError: mmdet refuses another package (MMCV==2.2.0 is used" in line
    assert "mmcv 2.2.0, mmdet 3.3.0" in line  # what was found, and what works:
    assert "torch 2.1.2 with mmengine 0.10.7, mmcv 2.1.0, mmdet 3.3.0" in line


def test_old_torch_is_named(tmp_path):
    fake_package(tmp_path, "torch", "2.0.1+cu117")
    line = run_import(tmp_path)
    assert "las_mm needs torch>=2.1; found torch 2.0.1+cu117, mmengine " in line
    assert "torch 2.1.2 with mmengine 0.10.7" in line


def test_a_transformers_that_mmpretrain_cannot_use_is_named(tmp_path):
    pytest.importorskip("pycocotools", reason="without it mmpretrain leaves transformers alone")
    # None of the names of version 4 but the one that torch 2.1 asks for.
    fake_package(tmp_path, "transformers", "5.17.0", "from . import configuration_utils\n")
    (tmp_path / "transformers/configuration_utils.py").write_text("class PretrainedConfig: pass\n")
    info = tmp_path / "transformers-5.17.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.17.0\n")
    line = run_import(tmp_path, "las_mm.models")
    assert "needs mmpretrain.models, which cannot be imported beside transformers 5.17.0" in line
    assert "pip install 'transformers<5'" in line
