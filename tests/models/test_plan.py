"""The plan: which form of a block runs, measured once and kept in a file."""

import json
import logging
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from las_mm import machine, ops, preflight
from las_mm.explanation import explain
from las_mm.models import LASRegNet, plan, sparse, timing
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


@pytest.mark.parametrize(
    "key, value",
    [("cpu", "another"), ("las_mm", "0.0.1"), ("isa", "mmx"), ("kernels", "0123456789ab")],
)
def test_file_of_another_machine_is_replaced(tmp_path, counted, key, value):
    path = tmp_path / "plan.json"
    Plan(path).lookup(KIND)
    content = json.loads(path.read_text())
    content["machine"][key] = value
    path.write_text(json.dumps(content))
    Plan(path).lookup(KIND)
    assert len(counted) == 2
    assert json.loads(path.read_text())["machine"] == machine.machine()


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
    here = json.dumps(machine.machine())
    path.write_text(content.replace("MACHINE", here).replace("KEY", KIND.key))
    Plan(path).lookup(KIND)
    assert counted == [KIND]
    assert Plan(path).lookup(KIND).timing is not None
    assert len(counted) == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".plan.json.lock", path]  # no draft left


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


# Which library it was measured with ---------------------------------------------------------------


def test_machine_changes_with_the_compiled_library(tmp_path, monkeypatch):
    """The version string stays when kernels change."""
    ids = set()
    for content in (b"some kernels", b"others"):
        library = tmp_path / "_C.so"
        library.write_bytes(content)
        monkeypatch.setitem(sys.modules, "las_mm._C", SimpleNamespace(__file__=str(library)))
        machine.kernels_id.cache_clear()
        ids.add(machine.machine()["kernels"])
    monkeypatch.undo()
    machine.kernels_id.cache_clear()
    ids.add(machine.machine()["kernels"])
    assert len(ids) == 3


def test_machine_without_native_ops(monkeypatch):
    monkeypatch.delitem(sys.modules, "las_mm._C", raising=False)
    monkeypatch.setattr(machine.ops, "native_available", lambda: False)
    machine.kernels_id.cache_clear()
    found = machine.machine()
    machine.kernels_id.cache_clear()
    assert (found["isa"], found["kernels"]) == ("none", "none")


# Measured as inside a network ---------------------------------------------------------------------


