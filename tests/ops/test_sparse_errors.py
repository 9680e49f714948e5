"""Wrong arguments: a ValueError that starts with the argument's name, and nothing written.

Every row changes one argument of a call that is right otherwise.
"""

import math

import pytest
import torch

from las_mm import ops

from . import cases
from .cases import Block

INF, NAN = math.inf, math.nan


# Arguments that are right ------------------------------------------------------------------------


def bottleneck(**changes):
    block = Block(2, (7, 9), (8, 24, 8), 3, **changes)
    names = ["mask", "weights", "biases", "winograd", "shortcut"]
    names += ["granularity", "strides", "dilation", "groups", "winograd_cost"]
    names += ["dense", "dense_above"]
    return dict(x=block.x, **dict(zip(names, block.arguments)))


def downsampled(**changes):
    return bottleneck(strides=(1, 2), downsample=True, shortcut_channels=5, **changes)


def with_dense():
    return bottleneck(dense_above=0.5)


def downsampled_dense():
    return downsampled(dense_above=0.5)


def bfloat16():
    return bottleneck(dtype=torch.bfloat16)


def with_winograd():
    return bottleneck(winograd="both")


def masker():
    return dict(weight=torch.ones(2, 8, 1, 1), bias=torch.zeros(2), offset=torch.zeros(2, 1, 2, 2))


GEOMETRY = dict(granularity=3, strides=(1, 2), dilation=1)


def spatial_mask():
    return dict(x=torch.randn(2, 8, 7, 9), **masker(), **GEOMETRY)


def masker_conv1x1():
    m = masker()
    return dict(
        x=torch.randn(2, 8, 7, 9),
        masker_weight=m["weight"],
        masker_bias=m["bias"],
        offset=m["offset"],
        weight=ops.pack_conv(torch.randn(12, 8, 1, 1)),
        bias=torch.zeros(12),
        **GEOMETRY,
    )


def gather_conv3x3():
    return dict(
        hidden=torch.randn(2, 12, 7, 9),
        mask=torch.ones(2, 1, 2, 2),
        weight=ops.pack_conv(torch.randn(24, 6, 3, 3), 2),
        bias=torch.zeros(24),
        granularity=3,
        stride=2,
        dilation=1,
        groups=2,
    )


def conv1x1_scatter_add_():
    return dict(
        residual=torch.randn(2, 8, 7, 9),
        x=torch.randn(2, 12, 7, 9),
        mask=torch.ones(2, 1, 3, 3),
        weight=ops.pack_conv(torch.randn(8, 12, 1, 1)),
        bias=torch.zeros(8),
        granularity=3,
    )


def conv_pool_stem():
    return dict(
        x=torch.randn(2, 3, 13, 18),
        weight=ops.pack_stem(torch.randn(8, 3, 7, 7)),
        bias=torch.zeros(8),
    )


def channel_mask():
    return dict(
        x=torch.randn(2, 8, 7, 9),
        weights=[torch.randn(5, 8), torch.randn(6, 5)],
        biases=[torch.zeros(5), torch.zeros(6)],
        offset=torch.zeros(2, 3),
    )


# What goes wrong ---------------------------------------------------------------------------------


def put(value):
    """Replaces the argument."""
    return lambda _: value


def with_value(value):
    """A copy of the tensor as float32 with one element set."""

    def change(tensor):
        tensor = tensor.float().clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def item(index, change):
    """Changes one tensor of a list."""

    def apply(tensors):
        tensors = list(tensors)
        tensors[index] = change(tensors[index])
        return tensors

    return apply


def longer(tensor):
    return torch.cat([tensor, tensor[:16]])


def shorter(tensor):
    return tensor[:-1]


def double(tensor):
    return tensor.double()


def half(tensor):
    return tensor.half()


def as_bfloat16(tensor):
    return tensor.bfloat16()


def as_int64(tensor):
    return tensor.long()


def column(tensor):
    return tensor[:, None]


def no_batch(tensor):
    return tensor[0]


def no_pixels(tensor):
    return tensor[:, :, :0]


def one_channel_less(tensor):
    return tensor[:, 1:]


def one_column_less(tensor):
    return tensor[..., 1:]


def one_column_more(tensor):
    return torch.cat([tensor, tensor[..., :1]], -1)


