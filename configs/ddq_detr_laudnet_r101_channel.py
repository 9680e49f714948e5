"""DDQ-DETR with LAUDNet-ResNet-101, channel skipping, G = 2, FLOPs target t = 0.5, on COCO.

LAUDNet (arXiv 2308.15949) as a diff of mmdet's static recipe, which is of a ResNet-50: 12 epochs,
AdamW 2e-4, backbone learning rate x 0.1, 8 devices x 2 images; temperature 0.1, one FLOPs term.
"""

_base_ = ["mmdet::ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py", "./_base_/lasnet_r101.py"]

backbone = {
    **_base_.las_mm.backbone,
    **dict(mode="channel", channel_granularity=2, channel_position="before_norm"),
}
model = dict(backbone=dict(_delete_=True, **{**backbone, "out_indices": (1, 2, 3)}))
train_dataloader = _base_.las_mm.train_dataloader
val_dataloader = _base_.las_mm.val_dataloader
test_dataloader = val_dataloader
val_evaluator = _base_.las_mm.val_evaluator
test_evaluator = val_evaluator
default_hooks = _base_.las_mm.default_hooks
vis_backends = _base_.las_mm.vis_backends
visualizer = dict(vis_backends=vis_backends)
custom_hooks = [
    _base_.las_mm.hooks.seed,
    _base_.las_mm.hooks.temperature,
    dict(type="las_mm.BudgetHook", loss=dict(type="las_mm.BudgetLoss", target=0.5)),
    _base_.las_mm.hooks.latency,
]
