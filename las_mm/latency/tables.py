"""The tables of one device, one per network and input size, built when first needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from las_mm.bounded import Recent

from .device import AnyDevice, load_device
from .predictor import LatencyTable
from .shapes import NetworkShape


class LatencyTables:
    """:class:`LatencyTable` of whatever shape a training comes along with, each built once.

    Args:
        device: A device, its name or its file.
        batch_size: Images per batch. Defaults to the device's.
        options: Other arguments of :class:`LatencyTable`: ``points``, ``include_stem``,
            ``patches``.
    """

    def __init__(
        self, device: str | Path | AnyDevice, batch_size: int | None = None, **options: Any
    ) -> None:
        self.device = load_device(device)
        self.batch_size = batch_size
        self.options = options
        self._tables: Recent[NetworkShape, LatencyTable] = Recent()
        self._last: LatencyTable | None = None

    def __call__(self, network: NetworkShape) -> LatencyTable:
        """The table of ``network``: the network at one input size."""
        # A backbone keeps its shapes, and hashing one takes longer than reading a table.
        if self._last is None or self._last.network is not network:
            self._last = self._tables.get(
                network,
                lambda: LatencyTable(
                    self.device, network, batch_size=self.batch_size, **self.options
                ),
            )
        return self._last
