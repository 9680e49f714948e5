"""Bottlenecks on the sparse path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from las_mm import compat, memory, ops
from las_mm.models import plan
from las_mm.models.coverage import (
    Unsupported,
    check_class,
    check_conv,
    is_channels_last,
)
from las_mm.models.executors.base import SparseBlock, layers_of, leave
from las_mm.models.executors.folding import (
    POINTWISE,
    check_block,
    check_channel_groups,
    fold,
    fold_shortcut,
    leading,
    norm_of_zero,
)
from las_mm.models.plan import BlockKind, Choice, map_side


@dataclass
class SparseBottleneck(SparseBlock):
    """The packed form of one ``DynamicBottleneck``; see ``ops.sparse_bottleneck``.

    One with a channel masker runs ``ops.channel_bottleneck``.
    """

    pack: ops.BottleneckPack
    pool: nn.Module | None  # what the shortcut does before its convolution
    strides: tuple[int, int]
    dilation: int
    groups: int
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None  # with its weight and bias, not copied
    masker_channel: nn.Module | None
    constants: list[Tensor] | None  # what skipped channels hold; None: zero
    choice: Choice  # the last one made; torch.compile and torch.export keep it
    # Weights and biases of masker_channel where one op does its work, not copied.
    channel_layers: tuple[list[Tensor], list[Tensor]] | None = None
    channels_last: bool = False  # whether dense convolutions with its weights put out channels_last

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of the last call: its choice, what it was made from, and the arguments.
        self._last: tuple[Choice, ops.BottleneckPack, ops.BottleneckPack] | None = None

    @classmethod
    def of(cls, block: nn.Module) -> SparseBottleneck:
        """Fold and pack ``block``.

        Raises:
            Unsupported: The block has a part without a sparse path.
        """
        folded = _fold_block(block)
        dtype, device_type = folded[0][0].dtype, folded[0][0].device.type
        if block.masker_channel is not None and not ops.has_channel_kernels(device_type):
            raise Unsupported(f"there are no kernels that skip channels on {device_type}")
        if not ops.supports(dtype, device_type):
            raise Unsupported(f"its weights are {dtype}")
        # Masks of whole tiles never need the direct form of conv2.
        whole = block.mode not in ("spatial", "both") or block.granularity % 2 == 0
        excitation = _excitation_of(block)
        pack = _pack(
            block,
            folded,
            excitation=excitation,
            direct=not whole,
            winograd=ops.has_winograd(device_type),
        )
        del folded
        memory.release_freed()
        masker = block.masker
        constants = None
        if block.masker_channel is not None and block.channel_position == "before_norm":
            if excitation is not None:
                raise Unsupported(
                    "its skipped channels are not zero (channel_position='before_norm') before "
                    "squeeze-and-excitation"
                )
            pairs = ((block.conv1, block.norm1), (block.conv2, block.norm2))
            constants = [norm_of_zero(conv, norm).relu() for conv, norm in pairs]
        pools = [] if block.downsample is None else list(block.downsample)[:-2]
        return cls(
            pack=pack,
            pool=nn.Sequential(*pools) if pools else None,
            strides=(block.conv1_stride, block.conv2_stride),
            dilation=block.dilation,
            groups=block.conv2.groups,
            one=torch.ones((), device=pack.weights[0].device, dtype=torch.float32),
            masker=None if masker is None else (masker, masker.conv.weight, masker.conv.bias),
            masker_channel=block.masker_channel,
            constants=constants,
            choice=Choice(winograd=pack.winograd is not None),
            channel_layers=layers_of(block.masker_channel),
            channels_last=any(is_channels_last(conv.weight) for conv in leading(block)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self.pack.weights[0].dtype

    def kind(self, x: Tensor) -> BlockKind:
        """What the plan looks up for an input ``x``."""
        pack = self.pack
        stride = self.strides[0] * self.strides[1]
        positions = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        kind = BlockKind(
            c_in=x.shape[1],
            width=pack.biases[0].numel(),
            c_out=pack.biases[2].numel(),
            strides=self.strides,
            dilation=self.dilation,
            groups=self.groups,
            downsample=len(pack.weights) == 4,
            dtype=str(x.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            side=0,
        )
        return replace(kind, side=map_side(positions, kind.macs))

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        if block.runtime == "sparse":
            choice = Choice(winograd=self.pack.winograd is not None, decided_by="runtime='sparse'")
        else:
            choice = plan.current_plan().lookup(self.kind(x), x.device.type)
        lacks_direct = not choice.winograd and not self.pack.weights[1].numel()
        wants_dense = choice.dense_above < 1 and self.masker_channel is None
        if lacks_direct or (wants_dense and self.pack.dense is None):
            self.pack = _pack(
                block,
                [
                    (weight.contiguous(memory_format=torch.channels_last), bias)
                    for weight, bias in _fold_block(block)
                ],
                excitation=self.pack.excitation,
                winograd=self.pack.winograd is not None,
                dense=wants_dense,
            )
        return choice

    def _chosen(self, block: nn.Module, x: Tensor) -> ops.BottleneckPack:
        """The arguments of the form for inputs like ``x``."""
        choice, pack = self.plan(block, x), self.pack
        last = None if compat.is_compiling() else self._last
        if last is not None and last[0] is choice and last[1] is pack:
            return last[2]
        chosen = ops.BottleneckPack(  # not _replace, which torch.compile of torch 2.1 cannot read
            pack.weights,
            [block.checked(pack.biases[0], x), *pack.biases[1:]],
            pack.winograd if choice.winograd else None,
            pack.dense if choice.dense_above < 1 else None,
            pack.excitation,
            pack.strides,
            pack.dilation,
            pack.groups,
            choice.winograd_cost,
            choice.dense_above,
        )
        if not compat.is_compiling():
            self._last = choice, pack, chosen
        return chosen

    def __call__(self, block: nn.Module, x: Tensor, in_place: bool) -> Tensor:
        """Run on ``x``; leaves ``block.activation``. ``in_place``: ``x`` may be overwritten."""
        pack = self._chosen(block, x)
        mask, granularity, known = self._positions(block, x)
        in_place = in_place and len(pack.weights) == 3
        shortcut = None if self.pool is None else self.pool(x)
        if self.masker_channel is not None:
            groups = self._channels(block, x, known)
            size = 1 if mask is None else granularity
            if in_place:
                return ops.channel_bottleneck_(x, groups, mask, pack, size, self.constants)
            return ops.channel_bottleneck(x, groups, mask, pack, size, shortcut, self.constants)
        if known is not None:
            leave(block, "_activation", known)
        if in_place:
            return ops.sparse_bottleneck_(x, mask, pack, granularity)
        return ops.sparse_bottleneck(x, mask, pack, granularity, shortcut)


def _pack(block: nn.Module, folded: list[tuple[Tensor, Tensor]], **forms) -> ops.BottleneckPack:
    """``forms``: see :func:`ops.pack_bottleneck`."""
    kernels, biases = zip(*folded)
    geometry = (block.conv1_stride, block.conv2_stride), block.dilation, block.conv2.groups
    return ops.pack_bottleneck(kernels, biases, *geometry, **forms)


def _excitation_of(block: nn.Module) -> list[Tensor] | None:
    """Weights and biases of the block's squeeze-and-excitation, as the op takes them.

    Raises:
        Unsupported: It reads positions that the block does not compute.
    """
    se = getattr(block, "se", None)
    if se is None:
        return None
    check_class(se, "its squeeze-and-excitation")
    for conv in (se.fc1, se.fc2):
        check_conv(conv, "a layer of its squeeze-and-excitation", **POINTWISE, stride=(1, 1))
        if conv.bias is None:
            raise Unsupported("a layer of its squeeze-and-excitation has no bias")
    if se.pool == "all" and block.mode in ("spatial", "both"):
        raise Unsupported("its squeeze-and-excitation reads dropped positions (se_pool='all')")
    if not ops.has_excitation(se.fc1.weight.device.type):
        raise Unsupported("there is no kernel for squeeze-and-excitation on its device")
    weights = (se.fc1.weight.flatten(1), se.fc1.bias, se.fc2.weight.flatten(1), se.fc2.bias)
    return [weight.float().clone() for weight in weights]


def _fold_block(block: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of conv1, conv2, conv3 and the downsample convolution.

    Raises:
        Unsupported: The block has a part without a sparse path.
    """
    check_block(block, ("conv1", "conv2", "conv3"))
    first, second, d = block.conv1_stride, block.conv2_stride, block.dilation
    spatial = dict(kernel_size=(3, 3), stride=(second, second), padding=(d, d), dilation=(d, d))
    parts = [
        (block.conv1, block.norm1, "conv1", dict(POINTWISE, stride=(first, first))),
        (block.conv2, block.norm2, "conv2", spatial),
        (block.conv3, block.norm3, "conv3", dict(POINTWISE, stride=(1, 1))),
    ]
    found = [fold(conv, norm, what, **wanted) for conv, norm, what, wanted in parts]
    if block.downsample is not None:
        found.append(fold_shortcut(block))
    _check_widths(block, [len(weight) for weight, _ in found])
    return found


def _check_widths(block: nn.Module, widths: list[int]) -> None:
    """The ops take blocks of one width, which pruning may change."""
    if widths[0] != widths[1]:
        raise Unsupported(f"conv1 and conv2 put out {widths[0]} and {widths[1]} channels")
    if len(widths) == 4 and widths[2] != widths[3]:
        raise Unsupported(f"conv3 and the shortcut put out {widths[2]} and {widths[3]} channels")
    check_channel_groups(block, widths[0])
    if block.stride != block.conv1_stride * block.conv2_stride:
        raise Unsupported(f"its stride is {block.stride}, other than that of its convolutions")
