"""set_budget, and the scalar offsets that it sets."""

import numpy as np
import pytest
import torch
from PIL import Image

import las_mm
from las_mm.latency import predict
from las_mm.models import LASResNet, collect_activations
from las_mm.models.flops import flops_report
from las_mm.models.sparse import masked_dense
from las_mm.pictures import as_the_model_reads

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


# A limit on latency ------------------------------------------------------------------------------


def latencies(net, images):
    found = []
    for image in images.split(1):
        with torch.no_grad():
            net(image)
        found.append(1e3 * predict(net, "v100", (1, 3, 64, 64)).latency_s)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_image_stays_within_the_limit(mode, images):
    net = make(mode)
    before = latencies(net, images)
    low = latencies_with_nothing(net, images)
    limit = 0.4 * max(before) + 0.6 * low
    told = las_mm.set_budget(net, images=images, max_latency_ms=limit, device="v100")
    after = latencies(net, images)
    assert told.offset < 0
    # Between its points the table is a straight line, the model itself goes in steps.
    assert max(after) == pytest.approx(told.latency_ms, rel=0.02)
    assert low <= told.latency_ms <= limit
    assert ratio(net, images) == pytest.approx(told.flops_ratio, abs=1e-3)


def latencies_with_nothing(net, images):
    for masker in net.maskers():
        masker.offset = torch.tensor(-1e4)
    found = max(latencies(net, images))
    las_mm.set_budget(net)
    return found


def test_a_percentile_lets_the_others_take_longer(images):
    net = make("spatial")
    before = sorted(latencies(net, images))
    limit = sum(before) / len(before)
    worst = las_mm.set_budget(net, images=images, max_latency_ms=limit, device="v100")
    half = las_mm.set_budget(net, images=images, max_latency_ms=limit, device="v100", percentile=50)
    assert worst.offset < half.offset <= 0
    within = [ms <= 1.02 * limit for ms in latencies(net, images)]
    assert sum(within) >= len(images) / 2


def test_within_the_limit_nothing_changes(images):
    net = make("spatial")
    told = las_mm.set_budget(net, images=images, max_latency_ms=1e6, device="v100")
    assert told.offset == 0 and told.latency_ms < 1e6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(max_latency_ms=1e-3, device="v100"), "0.001 of set_budget is out of reach: .* ms"),
        (dict(rate=0.5, max_latency_ms=1, device="v100"), "a rate or max_latency_ms, got both"),
        (dict(max_latency_ms=1), "needs a device"),
        (dict(rate=0.5, device="v100"), "give max_latency_ms too"),
        (dict(max_latency_ms=0, device="v100"), "max_latency_ms .* got 0"),
        (dict(max_latency_ms=True, device="v100"), "max_latency_ms .* got True"),
        (dict(max_latency_ms=1, device="v100", percentile=101), "percentile .* got 101"),
        (dict(max_latency_ms=1, device="v999"), "v999"),
    ],
)
def test_limits_that_make_no_sense(arguments, words, images):
    net = make("spatial")
    with pytest.raises(ValueError, match=words):
        las_mm.set_budget(net, images=images, **arguments)
    assert all(masker.offset is None for masker in net.maskers())


@pytest.fixture
def classifier():
    """With the config that it was built from."""
    from mmengine.config import ConfigDict
    from mmpretrain.registry import MODELS

    model = MODELS.build(
        dict(
            type="ImageClassifier",
            data_preprocessor=dict(mean=[100.0] * 3, std=[50.0] * 3, to_rgb=True),
            backbone=dict(type="las_mm.LASResNet", depth=50, base_channels=8, stem_channels=8),
        )
    ).eval()
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(64, 64)),
        dict(type="PackInputs"),
    ]
    loader = dict(dataset=dict(type="Wrapper", dataset=dict(pipeline=pipeline)))
    model._config = ConfigDict(default_scope="mmpretrain", test_dataloader=loader)
    return model


def test_a_folder_is_read_by_the_test_pipeline(classifier, tmp_path):
    for i in range(3):
        pixels = np.full((20 + i, 30, 3), 80 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    batches = list(as_the_model_reads(classifier, tmp_path))
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 64, 64)] * 3
    assert batches[2].unique().tolist() == pytest.approx([(160 - 100) / 50])
    told = las_mm.set_budget(classifier, 0.7, str(tmp_path))
    assert told.flops_ratio == pytest.approx(0.7, abs=0.02)


def test_folders_that_cannot_be_read(classifier, tmp_path):
    with pytest.raises(ValueError, match="must be a folder with .*png"):
        las_mm.set_budget(classifier, 0.7, tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="LASResNet has no config with a test pipeline"):
        las_mm.set_budget(make("spatial"), 0.7, tmp_path)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="a.png"):
        las_mm.set_budget(classifier, 0.7, tmp_path)
