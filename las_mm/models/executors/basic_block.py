"""The sparse path of basic blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from las_mm import ops
from las_mm.models import plan
from las_mm.models.coverage import Unsupported, is_channels_last
from las_mm.models.executors.base import SparseBlock, layers_of, leave
from las_mm.models.executors.folding import (
    check_block,
    check_channel_groups,
    fold,
    fold_shortcut,
    leading,
    norm_of_zero,
)
from las_mm.models.plan import BlockKind, Choice, map_side


@dataclass
class SparseBasicBlock(SparseBlock):
    """The packed form of one ``DynamicBasicBlock``; see ``ops.sparse_basic``.

    One with a channel masker runs ``ops.channel_basic``.
    """

    pack: ops.BasicPack
    pool: nn.Module | None  # what the shortcut does before its convolution
    strides: tuple[int, int]
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None
    masker_channel: nn.Module | None
    channel_layers: tuple[list[Tensor], list[Tensor]] | None
    constant: Tensor | None  # what skipped channels hold; None: zero
    choice: Choice
    channels_last: bool
    dilation: int = 1  # of conv2
    groups: int = 1

    @classmethod
    def of(cls, block: nn.Module) -> SparseBasicBlock:
        """Fold and pack ``block``.

        Raises:
            Unsupported: The block has a part without a sparse path.
        """
        kernels, biases = _folded(block)
        dtype, device_type = kernels[0].dtype, kernels[0].device.type
        if block.masker_channel is not None and not ops.has_channel_kernels(device_type):
            raise Unsupported(f"there are no kernels that skip channels on {device_type}")
        if not ops.supports(dtype, device_type) or not ops.has_block_kernels(device_type):
            raise Unsupported(f"there are no kernels for basic blocks of {dtype} on {device_type}")
        winograd = ops.has_winograd(device_type)
        # Masks of whole tiles never need the direct form.
        whole = block.mode not in ("spatial", "both") or block.granularity % 2 == 0
        pack = ops.pack_basic(
            kernels, biases, block.stride, block.dilation, direct=not whole, winograd=winograd
        )
        masker, constant = block.masker, None
        if block.masker_channel is not None and block.channel_position == "before_norm":
            constant = norm_of_zero(block.conv1, block.norm1).relu()
        pools = [] if block.downsample is None else list(block.downsample)[:-2]
        return cls(
            pack=pack,
            pool=nn.Sequential(*pools) if pools else None,
            strides=(block.stride, 1),
            one=torch.ones((), device=kernels[0].device, dtype=torch.float32),
            masker=None if masker is None else (masker, masker.conv.weight, masker.conv.bias),
            masker_channel=block.masker_channel,
            channel_layers=layers_of(block.masker_channel),
            constant=constant,
            choice=Choice(winograd=winograd and dtype == torch.float32),
            channels_last=any(is_channels_last(conv.weight) for conv in leading(block)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self.pack.weights[0].dtype

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        if block.runtime == "sparse":
            choice = Choice(winograd=len(self.pack.winograd) > 0, decided_by="runtime='sparse'")
        else:
            choice = plan.current_plan().lookup(self._kind(x), x.device.type)
        lacks_direct = any(not weight.numel() for weight in self.pack.weights)
        wants_dense = choice.dense_above < 1 and self.masker_channel is None
        if (not choice.winograd and lacks_direct) or (wants_dense and not self.pack.dense):
            kernels, biases = _folded(block)
            self.pack = ops.pack_basic(
                [kernel.contiguous(memory_format=torch.channels_last) for kernel in kernels],
                biases,
                block.stride,
                block.dilation,
                winograd=len(self.pack.winograd) > 0,
                dense=wants_dense,
            )
        return choice

    def _kind(self, x: Tensor) -> BlockKind:
        stride = self.strides[0]
        kind = BlockKind(
            c_in=x.shape[1],
            width=self.pack.biases[0].numel(),
            c_out=self.pack.biases[1].numel(),
            strides=self.strides,
            dilation=self.pack.dilation,
            groups=1,
            downsample=len(self.pack.weights) == 3,
            dtype=str(x.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            side=0,
            block="basic",
        )
        positions = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        return replace(kind, side=map_side(positions, kind.macs))

    def __call__(self, block: nn.Module, x: Tensor, in_place: bool) -> Tensor:
        """Run on ``x``; leaves ``block.activation``. ``in_place``: ``x`` may be overwritten."""
        choice = self.plan(block, x)
        biases = [block.checked(self.pack.biases[0], x), *self.pack.biases[1:]]
        pack = ops.BasicPack(  # not _replace, which torch.compile of torch 2.1 cannot read
            self.pack.weights,
            biases,
            self.pack.winograd if choice.winograd else (),
            self.pack.dense if choice.dense_above < 1 else (),
            self.pack.stride,
            self.pack.dilation,
            choice.winograd_cost,
            choice.dense_above,
        )
        mask, granularity, known = self._positions(block, x)
        in_place = in_place and len(pack.weights) == 2
        shortcut = None if self.pool is None else self.pool(x)
        if self.masker_channel is not None:
            groups = self._channels(block, x, known)
            size = 1 if mask is None else granularity
            if in_place:
                return ops.channel_basic_(x, groups, mask, pack, size, self.constant)
            return ops.channel_basic(x, groups, mask, pack, size, shortcut, self.constant)
        if known is not None:
            leave(block, "_activation", known)
        if in_place:
            return ops.sparse_basic_(x, mask, pack, granularity)
        return ops.sparse_basic(x, mask, pack, granularity, shortcut)


def _folded(block: nn.Module) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Weights and biases of conv1, conv2 and the shortcut's convolution.

    Raises:
        Unsupported: The block has a part without a sparse path.
    """
    check_block(block, ("conv1", "conv2"))
    stride, d = (block.stride,) * 2, (block.dilation,) * 2
    common: dict = dict(kernel_size=(3, 3), groups=1)
    found = [
        fold(block.conv1, block.norm1, "conv1", **common, stride=stride, padding=d, dilation=d),
        fold(
            block.conv2,
            block.norm2,
            "conv2",
            **common,
            stride=(1, 1),
            padding=(1, 1),
            dilation=(1, 1),
        ),
    ]
    if block.downsample is not None:
        found.append(fold_shortcut(block))
    kernels, biases = zip(*found)
    widths = [len(kernel) for kernel in kernels]
    if len(widths) == 3 and widths[1] != widths[2]:
        raise Unsupported(f"conv2 and the shortcut put out {widths[1]} and {widths[2]} channels")
    check_channel_groups(block, widths[0])
    return kernels, biases
