"""LAUDNet-T2T-ViT-19 on ImageNet, skipping heads, in the MLP's hidden channels too, t = 0.5."""

_base_ = "./laudnet_t2tvit19_all.py"

model = dict(backbone=dict(mode="head", head_in_mlp="hidden"))
