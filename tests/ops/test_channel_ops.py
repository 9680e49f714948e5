"""Channel skipping against masked-dense convolutions in float64, on drawn cases of all kinds."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from hypothesis import strategies as st

import needs
from las_mm import ops
from las_mm.ops import masks

from . import cases
from .cases import Untouched, assert_close, for_all, same_bits

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """at::empty returns NaN, so that an output position that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class ChannelBlock:
    """A drawn bottleneck and a channel mask of another share for every image."""

    block: cases.Block
    together: int  # G: channels of one decision
    kinds: tuple[str, ...]  # of each image
    constant: bool  # whether skipped channels hold something else than zero
    mask_dtype: torch.dtype = torch.bool

    @cached_property
    def wanted(self):
        """Decision per image and group of channels."""
        groups, generator = self.block.channels[1] // self.together, self.block.generator
        rows = []
        for kind in self.kinds[: self.block.images]:
            uniform = torch.rand(groups, generator=generator)
            one = uniform.argmax() == torch.arange(groups)
            named = {"none": uniform > 2, "all": uniform < 2, "one": one, "but one": ~one}
            rows.append(named[kind] if kind in named else uniform < float(kind))
        return torch.stack(rows) if rows else torch.zeros(0, groups, dtype=torch.bool)

    @cached_property
    def channel_mask(self):
        if self.mask_dtype.is_floating_point:
            mask = torch.where(self.wanted, 0.75, 0.5).to(self.mask_dtype)
        else:
            mask = self.wanted.to(self.mask_dtype)
        return torch.stack([mask, mask], 2)[..., 0] if self.block.mask_view else mask

    @cached_property
    def constants(self):
        if not self.constant:
            return None
        width = self.block.channels[1]
        vectors = [cases.make_bias(self.block.generator, width) for _ in range(2)]
        return [cases.strided(v) for v in vectors] if self.block.strided_parameters else vectors

    @property
    def arguments(self):
        """What follows ``x`` in the schema."""
        b = self.block
        return (
            b.mask,
            self.channel_mask,
            b.weights,
            b.biases,
            self.constants,
            b.winograd_weight,
            b.shortcut,
            *b.args,
            b.winograd_cost,
        )

    @property
    def inputs(self):
        """All tensors but ``x``."""
        return [*self.block.inputs, self.channel_mask, *(self.constants or [])]

    def skip(self, hidden, which):
        constant = torch.zeros(1) if self.constants is None else self.constants[which]
        wanted = self.wanted.repeat_interleave(self.together, 1)[:, :, None, None]
        return torch.where(wanted, hidden, constant.double()[:, None, None])

    def expected(self, x):
        """The definition applied to ``x``, and the scale of its terms."""
        b = self.block
        return cases.masked_dense(x, b.mask, b.kernels, b.biases, b.shortcut, *b.args, self.skip)


KINDS = ["none", "all", "one", "but one", "0.1", "0.4", "0.6", "0.9"]


@st.composite
def channel_blocks(draw, blocks):
    block = replace(draw(blocks), dense_above=None)
    width = block.channels[1]
    return ChannelBlock(
        block,
        together=draw(st.sampled_from([g for g in (1, 2, 4, 8, width) if width % g == 0])),
        kinds=tuple(draw(st.sampled_from(KINDS)) for _ in range(3)),
        constant=draw(st.booleans()),
        mask_dtype=draw(st.sampled_from(masks.MASK_DTYPES)),
    )


def check(call, case):
    x = case.block.x
    expected, scale = case.expected(x)
    untouched = Untouched(x, *case.inputs)
    with cases.threads(case.block.threads):
        actual = call("channel_bottleneck", x, *case.arguments)
    untouched.check()
    assert_close(actual, expected, scale, case.block.dtype)
    assert actual.is_contiguous(memory_format=CHANNELS_LAST)


@for_all(channel_blocks(cases.blocks()), 700, "channel_bottleneck")
def test_channels_equal_masked_dense(call, case):
    check(call, case)


@st.composite
def wide_blocks(draw):
    """Widths of several panels, whose wanted channels straddle them, and larger maps."""
    case = draw(channel_blocks(cases.blocks()))
    b = case.block
    width = draw(st.sampled_from([128, 192, 200]))
    size = draw(st.sampled_from([(20, 7), (5, 31), (15, 16)]))
    groups = draw(st.sampled_from([1, 1, 2, 4])) if b.winograd == "none" else 1
    channels = (b.channels[0], width, b.channels[2])
    block = replace(b, channels=channels, size=size, groups=groups)
    return replace(case, block=block, together=draw(st.sampled_from([1, 2, 4, 8])))


@for_all(wide_blocks(), 60, "channel_bottleneck")
def test_channels_of_several_panels(call, case):
    check(call, case)


