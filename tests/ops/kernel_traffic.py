"""Bytes and multiplications of the CUDA kernels at ResNet-101's shapes, counted by the emulator.

    cd tests && python -m ops.kernel_traffic [--write ../docs/cuda.md] [--channels]

"Least" is what a kernel cannot avoid: each input row that it needs, its weights, biases and list
read once, each output written once, as through a cache that keeps everything (distinct 32-byte
sectors, counted). "Requested" is what threads ask of the L1 and L2 caches. FLOPs of tensor cores
include the padding of tiles.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from las_mm.drawn_masks import draw_masks
from las_mm.fileio import write_atomically
from las_mm.models import LASResNet

from . import cases, emulated

SIZE, RATE, DTYPE = (800, 1344), 0.5, torch.float16
TOGETHER, SQUEEZED = 2, 16  # channels of one decision, width of squeeze-and-excitation
MARKERS = ("<!-- traffic -->", "<!-- /traffic -->")
CHANNEL_MARKERS = ("<!-- channel traffic -->", "<!-- /channel traffic -->")
SECTOR = 32


def needed(block: cases.Block, kept: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Least bytes and useful multiplications of each kernel, by hand."""
    c_in, width, c_out = block.channels
    stride, outputs = block.strides[1], block.out_size
    halo = cases.read_by(kept, cases.out_size(block.size, block.strides[0]), stride, block.dilation)
    n_kept, n_halo, value = int(kept.sum()), int(halo.sum()), 2
    n_out, n_in = outputs[0] * outputs[1], block.size[0] * block.size[1]
    sides = n_kept * c_in * value if block.downsample else n_kept * c_out * value
    side_weights = c_in * c_out * value if block.downsample else 0
    patches = block.mask.numel()
    kernels = {
        "ScorePatches": ((n_in * c_in + 2 * c_in) * value + patches, 0),
        "ScorePositions": ((n_in * c_in + 2 * c_in) * value + 4 * n_in, 0),
        "DecidePatches": (4 * n_in + patches, 0),
        "ListPositions": (patches + 4 * (n_halo + (n_out if block.downsample else n_kept)), 0),
        "conv1": (
            (n_halo * (c_in + width) + c_in * width) * value + 4 * (width + n_halo),
            n_halo * c_in * width,
        ),
        "conv2": (
            (n_halo + n_kept) * width * value + 9 * width * width * value + 4 * (width + n_kept),
            n_kept * 9 * width * width,
        ),
        "conv3": (
            n_kept * (width + c_out) * value
            + sides
            + width * c_out * value
            + side_weights
            + 4 * (c_out + n_kept),
            n_kept * c_out * (width + (c_in if block.downsample else 0)),
        ),
    }
    if block.downsample:
        n_dropped = n_out - n_kept
        kernels["dropped"] = (
            n_dropped * (c_in + c_out) * value + c_in * c_out * value + 4 * (c_out + n_dropped),
            n_dropped * c_in * c_out,
        )
    return kernels


def measure(block: cases.Block, library: ctypes.CDLL) -> list[tuple]:
    """Rows of (kernel, least MB, counted / least, requested MB, useful GFLOP, counted / useful)."""
    machine = emulated.Machine(library, capability=80, blocks=432, multiprocessors=108)  # A100
    x = block.x
    weight = cases.make_kernel(block.generator, 2, block.channels[0], 1, block.dtype)
    masker = (weight, torch.zeros(2, dtype=block.dtype), None)
    machine("spatial_mask", x, *masker, block.granularity, block.strides, block.dilation)
    launches = [n for n in machine.launches() if not n.kernel.startswith(("Mean", "List"))]
    together = "ScorePatches" in launches[0].kernel  # large patches take two kernels
    names = ["ScorePatches"] if together else ["ScorePositions", "DecidePatches"]
    name = "sparse_bottleneck" if block.downsample else "sparse_bottleneck_"
    machine(name, x, *block.arguments)
    launches += machine.launches()
    names += ["ListPositions", "conv1", "conv2", "conv3", "dropped"]
    least = needed(block, block.kept)
    return compare({name: least[name] for name in names if name in least}, launches)


def compare(least: dict[str, tuple[int, int]], launches: list[emulated.Launch]) -> list[tuple]:
    """What each launch moved and multiplied beside the least."""
    rows = []
    for (name, (bytes_least, useful)), launch in zip(least.items(), launches, strict=True):
        moved = SECTOR * (launch.sectors_read + launch.sectors_written)
        rows.append(
            (
                name,
                launch.kernel.split("Tile<")[-1].rstrip("> ") if "Gemm" in launch.kernel else "",
                bytes_least / 1e6,
                moved / bytes_least,
                (launch.load_bytes + launch.store_bytes) / 1e6,
                2 * useful / 1e9,
                launch.multiply_adds / useful if useful else None,
            )
        )
    return rows


