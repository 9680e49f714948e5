"""``packed_conv2d`` against its definition in float64, on drawn cases."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import needs
from las_mm import ops

from . import cases
from .cases import Untouched, assert_close, for_all, make_bias, make_kernel
from .test_sparse_errors import BIAS, MAP, PACKED, check_error, rows


def draw(images, size, c_in, c_out, kernel, stride, dilation, winograd, relu, layout, dtype, seed):
    """Arguments of the op, and what it is to return."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, c_in, *size, generator=generator).to(dtype)
    weight = make_kernel(generator, c_out, c_in, kernel, dtype)
    bias = make_bias(generator, c_out)
    padding = min(dilation, max(size)) * (kernel // 2)
    reach = min(dilation, max(size))
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, reach)
    pack = ops.pack_conv2d(weight, bias, stride, dilation, winograd=winograd)
    return [cases.stored(x, layout), *pack, relu], expected.relu() if relu else expected


CASES = st.tuples(
    st.integers(0, 4),
    st.tuples(st.integers(1, 25), st.integers(1, 25)),
    st.sampled_from(cases.CHANNELS),
    st.sampled_from(cases.CHANNELS),
    st.sampled_from([1, 3]),
    st.integers(1, 3),
    st.sampled_from([1, 1, 1, 2, 30]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([*cases.DENSE, "channels_last", *cases.VIEWS]),
    st.sampled_from(cases.DTYPES),
    cases.SEEDS,
)
ONE = (2, (9, 8), 8, 12, 3, 1, 1, True, True, "channels_last", torch.float32, 0)


@for_all(st.tuples(CASES, st.integers(1, 2)), 300, "packed_conv2d")
def test_equals_its_definition(call, case):
    values, expected = draw(*case[0])
    untouched = Untouched(*values[:4])
    with cases.threads(case[1]):
        out = call("packed_conv2d", *values)
    untouched.check()
    assert out.is_contiguous(memory_format=torch.channels_last)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert_close(out, expected, scale, values[0].dtype)


@pytest.mark.parametrize("kernel, tiled", [(1, False), (3, True)])
def test_public_functions(kernel, tiled):
    weight = torch.randn(5, 4, kernel, kernel)
    pack = ops.pack_conv2d(weight)
    assert (pack.winograd.numel() > 0, pack.weight.numel() > 0) == (tiled, not tiled)
    x = torch.randn(2, 4, 6, 7)
    expected = F.conv2d(x, weight, padding=kernel // 2)
    torch.testing.assert_close(ops.packed_conv2d(x, pack), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        ops.packed_conv2d(x, pack, relu=True), expected.relu(), atol=1e-4, rtol=1e-4
    )


def test_a_kernel_of_another_size():
    with pytest.raises(ValueError, match=r"kernel must have shape .* \[4, 4, 5, 5\]"):
        ops.pack_conv2d(torch.zeros(4, 4, 5, 5))


NAMES = ("x", "weight", "winograd", "bias", "kernel", "stride", "dilation", "relu")


def arguments(winograd):
    return lambda: dict(zip(NAMES, draw(*ONE[:7], winograd, *ONE[8:])[0]))


def error_rows():
    direct, tiled = arguments(False), arguments(True)
    table = [*rows(direct, "x", MAP), *rows(direct, "bias", BIAS[:3])]
    table += rows(direct, "weight", PACKED, r"weights\[0\]")
    table += rows(tiled, "winograd", PACKED, r"winograd\[0\]")
    table += rows(direct, "kernel", [(lambda _: 5, "{} must be 1 or 3, got 5")])
    table += rows(direct, "stride", [(lambda _: 0, "{} must be")])
    table += rows(direct, "dilation", [(lambda _: 0, "{} must be positive, got 0")])
    table += rows(tiled, "stride", [(lambda _: 2, r"winograd\[0\] must be empty unless")])
    table += rows(tiled, "kernel", [(lambda _: 1, r"winograd\[0\] must be empty for a 1x1")])
    return [pytest.param(*row, id=f"{row[1]}-{i}") for i, row in enumerate(table)]


@pytest.mark.parametrize("build, argument, change, pattern", error_rows())
@cases.implementations("packed_conv2d")
def test_errors_name_the_argument(implementation, build, argument, change, pattern):
    values = build()
    values[argument] = change(values[argument])
    check_error(cases.implementation_of(implementation), "packed_conv2d", values, pattern)


@needs.OPCHECK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    values, _ = draw(*ONE[:-2], dtype, 0)
    torch.library.opcheck(torch.ops.las_mm.packed_conv2d.default, tuple(values))


@needs.FLOPS
def test_flops():
    values, _ = draw(*ONE)
    with FlopCounterMode(display=False) as counter:
        torch.ops.las_mm.packed_conv2d(*values)
    assert counter.get_total_flops() == 2 * 2 * 9 * 8 * 9 * 8 * 12
