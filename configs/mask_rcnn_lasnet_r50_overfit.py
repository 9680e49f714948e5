"""Learning is real: a half-width Mask R-CNN that over-fits a few dozen images from scratch.

Train and evaluate on the same images (LAS_MM_COCO's train2017), on 2 CPU cores in about half an
hour per network. Its static twin is mask_rcnn_resnet_r50_overfit.py.
"""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

data_root = "{{$LAS_MM_COCO:data/coco/}}"
scale = (384, 384)
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
    persistent_workers=False,
    batch_sampler=None,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_train2017.json")
test_evaluator = val_evaluator

model = dict(
    backbone=dict(
        _delete_=True,
        type="las_mm.LASResNet",
        depth=50,
        base_channels=32,
        stem_channels=32,
        mode="spatial",
        granularity=(4, 4, 2, 1),
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=64, fc_out_channels=512),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(num_convs=3, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=500),
        rcnn=dict(sampler=dict(num=128)),
    ),
)
max_epochs = 125
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
    dict(type="las_mm.TemperatureHook", start=5.0, end=0.1),
    # The weights of the ImageNet recipe: from scratch, the bounds keep every block in use early on.
    dict(
        type="las_mm.BudgetHook",
        loss=dict(type="las_mm.BudgetLoss", target=0.5, bounds_weight=1.0, loss_weight=10.0),
    ),
    dict(type="las_mm.PredictedLatencyHook", device="v100"),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=25, max_keep_ckpts=1))
