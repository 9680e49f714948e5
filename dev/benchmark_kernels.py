#!/usr/bin/env python
"""Time every CUDA kernel of ResNet-101's blocks on a GPU, beside cuDNN's dense convolutions.

python dev/benchmark_kernels.py --json kernels.json [--tile small] [--no-dense] [--network]

Per stage, batch and precision one block with half of its patches kept (S=4-4-2-1, blob masks) runs
under PyTorch's profiler: device time per launch, the median over the runs. The features of a block
come out of the L2 cache where they fit, as in a network; its weights do too, which a network has to
stream. `--tile` forces one tile for all products (through LAS_MM_CUDA_TILES, see
ops/cuda/tile_file.h), `--network` also lists the kernels of a whole backbone. Without a GPU,
`--dry-run` runs small blocks on the CPU, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

TILES = {"large": "0 0 0 0", "medium": "0 0 1e30 0", "small": "0 1e30 1e30 1e30"}
STAGES = ((256, 64, 4, 4), (512, 128, 8, 4), (1024, 256, 16, 2), (2048, 512, 32, 1))
"""Channels of the features and of the bottleneck, stride against the image, granularity S."""
SHAPES = {"1x224": (1, 224, 224), "128x224": (128, 224, 224), "1x800": (1, 800, 1344)}
RATE, RUNS = 0.5, 10


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "tf32", "fp16", "bf16"], help="how to multiply"
    )
    parser.add_argument("--tile", choices=tuple(TILES), help="this one everywhere")
    parser.add_argument("--no-dense", action="store_true", help="leave cuDNN out")
    parser.add_argument(
        "--network", action="store_true", help="also a whole backbone, kernel by kernel"
    )
    parser.add_argument("--dry-run", action="store_true", help="small blocks on the CPU, no times")
    return parser.parse_args(argv)


def profile(run, device: str, runs: int = RUNS) -> list[tuple[str, float]]:
    """(name, device microseconds) of each launch of one run, in order; medians over ``runs``."""
    for _ in range(3):
        run()
    if device == "cpu":
        return [("cpu", 0.0)]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    each, rest = divmod(len(events), runs)
    if rest:  # cuDNN chose anew in between: only the sum means something
        return [("all", sum(e.time_range.elapsed_us() for e in events) / runs)]
    columns = [events[i::each] for i in range(each)]
    return [(c[0].name, statistics.median(e.time_range.elapsed_us() for e in c)) for c in columns]


def peak(dtype: torch.dtype, tf32: bool, device: str) -> float:
    """FLOP/s of a large dense product through PyTorch."""
    n = 64 if device == "cpu" else 8192 if dtype != torch.float32 or tf32 else 4096
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    with cuda_engines.settings(tf32):
        micros = sum(us for _, us in profile(lambda: a @ b, device, 5))
    return 2 * n**3 / (micros * 1e-6) if micros else float("nan")


class Block:
    """A bottleneck of one stage with random weights, its input and mask."""

    def __init__(self, stage: int, shape: tuple[int, int, int], dtype, device: str) -> None:
        self.channels, self.width, stride, self.granularity = STAGES[stage]
        images, *size = shape
        self.hw = tuple(-(-n // stride) for n in size)
        generator = torch.Generator().manual_seed(stage)
        grid = tuple(-(-n // self.granularity) for n in self.hw)
        mask = masks.spatial_mask(images, grid, RATE, "blob", generator)
        _, counts = ops.dilate_mask(mask, self.granularity, self.hw, 1, 1)
        self.kept, self.halo = (int(n) for n in counts.sum(0))
        c, w = self.channels, self.width
        sizes = [(w, c, 1), (w, w, 3), (c, w, 1)]
        scales = [1.0, 1.0, 1e-3]  # run after run in place must not blow up
        self.kernels = [
            (torch.randn(o, i, k, k, generator=generator) * (2 / (i * k * k)) ** 0.5 * scale).to(
                device, dtype
            )
            for (o, i, k), scale in zip(sizes, scales)
        ]
        self.biases = [torch.zeros(len(k), device=device) for k in self.kernels]
        self.weights = [ops.pack_conv(k) for k in self.kernels]
        self.mask = mask.to(device)
        x = torch.randn(images, c, *self.hw, generator=generator).relu()
        self.x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        hidden = torch.randn(images, w, *self.hw, generator=generator).relu()
        self.hidden = hidden.to(device, dtype).contiguous(memory_format=torch.channels_last)

    def sparse(self) -> None:
        torch.ops.las_mm.sparse_bottleneck_.default(
            self.x,
            self.mask,
            self.weights,
            self.biases,
            None,
            None,
            self.granularity,
            [1, 1],
            1,
            1,
            1.0,
        )

    def dense(self, conv: int):
        x = self.x if conv == 0 else self.hidden
        kernel = self.kernels[conv].contiguous(memory_format=torch.channels_last)
        return lambda: F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)

    def useful(self) -> list[int]:
        """FLOPs of the three convolutions."""
        c, w = self.channels, self.width
        return [2 * self.halo * c * w, 2 * self.kept * 9 * w * w, 2 * self.kept * w * c]


def measure(args: argparse.Namespace, device: str) -> dict:
    """All kernels of all blocks asked for."""
    rows, peaks = [], {}
    for precision in args.precisions:
        tf32 = precision == "tf32"
        dtype = DTYPES["fp32" if tf32 else precision]
        if device == "cuda":
            peaks[precision] = peak(dtype, tf32, device)
        for name in args.shapes:
            shape = (1, 32, 32) if args.dry_run else SHAPES[name]
            for stage in range(len(STAGES)):
                with torch.inference_mode(), cuda_engines.settings(tf32):
                    block = Block(stage, shape, dtype, device)
                    launches = profile(block.sparse, device)
                    gemms = [us for kernel, us in launches if "SparseGemm" in kernel]
                    for conv, flops in enumerate(block.useful()):
                        row = dict(
                            precision=precision,
                            shape=name,
                            stage=stage + 1,
                            conv=conv + 1,
                            gflop=flops / 1e9,
                        )
                        if len(gemms) == 3:
                            tiles = [k for k, _ in launches if "SparseGemm" in k]
                            row.update(
                                tile=tiles[conv].split("Tile<")[1].split(">")[0],
                                us=gemms[conv],
                                tflops=flops / gemms[conv] / 1e6,
                                of_peak=flops / gemms[conv] * 1e6 / peaks[precision],
                            )
                        if not args.no_dense:
                            row["dense_us"] = sum(
                                us for _, us in profile(block.dense(conv), device)
                            )
                        rows.append(row)
                    small = [(k, us) for k, us in launches if "SparseGemm" not in k]
                    rows.append(
                        dict(
                            precision=precision,
                            shape=name,
                            stage=stage + 1,
                            conv="rest",
                            us=sum(us for _, us in small),
                            kernels=[short(k) for k, _ in small],
                        )
                    )
                del block
    return dict(rows=rows, peaks=peaks, tile=args.tile or "table")


def short(kernel: str) -> str:
    """A kernel's name without namespaces and arguments."""
    name = kernel.replace("las_mm::cuda::", "").removeprefix("void ")
    return name.split("(")[0].removeprefix("entry<")[:100]


