"""The convolutions around a dynamic backbone (neck, heads) on the kernels of its sparse path.

They skip nothing, but run with packed weights, 3x3 ones in Winograd form (arXiv 1509.09308), where
that is measured to be faster. What a convolution computes stays the same, and so do its parameters,
names and ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable

import mmcv.cnn
import torch
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.bounded import Recent
from las_mm.models import plan, sparse
from las_mm.models.conv_forms import ConvKind
from las_mm.models.coverage import is_channels_last, shadowed
from las_mm.models.plan import map_side
from las_mm.models.snapshot import Snapshot


class _State:
    """What a packed convolution holds beside its parameters.

    Attributes:
        packs: By whether they are in Winograd form.
        snapshot: What they were made from.
        forms: By input: whether the Winograd form is the fastest; ``None``: dense.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self.packs: dict[bool, ops.ConvPack] = {}
        self.snapshot: Snapshot | None = None
        self.forms: Recent[tuple, bool | None] = Recent()
        self._holder = nn.Module()  # snapshots are of children
        self._holder.add_module("conv", conv)

    def pack(self, conv: nn.Conv2d, winograd: bool, positions: int) -> ops.ConvPack:
        """The weights as they are now, see :meth:`Snapshot.stale`."""
        packs = self.packs
        if self.snapshot is None or self.snapshot.stale(positions):
            packs = self.packs = {}
            self.snapshot = Snapshot(self._holder)
        if winograd not in packs:
            geometry = conv.stride[0], conv.dilation[0]
            packs[winograd] = ops.pack_conv2d(conv.weight, conv.bias, *geometry, winograd=winograd)
        return packs[winograd]


class _Packed(nn.Conv2d):
    """A convolution that runs with packed weights where the plan says that this is faster."""

    _state: _State | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), in the memory format of a dense convolution."""
        if compat.is_compiling() or not self._fits(x):
            return super().forward(x)
        if self._state is None:
            self._state = _State(self)
        nchw = not (is_channels_last(x) or is_channels_last(self.weight))
        size = (*x.shape, nchw, x.dtype, self.stride, self.dilation, torch.get_num_threads())
        winograd = self._state.forms.get(size, lambda: self._form(x, nchw))
        if winograd is None:
            return super().forward(x)
        out = ops.packed_conv2d(x, self._state.pack(self, winograd, _positions(x, self.stride[0])))
        return ops.to_nchw(out) if nchw else out

    def _fits(self, x: Tensor) -> bool:
        """Whether the packed form computes what this convolution does, here and now."""
        weight = self._parameters.get("weight")
        return (
            type(self) in _PACKED.values()
            and type(weight) is nn.Parameter
            and x.dim() == 4
            and x.numel() > 0
            and x.shape[1] == self.in_channels
            and x.dtype == weight.dtype
            and x.device.type == weight.device.type == "cpu"
            and has_form(self)
            and sparse.wanted(x)
        )

    def _form(self, x: Tensor, nchw: bool) -> bool | None:
        side = self.kernel_size[0]
        geometry = self.stride[0], self.dilation[0] if side > 1 else 1
        dtype, threads = str(x.dtype).removeprefix("torch."), torch.get_num_threads()
        macs = self.in_channels * self.out_channels * side**2
        kind = ConvKind(
            self.in_channels,
            self.out_channels,
            side,
            *geometry,
            nchw,
            dtype,
            threads,
            map_side(_positions(x, geometry[0]), macs),
        )
        choice = plan.current_plan().lookup(kind)
        return None if choice.dense_above < 1 else choice.winograd

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_state": None}


class PackedConv2d(_Packed):
    """torch's."""


class PackedMMConv2d(_Packed, mmcv.cnn.Conv2d):
    """mmcv's, which heads of mmdet have in places."""


_PACKED: dict[type[nn.Conv2d], type[_Packed]] = {
    nn.Conv2d: PackedConv2d,
    mmcv.cnn.Conv2d: PackedMMConv2d,
}


def _positions(x: Tensor, stride: int) -> int:
    return x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)


def has_form(conv: nn.Conv2d) -> bool:
    """Whether a convolution has a packed form: 1x1 or 3x3, padded by its dilation, one group."""
    side, dilation = conv.kernel_size[0], conv.dilation[0]
    padding = 0 if side == 1 else dilation
    return (
        conv.kernel_size in ((1, 1), (3, 3))
        and conv.stride == (conv.stride[0],) * 2
        and conv.dilation == (dilation,) * 2
        and conv.padding == (padding,) * 2
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.transposed is False
    )


