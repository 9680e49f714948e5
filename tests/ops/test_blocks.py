"""Basic blocks and dense layers against masked-dense convolutions in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch.utils import flop_counter

import needs
from las_mm import ops

from . import cases
from .block_cases import (
    BasicBlock,
    Channels,
    DenseLayer,
    basic_blocks,
    channel_blocks,
    dense_layers,
)
from .cases import Untouched, assert_close, for_all, same_bits

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """at::empty returns NaN, so that an output position that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# sparse_basic ------------------------------------------------------------------------------------


def check_basic(call, block):
    x = block.x
    expected, scale = block.expected(x)
    untouched = Untouched(x, *block.inputs)
    with cases.threads(block.threads):
        actual = call("sparse_basic", x, *block.arguments)
    untouched.check()
    assert_close(actual, expected, scale, block.dtype)
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)
    if not block.downsample:  # dropped outputs are exact, NaN stays one
        dropped = ~block.kept.expand_as(x)
        if block.dense is None:
            assert same_bits(actual[dropped], x.relu()[dropped])


@for_all(basic_blocks(), 600, "sparse_basic")
def test_basic_equals_masked_dense(call, block):
    check_basic(call, block)


@for_all(basic_blocks(in_place=True), 200, "sparse_basic_", "sparse_basic")
def test_basic_in_place(call, block):
    features = block.x
    positive = features.abs_() if block.seed % 2 or block.dense else features
    expected, scale = block.expected(positive)
    dropped = ~block.kept.expand_as(positive)
    before = positive.clone()
    untouched = Untouched(*block.inputs, output=positive)
    with cases.threads(block.threads):
        functional = call("sparse_basic", before, *block.arguments)
        assert call("sparse_basic_", positive, *block.arguments) is None
    untouched.check()
    assert same_bits(positive[dropped], before[dropped])  # negative or NaN as they may be
    kept = torch.where(dropped, torch.nan, expected)
    assert_close(positive, kept, scale, block.dtype)
    assert_close(positive, functional.double().where(~dropped, torch.nan), scale, block.dtype)


@st.composite
def wide(draw, blocks):
    """Beyond one tile of work in every direction, with images for every thread."""
    block = draw(blocks)
    channels = [draw(st.sampled_from([64, 130])) for _ in range(3)]
    if not block.downsample and isinstance(block, BasicBlock):
        channels[2] = channels[0]
    size = draw(st.sampled_from([(40, 7), (5, 61), (24, 17)]))
    images = draw(st.sampled_from([1, 4, 7]))
    return replace(block, channels=tuple(channels), size=size, images=images)


@for_all(wide(basic_blocks()), 40, "sparse_basic")
def test_basic_beyond_one_tile(call, block):
    check_basic(call, block)


# channel_basic -----------------------------------------------------------------------------------


@for_all(channel_blocks(), 500, "channel_basic")
def test_channels_equal_masked_dense(call, case):
    block, x = case.block, case.block.x
    expected, scale = case.expected(x)
    untouched = Untouched(x, case.mask, case.constant, *block.inputs)
    with cases.threads(block.threads):
        actual = call("channel_basic", x, *case.arguments)
    untouched.check()
    assert_close(actual, expected, scale, block.dtype)


@for_all(channel_blocks(in_place=True), 150, "channel_basic_")
def test_channels_in_place(call, case):
    block, x = case.block, case.block.x
    expected, scale = case.expected(x)
    dropped = ~block.kept.expand_as(x)
    before = x.clone()
    with cases.threads(block.threads):
        assert call("channel_basic_", x, *case.arguments) is None
    assert same_bits(x[dropped], before[dropped])
    assert_close(x, torch.where(dropped, torch.nan, expected), scale, block.dtype)


# sparse_dense_layer_ -----------------------------------------------------------------------------


def check_dense_layer(call, layer):
    buffer, (c_in, _, growth) = layer.x, layer.channels
    before = buffer.clone()
    expected, scale = layer.expected(buffer)
    untouched = Untouched(*layer.inputs, output=buffer)
    with cases.threads(layer.threads):
        assert call("sparse_dense_layer_", buffer, *layer.arguments) is None
    untouched.check()
    written = buffer[:, c_in : c_in + growth]
    assert_close(written, expected, scale, layer.dtype)
    assert same_bits(buffer[:, :c_in], before[:, :c_in])
    assert same_bits(buffer[:, c_in + growth :], before[:, c_in + growth :])
    assert not written[~layer.kept.expand_as(written)].any()
    assert written[layer.kept.expand_as(written)].isfinite().all()


