"""The sparse ops against masked-dense convolutions in float64, on drawn cases of all kinds.

Every test runs the reference implementation and, where it is built, the native kernel.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import needs
from las_mm import ops

from . import cases
from .cases import (
    Untouched,
    assert_close,
    for_all,
    make_bias,
    make_kernel,
    needs_native,
    out_size,
    same_bits,
)

CHANNELS_LAST = torch.channels_last
HERE = Path(__file__).resolve()


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """at::empty returns NaN, so that an output position that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# sparse_bottleneck -------------------------------------------------------------------------------


def check_bottleneck(call, block):
    x = block.x
    expected, scale = block.expected(x)
    untouched = Untouched(x, *block.inputs)
    with cases.threads(block.threads):
        actual = call("sparse_bottleneck", x, *block.arguments)
    untouched.check()
    assert_close(actual, expected, scale, block.dtype)
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)
    if not block.downsample and not block.poison:  # dropped outputs are exact
        dropped = ~block.kept.expand_as(x)
        assert torch.equal(actual[dropped], x.relu()[dropped])


@for_all(cases.blocks(), 1000, "sparse_bottleneck")
def test_bottleneck_equals_masked_dense(call, block):
    check_bottleneck(call, block)


@for_all(cases.blocks(in_place=True), 300, "sparse_bottleneck_", "sparse_bottleneck")
def test_bottleneck_in_place(call, block):
    features = block.x
    # Dense convolutions rely on x being the output of a ReLU also where it is dropped.
    positive = features.abs_() if block.seed % 2 or block.dense else features
    expected, scale = block.expected(positive)
    dropped = ~block.kept.expand_as(positive)
    before = positive.clone()
    untouched = Untouched(*block.inputs, output=positive)
    with cases.threads(block.threads):
        functional = call("sparse_bottleneck", before, *block.arguments)
        assert call("sparse_bottleneck_", positive, *block.arguments) is None
    untouched.check()
    assert same_bits(positive[dropped], before[dropped])  # negative or NaN as they may be
    kept = torch.where(dropped, torch.nan, expected)
    assert_close(positive, kept, scale, block.dtype)
    assert_close(positive, functional.double().where(~dropped, torch.nan), scale, block.dtype)


@st.composite
def tall_blocks(draw):
    """A few blocks with many channels or pixels, beyond one tile of work in every direction."""
    block = draw(cases.blocks())
    width = draw(st.sampled_from([128, 200]))
    size = draw(st.sampled_from([(40, 7), (5, 61), (30, 33)]))
    return replace(block, channels=(block.channels[0], width, block.channels[2]), size=size)


@for_all(tall_blocks(), 40, "sparse_bottleneck")
def test_bottleneck_beyond_one_tile(call, block):
    if block.channels[1] % block.groups:
        block = replace(block, groups=1)
    check_bottleneck(call, block)


@st.composite
def batches(draw):
    """Blocks with enough images for each thread to compute its own ones."""
    block = draw(cases.blocks())
    size = draw(st.sampled_from([(24, 17), (12, 13), (5, 6)]))
    return replace(block, images=draw(st.integers(4, 9)), size=size)


@for_all(batches(), 100, "sparse_bottleneck")
def test_bottleneck_of_many_images(call, block):
    check_bottleneck(call, block)


@cases.needs_native("sparse_bottleneck")
@pytest.mark.parametrize("images", [2, 4, 7, 8])
@pytest.mark.parametrize("uneven", [False, True])
def test_images_do_not_depend_on_their_batch(images, uneven):
    """Whether threads take whole images, groups of them or parts of all, nothing changes."""
    block = cases.Block(images, (16, 18), (24, 16, 24), 4, winograd="only")
    call = cases.implementation_of("native")
    x, (mask, *rest) = block.x, block.arguments
    if uneven:
        mask = mask.clone()
        mask[1:] = False
    apart = [call("sparse_bottleneck", x[[n]], mask[[n]], *rest) for n in range(images)]
    for threads in (1, 2, 3):
        with cases.threads(threads):
            together = call("sparse_bottleneck", x, mask, *rest)
        assert torch.equal(together, torch.cat(apart))


