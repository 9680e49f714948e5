"""set_budget, and the scalar offsets that it sets."""

import pytest
import torch

import las_mm
from las_mm.models import LASResNet, collect_activations
from las_mm.models.flops import flops_report
from las_mm.models.sparse import masked_dense

MODES = ["spatial", "layer", "channel", "both"]


def make(mode, seed=0, **kwargs):
    torch.manual_seed(seed)
    net = LASResNet(
        50, mode=mode, base_channels=8, stem_channels=8, granularity=(2, 2, 1, 1), **kwargs
    )
    for masker in net.maskers():
        for parameter in masker.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return net.eval()


@pytest.fixture
def images():
    return torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def ratio(net, images):
    with torch.no_grad():
        net(images)
    return flops_report(collect_activations(net)).ratio.item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_hits_the_target(mode, rate, images):
    net = make(mode)
    told = las_mm.set_budget(net, rate, images)
    tolerance = 0.05 if mode == "layer" else 0.01  # a layer block has one decision per image
    assert told.flops_ratio == pytest.approx(rate, abs=tolerance)
    assert ratio(net, images) == pytest.approx(told.flops_ratio, abs=1e-3)
    trained = las_mm.set_budget(net, None)
    assert trained.offset == 0 and all(masker.offset is None for masker in net.maskers())


@pytest.mark.parametrize("mode", MODES)
def test_both_paths_take_a_scalar(mode, images):
    net = make(mode)
    las_mm.set_budget(net, 0.6, images)
    with torch.no_grad():
        (fast,) = net(images)
        rates = collect_activations(net).rates
        with masked_dense():
            (dense,) = net(images)
        torch.testing.assert_close(rates, collect_activations(net).rates, atol=1e-3, rtol=0)
    # A logit that rounds to the other side of the threshold changes a patch: few may.
    wrong = (fast - dense).abs() > 1e-3 * dense.abs().max()
    assert wrong.float().mean() < 0.02


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("offset", [1.5, "1", torch.zeros(3), torch.zeros(5, 1, 3, 3)])
def test_other_offsets_are_refused_on_both_paths(mode, dense, offset, images):
    net = make(mode, runtime="dense" if dense else "sparse")
    for masker in net.maskers():
        masker.offset = offset
    message = r"^offset of \w+Masker must be None or a tensor of shape \(\) or \(1 or 12, [^\n]*$"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        net(images)


def test_batches_are_as_good_as_a_tensor(images):
    net = make("spatial")
    whole = las_mm.set_budget(net, 0.6, images)
    parts = las_mm.set_budget(net, 0.6, iter(images.split(5)))
    assert whole.offset == pytest.approx(parts.offset, abs=0.1)


@pytest.mark.parametrize("rate", [0, -1, 1.1, True, "0.5", float("nan")])
def test_wrong_rates(rate, images):
    with pytest.raises(ValueError, match=r"^rate of set_budget must be in \(0, 1\] or None, got"):
        las_mm.set_budget(make("spatial"), rate, images)


def test_out_of_reach_leaves_the_network_as_it_was(images):
    net = make("spatial")
    before = torch.tensor(0.25)
    for masker in net.maskers():
        masker.offset = before
    with pytest.raises(ValueError, match="out of reach: with nothing kept the FLOPs ratio"):
        las_mm.set_budget(net, 0.01, images)
    assert all(masker.offset is before for masker in net.maskers())


@pytest.mark.parametrize("wrong", [None, [], torch.rand(3, 64, 64), [torch.rand(3, 8, 8)]])
def test_no_images(wrong):
    with pytest.raises(ValueError, match=r"^images of set_budget must be \(N, 3, H, W\)"):
        las_mm.set_budget(make("spatial"), 0.5, wrong)


def test_training_mode_and_static_networks(images):
    with pytest.raises(RuntimeError, match="eval mode"):
        las_mm.set_budget(make("spatial").train(), 0.5, images)
    with pytest.raises(ValueError, match="every block of the backbone is static"):
        las_mm.set_budget(make("static"), 0.5, images)
