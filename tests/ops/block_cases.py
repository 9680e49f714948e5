"""Drawn basic blocks and dense layers, and their masked-dense definitions in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from las_mm import ops

from . import cases
from .cases import Block, make_bias, make_kernel, read_by, stored, strided


@dataclass(frozen=True)
class BasicBlock(Block):
    """``strides`` are (stride, 1), ``dilation`` is conv1's."""

    @cached_property
    def kernels(self):
        c_in, width, c_out = self.channels
        shapes = [(width, c_in, 3), (c_out, width, 3)]
        if self.downsample:
            shapes.append((c_out, self.shortcut_channels or c_in, 1))
        return [make_kernel(self.generator, *shape, self.dtype) for shape in shapes]

    @cached_property
    def pack(self):
        pack = ops.pack_basic(
            self.kernels,
            self.biases,
            self.strides[0],
            self.dilation,
            direct=self.winograd != "only",
            winograd=self.winograd != "none",
            winograd_cost=self.winograd_cost,
        )
        if self.strided_parameters:
            pack = pack._replace(
                weights=[strided(w) for w in pack.weights],
                winograd=[strided(w) for w in pack.winograd],
            )
        above = 1.0 if self.dense_above is None else self.dense_above
        return pack._replace(biases=self.biases, dense=self.dense or [], dense_above=above)

    @property
    def arguments(self):
        pack = self.pack
        geometry = (self.granularity, pack.stride, pack.dilation)
        plan = (pack.winograd_cost, pack.dense_above)
        tensors = (pack.weights, pack.biases, pack.winograd, pack.dense)
        return self.mask, self.shortcut, *tensors, geometry, plan

    @property
    def inputs(self):
        pack = self.pack
        lists = (*pack.weights, *pack.biases, *pack.winograd, *pack.dense, *self.kernels)
        return [self.mask, self.shortcut, *lists]

    @cached_property
    def x(self):
        x = self.features(self.channels[0], self.size, self.layout)
        if self.poison:
            hidden = read_by(self.kept, self.out_size, 1, 1)
            x.copy_(
                torch.where(
                    read_by(hidden, self.size, *self.args[1][:1], self.dilation), x, math.nan
                )
            )
        return x

    def expected(self, x, skip=lambda hidden: hidden):
        """The definition applied to ``x``; ``skip`` may change conv1's output."""
        x, (stride, _) = x.double(), self.strides
        kernels, biases = [k.double() for k in self.kernels], [b.double() for b in self.biases]
        out = F.conv2d(x, kernels[0], biases[0], stride, self.dilation, self.dilation).relu()
        branch = F.conv2d(skip(out), kernels[1], biases[1], padding=1)
        if not self.downsample:
            identity = x
        elif self.shortcut is None:
            identity = F.conv2d(x, kernels[2], biases[2], stride)
        else:
            identity = F.conv2d(self.shortcut.double(), kernels[2], biases[2])
        branch = torch.where(self.kept, branch, 0.0)
        terms = (identity, branch)
        scale = max(t.nan_to_num(0).abs().max().item() if t.numel() else 0 for t in terms)
        return (identity + branch).relu(), scale


@st.composite
def basic_blocks(draw, in_place=False):
    block = draw(cases.blocks(in_place=in_place))
    stride = block.strides[0] * block.strides[1]
    dilation = block.dilation
    if block.winograd == "none" and block.dtype == torch.float32 and draw(st.booleans()):
        winograd = draw(st.sampled_from(["both", "only"]))  # of conv2 alone, if dilated
    else:
        winograd = block.winograd
    values = {f.name: getattr(block, f.name) for f in fields(Block)}
    poison = not block.downsample and block.dense is None and block.mask_kind is not None
    poison = poison and draw(st.booleans())
    if poison and block.layout == "expanded":
        values["layout"] = "contiguous"
    values |= dict(
        strides=(stride, 1), groups=1, dilation=dilation, winograd=winograd, poison=poison
    )
    return BasicBlock(**values)


