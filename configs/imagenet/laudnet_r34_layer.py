"""LAUDNet-ResNet-34 on ImageNet, whole blocks, FLOPs target t = 0.5, batch 1024."""

_base_ = "./lasnet_r34_spatial.py"

model = dict(backbone=dict(mode="layer"))
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.08))
auto_scale_lr = dict(base_batch_size=1024)
