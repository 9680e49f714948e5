"""CIFAR-10 at 96 x 96 with a half-width ResNet-18: lasnet_r50_cifar10_flops.py on basic blocks."""

_base_ = "./lasnet_r50_cifar10_flops.py"

model = dict(
    backbone=dict(depth=18, granularity=(4, 4, 2, 1)), head=dict(in_channels=8 * _base_.width)
)
