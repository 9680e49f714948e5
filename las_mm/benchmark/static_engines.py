"""Engines that run the static network: eager, torch.compile, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
import importlib.util

import torch
from torch import Tensor, nn

from las_mm.benchmark.contest import (
    Contestant,
)
from las_mm.benchmark.subject import DTYPES, Subject


class Skip(Exception):
    """An engine cannot take part; the message is the reason."""


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skip("not installed: pip install las_mm[benchmark]")


def torch_engine(name: str, kind: str, model: nn.Module, x: Tensor) -> Contestant:
    """A module run by torch as it is."""

    @torch.inference_mode()
    def run() -> tuple[Tensor, ...]:
        return model(x)

    return Contestant(name, kind, run)


def eager_twin(subject: Subject, memory_format: torch.memory_format) -> nn.Module:
    """A copy of the twin in the benchmark's dtype, on its device."""
    twin = copy.deepcopy(subject.twin).to(subject.device, DTYPES[subject.dtype])
    return twin.to(memory_format=memory_format)


def build_eager_nchw(subject: Subject) -> Contestant:
    """PyTorch eager mode, contiguous tensors."""
    twin = eager_twin(subject, torch.contiguous_format)
    return torch_engine("eager-nchw", "static", twin, subject.cast_x)


def build_eager_nhwc(subject: Subject) -> Contestant:
    """PyTorch eager mode, channels last."""
    x = subject.cast_x.contiguous(memory_format=torch.channels_last)
    return torch_engine("eager-nhwc", "static", eager_twin(subject, torch.channels_last), x)


def build_compile(subject: Subject, mode: str | None = None) -> Contestant:
    """torch.compile with constant weights, channels last; ``mode`` as ``torch.compile`` has it."""
    import torch._inductor.config as inductor

    x = subject.cast_x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(eager_twin(subject, torch.channels_last), dynamic=False, mode=mode)

    @torch.no_grad()  # freezing does nothing where gradients may be asked for
    def run() -> tuple[Tensor, ...]:
        return compiled(x)

    with inductor.patch(freezing=True):
        run()
    return Contestant("compile", "static", run)


def build_onnxruntime(subject: Subject) -> Contestant:
    """ONNX Runtime on its CPU provider, input and outputs bound once."""
    _require("onnxruntime")
    _require("onnx")
    if subject.dtype != "fp32":
        raise Skip("its CPU provider has no bf16 convolutions")
    import onnxruntime

    path = subject.work_dir / "twin.onnx"
    names = [f"stage{i}" for i in range(len(subject.expected))]
    with torch.no_grad():
        torch.onnx.export(
            subject.twin,
            (subject.x,),
            str(path),
            input_names=["x"],
            output_names=names,
            opset_version=18,
            dynamo=False,
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = subject.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin during a run, which is faster, but not into another contestant's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(subject.x.numpy()))
    for name, output in zip(names, subject.expected):
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, "float32")
        binding.bind_ortvalue_output(name, value)

    def read(_: object) -> list[Tensor]:
        return [torch.from_numpy(value) for value in binding.copy_outputs_to_cpu()]

    return Contestant(
        "onnxruntime", "static", lambda: session.run_with_iobinding(binding), read=read
    )


def build_openvino(subject: Subject) -> Contestant:
    """OpenVINO on the CPU with its latency hint, one infer request with a shared input."""
    _require("openvino")
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(
            copy.deepcopy(subject.twin), example_input=subject.x, input=list(subject.x.shape)
        )
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(subject.threads),
            "INFERENCE_PRECISION_HINT": "f32" if subject.dtype == "fp32" else "bf16",
        },
    )
    request = compiled.create_infer_request()
    array = subject.x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(array, shared_memory=True))

    def read(_: object) -> list[Tensor]:
        tensors = (request.get_output_tensor(i) for i in range(len(subject.expected)))
        return [torch.from_numpy(tensor.data.copy()) for tensor in tensors]

    def run() -> None:
        request.start_async()  # unlike infer(), copies no outputs
        request.wait()

    return Contestant("openvino", "static", run, read)
