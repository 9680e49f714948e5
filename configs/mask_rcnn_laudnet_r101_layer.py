"""Mask R-CNN with LAUDNet-ResNet-101, layer skipping, FLOPs target t = 0.5."""

_base_ = "./mask_rcnn_lasnet_r101.py"

model = dict(backbone=dict(mode="layer"))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))))
custom_hooks = _base_.custom_hooks
custom_hooks[2]["loss"]["target"] = 0.5
