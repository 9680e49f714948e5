"""LASNet's ResNet: mmpretrain's ResNet with dynamic bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence

from mmpretrain.models.backbones import ResNet
from torch import Tensor

from las_mm.models.arguments import check_stages, require_bool, static_arguments
from las_mm.models.backbone import DynamicBackbone
from las_mm.models.basic import DynamicBasicBlock
from las_mm.models.bottleneck import DynamicBottleneck
from las_mm.models.executors.stem import FusedStem
from las_mm.models.settings import block_settings
from las_mm.registry import MODELS


@MODELS.register_module()
class LASResNet(DynamicBackbone, ResNet):
    """ResNet whose blocks decide per image which patches and channels, or whether, to compute.

    LASNet (arXiv 2210.06223) and LAUDNet (arXiv 2308.15949). What changes against mmpretrain's
    ``ResNet``: blocks are :class:`~las_mm.models.bottleneck.DynamicBottleneck` or
    :class:`~las_mm.models.basic.DynamicBasicBlock`; a static checkpoint (torchvision naming)
    loads, its maskers then start mostly on. Use it in any mm project as
    ``backbone=dict(type='las_mm.LASResNet', depth=101, out_indices=(0, 1, 2, 3))``.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        mode: ``'static'``, ``'spatial'`` (patches), ``'channel'``, ``'both'`` (patches and
            channels) or ``'layer'`` (blocks): one for all, one per stage, one per block (flat), or
            per stage a list of one per block, as ``['spatial', 'both', ['channel'] * 5 +
            ['layer'], 'channel']``. Defaults to ``'spatial'``.
        granularity: Side S of a patch in output pixels, read by spatial and both; given like
            ``mode``. Defaults to ``(4, 4, 2, 1)``.
        channel_granularity: Channels G that share a decision, read by channel and both; given
            like ``mode``, as are the following. Defaults to 2.
        channel_masker: ``'mlp'`` or ``'conv_linear'``, see
            :class:`~las_mm.models.maskers.ChannelMasker`. Defaults to ``'mlp'``.
        channel_masker_layers: 1 or 2 fully connected layers of an ``'mlp'``. Defaults to 2.
        channel_reduction: Divisor of the masker's hidden channels. Defaults to 16.
        channel_position: ``'after_act'``: a skipped channel is 0; ``'before_norm'``: it is
            ReLU(BN(0)), as in the authors' released ResNets. Defaults to ``'after_act'``.
        freeze_maskers: Whether ``frozen_stages`` freezes the maskers of these stages too. Set it
            to ``False`` to train the maskers of frozen, statically pretrained stages.
            Norms of maskers train wherever the maskers do, also under ``norm_eval``, which is
            about statistics that came with static weights. Defaults to ``True``.
        runtime: ``'auto'``, ``'sparse'`` or ``'dense'``: how blocks run in eval mode, see
            :class:`~las_mm.models.backbone.DynamicBackbone`. Defaults to ``'auto'``.
        contract_dilation: Whether the first block of a dilated stage has half the dilation, as in
            mmseg. Defaults to ``False``.
        multi_grid: Dilation of each block of the last stage, as in mmseg. Defaults to that of
            ``dilations``.
        kwargs: Arguments of the parent: ``out_indices``, ``frozen_stages``, ``norm_eval``,
            ``with_cp``, ``style``, ``deep_stem``, ``avg_down``, ``base_channels``, ... Those of
            mmdet's and mmseg's ResNet are taken where they ask for nothing (``dcn=None``).

    Raises:
        ValueError: Wrong depth, mode, granularity, ...; the message names the value.
        TypeError: An unknown argument; the message names close ones.

    Examples:
        >>> import torch
        >>> from las_mm.models import LASResNet, collect_activations
        >>> backbone = LASResNet(50, granularity=(4, 4, 2, 1), out_indices=(0, 1, 2, 3))
        >>> outs = backbone(torch.rand(1, 3, 64, 96))
        >>> [tuple(out.shape) for out in outs]
        [(1, 256, 16, 24), (1, 512, 8, 12), (1, 1024, 4, 6), (1, 2048, 2, 3)]
        >>> collect_activations(backbone).rates.shape
        torch.Size([16])
    """

    arch_settings = {
        depth: (DynamicBottleneck if depth >= 50 else DynamicBasicBlock, blocks)
        for depth, (_, blocks) in ResNet.arch_settings.items()
    }

    stem_class = FusedStem
    static_forward = ResNet.forward

    def __init__(
        self,
        depth: int,
        mode: str | Sequence = "spatial",
        granularity: int | Sequence = (4, 4, 2, 1),
        freeze_maskers: bool = True,
        channel_granularity: int | Sequence = 2,
        channel_masker: str | Sequence = "mlp",
        channel_masker_layers: int | Sequence = 2,
        channel_reduction: int | Sequence = 16,
        channel_position: str | Sequence = "after_act",
        runtime: str = "auto",
        contract_dilation: bool = False,
        multi_grid: Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        kwargs = static_arguments(type(self), ResNet, kwargs)
        if depth not in self.arch_settings:
            known = ", ".join(map(str, self.arch_settings))
            raise ValueError(f"depth of LASResNet must be one of {known}, got {depth!r}")
        num_stages = kwargs.get("num_stages", 4)
        check_stages(num_stages, ResNet, kwargs)
        if isinstance(granularity, (list, tuple)) and len(granularity) == 4 > num_stages:
            granularity = granularity[:num_stages]  # the default serves shorter networks too
        self.settings = block_settings(
            self.arch_settings[depth][1][:num_stages],
            mode=mode,
            granularity=granularity,
            channel_granularity=channel_granularity,
            channel_masker=channel_masker,
            channel_masker_layers=channel_masker_layers,
            channel_reduction=channel_reduction,
            channel_position=channel_position,
        )
        require_bool("freeze_maskers", freeze_maskers)
        require_bool("contract_dilation", contract_dilation)
        self.freeze_maskers = freeze_maskers
        self.contract_dilation = contract_dilation
        self.multi_grid = multi_grid
        super().__init__(depth, **kwargs)
        self.runtime = runtime

    def _dense_stem(self, x: Tensor) -> Tensor:
        if self.deep_stem:
            return self.maxpool(self.stem(x))
        return self.maxpool(self.relu(self.norm1(self.conv1(x))))

    def _stem_parts(self) -> list[str]:
        parts = ["stem"] if self.deep_stem else ["conv1", self.norm1_name, "relu"]
        return [*parts, "maxpool"]

    @property
    def architecture(self) -> str:
        """See the base class."""
        return f"LASResNet-{self.depth}"
