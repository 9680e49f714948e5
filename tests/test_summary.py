"""DatasetSummary: means over a data set as ratios of sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from las_mm import summary as summary_module
from las_mm.latency import LatencyTable, Prediction, network_report, resnet_shape
from las_mm.models.activation import NetworkActivation
from las_mm.models.flops import flops_report
from las_mm.summary import DatasetSummary
from records import record as record_of

MODES = ("static", "spatial", "spatial", "layer")
STAGES = {1: slice(0, 3), 2: slice(3, 7), 3: slice(7, 13), 4: slice(13, 16)}
DEVICE = "v100"


def record(seed: int, input_hw=(64, 64), mode=MODES) -> NetworkActivation:
    """Random rates; 1 for the static blocks, like the network's."""
    shape = resnet_shape(50, input_hw, mode=mode, granularity=(4, 4, 2, 1), base_channels=8)
    rng = np.random.default_rng(seed)
    dynamic = np.array([block.mode != "static" for block in shape.blocks])
    rates = np.where(dynamic, rng.uniform(0.2, 0.7, 16), 1.0)
    dilated = np.where(dynamic, np.minimum(1.0, rates * 1.2), 1.0)
    return record_of(shape, torch.as_tensor(rates, dtype=torch.float64), dilated)


def add(
    summary: DatasetSummary,
    activation: NetworkActivation,
    images: int = 1,
    include_stem: bool = True,
) -> None:
    table = LatencyTable(DEVICE, activation.shape, include_stem=include_stem)
    prediction = table.predict(activation.rates.numpy(), activation.rates_dilated.numpy())
    summary.add(activation, prediction, table.static_block_s, table.stem_s, images)


@pytest.fixture
def records() -> list[tuple[NetworkActivation, int]]:
    """Three batches of different sizes, the last one of larger images."""
    return [(record(0), 2), (record(1), 1), (record(2, (96, 128)), 1)]


@pytest.fixture
def summary(records) -> DatasetSummary:
    summary = DatasetSummary()
    for activation, images in records:
        add(summary, activation, images)
    return summary


def test_flops_are_a_ratio_of_sums(summary, records):
    reports = [(flops_report(activation), images) for activation, images in records]
    dynamic = sum(report.dynamic.item() * images for report, images in reports)
    static = sum(report.static.item() * images for report, images in reports)
    metrics = summary.metrics()
    assert metrics["flops_ratio"] == pytest.approx(dynamic / static)
    mean = sum(report.ratio.item() * images for report, images in reports) / 4
    assert metrics["flops_ratio"] != pytest.approx(mean, rel=1e-3)  # large images count for more


def test_rates_are_means_over_images(summary, records):
    metrics = summary.metrics()
    for stage, blocks in STAGES.items():
        means = [activation.rates[blocks].mean().item() for activation, _ in records]
        expected = np.average(means, weights=[images for _, images in records])
        assert metrics[f"activation_rate_stage{stage}"] == pytest.approx(expected)
    dynamic = [activation.mean_rate.item() for activation, _ in records]  # not of static blocks
    expected = np.average(dynamic, weights=[2, 1, 1])
    assert metrics["activation_rate"] == pytest.approx(expected)
    assert metrics["activation_rate_stage1"] == 1.0


def test_channel_rates():
    activation = record(0)
    channel = torch.where(torch.arange(16) < 7, 0.5, 1.0)
    shape = replace(
        activation.shape,
        blocks=tuple(
            replace(block, mode="both" if i < 7 else block.mode, granularity=1)
            for i, block in enumerate(activation.shape.blocks)
        ),
    )
    activation = record_of(shape, activation.rates, activation.rates_dilated, channel)
    summary = DatasetSummary()
    summary.add(activation, Prediction(1.0, 2.0, np.ones(16)), np.ones(16), 0.0, 3)
    metrics = summary.metrics()
    assert metrics["channel_rate"] == metrics["channel_rate_stage1"] == pytest.approx(0.5)
    assert "channel_rate_stage3" not in metrics
    assert "channels" in summary.table(DEVICE) and "both S=1 G=1" in summary.table(DEVICE)


