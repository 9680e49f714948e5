"""The CUDA kernels on a GPU: the drawn cases of test_sparse_ops.py, and a CUDA graph of a network.

`make test-gpu` runs these, then some of them under compute-sanitizer. What is expected comes from
the CPU: from the Python reference in float32 on the very values (each of 16 bits is one in
float32), or, where the kernel decides by itself, from the definition in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from las_mm import drawn_masks as masks
from las_mm import ops
from las_mm.benchmark import cuda_engines
from las_mm.benchmark.contest import relative_error
from las_mm.benchmark.subject import randomize
from las_mm.models import LASResNet, sparse

from . import cases
from .test_channel_ops import ChannelBlock, channel_blocks
from .test_excitation import excited_blocks
from .test_sparse_ops import MASKERS, SCATTERS, check_decisions, make_masker

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=f"NO GPU: torch {torch.__version__} (CUDA {torch.version.cuda}) sees none",
)

KERNELS = (
    "channel_bottleneck",
    "channel_bottleneck_",
    "channel_mean",
    "conv1x1_scatter_add_",
    "gather_conv3x3",
    "masker_conv1x1",
    "patch_mask",
    "sparse_bottleneck",
    "sparse_bottleneck_",
    "spatial_mask",
)


@dataclass(frozen=True)
class Precision:
    """How a kernel multiplies, and the error that this allows, relative to the largest term."""

    dtype: torch.dtype
    tf32: bool
    tolerance: float


PRECISIONS = {
    "float32": Precision(torch.float32, False, cases.TOLERANCE[torch.float32]),
    "tf32": Precision(torch.float32, True, 5e-3),
    "bfloat16": Precision(torch.bfloat16, False, cases.TOLERANCE[torch.bfloat16]),
    "float16": Precision(torch.float16, False, 5e-3),
}


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """at::empty returns NaN, so that an output position that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_are_built(name):
    """Without them the dispatcher would run the reference on the GPU, and compare it to itself."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"las_mm::{name}", "CUDA"), (
        "build with FORCE_CUDA=1 pip install -e . --no-build-isolation"
    )


def test_precisions_set_one_by_one(monkeypatch):
    """torch's newer interface; asked without an operation, it raises once they differ."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip(f"torch {torch.__version__} has one precision for all operations")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    try:
        x = torch.rand(1, 4, 3, 3, device="cuda")
        assert relative_error([ops.channel_mean(x)], [x.mean(dim=(2, 3))]) < 1e-5
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
        torch.backends.cudnn.rnn.fp32_precision = before


# Drawn cases -------------------------------------------------------------------------------------


def drawn(strategy, examples):
    """Run ``check(precision, case)`` for drawn cases, the same in every run, per precision."""

    def decorate(check):
        @pytest.mark.parametrize("precision", PRECISIONS.values(), ids=list(PRECISIONS))
        def test(precision):
            @cases.drawn(strategy, examples)
            def every(case):
                with cuda_engines.settings(precision.tf32, measure=False):
                    check(precision, case)

            every()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def adapt(block, precision, **changes):
    """The block in this precision; a GPU has no Winograd form, so conv2's weight is there."""
    plain = precision.dtype == torch.float32 and block.winograd != "none"
    winograd = "both" if plain else "none"
    return replace(block, dtype=precision.dtype, winograd=winograd, **changes)


def on_gpu(x):
    """The same values in the same memory layout, with what lies around them."""
    if x is None:
        return None
    return cases._flat(x).cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def pack(block, kernels, device):
    """Weights for the ops, packed on ``device``."""
    packed = [
        ops.pack_conv(kernel.to(device), block.groups if i == 1 else 1)
        for i, kernel in enumerate(kernels)
    ]
    return [cases.strided(w) for w in packed] if block.strided_parameters else packed


def gpu_arguments(block):
    """What follows ``x`` in the schema of the bottleneck, on the GPU."""
    winograd = None
    if block.winograd != "none":
        winograd = ops.pack_winograd(block.kernels[1].cuda())
    return (
        on_gpu(block.mask),
        pack(block, block.kernels, "cuda"),
        [on_gpu(bias) for bias in block.biases],
        winograd,
        on_gpu(block.shortcut),
        *block.args,
        block.winograd_cost,
        block.dense and [on_gpu(weight) for weight in block.dense],
        1.0 if block.dense_above is None else block.dense_above,
    )


