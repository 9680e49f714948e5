"""Test-time augmentation: every view counts, and pictures show the first."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from conftest import load_tool
from las_mm import preflight
from las_mm.errors import UserError
from las_mm.hooks import masks as masks_module
from las_mm.models import find_dynamic_backbone
from las_mm.tta import use_tta
from las_mm.visualization import unpad

pytest.importorskip("mmdet")
BOXES = ["--cfg-options", "model.roi_head.mask_head=None", "test_evaluator.metric=bbox"]


@pytest.fixture(autouse=True)
def scope():
    yield
    preflight.reset_scope()


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("tta"))


@pytest.fixture(scope="module")
def checkpoint(config):
    """Weights with which about half of the patches are kept, others in each image."""
    model = preflight.build_model(Config.fromfile(config))
    torch.manual_seed(0)
    for masker in model.backbone.maskers():
        torch.nn.init.normal_(masker.conv.weight, std=1.0)
        torch.nn.init.zeros_(masker.conv.bias)
    path = config.parent / "weights.pth"
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


@pytest.fixture
def configure(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")

    def call(*arguments: object) -> Config:
        tool = load_tool("test")
        monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
        return tool.configure(tool.parse_args())

    return call


def test_every_view_counts(configure, config, checkpoint, tmp_path, monkeypatch):
    cfg = configure(
        config,
        checkpoint,
        "--tta",
        "--work-dir",
        tmp_path,
        "--show-dir",
        tmp_path / "masks",
        *BOXES,
    )
    cfg.launcher, cfg.experiment_name = "none", "tta"
    drawn = []
    draw = masks_module.draw_masks
    monkeypatch.setattr(
        masks_module, "draw_masks", lambda *a, **k: drawn.append(a[1]) or draw(*a, **k)
    )
    runner = Runner.from_cfg(cfg)
    assert type(runner.model).__name__ == "DetTTAModel"
    backbone, seen = find_dynamic_backbone(runner.model), []
    backbone.register_forward_hook(lambda *_: seen.append(backbone.network_activation().detach()))
    runner.test()
    assert len(seen) == 6  # 3 images, flipped and as they are
    views = [record.mean_rate.item() for record in seen]
    assert abs(np.mean(views[::2]) - np.mean(views)) > 1e-5  # the mean of one kind is another
    scalars = runner.message_hub.log_scalars
    assert scalars["test/las_mm/activation_rate"].current() == pytest.approx(np.mean(views))
    (text,) = (path.read_text() for path in tmp_path.glob("*/*.log"))
    assert "6 views, latency predicted for" in text and "per view" in text
    assert [record.mean_rate.item() for record in drawn] == views[::2]
    assert len(list((tmp_path / "masks").iterdir())) == 3


def test_masks_are_refused(configure, config, checkpoint):
    with pytest.raises(UserError, match="merges boxes and no masks; .*mask_head=None"):
        configure(config, checkpoint, "--tta")


def test_classifiers_scores_are_averaged():
    pack = dict(type="PackInputs")
    dataset = dict(type="CIFAR10", pipeline=[pack])
    cfg = Config(
        dict(
            default_scope="mmpretrain",
            model=dict(type="ImageClassifier"),
            test_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dataset)),
        )
    )
    use_tta(cfg, torch.nn.Identity())
    assert cfg.model.type == "AverageClsScoreTTA" and cfg.model.module.type == "ImageClassifier"
    (views,) = cfg.test_dataloader.dataset.dataset.pipeline
    assert views.type == "TestTimeAug" and views.transforms[1] == [pack]


def test_a_classifier_end_to_end(tmp_path):
    """Images of several sizes in two batches, resized, cropped and flipped."""
    for i, size in enumerate([(80, 64), (64, 96), (72, 72)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels)
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="ResizeEdge", scale=72, edge="short"),
        dict(type="CenterCrop", crop_size=64),
        dict(type="PackInputs"),
    ]
    backbone = dict(type="las_mm.LASResNet", depth=50, base_channels=8, stem_channels=8)
    hooks = ["las_mm.PredictedLatencyHook", "las_mm.MaskVisualizationHook"]
    cfg = Config(
        dict(
            default_scope="mmpretrain",
            model=dict(
                type="ImageClassifier",
                backbone=backbone,
                neck=dict(type="GlobalAveragePooling"),
                head=dict(type="LinearClsHead", num_classes=2, in_channels=256),
            ),
            test_dataloader=dict(
                batch_size=2,
                sampler=dict(type="DefaultSampler", shuffle=False),
                collate_fn=dict(type="default_collate"),
                dataset=dict(
                    type="CustomDataset", data_root=str(tmp_path / "data"), pipeline=pipeline
                ),
            ),
            test_evaluator=dict(type="Accuracy", topk=(1,)),
            test_cfg=dict(),
            custom_hooks=[dict(type=hook) for hook in hooks],
            work_dir=str(tmp_path / "work"),
            experiment_name="tta_classifier",
        )
    )
    use_tta(cfg, preflight.build_model(cfg))
    preflight.reset_scope()
    runner = Runner.from_cfg(cfg)
    backbone, seen = find_dynamic_backbone(runner.model), []
    for masker in backbone.maskers():
        torch.nn.init.normal_(masker.conv.weight, std=1.0)
        torch.nn.init.zeros_(masker.conv.bias)
    backbone.register_forward_hook(
        lambda _, __, outs: seen.append((len(outs[-1]), backbone.network_activation().mean_rate))
    )
    runner.test()
    assert [count for count, _ in seen] == [2, 2, 1, 1]
    mean = sum(count * rate.item() for count, rate in seen) / 6
    scalars = runner.message_hub.log_scalars
    assert scalars["test/las_mm/activation_rate"].current() == pytest.approx(mean, rel=1e-5)
    names = sorted(path.name for path in (tmp_path / "work" / "masks").iterdir())
    assert names == ["0.png", "1.png", "2.png"]


def test_own_settings_are_used():
    cfg = Config(
        dict(
            model=dict(type="Mine"),
            tta_model=dict(type="Merge", a=1),
            tta_pipeline=[dict(type="View")],
            test_dataloader=dict(dataset=dict(pipeline=[])),
        )
    )
    use_tta(cfg, torch.nn.Identity())
    assert cfg.model == dict(type="Merge", a=1, module=dict(type="Mine"))
    assert cfg.test_dataloader.dataset.pipeline == [dict(type="View")]


@pytest.mark.parametrize(
    ("scope", "last", "message"),
    [
        ("mmseg", "PackSegInputs", "mmdet and mmpretrain only, and its default_scope is 'mmseg'"),
        ("mmdet", "Resize", "needs tta_pipeline in the config, as its test pipeline ends with Res"),
    ],
)
def test_without_a_default(scope, last, message):
    cfg = Config(
        dict(
            default_scope=scope,
            model=dict(),
            test_dataloader=dict(dataset=dict(pipeline=[dict(type=last)])),
        )
    )
    with pytest.raises(UserError, match=message):
        use_tta(cfg, torch.nn.Identity())


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("horizontal", [[1, 0], [3, 2]]),
        ("vertical", [[2, 3], [0, 1]]),
        ("diagonal", [[3, 2], [1, 0]]),
        (None, [[1, 0], [3, 2]]),
    ],
)
def test_maps_of_flipped_images_are_flipped_back(direction, expected):
    share = np.array([[0, 1, 9], [2, 3, 9], [9, 9, 9]], np.float32)  # 9: padding
    found, window = unpad(
        share, (2, 2), dict(img_shape=(2, 2), flip=True, flip_direction=direction)
    )
    np.testing.assert_array_equal(found, expected)
    assert window == (0, 2, 0, 2)


def test_images_of_several_passes_are_told_apart():
    passes = [(2, "first"), (1, "second")]
    assert masks_module._pass_of(1, passes) == (1, "first")
    assert masks_module._pass_of(2, passes) == (0, "second")
    assert masks_module._pass_of(3, passes) == (0, None)
