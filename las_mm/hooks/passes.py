"""The forward passes of a backbone in validation and test."""

from __future__ import annotations

from torch import Tensor, nn

from las_mm.models.activation import NetworkActivation


class Passes:
    """Records what a backbone does in each forward pass of an iteration.

    There may be several: one for each view of test-time augmentation or for each window of a large
    image; or none, where another of the model's networks was run.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[int, NetworkActivation]] = []
        self._handle = None

    def start(self, backbone: nn.Module) -> None:
        """Record this backbone from now on, until :meth:`stop`."""
        self.stop()
        self._handle = backbone.register_forward_hook(self._record)

    def stop(self) -> None:
        """Record no longer, and forget what was not taken."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._passes = []

    def take(self) -> list[tuple[int, NetworkActivation]]:
        """(images, what was done) of each pass since the last call, in their order."""
        passes, self._passes = self._passes, []
        return passes

    def _record(self, backbone: nn.Module, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        images = len(outputs[-1])
        self._passes.append((images, backbone.network_activation().detach()))