@for_all(dense_layers(), 600, "sparse_dense_layer_")
def test_dense_layer_equals_masked_dense(call, layer):
    check_dense_layer(call, layer)


@for_all(wide(dense_layers()), 40, "sparse_dense_layer_")
def test_dense_layer_beyond_one_tile(call, layer):
    check_dense_layer(call, layer)


# What both promise -------------------------------------------------------------------------------

BASIC = {
    "float32": BasicBlock(2, (7, 9), (8, 24, 8), winograd="both"),
    "bfloat16": BasicBlock(2, (7, 9), (8, 24, 8), dtype=torch.bfloat16),
    "static": BasicBlock(1, (7, 9), (8, 24, 8), mask_kind=None, winograd="only"),
    "dilated": BasicBlock(2, (7, 9), (8, 4, 8), dilation=2, winograd="both"),
    "layer": BasicBlock(3, (5, 6), (8, 8, 8), granularity=ops.LAYER, layout="slice"),
    "dense": BasicBlock(2, (5, 6), (8, 8, 8), mask_kind="0.9", winograd="only", dense_above=0.5),
    "dense static": BasicBlock(1, (5, 6), (8, 8, 8), mask_kind=None, dense_above=0.0),
}
DOWNSAMPLED = {
    "strided": BasicBlock(2, (7, 9), (8, 8, 24), strides=(2, 1), downsample=True, winograd="both"),
    "pooled": BasicBlock(
        2, (7, 9), (8, 8, 24), strides=(2, 1), downsample=True, shortcut_channels=12
    ),
    "dense strided": BasicBlock(
        2, (7, 9), (8, 8, 24), strides=(2, 1), downsample=True, mask_kind="0.9", dense_above=0.0
    ),
}
LAYERS = {
    "float32": DenseLayer(2, (7, 9), (16, 24, 8), winograd="both", layout="channels_last"),
    "bfloat16": DenseLayer(2, (7, 9), (15, 24, 8), dtype=torch.bfloat16, room=3),
    "static": DenseLayer(1, (7, 9), (8, 24, 8), mask_kind=None, layout="channels"),
    "layer": DenseLayer(3, (5, 6), (8, 8, 8), granularity=ops.LAYER, winograd="only"),
}


def named(blocks):
    return pytest.mark.parametrize("block", [pytest.param(b, id=n) for n, b in blocks.items()])


def buffer_of(layer):
    """opcheck compares values, so none may be NaN."""
    return layer.x.nan_to_num(0.5)


def opcheck(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.las_mm, name).default, arguments)


@needs.OPCHECK
@named({**BASIC, **DOWNSAMPLED})
def test_opcheck_basic(block):
    opcheck("sparse_basic", block.x, *block.arguments)


@needs.OPCHECK
@named(BASIC)
def test_opcheck_basic_in_place(block):
    opcheck("sparse_basic_", block.x.clone(), *block.arguments)


@needs.OPCHECK
@named({name: b for name, b in BASIC.items() if "dense" not in name})
@pytest.mark.parametrize("has_constant", [False, True])
def test_opcheck_channels(block, has_constant):
    case = Channels(block, 4, "0.5", has_constant)
    opcheck("channel_basic", block.x, *case.arguments)
    opcheck("channel_basic_", block.x.clone(), *case.arguments)


@needs.OPCHECK
@named(LAYERS)
def test_opcheck_dense_layer(block):
    opcheck("sparse_dense_layer_", buffer_of(block), *block.arguments)


@cases.implementations("sparse_basic", "sparse_basic_", "sparse_dense_layer_")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images(implementation, dtype):
    call = cases.implementation_of(implementation)
    block = BasicBlock(0, (5, 6), (8, 4, 8), dtype=dtype)
    assert call("sparse_basic", block.x, *block.arguments).shape == (0, 8, 5, 6)
    call("sparse_basic_", block.x, *block.arguments)
    layer = DenseLayer(0, (5, 6), (8, 4, 8), dtype=dtype)
    call("sparse_dense_layer_", layer.x, *layer.arguments)


