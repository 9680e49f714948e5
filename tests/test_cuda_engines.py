"""las_mm/benchmark/cuda_engines.py as far as it goes without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from las_mm.benchmark import cuda_engines
from las_mm.benchmark.engines import precision_of
from las_mm.models import sparse
from las_mm.preflight import UserError


def test_every_engine_has_a_tolerance_and_a_place():
    known = cuda_engines.CUDA
    assert set(known.static) | set(known.dynamic) < set(known.builders)
    assert known.dynamic[0] == "las_mm" and "masked-dense" in known.builders
    for members in known.aliases.values():
        assert set(members) < set(known.builders)
    for dtype in known.dtypes:
        for name in known.names(dtype):
            assert precision_of(name, dtype) in known.static_tolerance
            assert precision_of(name, dtype) in known.dynamic_tolerance
    assert "graph-tf32" in known.names("fp32") and "graph-tf32" not in known.names("fp16")


@pytest.mark.parametrize("tf32", [False, True])
def test_settings_hold_meanwhile_only(tf32):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def now():
        return cudnn.allow_tf32, cudnn.benchmark, cudnn.enabled, matmul.allow_tf32

    before = now()
    with pytest.raises(KeyError), cuda_engines.settings(tf32):
        assert now() == (tf32, True, True, tf32)
        with cuda_engines.settings(not tf32, measure=False):
            assert now() == (not tf32, False, True, not tf32)
        assert now() == (tf32, True, True, tf32)
        raise KeyError
    assert now() == before


def test_event_time(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            assert other is not self
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    assert cuda_engines.event_time(lambda: log.append("run")) == 2.5e-3
    assert log == ["idle", "record", "run", "record", "wait"]


def test_check(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        cuda_engines.check("fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_engines.ops, "has_kernels", lambda device: False)
    with pytest.raises(UserError, match="FORCE_CUDA=1"):
        cuda_engines.check("fp32")
    monkeypatch.setattr(cuda_engines.ops, "has_kernels", lambda device: True)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(sparse, "wanted", lambda x: False)
    with pytest.raises(UserError, match="fp16"):
        cuda_engines.check("fp16")
    monkeypatch.setattr(sparse, "wanted", lambda x: True)
    cuda_engines.check("fp16")


def test_describe(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 1024**3,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(cuda_engines.shutil, "which", lambda name: "nvidia-smi")
    done = SimpleNamespace(returncode=0, stdout="580.65.06\n")
    monkeypatch.setattr(cuda_engines.subprocess, "run", lambda *args, **kwargs: done)
    told = cuda_engines.describe()
    assert (told["type"], told["name"], told["capability"]) == ("cuda", properties.name, "9.0")
    assert (told["driver"], told["cudnn"], told["memory_gib"]) == ("580.65.06", 91300, 80)


def test_driver_without_its_tool(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\nGCC 12.2.0")
    monkeypatch.setattr(cuda_engines.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda_engines, "Path", lambda path: version)
    assert cuda_engines._driver() == "535.54.03"
    version.unlink()
    assert cuda_engines._driver() is None
