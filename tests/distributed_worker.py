"""A short training of a classifier, in one process or as one of several: see test_distributed.py.

python -m torch.distributed.run --nproc_per_node=2 tests/distributed_worker.py OUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmengine import dist
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.utils.data import DataLoader

from las_mm import preflight
from las_mm.models import maskers
from las_mm.registry import MODELS

STEPS = 6
GLOBAL_BATCH = 4
CLASSES = 5
RESNET = dict(
    type="las_mm.LASResNet",
    base_channels=8,
    stem_channels=8,
    norm_eval=True,  # batch statistics would couple the images of a process
    zero_init_residual=False,
)
# Each with the channels of its features.
BACKBONES = dict(
    bottlenecks=(dict(RESNET, depth=50), 256),
    basic=(dict(RESNET, depth=18), 64),
    dense=(
        dict(
            type="las_mm.LASDenseNet",
            arch=dict(growth_rate=8, depths=[2, 3, 2, 2], init_channels=16),
            norm_eval=True,
        ),
        34,
    ),
)


def model_config(name: str) -> dict:
    """A classifier with one of :data:`BACKBONES`."""
    backbone, channels = BACKBONES[name]
    return dict(
        type="mmpretrain.ImageClassifier",
        backbone=backbone,
        neck=dict(type="mmpretrain.GlobalAveragePooling"),
        head=dict(type="mmpretrain.LinearClsHead", num_classes=CLASSES, in_channels=channels),
        data_preprocessor=dict(
            type="mmpretrain.ClsDataPreprocessor", mean=[127.5] * 3, std=[64.0] * 3
        ),
    )


BUDGET = dict(type="las_mm.BudgetLoss", target=0.4, bounds_weight=2.0, release=1.0, loss_weight=3.0)


def build_model(name: str = "bottlenecks") -> nn.Module:
    """The same weights in every process, with maskers that are undecided and see the image."""
    init_default_scope("mmpretrain")
    torch.manual_seed(0)
    model = MODELS.build(model_config(name))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, maskers.SpatialMasker):
            nn.init.normal_(module.conv.weight, std=0.3)
            nn.init.constant_(module.conv.bias, 0.0)
        if hasattr(module, "norm3"):
            nn.init.constant_(module.norm3.weight, 0.2)
    return model


def image(index: int) -> dict:
    pixels = torch.randint(0, 256, (3, 64, 48), generator=torch.Generator().manual_seed(index))
    return dict(inputs=pixels, data_samples=DataSample().set_gt_label(index % CLASSES))


def share(values):
    """This process's share of a global batch."""
    size = len(values) // dist.get_world_size()
    return values[dist.get_rank() * size : (dist.get_rank() + 1) * size]


class GlobalNoise(Hook):
    """Draws each masker's noise for the global batch and records what is logged."""

    def __init__(self) -> None:
        self.log: list[dict] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._seed = 1000 * runner.iter

    def noise(self, reference: Tensor) -> Tensor:
        shape = (len(reference) * dist.get_world_size(), *reference.shape[1:])
        generator = torch.Generator().manual_seed(self._seed)
        self._seed += 1
        return share(torch.randn(shape, generator=generator))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        values = {key: value.detach().clone().float() for key, value in outputs.items()}
        dist.all_reduce(values["loss"], op="mean")  # the classifier's own, a mean over images
        local = runner.model.module if dist.is_distributed() else runner.model
        values["local rate"] = local.backbone.network_activation().mean_rate.item()
        self.log.append({key: float(value) for key, value in values.items()})


def train(work_dir: Path, launcher: str, name: str = "bottlenecks") -> dict:
    """Train :data:`STEPS` steps; return the log and the final weights."""
    cfg = Config(dict(launcher=launcher, experiment_name=f"distributed_{launcher}_{name}"))
    preflight.prepare_device(cfg)
    batches = [range(i * GLOBAL_BATCH, (i + 1) * GLOBAL_BATCH) for i in range(STEPS)]
    hook = GlobalNoise()
    original, maskers.gumbel_difference = maskers.gumbel_difference, hook.noise
    try:
        runner = Runner(
            model=build_model(name),
            work_dir=str(work_dir),
            train_dataloader=DataLoader(
                [image(index) for batch in batches for index in share(batch)],
                batch_size=GLOBAL_BATCH // dist.get_world_size(),
                collate_fn=pseudo_collate,
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.02, momentum=0.9)),
            custom_hooks=[dict(type="las_mm.BudgetHook", loss=BUDGET), hook],
            default_hooks=dict(checkpoint=None),
            launcher=launcher,
            experiment_name=cfg.experiment_name,
            log_level="WARNING",
            cfg=cfg,
        )
        model = runner.train()
    finally:
        maskers.gumbel_difference = original
    model = model.module if dist.is_distributed() else model
    return dict(log=hook.log, weights=model.state_dict())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = {name: train(folder, "pytorch", name) for name in BACKBONES}
    torch.save(result, folder / f"rank{dist.get_rank()}.pt")
