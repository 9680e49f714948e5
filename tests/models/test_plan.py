"""The plan: which form of a block runs, measured once and kept in a file."""

import json
from dataclasses import replace

import pytest
import torch

from las_mm import ops
from las_mm.models import plan, sparse
from las_mm.models.plan import BlockKind, Choice, Plan, Timing, choose, map_side
from las_mm.models.resnet import LASResNet

KIND = BlockKind(
    c_in=256,
    width=64,
    c_out=256,
    strides=(1, 1),
    dilation=1,
    groups=1,
    downsample=False,
    dtype="float32",
    threads=1,
    side=14,
)
needs_native = pytest.mark.skipif(not ops.native_available(), reason="NATIVE OPS NOT BUILT")


@pytest.fixture
def counted(monkeypatch):
    """Replaces the measurement by a constant and records what was measured."""
    calls = []

    def measure(kind):
        calls.append(kind)
        return Timing(dense=2.0, direct=(0.5, 2.5), winograd=(0.4, 1.9) if kind.tiled else None)

    monkeypatch.setattr(plan, "measure", measure)
    return calls


def test_measured_once_and_kept_in_a_file(tmp_path, counted):
    first = Plan(tmp_path / "a" / "plan.json")
    choice = first.lookup(KIND)
    assert first.lookup(KIND) is choice
    assert Plan(first.path).lookup(KIND) == choice
    assert counted == [KIND]
    Plan(first.path).lookup(replace(KIND, threads=2))
    assert len(counted) == 2
    assert len(json.loads(first.path.read_text())["seconds"]) == 2


@pytest.mark.parametrize("key, value", [("cpu", "another"), ("las_mm", "0.0.1"), ("isa", "mmx")])
def test_file_of_another_machine_is_replaced(tmp_path, counted, key, value):
    path = tmp_path / "plan.json"
    Plan(path).lookup(KIND)
    content = json.loads(path.read_text())
    content["machine"][key] = value
    path.write_text(json.dumps(content))
    Plan(path).lookup(KIND)
    assert len(counted) == 2
    assert json.loads(path.read_text())["machine"] == plan.machine()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"machine": 1}',
        '{"machine": MACHINE, "seconds": {"KEY": {"dense": -1.0, "direct": [1.0, 2.0]}}}',
        '{"machine": MACHINE, "seconds": {"KEY": 3}}',
    ],
)
def test_corrupt_file_is_measured_anew(tmp_path, counted, content):
    path = tmp_path / "plan.json"
    machine = json.dumps(plan.machine())
    path.write_text(content.replace("MACHINE", machine).replace("KEY", KIND.key))
    Plan(path).lookup(KIND)
    assert counted == [KIND]
    assert Plan(path).lookup(KIND).timing is not None
    assert len(counted) == 1
    assert list(tmp_path.iterdir()) == [path]  # no draft left behind


def test_two_processes_add_to_one_file(tmp_path, counted):
    one, two = Plan(tmp_path / "plan.json"), Plan(tmp_path / "plan.json")
    one.lookup(KIND)
    other = replace(KIND, width=128)
    two._timings = {}  # read before `one` wrote
    two.lookup(other)
    assert len(json.loads(one.path.read_text())["seconds"]) == 2


def test_unwritable_folder_only_warns(tmp_path, counted):
    (tmp_path / "file").write_text("")
    blocked = Plan(tmp_path / "file" / "plan.json")
    assert blocked.lookup(KIND).timing is not None
    assert blocked.path is None


def test_break_even():
    never = choose(KIND, Timing(2.0, (0.5, 1.8), None))
    assert never.dense_above == 1.0 and not never.winograd
    # Direct: 0.5 s at a rate of .25 and 2.5 s at 1, dense 2 s: equal at .8125.
    crossing = choose(KIND, Timing(2.0, (0.5, 2.5), None))
    assert crossing.dense_above == pytest.approx(0.8125)
    always = choose(KIND, Timing(0.01, (1.0, 2.5), None))
    assert always.dense_above == 0.0
    assert choose(KIND, Timing(2.0, (0.5, 2.5), (0.4, 1.9))).winograd
    assert not choose(KIND, Timing(2.0, (0.5, 2.5), (0.6, 2.6))).winograd


