"""Learning is real: a half-width Mask R-CNN that over-fits a few dozen images from scratch.

Trains and evaluates on the same images (LAS_MM_COCO's train2017), 800 steps, about half an hour
on 2 CPU cores. The static twin is mask_rcnn_resnet_r50_overfit.py; docs/overfit.md has the result.
"""

_base_ = "./mask_rcnn_lasnet_r101_demo.py"

scale = (384, 384)
train_pipeline = _base_.train_pipeline
train_pipeline[2]["scale"] = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1]["scale"] = scale
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=_base_.data_root + "annotations/instances_train2017.json")
test_evaluator = val_evaluator

width = 32
model = dict(
    backbone=dict(depth=50, base_channels=width, stem_channels=width),
    neck=dict(in_channels=[4 * width, 8 * width, 16 * width, 32 * width]),
)
max_epochs = 100
train_cfg = dict(max_epochs=max_epochs, val_interval=25)
param_scheduler = _base_.param_scheduler
param_scheduler[1]["T_max"] = max_epochs
default_hooks = dict(checkpoint=dict(interval=25))
