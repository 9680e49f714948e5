"""How a transformer layer skips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from las_mm.network.transformer import HEAD, HEAD_IN_MLP, axes_of_mode, mode_of_axes


@dataclass(frozen=True)
class TransformerSettings:
    """What one transformer layer decides about.

    Args:
        mode: ``'static'``, or some of ``token``, ``head``, ``attention``, ``mlp`` and ``layer``
            (attention and MLP, each for itself) joined by ``+``; ``'all'`` is all of them.
        head_in_mlp: Whether skipped heads close their channels in the MLP too: ``'none'``; in its
            ``'input'``, as AdaViT (arXiv 2111.15668) does; or in its ``'hidden'`` channels, as
            AdaViT does with ``ada_head_v2``.

    Raises:
        ValueError: A value outside its range; the message names it.
    """

    mode: str = "static"
    head_in_mlp: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", mode_of_axes(axes_of_mode(self.mode)))
        if self.head_in_mlp not in HEAD_IN_MLP:
            raise ValueError(
                f"head_in_mlp must be one of {', '.join(HEAD_IN_MLP)}, got {self.head_in_mlp!r}"
            )

    # What settings of all blocks have.
    granularity = channel_granularity = 1
    channel_position = "after_act"
    spatial = channel = False

    @property
    def axes(self) -> tuple[str, ...]:
        """What it decides about."""
        return axes_of_mode(self.mode)

    @property
    def gates_mlp(self) -> bool:
        """Whether decisions about heads reach the MLP."""
        return HEAD in self.axes and self.head_in_mlp != "none"


def layer_settings(
    layers: int, mode: str | Sequence[str], head_in_mlp: str, static_layers: int
) -> tuple[TransformerSettings, ...]:
    """The settings of every layer.

    Args:
        layers: How many.
        mode: One for all but the first ``static_layers``, or a list of one per layer.
        head_in_mlp: Of all.
        static_layers: See ``mode``.

    Raises:
        ValueError: A list of the wrong length, or a value outside its range.
    """
    whole = isinstance(static_layers, int) and not isinstance(static_layers, bool)
    if not whole or not 0 <= static_layers <= layers:
        raise ValueError(f"static_layers must be from 0 to {layers}, got {static_layers!r}")
    if isinstance(mode, (list, tuple)):
        modes = list(mode)
        if len(modes) != layers:
            raise ValueError(f"mode needs one value or {layers} (one per layer), got {modes}")
    else:
        modes = ["static"] * static_layers + [mode] * (layers - static_layers)
    found = []
    for i, one in enumerate(modes):
        try:
            found.append(TransformerSettings(one, head_in_mlp))
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from None
    return tuple(found)
