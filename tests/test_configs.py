"""Every config under configs/ builds, says what the recipe says, trains a step and infers."""

import importlib.util
import os
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.config.utils import _get_cfg_metainfo
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import needs
from las_mm import preflight
from las_mm.benchmark.subject import randomize
from las_mm.models import collect_activations, flops_report, plan, sparse
from las_mm.registry import HOOKS

ROOT = Path(__file__).resolve().parents[1]
TOP = sorted(p.name for p in (ROOT / "configs").glob("*.py"))
CIFAR = [name for name in TOP if "cifar10" in name]
COCO = [name for name in TOP if name not in CIFAR]
IMAGENET = sorted(f"imagenet/{p.name}" for p in (ROOT / "configs" / "imagenet").glob("*.py"))
T2T = [name for name in IMAGENET if "t2tvit" in name]
CONFIGS = COCO + IMAGENET + CIFAR
RECIPES = {  # FLOPs target, backbone lr multiplier
    "mask_rcnn": (0.4, 0.5),
    "faster_rcnn": (0.5, 0.5),
    "retinanet": (0.5, 0.2),
}
LAUDNET = {  # FLOPs target of channel and of layer, backbone lr multiplier
    "mask_rcnn": (0.8, 0.5, 0.3),
    "faster_rcnn": (0.8, 0.5, 0.5),
    "retinanet": (0.6, 0.5, 0.2),
}
TRANSFORMERS = {
    "ddq_detr": (12, 2e-4, 0.1),
    "mask2former": (None, 1e-4, 0.1),
}  # epochs, lr, backbone's
DETECTORS = (*RECIPES, *TRANSFORMERS)
CLASSIFIERS = ("las_mm.DistilledClassifier", "ImageClassifier")
CLASSES = 10  # of the shrunk networks


@cache
def _parsed(name: str) -> Config:
    return Config.fromfile(ROOT / "configs" / name)


def parsed(name: str) -> Config:
    """A config of the environment below, to change at will: each is read once."""
    if name.startswith(DETECTORS) and not needs.HAS_MMDET:
        pytest.skip(needs.NO_MMDET)
    return deepcopy(_parsed(name))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LAS_MM_PRETRAINED", "none")
    monkeypatch.setenv("LAS_MM_COCO", "/data/somewhere")
    monkeypatch.setenv("LAS_MM_IMAGENET", "/data/elsewhere")


@pytest.fixture
def no_drawing(monkeypatch):
    """Weights are left as allocated: drawing 45 million numbers takes most of a build's time."""
    for name in ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture
def no_measuring(monkeypatch):
    """The plan: nothing is measured, or written to the user's folder."""

    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


@pytest.mark.parametrize("name", CONFIGS)
def test_builds(name, no_drawing):
    cfg = parsed(name)
    model = preflight.build_model(cfg)
    preflight.check_hooks(cfg, model)
    if name in COCO:
        assert cfg.train_dataloader.dataset.data_root == "/data/somewhere/"
        assert cfg.val_evaluator.ann_file.startswith("/data/somewhere/annotations/")
    elif name in IMAGENET:
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.data_root == "/data/elsewhere/"


@pytest.mark.parametrize("detector", RECIPES)
def test_recipe(detector, no_drawing):
    target, lr_mult = RECIPES[detector]
    cfg = parsed(f"{detector}_lasnet_r101.py")
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    assert hooks["las_mm.BudgetHook"]["loss"]["target"] == target
    assert hooks["las_mm.TemperatureHook"] == dict(
        type="las_mm.TemperatureHook", start=0.1, schedule="constant"
    )
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.backbone == dict(lr_mult=lr_mult, decay_mult=0.9)
    assert tuple(cfg.model.backbone.granularity) == (4, 4, 2, 1)
    assert cfg.train_cfg.max_epochs == 12
    twin = parsed(f"{detector}_resnet_r101.py")
    assert twin.model.backbone.mode == "static"
    init_default_scope("mmdet")
    assert not MODELS.build(twin.model).backbone.maskers()


