"""One GPU-like device of the analytical latency model, and the files that describe it.

A device file is YAML with a ``name`` and, for every number, a value and where it comes from::

    name: v100
    kind: published
    n_pe:
      value: 80
      source: NVIDIA Tesla V100 data sheet (80 SMs)

Numbers are in the unit that the field's name ends in. ``kind`` (optional, one of :data:`KINDS`)
says how far to trust the predictions.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_BYTES_PER_VALUE = 4  # FP32, the only precision that the model knows
KINDS = {
    "published": "the numbers behind the papers' figures, which predictions reproduce",
    "datasheet": "from data sheets; L2 and launch estimated, not compared with the device",
    "calibrated": "fitted to measurements on the device",
    "custom": "numbers of the user's own",
}
"""What a device's numbers rest on, and what that means, in words for a person."""
_INTEGERS = ("n_pe", "lanes", "batch_size", "request_width", "macs_in_flight_per_lane")


@dataclass(frozen=True)
class Device:
    """What the latency model needs to know about a device.

    Args:
        name: Name to show and to look the device up by.
        n_pe: Number of processing engines (SMs).
        lanes: FP32 multiply-accumulate lanes per processing engine.
        frequency_hz: Clock, in Hz; every lane does one multiply-accumulate per cycle.
        dram_bytes_per_s: Bandwidth of the device memory, in bytes/s.
        l2_to_dram_ratio: L2 bandwidth divided by the device memory's.
        launch_s: Fixed cost of one kernel, in seconds.
        batch_size: Images per batch in the published figures; the default of every prediction.
        request_width: FP32 values fetched by one memory request.
        macs_in_flight_per_lane: Multiply-accumulates in flight per lane.
        sources: Where each number comes from, by field name. Takes no part in comparisons.
        kind: What the numbers rest on, one of :data:`KINDS`. Takes no part in comparisons.
            Defaults to 'custom'.

    Raises:
        ValueError: A number is of the wrong type, not finite or not positive, or ``kind`` is
            unknown.
    """

    name: str
    n_pe: int
    lanes: int
    frequency_hz: float
    dram_bytes_per_s: float
    l2_to_dram_ratio: float
    launch_s: float
    batch_size: int
    request_width: int = 8
    macs_in_flight_per_lane: int = 4
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    kind: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name must be a non-empty string, got {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for key in NUMBER_FIELDS:
            _check_number(key, getattr(self, key))

    @property
    def note(self) -> str:
        """One line for people: what predictions for this device rest on."""
        return f"{self.name}: {self.kind} ({KINDS[self.kind]})"

    @property
    def dram_values_per_s(self) -> float:
        """Device memory bandwidth in FP32 values/s."""
        return self.dram_bytes_per_s / _BYTES_PER_VALUE

    @property
    def l2_values_per_s(self) -> float:
        """L2 bandwidth in FP32 values/s."""
        return self.dram_values_per_s * self.l2_to_dram_ratio

    @property
    def macs_per_s_per_pe(self) -> float:
        """Peak multiply-accumulates/s of one processing engine."""
        return self.frequency_hz * self.lanes

    def to_dict(self) -> dict[str, Any]:
        """The content of a device file; ``yaml.safe_dump`` of it loads back as this device."""
        content: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for key in NUMBER_FIELDS:
            content[key] = {"value": getattr(self, key), "source": self.sources.get(key, "")}
        return content


NUMBER_FIELDS = tuple(f.name for f in fields(Device) if f.name not in ("name", "sources", "kind"))
"""The fields that hold a number, in order: the keys of a device file besides the name and kind."""


def parse_device(path: Path, content: Any) -> Device:
    """The device of a file's content.

    Raises:
        ValueError: It is none; the message names the file, the field and the value.
    """
    required = ("name", *NUMBER_FIELDS)
    known = (*required, "kind")
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a mapping with the keys {', '.join(known)}, "
            f"got {type(content).__name__}"
        )
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ValueError(
            f"{path}: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}"
        )
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(
            f"{path}: missing key {', '.join(missing)}; a device file gives every "
            'number as "<key>: {value: ..., source: ...}"'
        )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key in NUMBER_FIELDS:
        values[key], sources[key] = _entry(path, key, content[key])
    try:
        kind = content.get("kind", "custom")
        return Device(name=content["name"], sources=sources, kind=kind, **values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _entry(path: Path, key: str, entry: Any) -> tuple[Any, str]:
    """Split one ``{value, source}`` entry of a device file."""
    if not isinstance(entry, dict) or "value" not in entry:
        raise ValueError(f'{path}: {key} must be "{{value: ..., source: ...}}", got {entry!r}')
    extra = sorted(str(k) for k in entry if k not in ("value", "source"))
    if extra:
        raise ValueError(
            f"{path}: {key} has the unknown key {', '.join(extra)}; write only value and source"
        )
    source = entry.get("source")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(
            f"{path}: {key} = {entry['value']!r} has no source (got {source!r}); "
            'say in "source" where the number comes from'
        )
    return entry["value"], source.strip()


def _check_number(key: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a positive finite number of the field's type."""
    wanted = "a positive integer" if key in _INTEGERS else "a positive finite number"
    kind = numbers.Integral if key in _INTEGERS else numbers.Real
    hint = ""
    if isinstance(value, str):
        hint = "; YAML reads 1.5e9 as text: write 1.5e+9 or 1500000000"
    # bool is an Integral in Python, but "n_pe: yes" is a mistake.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{key} must be {wanted}, got {value!r} ({type(value).__name__}){hint}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} must be {wanted}, got {value!r}")
