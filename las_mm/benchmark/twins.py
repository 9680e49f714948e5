"""Static networks that nothing of las_mm can speed up, with the parameter names of ours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from mmpretrain.models.backbones import RegNet, T2T_ViT
from mmpretrain.models.backbones.resnet import ResLayer
from mmpretrain.models.backbones.resnext import Bottleneck
from torch import Tensor, nn

from las_mm.models.backbone import DynamicBackbone
from las_mm.models.excitation import SqueezeExcitation
from las_mm.models.regnet import LASRegNet
from las_mm.models.t2t_vit import plain_t2t


class _Block(Bottleneck):
    """mmpretrain's grouped bottleneck with squeeze-and-excitation."""

    def __init__(self, in_channels: int, out_channels: int, se_ratio: float, **kwargs) -> None:
        super().__init__(in_channels, out_channels, **kwargs)
        self.se: nn.Module = nn.Identity()
        if se_ratio:
            self.se = SqueezeExcitation(self.mid_channels, round(se_ratio * in_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.se(self.relu(self.norm2(self.conv2(out))))
        out = self.norm3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _RegNet(RegNet):
    """mmpretrain's RegNet with torchvision's widths, X or Y."""

    quantize_float = staticmethod(LASRegNet.quantize_float)

    def __init__(self, arch: dict, **kwargs) -> None:
        arch = dict(arch)
        self.se_ratio = arch.pop("se_ratio", 0.0)
        super().__init__(arch, **kwargs)

    def make_res_layer(self, **kwargs) -> ResLayer:
        kwargs["block"] = _Block
        return ResLayer(se_ratio=self.se_ratio, **kwargs)


def plain_twin(backbone: nn.Module, config: Mapping) -> nn.Module:
    """A plain static network of the kind of ``backbone``, with weights of its own.

    Args:
        backbone: A dynamic backbone.
        config: What it was built from.
    """
    # What it was made from: the first of its bases that is nothing of las_mm's.
    static = next(cls for cls in type(backbone).__mro__ if not issubclass(cls, DynamicBackbone))
    if static is T2T_ViT:
        return plain_t2t(config)
    known = inspect.signature(static.__init__).parameters
    kwargs = {key: config[key] for key in config if key in known}
    if static is not RegNet:
        return static(**kwargs)
    arch = kwargs.pop("arch")
    return _RegNet(LASRegNet.arch_settings[arch] if isinstance(arch, str) else arch, **kwargs)
