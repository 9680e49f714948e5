"""The CUDA kernels in the emulator: the cases of the CPU kernels, each dtype and tile shape."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch

from . import cases, emulated, kernel_traffic
from . import test_sparse_ops as sparse

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# dtype, compute capability, tf32: what decides which kernels run.
KINDS = {
    "fp32": (torch.float32, 80, False),
    "tf32": (torch.float32, 80, True),
    "fp16": (torch.float16, 80, False),
    "fp16-plain": (torch.float16, 70, False),
    "bf16": (torch.bfloat16, 80, False),
    "bf16-plain": (torch.bfloat16, 75, False),
}
TILES = {"large": 0, "medium": 1, "small": 2, "table": -1}
# tf32 keeps 10 bits of the factors.
TOLERANCE = {**cases.TOLERANCE, torch.float16: 4e-3, "tf32": 4e-3}


@pytest.fixture(scope="session")
def libraries():
    folder = emulated.ROOT / "build" / "emulator"
    return {
        dtype: ctypes.CDLL(str(emulated.build(element, folder)))
        for dtype, element in emulated.ELEMENTS.items()
    }


@pytest.fixture(autouse=True)
def tolerances(monkeypatch):
    monkeypatch.setattr(cases, "TOLERANCE", dict(TOLERANCE))
    monkeypatch.setattr(cases.ops, "pack_conv", emulated.pack_conv)


def on_machine(block, dtype):
    """The drawn block with what the CUDA kernels know: no Winograd form, no dense convolutions."""
    return replace(block, dtype=dtype, winograd="none", dense_above=None, threads=1)


def check_drawn(test, machine, dtype, examples, **changes):
    """Run a test of test_sparse_ops.py in the emulator."""

    @cases.drawn(test.strategy, examples, **changes)
    def every(case):
        block, *rest = case if isinstance(case, tuple) else (case,)
        block = on_machine(block, dtype)
        machine.seed = block.seed
        test.check(machine, (block, *rest) if rest else block)

    every()


CHECKS = {  # and the number of cases per kind and tile
    sparse.test_bottleneck_equals_masked_dense: 40,
    sparse.test_bottleneck_in_place: 15,
    sparse.test_bottleneck_beyond_one_tile: 3,
    sparse.test_spatial_mask: 10,
    sparse.test_masker_conv1x1: 10,
    sparse.test_gather_conv3x3: 12,
    sparse.test_conv1x1_scatter_add: 8,
    sparse.test_composition_equals_the_bottleneck: 6,
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("test", CHECKS, ids=lambda test: test.__name__.removeprefix("test_"))
def test_drawn_cases(test, kind, tile, libraries):
    dtype, capability, tf32 = KINDS[kind]
    if tf32:
        cases.TOLERANCE[torch.float32] = TOLERANCE["tf32"]
    machine = emulated.Machine(libraries[dtype], capability, tf32, TILES[tile])
    check_drawn(test, machine, dtype, CHECKS[test])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("layer3.1", "layer4.0")]


@pytest.mark.parametrize("name", ["layer4.1", *SLOW])
def test_traffic_is_near_the_least(name, libraries):
    """At ResNet-101's shapes: bytes and multiplications within 10 % of what is unavoidable."""
    block = dict(kernel_traffic.blocks())[name]
    for row in kernel_traffic.measure(block, libraries[kernel_traffic.DTYPE]):
        kernel, _, _, bytes_ratio, _, _, padding = row
        assert bytes_ratio <= 1.1, row
        assert padding is None or 1 <= padding <= 1.1, row
