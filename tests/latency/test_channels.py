"""Skipped channels, squeeze-and-excitation and RegNets in the latency model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from las_mm.latency import (
    BottleneckShape,
    LatencyTable,
    block_report,
    load_device,
    network_report,
    paper_report,
    regnet_shape,
    resnet_shape,
)
from las_mm.latency.analytical import operators as ops
from las_mm.latency.analytical.channels import busiest_share
from las_mm.models.flops import count_macs
from las_mm.network.architectures import ARCHS


def _block(**changes):
    block = BottleneckShape("b", 1, "channel", 4, 256, 64, 256, 28, 28, 1, channel_granularity=2)
    return replace(block, **changes)


def _exact_maximum(population, marked, drawn, copies):
    """Of independent hypergeometric variables, from binomial coefficients."""
    below, expected = 0.0, 0.0
    for x in range(drawn):
        ways = math.comb(marked, x) * math.comb(population - marked, drawn - x)
        below += ways / math.comb(population, drawn)
        expected += 1 - below**copies
    return expected


@pytest.mark.parametrize("copies", [1, 4, 80])
@pytest.mark.parametrize("population, drawn", [(32, 8), (256, 32), (64, 1), (10, 9), (7, 7)])
def test_busiest_tile_is_the_expected_maximum(population, drawn, copies):
    for marked in {0, 1, population // 3, population - 1, population}:
        share = busiest_share(population, marked / population, 1, drawn, copies)
        exact = _exact_maximum(population, marked, drawn, copies) / drawn
        assert share == pytest.approx(exact, rel=1e-9, abs=1e-12)


def test_busiest_tile_against_draws():
    rng = np.random.default_rng(0)
    population, marked, drawn, copies = 128, 50, 16, 8
    draws = rng.hypergeometric(marked, population - marked, drawn, (20000, copies)).max(1)
    share = busiest_share(population, marked / population, 1, drawn, copies)
    assert share * drawn == pytest.approx(draws.mean(), rel=5e-3)


def test_a_batch_evens_tiles_out():
    shares = [busiest_share(64, 0.5, images, 8, 8) for images in (1, 8, 128)]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < shares[2] < 0.56 < shares[0]
    rates = np.linspace(0, 1, 101)
    found = [busiest_share(64, rate, 3, 8, 8) for rate in rates]
    assert (np.diff(found) > 0).all() and (np.array(found) >= rates - 1e-12).all()


@pytest.mark.parametrize("device", ["v100", "tx2"])
@pytest.mark.parametrize("conv", [(64, 128, 1, 1), (64, 64, 3, 1), (64, 64, 3, 8)])
def test_a_conv_with_all_channels_is_the_dense_one(device, conv):
    d = load_device(device)
    c_in, c_out, kernel, groups = conv
    sizes = (c_in, c_out, kernel, 14, 20)
    dense = ops.static_conv(d, *sizes, groups=groups).latency_s
    mask = ops.ChannelMask(32, inputs=True, outputs=True)
    times = [
        ops.channel_conv(d, *sizes, groups=groups, rate=rate, mask=mask).latency_s
        for rate in np.linspace(0, 1, 21)
    ]
    assert times == sorted(times)
    # The tiling is the best at the mean rate, which need not be the best at 1.
    assert dense * (1 - 1e-12) <= times[-1] < 1.05 * dense
    assert times[0] - d.launch_s < 0.1 * (dense - d.launch_s)


def test_patches_with_all_channels_are_dynamic_convs():
    d = load_device("v100")
    mask, size = ops.ChannelMask(32, inputs=True, outputs=True), ops.ConvSize(64, 64, 3, 28, 28)
    for gathered in (False, True):
        options = dict(granularity=4, gathered=gathered)
        cost = ops.channel_conv_cost(d, size, mask=mask, **options)
        same = ops.dynamic_conv_cost(d, size, **options)
        for n in (0, 10, 49):
            full = cost.at(1.0).report(n).latency_s
            assert full == pytest.approx(same.report(n).latency_s, rel=0.05)
            half = cost.at(0.5).report(n).latency_s
            assert half < full or (n == 0 and half == full)  # a batch reads all weights


def test_unmasked_sides_are_charged_in_full():
    d = load_device("tx2")
    sizes = (64, 64, 3, 14, 14)
    both, inputs, outputs = (
        ops.channel_conv(d, *sizes, rate=0.25, mask=ops.ChannelMask(32, *sides)).latency_s
        for sides in ((True, True), (True, False), (False, True))
    )
    assert both < min(inputs, outputs)
    nothing = ops.ChannelMask(32, inputs=False, outputs=False)
    dense = ops.static_conv(d, *sizes).latency_s
    assert ops.channel_conv(d, *sizes, rate=0.0, mask=nothing).latency_s == pytest.approx(dense)


@pytest.mark.parametrize("device", ["v100", "rtx3090", "tx2"])
@pytest.mark.parametrize("mode", ["channel", "both"])
def test_blocks_grow_with_the_channel_rate(device, mode):
    for block in (_block(mode=mode), _block(mode=mode, stride=2, downsample=True, se_width=16)):
        times = [
            block_report(device, block, 0.6, rate_channel=rate).latency_s
            for rate in np.linspace(0, 1, 21)
        ]
        assert all(b >= a * (1 - 1e-12) for a, b in zip(times, times[1:]))
        assert times[-1] > times[5] > times[0]


@pytest.mark.parametrize("device", ["v100", "tx2"])
def test_all_channels_cost_the_static_block_and_the_masker(device):
    block = _block(se_width=16)
    full = block_report(device, block)
    masker = full.children[-1]
    assert masker.name == "channel_masker"
    static = block_report(device, replace(block, mode="static")).latency_s
    assert static * (1 - 1e-12) <= full.latency_s - masker.latency_s < 1.03 * static
    spatial = block_report(device, replace(block, mode="spatial"), 0.5).latency_s
    both = block_report(device, replace(block, mode="both"), 0.5)
    assert both.latency_s - both.children[-1].latency_s == pytest.approx(spatial, rel=0.05)


def test_operators_of_blocks():
    def names(report):
        return [child.name for child in report.children]

    report = block_report("tx2", _block(se_width=16), rate_channel=0.5)
    se = ["se_pool", "se_fc1", "se_fc2", "se_scale"]
    assert names(report) == ["conv1", "conv2", *se, "conv3", "add", "channel_masker"]
    assert names(report.children[-1]) == ["pool", "fc1", "fc2"]
    report = block_report("tx2", _block(mode="both", channel_masker_layers=1, downsample=True), 0.5)
    assert names(report) == [
        "masker_conv1", "conv2", "conv3", "scatter_add", "channel_masker", "downsample",
    ]  # fmt: skip
    assert names(report.children[-2]) == ["pool", "fc1"]
    report = block_report("tx2", _block(channel_masker="conv_linear"))
    assert names(report.children[-1]) == ["conv", "pool", "fc1"]


def test_se_costs_the_kept_share():
    block = _block(mode="spatial", se_width=16)
    parts = {}
    for rate in (0.0, 0.5, 1.0):
        parts[rate] = {c.name: c for c in block_report("tx2", block, rate).children}
    for name in ("se_pool", "se_scale"):
        empty, half, full = (parts[rate][name] for rate in (0.0, 0.5, 1.0))
        assert empty.latency_s == empty.launch_s > 0
        assert half.memory_s == pytest.approx(full.memory_s * 25 / 49)  # whole patches
    assert parts[0.0]["se_fc1"].latency_s == parts[1.0]["se_fc1"].latency_s


def test_the_model_draws_no_random_numbers():
    state = np.random.get_state()[1].copy()
    first = block_report("v100", _block(c_in=96), rate_channel=0.3)
    assert (np.random.get_state()[1] == state).all()
    assert block_report("v100", _block(c_in=96), rate_channel=0.3) == first


def _channel_rate(network, gflops):
    """The channel rate at which the network has so many multiply-accumulates."""
    macs = dict(conv1=0, conv2=0, conv3=0, downsample=0)
    for op in (op for block in network.static().blocks for op in block.operators):
        if op.name in macs:
            macs[op.name] += op.macs()
    rho = np.linspace(0, 1, 2001)
    convs = (macs["conv1"] + macs["conv3"]) * rho + macs["conv2"] * rho**2
    fixed = sum(op.macs() for op in network.stem) + macs["downsample"]
    return float(np.interp(gflops, (fixed + convs) / 1e9, rho))


# docs/FACTS.md: GFLOPs, ms per image on TX2 and V100, read off a plot, one rate per block there.
@pytest.mark.parametrize(
    "gflops, tx2, v100", [(2.86, 15.0, 0.844), (3.64, 17.5, 0.979), (5.2, 23.49, 1.283)]
)
def test_published_channel_skipping(gflops, tx2, v100):
    rho = _channel_rate(resnet_shape(101, mode="channel"), gflops)
    for device, ms in (("tx2", tx2), ("v100", v100)):
        report = paper_report(device, 101, mode="channel", rate_channel=rho)
        assert 1e3 * report.latency_s == pytest.approx(ms, rel=0.1)


def test_published_regnets():
    """RegNetY-800MF: static 5.41 ms on TX2, 12.53 on Nano; channels at 0.52 GFLOPs 4.43, 9.18."""
    for device, ms, channel_ms in (("tx2", 5.41, 4.43), ("nano", 12.53, 9.18)):
        static = network_report(
            device, regnet_shape("y_800mf", mode="static"), 1, include_stem=False
        )
        assert 1e3 * static.latency_s == pytest.approx(ms, rel=0.03)
        network = regnet_shape("y_800mf", mode="channel")
        rho = _channel_rate(network, 0.52)
        report = network_report(device, network, 1, include_stem=False, rates_channel=rho)
        assert 1e3 * report.latency_s == pytest.approx(channel_ms, rel=0.03)


@pytest.mark.parametrize("arch, gmacs", [("x_400mf", 0.41), ("y_400mf", 0.40), ("y_800mf", 0.83),
                                         ("x_8gf", 8.0), ("y_8gf", 8.47)])  # fmt: skip
def test_regnets_have_the_flops_of_their_names(arch, gmacs):
    counts = count_macs(regnet_shape(arch, mode="static"))
    assert (counts.stem + counts.static_blocks.sum()) / 1e9 == pytest.approx(gmacs, rel=0.03)


def test_regnets_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    for arch in ("x_400mf", "x_3.2gf", "y_400mf", "y_800mf"):
        net = getattr(models, f"regnet_{arch.replace('.', '_')}")()
        blocks = [block for stage in net.trunk_output for block in stage]
        shapes = regnet_shape(arch).blocks
        assert len(blocks) == len(shapes)
        for block, shape in zip(blocks, shapes):
            f = block.f
            assert (f.a[0].in_channels, f.a[0].out_channels) == (shape.c_in, shape.width)
            assert (f.b[0].groups, f.b[0].stride[0]) == (shape.groups, shape.stride)
            assert (f.se.fc1.out_channels if hasattr(f, "se") else 0) == shape.se_width
            assert (block.proj is not None) == shape.downsample


@pytest.mark.parametrize("mode", ["channel", "both", ("spatial", "both", "channel", "layer")])
@pytest.mark.parametrize("device", ["v100", "tx2"])
def test_table_of_channel_rates(device, mode):
    network = resnet_shape(50, mode=mode)
    table = LatencyTable(device, network)
    rng = np.random.default_rng(1)
    grid = rng.integers(0, 33, (3, 16)) / 32
    exact = network_report(device, network, grid[0], grid[1], rates_channel=grid[2])
    assert table.predict(*grid).total_s == pytest.approx(exact.latency_s)
    mixed = rng.random((3, 16))
    exact = network_report(device, network, mixed[0], mixed[1], rates_channel=mixed[2])
    assert table.predict(*mixed).total_s == pytest.approx(exact.latency_s, rel=0.01)
    full = network_report(device, network, grid[0])
    assert table.predict(grid[0]).total_s == pytest.approx(full.latency_s)
    with pytest.raises(ValueError, match="rates_channel must lie in"):
        table.predict(0.5, rates_channel=1.5)


def test_every_architecture_has_a_shape():
    for arch in ARCHS:
        network = regnet_shape(arch, (64, 96), mode=("channel", "both", "spatial", "layer"))
        assert network_report("tx2", network, 0.5, rates_channel=0.5).latency_s > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _block(channel_granularity=3), "channel_granularity must divide width=64, got 3"),
        (lambda: _block(channel_masker="rnn"), "channel_masker must be one of"),
        (lambda: _block(se_width=-1), "se_width must be a positive integer, got -1"),
        (lambda: regnet_shape("z_1gf"), "arch must be one of x_400mf.*got 'z_1gf'"),
        (lambda: regnet_shape("y_400mf", mode=["layer"]), "mode must have one entry per stage"),
        (lambda: resnet_shape(50, channel_granularity=(2,)), "channel_granularity must have one"),
        (lambda: block_report("tx2", _block(), rate_channel=2), r"rate_channel must be a number"),
        (
            lambda: ops.channel_conv(
                load_device("tx2"), 4, 4, 1, 4, 4, rate=-0.1, mask=ops.ChannelMask(2, True, True)
            ),
            r"conv: rate must be a number in \[0, 1\], got -0.1",
        ),
        (
            lambda: ops.channel_conv_cost(
                load_device("tx2"),
                ops.ConvSize(4, 4, 1, 4, 4),
                mask=ops.ChannelMask(0, True, True),
            ),
            "mask_groups must be a positive integer",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
