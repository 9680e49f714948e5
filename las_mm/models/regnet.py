"""LASNet's and LAUDNet's RegNet: mmpretrain's RegNet with dynamic blocks."""

from __future__ import annotations

from collections.abc import Sequence

from mmpretrain.models.backbones import RegNet
from mmpretrain.models.backbones.resnet import ResLayer
from mmpretrain.models.backbones.resnext import Bottleneck as GroupedBottleneck
from torch import Tensor

from las_mm.models.arguments import check_stages, require_bool, static_arguments
from las_mm.models.backbone import DynamicBackbone
from las_mm.models.bottleneck import DynamicBottleneck
from las_mm.models.coverage import register
from las_mm.models.excitation import POOLS, SqueezeExcitation
from las_mm.models.executors.stem import FusedConvStem
from las_mm.models.released import convert_regnet
from las_mm.models.settings import block_settings
from las_mm.network.architectures import ARCHS, SE_RATIO
from las_mm.registry import MODELS

_ARCH_KEYS = ("w0", "wa", "wm", "group_w", "depth", "bot_mul")


@register
class DynamicRegNetBlock(DynamicBottleneck, GroupedBottleneck):
    """:class:`DynamicBottleneck` with a grouped conv2 and squeeze-and-excitation after it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        se_ratio: Squeezed channels per input channel of the block; 0: no squeeze-and-excitation.
        se_pool: See :class:`SqueezeExcitation`.
        kwargs: Arguments of the parents: ``mode``, ``granularity``, ``groups``,
            ``width_per_group``, ``base_channels``, ``stride``, ...
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        se_ratio: float = 0.0,
        se_pool: str = "kept",
        **kwargs,
    ) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.squeeze_channels = round(se_ratio * in_channels)
        self.se: SqueezeExcitation | None = None
        if se_ratio:
            self.se = SqueezeExcitation(self.mid_channels, self.squeeze_channels, se_pool)

    def _excite(self, out: Tensor, mask: Tensor | None) -> Tensor:
        return out if self.se is None else self.se(out, mask)


@MODELS.register_module()
class LASRegNet(DynamicBackbone, RegNet):
    """RegNet whose blocks decide per image which patches and channels, or whether, to compute.

    LAUDNet (arXiv 2308.15949). RegNetX and RegNetY (arXiv 2003.13678) with torchvision's
    architectures, from which mmpretrain's ``RegNet`` differs in the last stage of RegNetX-400MF
    only; block, stage and parameter names are those of mmpretrain. Weights of
    ``torchvision.models.regnet_*`` and of the authors' released code load as they are, their names
    are converted by :func:`~las_mm.models.released.convert_regnet`; without maskers among them the
    maskers start mostly on. Use it in any mm project as
    ``backbone=dict(type='las_mm.LASRegNet', arch='regnety_800mf', out_indices=(0, 1, 2, 3))``.

    Args:
        arch: ``'regnetx_400mf'``, ``'_800mf'``, ``'_1.6gf'``, ``'_3.2gf'``, ``'_8gf'``, the same
            with ``'regnety'``, or a dict of ``w0``, ``wa``, ``wm``, ``group_w``, ``depth`` and
            ``bot_mul`` as mmpretrain's ``RegNet`` takes it, and optionally ``se_ratio``.
        mode, granularity, freeze_maskers, channel_granularity, channel_masker,
            channel_masker_layers, channel_reduction, channel_position, runtime: See
            :class:`LASResNet`.
        se_pool: What squeeze-and-excitation averages over: ``'kept'`` positions, with which
            dropped ones need not be computed, or ``'all'``, as the released checkpoints were
            trained; spatial blocks then have no sparse form. Defaults to ``'kept'``.
        kwargs: Arguments of mmpretrain's ``RegNet``: ``out_indices``, ``frozen_stages``,
            ``norm_eval``, ``with_cp``, ``strides``, ``dilations``, ``stem_channels``, ...

    Raises:
        ValueError: Wrong arch, mode, granularity, se_pool, ...; the message names the value.
        TypeError: An unknown argument; the message names close ones.

    Examples:
        >>> import torch
        >>> from las_mm.models import LASRegNet, collect_activations
        >>> backbone = LASRegNet("regnety_400mf", out_indices=(0, 1, 2, 3))
        >>> outs = backbone(torch.rand(1, 3, 64, 96))
        >>> [tuple(out.shape) for out in outs]
        [(1, 48, 16, 24), (1, 104, 8, 12), (1, 208, 4, 6), (1, 440, 2, 3)]
        >>> collect_activations(backbone).rates.shape
        torch.Size([16])
    """

    arch_settings = {
        f"regnet{name}": dict(
            depth=depth,
            w0=w0,
            wa=wa,
            wm=wm,
            group_w=group_w,
            bot_mul=1.0,
            se_ratio=SE_RATIO if name.startswith("y") else 0.0,
        )
        for name, (depth, w0, wa, wm, group_w) in ARCHS.items()
    }
    stem_class = FusedConvStem
    static_forward = RegNet.forward

    def __init__(
        self,
        arch: str | dict,
        mode: str | Sequence = "spatial",
        granularity: int | Sequence = (4, 4, 2, 1),
        freeze_maskers: bool = True,
        channel_granularity: int | Sequence = 2,
        channel_masker: str | Sequence = "mlp",
        channel_masker_layers: int | Sequence = 2,
        channel_reduction: int | Sequence = 16,
        channel_position: str | Sequence = "after_act",
        se_pool: str = "kept",
        runtime: str = "auto",
        **kwargs,
    ) -> None:
        kwargs = static_arguments(type(self), RegNet, kwargs)
        if kwargs.get("deep_stem"):
            raise ValueError("deep_stem is of a ResNet: a RegNet has no other stem than its own")
        settings = self._settings_of(arch)
        if se_pool not in POOLS:
            raise ValueError(f"se_pool must be one of {', '.join(POOLS)}, got {se_pool!r}")
        self.arch = arch if isinstance(arch, str) else "custom"
        self.se_ratio = settings.pop("se_ratio", 0.0)
        self.se_pool = se_pool
        if se_pool != "kept" and not self.se_ratio:
            raise ValueError(
                f"se_pool={se_pool!r} has no effect on {self.arch}, which has no "
                "squeeze-and-excitation (a RegNetY has it, or se_ratio of an arch given as a dict)"
            )
        widths, _ = self.generate_regnet(*(settings[key] for key in ("w0", "wa", "wm", "depth")))
        _, stage_blocks = self.get_stages_from_blocks(widths)
        if isinstance(granularity, (list, tuple)) and len(granularity) == 4 > len(stage_blocks):
            granularity = granularity[: len(stage_blocks)]
        self.settings = block_settings(
            stage_blocks,
            mode=mode,
            granularity=granularity,
            channel_granularity=channel_granularity,
            channel_masker=channel_masker,
            channel_masker_layers=channel_masker_layers,
            channel_reduction=channel_reduction,
            channel_position=channel_position,
        )
        check_stages(len(stage_blocks), RegNet, kwargs)
        require_bool("freeze_maskers", freeze_maskers)
        self.freeze_maskers = freeze_maskers
        super().__init__(settings, **kwargs)
        self.runtime = runtime
        self._register_load_state_dict_pre_hook(_convert_on_load)

    def _settings_of(self, arch: str | dict) -> dict:
        if isinstance(arch, dict):
            missing = [key for key in _ARCH_KEYS if key not in arch]
            unknown = [key for key in arch if key not in (*_ARCH_KEYS, "se_ratio")]
            if missing or unknown:
                raise ValueError(
                    f"arch as a dict needs {', '.join(_ARCH_KEYS)} and may have se_ratio; missing: "
                    f"{missing}, unknown: {unknown}"
                )
            return dict(arch)
        if arch not in self.arch_settings:
            known = ", ".join(self.arch_settings)
            raise ValueError(f"arch of LASRegNet must be a dict or one of {known}, got {arch!r}")
        return dict(self.arch_settings[arch])

    @staticmethod
    def quantize_float(number: float, divisor: int) -> int:
        """``number`` rounded to a multiple of ``divisor`` as torchvision does: halves go up.

        The last stage of RegNetX-400MF has 400 channels there, 384 in mmpretrain.
        """
        rounded = max(divisor, int(number + divisor / 2) // divisor * divisor)
        return rounded if rounded >= 0.9 * number else rounded + divisor

    def make_res_layer(self, **kwargs) -> ResLayer:
        """The parent's stage builder, with dynamic blocks."""
        kwargs["block"] = DynamicRegNetBlock
        return super().make_res_layer(se_ratio=self.se_ratio, se_pool=self.se_pool, **kwargs)

    def _stem_parts(self) -> list[str]:
        return ["conv1", self.norm1_name, "relu"]

    def _dense_stem(self, x: Tensor) -> Tensor:
        return self.relu(self.norm1(self.conv1(x)))

    @property
    def architecture(self) -> str:
        """See the base class."""
        return f"LASRegNet-{self.arch}"

    def extra_repr(self) -> str:
        return super().extra_repr().replace(f"depth={self.depth}", f"arch={self.arch}", 1)


def _convert_on_load(state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Rename torchvision's and the released keys of a ``state_dict`` that is being loaded."""
    mine = [key for key in state_dict if key.startswith(prefix)]
    if not any(key.startswith(f"{prefix}trunk_output.") for key in mine):
        return
    weights = {key.removeprefix(prefix): state_dict.pop(key) for key in mine}
    state_dict.update((prefix + key, value) for key, value in convert_regnet(weights).items())
