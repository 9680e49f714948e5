"""Faster R-CNN with LAUDNet-ResNet-101, channel skipping, G = 2, FLOPs target t = 0.8."""

_base_ = "./faster_rcnn_lasnet_r101.py"

# The masks sit where they do in the authors' ImageNet weights.
model = dict(backbone=dict(mode="channel", channel_granularity=2, channel_position="before_norm"))
custom_hooks = _base_.custom_hooks
custom_hooks[2]["loss"]["target"] = 0.8
