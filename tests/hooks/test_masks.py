import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("matplotlib")

from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import records  # noqa: E402
from las_mm.hooks.masks import MaskVisualizationHook  # noqa: E402
from las_mm.latency import BottleneckShape, ConvShape, NetworkShape, PoolShape  # noqa: E402
from las_mm.models import LASResNet, collect_activations  # noqa: E402
from las_mm.visualization import (  # noqa: E402
    computed_share,
    draw_masks,
    image_activation,
    unpad,
    write_png,
)

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "mask_rcnn_lasnet_r50_overfit.py"


def block(stage, mode, granularity, hw, stride=1):
    return BottleneckShape(f"b{stage}", stage, mode, granularity, 8, 2, 8, *hw, stride)


def network(input_hw, blocks, masks):
    """A network activation with a stem of stride 4 and these blocks and masks."""
    h, w = (-(-n // 2) for n in input_hw)
    stem = (
        ConvShape("conv", 3, 8, 7, 2, 1, h, w),
        PoolShape("pool", 8, 3, 2, -(-h // 2), -(-w // 2)),
    )
    masks = tuple(None if m is None else torch.tensor(m, dtype=torch.float32) for m in masks)
    rates = torch.tensor([1.0 if m is None else m.mean() for m in masks])
    shape = NetworkShape("net", input_hw, stem, tuple(blocks))
    axes = ["layer" if block.mode == "layer" else "position" for block in blocks]
    decisions = [{} if m is None else {axis: m} for axis, m in zip(axes, masks)]
    return records.record(shape, rates, decisions=decisions)


def test_ragged_patches():
    # 20 x 28 pixels are 5 x 7 outputs, so patches of 2 outputs (8 pixels) end ragged.
    mask = [[[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]]]
    activation = network((20, 28), [block(1, "spatial", 2, (5, 7))], [mask])
    expected = np.zeros((20, 28), np.float32)
    for row, column in [(0, 0), (0, 3), (1, 1), (2, 2), (2, 3)]:
        expected[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    share = computed_share(activation, 0)
    assert share.dtype == np.float32
    np.testing.assert_array_equal(share, expected)
    assert share.mean() == pytest.approx(image_activation(activation, 0).mean_rate.item())


def test_channels_count_by_their_share():
    channel = BottleneckShape("c", 1, "channel", 0, 8, 4, 8, 4, 4, 1, channel_granularity=2)
    both = BottleneckShape("b", 2, "both", 2, 8, 4, 8, 4, 4, 1, channel_granularity=1)
    decisions = [[[[1, 0], [0, 0]]], [[[1, 1], [1, 1]]]]
    activation = network((16, 16), [channel, both], [None, decisions])
    channels = (
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool(),
    )
    decisions = [{**made, "channel": mask} for made, mask in zip(activation.decisions, channels)]
    activation = replace(activation, decisions=tuple(decisions))
    assert (computed_share(activation, 0, 1) == 0.5).all()
    expected = np.zeros((16, 16), np.float32)
    expected[:8, :8] = 0.75
    np.testing.assert_array_equal(computed_share(activation, 0, 2), expected)
    own = image_activation(activation, 0)
    assert own.rates_channel.tolist() == [0.5, 0.75]
    assert own.shares[:3].tolist() == [0.5, 0.25, 0.5]
    assert own.shares[4].item() == pytest.approx(0.75**2 / 4)
    with pytest.raises(IndexError, match="from 0 to 1"):
        computed_share(activation, 2)
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert draw_masks(image, activation, 1).shape[2] == 3


def test_stride_layer_and_static_blocks():
    # 18 x 10 pixels: 5 x 3 outputs in stage 1; stage 2 has stride 2: 3 x 2 outputs of 8 pixels.
    blocks = [
        block(1, "static", 0, (5, 3)),
        block(2, "spatial", 1, (5, 3), stride=2),
        block(2, "layer", 0, (3, 2)),
    ]
    spatial = [[[[1, 0], [0, 0], [0, 1]]], [[[0, 0], [1, 0], [0, 0]]]]
    activation = network((18, 10), blocks, [None, spatial, [[[[1]]], [[[0]]]]])
    first = np.full((18, 10), 0.5, np.float32)
    first[:8, :8] = first[16:, 8:] = 1
    np.testing.assert_array_equal(computed_share(activation, 0), first)
    second = np.zeros((18, 10), np.float32)
    second[8:16, :8] = 0.5
    np.testing.assert_array_equal(computed_share(activation, 1), second)
    np.testing.assert_array_equal(computed_share(activation, 1, stage=2), second)
    assert (computed_share(activation, 1, stage=1) == 1).all()


def test_share_rejects_what_is_not_there():
    activation = network((8, 8), [block(1, "layer", 0, (2, 2))], [[[[[1]]]]])
    with pytest.raises(IndexError, match="image_index must be from 0 to 0"):
        computed_share(activation, 1)
    with pytest.raises(ValueError, match=r"stage must be one of \[1\]"):
        computed_share(activation, 0, stage=2)


def test_image_rates_are_those_of_a_batch_of_one():
    torch.manual_seed(0)
    backbone = LASResNet(
        50,
        mode=("spatial", "layer", "spatial", "spatial"),
        base_channels=8,
        stem_channels=8,
        out_indices=(3,),
    ).eval()
    for masker in backbone.maskers():
        torch.nn.init.normal_(masker.conv.weight, std=3)
        torch.nn.init.zeros_(masker.conv.bias)
    images = torch.rand(3, 3, 72, 104)
    with torch.no_grad():
        backbone(images)
        batch = collect_activations(backbone)
        backbone(images[1:2])
    alone, own = collect_activations(backbone), image_activation(batch, 1)
    assert 0.2 < alone.mean_rate < 0.8
    torch.testing.assert_close(own.rates, alone.rates)
    torch.testing.assert_close(own.rates_dilated, alone.rates_dilated)
    np.testing.assert_array_equal(computed_share(batch, 1), computed_share(alone, 0))


@pytest.mark.parametrize(
    "image_hw, metainfo, seen, window",
    [
        ((40, 60), {}, (96, 160), (0, 60, 0, 40)),
        ((40, 60), dict(img_shape=(80, 120)), (80, 120), (0, 60, 0, 40)),
        # A pipeline that pads itself reports the padded size as img_shape.
        ((40, 60), dict(img_shape=(96, 128), scale_factor=(2.0, 2.0)), (80, 120), (0, 60, 0, 40)),
        # Twice the size, then a centre crop of 60 x 80 pixels.
        ((40, 60), dict(img_shape=(60, 80), scale_factor=(2.0, 2.0)), (60, 80), (10, 50, 5, 35)),
        # The network's input instead of the original: the factor is not of this image.
        (
            (96, 160),
            dict(img_shape=(96, 160), ori_shape=(48, 80), scale_factor=(2.0, 2.0)),
            (96, 160),
            (0, 160, 0, 96),
        ),
    ],
)
def test_unpad(image_hw, metainfo, seen, window):
    share, found = unpad(np.zeros((96, 160), np.float32), image_hw, metainfo)
    assert share.shape == seen
    assert found == pytest.approx(window)


def test_padding_is_not_drawn():
    # 32 x 32 pixels of image in an input of 32 x 64; only the padding was computed.
    mask = [[[[0, 1]]]]
    activation = network((32, 64), [block(1, "spatial", 8, (8, 16))], [mask])
    image = np.full((32, 32, 3), 128, np.uint8)
    sample = DetDataSample(metainfo=dict(img_shape=(32, 32), scale_factor=(1.0, 1.0)))
    dark = draw_masks(image, activation, data_sample=sample)
    right = dark[: dark.shape[0] // 2, dark.shape[1] // 2 : int(0.9 * dark.shape[1])].astype(int)
    blue, yellow = right[..., 2] - right[..., 0] > 10, right[..., 0] - right[..., 2] > 30
    assert blue.mean() > 0.3
    assert not yellow.any()


@pytest.mark.parametrize("masks", [True, False])
def test_predictions_are_drawn(masks):
    activation = network((32, 32), [block(1, "layer", 0, (8, 8))], [[[[[1]]]]])
    image = np.zeros((32, 32, 3), np.uint8)
    sample = DetDataSample()
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[2.0, 2, 30, 30], [2, 2, 30, 30]]),
        labels=torch.tensor([0, 7]),
        scores=torch.tensor([0.9, 0.2]),
    )
    if masks:
        sample.pred_instances.masks = torch.ones(2, 32, 32, dtype=torch.bool)
    meta = dict(classes=("cat",), palette=[(255, 0, 0)])
    picture = draw_masks(image, activation, data_sample=sample, dataset_meta=meta).astype(int)
    assert picture.dtype == int and picture.ndim == 3
    red = (picture[..., 0] > 100) & (picture[..., 1:].max(axis=2) < 30)
    assert (red.mean() > 0.1) == masks
    assert red.any()
    nothing = draw_masks(image, activation, data_sample=sample, dataset_meta=meta, score_thr=0.95)
    assert not ((nothing[..., 0] > 100) & (nothing[..., 1:].max(axis=2) < 30)).any()


def test_classifier():
    activation = network((32, 32), [block(1, "layer", 0, (8, 8))], [[[[[1]]]]])
    sample = SimpleNamespace(
        metainfo=dict(img_shape=(32, 32)),
        pred_label=torch.tensor([1]),
        pred_score=torch.tensor([0.2, 0.8]),
    )
    image = np.zeros((32, 32, 3), np.uint8)
    picture = draw_masks(image, activation, 0, sample, dict(classes=("cat", "dog")))
    assert picture.shape[1] > 600


def test_write_png_is_atomic(tmp_path, monkeypatch):
    picture = np.zeros((4, 5, 3), np.uint8)
    picture[..., 0] = 255
    write_png(tmp_path / "new" / "a.png", picture)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "new" / "a.png"))[0, 0], (0, 0, 255))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(tmp_path / "b.png", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(out_dir=""),
        dict(out_dir=3),
        dict(score_thr=1.5),
        dict(score_thr="0.3"),
        dict(interval=0),
        dict(interval=True),
        dict(max_images=2.0),
        dict(in_val="yes"),
        dict(in_test=None),
    ],
)
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        MaskVisualizationHook(**kwargs)


