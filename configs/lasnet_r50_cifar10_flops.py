"""CIFAR-10 at 96 x 96 with a half-width ResNet-50, S=1 everywhere, held to a share of its FLOPs.

The experiment of docs/latency.md, with lasnet_r50_cifar10_latency.py: what changes when the
budget is latency. LAS_MM_CIFAR10 is a folder with train/CLASS/*.jpg and test/CLASS/*.jpg, default
data/cifar10; LAS_MM_PRETRAINED a checkpoint to start from (docs/latency.md says which).
"""

_base_ = []

import os

data_root = (os.environ.get("LAS_MM_CIFAR10") or "data/cifar10").rstrip("/") + "/"
pretrained = os.environ.get("LAS_MM_PRETRAINED") or "none"
default_scope = "mmpretrain"
target = 0.7
width = 32
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(
        num_classes=10, mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7], to_rgb=True
    ),
    backbone=dict(
        type="las_mm.LASResNet",
        depth=50,
        base_channels=width,
        stem_channels=width,
        mode="spatial",
        granularity=(1, 1, 1, 1),
        out_indices=(3,),
        style="pytorch",
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=32 * width, topk=(1,)),
)
resize = dict(type="Resize", scale=96, interpolation="bilinear")
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    dataset=dict(
        type="CustomDataset",
        data_root=data_root + "train",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            resize,
            dict(type="PackInputs"),
        ],
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    dataset=dict(
        type="CustomDataset",
        data_root=data_root + "test",
        # One image in five: 2,000.
        indices=list(range(0, 10000, 5)),
        pipeline=[dict(type="LoadImageFromFile"), resize, dict(type="PackInputs")],
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
steps = 400
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-5)
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=steps, by_epoch=False)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="las_mm.AtomicCheckpointHook", interval=steps, by_epoch=False),
)
custom_hooks = [
    dict(type="las_mm.IterationSeedHook"),
    # No noise in the last steps: training's rates are then those of inference.
    dict(type="las_mm.TemperatureHook", start=5.0, end=0.1, noise_fade=(0.5, 0.75)),
    dict(
        type="las_mm.BudgetHook",
        loss=dict(type="las_mm.BudgetLoss", target=target, network_weight=10.0),
    ),
    dict(type="las_mm.PredictedLatencyHook", device="v100"),
]
load_from = None if pretrained == "none" else pretrained
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
