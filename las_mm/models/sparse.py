"""The fast form of a trained backbone: BN folded, weights packed, run by the sparse ops.

In eval mode without gradients a dynamic backbone runs this form by itself; :func:`prepare` only
does the work ahead of the first image. Nothing of the training form changes: parameters, names and
``state_dict`` stay, ``.train()`` goes back, and weights that change are folded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from las_mm import compat, memory, ops
from las_mm.bounded import Recent
from las_mm.models.activation import Activation, channel_rates, find_dynamic_backbones
from las_mm.models.coverage import (
    Unsupported,
    check_children,
    check_class,
    check_conv,
    check_norm,
    check_plain,
    is_channels_last,
    obstacle,
)
from las_mm.models.plan import BlockKind, Choice, current_plan, map_side
from las_mm.network.operator import CHANNEL, DILATED, LAYER, POSITION

RUNTIMES = ("auto", "sparse", "dense")
Record = Activation | Callable[[], Activation]  # the latter counts when asked


def check_runtime(value: object) -> str:
    """``value``, one of :data:`RUNTIMES`.

    Raises:
        ValueError: It is none.
    """
    if value not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {value!r}")
    return str(value)


_masked_dense = False  # set by masked_dense()


@contextmanager
def masked_dense() -> Iterator[None]:
    """Run the masked-dense form (dense convolutions, masks multiplied) in this process meanwhile.

    For comparisons: both forms compute the same.
    """
    global _masked_dense
    before, _masked_dense = _masked_dense, True
    try:
        yield
    finally:
        _masked_dense = before


def wanted(x: Tensor) -> bool:
    """Whether a module in eval mode should run its fast form on ``x``.

    Not under autograd (the fast form has no gradients), autocast, tracing or ONNX export, only
    where the back end has native kernels, and where nobody has a hand in all modules; see
    :func:`~las_mm.models.coverage.obstacle`.
    """
    return (
        not torch.is_grad_enabled()
        and not _masked_dense
        and ops.has_kernels(x.device.type)
        and ops.supports(x.dtype, x.device.type)
        and not compat.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()
        and not torch.onnx.is_in_onnx_export()
        and (compat.is_compiling() or obstacle(x) is None)
    )


def prepare(model: nn.Module) -> nn.Module:
    """Fold and pack all dynamic backbones inside ``model`` now, not in the first forward pass.

    Needed before ``torch.compile`` and ``torch.export``, optional otherwise.

    Args:
        model: A model (detector, classifier, backbone) in eval mode.

    Returns:
        ``model``.

    Raises:
        ValueError: No dynamic backbone inside.
        RuntimeError: The model is in training mode.
    """
    backbones = find_dynamic_backbones(model)
    if not backbones:
        raise ValueError(
            f"{type(model).__name__} contains no dynamic backbone such as las_mm.LASResNet"
        )
    for name, backbone in backbones:
        if backbone.training:
            raise RuntimeError(
                f"{name or type(backbone).__name__} is in training mode; call .eval()"
            )
        with torch.no_grad():
            backbone.prepare()
    return model


def fold(conv: nn.Module, norm: nn.Module, what: str, **wanted: object) -> tuple[Tensor, Tensor]:
    """Weight (dtype of ``conv``) and float32 bias of a convolution followed by a BN in eval mode.

    Args:
        conv, norm: The two; an ``nn.Identity`` stands for a BN that was folded before.
        what: Name of ``conv`` for messages.
        wanted: Attributes that ``conv`` must have.

    Raises:
        Unsupported: Not a plain ``nn.Conv2d`` followed by a BN with running statistics.
    """
    check_conv(conv, what, **wanted)
    check_norm(norm, f"the norm after {what}")
    if isinstance(norm, nn.Identity):
        weight = conv.weight.clone()
        return weight, weight.new_zeros(len(weight)).float() if conv.bias is None else (
            conv.bias.detach().float().clone()
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.float() * scale.float()[:, None, None, None]
    return weight.to(conv.weight.dtype), bias.float()


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift that a BN in eval mode is, float32.

    Raises:
        Unsupported: It is another norm.
    """
    check_norm(norm, "a norm")
    if isinstance(norm, nn.Identity):
        raise Unsupported("a norm before its convolution was folded away")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.float(), shift.float()