@needs.MMDET
def test_recipe_of_densenets(monkeypatch):
    path = ROOT / "configs" / "retinanet_lasnet_densenet121.py"
    assert Config.fromfile(path).model.backbone.init_cfg is None
    monkeypatch.delenv("LAS_MM_PRETRAINED")
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.init_cfg.checkpoint == "torchvision://densenet121"
    assert cfg.model.backbone.norm_eval and cfg.model.backbone.frozen_stages == 1
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == RECIPES["retinanet"][1]


@needs.MMDET
def test_pretrained_weights_freeze_what_they_justify(monkeypatch):
    path = ROOT / "configs" / "mask_rcnn_lasnet_r101.py"
    scratch = Config.fromfile(path).model.backbone
    assert scratch.init_cfg is None and scratch.frozen_stages == -1 and not scratch.norm_eval
    monkeypatch.delenv("LAS_MM_PRETRAINED")
    static = Config.fromfile(path).model.backbone
    assert static.init_cfg.checkpoint == "torchvision://resnet101"
    assert static.frozen_stages == 1 and static.norm_eval
    monkeypatch.setenv("LAS_MM_PRETRAINED", "weights.pth")
    assert Config.fromfile(path).model.backbone.init_cfg.checkpoint == "weights.pth"


@needs.MMDET
def test_data_root_defaults(monkeypatch):
    monkeypatch.delenv("LAS_MM_COCO")
    cfg = Config.fromfile(ROOT / "configs" / "mask_rcnn_lasnet_r101.py")
    assert cfg.train_dataloader.dataset.data_root == "data/coco/"


@pytest.mark.parametrize("mode", ["channel", "layer"])
@pytest.mark.parametrize("detector", LAUDNET)
def test_recipe_of_laudnet(detector, mode):
    *targets, lr_mult = LAUDNET[detector]
    cfg = parsed(f"{detector}_laudnet_r101_{mode}.py")
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    target = targets[mode == "layer"]
    assert hooks["las_mm.BudgetHook"]["loss"] == dict(type="las_mm.BudgetLoss", target=target)
    assert hooks["las_mm.TemperatureHook"]["start"] == 0.1
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.backbone == dict(lr_mult=lr_mult, decay_mult=0.9)
    assert cfg.model.backbone.mode == mode and cfg.model.backbone.depth == 101
    if mode == "channel":
        assert cfg.model.backbone.channel_granularity == 2
        assert cfg.model.backbone.channel_position == "before_norm"


@pytest.mark.parametrize("mode", ["channel", "layer"])
@pytest.mark.parametrize("detector", TRANSFORMERS)
def test_recipe_of_detection_transformers(detector, mode):
    epochs, lr, multiplier = TRANSFORMERS[detector]
    cfg = parsed(f"{detector}_laudnet_r101_{mode}.py")
    backbone = cfg.model.backbone
    assert backbone.type == "las_mm.LASResNet" and backbone.depth == 101 and backbone.mode == mode
    assert tuple(backbone.out_indices) == ((1, 2, 3) if detector == "ddq_detr" else (0, 1, 2, 3))
    assert cfg.optim_wrapper.optimizer.type == "AdamW" and cfg.optim_wrapper.optimizer.lr == lr
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == multiplier
    assert cfg.train_cfg.get("max_epochs") == epochs
    assert cfg.train_dataloader.dataset.data_root == "/data/somewhere/"
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    assert hooks["las_mm.BudgetHook"]["loss"] == dict(type="las_mm.BudgetLoss", target=0.5)
    assert hooks["las_mm.TemperatureHook"]["start"] == 0.1


@pytest.mark.parametrize("name", T2T)
def test_recipe_of_t2t_vit(name):
    cfg = parsed(name)
    words = name.removesuffix(".py").split("_")
    assert cfg.model.backbone.type == "las_mm.LAUDT2TViT"
    assert cfg.model.backbone.mode == words[-1]
    assert cfg.model.backbone.arch == f"t2t-vit-{words[-2].removeprefix('t2tvit')}"
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, weight_decay=0.065)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler.T_max == 100
    assert cfg.model.static_checkpoint is None  # nobody hosts weights that a config could name


