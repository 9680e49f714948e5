"""What networks are made of, described without torch: operators, blocks, architectures."""

from .architectures import regnet_shape, resnet_shape
from .basic import BasicShape
from .block import CHANNEL_MASKERS, MODES, BlockShape, NetworkShape
from .bottleneck import BottleneckShape
from .operator import Add, Conv, GlobalPool, Linear, Masker, Operator, Pool, Scale

__all__ = [
    "CHANNEL_MASKERS",
    "MODES",
    "Add",
    "BasicShape",
    "BlockShape",
    "BottleneckShape",
    "Conv",
    "GlobalPool",
    "Linear",
    "Masker",
    "NetworkShape",
    "Operator",
    "Pool",
    "Scale",
    "regnet_shape",
    "resnet_shape",
]
