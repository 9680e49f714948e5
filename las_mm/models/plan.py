"""Which form of a block is the fastest on this machine: measured once, kept in a file.

A block can run sparse (with conv2 in Winograd or direct form) or dense. Its :class:`BlockKind` is
what decides; :func:`lookup` measures a kind when it is first met and stores the result in
``$LAS_MM_CACHE`` (default ``~/.cache/las_mm``). A file of another CPU, instruction set or version
is ignored and replaced.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor

from las_mm import ops
from las_mm.fileio import cache_folder, write_atomically
from las_mm.memory import release_freed
from las_mm.version import __version__

_FORMAT = 1
_SIDES = (7, 14, 28, 56)  # of the square map that stands for a number of positions
_MOST_MACS = 1.5e9  # of one dense run; per position, larger maps behave like this one
_FEWEST_MACS = 5e6  # below, the forms differ by less than the noise of a measurement
_WINOGRAD_COST = 1.15  # until measured: transforms and smaller products
_ROUNDS = 6
_RATES = (0.25, 1.0)


@dataclass(frozen=True)
class BlockKind:
    """What the speed of a block's forms depends on, besides the machine.

    Attributes:
        c_in, width, c_out: Channels of the input, of conv1 and conv2, of the output.
        strides: Of conv1 and conv2.
        dilation, groups: Of conv2.
        downsample: Whether the shortcut has a convolution.
        dtype: ``'float32'`` or ``'bfloat16'``.
        threads: torch's threads.
        side: Side of a square map with about as many output positions as all images have.
    """

    c_in: int
    width: int
    c_out: int
    strides: tuple[int, int]
    dilation: int
    groups: int
    downsample: bool
    dtype: str
    threads: int
    side: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position when all is computed."""
        stride = self.strides[1] ** 2
        return (
            self.c_in * self.width * stride
            + 9 * self.width * self.width // self.groups
            + self.width * self.c_out
            + (self.c_in * self.c_out if self.downsample else 0)
        )

    @property
    def key(self) -> str:
        """The kind as a key of the file."""
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def tiled(self) -> bool:
        """Whether conv2 has a Winograd form."""
        plain = (self.strides[1], self.dilation, self.groups) == (1, 1, 1)
        return plain and self.dtype == "float32"


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one kind on its map of ``side`` x ``side`` outputs.

    Attributes:
        dense: Dense convolutions, masked.
        direct: The sparse op at rates 0.25 and 1 with conv2 in direct form.
        winograd: The same in Winograd form, or ``None`` if it has none.
    """

    dense: float
    direct: tuple[float, float]
    winograd: tuple[float, float] | None


@dataclass(frozen=True)
class Choice:
    """How to run a block.

    Attributes:
        winograd: Whether whole 2x2 tiles of conv2 run in Winograd form.
        winograd_cost: Time of a multiplication in that form relative to the direct form.
        dense_above: Share of kept outputs above which dense convolutions are faster; 1: never.
        timing: What was measured, or ``None`` for a block too small to measure.
        side: Side of the measured map.
    """

    winograd: bool
    winograd_cost: float = _WINOGRAD_COST
    dense_above: float = 1.0
    timing: Timing | None = None
    side: int = 0

    def predict(self, rate: float, positions: int) -> float | None:
        """Seconds for ``positions`` outputs (of all images) at ``rate``; ``None`` if unknown."""
        if self.timing is None:
            return None
        if rate > self.dense_above:
            seconds = self.timing.dense
        else:
            low, full = (self.timing.winograd if self.winograd else None) or self.timing.direct
            seconds = max(full + (full - low) / (1 - _RATES[0]) * (rate - 1), 0.0)
        return seconds * positions / self.side**2


def map_side(positions: int, macs: int) -> int:
    """The side of the map that stands for ``positions`` outputs of ``macs`` each."""
    most = max(_SIDES[0], min(_SIDES[-1], math.sqrt(_MOST_MACS / macs)))
    wanted = min(max(math.sqrt(positions), _SIDES[0]), most)
    return min((side for side in _SIDES if side <= most), key=lambda s: abs(math.log(s / wanted)))


def choose(kind: BlockKind, timing: Timing) -> Choice:
    """The fastest forms according to ``timing``."""
    winograd = timing.winograd is not None and sum(timing.winograd) < sum(timing.direct)
    cost = _WINOGRAD_COST
    if timing.winograd is not None:
        # Time of conv2's direct form: its share of the multiplications. 9 per output become 4.
        conv2 = timing.direct[1] * (9 * kind.width * kind.width / kind.groups) / kind.macs
        cost = max((timing.winograd[1] - timing.direct[1] + conv2) / (conv2 * 4 / 9), 0.1)
    low, full = timing.winograd if winograd and timing.winograd else timing.direct
    above = 1.0
    if full > timing.dense:
        slope = max(full - low, 1e-12) / (1 - _RATES[0])
        above = min(max(1 - (full - timing.dense) / slope, 0.0), 1.0)
    return Choice(winograd, cost, above, timing, kind.side)


def _best_seconds(contestants: list[Callable[[], object]]) -> list[float]:
    """Least of several rounds, in turns, as other work on the machine only ever adds time."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(_ROUNDS):
        for contestant, record in zip(contestants, seconds):
            start = time.perf_counter()
            contestant()
            record.append(time.perf_counter() - start)
    return [min(record) for record in seconds]


