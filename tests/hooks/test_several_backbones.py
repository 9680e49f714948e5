"""Models with several dynamic backbones: an argument says which one is meant."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from torch import nn

import las_mm
from las_mm import preflight
from las_mm.hooks import (
    BudgetHook,
    MaskVisualizationHook,
    PredictedLatencyHook,
    TemperatureHook,
)
from las_mm.models import LASResNet, collect_activations, find_dynamic_backbone

NAMES = "student.backbone, teacher.backbone"


@pytest.fixture(autouse=True)
def scope():
    yield
    preflight.reset_scope()


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = LASResNet(50, base_channels=8, stem_channels=8)
        for masker in self.backbone.maskers():
            nn.init.zeros_(masker.conv.bias)


class MeanTeacher(nn.Module):
    """The student learns, the teacher predicts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher = Part(), Part()

    def forward(self, x: torch.Tensor) -> dict:
        if not self.training:
            return self.teacher.backbone(x)
        with torch.no_grad():
            self.teacher.eval().backbone(x)
        return dict(loss=self.student.backbone(x)[-1].mean())


@pytest.fixture
def model() -> MeanTeacher:
    return MeanTeacher()


def runner_of(model: nn.Module, name: str) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        iter=0,
        max_iters=10,
        message_hub=MessageHub.get_instance(name),
        logger=MMLogger.get_instance("several"),
        val_dataloader=SimpleNamespace(dataset=range(2)),
    )


def test_named_by_the_backbone_or_a_part(model):
    teacher = model.teacher.backbone
    for name in ("teacher.backbone", "teacher"):
        assert find_dynamic_backbone(model, name) is teacher
    assert find_dynamic_backbone(teacher) is find_dynamic_backbone(teacher, "") is teacher
    teacher(torch.rand(1, 3, 64, 64))
    assert collect_activations(model, "teacher").shape.input_hw == (64, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, rf"exactly one dynamic backbone .*, found {NAMES}; name one with module='...'"),
        ("stud", f"module='stud' names no dynamic backbone of MeanTeacher; .* one of: {NAMES}"),
        ("student.neck", f"names no dynamic backbone .* one of: {NAMES}"),
        (1, "module must be a name such as 'student.backbone', got 1"),
    ],
)
def test_what_could_be_meant_is_listed(model, name, message):
    with pytest.raises(ValueError, match=message):
        find_dynamic_backbone(model, name)
    for hook in (BudgetHook, PredictedLatencyHook, MaskVisualizationHook, TemperatureHook):
        if name is None and hook is TemperatureHook:
            continue  # sets all
        cfg = Config(dict(custom_hooks=[dict(type=f"las_mm.{hook.__name__}", module=name)]))
        with pytest.raises(preflight.UserError, match=f"{hook.__name__}: .*{message}"):
            preflight.check_hooks(cfg, model)
    with pytest.raises(ValueError, match=message):
        las_mm.explain(model, torch.rand(3, 64, 64), module=name)


def test_two_in_a_part_are_too_many(model):
    with pytest.raises(ValueError, match="module='both' names 2 dynamic backbones"):
        find_dynamic_backbone(nn.ModuleDict(dict(both=model)), "both")


def test_hooks_accept_names(model):
    hooks = [
        dict(type="las_mm.BudgetHook", module="student"),
        dict(type="las_mm.PredictedLatencyHook", module="student", val_module="teacher"),
        dict(type="las_mm.MaskVisualizationHook", module="teacher.backbone"),
        dict(type="las_mm.TemperatureHook"),
        dict(type="las_mm.IterationSeedHook"),
    ]
    preflight.check_hooks(Config(dict(custom_hooks=hooks)), model)


def test_the_budget_is_the_named_ones(model):
    BudgetHook(module="student.backbone").attach(model)
    losses = model.train()(torch.rand(2, 3, 64, 64))
    assert losses["activation_rate"] == collect_activations(model, "student").mean_rate
    losses["loss_budget"].backward()
    assert model.student.backbone.maskers()[0].conv.weight.grad is not None
    assert model.teacher.backbone.maskers()[0].conv.weight.grad is None


def test_temperature_is_everyones_or_one_ones(model):
    def temperatures(**kwargs) -> list[float]:
        hook = TemperatureHook(start=3.0, schedule="constant", **kwargs)
        hook.before_train(runner_of(model, "temperature"))
        hook.before_train_iter(runner_of(model, "temperature"), 0)
        parts = model.student, model.teacher
        return [part.backbone.maskers()[-1].temperature for part in parts]

    assert temperatures(module="student") == [3.0, 1.0]
    assert temperatures() == [3.0, 3.0]


def test_latency_of_student_and_teacher(model):
    hook = PredictedLatencyHook(module="student", val_module="teacher", interval=1)
    runner = runner_of(model, "student-and-teacher")
    hook.before_run(runner)
    model.train()(torch.rand(2, 3, 64, 64))
    hook.after_train_iter(runner, 0)
    hook.before_val_epoch(runner)
    model.eval()
    rates = []
    for i in range(2):
        with torch.no_grad():
            model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)))
        rates.append(collect_activations(model, "teacher").mean_rate.item())
        hook.after_val_iter(runner, i, outputs=[object()])
    hook.after_val_epoch(runner)
    scalars = runner.message_hub.log_scalars
    logged = scalars["val/las_mm/activation_rate"].current()
    assert logged == pytest.approx(sum(rates) / 2, rel=1e-5)
    student = hook.predict(collect_activations(model, "student").detach())
    assert scalars["train/latency_ratio"].current() == pytest.approx(student.ratio)


def test_one_that_did_not_run_is_said(model, caplog):
    hook = PredictedLatencyHook(module="student")
    runner = runner_of(model, "did-not-run")
    model.train()(torch.rand(1, 3, 64, 64))  # a record that validation must not take for its own
    hook.before_val_epoch(runner)
    with torch.no_grad():
        model.eval()(torch.rand(1, 3, 64, 64))
    hook.after_val_iter(runner, 0, outputs=[object()])
    said = []
    runner.logger = SimpleNamespace(warning=said.append)
    hook.after_val_epoch(runner)
    assert said and "student did not run in val" in said[0] and "val_module" in said[0]
    assert "val/las_mm/latency_ms" not in runner.message_hub.log_scalars


def test_soft_teacher(tiny_config, tmp_path):
    pytest.importorskip("mmdet")
    cfg = Config.fromfile(tiny_config(tmp_path))
    detector = copy.deepcopy(cfg.model)
    detector.data_preprocessor = None
    cfg.model = dict(
        type="SoftTeacher",
        detector=detector,
        data_preprocessor=dict(
            type="mmdet.MultiBranchDataPreprocessor", data_preprocessor=cfg.model.data_preprocessor
        ),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on="teacher"),
    )
    model = preflight.build_model(cfg)
    with pytest.raises(preflight.UserError, match=NAMES):
        preflight.check_hooks(cfg, model)
    for hook in cfg.custom_hooks:
        if hook.type in ("las_mm.BudgetHook", "las_mm.PredictedLatencyHook"):
            hook.module = "student.backbone"
    preflight.check_hooks(cfg, model)
