"""How long blocks of networks take on this machine, as the sparse runtime runs them.

Needs torch and the models, which the rest of :mod:`las_mm.latency` does without.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from las_mm import ops
from las_mm.drawn_masks import draw_channel_masks, draw_masks
from las_mm.memory import Eviction
from las_mm.models.bottleneck import DynamicBottleneck
from las_mm.models.regnet import DynamicRegNetBlock
from las_mm.network.bottleneck import BottleneckShape

from .samples import Case, StemCase

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
    """Times single calls, each with cold weights, a warm input and warm code, as inside a network.

    Between two runs of a block a network runs its other blocks, whose weights (hundreds of
    megabytes) push this block's out of the caches; the block's input has just been written, and
    the code, which is the same for all blocks, has just run. (Calibrated with cold code, networks
    at 1x3x224x224 were predicted up to 45 % too slow.)

    Args:
        device_type: ``'cpu'`` or ``'cuda'``.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._evict = Eviction(device_type)
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

    def runs(
        self,
        prepare: Callable[[], object],
        run: Callable[[], object],
        warm: Callable[[], object] = lambda: None,
    ) -> tuple[float, ...]:
        """Seconds of each of several calls of ``run``, after one that is not counted.

        Args:
            prepare: Writes the input.
            run: What to time.
            warm: Runs the same code on other data: what an earlier block of a network does.
        """
        seconds: list[float] = []
        while len(seconds) <= _FEWEST_RUNS or (
            len(seconds) <= _MOST_RUNS and sum(seconds[1:]) < _ENOUGH_S
        ):
            self._evict()
            prepare()
            warm()
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
    """Time one block with random weights and forced decisions.

    Raises:
        RuntimeError: It has no sparse path on the device.
    """
    runner = BlockRunner(case, dtype, device)
    before = BlockRunner(small_case(case), dtype, device)
    with torch.inference_mode():
        seconds = stopwatch.runs(runner.refill, runner.run, before.run)
    activation = runner.block.activation
    assert activation is not None
    rates = (activation.rate, activation.rate_dilated, activation.rate_channel)
    return Measurement(seconds, *map(float, rates))


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
    """A block of a given shape with random weights, run by its sparse path.

    Args:
        case: The block, its batch and its rates.
        dtype: Of weights and features.
        device: Of both.

    Raises:
        RuntimeError: The block has no sparse path on the device.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        shape = case.block
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            self.block = build_block(shape).to(device=device, dtype=dtype).eval()
            size = (case.batch, shape.c_in, shape.h_in, shape.w_in)
            source = torch.rand(size).to(device=device, dtype=dtype)
        masks = (
            (self.block.masker, draw_masks([shape], case.batch, case.rate, case.masks, case.seed)),
            (
                self.block.masker_channel,
                draw_channel_masks([shape], case.batch, case.channel_rate, case.seed),
            ),
        )
        for masker, (mask,) in masks:
            if masker is not None and mask is not None:
                masker.offset = torch.where(mask, torch.inf, -torch.inf).to(device)
        self._source = source.contiguous(memory_format=torch.channels_last)
        self._x = self._source.clone()
        self._in_place = not shape.downsample
        with torch.inference_mode():
            if self.block.prepare() is None:
                raise RuntimeError(f"{shape.label} has no sparse path: {self.block.why_dense}")

    def refill(self) -> None:
        """Write the input, as the block before would."""
        self._x.copy_(self._source)

    def run(self) -> None:
        """The block, in place where it has no shortcut convolution, as inside a stage."""
        self.block.infer(self._x, self._in_place)


def small_case(case: Case) -> Case:
    """A block that the same code runs in microseconds."""
    shape = case.block
    step = shape.channel_granularity * 16
    width = step if shape.groups == 1 else 2 * shape.width // shape.groups
    c_out = width * (shape.c_out // shape.width)
    block = replace(
        shape,
        c_in=step if shape.downsample else c_out,
        width=width,
        c_out=c_out,
        h_in=2 * shape.stride,
        w_in=2 * shape.stride,
        groups=min(shape.groups, 2),
        granularity=min(shape.granularity, 2),
        se_width=min(shape.se_width, 8),
    )
    return replace(case, block=block, batch=1)


def build_block(shape: BottleneckShape) -> DynamicBottleneck:
    """A block of this shape, style 'pytorch': a RegNet's if ``c_out == width``."""
    downsample = None
    if shape.downsample:
        conv = nn.Conv2d(shape.c_in, shape.c_out, 1, shape.stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(shape.c_out))
    settings: dict[str, Any] = {}
    if shape.has_channels:
        settings = dict(
            channel_granularity=shape.channel_granularity,
            channel_masker=shape.channel_masker,
            channel_masker_layers=shape.channel_masker_layers,
            channel_reduction=shape.channel_reduction,
        )
    options: dict[str, Any] = dict(
        expansion=shape.c_out // shape.width,
        stride=shape.stride,
        dilation=shape.dilation,
        downsample=downsample,
        mode=shape.mode,
        granularity=max(shape.granularity, 1),
        settings=settings,
    )
    if shape.c_out != shape.width:
        return DynamicBottleneck(shape.c_in, shape.c_out, **options)
    return DynamicRegNetBlock(
        shape.c_in,
        shape.c_out,
        groups=shape.groups,
        width_per_group=shape.width // shape.groups,
        base_channels=shape.c_out,
        se_ratio=shape.se_width / shape.c_in,
        **options,
    )
