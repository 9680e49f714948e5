"""Fitting :class:`~las_mm.latency.measured.fitted.FittedModel` to measurements.

Needs scipy and scikit-learn, which predicting does without.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from las_mm.network.bottleneck import BottleneckShape

from .fitted import INPUTS, TERMS, Correction, FittedModel, correction_inputs
from .samples import StemCase
from .terms import Probes, quantities

_FOLDS = 5
_ROBUST = 1.5  # median errors beyond which a measurement loses weight
_OUTLIER = 4.0  # standard deviations of the formula's error, not learned
FEWEST = 60  # blocks that a fit needs


class Observation(NamedTuple):
    """A block as measured: rates as recorded, seconds of the whole batch."""

    block: BottleneckShape
    batch: int
    rate: float
    dilated: float
    channel: float
    seconds: float


class StemObservation(NamedTuple):
    """A stem as measured."""

    case: StemCase
    seconds: float


@dataclass(frozen=True)
class Accuracy:
    """How well predictions match measurements.

    Attributes:
        cases: Number of blocks.
        rmspe: Root of the mean squared relative error.
        within_10_percent: Share of blocks within 10 %.
        bias: Median relative error.
        rank_correlation: Spearman's.
    """

    cases: int
    rmspe: float
    within_10_percent: float
    bias: float
    rank_correlation: float

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Accuracy:
        """Of seconds, shape (cases,)."""
        from scipy.stats import spearmanr

        error = predicted / measured - 1
        return cls(
            cases=len(error),
            rmspe=float(np.sqrt((error**2).mean())),
            within_10_percent=float((abs(error) <= 0.1).mean()),
            bias=float(np.median(error)),
            rank_correlation=float(spearmanr(predicted, measured).statistic),
        )


def check_libraries() -> None:
    """What fitting needs is installed.

    Raises:
        ImportError: scipy or scikit-learn is missing.
    """
    for name, package in (("scipy", "scipy"), ("sklearn", "scikit-learn")):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"fitting needs {package}: pip install {package}")


def fit(
    blocks: Sequence[Observation],
    stems: Sequence[StemObservation],
    probes: Probes,
    tiles: bool = True,
) -> tuple[FittedModel, Accuracy]:
    """The model and how well it predicts blocks that it has not seen (5-fold cross-validation).

    Raises:
        ValueError: Too few measurements.
        ImportError: scipy or scikit-learn is missing.
    """
    if len(blocks) < FEWEST or not stems:
        raise ValueError(
            f"at least {FEWEST} blocks and a stem have to be measured, got {len(blocks)} and "
            f"{len(stems)}"
        )
    stem_s = _fit_stems(stems)
    kernel = None
    model, kernel = _fit_blocks(blocks, probes, stem_s, tiles, kernel)
    fold = np.arange(len(blocks)) % _FOLDS
    unseen = np.empty(len(blocks))
    for i in range(_FOLDS):
        others = [b for b, part in zip(blocks, fold) if part != i]
        partial, _ = _fit_blocks(others, probes, stem_s, tiles, kernel)
        for j in np.flatnonzero(fold == i):
            unseen[j] = predicted_s(partial, blocks[j])
    return model, Accuracy.of(unseen, np.array([b.seconds for b in blocks]))


def predicted_s(model: FittedModel, observed: Observation) -> float:
    """What the model says about a measured block, at the rates that it had."""
    return float(model.seconds(*observed[:-1])[0])


def _fit_blocks(
    blocks: Sequence[Observation],
    probes: Probes,
    stem_s: Mapping[str, float],
    tiles: bool,
    kernel: object | None,
) -> tuple[FittedModel, object]:
    """The model, and the kernel of its correction, which is searched unless given."""
    measured = np.array([b.seconds for b in blocks])
    terms = [
        quantities(b.block, b.batch, probes, b.rate, b.dilated, b.channel, tiles) for b in blocks
    ]
    names = [name for name in TERMS if any(name in row for row in terms)]
    design = np.array([[float(row.get(name, 0.0)) for name in names] for row in terms])
    found = _robust_constants(design, measured)
    constants = {name: 0.0 for name in TERMS} | dict(zip(names, map(float, found)))
    inputs = np.concatenate(
        [correction_inputs(b.block, b.batch, b.rate, b.channel) for b in blocks]
    )
    correction, kernel = _fit_correction(inputs, np.log(measured / (design @ found)), kernel)
    return FittedModel(probes, constants, correction, stem_s, tiles), kernel


def _robust_constants(design: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Non-negative constants of least relative error, disturbed measurements counting less."""
    from scipy.optimize import nnls

    relative = design / measured[:, None]
    size = np.abs(relative).max(axis=0)
    size[size == 0] = 1.0
    weight = np.ones(len(measured))
    constants = np.zeros(design.shape[1])
    for _ in range(10):
        solution, _ = nnls(relative / size * weight[:, None], weight)
        constants = solution / size
        error = abs(relative @ constants - 1)
        limit = _ROBUST * np.median(error) + 1e-12
        weight = np.sqrt(np.minimum(1.0, limit / np.maximum(error, 1e-12)))
    return constants


def _fit_correction(
    inputs: np.ndarray, logarithms: np.ndarray, kernel: object | None
) -> tuple[Correction, object]:
    check_libraries()
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    deviation = 1.4826 * np.median(abs(logarithms - np.median(logarithms))) + 1e-9
    used = abs(logarithms - np.median(logarithms)) < _OUTLIER * deviation
    center, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale[scale < 1e-9] = 1.0
    scaled = (inputs[used] - center) / scale
    optimizer = None
    if kernel is None:
        optimizer = "fmin_l_bfgs_b"
        kernel = ConstantKernel(0.01, (1e-4, 1.0)) * RBF(
            np.full(len(INPUTS), 3.0), (0.5, 1e3)
        ) + WhiteKernel(2e-3, (1e-4, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths at their limit: an input without influence
        process = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=optimizer)
        process.fit(scaled, logarithms[used])
    smooth = process.kernel_.k1
    lengths = np.broadcast_to(smooth.k2.length_scale, scale.shape)
    correction = Correction(
        center=center,
        scale=scale * lengths,
        points=scaled / lengths,
        weights=np.ravel(process.alpha_),
        amplitude=float(smooth.k1.constant_value),
    )
    return correction, process.kernel_


def _fit_stems(stems: Sequence[StemObservation]) -> dict[str, float]:
    """Seconds per call and per multiply-accumulate, with pooling and without."""
    rows, measured = [], []
    for case, seconds in stems:
        products = stem_products(case)
        rows.append([1.0, products if case.pool else 0.0, 0.0 if case.pool else products])
        measured.append(seconds)
    found = _robust_constants(np.array(rows), np.array(measured))
    return dict(zip(("call", "pooled", "plain"), map(float, found)))


def stem_products(case: StemCase) -> float:
    """Multiply-accumulates of a stem's convolution."""
    conv = case.conv
    each = conv.c_in * conv.kernel**2 // conv.groups
    return float(case.batch * conv.h_out * conv.w_out * conv.c_out * each)