def measure(kind: BlockKind) -> Timing:
    """Time the forms of ``kind`` with random weights and masks on this machine."""
    dtype = getattr(torch, kind.dtype)
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        return (torch.randn(shape, generator=random) / fan_in**0.5).to(dtype)

    side = kind.side * kind.strides[0] * kind.strides[1]
    x = torch.rand(1, kind.c_in, side, side, generator=random).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dense = [
        weight(kind.width, kind.c_in, 1, 1),
        weight(kind.width, kind.width // kind.groups, 3, 3),
        weight(kind.c_out, kind.width, 1, 1),
    ]
    biases = [torch.zeros(kind.width), torch.zeros(kind.width), torch.zeros(kind.c_out)]
    if kind.downsample:
        dense.append(weight(kind.c_out, kind.c_in, 1, 1))
        biases.append(torch.zeros(kind.c_out))
    packed = [ops.pack_conv(w, g) for w, g in zip(dense, (1, kind.groups, 1, 1))]
    tiles = ops.pack_winograd(dense[1]) if kind.tiled else None
    dense = [w.contiguous(memory_format=torch.channels_last) for w in dense]
    grid = -(-kind.side // 2)
    low = torch.rand(1, 1, grid, grid, generator=random) < _RATES[0]

    def run(mask: Tensor, winograd: Tensor | None, dense_above: float) -> Callable[[], Tensor]:
        last = (0.0, dense if dense_above < 0 else None, dense_above)
        if kind.downsample:
            args = (None, 2, kind.strides, kind.dilation, kind.groups, *last)
            return lambda: ops.sparse_bottleneck(x, mask, packed, biases, winograd, *args)
        # In place, as inside a stage. Values at most double in each of the few runs.
        args = (2, kind.dilation, kind.groups, *last)
        return lambda: ops.sparse_bottleneck_(x, mask, packed, biases, winograd, *args)

    masks = [low, torch.ones_like(low)]
    contestants = [run(low, None, -1.0), *(run(mask, None, 1.0) for mask in masks)]
    if tiles is not None:
        contestants += [run(mask, tiles, 1.0) for mask in masks]
    dense_s, *sparse = _best_seconds(contestants)
    return Timing(
        dense=dense_s,
        direct=(sparse[0], sparse[1]),
        winograd=(sparse[2], sparse[3]) if tiles is not None else None,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What a file of measurements is valid for."""
    return {
        "format": _FORMAT,
        "cpu": _cpu_name(),
        "isa": ops.cpu_isa(),
        "torch": torch.__version__,
        "las_mm": __version__,
    }


class Plan:
    """The measurements of this machine, in memory and in a file.

    Args:
        path: The file; ``None`` measures without storing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._choices: dict[BlockKind, Choice] = {}
        self._timings: dict[str, Timing] | None = None
        self._announced = False
        self._lock = threading.Lock()

    def lookup(self, kind: BlockKind, device_type: str = "cpu") -> Choice:
        """The choice for ``kind``; measures it if this machine has not met it before.

        Only a CPU is measured: elsewhere sparse execution has no alternatives, and timing it would
        wait for the device.
        """
        if device_type != "cpu":
            return Choice(winograd=False)
        found = self._choices.get(kind)
        if found is not None:
            return found
        if kind.macs * kind.side**2 < _FEWEST_MACS:
            return self._choices.setdefault(kind, Choice(winograd=kind.tiled))
        with self._lock, torch.inference_mode():
            if self._timings is None:
                self._timings = self._read()
            timing = self._timings.get(kind.key)
            if timing is None:
                if not self._announced:
                    self._announced = True
                    print_log(
                        "las_mm: measuring this network's kinds of blocks on this machine, once; "
                        f"the result is kept in {self.path}",
                        logger="current",
                    )
                timing = self._timings[kind.key] = measure(kind)
                release_freed()
                self._write()
            return self._choices.setdefault(kind, choose(kind, timing))

    def _read(self) -> dict[str, Timing]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["machine"] != machine():
                return {}
            return {key: _timing(value) for key, value in content["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print_log(
                f"las_mm: {self.path} is not readable ({error!r}); its blocks are measured anew",
                logger="current",
                level=logging.WARNING,
            )
            return {}

    def _write(self) -> None:
        if self.path is None or self._timings is None:
            return
        # Another process may have measured other kinds meanwhile.
        self._timings = {**self._read(), **self._timings}
        content = {
            "machine": machine(),
            "seconds": {key: asdict(value) for key, value in sorted(self._timings.items())},
        }
        try:
            text = json.dumps(content, indent=1)
            write_atomically(self.path, text.encode())
        except OSError as error:
            print_log(
                f"las_mm: cannot write {self.path} ({error}); every process will measure again. "
                "Set LAS_MM_CACHE to a folder that can be written.",
                logger="current",
                level=logging.WARNING,
            )
            self.path = None


def _timing(value: dict) -> Timing:
    numbers = [value["dense"], *value["direct"], *(value["winograd"] or ())]
    if len(numbers) not in (3, 5) or not all(
        isinstance(n, float) and math.isfinite(n) and n > 0 for n in numbers
    ):
        raise ValueError(f"not a timing: {value}")
    return Timing(numbers[0], (numbers[1], numbers[2]), tuple(numbers[3:]) or None)


def default_path() -> Path:
    """``plan.json`` in the :func:`~las_mm.fileio.cache_folder`."""
    return cache_folder() / "plan.json"


_plan: Plan | None = None


def current_plan() -> Plan:
    """The plan of this process."""
    global _plan
    if _plan is None:
        _plan = Plan(default_path())
    return _plan