@cases.implementations("sparse_bottleneck", "sparse_bottleneck_")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images(implementation, dtype):
    call = cases.implementation_of(implementation)
    winograd = "both" if dtype == torch.float32 else "none"
    block = cases.Block(0, (5, 6), (8, 4, 8), dtype=dtype, winograd=winograd)
    assert call("sparse_bottleneck", block.x, *block.arguments).shape == (0, 8, 5, 6)
    call("sparse_bottleneck_", block.x, *block.arguments)


@cases.implementations("masker_conv1x1", "gather_conv3x3", "conv1x1_scatter_add_")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images_unfused(implementation, dtype):
    call = cases.implementation_of(implementation)
    block = cases.Block(0, (5, 6), (8, 4, 8), dtype=dtype)
    masker, weights, biases = make_masker(block, "none"), block.weights, block.biases
    mask, rates = call("spatial_mask", block.x, *masker, 3, (1, 1), 1)
    assert mask.shape == (0, 1, 2, 2) and rates.isfinite().all()
    _, _, hidden = call("masker_conv1x1", block.x, *masker, weights[0], biases[0], 3, (1, 1), 1)
    assert hidden.shape == (0, 4, 5, 6)
    out = call("gather_conv3x3", hidden, mask, weights[1], biases[1], 3, 1, 1, 1)
    assert out.shape == (0, 4, 5, 6)
    call("conv1x1_scatter_add_", block.x, out, mask, weights[2], biases[2], 3)


@cases.implementations("conv_pool_stem")
def test_no_images_in_the_stem(implementation):
    call = cases.implementation_of(implementation)
    weight = ops.pack_stem(torch.randn(8, 3, 7, 7))
    assert call("conv_pool_stem", torch.randn(0, 3, 9, 9), weight, torch.zeros(8)).shape == (
        (0, 8, 3, 3)
    )


def test_public_functions():
    block = cases.Block(2, (9, 11), (16, 8, 24), strides=(2, 1), downsample=True, winograd="both")
    pack = ops.pack_bottleneck(block.kernels, block.biases, (2, 1), dense=True, winograd_cost=0.5)
    assert pack.winograd is not None and pack.winograd_cost == 0.5
    assert all(map(torch.equal, pack.weights, block.weights))
    assert all(map(torch.equal, pack.dense, block.kernels))
    actual = ops.sparse_bottleneck(block.x, block.mask, pack, 3, block.shortcut)
    assert_close(actual, *block.expected(block.x), torch.float32)
    block = cases.Block(2, (9, 11), (16, 8, 16), groups=2, dilation=2)
    x = block.x.abs()
    expected, scale = block.expected(x)
    pack = ops.pack_bottleneck(block.kernels, block.biases, dilation=2, groups=2)
    assert pack.winograd is None and pack.dense is None
    assert ops.sparse_bottleneck_(x, block.mask, pack, granularity=3) is x
    assert_close(x, expected, scale, torch.float32)


@pytest.mark.parametrize(
    "changes, winograd, direct",
    [
        ({}, True, True),
        ({"direct": False}, True, False),
        ({"winograd": False, "direct": False}, False, True),
        ({"strides": (1, 2), "direct": False}, False, True),
        ({"dilation": 2, "direct": False}, False, True),
        ({"excitation": [], "direct": False}, False, True),
    ],
)
def test_packs_of_bottlenecks_have_the_forms_that_there_are(changes, winograd, direct):
    block = cases.Block(1, (4, 4), (16, 8, 16))
    pack = ops.pack_bottleneck(block.kernels, block.biases, **changes)
    assert (pack.winograd is not None) == winograd
    assert bool(pack.weights[1].numel()) == direct


# The three ops of the paper ----------------------------------------------------------------------