# Memory format -----------------------------------------------------------------------------------

# In detectors of these parts alone maps may be channels_last, which is what the kernels read and
# write: nothing looks at a map's memory but mmcv's RoIAlign, which takes it for NCHW on a CPU.
_KNOWN_PARTS = {
    "mmcv.cnn.bricks.conv_module.ConvModule",
    "mmcv.cnn.bricks.wrappers.Conv2d",
    "mmcv.cnn.bricks.wrappers.ConvTranspose2d",
    "mmcv.ops.roi_align.RoIAlign",
    "mmdet.models.data_preprocessors.data_preprocessor.DetDataPreprocessor",
    "mmdet.models.dense_heads.retina_head.RetinaHead",
    "mmdet.models.dense_heads.rpn_head.RPNHead",
    "mmdet.models.detectors.faster_rcnn.FasterRCNN",
    "mmdet.models.detectors.mask_rcnn.MaskRCNN",
    "mmdet.models.detectors.retinanet.RetinaNet",
    "mmdet.models.losses.cross_entropy_loss.CrossEntropyLoss",
    "mmdet.models.losses.focal_loss.FocalLoss",
    "mmdet.models.losses.smooth_l1_loss.L1Loss",
    "mmdet.models.losses.smooth_l1_loss.SmoothL1Loss",
    "mmdet.models.necks.fpn.FPN",
    "mmdet.models.roi_heads.bbox_heads.convfc_bbox_head.Shared2FCBBoxHead",
    "mmdet.models.roi_heads.mask_heads.fcn_mask_head.FCNMaskHead",
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor.SingleRoIExtractor",
    "mmdet.models.roi_heads.standard_roi_head.StandardRoIHead",
    "mmengine.model.base_module.ModuleList",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.linear.Linear",
}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _to_channels_last(module: nn.Module, args: tuple) -> tuple | None:
    """Before the backbone, whose maps get the format of its input."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 4:
        return None
    if not sparse.wanted(args[0]):
        return None
    return args[0].contiguous(memory_format=torch.channels_last), *args[1:]


def _to_nchw(module: nn.Module, args: tuple) -> tuple | None:
    """Before RoIAlign."""
    if not args or not isinstance(args[0], Tensor) or torch.is_grad_enabled():
        return None
    return args[0].contiguous(), *args[1:]


def _set_hook(module: nn.Module, hook: Callable, wanted: bool) -> None:
    hooks = module._forward_pre_hooks
    present = [key for key, value in hooks.items() if value is hook]
    if wanted and not present:
        module.register_forward_pre_hook(hook)
    elif not wanted:
        for key in present:
            del hooks[key]


def _set_format(model: nn.Module, backbones: list[nn.Module], inside: set, wanted: bool) -> None:
    """Let maps be channels_last where all that reads them is known, or no longer."""
    around = [module for module in model.modules() if module not in inside]
    plain = {packed: kind for kind, packed in _PACKED.items()}
    wanted = wanted and len(backbones) == 1
    wanted = wanted and type(model).__module__.startswith("mmdet.")
    wanted = wanted and all(
        _name(plain.get(type(m), type(m))) in _KNOWN_PARTS and shadowed(m) is None for m in around
    )
    for backbone in backbones:
        _set_hook(backbone, _to_channels_last, wanted)
    for module in around:
        if _name(type(module)) == "mmcv.ops.roi_align.RoIAlign":
            _set_hook(module, _to_nchw, wanted)


def pack_surroundings(model: nn.Module, backbones: list[nn.Module], wanted: bool) -> int:
    """Let the convolutions of ``model`` outside of ``backbones`` run packed, or no longer.

    Only those of exactly torch's or mmcv's class are taken, each for an own subclass of it. In
    detectors all of whose parts are known, maps are channels_last from the image to RoIAlign.

    Returns:
        How many have a packed form.
    """
    inside = {module for backbone in backbones for module in backbone.modules()}
    change = _PACKED if wanted else {packed: plain for plain, packed in _PACKED.items()}
    for module in model.modules():
        if module not in inside and type(module) in change and has_form(module):
            module.__class__ = change[type(module)]
            module.__dict__.pop("_state", None)
    _set_format(model, backbones, inside, wanted)
    return sum(type(module) in _PACKED.values() for module in model.modules())
