"""Contestants, whether they compute the same, and how long they take in turns."""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from las_mm.errors import UserError
from las_mm.memory import release_freed

KINDS = ("static", "ours", "reference")
# Seconds: calls below SHORT are repeated until ENOUGH are timed; PAUSE lets the threads of the
# engine before, which spin for a while, fall asleep.
SHORT, ENOUGH, PAUSE, MOST_CALLS = 0.2, 0.3, 0.01, 100

Timer = Callable[[Callable[[], object]], float]
"""Calls what it is given once and returns the seconds that this took."""


@dataclass
class Contestant:
    """One engine with its network, ready to run on the one input of the contest.

    Attributes:
        engine: Its name.
        kind: ``'static'`` (a rival), ``'ours'`` or ``'reference'``.
        run: One inference; its result may only be valid until the next.
        read: Turns the result of ``run`` into the network's outputs.
        prepare: Called untimed before its turn, e.g. to set masks.
        inside: What its turn runs inside of, e.g. settings of a library; entered untimed.
        precision: How it multiplies, e.g. ``'fp32'``.
        note: What a reader of the table should know.
        rel_error: Largest relative error of an output, see :func:`relative_error`.
        rounds: Seconds a call, the median of each timed round.
        fastest: Seconds of the fastest timed call.
    """

    engine: str
    kind: str
    run: Callable[[], object]
    read: Callable[[object], Sequence[Tensor]] = list
    prepare: Callable[[], None] = lambda: None
    inside: Callable[[], AbstractContextManager] = nullcontext
    precision: str = ""
    note: str = ""
    rel_error: float | None = None
    rounds: list[float] = field(default_factory=list)
    fastest: float = math.inf

    @property
    def median(self) -> float:
        """Seconds: the median of the rounds."""
        return statistics.median(self.rounds)

    def outputs(self) -> list[Tensor]:
        """The network's outputs, float32 on the CPU, of one untimed run."""
        self.prepare()
        with self.inside():
            outputs = self.read(self.run())
            return [output.detach().to("cpu", torch.float32, copy=True) for output in outputs]


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest max|a - b| / max|b| over the network's outputs; inf where shapes differ or NaN."""
    if [a.shape for a in outputs] != [b.shape for b in expected]:
        return math.inf
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(outputs, expected)
    ]
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def check_finite(outputs: Sequence[Tensor], what: str) -> None:
    """Times of a network that computes NaN mean nothing.

    Raises:
        UserError: An output is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise UserError(f"{what}: the outputs hold inf or NaN, so nothing can be compared")


def check_contestant(
    contestant: Contestant, expected: Sequence[Tensor], tolerance: float, against: str
) -> None:
    """The contestant computes what it should; leaves its error in ``rel_error``.

    Raises:
        UserError: It does not.
    """
    contestant.rel_error = relative_error(contestant.outputs(), expected)
    if not contestant.rel_error <= tolerance:
        raise UserError(
            f"{contestant.engine} computes something else than {against}: relative error "
            f"{contestant.rel_error:.3g}, allowed are {tolerance:g}"
        )


def wall_time(run: Callable[[], object]) -> float:
    """Seconds on the clock of the CPU: the :data:`Timer` of engines that return when done."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _turn(contestant: Contestant, timed: bool, timer: Timer) -> None:
    """One contestant's part of a round."""
    contestant.prepare()
    time.sleep(PAUSE)
    with contestant.inside():
        first = timer(contestant.run)
        if not timed:
            return
        # A short call is timed with warm caches and threads, a long one warms them itself.
        calls = [first] if first >= SHORT else [timer(contestant.run)]
        while sum(calls) < ENOUGH and len(calls) < MOST_CALLS:
            calls.append(timer(contestant.run))
    contestant.rounds.append(statistics.median(calls))
    contestant.fastest = min(contestant.fastest, *calls)


def time_contestants(
    contestants: Sequence[Contestant],
    rounds: int,
    warmup: int,
    progress: Callable[[str], None] = lambda text: None,
    timer: Timer = wall_time,
) -> None:
    """Let everybody run once a round, in turns, beginning with another one each time.

    Args:
        contestants: Their ``rounds`` and ``fastest`` are filled in.
        rounds: Timed rounds.
        warmup: Untimed rounds before them.
        progress: Called with what is being done, once a turn.
        timer: How long one call takes on the contestants' device.
    """
    collecting = gc.isenabled()
    gc.disable()  # a full collection takes longer than a short call
    try:
        for number in range(-warmup, rounds):
            start = number % len(contestants)
            for contestant in [*contestants[start:], *contestants[:start]]:
                label = f"round {number + 1}/{rounds}" if number >= 0 else "warming up"
                progress(f"{label}: {contestant.engine}")
                _turn(contestant, number >= 0, timer)
    finally:
        if collecting:
            gc.enable()


def peak_memory(contestant: Contestant) -> float:
    """Largest resident memory of this process in MiB while the contestant runs twice.

    On Linux the peak of what was done before, such as building networks, is forgotten first.
    """
    gc.collect()
    release_freed()
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        status = Path(os.devnull)
    for _ in range(2):
        contestant.prepare()
        contestant.run()
    # ru_maxrss would include the process that this one was forked from.
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)
