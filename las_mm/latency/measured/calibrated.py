"""A device whose latencies were measured: what it predicts, and its file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from las_mm.fileio import cache_folder
from las_mm.network.block import BlockShape, NetworkShape
from las_mm.network.bottleneck import BottleneckShape
from las_mm.network.operator import CHANNEL, DILATED, LAYER, POSITION, Conv, Pool

from ..report import Report
from .fitted import INPUTS, TERMS, Correction, FittedModel
from .halo import expected_dilated_rate
from .terms import Probes

FORMAT = 1
_DIGITS = 7  # of numbers in a file; float32 has as many
POOR = 0.25  # RMS error of unseen blocks from which on a calibration is not to be trusted
_RECALIBRATE = "run las_mm calibrate again"
_warned: set[str] = set()


@dataclass(frozen=True, eq=False)
class CalibratedDevice:
    """A machine with a model fitted to measurements on it, in place of the analytical one.

    Times are those of the sparse runtime of this package (static blocks included), at the threads
    and the dtype of the measurement. A rate without a recorded dilated rate is taken for that of
    coherent masks (:mod:`las_mm.latency.measured.halo`), where the analytical devices follow the
    papers and charge no halo.

    Attributes:
        name: Name to show.
        machine: What was measured: device, processor, isa, threads, dtype, versions.
        date: When, YYYY-MM-DD.
        accuracy: How well blocks are predicted that the fit has not seen.
        model: The fitted model.
        batch_size: Images per batch where none is given.
        kind: ``'calibrated'``.
    """

    name: str
    machine: Mapping[str, Any]
    date: str
    accuracy: Mapping[str, float]
    model: FittedModel
    batch_size: int = 1
    kind: str = field(default="calibrated", init=False)

    @property
    def note(self) -> str:
        """One line for people: what predictions for this device rest on."""
        m = self.machine
        return (
            f"{self.name}: calibrated on {self.date} ({m['processor']}, {m['threads']} threads, "
            f"{m['dtype']}); unseen blocks within {100 * self.accuracy['rmspe']:.1f} % (RMS), "
            f"{100 * self.accuracy['within_10_percent']:.0f} % of them within 10 %"
        )

    def dilated(self, block: BlockShape, rates: np.ndarray) -> np.ndarray:
        """conv1's rates where only the block's are known."""
        return expected_dilated_rate(block, rates)

    def block_report(self, block: BlockShape, rates: Mapping[str, float], batch: int) -> Report:
        """Seconds of a block for the batch, by operator.

        Args:
            block: The block.
            rates: By axis; those that are not given are 1.
            batch: Images.

        Raises:
            ValueError: It is of a kind that calibrations do not measure.
        """
        known = self._known(block)
        rate = rates.get(LAYER, rates.get(POSITION, 1.0))
        dilated = rates.get(LAYER, rates.get(DILATED, 1.0))
        parts = self.model.parts(known, batch, rate, dilated, rates.get(CHANNEL, 1.0))
        operators: dict[str, dict[str, float]] = {}
        for name, seconds in parts.items():
            term = TERMS[name]
            times = operators.setdefault(term.operator, dict(compute=0.0, memory=0.0, launch=0.0))
            times[term.kind] += float(seconds[0])
        reports = [
            Report(name, t["compute"], t["memory"], t["launch"]) for name, t in operators.items()
        ]
        return Report.group(block.name, [r for r in reports if r.latency_s])

    def block_costs(self, block: BlockShape, batch: int) -> list[MeasuredCost]:
        """What a block's latency is the sum of: what goes with conv1's rate, and the rest.

        Raises:
            ValueError: As for :meth:`block_report`.
        """
        known = self._known(block)
        channels = (CHANNEL,) if block.has_channels else ()
        position = {LAYER: (LAYER, LAYER), POSITION: (DILATED, POSITION)}
        none = ("", "")
        dilated, rate = next((b for axis, b in position.items() if axis in block.axes), none)
        return [
            MeasuredCost(self.model, known, batch, part, axis, (*filter(None, [axis]), *channels))
            for part, axis in (("dilated", dilated), ("rate", rate))
        ]

    def _known(self, block: BlockShape) -> BottleneckShape:
        if type(block) is BottleneckShape:
            return block
        raise ValueError(
            f"{self.name} is calibrated by measurement, which so far covers bottleneck blocks, not "
            f"{block.name}, a {type(block).__name__}: give a device of the analytical model, such "
            "as 'v100'"
        )

    def stem_report(self, network: NetworkShape, batch: int) -> Report:
        """Seconds of the stem for the batch.

        Raises:
            ValueError: It holds something without a model.
        """
        parts = []
        stem = list(network.stem)
        constants = self.model.stem_s
        while stem:
            item = stem.pop(0)
            if isinstance(item, Pool):
                moved = 4 * batch * item.channels * item.h_out * item.w_out * (item.stride**2 + 1)
                seconds = float(self.model.probes.transfer_s(moved, moved))
                parts.append(Report(item.name, 0.0, seconds, constants["call"]))
                continue
            if not isinstance(item, Conv):
                raise ValueError(f"there is no latency model for {item!r} of {network.name}")
            products = batch * item.h_out * item.w_out * item.c_out * item.kernel**2
            products *= item.c_in // item.groups
            if item.c_in > 4:  # of a deep stem: an ordinary dense convolution
                seconds = products / self.model.probes.macs_per_s
                seconds *= self.model.constants["conv2"] + self.model.constants["conv2_panels"]
                parts.append(Report(item.name, seconds, 0.0, constants["call"]))
                continue
            pooled = item.kernel == 7 and len(stem) == 1 and isinstance(stem[0], Pool)
            name = item.name
            if pooled:
                name += "+" + stem.pop(0).name
            each = constants["pooled" if pooled else "plain"]
            parts.append(Report(name, products * each, 0.0, constants["call"]))
        return Report.group("stem", parts)

    def to_dict(self) -> dict[str, Any]:
        """The content of the device's file."""
        model, probes = self.model, self.model.probes
        content: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "format": FORMAT,
            "date": self.date,
            "machine": dict(self.machine),
            "accuracy": dict(self.accuracy),
            "batch_size": self.batch_size,
            "probes": {
                "macs_per_s": probes.macs_per_s,
                "macs_per_s_one": probes.macs_per_s_one,
                "bandwidth": [list(pair) for pair in probes.bandwidth],
                "call_s": probes.call_s,
            },
            "tiles": model.tiles,
            "constants": dict(model.constants),
            "stem_s": dict(model.stem_s),
            "correction": {
                "inputs": list(INPUTS),
                "center": model.correction.center.tolist(),
                "scale": model.correction.scale.tolist(),
                "amplitude": model.correction.amplitude,
                "weights": model.correction.weights.tolist(),
                "points": model.correction.points.tolist(),
            },
        }
        content = _rounded(content)
        content["checksum"] = _checksum(content)
        return content

    def to_yaml(self) -> str:
        """The device's file."""
        head = f"# Measured by las_mm calibrate on {self.date}. Not to be edited.\n"
        return head + yaml.safe_dump(
            self.to_dict(), sort_keys=False, default_flow_style=None, width=2**16
        )

    def warn_if_poor(self, path: Path) -> None:
        """Say once per file and process if it predicts badly by its own account."""
        if self.accuracy["rmspe"] > POOR:
            _warn_once(
                f"{path} predicts blocks only to {100 * self.accuracy['rmspe']:.0f} %; while "
                f"nothing else runs, {_RECALIBRATE}"
            )

    def warn_if_stale(self, here: Mapping[str, Any], path: Path) -> None:
        """Say once per file and process if it was measured on something else than ``here``."""
        other = [
            f"{key} {self.machine.get(key)!r}, here {here[key]!r}"
            for key in ("processor", "isa", "threads", "las_mm", "kernels")
            if key in here and self.machine.get(key) != here[key]
        ]
        if other:
            _warn_once(
                f"{path} was measured with {'; '.join(other)}: its predictions hold for that. For "
                f"this machine, {_RECALIBRATE}"
            )


