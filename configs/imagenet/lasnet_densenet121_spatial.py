"""LASNet-DenseNet-121 on ImageNet, patches of S = 4-4-2-1, FLOPs target t = 0.5, batch 512."""

_base_ = "../_base_/imagenet.py"

static = _base_.las_mm.pretrained or "torchvision://densenet121"
model = dict(
    backbone=dict(type="las_mm.LASDenseNet", arch="121", mode="spatial", granularity=(4, 4, 2, 1)),
    head=dict(in_channels=1024),
    static_checkpoint=None if static == "none" else static,
)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=0.04))
auto_scale_lr = dict(base_batch_size=512)
