"""What the COCO configs share, under one key: mmengine merges a base's other keys by name.

LAS_MM_COCO        folder of the COCO data set, default data/coco/
LAS_MM_PRETRAINED  initial backbone weights: a file, a URL, or 'none' to start from scratch;
                   default torchvision://resnet101 (static weights: maskers start mostly on)
LAS_MM_PRETRAINED_PREFIX  what their keys begin with, such as 'backbone.' in a classifier
"""

_base_ = []

import os

las_mm = dict(
    data_root=(os.environ.get("LAS_MM_COCO") or "data/coco").rstrip("/") + "/",
    pretrained=os.environ.get("LAS_MM_PRETRAINED") or "torchvision://resnet101",
)
las_mm.update(
    backbone=dict(
        type="las_mm.LASResNet",
        depth=101,
        mode="spatial",
        granularity=(4, 4, 2, 1),
        out_indices=(0, 1, 2, 3),
        style="pytorch",
        norm_cfg=dict(type="BN", requires_grad=True),
        # Without pretrained weights nothing is worth freezing, and BN needs its batch statistics.
        frozen_stages=-1 if las_mm["pretrained"] == "none" else 1,
        norm_eval=las_mm["pretrained"] != "none",
        # Static weights know no maskers: stage 1 must be free to learn what to skip.
        freeze_maskers=False,
        init_cfg=None
        if las_mm["pretrained"] == "none"
        else dict(
            type="Pretrained",
            checkpoint=las_mm["pretrained"],
            prefix=os.environ.get("LAS_MM_PRETRAINED_PREFIX") or None,
        ),
    ),
    train_dataloader=dict(
        # Workers seeded anew each epoch make a resumed run repeat the uninterrupted one.
        persistent_workers=False,
        dataset=dict(data_root=las_mm["data_root"]),
    ),
    val_dataloader=dict(dataset=dict(data_root=las_mm["data_root"])),
    val_evaluator=dict(ann_file=las_mm["data_root"] + "annotations/instances_val2017.json"),
    default_hooks=dict(
        logger=dict(interval=10),
        checkpoint=dict(type="las_mm.AtomicCheckpointHook", max_keep_ckpts=2),
    ),
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
    hooks=dict(
        seed=dict(type="las_mm.IterationSeedHook"),
        temperature=dict(type="las_mm.TemperatureHook", start=0.1, schedule="constant"),
        latency=dict(type="las_mm.PredictedLatencyHook", device="v100"),
    ),
)