def scores(x, weight, bias, offset, granularity, strides):
    """logit 0 - logit 1 by the masker's definition, in float64, and the scale of its terms."""
    x, weight, bias = x.double(), weight.double().view(2, -1), bias.double()
    patch = min(granularity, max(x.shape)) * strides[0] * strides[1]
    rows, columns = (
        F.one_hot(torch.arange(n) // patch, cases.ceil_div(n, patch)).double() for n in x.shape[2:]
    )
    area = rows.sum(0)[:, None] * columns.sum(0)
    pooled, magnitude = (
        torch.einsum("nchw,hi,wj->ncij", t, rows, columns) / area for t in (x, x.abs())
    )
    logits = torch.einsum("ncij,oc->noij", pooled, weight) + bias[:, None, None]
    scale = torch.einsum("ncij,oc->nij", magnitude, weight.abs())[:, None] + bias.abs().sum()
    keep = logits[:, :1] - logits[:, 1:]
    if offset is not None:
        keep = keep + offset.double()
        scale = scale + offset.abs().nan_to_num(posinf=0).double()
    return keep, scale


def make_masker(block, offset_kind, force=False):
    """Weights and offset of a masker that keeps some and drops some patches."""
    generator, channels = block.generator, block.channels[0]
    weight = make_kernel(generator, 2, channels, 1, block.dtype)
    bias = (0.1 * make_bias(generator, 2)).to(block.dtype)
    grid = out_size(block.out_size, block.granularity)
    if offset_kind == "none":
        return weight, bias, None
    images = block.images if offset_kind == "per image" else 1
    offset = 0.2 * torch.randn(images, 1, *grid, generator=generator)
    if force:  # infinite values force the decision
        forced = torch.rand(offset.shape, generator=generator)
        offset = offset.masked_fill(forced < 0.2, -torch.inf).masked_fill(forced > 0.8, torch.inf)
    return weight, bias, strided_map(offset) if block.mask_view else offset


def strided_map(x):
    return torch.stack([x, torch.full_like(x, cases.GUARD)], -1)[..., 0]


def check_decisions(x, block, masker, mask, rates):
    """Mask and rates against the definition; a decision that rounding may turn is free."""
    keep, scale = scores(x, *masker, block.granularity, block.strides)
    assert mask.dtype == torch.bool and mask.shape == keep.shape
    clear = keep.abs() > 1e-4 * scale
    assert torch.equal(mask[clear], (keep >= 0)[clear])
    size = out_size(block.size, block.strides[0])
    kept = cases.expand(mask, block.out_size, block.granularity)
    halo = cases.read_by(kept, size, block.strides[1], block.dilation)
    expected = torch.stack([kept.double().mean(), halo.double().mean()])
    assert rates.dtype == torch.float32 and rates.shape == (2,)
    assert (rates.double() - expected).abs().max() <= 1e-6
    return halo


MASKERS = st.tuples(
    cases.blocks(), st.sampled_from(["none", "per image", "broadcast"]), st.booleans()
)


@for_all(MASKERS, 300, "spatial_mask")
def test_spatial_mask(call, case):
    block, *offset_kind = case
    block = replace(block, poison=False)
    x, masker = block.x, make_masker(block, *offset_kind)
    untouched = Untouched(x, *masker)
    with cases.threads(block.threads):
        arguments = (x, *masker, block.granularity, block.strides, block.dilation)
        mask, rates = call("spatial_mask", *arguments)
        assert torch.equal(call("patch_mask", *arguments), mask)
    untouched.check()
    check_decisions(x, block, masker, mask, rates)


@for_all(MASKERS, 200, "masker_conv1x1")
def test_masker_conv1x1(call, case):
    block, *offset_kind = case
    block = replace(block, poison=False)
    x, masker = block.x, make_masker(block, *offset_kind)
    weight, bias, kernel = block.weights[0], block.biases[0], block.kernels[0]
    untouched = Untouched(x, *masker, weight, bias)
    with cases.threads(block.threads):
        mask, rates, hidden = call(
            "masker_conv1x1",
            x,
            *masker,
            weight,
            bias,
            block.granularity,
            block.strides,
            block.dilation,
        )
    untouched.check()
    halo = check_decisions(x, block, masker, mask, rates)
    dense = F.conv2d(x.double(), kernel.double(), bias.double(), block.strides[0])
    expected = torch.where(halo, dense.relu(), 0.0)
    assert_close(hidden, expected, dense.abs().max().item(), block.dtype)
    assert not hidden[~halo.expand_as(hidden)].any()
    assert hidden.is_contiguous(memory_format=CHANNELS_LAST)


@for_all(st.tuples(cases.blocks(), st.booleans()), 300, "gather_conv3x3")
def test_gather_conv3x3(call, case):
    block, widen = case
    block = replace(block, mask_kind=block.mask_kind or "0.5")
    stride, groups = block.strides[1], block.groups
    width, size = block.channels[1], out_size(block.size, block.strides[0])
    hidden = block.features(width, size, block.layout)
    c_out = 2 * width if widen else width
    kernel = make_kernel(block.generator, c_out, width // groups, 3, block.dtype)
    bias = make_bias(block.generator, c_out)
    weight = ops.pack_conv(kernel, groups)
    if block.strided_parameters:
        weight, bias = cases.strided(weight), cases.strided(bias)
    arguments = (hidden, block.mask, weight, bias, block.granularity, stride)
    untouched = Untouched(hidden, block.mask, weight, bias)
    with cases.threads(block.threads):
        actual = call("gather_conv3x3", *arguments, block.dilation, groups)
    untouched.check()
    dilation = block.dilation
    dense = F.conv2d(
        hidden.double(), kernel.double(), bias.double(), stride, dilation, dilation, groups
    )
    expected = torch.where(block.kept, dense.relu(), 0.0)
    assert_close(actual, expected, dense.abs().max().item(), block.dtype)
    assert not actual[~block.kept.expand_as(actual)].any()
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)


SCATTERS = st.tuples(cases.blocks(plain=True), st.sampled_from(cases.VIEWS))


@for_all(SCATTERS, 250, "conv1x1_scatter_add_")
def test_conv1x1_scatter_add(call, case):
    block, layout = case
    c_out, width, _ = block.channels
    x = block.features(width, block.size, block.layout)
    residual = block.features(c_out, block.size, layout if block.seed % 2 else block.layout)
    weight, bias, kernel = block.weights[2], block.biases[2], block.kernels[2]
    branch = F.conv2d(x.double(), kernel.double(), bias.double())
    before = residual.clone()
    expected = torch.where(block.kept, (before + branch).relu(), before.double())
    scale = max(branch.abs().max().item(), before.abs().max().item())
    untouched = Untouched(x, block.mask, weight, bias, output=residual)
    with cases.threads(block.threads):
        call("conv1x1_scatter_add_", residual, x, block.mask, weight, bias, block.granularity)
    untouched.check()
    assert_close(residual, expected, scale, block.dtype)
    dropped = ~block.kept.expand_as(residual)
    assert torch.equal(residual[dropped], before[dropped])


UNFUSED = ("masker_conv1x1", "gather_conv3x3", "conv1x1_scatter_add_")


@for_all(cases.blocks(plain=True), 150, *UNFUSED, "sparse_bottleneck", "sparse_bottleneck_")
def test_composition_equals_the_bottleneck(call, block):
    block = replace(block, poison=False)
    if block.winograd == "only":
        block = replace(block, winograd="both")
    x = block.x.abs_()
    grid = out_size(block.size, block.granularity)
    offset = torch.full((block.images, 1, *grid), -torch.inf)
    offset[cases.expand(block.mask, grid, 1)] = torch.inf  # the masker obeys the drawn mask
    weights, biases = block.weights, block.biases
    granularity, strides, dilation, groups = block.args
    with cases.threads(block.threads):
        mask, _, hidden = call(
            "masker_conv1x1",
            x,
            make_kernel(block.generator, 2, x.shape[1], 1, block.dtype),
            torch.zeros(2, dtype=block.dtype),
            offset,
            weights[0],
            biases[0],
            granularity,
            strides,
            dilation,
        )
        assert torch.equal(mask, cases.expand(block.mask, grid, 1))
        middle = call(
            "gather_conv3x3", hidden, mask, weights[1], biases[1], granularity, 1, dilation, groups
        )
        composed, updated = x.clone(), x.clone()
        call("conv1x1_scatter_add_", composed, middle, mask, weights[2], biases[2], granularity)
        fused = call("sparse_bottleneck", x, *block.arguments)
        call("sparse_bottleneck_", updated, *block.arguments)
    _, scale = block.expected(x)
    assert_close(composed, fused.double(), scale, block.dtype)
    assert_close(updated, fused.double(), scale, block.dtype)


# The stem ----------------------------------------------------------------------------------------

STEMS = st.tuples(
    cases.blocks(),
    st.sampled_from([1, 3, 3, 3, 4]),
    st.sampled_from([1, 8, 24, 32, 64, 72]),
    st.tuples(st.integers(1, 45), st.integers(1, 45)),
)


@for_all(STEMS, 150, "conv_pool_stem")
def test_conv_pool_stem(call, case):
    block, c_in, c_out, size = case
    x = block.features(c_in, size, block.layout)
    kernel = make_kernel(block.generator, c_out, c_in, 7, block.dtype)
    weight, bias = ops.pack_stem(kernel), make_bias(block.generator, c_out)
    if block.strided_parameters:
        weight, bias = cases.strided(weight), cases.strided(bias)
    untouched = Untouched(x, weight, bias)
    with cases.threads(block.threads):
        actual = call("conv_pool_stem", x, weight, bias)
    untouched.check()
    dense = F.conv2d(x.double(), kernel.double(), bias.double(), stride=2, padding=3)
    expected = F.max_pool2d(dense.relu(), 3, stride=2, padding=1)
    assert_close(actual, expected, dense.abs().max().item(), block.dtype)
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)


