"""What the tests of the sparse ops share: drawn cases and an independent, masked-dense definition.

A case is drawn by hypothesis as a few small numbers; the tensors follow from them and a seed.
``LAS_MM_HYPOTHESIS_SCALE`` multiplies the number of cases.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from las_mm import ops
from las_mm.ops import (
    basic,
    basic_channels,
    bottleneck,
    channels,
    convolution,
    dense_layer,
    dense_transition,
    maps,
    masks,
    packed_convolution,
    packing,
)

SCALE = float(os.environ.get("LAS_MM_HYPOTHESIS_SCALE", 1))
SANITIZED = "LAS_MM_SANITIZE" in os.environ
REFERENCE_SHARE = 0.15  # of the cases that the native kernel gets
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
GUARD = 4096.0  # lies in storage beside what an op may touch

REFERENCES = {
    "sparse_bottleneck": bottleneck._reference,
    "sparse_bottleneck_": bottleneck._reference_,
    "sparse_basic": basic._reference,
    "sparse_basic_": basic._reference_,
    "channel_basic": basic_channels._reference,
    "channel_basic_": basic_channels._reference_,
    "sparse_dense_layer_": dense_layer._reference,
    "channel_bottleneck": channels._reference,
    "channel_bottleneck_": channels._reference_,
    "channel_mask": channels._channel_mask_reference,
    "channel_mean": channels._channel_mean_reference,
    "dense_transition_": dense_transition._reference,
    "masker_conv1x1": convolution._masker_conv1x1_reference,
    "gather_conv3x3": convolution._gather_conv3x3_reference,
    "conv1x1_scatter_add_": convolution._conv1x1_scatter_add_reference,
    "conv_pool_stem": maps._conv_pool_stem_reference,
    "spatial_mask": masks._spatial_mask_reference,
    "patch_mask": lambda *arguments: masks._spatial_mask_reference(*arguments)[0],
    "packed_conv2d": packed_convolution._reference,
    "pack_conv": packing._pack_conv_reference,
}


# Implementations ---------------------------------------------------------------------------------


def has_native(name: str) -> bool:
    """Whether the dispatcher has a CPU kernel of ``las_mm::name``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"las_mm::{name}", "CPU")


def needs_native(*names: str):
    missing = [name for name in names if not has_native(name)]
    return pytest.mark.skipif(
        bool(missing),
        reason=f"NATIVE OPS NOT BUILT: {', '.join(missing)}; "
        "run `pip install -e . --no-build-isolation`",
    )


def implementation_of(kind: str):
    """``call(name, *arguments)`` that runs the reference or what the dispatcher has."""

    def call(name, *arguments):
        if kind == "reference":
            return REFERENCES[name](*arguments)
        return getattr(torch.ops.las_mm, name).default(*arguments)

    return call


def implementations(*names: str):
    """Parametrises ``implementation``; native is skipped unless all of ``names`` are built."""
    return pytest.mark.parametrize(
        "implementation",
        [
            pytest.param("reference", id="reference"),
            pytest.param("native", id="native", marks=needs_native(*names)),
        ],
    )


def scaled(examples: float) -> int:
    """Number of cases to draw, under ``LAS_MM_HYPOTHESIS_SCALE``."""
    return max(1, round(examples * SCALE))


def drawn(strategy, examples: float, **changes):
    """Decorates ``check(case)``: calling it checks drawn cases, the same in every run."""
    how = dict(
        max_examples=scaled(examples),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda check: settings(**{**how, **changes})(given(strategy)(check))


def for_all(strategy, examples: int, *names: str):
    """Run ``check(call, case)`` for drawn cases, the same in every run, and both implementations.

    Args:
        strategy: Draws a case.
        examples: How many the native kernels get; the reference gets a share.
        names: The ops that ``check`` calls.
    """

    def decorate(check):
        @implementations(*names)
        def test(implementation):
            share = 1 if implementation == "native" else REFERENCE_SHARE

            @drawn(strategy, examples * share)
            def every(case):
                check(implementation_of(implementation), case)

            every()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.check, test.strategy = check, strategy  # for other implementations
        return test

    return decorate


@contextlib.contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Storage -----------------------------------------------------------------------------------------

DENSE = ["contiguous", "channels_last"]
VIEWS = ["slice", "channels", "channels_last_slice", "transposed"]
LAYOUTS = [*DENSE, "channels_last", *VIEWS, "expanded"]  # expanded: not where it is written to


def stored(values: torch.Tensor, layout: str) -> torch.Tensor:
    """``values`` (N, C, H, W) in a memory layout; views lie amid guard values."""
    images, channels, height, width = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1].expand_as(values)
    if layout == "channels":  # some of a channels_last map's
        wide = F.pad(values, (0, 0, 0, 0, 1, 3), value=GUARD)
        return wide.contiguous(memory_format=torch.channels_last)[:, 1:-3]
    if layout == "transposed":
        buffer = values.new_full((images + 1, channels, width + 1, height), GUARD)
        view = buffer[1:, :, :-1].transpose(2, 3)
    else:
        shape = (images + 1, channels + 2, height + 2, width + 3)
        buffer = values.new_full(shape, GUARD)
        if layout == "channels_last_slice":
            buffer = buffer.contiguous(memory_format=torch.channels_last)
        view = buffer[1:, 1:-1, 1:-1, 2:-1]
    return view.copy_(values)


