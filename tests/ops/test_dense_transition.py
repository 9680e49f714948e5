"""``dense_transition_`` against its definition in float64, on drawn cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import needs
from las_mm import ops

from . import cases
from .cases import Untouched, assert_close, for_all, make_bias, make_kernel
from .test_sparse_errors import (
    BIAS,
    MAP,
    PACKED,
    as_bfloat16,
    check_error,
    drop_last,
    item,
    one_image_less,
    repeat_last,
    rows,
)


def draw(images, size, c_in, c_out, room, layout, dtype, seed):
    """Arguments of the op, and what it is to write."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, c_in + room, *size, generator=generator).to(dtype)
    kernel = make_kernel(generator, c_out, c_in, 1, dtype)
    vectors = [1 + make_bias(generator, c_in), *(make_bias(generator, n) for n in (c_in, c_out))]
    scale, shift, bias = (vector.double()[:, None, None] for vector in vectors)
    pooled = F.avg_pool2d((x[:, :c_in].double() * scale + shift).relu(), 2)
    expected = F.conv2d(pooled, kernel.double()) + bias
    out = torch.full((images, c_out + room, size[0] // 2, size[1] // 2), cases.GUARD, dtype=dtype)
    x, out = cases.stored(x, layout), cases.stored(out, layout)
    return [out, x, ops.pack_conv(kernel), vectors], kernel, expected


CASES = st.tuples(
    st.integers(0, 4),
    st.tuples(st.integers(2, 25), st.integers(2, 25)),
    st.sampled_from(cases.CHANNELS),
    st.sampled_from(cases.CHANNELS),
    st.sampled_from([0, 5, 32]),
    st.sampled_from([*cases.DENSE, "channels_last", *cases.VIEWS]),
    st.sampled_from(cases.DTYPES),
    cases.SEEDS,
)
ONE = (2, (9, 8), 8, 12, 4, "channels_last", torch.float32, 0)


@for_all(st.tuples(CASES, st.integers(1, 2)), 200, "dense_transition_")
def test_transition_equals_its_definition(call, case):
    (out, x, weight, vectors), _, expected = draw(*case[0])
    written = out[:, : expected.shape[1]]
    untouched = Untouched(x, weight, *vectors, output=written)
    with cases.threads(case[1]):
        assert call("dense_transition_", out, x, weight, vectors) is None
    untouched.check()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert_close(written, expected, scale, x.dtype)


@cases.implementations("dense_transition_")
def test_nan_stays_where_it_is(implementation):
    (out, x, weight, vectors), *_ = draw(*ONE)
    x[1, 3, 5, 2] = math.nan
    cases.implementation_of(implementation)("dense_transition_", out, x, weight, vectors)
    assert out[1, :12, 2, 1].isnan().all() and out.isnan().sum() == 12


def test_public_functions():
    (out, x, _, vectors), kernel, expected = draw(*ONE)
    assert ops.dense_transition_(out, x, ops.pack_dense_transition(kernel, vectors)) is out
    assert_close(out[:, :12], expected, expected.abs().max().item(), torch.float32)


def arguments():
    return dict(zip(("out", "buffer", "weight", "vectors"), draw(*ONE)[0]))


def error_rows():
    a = arguments
    table = [*rows(a, "buffer", MAP), *rows(a, "out", MAP), *rows(a, "weight", PACKED)]
    table += rows(a, "out", [(one_image_less, "{} must have 2 images of 4x4")])
    table += rows(a, "out", [(as_bfloat16, "{} must be (torch.float32|Float)")])
    table += rows(a, "out", [(lambda out: out[:, :11], "{} must have room for 12 channels")])
    table += rows(a, "buffer", [(lambda x: x[:, :7], "{} must have 8 channels or more")])
    table += rows(a, "vectors", [(c, "{} must be scale, shift") for c in (drop_last, repeat_last)])
    for i in range(3):
        table += rows(a, "vectors", [(item(i, c), t) for c, t in BIAS[:3]], rf"vectors\[{i}\]")
    return [pytest.param(*row, id=f"{row[1]}-{i}") for i, row in enumerate(table)]


@pytest.mark.parametrize("build, argument, change, pattern", error_rows())
@cases.implementations("dense_transition_")
def test_errors_name_the_argument(implementation, build, argument, change, pattern):
    values = build()
    values[argument] = change(values[argument])
    check_error(cases.implementation_of(implementation), "dense_transition_", values, pattern)


@needs.OPCHECK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    values, *_ = draw(*ONE[:-2], dtype, 0)
    torch.library.opcheck(torch.ops.las_mm.dense_transition_.default, tuple(values))


@needs.FLOPS
def test_flops_are_those_after_the_mean():
    values, *_ = draw(*ONE)
    with FlopCounterMode(display=False) as counter:
        torch.ops.las_mm.dense_transition_(*values)
    assert counter.get_total_flops() == 2 * 2 * 4 * 4 * 8 * 12