# Extremes ----------------------------------------------------------------------------------------


@cases.implementations("sparse_bottleneck", "spatial_mask", "gather_conv3x3")
@pytest.mark.parametrize("granularity", [ops.LAYER, 2**62, 2**63 - 1])
def test_huge_granularity_is_one_decision_per_image(implementation, granularity):
    call = cases.implementation_of(implementation)
    block = cases.Block(
        2, (7, 6), (8, 16, 24), granularity, strides=(2, 2), downsample=True, mask_kind="single"
    )
    assert block.mask.sum() == 1
    check_bottleneck(call, block)
    masker = make_masker(block, "none")
    mask, rates = call("spatial_mask", block.x, *masker, granularity, (2, 2), 1)
    check_decisions(block.x, block, masker, mask, rates)


MAX_STRIDE = 2**15


@cases.implementations("sparse_bottleneck", "spatial_mask", "masker_conv1x1", "gather_conv3x3")
@pytest.mark.parametrize("strides", [(2**31, 2**31), (2**62, 4), (1, 2**40), (1, MAX_STRIDE + 1)])
def test_huge_strides_raise(implementation, strides):
    call = cases.implementation_of(implementation)
    block = cases.Block(2, (7, 6), (8, 16, 24), 2**31, downsample=True)
    masker, geometry = make_masker(block, "none"), (2**31, strides, 1)
    weights, biases = block.weights, block.biases
    wrong = max(strides) if strides[0] == 1 else strides[0]
    with pytest.raises(ValueError, match=f"^strides must be 1 to {MAX_STRIDE}, got {wrong}"):
        call("spatial_mask", block.x, *masker, *geometry)
    with pytest.raises(ValueError, match=f"^strides must be 1 to {MAX_STRIDE}, got {wrong}"):
        call("masker_conv1x1", block.x, *masker, weights[0], biases[0], *geometry)
    with pytest.raises(ValueError, match=f"^strides must be 1 to {MAX_STRIDE}, got {wrong}"):
        call("sparse_bottleneck", block.x, *block.arguments[:5], *geometry, 1, 1.0)
    hidden = block.features(16, (7, 6), "contiguous")
    with pytest.raises(ValueError, match=f"^stride must be 1 to {MAX_STRIDE}, got {wrong}"):
        call("gather_conv3x3", hidden, block.mask, weights[1], biases[1], 2**31, wrong, 1, 1)