@dataclass(frozen=True)
class DenseLayer(Block):
    """``channels`` are those read, conv1's and those written; ``room`` is left behind them."""

    room: int = 0

    @cached_property
    def kernels(self):
        c_in, width, growth = self.channels
        shapes = [(width, c_in, 1), (growth, width, 3)]
        return [make_kernel(self.generator, *shape, self.dtype) for shape in shapes]

    @cached_property
    def vectors(self):
        c_in = self.channels[0]
        scale = torch.rand(c_in, generator=self.generator) + 0.5
        vectors = [scale, make_bias(self.generator, c_in)]
        vectors += [make_bias(self.generator, len(kernel)) for kernel in self.kernels]
        return [strided(v) for v in vectors] if self.strided_parameters else vectors

    @cached_property
    def pack(self):
        pack = ops.pack_dense_layer(
            self.kernels,
            self.vectors,
            direct=self.winograd != "only",
            winograd=self.winograd != "none",
            winograd_cost=self.winograd_cost,
        )
        if self.strided_parameters:
            pack = pack._replace(
                weights=[strided(w) for w in pack.weights],
                winograd=[strided(w) for w in pack.winograd],
            )
        return pack._replace(vectors=self.vectors)

    @property
    def arguments(self):
        pack = self.pack
        return (
            self.mask,
            pack.weights,
            pack.vectors,
            pack.winograd,
            self.granularity,
            pack.winograd_cost,
        )

    @property
    def inputs(self):
        pack = self.pack
        return [self.mask, *pack.weights, *pack.vectors, *pack.winograd, *self.kernels]

    @cached_property
    def x(self):
        """The buffer: what is written next and what follows holds NaN."""
        c_in, _, growth = self.channels
        x = torch.randn(self.images, c_in, *self.size, generator=self.generator)
        if self.poison:
            x = torch.where(read_by(self.kept, self.size, 1, 1), x, math.nan)
        x = F.pad(x, (0, 0, 0, 0, 0, growth + self.room), value=math.nan).to(self.dtype)
        return stored(x, self.layout)

    def expected(self, x):
        c_in = self.channels[0]
        scale, shift, *biases = [v.double() for v in self.vectors]
        x = x[:, :c_in].double() * scale[:, None, None] + shift[:, None, None]
        kernels = [k.double() for k in self.kernels]
        x = F.conv2d(x.relu(), kernels[0], biases[0]).relu()
        x = F.conv2d(x, kernels[1], biases[1], padding=1)
        x = torch.where(self.kept, x, 0.0)
        return x, x.nan_to_num(0).abs().max().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Channels:
    """Which hidden channels a basic block's images want."""

    block: BasicBlock
    decisions: int
    kind: str  # as of a mask
    has_constant: bool
    dtype: torch.dtype = torch.bool

    @cached_property
    def mask(self):
        shape = (self.decisions, 1)
        arguments = (self.block.images, shape, 1, self.dtype, self.block.generator)
        return cases.make_mask(self.kind, *arguments).flatten(1)

    @cached_property
    def constant(self):
        if not self.has_constant:
            return None
        return make_bias(self.block.generator, self.block.channels[1]).abs()

    @property
    def arguments(self):
        mask, shortcut, weights, biases, winograd, _, geometry, (cost, _) = self.block.arguments
        tensors = (self.mask, self.constant, mask, shortcut, weights, biases, winograd)
        return *tensors, geometry, cost

    def expected(self, x):
        width = self.block.channels[1]
        wanted = (self.mask.double() > 0.5).repeat_interleave(width // self.decisions, 1)
        constant = torch.zeros(width) if self.constant is None else self.constant
        wanted, constant = wanted[:, :, None, None], constant.double()[:, None, None]
        return self.block.expected(x, lambda hidden: torch.where(wanted, hidden, constant))


@st.composite
def channel_blocks(draw, in_place=False):
    block = draw(basic_blocks(in_place=in_place))
    block = replace(block, dense_above=None)
    width = block.channels[1]
    decisions = draw(st.sampled_from([n for n in (1, 2, 4, width) if width % n == 0]))
    kind = draw(st.sampled_from(["empty", "full", "single", "0.1", "0.5", "0.9"]))
    dtype = draw(st.sampled_from([torch.bool, torch.float32]))
    return Channels(block, decisions, kind, draw(st.booleans()), dtype)


@st.composite
def dense_layers(draw):
    block = draw(cases.blocks(plain=True))
    values = {f.name: getattr(block, f.name) for f in fields(Block)}
    channels = [draw(st.sampled_from(cases.CHANNELS)) for _ in range(3)]
    f32 = block.dtype == torch.float32
    values |= dict(
        channels=tuple(channels),
        mask_kind=draw(st.sampled_from([None, *cases.MASK_KINDS])),
        layout=draw(st.sampled_from(["channels_last", *cases.LAYOUTS[:-1]])),
        dilation=1,
        groups=1,
        winograd=draw(st.sampled_from(["none", "both", "only"])) if f32 else "none",
        dense_above=None,
    )
    values["poison"] = values["mask_kind"] is not None and draw(st.booleans())
    return DenseLayer(**values, room=draw(st.integers(0, 5)))