def test_latency_is_the_predictors(summary, records):
    seconds, static = 0.0, 0.0
    for activation, images in records:
        table = LatencyTable(DEVICE, activation.shape)
        predicted = table.predict(activation.rates.numpy(), activation.rates_dilated.numpy())
        seconds, static = seconds + predicted.total_s * images, static + table.static_s * images
    metrics = summary.metrics()
    assert metrics["latency_ms"] == pytest.approx(1e3 * seconds / 4)
    assert metrics["static_latency_ms"] == pytest.approx(1e3 * static / 4)
    assert metrics["latency_ratio"] == pytest.approx(seconds / static)


def test_a_batch_counts_like_its_images():
    together, apart = DatasetSummary(), DatasetSummary()
    add(together, record(3), 3)
    for _ in range(3):
        add(apart, record(3))
    assert together.images == apart.images == 3
    assert together.metrics() == pytest.approx(apart.metrics())


def test_batch_of_no_images_changes_nothing(summary):
    before = summary.metrics()
    add(summary, record(9), 0)
    assert summary.metrics() == before


def test_static_network():
    summary = DatasetSummary()
    static = record(0, mode="static")
    add(summary, static)
    metrics = summary.metrics()
    assert metrics["flops_ratio"] == metrics["activation_rate"] == 1.0
    assert metrics["latency_ratio"] == pytest.approx(1.0)
    exact = network_report(DEVICE, static.shape, 1.0).latency_s
    assert metrics["latency_ms"] == pytest.approx(1e3 * exact)


def test_table_shows_every_stage(summary):
    lines = summary.table("a device").splitlines()
    assert "4 images, latency predicted for a device, per image" in lines[0]
    metrics = summary.metrics()
    labels = dict(zip(STAGES, ("static", "spatial S=4", "spatial S=2", "layer")))
    for stage, label in labels.items():
        (row,) = (line for line in lines if line.startswith(f"│ stage {stage} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        blocks = STAGES[stage].stop - STAGES[stage].start
        assert cells[:3] == [f"stage {stage}", str(blocks), label]
        assert float(cells[3]) == pytest.approx(metrics[f"activation_rate_stage{stage}"], abs=6e-4)
        assert float(cells[4]) >= float(cells[3])
    (total,) = (line for line in lines if line.startswith("│ backbone"))
    cells = [cell.strip() for cell in total.strip("│").split("│")]
    assert float(cells[6]) == pytest.approx(metrics["flops_ratio"], abs=6e-4)
    assert float(cells[7]) == pytest.approx(metrics["latency_ms"], abs=6e-4)
    assert float(cells[9]) == pytest.approx(metrics["latency_ratio"], abs=6e-4)


@pytest.mark.filterwarnings("error")
def test_latency_without_the_stem(records):
    summary, whole = DatasetSummary(), DatasetSummary()
    add(summary, records[0][0], include_stem=False)
    add(whole, records[0][0])
    assert summary.metrics()["latency_ms"] < whole.metrics()["latency_ms"]
    (stem,) = (line for line in summary.table("v100").splitlines() if line.startswith("│ stem"))
    assert [cell.strip() for cell in stem.strip("│").split("│")][-3:] == ["0.000", "0.000", ""]


def test_processes_add_up(records, monkeypatch):
    """Two processes, the second of which had a repeated image only."""
    whole, first, second = DatasetSummary(), DatasetSummary(), DatasetSummary()
    for activation, images in records:
        add(whole, activation, images)
        add(first, activation, images)
    add(second, record(9), 0)
    for activation, _ in records[:2]:
        add(whole, activation)
        add(second, activation)
    packed = {}

    def all_reduce(tensor: torch.Tensor, op: str) -> None:
        assert op == "sum"
        tensor += packed.pop("other", 0)
        packed["own"] = tensor.clone()

    monkeypatch.setattr(summary_module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(summary_module.dist, "all_reduce", all_reduce)
    second.reduce()  # alone: leaves what it would have sent
    packed["other"] = packed["own"]
    first.reduce()
    assert first.images == whole.images == 6
    assert first.metrics() == pytest.approx(whole.metrics())
