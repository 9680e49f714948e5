"""LAUDNet-T2T-ViT-14 on ImageNet: tokens, heads, attention and MLP, FLOPs target t = 0.5."""

_base_ = "./laudnet_t2tvit19_all.py"

model = dict(backbone=dict(arch="t2t-vit-14"), head=dict(in_channels=384))
