"""Predicted against measured: blocks that no fit has seen, whole networks, chosen granularities."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from las_mm.drawn_masks import force_masks
from las_mm.models import LASResNet
from las_mm.models.activation import NetworkActivation

from ..search import search_granularity
from ..table import network_report
from .calibrate import SEED, Progress, Settings, measure
from .calibrated import CalibratedDevice
from .fitting import Accuracy, Observation, predicted_s
from .samples import Case, StemCase, draw_cases

_MOST_MACS = 25e9  # of a block: twice what calibrations measure
_RANGES_MS = (0.0, 1.0, 3.0, 10.0, 30.0, float("inf"))
_DRAWN = 8800  # cases that count as seen: more than any calibration measures
_ROUNDS, _VISIT_S, _MOST_RUNS = 7, 0.2, 5
NETWORK_INPUTS = ((1, 224, 224), (8, 224, 224), (1, 480, 800), (1, 800, 1344))
NETWORK_RATES = (0.25, 0.5, 0.75)
OTHER_MODES = (("layer", 0.5), ("channel", 0.6))
SETTINGS = (
    (1, 1, 1, 1),
    (2, 2, 2, 1),
    (2, 2, 2, 2),
    (4, 4, 2, 1),
    (4, 4, 2, 2),
    (4, 4, 4, 4),
    (8, 4, 7, 1),
    (8, 8, 4, 2),
    (14, 7, 7, 4),
    (28, 14, 7, 4),
)
"""Granularities to measure beside the one that the search picks."""


def unseen_cases(count: int, seed: int) -> list[Case | StemCase]:
    """Blocks that are in no calibration.

    Raises:
        ValueError: ``seed`` is that of the calibrations.
    """
    if seed == SEED:
        raise ValueError(f"seed {seed} draws the blocks of the calibration; take another one")
    seen = itertools.islice(draw_cases(SEED, _MOST_MACS), _DRAWN)
    known = {(case.block, case.batch) for case in seen}
    return list(itertools.islice(draw_cases(seed, _MOST_MACS, known), count))


@dataclass(frozen=True)
class BlockResults:
    """Blocks as measured and as predicted.

    Attributes:
        observed: The measured blocks.
        predicted: Seconds, shape (blocks,).
        measured: Seconds, shape (blocks,).
    """

    observed: list[Observation]
    predicted: np.ndarray
    measured: np.ndarray

    def groups(self) -> dict[str, Accuracy]:
        """Accuracy of all blocks, by mode, by family and by duration; few blocks are left out."""
        found: dict[str, np.ndarray] = {"all": np.ones(len(self.observed), dtype=bool)}
        for label, key in (("mode", lambda b: b.mode), ("family", lambda b: b.name)):
            values = np.array([key(o.block) for o in self.observed])
            found |= {f"{label} {value}": values == value for value in sorted(set(values))}
        for low, high in itertools.pairwise(_RANGES_MS):
            name = f"{low:g} to {high:g} ms" if high < float("inf") else f"over {low:g} ms"
            ms = 1e3 * self.measured
            found[name] = (ms >= low) & (ms < high)
        return {
            name: Accuracy.of(self.predicted[chosen], self.measured[chosen])
            for name, chosen in found.items()
            if chosen.sum() >= 5
        }


def validate_blocks(
    device: CalibratedDevice,
    settings: Settings,
    record: Path,
    count: int,
    progress: Progress = lambda i, n: None,
) -> BlockResults:
    """Measure blocks that the calibration has not seen; resumes as a calibration does."""
    observed = measure(settings, record, progress, unseen_cases(count, settings.seed)).blocks
    return BlockResults(
        observed,
        np.array([predicted_s(device.model, o) for o in observed]),
        np.array([o.seconds for o in observed]),
    )


@dataclass(frozen=True)
class NetworkResult:
    """A whole backbone as measured and as predicted, seconds of the batch."""

    depth: int
    mode: str
    input_shape: tuple[int, int, int]
    rate: float | None
    granularity: tuple[int, ...]
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted_s / self.measured_s - 1


def validate_networks(
    device: CalibratedDevice,
    depths: Sequence[int] = (50, 101),
    inputs: Sequence[tuple[int, int, int]] = NETWORK_INPUTS,
    rates: Sequence[float] = NETWORK_RATES,
    others: Sequence[tuple[str, float]] = OTHER_MODES,
    progress: Progress = lambda i, n: None,
) -> list[NetworkResult]:
    """Measure ResNets, static, spatial at several rates and in other modes, and predict them."""
    settings: list[tuple[str, float | None]] = [("static", None)]
    settings += [*(("spatial", rate) for rate in rates), *others]
    backbones = {
        (depth, mode): _backbone(depth, mode, (4, 4, 2, 1))
        for depth, (mode, _) in itertools.product(depths, settings)
    }
    entrants = [
        Entrant(depth, backbones[depth, mode], rate, shape)
        for depth, shape, (mode, rate) in itertools.product(depths, inputs, settings)
    ]
    return _contest(device, entrants, progress)


@dataclass(frozen=True)
class SearchCheck:
    """Settings of one network as measured, fastest first; the chosen one among them."""

    depth: int
    input_shape: tuple[int, int, int]
    rate: float
    chosen: tuple[int, ...]
    results: list[NetworkResult]

    @property
    def loss(self) -> float:
        """How much slower the chosen setting is than the fastest measured one."""
        chosen = next(r for r in self.results if r.granularity == self.chosen)
        return chosen.measured_s / self.results[0].measured_s - 1


def validate_search(
    device: CalibratedDevice,
    depth: int,
    input_shape: tuple[int, int, int],
    rate: float = 0.5,
    settings: Sequence[tuple[int, ...]] = SETTINGS,
) -> SearchCheck:
    """Measure the granularity that the search picks beside others."""
    batch, *hw = input_shape
    network = _backbone(depth, "spatial", (4, 4, 2, 1)).network_shape((hw[0], hw[1]))
    found = search_granularity(device, network, rate=rate, batch_size=batch)
    chosen = found.chosen.granularity
    wanted = dict.fromkeys([chosen, *(s.granularity for s in found.settings[:2]), *settings])
    entrants = [
        Entrant(depth, _backbone(depth, "spatial", side), rate, input_shape) for side in wanted
    ]
    results = _contest(device, entrants)
    results.sort(key=lambda result: result.measured_s)
    return SearchCheck(depth, input_shape, rate, chosen, results)


def _backbone(depth: int, mode: str, granularity: Sequence[int]) -> LASResNet:
    torch.manual_seed(0)
    backbone = LASResNet(depth, mode=mode, granularity=list(granularity), out_indices=(3,))
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Residual branches that do not blow features up, 33 blocks in a row.
            module.weight.data.fill_(0.5)
    return backbone.eval()


def _predict(device: CalibratedDevice, activation: NetworkActivation, batch: int) -> float:
    """Seconds of the batch at the recorded rates."""
    rates = {axis: r.clamp(0, 1).double().numpy() for axis, r in activation.axes.items()}
    return network_report(
        device, activation.shape, rates, batch_size=batch, per_image=False
    ).latency_s


@dataclass(frozen=True)
class Entrant:
    """A backbone, the rate of the masks to force upon it (``None``: static) and its input."""

    depth: int
    backbone: LASResNet
    rate: float | None
    input_shape: tuple[int, int, int]

    def prepare(self) -> torch.Tensor:
        """Force the masks; returns the input."""
        batch, *hw = self.input_shape
        shape = (batch, 3, *hw)
        if self.rate is not None:
            force_masks(self.backbone, shape, self.rate, "blob")
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def predicted_s(self, device: CalibratedDevice) -> float:
        """At the rates of the backbone's last run, which must have been this one's."""
        activation = self.backbone.network_activation().detach()
        return _predict(device, activation, self.input_shape[0])

    def result(self, predicted_s: float, seconds: Sequence[float]) -> NetworkResult:
        """Beside its prediction, the median of its visits."""
        return NetworkResult(
            self.depth,
            self.backbone.blocks()[0].mode,
            self.input_shape,
            self.rate,
            tuple(stage[0] for stage in self.backbone.granularity),
            predicted_s,
            statistics.median(seconds),
        )


def _contest(
    device: CalibratedDevice,
    entrants: Sequence[Entrant],
    progress: Progress = lambda i, n: None,
) -> list[NetworkResult]:
    """Run all in turns, round by round, so that each meets the same moods of the machine."""
    seconds: list[list[float]] = [[] for _ in entrants]
    predicted: list[float] = []
    total = (_ROUNDS + 1) * len(entrants)
    with torch.inference_mode():
        for turn, (warm_up, (i, entrant)) in enumerate(
            itertools.product([True, *[False] * _ROUNDS], enumerate(entrants))
        ):
            progress(turn, total)
            x = entrant.prepare()
            # Not counted: the memory that another network gave back has to be mapped again.
            entrant.backbone(x)
            if warm_up:
                predicted.append(entrant.predicted_s(device))
                continue
            visit: list[float] = []
            while not visit or (sum(visit) < _VISIT_S and len(visit) < _MOST_RUNS):
                start = time.perf_counter()
                entrant.backbone(x)
                visit.append(time.perf_counter() - start)
            seconds[i].append(statistics.median(visit))
    progress(total, total)
    return [e.result(at, record) for e, at, record in zip(entrants, predicted, seconds)]