def reference_bottleneck(block, x):
    """The bottleneck by the Python reference on the CPU, and the scale of its terms."""
    kernels = [kernel.float() for kernel in block.kernels]
    shortcut = None if block.shortcut is None else block.shortcut.float()
    weights = pack(block, kernels, "cpu")
    rest = (block.mask, weights, block.biases, None, shortcut, *block.args, 0.0)
    expected = cases.REFERENCES["sparse_bottleneck"](x.float(), *rest)
    return expected, block.expected(x)[1]


def call(name, *arguments):
    return getattr(torch.ops.las_mm, name).default(*arguments)


def assert_close(actual, expected, scale, precision):
    """As cases.assert_close, by the tolerance of the precision."""
    assert actual.is_cuda and actual.dtype == precision.dtype and actual.shape == expected.shape
    error = (actual.cpu().double() - expected.double()).masked_fill(expected.isnan(), 0)
    worst = error.abs().max().item() if error.numel() else 0.0
    assert worst <= precision.tolerance * scale, f"off by {worst:.3g}, values up to {scale:.3g}"


@drawn(cases.blocks(), 300)
def test_bottleneck(precision, block):
    block = adapt(block, precision)
    x, arguments = on_gpu(block.x), gpu_arguments(block)
    mask, weights, biases, winograd, shortcut, *_ = arguments
    untouched = cases.Untouched(x, mask, *weights, *biases, winograd, shortcut)
    actual = call("sparse_bottleneck", x, *arguments)
    untouched.check()
    assert_close(actual, *reference_bottleneck(block, block.x), precision)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    if not block.downsample and not block.poison:  # dropped outputs are exact
        dropped = ~block.kept.expand_as(block.x)
        assert torch.equal(actual.cpu()[dropped], block.x.relu()[dropped])


@drawn(cases.blocks(in_place=True), 200)
def test_bottleneck_in_place(precision, block):
    block = adapt(block, precision)
    features = block.x
    # Dense convolutions rely on x being the output of a ReLU also where it is dropped.
    positive = features.abs_() if block.seed % 2 or block.dense else features
    x, arguments = on_gpu(positive), gpu_arguments(block)
    untouched = cases.Untouched(*arguments[1], *arguments[2], output=x)
    assert call("sparse_bottleneck_", x, *arguments) is None
    untouched.check()
    expected, scale = reference_bottleneck(block, positive)
    dropped = ~block.kept.expand_as(positive)
    assert cases.same_bits(x.cpu()[dropped], positive[dropped])  # negative or NaN as they may be
    assert_close(x, expected.masked_fill(dropped, torch.nan), scale, precision)


def adapt_channels(case, precision):
    """As :func:`adapt`, of a block that skips channels."""
    return replace(case, block=adapt(case.block, precision))


def channel_arguments(case):
    """What follows ``x`` in the schema of ``channel_bottleneck``, on the GPU."""
    mask, weights, biases, winograd, *rest = gpu_arguments(case.block)[:10]
    constants = case.constants and [on_gpu(vector) for vector in case.constants]
    return (mask, on_gpu(case.channel_mask), weights, biases, constants, winograd, *rest)


@drawn(channel_blocks(cases.blocks()), 200)
def test_channels(precision, case):
    case = adapt_channels(case, precision)
    x, arguments = on_gpu(case.block.x), channel_arguments(case)
    untouched = cases.Untouched(x, arguments[1], *arguments[2])
    actual = call("channel_bottleneck", x, *arguments)
    untouched.check()
    assert_close(actual, *case.expected(case.block.x), precision)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@drawn(channel_blocks(cases.blocks(in_place=True)), 100)
