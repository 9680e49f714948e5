"""Which form of a block is the fastest on this machine: measured once, kept in a file.

A block can run sparse (with conv2 in Winograd or direct form) or dense. Its :class:`BlockKind` is
what decides; :func:`lookup` measures a kind when it is first met and stores the result in
``$LAS_MM_CACHE`` (default ``~/.cache/las_mm``). A file of another CPU, instruction set or build of
the kernels is ignored and replaced. ``$LAS_MM_PLAN`` names such a file to go by instead: nothing is
measured then, and the same forms run every time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Union

import filelock
import torch
from mmengine.logging import print_log

from las_mm.fileio import cache_folder, write_atomically
from las_mm.machine import machine
from las_mm.memory import release_freed
from las_mm.models.conv_forms import ConvKind
from las_mm.models.timing import RATES, BlockKind, Timing, measure

PINNED = "LAS_MM_PLAN"
_SIDES = (7, 14, 28, 56)  # of the square map that stands for a number of positions
_MOST_MACS = 1.5e9  # of one dense run; per position, larger maps behave like this one
_FEWEST_MACS = 5e6  # below, the forms differ by less than the noise of a measurement
_WINOGRAD_COST = 1.15  # until measured: transforms and smaller products
_PATIENCE_S = 60.0  # with another process that measures
Kind = Union[BlockKind, ConvKind]


@dataclass(frozen=True)
class Choice:
    """How to run a block.

    Attributes:
        winograd: Whether whole 2x2 tiles of conv2 run in Winograd form.
        winograd_cost: Time of a multiplication in that form relative to the direct form.
        dense_above: Share of kept outputs above which dense convolutions are faster; 1: never.
        timing: What was measured, or ``None`` for a block too small to measure.
        side: Side of the measured map.
        decided_by: What made this choice, for people.
    """

    winograd: bool
    winograd_cost: float = _WINOGRAD_COST
    dense_above: float = 1.0
    timing: Timing | None = None
    side: int = 0
    decided_by: str = "default"

    def predict(self, rate: float, positions: int) -> float | None:
        """Seconds for ``positions`` outputs (of all images) at ``rate``; ``None`` if unknown."""
        if self.timing is None:
            return None
        if rate > self.dense_above:
            seconds = self.timing.dense
        else:
            low, full = (self.timing.winograd if self.winograd else None) or self.timing.direct
            seconds = max(full + (full - low) / (1 - RATES[0]) * (rate - 1), 0.0)
        return seconds * positions / self.side**2


def map_side(positions: int, macs: int) -> int:
    """The side of the map that stands for ``positions`` outputs of ``macs`` each."""
    most = max(_SIDES[0], min(_SIDES[-1], math.sqrt(_MOST_MACS / macs)))
    wanted = min(max(math.sqrt(positions), _SIDES[0]), most)
    return min((side for side in _SIDES if side <= most), key=lambda s: abs(math.log(s / wanted)))


def choose(kind: Kind, timing: Timing) -> Choice:
    """The fastest forms according to ``timing``."""
    winograd = timing.winograd is not None and sum(timing.winograd) < sum(timing.direct)
    cost = _WINOGRAD_COST
    if timing.winograd is not None:
        # Time of conv2's direct form: its share of the multiplications. 9 per output become 4.
        conv2 = timing.direct[1] * kind.tiled_macs / kind.macs
        cost = max((timing.winograd[1] - timing.direct[1] + conv2) / (conv2 * 4 / 9), 0.1)
    low, full = timing.winograd if winograd and timing.winograd else timing.direct
    above = 1.0
    if full > timing.dense:
        slope = max(full - low, 1e-12) / (1 - RATES[0])
        above = min(max(1 - (full - timing.dense) / slope, 0.0), 1.0)
    return Choice(winograd, cost, above, timing, kind.side, "measured")


class Plan:
    """The measurements of this machine, in memory and in a file.

    Args:
        path: The file; ``None`` measures without storing.
        pinned: Whether to go by the file as it is: nothing is measured or written, and a kind
            that it lacks runs in the default form.
    """

    def __init__(self, path: Path | None, pinned: bool = False) -> None:
        self.path = path
        self.pinned = pinned
        self._choices: dict[Kind, Choice] = {}
        self._timings: dict[str, Timing] | None = None
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def lookup(self, kind: Kind, device_type: str = "cpu") -> Choice:
        """The choice for ``kind``; measures it if this machine has not met it before.

        Only a CPU is measured: elsewhere sparse execution has no alternatives, and timing it would
        wait for the device.

        Raises:
            las_mm.preflight.UserError: The pinned file is missing or damaged.
        """
        if device_type != "cpu":
            return Choice(winograd=False)
        found = self._choices.get(kind)
        if found is not None:
            return found
        if kind.macs * kind.side**2 < _FEWEST_MACS:
            choice = Choice(winograd=kind.tiled, decided_by="too small to measure")
            return self._choices.setdefault(kind, choice)
        with self._lock, torch.inference_mode():
            return self._choices.setdefault(kind, self._decide(kind))

    def _decide(self, kind: Kind) -> Choice:
        default = Choice(winograd=kind.tiled)
        if self._timings is None:
            self._timings = self._read_pinned() if self.pinned else self._read()
        timing = self._timings.get(kind.key)
        if self.pinned:
            if timing is not None:
                return replace(choose(kind, timing), decided_by="pinned plan")
            self._say(
                "missing kinds",
                f"{self.path} ({PINNED}) lacks kinds of blocks that run here, such as {kind.key}; "
                "these run in the default form. To have all, run once without the variable and "
                "copy the plan from the cache folder",
                logging.WARNING,
            )
            return default
        if timing is None:
            timing = self._measure(kind)
        return default if timing is None else choose(kind, timing)

    def _measure(self, kind: Kind) -> Timing | None:
        """The timing of a kind that is not known yet; ``None`` if another process hogs the file."""
        assert self._timings is not None
        try:
            with self._alone():
                # Another process may have measured this one or others meanwhile.
                self._timings = {**self._read(), **self._timings}
                timing = self._timings.get(kind.key)
                if timing is None:
                    self._say(
                        "measuring",
                        "measuring this network's kinds of blocks on this machine, once; the "
                        f"result is kept in {self.path}",
                    )
                    timing = self._timings[kind.key] = measure(kind)
                    release_freed()
                    self._write()
                return timing
        except filelock.Timeout as busy:
            self._say(
                "lock",
                f"another process has held {busy.lock_file} for {_PATIENCE_S:.0f} s; this one "
                "runs blocks that are not measured yet in the default form",
                logging.WARNING,
            )
            return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, as those that measure at once measure one another."""
        if self.path is None:
            yield
            return
        lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE_S)
        except filelock.Timeout:
            raise
        except (OSError, NotImplementedError):  # a folder, or a file system, without
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _say(self, about: str, text: str, level: int = logging.INFO) -> None:
        """Log once per process what there is to say ``about`` something."""
        if about not in self._said:
            self._said.add(about)
            print_log(f"las_mm: {text}", logger="current", level=level)

    def _read(self) -> dict[str, Timing]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return _timings(content) if content["machine"] == machine() else {}
        except _DAMAGE as error:
            print_log(
                f"las_mm: {self.path} is not readable ({error!r}); its blocks are measured anew",
                logger="current",
                level=logging.WARNING,
            )
            return {}

    def _read_pinned(self) -> dict[str, Timing]:
        assert self.path is not None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            found = _timings(content)
            origin = content["machine"]
        except _DAMAGE as error:
            from las_mm.errors import UserError

            raise UserError(
                f"{PINNED}={self.path} is no readable plan ({error}): name a copy of a plan.json "
                "that las_mm wrote into its cache folder, or unset the variable"
            ) from error
        if origin != machine():
            self._say(
                "machine",
                f"{self.path} ({PINNED}) was measured on another machine or with other kernels; "
                "its choices hold all the same, its seconds may not",
                logging.WARNING,
            )
        return found

    def _write(self) -> None:
        if self.path is None or self._timings is None:
            return
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


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _timings(content: dict) -> dict[str, Timing]:
    return {key: _timing(value) for key, value in content["seconds"].items()}


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
    """The plan of this process: the file that ``$LAS_MM_PLAN`` names, or this machine's own."""
    global _plan
    if _plan is None:
        pinned = os.environ.get(PINNED)
        _plan = Plan(Path(pinned), pinned=True) if pinned else Plan(default_path())
    return _plan
