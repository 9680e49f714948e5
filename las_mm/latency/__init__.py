"""Predicting latency from a description of the hardware (docs/latency_model.md)."""

from .device import Device, available_devices, load_device
from .predictor import LatencyTable, Prediction, block_report, network_report, paper_report
from .report import Report
from .shapes import BlockShape, ConvShape, NetworkShape, PoolShape, resnet_shape

__all__ = [
    "BlockShape",
    "ConvShape",
    "Device",
    "LatencyTable",
    "NetworkShape",
    "PoolShape",
    "Prediction",
    "Report",
    "available_devices",
    "block_report",
    "load_device",
    "network_report",
    "paper_report",
    "resnet_shape",
]
