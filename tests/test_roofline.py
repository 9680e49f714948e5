"""las_mm/benchmark/roofline.py and tools/roofline.py: bytes and FLOPs counted by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import load_tool
from las_mm import drawn_masks as masks
from las_mm.benchmark import roofline
from las_mm.benchmark.roofline import GPUS, Gpu, Kernel
from las_mm.latency import BottleneckShape, resnet_shape
from las_mm.models.flops import count_macs

BLOCK = BottleneckShape(
    name="b", stage=2, mode="spatial", granularity=2, c_in=16, width=4, c_out=16, h_in=8, w_in=8,
    stride=1,
)  # fmt: skip
NAMES = {gpu.name: gpu for gpu in GPUS}


def counts(kernels: list[Kernel]) -> dict[str, tuple[float, float]]:
    return {k.name.rpartition(".")[2]: (k.bytes, k.flops) for k in kernels}


def test_a_block_by_hand():
    """Two images of 8x8 positions in 16 patches each; 32 outputs kept, 64 hidden positions read."""
    kernels = roofline.block_kernels(BLOCK, 2, "fp32", rate=0.25, halo=0.5)
    assert {k.stage for k in kernels} == {2}
    mask = 2 * 16  # bytes
    assert counts(kernels) == {
        # x, two weights and biases per channel; one addition a value, then two dot products a patch
        "masker": ((128 + 2) * 16 * 4 + 2 * 4 + mask, 2 * (128 * 16 + 32 * 2 * 16)),
        "conv1": (64 * (16 + 4) * 4 + 16 * 4 * 4 + 4 * 4 + mask, 2 * 64 * 16 * 4),
        "conv2": ((64 + 32) * 4 * 4 + 9 * 4 * 4 * 4 + 4 * 4 + mask, 2 * 32 * 9 * 4 * 4),
        # the residual is read and written
        "conv3": (32 * (4 + 16 + 16) * 4 + 4 * 16 * 4 + 16 * 4 + mask, 2 * 32 * 4 * 16),
    }


def test_a_downsampling_block_by_hand():
    """One image of 9x9 positions in fp16, 5x5 outputs, conv2 in two groups; no masker."""
    block = replace(
        BLOCK, mode="static", c_out=32, h_in=9, w_in=9, stride=2, groups=2, downsample=True
    )
    assert counts(roofline.block_kernels(block, 1, "fp16")) == {
        "conv1": (81 * (16 + 4) * 2 + 16 * 4 * 2 + 4 * 4, 2 * 81 * 16 * 4),
        "conv2": ((81 + 25) * 4 * 2 + 9 * 4 * 2 * 2 + 4 * 4, 2 * 25 * 9 * 4 * 2),
        "downsample": (25 * (16 + 32) * 2 + 16 * 32 * 2 + 32 * 4, 2 * 25 * 16 * 32),
        "conv3": (25 * (4 + 32 + 32) * 2 + 4 * 32 * 2 + 32 * 4, 2 * 25 * 4 * 32),
    }
    pooled = replace(block, downsample_pool=True)
    pool = counts(roofline.block_kernels(pooled, 1, "fp16"))["downsample_pool"]
    assert pool == ((81 + 25) * 16 * 2, 81 * 16)
    strided = replace(block, conv1_stride=2)
    hidden = counts(roofline.block_kernels(strided, 1, "fp16"))["conv1"]
    assert hidden == (25 * (16 + 4) * 2 + 16 * 4 * 2 + 4 * 4, 2 * 25 * 16 * 4)


def test_nothing_kept_costs_the_masker():
    kernels = counts(roofline.block_kernels(BLOCK, 2, "fp32", rate=0.0, halo=0.0))
    assert kernels["conv1"] == kernels["conv2"] == kernels["conv3"] == (32, 0)  # the mask
    assert kernels["masker"][0] > 128 * 16 * 4


def test_the_floor_is_the_greater_of_both():
    gpu = Gpu("x", bandwidth=10.0, peaks={"fp32": 4.0}, pattern="x", source="")
    assert Kernel("k", 1, bytes=100, flops=8).seconds(gpu, "fp32") == 10
    assert Kernel("k", 1, bytes=100, flops=80).seconds(gpu, "tf32") == 20  # no such hardware
    assert Kernel("k", 1, bytes=100, flops=80).seconds(gpu, "fp16") is None
    both = [Kernel("k", 1, 100, 8), Kernel("k", 1, 100, 80)]
    assert roofline.floor_ms(both, gpu, "fp32") == 30e3
    assert roofline.floor_ms(both, gpu, "fp16") is None


def test_static_resnet101():
    """Against the known counts: 7.8 GMACs and 42.4 million weights without the classifier."""
    shape = resnet_shape(101, (224, 224))
    kernels = roofline.network_kernels(shape, 1, "fp32")
    macs = count_macs(shape.static())
    pool = 9 * 64 * 56 * 56
    assert sum(k.flops for k in kernels) == 2 * (macs.stem + macs.static_blocks.sum()) - pool
    assert sum(k.flops for k in kernels) == pytest.approx(2 * 7.8e9, rel=0.01)
    # What grows with the batch are maps, the rest is weights.
    one, two = (sum(k.bytes for k in roofline.network_kernels(shape, n, "fp32")) for n in (1, 2))
    assert 2 * one - two == pytest.approx(4 * 42.4e6, rel=0.01)
    for batch in (1, 128):
        for gpu in GPUS:
            kernels = roofline.network_kernels(shape, batch, "fp32")
            compute = 1e3 * sum(k.flops for k in kernels) / gpu.peaks["fp32"]
            memory = 1e3 * sum(k.bytes for k in kernels) / gpu.bandwidth
            floor = roofline.floor_ms(kernels, gpu, "fp32")
            assert max(compute, memory) <= floor <= compute + memory


def test_dynamic_is_below_static_and_full_masks_add_the_maskers():
    shape = resnet_shape(101, (224, 224))
    full = [1.0] * len(shape.blocks)
    static, everything, half = (
        roofline.network_kernels(shape, 8, "fp16", *shares)
        for shares in ((), (full, full), ([0.5] * 33, [0.6] * 33))
    )
    maskers = [k for k in everything if k.name.endswith(".masker")]
    assert len(maskers) == 33 == len(everything) - len(static)
    for gpu in GPUS:
        floors = [roofline.floor_ms(k, gpu, "fp16") for k in (half, static, everything)]
        assert floors == sorted(floors)


def test_shares_of_masks():
    """A kept patch of 2x2 outputs is read from 3x3 positions in a corner, elsewhere from 4x4."""
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[1, 0, 1, 1] = True
    layer = replace(BLOCK, mode="layer", granularity=0)
    decision = torch.tensor([True, False]).view(2, 1, 1, 1)
    shares = roofline.mask_shares([BLOCK, layer, BLOCK], [mask, decision, None])
    assert shares == ([8 / 128, 0.5, 1.0], [(9 + 16) / 128, 0.5, 1.0])
    drawn = masks.draw_masks([BLOCK, layer], 2, 0.5, "blob")
    assert roofline.mask_shares([BLOCK, layer], drawn)[0] == [0.5, 0.5]


def test_gpus():
    assert list(NAMES) == ["V100", "A100", "H100", "TX2"]
    names = {
        "Tesla V100-SXM2-32GB": "V100",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA Tegra X2": "TX2",
    }
    for name, gpu in names.items():
        assert roofline.find_gpu(name) is NAMES[gpu]
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB", "Orin"):
        assert roofline.find_gpu(other) is None
    tx2 = NAMES["TX2"]
    assert (tx2.bandwidth, tx2.peaks["fp32"]) == (59.7e9, pytest.approx(0.665e12, rel=1e-3))
    assert tx2.peak("bf16") is None and tx2.peak("tf32") == tx2.peaks["fp32"]


def result_of(gpu: str, dtype: str) -> dict:
    def row(engine, kind, speed):
        return dict(engine=engine, kind=kind, gflops_per_s=speed)

    rows = [
        row("graph", "static", 1.0),
        row("graph-tf32", "static", 1.0),
        row("masked-dense", "reference", None),
        row("las_mm-static", "ours", 1.0),
        row("las_mm", "ours", None),
        row("las_mm-graph-tf32", "ours", None),
    ]
    return dict(
        environment=dict(shape=[4, 3, 224, 224], dtype=dtype),
        device=dict(type="cuda", name=gpu),
        sweep=[dict(rate=0.5, dynamic=row("las_mm-graph", "ours", None))],
        rows=[r for r in rows if dtype == "fp32" or not r["engine"].endswith("-tf32")],
    )


def test_floors_beside_the_rows():
    shape = resnet_shape(50, (224, 224))
    shares = torch.full((len(shape.blocks),), 0.5), torch.full((len(shape.blocks),), 0.75)
    activation = SimpleNamespace(rates=shares[0], rates_dilated=shares[1])
    result = result_of("NVIDIA A100-SXM4-80GB", "fp32")
    roofline.annotate(result, shape, [activation])
    told = result["roofline"]
    assert told["gpu"] == "A100" and set(told["gpus"]) == set(NAMES)
    assert set(told["static"]["floor_ms"]) == {"fp32", "tf32"}
    assert all(set(f) == set(NAMES) for f in told["static"]["floor_ms"].values())
    static, dynamic = told["static"]["floor_ms"], told["sweep"][0]["floor_ms"]
    floors = [row["floor_ms"] for row in result["rows"]]
    assert floors == [
        static["fp32"]["A100"],
        static["tf32"]["A100"],
        static["fp32"]["A100"],
        static["fp32"]["A100"],
        dynamic["fp32"]["A100"],
        dynamic["tf32"]["A100"],
    ]
    assert floors[1] < floors[0] and floors[4] < floors[0]
    kernels = roofline.network_kernels(shape, 4, "fp32", *(s.tolist() for s in shares))
    assert dynamic["fp32"]["V100"] == roofline.floor_ms(kernels, NAMES["V100"], "fp32")

    unknown = result_of("NVIDIA GeForce RTX 3090", "bf16")
    roofline.annotate(unknown, shape, [activation])
    assert unknown["roofline"]["gpu"] is None
    assert {row["floor_ms"] for row in unknown["rows"]} == {None}
    assert unknown["roofline"]["static"]["floor_ms"]["bf16"]["V100"] is None


def test_the_tool(capsys, refused):
    small = ["--shape", "1", "3", "64", "64", "--rate"]
    load_tool("roofline").main([*small, "0.5", "--dtype", "fp16", "--depth", "50"])
    printed = capsys.readouterr().out
    for word in ("stem", "stage 4", "total", *NAMES, "fp16"):
        assert word in printed
    assert "1.5" in refused(load_tool("roofline").main, [*small, "1.5"])


@pytest.mark.parametrize("mode", ["channel", "both"])
def test_modes_without_a_floor_are_one_sentence(mode, refused):
    arguments = ["--mode", mode, "--rate", "0.5", "--shape", "1", "3", "64", "64"]
    message = refused(load_tool("roofline").main, arguments)
    assert message.startswith(f"roofline.py: error: --mode {mode}: no floor is known")
    assert "use --mode spatial, layer or static" in message