def test_channels_in_place(precision, case):
    case = adapt_channels(case, precision)
    positive = case.block.x.abs_()
    x, arguments = on_gpu(positive), channel_arguments(case)
    untouched = cases.Untouched(*arguments[2], output=x)
    assert call("channel_bottleneck_", x, *arguments) is None
    untouched.check()
    expected, scale = case.expected(positive)
    dropped = ~case.block.kept.expand_as(positive)
    assert cases.same_bits(x.cpu()[dropped], positive[dropped])
    assert_close(x, expected.masked_fill(dropped, torch.nan), scale, precision)


@drawn(excited_blocks(), 150)
def test_excitation(precision, case):
    block = replace(adapt(case.block, precision), winograd="none")
    channels = case.channels and replace(case.channels, block=block)
    case = replace(case, block=block, channels=channels)
    arguments = gpu_arguments(block) if channels is None else channel_arguments(channels)
    weights = [on_gpu(weight) for weight in case.weights]
    actual = call(case.name, on_gpu(block.x), *arguments, weights)
    assert_close(actual, *case.expected(block.x), precision)
    again = call(case.name, on_gpu(block.x), *arguments, weights)
    assert torch.equal(actual, again)  # all sums have a fixed order


@drawn(cases.blocks(), 60)
def test_channel_mean(precision, block):
    block = adapt(block, precision, poison=False)
    actual = call("channel_mean", on_gpu(block.x))
    assert actual.is_cuda and actual.dtype == torch.float32
    error = (actual.cpu().double() - block.x.double().mean((2, 3))).abs()
    assert (error <= 1e-5 * block.x.double().abs().mean((2, 3)) + 1e-9).all()


@drawn(MASKERS, 150)
def test_spatial_mask(precision, case):
    block, *offset_kind = case
    block = adapt(block, precision, poison=False)
    masker = make_masker(block, *offset_kind)
    x, on_device = on_gpu(block.x), [on_gpu(part) for part in masker]
    geometry = (block.granularity, block.strides, block.dilation)
    mask, rates = call("spatial_mask", x, *on_device, *geometry)
    assert torch.equal(call("patch_mask", x, *on_device, *geometry), mask)
    check_decisions(block.x, block, masker, mask.cpu(), rates.cpu())


@drawn(MASKERS, 150)
def test_masker_conv1x1(precision, case):
    block, *offset_kind = case
    block = adapt(block, precision, poison=False)
    masker = make_masker(block, *offset_kind)
    x, on_device = on_gpu(block.x), [on_gpu(part) for part in masker]
    (weight, *_), bias = pack(block, block.kernels[:1], "cuda"), block.biases[0]
    geometry = (block.granularity, block.strides, block.dilation)
    mask, rates, hidden = call("masker_conv1x1", x, *on_device, weight, on_gpu(bias), *geometry)
    halo = check_decisions(block.x, block, masker, mask.cpu(), rates.cpu())
    kernel = block.kernels[0].double()
    dense = F.conv2d(block.x.double(), kernel, bias.double(), block.strides[0])
    expected = torch.where(halo, dense.relu(), 0.0)
    assert_close(hidden, expected, dense.abs().max().item(), precision)
    assert not hidden.cpu()[~halo.expand_as(hidden)].any()
    assert hidden.is_contiguous(memory_format=torch.channels_last)


