"""Test-time augmentation of a config's test, as ``tools/test.py --tta`` of mmdet and mmpretrain."""

from __future__ import annotations

import copy

from mmengine.config import Config, ConfigDict
from torch import nn

from las_mm.errors import UserError

# By default scope: how the predictions of an image's views are merged.
MODELS = dict(
    mmdet=dict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
    mmpretrain=dict(type="AverageClsScoreTTA"),
)
FLIPS = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
FLIP_KEYS = ("flip", "flip_direction")
META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")  # mmdet's


def use_tta(cfg: Config, model: nn.Module) -> None:
    """Wrap the config's model and pipeline, by its ``tta_model`` and ``tta_pipeline``.

    Without these, each image is seen flipped and as it is, as in mmdet's and mmpretrain's tools.

    Args:
        cfg: The config; changed in place.
        model: Its model, built.

    Raises:
        UserError: There is no default for such a model, or its predictions cannot be merged.
    """
    scope = cfg.get("default_scope")
    if "tta_model" not in cfg:
        if scope not in MODELS:
            raise UserError(
                f"--tta needs tta_model and tta_pipeline in the config, as there are defaults for "
                f"{' and '.join(MODELS)} only, and its default_scope is {scope!r}"
            )
        cfg.tta_model = copy.deepcopy(MODELS[scope])
    merges_boxes = cfg.tta_model.type in ("DetTTAModel", "mmdet.DetTTAModel")
    if merges_boxes and getattr(model, "with_mask", False):
        raise UserError(
            "--tta: mmdet's DetTTAModel merges boxes and no masks; test the boxes alone with "
            "--cfg-options model.roi_head.mask_head=None test_evaluator.metric=bbox"
        )
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    if "tta_pipeline" not in cfg:
        cfg.tta_pipeline = _flipped(dataset.pipeline)
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flipped(pipeline: list) -> list:
    """A test pipeline, its end replaced by two views."""
    *steps, pack = copy.deepcopy(pipeline)
    if "Pack" not in str(pack.get("type")):
        raise UserError(
            f"--tta needs tta_pipeline in the config, as its test pipeline ends with "
            f"{pack.get('type')} and not with what packs the inputs"
        )
    if "meta_keys" in pack or "PackDet" in str(pack.type):
        pack.meta_keys = (*dict.fromkeys((*pack.get("meta_keys", META_KEYS), *FLIP_KEYS)),)
    return [*steps, dict(type="TestTimeAug", transforms=[copy.deepcopy(FLIPS), [pack]])]
