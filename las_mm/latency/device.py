"""Devices by name or file: of the analytical model, or calibrated by measurement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Union

import yaml

from .analytical.device import KINDS, Device, parse_device
from .measured.calibrated import CalibratedDevice, calibration_path, parse_calibrated

__all__ = [
    "KINDS",
    "MEASURED",
    "AnyDevice",
    "Device",
    "available_devices",
    "load_analytic_device",
    "load_device",
]
_DEVICE_DIR = Path(__file__).parent / "devices"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MEASURED = ("cpu", "cuda")
"""Names of this machine's own calibrations."""
AnyDevice = Union[Device, CalibratedDevice]


def available_devices() -> list[str]:
    """Names of the devices shipped with the package, sorted."""
    return sorted(path.stem for path in _DEVICE_DIR.glob("*.yaml"))


def load_device(name_or_path: str | Path | AnyDevice) -> AnyDevice:
    """Load a device.

    Shipped devices are of two kinds (``Device.kind``, :data:`KINDS`): *published* are ``v100``,
    ``rtx3090``, ``rtx3060``, ``tx2`` and ``nano``, whose numbers are exactly those of the papers'
    simulator; *datasheet* are ``a100``, ``h100``, ``rtx4090``, ``orin`` and ``t4``, whose peak
    numbers are the vendor's and whose L2 and launch figures are estimates: compare networks on
    one such device, but do not read its milliseconds as measured ones. A file written by
    ``las_mm calibrate`` is *calibrated* (a :class:`CalibratedDevice`), and ``cpu`` and ``cuda``
    are the names of this machine's own; a file that says nothing is *custom*.

    Args:
        name_or_path: A shipped name (any case), ``cpu`` or ``cuda``, the path of a ``.yaml`` or
            ``.yml`` file, or a device, which is returned unchanged.

    Raises:
        TypeError: The argument is none of these.
        ValueError: The name is unknown, or the file is not a valid device file. The message
            names the file, the field, the value, and what to write instead.
        FileNotFoundError: There is no file at the path.
    """
    if isinstance(name_or_path, (Device, CalibratedDevice)):
        return name_or_path
    if not isinstance(name_or_path, (str, Path)):
        raise TypeError(
            "a device is given by its name, the path of a .yaml file or a Device, "
            f"got {type(name_or_path).__name__}"
        )
    path = Path(name_or_path)
    way_out = ""
    if path.suffix.lower() not in (".yaml", ".yml"):
        name = str(name_or_path).lower()
        if name in MEASURED:
            path = calibration_path(name)
            way_out = f"run las_mm calibrate --device {name} again (--refit keeps measurements)"
            if not path.is_file():
                raise ValueError(
                    f"this machine's {name} is not calibrated yet (no {path}): run "
                    f"las_mm calibrate --device {name}, or give another device"
                )
        elif name in available_devices():
            path = _DEVICE_DIR / f"{name}.yaml"
        else:
            raise ValueError(
                f"unknown device {str(name_or_path)!r}; shipped devices: "
                f"{', '.join(available_devices())}; {' or '.join(MEASURED)} is this machine's own "
                "calibration; for another one give the path of its .yaml file"
            )
    if not path.is_file():
        raise FileNotFoundError(
            f"no device file at {path}; shipped devices, which need no path: "
            f"{', '.join(available_devices())}"
        )
    try:
        return _parse(path)
    except ValueError as error:
        if way_out and way_out.split(" --device")[0] not in str(error):
            raise ValueError(f"{error}; {way_out}") from error
        raise


def load_analytic_device(name_or_path: str | Path | AnyDevice) -> Device:
    """:func:`load_device` where only the analytical model has an answer.

    Raises:
        ValueError: The device is a calibrated one; else as :func:`load_device`.
    """
    device = load_device(name_or_path)
    if isinstance(device, CalibratedDevice):
        raise ValueError(
            f"{device.name} is calibrated by measurement, which covers the blocks of "
            "convolutional networks; give a device of the analytical model: "
            f"{', '.join(available_devices())}"
        )
    return device


def _parse(path: Path) -> AnyDevice:
    """Read and validate one device file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != "calibrated":
        return parse_device(path, content)
    device = parse_calibrated(path, content)
    device.warn_if_stale(_here(device.machine.get("device", "cpu")), path)
    device.warn_if_poor(path)
    return device


def _here(device_type: str) -> dict[str, Any]:
    """What of this process a calibration can be compared with; little where torch is not loaded."""
    if "torch" not in sys.modules:
        return {}
    from las_mm.machine import machine, processor

    threads = sys.modules["torch"].get_num_threads()
    return {**machine(), "processor": processor(device_type), "threads": threads}