@needs_native
def test_every_run_is_timed_with_cold_weights(monkeypatch):
    log = []

    class Eviction:
        def __call__(self):
            log.append("evict")

    monkeypatch.setattr(timing, "Eviction", Eviction)
    runs = {}
    original = timing._Forms.__init__

    def spied(self, kind):
        original(self, kind)
        name = "small" if runs else "block"
        runs[name] = self.runs = [
            lambda i=i, run=run, name=name: (log.append((name, i)), run())
            for i, run in enumerate(self.runs)
        ]
        refill = self.refill
        self.refill = lambda: (log.append("refill"), refill())

    monkeypatch.setattr(timing._Forms, "__init__", spied)
    timing.measure(replace(KIND, c_in=32, width=16, c_out=32, side=7))
    turn = [["evict", "refill", ("small", i), ("block", i)] for i in range(5)]
    assert log == sum(turn, []) * (len(log) // 20)


# Processes that share a file ----------------------------------------------------------------------


def test_another_process_is_waited_for_and_its_result_used(tmp_path, counted):
    mine, path = Plan(tmp_path / "plan.json"), tmp_path / "plan.json"
    other = Plan(path)
    with other._alone():
        waiting = threading.Thread(target=mine.lookup, args=(KIND,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and not counted  # it does not measure meanwhile
        other._timings = {KIND.key: Timing(dense=1.0, direct=(1.0, 2.0), winograd=None)}
        other._write()
    waiting.join(30)
    assert not counted
    assert mine.lookup(KIND).timing == other._timings[KIND.key]


def test_a_file_that_stays_locked_costs_the_measurement_not_the_run(tmp_path, counted, said):
    mine, other = Plan(tmp_path / "plan.json"), Plan(tmp_path / "plan.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_PATIENCE_S", 0.1)
        with other._alone():
            assert mine.lookup(KIND) == Choice(winograd=True)
            assert mine.lookup(replace(KIND, threads=2)).decided_by == "default"
    assert not counted and not mine.path.exists()
    assert len(said) == 1 and ".plan.json.lock" in said[0]


def test_ranks_that_start_together_measure_once(tmp_path):
    """Real processes: each would need a second for a measurement of its own."""
    code = """
import sys, time
from pathlib import Path
from las_mm.models import plan
def measure(kind):
    with open(sys.argv[2], "a") as file:
        file.write("measured\\n")
    time.sleep(1)
    return plan.Timing(dense=2.0, direct=(0.5, 2.5), winograd=None)
plan.measure = measure
kind = plan.BlockKind(256, 64, 256, (1, 1), 1, 1, False, "float32", 1, 14)
print(plan.Plan(Path(sys.argv[1])).lookup(kind).timing)
"""
    files = [str(tmp_path / name) for name in ("plan.json", "log")]
    command = [sys.executable, "-c", code, *files]
    root = str(Path(__file__).resolve().parents[2])
    ranks = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outs[0].splitlines()[-1] == outs[1].splitlines()[-1]
    assert (tmp_path / "log").read_text() == "measured\n"


# Pinned -------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    lines = []

    def record(text, logger, level=logging.INFO):
        if level >= logging.WARNING:
            lines.append(text)

    monkeypatch.setattr(plan, "print_log", record)
    return lines


@pytest.fixture
def pinned(tmp_path, monkeypatch, counted):
    path = tmp_path / "mine.json"
    Plan(path).lookup(KIND)
    counted.clear()
    monkeypatch.setenv("LAS_MM_PLAN", str(path))
    monkeypatch.setattr(plan, "_plan", None)
    return path


def test_pinned_plan_is_read_only(pinned, counted, said):
    before = pinned.read_bytes()
    known = plan.current_plan().lookup(KIND)
    assert known.timing == Timing(dense=2.0, direct=(0.5, 2.5), winograd=(0.4, 1.9))
    assert known.decided_by == "pinned plan" and not said
    for width in (128, 512):
        unknown = plan.current_plan().lookup(replace(KIND, width=width))
        assert unknown == Choice(winograd=True)
    assert len(said) == 1 and "width=128" in said[0] and "LAS_MM_PLAN" in said[0]
    assert not counted and pinned.read_bytes() == before


def test_pinned_plan_of_another_machine_decides_the_same(pinned, counted, said):
    content = json.loads(pinned.read_text())
    content["machine"]["cpu"] = "another"
    pinned.write_text(json.dumps(content))
    assert plan.current_plan().lookup(KIND).timing.dense == 2.0
    assert len(said) == 1 and "another machine" in said[0] and not counted
    plan.current_plan().lookup(replace(KIND, width=128))
    assert len(said) == 2 and "lacks kinds of blocks" in said[1]


@pytest.mark.parametrize("content", [None, "{", '{"machine": {}}', '{"seconds": {"a": 1}}'])
def test_pinned_plan_that_cannot_be_read(pinned, content):
    pinned.unlink() if content is None else pinned.write_text(content)
    with pytest.raises(preflight.UserError, match="LAS_MM_PLAN=.*mine.json is no readable plan"):
        plan.current_plan().lookup(KIND)


# The switch ---------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("make", [LASResNet, LASRegNet])
def test_runtime(monkeypatch, make):
    looked_up = []

    class Spy:
        def lookup(self, kind, device_type="cpu"):
            looked_up.append(kind)
            return Choice(winograd=False, dense_above=0.0, decided_by="measured")

    monkeypatch.setattr("las_mm.models.plan.current_plan", Spy)
    torch.manual_seed(0)
    kwargs = dict(runtime="sparse", out_indices=(0, 1, 2, 3))
    if make is LASResNet:
        net = make(50, base_channels=8, stem_channels=8, **kwargs).eval()
    else:
        net = make("regnetx_400mf", **kwargs).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = {"sparse": net(x)}
        assert not looked_up
        assert {block._executor.choice.decided_by for block in net.blocks()} == {"runtime='sparse'"}
        for runtime in ("auto", "dense"):
            net.runtime = runtime
            assert {block.runtime for block in net.blocks()} == {runtime}
            found[runtime] = net(x)
            assert len(looked_up) == len(net.blocks())
        with sparse.masked_dense():
            want = net(x)
    for outs in found.values():
        for out, other in zip(outs, want):
            assert (out - other).abs().max() <= 1e-4 * other.abs().max()
    assert all(torch.equal(out, other) for out, other in zip(found["dense"], want))
    rows = explain(net, x, quiet=True).blocks
    assert rows[0].choice == "as its modules: runtime='dense'"
    assert {row.choice for row in rows[1:]} == {"masked-dense: runtime='dense'"}
    net.runtime = "auto"
    rows = [row for row in explain(net, x, quiet=True).blocks if row.name != "stem"]
    assert {row.decided_by for row in rows} == {"measured"}


def test_unknown_runtime():
    with pytest.raises(ValueError, match="runtime must be one of auto, sparse, dense, got 'fast'"):
        LASResNet(50, runtime="fast")
    net = LASResNet(50, base_channels=8, stem_channels=8)
    with pytest.raises(ValueError, match="got None"):
        net.runtime = None
    assert net.runtime == "auto"
