"""The CUDA kernels, compiled for the emulator (tests/ops/emulator/) and called like the ops.

The very same headers that nvcc compiles run here on the CPU, thread by thread, with every access to
shared and global memory checked. What only a GPU can show is not covered: its real instructions,
their speed, and the few lines of launch code in ops/cuda/*.cu.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from las_mm.ops.masks import ceil_div
from las_mm.ops.packing import pack_conv as pack

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "ops"
EMULATOR = Path(__file__).resolve().parent / "emulator"
ELEMENTS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bf16"}

_INTEGERS = (
    "capability multiprocessors allow_tf32 tile blocks seed images height width hidden_height "
    "hidden_width first_stride stride dilation granularity c_in hidden c_out groups downsample "
    "shortcut_channels offset_images"
)


class _Call(ctypes.Structure):
    """``Call`` of bindings.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        *((name, ctypes.c_void_p) for name in ("x", "mask", "shortcut", "out")),
        ("weights", ctypes.c_void_p * 4),
        ("biases", ctypes.c_void_p * 4),
        ("weight_sizes", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("masker_weight", "masker_bias", "offset", "rates")),
        *((name, ctypes.c_int64) for name in ("squeezed", "together")),
        ("excitation", ctypes.c_void_p * 4),
        ("channel_mask", ctypes.c_void_p),
        ("constants", ctypes.c_void_p * 2),
    ]


class Launch(ctypes.Structure):
    """One launch of a kernel: its name and what it moved and multiplied."""

    _fields_ = [
        ("name", ctypes.c_char * 160),
        *(
            (name, ctypes.c_int64)
            for name in (
                "blocks",
                "load_bytes",
                "store_bytes",
                "sectors_read",
                "sectors_written",
                "multiply_adds",
            )
        ),
    ]

    @property
    def kernel(self) -> str:
        """Such as ``SparseGemm<Tile<half, 128, 1, 64, true> >``."""
        name = self.name.decode().split("]")[0].split(";")[0]
        return name.replace("las_mm::cuda::", "").replace("{anonymous}::", "")


class EmulatorError(AssertionError):
    """A kernel did something that a GPU would not forgive."""


