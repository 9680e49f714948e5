"""Predicting latency from a description of the hardware (docs/latency_model.md)."""

from .device import KINDS, Device, available_devices, load_device
from .prediction import find_network, predict
from .predictor import LatencyTable, Prediction, block_report, network_report, paper_report
from .regnet import regnet_shape
from .report import Report
from .search import SearchResult, search_granularity
from .shapes import BlockShape, ConvShape, NetworkShape, PoolShape, resnet_shape
from .tables import LatencyTables

__all__ = [
    "KINDS",
    "BlockShape",
    "ConvShape",
    "Device",
    "LatencyTable",
    "LatencyTables",
    "NetworkShape",
    "PoolShape",
    "Prediction",
    "Report",
    "SearchResult",
    "available_devices",
    "block_report",
    "find_network",
    "load_device",
    "network_report",
    "paper_report",
    "predict",
    "regnet_shape",
    "resnet_shape",
    "search_granularity",
]
