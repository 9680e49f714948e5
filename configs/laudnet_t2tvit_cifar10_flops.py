"""CIFAR-10 at 64 x 64, a small T2T-ViT: lasnet_r50_cifar10_flops.py on transformer layers."""

_base_ = "./lasnet_r50_cifar10_flops.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="las_mm.LAUDT2TViT",
        arch=dict(embed_dims=128, num_layers=6, num_heads=4),
        mode="all",
        img_size=64,
        t2t_cfg=dict(token_dims=32),
    ),
    neck=None,
    head=dict(in_channels=128),
)
resize = dict(type="Resize", scale=64, interpolation="bilinear")
pipeline = _base_.train_dataloader.dataset.pipeline
pipeline[3] = resize
train_dataloader = dict(dataset=dict(pipeline=pipeline))
test_pipeline = [dict(type="LoadImageFromFile"), resize, dict(type="PackInputs")]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05))