@dataclass(frozen=True)
class MeasuredCost:
    """Seconds of a part of a block for the whole batch, by the rates of its axes."""

    model: FittedModel
    block: BottleneckShape
    batch: int
    part: str  # of BlockCurves
    position: str  # its axis of positions or layers, or empty
    axes: tuple[str, ...]

    def seconds(self, rates: Mapping[str, Any], patches: str = "whole") -> np.ndarray:
        """At arrays of rates that broadcast; 1 where none is given.

        A rate is the mean over many images, so that there are no whole ``patches`` to round to.
        """
        rate, channel = np.broadcast_arrays(
            np.asarray(rates.get(self.position, 1.0), dtype=float), rates.get(CHANNEL, 1.0)
        )
        found = np.empty(rate.shape)
        for value in np.unique(channel):
            of = channel == value
            own = rate[of]
            curves = self.model.curves(self.block, self.batch, own, own, float(value))
            found[of] = getattr(curves, self.part)
        return found


def _warn_once(text: str) -> None:
    if text in _warned:
        return
    _warned.add(text)
    from mmengine.logging import print_log

    print_log(text, logger="current", level=logging.WARNING)


def parse_calibrated(path: Path, content: Mapping[str, Any]) -> CalibratedDevice:
    """The device of a file's content.

    Raises:
        ValueError: The file was changed, cut off, or written by another version.
    """
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {content.get('format')!r}, this version reads {FORMAT}; {_RECALIBRATE}"
        )
    body = {key: value for key, value in content.items() if key != "checksum"}
    if content.get("checksum") != _checksum(body):
        raise ValueError(
            f"{path}: the checksum does not fit the content, so the file was edited or is "
            f"damaged; {_RECALIBRATE}"
        )
    try:
        correction, probes = body["correction"], body["probes"]
        if correction["inputs"] != list(INPUTS) or set(body["constants"]) != set(TERMS):
            raise ValueError("its model is that of another version")
        arrays = {
            key: np.asarray(correction[key], dtype=float)
            for key in ("center", "scale", "weights", "points")
        }
        count = len(INPUTS)
        shapes = dict(center=(count,), scale=(count,), points=(len(arrays["weights"]), count))
        for key, shape in shapes.items():
            if arrays[key].shape != shape:
                raise ValueError(f"correction.{key} has shape {arrays[key].shape}, not {shape}")
        _check_finite(body)
        model = FittedModel(
            probes=Probes(
                probes["macs_per_s"],
                probes["macs_per_s_one"],
                tuple((float(size), float(rate)) for size, rate in probes["bandwidth"]),
                probes["call_s"],
            ),
            constants=body["constants"],
            correction=Correction(amplitude=correction["amplitude"], **arrays),
            stem_s=body["stem_s"],
            tiles=body["tiles"],
        )
        return CalibratedDevice(
            name=body["name"],
            machine=body["machine"],
            date=body["date"],
            accuracy=body["accuracy"],
            model=model,
            batch_size=body["batch_size"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; {_RECALIBRATE}") from error


def calibration_path(device_type: str) -> Path:
    """Where this machine's own calibration is kept: e.g. ``~/.cache/las_mm/cpu.yaml``."""
    return cache_folder() / f"{device_type}.yaml"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.{_DIGITS}g}")
    return value


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_finite(value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_finite(item)
    elif isinstance(value, numbers.Real) and not math.isfinite(value):
        raise ValueError(f"it holds {value!r}")
