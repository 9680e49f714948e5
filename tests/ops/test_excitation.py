"""Squeeze-and-excitation inside the bottleneck ops, against its definition in float64."""

from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from hypothesis import strategies as st

import needs

from . import cases
from .cases import Untouched, assert_close, for_all, same_bits
from .test_channel_ops import KINDS, ChannelBlock


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """at::empty returns NaN, so that a position that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class ExcitedBlock:
    """A drawn bottleneck with squeeze-and-excitation, with or without a channel mask."""

    block: cases.Block
    squeezed: int
    channels: ChannelBlock | None = None

    @property
    def name(self):
        return "sparse_bottleneck" if self.channels is None else "channel_bottleneck"

    @cached_property
    def weights(self):
        width, g = self.block.channels[1], self.block.generator
        shapes = [(self.squeezed, width), (self.squeezed,), (width, self.squeezed), (width,)]
        weights = [torch.randn(shape, generator=g) for shape in shapes]
        if self.block.strided_parameters:
            return [torch.stack([w, w], -1)[..., 0] for w in weights]
        return weights

    @property
    def arguments(self):
        b = self.block
        if self.channels is not None:
            return (*self.channels.arguments, self.weights)
        above = 1.0 if b.dense_above is None else b.dense_above
        return (b.mask, b.weights, b.biases, None, b.shortcut, *b.args, 1.0, b.dense, above,
                self.weights)  # fmt: skip

    def expected(self, x):
        """The definition applied to ``x``, and the scale of its terms."""
        b = self.block

        def skip(hidden, which):
            if self.channels is not None:
                hidden = self.channels.skip(hidden, which)
            if which == 0:
                return hidden
            kept = b.kept
            total = torch.where(kept, hidden, 0).sum((2, 3))
            mean = total / kept.sum((2, 3)).clamp(min=1)
            first, first_bias, second, second_bias = (w.double() for w in self.weights)
            squeezed = (mean @ first.T + first_bias).relu()
            return hidden * (squeezed @ second.T + second_bias).sigmoid()[:, :, None, None]

        return cases.masked_dense(x, b.mask, b.kernels, b.biases, b.shortcut, *b.args, skip)


@st.composite
def excited_blocks(draw, in_place=False):
    block = replace(draw(cases.blocks(in_place=in_place)), winograd="none")
    channels = None
    if draw(st.booleans()):
        block, width = replace(block, dense_above=None), block.channels[1]
        channels = ChannelBlock(
            block,
            together=draw(st.sampled_from([g for g in (1, 2, 4, 8, width) if width % g == 0])),
            kinds=tuple(draw(st.sampled_from(KINDS)) for _ in range(3)),
            constant=False,
        )
    return ExcitedBlock(block, draw(st.sampled_from([1, 2, 6, 17])), channels)


@for_all(excited_blocks(), 300, "sparse_bottleneck", "channel_bottleneck")
def test_equals_the_definition(call, case):
    x = case.block.x
    expected, scale = case.expected(x)
    untouched = Untouched(x, *case.block.inputs, *case.weights)
    with cases.threads(case.block.threads):
        actual = call(case.name, x, *case.arguments)
    untouched.check()
    assert_close(actual, expected, scale, case.block.dtype)


@for_all(excited_blocks(in_place=True), 100, "sparse_bottleneck_", "channel_bottleneck_")
def test_in_place(call, case):
    case = replace(case, block=replace(case.block, dense_above=None))
    if case.channels is not None:
        case = replace(case, channels=replace(case.channels, block=case.block))
    x = case.block.x.abs_()
    expected, scale = case.expected(x)
    dropped = ~case.block.kept.expand_as(x)
    before = x.clone()
    with cases.threads(case.block.threads):
        assert call(f"{case.name}_", x, *case.arguments) is None
    assert same_bits(x[dropped], before[dropped])
    assert_close(x, torch.where(dropped, torch.nan, expected), scale, case.block.dtype)


BLOCK = cases.Block(2, (7, 9), (16, 24, 16), groups=3)
CASE = ExcitedBlock(BLOCK, 6)
CHANNELS = replace(CASE, channels=ChannelBlock(BLOCK, 2, ("0.6", "none"), False))
WRONG = {
    "excitation must be None or weight and bias": lambda w: w[:3],
    r"excitation\[0\] must have shape": lambda w: [w[0].T, *w[1:]],
    r"excitation\[1\] must": lambda w: [w[0], w[1].double(), *w[2:]],
    r"excitation\[2\] must": lambda w: [*w[:2], w[2].double(), w[3]],
    r"excitation\[3\] must have shape": lambda w: [*w[:3], w[3][1:]],
}


@pytest.mark.parametrize("message", WRONG)
@cases.implementations("sparse_bottleneck", "channel_bottleneck")
def test_bad_arguments(implementation, message):
    call = cases.implementation_of(implementation)
    for case in (CASE, CHANNELS):
        with pytest.raises(ValueError, match=message):
            call(case.name, BLOCK.x, *case.arguments[:-1], WRONG[message](case.weights))


@cases.implementations("sparse_bottleneck", "channel_bottleneck")
def test_what_does_not_go_together(implementation):
    call = cases.implementation_of(implementation)
    block = cases.Block(2, (7, 9), (16, 24, 16), winograd="both")
    winograd = list(ExcitedBlock(block, 6).arguments)
    winograd[3] = block.winograd_weight
    with pytest.raises(ValueError, match="winograd must be None with excitation"):
        call("sparse_bottleneck", block.x, *winograd)
    constants = replace(CHANNELS, channels=replace(CHANNELS.channels, constant=True))
    with pytest.raises(ValueError, match="constants must be None with excitation"):
        call("channel_bottleneck", BLOCK.x, *constants.arguments)


@needs.OPCHECK
@pytest.mark.parametrize("case", [CASE, CHANNELS], ids=["sparse", "channels"])
def test_opcheck(case):
    for name in (case.name, f"{case.name}_"):
        torch.library.opcheck(getattr(torch.ops.las_mm, name).default, (BLOCK.x, *case.arguments))