def one_image_less(tensor):
    return tensor[1:]


def drop_last(values):
    return values[:-1]


def repeat_last(values):
    return [*values, values[-1]]


NOT_POSITIVE = [(put(0), "{} must be positive, got 0"), (put(-3), "{} must be positive, got -3")]
MAP = [
    (no_batch, "{} must have shape .N, C, H, W."),
    (no_pixels, "{} must have shape .N, C, H, W."),
    (double, "{} must be float32 or bfloat16"),
    (half, "{} must be float32 or bfloat16"),
    (as_int64, "{} must be float32 or bfloat16"),
]
MASK = [
    (as_int64, "{} must be bool, uint8 or floating point"),
    (no_batch, "{} must have shape"),
    (one_column_less, "{} must have shape"),
    (one_column_more, "{} must have shape"),
    (one_image_less, "{} must have shape"),
    (lambda mask: mask.expand(-1, 2, -1, -1), "{} must have shape"),
    (with_value(NAN), "{} must be finite"),
    (with_value(INF), "{} must be finite"),
    (with_value(-INF), "{} must be finite"),
    (lambda mask: with_value(NAN)(mask).half(), "{} must be finite"),
    (lambda mask: with_value(INF)(mask).bfloat16(), "{} must be finite"),
    (lambda mask: with_value(NAN)(mask).double(), "{} must be finite"),
]
PACKED = [
    (longer, "{} must be packed"),
    (shorter, "{} must be packed"),
    (column, "{} must be packed"),
    (double, "{} must be (torch.float32|Float)"),
    (as_bfloat16, "{} must be ((torch.float32|Float)|packed)"),
]
BIAS = [
    (double, "{} must be (torch.float32|Float)"),
    (as_bfloat16, "{} must be (torch.float32|Float)"),
    (column, r"{} must have shape \[[0-9]+\], got \[[0-9]+, 1\]"),
    (
        lambda bias: bias[0],
        r"({} must have shape|groups must|residual must|weights? must|weights\[)",
    ),
]
STRIDES = [
    (put((0, 1)), "{} must be 1 to 32768, got 0"),
    (put((1, -1)), "{} must be 1 to 32768, got -1"),
    (put((1, 2**15 + 1)), "{} must be 1 to 32768, got 32769"),
    (put((2**63 - 1, 1)), "{} must be 1 to 32768, got 9223372036854775807"),
    (put((1, 1, 1)), r"{} must be \(stride of conv1, stride of conv2\), got"),
]
DENSE = [
    (drop_last, "dense must be None or hold {count} weights"),
    (repeat_last, "dense must be None or hold {count} weights"),
    (put([]), "dense must be None or hold {count} weights"),
]
DENSE_WEIGHT = [
    (one_channel_less, r"{} must have shape \["),
    (shorter, r"{} must have shape \["),
    (lambda weight: weight.flatten(), r"{} must have shape \["),
    (lambda weight: weight.flatten(2), r"{} must have shape \["),
    (double, "{} must be (torch.float32|Float)"),
    (as_bfloat16, "{} must be (torch.float32|Float)"),
]
OFFSET = [
    (double, "{} must be float32"),
    (as_bfloat16, "{} must be float32"),
    (one_column_less, "{} must have shape"),
    (no_batch, "{} must have shape"),
    (lambda offset: offset.expand(-1, 2, -1, -1), "{} must have shape"),
    (lambda offset: torch.cat([offset, offset]), "{} must have shape"),
]
MASKER_WEIGHT = [
    (one_channel_less, r"{} must have shape \[2, 8, 1, 1\], got \[2, 7, 1, 1\]"),
    (double, "{} must be (torch.float32|Float)"),
]
MASKER_BIAS = [
    (longer, r"{} must have shape \[2\], got \[4\]"),
    (column, r"{} must have shape \[2\], got \[2, 1\]"),
    (as_bfloat16, "{} must be (torch.float32|Float)"),
]


def rows(build, argument, changes, named=None):
    """(arguments that are right, changed argument, change, pattern of the message)."""
    return [(build, argument, change, text.format(named or argument)) for change, text in changes]