def test_switched_off():
    hook = MaskVisualizationHook(in_val=False, in_test=False)
    hook.after_val_iter(None, 0, None, [None])
    hook.after_test_iter(None, 0, None, [None])


def make_coco(root):
    """Two images of random pixels, one wide and one tall, with an object each."""
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i, (height, width) in enumerate([(48, 64), (64, 40)], start=1):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "train2017" / f"{i:03d}.png"), pixels)
        images.append(dict(id=i, file_name=f"{i:03d}.png", height=height, width=width))
        annotations.append(
            dict(
                id=i,
                image_id=i,
                category_id=1,
                bbox=[4, 4, 24, 24],
                area=576,
                iscrowd=0,
                segmentation=[[4, 4, 28, 4, 28, 28, 4, 28]],
            )
        )
    categories = [dict(id=1, name="person")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))


def tiny_runner(tmp_path, monkeypatch, **hook):
    """The over-fit recipe on two images with a network of an eighth of the width."""
    root = tmp_path / "coco"
    make_coco(root)
    monkeypatch.setenv("LAS_MM_COCO", f"{root}/")
    config = Config.fromfile(CONFIG)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.metainfo = dict(classes=("person",), palette=[(255, 0, 0)])
        loader.dataset.pipeline[1 if loader is not config.train_dataloader else 2].scale = (96, 96)
    config.val_dataloader.batch_size = 2  # so that the narrower and lower images are padded
    model = config.model
    model.backbone.update(base_channels=8, stem_channels=8)
    model.neck.update(in_channels=[32, 64, 128, 256], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=16, num_classes=1)
    model.roi_head.mask_roi_extractor.out_channels = 16
    model.roi_head.mask_head.update(
        in_channels=16, conv_out_channels=16, num_convs=1, num_classes=1
    )
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    config.merge_from_dict(
        dict(
            work_dir=str(tmp_path / "work"),
            custom_hooks=[dict(type="las_mm.MaskVisualizationHook", **hook)],
            train_cfg=dict(max_epochs=1, val_interval=1),
            train_dataloader=dict(batch_size=2),
            param_scheduler=[],
            default_hooks=dict(checkpoint=dict(save_last=False, interval=-1)),
            log_level="WARNING",
        )
    )
    config.experiment_name = tmp_path.name
    return Runner.from_cfg(config)


def test_hook_in_training_and_test(tmp_path, monkeypatch):
    runner = tiny_runner(tmp_path, monkeypatch, score_thr=0.0)
    runner.train()
    folder = tmp_path / "work" / "masks"
    assert sorted(p.name for p in folder.iterdir()) == ["001_epoch1.png", "002_epoch1.png"]
    wide, tall = (cv2.imread(str(p)) for p in sorted(folder.iterdir()))
    assert 1000 < wide.shape[1] < 1500 and 500 < wide.shape[0] < 1200
    assert tall.shape[0] > tall.shape[1]
    assert wide.std() > 20
    runner.test()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["001.png", "001_epoch1.png", "002.png", "002_epoch1.png"]


def test_hook_limits(tmp_path, monkeypatch):
    runner = tiny_runner(tmp_path, monkeypatch, max_images=1, out_dir="pictures")
    runner.val()
    assert [p.name for p in (tmp_path / "work" / "pictures").iterdir()] == ["001.png"]