@pytest.mark.parametrize("name", [name for name in IMAGENET if name not in T2T])
def test_recipe_of_imagenet(name, monkeypatch):
    monkeypatch.delenv("LAS_MM_PRETRAINED")
    cfg = Config.fromfile(ROOT / "configs" / name)
    mode = name.removesuffix(".py").rpartition("_")[2]
    assert cfg.model.backbone.mode == mode
    batch = 8 * cfg.train_dataloader.batch_size
    assert batch == (512 if mode == "spatial" else 1024) == cfg.auto_scale_lr.base_batch_size
    optimizer = dict(type="SGD", momentum=0.9, nesterov=True, weight_decay=5e-5)
    assert cfg.optim_wrapper.optimizer == dict(optimizer, lr=0.02 * batch / 256)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler.T_max == 100
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    assert hooks["las_mm.BudgetHook"]["loss"] == dict(
        type="las_mm.BudgetLoss", target=0.5, bounds_weight=1.0, loss_weight=10.0
    )
    assert (cfg.model.distill_weight, cfg.model.distill_temperature) == (0.5, 4.0)
    assert cfg.model.static_checkpoint.startswith("torchvision://")


# One step of training, one of inference ----------------------------------------------------------


def shrink(model: dict) -> dict:
    """The same model with few channels."""
    backbone = model.backbone
    if backbone.type == "las_mm.LASDenseNet":
        arch = dict(growth_rate=8, depths=[2, 2, 2, 2], init_channels=16)
        backbone.update(arch=arch, init_cfg=None)
        channels = [[16, 16, 16, 32][i] for i in backbone.out_indices]
    elif backbone.type == "las_mm.LAUDT2TViT":
        arch = dict(embed_dims=32, num_layers=3, num_heads=4)
        backbone.update(arch=arch, img_size=64, t2t_cfg=dict(token_dims=8), init_cfg=None)
        channels = [32]
    elif "depth" in backbone:
        basic = backbone.depth < 50
        depth = 18 if basic else 50
        backbone.update(depth=depth, base_channels=8, stem_channels=8, init_cfg=None)
        channels = [8, 16, 32, 64] if basic else [32, 64, 128, 256]
    else:
        channels = None
    if model.type in CLASSIFIERS:
        model.head.update(num_classes=CLASSES)
        if channels:
            model.head.in_channels = channels[-1]
        return model
    if model.type == "DDQDETR":
        model.neck.in_channels = channels[1:]
        model.num_queries = 20
        model.encoder.num_layers, model.decoder.num_layers = 1, 2
        for part in (model.encoder, model.decoder):
            part.layer_cfg.ffn_cfg.feedforward_channels = 16
        return model
    if model.type == "Mask2Former":
        head = model.panoptic_head
        head.update(in_channels=channels, num_queries=10)
        head.pixel_decoder.encoder.num_layers, head.transformer_decoder.num_layers = 1, 3
        for part in (head.pixel_decoder.encoder, head.transformer_decoder):
            part.layer_cfg.ffn_cfg.feedforward_channels = 16
        return model
    model.neck.update(in_channels=channels, out_channels=8)
    if model.type == "RetinaNet":
        model.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1)
        return model
    model.rpn_head.update(in_channels=8, feat_channels=8)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = 8
    heads.bbox_head.update(in_channels=8, fc_out_channels=16)
    if "mask_head" in heads:
        heads.mask_roi_extractor.out_channels = 8
        heads.mask_head.update(in_channels=8, conv_out_channels=8, num_convs=1)
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    model.train_cfg.rcnn.sampler.num = 16
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    return model


