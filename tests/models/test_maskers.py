import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from las_mm.models.maskers import (
    SpatialMasker,
    dilate_mask,
    expand_mask,
    gumbel_difference,
)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 23),
    w=st.integers(1, 23),
    granularity=st.integers(1, 9),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_pooling_averages_over_real_pixels(h, w, granularity, stride, seed):
    """Patch (i, j) of the output grid pools exactly the input pixels below its outputs."""
    torch.manual_seed(seed)
    x = torch.rand(2, 3, h, w)
    masker = SpatialMasker(3)
    torch.nn.init.normal_(masker.conv.weight)
    logits = masker.logits(x, granularity * stride)
    h_out, w_out = -(-h // stride), -(-w // stride)
    assert logits.shape == (2, 2, -(-h_out // granularity), -(-w_out // granularity))
    side = granularity * stride
    for i in range(logits.shape[2]):
        for j in range(logits.shape[3]):
            pixels = x[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
            expected = masker.conv(pixels.mean((2, 3), keepdim=True))[:, :, 0, 0]
            torch.testing.assert_close(logits[:, :, i, j], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 15),
    w=st.integers(1, 15),
    granularity=st.integers(1, 5),
    stride=st.sampled_from([1, 2]),
    dilation=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_dilated_mask_is_what_the_convolution_reads(h, w, granularity, stride, dilation, seed):
    """A position is in the halo exactly if changing it changes a kept output of conv2."""
    torch.manual_seed(seed)
    h_out, w_out = -(-h // stride), -(-w // stride)
    grid = -(-h_out // granularity), -(-w_out // granularity)
    mask = expand_mask((torch.rand(1, 1, *grid) < 0.3).float(), granularity, (h_out, w_out))
    halo = dilate_mask(mask, (h, w), stride, dilation)
    x = torch.zeros(1, 1, h, w, requires_grad=True)
    out = F.conv2d(x, torch.ones(1, 1, 3, 3), stride=stride, padding=dilation, dilation=dilation)
    assert out.shape[-2:] == mask.shape[-2:]
    (read,) = torch.autograd.grad((out * mask).sum(), x)
    assert torch.equal(halo, (read > 0).float())


def test_starts_mostly_on():
    torch.manual_seed(0)
    masker = SpatialMasker(256).train()
    x = torch.randn(4, 256, 32, 32).relu()
    assert masker(x, 1).mean() > 0.98
    assert masker.eval()(x, 1).mean() == 1


def test_training_sample_is_hard_with_soft_gradient():
    torch.manual_seed(0)
    masker = SpatialMasker(8, keep_bias=0.0).train()
    masker.temperature = 0.7
    x = torch.randn(2, 8, 16, 16)
    mask = masker(x, 4)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    mask.sum().backward()
    assert masker.conv.bias.grad[0] > 0  # more keep logit, more kept
    assert masker.conv.bias.grad[1] < 0
    assert masker.conv.weight.grad.abs().sum() > 0


def test_keep_probability_is_the_softmax():
    """P(keep) of the hard Gumbel-softmax is softmax(logits)[0], whatever the temperature."""
    torch.manual_seed(0)
    masker = SpatialMasker(1, keep_bias=0.8).train()
    torch.nn.init.zeros_(masker.conv.weight)
    for temperature in (0.1, 5.0):
        masker.temperature = temperature
        rate = masker(torch.zeros(1, 1, 300, 300), 1).mean().item()
        assert rate == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.01)


def test_logistic_noise_is_finite_and_centred():
    torch.manual_seed(0)
    noise = gumbel_difference(torch.zeros(400_000))
    assert noise.isfinite().all()
    assert abs(noise.mean()) < 0.02
    assert noise.var() == pytest.approx(torch.pi**2 / 3, rel=0.02)


def test_layer_decision_is_per_image():
    masker = SpatialMasker(1, keep_bias=0.0).eval()
    with torch.no_grad():
        masker.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    x = torch.stack([torch.ones(1, 5, 7), -torch.ones(1, 5, 7)])
    assert masker(x, None).flatten().tolist() == [1.0, 0.0]
