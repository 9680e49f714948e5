"""Calibrated devices: the fit, the file, the record of measurements, what is predicted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import records
from las_mm import ops
from las_mm.drawn_masks import draw_channel_masks, draw_masks
from las_mm.latency import (
    LatencyTable,
    LatencyTables,
    block_report,
    load_device,
    network_report,
    predict,
    resnet_shape,
    search_granularity,
)
from las_mm.latency.analytical.operators import static_conv
from las_mm.latency.differentiable import DifferentiableLatency
from las_mm.latency.measured import calibrate, validation
from las_mm.latency.measured.calibrate import Settings, measure, read_record
from las_mm.latency.measured.calibrated import CalibratedDevice, calibration_path
from las_mm.latency.measured.fitted import TERMS
from las_mm.latency.measured.fitting import Accuracy, Observation, StemObservation, fit, predicted_s
from las_mm.latency.measured.halo import expected_dilated_rate
from las_mm.latency.measured.measurement import (
    BlockRunner,
    Measurement,
    Stopwatch,
    measure_case,
    small_case,
)
from las_mm.latency.measured.samples import Case, StemCase, draw_cases, stem_cases
from las_mm.latency.measured.terms import Probes, quantities
from las_mm.network import MODES, BottleneckShape

PROBES = Probes(1e11, 5e10, ((1e4, 4e11), (1e6, 1e11), (1e8, 3e10)), 2e-5)
BLOCK = BottleneckShape("block", 2, "spatial", 4, 512, 128, 512, 56, 56, 1)


def imagined_seconds(block, batch, rate, dilated, channel=1.0) -> float:
    """A machine whose blocks take 1 + a term's position in TERMS times the ideal, and a wave."""
    found = quantities(block, batch, PROBES, rate, dilated, channel)
    factors = {name: 1 + i % 3 for i, name in enumerate(TERMS)}
    total = sum(factors[name] * float(value) for name, value in found.items())
    return total * np.exp(0.1 * np.sin(np.log(block.width)))


def imagined(case: Case | StemCase, noise: np.random.Generator | None = None) -> Measurement:
    """A measurement of that machine."""
    factor = 1.0 if noise is None else float(np.exp(0.02 * noise.standard_normal()))
    if isinstance(case, StemCase):
        seconds = 1e-4 + 1e-11 * case.batch * case.conv.h_out**2 * case.conv.c_out * 147
        return Measurement((factor * seconds,) * 3)
    rate = case.rate if case.block.decides_positions else 1.0
    dilated = float(expected_dilated_rate(case.block, np.asarray(rate)))
    seconds = imagined_seconds(case.block, case.batch, rate, dilated, case.channel_rate)
    return Measurement((factor * seconds,) * 3, rate, dilated, case.channel_rate)


def observe(cases, noise=None) -> list[Observation]:
    found = []
    for case in cases:
        m = imagined(case, noise)
        found.append(
            Observation(
                case.block, case.batch, m.rate, m.rate_dilated, m.rate_channel, m.seconds[0]
            )
        )
    return found


