"""The ops of ``las_mm::``: schemas, reference implementations, fake kernels, public functions.

The reference implementation of an op is plain PyTorch and registered for every back end; a native
kernel (ops/ at the top of the repository, built as ``las_mm._C``) takes precedence where the
dispatcher has one. Importing this package loads the extension, or says once why the reference
implementations run instead.

A *mask* is (N, 1, ceil(H_out/S), ceil(W_out/S)): one decision per image and patch of S x S outputs,
patches at the right and bottom edges may be smaller. Feature maps are (N, C, H, W), read in any
memory format and written channels_last, in float32 or bfloat16, on a GPU also float16. There a mask
is not checked for NaN, which would mean waiting for the GPU: NaN drops the patch. LASNet (arXiv
2210.06223), section 3.
"""

import torch

from las_mm.ops.basic import BasicPack, pack_basic, sparse_basic, sparse_basic_
from las_mm.ops.basic_channels import channel_basic, channel_basic_
from las_mm.ops.bottleneck import sparse_bottleneck, sparse_bottleneck_
from las_mm.ops.bottleneck_pack import BottleneckPack, pack_bottleneck
from las_mm.ops.channels import channel_bottleneck, channel_bottleneck_, channel_mask, channel_mean
from las_mm.ops.contents import (
    MANY_POSITIONS,
    PARTS,
    PREPARE_FIRST,
    fingerprint,
    fingerprints,
    sample_view,
    unchanged,
)
from las_mm.ops.convolution import (
    conv1x1_scatter_add_,
    gather_conv3x3,
    masker_conv1x1,
)
from las_mm.ops.dense_layer import DenseLayerPack, pack_dense_layer, sparse_dense_layer_
from las_mm.ops.dense_transition import (
    TransitionPack,
    dense_transition_,
    pack_dense_transition,
)
from las_mm.ops.flops import register as _register_flops
from las_mm.ops.library import load_native
from las_mm.ops.maps import conv_pool_stem, to_nchw
from las_mm.ops.masks import LAYER, dilate_mask, spatial_mask, supports
from las_mm.ops.packed_convolution import ConvPack, pack_conv2d, packed_conv2d
from las_mm.ops.packing import pack_conv, pack_stem, pack_winograd

__all__ = [
    "BasicPack",
    "BottleneckPack",
    "ConvPack",
    "DenseLayerPack",
    "LAYER",
    "MANY_POSITIONS",
    "PARTS",
    "PREPARE_FIRST",
    "TransitionPack",
    "channel_basic",
    "channel_basic_",
    "channel_bottleneck",
    "channel_bottleneck_",
    "channel_mask",
    "channel_mean",
    "conv1x1_scatter_add_",
    "conv_pool_stem",
    "cpu_isa",
    "dense_transition_",
    "dilate_mask",
    "fingerprint",
    "fingerprints",
    "gather_conv3x3",
    "has_block_kernels",
    "has_channel_kernels",
    "has_channel_mask",
    "has_excitation",
    "has_fingerprint",
    "has_kernels",
    "has_stem_kernel",
    "has_winograd",
    "masker_conv1x1",
    "native_available",
    "pack_basic",
    "pack_bottleneck",
    "pack_conv",
    "pack_conv2d",
    "pack_dense_layer",
    "pack_dense_transition",
    "pack_stem",
    "pack_winograd",
    "packed_conv2d",
    "sample_view",
    "sparse_basic",
    "sparse_basic_",
    "sparse_bottleneck",
    "sparse_bottleneck_",
    "sparse_dense_layer_",
    "spatial_mask",
    "supports",
    "to_nchw",
    "unchanged",
]

_register_flops()
_NATIVE = load_native()


def native_available() -> bool:
    """Whether the native kernels are loaded; if not, the reference implementations run."""
    return _NATIVE


def _devices_with(name: str) -> frozenset[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = ("cpu", "cuda") if _NATIVE else ()
    return frozenset(d for d in devices if has_kernel(f"las_mm::{name}", d.upper()))


_SPARSE_OPS = _devices_with("sparse_bottleneck")
_BLOCKS = _devices_with("sparse_basic") & _devices_with("sparse_dense_layer_")
_CHANNELS = _devices_with("channel_bottleneck")
_CHANNEL_MASK = _devices_with("channel_mask")
_EXCITATION = _devices_with("channel_mean")  # built with the kernels of channels
_FINGERPRINT = _devices_with("fingerprint")
_STEM = _devices_with("conv_pool_stem")
_WINOGRAD = frozenset({"cpu"})


def has_kernels(device_type: str) -> bool:
    """Whether native kernels of the sparse ops exist for a device type such as ``'cpu'``."""
    return device_type in _SPARSE_OPS


def has_block_kernels(device_type: str) -> bool:
    """Whether native kernels of basic blocks and dense layers exist there."""
    return device_type in _BLOCKS


def has_channel_kernels(device_type: str) -> bool:
    """Whether native kernels of ``channel_bottleneck`` exist there."""
    return device_type in _CHANNELS


def has_channel_mask(device_type: str) -> bool:
    """Whether ``channel_mask`` has a native kernel there."""
    return device_type in _CHANNEL_MASK


def has_stem_kernel(device_type: str) -> bool:
    """Whether ``conv_pool_stem`` has a native kernel there; else dense convolutions are faster."""
    return device_type in _STEM


def has_winograd(device_type: str) -> bool:
    """Whether ``sparse_bottleneck`` uses the Winograd form of conv2 there."""
    return device_type in _WINOGRAD


def has_excitation(device_type: str) -> bool:
    """Whether ``sparse_bottleneck`` takes squeeze-and-excitation there."""
    return device_type in _EXCITATION


def has_fingerprint(device_type: str) -> bool:
    """Whether ``fingerprint`` has a native kernel there; else it is too slow for every image."""
    return device_type in _FINGERPRINT


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: generic, avx2, avx512 or avx512_bf16.

    The environment variable ``LAS_MM_CPU_ISA`` asks for a lower one.

    Raises:
        RuntimeError: The native kernels are not built.
        ValueError: ``LAS_MM_CPU_ISA`` names none of these, or one that this CPU lacks.
    """
    if not _NATIVE:
        raise RuntimeError("the native kernels of las_mm are not built")
    return torch.ops.las_mm.cpu_isa()
