"""What networks are made of, described without torch: operators, blocks, architectures."""

from .architectures import regnet_shape, resnet_shape
from .block import CHANNEL_MASKERS, MODES, BlockShape, NetworkShape
from .bottleneck import BottleneckShape
from .operator import Operator

__all__ = [
    "CHANNEL_MASKERS",
    "MODES",
    "BlockShape",
    "BottleneckShape",
    "NetworkShape",
    "Operator",
    "regnet_shape",
    "resnet_shape",
]