def norm_of_zero(conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """What the norm after ``conv`` makes of zeros in eval mode, (C,), float32.

    Where it was folded into ``conv``, that is the bias which it left there.
    """
    if isinstance(norm, nn.Identity):
        bias = conv.bias
        return conv.weight.new_zeros(conv.out_channels).float() if bias is None else bias.float()
    shift = -norm.running_mean.double() * (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        shift = shift * norm.weight.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return shift.float()


class FastBlock:
    """What the packed forms of all blocks have in common: their decisions and their record.

    A subclass is a dataclass with these fields, and gives :meth:`_choose` and ``__call__``.

    Attributes:
        strides: Of the convolution that conv1 is and of the one that reads around kept positions.
        dilation: Of the latter.
        groups: Of the convolution between gated channels.
        one: 1, on the block's device.
        masker: With its weight and bias, not copied; ``None`` without.
        masker_channel: Likewise a channel masker.
        channel_layers: Weights and biases of masker_channel where one op does its work.
        choice: The last one made; torch.compile and torch.export keep it.
        channels_last: Whether dense convolutions with its weights put out channels_last.
    """

    strides: tuple[int, int]
    dilation: int
    groups: int
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None
    masker_channel: nn.Module | None
    channel_layers: tuple[list[Tensor], list[Tensor]] | None
    choice: Choice
    channels_last: bool

    def __post_init__(self) -> None:
        self._choices: Recent[tuple[int, ...], Choice] = Recent()

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, which inputs must have."""
        raise NotImplementedError

    def plan(self, block: nn.Module, x: Tensor) -> Choice:
        """The form for inputs like ``x``; packs what that form needs before anyone sees it."""
        if compat.is_compiling():
            return self.choice
        block.input_hw = (x.shape[-2], x.shape[-1])
        size = (*x.shape, torch.get_num_threads())
        self.choice = self._choices.get(size, lambda: self._choose(block, x))
        return self.choice

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        raise NotImplementedError

    def _positions(self, block: nn.Module, x: Tensor) -> tuple[Tensor | None, int, Record]:
        """Decisions about positions, S, and what is known of the block's activation by them."""
        granularity = block.granularity if block.mode in ("spatial", "both") else ops.LAYER
        if self.masker is None:
            return None, granularity, Activation(self.one)
        masker, weight, bias = self.masker
        axes = (LAYER,) if block.mode == "layer" else (POSITION, DILATED)
        offset = masker.offset
        if offset is not None:
            side = self.strides[1] * granularity  # ceil(ceil(n / a) / b) is ceil(n / (a * b))
            grid = (-(-n // (self.strides[0] * side)) for n in x.shape[2:])
            offset = masker.offset_for((len(x), 1, *grid))
        arguments = (weight, bias, offset, granularity, self.strides, self.dilation)
        if x.is_cuda and not (compat.is_compiling() or compat.is_exporting()):
            # Rates take launches of their own there, which nobody may ask for.
            mask = torch.ops.las_mm.patch_mask(x, *arguments)
            geometry = (tuple(x.shape[2:]), granularity, self.strides, self.dilation)
            return mask, granularity, partial(_spatial_activation, self.one, mask, axes, *geometry)
        mask, found = ops.spatial_mask(x, *arguments)
        known = Activation(self.one, dict(zip(axes, found.unbind())), {axes[0]: mask})
        return mask, granularity, known

    def _channels(self, block: nn.Module, x: Tensor, known: Record) -> Tensor:
        """Decisions about channels, (N, groups) bool; leaves ``block.activation``."""
        assert self.masker_channel is not None
        if self.channel_layers is None:
            groups = self.masker_channel(x)
        else:
            offset = self.masker_channel.offset_for((len(x), self.masker_channel.groups))
            groups = ops.channel_mask(x, *self.channel_layers, offset)
        if not compat.is_exporting():
            record = partial(
                _channel_activation,
                known,
                groups,
                tuple(x.shape[2:]),
                block.granularity,
                self.strides,
                self.dilation,
                self.groups,
                block.channel_granularity,
            )
            # Ten small operations that nobody may ask for.
            block.activation = record() if compat.is_compiling() else record
        return groups.bool()


@dataclass
class FastBottleneck(FastBlock):
    """The packed form of one ``DynamicBottleneck``; see ``ops.sparse_bottleneck``.

    One with a channel masker runs ``ops.channel_bottleneck``.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    winograd: Tensor | None
    dense: list[Tensor] | None  # only where the plan wants it
    pool: nn.Module | None  # what the shortcut does before its convolution
    strides: tuple[int, int]
    dilation: int
    groups: int
    one: Tensor
    masker: tuple[nn.Module, Tensor, Tensor] | None  # with its weight and bias, not copied
    masker_channel: nn.Module | None
    constants: list[Tensor] | None  # what skipped channels hold; None: zero
    choice: Choice  # the last one made; torch.compile and torch.export keep it
    excitation: list[Tensor] | None = None  # weights and biases of squeeze-and-excitation
    # Weights and biases of masker_channel where one op does its work, not copied.
    channel_layers: tuple[list[Tensor], list[Tensor]] | None = None
    channels_last: bool = False  # whether dense convolutions with its weights put out channels_last

    @classmethod
    def of(cls, block: nn.Module) -> FastBottleneck:
        """Fold and pack ``block``.

        Raises:
            Unsupported: The block has a part without a fast form.
        """
        folded = _fold_block(block)
        dtype, device_type = folded[0][0].dtype, folded[0][0].device.type
        if block.masker_channel is not None and not ops.has_channel_kernels(device_type):
            raise Unsupported(f"there are no kernels that skip channels on {device_type}")
        if not ops.supports(dtype, device_type):
            raise Unsupported(f"its weights are {dtype}")
        weights = [ops.pack_conv(weight, groups) for weight, _, groups in folded]
        biases = [bias for _, bias, _ in folded]
        conv2 = block.conv2
        winograd = None
        excitation = _excitation_of(block)
        plain = (conv2.stride, conv2.dilation, conv2.groups) == ((1, 1), (1, 1), 1)
        if (
            plain
            and excitation is None
            and dtype == torch.float32
            and ops.has_winograd(device_type)
        ):
            winograd = ops.pack_winograd(folded[1][0])
            if block.mode not in ("spatial", "both") or block.granularity % 2 == 0:
                weights[1] = weights[1][:0].clone()  # masks of whole tiles never need it
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
            pairs = ((block.conv1, block.norm1), (conv2, block.norm2))
            constants = [norm_of_zero(conv, norm).relu() for conv, norm in pairs]
        pools = [] if block.downsample is None else list(block.downsample)[:-2]
        return cls(
            weights=weights,
            biases=biases,
            winograd=winograd,
            dense=None,
            pool=nn.Sequential(*pools) if pools else None,
            strides=(block.conv1_stride, block.conv2_stride),
            dilation=block.dilation,
            groups=conv2.groups,
            one=torch.ones((), device=weights[0].device, dtype=torch.float32),
            masker=None if masker is None else (masker, masker.conv.weight, masker.conv.bias),
            masker_channel=block.masker_channel,
            constants=constants,
            choice=Choice(winograd=winograd is not None),
            excitation=excitation,
            channel_layers=layers_of(block.masker_channel),
            channels_last=any(is_channels_last(conv.weight) for conv in leading(block)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """See the base class."""
        return self.weights[0].dtype

    def kind(self, x: Tensor) -> BlockKind:
        """What the plan looks up for an input ``x``."""
        stride = self.strides[0] * self.strides[1]
        positions = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
        kind = BlockKind(
            c_in=x.shape[1],
            width=self.biases[0].numel(),
            c_out=self.biases[2].numel(),
            strides=self.strides,
            dilation=self.dilation,
            groups=self.groups,
            downsample=len(self.weights) == 4,
            dtype=str(x.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            side=0,
        )
        return replace(kind, side=map_side(positions, kind.macs))

    def _choose(self, block: nn.Module, x: Tensor) -> Choice:
        if block.runtime == "sparse":
            choice = Choice(winograd=self.winograd is not None, decided_by="runtime='sparse'")
        else:
            choice = current_plan().lookup(self.kind(x), x.device.type)
        if not choice.winograd and not self.weights[1].numel():
            weight, _, groups = _fold_block(block)[1]
            self.weights[1] = ops.pack_conv(weight, groups)
        if choice.dense_above < 1 and self.dense is None and self.masker_channel is None:
            self.dense = [
                weight.contiguous(memory_format=torch.channels_last)
                for weight, _, _ in _fold_block(block)
            ]
        return choice

    def __call__(self, block: nn.Module, x: Tensor, in_place: bool) -> Tensor:
        """Run on ``x``; leaves ``block.activation``. ``in_place``: ``x`` may be overwritten."""
        choice = self.plan(block, x)
        biases = [block.checked(self.biases[0], x), *self.biases[1:]]
        mask, granularity, known = self._positions(block, x)
        winograd = self.winograd if choice.winograd else None
        if self.masker_channel is not None:
            groups = self._channels(block, x, known)
            tensors = (mask, groups, self.weights, biases, self.constants, winograd)
            return self._skip_channels(x, tensors, 1 if mask is None else granularity, in_place)
        if not compat.is_exporting():
            block.activation = known
        cost, above = choice.winograd_cost, choice.dense_above
        dense = self.dense if above < 1 else None
        if in_place and len(self.weights) == 3:
            return ops.sparse_bottleneck_(
                x,
                mask,
                self.weights,
                biases,
                winograd,
                granularity,
                self.dilation,
                self.groups,
                cost,
                dense,
                above,
                self.excitation,
            )
        return ops.sparse_bottleneck(
            x,
            mask,
            self.weights,
            biases,
            winograd,
            None if self.pool is None else self.pool(x),
            granularity,
            self.strides,
            self.dilation,
            self.groups,
            cost,
            dense,
            above,
            self.excitation,
        )

    def _skip_channels(self, x: Tensor, tensors: tuple, granularity: int, in_place: bool) -> Tensor:
        """``__call__`` of a block that decides about channels, after the decisions."""
        cost = self.choice.winograd_cost
        if in_place and len(self.weights) == 3:
            geometry = (granularity, self.dilation, self.groups)
            return ops.channel_bottleneck_(x, *tensors, *geometry, cost, self.excitation)
        shortcut = None if self.pool is None else self.pool(x)
        geometry = (granularity, self.strides, self.dilation, self.groups)
        return ops.channel_bottleneck(x, *tensors, shortcut, *geometry, cost, self.excitation)


def _spatial_activation(
    one: Tensor,
    mask: Tensor,
    axes: Sequence[str],
    input_hw: tuple[int, int],
    granularity: int,
    strides: Sequence[int],
    dilation: int,
) -> Activation:
    """What ``ops.spatial_mask`` would have counted, for those who ask."""
    size = [-(-n // strides[0]) for n in input_hw]
    _, counts = ops.dilate_mask(mask, granularity, size, strides[1], dilation)
    areas = counts.new_tensor([math.prod(-(-n // strides[1]) for n in size), math.prod(size)])
    rates = (counts.sum(dim=0) / (areas * max(len(mask), 1))).float()
    return Activation(one, dict(zip(axes, rates.unbind())), {axes[0]: mask})


def _channel_activation(
    known: Record,
    groups_mask: Tensor,
    input_hw: tuple[int, int],
    granularity: int,
    strides: Sequence[int],
    dilation: int,
    groups: int,
    channel_granularity: int,
) -> Activation:
    """``known`` with the decisions about channels, and the rates of each image."""
    if callable(known):
        known = known()
    mask, decisions = known.mask, groups_mask.float()
    rates = dict(known.rates)
    if mask is not None and len(decisions) > 1:
        size = [-(-n // strides[0]) for n in input_hw]
        _, counts = ops.dilate_mask(mask, granularity, size, strides[1], dilation)
        outputs = [-(-n // strides[1]) for n in size]
        areas = counts.new_tensor([math.prod(outputs), math.prod(size)])
        rates = dict(zip((POSITION, DILATED), (counts.float() / areas).unbind(1)))
    channels = decisions
    if groups > 1:
        channels = decisions.repeat_interleave(channel_granularity, dim=1)
    rates.update(channel_rates(channels, groups))
    return replace(known, rates=rates, decisions={**known.decisions, CHANNEL: decisions})


def layers_of(masker: nn.Module | None) -> tuple[list[Tensor], list[Tensor]] | None:
    """What ``ops.channel_mask`` takes of a channel masker; ``None`` where it cannot do its work.

    In bfloat16 the masker rounds between its layers, which the op does not. A masker of other
    layers, e.g. quantised ones, runs as the module that it is.
    """
    if masker is None or masker.kind != "mlp":
        return None
    layers, types = [masker.conv], [nn.Linear]
    try:
        if masker.layers == 2:
            check_plain(masker.conv, "", nn.Sequential)
            layers, types = list(masker.conv), [nn.Linear, nn.ReLU, nn.Linear]
        for layer, kind in zip(layers, types):
            check_plain(layer, "", kind)
    except Unsupported:
        return None
    if len(layers) != len(types):
        return None
    layers = layers[::2]
    weights = [layer.weight for layer in layers]
    if weights[0].dtype != torch.float32 or not ops.has_channel_mask(weights[0].device.type):
        return None
    if any(
        type(w) not in (nn.Parameter, Tensor) or layer.bias is None
        for layer, w in zip(layers, weights)
    ):
        return None
    return weights, [layer.bias for layer in layers]


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


_POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.Identity)
POINTWISE = dict(kernel_size=(1, 1), padding=(0, 0), groups=1)


def leading(block: nn.Module) -> list[nn.Module]:
    """The convolutions whose weights' memory format the output of a dense block has.

    A sum has the format of its first term: the shortcut, or without a mask the branch.
    """
    if block.masker is None:
        return [m for name, m in block.named_children() if name.startswith("conv")]
    return [] if block.downsample is None else [block.downsample[-2]]


def check_maskers(block: nn.Module) -> None:
    """The block's maskers decide as the ops do.

    Raises:
        Unsupported: One has a part that the ops do not know, or samples.
    """
    for masker in block.maskers():
        check_class(masker, "its masker")
        if masker.training:  # it samples
            raise Unsupported("its masker is in training mode")
    if block.masker is not None:
        check_conv(block.masker.conv, "its masker's conv", **POINTWISE, stride=(1, 1))
        if block.masker.conv.bias is None:
            raise Unsupported("its masker's conv has no bias")


def check_block(block: nn.Module, convs: Sequence[str]) -> None:
    """The block and its children compute what the ops compute, and nothing else.

    Args:
        block: The block.
        convs: Names of its convolutions; each ``convN`` is followed by ``block.normN``.

    Raises:
        Unsupported: A part that the ops do not know.
    """
    check_class(block, "it")
    check_plain(block.relu, "its activation", nn.ReLU)
    check_plain(block.drop_path, "its drop_path", nn.Identity, DropPath)
    if block.drop_path.training and type(block.drop_path) is DropPath:
        raise Unsupported("its DropPath is in training mode")
    check_maskers(block)
    norms = [getattr(block, f"norm{name[-1]}_name") for name in convs]
    parts = (*convs, *norms, "relu", "downsample", "drop_path")
    check_children(block, (*parts, "masker", "masker_channel", "se"))


def _fold_block(block: nn.Module) -> list[tuple[Tensor, Tensor, int]]:
    """Weight, bias and groups of conv1, conv2, conv3 and the downsample convolution.

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
    found = [(*fold(conv, norm, what, **wanted), conv.groups) for conv, norm, what, wanted in parts]
    if block.downsample is not None:
        found.append((*fold_shortcut(block), 1))
    _check_widths(block, [len(weight) for weight, _, _ in found])
    return found


def fold_shortcut(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the shortcut's convolution, the last but one of its modules.

    Raises:
        Unsupported: It has another end, or modules before it that might write into ``x``, which
            the branch reads later.
    """
    check_plain(block.downsample, "its shortcut", nn.Sequential)
    if len(block.downsample) < 2:
        raise Unsupported("its shortcut is no convolution followed by a norm")
    for pool in list(block.downsample)[:-2]:
        check_plain(pool, "what precedes its shortcut's convolution", *_POOLS)
    stride = (block.stride,) * 2 if len(block.downsample) == 2 else (1, 1)
    last = tuple(block.downsample)[-2:]
    return fold(*last, "the shortcut's convolution", **dict(POINTWISE, stride=stride))


def _check_widths(block: nn.Module, widths: list[int]) -> None:
    """The ops take blocks of one width, which pruning may change."""
    if widths[0] != widths[1]:
        raise Unsupported(f"conv1 and conv2 put out {widths[0]} and {widths[1]} channels")
    if len(widths) == 4 and widths[2] != widths[3]:
        raise Unsupported(f"conv3 and the shortcut put out {widths[2]} and {widths[3]} channels")
    check_channel_groups(block, widths[0])
    if block.stride != block.conv1_stride * block.conv2_stride:
        raise Unsupported(f"its stride is {block.stride}, other than that of its convolutions")


def check_channel_groups(block: nn.Module, width: int) -> None:
    """Of the masker of ``width`` gated channels, which pruning may have changed.

    Raises:
        Unsupported: It decides about another number of channels.
    """
    masker = block.masker_channel
    if masker is not None and masker.groups * block.channel_granularity != width:
        raise Unsupported(
            f"its masker decides about {masker.groups} groups of {block.channel_granularity} "
            f"channels, of {width}"
        )


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclass
class FastStem:
    """The packed form of a ResNet's 7x7 stem; see ``ops.conv_pool_stem``."""

    weight: Tensor
    bias: Tensor
    in_channels: int
    channels_last: bool  # whether a dense convolution with its weight puts out channels_last

    @classmethod
    def of(cls, backbone: nn.Module) -> FastStem:
        """Fold and pack the stem of ``backbone``.

        Raises:
            Unsupported: A deep stem, or one with other parts than usual.
        """
        if backbone.deep_stem:
            raise Unsupported("its stem is deep")
        return cls.of_parts(backbone.conv1, backbone.norm1, backbone.relu, backbone.maxpool)

    @classmethod
    def of_parts(
        cls, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module
    ) -> FastStem:
        """Fold and pack a stem of these modules.

        Raises:
            Unsupported: One of them is another one than usual.
        """
        check_plain(activation, "its activation", nn.ReLU)
        check_plain(pool, "its pooling", nn.MaxPool2d)
        sizes = [_pair(n) for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        if sizes != [(3, 3), (2, 2), (1, 1), (1, 1)] or pool.ceil_mode or pool.return_indices:
            raise Unsupported(f"its pooling is {pool}")
        weight, bias = fold(
            conv,
            norm,
            "conv1",
            kernel_size=(7, 7),
            stride=(2, 2),
            padding=(3, 3),
            dilation=(1, 1),
            groups=1,
        )
        if not ops.has_stem_kernel(weight.device.type):
            raise Unsupported(f"there is no kernel for it on {weight.device.type}")
        return cls(ops.pack_stem(weight), bias, conv.in_channels, is_channels_last(conv.weight))

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """The stem's output for ``x``; ``bias``: :attr:`bias` or a checked copy of it."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape (N, {self.in_channels}, H, W), got {list(x.shape)}"
            )
        return ops.conv_pool_stem(x, self.weight, bias)


@dataclass
class FastConvStem:
    """The folded form of a RegNet's stem: a 3x3 convolution of stride 2 and ReLU."""

    weight: Tensor
    bias: Tensor
    channels_last: bool  # as of a FastStem

    @classmethod
    def of(cls, backbone: nn.Module) -> FastConvStem:
        """Fold the stem of ``backbone``.

        Raises:
            Unsupported: It has other parts than usual.
        """
        check_plain(backbone.relu, "its activation", nn.ReLU)
        weight, bias = fold(
            backbone.conv1,
            backbone.norm1,
            "conv1",
            kernel_size=(3, 3),
            stride=(2, 2),
            padding=(1, 1),
            dilation=(1, 1),
            groups=1,
        )
        last = is_channels_last(backbone.conv1.weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(weight, bias.to(weight.dtype), last)

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """The stem's output for ``x``; ``bias``: :attr:`bias` or a checked copy of it."""
        return F.conv2d(x, self.weight, bias, stride=2, padding=1).relu_()