def strided(vector: torch.Tensor) -> torch.Tensor:
    """The same values, every other of a longer vector."""
    buffer = vector.new_full((2 * vector.numel(),), GUARD if vector.dtype.is_floating_point else 1)
    return buffer[::2].copy_(vector.flatten())


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All that lies in the storage of ``x``."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


class Untouched:
    """Remembers the storages of tensors; ``check`` says that nothing was written.

    Args:
        inputs: Tensors that an op only reads.
        output: Tensor that it updates; only what lies around it is checked.
    """

    def __init__(self, *inputs: torch.Tensor | None, output: torch.Tensor | None = None):
        self.inputs = [_flat(x) for x in inputs if x is not None]
        if output is not None:
            covered = torch.zeros(_flat(output).shape, dtype=torch.bool)
            covered.as_strided(output.shape, output.stride(), output.storage_offset()).fill_(True)
            self.around, self.output = ~covered, _flat(output)
            self.before = self.output[self.around]
        else:
            self.output = None
        self.copies = [x.clone() for x in self.inputs]

    def check(self) -> None:
        for now, before in zip(self.inputs, self.copies):
            assert same_bits(now, before), "an input was written to"
        if self.output is not None:
            assert same_bits(self.output[self.around], self.before), "storage around the output"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, NaN equal to NaN."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


# Masks -------------------------------------------------------------------------------------------

MASK_KINDS = ["empty", "full", "single", "edge", "0.1", "0.5", "0.9"]
GRANULARITIES = [1, 2, 3, 4, 5, 6, 7, 8, 9, ops.LAYER]


def ceil_div(a: int, b: int) -> int:
    return math.ceil(a / b)


def out_size(size, *strides) -> list[int]:
    for stride in strides:
        size = [ceil_div(n, stride) for n in size]
    return list(size)


def make_mask(kind, images, size, granularity, dtype=torch.bool, generator=None, view=False):
    """A mask for ``size`` outputs; floating-point ones take values on both sides of 0.5."""
    grid = [ceil_div(n, granularity) for n in size]
    kept = torch.zeros(images, 1, *grid, dtype=torch.bool)
    uniform = torch.rand(kept.shape, generator=generator)
    if kind == "full":
        kept[:] = True
    elif kind == "single" and kept.numel():
        kept.view(-1)[uniform.flatten().argmax()] = True
    elif kind == "edge":
        kept[:, :, -1], kept[:, :, :, -1] = True, True
    elif kind != "empty":
        kept = uniform < float(kind)
    mask = kept.to(dtype)
    if dtype.is_floating_point:
        above = torch.tensor([1.0, 0.625, 3.0])[(uniform * 99).long() % 3]
        below = torch.tensor([0.0, 0.5, -2.0])[(uniform * 99).long() % 3]
        mask = torch.where(kept, above, below).to(dtype)
    if view:
        mask = torch.stack([mask, ~mask if dtype == torch.bool else mask + 7], -1)[..., 0]
    return mask


def expand(mask, size, granularity):
    """Decision per output, bool (N, 1, H, W)."""
    granularity = min(granularity, max(size))
    kept = (mask.double() > 0.5).repeat_interleave(granularity, 2)
    return kept.repeat_interleave(granularity, 3)[:, :, : size[0], : size[1]]


def read_by(kept, size, stride, dilation):
    """What a 3x3 convolution reads for ``kept``: where its adjoint leads, bool (N, 1, H, W)."""
    beyond = [n - 1 - (out - 1) * stride for n, out in zip(size, kept.shape[2:])]
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    return F.conv_transpose2d(
        kept.double(), ones, None, stride, dilation, beyond, dilation=dilation
    ).ge(0.5)


