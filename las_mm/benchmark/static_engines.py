"""Engines that run the static network: eager, torch.compile, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from las_mm.benchmark.contest import (
    Contestant,
)
from las_mm.benchmark.subject import DTYPES, Subject

OPSET = 18  # of ONNX; what torch 2.1's exporter knows


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


def _export(subject: Subject) -> Path:
    """The twin as an ONNX file, written once."""
    path = subject.work_dir / "twin.onnx"
    if not path.exists():
        export_onnx(subject.twin, subject.x, path, _names(subject))
    return path


def export_onnx(model: nn.Module, x: Tensor, path: Path, names: list[str], **options: Any) -> None:
    """Write ``model`` for inputs like ``x`` with outputs of these names, by torch's older exporter.

    Args:
        model: A module of tensors in and out.
        x: Its input.
        path: The file.
        names: Of the outputs.
        options: More of ``torch.onnx.export``'s.
    """
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:  # torch 2.5 and newer
        options["dynamo"] = False
    with torch.no_grad():
        torch.onnx.export(
            model,
            (x,),
            str(path),
            input_names=["x"],
            output_names=names,
            opset_version=OPSET,
            **options,
        )


def _names(subject: Subject) -> list[str]:
    return [f"stage{i}" for i in range(len(subject.expected))]


def _quantize(subject: Subject) -> Path:
    """The twin with int8 convolutions, written once.

    Static quantisation as a user would deploy it on a CPU: unsigned activations with the range
    (minimum and maximum) that they have on the benchmark's input, signed weights per output
    channel, in the form (QDQ) that both engines fuse into int8 convolutions.
    """
    _require("onnxruntime")
    _require("onnx")
    path = subject.work_dir / "twin_int8.onnx"
    if path.exists():
        return path
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [dict(x=image[None].numpy()) for image in subject.x]

        def get_next(self) -> dict | None:
            return self.left.pop() if self.left else None

    # One image at a time, so a file of its own, whose batch is not fixed.
    source, prepared = subject.work_dir / "any_batch.onnx", subject.work_dir / "prepared.onnx"
    names = _names(subject)
    axes = {name: {0: "n"} for name in ("x", *names)}
    export_onnx(subject.twin, subject.x, source, names, dynamic_axes=axes)
    quant_pre_process(str(source), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def build_onnxruntime(subject: Subject) -> Contestant:
    """ONNX Runtime on its CPU provider, input and outputs bound once."""
    _require("onnxruntime")
    _require("onnx")
    if subject.dtype == "bf16":
        raise Skip("its CPU provider has no bf16 convolutions")
    return _onnxruntime("onnxruntime", subject, _export(subject))


def build_onnxruntime_int8(subject: Subject) -> Contestant:
    """ONNX Runtime on its CPU provider, statically quantised."""
    return _onnxruntime("onnxruntime-int8", subject, _quantize(subject))


def _onnxruntime(name: str, subject: Subject, path: Path) -> Contestant:
    import onnxruntime

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
    for output_name, output in zip(_names(subject), subject.expected):
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, "float32")
        binding.bind_ortvalue_output(output_name, value)

    def read(_: object) -> list[Tensor]:
        return [torch.from_numpy(value) for value in binding.copy_outputs_to_cpu()]

    return Contestant(name, "static", lambda: session.run_with_iobinding(binding), read=read)


def build_openvino(subject: Subject) -> Contestant:
    """OpenVINO on the CPU with its latency hint, one infer request with a shared input."""
    _require("openvino")
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(
            copy.deepcopy(subject.twin), example_input=subject.x, input=list(subject.x.shape)
        )
    precision = "bf16" if subject.dtype == "bf16" else "f32"
    return _openvino("openvino", subject, model, precision)


def build_openvino_int8(subject: Subject) -> Contestant:
    """OpenVINO on the CPU with the network that ONNX Runtime quantised."""
    _require("openvino")
    import openvino

    model = openvino.Core().read_model(str(_quantize(subject)))
    model.reshape(list(subject.x.shape))
    # What is not quantised, such as the maps between the convolutions, stays in float32.
    return _openvino("openvino-int8", subject, model, "f32")


def _openvino(name: str, subject: Subject, model: Any, precision: str) -> Contestant:
    import openvino

    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(subject.threads),
            "INFERENCE_PRECISION_HINT": precision,
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

    return Contestant(name, "static", run, read)