@cases.implementations("spatial_mask", "sparse_bottleneck")
@pytest.mark.parametrize("strides", [(MAX_STRIDE, MAX_STRIDE), (1, MAX_STRIDE), (MAX_STRIDE, 1)])
def test_greatest_strides_leave_one_output(implementation, strides):
    call = cases.implementation_of(implementation)
    block = cases.Block(2, (7, 6), (8, 16, 24), 2**31, "full", strides=strides, downsample=True)
    masker = make_masker(block, "per image")
    mask, _ = call("spatial_mask", block.x, *masker, 2**31, strides, 2**62)
    assert mask.shape == (2, 1, 1, 1)
    keep, _ = scores(block.x, *masker, 2**31, (7, 6))
    assert torch.equal(mask, keep >= 0)
    check_bottleneck(call, block)


@cases.implementations("sparse_bottleneck")
@pytest.mark.parametrize("dilation", [100, 2**31, 2**62])
def test_huge_dilation_with_dense_weights(implementation, dilation):
    call = cases.implementation_of(implementation)
    block = cases.Block(2, (7, 9), (8, 16, 8), mask_kind="full", dilation=9, dense_above=0.5)
    expected, scale = block.expected(block.x)
    far = (block.granularity, block.strides, dilation, *block.arguments[8:])
    actual = call("sparse_bottleneck", block.x, *block.arguments[:5], *far)
    assert_close(actual, expected, scale, torch.float32)


