"""Mask R-CNN with LASNet-ResNet-101, S = 4-4-2-1, FLOPs target t = 0.4, on COCO, 1x schedule.

The recipe of LASNet (arXiv 2210.06223) as a diff of mmdet's static one: 8 devices x 2 images,
temperature 0.1, one FLOPs term, backbone learning rate x 0.5, backbone weight decay x 0.9.
"""

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py", "./_base_/lasnet_r101.py"]

model = dict(backbone=dict(_delete_=True, **_base_.las_mm.backbone))
train_dataloader = _base_.las_mm.train_dataloader
val_dataloader = _base_.las_mm.val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.las_mm.val_evaluator
test_evaluator = val_evaluator
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.5, decay_mult=0.9)))
)
default_hooks = _base_.las_mm.default_hooks
vis_backends = _base_.las_mm.vis_backends
visualizer = dict(vis_backends=vis_backends)
custom_hooks = [
    _base_.las_mm.hooks.seed,
    _base_.las_mm.hooks.temperature,
    dict(type="las_mm.BudgetHook", loss=dict(type="las_mm.BudgetLoss", target=0.4)),
    _base_.las_mm.hooks.latency,
]
