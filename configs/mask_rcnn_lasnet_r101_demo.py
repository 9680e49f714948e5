"""mask_rcnn_lasnet_r101.py scaled down to train in a few minutes on 2 CPU cores.

For the data of tools/make_demo_coco.py, from scratch; `make demo` runs it. What changes: a network
of a quarter of the width, small images, AdamW, and the annealing and bounds of the ImageNet recipe
(there are no pretrained masks to start from).
"""

_base_ = "./mask_rcnn_lasnet_r101.py"

import os

data_root = (os.environ.get("LAS_MM_COCO") or "data/demo_coco").rstrip("/") + "/"
scale = (256, 256)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    batch_sampler=None,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

width, channels = 16, 64  # of the backbone, of everything behind it
model = dict(
    backbone=dict(
        base_channels=width,
        stem_channels=width,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[4 * width, 8 * width, 16 * width, 32 * width], out_channels=channels),
    # Small images, small objects: anchors of 16 pixels and more instead of 32.
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=channels, fc_out_channels=512),
        mask_roi_extractor=dict(out_channels=channels, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(num_convs=3, in_channels=channels, conv_out_channels=channels),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=500),
        rcnn=dict(sampler=dict(num=128)),
    ),
)
max_epochs = 20
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=1e-6,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    _base_.las_mm.hooks.seed,
    # Too few steps for the maskers to grow sure of themselves: end without noise, as in inference.
    dict(type="las_mm.TemperatureHook", start=5.0, end=0.1, noise_fade=(0.4, 0.8)),
    dict(
        type="las_mm.BudgetHook",
        loss=dict(type="las_mm.BudgetLoss", target=0.5, bounds_weight=1.0, loss_weight=10.0),
    ),
    _base_.las_mm.hooks.latency,
]
