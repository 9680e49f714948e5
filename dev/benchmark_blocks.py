#!/usr/bin/env python
"""Time basic blocks and dense layers on a CPU, beside torch's own convolutions (oneDNN).

python dev/benchmark_blocks.py [--images 8] [--threads 1] [--rounds 11]

For every kind of block of ResNet-34 and some layers of DenseNet-121 at 224x224, float32: torch's
convolutions with folded norms on channels_last maps; this library's op, static (mask=None); and
with half of the patches kept (S=4-4-2-1, blob masks). For a dense layer torch's time is that of the
two convolutions alone, without norm and concatenation. The contestants take turns; the least times
and their ratios are printed: on a busy machine the others say more about it than about them.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F

from las_mm import ops

BASIC = [(64, 56, 4, 1), (128, 28, 4, 1), (256, 14, 2, 1), (512, 7, 1, 1)]
BASIC += [(128, 28, 4, 2), (256, 14, 2, 2), (512, 7, 1, 2)]
"""Channels, side of the output, granularity, stride."""
LAYERS = [(64, 56, 4, 256), (224, 56, 4, 256), (128, 28, 4, 512), (480, 28, 4, 512)]
LAYERS += [(256, 14, 2, 1024), (992, 14, 2, 1024), (512, 7, 1, 1024), (992, 7, 1, 1024)]
"""Channels that are read, side, granularity, channels of the whole block."""
RATE, HIDDEN, GROWTH = 0.5, 128, 32


def blob(images, side, granularity, generator):
    """Exactly the given share of patches of every image, spatially coherent."""
    grid = -(-side // granularity)
    coarse = torch.randn(images, 1, *[max(2, grid // 3 + 1)] * 2, generator=generator)
    scores = F.interpolate(coarse, (grid, grid), mode="bicubic").flatten(1)
    kept = scores.topk(round(RATE * grid * grid), 1).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, kept, True)
    return mask.view(images, 1, grid, grid)


def halo_rate(mask, side, granularity):
    kept = mask.float().repeat_interleave(granularity, 2).repeat_interleave(granularity, 3)
    return F.max_pool2d(kept[:, :, :side, :side], 3, 1, 1).mean().item()


def report(name, rounds, flops_ratio, **contestants):
    best = dict.fromkeys(contestants, float("inf"))
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for key, run in contestants.items():
            start = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - start)
    times = "  ".join(f"{key} {1e3 * seconds:7.2f} ms" for key, seconds in best.items())
    ratio = best["sparse"] / best["static"]
    print(
        f"{name:32} {times}  static/torch {best['static'] / best['torch']:.2f}  "
        f"sparse/torch {best['sparse'] / best['torch']:.2f}  sparse/static {ratio:.2f}  "
        f"FLOPs {flops_ratio:.2f}",
        flush=True,
    )


def basic(images, rounds, channels, side, granularity, stride):
    generator = torch.Generator().manual_seed(0)
    c_in = channels // stride
    x = torch.randn(images, c_in, side * stride, side * stride, generator=generator).relu_()
    x = x.to(memory_format=torch.channels_last)
    shapes = [(channels, c_in, 3, 3), (channels, channels, 3, 3), (channels, c_in, 1, 1)]
    kernels = [0.03 * torch.randn(s, generator=generator) for s in shapes[: 1 + stride]]
    biases = [torch.zeros(channels) for _ in kernels]
    dense = [k.to(memory_format=torch.channels_last) for k in kernels]
    pack = ops.pack_basic(kernels, biases, stride, direct=granularity % 2 == 1)
    static = ops.pack_basic(kernels, biases, stride, direct=False)
    mask = blob(images, side, granularity, generator)
    op = ops.sparse_basic_ if stride == 1 else ops.sparse_basic

    def convolutions():
        out = F.conv2d(x, dense[0], biases[0], stride, 1).relu_()
        out = F.conv2d(out, dense[1], biases[1], 1, 1)
        side = x if stride == 1 else F.conv2d(x, dense[2], biases[2], stride)
        return out.add_(side).relu_()

    halo = halo_rate(mask, side, granularity)
    macs = [9 * c_in * halo, 9 * channels * RATE, c_in if stride > 1 else 0]
    full = 9 * c_in + 9 * channels + macs[2]
    report(
        f"basic {channels} at {side}x{side}, stride {stride}",
        rounds,
        sum(macs) / full,
        torch=convolutions,
        static=lambda: op(x, None, static),
        sparse=lambda: op(x, mask, pack, granularity),
    )


def layer(images, rounds, c_in, side, granularity, room):
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(images, room, side, side, generator=generator)
    buffer = buffer.to(memory_format=torch.channels_last)
    x = buffer[:, :c_in].contiguous(memory_format=torch.channels_last)
    shapes = [(HIDDEN, c_in, 1, 1), (GROWTH, HIDDEN, 3, 3)]
    kernels = [0.03 * torch.randn(s, generator=generator) for s in shapes]
    vectors = [torch.ones(c_in), torch.zeros(c_in), torch.zeros(HIDDEN), torch.zeros(GROWTH)]
    dense = [k.to(memory_format=torch.channels_last) for k in kernels]
    pack = ops.pack_dense_layer(kernels, vectors, direct=granularity % 2 == 1)
    static = ops.pack_dense_layer(kernels, vectors, direct=False)
    mask = blob(images, side, granularity, generator)
    halo = halo_rate(mask, side, granularity)
    report(
        f"dense layer {c_in} at {side}x{side}",
        rounds,
        (c_in * halo + 9 * GROWTH * RATE) / (c_in + 9 * GROWTH),
        torch=lambda: F.conv2d(F.conv2d(x, dense[0], vectors[2]).relu_(), dense[1], None, 1, 1),
        static=lambda: ops.sparse_dense_layer_(buffer, None, static),
        sparse=lambda: ops.sparse_dense_layer_(buffer, mask, pack, granularity),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        for kind in BASIC:
            basic(args.images, args.rounds, *kind)
        for kind in LAYERS:
            layer(args.images, args.rounds, *kind)


if __name__ == "__main__":
    main()