@needs_native("sparse_bottleneck")
@pytest.mark.parametrize("kept", [0, 9, 20, 36])
def test_dense_runs_above_the_given_share(kept):
    """The convolutions that run decide which weights matter."""
    block = cases.Block(1, (6, 6), (8, 8, 8), 1, dense_above=0.5)
    mask = (torch.arange(36) < kept).view(1, 1, 6, 6)
    arguments = list(block.arguments)
    arguments[0], arguments[10] = mask, [torch.zeros_like(kernel) for kernel in block.kernels]
    actual = torch.ops.las_mm.sparse_bottleneck(block.x, *arguments)
    kernels = arguments[10] if kept > 18 else block.kernels
    expected, scale = cases.masked_dense(block.x, mask, kernels, block.biases, None, *block.args)
    assert_close(actual, expected, scale, torch.float32)


@cases.implementations("sparse_bottleneck", "gather_conv3x3")
@pytest.mark.parametrize("dilation", [100, 2**31, 2**62])
def test_huge_dilation_reads_the_centre_tap(implementation, dilation):
    call = cases.implementation_of(implementation)
    block = cases.Block(2, (7, 9), (8, 16, 24), strides=(1, 2), downsample=True, dilation=9)
    expected, scale = block.expected(block.x)
    far = (block.granularity, block.strides, dilation, block.groups, 1.0)
    actual = call("sparse_bottleneck", block.x, *block.arguments[:5], *far)
    assert_close(actual, expected, scale, torch.float32)
    hidden = block.features(16, (7, 9), "contiguous")
    rest = (hidden, block.mask, block.weights[1], block.biases[1], 3, 2)
    near, far = (call("gather_conv3x3", *rest, d, 1) for d in (9, dilation))
    assert torch.equal(near, far)


# opcheck -----------------------------------------------------------------------------------------

BLOCKS = {
    "float32": cases.Block(2, (7, 9), (16, 8, 16)),
    "bfloat16": cases.Block(2, (7, 9), (16, 24, 16), dtype=torch.bfloat16, layout="channels_last"),
    "no mask": cases.Block(1, (5, 6), (8, 8, 8), mask_kind=None, groups=2, dilation=2),
    "winograd": cases.Block(1, (5, 6), (8, 8, 8), winograd="only", mask_dtype=torch.float32),
    "slice": cases.Block(2, (5, 6), (8, 8, 8), layout="slice", granularity=ops.LAYER),
    "dense": cases.Block(2, (5, 6), (8, 8, 8), mask_kind="0.9", winograd="only", dense_above=0.5),
    "dense without mask": cases.Block(1, (5, 6), (8, 8, 8), mask_kind=None, dense_above=0.0),
}
DOWNSAMPLED = {
    "strided": cases.Block(2, (7, 9), (8, 8, 24), strides=(1, 2), downsample=True),
    "shortcut": cases.Block(
        2, (7, 9), (8, 8, 24), strides=(2, 1), downsample=True, shortcut_channels=12
    ),
    "dense": cases.Block(
        2, (7, 9), (8, 8, 24), strides=(2, 1), downsample=True, mask_kind="0.9", dense_above=0.0
    ),
}


