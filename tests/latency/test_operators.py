"""Operators against the document's formulas, searched by brute force in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from las_mm.latency import Report, load_device
from las_mm.latency.analytical import operators as ops
from las_mm.latency.analytical.axes import candidates

TINY = 1e-12


def _lane(device, x):
    slots = 4 * device.lanes
    return x / (math.ceil(x / slots) * slots)


def _request(w, gap):
    gap = max(gap, 0)
    if w > 8:
        return w / (math.ceil(w / 8) * 8)
    return w / 8 if w + gap > 8 else w / (w + gap)


def _brute_conv(d, cin, cout, k, g, s, H, W, N):
    dram = d.dram_bytes_per_s / 4
    best = math.inf
    for c, h, w in itertools.product(*(candidates(n) for n in (cout, H, W))):
        tiles = math.ceil(cout / c) * math.ceil(H / h) * math.ceil(W / w)
        compute = (
            N
            * c
            * h
            * w
            * (cin / g)
            * k
            * k
            / (d.frequency_hz * d.lanes)
            / _lane(d, c * h * w)
            * math.ceil(tiles / d.n_pe)
        )
        tile = (
            c * (cin / g) * k * k
            + math.ceil(c / (cout / g)) * (cin / g) * (h + k - 1) * s * (w + k - 1) * s * N
            + c * h * w * N
        )
        memory = (
            cout * (cin / g) * k * k + cin * H * s * W * s * N + cout * H * W * N
        ) / dram + tiles * tile / (dram * d.l2_to_dram_ratio) / _request(w, W - w)
        best = min(best, compute + memory)
    return best + d.launch_s


def _brute_add(d, C, H, W, N):
    best = math.inf
    for c, h, w in itertools.product(*(candidates(n) for n in (C, H, W))):
        tiles = math.ceil(C / c) * math.ceil(H / h) * math.ceil(W / w)
        compute = (
            N
            * c
            * h
            * w
            / (d.frequency_hz * d.lanes)
            / _lane(d, c * h * w)
            * math.ceil(tiles / d.n_pe)
        )
        best = min(best, compute + tiles * 3 * c * h * w * N / (d.dram_bytes_per_s / 4))
    return best + d.launch_s


def _brute_scatter(d, C, H, W, S, N, n):
    dram = d.dram_bytes_per_s / 4
    positions = math.ceil(H / S) * math.ceil(W / S)

    def cost(n, c, h, w, q):
        tiles = math.ceil(C / c) * math.ceil(S / h) * math.ceil(S / w)
        compute = (
            c
            * h
            * w
            * q
            / (d.frequency_hz * d.lanes)
            / _lane(d, c * h * w * N * q)
            * math.ceil(n / q)
            * N
            * math.ceil(tiles / d.n_pe)
        )
        return compute + (
            ((n * C * S * S + C * H * W) * N + C * H * W * N) / dram
            + tiles * 3 * c * h * w * n * N / (dram * d.l2_to_dram_ratio) / _request(w, S - w)
        )

    sides = [x for x in candidates(S) if x <= S]
    tilings = itertools.product(candidates(C), sides, sides, candidates(positions))
    chosen = min(tilings, key=lambda tiling: cost((positions + 1) / 2, *tiling))
    return cost(n, *chosen) + d.launch_s


def test_candidates_follow_the_document():
    assert candidates(1) == (1, 2)
    assert candidates(7) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert candidates(56) == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 19, 28, 32, 56, 64)


@pytest.mark.parametrize("device", ["v100", "rtx3090", "nano"])
@pytest.mark.parametrize(
    "shape", [(64, 65, 1, 1, 1, 14, 14), (32, 64, 3, 4, 2, 9, 21), (16, 16, 3, 16, 1, 7, 5)]
)
def test_static_conv_is_the_least_over_all_tilings(device, shape):
    d = load_device(device)
    cin, cout, k, g, s, h, w = shape
    report = ops.static_conv(d, cin, cout, k, h, w, stride=s, groups=g, batch_size=3)
    assert report.latency_s == pytest.approx(_brute_conv(d, *shape, 3), rel=TINY)
    assert report.launch_s == d.launch_s


def test_elementwise_add_is_the_least_over_all_tilings():
    d = load_device("tx2")
    assert ops.elementwise_add(d, 48, 13, 10).latency_s == pytest.approx(
        _brute_add(d, 48, 13, 10, 1), rel=TINY
    )


@pytest.mark.parametrize("n", [0, 1, 7, 15])
def test_scatter_add_tiling_is_chosen_at_the_mean_count(n):
    d = load_device("tx2")
    report = ops.scatter_add(d, 24, 10, 18, granularity=4, n_patches=n)
    assert report.latency_s == pytest.approx(_brute_scatter(d, 24, 10, 18, 4, 1, n), rel=TINY)


def test_dynamic_conv_without_patches_reads_weights_and_the_map_but_computes_nothing():
    report = ops.dynamic_conv(load_device("v100"), 64, 64, 3, 56, 56, granularity=4, n_patches=0)
    assert report.compute_s == 0
    assert report.memory_s > 64 * 56 * 56 * 128 * 4 / 700e9


def test_dynamic_conv_grows_with_patches_and_gathered_input_is_cheaper_when_few():
    d = load_device("v100")
    cost = ops.dynamic_conv_cost(d, ops.ConvSize(64, 64, 3, 50, 37), granularity=4)
    assert cost.positions == 13 * 10
    times = [cost.report(n).latency_s for n in range(131)]
    assert times == sorted(times)
    assert cost.seconds(np.arange(131)) == pytest.approx(times)
    few = ops.dynamic_conv(d, 64, 64, 3, 50, 37, granularity=4, n_patches=5, gathered=True)
    assert few.latency_s < times[5]


def test_masker_conv1_takes_the_cheaper_way():
    d = load_device("v100")
    fused, masker, conv1 = ops.masker_conv1_costs(d, 256, 64, 56, 56, granularity=8)
    for n in (0, 10, 49):
        report = ops.masker_conv1(d, 256, 64, 56, 56, granularity=8, n_patches=n)
        apart = masker.latency_s + conv1.report(n).latency_s
        assert report.latency_s == pytest.approx(min(fused.latency_s, apart))


def test_layer_masker_reads_weights_only_for_a_batch():
    d = load_device("tx2")
    wide = ops.layer_masker(d, 64, 16, 1, 1)
    assert wide.compute_s == 0
    # one pixel in: 64 values through DRAM and at least once through L2
    assert wide.memory_s >= 64 / d.dram_values_per_s + 64 / d.l2_values_per_s
    assert wide.memory_s < 64 * 17 / d.dram_values_per_s
    assert ops.layer_masker(d, 64, 16, 1, 1, batch_size=2).memory_s > 64 * 17 / d.dram_values_per_s


def test_max_pool_moves_its_window_and_output():
    d = load_device("v100")
    report = ops.max_pool(d, 64, 3, 56, 56, stride=2)
    values = (112 * 112 + 56 * 56) * 64 * 128
    assert values < report.memory_s * d.dram_values_per_s < 1.2 * values


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda d: ops.static_conv(d, 0, 4, 1, 4, 4),
            "conv: c_in must be a positive integer, got 0",
        ),
        (
            lambda d: ops.static_conv(d, 4, 4, 1, 4.0, 4),
            "h_out must be a positive integer, got 4.0",
        ),
        (lambda d: ops.static_conv(d, 4, 4, True, 4, 4), "kernel must be"),
        (lambda d: ops.static_conv(d, 4, 4, 1, 4, 4, batch_size=0), "batch_size must be"),
        (lambda d: ops.static_conv(d, 4, 6, 1, 4, 4, groups=4), "groups must divide"),
        (lambda d: ops.elementwise_add(d, 4, -1, 4), "add: h must be"),
        (lambda d: ops.max_pool(d, 4, 3, 4, 4, stride=0), "pool: stride must be"),
        (lambda d: ops.dynamic_conv(d, 4, 4, 1, 4, 4, granularity=0, n_patches=1), "granularity"),
        (
            lambda d: ops.dynamic_conv(d, 4, 4, 1, 4, 4, granularity=2, n_patches=5),
            "n_patches must be an integer from 0 to 4, got 5",
        ),
        (lambda d: ops.scatter_add(d, 4, 4, 4, granularity=2, n_patches=-1), "n_patches"),
        (lambda d: ops.masker_conv1(d, 4, 4, 4, 4, granularity=2, n_patches=1.5), "n_patches"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(load_device("tx2"))


def test_reports_add_scale_and_render():
    a, b = Report("a", 1e-3, 2e-3, 1e-6), Report("b", 3e-3, 0.0, 1e-6)
    total = sum([a, b, a])
    assert total.children == (a, b, a)
    assert total.latency_s == pytest.approx(2 * a.latency_s + b.latency_s)
    assert (a + b).to_dict()["children"][1]["compute_s"] == 3e-3
    half = 0.5 * total
    assert half.latency_s == pytest.approx(total.latency_s / 2)
    assert half.children[0].memory_s == 1e-3
    lines = str(Report.group("net", [total])).splitlines()
    assert len(lines) == 6 and lines[0].split() == [
        "name",
        "total",
        "ms",
        "compute",
        "memory",
        "launch",
    ]
    assert lines[3].startswith("    a") and lines[3].split()[1] == "3.0010"
    assert len(total.table(max_depth=0).splitlines()) == 2
    with pytest.raises(ValueError, match="finite number >= 0"):
        a * float("nan")
    with pytest.raises(TypeError):
        a + 1
