"""The contestants on an NVIDIA GPU: cuDNN with TF32 off and on, CUDA graphs, torch.compile.

All times are those between two CUDA events around a run, so they hold the launches as far as the
GPU waits for them. cuDNN chooses its algorithms by measuring (``cudnn.benchmark``) in the untimed
runs. The engines whose names end in ``-tf32`` may round float32 products to TF32, the others may
not; with other dtypes there is nothing to choose.
"""

from __future__ import annotations

import functools
import gc
import inspect
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from las_mm import ops
from las_mm.benchmark import engines, static_engines
from las_mm.benchmark.contest import Contestant
from las_mm.benchmark.engines import TF32, EngineSet
from las_mm.benchmark.static_engines import Skip
from las_mm.benchmark.subject import DTYPES, Subject
from las_mm.errors import UserError
from las_mm.models import sparse

Builder = Callable[[Subject], Contestant]

# TF32 and fp16 keep 10 bits of a product's factors, bf16 keeps 7: computed so on the CPU, a
# ResNet-101 is off by 1.0e-3, 1.5e-3 and 1.2e-2. See engines.STATIC_TOLERANCE.
STATIC_TOLERANCE = {**engines.STATIC_TOLERANCE, "tf32": 1e-2, "fp16": 1e-2}
DYNAMIC_TOLERANCE = {**engines.DYNAMIC_TOLERANCE, "tf32": 1e-2, "fp16": 1e-2}
CAPTURE_AFTER = 3  # runs: what libraries set up or measure in the first ones is not captured


@contextmanager
def settings(tf32: bool, measure: bool = True) -> Iterator[None]:
    """Float32 products may or may not be TF32 meanwhile, and cuDNN measures its algorithms."""
    flags: dict[str, Any] = dict(enabled=True, benchmark=measure, allow_tf32=tf32)
    if "fp32_precision" in inspect.signature(torch.backends.cudnn.flags).parameters:
        flags["fp32_precision"] = "tf32" if tf32 else "ieee"  # torch 2.9: what inductor asks
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(**flags):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def event_time(run: Callable[[], object]) -> float:
    """Seconds between CUDA events around one run that starts on an idle GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # it is in milliseconds


def peak_memory(contestant: Contestant) -> float:
    """Largest memory in MiB that torch has allocated on the GPU while the contestant runs twice.

    Weights and input are part of it, the CUDA context is not.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with contestant.inside():
        for _ in range(2):
            contestant.prepare()
            contestant.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1024**2


class Replay:
    """What a function does on the GPU, recorded as a CUDA graph; calling it runs the graph.

    A call returns what the function returned when it was recorded, tensors that each call
    overwrites.

    Args:
        run: Reads and writes the same tensors each time and never waits for the GPU.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run  # keeps what the graph reads alive
        side = torch.cuda.Stream()  # not the stream on which it will be recorded, nor the default
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_AFTER):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run()

    def __call__(self) -> object:
        self._graph.replay()
        return self._outputs


def graphed(builder: Builder) -> Builder:
    """The same engine, replayed as a CUDA graph."""

    def build(subject: Subject) -> Contestant:
        contestant = builder(subject)
        return replace(contestant, run=Replay(contestant.run))

    return build


def compiled(mode: str) -> Builder:
    """torch.compile in a mode that replays CUDA graphs of its own."""

    def build(subject: Subject) -> Contestant:
        contestant = static_engines.build_compile(subject, mode)
        for _ in range(CAPTURE_AFTER):
            contestant.run()  # its graphs are recorded in the second and third run
        return contestant

    return build


def variant(builder: Builder, name: str, tf32: bool) -> Builder:
    """The same engine under a name, built and run with TF32 off or on."""

    def build(subject: Subject) -> Contestant:
        if tf32 and subject.dtype != "fp32":
            raise Skip(f"TF32 is a form of fp32, not of {subject.dtype}")
        inside = functools.partial(settings, tf32)
        with inside():
            contestant = builder(subject)
        return replace(contestant, engine=name, inside=inside)

    return build


def cpu_only(reason: str) -> Builder:
    """An engine of other devices."""

    def build(_: Subject) -> Contestant:
        raise Skip(reason)

    return build


STATIC = {
    "eager-nchw": static_engines.build_eager_nchw,
    "eager-nhwc": static_engines.build_eager_nhwc,
    "graph": graphed(static_engines.build_eager_nhwc),
    "compile": compiled("reduce-overhead"),
    "compile-max": compiled("max-autotune"),
}
OURS = {
    "las_mm-static": engines.build_static,
    "las_mm": engines.build_dynamic,
    "las_mm-graph": graphed(engines.build_dynamic),
}


def _builders() -> dict[str, Builder]:
    """Everybody, in the order of the table."""
    forms = {
        name + suffix: variant(builder, name + suffix, tf32)
        for name, builder in {**STATIC, **OURS}.items()
        for suffix, tf32 in (("", False), (TF32, True))
    }
    ours = {name: forms.pop(name) for name in list(forms) if name.startswith("las_mm")}
    others = {
        "onnxruntime": cpu_only("measured on the CPU only, by its CPU provider"),
        "openvino": cpu_only("it runs on Intel's devices"),
        "masked-dense": variant(engines.build_masked_dense, "masked-dense", False),
    }
    return {**forms, **others, **ours}


BUILDERS = _builders()


def check(dtype: str) -> None:
    """This machine can run las_mm's kernels in ``dtype`` on a GPU.

    Raises:
        UserError: It cannot; the message says why.
    """
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise UserError(
            f"--device cuda needs an NVIDIA GPU and its driver, and torch {torch.__version__} "
            f"(built for {built}) sees none"
        )
    if not ops.has_kernels("cuda"):
        raise UserError(
            "--device cuda needs las_mm's CUDA kernels, which are not built: "
            "FORCE_CUDA=1 pip install -e . --no-build-isolation"
        )
    with torch.inference_mode():
        if not sparse.wanted(torch.empty(0, dtype=DTYPES[dtype], device="cuda")):
            raise UserError(f"las_mm's sparse path does not run in {dtype} on a GPU")


def _driver() -> str | None:
    """Version of the driver, such as ``'580.65.06'``; ``None`` where nothing says it (Jetson)."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    version = Path("/proc/driver/nvidia/version")
    words = version.read_text().split() if version.is_file() else []
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)


def describe() -> dict[str, object]:
    """The GPU that runs the benchmark, and the versions that decide its speed."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return dict(
        type="cuda",
        name=gpu.name,
        capability=f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu.multi_processor_count,
        memory_gib=gpu.total_memory / 1024**3,
        driver=_driver(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )


CUDA = EngineSet(
    device="cuda",
    builders=BUILDERS,
    static=(*(name for name in BUILDERS if name.removesuffix(TF32) in STATIC),),
    dynamic=("las_mm", "las_mm-tf32", "las_mm-graph", "las_mm-graph-tf32"),
    aliases={
        "eager": ("eager-nchw", "eager-nchw-tf32", "eager-nhwc", "eager-nhwc-tf32"),
        "graphs": ("graph", "graph-tf32", "las_mm-graph", "las_mm-graph-tf32"),
        "compilers": ("compile", "compile-tf32", "compile-max", "compile-max-tf32"),
    },
    dtypes=("fp32", "bf16", "fp16"),
    static_tolerance=STATIC_TOLERANCE,
    dynamic_tolerance=DYNAMIC_TOLERANCE,
    timer=event_time,
    peak_memory=peak_memory,
    describe=describe,
    check=check,
    only_fp32=frozenset(name for name in BUILDERS if name.endswith(TF32)),
)
