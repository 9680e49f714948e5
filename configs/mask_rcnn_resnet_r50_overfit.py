"""The static twin of mask_rcnn_lasnet_r50_overfit.py: same network, data, steps; no maskers."""

_base_ = "./mask_rcnn_lasnet_r50_overfit.py"

model = dict(backbone=dict(mode="static"))
custom_hooks = [dict(type="las_mm.IterationSeedHook")]
