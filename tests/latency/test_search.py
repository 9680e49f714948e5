"""The granularity search: exhaustive, additive, and in agreement with what the papers found."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from las_mm.latency import (
    NetworkShape,
    available_devices,
    block_report,
    network_report,
    resnet_shape,
)
from las_mm.latency.candidates import candidates, channel_candidates
from las_mm.latency.search import latency_against_rate, search_granularity


def test_candidates_are_the_sides_that_matter():
    assert candidates((56, 56)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 19, 28, 56]
    assert candidates((56, 56), ragged=False) == [1, 2, 4, 7, 8, 14, 28, 56]  # the papers' list
    assert candidates((7, 7), ragged=False) == [1, 7]
    assert candidates((14, 14), min_patches=4) == [1, 2, 3, 4, 5, 7]
    assert candidates((2, 4)) == [1, 2, 4]
    assert candidates((2, 4), ragged=False) == [1, 2]
    # Every other side makes a grid that a finer one makes too.
    grids = {(-(-25 // s), -(-42 // s)) for s in range(1, 43)}
    assert len(candidates((25, 42))) == len(grids)


def test_coarse_pays_on_v100_and_hurts_on_tx2():
    """docs/FACTS.md, what coarse granularity buys; ResNet-101 at 224 x 224, r = 0.5 and 0.6."""
    for rate in (0.5, 0.6):
        v100, tx2 = (search_granularity(name, resnet_shape(101), rate) for name in ("v100", "tx2"))
        for coarse, fine in zip(v100.stages, tx2.stages):
            assert coarse.chosen.granularity > 2 * fine.chosen.granularity
            assert coarse.chosen.granularity > coarse.map_hw[0] / 4
            assert fine.chosen.granularity <= 4
        # The other device's choice costs much; on V100 it is slower than the static network.
        other = latency_against_rate("v100", v100.network, tx2.chosen.granularity, [rate])
        assert other[0][0] > 1.2 * v100.chosen.latency_s
        other = latency_against_rate("tx2", tx2.network, v100.chosen.granularity, [rate])
        assert other[0][0] > 1.08 * tx2.chosen.latency_s
    finest = latency_against_rate("v100", v100.network, (1, 1, 1, 1), [0.5])
    assert finest[0][0] > 1.1 * finest[1]


# docs/FACTS.md: dynamic over static of a repeated block at r = 0.6, rates rounded up.
@pytest.mark.parametrize(
    "device, ratios",
    [
        ("v100", {1: 1.93, 2: 1.26, 4: 0.93, 7: 0.91, 8: 0.87}),
        ("tx2", {1: 0.81, 2: 0.79, 4: 0.78, 7: 0.81}),
    ],
)
def test_published_ratios(device, ratios):
    block = resnet_shape(50).blocks[1]
    net = NetworkShape("block", (224, 224), (), (block,))
    (stage,) = search_granularity(device, net, 0.6, patches="whole").stages
    found = {choice.granularity: choice.ratio for choice in stage.choices}
    for side, ratio in ratios.items():
        assert found[side] == pytest.approx(ratio, abs=0.0065)


@pytest.mark.parametrize("patches", ["mean", "whole"])
def test_nothing_is_faster_than_what_was_found(patches):
    net = resnet_shape(50, (96, 128), mode=("spatial", "static", "spatial", "layer"))
    found = search_granularity("rtx3060", net, 0.5, 4, patches=patches, top=7, tolerance=0)
    sides = [candidates((24, 32), 2), [1], candidates((6, 8), 2), [1]]
    totals = {
        setting: latency_against_rate("rtx3060", net, setting, [0.5], 4, patches)[0][0]
        for setting in itertools.product(*sides)
    }
    best = sorted(totals.values())[:7]
    assert [setting.latency_s for setting in found.settings] == pytest.approx(best)
    for setting in (*found.settings, found.chosen, found.current):
        assert setting.latency_s == pytest.approx(totals[setting.granularity])
        assert setting.ratio == pytest.approx(setting.latency_s / found.static_s)
    assert found.chosen == found.settings[0]
    assert found.current.granularity == (4, 1, 2, 1)
    assert [stage.stage for stage in found.stages] == [1, 3]


def test_whole_patches_are_the_reports():
    net = resnet_shape(50, (96, 128))
    for setting in ((4, 4, 2, 1), (8, 2, 3, 2)):
        chosen = net.with_granularity(dict(enumerate(setting, 1)))
        rates = np.array([0.0, 0.3, 0.77, 1.0])
        found, static = latency_against_rate("v100", net, setting, rates, 2, "whole")
        exact = [network_report("v100", chosen, rate, batch_size=2).latency_s for rate in rates]
        assert found == pytest.approx(np.array(exact))
        whole = network_report("v100", net.static(), 1.0, batch_size=2).latency_s
        assert static == pytest.approx(whole)
        mean, _ = latency_against_rate("v100", net, setting, rates, 2)
        assert (mean <= found + 1e-12).all()
        assert mean[[0, -1]] == pytest.approx(found[[0, -1]])


def test_break_even():
    net = resnet_shape(101)
    found = search_granularity("v100", net)
    (stage,) = (stage for stage in found.stages if stage.stage == 1)
    alone = replace(net, stem=(), blocks=net.stages()[1])
    for choice in stage.choices[::3]:
        rates = np.array([choice.break_even - 0.002, min(1.0, choice.break_even + 0.001)])
        latency, static = latency_against_rate("v100", alone, [choice.granularity], rates)
        assert latency[0] < static
        assert latency[1] >= static or choice.break_even == 1
        faster = choice.ratio < 1
        assert (choice.break_even > 0.5) == faster
    by_side = {choice.granularity: choice.break_even for choice in stage.choices}
    assert by_side[1] < by_side[2] < by_side[4]  # coarser pays at more rates
    assert any(c.break_even == 1 for s in found.stages for c in s.choices)


def test_ranking_and_tolerance():
    found = search_granularity("nano", resnet_shape(101), tolerance=0.05)
    for stage in found.stages:
        latencies = [choice.latency_s for choice in stage.choices]
        assert latencies == sorted(latencies)
        within = [c.granularity for c in stage.choices if c.latency_s <= 1.05 * latencies[0]]
        assert stage.chosen.granularity == min(within)
        for choice in stage.choices:
            assert choice.rows == -(-stage.map_hw[0] // choice.granularity)
            assert choice.ragged == bool(stage.map_hw[0] % choice.granularity)
    assert found.chosen.latency_s <= 1.05 * found.settings[0].latency_s
    limited = search_granularity("v100", resnet_shape(101), min_patches=16, ragged=False)
    for stage in limited.stages:
        assert all(c.rows * c.columns >= 16 and not c.ragged for c in stage.choices)


@pytest.mark.parametrize("device", available_devices())
def test_every_shipped_device_gains_at_half_the_patches(device):
    found = search_granularity(device, resnet_shape(101))
    assert 0.5 < found.chosen.ratio < 0.9
    content = json.loads(json.dumps(found.to_dict()))
    assert content["device"] == device and content["batch_size"] == found.batch_size
    assert tuple(content["chosen"]["granularity"]) == found.chosen.granularity


def test_channel_candidates_divide_the_widths():
    assert channel_candidates([64]) == [1, 2, 4, 8, 16, 32]
    assert channel_candidates([48, 104]) == [1, 2, 4, 8]
    assert channel_candidates([7]) == [1]


def test_granularity_of_channels():
    net = resnet_shape(50, (64, 96), mode=("spatial", "both", "channel", "layer"))
    found = search_granularity("tx2", net, 0.6, rate_channel=0.4, tolerance=0, top=3)
    assert [stage.mode for stage in found.stages] == ["spatial", "both", "channel"]
    groups = [{c.channel_granularity for c in stage.choices} for stage in found.stages]
    assert groups[0] == {1} and groups[1] == set(channel_candidates([128]))
    assert {c.granularity for c in found.stages[2].choices} == {1}
    assert found.current.channel_granularity == (1, 2, 2, 1)
    for setting in (*found.settings, found.current):
        shape = net.with_granularity(dict(enumerate(setting.granularity, 1)))
        shape = shape.with_channel_granularity(dict(enumerate(setting.channel_granularity, 1)))
        latency, _ = latency_against_rate(
            "tx2",
            replace(shape, blocks=tuple(b for b in shape.blocks if b.mode != "channel")),
            setting.granularity[:2] + setting.granularity[3:],
            np.array([0.6]),
            channel_granularity=setting.channel_granularity[:2] + setting.channel_granularity[3:],
            rate_channel=0.4,
        )
        channel = [b for b in shape.blocks if b.mode == "channel"]
        rest = sum(block_report("tx2", b, rate_channel=0.4).latency_s for b in channel)
        assert setting.latency_s == pytest.approx(latency[0] + rest, rel=2e-3)
    assert found.chosen.latency_s == found.settings[0].latency_s


def test_blocks_with_sides_of_their_own():
    net = resnet_shape(50)
    first = replace(net.blocks[0], granularity=2)
    mixed = replace(net, blocks=(first, *net.blocks[1:]))
    assert search_granularity("v100", mixed).current is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rate=1.5), r"rate must be a number in \[0, 1\], got 1.5"),
        (dict(rate=True), "rate must be"),
        (dict(top=0), "top must be a positive integer, got 0"),
        (dict(min_patches=50), "stage 4 has a map of 7 x 7, too small for min_patches=50"),
        (dict(tolerance=-1), "tolerance must be a number >= 0, got -1"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(patches="half"), "patches must be one of whole, mean"),
        (
            dict(network=resnet_shape(50, mode="layer")),
            "no spatial stage and none that skips channels.*set mode",
        ),
    ],
)
def test_wrong_arguments(changes, message):
    arguments = dict(device="v100", network=resnet_shape(50))
    with pytest.raises(ValueError, match=message):
        search_granularity(**{**arguments, **changes})
    with pytest.raises(ValueError, match="one S per stage"):
        latency_against_rate("v100", resnet_shape(50), (4, 4), np.array([0.5]))
