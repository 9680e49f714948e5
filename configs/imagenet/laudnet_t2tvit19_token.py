"""LAUDNet-T2T-ViT-19 on ImageNet, skipping tokens, FLOPs target t = 0.5."""

_base_ = "./laudnet_t2tvit19_all.py"

model = dict(backbone=dict(mode="token"))
