"""Small networks of both families that are no bottlenecks, for tests that hold for either."""

from __future__ import annotations

import os

import torch
from torch import nn

from las_mm.benchmark.subject import randomize
from las_mm.drawn_masks import force_masks
from las_mm.models import LASDenseNet, LASResNet, collect_activations, plan, sparse

SCALE = float(os.environ.get("LAS_MM_HYPOTHESIS_SCALE", 1))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ALL = (0, 1, 2, 3)
TINY = dict(growth_rate=8, depths=[2, 3, 2, 2], init_channels=16)
MODES = {
    "basic": ("static", "spatial", "layer", "channel", "both"),
    "dense": ("static", "spatial", "layer"),
}
DYNAMIC = [(family, mode) for family, modes in MODES.items() for mode in modes[1:]]


class FixedPlan:
    """Nothing is measured, or written to the user's folder."""

    def lookup(self, kind, device_type="cpu"):
        return plan.Choice(winograd=kind.tiled)


def basic(depth=18, **kwargs):
    """A ResNet-18 of a quarter of its width."""
    return LASResNet(
        depth, **{**dict(base_channels=16, stem_channels=16, out_indices=ALL), **kwargs}
    )


def dense(**kwargs):
    """A DenseNet of nine layers."""
    return LASDenseNet(**{**dict(arch=TINY, out_indices=ALL), **kwargs})


def make(family, seed=0, **kwargs):
    """A network in eval mode whose features vary and whose maskers are undecided."""
    torch.manual_seed(seed)
    net = dict(basic=basic, dense=dense)[family](**kwargs)
    randomize(net, seed)
    for masker in net.maskers():
        for name, parameter in masker.named_parameters():
            nn.init.normal_(parameter, std=0.5) if "weight" in name else nn.init.zeros_(parameter)
    return net.eval()


def images(count, height, width, channels=3, seed=1):
    """Noise around another mean in every image and channel, so that decisions differ."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, height, width, generator=generator)
    return noise + 2 * torch.randn(count, channels, 1, 1, generator=generator)


def force(net, x, rate=0.5, seed=0):
    """Decisions that no rounding turns; of the first image every other one is flipped."""
    force_masks(net, x.shape, rate, "random", seed, channel_rate=rate)
    for masker in net.maskers()[::2]:
        masker.offset[0] = -masker.offset[0]


def run(net, x):
    """Outputs and record of the form that the network picks without gradients."""
    with torch.no_grad():
        outs = net(x)
    return outs, collect_activations(net)


def run_masked_dense(net, x):
    """The same of the masked-dense path."""
    with sparse.masked_dense():
        return run(net, x)


def assert_close(actual, expected, tolerance=None):
    """Equal up to rounding, in shape, type and memory format."""
    assert len(actual) == len(expected)
    for stage, (a, e) in enumerate(zip(actual, expected), start=1):
        assert a.shape == e.shape and a.dtype == e.dtype
        # Of a single row, column or image no stride is ever used.
        pairs = zip(a.shape, a.stride(), e.stride())
        assert all(ours == theirs for size, ours, theirs in pairs if size > 1)
        error = (a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)
        assert error <= (tolerance or TOLERANCE[a.dtype]), f"stage {stage}: {error:.3g}"


def assert_same_record(actual, expected):
    """Equal rates, shares and decisions."""
    for axis, rates in expected.axes.items():
        torch.testing.assert_close(actual.axes[axis], rates, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.shares, expected.shares, rtol=0, atol=1e-6)
    for ours, theirs in zip(actual.decisions, expected.decisions):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[axis].bool(), made.bool()) for axis, made in theirs.items())


def check(net, x):
    """The sparse path equals masked-dense; returns its outputs and record."""
    expected, record = run_masked_dense(net, x)
    actual, own = run(net, x)
    assert_close(actual, expected)
    assert_same_record(own, record)
    return actual, own
