"""LAUDNet-T2T-ViT-19 on ImageNet: tokens, heads, attention and MLP, FLOPs target t = 0.5.

The recipe of ../_base_/imagenet.py (static teacher, budget, temperature, 100 epochs) with the
optimiser of mmpretrain's T2T-ViT at a tenth of its learning rate, as training starts from trained
weights. LAS_MM_PRETRAINED is a static T2T-ViT-19 with performer tokens, such as its authors'
(github.com/yitu-opensource/T2T-ViT); without it training starts from scratch, without a teacher.
"""

_base_ = "../_base_/imagenet.py"

static = _base_.las_mm.pretrained or "none"
model = dict(
    backbone=dict(
        _delete_=True,
        type="las_mm.LAUDT2TViT",
        arch="t2t-vit-19",
        mode="all",
        drop_path_rate=0.1,
        init_cfg=[
            dict(type="TruncNormal", layer="Linear", std=0.02),
            dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
        ],
    ),
    neck=None,
    head=dict(in_channels=448),
    static_checkpoint=None if static == "none" else static,
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.065),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={"cls_token": dict(decay_mult=0.0)}
    ),
)