def parametrize(blocks):
    return pytest.mark.parametrize(
        "block", [pytest.param(b, id=name) for name, b in blocks.items()]
    )


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.las_mm, name).default, arguments)


@needs.OPCHECK
@parametrize({**BLOCKS, **{f"downsampled {k}": b for k, b in DOWNSAMPLED.items()}})
def test_opcheck_bottleneck(block):
    opcheck("sparse_bottleneck", block.x, *block.arguments)


@needs.OPCHECK
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@parametrize({name: BLOCKS[name] for name in ("float32", "dense", "dense without mask")})
def test_opcheck_has_no_gradient(block):
    opcheck("sparse_bottleneck", block.x.clone().requires_grad_(), *block.arguments)


@needs.OPCHECK
@parametrize(BLOCKS)
def test_opcheck_bottleneck_in_place(block):
    opcheck("sparse_bottleneck_", block.x.clone(), *block.arguments)


@needs.OPCHECK
@parametrize({"float32": BLOCKS["float32"], "bfloat16": BLOCKS["bfloat16"], **DOWNSAMPLED})
def test_opcheck_masker_conv1x1(block):
    offset = "broadcast" if block.downsample else "none"
    masker, geometry = make_masker(block, offset), (block.granularity, block.strides, 1)
    opcheck("spatial_mask", block.x, *masker, *geometry)
    opcheck("patch_mask", block.x, *masker, *geometry)
    opcheck("masker_conv1x1", block.x, *masker, block.weights[0], block.biases[0], *geometry)


@needs.OPCHECK
@parametrize({name: BLOCKS[name] for name in ("float32", "bfloat16", "slice")})
def test_opcheck_gather_and_scatter(block):
    hidden = block.features(block.channels[1], block.size, block.layout)
    weights, biases, granularity = block.weights, block.biases, block.granularity
    opcheck("gather_conv3x3", hidden, block.mask, weights[1], biases[1], granularity, 1, 1, 1)
    residual = block.x.clone()
    opcheck(
        "conv1x1_scatter_add_", residual, hidden, block.mask, weights[2], biases[2], granularity
    )


@needs.OPCHECK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_stem(dtype):
    kernel = torch.randn(8, 3, 7, 7).to(dtype)
    opcheck(
        "conv_pool_stem", torch.randn(2, 3, 13, 18).to(dtype), ops.pack_stem(kernel), torch.zeros(8)
    )


# Instruction sets --------------------------------------------------------------------------------

LEVELS = ["generic", "avx2", "avx512", "avx512_bf16"]
LEVEL = os.environ.get("LAS_MM_CPU_ISA")


def levels_of_this_cpu():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(flags.partition("flags")[2].partition("\n")[0].split())
    found = ["generic"]
    if {"avx2", "fma"} <= flags:
        found.append("avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            found.append("avx512")
            if "avx512_bf16" in flags:
                found.append("avx512_bf16")
    return found


needs_isa = pytest.mark.skipif(
    not hasattr(torch.ops.las_mm, "cpu_isa"), reason="NATIVE OPS NOT BUILT: no las_mm::cpu_isa"
)


@needs_isa
def test_isa_is_the_one_asked_for():
    expected = LEVEL or levels_of_this_cpu()[-1]
    assert torch.ops.las_mm.cpu_isa() == expected


# The best level is what all other tests of the operators run on.
@needs_isa
@pytest.mark.skipif(bool(LEVEL), reason=f"already inside the run for {LEVEL}")
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    if level not in levels_of_this_cpu():
        pytest.skip(f"this CPU has no {level}")
    if level == levels_of_this_cpu()[-1]:
        pytest.skip(f"{level} is what this process runs on")
    environment = dict(os.environ, LAS_MM_CPU_ISA=level, OMP_NUM_THREADS="1")
    environment["LAS_MM_HYPOTHESIS_SCALE"] = str(0.1 * cases.SCALE)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE),
            str(HERE.with_name("test_blocks.py")),
            "-q",
            "-k",
            "native or isa",
            "-p",
            "no:faulthandler",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "NATIVE OPS NOT BUILT" not in run.stdout


