"""How long blocks of networks take on this machine, as the sparse runtime runs them.

Needs torch and the models, which the rest of :mod:`las_mm.latency` does without.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from las_mm import ops
from las_mm.benchmark.masks import draw_masks
from las_mm.models.plan import Choice
from las_mm.models.sparse import FastBottleneck

from .samples import Case, StemCase

_EVICT_BYTES = 64 << 20  # read and written between two runs; more than the caches of most machines
_PROBE_SIDE, _PROBE_CALLS = 384, 3  # a product that always takes the same time, about 1 ms
_DISTURBED, _ATTEMPTS = 1.25, 3
_FEWEST_RUNS, _MOST_RUNS, _ENOUGH_S = 3, 9, 0.02  # of one visit; a case is visited several times


@dataclass(frozen=True)
class Measurement:
    """What a case took.

    Attributes:
        seconds: Of each run.
        rate, rate_dilated, rate_channel: What the block recorded: the share of its outputs, of
            conv1's outputs and of channels.
    """

    seconds: tuple[float, ...]
    rate: float = 1.0
    rate_dilated: float = 1.0
    rate_channel: float = 1.0


class Stopwatch:
    """Times single calls, each with cold weights and a warm input, as inside a network.

    Between two runs of a block a network runs its other blocks, whose weights (hundreds of
    megabytes) push this block's out of the caches; the block's input has just been written.

    Args:
        device_type: ``'cpu'`` or ``'cuda'``.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._evict = torch.zeros(_EVICT_BYTES // 4, device=device_type)
        self._probe = torch.rand(_PROBE_SIDE, _PROBE_SIDE, device=device_type)
        self._usual: deque[float] = deque(maxlen=101)
        self._wait = torch.cuda.synchronize if device_type == "cuda" else lambda: None

    def undisturbed(self, measure: Callable[[], Measurement]) -> Measurement:
        """Measure, and again where other work was on the machine; the least disturbed one."""
        attempts = []
        for _ in range(_ATTEMPTS):
            before = self._probe_s()
            found = measure()
            slowest = max(before, self._probe_s())
            attempts.append((slowest, found))
            if slowest <= _DISTURBED * statistics.median(self._usual):
                break
        return min(attempts, key=lambda attempt: attempt[0])[1]

    def _probe_s(self) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(_PROBE_CALLS):
            self._probe @ self._probe
        self._wait()
        self._usual.append(time.perf_counter() - start)
        return self._usual[-1]

    def runs(self, prepare: Callable[[], object], run: Callable[[], object]) -> tuple[float, ...]:
        """Seconds of each of several calls of ``run``, after one that is not counted."""
        seconds: list[float] = []
        while len(seconds) <= _FEWEST_RUNS or (
            len(seconds) <= _MOST_RUNS and sum(seconds[1:]) < _ENOUGH_S
        ):
            self._evict.add_(1.0)
            prepare()
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return tuple(seconds[1:])


def measure_case(
    case: Case | StemCase, stopwatch: Stopwatch, dtype: torch.dtype, device: str
) -> Measurement:
    """Time a block or a stem."""
    if isinstance(case, StemCase):
        return measure_stem(case, stopwatch, dtype, device)
    return measure_block(case, stopwatch, dtype, device)


def measure_block(case: Case, stopwatch: Stopwatch, dtype: torch.dtype, device: str) -> Measurement:
    """Time one block with random weights and forced decisions."""
    runner = BlockRunner(case, dtype, device)
    with torch.inference_mode():
        seconds = stopwatch.runs(runner.refill, runner.run)
    activation = runner.block.activation
    return Measurement(seconds, float(activation.rate), float(activation.rate_dilated))


def measure_stem(
    case: StemCase, stopwatch: Stopwatch, dtype: torch.dtype, device: str
) -> Measurement:
    """Time one stem with random weights: the fused op, or a dense convolution with its ReLU."""
    conv = case.conv
    random = torch.Generator().manual_seed(0)
    side = (case.batch, conv.c_in, conv.h_out * conv.stride, conv.w_out * conv.stride)
    x = torch.rand(side, generator=random).to(device=device, dtype=dtype)
    weight = torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel, generator=random)
    weight = weight.to(device=device, dtype=dtype)
    if case.pool and ops.has_stem_kernel(device):
        packed, bias = ops.pack_stem(weight), torch.zeros(conv.c_out, device=device)

        def run() -> Tensor:
            return ops.conv_pool_stem(x, packed, bias)
    else:

        def run() -> Tensor:
            out = F.conv2d(x, weight, stride=conv.stride, padding=conv.kernel // 2).relu_()
            return F.max_pool2d(out, 3, 2, 1) if case.pool else out

    with torch.inference_mode():
        return Measurement(stopwatch.runs(lambda: x.add_(0.0), run))


class BlockRunner:
    """A block of a given shape with random weights, run by its packed form.

    Args:
        case: The block, its batch and its rate.
        dtype: Of weights and features.
        device: Of both.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        shape = case.block
        random = torch.Generator().manual_seed(case.seed)

        def normal(*size: int) -> Tensor:
            fan_in = size[1] * size[2] * size[3]
            values = torch.randn(size, generator=random) / fan_in**0.5
            return values.to(device=device, dtype=dtype)

        weights = [
            normal(shape.width, shape.c_in, 1, 1),
            normal(shape.width, shape.width // shape.groups, 3, 3),
            normal(shape.c_out, shape.width, 1, 1),
        ]
        widths = [shape.width, shape.width, shape.c_out]
        if shape.downsample:
            weights.append(normal(shape.c_out, shape.c_in, 1, 1))
            widths.append(shape.c_out)
        groups = (1, shape.groups, 1, 1)
        plain = (shape.conv2_stride, shape.dilation, shape.groups) == (1, 1, 1)
        winograd = None
        if plain and dtype == torch.float32 and ops.has_winograd(device):
            winograd = ops.pack_winograd(weights[1])
        masker: Any = None
        if shape.mode != "static":
            mask = draw_masks([shape], case.batch, case.rate, case.masks, case.seed)[0]
            assert mask is not None
            offset = torch.where(mask, torch.inf, -torch.inf).to(device)
            masker = (
                SimpleNamespace(offset=offset),
                normal(2, shape.c_in, 1, 1),
                torch.zeros(2, dtype=dtype, device=device),
            )
        self.fast = FastBottleneck(
            weights=[ops.pack_conv(w, g) for w, g in zip(weights, groups)],
            biases=[torch.zeros(n, device=device) for n in widths],
            winograd=winograd,
            dense=[w.contiguous(memory_format=torch.channels_last) for w in weights],
            pool=None,
            strides=(shape.conv1_stride, shape.conv2_stride),
            dilation=shape.dilation,
            groups=shape.groups,
            one=torch.ones((), device=device),
            masker=masker,
            choice=Choice(winograd=winograd is not None),
        )
        block: Any = SimpleNamespace(
            mode=shape.mode, granularity=shape.granularity, activation=None
        )
        self.block = block
        size = (case.batch, shape.c_in, shape.h_in, shape.w_in)
        source = torch.rand(size, generator=random).to(device=device, dtype=dtype)
        self._source = source.contiguous(memory_format=torch.channels_last)
        self._x = self._source.clone()
        self._in_place = not shape.downsample
        self.fast.plan(block, self._x)

    def refill(self) -> None:
        """Write the input, as the block before would."""
        self._x.copy_(self._source)

    def run(self) -> None:
        """The block, in place where it has no shortcut convolution, as inside a stage."""
        self.fast(self.block, self._x, self._in_place)
