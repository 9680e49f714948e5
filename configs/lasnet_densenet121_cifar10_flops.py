"""CIFAR-10 at 96 x 96, a half-width DenseNet-121: lasnet_r50_cifar10_flops.py on dense layers."""

_base_ = "./lasnet_r50_cifar10_flops.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="las_mm.LASDenseNet",
        arch=dict(growth_rate=16, depths=[6, 12, 24, 16], init_channels=32),
        mode="spatial",
        granularity=(4, 4, 2, 1),
        out_indices=(3,),
    ),
    head=dict(in_channels=512),
)
