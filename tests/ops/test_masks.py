"""dilate_mask: native == reference == the training path of maskers.py, and loading _C."""

import importlib
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import needs
from las_mm import ops
from las_mm.models import maskers
from las_mm.ops import library, masks

from .cases import read_by, scaled

OP = torch.ops.las_mm.dilate_mask.default
needs_native = pytest.mark.skipif(
    not ops.native_available(),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)
IMPLEMENTATIONS = [
    pytest.param(masks._dilate_mask_reference, id="reference"),
    pytest.param(OP, id="native", marks=needs_native),
]


def make_mask(images, granularity, size, stride, fill=0.5, dtype=torch.float32, seed=0):
    """A random patch mask; ``fill`` is the expected share of kept patches."""
    grid = [math.ceil(math.ceil(n / stride) / granularity) for n in size]
    uniform = torch.rand(images, 1, *grid, generator=torch.Generator().manual_seed(seed))
    return (uniform < fill).to(dtype)


def adjoint(mask, granularity, size, stride, dilation):
    """The definition: the positions that get a gradient through the convolution."""
    out_size = [math.ceil(n / stride) for n in size]
    kept = mask.repeat_interleave(granularity, 2).repeat_interleave(granularity, 3) > 0.5
    kept = kept[:, :, : out_size[0], : out_size[1]]
    halo = read_by(kept, size, stride, dilation)
    return halo, torch.stack([kept.sum((1, 2, 3)), halo.sum((1, 2, 3))], 1).long()


def training_path(mask, granularity, size, stride, dilation):
    """What maskers.py computes, in the op's output format."""
    out_size = tuple(math.ceil(n / stride) for n in size)
    kept = maskers.expand_mask(mask.float(), granularity, out_size)
    halo = maskers.dilate_mask(kept, size, stride, dilation)
    return halo.bool(), torch.stack([kept.sum((1, 2, 3)), halo.sum((1, 2, 3))], 1).long()


def assert_same(actual, expected):
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
        assert a.is_contiguous()


GEOMETRY = dict(
    images=st.integers(1, 3),
    granularity=st.integers(1, 30),
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    stride=st.integers(1, 3),
    fill=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=scaled(250), deadline=None, derandomize=True)
@given(**GEOMETRY, dilation=st.integers(1, 4), dtype=st.sampled_from(masks.MASK_DTYPES))
def test_equals_the_adjoint_of_the_convolution(
    implementation, images, granularity, size, stride, dilation, fill, dtype, seed
):
    mask = make_mask(images, granularity, size, stride, fill, dtype, seed)
    actual = implementation(mask, granularity, size, stride, dilation)
    assert_same(actual, adjoint(mask, granularity, size, stride, dilation))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@settings(max_examples=scaled(200), deadline=None, derandomize=True)
