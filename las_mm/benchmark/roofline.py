"""How fast a GPU could run a network at best: bytes and FLOPs of each kernel, and its roofline.

The floor of a kernel is max(bytes / bandwidth, FLOPs / peak), that of a network the sum over its
kernels, which run one after the other. A kernel reads each input once, its weights once, and writes
each output once, all from and to device memory. So the floor leaves out launches and everything
that a kernel does besides, and two things can beat it: a map that is small enough stays in the L2
cache from one kernel to the next, and a float32 convolution in Winograd form has fewer FLOPs.

The kernels of a dynamic block are: masker (scores and mask), conv1 where conv2 reads, conv2 and
conv3 at kept outputs, the residual updated in place there, and the dense downsample convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from las_mm.benchmark.engines import precision_of
from las_mm.latency.device import load_analytic_device
from las_mm.models.activation import NetworkActivation
from las_mm.models.rates import image_rates
from las_mm.network.block import BlockShape, NetworkShape
from las_mm.network.operator import (
    DILATED,
    LAYER,
    POSITION,
    Add,
    Conv,
    GlobalPool,
    Linear,
    Masker,
    Operator,
    Pool,
    Scale,
)

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a feature or weight by how a network multiplies; biases are float32 always."""
_BIAS, _DECISION = 4, 1  # bytes of a bias, and of the decision for a patch


# GPUs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """The two limits of a GPU.

    Attributes:
        name: Name to show.
        bandwidth: Of the device memory, bytes/s.
        peaks: FLOP/s by how it multiplies, dense (no 2:4 sparsity); one missing is not in hardware.
        pattern: Regular expression of the names that CUDA gives it.
        source: Where the numbers come from.
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, float]
    pattern: str
    source: str

    def peak(self, precision: str) -> float | None:
        """FLOP/s; without TF32 hardware, TF32 is float32. ``None``: not in hardware."""
        if precision == "tf32" and "tf32" not in self.peaks:
            precision = "fp32"
        return self.peaks.get(precision)


def _tx2() -> Gpu:
    """From the latency model's device file, whose numbers equal the data sheet's."""
    device = load_analytic_device("tx2")
    fp32 = 2 * device.n_pe * device.macs_per_s_per_pe
    return Gpu(
        "TX2",
        bandwidth=device.dram_bytes_per_s,
        peaks={"fp32": fp32, "fp16": 2 * fp32},
        pattern=r"Tegra X2|\bTX2\b",
        source="las_mm/latency/devices/tx2.yaml; NVIDIA Jetson TX2 Series module data "
        "sheet: 59.7 GB/s; 256 cores at 1.3 GHz, two fp16 operations in place of one fp32",
    )


