"""LAUDNet-ResNet-18 on ImageNet, patches S = 4-4-2-1, channels G = 2, t = 0.5, batch 1024."""

_base_ = "./lasnet_r18_spatial.py"

model = dict(backbone=dict(mode="both", channel_granularity=2))
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.08))
auto_scale_lr = dict(base_batch_size=1024)
