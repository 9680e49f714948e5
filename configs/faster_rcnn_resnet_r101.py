"""The static twin of faster_rcnn_lasnet_r101.py: same weights, data and steps, no maskers."""

_base_ = "./faster_rcnn_lasnet_r101.py"

model = dict(backbone=dict(mode="static"))
custom_hooks = [dict(type="las_mm.IterationSeedHook")]