def network(args: argparse.Namespace, device: str) -> dict:
    """Device time by kernel of a whole ResNet-101 with half of the patches, and of its launches."""
    from las_mm.benchmark.subject import randomize
    from las_mm.models import LASResNet

    result = {}
    for precision in args.precisions:
        tf32 = precision == "tf32"
        dtype = DTYPES["fp32" if tf32 else precision]
        for name in args.shapes:
            shape = (1, 64, 64) if args.dry_run else SHAPES[name]
            shape = (shape[0], 3, *shape[1:])
            net = LASResNet(101, granularity=(4, 4, 2, 1)).eval()
            randomize(net)
            net.to(device, dtype)
            drawn = masks.make_masks(net, shape, RATE, "blob", 0)
            masks.set_offsets(net, masks.make_offsets(drawn, device))
            x = torch.randn(shape).to(device, dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode(), cuda_engines.settings(tf32):
                launches = profile(lambda net=net, x=x: net(x), device, 3)
            by_kernel = defaultdict(lambda: [0, 0.0])
            for kernel, us in launches:
                entry = by_kernel[short(kernel)]
                entry[0] += 1
                entry[1] += us
            result[f"{name} {precision}"] = dict(
                us=sum(us for _, us in launches),
                launches=len(launches),
                kernels=sorted(
                    ((k, n, us) for k, (n, us) in by_kernel.items()), key=lambda row: -row[2]
                ),
            )
            del net, x
    return result


def table(result: dict) -> str:
    """The result for a reader."""
    lines = [f"tile: {result['tile']}; peaks, TFLOP/s: "]
    lines[0] += ", ".join(f"{k} {v / 1e12:.1f}" for k, v in result["peaks"].items())
    lines.append(
        "| precision | input | stage | conv | tile | us | TFLOP/s | of peak | cuDNN dense us |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        cells = [r["precision"], r["shape"], r["stage"], r["conv"], r.get("tile", "")]
        cells += [
            f"{r[k]:.{d}f}" if k in r else ""
            for k, d in (("us", 1), ("tflops", 1), ("of_peak", 2), ("dense_us", 1))
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for name, net in result.get("network", {}).items():
        lines.append(f"\n{name}: {net['us'] / 1e3:.3f} ms on the GPU, {net['launches']} launches")
        lines += [f"  {us:9.1f} us {n:4d} x  {kernel}" for kernel, n, us in net["kernels"][:25]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not (torch.cuda.is_available() and ops.has_kernels("cuda")):
        sys.exit("benchmark_kernels.py: error: no GPU, or las_mm's CUDA kernels are not built")
    result = measure(args, device)
    if args.network:
        result["network"] = network(args, device)
    result["device"] = cuda_engines.describe() if device == "cuda" else "dry run"
    write_atomically(args.json, json.dumps(result, indent=1).encode())
    print(table(result))


if __name__ == "__main__":
    args = parse_args(None)
    if args.tile:  # before the extension first chooses a tile
        with tempfile.NamedTemporaryFile("w", suffix=".tiles", delete=False) as file:
            file.write(TILES[args.tile] + "\n")
        os.environ["LAS_MM_CUDA_TILES"] = file.name
    import torch
    import torch.nn.functional as F

    from las_mm import drawn_masks as masks
    from las_mm import ops
    from las_mm.benchmark import cuda_engines
    from las_mm.benchmark.subject import DTYPES
    from las_mm.fileio import write_atomically

    main()