def block_rows():
    """What both bottleneck ops refuse."""
    b = bottleneck
    table = [*rows(b, "x", MAP), *rows(b, "mask", MASK), *rows(b, "granularity", NOT_POSITIVE)]
    table += [*rows(b, "dilation", NOT_POSITIVE), *rows(b, "strides", STRIDES)]
    table += rows(
        b, "x", [(one_channel_less, r"weights\[0\] must"), (as_bfloat16, r"weights\[0\]")]
    )
    table += rows(b, "x", [(one_image_less, "mask must"), (one_column_less, "mask must have")][:1])
    for i in range(3):
        table += rows(b, "weights", [(item(i, c), t) for c, t in PACKED], rf"weights\[{i}\]")
        table += rows(b, "biases", [(item(i, c), t) for c, t in BIAS], rf"biases\[{i}\]")
    table += rows(
        b, "biases", [(item(1, longer), r"biases\[1\] must have shape \[24\], got \[40\]")]
    )
    table += rows(b, "biases", [(item(0, longer), r"(biases\[1\]|weights\[0\]) must")])
    table += rows(b, "biases", [(item(2, shorter), r"(weights|strides|biases\[2\])\b")])
    table += rows(b, "weights", [(item(1, lambda w: w[:0]), r"weights\[1\] must be packed")])
    table += rows(b, "weights", [(drop_last, "weights and biases must"), (put([]), "weights and")])
    table += rows(
        b, "biases", [(drop_last, "weights and biases must"), (repeat_last, "weights and")]
    )
    table += rows(b, "groups", [(put(n), "groups must be positive and divide") for n in (0, -1, 5)])
    table += rows(b, "groups", [(put(2), r"weights\[1\] must be packed")])
    table += rows(b, "winograd_cost", [(put(n), "winograd_cost must") for n in (-1.0, NAN)])
    table += rows(b, "shortcut", [(put(torch.randn(2, 8, 7, 9)), "shortcut must be None")])
    table += rows(b, "strides", [(put((1, 2)), "(strides|weights) must")])
    table += rows(b, "winograd", [(put(torch.ones(3)), "winograd must be packed")])
    w = with_winograd
    table += rows(w, "winograd", PACKED)
    table += rows(w, "dilation", [(put(2), "winograd must be None")])
    table += rows(w, "groups", [(put(2), "winograd must be None")])
    table += rows(w, "weights", [(item(1, shorter), r"weights\[1\] must be packed")])
    table += rows(
        bfloat16, "winograd", [(put(with_winograd()["winograd"]), "winograd must be None")]
    )
    table += rows(bfloat16, "x", [(lambda x: x.float(), r"weights\[0\] must")])
    table += rows(
        bfloat16, "biases", [(item(2, as_bfloat16), r"biases\[2\] must be (torch.float32|Float)")]
    )
    return table + dense_rows(with_dense, 3)


def dense_rows(build, count):
    table = rows(build, "dense", [(c, t.format(count=count)) for c, t in DENSE])
    for i in range(count):
        changes = [(item(i, c), t) for c, t in DENSE_WEIGHT]
        table += rows(build, "dense", changes, rf"dense\[{i}\]")
    return table


def downsample_rows():
    d = downsampled
    table = rows(d, "shortcut", MAP)
    table += rows(
        d,
        "shortcut",
        [
            (as_bfloat16, "shortcut must be (torch.float32|Float)"),
            (one_image_less, "shortcut must have 2 images"),
            (one_column_less, "shortcut must have 2 images of 4x5"),
            (one_channel_less, r"weights\[3\] must be packed"),
            (put(None), r"weights\[3\] must be packed"),
        ],
    )
    table += rows(d, "weights", [(item(3, c), t) for c, t in PACKED], r"weights\[3\]")
    table += rows(d, "biases", [(item(3, c), t) for c, t in BIAS], r"biases\[3\]")
    table += rows(
        d, "biases", [(item(3, longer), r"biases\[3\] must have shape \[8\], got \[16\]")]
    )
    table += rows(d, "mask", [(put(torch.ones(2, 1, 3, 3)), "mask must have shape")])
    table += rows(d, "winograd", [(put(with_winograd()["winograd"]), "winograd must be None")])
    return table + dense_rows(downsampled_dense, 4)