@pytest.fixture(scope="module")
def fitted():
    """A device fitted to noisy measurements of the imagined machine, one in 20 disturbed."""
    noise = np.random.default_rng(0)
    blocks = observe(itertools.islice(draw_cases(1, 12e9), 160), noise)
    blocks = [b._replace(seconds=3 * b.seconds) if i % 20 == 7 else b for i, b in enumerate(blocks)]
    stems = [StemObservation(case, imagined(case).seconds[0]) for case in stem_cases()]
    model, accuracy = fit(blocks, stems, PROBES)
    settings = Settings(threads=torch.get_num_threads())
    return CalibratedDevice(
        "imagined",
        calibrate.here(settings),
        "2026-01-01",
        dataclasses.asdict(accuracy),
        model,
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("granularity", [1, 2, 3, 8])
def test_halo_is_that_of_drawn_masks(granularity, stride):
    block = BottleneckShape(
        "b", 1, "spatial", granularity, 8, 8, 8, 96 * stride, 144 * stride, stride
    )
    for rate in (0.2, 0.5, 0.8):
        found = []
        for seed in range(4):
            (mask,) = draw_masks([block], 2, rate, "blob", seed)
            size = (block.h_mid, block.w_mid)
            _, counts = ops.dilate_mask(mask, granularity, size, stride, 1)
            found.append(counts[:, 1].double().mean().item() / (size[0] * size[1]))
        expected = float(expected_dilated_rate(block, np.asarray(rate)))
        assert abs(expected - np.mean(found)) < 0.03, (rate, expected, np.mean(found))


def test_halo_at_the_ends():
    rates = np.array([0.0, 0.5, 1.0])
    assert expected_dilated_rate(BLOCK, rates)[[0, 2]].tolist() == [0.0, 1.0]
    assert expected_dilated_rate(BLOCK, rates)[1] > 0.5
    layer = replace(BLOCK, mode="layer", granularity=0)
    assert expected_dilated_rate(layer, rates).tolist() == rates.tolist()


def test_fit_predicts_unseen_blocks_despite_disturbed_ones(fitted):
    unseen = observe(itertools.islice(draw_cases(7, 25e9), 150))
    predicted = np.array([predicted_s(fitted.model, o) for o in unseen])
    accuracy = Accuracy.of(predicted, np.array([o.seconds for o in unseen]))
    assert accuracy.within_10_percent > 0.85, accuracy
    assert accuracy.rank_correlation > 0.99
    # The disturbed ones are a third of what cross-validation sees as wrong.
    assert fitted.accuracy["within_10_percent"] > 0.8


def test_too_few_measurements():
    with pytest.raises(ValueError, match="at least 60 blocks and a stem"):
        fit(observe(itertools.islice(draw_cases(1, 1e9), 5)), [], PROBES)


def test_file_round_trip(fitted, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(fitted.to_yaml())
    loaded = load_device(path)
    for rate in (0.0, 0.3, 1.0):
        expected = block_report(fitted, BLOCK, rate).latency_s
        assert block_report(loaded, BLOCK, rate).latency_s == pytest.approx(expected, rel=1e-3)
    assert loaded.to_yaml() == fitted.to_yaml()
    assert "calibrated on 2026-01-01" in loaded.note


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("tiles: true", "tiles: false"), "checksum"),
        (lambda text: text[: len(text) // 2], "not readable|checksum"),
        (lambda text: text.replace("format: 1", "format: 7"), "format 7, this version reads 1"),
        (lambda text: text.split("correction:")[0], "checksum"),
    ],
)
def test_damaged_files_are_refused(fitted, tmp_path, change, message):
    path = tmp_path / "mine.yaml"
    text = change(fitted.to_yaml())
    assert text != fitted.to_yaml()
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_device(path)


def test_own_calibration_has_a_name(fitted, tmp_path, monkeypatch):
    monkeypatch.setenv("LAS_MM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="not calibrated yet.*las_mm calibrate --device cpu"):
        load_device("cpu")
    calibration_path("cpu").write_text(fitted.to_yaml())
    assert load_device("CPU").name == "imagined"
    # A file in that folder never stands for a shipped device.
    (tmp_path / "v100.yaml").write_text(fitted.to_yaml())
    assert load_device("v100").kind == "published"


def test_stale_calibration_warns_once(fitted, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("mmengine.logging.print_log", lambda text, **_: messages.append(text))
    path = tmp_path / "mine.yaml"
    path.write_text(fitted.to_yaml())
    load_device(path)
    assert not messages
    path.write_text(replace(fitted, machine={**fitted.machine, "threads": 77}).to_yaml())
    load_device(path)
    load_device(path)
    assert len(messages) == 1
    assert "threads 77, here" in messages[0]


@pytest.mark.parametrize("key", ["processor", "kernels", "isa", "las_mm"])
def test_calibration_of_something_else_warns(fitted, tmp_path, monkeypatch, key):
    messages = []
    monkeypatch.setattr("mmengine.logging.print_log", lambda text, **_: messages.append(text))
    path = tmp_path / "mine.yaml"
    path.write_text(replace(fitted, machine={**fitted.machine, key: "another"}).to_yaml())
    load_device(path)
    assert len(messages) == 1
    assert f"{key} 'another', here" in messages[0] and "run las_mm calibrate" in messages[0]


def test_calibration_from_before_kernels_were_named_warns(fitted, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("mmengine.logging.print_log", lambda text, **_: messages.append(text))
    path = tmp_path / "mine.yaml"
    machine = {key: value for key, value in fitted.machine.items() if key != "kernels"}
    path.write_text(replace(fitted, machine=machine).to_yaml())
    load_device(path)
    assert len(messages) == 1 and "kernels None, here" in messages[0]


def test_calibration_of_a_gpu_is_compared_with_the_gpu(fitted, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("mmengine.logging.print_log", lambda text, **_: messages.append(text))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    path = tmp_path / "mine.yaml"
    machine = {**fitted.machine, "device": "cuda", "processor": "NVIDIA H100"}
    path.write_text(replace(fitted, machine=machine).to_yaml())
    load_device(path)
    assert not messages
    path.write_text(replace(fitted, machine={**machine, "processor": "NVIDIA T4"}).to_yaml())
    load_device(path)
    assert len(messages) == 1 and "processor 'NVIDIA T4', here 'NVIDIA H100'" in messages[0]


def test_poor_calibration_warns_once(fitted, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("mmengine.logging.print_log", lambda text, **_: messages.append(text))
    path = tmp_path / "mine.yaml"
    path.write_text(replace(fitted, accuracy={**fitted.accuracy, "rmspe": 0.8}).to_yaml())
    load_device(path)
    load_device(path)
    assert len(messages) == 1
    assert "predicts blocks only to 80 %" in messages[0]


def test_reports_add_up(fitted):
    network = resnet_shape(50, (256, 320))
    rates = np.linspace(0, 1, len(network.blocks))
    report = network_report(fitted, network, rates, batch_size=2, per_image=False)
    total = report.children[0].latency_s + sum(
        float(fitted.model.seconds(b, 2, r, expected_dilated_rate(b, np.asarray(r)))[0])
        for b, r in zip(network.blocks, rates)
    )
    # conv1's correction is read at conv1's rate in a report, too.
    assert report.latency_s == pytest.approx(total, rel=1e-9)
    operators = {child.name for child in report.children[1].children[1].children}
    assert {"masker", "conv1", "conv2", "conv3", "weights"} <= operators
    assert predict(network, fitted, rates=0.5).latency_s > 0


def test_table_equals_report_and_has_gradients(fitted):
    network = resnet_shape(50)
    table = LatencyTable(fitted, network, batch_size=4)
    rates = np.round(np.linspace(0, 1, len(network.blocks)) * 32) / 32
    for dilated in (None, np.minimum(1, np.round(1.2 * rates * 32) / 32)):
        expected = network_report(fitted, network, rates, dilated, batch_size=4).latency_s
        got = table.predict(rates, dilated).total_s
        assert got == pytest.approx(expected, rel=1e-9 if dilated is not None else 2e-3)
    static = network_report(fitted, network.static(), 1.0, batch_size=4).latency_s
    assert table.static_s == pytest.approx(static)

    leaf = torch.full((len(network.blocks),), 0.5, requires_grad=True)
    activation = records.record(network, leaf, leaf.detach())
    DifferentiableLatency(LatencyTables(fitted, 4)).report(activation).ratio.backward()
    assert (leaf.grad > 0).all()


def test_static_blocks_take_no_notice_of_rates(fitted):
    static = replace(BLOCK, mode="static", granularity=0)
    assert block_report(fitted, static, 0.1) == block_report(fitted, static, 0.9)


def test_search_knows_halos(fitted):
    found = search_granularity(fitted, resnet_shape(50, (800, 1344)), rate=0.5)
    one = next(c for c in found.stages[0].choices if c.granularity == 1)
    four = next(c for c in found.stages[0].choices if c.granularity == 4)
    assert four.latency_s < one.latency_s


def test_what_has_no_model_raises(fitted):
    network = resnet_shape(50)
    with pytest.raises(ValueError, match="no latency model"):
        network_report(fitted, _with_stem(network, ("something",)), 0.5)
    with pytest.raises(TypeError, match="calibrated device predicts blocks"):
        static_conv(fitted, 8, 8, 1, 4, 4)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        block_report(fitted, BLOCK, 0.5, batch_size=0)


def _with_stem(network, stem):
    network = replace(network)
    object.__setattr__(network, "stem", stem)
    return network


def test_drawn_cases_are_the_same_and_new():
    first = list(itertools.islice(draw_cases(3, 2e9), 50))
    assert first == list(itertools.islice(draw_cases(3, 2e9), 50))
    known = {(case.block, case.batch) for case in first}
    others = list(itertools.islice(draw_cases(3, 2e9, known), 50))
    assert not known & {(case.block, case.batch) for case in others}
    assert {case.block.mode for case in first} == set(MODES)
    assert {case.block.name for case in first} == {"resnet", "regnetx", "regnety"}
    assert max(case.macs for case in first) <= 2e9


def test_real_measurements_record_rates():
    stopwatch = Stopwatch()
    for case in itertools.islice(draw_cases(5, 2e7), 12):
        found = stopwatch.undisturbed(
            lambda: measure_case(case, stopwatch, torch.float32, "cpu")  # noqa: B023
        )
        assert len(found.seconds) >= 3
        assert min(found.seconds) > 0
        (mask,) = draw_masks([case.block], case.batch, case.rate, case.masks, case.seed)
        assert 0 <= found.rate <= 1 and 0 <= found.rate_dilated <= 1
        assert found.rate <= found.rate_dilated + 1e-6 or case.block.stride == 2
        if case.block.has_channels:
            (chosen,) = draw_channel_masks([case.block], case.batch, case.channel_rate, case.seed)
            assert found.rate_channel == pytest.approx(chosen.double().mean().item())
        if case.block.mode == "layer":
            assert found.rate == pytest.approx(mask.double().mean().item())
    found = measure_case(stem_cases()[0], stopwatch, torch.float32, "cpu")
    assert min(found.seconds) > 0


def test_a_run_finds_its_input_and_the_code_warm():
    calls = []
    seconds = Stopwatch().runs(*(lambda name=name: calls.append(name) for name in "prw"))
    assert calls == list("pwr") * (len(seconds) + 1)


def test_small_cases_run_the_same_code():
    for case in itertools.islice(draw_cases(7, 2e9), 40):
        small = small_case(case)
        kept = ("mode", "stride", "downsample", "channel_granularity", "channel_masker_layers")
        assert all(getattr(small.block, k) == getattr(case.block, k) for k in kept)
        assert bool(small.block.se_width) == bool(case.block.se_width)
        assert (small.block.groups > 1) == (case.block.groups > 1)
        assert small.macs < 5e6
        with torch.inference_mode():
            BlockRunner(small, torch.float32, "cpu").run()


def test_networks_and_searches_are_predicted_for_what_ran(fitted, monkeypatch):
    monkeypatch.setattr(validation, "_ROUNDS", 1)
    shape = (1, 64, 96)
    static, sparse, full = validation.validate_networks(fitted, (50,), [shape], (0.25, 1.0), ())
    assert (static.mode, static.rate, sparse.mode, sparse.rate) == ("static", None, "spatial", 0.25)
    network = resnet_shape(50, shape[1:], mode="static")
    report = network_report(fitted, network, 1.0, batch_size=1, per_image=False)
    assert static.predicted_s == pytest.approx(report.latency_s)
    assert sparse.predicted_s < full.predicted_s  # though the same backbone ran both
    assert min(static.measured_s, sparse.measured_s, full.measured_s) > 0

    found = validation.validate_search(fitted, 50, shape, settings=[(4, 4, 2, 1), (1, 1, 1, 1)])
    assert {(4, 4, 2, 1), (1, 1, 1, 1), found.chosen} <= {r.granularity for r in found.results}
    times = [r.measured_s for r in found.results]
    assert times == sorted(times) and found.loss >= 0


@pytest.fixture
def few(monkeypatch):
    """A calibration of three blocks on the imagined machine; counts measurements."""
    cases = list(itertools.islice(draw_cases(1, 1e9), 3))
    count = [0]

    def take(case, *_):
        count[0] += 1
        if count[0] == count[1] if len(count) > 1 else False:
            raise KeyboardInterrupt
        return imagined(case)

    monkeypatch.setattr(calibrate, "measure_case", take)
    monkeypatch.setattr(calibrate, "measure_probes", lambda settings: PROBES)
    monkeypatch.setattr(Stopwatch, "undisturbed", lambda self, take: take())
    return cases, count


def test_interrupted_calibration_resumes(few, tmp_path):
    cases, count = few
    record, settings = tmp_path / "record.jsonl", Settings(visits=2)
    count.append(5)  # the fifth measurement is interrupted
    with pytest.raises(KeyboardInterrupt):
        measure(settings, record, cases=cases)
    del count[1:]
    with open(record, "a") as file:
        file.write('{"visit": 1, "ca')  # killed while writing
    shown = []
    count[0] = 0
    observed = measure(settings, record, lambda i, n: shown.append((i, n)), cases)
    assert count[0] == 2
    assert shown[0] == (4, 6)
    assert shown[-1] == (6, 6)
    assert [o.block for o in observed.blocks] == [case.block for case in cases]
    expected = [imagined(case).seconds[0] for case in cases]
    assert [o.seconds for o in observed.blocks] == expected
    assert all(json.loads(line) for line in record.read_text().splitlines())


def test_a_record_knows_its_cases_by_what_they_are(few, tmp_path):
    """A drawing that changes takes no seconds of other cases, one in another order takes all."""
    cases, count = few
    record, settings = tmp_path / "record.jsonl", Settings(visits=1)
    measure(settings, record, cases=cases)
    count[0] = 0
    observed = measure(settings, record, cases=cases[::-1])
    assert count[0] == 0
    assert [o.seconds for o in observed.blocks] == [imagined(c).seconds[0] for c in cases[::-1]]
    changed = [replace(cases[0], batch=cases[0].batch + 1), *cases[1:]]
    observed = measure(settings, record, cases=changed)
    assert count[0] == 1
    assert [o.seconds for o in observed.blocks] == [imagined(c).seconds[0] for c in changed]


def test_record_of_other_kernels_is_refused(few, tmp_path, monkeypatch):
    cases, _ = few
    record, settings = tmp_path / "record.jsonl", Settings(visits=1)
    measure(settings, record, cases=cases)
    here = calibrate.machine()
    monkeypatch.setattr(calibrate, "machine", lambda: {**here, "kernels": "0123456789ab"})
    with pytest.raises(ValueError, match="kernels '.*', now '0123456789ab'.*--restart"):
        read_record(record, settings)


def test_foreign_and_damaged_records_are_refused(few, tmp_path):
    cases, _ = few
    record, settings = tmp_path / "record.jsonl", Settings(visits=1)
    measure(settings, record, cases=cases)
    known, probes = read_record(record, settings)
    assert len(known) == 3
    assert probes == PROBES
    with pytest.raises(ValueError, match="threads 1, now 3.*--restart"):
        read_record(record, Settings(visits=1, threads=3))
    lines = record.read_text().splitlines()
    lines[2] = lines[2].replace("seconds", "secs")
    record.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 3 is damaged"):
        read_record(record, settings)
    record.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="is no record of a calibration"):
        read_record(record, settings)