@st.composite
def deep_blocks(draw):
    """Small maps of many input channels, whose images run in step: other panels for each."""
    case = draw(channel_blocks(cases.blocks()))
    b = case.block
    depth, width = draw(st.sampled_from([(512, 72), (520, 40), (1040, 136)]))
    channels = (depth, width, b.channels[2] if b.downsample else depth)
    groups = draw(st.sampled_from([1, 1, 1, 2])) if b.winograd == "none" else 1
    size = draw(st.sampled_from([(3, 3), (7, 5), (4, 8)]))
    block = replace(b, images=3, size=size, channels=channels, groups=groups)
    return replace(case, block=block, together=draw(st.sampled_from([1, 2, 8])))


@for_all(deep_blocks(), 60, "channel_bottleneck")
def test_channels_of_images_in_step(call, case):
    check(call, case)


@for_all(channel_blocks(cases.blocks(in_place=True)), 200, "channel_bottleneck_")
def test_channels_in_place(call, case):
    x = case.block.x.abs_()
    expected, scale = case.expected(x)
    dropped = ~case.block.kept.expand_as(x)
    before = x.clone()
    untouched = Untouched(*case.inputs, output=x)
    with cases.threads(case.block.threads):
        assert call("channel_bottleneck_", x, *case.arguments) is None
    untouched.check()
    assert same_bits(x[dropped], before[dropped])
    assert_close(x, torch.where(dropped, torch.nan, expected), scale, case.block.dtype)


@for_all(cases.blocks(), 150, "channel_mean")
def test_channel_mean(call, block):
    x = replace(block, poison=False).x
    untouched = Untouched(x)
    with cases.threads(block.threads):
        actual = call("channel_mean", x)
    untouched.check()
    assert actual.dtype == torch.float32
    error = (actual.double() - x.double().mean((2, 3))).abs()
    assert (error <= 1e-5 * x.double().abs().mean((2, 3)) + 1e-9).all()


@cases.needs_native("channel_mean")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_mean_in_parts_whatever_the_threads(dtype):
    x = torch.rand(2, 70, 50, 61).to(dtype)
    results = []
    for count in (1, 2):
        with cases.threads(count):
            results.append(ops.channel_mean(x))
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], x.float().mean((2, 3)))


@dataclass(frozen=True)
class ChannelMasker:
    """Drawn linear layers after a global mean; ``shift``: images of the offset, 0: none."""

    block: cases.Block
    hidden: tuple[int, ...]
    groups: int
    shift: int

    @cached_property
    def arguments(self):
        generator = torch.Generator().manual_seed(self.block.seed)
        widths = (self.block.channels[0], *self.hidden, 2 * self.groups)
        weights = [
            cases.make_kernel(generator, o, i, 1, torch.float32)[..., 0, 0]
            for i, o in zip(widths, widths[1:])
        ]
        biases = [cases.make_bias(generator, o) for o in widths[1:]]
        offset = None
        if self.shift:
            images = self.block.images if self.shift > 1 else 1
            offset = torch.randn(images, self.groups, generator=generator)
            offset[:, ::5], offset[:, 1::5] = math.inf, -math.inf
        if self.block.strided_parameters:
            weights = [weight.t().contiguous().t() for weight in weights]
            biases = [cases.strided(bias) for bias in biases]
        return weights, biases, offset

    def keep(self, x):
        """The difference of the logits plus the offset, in float64."""
        weights, biases, offset = self.arguments
        out = x.double().mean((2, 3))
        for i, (weight, bias) in enumerate(zip(weights, biases)):
            out = (out.relu() if i else out) @ weight.double().t() + bias.double()
        out = out[:, : self.groups] - out[:, self.groups :]
        return out if offset is None else out + offset.double()


CHANNEL_MASKERS = st.builds(
    ChannelMasker,
    cases.blocks(),
    st.sampled_from([(), (1,), (7,), (64,), (130,), (12, 20)]),
    st.sampled_from([1, 2, 16, 33, 160]),
    st.integers(0, 2),
)


@for_all(CHANNEL_MASKERS, 200, "channel_mask")
def test_channel_mask(call, case):
    x = replace(case.block, poison=False).x
    weights, biases, offset = case.arguments
    untouched = Untouched(x, *weights, *biases, offset)
    with cases.threads(case.block.threads):
        actual = call("channel_mask", x, weights, biases, offset)
    untouched.check()
    assert actual.dtype == torch.bool and actual.shape == (case.block.images, case.groups)
    keep = case.keep(x)
    clear = keep.abs() > 1e-4  # float32 may see a difference near zero on the other side
    assert torch.equal(actual[clear], keep[clear] >= 0)


@cases.implementations("channel_mask")
def test_channel_mask_of_ties_and_nan(implementation):
    """Equal logits keep; an image with NaN keeps everything, whatever the offset."""
    x = torch.ones(2, 8, 3, 3)
    x[1, 0, 0, 0] = math.nan
    weights, biases = [torch.ones(4, 8), torch.ones(6, 4)], [torch.zeros(4), torch.zeros(6)]
    call = cases.implementation_of(implementation)
    mask = call("channel_mask", x, weights, biases, None)
    assert mask.tolist() == [[True] * 3, [True] * 3]
    mask = call("channel_mask", x, weights, biases, torch.tensor([[0.0, -math.inf, -1.0]]))
    assert mask.tolist() == [[True, False, False], [True] * 3]


