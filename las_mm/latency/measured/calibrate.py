"""Calibration: measure this machine, fit the model, write a device file.

The measurements go into a record beside the device file as they are taken, so that an interrupted
calibration goes on where it stopped. Cases are visited several times, minutes apart, as other work
on a machine comes and goes: the median of all runs is what counts, and a visit during which a
fixed product took clearly longer than usual is repeated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from las_mm import ops
from las_mm.fileio import write_atomically
from las_mm.machine import machine, processor

from .calibrated import CalibratedDevice
from .fitting import Observation, StemObservation, check_libraries, fit
from .measurement import Measurement, Stopwatch, measure_case
from .samples import Case, StemCase, draw_cases, stem_cases
from .terms import Probes

_RECORD_FORMAT = 2
_MOST_MACS = 12e9  # of a block
SEED = 1
CASES, VISITS = 400, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        device_type: ``'cpu'`` or ``'cuda'``.
        dtype: ``'float32'`` or ``'bfloat16'``.
        threads: torch's threads.
        cases: Blocks.
        visits: Visits of each.
        seed: Of the drawing of blocks.
    """

    device_type: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    cases: int = CASES
    visits: int = VISITS
    seed: int = SEED

    def header(self) -> dict[str, Any]:
        """The first line of a record: what its measurements can be mixed with."""
        return {"record": _RECORD_FORMAT, **asdict(self), "machine": here(self)}


def here(settings: Settings) -> dict[str, Any]:
    """The machine as a device file describes it."""
    found = machine()
    for key in ("cpu", "format"):
        found.pop(key)
    return {
        "device": settings.device_type,
        "processor": processor(settings.device_type),
        "threads": settings.threads,
        "dtype": settings.dtype,
        **found,
    }


def calibrate(
    settings: Settings, record: Path, name: str, date: str, progress: Progress = lambda i, n: None
) -> CalibratedDevice:
    """Measure and fit; the record stays until the caller has written the device.

    Args:
        settings: What to measure.
        record: File of the measurements; those that it holds already are not repeated.
        name: Of the device.
        date: Of the calibration.
        progress: Called with the number of visits done and of all.

    Raises:
        ValueError: The record is damaged, or of another machine or other settings.
        RuntimeError: There are no native kernels here.
        ImportError: scipy or scikit-learn is missing.
    """
    check_libraries()  # before minutes of measuring
    observed = measure(settings, record, progress)
    tiles = settings.dtype == "float32" and ops.has_winograd(settings.device_type)
    model, accuracy = fit(observed.blocks, observed.stems, observed.probes, tiles)
    return CalibratedDevice(
        name=name, machine=here(settings), date=date, accuracy=asdict(accuracy), model=model
    )


@dataclass(frozen=True)
class Observed:
    """Everything measured."""

    blocks: list[Observation]
    stems: list[StemObservation]
    probes: Probes


def plan(settings: Settings) -> list[Case | StemCase]:
    """The cases of a calibration, in order."""
    blocks = itertools.islice(draw_cases(settings.seed, _MOST_MACS), settings.cases)
    return [*stem_cases(), *blocks]


