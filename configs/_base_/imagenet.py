"""The ImageNet recipe of LASNet and LAUDNet: 100 epochs, a static teacher, a FLOPs budget.

Cross-entropy + 10 * budget + 0.5 * T^2 * KL to the static network (T = 4), from whose weights
training starts; temperature 5.0 -> 0.1; SGD, cosine from 0.02 * batch / 256, 8 devices.

LAS_MM_IMAGENET    folder of ImageNet-1k (train/, val/, meta/), default data/imagenet/
LAS_MM_PRETRAINED  the static network with its classifier, in torchvision's, timm's or mmpretrain's
                   names: a file, a URL, or 'none' to start from scratch without a teacher;
                   default torchvision's weights
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64.py",
    "mmpretrain::_base_/default_runtime.py",
]

import os

las_mm = dict(
    data_root=(os.environ.get("LAS_MM_IMAGENET") or "data/imagenet").rstrip("/") + "/",
    pretrained=os.environ.get("LAS_MM_PRETRAINED"),
)
model = dict(
    type="las_mm.DistilledClassifier",
    backbone=dict(out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1, 5),
    ),
    distill_weight=0.5,
    distill_temperature=4.0,
)
train_dataloader = dict(
    batch_size=128,
    # Workers seeded anew each epoch make a resumed run repeat the uninterrupted one.
    persistent_workers=False,
    dataset=dict(data_root=las_mm["data_root"]),
)
val_dataloader = dict(dataset=dict(data_root=las_mm["data_root"]))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.08, momentum=0.9, nesterov=True, weight_decay=5e-5)
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=100, by_epoch=True, begin=0, end=100)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=1024)
default_hooks = dict(checkpoint=dict(type="las_mm.AtomicCheckpointHook", max_keep_ckpts=2))
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)
custom_hooks = [
    dict(type="las_mm.IterationSeedHook"),
    dict(type="las_mm.TemperatureHook", start=5.0, end=0.1),
    dict(
        type="las_mm.BudgetHook",
        loss=dict(type="las_mm.BudgetLoss", target=0.5, bounds_weight=1.0, loss_weight=10.0),
    ),
    dict(type="las_mm.PredictedLatencyHook", device="v100"),
]
