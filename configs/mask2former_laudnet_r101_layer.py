"""Mask2Former with LAUDNet-ResNet-101, layer skipping, FLOPs target t = 0.5."""

_base_ = "./mask2former_laudnet_r101_channel.py"

model = dict(backbone=dict(mode="layer"))