def build(element: str, folder: Path, headers: Path = OPS, flags: Sequence[str] = ()) -> Path:
    """Compile the kernels for one type; built again only if a source has changed.

    Args:
        element: ``'float'``, ``'half'`` or ``'bf16'``.
        folder: Where the library goes.
        headers: The ``ops`` folder with the kernels.
        flags: More arguments of the compiler.
    """
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DLAS_MM_EMULATE", *flags]
    sources = [*sorted(headers.glob("c*/*.cuh")), *sorted(headers.glob("common/*.h"))]
    digest = hashlib.sha256(repr([*command, element]).encode())
    for path in [*sources, EMULATOR / "emulator.h", EMULATOR / "bindings.cpp"]:
        digest.update(path.read_bytes())
    target = folder / f"emulated_{element}_{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_suffix(".lock")):  # several processes test at a time
        if target.is_file():
            return target
        partial = target.with_suffix(".partial")
        done = subprocess.run(
            [
                *command,
                f"-DLAS_MM_ELEMENT={element}",
                f"-I{headers}",
                f"-I{EMULATOR}",
                str(EMULATOR / "bindings.cpp"),
                "-o",
                str(partial),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        partial.replace(target)
    return target


def pack_conv(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """``ops.pack_conv``, also of float16 on a CPU: packing only moves bits."""
    if weight.dtype != torch.float16:
        return pack(weight, groups)
    return pack(weight.view(torch.bfloat16), groups).view(torch.float16)


@dataclass
class Machine:
    """An emulated GPU.

    Attributes:
        library: From :func:`build`.
        capability: Of the GPU, e.g. 80; decides about tensor cores.
        allow_tf32: Whether float32 products use tf32.
        tile: 0, 1, 2 for large, medium, small tiles; -1: as the table says.
        blocks: Thread blocks that run at a time, so that kernels have to loop.
        seed: Order of threads and blocks.
        multiprocessors: Decides, with ``tile=-1``, about the size of tiles.
    """

    library: ctypes.CDLL
    capability: int = 80
    allow_tf32: bool = False
    tile: int = -1
    blocks: int = 3
    seed: int = 0
    multiprocessors: int = 4

    def __call__(self, name: str, *arguments):
        """Run an op, such as ``'sparse_bottleneck'``, with its arguments."""
        return getattr(self, f"_{name}")(*arguments)

    def launches(self) -> list[Launch]:
        """Of the last call."""
        room = (Launch * 64)()
        count = self.library.emulated_launches(room, 64)
        assert count <= 64
        return list(room[:count])

    def _run(self, name: str, x, geometry: dict, arrays: dict, weights=(), biases=()) -> None:
        x = _nhwc(x)
        keep = [x]  # alive until the call returns
        call = _Call(
            capability=self.capability,
            multiprocessors=self.multiprocessors,
            allow_tf32=self.allow_tf32,
            tile=self.tile,
            blocks=self.blocks,
            seed=self.seed,
            images=x.shape[0],
            c_in=x.shape[1],
            height=x.shape[2],
            width=x.shape[3],
            **{**dict(groups=1, offset_images=1, first_stride=1, c_out=1, hidden=1), **geometry},
        )
        call.x = x.data_ptr()
        for key, value in arrays.items():
            if isinstance(value, list):
                value = [part.contiguous() for part in value]
                keep += value
                setattr(call, key, type(getattr(call, key))(*(part.data_ptr() for part in value)))
            elif value is not None:
                keep.append(value)
                setattr(call, key, value.data_ptr())
        for i, weight in enumerate(weights):
            if weight is not None:
                weight, bias = weight.contiguous(), biases[i].contiguous()
                keep += [weight, bias]
                call.weights[i], call.biases[i] = weight.data_ptr(), bias.data_ptr()
                call.weight_sizes[i] = weight.numel()
        function = getattr(self.library, f"emulated_{name}")
        function.restype = ctypes.c_char_p
        report = function(ctypes.byref(call)).decode()
        if report:
            raise EmulatorError(report)

    def _bottleneck(self, x, out, mask, weights, biases, shortcut, granularity, strides, dilation,
                    groups, excitation=None, channels=None, constants=None):  # fmt: skip
        hidden = [ceil_div(n, strides[0]) for n in x.shape[2:]]
        shortcut = None if shortcut is None else _nhwc(shortcut)
        geometry = dict(
            hidden_height=hidden[0],
            hidden_width=hidden[1],
            first_stride=strides[0],
            stride=strides[1],
            dilation=dilation,
            granularity=granularity,
            hidden=biases[0].numel(),
            c_out=biases[2].numel(),
            groups=groups,
            downsample=len(weights) == 4,
            shortcut_channels=0 if shortcut is None else shortcut.shape[1],
            squeezed=0 if excitation is None else excitation[1].numel(),
        )
        arrays = dict(mask=_decisions(mask), shortcut=shortcut, out=out, excitation=excitation)
        name = "sparse_bottleneck"
        if channels is not None:
            name, arrays["constants"] = "channel_bottleneck", constants
            arrays["channel_mask"] = _decisions(channels)
            geometry["together"] = geometry["hidden"] // channels.shape[1]
        self._run(name, x, geometry, arrays, weights, biases)

    def _new_bottleneck(self, x, mask, weights, biases, shortcut, granularity, strides, *rest):
        size = [ceil_div(ceil_div(n, strides[0]), strides[1]) for n in x.shape[2:]]
        out = _empty(x, biases[2].numel(), size)
        self._bottleneck(x, out, mask, weights, biases, shortcut, granularity, strides, *rest)
        return out

    def _bottleneck_in_place(self, x, *arguments):
        stream = _nhwc(x)
        self._bottleneck(stream, stream, *arguments)
        if stream is not x:
            x.copy_(stream)

    def _sparse_bottleneck(self, x, mask, weights, biases, _, shortcut, granularity, strides,
                           dilation, groups, __=1.0, dense=None, above=1.0, excitation=None,
                           run=None):  # fmt: skip
        arguments = (mask, weights, biases, shortcut, granularity, strides, dilation, groups)
        return (run or self._new_bottleneck)(x, *arguments, excitation)

    def _sparse_bottleneck_(self, x, *arguments):
        self._sparse_bottleneck(x, *arguments, run=self._bottleneck_in_place)

    def _channel_bottleneck(self, x, mask, channels, weights, biases, constants, _, shortcut,
                            granularity, strides, dilation, groups, __=1.0, excitation=None,
                            run=None):  # fmt: skip
        arguments = (mask, weights, biases, shortcut, granularity, strides, dilation, groups)
        return (run or self._new_bottleneck)(x, *arguments, excitation, channels, constants)

    def _channel_bottleneck_(self, x, *arguments):
        self._channel_bottleneck(x, *arguments, run=self._bottleneck_in_place)

    def _channel_mean(self, x):
        means = torch.full(x.shape[:2], torch.nan)
        self._run("channel_mean", x, _same_size(x), dict(out=means))
        return means

    def _masker(self, name, x, weight, bias, offset, granularity, strides, dilation, **more):
        hidden = [ceil_div(n, strides[0]) for n in x.shape[2:]]
        grid = [ceil_div(ceil_div(n, strides[1]), granularity) for n in hidden]
        mask = torch.full((x.shape[0], 1, *grid), 255, dtype=torch.uint8)
        rates = torch.full((2,), torch.nan)
        geometry = dict(
            hidden_height=hidden[0],
            hidden_width=hidden[1],
            first_stride=strides[0],
            stride=strides[1],
            dilation=dilation,
            granularity=granularity,
            offset_images=1 if offset is None else offset.shape[0],
            hidden=more.get("hidden", 1),
        )
        arrays = dict(
            mask=mask,
            rates=rates,
            masker_weight=weight.contiguous(),
            masker_bias=bias.contiguous(),
            offset=None if offset is None else offset.contiguous(),
            out=more.get("out"),
        )
        if more.get("unrated"):
            del arrays["rates"]
        self._run(name, x, geometry, arrays, more.get("weights", ()), more.get("biases", ()))
        assert mask.max() <= 1, "a decision is missing"
        return mask.bool(), rates

    def _spatial_mask(self, x, weight, bias, offset, granularity, strides, dilation):
        return self._masker("spatial_mask", x, weight, bias, offset, granularity, strides, dilation)

    def _patch_mask(self, x, *arguments):
        return self._masker("spatial_mask", x, *arguments, unrated=True)[0]

    def _masker_conv1x1(self, x, masker_weight, masker_bias, offset, weight, bias, granularity,
                        strides, dilation):  # fmt: skip
        out = _empty(x, bias.numel(), [ceil_div(n, strides[0]) for n in x.shape[2:]])
        masker = (masker_weight, masker_bias, offset, granularity, strides, dilation)
        more = dict(out=out, hidden=bias.numel(), weights=[weight], biases=[bias])
        return (*self._masker("masker_conv1x1", x, *masker, **more), out)

    def _gather_conv3x3(self, hidden, mask, weight, bias, granularity, stride, dilation, groups):
        out = _empty(hidden, bias.numel(), [ceil_div(n, stride) for n in hidden.shape[2:]]).zero_()
        geometry = dict(
            hidden_height=hidden.shape[2],
            hidden_width=hidden.shape[3],
            stride=stride,
            dilation=dilation,
            granularity=granularity,
            hidden=bias.numel(),
            groups=groups,
        )
        arrays = dict(mask=_decisions(mask), out=out)
        self._run("gather_conv3x3", hidden, geometry, arrays, [None, weight], [None, bias])
        return out

    def _conv1x1_scatter_add_(self, residual, x, mask, weight, bias, granularity):
        stream = _nhwc(residual)
        geometry = dict(
            hidden_height=x.shape[2],
            hidden_width=x.shape[3],
            stride=1,
            dilation=1,
            granularity=granularity,
            c_out=bias.numel(),
        )
        arrays = dict(mask=_decisions(mask), out=stream)
        weights, biases = [None, None, weight], [None, None, bias]
        self._run("conv1x1_scatter_add", x, geometry, arrays, weights, biases)
        if stream is not residual:
            residual.copy_(stream)


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _same_size(x: torch.Tensor) -> dict[str, int]:
    return dict(
        hidden_height=x.shape[2], hidden_width=x.shape[3], stride=1, dilation=1, granularity=1
    )


def _decisions(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else (mask > 0.5).contiguous()


def _empty(x: torch.Tensor, channels: int, size: Sequence[int]) -> torch.Tensor:
    out = torch.full((x.shape[0], channels, *size), torch.nan, dtype=x.dtype)
    return _nhwc(out)