def needed_channels(block: cases.Block, wanted: int) -> dict[str, tuple[int, int]]:
    """As :func:`needed`, with ``wanted`` channels and squeeze-and-excitation."""
    c_in, width, c_out = block.channels
    halo = cases.read_by(block.kept, block.size, 1, block.dilation)
    n, n_kept, n_halo, value = wanted, int(block.kept.sum()), int(halo.sum()), 2
    weights = value * n * (c_in + 9 * n + c_out)
    positions = block.size[0] * block.size[1]
    parts = cases.ceil_div(positions, max(256, cases.ceil_div(positions, 64)))
    squeezed = 4 * (width * SQUEEZED + SQUEEZED + width)
    return {
        "ListPositions": (block.mask.numel() + 4 * (n_halo + n_kept), 0),
        "ListChannels": (width // TOGETHER + 4 * (5 * n + width), 0),
        "SelectWeights": (2 * weights + 4 * n, 0),
        "conv1": (
            value * (n_halo * (c_in + n) + c_in * n) + 4 * (n + n_halo),
            n_halo * c_in * n,
        ),
        "conv2": (
            value * ((n_halo + n_kept) * n + 9 * n * n) + 4 * (n + n_kept),
            n_kept * 9 * n * n,
        ),
        "SumRows": (value * n_kept * n + block.mask.numel() + 4 * parts * n, 0),
        "MeanRows": (4 * (parts * n + 2 * width), 0),
        "Connect (fc1)": (squeezed, 0),
        "Connect (fc2)": (squeezed + 4 * width, 0),
        "ScaleRows": (2 * value * n_kept * n + block.mask.numel() + 8 * n, 0),
        "conv3": (
            value * (n_kept * (n + 2 * c_out) + n * c_out) + 4 * (c_out + n_kept),
            n_kept * n * c_out,
        ),
    }


def measure_channels(block: cases.Block, library: ctypes.CDLL) -> list[tuple]:
    """:func:`measure` of ``channel_bottleneck_`` on half of the channels."""
    machine = emulated.Machine(library, capability=80, blocks=432, multiprocessors=108)  # A100
    width = block.channels[1]
    groups = width // TOGETHER
    channels = torch.randperm(groups, generator=block.generator)[None] < groups * RATE
    shapes = ((SQUEEZED, width), (SQUEEZED,), (width, SQUEEZED), (width,))
    excitation = [torch.randn(shape, generator=block.generator) for shape in shapes]
    arguments = (block.mask, channels, block.weights, block.biases, None, None, None)
    machine("channel_bottleneck_", block.x, *arguments, *block.args, 1.0, excitation)
    return compare(needed_channels(block, int(channels.sum()) * TOGETHER), machine.launches())


def blocks() -> Iterator[tuple[str, cases.Block]]:
    """The first and the second block of every stage, as in configs/mask_rcnn_lasnet_r101.py."""
    backbone = LASResNet(depth=101, granularity=(4, 4, 2, 1))
    shapes = backbone.network_shape(SIZE).blocks
    for shape, mask in zip(shapes, draw_masks(shapes, 1, RATE, "blob")):
        if not shape.name.endswith((".0", ".1")):
            continue
        block = cases.Block(
            1,
            (shape.h_in, shape.w_in),
            (shape.c_in, shape.width, shape.c_out),
            shape.granularity,
            dtype=DTYPE,
            layout="channels_last",
            strides=(shape.conv1_stride, shape.stride // shape.conv1_stride),
            downsample=shape.downsample,
        )
        block.__dict__["mask"] = mask  # in place of the cached property that draws one
        yield shape.name, block


def table(library: ctypes.CDLL, measure=measure, suffix: str = "") -> str:
    """In Markdown; of blocks whose names end with ``suffix``."""
    lines = [
        "| block | kernel | tile | least MB | counted / least | requested MB | useful GFLOP | "
        "multiplied / useful |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, block in blocks():
        if not name.endswith(suffix):
            continue
        for kernel, tile, least, ratio, requested, useful, padding in measure(block, library):
            multiplied = "" if padding is None else f"{padding:.3f}"
            lines.append(
                f"| {name} | {kernel} | {tile} | {least:.2f} | {ratio:.3f} | {requested:.2f} | "
                f"{useful:.2f} | {multiplied} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a file whose table to replace")
    parser.add_argument("--channels", action="store_true", help="channel skipping only")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases.ops.pack_conv = emulated.pack_conv
    library = emulated.build(emulated.ELEMENTS[DTYPE], emulated.ROOT / "build" / "emulator")
    kernels = ctypes.CDLL(str(library))
    tables = {CHANNEL_MARKERS: table(kernels, measure_channels, ".1")}
    if not args.channels:
        tables[MARKERS] = table(kernels)
    for (begin, end), text in tables.items():
        if args.write is not None:
            before, rest = args.write.read_text().split(begin)
            content = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
            write_atomically(args.write, content.encode())


if __name__ == "__main__":
    main()
