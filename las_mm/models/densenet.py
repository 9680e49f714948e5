"""LASNet's DenseNet: mmpretrain's DenseNet with dynamic layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mmpretrain.models.backbones import DenseNet
from mmpretrain.models.backbones.densenet import DenseTransition
from torch import Tensor, nn

from las_mm import compat, ops
from las_mm.models.arguments import check_out_indices, require_bool, static_arguments
from las_mm.models.backbone import DynamicBackbone
from las_mm.models.coverage import in_format, is_channels_last, shadowed
from las_mm.models.dense_layer import DynamicDenseBlock, DynamicDenseLayer
from las_mm.models.executors import dense_layer as executors
from las_mm.models.maskers import is_masker
from las_mm.models.released import convert_densenet
from las_mm.models.settings import block_settings, in_stage
from las_mm.models.snapshot import has_hooks
from las_mm.models.stem import stem_shapes
from las_mm.network.block import BlockShape, NetworkShape
from las_mm.registry import MODELS


@MODELS.register_module()
class LASDenseNet(DynamicBackbone, DenseNet):
    """DenseNet whose layers decide per image which patches, or whether, to compute.

    LASNet (arXiv 2210.06223) on DenseNet (arXiv 1608.06993), which the paper does not have: a
    skipped position contributes zeros to the concatenation. Parameter names are those of
    mmpretrain's ``DenseNet``; weights of ``torchvision.models.densenet*`` load as they are, their
    names are converted. Use it in any mm project as
    ``backbone=dict(type='las_mm.LASDenseNet', arch='121', out_indices=(0, 1, 2, 3))``.

    Args:
        arch: ``'121'``, ``'161'``, ``'169'``, ``'201'``, or a dict of ``growth_rate``, ``depths``
            and ``init_channels``.
        mode: ``'static'``, ``'spatial'`` or ``'layer'``: one for all, one per stage, or per stage a
            list of one per layer.
        granularity: Side S of a patch, given like ``mode``. Defaults to ``(4, 4, 2, 1)``.
        freeze_maskers, runtime: See :class:`LASResNet`.
        norm_eval: Whether norms outside the maskers keep their running statistics in training, as
            for few images per device. Defaults to ``False``.
        kwargs: Arguments of mmpretrain's ``DenseNet``: ``in_channels``, ``bn_size``,
            ``drop_rate``, ``memory_efficient``, ``out_indices``, ``frozen_stages``, ...

    Raises:
        ValueError: Wrong arch, mode, granularity, ...; the message names the value.
        TypeError: An unknown argument; the message names close ones.

    Examples:
        >>> import torch
        >>> from las_mm.models import LASDenseNet, collect_activations
        >>> backbone = LASDenseNet("121", out_indices=(0, 1, 2, 3))
        >>> outs = backbone(torch.rand(1, 3, 64, 96))
        >>> [tuple(out.shape) for out in outs]
        [(1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3), (1, 1024, 2, 3)]
        >>> collect_activations(backbone).rates.shape
        torch.Size([58])
    """

    stem_class = executors.DenseNetParts
    static_forward = DenseNet.forward

    def __init__(
        self,
        arch: str | dict = "121",
        mode: str | Sequence = "spatial",
        granularity: int | Sequence = (4, 4, 2, 1),
        freeze_maskers: bool = True,
        norm_eval: bool = False,
        runtime: str = "auto",
        **kwargs,
    ) -> None:
        kwargs = static_arguments(type(self), DenseNet, kwargs)
        if isinstance(arch, str) and arch not in self.arch_settings:
            known = ", ".join(self.arch_settings)
            raise ValueError(f"arch of LASDenseNet must be one of {known} or a dict, got {arch!r}")
        depths = self._check(self.arch_settings[arch] if isinstance(arch, str) else arch)
        if "out_indices" in kwargs:
            kwargs["out_indices"] = _from_start(kwargs["out_indices"], len(depths))
        frozen = kwargs.get("frozen_stages", 0)
        if frozen > len(depths):
            raise ValueError(f"frozen_stages must be -1 to {len(depths)}, got {frozen}")
        if isinstance(granularity, (list, tuple)) and len(granularity) == 4 > len(depths):
            granularity = granularity[: len(depths)]  # the default serves shorter networks too
        require_bool("freeze_maskers", freeze_maskers)
        self.settings = block_settings(depths, mode=mode, granularity=granularity)
        require_bool("norm_eval", norm_eval)
        self.freeze_maskers = freeze_maskers
        self.norm_eval = norm_eval
        self.arch = arch if isinstance(arch, str) else "custom"
        super().__init__(arch, **kwargs)
        self._make_dynamic(kwargs)
        self._freeze_stages()
        self.runtime = runtime
        self._register_load_state_dict_pre_hook(_convert_on_load)

    @staticmethod
    def _check(arch: object) -> list[int]:
        """Layers per dense block of ``arch``."""
        names = ("growth_rate", "depths", "init_channels")
        numbers: list = []
        if isinstance(arch, dict) and all(name in arch for name in names):
            depths = arch["depths"]
            own = list(depths) if isinstance(depths, (list, tuple)) and depths else [depths]
            numbers = [arch["growth_rate"], arch["init_channels"], *own]
        if not numbers or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(
                "arch of LASDenseNet must be a name or a dict of growth_rate, depths (a list) and "
                f"init_channels, positive integers, got {arch!r}"
            )
        return list(arch["depths"])

    def _make_dynamic(self, kwargs: dict) -> None:
        names = ("norm_cfg", "act_cfg", "drop_rate", "memory_efficient")
        common = {name: kwargs[name] for name in names if name in kwargs}
        for i, stage in enumerate(self.stages):
            layers = []
            for layer, settings in zip(stage.block, self._asked[i]):
                hidden, c_in = layer.conv1.out_channels, layer.conv1.in_channels
                bn_size = hidden // self.growth_rate
                make = lambda c=c_in, b=bn_size, s=settings: DynamicDenseLayer(  # noqa: E731
                    c, self.growth_rate, b, settings=s, **common
                )
                layers.append(in_stage(i, make))
            self.stages[i] = DynamicDenseBlock(layers)

    @property
    def res_layers(self) -> list[str]:
        """Names of the stages."""
        return [f"stages.{i}" for i in range(len(self.depths))]

    @property
    def architecture(self) -> str:
        """See the base class."""
        return f"LASDenseNet-{self.arch}"

    @property
    def depth(self) -> str:
        """Its arch."""
        return self.arch

    def train(self, mode: bool = True) -> LASDenseNet:
        """The base class's, and ``norm_eval``."""
        super().train(mode)
        if mode and self.norm_eval:
            for name, module in self.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_masker(name):
                    module.eval()
        return self

    @property
    def channels(self) -> int:
        """See the base class."""
        last = self.blocks()[-1]
        return last.in_channels + last.out_channels

    def packed(self) -> list[nn.Module]:
        """See the base class: transitions."""
        packs = [] if self._stem_executor is None else self._stem_executor.transitions
        return [part for part, pack in zip(self.transitions, packs) if pack is not None]

    def _dense_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def _stem_parts(self) -> list[str]:
        return ["stem", "transitions"]

    def _network_shape(self, input_hw: tuple[int, int]) -> NetworkShape:
        blocks: list[BlockShape] = []
        stem, hw = stem_shapes([self.stem], self.blocks()[0].in_channels, input_hw)
        for stage, name in enumerate(self.res_layers, start=1):
            layers = self.blocks_of(name)
            own = [layer.describe(f"stage{stage}.{i}", stage, hw) for i, layer in enumerate(layers)]
            transition = self.transitions[stage - 1]
            if isinstance(transition, DenseTransition):
                own[-1] = replace(own[-1], transition=transition.conv.out_channels)
                hw = (hw[0] // 2, hw[1] // 2)
            elif any(isinstance(part, nn.Conv2d) for part in transition.modules()):
                raise ValueError(f"transitions.{stage - 1} is {transition}, of no known shape")
            blocks += own
        return NetworkShape(self.architecture, input_hw, stem, tuple(blocks))

    def _infer(
        self, x: Tensor, observe: Callable[[nn.Module], None] | None = None
    ) -> tuple[Tensor, ...]:
        if compat.is_compiling():
            return DenseNet.forward(self, x)
        observe = observe or (lambda module: None)
        channels_last = is_channels_last(x)
        parts = self._prepare_stem()
        stem = None if parts is None else parts.stem
        if stem is not None and x.dtype == stem.weight.dtype:
            channels_last |= stem.channels_last
            x = stem(x, stem.bias)
        else:
            x = self.stem(x)
            channels_last = is_channels_last(x)
        observe(self)
        outs, buffer = [], None
        for i, (stage, transition) in enumerate(zip(self.stages, self.transitions)):
            if _is_known(stage):
                layers = list(stage.block)
                width = layers[-1].in_channels + layers[-1].out_channels
                if buffer is None:
                    buffer = executors.room(x, width)
                    buffer[:, : x.shape[1]] = x
                channels_last |= self._append(layers, buffer, channels_last, observe)
            else:
                if buffer is not None:
                    x = buffer[:, : x.shape[1]]
                buffer = stage(in_format(x, channels_last))
                observe(stage)
            pack = None if parts is None else parts.transitions[i]
            following = self.stages[i + 1] if i + 1 < len(self.stages) else None
            if pack is not None and following is not None and _is_known(following):
                if not has_hooks(transition) and pack.weight.dtype == buffer.dtype:
                    last = following.block[-1]
                    narrow = executors.room(buffer, last.in_channels + last.out_channels, True)
                    ops.dense_transition_(narrow, buffer, pack)
                    observe(transition)
                    channels_last |= is_channels_last(transition.conv.weight)
                    x, buffer = narrow[:, : following.block[0].in_channels], narrow
                    if i in self.out_indices:
                        outs.append(in_format(x, channels_last))
                    continue
            x = transition(in_format(buffer, channels_last))
            channels_last, buffer = is_channels_last(x), None
            observe(transition)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def _append(
        self,
        layers: Sequence[DynamicDenseLayer],
        buffer: Tensor,
        channels_last: bool,
        observe: Callable[[nn.Module], None],
    ) -> bool:
        """Let the layers of a dense block append to ``buffer``.

        Returns:
            Whether dense convolutions would have put out channels_last at one of them.
        """
        for layer in layers:
            c_in, c_out = layer.in_channels, layer.out_channels
            x = buffer[:, :c_in]
            executor = None if has_hooks(layer) or shadowed(layer) else layer.executor_for(x)
            if executor is not None:
                channels_last |= executor.channels_last
                executor.append(layer, buffer)
            else:
                out = layer([in_format(x, channels_last)])
                channels_last |= is_channels_last(out)
                buffer[:, c_in : c_in + c_out] = out
            observe(layer)
        return channels_last


def _from_start(out_indices: object, count: int) -> list[int]:
    """``out_indices`` as mmpretrain's DenseNet takes them, counted from the first of ``count``."""
    listed = [out_indices] if isinstance(out_indices, int) else out_indices
    if isinstance(listed, (list, tuple)):
        listed = [n + count if isinstance(n, int) and n < 0 else n for n in listed]
    check_out_indices(listed, count)
    return list(listed)


def _is_known(stage: nn.Module) -> bool:
    """Whether a stage is what its layers make it, so that they can append to a buffer."""
    return (
        type(stage) is DynamicDenseBlock
        and list(stage._modules) == ["block"]
        and type(stage.block) is nn.ModuleList
        and not has_hooks(stage)
        and shadowed(stage) is None
        and all(isinstance(layer, DynamicDenseLayer) for layer in stage.block)
        and len(stage.block) > 0
    )


def _convert_on_load(state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Rename torchvision's keys of a ``state_dict`` that is being loaded."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if not any(key.startswith(f"{prefix}features.denseblock1.") for key in mine):
        return
    weights = {key.removeprefix(prefix): state_dict.pop(key) for key in mine}
    converted = convert_densenet(weights).items()
    state_dict.update((prefix + k, v) for k, v in converted if not k.startswith("classifier."))