ASK_FOR_LEVELS = """
import os, sys, torch
torch.ops.load_library(sys.argv[1])
for level in sys.argv[2:]:
    if os.fork() == 0:
        os.environ["LAS_MM_CPU_ISA"] = level
        try:
            print("ran", torch.ops.las_mm.cpu_isa(), flush=True)
        except ValueError as error:
            print(level, "refused", error, flush=True)
        os._exit(0)
    os.wait()
"""


@needs_isa
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_instruction_sets_by_name():
    levels = levels_of_this_cpu()
    lacking = ["mmx", *(name for name in LEVELS if name not in levels)]
    library = sys.modules["las_mm._C"].__file__
    run = subprocess.run(
        [sys.executable, "-c", ASK_FOR_LEVELS, library, *lacking, *levels],
        env={key: value for key, value in os.environ.items() if key != "LAS_MM_CPU_ISA"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = run.stdout.splitlines()
    assert answers[len(lacking) :] == [f"ran {name}" for name in levels], run.stderr
    for name, answer in zip(lacking, answers):
        assert answer.startswith(f"{name} refused ") and "LAS_MM_CPU_ISA" in answer


NCHW = pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 1, 1, 1), (2, 17, 9, 15), (3, 64, 8, 8)])


@needs.OPCHECK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NCHW
def test_opcheck_to_nchw(shape, dtype):
    opcheck("to_nchw", torch.randn(shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NCHW
def test_to_nchw(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for source in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        out = torch.ops.las_mm.to_nchw(source)
        assert out.is_contiguous() and out.data_ptr() != source.data_ptr() or not x.numel()
        torch.testing.assert_close(out, source, rtol=0, atol=0)
    with pytest.raises(ValueError, match="x must have shape"):
        torch.ops.las_mm.to_nchw(torch.zeros(2, 2, 2))


@cases.implementations("sparse_bottleneck")
@pytest.mark.parametrize(
    "dtype, winograd", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("which", range(4))
def test_nan_in_a_weight_reaches_every_kept_output(implementation, dtype, which, winograd):
    """A ReLU that turned NaN into 0 would let a broken network look healthy."""
    call = cases.implementation_of(implementation)
    weights = [torch.randn(16, 8, 1, 1), torch.randn(16, 16, 3, 3), torch.randn(8, 16, 1, 1)]
    weights.append(torch.randn(8, 8, 1, 1))
    weights[which].fill_(math.nan)
    packed = [ops.pack_conv(weight.to(dtype)) for weight in weights]
    biases = [torch.zeros(16), torch.zeros(16), torch.zeros(8), torch.zeros(8)]
    tiles = ops.pack_winograd(weights[1]) if winograd else None
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2:4, 1:3] = 1
    args = (mask, packed, biases, tiles, None, 1, (1, 1), 1, 1, 0.0)
    out = call("sparse_bottleneck", torch.rand(1, 8, 6, 6).to(dtype), *args)
    assert out[..., 2:4, 1:3].isnan().all()
    assert out.isnan().all() == (which == 3)  # the shortcut is computed everywhere


@cases.implementations("conv_pool_stem")
def test_nan_in_an_image_passes_the_stem(implementation):
    call = cases.implementation_of(implementation)
    x = torch.randn(1, 3, 40, 40)
    x[..., 10:30, 10:30] = math.nan
    out = call("conv_pool_stem", x, ops.pack_stem(torch.randn(8, 3, 7, 7)), torch.zeros(8))
    assert out[..., 4:7, 4:7].isnan().all()


@cases.implementations("sparse_bottleneck")
def test_nan_at_a_dropped_position_stays(implementation):
    x = torch.rand(1, 8, 4, 4)
    x[..., 0, 0] = math.nan
    weights = [torch.randn(4, 8, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(8, 4, 1, 1)]
    packed = [ops.pack_conv(weight) for weight in weights]
    biases = [torch.zeros(4), torch.zeros(4), torch.zeros(8)]
    args = (torch.zeros(1, 1, 4, 4), packed, biases, None, None, 1, (1, 1), 1, 1, 0.0)
    out = cases.implementation_of(implementation)("sparse_bottleneck", x, *args)
    assert out[..., 0, 0].isnan().all() and out[..., 1:, :].isfinite().all()
