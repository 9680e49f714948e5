"""The sparse path of DenseNets: layers append to one buffer per dense block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmpretrain.models.backbones.densenet import DenseTransition
from torch import Tensor, nn

from las_mm import ops
from las_mm.models.coverage import (
    Unsupported,
    check_children,
    check_class,
    check_conv,
    check_plain,
    is_channels_last,
)
from las_mm.models.executors.base import SparseBlock, leave
from las_mm.models.executors.folding import POINTWISE, affine, check_maskers, fold
from las_mm.models.executors.stem import FusedStem
from las_mm.models.plan import Choice


@dataclass
class SparseDenseLayer(SparseBlock):
    """The packed form of one ``DynamicDenseLayer``; see ``ops.sparse_dense_layer_``."""

    pack: ops.DenseLayerPack
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None
    choice: Choice
    channels_last: bool
    strides: tuple[int, int] = (1, 1)
    dilation: int = 1
    groups: int = 1
    masker_channel: nn.Module | None = None
    channel_layers: tuple[list[Tensor], list[Tensor]] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> SparseDenseLayer:
        """Fold and pack ``layer``.

        Raises:
            Unsupported: It has a part without a sparse path.
        """
        check_class(layer, "it")
        check_plain(layer.act, "its activation", nn.ReLU)
        check_maskers(layer)
        check_children(layer, ("norm1", "conv1", "act", "norm2", "conv2", "masker"))
        weight1, bias1 = fold(layer.conv1, layer.norm2, "conv1", **POINTWISE, stride=(1, 1))
        spatial: dict = dict(kernel_size=(3, 3), padding=(1, 1), stride=(1, 1), dilation=(1, 1))
        check_conv(layer.conv2, "conv2", **spatial, groups=1)
        weight2, bias2 = layer.conv2.weight.clone(), layer.conv2.bias
        dtype, device_type = weight1.dtype, weight1.device.type
        if not ops.supports(dtype, device_type) or not ops.has_block_kernels(device_type):
            raise Unsupported(f"there are no kernels for dense layers of {dtype} on {device_type}")
        if bias2 is None:
            bias2 = weight2.new_zeros(len(weight2))
        # Masks of whole tiles never need the direct form.
        whole = layer.mode != "spatial" or layer.granularity % 2 == 0
        pack = ops.pack_dense_layer(
            [weight1, weight2],
            [*affine(layer.norm1), bias1, bias2.float().clone()],
            direct=not whole,
            winograd=ops.has_winograd(device_type),
        )
        masker = layer.masker
        return cls(
            pack=pack,
            one=torch.ones((), device=weight1.device, dtype=torch.float32),
            masker=None if masker is None else (masker, masker.conv.weight, masker.conv.bias),
            choice=Choice(winograd=len(pack.winograd) > 0, decided_by="the only form"),
            channels_last=any(is_channels_last(c.weight) for c in (layer.conv1, layer.conv2)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self.pack.weights[0].dtype

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        return self.choice

    def append(self, layer: nn.Module, buffer: Tensor) -> None:
        """Write what the layer adds behind the channels of ``buffer`` that it reads."""
        x = buffer[:, : layer.in_channels]
        self.plan(layer, x)
        vectors = [layer.checked(self.pack.vectors[0], x), *self.pack.vectors[1:]]
        mask, granularity, known = self._positions(layer, x)
        if known is not None:
            leave(layer, "_activation", known)
        # Not _replace, which torch.compile of torch 2.1 cannot read.
        pack = ops.DenseLayerPack(
            self.pack.weights, vectors, self.pack.winograd, self.pack.winograd_cost
        )
        ops.sparse_dense_layer_(buffer, mask, pack, granularity)

    def __call__(self, block: nn.Module, x: Tensor, in_place: bool) -> Tensor:
        """What the layer makes of ``x``; leaves ``block.activation``."""
        buffer = room(x, x.shape[1] + block.out_channels)
        buffer[:, : x.shape[1]] = x
        self.append(block, buffer)
        return buffer[:, x.shape[1] :].contiguous(memory_format=torch.channels_last)


def room(like: Tensor, channels: int, halved: bool = False) -> Tensor:
    """An empty channels_last map for ``channels`` of the images ``like``, of half their sides."""
    n, _, h, w = like.shape
    size = (h // 2, w // 2) if halved else (h, w)
    return like.new_empty((n, channels, *size)).to(memory_format=torch.channels_last)


@dataclass
class DenseNetParts:
    """What of a DenseNet is in no layer: its stem and its transitions.

    Attributes:
        stem: ``None`` where it runs as the module that it is.
        transitions: Likewise, per dense block.
        reason: Why the stem does.
    """

    stem: FusedStem | None
    transitions: list[ops.TransitionPack | None]
    reason: str | None = None

    @classmethod
    def of(cls, backbone: nn.Module) -> DenseNetParts:
        """Fold and pack the parts of ``backbone`` that are as usual."""
        stem = reason = None
        try:
            check_plain(backbone.stem, "its stem", nn.Sequential)
            if len(backbone.stem) != 4:
                raise Unsupported(f"its stem has {len(backbone.stem)} modules, not 4")
            stem = FusedStem.of_parts(*backbone.stem)
        except Unsupported as unknown:
            reason = str(unknown)
        return cls(stem, [_transition(m) for m in backbone.transitions], reason)

    @property
    def bias(self) -> Tensor | None:
        """A tensor among the packed ones."""
        return None if self.stem is None else self.stem.bias


def _transition(module: nn.Module) -> ops.TransitionPack | None:
    try:
        check_plain(module, "a transition", DenseTransition)
        check_children(module, ("norm", "act", "conv", "pool"))
        check_plain(module.act, "its activation", nn.ReLU)
        check_plain(module.pool, "its pooling", nn.AvgPool2d)
        check_conv(module.conv, "its convolution", **POINTWISE, stride=(1, 1))
        weight, bias = module.conv.weight, module.conv.bias
        pool = module.pool
        sizes = [n if isinstance(n, tuple) else (n, n) for n in (pool.kernel_size, pool.stride)]
        plain = not (pool.ceil_mode or pool.divisor_override or pool.padding not in (0, (0, 0)))
        device_type = weight.device.type
        known = ops.supports(weight.dtype, device_type) and ops.has_block_kernels(device_type)
        if sizes != [(2, 2), (2, 2)] or not plain or not known:
            return None
        shift = weight.new_zeros(len(weight)) if bias is None else bias
        return ops.pack_dense_transition(
            weight.clone(), [*affine(module.norm), shift.float().clone()]
        )
    except Unsupported:
        return None
