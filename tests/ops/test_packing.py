"""Packed weights: their documented order, its inverse and the Winograd transform."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import needs
from las_mm import ops
from las_mm.ops import packing

from .cases import Untouched, for_all, make_kernel, scaled

DTYPES = [torch.float32, torch.bfloat16]


@st.composite
def kernels(draw):
    """A weight (O, I, kh, kw) and its groups."""
    groups = draw(st.sampled_from([1, 1, 2, 4, 9]))
    out = groups * draw(st.sampled_from([1, 2, 3, 15, 16, 17, 40, 64, 65, 130]))
    shape = (
        out,
        draw(st.sampled_from([1, 2, 3, 8, 33])),
        *draw(st.tuples(*[st.integers(1, 3)] * 2)),
    )
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    weight = values.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, groups


def in_documented_order(weight, groups):
    """group, panel of 64 outputs, tap, input (or pair of inputs), output (of the pair)."""
    out, depth = weight.shape[0] // groups, weight.shape[1]
    taps = weight.flatten(2)
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    zero, packed = weight.new_zeros(()), []
    for group in range(groups):
        for panel in range(0, out, 64):
            columns = range(panel, min(panel + 64, -(-out // 16) * 16))
            for tap in range(taps.shape[2]):
                for first in range(0, depth, pair):
                    for column in columns:
                        for k in range(first, first + pair):
                            real = column < out and k < depth
                            packed.append(taps[group * out + column, k, tap] if real else zero)
    return torch.stack(packed)


SHAPES = [(3, 3, 1, 2), (70, 3, 1, 1), (34, 1, 3, 2), (18, 2, 3, 1), (130, 3, 1, 1)]


@for_all(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), 20, "pack_conv")
def test_order_by_hand(call, case):
    (out, depth, kernel, groups), dtype = case
    weight = torch.randn(out - out % groups, depth, kernel, kernel).to(dtype)
    packed = call("pack_conv", weight, groups)
    assert torch.equal(packed, in_documented_order(weight, groups))


@for_all(kernels(), 200, "pack_conv")
def test_unpack_inverts_pack(call, case):
    weight, groups = case
    out, depth, height, width = weight.shape
    untouched = Untouched(weight)
    packed = call("pack_conv", weight, groups)
    untouched.check()
    taps = height * width
    assert packed.dim() == 1 and packed.is_contiguous() and packed.dtype == weight.dtype
    assert packed.numel() == packing.packed_numel(out, depth, taps, groups, weight.dtype)
    unpacked = packing.unpack_conv(packed, out, depth, taps, groups)
    assert torch.equal(unpacked, weight.flatten(2))
    total = packed.double().abs().sum()  # all else is zero
    torch.testing.assert_close(total, weight.double().abs().sum())
    assert torch.equal(packed, packing._pack_conv_reference(weight, groups))


@settings(max_examples=scaled(30), deadline=None, derandomize=True)
@given(st.sampled_from([1, 3, 16, 40, 72]), st.sampled_from([1, 3, 16, 40]), st.integers(0, 99))
def test_winograd_weight_convolves(out, depth, seed):
    # arXiv 1509.09308, equation 8, for one 4x4 tile: Y = A^T [(G g G^T) * (B^T d B)] A.
    generator = torch.Generator().manual_seed(seed)
    weight = make_kernel(generator, out, depth, 3, torch.float32)
    tile = torch.randn(1, depth, 4, 4, generator=generator, dtype=torch.float64)
    packed = ops.pack_winograd(weight)
    assert packed.numel() == packing.packed_numel(out, depth, 16, 1, torch.float32)
    u = packing.unpack_conv(packed, out, depth, 16, 1).view(out, depth, 4, 4).double()
    b = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double()
    a = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]]).double()
    product = (u * (b @ tile @ b.T)).sum(1)
    expected = F.conv2d(tile, weight.double())[0]
    torch.testing.assert_close(a @ product @ a.T, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c_in, c_out", [(3, 64), (1, 5), (4, 72)])
def test_stem_rows_are_runs_of_memory(c_in, c_out, dtype):
    weight = torch.randn(c_out, c_in, 7, 7).to(dtype)
    packed = ops.pack_stem(weight)
    rows = packing.unpack_conv(packed, c_out, 7 * c_in, 7, 1)
    for y in range(7):
        for x in range(7):
            for c in range(c_in):
                assert torch.equal(rows[:, x * c_in + c, y], weight[:, c, y, x])


@pytest.mark.parametrize(
    "pack, weight, arguments, named",
    [
        (ops.pack_conv, torch.ones(4, 4, 3), (), "weight must have shape"),
        (ops.pack_conv, torch.ones(4, 0, 3, 3), (), "weight must have shape"),
        (ops.pack_conv, torch.ones(4, 4, 3, 3).double(), (), "weight must be float32 or bfloat16"),
        (ops.pack_conv, torch.ones(4, 4, 3, 3).half(), (), "weight must be float32 or bfloat16"),
        (ops.pack_conv, torch.ones(4, 4, 3, 3), (0,), "groups must be positive"),
        (ops.pack_conv, torch.ones(4, 4, 3, 3), (-2,), "groups must be positive"),
        (ops.pack_conv, torch.ones(4, 4, 3, 3), (3,), "groups must .* divide 4"),
        (ops.pack_winograd, torch.ones(4, 4, 1, 1), (), "weight must be float32"),
        (ops.pack_winograd, torch.ones(4, 4, 3, 3).bfloat16(), (), "weight must be float32"),
        (ops.pack_winograd, torch.ones(4, 4, 9), (), "weight must be float32"),
        (ops.pack_stem, torch.ones(4, 4, 49), (), "weight must have shape"),
        (ops.pack_stem, torch.ones(4, 4, 7, 7).double(), (), "weight must be float32 or bfloat16"),
    ],
)
def test_errors_name_the_argument(pack, weight, arguments, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        pack(weight, *arguments)


@needs.OPCHECK
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, groups", [((5, 3, 3, 3), 1), ((72, 1, 3, 3), 72), ((70, 8, 1, 1), 2)]
)
def test_opcheck(shape, groups, dtype):
    torch.library.opcheck(
        torch.ops.las_mm.pack_conv.default, (torch.randn(shape).to(dtype), groups)
    )