@cases.needs_native("sparse_basic", "sparse_dense_layer_")
@pytest.mark.parametrize("images", [2, 7])
@pytest.mark.parametrize("winograd", ["none", "only"])
def test_images_do_not_depend_on_their_batch(images, winograd):
    """Whether threads take whole images, groups of them or parts of all, nothing changes."""
    call = cases.implementation_of("native")
    block = BasicBlock(images, (16, 18), (24, 70, 24), 4, winograd=winograd)
    layer = DenseLayer(images, (16, 18), (24, 70, 8), 4, winograd=winograd)
    x, (mask, *rest) = block.x, block.arguments
    buffer, (layer_mask, *layer_rest) = buffer_of(layer), layer.arguments

    def appended(buffer, mask):
        buffer = buffer.clone()
        call("sparse_dense_layer_", buffer, mask, *layer_rest)
        return buffer

    with cases.threads(1):
        apart = [call("sparse_basic", x[[n]], mask[[n]], *rest) for n in range(images)]
        layers = [appended(buffer[[n]], layer_mask[[n]]) for n in range(images)]
    for threads in (1, 2, 3):
        with cases.threads(threads):
            assert torch.equal(call("sparse_basic", x, mask, *rest), torch.cat(apart))
            assert torch.equal(appended(buffer, layer_mask), torch.cat(layers))
            one = call("sparse_basic", x[:1], mask[:1], *rest)
            assert torch.equal(one, apart[0])


def test_public_functions():
    block = BasicBlock(2, (9, 11), (16, 8, 24), strides=(2, 1), downsample=True)
    actual = ops.sparse_basic(block.x, block.mask, block.pack, 3)
    assert_close(actual, *block.expected(block.x), torch.float32)
    block = BasicBlock(2, (9, 11), (16, 8, 16), winograd="only")
    x = block.x.abs()
    expected, scale = block.expected(x)
    assert ops.sparse_basic_(x, block.mask, block.pack, 3) is x
    assert_close(x, expected, scale, torch.float32)
    case = Channels(block, 4, "0.5", True)
    x = block.x.abs()
    expected, scale = case.expected(x)
    actual = ops.channel_basic(x, case.mask, block.mask, block.pack, 3, constant=case.constant)
    assert_close(actual, expected, scale, torch.float32)
    assert ops.channel_basic_(x, case.mask, block.mask, block.pack, 3, case.constant) is x
    assert_close(x, expected, scale, torch.float32)
    layer = DenseLayer(2, (9, 11), (16, 24, 8), winograd="both")
    buffer = layer.x
    assert ops.sparse_dense_layer_(buffer, layer.mask, layer.pack, 3) is buffer
    assert_close(buffer[:, 16:24], *layer.expected(buffer), torch.float32)


@cases.implementations("sparse_basic", "sparse_dense_layer_")
@pytest.mark.parametrize("winograd", ["none", "only"])
@pytest.mark.parametrize("which", range(2))
def test_nan_in_a_weight_reaches_every_kept_output(implementation, which, winograd):
    """A ReLU that turned NaN into 0 would let a broken network look healthy."""
    call = cases.implementation_of(implementation)
    for cls, name in ((BasicBlock, "sparse_basic"), (DenseLayer, "sparse_dense_layer_")):
        block = cls(1, (6, 6), (8, 16, 8), mask_kind="single", granularity=2, winograd=winograd)
        block.kernels[which].fill_(math.nan)
        x = buffer_of(block) if cls is DenseLayer else block.x
        out = call(name, x, *block.arguments)
        out = x[:, 8:16] if out is None else out
        assert torch.equal(out.isnan(), block.kept.expand_as(out))


@needs.FLOPS
@pytest.mark.parametrize("mask_kind", [None, "empty", "full", "0.5"])
def test_flops_follow_masks(mask_kind):
    block = BasicBlock(
        3, (9, 12), (8, 16, 24), mask_kind=mask_kind, strides=(2, 1), downsample=True
    )
    layer = DenseLayer(3, (9, 12), (8, 16, 24), mask_kind=mask_kind)
    with flop_counter.FlopCounterMode(display=False) as counter:
        ops.sparse_basic(block.x, block.mask, block.pack, 3)
    kept, halo = (m.sum().item() for m in (block.kept, cases.read_by(block.kept, (5, 6), 1, 1)))
    macs = halo * 9 * 8 * 16 + kept * 9 * 16 * 24 + 3 * 5 * 6 * 8 * 24
    assert counter.get_total_flops() == 2 * macs
    case = Channels(block, 8, "0.5", False)
    with flop_counter.FlopCounterMode(display=False) as counter:
        ops.channel_basic(block.x, case.mask, block.mask, block.pack, 3)
    kept, halo = (m.sum((1, 2, 3)) for m in (block.kept, cases.read_by(block.kept, (5, 6), 1, 1)))
    macs = ((halo * 8 + kept * 24) * 9 * 2 * case.mask.sum(1)).sum().item() + 3 * 5 * 6 * 8 * 24
    assert counter.get_total_flops() == 2 * macs
    with flop_counter.FlopCounterMode(display=False) as counter:
        ops.sparse_dense_layer_(layer.x, layer.mask, layer.pack, 3)
    kept, halo = (m.sum().item() for m in (layer.kept, cases.read_by(layer.kept, (9, 12), 1, 1)))
    assert counter.get_total_flops() == 2 * (halo * 8 * 16 + kept * 9 * 16 * 24)


