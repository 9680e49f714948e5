"""Transformer blocks and the operators on values in the latency model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from las_mm.latency import load_device
from las_mm.latency.analytical import operators as ops
from las_mm.latency.analytical.tokens import (
    TransformerShape,
    attention,
    layer_norm,
    matmul,
    mlp,
    softmax,
    transformer_report,
)

BLOCK = TransformerShape("t2t_vit_19", 197, 448, 7, 64, 1344)


def test_tree_of_a_block():
    report = transformer_report("v100", BLOCK, 0.7, 0.5)
    names = [child.name for child in report.children]
    assert names == ["maskers", "norm1", "attention", "add1", "norm2", "mlp", "add2"]
    parts = [child.name for child in report.children[2].children]
    assert parts == ["qkv", "scores", "softmax", "mix", "proj"]
    assert report.latency_s == pytest.approx(sum(c.latency_s for c in report.children))
    static = transformer_report("v100", BLOCK, maskers=False)
    assert report.latency_s < static.latency_s


@pytest.mark.parametrize("device", ["v100", "tx2"])
@pytest.mark.parametrize("rate", ["rate_tokens", "rate_heads", "rate_attention", "rate_mlp"])
def test_blocks_grow_with_every_rate(device, rate):
    times = [
        transformer_report(device, BLOCK, **{rate: value}).latency_s
        for value in np.linspace(0, 1, 6)
    ]
    assert all(b >= 0.99 * a for a, b in zip(times, times[1:]))
    assert times[-1] > times[2] > times[0] > 0


def test_arithmetic_takes_at_least_its_time():
    d = load_device("tx2")
    tokens, dim, inner = BLOCK.tokens, BLOCK.dim, BLOCK.heads * BLOCK.head_dim
    peak = d.macs_per_s_per_pe * d.n_pe
    macs = tokens * dim * 4 * inner + 2 * tokens**2 * inner
    assert attention(d, BLOCK).compute_s > macs / peak
    assert attention(d, BLOCK).compute_s < 1.5 * macs / peak
    assert mlp(d, BLOCK).compute_s > 2 * tokens * dim * BLOCK.hidden / peak


def test_all_heads_cost_dense_layers():
    d = load_device("v100")
    report = attention(d, BLOCK)
    dense = ops.static_conv(d, 448, 3 * 448, 1, 1, 197).latency_s
    assert dense * (1 - 1e-12) <= report.children[0].latency_s < 1.05 * dense


def test_products_have_matrices_of_their_own():
    d = load_device("tx2")
    one = matmul(d, 1, 196, 64, 196)
    seven = matmul(d, 7, 196, 64, 196)
    values = 7 * (196 * 64 * 2 + 196 * 196)
    assert seven.memory_s > values / d.dram_values_per_s
    assert 6 * one.memory_s < seven.memory_s < 8 * one.memory_s


@pytest.mark.parametrize(
    "report, values",
    [
        (lambda d: layer_norm(d, 197, 448), 2 * 197 * 448),
        (lambda d: softmax(d, 197, 200), 2 * 197 * 200),
        (lambda d: ops.scale_channels(d, 64, 14, 14), 2 * 64 * 14 * 14),
        (lambda d: ops.global_average_pool(d, 64, 14, 14), 64 * 14 * 14),
        (lambda d: ops.resize(d, 64, 28, 28), 5 * 64 * 28 * 28),
    ],
)
def test_operators_on_values_move_them(report, values):
    d = load_device("tx2")
    found = report(d)
    assert values <= found.memory_s * d.dram_values_per_s < 1.3 * values
    assert found.compute_s > 0 and found.launch_s == d.launch_s


def test_fully_connected_reads_its_weights_once_for_a_batch():
    d = load_device("v100")
    one, many = (ops.fully_connected(d, 512, 128, batch_size=n).latency_s for n in (1, 128))
    assert one < many < 4 * one
    assert ops.fully_connected(d, 512, 128, rows=128, batch_size=1).latency_s == many


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: replace(BLOCK, heads=0), "t2t_vit_19: heads must be a positive integer, got 0"),
        (lambda d: attention(d, BLOCK, rate_tokens=1.5), "rate_tokens must be a number in"),
        (lambda d: attention(d, BLOCK, rate_heads=-1), "rate_heads must be a number in"),
        (lambda d: transformer_report(d, BLOCK, rate_mlp=float("nan")), "rate_mlp must be"),
        (lambda d: mlp(d, BLOCK, batch_size=0), "batch_size must be a positive integer"),
        (lambda d: matmul(d, 0, 1, 1, 1), "matmul: count must be a positive integer"),
        (lambda d: ops.fully_connected(d, 0, 4), "fc: c_in must be a positive integer"),
        (lambda d: ops.resize(d, 4, 0, 4), "resize: h must be a positive integer"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(load_device("tx2"))
