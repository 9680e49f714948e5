"""The settings of a block that may change after it was made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from las_mm.models import sparse
from las_mm.models.settings import BlockSettings


def _setting(name: str) -> property:
    """A setting of a block, checked like the constructor's whenever it is changed."""

    def get(self):
        return getattr(self, f"_{name}")

    def set_(self, value) -> None:
        self._check(name, value)
        setattr(self, f"_{name}", value)

    return property(get, set_)


class ChangeableBlock(nn.Module):
    """A block's settings as attributes that are checked whenever they change.

    Attributes:
        mode, granularity, channel_granularity, channel_position: See :class:`BlockSettings`.
        runtime: See :class:`~las_mm.models.backbone.DynamicBackbone`.
    """

    mode = _setting("mode")
    granularity = _setting("granularity")
    channel_granularity = _setting("channel_granularity")
    channel_position = _setting("channel_position")
    _runtime = "auto"

    @property
    def runtime(self) -> str:
        """See the class."""
        return self._runtime

    @runtime.setter
    def runtime(self, value: str) -> None:
        self._runtime = sparse.check_runtime(value)

    def _check(self, name: str, value: object) -> None:
        """``name`` may become ``value``.

        Raises:
            ValueError: No value for a block, or the maskers are others than it needs.
        """
        wanted = replace(self.settings, **{name: value})
        known = (self.masker is not None, self.masker_channel is not None)
        if name == "mode" and (wanted.spatial, wanted.channel) != known:
            raise ValueError(
                f"mode cannot become {value!r}, which needs other maskers than the block has: call "
                f"block.make_dynamic(BlockSettings(mode={value!r}, ...))"
            )
        masker = self.masker_channel
        if name == "channel_granularity" and masker is not None:
            size = self.mid_channels // masker.groups
            if value != size:
                raise ValueError(
                    f"channel_granularity cannot become {value!r}, as the masker decides about "
                    f"groups of {size} channels: call "
                    f"block.make_dynamic(BlockSettings(channel_granularity={value!r}, ...))"
                )

    @property
    def settings(self) -> BlockSettings:
        """How the block skips, as it is now."""
        return BlockSettings(
            mode=self.mode,
            granularity=self.granularity,
            channel_position=self.channel_position,
            **{"channel_granularity": self.channel_granularity, **self._channel_masker_shape()},
        )

    def _channel_masker_shape(self) -> dict[str, Any]:
        """What a shape says of the channel masker; empty without one."""
        masker = self.masker_channel
        if masker is None:
            return {}
        return dict(
            channel_granularity=self.channel_granularity,
            channel_masker=masker.kind,
            channel_masker_layers=masker.layers,
            channel_reduction=masker.reduction,
        )

    def extra_repr(self) -> str:
        patch = f", S={self.granularity}" if self.mode in ("spatial", "both") else ""
        group = ""
        if self.mode in ("channel", "both"):
            group = f", G={self.channel_granularity}, {self.channel_position}"
        return f"mode={self.mode}{patch}{group}"
