"""Backbones and their parts. Importing this module registers the models."""

from las_mm.dependencies import require, require_mmpretrain_models

require("mmcv", "las_mm.models")
require_mmpretrain_models("las_mm.models (LASResNet extends mmpretrain's ResNet)")

from las_mm.models.activation import Activation, NetworkActivation  # noqa: E402
from las_mm.models.basic import DynamicBasicBlock  # noqa: E402
from las_mm.models.block import DynamicBlock  # noqa: E402
from las_mm.models.bottleneck import DynamicBottleneck  # noqa: E402
from las_mm.models.densenet import LASDenseNet  # noqa: E402
from las_mm.models.distill import DistilledClassifier  # noqa: E402
from las_mm.models.finding import collect_activations, find_dynamic_backbone  # noqa: E402
from las_mm.models.flops import flops_report  # noqa: E402
from las_mm.models.maskers import ChannelMasker, SpatialMasker  # noqa: E402
from las_mm.models.regnet import LASRegNet  # noqa: E402
from las_mm.models.resnet import LASResNet  # noqa: E402
from las_mm.models.settings import BlockSettings  # noqa: E402
from las_mm.models.t2t_vit import LAUDT2TViT  # noqa: E402
from las_mm.models.token_maskers import ClassTokenMasker, TokenMasker  # noqa: E402
from las_mm.models.token_settings import TransformerSettings  # noqa: E402
from las_mm.models.transformer_layer import DynamicTransformerLayer  # noqa: E402

__all__ = [
    "Activation",
    "BlockSettings",
    "ChannelMasker",
    "ClassTokenMasker",
    "DistilledClassifier",
    "DynamicBasicBlock",
    "DynamicBlock",
    "DynamicBottleneck",
    "DynamicTransformerLayer",
    "LASDenseNet",
    "LASRegNet",
    "LASResNet",
    "LAUDT2TViT",
    "NetworkActivation",
    "SpatialMasker",
    "TokenMasker",
    "TransformerSettings",
    "collect_activations",
    "find_dynamic_backbone",
    "flops_report",
]
