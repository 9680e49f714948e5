"""What test_cuda_device.py passes to the ops fits their schemas: a card's time is dear."""

import pytest
import torch

from . import cases, test_cuda_device
from .cases import needs_native
from .test_channel_ops import ChannelBlock

BLOCK = cases.Block(2, (20, 23), (64, 48, 64), layout="channels_last")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    pack = test_cuda_device.pack
    monkeypatch.setattr(test_cuda_device, "on_gpu", lambda x: x)
    monkeypatch.setattr(
        test_cuda_device, "pack", lambda block, kernels, _: pack(block, kernels, "cpu")
    )


@needs_native("sparse_bottleneck")
def test_bottleneck():
    actual = test_cuda_device.call(
        "sparse_bottleneck", BLOCK.x, *test_cuda_device.gpu_arguments(BLOCK)
    )
    cases.assert_close(actual, *BLOCK.expected(BLOCK.x), torch.float32)


@needs_native("channel_bottleneck")
@pytest.mark.parametrize("constant", [False, True])
def test_channels(constant):
    case = ChannelBlock(BLOCK, 2, ("0.6", "none"), constant)
    actual = test_cuda_device.call(
        "channel_bottleneck", BLOCK.x, *test_cuda_device.channel_arguments(case)
    )
    cases.assert_close(actual, *case.expected(BLOCK.x), torch.float32)