# The definition ----------------------------------------------------------------------------------


def masked_dense(
    x, mask, kernels, biases, shortcut, granularity, strides, dilation, groups, skip=None
):
    """relu(identity + mask * branch) in float64, and the scale of its terms for tolerances.

    ``skip(hidden, i)`` may change the outputs of conv1 (``i == 0``) and conv2.
    """
    skip = skip or (lambda hidden, i: hidden)
    x, kernels, biases = x.double(), [k.double() for k in kernels], [b.double() for b in biases]
    out = skip(F.conv2d(x, kernels[0], biases[0], strides[0]).relu(), 0)
    out = F.conv2d(
        out, kernels[1], biases[1], strides[1], dilation, dilation=dilation, groups=groups
    )
    branch = F.conv2d(skip(out.relu(), 1), kernels[2], biases[2])
    if len(kernels) == 3:
        identity = x
    elif shortcut is None:
        identity = F.conv2d(x, kernels[3], biases[3], strides[0] * strides[1])
    else:
        identity = F.conv2d(shortcut.double(), kernels[3], biases[3])
    if mask is not None:
        branch = torch.where(expand(mask, branch.shape[2:], granularity), branch, 0.0)
    scale = max(t.nan_to_num(0).abs().max().item() if t.numel() else 0 for t in (identity, branch))
    return (identity + branch).relu(), scale


