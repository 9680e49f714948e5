"""DDQ-DETR with LAUDNet-ResNet-101, layer skipping, FLOPs target t = 0.5."""

_base_ = "./ddq_detr_laudnet_r101_channel.py"

model = dict(backbone=dict(mode="layer"))