def unfused_rows():
    s, m, g, c, t = (
        spatial_mask,
        masker_conv1x1,
        gather_conv3x3,
        conv1x1_scatter_add_,
        conv_pool_stem,
    )
    table = {"spatial_mask": [], "masker_conv1x1": []}
    for name, build, prefix in [("spatial_mask", s, ""), ("masker_conv1x1", m, "masker_")]:
        table[name] += rows(build, "x", MAP) + rows(build, "offset", OFFSET)
        table[name] += rows(build, f"{prefix}weight", MASKER_WEIGHT)
        table[name] += rows(build, f"{prefix}bias", MASKER_BIAS) + rows(build, "strides", STRIDES)
        for argument in ("granularity", "dilation"):
            table[name] += rows(build, argument, NOT_POSITIVE)
        table[name] += rows(build, "granularity", [(put(1), "offset must have shape")])
    table["spatial_mask"] += rows(
        s, "x", [(as_bfloat16, "weight must be (torch.bfloat16|BFloat16)")]
    )
    table["masker_conv1x1"] += rows(m, "weight", PACKED) + rows(m, "bias", BIAS)
    table["masker_conv1x1"] += rows(m, "bias", [(longer, "(bias|weight) must")])
    table["gather_conv3x3"] = [
        *rows(g, "hidden", MAP),
        *rows(g, "hidden", [(one_channel_less, "groups must"), (as_bfloat16, "weight must")]),
        *rows(g, "mask", MASK),
        *rows(g, "weight", PACKED),
        *rows(g, "bias", BIAS),
        *rows(g, "bias", [(shorter, "(bias|groups|weight) must")]),
        *rows(g, "granularity", NOT_POSITIVE),
        *rows(g, "stride", [(put(n), f"stride must be 1 to 32768, got {n}") for n in (0, -3)]),
        *rows(
            g, "stride", [(put(n), f"stride must be 1 to 32768, got {n}") for n in (32769, 2**62)]
        ),
        *rows(g, "dilation", NOT_POSITIVE),
        *rows(g, "groups", [(put(n), "groups must be positive and divide") for n in (0, -2, 5)]),
        *rows(g, "groups", [(put(1), "weight must be packed")]),
    ]
    table["conv1x1_scatter_add_"] = [
        *rows(c, "residual", MAP),
        *rows(c, "residual", [(one_channel_less, "residual must have 8 channels")]),
        *rows(c, "x", MAP),
        *rows(c, "x", [(one_channel_less, "weight must be packed"), (as_bfloat16, "x must be")]),
        *rows(c, "x", [(one_image_less, "x must have"), (one_column_less, "x must have")]),
        *rows(c, "mask", MASK),
        *rows(c, "weight", PACKED),
        *rows(c, "bias", BIAS),
        *rows(c, "bias", [(shorter, "(bias|residual|weight) must")]),
        *rows(c, "granularity", NOT_POSITIVE),
    ]
    table["conv_pool_stem"] = [
        *rows(t, "x", MAP),
        *rows(t, "x", [(one_channel_less, "weight must be packed"), (as_bfloat16, "weight must")]),
        *rows(t, "weight", PACKED),
        *rows(t, "bias", BIAS),
    ]
    k = channel_mask
    table["channel_mask"] = [
        *rows(k, "x", MAP),
        *rows(k, "x", [(one_channel_less, r"weights\[0\] must have shape \(out, 7\)")]),
        *rows(
            k,
            "weights",
            [
                (put([]), "weights and biases must be those of the same linear layers"),
                (lambda w: w[:1], "weights and biases must be those of the same linear layers"),
                (item(0, no_batch), r"weights\[0\] must have shape \(out, 8\)"),
                (item(1, lambda w: w[:, 1:]), r"weights\[1\] must have shape \(out, 5\)"),
                (item(1, double), r"weights\[1\] must be (torch.float32|Float)"),
                (item(1, lambda w: w[1:]), r"biases\[1\] must have shape \[5\]"),
            ],
        ),
        *rows(
            k,
            "biases",
            [
                (item(0, shorter), r"biases\[0\] must have shape \[5\]"),
                (item(1, as_bfloat16), r"biases\[1\] must be (torch.float32|Float)"),
            ],
        ),
        *rows(
            k,
            "offset",
            [
                (no_batch, r"offset must have shape \(1 or 2, 3\)"),
                (put(torch.zeros(3, 3)), r"offset must have shape \(1 or 2, 3\)"),
                (put(torch.zeros(1, 4)), r"offset must have shape \(1 or 2, 3\)"),
                (double, "offset must be (torch.float32|Float)"),
            ],
        ),
    ]
    return table