@cases.implementations("channel_mask")
def test_channel_mask_needs_two_logits_each(implementation):
    call = cases.implementation_of(implementation)
    x = torch.ones(2, 8, 3, 3)
    for width in (0, 5):
        with pytest.raises(ValueError, match=f"two logits per decision, got {width}"):
            call("channel_mask", x, [torch.ones(width, 8)], [torch.ones(width)], None)


BLOCK = cases.Block(2, (7, 9), (16, 24, 16), winograd="both")
CASE = ChannelBlock(BLOCK, 2, ("0.6", "0.4"), True)


def test_public_functions():
    x, b = BLOCK.x.abs(), BLOCK
    expected, scale = CASE.expected(x)
    pack = ops.pack_bottleneck(b.kernels, b.biases, b.strides, b.dilation, b.groups)
    arguments = (CASE.channel_mask, b.mask, pack, b.granularity)
    actual = ops.channel_bottleneck(x, *arguments, constants=CASE.constants)
    assert_close(actual, expected, scale, torch.float32)
    assert ops.channel_bottleneck_(x, *arguments, CASE.constants) is x
    assert_close(x, expected, scale, torch.float32)


@cases.implementations("channel_bottleneck", "channel_bottleneck_", "channel_mean", "channel_mask")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images(implementation, dtype):
    call = cases.implementation_of(implementation)
    case = ChannelBlock(cases.Block(0, (5, 6), (8, 4, 8), dtype=dtype), 2, (), True)
    assert call("channel_bottleneck", case.block.x, *case.arguments).shape == (0, 8, 5, 6)
    call("channel_bottleneck_", case.block.x, *case.arguments)
    assert call("channel_mean", case.block.x).shape == (0, 8)
    layers = [torch.ones(6, 8)], [torch.zeros(6)]
    assert call("channel_mask", case.block.x, *layers, None).shape == (0, 3)


@cases.implementations("channel_bottleneck", "channel_bottleneck_")
@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (1, torch.ones(2, 12, 1), r"channel_mask must have shape \(2, k\)"),
        (1, torch.ones(1, 12), r"channel_mask must have shape \(2, k\)"),
        (1, torch.ones(2, 7), "with k dividing 24 channels"),
        (1, torch.ones(2, 0), "with k dividing 24 channels"),
        (1, torch.ones(2, 12, dtype=torch.int64), "channel_mask must be bool, uint8 or floating"),
        (1, torch.full((2, 12), math.nan), "channel_mask must be finite"),
        (4, [torch.zeros(24)], "constants must be None or those of conv1's and conv2's"),
        (4, [torch.zeros(24), torch.zeros(23)], r"constants\[1\] must have shape \[24\]"),
        (4, [torch.zeros(24).double(), torch.zeros(24)], r"constants\[0\] must be "),
        (3, [torch.zeros(24)], "weights and biases must be those of"),
    ],
)
def test_bad_arguments(implementation, position, wrong, message):
    call = cases.implementation_of(implementation)
    arguments = list(CASE.arguments)
    arguments[position] = wrong
    for name in ("channel_bottleneck", "channel_bottleneck_"):
        with pytest.raises(ValueError, match=message):
            call(name, BLOCK.x.clone(), *arguments)


@cases.implementations("channel_bottleneck_")
def test_in_place_without_downsample_only(implementation):
    block = cases.Block(1, (5, 6), (8, 8, 8), downsample=True)
    case = ChannelBlock(block, 2, ("0.6",), False)
    with pytest.raises(ValueError, match="weights must have no downsample convolution"):
        cases.implementation_of(implementation)("channel_bottleneck_", block.x, *case.arguments)


OPCHECKED = {
    "constants": CASE,
    "zero": replace(CASE, constant=False),
    "no mask": replace(CASE, block=replace(BLOCK, mask_kind=None)),
    "bfloat16": replace(CASE, block=cases.Block(2, (7, 9), (16, 24, 16), dtype=torch.bfloat16)),
    "groups": replace(CASE, block=cases.Block(2, (7, 9), (16, 24, 16), groups=3)),
}


@needs.OPCHECK
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name):
    case = OPCHECKED[name]
    library = torch.ops.las_mm
    torch.library.opcheck(library.channel_bottleneck.default, (case.block.x, *case.arguments))
    torch.library.opcheck(library.channel_bottleneck_.default, (case.block.x, *case.arguments))
    torch.library.opcheck(library.channel_mean.default, (case.block.x,))
    layers = [torch.randn(5, 16), torch.randn(8, 5)], [torch.randn(5), torch.randn(8)]
    torch.library.opcheck(library.channel_mask.default, (case.block.x, *layers, torch.randn(1, 4)))


@needs.OPCHECK
def test_opcheck_downsampled():
    block = cases.Block(2, (7, 9), (8, 8, 24), strides=(1, 2), downsample=True)
    case = ChannelBlock(block, 4, ("0.6", "none"), True)
    torch.library.opcheck(torch.ops.las_mm.channel_bottleneck.default, (block.x, *case.arguments))
