"""Two processes train like one with the doubled batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_worker as worker
import needs

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 1200  # seconds that a process may take on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
        **extra,
    }


@pytest.fixture(scope="module", params=worker.BACKBONES)
def backbone(request) -> str:
    """Its name."""
    return request.param


@pytest.fixture(scope="module")
def all_of_two_processes(tmp_path_factory) -> list[dict[str, dict]]:
    """What each of two processes logged and ended with, for each backbone."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", worker.__file__, str(out)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def two_processes(all_of_two_processes, backbone) -> list[dict]:
    return [rank[backbone] for rank in all_of_two_processes]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, backbone) -> dict:
    if torch.cuda.is_available():
        pytest.skip("compares CPU with CPU")
    return worker.train(tmp_path_factory.mktemp("one"), "none", backbone)


KEYS = ["loss", "loss_budget", "flops_ratio", "activation_rate", "activation_rate_stage3"]


@pytest.mark.parametrize("key", KEYS)
def test_same_losses(key, two_processes, one_process):
    expected = [entry[key] for entry in one_process["log"]]
    assert len(set(expected)) >= worker.STEPS - 1  # training moves
    for rank in two_processes:
        assert [entry[key] for entry in rank["log"]] == pytest.approx(expected, rel=1e-5)


def test_processes_did_see_different_halves(two_processes):
    first, second = (rank["log"] for rank in two_processes)
    same = [
        a["local rate"] == pytest.approx(b["local rate"], rel=1e-4) for a, b in zip(first, second)
    ]
    assert sum(same) <= 1  # small networks may agree by chance
    for entry, other in zip(first, second):
        mean = (entry["local rate"] + other["local rate"]) / 2
        assert entry["activation_rate"] == pytest.approx(mean, rel=1e-5)


def test_bounds_take_part(two_processes):
    first = two_processes[0]["log"][0]
    network = worker.BUDGET["loss_weight"] * (first["flops_ratio"] - worker.BUDGET["target"]) ** 2
    assert first["loss_budget"] > 1.01 * network


def test_same_weights(two_processes, one_process, backbone):
    model = worker.build_model(backbone)
    start = model.state_dict()
    moved = 0
    for key, weight in one_process["weights"].items():
        for rank in two_processes:
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-4, atol=1e-6)
        if key.endswith("masker.conv.weight"):
            moved += not torch.allclose(weight, start[key], atol=1e-4)
    assert moved == len(model.backbone.maskers())


@needs.MMDET
def test_dist_train_runs_to_the_end_without_a_gpu(tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{"train_cfg.max_epochs": 1})
    command = ["bash", "tools/dist_train.sh", str(config), "2"]
    done = subprocess.run(
        command,
        env=environment(PYTHON=sys.executable, PORT=str(free_port())),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout + done.stderr
    assert "Epoch(train) [1][2/2]" in output  # 6 images, 2 processes, batches of 2
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert checkpoint["meta"]["iter"] == 2
    assert not any(key.startswith("module.") for key in checkpoint["state_dict"])
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_1.pth")
    assert "3 images, latency predicted" in output  # summed over the processes