# Errors ------------------------------------------------------------------------------------------

BASIC_NAMES = [
    "x",
    "mask",
    "shortcut",
    "weights",
    "biases",
    "winograd",
    "dense",
    "geometry",
    "plan",
]
LAYER_NAMES = ["buffer", "mask", "weights", "vectors", "winograd", "granularity", "winograd_cost"]


def wrong(cls, named, change, **how):
    return pytest.param(cls, how, change, named, id=f"{cls.__name__}-{named}")


def put(name, index, value):
    """Replace one element of a list."""

    def change(a):
        a[name] = list(a[name])
        a[name][index] = value(a[name][index])

    return change


def to(name, value):
    return lambda a: a.update({name: value(a[name])})


HALF = torch.Tensor.half
POOLED = dict(channels=(8, 8, 24), strides=(2, 1), downsample=True, shortcut_channels=12)
WRONG = [
    wrong(BasicBlock, "x must have shape", to("x", lambda x: x[0])),
    wrong(BasicBlock, "x must be float32 or bfloat16", to("x", HALF)),
    wrong(BasicBlock, "stride must be 1 to", put("geometry", 1, lambda _: 0)),
    wrong(BasicBlock, "dilation must be positive", put("geometry", 2, lambda _: 0)),
    wrong(BasicBlock, "granularity must be positive", put("geometry", 0, lambda _: 0)),
    wrong(BasicBlock, "weights and biases must be those", to("weights", lambda w: w[:1])),
    wrong(BasicBlock, "weights and biases must be those", to("biases", lambda b: b[:1])),
    wrong(BasicBlock, r"biases\[1\] must be", put("biases", 1, torch.Tensor.double)),
    wrong(BasicBlock, r"weights\[0\] must be packed", put("weights", 0, lambda w: w[1:])),
    wrong(BasicBlock, r"weights\[1\] must be packed", put("weights", 1, lambda w: w[:0])),
    wrong(BasicBlock, r"weights\[1\] must be", put("weights", 1, torch.Tensor.double)),
    wrong(
        BasicBlock,
        "weights must have a downsample",
        put("geometry", 1, lambda _: 2),
        mask_kind=None,
    ),
    wrong(
        BasicBlock,
        "winograd must be empty or hold",
        to("winograd", lambda w: w[:1]),
        winograd="both",
    ),
    wrong(
        BasicBlock,
        r"winograd\[1\] must be packed",
        put("winograd", 1, lambda w: w[1:]),
        winograd="both",
    ),
    wrong(
        BasicBlock, r"winograd\[0\] must be empty", put("geometry", 2, lambda _: 2), winograd="both"
    ),
    wrong(BasicBlock, "winograd_cost must be a number", put("plan", 0, lambda _: math.nan)),
    wrong(BasicBlock, "mask must have shape", to("mask", lambda m: m[:, :, 1:])),
    wrong(BasicBlock, "mask must be bool", to("mask", torch.Tensor.int)),
    wrong(BasicBlock, "mask must be finite", to("mask", lambda m: m.float() / 0)),
    wrong(BasicBlock, "shortcut must be None", to("shortcut", lambda _: torch.zeros(2, 8, 7, 9))),
    wrong(BasicBlock, "shortcut must have 2 images", to("shortcut", lambda s: s[:1]), **POOLED),
    wrong(BasicBlock, "shortcut must be", to("shortcut", torch.Tensor.bfloat16), **POOLED),
    wrong(BasicBlock, r"weights\[2\] must be packed", to("shortcut", lambda s: s[:, 1:]), **POOLED),
    wrong(BasicBlock, "dense must be empty or hold", to("dense", lambda d: d[:1]), dense_above=0.5),
    wrong(
        BasicBlock, r"dense\[1\] must have shape", put("dense", 1, lambda d: d[1:]), dense_above=0.5
    ),
    wrong(BasicBlock, r"dense\[0\] must be", put("dense", 0, torch.Tensor.double), dense_above=0.5),
    wrong(DenseLayer, "buffer must have shape", to("buffer", lambda x: x[0])),
    wrong(DenseLayer, "buffer must be float32 or bfloat16", to("buffer", HALF)),
    wrong(DenseLayer, "buffer must have room", to("buffer", lambda x: x[:, 1:])),
    wrong(DenseLayer, "weights must be those", to("weights", lambda w: w[:1])),
    wrong(DenseLayer, "vectors must be scale and shift", to("vectors", lambda v: v[:3])),
    wrong(DenseLayer, r"vectors\[1\] must have shape", put("vectors", 1, lambda v: v[1:])),
    wrong(DenseLayer, r"vectors\[2\] must be", put("vectors", 2, torch.Tensor.double)),
    wrong(DenseLayer, r"weights\[0\] must be packed", put("weights", 0, lambda w: w[1:])),
    wrong(DenseLayer, r"weights\[1\] must be packed", put("weights", 1, lambda w: w[1:])),
    wrong(
        DenseLayer,
        "winograd must be empty or hold",
        to("winograd", lambda w: [*w, *w]),
        winograd="both",
    ),
    wrong(
        DenseLayer,
        r"winograd\[1\] must be packed",
        put("winograd", 0, lambda w: w[1:]),
        winograd="both",
    ),
    wrong(DenseLayer, "winograd_cost must be a number", to("winograd_cost", lambda _: -1.0)),
    wrong(DenseLayer, "granularity must be positive", to("granularity", lambda _: 0)),
    wrong(DenseLayer, "mask must have shape", to("mask", lambda m: m[:1])),
    wrong(DenseLayer, "mask must be finite", to("mask", lambda m: m.float() / 0)),
]


