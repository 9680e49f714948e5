"""ActivationMetric: what PredictedLatencyHook logs, where save_best can use it."""

import math

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner

import las_mm
from las_mm.models import LASResNet


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = LASResNet(50, mode=["spatial", "both", "layer", "channel"], base_channels=8)
        for masker in self.backbone.maskers():
            for parameter in masker.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=1.0)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        features = self.backbone(torch.stack(inputs))[-1].mean((2, 3))
        if mode == "loss":
            return dict(loss=features.square().mean())
        return list(features)


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results):
        return dict(images=len(results))


def make_runner(work_dir, hooks, **kwargs):
    torch.manual_seed(1)
    data = [dict(inputs=torch.rand(3, 64, 64)) for _ in range(5)]
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=data,
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )
    return Runner(
        model=Classifier(),
        work_dir=str(work_dir),
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=[dict(type="las_mm.ActivationMetric"), Nothing()],
        custom_hooks=hooks,
        default_scope="mmengine",
        experiment_name=work_dir.name + str(len(kwargs)),
        **kwargs,
    )


def test_agrees_with_the_hook(tmp_path):
    runner = make_runner(tmp_path, [dict(type="las_mm.PredictedLatencyHook", device="v100")])
    found = runner.val()
    hub = runner.message_hub
    keys = ("flops_ratio", "activation_rate", "channel_rate", "latency_ms", "latency_ratio")
    for key in keys:
        logged = hub.get_scalar(f"val/las_mm/{key}").current()
        assert math.isclose(found[f"las_mm/{key}"], logged, rel_tol=1e-5), key
    assert 0 < found["las_mm/flops_ratio"] < 1 and found["images"] == 5


def test_save_best(tmp_path):
    train = dict(
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=[dict(inputs=torch.rand(3, 64, 64)) for _ in range(2)],
            sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(
                type="CheckpointHook", save_best="las_mm/latency_ratio", rule="less", interval=5
            )
        ),
    )
    hooks = [dict(type="las_mm.PredictedLatencyHook", device="v100")]
    make_runner(tmp_path, hooks, **train).train()
    assert list(tmp_path.glob("best_las_mm_latency_ratio*.pth"))


def test_without_the_hook(tmp_path):
    with pytest.raises(RuntimeError, match="add dict\\(type='las_mm.PredictedLatencyHook'\\)"):
        make_runner(tmp_path, []).val()


def test_is_exported():
    assert las_mm.ActivationMetric().prefix == "las_mm"