@drawn(st.tuples(cases.blocks(), st.booleans()), 200)
def test_gather_conv3x3(precision, case):
    block, widen = case
    block = adapt(block, precision, mask_kind=block.mask_kind or "0.5")
    stride, groups = block.strides[1], block.groups
    width, size = block.channels[1], cases.out_size(block.size, block.strides[0])
    hidden = block.features(width, size, block.layout)
    c_out = 2 * width if widen else width
    kernel = cases.make_kernel(block.generator, c_out, width // groups, 3, block.dtype)
    bias = cases.make_bias(block.generator, c_out)
    geometry = (block.granularity, stride, block.dilation, groups)
    weight = ops.pack_conv(kernel.cuda(), groups)
    actual = call(
        "gather_conv3x3", on_gpu(hidden), on_gpu(block.mask), weight, on_gpu(bias), *geometry
    )
    weight = ops.pack_conv(kernel.float(), groups)
    reference = cases.REFERENCES["gather_conv3x3"]
    expected = reference(hidden.float(), block.mask, weight, bias, *geometry)
    padding = (stride, block.dilation, block.dilation, groups)
    dense = F.conv2d(hidden.double(), kernel.double(), bias.double(), *padding)
    assert_close(actual, expected, dense.abs().max().item(), precision)
    assert not actual.cpu()[~block.kept.expand_as(actual)].any()
    assert actual.is_contiguous(memory_format=torch.channels_last)


@drawn(SCATTERS, 200)
def test_conv1x1_scatter_add(precision, case):
    block, layout = case
    block = adapt(block, precision)
    c_out, width, _ = block.channels
    x = block.features(width, block.size, block.layout)
    residual = block.features(c_out, block.size, layout if block.seed % 2 else block.layout)
    kernel, bias = block.kernels[2], block.biases[2]
    updated, weight = on_gpu(residual), ops.pack_conv(kernel.cuda())
    untouched = cases.Untouched(weight, output=updated)
    mask = on_gpu(block.mask)
    call("conv1x1_scatter_add_", updated, on_gpu(x), mask, weight, on_gpu(bias), block.granularity)
    untouched.check()
    expected, weight = residual.float().clone(), ops.pack_conv(kernel.float())
    reference = cases.REFERENCES["conv1x1_scatter_add_"]
    reference(expected, x.float(), block.mask, weight, bias, block.granularity)
    branch = F.conv2d(x.double(), kernel.double(), bias.double())
    scale = max(branch.abs().max().item(), residual.abs().max().item())
    assert_close(updated, expected, scale, precision)
    dropped = ~block.kept.expand_as(residual)
    assert torch.equal(updated.cpu()[dropped], residual[dropped])


# A whole network ---------------------------------------------------------------------------------


def test_cuda_graph_of_skipped_channels():
    """As below, of the op: images with none, some and all of the channels."""
    block = cases.Block(2, (20, 23), (64, 48, 64), dtype=torch.float16, layout="channels_last")
    case = ChannelBlock(block, 2, ("0.6", "none"), True)
    x, arguments = on_gpu(block.x), channel_arguments(case)
    torch.use_deterministic_algorithms(False)  # filling memory is no part of the graph
    replay = cuda_engines.Replay(lambda: [call("channel_bottleneck", x, *arguments)])
    for kinds in (("all", "0.4"), ("one", "0.9"), ("none", "none")):
        arguments[1].copy_(replace(case, kinds=kinds).channel_mask)
        (recorded,) = replay()
        assert torch.equal(recorded, call("channel_bottleneck", x, *arguments)), kinds


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_cuda_graph_of_a_network(name):
    """Recorded with one mask, replayed with others: nothing may depend on the recorded counts."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    shape, tolerance = (2, 3, 96, 128), cuda_engines.DYNAMIC_TOLERANCE[name]
    backbone = LASResNet(50, out_indices=(0, 1, 2, 3)).eval()
    randomize(backbone)
    backbone.to("cuda", dtype)

    def draw(rate, seed):
        return masks.make_offsets(masks.make_masks(backbone, shape, rate, "blob", seed), "cuda")

    offsets = draw(0.5, 0)
    masks.set_offsets(backbone, offsets)
    x = torch.randn(shape).to("cuda", dtype)

    @torch.inference_mode()
    def run():
        return [output.float() for output in backbone(x)]

    torch.use_deterministic_algorithms(False)  # filling memory is no part of the graph
    with torch.inference_mode():
        assert sparse.wanted(x), "the sparse path does not run"
    with cuda_engines.settings(tf32=False):
        replay = cuda_engines.Replay(run)
        for seed, rate in enumerate((0.5, 0.25, 1.0, 0.0), start=1):
            x.copy_(torch.randn(shape))
            for offset, other in zip(offsets, draw(rate, seed)):
                offset.copy_(other)
            eager = run()
            recorded = replay()
            assert relative_error(recorded, eager) <= tolerance / 10, f"rate {rate}"
            with sparse.masked_dense():
                dense = run()
            assert relative_error(recorded, dense) <= tolerance, f"rate {rate}"
