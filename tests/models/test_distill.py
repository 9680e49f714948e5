"""The ImageNet recipe's classifier: a static teacher, out of sight."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from mmpretrain.models import ImageClassifier
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader

from las_mm.benchmark.subject import randomize
from las_mm.models import (
    DistilledClassifier,
    LASResNet,
    find_dynamic_backbone,
    plan,
    released,
)
from las_mm.models.distill import distillation

CONFIG = dict(
    backbone=dict(
        type="las_mm.LASResNet", depth=50, base_channels=4, stem_channels=4, mode="channel"
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead", num_classes=5, in_channels=128, loss=dict(type="CrossEntropyLoss")
    ),
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


@pytest.fixture
def checkpoint(tmp_path):
    """A static network's weights, in torchvision's names."""
    torch.manual_seed(0)
    net = LASResNet(50, mode="static", base_channels=4, stem_channels=4)
    randomize(net)
    weights = {**net.state_dict(), "fc.weight": torch.randn(5, 128), "fc.bias": torch.randn(5)}
    torch.save(weights, tmp_path / "static.pth")
    return tmp_path / "static.pth"


def build(**kwargs) -> DistilledClassifier:
    torch.manual_seed(1)
    model = DistilledClassifier(**copy.deepcopy(CONFIG), **kwargs)
    model.init_weights()
    return model


def batch(count=3):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, 64, 64, generator=generator)
    return images, [DataSample().set_gt_label(i) for i in range(count)]


def test_weights_go_into_teacher_and_student(checkpoint):
    model = build(static_checkpoint=str(checkpoint))
    weights = torch.load(checkpoint, weights_only=True)
    for net in (model, model.teacher):
        assert torch.equal(net.backbone.layer2[1].conv2.weight, weights["layer2.1.conv2.weight"])
        assert torch.equal(net.head.fc.bias, weights["fc.bias"])
    assert model.backbone.maskers() and not model.teacher.backbone.maskers()


def test_teacher_is_out_of_sight(checkpoint):
    model = build(static_checkpoint=str(checkpoint)).train()
    assert find_dynamic_backbone(model) is model.backbone
    assert {key.partition(".")[0] for key in model.state_dict()} == {"backbone", "head"}
    hidden = {id(p) for p in model.teacher.parameters()}
    assert not hidden & {id(p) for p in model.parameters()}
    assert not model.teacher.training and not any(
        p.requires_grad for p in model.teacher.parameters()
    )
    assert model.double().teacher.head.fc.weight.dtype == torch.float64  # it moves with the model


def test_teacher_is_built_for_training_alone(checkpoint):
    model = build(static_checkpoint=str(checkpoint))
    images, labels = batch()
    with torch.no_grad():
        model.eval().predict(images, [copy.deepcopy(label) for label in labels])
    assert model._teacher == []  # no weights were read for it either
    seen = []
    for built in (False, True):
        model.train()
        torch.manual_seed(3)
        assert bool(model._teacher) == built
        assert model(images, labels, mode="loss")["loss_distill"] > 0
        seen.append(torch.rand(1))
    assert torch.equal(*seen)  # the noise of a resumed run is that of the uninterrupted one


def test_copies_have_no_teacher(checkpoint):
    model = build(static_checkpoint=str(checkpoint)).train()
    model(*batch(), mode="loss")
    ema = ExponentialMovingAverage(model)
    for twin in (ema.module, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._teacher == [] and model._teacher
    assert torch.equal(twin.teacher.head.fc.bias, model.teacher.head.fc.bias)  # makes its own
    assert twin.teacher is not model.teacher


def test_checkpoint_that_mmengines_runner_wrote(checkpoint, tmp_path):
    static = {**CONFIG["backbone"], "mode": "static"}
    torch.manual_seed(4)
    model = ImageClassifier(**{**copy.deepcopy(CONFIG), "backbone": static}).train()
    runner = Runner(
        model,
        work_dir=str(tmp_path),
        train_dataloader=DataLoader([0]),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        param_scheduler=dict(type="CosineAnnealingLR", T_max=3),
        experiment_name="distill",
        default_scope="mmpretrain",
    )
    runner.message_hub.update_scalar("train/loss", 1.5)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.save_checkpoint(str(tmp_path), "epoch_1.pth")
    path = tmp_path / "epoch_1.pth"
    assert {"message_hub", "optimizer"} <= torch.load(path, weights_only=False).keys()
    student = build(static_checkpoint=str(path))
    expected = model.backbone.layer2[1].conv2.weight
    for net in (student, student.teacher, released.load(path)):
        assert torch.equal(net.backbone.layer2[1].conv2.weight, expected)


def test_weights_of_an_init_cfg_are_the_students(checkpoint, tmp_path):
    trained = build().backbone.state_dict()
    torch.save({key: value + 1 for key, value in trained.items()}, tmp_path / "student.pth")
    load = dict(type="mmengine.Pretrained", checkpoint=str(tmp_path / "student.pth"))
    config = copy.deepcopy(CONFIG)
    config["backbone"]["init_cfg"] = [load]
    model = DistilledClassifier(**config, static_checkpoint=str(checkpoint))
    model.init_weights()
    assert torch.equal(model.backbone.conv1.weight, trained["conv1.weight"] + 1)
    static = torch.load(checkpoint, weights_only=True)
    assert torch.equal(model.teacher.backbone.conv1.weight, static["conv1.weight"])


def test_a_second_initialisation_changes_nothing(checkpoint):
    model = build(static_checkpoint=str(checkpoint))
    torch.nn.init.ones_(model.backbone.conv1.weight)
    model.init_weights()
    assert (model.backbone.conv1.weight == 1).all()


def test_loss(checkpoint):
    model = build(static_checkpoint=str(checkpoint), distill_weight=0.3, distill_temperature=2.0)
    model.eval()  # the same batch statistics in both passes
    images, labels = batch()
    losses = model(images, labels, mode="loss")
    student, teacher = model(images), model.teacher(images)
    p, q = F.softmax(teacher / 2, dim=1), F.softmax(student / 2, dim=1)
    expected = 0.3 * 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert losses["loss_distill"].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    labelled = F.cross_entropy(student, torch.arange(3))
    assert losses["loss"].item() == pytest.approx(labelled.item(), rel=1e-4)
    model.train()
    total, _ = model.parse_losses(model(images, labels, mode="loss"))
    total.backward()
    assert model.backbone.conv1.weight.grad is not None
    assert all(p.grad is None for p in model.teacher.parameters())


def test_distillation_is_zero_for_equal_logits_and_never_negative():
    logits = torch.randn(4, 7)
    assert distillation(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-6)
    assert distillation(logits, logits + 3, 4.0).item() == pytest.approx(0, abs=1e-5)
    assert distillation(logits, logits.flip(1), 4.0) > 0


def test_from_scratch():
    model = build()
    assert model.teacher is None
    assert "loss_distill" not in model(*batch(), mode="loss")
    assert isinstance(model, ImageClassifier)


def test_wrong_arguments(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="distill_weight .* got -1"):
        build(distill_weight=-1)
    with pytest.raises(ValueError, match="distill_temperature .* got 0"):
        build(distill_temperature=0)
    weights = torch.load(checkpoint, weights_only=True)
    other = {**weights, "fc.weight": torch.zeros(6, 128), "fc.bias": torch.zeros(6)}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="2 weights differ in name or shape, e.g. head.fc"):
        build(static_checkpoint=str(tmp_path / "other.pth"))
    bare = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="has no classifier"):
        build(static_checkpoint=str(tmp_path / "bare.pth"))
