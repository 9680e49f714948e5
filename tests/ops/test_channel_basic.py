"""Channel skipping in basic blocks against masked-dense convolutions in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import needs
from las_mm import ops

from . import cases
from .block_cases import BasicBlock, basic_blocks
from .cases import Untouched, assert_close, for_all, same_bits
from .test_channel_ops import ChannelBlock, channel_blocks, fill_uninitialised_memory  # noqa: F401
from .test_sparse_errors import BIAS, as_int64, check_error, put, rows, with_value


class BasicChannels(ChannelBlock):
    """A drawn basic block and a channel mask of another share for every image."""

    @property
    def arguments(self):
        mask, shortcut, weights, biases, winograd, _, geometry, plan = self.block.arguments
        constants = None if self.constants is None else self.constants[0]
        lists = weights, biases, winograd
        return mask, self.channel_mask, shortcut, *lists, constants, geometry, plan[0]

    def expected(self, x):
        return self.block.expected(x, lambda hidden: self.skip(hidden, 0))


@st.composite
def drawn(draw, **kinds):
    case = draw(channel_blocks(basic_blocks(**kinds)))
    return BasicChannels(**vars_of(case))


def vars_of(case):
    return {name: getattr(case, name) for name in ChannelBlock.__dataclass_fields__}


@for_all(drawn(), 500, "channel_basic")
def test_channels_equal_masked_dense(call, case):
    x = case.block.x
    expected, scale = case.expected(x)
    untouched = Untouched(x, *case.inputs)
    with cases.threads(case.block.threads):
        actual = call("channel_basic", x, *case.arguments)
    untouched.check()
    assert_close(actual, expected, scale, case.block.dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@for_all(drawn(in_place=True), 150, "channel_basic", "channel_basic_")
def test_in_place(call, case):
    x = case.block.x.abs_() if case.block.seed % 2 else case.block.x
    expected, scale = case.expected(x)
    dropped, before = ~case.block.kept.expand_as(x), x.clone()
    with cases.threads(case.block.threads):
        assert call("channel_basic_", x, *case.arguments) is None
    assert same_bits(x[dropped], before[dropped])
    assert_close(x, torch.where(dropped, torch.nan, expected), scale, case.block.dtype)


@st.composite
def wide(draw):
    """Widths of several panels, whose wanted channels straddle them."""
    case = draw(drawn())
    b, width = case.block, draw(st.sampled_from([128, 192, 200]))
    together = draw(st.sampled_from([1, 4, 8]))
    block = replace(b, channels=(b.channels[0], width, b.channels[2]), size=(9, 14))
    return BasicChannels(**{**vars_of(case), "block": block, "together": together})


@for_all(wide(), 60, "channel_basic")
def test_wide_blocks(call, case):
    x = case.block.x
    expected, scale = case.expected(x)
    assert_close(call("channel_basic", x, *case.arguments), expected, scale, case.block.dtype)


def example(**changes):
    block = BasicBlock(2, (7, 9), (8, 24, 8), 3, **changes)
    return BasicChannels(block, 4, ("0.6", "0.4"), True)


@cases.needs_native("channel_basic")
@pytest.mark.parametrize("winograd", ["none", "both", "only"])
def test_images_do_not_depend_on_threads(winograd):
    case = example(winograd=winograd)
    call, results = cases.implementation_of("native"), []
    for threads in (1, 2, 3):
        with cases.threads(threads):
            results.append(call("channel_basic", case.block.x, *case.arguments))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_public_functions():
    case = example(winograd="both")
    b, constants = case.block, case.constants[0]
    x = b.x.abs_()
    expected, scale = case.expected(x)
    arguments = (b.mask, case.channel_mask, b.pack, 3)
    assert_close(ops.channel_basic(x, *arguments, None, constants), expected, scale, x.dtype)
    assert ops.channel_basic_(x, *arguments, constants) is x
    assert_close(x, expected, scale, x.dtype)


NAMES = ["mask", "channel_mask", "shortcut", "weights", "biases", "winograd", "constants"]
NAMES += ["geometry", "winograd_cost"]


def arguments():
    case = example()
    return dict(x=case.block.x, **dict(zip(NAMES, case.arguments)))


ERRORS = [
    *rows(
        arguments,
        "channel_mask",
        [
            (as_int64, "{} must be bool, uint8 or floating point"),
            (lambda mask: mask[0], r"{} must have shape \(2, k\) with k dividing 24"),
            (lambda mask: mask[1:], r"{} must have shape \(2, k\)"),
            (lambda mask: mask[:, 1:], r"{} must have shape \(2, k\) with k dividing 24"),
            (with_value(torch.nan), "{} must be finite"),
        ],
    ),
    *rows(arguments, "constants", BIAS[:3]),
    *rows(arguments, "winograd_cost", [(put(-1.0), "{} must be a number")]),
    *rows(arguments, "geometry", [(put((3, 1)), "geometry must|Expected|.*")]),
]


@cases.implementations("channel_basic", "channel_basic_")
@pytest.mark.parametrize("name", ["channel_basic", "channel_basic_"])
@pytest.mark.parametrize("build, argument, change, pattern", ERRORS)
def test_errors_name_the_argument(implementation, name, build, argument, change, pattern):
    values = build()
    values[argument] = change(values[argument])
    errors = ValueError if argument != "geometry" else (ValueError, RuntimeError)
    check_error(cases.implementation_of(implementation), name, values, pattern, errors)


@cases.implementations("channel_basic_")
def test_in_place_with_downsample(implementation):
    case = example(downsample=True)
    with pytest.raises(ValueError, match="^weights must have no downsample"):
        cases.implementation_of(implementation)("channel_basic_", case.block.x, *case.arguments)


@needs.OPCHECK
@pytest.mark.parametrize("changes", [{}, {"dtype": torch.bfloat16}, {"winograd": "only"}], ids=str)
def test_opcheck(changes):
    case = example(**changes)
    for name in ("channel_basic", "channel_basic_"):
        op = getattr(torch.ops.las_mm, name).default
        torch.library.opcheck(op, (case.block.x.clone(), *case.arguments))


def test_flops_follow_both_masks():
    case = example(downsample=True)
    b = case.block
    x, values = b.x, case.arguments
    with FlopCounterMode(display=False) as counter:
        torch.ops.las_mm.channel_basic(x, *values)
    wanted = 4 * case.wanted.sum(1)
    halo = cases.read_by(b.kept, b.size, 1, 1).sum((1, 2, 3))
    macs = 9 * (wanted * 8 * (halo + b.kept.sum((1, 2, 3)))).sum() + 2 * 7 * 9 * 8 * 8
    assert counter.get_total_flops() == 2 * macs.item()
