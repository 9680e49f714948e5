"""The emulator notices what it should: each kernel, broken in several ways, is caught."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase

from . import cases, emulated
from . import test_sparse_ops as sparse
from .test_emulated_kernels import TOLERANCE, check_drawn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

BOTTLENECK = sparse.test_bottleneck_equals_masked_dense
MASK = sparse.test_spatial_mask
MASKER = sparse.test_masker_conv1x1
WIDE = sparse.test_bottleneck_beyond_one_tile


@dataclass(frozen=True)
class Mutant:
    """A kernel with a mistake.

    Attributes:
        kernel: Its name.
        mistake: In words.
        file: Below ops/cuda/.
        old: What the source says; must occur.
        new: What the mutant says there.
        test: Which test of test_sparse_ops.py, or which of EXTRA, finds it.
        caught: Part of the message, or ``'off by'`` for a wrong result.
        dtype: Of the features; float64 stands for float32 without tf32.
    """

    kernel: str
    mistake: str
    file: str
    old: str
    new: str
    test: object
    caught: str
    dtype: torch.dtype = torch.float16


GEMM, PRODUCT, SCORES, POSITIONS, ROWS = (
    "sparse_gemm.cuh",
    "gemm_product.cuh",
    "spatial_mask.cuh",
    "positions.cuh",
    "rows.cuh",
)
MUTANTS = [
    Mutant(
        "SparseGemm",
        "no barrier between filling a stage and reading it",
        GEMM,
        "sync_block();  // this stage is complete",
        "// this stage is complete",
        BOTTLENECK,
        "uninitialised shared memory|race in shared memory",
    ),
    Mutant(
        "SparseGemm",
        "no barrier before the next tile fills the stages",
        GEMM,
        "sync_block();  // the next tile",
        "// the next tile",
        WIDE,
        "race in shared memory",
    ),
    Mutant(
        "SparseGemm",
        "waits for one group of copies too few",
        GEMM,
        "wait_copies<Tile::kStages - 2>()",
        "wait_copies<Tile::kStages - 1>()",
        BOTTLENECK,
        "in flight",
    ),
    Mutant(
        "SparseGemm",
        "a list read one past its end",
        GEMM,
        "if (row < place.rows) {",
        "if (row <= place.rows) {",
        BOTTLENECK,
        "uninitialised|out of bounds",
    ),
    Mutant(
        "SparseGemm",
        "a row written to the next position",
        GEMM,
        "return Part::row(i) < place.rows ? first : -1;",
        "return Part::row(i) < place.rows ? first + channels : -1;",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm",
        "halo one row too far down",
        GEMM,
        "y < s.height &&",
        "y <= s.height &&",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm",
        "halo without the column on the left",
        GEMM,
        "x >= 0 &&",
        "x >= 1 &&",
        BOTTLENECK,
        "off by",
    ),
    Mutant(
        "SparseGemm",
        "taps shifted by a row",
        GEMM,
        "(step.tap / 3 - 1) * s.dilation",
        "(step.tap / 3) * s.dilation",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm",
        "weights read beyond the last panel's width",
        GEMM,
        "const bool valid = column < width && k < now.word_depth;",
        "const bool valid = k < now.word_depth;",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm",
        "weights read beyond the depth",
        GEMM,
        "const bool valid = column < width && k < now.word_depth;",
        "const bool valid = column < width;",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm",
        "channels written beyond the group",
        GEMM,
        "left < Part::kRun ? left : Part::kRun",
        "Part::kRun",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm (exchange)",
        "no barrier before the stages are overwritten",
        PRODUCT,
        "sync_block();  // no one reads the stages",
        "// no one reads the stages",
        BOTTLENECK,
        "race in shared memory",
    ),
    Mutant(
        "SparseGemm (exchange)",
        "no barrier before the sums are read",
        PRODUCT,
        "sync_block();  // all sums are there",
        "// all sums are there",
        BOTTLENECK,
        "race in shared memory|uninitialised shared memory",
    ),
    Mutant(
        "SparseGemm (exchange)",
        "sums of the first group of warps only",
        PRODUCT,
        "for (int from = 0; from < kSplits; ++from) {",
        "for (int from = 0; from < 1; ++from) {",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "SparseGemm (tf32)",
        "factors not rounded",
        PRODUCT,
        "words[i] = round_to_tf32(words[i]);",
        "words[i] = words[i] + 0;",
        BOTTLENECK,
        "tf32",
        torch.float32,
    ),
    Mutant(
        "SparseGemm (plain)",
        "a thread's rows overlap its neighbour's",
        PRODUCT,
        "return thread_index() / (Tile::kColumns / kRun) + i * kLines;",
        "return thread_index() / (Tile::kColumns / kRun) + i * (kLines - 1);",
        BOTTLENECK,
        "",
        torch.float64,
    ),
    Mutant(
        "SparseGemm (scores)",
        "scores of every panel, not of the first only",
        GEMM,
        "if (place.panel == 0) write_scores(p, place, score);",
        "write_scores(p, place, score);",
        MASKER,
        "",
    ),
    Mutant(
        "ScorePatches",
        "positions of the first of the threads that share a chunk only",
        SCORES,
        "chunk * kChunk, first, kThreads / across);",
        "chunk * kChunk, 0, kThreads / across);",
        MASK,
        "",
    ),
    Mutant(
        "ScorePatches",
        "channels beyond the last",
        SCORES,
        "c < p.channels && c < channel + kChunk",
        "c < channel + kChunk",
        MASK,
        "",
    ),
    Mutant(
        "ScorePatches",
        "lines of a patch side by side",
        SCORES,
        "return k / wide * width + k % wide;",
        "return k;",
        MASK,
        "",
    ),
    Mutant(
        "ScorePositions",
        "half of the lanes left out of the sum",
        SCORES,
        "for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);\n"
        "      if (lane == 0)",
        "for (int lanes = 1; lanes < 16; lanes *= 2) sum += shuffle_xor(sum, lanes);\n"
        "      if (lane == 0)",
        "layer",
        "",
        torch.float64,
    ),
    Mutant(
        "ScorePositions",
        "one position too many",
        SCORES,
        "position < p.positions;",
        "position <= p.positions;",
        "layer",
        "out of bounds",
    ),
    Mutant(
        "DecidePatches",
        "ragged patches taken for whole ones",
        SCORES,
        "p.width - left < p.side ? p.width - left : p.side;\n    first",
        "p.side;\n    first",
        MASK,
        "",
    ),
    Mutant(
        "DecidePatches (large patches)",
        "no barrier between the warps' sums and their total",
        SCORES,
        "    sync_block();\n    sum = 0.f;",
        "    sum = 0.f;",
        "layer",
        "",
    ),
    Mutant(
        "DecidePatches (large patches)",
        "no barrier before the next patch",
        SCORES,
        "    sync_block();  // the next patch",
        "    // the next patch",
        "layer",
        "race in shared memory",
    ),
    Mutant(
        "ListPositions",
        "a position counts its own lane as before it",
        POSITIONS,
        "((1u << thread_index() % 32) - 1u)",
        "((2u << thread_index() % 32) - 1u)",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "ListPositions",
        "halo without the row below",
        POSITIONS,
        "down = 0; down < 3",
        "down = 0; down < 2",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "ListPositions",
        "positions beyond the map",
        POSITIONS,
        "const bool read = i < hidden && is_read",
        "const bool read = is_read",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "ListPositions",
        "no barrier between the warps' counts and their sum",
        POSITIONS,
        "sync_block();  // all warps' counts",
        "// all warps' counts",
        BOTTLENECK,
        "uninitialised shared memory|race in shared memory",
    ),
    Mutant(
        "ListPositions",
        "no barrier before a block's positions are written",
        POSITIONS,
        "sync_block();  // where the block's",
        "// where the block's",
        BOTTLENECK,
        "uninitialised shared memory|race in shared memory",
    ),
    Mutant(
        "ListPositions",
        "warps before the own left out",
        POSITIONS,
        "if (w < warp) before += count;",
        "",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "ListPositions",
        "appends without atomics",
        POSITIONS,
        "total > 0 ? p.counts.atomic_add(which, total) : 0);",
        "p.counts.load(which));\n      p.counts.store(which, p.counts.load(which) + total);",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "MeanRates",
        "shares of the wrong map",
        SCORES,
        "static_cast<float>(p.outputs)",
        "static_cast<float>(p.hidden)",
        MASK,
        "",
    ),
    Mutant(
        "ReluRows",
        "channels beyond the row",
        ROWS,
        "k < kChunk && c + k < p.channels",
        "k < kChunk",
        "dropped",
        "",
    ),
    Mutant(
        "ReluRows",
        "one row too many",
        ROWS,
        "p.count.load(0) * chunks",
        "(p.count.load(0) + 1) * chunks",
        BOTTLENECK,
        "",
    ),
    Mutant(
        "ClearUnread",
        "one position too many",
        ROWS,
        "i < g.hidden();",
        "i <= g.hidden();",
        MASKER,
        "out of bounds",
    ),
    Mutant(
        "ClearUnread",
        "half of the channels left",
        ROWS,
        "c < p.channels; c += 32)",
        "c < p.channels / 2; c += 32)",
        MASKER,
        "",
    ),
]


def check_layer_masks(machine):
    """Patches large enough for eight warps, more of them than blocks; close decisions."""
    block = cases.Block(4, (50, 47), (160, 8, 8), sparse.ops.LAYER, dtype=machine.dtype)
    weight, bias, _ = sparse.make_masker(block, "none")
    keep, scale = sparse.scores(block.x, weight, bias, None, block.granularity, (1, 1))
    signs = torch.tensor([1, -1, 1, -1]).view(-1, 1, 1, 1)
    masker = (weight, bias, (3e-4 * signs * scale - keep).float())
    mask, rates = machine("spatial_mask", block.x, *masker, block.granularity, (1, 1), 1)
    sparse.check_decisions(block.x, block, masker, mask, rates)


def run(mutant, machine):
    if mutant.test in EXTRA:
        EXTRA[mutant.test](machine)
        return

    # Finding the mistake is enough; no need for the smallest case.
    how = dict(phases=[Phase.generate], report_multiple_bugs=False)
    check_drawn(mutant.test, machine, machine.dtype, 60, **how)


def check_dropped_rows(machine):
    """Rows that end within sixteen bytes, all of them dropped."""
    block = cases.Block(2, (7, 5), (3, 8, 3), mask_kind="empty", dtype=machine.dtype)
    BOTTLENECK.check(machine, block)


EXTRA = {"layer": check_layer_masks, "dropped": check_dropped_rows}


class TestMachine(emulated.Machine):
    dtype: torch.dtype

    __test__ = False


def machine_for(mutant, headers, folder):
    dtype = torch.float32 if mutant.dtype == torch.float64 else mutant.dtype
    library = emulated.build(emulated.ELEMENTS[dtype], folder, headers)
    machine = TestMachine(
        ctypes.CDLL(str(library)),
        allow_tf32=mutant.dtype == torch.float32,
        tile=2,
        blocks=2,
    )
    machine.dtype = dtype
    return machine


@pytest.fixture(autouse=True)
def tolerances(monkeypatch):
    tolerances = {**TOLERANCE, torch.float32: TOLERANCE["tf32"]}
    monkeypatch.setattr(cases, "TOLERANCE", tolerances)
    monkeypatch.setattr(cases.ops, "pack_conv", emulated.pack_conv)


def mutated(mutant):
    source = (emulated.OPS / "cuda" / mutant.file).read_text()
    assert mutant.old in source, f"{mutant.file} does not say {mutant.old!r} any more"
    return source.replace(mutant.old, mutant.new)


def expect_applicable(mutants):
    for mutant in mutants:
        assert mutant.new != mutant.old
        mutated(mutant)


def as_parameters(mutants):
    """The first mistake of each file; the others, a compilation each, are slow tests."""
    seen = set()
    for mutant in mutants:
        marks = [pytest.mark.slow] if mutant.file in seen else []
        seen.add(mutant.file)
        yield pytest.param(mutant, id=f"{mutant.kernel}: {mutant.mistake}", marks=marks)


def expect_caught(mutant, tmp_path, run):
    """Compile the mutant and ``run(mutant, machine)`` the test that must fail."""
    shutil.copytree(emulated.OPS, tmp_path / "ops", ignore=shutil.ignore_patterns("*.cpp", "*.o"))
    path = tmp_path / "ops" / "cuda" / mutant.file
    path.write_text(mutated(mutant))
    machine = machine_for(mutant, tmp_path / "ops", tmp_path)
    with pytest.raises(AssertionError, match=mutant.caught) as caught:
        run(mutant, machine)
    print(f"{mutant.kernel}: {mutant.mistake}: {str(caught.value).splitlines()[0][:200]}")


@pytest.mark.parametrize("mutant", as_parameters(MUTANTS))
def test_mutant_is_caught(mutant, tmp_path):
    expect_caught(mutant, tmp_path, run)


def test_all_mistakes_can_still_be_made():
    expect_applicable(MUTANTS)


@pytest.mark.parametrize("name", EXTRA)
def test_extra_checks_pass_with_the_real_kernels(name):
    machine = machine_for(MUTANTS[0], emulated.OPS, emulated.ROOT / "build" / "emulator")
    EXTRA[name](machine)