@given(**GEOMETRY)
def test_equals_the_training_path(dilation, images, granularity, size, stride, fill, seed):
    mask = make_mask(images, granularity, size, stride, fill, seed=seed)
    actual = ops.dilate_mask(mask, granularity, size, stride, dilation)
    assert_same(actual, training_path(mask, granularity, size, stride, dilation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_patch_by_hand(implementation):
    # 5x5 input, stride 2 -> 3x3 outputs, S=2 -> 2x2 ragged patches. The top right patch keeps
    # outputs (0, 2) and (1, 2), at input positions (0, 4) and (2, 4).
    mask = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    halo, counts = implementation(mask, 2, (5, 5), 2, 1)
    expected = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    expected[:, :, :4, 3:] = True
    assert_same((halo, counts), (expected, torch.tensor([[2, 8]])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation):
    halo, counts = implementation(torch.zeros(0, 1, 2, 3), 4, (8, 12), 1, 1)
    assert halo.shape == (0, 1, 8, 12) and counts.shape == (0, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_are_thresholded(implementation):
    mask = torch.tensor([0.5, 0.51, float("nan"), -1.0, float("inf")]).view(5, 1, 1, 1)
    halo, counts = implementation(mask, 7, (3, 4), 1, 1)
    assert counts.tolist() == [[0, 0], [12, 12], [0, 0], [0, 0], [12, 12]]
    assert halo.sum((1, 2, 3)).tolist() == counts[:, 1].tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_arguments(implementation):
    mask = torch.ones(1, 1, 1, 1)
    _, counts = implementation(mask, 2**62, (6, 7), 1, 2**62)
    assert counts.tolist() == [[42, 42]]
    _, counts = implementation(mask, 2**62, (6, 7), 2**31, 1)
    assert counts.tolist() == [[1, 4]]


@needs_native
def test_strided_mask_and_many_threads():
    mask = make_mask(16, 4, (200, 336), 1).expand(-1, 2, -1, -1)[:, 1:].flip(0)
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        actual = ops.dilate_mask(mask, 4, (200, 336), 1, 2)
    finally:
        torch.set_num_threads(threads)
    assert_same(actual, masks._dilate_mask_reference(mask, 4, (200, 336), 1, 2))


@pytest.mark.parametrize(
    "named, changes",
    [
        ("mask must have shape", {"mask": torch.ones(1, 2, 2)}),
        ("mask must have shape", {"mask": torch.ones(1, 2, 2, 2)}),
        ("mask must be bool, uint8 or floating", {"mask": torch.ones(1, 1, 2, 2).long()}),
        ("mask must be bool, uint8 or floating", {"mask": torch.ones(1, 1, 2, 2) + 0j}),
        ("mask must cover 8x8 outputs with a grid of 2x2", {"mask": torch.ones(1, 1, 2, 1)}),
        ("mask must cover 8x8 outputs with a grid of 2x2", {"mask": torch.ones(1, 1, 3, 2)}),
        ("mask must cover 4x4 outputs with a grid of 1x1", {"stride": 2}),
        ("granularity must be positive, got 0", {"granularity": 0}),
        ("size must be a positive .height, width.", {"size": (8, 0)}),
        ("size must be a positive .height, width.", {"size": (8,)}),
        ("size must be a positive .height, width.", {"size": (8, 8, 8)}),
        ("stride must be positive, got -1", {"stride": -1}),
        ("dilation must be positive, got 0", {"dilation": 0}),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_errors_name_the_argument(implementation, named, changes):
    arguments = dict(mask=torch.ones(1, 1, 2, 2), granularity=4, size=(8, 8), stride=1, dilation=1)
    arguments.update(changes)
    with pytest.raises(ValueError, match=named):
        implementation(**arguments)


@needs.OPCHECK
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("stride, dilation", [(1, 2), (2, 1)])
def test_opcheck(stride, dilation, requires_grad):
    mask = make_mask(2, 4, (13, 18), stride).requires_grad_(requires_grad)
    torch.library.opcheck(OP, (mask, 4, (13, 18), stride, dilation))
    halo, counts = ops.dilate_mask(mask, 4, (13, 18), stride, dilation)
    assert not halo.requires_grad and not counts.requires_grad


@needs.ONE_DYNAMIC_GRAPH
def test_compile_sees_one_graph_for_all_sizes():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def block(x):
        coarse = F.avg_pool2d(x, 4, 4, ceil_mode=True) > 0
        return ops.dilate_mask(coarse, 4, x.shape[-2:])

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for size in [(9, 14), (17, 22), (30, 11)]:
        x = torch.randn(2, 1, *size)
        assert_same(compiled(x), block(x))
    assert len(graphs) == 1
    assert any("dilate_mask" in str(node.target) for node in graphs[0].graph.nodes)
    x = torch.randn(1, 1, 9, 9, requires_grad=True)
    assert_same(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_native_kernel_takes_precedence():
    dump = torch._C._dispatch_dump("las_mm::dilate_mask")
    assert "CompositeExplicitAutograd[alias]" in dump
    assert ("\nCPU: " in dump) == ops.native_available()


@needs_native
def test_extension_loaded_before_the_schema():
    code = (
        "import torch, las_mm._C, sys; assert 'las_mm.ops' not in sys.modules\n"
        "from las_mm import ops\n"
        "halo, counts = ops.dilate_mask(torch.ones(1, 1, 1, 1), 4, (3, 3))\n"
        "assert ops.native_available() and counts.tolist() == [[9, 9]]\n"
        "assert '\\nCPU: ' in torch._C._dispatch_dump('las_mm::dilate_mask')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_says_how_to_build_when_not_built(monkeypatch):
    logged = []
    monkeypatch.setattr(library, "print_log", lambda message, **_: logged.append(message))
    monkeypatch.setitem(sys.modules, "las_mm._C", None)
    assert library.load_native() is False
    assert len(logged) == 1 and "pip install -e . --no-build-isolation" in logged[0]


def test_says_why_when_built_but_broken(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at4nope")

    logged = []
    monkeypatch.setattr(library, "print_log", lambda message, **_: logged.append(message))
    monkeypatch.setattr(importlib, "import_module", broken)
    assert library.load_native() is False
    assert len(logged) == 1 and "undefined symbol: _ZN2at4nope" in logged[0]
