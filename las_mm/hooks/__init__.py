"""Hooks for mmengine's runner. Importing this module registers them."""

from las_mm.hooks.activation_metric import ActivationMetric
from las_mm.hooks.budget import BudgetHook
from las_mm.hooks.checkpoint import AtomicCheckpointHook
from las_mm.hooks.latency import PredictedLatencyHook
from las_mm.hooks.masks import MaskVisualizationHook
from las_mm.hooks.seed import IterationSeedHook
from las_mm.hooks.temperature import TemperatureHook

__all__ = [
    "ActivationMetric",
    "AtomicCheckpointHook",
    "BudgetHook",
    "IterationSeedHook",
    "MaskVisualizationHook",
    "PredictedLatencyHook",
    "TemperatureHook",
]
