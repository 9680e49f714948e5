"""Predicting latency from a description of the hardware (docs/latency_model.md)."""

from las_mm.network.architectures import regnet_shape, resnet_shape
from las_mm.network.block import BlockShape, NetworkShape
from las_mm.network.bottleneck import BottleneckShape
from las_mm.network.operator import Conv as ConvShape
from las_mm.network.operator import Pool as PoolShape

from .analytical.costs import Cost, ShareCost
from .analytical.rules import operator_cost
from .blocks import block_report
from .device import KINDS, AnyDevice, Device, available_devices, load_device
from .measured.calibrated import CalibratedDevice
from .prediction import find_network, predict
from .report import Report
from .search import search_granularity
from .search_result import SearchResult
from .table import (
    LatencyTable,
    LatencyTables,
    Prediction,
    network_report,
    paper_report,
)

__all__ = [
    "KINDS",
    "AnyDevice",
    "BlockShape",
    "BottleneckShape",
    "CalibratedDevice",
    "ConvShape",
    "Cost",
    "Device",
    "LatencyTable",
    "LatencyTables",
    "NetworkShape",
    "PoolShape",
    "Prediction",
    "Report",
    "SearchResult",
    "ShareCost",
    "available_devices",
    "block_report",
    "find_network",
    "load_device",
    "network_report",
    "operator_cost",
    "paper_report",
    "predict",
    "regnet_shape",
    "resnet_shape",
    "search_granularity",
]
