"""lasnet_r50_cifar10_flops.py held to a share of its latency on a V100 instead."""

_base_ = "./lasnet_r50_cifar10_flops.py"

custom_hooks = _base_.custom_hooks
custom_hooks[2]["loss"].update(metric="latency", device="v100")