def assert_close(actual, expected, scale, dtype):
    """``|actual - expected| <= tolerance * scale`` wherever ``expected`` is a number."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.double() - expected).masked_fill(expected.isnan(), 0)
    worst = error.abs().max().item() if error.numel() else 0.0
    assert worst <= TOLERANCE[dtype] * scale, f"off by {worst:.3g}, values up to {scale:.3g}"


# Blocks ------------------------------------------------------------------------------------------

CHANNELS = [1, 3, 8, 16, 20, 24, 40, 64, 72, 136]
SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [torch.float32, torch.float32, torch.bfloat16]
STRIDES = [(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]
DILATIONS = [1, 1, 1, 2, 3, 25]


def make_kernel(generator, out, depth, kernel, dtype):
    """Weights that keep the magnitude of what they are applied to."""
    weight = torch.randn(out, depth, kernel, kernel, generator=generator)
    return (weight * math.sqrt(2 / (depth * kernel * kernel))).to(dtype)


def make_bias(generator, out):
    return 0.3 * torch.randn(out, generator=generator)


@dataclass(frozen=True)
class Block:
    """A drawn bottleneck with its input; tensors are made once and never change."""

    images: int
    size: tuple[int, int]
    channels: tuple[int, int, int]  # in, width, out
    granularity: int = 3
    mask_kind: str | None = "0.5"  # None: no mask
    mask_dtype: torch.dtype = torch.bool
    mask_view: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    strides: tuple[int, int] = (1, 1)
    dilation: int = 1
    groups: int = 1
    downsample: bool = False
    shortcut_channels: int | None = None  # None: the downsample convolution reads x
    winograd: str = "none"  # none, both (the direct weight is there too), only
    winograd_cost: float = 1.0
    dense_above: float | None = None  # None: no dense weights
    strided_parameters: bool = False
    poison: bool = False  # NaN in x where nothing that is computed reads it
    threads: int = 1
    seed: int = 0

    @cached_property
    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    @property
    def out_size(self):
        return out_size(self.size, *self.strides)

    @property
    def args(self):
        return self.granularity, self.strides, self.dilation, self.groups

    @cached_property
    def kernels(self):
        c_in, width, c_out = self.channels
        shapes = [(width, c_in, 1), (width, width // self.groups, 3), (c_out, width, 1)]
        if self.downsample:
            shapes.append((c_out, self.shortcut_channels or c_in, 1))
        return [make_kernel(self.generator, *shape, self.dtype) for shape in shapes]

    @cached_property
    def biases(self):
        vectors = [make_bias(self.generator, len(kernel)) for kernel in self.kernels]
        return [strided(v) for v in vectors] if self.strided_parameters else vectors

    @cached_property
    def weights(self):
        packed = [
            ops.pack_conv(kernel, self.groups if i == 1 else 1)
            for i, kernel in enumerate(self.kernels)
        ]
        if self.winograd == "only":
            packed[1] = packed[1].new_empty(0)
        return [strided(w) for w in packed] if self.strided_parameters else packed

    @cached_property
    def winograd_weight(self):
        if self.winograd == "none":
            return None
        packed = ops.pack_winograd(self.kernels[1])
        return strided(packed) if self.strided_parameters else packed

    @cached_property
    def dense(self):
        if self.dense_above is None:
            return None
        if self.strided_parameters:
            return [stored(kernel, "channels_last") for kernel in self.kernels]
        return self.kernels

    @cached_property
    def mask(self):
        if self.mask_kind is None:
            return None
        arguments = (self.images, self.out_size, self.granularity, self.mask_dtype)
        return make_mask(self.mask_kind, *arguments, self.generator, self.mask_view)

    @cached_property
    def kept(self):
        """Decision per output."""
        if self.mask is None:
            return torch.ones(self.images, 1, *self.out_size, dtype=torch.bool)
        return expand(self.mask, self.out_size, self.granularity)

    def features(self, channels, size, layout):
        values = torch.randn(self.images, channels, *size, generator=self.generator)
        return stored(values.to(self.dtype), layout)

    @cached_property
    def x(self):
        x = self.features(self.channels[0], self.size, self.layout)
        if self.poison:
            hidden = read_by(
                self.kept, out_size(self.size, self.strides[0]), self.strides[1], self.dilation
            )
            read = torch.zeros(self.images, 1, *self.size, dtype=torch.bool)
            read[:, :, :: self.strides[0], :: self.strides[0]] = hidden
            x.copy_(torch.where(read, x, math.nan))
        return x

    @cached_property
    def shortcut(self):
        if not self.shortcut_channels:
            return None
        return self.features(self.shortcut_channels, self.out_size, self.layout)

    @property
    def arguments(self):
        """What follows ``x`` in the schema."""
        return (
            self.mask,
            self.weights,
            self.biases,
            self.winograd_weight,
            self.shortcut,
            *self.args,
            self.winograd_cost,
            self.dense,
            1.0 if self.dense_above is None else self.dense_above,
        )

    @property
    def inputs(self):
        """All tensors but ``x``."""
        return [
            self.mask,
            *self.weights,
            *self.biases,
            *self.kernels,
            *(self.dense or []),
            self.winograd_weight,
            self.shortcut,
        ]

    def expected(self, x):
        """The definition applied to ``x``, and the scale of its terms."""
        return masked_dense(x, self.mask, self.kernels, self.biases, self.shortcut, *self.args)


@st.composite
def blocks(draw, in_place=False, plain=False):
    """Draws a :class:`Block`.

    Args:
        in_place: Only blocks that ``sparse_bottleneck_`` takes.
        plain: Only what the unfused ops can express: a mask, no downsample convolution.
    """

    def pick(*choices):
        return draw(st.sampled_from(choices))

    dtype = pick(*DTYPES)
    no_branch = in_place or plain
    strides = (1, 1) if no_branch else pick(*STRIDES)
    downsample = not no_branch and (strides != (1, 1) or draw(st.booleans()))
    shortcut = pick(None, *CHANNELS) if downsample and draw(st.booleans()) else None
    c_in, width = pick(*CHANNELS), pick(*CHANNELS)
    winograd, cost, dilation, groups = "none", pick(0.0, 1.0, 1e9), 1, 1
    if dtype == torch.float32 and strides[1] == 1 and draw(st.booleans()):
        winograd = pick("none", "both", "only")
    else:
        dilation = pick(*DILATIONS)
        groups = pick(*[n for n in (1, 1, 2, 4, width) if width % n == 0])
    kind = pick(*MASK_KINDS) if plain else pick(None, *MASK_KINDS)
    dense_above = pick(None, None, 0.0, 0.5, 1.0)
    poison = winograd == "none" and not downsample and dense_above is None and kind
    poison = poison and draw(st.booleans())
    if poison or no_branch:
        layout = pick(*DENSE, *VIEWS)
    else:
        layout = pick(*LAYOUTS)
    return Block(
        images=draw(st.integers(1, 3)),
        size=draw(SIZES),
        channels=(c_in, width, pick(*CHANNELS) if downsample else c_in),
        granularity=pick(*GRANULARITIES),
        mask_kind=kind,
        mask_dtype=pick(*masks.MASK_DTYPES),
        mask_view=draw(st.booleans()),
        dtype=dtype,
        layout=layout,
        strides=strides,
        dilation=dilation,
        groups=groups,
        downsample=downsample,
        shortcut_channels=shortcut,
        winograd=winograd,
        winograd_cost=cost,
        dense_above=dense_above,
        strided_parameters=draw(st.integers(0, 3)) == 0,
        poison=bool(poison),
        threads=draw(st.integers(1, 2)),
        seed=draw(SEEDS),
    )
