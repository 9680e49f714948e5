"""Kernels of channel skipping and squeeze-and-excitation, each broken in several ways."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import Phase

from . import emulated
from . import test_channel_ops as channels
from . import test_excitation as excitation
from .test_emulated_channels import check_drawn
from .test_kernel_mutants import (
    GEMM,
    POSITIONS,
    Mutant,
    as_parameters,
    expect_applicable,
    expect_caught,
    machine_for,
    tolerances,
)

__all__ = ["tolerances"]  # a fixture

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

CHANNELS, EXCITATION = "channels.cuh", "excitation.cuh"
BLOCK = channels.test_channels_equal_masked_dense
WIDE = channels.test_channels_of_several_panels
EXCITED = excitation.test_equals_the_definition
MEAN = channels.test_channel_mean

# The first of each file in every run, the others in `make test-slow`: compiling takes long.
MUTANTS = [
    Mutant(
        "ListChannels",
        "a channel counts its own lane as before it",
        CHANNELS,
        "lanes & ((1u << lane) - 1u)",
        "lanes & ((2u << lane) - 1u)",
        BLOCK,
        "",
    ),
    Mutant(
        "SumRows",
        "no barrier between the warps' sums and their total",
        EXCITATION,
        "(kThreads + warp) * 4, kept);\n    sync_block();",
        "(kThreads + warp) * 4, kept);",
        EXCITED,
        "race in shared memory|uninitialised shared memory",
    ),
    Mutant(
        "SparseGemm (selected)",
        "weights of the first image for all",
        GEMM,
        "weight.data += place.image * s.image_values + ",
        "weight.data += ",
        BLOCK,
        "",
    ),
    Mutant(
        "SparseGemm (selected)",
        "depth of all channels",
        GEMM,
        "return s.selected ? place.selected : s.depth;",
        "return s.depth;",
        BLOCK,
        "",
    ),
    Mutant(
        "SparseGemm (selected)",
        "positions of the first image for all",
        GEMM,
        "row += place.image * p.height * p.width;",
        "row += 0;",
        BLOCK,
        "",
    ),
    Mutant(
        "SparseGemm (selected)",
        "a source without channels is read all the same",
        GEMM,
        "if (depth_of(p.sources[0], place) == 0) next.source = 1;",
        "",
        BLOCK,
        "",
    ),
    Mutant(
        "SparseGemm (selected)",
        "an image's last tile left out",
        GEMM,
        "if (left <= 0 || ",
        "if (left < Tile::kRows || ",
        BLOCK,
        "",
    ),
    Mutant(
        "SparseGemm (selected)",
        "biases of the first image for all",
        GEMM,
        "p.selection.columns ? place.image * p.selection.row + channel : channel",
        "channel",
        BLOCK,
        "off by",
    ),
    Mutant(
        "ListChannels",
        "groups not filled up",
        CHANNELS,
        "(next - first + kFill - 1) / kFill * kFill;",
        "(next - first);",
        BLOCK,
        "",
    ),
    Mutant(
        "ListChannels",
        "no channel that is 1",
        CHANNELS,
        "const bool one = p.constants && next - first < g.per_group();",
        "const bool one = false;",
        BLOCK,
        "off by",
    ),
    Mutant(
        "ListChannels",
        "no place of skipped channels",
        CHANNELS,
        "if (valid && p.places.data != nullptr)",
        "if (wanted && p.places.data != nullptr)",
        EXCITED,
        "uninitialised global memory",
    ),
    Mutant(
        "SelectWeights",
        "weights of the first group for all",
        CHANNELS,
        "from.data += group * conv.from_values();",
        "",
        BLOCK,
        "off by",
    ),
    Mutant(
        "SelectWeights",
        "values beyond the slice",
        CHANNELS,
        "const int end = begin + kSlice < total ? begin + kSlice : total;",
        "const int end = total;",
        WIDE,
        "race in global memory",
    ),
    Mutant(
        "SelectWeights",
        "width of the last panel as of a full one",
        CHANNELS,
        "(left < kPanel ? left : kPanel) / 4;  // in chunks",
        "(left < kPanel ? kPanel : kPanel) / 4;  // in chunks",
        BLOCK,
        "",
    ),
    Mutant(
        "SumConstants",
        "wanted channels summed too",
        CHANNELS,
        "if (is_wanted(g, p.mask, image, channel)) continue;",
        "",
        BLOCK,
        "off by",
    ),
    Mutant(
        "SumConstants",
        "no barrier before the next sums",
        CHANNELS,
        "    sync_block();  // the next sums",
        "    // the next sums",
        WIDE,
        "race in shared memory",
    ),
    Mutant(
        "SumConstants",
        "sums of one warp only",
        CHANNELS,
        "for (int i = 0; i < kWarps; ++i) total +=",
        "for (int i = 0; i < 1; ++i) total +=",
        BLOCK,
        "off by",
    ),
    Mutant(
        "ListPositions (images)",
        "lists of all images at the same place",
        POSITIONS,
        "{p.halo, p.sections + section, section * hidden, read}",
        "{p.halo, p.sections + section, 0, read}",
        BLOCK,
        "",
    ),
    Mutant(
        "ListPositions (images)",
        "counts of the first image for all",
        POSITIONS,
        "append(p, {p.kept, section, section * outputs, kept},",
        "append(p, {p.kept, 0, section * outputs, kept},",
        BLOCK,
        "",
    ),
    Mutant(
        "SumRows",
        "dropped rows summed too",
        EXCITATION,
        "if (!p.rows.kept(image, i)) continue;",
        "",
        EXCITED,
        "",
    ),
    Mutant(
        "SumRows",
        "channels that the image does not have",
        EXCITATION,
        "const bool valid = channel < p.rows.channels_of(image);",
        "const bool valid = channel < p.rows.channels;",
        EXCITED,
        "uninitialised global memory",
    ),
    Mutant(
        "SumRows",
        "positions of the next part too",
        EXCITATION,
        "left < p.part_positions ? left : p.part_positions",
        "left",
        MEAN,
        "",
        torch.float64,
    ),
    Mutant(
        "MeanRows",
        "rows of the first part only",
        EXCITATION,
        "kept += p.kept.load(part);",
        "kept = p.kept.load(part);",
        MEAN,
        "",
        torch.float64,
    ),
    Mutant(
        "Connect",
        "half of the lanes left out of the sum",
        EXCITATION,
        "lanes = 1; lanes < 32; lanes *= 2",
        "lanes = 1; lanes < 16; lanes *= 2",
        EXCITED,
        "off by",
    ),
    Mutant(
        "Connect",
        "no ReLU between the two",
        EXCITATION,
        ": relu(sum)",
        ": sum",
        EXCITED,
        "off by",
    ),
    Mutant(
        "ScaleRows",
        "scales of the channels' places, not of the channels",
        EXCITATION,
        "image) * p.rows.row + c);\n          if (channel < 0) continue;",
        "image) * p.rows.row + c);\n          if (channel < 0) continue;\n          channel = c;",
        EXCITED,
        "out of bounds",
    ),
    Mutant(
        "ScaleRows",
        "scales of the first image for all",
        EXCITATION,
        "p.scales.load(static_cast<int64_t>(image) * p.width + channel)",
        "p.scales.load(channel)",
        EXCITED,
        "off by",
    ),
]


def check_parts(machine):
    """A map of more than one part."""
    x = torch.rand(2, 3, 20, 21)
    torch.testing.assert_close(machine("channel_mean", x), x.mean((2, 3)))


def run(mutant, machine):
    if mutant.test is MEAN:
        check_parts(machine)
        return
    how = dict(phases=[Phase.generate], report_multiple_bugs=False)
    check_drawn(mutant.test, machine, machine.dtype, 80, **how)


@pytest.mark.parametrize("mutant", as_parameters(MUTANTS))
def test_mutant_is_caught(mutant, tmp_path):
    expect_caught(mutant, tmp_path, run)


def test_parts_pass_with_the_real_kernels():
    mutant = next(m for m in MUTANTS if m.test is MEAN)
    check_parts(machine_for(mutant, emulated.OPS, emulated.ROOT / "build" / "emulator"))


def test_all_mistakes_can_still_be_made():
    expect_applicable(MUTANTS)