TABLE = {
    "sparse_bottleneck": block_rows() + downsample_rows(),
    "sparse_bottleneck_": block_rows(),
    **unfused_rows(),
}


# The tests ---------------------------------------------------------------------------------------


def tensors_of(arguments):
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            for i, tensor in enumerate(value):
                yield f"{name}[{i}]", tensor


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("kind", ["reference", "native"])
def test_right_arguments_are_right(kind, name):
    """The rows below fail for their change, not for something else."""
    if kind == "native" and not cases.has_native(name):
        pytest.skip(f"NATIVE OPS NOT BUILT: {name}")
    call = cases.implementation_of(kind)
    for build in {row[0] for row in TABLE[name]}:
        call(name, *build().values())


def error_rows():
    for name, table in TABLE.items():
        for number, (build, argument, change, pattern) in enumerate(table):
            label = f"{name}-{build.__name__}-{argument}-{number}"
            yield pytest.param(name, build, argument, change, pattern, id=label)


def check_error(call, name, arguments, pattern, errors=ValueError):
    before = [(tensor, tensor.clone()) for _, tensor in tensors_of(arguments)]
    with pytest.raises(errors, match=f"^{pattern}") as caught:
        call(name, *arguments.values())
    assert "INTERNAL ASSERT" not in str(caught.value)
    for tensor, copy in before:
        if tensor.device.type != "meta":
            assert cases.same_bits(tensor, copy), "an argument was written to"


@pytest.mark.parametrize("name, build, argument, change, pattern", error_rows())
@pytest.mark.parametrize("kind", ["reference", "native"])
def test_errors_name_the_argument(kind, name, build, argument, change, pattern):
    if kind == "native" and not cases.has_native(name):
        pytest.skip("NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`")
    arguments = build()
    arguments[argument] = change(arguments[argument])
    check_error(cases.implementation_of(kind), name, arguments, pattern)


IN_PLACE = "weights must have no downsample convolution"


@cases.implementations("sparse_bottleneck_")
def test_in_place_with_downsample(implementation):
    arguments = bottleneck(downsample=True)
    check_error(cases.implementation_of(implementation), "sparse_bottleneck_", arguments, IN_PLACE)


@cases.implementations("sparse_bottleneck_", "conv1x1_scatter_add_")
def test_writing_to_an_expanded_tensor(implementation):
    call = cases.implementation_of(implementation)
    for build, argument in [(bottleneck, "x"), (conv1x1_scatter_add_, "residual")]:
        arguments = build()
        arguments[argument] = arguments[argument][:1].expand(2, -1, -1, -1)
        name = "sparse_bottleneck_" if build is bottleneck else build.__name__
        check_error(call, name, arguments, "", (ValueError, RuntimeError))


def device_rows():
    builds = {name: [] for name in TABLE}
    for name, table in TABLE.items():
        for build in dict.fromkeys(row[0] for row in table):
            if build is not bfloat16:
                builds[name] += [(build, argument) for argument, _ in tensors_of(build())]
    for name, pairs in builds.items():
        for build, argument in pairs:
            label = f"{name}-{build.__name__}-{argument}"
            yield pytest.param(name, build, argument, id=label)


@pytest.mark.parametrize("name, build, argument", device_rows())
@pytest.mark.parametrize("kind", ["reference", "native"])
def test_one_tensor_on_another_device(kind, name, build, argument):
    """Names the tensor that differs, or another one if it is the first that differs."""
    if kind == "native" and not cases.has_native(name):
        pytest.skip("NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`")
    arguments = build()
    key, _, index = argument.partition("[")
    if index:
        arguments[key] = item(int(index[:-1]), lambda t: t.to("meta"))(arguments[key])
    else:
        arguments[key] = arguments[key].to("meta")
    first = next(iter(arguments))
    pattern = r"[a-z_\[\]0-9]+ must be .*cpu" if key == first else rf".*{key}.* must be "
    check_error(cases.implementation_of(kind), name, arguments, pattern, (ValueError, RuntimeError))
