"""tools/calibrate.py and tools/validate_latency.py, on an imagined machine."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import load_tool
from las_mm.cli import validate
from las_mm.errors import UserError
from las_mm.latency import load_device
from las_mm.latency.measured import calibrate
from las_mm.latency.measured.halo import expected_dilated_rate
from las_mm.latency.measured.measurement import Measurement, Stopwatch
from las_mm.latency.measured.samples import StemCase
from las_mm.latency.measured.terms import Probes

PROBES = Probes(1e11, 5e10, ((1e4, 4e11), (1e6, 1e11), (1e8, 3e10)), 2e-5)


def take(case, *_):
    """A machine that takes 10 ns per thousand multiply-accumulates that are left, and 0.1 ms."""
    if isinstance(case, StemCase):
        return Measurement((1e-4 + 1e-9 * case.batch * case.conv.h_out**2,) * 3)
    rate = case.rate if case.block.decides_positions else 1.0
    dilated = float(expected_dilated_rate(case.block, np.asarray(rate)))
    seconds = 1e-4 + 1e-11 * case.macs * rate * case.channel_rate
    return Measurement((seconds,) * 3, rate, dilated, case.channel_rate)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LAS_MM_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure_case", take)
    monkeypatch.setattr(calibrate, "measure_probes", lambda settings: PROBES)
    monkeypatch.setattr(Stopwatch, "undisturbed", lambda self, run: run())
    return tmp_path


def test_calibrate_then_validate(machine, capsys):
    tool = load_tool("calibrate")
    arguments = ["--cases", "60", "--visits", "1", "--name", "mine"]
    tool.main(arguments)
    assert "unseen blocks" in capsys.readouterr().out
    device = load_device("cpu")
    assert device.name == "mine"
    assert not (machine / "cpu.measurements.jsonl").exists()
    written = (machine / "cpu.yaml").read_text()
    tool.main(["--name", "mine", "--refit"])
    assert (machine / "cpu.yaml").read_text() == written

    report = machine / "report.md"
    checker = load_tool("validate_latency")
    parts = "".join(f"<!-- validation: {part} -->\nold {part}\n" for part in validate.PARTS)
    text = f"before\n<!-- validation: begin -->\n{parts}<!-- validation: end -->\nafter\n"
    report.write_text(text)
    options = ["--cases", "40", "--visits", "1", "--parts", "blocks", "--write", str(report)]
    checker.main(options)
    text = report.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- validation: end -->\nafter\n")
    assert "| all | 40 |" in text and "old blocks" not in text
    assert "<!-- validation: networks -->\nold networks\n" in text  # were not measured
    assert "<!-- validation: search -->\nold search\n" in text
    assert (machine / "report.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("calibrate", ["--visits", "0"], "--visits must be positive, got 0"),
        ("calibrate", ["--out", "device.txt"], "--out must end in .yaml or .yml"),
        ("calibrate", ["--refit"], "--refit: there are no measurements at"),
        ("calibrate", ["--cases", "5", "--visits", "1"], "--cases must be at least 60, got 5"),
        ("validate_latency", [], "not calibrated yet"),
        ("validate_latency", ["--device", "v100"], "--device v100 is published"),
        ("validate_latency", ["--write", "missing.md"], "--write missing.md does not exist"),
    ],
)
def test_refusals(machine, name, arguments, message, refused):
    said = refused(load_tool(name).main, arguments)
    assert said.startswith(f"{name}.py: error: ") and message in said


def test_missing_library_is_named_before_measuring(machine, monkeypatch):
    monkeypatch.setattr(calibrate, "measure_case", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="fitting needs scipy: pip install scipy"):
        calibrate.calibrate(calibrate.Settings(), machine / "record.jsonl", "mine", "2026-01-01")


def test_one_part_keeps_the_tables_of_the_others(tmp_path):
    path, empty = tmp_path / "report.md", f"a\n{validate.BEGIN}\n{validate.END}\nb\n"
    found = {part: [f"| {part} |", ""] for part in validate.PARTS}
    text = validate.merge(empty, found, path)
    assert text.startswith("a\n") and text.endswith("\nb\n")
    for part in validate.PARTS:
        again = validate.merge(text, {part: ["new"]}, path)
        assert again == text.replace(f"| {part} |", "new")
    assert validate.merge(empty, {"search": ["new"]}, path).count("validation: ") == 3
    unnamed = f"a\n{validate.BEGIN}\n| tables |\n{validate.END}\nb\n"
    with pytest.raises(UserError, match="the others than search would be lost.*leave --parts out"):
        validate.merge(unnamed, {"search": ["new"]}, path)
    assert "| tables |" not in validate.merge(unnamed, found, path)
