"""RetinaNet with LASNet-DenseNet-121, S = 4-4-2-1, FLOPs target t = 0.5, on COCO, 1x schedule.

The recipe of retinanet_lasnet_r101.py with another backbone, whose features have the strides 8, 16
and 32. LAS_MM_PRETRAINED defaults to torchvision's weights.
"""

_base_ = "./retinanet_lasnet_r101.py"

import os

pretrained = os.environ.get("LAS_MM_PRETRAINED") or "torchvision://densenet121"
prefix = os.environ.get("LAS_MM_PRETRAINED_PREFIX") or None
weights = dict(type="Pretrained", checkpoint=pretrained, prefix=prefix)
model = dict(
    backbone=dict(
        _delete_=True,
        type="las_mm.LASDenseNet",
        arch="121",
        mode="spatial",
        granularity=(4, 4, 2, 1),
        out_indices=(0, 1, 3),  # the third has the stride of the fourth
        frozen_stages=0 if pretrained == "none" else 1,
        norm_eval=pretrained != "none",
        freeze_maskers=False,
        init_cfg=None if pretrained == "none" else weights,
    ),
    neck=dict(in_channels=[128, 256, 1024], start_level=0),
)
