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

from las_mm.benchmark.masks import force_masks
from las_mm.models import LASResNet
from las_mm.models.activation import NetworkActivation

from .calibrate import CASES, SEED, Progress, Settings, measure
from .calibrated import CalibratedDevice
from .fitting import Accuracy, Observation, predicted_s
from .predictor import network_report
from .samples import Case, StemCase, draw_cases
from .search import search_granularity

_MOST_MACS = 25e9  # of a block: twice what calibrations measure
_RANGES_MS = (0.0, 1.0, 3.0, 10.0, 30.0, float("inf"))
_ROUNDS = 9
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
    seen = itertools.islice(draw_cases(SEED, _MOST_MACS), 20 * CASES)
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
    results = []
    total = len(depths) * len(inputs)
    for done, (depth, shape) in enumerate(itertools.product(depths, inputs)):
        progress(done, total)
        static = _backbone(depth, "static", (1, 1, 1, 1))
        dynamic = _backbone(depth, "spatial", (4, 4, 2, 1))
        contestants: list[tuple[LASResNet, float | None]] = [(static, None)]
        contestants += [(dynamic, rate) for rate in rates]
        contestants += [(_backbone(depth, mode, (4, 4, 2, 1)), rate) for mode, rate in others]
        seconds, activations = _contest(contestants, shape)
        for (backbone, rate), measured, activation in zip(contestants, seconds, activations):
            results.append(
                NetworkResult(
                    depth,
                    backbone.blocks()[0].mode,
                    shape,
                    rate,
                    (4, 4, 2, 1),
                    _predict(device, activation, shape[0]),
                    measured,
                )
            )
    progress(total, total)
    return results


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
    contestants = [(_backbone(depth, "spatial", side), rate) for side in wanted]
    seconds, activations = _contest(contestants, input_shape)
    results = [
        NetworkResult(
            depth, "spatial", input_shape, rate, side, _predict(device, activation, batch), measured
        )
        for side, measured, activation in zip(wanted, seconds, activations)
    ]
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
    rates, dilated, channel = (
        values.clamp(0, 1).double().numpy()
        for values in (activation.rates, activation.rates_dilated, activation.rates_channel)
    )
    return network_report(
        device,
        activation.shape,
        rates,
        dilated,
        batch_size=batch,
        per_image=False,
        rates_channel=channel,
    ).latency_s


def _contest(
    contestants: Sequence[tuple[LASResNet, float | None]], input_shape: tuple[int, int, int]
) -> tuple[list[float], list[NetworkActivation]]:
    """Median seconds of each (backbone, rate of its masks), in turns, and its recorded rates."""
    batch, height, width = input_shape
    x = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    seconds: list[list[float]] = [[] for _ in contestants]
    activations = []
    with torch.inference_mode():
        for warm_up in (True, *[False] * _ROUNDS):
            for (backbone, rate), record in zip(contestants, seconds):
                if rate is not None:
                    force_masks(backbone, (batch, 3, height, width), rate, "blob")
                backbone(x)
                start = time.perf_counter()
                backbone(x)
                record.append(time.perf_counter() - start)
                if warm_up:
                    record.clear()
                    activations.append(backbone.network_activation().detach())
    return [statistics.median(record) for record in seconds], activations
