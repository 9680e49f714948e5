"""Channel skipping and squeeze-and-excitation on a GPU: the CPU's cases in the emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from . import cases, emulated, kernel_traffic
from . import test_channel_ops as channels
from . import test_excitation as excitation
from .test_emulated_kernels import KINDS, TILES, TOLERANCE, libraries, on_machine, tolerances

__all__ = ["libraries", "tolerances"]  # fixtures

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

CHECKS = {  # and the number of cases per kind and tile
    channels.test_channels_equal_masked_dense: 12,
    channels.test_channels_in_place: 4,
    channels.test_channels_of_several_panels: 2,
    excitation.test_equals_the_definition: 8,
    excitation.test_in_place: 4,
}


def adapt(case, dtype):
    """The drawn case with what the CUDA kernels know."""
    if isinstance(case, cases.Block):
        return on_machine(case, dtype)
    changes = {"block": on_machine(case.block, dtype)}
    if getattr(case, "channels", None) is not None:
        changes["channels"] = replace(case.channels, block=changes["block"])
    return replace(case, **changes)


def check_drawn(test, machine, dtype, examples, **changes):
    """Run a test of test_channel_ops.py or test_excitation.py in the emulator."""

    @cases.drawn(test.strategy, examples, **changes)
    def every(case):
        case = adapt(case, dtype)
        machine.seed = getattr(case, "block", case).seed
        test.check(machine, case)

    every()


# Large tiles have no registers left for what these products need beside.
@pytest.mark.parametrize("tile", ["medium", "small"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("test", CHECKS, ids=lambda test: test.__name__.removeprefix("test_"))
def test_drawn_cases(test, kind, tile, libraries):
    dtype, capability, tf32 = KINDS[kind]
    if tf32:
        cases.TOLERANCE[torch.float32] = TOLERANCE["tf32"]
    machine = emulated.Machine(libraries[dtype], capability, tf32, TILES[tile])
    check_drawn(test, machine, dtype, CHECKS[test])


def test_traffic_is_near_the_least(libraries):
    """At ResNet-101's last stage, half of its patches and channels."""
    block = dict(kernel_traffic.blocks())["layer4.1"]
    for row in kernel_traffic.measure_channels(block, libraries[kernel_traffic.DTYPE]):
        kernel, _, megabytes, ratio, _, _, padding = row
        # Columns that are not wanted lie between those that are; of short vectors the ends count.
        limit = 1.4 if kernel == "SelectWeights" else 1.1
        assert ratio <= limit or megabytes < 0.1, row
        assert padding is None or padding <= 1.1, row


@pytest.mark.parametrize("dtype", emulated.ELEMENTS)
def test_channel_mean(dtype, libraries):
    check_drawn(channels.test_channel_mean, emulated.Machine(libraries[dtype]), dtype, 30)


def test_channel_mean_in_parts(libraries):
    x = torch.rand(2, 40, 50, 61)
    means = emulated.Machine(libraries[torch.float32])("channel_mean", x)
    torch.testing.assert_close(means, x.mean((2, 3)))
