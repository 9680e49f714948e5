"""RetinaNet with LAUDNet-ResNet-101, layer skipping, FLOPs target t = 0.5."""

_base_ = "./retinanet_lasnet_r101.py"

model = dict(backbone=dict(mode="layer"))
