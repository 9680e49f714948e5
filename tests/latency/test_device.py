"""Device files load, and a wrong one says what is wrong and what to write."""

from __future__ import annotations

import copy

import pytest
import yaml

from las_mm.latency import KINDS, Device, available_devices, load_device
from las_mm.latency.analytical.device import NUMBER_FIELDS

# docs/latency_model.md: n_pe, lanes, Hz, bytes/s, k, batch
TABLE = {
    "v100": (80, 64, 1500e6, 700e9, 4, 128),
    "rtx3090": (82, 128, 1250e6, 936e9, 1, 128),
    "rtx3060": (28, 128, 1777e6, 360e9, 4, 128),
    "tx2": (2, 128, 1300e6, 59.7e9, 4, 1),
    "nano": (1, 128, 921e6, 25.6e9, 4, 1),
}

# From data sheets, as above but for the ratio of L2, which is an estimate.
DATA_SHEETS = {
    "a100": (108, 64, 1410e6, 2039e9, 128),
    "h100": (132, 128, 1980e6, 3350e9, 128),
    "rtx4090": (128, 128, 2520e6, 1008e9, 128),
    "orin": (16, 128, 1300e6, 204.8e9, 1),
    "t4": (40, 64, 1590e6, 320e9, 128),
}
TFLOPS = {"a100": 19.5, "h100": 67, "rtx4090": 82.6, "orin": 5.3, "t4": 8.1}  # FP32, as stated


@pytest.mark.parametrize("name", TABLE)
def test_shipped_devices_hold_the_documents_numbers(name):
    device = load_device(name)
    assert device.name == name
    assert (
        device.n_pe,
        device.lanes,
        device.frequency_hz,
        device.dram_bytes_per_s,
        device.l2_to_dram_ratio,
        device.batch_size,
    ) == pytest.approx(TABLE[name])
    assert (device.launch_s, device.request_width, device.macs_in_flight_per_lane) == (8e-6, 8, 4)
    assert set(device.sources) == set(NUMBER_FIELDS) and all(device.sources.values())
    assert device.kind == "published" and "published" in device.note


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_devices_from_data_sheets(name):
    device = load_device(name)
    assert device.name == name and device.kind == "datasheet"
    assert (
        device.n_pe,
        device.lanes,
        device.frequency_hz,
        device.dram_bytes_per_s,
        device.batch_size,
    ) == pytest.approx(DATA_SHEETS[name])
    peak = 2 * device.n_pe * device.macs_per_s_per_pe
    assert peak == pytest.approx(1e12 * TFLOPS[name], rel=0.01)
    assert 1 <= device.l2_to_dram_ratio <= 6
    for key in ("l2_to_dram_ratio", "launch_s", "request_width", "macs_in_flight_per_lane"):
        assert device.sources[key].startswith("estimate")
    for key in ("n_pe", "lanes", "frequency_hz", "dram_bytes_per_s"):
        assert device.sources[key].startswith("NVIDIA")


def test_kinds(tmp_path):
    content = load_device("v100").to_dict()
    path = tmp_path / "mine.yaml"
    for kind in set(KINDS) - {"calibrated"}:  # which is a file of another form
        path.write_text(yaml.safe_dump({**content, "kind": kind}))
        assert load_device(path).kind == kind
        assert KINDS[kind] in load_device(path).note
    del content["kind"]
    path.write_text(yaml.safe_dump(content))
    assert load_device(path).kind == "custom"
    assert load_device(path) == load_device("v100")  # which is about numbers
    path.write_text(yaml.safe_dump({**content, "kind": "guessed"}))
    with pytest.raises(ValueError, match="mine.yaml: kind must be one of published.*'guessed'"):
        load_device(path)


def test_available_devices_and_ways_to_name_one(tmp_path):
    assert available_devices() == sorted({**TABLE, **DATA_SHEETS})
    device = load_device("V100")
    assert load_device(device) is device
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(device.to_dict()))
    assert load_device(path) == load_device(str(path)) == device
    assert load_device(path).sources == device.sources
    assert hash(load_device(path)) == hash(device)


def test_unknown_names_and_missing_files_list_the_devices(tmp_path):
    with pytest.raises(ValueError, match="unknown device 'v1000'.*nano, .*rtx3090, .*tx2"):
        load_device("v1000")
    with pytest.raises(FileNotFoundError, match="absent.yaml.*v100"):
        load_device(tmp_path / "absent.yaml")
    with pytest.raises(TypeError, match="got int"):
        load_device(3)


def _set(key, value):
    def change(content):
        content[key]["value"] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(cores=3), "unknown key cores; known keys: name, n_pe"),
        (lambda c: c.pop("lanes"), "missing key lanes"),
        (lambda c: c.update(n_pe=80), "n_pe must be .*value.*source.*got 80"),
        (lambda c: c["n_pe"].pop("source"), "n_pe = 80 has no source"),
        (lambda c: c["n_pe"].update(source=" "), "n_pe = 80 has no source"),
        (lambda c: c["n_pe"].update(unit="SM"), "n_pe has the unknown key unit"),
        (lambda c: c.update(name=7), "name must be a non-empty string, got 7"),
        (_set("n_pe", True), r"n_pe must be a positive integer, got True \(bool\)"),
        (_set("n_pe", 80.0), r"n_pe must be a positive integer, got 80.0 \(float\)"),
        (_set("n_pe", 0), "n_pe must be a positive integer, got 0"),
        (_set("launch_s", -1e-6), "launch_s must be a positive finite number, got -1e-06"),
        (_set("frequency_hz", float("nan")), "frequency_hz must be a positive finite .* got nan"),
        (_set("frequency_hz", float("inf")), "frequency_hz must be a positive finite .* got inf"),
        (_set("frequency_hz", "1.5e9"), r"frequency_hz .* got '1.5e9' \(str\).*write 1.5e\+9"),
        (_set("l2_to_dram_ratio", None), "l2_to_dram_ratio must be .* got None"),
    ],
)
def test_wrong_files_name_the_file_the_field_and_the_value(tmp_path, change, message):
    content = copy.deepcopy(load_device("v100").to_dict())
    change(content)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=f"wrong.yaml: .*{message}"):
        load_device(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_pe: [1", "not readable as YAML"),
        ("!!python/object/apply:os.getcwd []", "not readable as YAML"),
        ("- 1", "expected a mapping .* got list"),
        ("", "expected a mapping .* got NoneType"),
    ],
)
def test_files_that_are_no_device_at_all(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"wrong.yaml: {message}"):
        load_device(path)


def test_devices_made_in_code_are_checked_too():
    with pytest.raises(ValueError, match="lanes must be a positive integer, got -1"):
        Device("mine", 1, -1, 1e9, 1e9, 4, 8e-6, 1)
