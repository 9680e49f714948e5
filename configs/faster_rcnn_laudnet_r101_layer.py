"""Faster R-CNN with LAUDNet-ResNet-101, layer skipping, FLOPs target t = 0.5."""

_base_ = "./faster_rcnn_lasnet_r101.py"

model = dict(backbone=dict(mode="layer"))