# The v100 of the latency model has the 700 GB/s of the published simulation, not the peak.
GPUS = (
    Gpu(
        "V100",
        bandwidth=900e9,
        peaks={"fp32": 15.7e12, "fp16": 125e12},
        pattern=r"V100-SXM2",
        source="NVIDIA Tesla V100 GPU Accelerator data sheet, column V100 SXM2",
    ),
    Gpu(
        "A100",
        bandwidth=2039e9,
        peaks={"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12},
        pattern=r"A100-SXM\d?-80GB",
        source="NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM",
    ),
    Gpu(
        "H100",
        bandwidth=3350e9,
        peaks={"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12},
        pattern=r"H100 80GB HBM3|H100 SXM",
        source="NVIDIA H100 Tensor Core GPU data sheet and Hopper architecture whitepaper, column "
        "H100 SXM5; half of what they give with sparsity",
    ),
    _tx2(),
)


def find_gpu(name: str) -> Gpu | None:
    """The GPU that CUDA calls ``name``; ``None`` for any other, e.g. the slower PCIe cards."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, name)), None)


# Kernels -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What one kernel has to do, for the whole batch.

    Attributes:
        name: Such as ``'layer3.5.conv2'``.
        stage: Stage of its block from 1, 0 for the stem.
        bytes: Read from and written to device memory.
        flops: Floating-point operations, two for a multiply-accumulate.
    """

    name: str
    stage: int
    bytes: float
    flops: float

    def seconds(self, gpu: Gpu, precision: str) -> float | None:
        """The floor; ``None`` where the GPU lacks the precision."""
        peak = gpu.peak(precision)
        return None if peak is None else max(self.bytes / gpu.bandwidth, self.flops / peak)


def _conv(
    name: str,
    stage: int,
    size: int,
    weights: int,
    c_out: int,
    inputs: float,
    outputs: float,
    macs: float,
    mask: float = 0.0,
) -> Kernel:
    """A convolution; nothing is read where nothing is computed.

    Args:
        name, stage: See :class:`Kernel`.
        size: Bytes of a value.
        weights: Number of weights.
        c_out: Number of biases.
        inputs, outputs: Values read (a residual is one) and written.
        macs: Multiply-accumulates.
        mask: Bytes of the mask.
    """
    parameters = (weights * size + c_out * _BIAS) if outputs else 0
    return Kernel(name, stage, (inputs + outputs) * size + parameters + mask, 2 * macs)


def stem_kernels(shape: NetworkShape, batch: int, precision: str) -> list[Kernel]:
    """The dense operators before the first block, one kernel each."""
    size, kernels = BYTES[precision], []
    positions_in = batch * shape.input_hw[0] * shape.input_hw[1]
    for layer in shape.stem:
        positions = batch * layer.h_out * layer.w_out
        if isinstance(layer, Pool):
            moved = (positions_in + positions) * layer.channels * size
            kernels.append(Kernel(layer.name, 0, moved, batch * layer.macs()))
        else:
            kernels.append(_stem_conv(layer, batch, positions_in, positions, size))
        positions_in = positions
    return kernels


def _stem_conv(layer: Conv, batch: int, positions_in: int, positions: int, size: int) -> Kernel:
    weights = layer.c_out * layer.c_in // layer.groups * layer.kernel**2
    inputs, outputs = positions_in * layer.c_in, positions * layer.c_out
    macs = batch * layer.macs()
    return _conv(layer.name, 0, size, weights, layer.c_out, inputs, outputs, macs)


def block_kernels(
    block: BlockShape, batch: int, precision: str, rate: float = 1.0, halo: float = 1.0
) -> list[Kernel]:
    """The kernels of one block.

    Args:
        block: Its shape; a static one computes everything and has no masker.
        batch: Images.
        precision: A key of :data:`BYTES`.
        rate: Share of the outputs that are kept.
        halo: Share of conv1's outputs that conv2 reads for them.

    Raises:
        ValueError: The block skips channels.
    """
    if block.has_channels:
        raise ValueError(
            f"no floor is known for blocks that skip channels, {block.name} is {block.label}"
        )
    size, stage, kernels = BYTES[precision], block.stage, []
    rates = {DILATED: halo, POSITION: rate, LAYER: rate}
    pixels = batch * block.h_in * block.w_in
    mask = batch * block.n_patches * _DECISION
    available = float(pixels)  # positions that the operator before has computed

    def add(op: Operator, read: float, moved: float, flops: float) -> None:
        gated = mask if op.gates else 0
        kernels.append(Kernel(f"{block.name}.{op.name}", stage, read + moved + gated, flops))

    for op, following in zip(block.operators, (*block.operators[1:], None)):
        share = math.prod(rates[axis] for axis in op.axes)
        macs = batch * share * op.macs()
        if isinstance(op, Masker):
            moved = (pixels + 2) * op.c_in * size + 2 * _BIAS
            kernels.append(Kernel(f"{block.name}.masker", stage, moved + mask, 2 * macs))
        elif isinstance(op, Conv):
            outputs = share * batch * op.h_out * op.w_out
            read = (outputs if op.kernel == 1 else available) * op.c_in
            if isinstance(following, Add):
                read += outputs * op.c_out  # the residual, added on the way
            name, parts = f"{block.name}.{op.name}", (read, outputs * op.c_out, macs)
            weights = op.kernel**2 * op.c_in // op.groups * op.c_out
            gated = mask if op.gates else 0
            kernels.append(_conv(name, stage, size, weights, op.c_out, *parts, mask=gated))
            available = outputs
        elif isinstance(op, Pool):
            moved = (pixels + batch * op.h_out * op.w_out) * op.channels * size
            kernels.append(Kernel(f"{block.name}.{op.name}", stage, moved, pixels * op.channels))
        elif isinstance(op, (GlobalPool, Scale)):
            values = share * batch * op.channels * op.h_out * op.w_out
            add(op, values * size, values * size * isinstance(op, Scale), values)
        elif isinstance(op, Linear):
            add(op, op.c_in * op.c_out * _BIAS, batch * (op.c_in + op.c_out) * _BIAS, 2 * macs)
        elif not isinstance(op, Add):
            raise ValueError(f"no floor is known for {block.name}.{op.name}, a {type(op).__name__}")
    return kernels


def network_kernels(
    shape: NetworkShape,
    batch: int,
    precision: str,
    rates: Sequence[float] | None = None,
    halos: Sequence[float] | None = None,
) -> list[Kernel]:
    """All kernels of a network, in order.

    Args:
        shape: The network at one input size.
        batch: Images.
        precision: ``'fp32'``, ``'tf32'``, ``'bf16'`` or ``'fp16'``.
        rates: Share of kept outputs per block; without, of the static network.
        halos: Share of conv1's outputs per block.
    """
    if rates is None or halos is None:
        shape = shape.static()
        rates = halos = [1.0] * len(shape.blocks)
    kernels = stem_kernels(shape, batch, precision)
    for block, rate, halo in zip(shape.blocks, rates, halos):
        kernels += block_kernels(block, batch, precision, rate, halo)
    return kernels


def mask_shares(
    shapes: Sequence[BlockShape], masks: Sequence[Tensor | None]
) -> tuple[list[float], list[float]]:
    """Per block the share of kept outputs, and of conv1's outputs that these read.

    Args:
        shapes: The blocks.
        masks: As :func:`las_mm.drawn_masks.draw_masks` returns them.
    """
    rates, halos = [], []
    for block, mask in zip(shapes, masks):
        axis = LAYER if LAYER in block.axes else POSITION
        found = {} if mask is None else image_rates(block, {axis: mask})
        rates.append(float(found[axis].double().mean()) if found else 1.0)
        halos.append(float(found.get(DILATED, found[axis]).double().mean()) if found else 1.0)
    return rates, halos


# Results -----------------------------------------------------------------------------------------


def floor_ms(kernels: Sequence[Kernel], gpu: Gpu, precision: str) -> float | None:
    """Milliseconds that the kernels take at least; ``None`` where the GPU lacks the precision."""
    seconds = [kernel.seconds(gpu, precision) for kernel in kernels]
    return None if None in seconds else 1e3 * sum(s for s in seconds if s is not None)


def summarize(kernels: Sequence[Kernel], precisions: Sequence[str]) -> dict:
    """Bytes, FLOPs and the floors by precision and GPU, as JSON."""
    return dict(
        bytes=sum(kernel.bytes for kernel in kernels),
        flops=sum(kernel.flops for kernel in kernels),
        floor_ms={
            precision: {gpu.name: floor_ms(kernels, gpu, precision) for gpu in GPUS}
            for precision in precisions
        },
    )


def annotate(result: dict, shape: NetworkShape, activations: Sequence[NetworkActivation]) -> None:
    """Put the floors beside what was measured.

    Args:
        result: Of a benchmark; gets ``roofline``, and each of its ``rows`` gets ``floor_ms`` of the
            GPU that ran it, ``None`` if that is none of :data:`GPUS`.
        shape: The network.
        activations: What its blocks did, per entry of ``result['sweep']``.
    """
    env = result["environment"]
    batch, dtype = env["shape"][0], env["dtype"]
    precisions = (dtype, "tf32") if dtype == "fp32" else (dtype,)
    sweep = []
    for point, activation in zip(result["sweep"], activations):
        shares = activation.rates.tolist(), activation.rates_dilated.tolist()
        kernels = network_kernels(shape, batch, dtype, *shares)
        sweep.append(dict(rate=point["rate"], **summarize(kernels, precisions)))
    plain = summarize(network_kernels(shape, batch, dtype), precisions)
    gpu = find_gpu(result["device"]["name"])
    result["roofline"] = dict(
        gpu=gpu and gpu.name,
        static=plain,
        sweep=sweep,
        gpus={
            g.name: dict(bytes_per_s=g.bandwidth, flops_per_s=dict(g.peaks), source=g.source)
            for g in GPUS
        },
    )
    for row in result["rows"]:
        dynamic = row["kind"] == "ours" and row["gflops_per_s"] is None
        count = sweep[0] if dynamic else plain
        floors = count["floor_ms"][precision_of(row["engine"], dtype)]
        row["floor_ms"] = None if gpu is None else floors[gpu.name]
