"""What every dynamic residual block has: maskers, a decision, a record and a sparse path."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from las_mm import compat, ops
from las_mm.models import sparse
from las_mm.models.activation import Activation, channel_rates
from las_mm.models.changeable import ChangeableBlock
from las_mm.models.coverage import Unsupported, in_format, is_channels_last, shadowed
from las_mm.models.executors.base import SparseBlock
from las_mm.models.maskers import (
    ChannelMasker,
    SpatialMasker,
    dilate_mask,
    expand_channels,
    expand_mask,
)
from las_mm.models.settings import BlockSettings
from las_mm.models.snapshot import Snapshot, checked, watch
from las_mm.network.block import BlockShape
from las_mm.network.operator import CHANNEL, DILATED, LAYER, POSITION

# What a forward pass reads of the block beside its modules.
_READ = (
    "_mode",
    "_granularity",
    "_channel_granularity",
    "_channel_position",
    "norm1_name",
    "norm2_name",
    "norm3_name",
    "conv1_stride",
    "conv2_stride",
    "stride",
    "dilation",
)
_METHODS = ("forward", "_forward", "_decide", "_decide_positions", "_compute", "_gated", "_excite")


class DynamicBlock(ChangeableBlock):
    """Mixed into a residual block of which a 3x3 convolution reads what conv1 puts out.

    Put before the static block among the bases; its constructor runs as it is, then
    :meth:`make_dynamic` adds the maskers, so the parameters keep their names and static
    checkpoints load. ``forward`` returns only the features; what was skipped is left in
    :attr:`activation`. A subclass gives :meth:`_compute` and, where there is a sparse path,
    :meth:`_make_executor`. It reads the block's ``in_channels``, ``mid_channels``,
    ``conv1_stride``, ``conv2_stride``, ``stride``, ``dilation``, ``conv2``, ``relu`` and
    ``with_cp``.

    Attributes:
        mode, granularity, channel_granularity, channel_position: See :class:`BlockSettings`. They
            may be changed as far as the maskers fit; :meth:`make_dynamic` makes others.
        runtime: See :class:`~las_mm.models.backbone.DynamicBackbone`.
        masker: Decides about patches or the whole block; ``None`` in other modes.
        masker_channel: Decides about channels; ``None`` in other modes.
        activation: What the last forward pass did; ``None`` before the first.
        input_hw: Rows and columns of its last input, but for those in compiled programs.
        why_dense: Why the block runs masked-dense; ``None`` if it does not.
    """

    input_hw: tuple[int, int] | None = None

    def make_dynamic(self, settings: BlockSettings) -> None:
        """Give the block the maskers of ``settings``; those it had are dropped.

        Raises:
            ValueError: ``channel_granularity`` does not divide the bottleneck's channels.
        """
        self._mode = settings.mode
        self._granularity = settings.granularity
        self._channel_granularity = settings.channel_granularity
        self._channel_position = settings.channel_position
        self.masker = SpatialMasker(self.in_channels) if settings.spatial else None
        self.masker_channel = None
        if settings.channel:
            width, size = self.mid_channels, settings.channel_granularity
            if width % size:
                raise ValueError(
                    f"channel_granularity must divide the {width} channels between the block's "
                    f"convolutions, got {size}"
                )
            self.masker_channel = ChannelMasker(
                self.in_channels,
                width // size,
                settings.channel_masker,
                settings.channel_masker_layers,
                settings.channel_reduction,
            )
        self._activation: Activation | Callable[[], Activation] | None = None
        self.why_dense: str | None = None
        self._executor: SparseBlock | None = None
        self._snapshot: Snapshot | None = None
        self._made_for: tuple | None = None
        self._key: str | None = None

    def describe(self, name: str, stage: int, hw: tuple[int, int]) -> BlockShape:
        """The block's shape, from which all that is counted and predicted of it follows.

        Args:
            name: Name to show.
            stage: Stage that it belongs to, from 1.
            hw: Rows and columns of its input.
        """
        raise NotImplementedError

    @property
    def activation(self) -> Activation | None:
        """What the last forward pass did, ``None`` before the first."""
        # Counted anew each time: a CUDA graph's next replay changes the masks in place.
        return self._activation() if callable(self._activation) else self._activation

    @activation.setter
    def activation(self, value: Activation | Callable[[], Activation] | None) -> None:
        self._activation = value

    def maskers(self) -> list[SpatialMasker | ChannelMasker]:
        """The maskers that the block has."""
        return [masker for masker in (self.masker, self.masker_channel) if masker is not None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H/stride), ceil(W/stride))."""
        if not self.training and self.runtime != "dense" and sparse.wanted(x):
            executor = self.executor_for(x)
            if executor is not None:
                channels_last = executor.channels_last or is_channels_last(x)
                return in_format(executor(self, x, False), channels_last)
        return self._forward(x)

    def infer(self, x: Tensor, in_place: bool = False) -> Tensor:
        """``forward`` in eval mode without gradients, in whatever memory format is the fastest.

        Args:
            x: (N, C_in, H, W).
            in_place: Whether ``x`` is the output of a ReLU that nobody else reads, so that it may
                be overwritten.
        """
        executor = self.executor_for(x)
        return self._forward(x) if executor is None else executor(self, x, in_place)

    def executor_for(self, x: Tensor) -> SparseBlock | None:
        """The packed form that computes this block for ``x``; ``None``: it runs masked-dense."""
        executor = self.prepare(self._positions(x))
        return executor if executor is not None and x.dtype == executor.dtype else None

    def prepare(self, positions: int | None = None) -> SparseBlock | None:
        """Fold and pack the weights unless that is done; ``None``: it runs masked-dense.

        Args:
            positions: See :meth:`stale`.

        Raises:
            RuntimeError: Inside ``torch.compile`` or ``torch.export`` before the first call.
        """
        if compat.is_compiling():
            if self._snapshot is None:
                raise RuntimeError(ops.PREPARE_FIRST)
            return self._executor
        # Another thread may call .eval() or .to() at any time, which forgets both.
        executor, snapshot = self._executor, self._snapshot
        if snapshot is None or self._settings() != self._made_for or snapshot.stale(positions):
            made_for, executor, why = self._settings(), None, None
            try:
                if self.runtime == "dense":
                    raise Unsupported("runtime='dense'")
                executor = self._make_executor()
            except Unsupported as reason:
                why = str(reason)
            snapshot = Snapshot(self, packed=executor is not None and executor.packs)
            self._made_for, self.why_dense = made_for, why
            self._executor, self._snapshot = executor, snapshot
            self._key = watch(self, self._key)
        return None if snapshot.hooked() else executor

    def stale(self, positions: int | None = None) -> bool:
        """Whether the block differs from the one whose weights are packed, or none are.

        Args:
            positions: See :meth:`~las_mm.models.snapshot.Snapshot.stale`.
        """
        snapshot = self._snapshot
        fresh = snapshot is not None and self._settings() == self._made_for
        return not fresh or snapshot.stale(positions)

    def checked(self, value: Tensor, x: Tensor) -> Tensor:
        """``value``, a packed one; in a compiled program only as long as it is up to date."""
        if not compat.is_compiling():
            return value
        return checked(value, self, self._snapshot, self._key, self._positions(x))

    def _settings(self) -> tuple:
        cls = type(self)
        return (
            *[getattr(cls, name) for name in _METHODS],
            shadowed(self, _METHODS),
            *map(self.__dict__.get, _READ),
            self.runtime,
            self.masker,
            self.masker_channel,
        )

    @property
    def _reader(self) -> tuple[int, int]:
        """Stride and dilation of the 3x3 convolution that reads around kept positions."""
        return self.conv2_stride, self.dilation

    def _positions(self, x: Tensor) -> int:
        """Outputs of the block for ``x``, of all images."""
        return x.shape[0] * -(-x.shape[2] // self.stride) * -(-x.shape[3] // self.stride)

    def hooked_inside(self) -> bool:
        """Whether a module of this block has forward hooks, which may keep what they are given."""
        snapshot = self._snapshot
        return snapshot is not None and snapshot.hooked()

    def train(self, mode: bool = True) -> DynamicBlock:
        """The parent's; the sparse path is made anew, as weights may be swapped in between."""
        self._executor = self._snapshot = None
        super().train(mode)
        return self

    def _make_executor(self) -> SparseBlock:
        """The packed form of this block.

        Raises:
            Unsupported: It has a part without a sparse path.
        """
        raise Unsupported(f"{type(self).__name__} has no sparse path")

    def _compute(self, x: Tensor, mask: Tensor | None, channels: Tensor | None) -> Tensor:
        """The block with dense convolutions.

        Args:
            x: (N, C_in, H, W).
            mask: (N, 1, H_out or 1, W_out or 1) of zeros and ones; ``None``: everything is kept.
            channels: (N, mid_channels, 1, 1) of zeros and ones, gating the outputs of conv1 and
                conv2; ``None``: everything is kept.
        """
        raise NotImplementedError

    def _excite(self, out: Tensor, mask: Tensor | None) -> Tensor:
        """What a subclass does to conv2's output before conv3 reads it."""
        return out

    def _gated(
        self, out: Tensor, conv: nn.Module, norm: nn.Module, channels: Tensor | None
    ) -> Tensor:
        """Norm and ReLU after conv1 or conv2, skipped channels gated at ``channel_position``."""
        if channels is None:
            return self.relu(norm(out))
        channels = channels.to(out.dtype)
        if self.channel_position == "after_act":
            return self.relu(norm(out)) * channels
        if type(norm) is nn.Identity and conv.bias is not None:
            # Folded into conv, whose bias is now what the norm made of a skipped channel's zeros.
            bias = conv.bias[:, None, None]
            return self.relu(bias + (out - bias) * channels)
        return self.relu(norm(out * channels))

    def _forward(self, x: Tensor) -> Tensor:
        if not compat.is_compiling():
            self.input_hw = (x.shape[-2], x.shape[-1])
        # Outside the checkpointed part: noise is drawn once and the activation has its graph.
        masks = self._decide(x)
        if self.with_cp and torch.is_grad_enabled() and x.requires_grad:
            return checkpoint(self._compute, x, *masks, use_reentrant=False)
        return self._compute(x, *masks)

    def _decide(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Run the maskers, leave the activation, return the masks that :meth:`_compute` takes.

        A subclass with an axis of its own adds its mask to these, and what it decided to the
        activation; see :meth:`.activation.Activation.about`.
        """
        mask = channels = None
        rates: dict[str, Tensor] = {}
        decisions: dict[str, Tensor] = {}
        if self.masker is not None:
            mask, coarse, kept, dilated = self._decide_positions(x)
            if self.mode == "layer":
                rates[LAYER], decisions[LAYER] = kept, coarse.detach()
            else:
                rates[POSITION], rates[DILATED] = kept, dilated
                decisions[POSITION] = coarse.detach()
        if self.masker_channel is not None:
            groups = self.masker_channel(x)
            channels = expand_channels(groups, self.channel_granularity)
            rates.update(channel_rates(channels[:, :, 0, 0], self.conv2.groups))
            decisions[CHANNEL] = groups.detach()
        self.activation = Activation(
            torch.ones((), device=x.device, dtype=torch.float32), rates, decisions
        )
        return mask, channels

    def _decide_positions(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mask to multiply with, hard decisions, rates (N,), conv1's dilated rates (N,))."""
        if self.mode == "layer":
            mask = self.masker(x, None)
            rates = mask.flatten()
            return mask, mask, rates, rates
        conv1_hw = tuple(-(-n // self.conv1_stride) for n in x.shape[-2:])
        out_hw = tuple(-(-n // self.stride) for n in x.shape[-2:])
        coarse = self.masker(x, self.granularity * self.stride)
        mask = expand_mask(coarse, self.granularity, out_hw)
        # Tracing (mmdet's FLOPs counters) records sizes as tensors, which the op cannot take;
        # torch.func has its own tensors, which older torch dispatches to no device.
        functional = not compat.is_compiling() and (
            torch._C._functorch.peek_interpreter_stack() is not None
        )
        if coarse.requires_grad or functional or torch.jit.is_tracing():
            halo = dilate_mask(mask, conv1_hw, *self._reader)
            return mask, coarse, mask.mean(dim=(1, 2, 3)), halo.mean(dim=(1, 2, 3))
        _, counts = ops.dilate_mask(coarse, self.granularity, conv1_hw, *self._reader)
        areas = counts.new_tensor([math.prod(out_hw), math.prod(conv1_hw)])
        return mask, coarse, *(counts.float() / areas).unbind(1)

    def _replicate_for_data_parallel(self) -> DynamicBlock:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__ = DynamicBlock.__getstate__(replica)  # its tensors are others
        return replica

    def __getstate__(self) -> dict:
        # Copies and pickles start without a record: it may hold the graph of a training step.
        # Packed weights are derived.
        return {
            **self.__dict__,
            "_activation": None,
            "_executor": None,
            "_snapshot": None,
            "_made_for": None,
            "_key": None,
        }

    def _apply(self, *args, **kwargs) -> DynamicBlock:
        self._executor = self._snapshot = None  # .to() may swap the data of a parameter in place
        return super()._apply(*args, **kwargs)
