"""What every operator checks before it is costed."""

from __future__ import annotations

import numbers

from .device import Device


def images_of(device: Device, batch_size: int | None) -> int:
    """``batch_size``, or the device's.

    Raises:
        TypeError: ``device`` is no one of the analytical model.
    """
    if not isinstance(device, Device):
        raise TypeError(
            f"operators are costed one by one for a Device of the analytical model, got "
            f"{type(device).__name__}; a calibrated device predicts blocks and networks"
        )
    return device.batch_size if batch_size is None else batch_size


def check_sizes(name: str, **sizes: int) -> None:
    """Raise ValueError for a size that is not a positive integer."""
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}: {key} must be a positive integer, got {value!r}")