def samples(model: dict, count: int) -> list:
    """Labels for images of 64 x 64."""
    if model.type in CLASSIFIERS:
        from mmpretrain.structures import DataSample

        return [DataSample().set_gt_label(i % CLASSES) for i in range(count)]
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    found = []
    for _ in range(count):
        shape = dict(img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64))
        sample = DetDataSample(metainfo=dict(shape, ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        mask[:, 8:40, 8:40] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
            labels=torch.zeros(1, dtype=torch.long),
            masks=BitmapMasks(mask.numpy(), 64, 64),
        )
        found.append(sample)
    return found


def step_and_infer(cfg: Config) -> None:
    """A step of training changes the maskers; then sparse inference equals masked-dense."""
    torch.manual_seed(0)
    model = preflight.build_model(cfg)
    if cfg.model.type in ("DDQDETR", "Mask2Former"):  # parts of these are allocated, not drawn
        model.init_weights()
    images, labels = torch.rand(2, 3, 64, 64), samples(cfg.model, 2)
    hooks = {hook["type"]: hook for hook in cfg.custom_hooks}
    budget = hooks.get("las_mm.BudgetHook")
    randomize(model.backbone)
    model.train()
    if budget is not None:
        built = HOOKS.build(dict(budget))
        built.attach(model)
    losses = model(images, labels, mode="loss")
    total, log = model.parse_losses(losses)
    assert torch.isfinite(total)
    if budget is not None:
        assert {"loss_budget", "flops_ratio", "activation_rate"} <= log.keys()
        built.remove()
    total.backward()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.01)
    before = [p.detach().clone() for m in model.backbone.maskers() for p in m.parameters()]
    optimizer.step()
    after = [p for m in model.backbone.maskers() for p in m.parameters()]
    assert not before or any(not torch.equal(a, b) for a, b in zip(before, after))

    model.eval()
    randomize(model.backbone)  # features of a sensible size
    for masker in model.backbone.maskers():
        for name, parameter in masker.named_parameters():
            (nn.init.normal_ if "weight" in name else nn.init.zeros_)(parameter)
    with torch.no_grad():
        outs = model.backbone(images)
        reasons = {block.why_dense for block in model.backbone.blocks()}
        assert reasons == {None}
        if model.backbone.maskers():
            assert flops_report(collect_activations(model)).ratio < 0.95
        with sparse.masked_dense():
            expected = model.backbone(images)
        results = model(images, samples(cfg.model, 2), mode="predict")
    for out, dense in zip(outs, expected):
        assert (out - dense).norm() <= 1e-4 * dense.norm()
    assert len(results) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_and_infers(name, no_measuring):
    cfg = parsed(name)
    shrink(cfg.model)
    step_and_infer(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_and_infers_in_full_size(name, no_measuring):
    cfg = parsed(name)
    if name in IMAGENET:
        cfg.model.head.num_classes = CLASSES
    step_and_infer(cfg)


# What is generated -------------------------------------------------------------------------------


def config_table():
    spec = importlib.util.spec_from_file_location("config_table", ROOT / "dev/config_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs.MMDET
def test_table_and_metafile_are_up_to_date(monkeypatch, tmp_path):
    tool = config_table()
    monkeypatch.setattr(tool, "read", lambda path: parsed(str(path.relative_to(ROOT / "configs"))))
    tool.main(["--check"])
    text = (ROOT / "configs" / "README.md").read_text()
    rows = [tool.describe(ROOT / "configs" / "mask_rcnn_laudnet_r101_channel.py")]
    shown = tool.readme(rows, text)
    assert (
        "| Mask R-CNN | ResNet-101 | channel |  | 2 | 0.8 of FLOPs | 0.006 | 12 epochs | 2 |"
        in shown
    )
    monkeypatch.setattr(tool, "files", lambda: [(tmp_path / "stale", "new")])
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="not up to date: stale"):
        tool.main(["--check"])
    tool.main([])
    tool.main(["--check"])
    with pytest.raises(ValueError, match="must hold the lines"):
        tool.readme(rows, "no table")


def test_mm_tools_find_every_config(tmp_path):
    """mmengine reads PACKAGE/.mim/model-index.yml, from which it finds the metafiles."""
    os.symlink(ROOT, tmp_path / ".mim")
    for name in CONFIGS:
        found = _get_cfg_metainfo(str(tmp_path), name)
        assert (ROOT / found["Config"]).is_file()
    metafile = yaml.safe_load((ROOT / "configs" / "metafile.yml").read_text())
    collections = {collection["Name"] for collection in metafile["Collections"]}
    assert {model["In Collection"] for model in metafile["Models"]} == collections
    names = [model["Name"] for model in metafile["Models"]]
    assert len(names) == len(set(names)) == len(CONFIGS)
