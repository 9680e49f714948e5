"""The cost of one operator on one device, as a :class:`Report`.

Implements the analytical model of docs/latency_model.md (the simulator of LAUDNet, arXiv
2308.15949): an operator's output is split into tiles, and its latency is
``launch + min over tilings of (compute + memory)``. All times are seconds for the whole batch,
all sizes are counts of FP32 values.
"""

from ...report import Report
from ..channels import ChannelCost, ChannelMask
from ..checks import check_sizes
from ..conv_size import ConvSize
from ..tiling import PatchCost
from .dynamic import (
    channel_conv,
    channel_conv_cost,
    dynamic_conv,
    dynamic_conv_cost,
    scatter_add,
    scatter_add_cost,
)
from .masker import masker_conv1, masker_conv1_costs
from .static import (
    MASKER_OUTPUTS,
    elementwise_add,
    fully_connected,
    global_average_pool,
    layer_masker,
    max_pool,
    resize,
    scale_channels,
    static_conv,
    value_op,
)

__all__ = [
    "MASKER_OUTPUTS",
    "check_sizes",
    "value_op",
    "ChannelCost",
    "ChannelMask",
    "ConvSize",
    "PatchCost",
    "Report",
    "channel_conv",
    "channel_conv_cost",
    "dynamic_conv",
    "dynamic_conv_cost",
    "elementwise_add",
    "fully_connected",
    "global_average_pool",
    "layer_masker",
    "masker_conv1",
    "masker_conv1_costs",
    "max_pool",
    "resize",
    "scale_channels",
    "scatter_add",
    "scatter_add_cost",
    "static_conv",
]