def measure(
    settings: Settings,
    record: Path,
    progress: Progress = lambda i, n: None,
    cases: list[Case | StemCase] | None = None,
) -> Observed:
    """The measurements of all cases, taken or found in the record; see :func:`calibrate`."""
    if not ops.has_kernels(settings.device_type):
        raise RuntimeError(
            f"las_mm was built without native kernels for {settings.device_type}, so there is "
            "nothing to calibrate; install it where a C++ compiler is"
        )
    cases = plan(settings) if cases is None else cases
    known, probes = read_record(record, settings)
    keys = [case_key(case) for case in cases]
    if probes is None:
        probes = measure_probes(settings)
        lines = [settings.header(), {"probes": asdict(probes)}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(record, text.encode())
    total = len(cases) * settings.visits
    left = [
        (visit, i)
        for visit in range(settings.visits)
        for i in range(len(cases))
        if (visit, keys[i]) not in known
    ]
    progress(total - len(left), total)
    if left:
        dtype = DTYPES[settings.dtype]
        stopwatch = Stopwatch(settings.device_type)
        with open(record, "a", encoding="utf-8") as file:
            for done, (visit, i) in enumerate(left, total - len(left) + 1):
                case = cases[i]
                found = stopwatch.undisturbed(
                    lambda: measure_case(case, stopwatch, dtype, settings.device_type)  # noqa: B023
                )
                known[visit, keys[i]] = found
                line = {"visit": visit, "case": keys[i], **asdict(found)}
                file.write(json.dumps(line) + "\n")
                file.flush()
                progress(done, total)
    blocks, stems = [], []
    for i, case in enumerate(cases):
        visits = [known[visit, keys[i]] for visit in range(settings.visits)]
        seconds = statistics.median(s for visit in visits for s in visit.seconds)
        if isinstance(case, StemCase):
            stems.append(StemObservation(case, seconds))
        else:
            first = visits[0]
            blocks.append(
                Observation(
                    case.block,
                    case.batch,
                    first.rate,
                    first.rate_dilated,
                    first.rate_channel,
                    seconds,
                )
            )
    return Observed(blocks, stems, probes)


def case_key(case: Case | StemCase) -> str:
    """What a case is, as a record names it: another one as soon as anything about it changes."""
    text = json.dumps([type(case).__name__, asdict(case)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def recorded_settings(path: Path) -> Settings:
    """What a record was measured with.

    Raises:
        ValueError: It is no record of a calibration.
    """
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(file.readline())
        return Settings(**{field.name: header[field.name] for field in fields(Settings)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a calibration; calibrate anew") from error


def read_record(
    path: Path, settings: Settings
) -> tuple[dict[tuple[int, str], Measurement], Probes | None]:
    """The measurements of an interrupted calibration, by visit and case's key, and its probes.

    A last line that was cut off is dropped, from the file too.

    Raises:
        ValueError: A line is damaged, or the record is of another machine or other settings.
    """
    if not path.exists():
        return {}, None
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    way_out = "delete it, or start anew with --restart"
    found: dict[tuple[int, str], Measurement] = {}
    header: Any = None
    probes: Probes | None = None
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if number == 1:
                header = entry
                continue
            if number == 2 and "probes" in entry:
                pairs = tuple((float(a), float(b)) for a, b in entry["probes"]["bandwidth"])
                probes = Probes(**{**entry["probes"], "bandwidth": pairs})
                continue
            seconds = tuple(float(s) for s in entry["seconds"])
            if not seconds or min(seconds) <= 0:
                raise ValueError("no seconds")
            rates = (entry[key] for key in ("rate", "rate_dilated", "rate_channel"))
            found[entry["visit"], entry["case"]] = Measurement(seconds, *map(float, rates))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged ({error}); {way_out}") from error
    expected = settings.header()
    if header != expected:
        if not isinstance(header, dict) or "record" not in header:
            raise ValueError(f"{path} is no record of a calibration; {way_out}")
        flat = {**header, **header.get("machine", {})}
        wanted = {**expected, **expected["machine"]}
        other = [
            f"{key} {flat.get(key)!r}, now {value!r}"
            for key, value in wanted.items()
            if key != "machine" and flat.get(key) != value
        ]
        raise ValueError(f"{path} was measured with {'; '.join(other)}; {way_out}")
    if len(whole) < len(text):
        write_atomically(path, whole)
    return found, probes


def measure_probes(settings: Settings) -> Probes:
    """Peak products, bandwidth by size, and the cost of a call, on this machine now."""
    with torch.inference_mode():
        return _measure_probes(settings)


def _measure_probes(settings: Settings) -> Probes:
    device, dtype = settings.device_type, DTYPES[settings.dtype]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(run: Callable[[], object], repeats: int = 15) -> float:
        seconds = []
        for _ in range(repeats + 2):
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
        # Other work only ever adds time.
        return min(seconds[2:])

    def products_per_s() -> float:
        rates = []
        for rows, inner, columns in ((2048, 512, 512), (4096, 256, 1024), (1024, 2304, 256)):
            a = torch.rand(rows, inner, device=device).to(dtype)
            b = torch.rand(inner, columns, device=device).to(dtype)
            rates.append(rows * inner * columns / best(lambda: a @ b))  # noqa: B023
        return max(rates)

    macs = products_per_s()
    torch.set_num_threads(1)
    try:
        one = products_per_s()
    finally:
        torch.set_num_threads(settings.threads)
    bandwidth = []
    for size in _sizes():
        values = torch.zeros(size // 4, device=device)
        calls = max(1, (4 << 20) // size)

        def sweep() -> None:
            for _ in range(calls):  # noqa: B023
                values.add_(1.0)  # noqa: B023

        # Read and written.
        bandwidth.append((float(size), 2 * size * calls / best(sweep, 7)))
    # Small data is moved in less time than a call takes: at least as fast as larger data.
    for i in range(len(bandwidth) - 1, 0, -1):
        slower, rate = bandwidth[i - 1]
        bandwidth[i - 1] = (slower, max(rate, bandwidth[i][1]))
    nothing = torch.zeros(1, 16, 1, 1, device=device)
    call = best(lambda: ops.dilate_mask(nothing[:, :1] > 0, 1, (1, 1), 1, 1), 200)
    return Probes(macs, one, tuple(bandwidth), call)


def _sizes() -> Iterator[int]:
    """Bytes, from a first-level cache to memory."""
    size = 16 << 10
    while size <= 256 << 20:
        yield size
        size *= 2