def test_winograd_cost_is_relative_to_the_direct_form():
    # conv2 has 9 of 17 parts of the direct time; in Winograd form 4 of 17 at equal speed.
    direct = 17.0
    equal = choose(KIND, Timing(99.0, (direct / 4, direct), (3.0, direct - 5.0)))
    assert equal.winograd_cost == pytest.approx(1.0)
    half_speed = choose(KIND, Timing(99.0, (direct / 4, direct), (3.0, direct - 1.0)))
    assert half_speed.winograd_cost == pytest.approx(2.0)


def test_prediction_is_linear_in_rate_and_positions():
    choice = choose(KIND, Timing(2.0, (0.5, 2.5), None))
    area = KIND.side**2
    assert choice.predict(0.25, area) == pytest.approx(0.5)
    assert choice.predict(0.5, 3 * area) == pytest.approx(3 * (0.5 + 2 / 3))
    assert choice.predict(1.0, area) == pytest.approx(2.0)  # dense
    assert Choice(winograd=False).predict(1.0, area) is None


def test_map_side_limits_the_work():
    assert map_side(10**6, KIND.macs) == 56
    assert map_side(49, KIND.macs) == 7
    assert map_side(1, KIND.macs) == 7
    assert map_side(200, KIND.macs) == 14
    large = replace(KIND, c_in=2048, width=512, c_out=2048).macs
    assert map_side(10**6, large) ** 2 * large <= 2e9


def test_tiny_blocks_are_not_measured(tmp_path, counted):
    tiny = Plan(tmp_path / "plan.json")
    assert tiny.lookup(replace(KIND, c_in=16, width=4, c_out=16, side=7)).timing is None
    assert not counted and not tiny.path.exists()


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strides, downsample", [((1, 1), False), ((1, 2), True), ((2, 1), True)])
def test_measure_runs_every_form(dtype, strides, downsample):
    kind = replace(
        KIND, c_in=32, width=16, c_out=32, dtype=dtype, strides=strides, downsample=downsample
    )
    timing = plan.measure(replace(kind, side=7))
    assert timing.dense > 0 and min(timing.direct) > 0
    assert (timing.winograd is not None) == (dtype == "float32" and strides[1] == 1)


@needs_native
@pytest.mark.parametrize(
    "timing",
    [
        Timing(1e-9, (1.0, 2.0), (1.0, 2.0)),  # dense always
        Timing(1.0, (0.5, 2.0), (0.9, 3.0)),  # direct below a rate of .5
        Timing(9.0, (1.0, 2.0), (0.5, 1.0)),  # Winograd
    ],
)
def test_every_choice_gives_the_same_result(tmp_path, monkeypatch, timing):
    def measure(kind):
        return timing if kind.tiled else replace(timing, winograd=None)

    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(plan, "_FEWEST_MACS", 0)
    monkeypatch.setattr(plan, "_plan", Plan(tmp_path / "plan.json"))
    torch.manual_seed(0)
    model = LASResNet(50, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3)).eval()
    for masker in model.maskers():
        masker.conv.weight.data.mul_(30)
        masker.conv.bias.data.zero_()
    x = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        outs = model(x)
        with sparse.masked_dense():
            expected = model(x)
    for out, want in zip(outs, expected):
        assert (out - want).abs().max() <= 1e-4 * want.abs().max()


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv("LAS_MM_CACHE", str(tmp_path / "here"))
    assert plan.default_path() == tmp_path / "here" / "plan.json"
    monkeypatch.delenv("LAS_MM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan.default_path() == tmp_path / "las_mm" / "plan.json"


def test_only_a_cpu_is_measured(tmp_path):
    plan = Plan(tmp_path / "plan.json")
    assert plan.lookup(KIND, "cuda") == Choice(winograd=False)
    assert not plan.path.exists()