@cases.implementations("sparse_basic", "sparse_dense_layer_")
@pytest.mark.parametrize("cls, how, change, named", WRONG)
def test_errors_name_the_argument(implementation, cls, how, change, named):
    block = cls(2, (7, 9), **{"channels": (8, 24, 8), **how})
    names, op = (
        (BASIC_NAMES, "sparse_basic") if cls is BasicBlock else (LAYER_NAMES, "sparse_dense_layer_")
    )
    arguments = dict(zip(names, (block.x.clone(), *block.arguments)))
    change(arguments)
    before = arguments[names[0]].clone()
    with pytest.raises(ValueError, match=f"^{named}"):
        cases.implementation_of(implementation)(op, *arguments.values())
    assert same_bits(arguments[names[0]], before)


@cases.implementations("channel_basic")
@pytest.mark.parametrize(
    "change, named",
    [
        (to("channel_mask", lambda m: m[:, [0, 1, 2, 3, 0]]), "channel_mask must have shape"),
        (to("channel_mask", lambda m: m[:1]), "channel_mask must have shape"),
        (to("channel_mask", torch.Tensor.int), "channel_mask must be bool"),
        (to("channel_mask", lambda m: m.float() / 0), "channel_mask must be finite"),
        (to("constant", lambda c: c[1:]), "constant must have shape"),
        (to("constant", torch.Tensor.double), "constant must be"),
        (to("mask", lambda m: m.float() / 0), "mask must be finite"),
    ],
)
def test_errors_of_channels_name_the_argument(implementation, change, named):
    case = Channels(BasicBlock(2, (7, 9), (8, 24, 8)), 4, "0.5", True)
    names = ["channel_mask", "constant", "mask", "shortcut", "weights", "biases", "winograd"]
    arguments = dict(zip([*names, "geometry", "winograd_cost"], case.arguments))
    change(arguments)
    with pytest.raises(ValueError, match=f"^{named}"):
        cases.implementation_of(implementation)("channel_basic", case.block.x, *arguments.values())


@cases.implementations("sparse_basic_")
def test_in_place_needs_an_identity(implementation):
    block = BasicBlock(2, (7, 9), (8, 24, 8), downsample=True)
    with pytest.raises(ValueError, match="^weights must have no downsample"):
        cases.implementation_of(implementation)("sparse_basic_", block.x, *block.arguments)


@pytest.mark.parametrize("pack", [ops.pack_basic, ops.pack_dense_layer])
def test_packs_need_kernels_of_a_known_type(pack):
    with pytest.raises(ValueError, match="^weight must"):
        pack([torch.zeros(8, 8, 3, 3).double()] * 2, [torch.zeros(8)] * 4)
