"""Necks and heads on packed weights: the same results, and nothing else changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import las_mm
import needs
from las_mm import ops
from las_mm.models import LASResNet, plan, sparse, surroundings
from las_mm.models.plan import Choice
from las_mm.registry import MODELS

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


@pytest.fixture(autouse=True)
def fixed_plan(monkeypatch):
    """Nothing is measured; ``fixed_plan["dense"] = True``: dense is the fastest."""
    says = dict(dense=False)

    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return Choice(winograd=kind.tiled, dense_above=0.0 if says["dense"] else 1.0)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)
    return says


@pytest.fixture
def packed(monkeypatch):
    """Input shapes of the packed convolutions that ran."""
    seen = []
    run = ops.packed_conv2d

    def spy(x, *rest):
        seen.append(tuple(x.shape))
        return run(x, *rest)

    monkeypatch.setattr(ops, "packed_conv2d", spy)
    return seen


class Net(nn.Module):
    """A backbone and convolutions of many kinds after it."""

    def __init__(self):
        super().__init__()
        self.backbone = LASResNet(50, base_channels=8, stem_channels=8, out_indices=(0,))
        self.neck = nn.Sequential(
            nn.Conv2d(32, 24, 1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1, bias=False),
            nn.Conv2d(24, 20, 3, stride=2, padding=2, dilation=2),
            nn.Conv2d(20, 16, 1, stride=2),
        )
        self.others = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=4),
            nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(16, 16, (3, 1), padding=(1, 0)),
            nn.Conv2d(16, 8, 5, padding=2),
            nn.Conv2d(8, 8, 3),
        )

    def forward(self, x):
        return self.others(self.neck(self.backbone(x)[0]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def run(net, x=X):
    with torch.no_grad():
        return net(x)


def test_the_same_results_from_packed_weights(net, packed):
    before = run(net)
    keys = list(net.state_dict())
    assert las_mm.prepare(net) is net
    after = run(net)
    assert len(packed) == 4  # all of the neck, none of the others
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert all(isinstance(m, nn.Conv2d) for m in net.neck if not isinstance(m, nn.ReLU))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_format_of_dense_convolutions(net, layout):
    x = X.contiguous(memory_format=layout)
    before = run(net, x)
    after = run(las_mm.prepare(net), x)
    assert after.stride() == before.stride()


def test_only_where_it_is_wanted(net, packed, fixed_plan):
    las_mm.prepare(net)
    net(X).sum().backward()  # gradients
    assert net.neck[0].weight.grad is not None
    with sparse.masked_dense():
        run(net)
    with torch.autocast("cpu", torch.bfloat16):
        run(net)
    fixed_plan["dense"] = True
    run(net)
    assert not packed


def test_switched_off(net, packed):
    las_mm.prepare(las_mm.prepare(net), surroundings=False)
    assert {type(m) for m in net.neck} == {nn.Conv2d, nn.ReLU}
    run(net)
    assert not packed


def test_subclasses_stay_as_they_are(net, packed):
    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net.neck[2] = Own(24, 24, 3, padding=1)
    before = run(net)
    after = run(las_mm.prepare(net))
    assert type(net.neck[2]) is Own and len(packed) == 3
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())


@pytest.mark.parametrize("write", ["in place", "data", "numpy", "replaced", "loaded", "part"])
def test_weights_that_change_are_packed_again(net, packed, write):
    run(las_mm.prepare(net))
    conv = net.neck[2]
    new = torch.randn_like(conv.weight)
    if write == "in place":
        with torch.no_grad():
            conv.weight.copy_(new)
    elif write == "data":
        conv.weight.data.copy_(new)
    elif write == "numpy":
        conv.weight.detach().numpy()[:] = new.numpy()
    elif write == "replaced":
        conv.weight = nn.Parameter(new)
    elif write == "loaded":
        conv.load_state_dict(dict(weight=new))
    else:
        conv.weight.data[3, 2, 1, 1] += 5
    packed.clear()
    after = run(net, X.repeat(1, 1, 2, 2))  # enough outputs for all to be compared at once
    assert len(packed) == 4
    with sparse.masked_dense():
        want = run(net, X.repeat(1, 1, 2, 2))
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_settings_that_change(net, packed):
    run(las_mm.prepare(net))
    packed.clear()
    net.neck[3].dilation = (1, 1)  # now padded by more than its dilation
    after = run(net)
    assert len(packed) == 3
    with sparse.masked_dense():
        want = run(net)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_copies(net, packed):
    want = run(las_mm.prepare(net))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        packed.clear()
        torch.testing.assert_close(run(other), want)
        assert len(packed) == 4
        assert other.neck[0]._state is not net.neck[0]._state


def test_hooks_are_called(net):
    las_mm.prepare(net)
    seen = []
    net.neck[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    run(net)
    assert len(seen) == 1


def test_empty_batches(net, packed):
    las_mm.prepare(net)
    with torch.no_grad():
        assert net.neck(torch.empty(0, 32, 8, 8)).shape == (0, 16, 2, 2)
    assert not packed


def test_the_plan_measures_convolutions(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(plan, "_plan", plan.Plan(tmp_path / "plan.json"))
    conv = las_mm.prepare(
        nn.Sequential(LASResNet(50, base_channels=8), nn.Conv2d(64, 64, 3, 1, 1)).eval()
    )[1]
    with torch.no_grad():
        conv(torch.randn(1, 64, 20, 20))
    (choice,) = plan._plan._choices.values()
    assert choice.decided_by == "measured"
    assert choice.timing.direct[0] > 0 and choice.timing.winograd[0] > 0
    assert '"conv,' in (tmp_path / "plan.json").read_text()


# Detectors ---------------------------------------------------------------------------------------


def detector():
    from mmengine.config import ConfigDict
    from mmengine.hub import get_config
    from mmengine.registry import DefaultScope

    config = get_config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model
    config.backbone = ConfigDict(
        type="las_mm.LASResNet",
        depth=50,
        base_channels=8,
        stem_channels=8,
        out_indices=(0, 1, 2, 3),
        norm_eval=True,
    )
    config.neck.in_channels, config.neck.out_channels = [32, 64, 128, 256], 32
    config.rpn_head.in_channels = config.rpn_head.feat_channels = 32
    roi = config.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 32
    roi.bbox_head.in_channels, roi.bbox_head.fc_out_channels = 32, 32
    roi.mask_head.in_channels = roi.mask_head.conv_out_channels = 32
    config.test_cfg.rcnn.score_thr = 0.0
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config).eval()
    return model


def detect(model):
    from las_mm.benchmark.whole_model import _data_samples

    with torch.no_grad():
        return model(X, _data_samples(model, X), mode="predict")


def formats_of_roi_maps(model):
    from mmcv.ops import RoIAlign

    before, inside = [], []
    for module in model.modules():
        if isinstance(module, RoIAlign):
            run = module.forward
            module.forward = lambda x, rois, run=run: (
                inside.append(x.is_contiguous()),
                run(x, rois),
            )[1]
    extractor = model.roi_head.bbox_roi_extractor
    extractor.register_forward_pre_hook(
        lambda module, args: before.append(
            args[0][0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    return before, inside


@pytest.mark.skipif(not needs.HAS_MMDET, reason=needs.NO_MMDET)
def test_a_known_detector_runs_channels_last_up_to_roi_align(packed):
    model = detector()
    want = detect(model)
    las_mm.prepare(model)
    before, inside = formats_of_roi_maps(model)
    found = detect(model)
    assert before and all(before) and inside and all(inside)
    assert packed
    for a, b in zip(found, want):
        a, b = a.pred_instances, b.pred_instances
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=1e-3, atol=1e-1)


@pytest.mark.skipif(not needs.HAS_MMDET, reason=needs.NO_MMDET)
@pytest.mark.parametrize("how", ["subclass", "replaced method", "switched off"])
def test_a_detector_with_other_parts_keeps_its_formats(how):
    model = detector()
    if how == "subclass":
        model.neck.__class__ = type("Own", (type(model.neck),), {})
    if how == "replaced method":
        model.neck.forward = model.neck.forward
    las_mm.prepare(model)
    if how == "switched off":
        las_mm.prepare(model, surroundings=False)
    assert not model.backbone._forward_pre_hooks
    before, inside = formats_of_roi_maps(model)
    detect(model)
    assert before and not any(before) and all(inside)


def test_names_of_known_parts_exist():
    import importlib

    for name in surroundings._KNOWN_PARTS:
        module, _, cls = name.rpartition(".")
        if needs.HAS_MMDET or not name.startswith(("mmdet.", "mmcv.ops")):
            assert isinstance(getattr(importlib.import_module(module), cls), type)
