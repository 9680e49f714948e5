"""Skipping channels, alone and together with patches: maskers, blocks, rates, FLOPs."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmpretrain.models.backbones import ResNet
from torch import nn

from las_mm.latency import block_report
from las_mm.models import (
    ChannelMasker,
    DynamicBottleneck,
    LASResNet,
    collect_activations,
    flops_report,
)
from las_mm.models.activation import Activation, channel_rates
from las_mm.models.flops import masker_macs
from las_mm.models.maskers import expand_channels, is_masker
from las_mm.models.sparse import masked_dense

SMALL = dict(base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
TWO_STAGES = {**SMALL, "num_stages": 2, "strides": (1, 2), "dilations": (1, 1)}
TWO_STAGES["out_indices"] = (0, 1)
KINDS = [
    dict(kind="mlp", layers=2),
    dict(kind="mlp", layers=1),
    dict(kind="conv_linear", reduction=4),
]


def bottleneck(mode, position="after_act", size=2, granularity=2, stride=1, **more):
    """A block of 24 -> 12 -> 48 channels whose maskers and norms do something."""
    downsample = nn.Conv2d(24, 48, 1, stride=stride)
    channel = dict(channel_granularity=size, channel_position=position, **more)
    block = DynamicBottleneck(
        24,
        48,
        stride=stride,
        downsample=downsample,
        mode=mode,
        granularity=granularity,
        settings=channel,
    )
    return undecided(block)


def undecided(module):
    """Norms that matter, maskers that keep about half."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    for masker in module.maskers():
        last = masker.last if isinstance(masker, ChannelMasker) else masker.conv
        nn.init.normal_(last.weight, std=2.0)
        nn.init.zeros_(last.bias)
    return module.eval()


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kwargs", KINDS)
def test_masker_starts_mostly_on(kwargs, groups):
    masker = ChannelMasker(24, groups, **kwargs)
    assert masker.last.bias.tolist() == [2.0] * groups + [-2.0] * groups
    x = torch.randn(5, 24, 6, 7)
    assert masker.eval()(x).tolist() == [[1.0] * groups] * 5
    nn.init.normal_(masker.last.bias)
    masker.reset_parameters()
    assert masker.last.bias.tolist() == [2.0] * groups + [-2.0] * groups


def test_masker_layers_and_released_names():
    def shapes(*args, **kwargs):
        state = ChannelMasker(*args, **kwargs).state_dict()
        return {k: tuple(v.shape) for k, v in state.items() if v.dim() and "running" not in k}

    assert shapes(64, 32) == {
        "conv.0.weight": (16, 64),
        "conv.0.bias": (16,),
        "conv.2.weight": (64, 16),
        "conv.2.bias": (64,),
    }
    assert shapes(64, 512)["conv.0.weight"] == (32, 64)
    assert shapes(64, 32, layers=1) == {"conv.weight": (64, 64), "conv.bias": (64,)}
    assert shapes(64, 32, "conv_linear") == {
        "conv.0.weight": (4, 64, 1, 1),
        "conv.1.weight": (4,),
        "conv.1.bias": (4,),
        "linear.weight": (64, 4),
        "linear.bias": (64,),
    }
    with pytest.raises(ValueError, match="channel_reduction .* at most its 8 input channels"):
        ChannelMasker(8, 4, "conv_linear")


@pytest.mark.parametrize("kwargs", KINDS)
def test_masker_decides_by_its_own_definition(kwargs):
    torch.manual_seed(0)
    masker = ChannelMasker(24, 6, **kwargs).eval()
    nn.init.normal_(masker.last.weight)
    nn.init.zeros_(masker.last.bias)
    x = torch.randn(4, 24, 5, 3)
    if kwargs["kind"] == "conv_linear":
        pooled = F.relu(masker.conv[1](masker.conv[0](x))).flatten(2).mean(2)
    else:
        pooled = x.flatten(2).mean(2)
        if kwargs["layers"] == 2:
            pooled = F.relu(pooled @ masker.conv[0].weight.T + masker.conv[0].bias)
    logits = pooled @ masker.last.weight.T + masker.last.bias
    decisions = masker(x)
    assert torch.equal(decisions, (logits[:, :6] >= logits[:, 6:]).float())
    assert 0 < decisions.mean() < 1
    masker.offset = torch.full((1, 6), torch.inf)
    assert masker(x).min() == 1


def test_training_sample_is_hard_with_soft_gradient():
    torch.manual_seed(0)
    masker = ChannelMasker(8, 4, keep_bias=0.4).train()
    nn.init.zeros_(masker.last.weight)
    x = torch.zeros(20_000, 8, 1, 1)
    for temperature in (0.1, 5.0):
        masker.temperature = temperature
        mask = masker(x)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        # P(keep) is the softmax of the logits (0.4, -0.4), whatever the temperature.
        expected = torch.sigmoid(torch.tensor(0.8)).item()
        assert mask.mean().item() == pytest.approx(expected, abs=0.01)
    mask.sum().backward()
    assert (masker.last.bias.grad[:4] > 0).all() and (masker.last.bias.grad[4:] < 0).all()


def test_channel_belongs_to_group_c_over_g():
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expanded = expand_channels(mask, 4)
    assert expanded.shape == (2, 12, 1, 1)
    for c in range(12):
        assert torch.equal(expanded[:, c, 0, 0], mask[:, c // 4])


def reference(block, x):
    """The block image by image on the channels that are computed, and the patches of the rest."""
    outs = []
    activation = block.activation
    conv3 = block.conv3.weight[:, :, 0, 0]
    for n in range(len(x)):
        image = x[n : n + 1]
        kept = activation.mask_channel[n].repeat_interleave(block.channel_granularity).bool()
        hidden = image
        for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
            out = conv(hidden)
            if block.channel_position == "before_norm":  # a constant where a channel is skipped
                constant = F.relu(norm(torch.zeros_like(out)))
                hidden = torch.where(kept[:, None, None], F.relu(norm(out)), constant)
            else:
                hidden = torch.where(kept[:, None, None], F.relu(norm(out)), torch.zeros(()))
        if block.channel_position == "after_act":
            assert not hidden[:, ~kept].any()
            out = torch.einsum("oc,nchw->nohw", conv3[:, kept], hidden[:, kept])
        else:
            out = torch.einsum("oc,nchw->nohw", conv3, hidden)
        out = block.norm3(out)
        if activation.mask is not None:
            side = block.granularity
            keep = activation.mask[n : n + 1].repeat_interleave(side, 2).repeat_interleave(side, 3)
            out = torch.where(
                keep[..., : out.shape[2], : out.shape[3]].bool(), out, torch.zeros(())
            )
        outs.append(F.relu(out + block.downsample(image)))
    return torch.cat(outs)


@pytest.mark.parametrize("mode", ["channel", "both"])
@pytest.mark.parametrize("position", ["after_act", "before_norm"])
@settings(max_examples=12, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 12]),
    granularity=st.integers(1, 4),
    stride=st.sampled_from([1, 2]),
    masker=st.sampled_from([("mlp", 1), ("mlp", 2), ("conv_linear", 2)]),
    h=st.integers(3, 9),
    seed=st.integers(0, 2**16),
)
def test_block_skips_channels(mode, position, size, granularity, stride, masker, h, seed):
    torch.manual_seed(seed)
    kinds = dict(zip(("channel_masker", "channel_masker_layers"), masker))
    block = bottleneck(mode, position, size, granularity, stride, **kinds)
    x = torch.randn(3, 24, h, 7)
    with torch.no_grad():
        out = block(x)
        torch.testing.assert_close(out, reference(block, x), rtol=1e-4, atol=1e-4)
    activation = block.activation
    assert activation.mask_channel.shape == (3, 12 // size)
    assert (activation.mask is None) == (mode == "channel")
    assert activation.rate_channel.item() == pytest.approx(activation.mask_channel.mean().item())
    # Multiply-accumulates counted one by one: output channel, input channel, position, image.
    kept = activation.mask_channel.repeat_interleave(size, 1)
    rates = torch.ones(3)
    if mode == "both":
        with torch.no_grad():
            masks = [block._decide(x[n : n + 1])[0] for n in range(3)]
        rates = torch.stack([mask.mean() for mask in masks])
    pairs = torch.einsum("ni,no->nio", kept, kept).mean((1, 2))
    terms = {op.name: op.term for op in block.describe("", 0, (8, 8)).operators}
    torch.testing.assert_close(activation.share(terms["conv2"]), (rates * pairs).mean())
    torch.testing.assert_close(activation.share(terms["conv3"]), (rates * kept.mean(1)).mean())


@settings(max_examples=30, deadline=None)
@given(
    images=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4, 12]),
    seed=st.integers(0, 2**16),
)
def test_shares_count_every_product(images, groups, seed):
    torch.manual_seed(seed)
    channels = (torch.rand(images, 12) < 0.6).double()
    rate, dilated = torch.rand(2, images).double()
    same_group = torch.arange(12) // (12 // groups)
    pairs = (same_group[:, None] == same_group).double()
    computed = torch.einsum("ni,no,io->n", channels, channels, pairs) / pairs.sum()
    expected = torch.stack([dilated * channels.mean(1), rate * computed, rate * channels.mean(1)])
    one = torch.ones((), dtype=torch.float64)
    rates = {"position": rate, "position_dilated": dilated, **channel_rates(channels, groups)}
    gates = (
        ("channel_out", "position_dilated"),
        ("channel_in", "channel_out", "position"),
        ("channel_in", "position"),
    )
    activation = Activation(one, rates)
    shares = torch.stack([activation.share((gate, groups)) for gate in gates[1:2]])
    torch.testing.assert_close(shares, expected.mean(1)[1:2])
    shares = torch.stack([activation.share((gate, 1)) for gate in gates[::2]])
    torch.testing.assert_close(shares, expected.mean(1)[::2])


@pytest.mark.parametrize("kind", ["mlp", "mlp1", "conv_linear"])
@pytest.mark.parametrize("mode", ["channel", "both"])
def test_flops(mode, kind):
    torch.manual_seed(1)
    more = dict(mlp1=dict(channel_masker_layers=1), conv_linear=dict(channel_masker="conv_linear"))
    own = more.get(kind, {})
    kwargs = dict(mode=mode, granularity=2, channel_reduction=4, **own, **TWO_STAGES)
    net = undecided(LASResNet(50, **kwargs))
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64))
    activation = collect_activations(net)
    block = activation.shape.blocks[1]
    assert (block.c_in, block.width, block.channel_groups) == (32, 8, 4)
    pixels = 16 * 16
    spatial = 4 * 32 * 64 if mode == "both" else 0
    channel = dict(
        mlp=32 * pixels + 32 * 16 + 16 * 8,
        mlp1=32 * pixels + 32 * 8,
        conv_linear=8 * pixels + 32 * 8 + 8 * 8,
    )
    assert masker_macs(block, "released") == spatial + channel[kind]
    exact = masker_macs(block) - masker_macs(block, "released")
    spatial_too = 32 * pixels - 2 * 32 * 64 if mode == "both" else 0
    assert exact == spatial_too + (32 * 8 * (pixels - 1) if kind == "conv_linear" else 0)

    convs = [op for op in block.operators if op.name in ("conv1", "conv2", "conv3")]
    conv1, conv2, conv3 = (op.macs() for op in convs)
    r, dilated, rho = (
        values[1].item()
        for values in (activation.rates, activation.rates_dilated, activation.rates_channel)
    )
    released = flops_report(activation, counting="released").block_ratios[1].item()
    masker = spatial + channel[kind]
    work = conv1 * dilated * rho + conv2 * r * rho**2 + conv3 * r * rho + masker
    assert released == pytest.approx(work / (conv1 + conv2 + conv3 + masker), rel=1e-6)
    shares = [net.layer1[1].activation.share(op.term).item() for op in convs]
    work = sum(share * op.macs() for share, op in zip(shares, convs)) + masker_macs(block)
    ratio = flops_report(activation).block_ratios[1].item()
    assert ratio == pytest.approx(work / (conv1 + conv2 + conv3), rel=1e-6)


def test_images_of_a_batch_count_one_by_one():
    """What a batch costs is the mean of what its images cost alone."""
    torch.manual_seed(0)
    net = undecided(LASResNet(50, mode=["both", "channel", "layer", "both"], **SMALL))
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together = net(images)
        report = flops_report(collect_activations(net))
        alone = [
            (net(image[None]), flops_report(collect_activations(net)).dynamic) for image in images
        ]
    for level, out in enumerate(together):
        expected = torch.cat([outs[level] for outs, _ in alone])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert report.dynamic.item() == pytest.approx(torch.stack([f for _, f in alone]).mean().item())


MIXED = ["spatial", ["both", "channel", "layer", "static"], ["channel"] * 5 + ["layer"], "channel"]


def test_modes_per_stage_and_block():
    net = LASResNet(
        50,
        mode=MIXED,
        granularity=(4, [8, 4, 4, 2], 2, 1),
        channel_granularity=(1, 2, [2, 2, 4, 4, 8, 8], 16),
        channel_masker=["mlp", "mlp", "mlp", "conv_linear"],
        channel_position="before_norm",
        **SMALL,
    )
    assert [block.mode for block in net.layer2] == MIXED[1]
    assert [block.masker is None for block in net.layer2] == [False, True, False, True]
    assert [block.masker_channel is None for block in net.layer2] == [False, False, True, True]
    assert net.layer3[2].masker_channel.groups == 32 // 4
    assert net.layer4[0].masker_channel.kind == "conv_linear"
    shape = net.network_shape((64, 64))
    assert [b.label for b in shape.blocks[3:7]] == [
        "both S=8 G=2",
        "channel G=2",
        "layer",
        "static",
    ]
    assert shape.blocks[-1].channel_masker == "conv_linear"
    assert shape.blocks[-1].channel_hidden == 256 // 16
    assert "both-channel-layer-static S=8-4-4-2 G=2" in net.extra_repr()
    assert "mode=both, S=8, G=2, before_norm" in repr(net.layer2[0])
    assert len(net.maskers()) == 3 + 4 + 6 + 3
    flat = [mode for stage in MIXED for mode in (stage if isinstance(stage, list) else [stage] * 3)]
    again = LASResNet(50, mode=flat, **SMALL)
    assert [block.mode for block in again.blocks()] == [block.mode for block in net.blocks()]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(mode=["spatial"] * 3 + ["chanel"]), ["stage 4", "mode", "'chanel'"]),
        (dict(mode=["spatial", ["both"] * 3, "layer", "layer"]), ["mode of stage 2", "4 values"]),
        (dict(mode="channel", channel_granularity=3), ["stage 1", "divide the 8", "got 3"]),
        (dict(channel_granularity=0), ["channel_granularity", "0"]),
        (dict(channel_granularity=(2, 2)), ["channel_granularity", "one per stage"]),
        (dict(channel_masker="fc"), ["channel_masker", "mlp, conv_linear", "'fc'"]),
        (dict(channel_masker_layers=3), ["channel_masker_layers", "1 or 2", "3"]),
        (dict(channel_position="after"), ["channel_position", "after_act, before_norm", "'after'"]),
        (dict(channel_reduction=0.5), ["channel_reduction", "0.5"]),
        (dict(mode="both", channel_masker="conv_linear"), ["stage 1", "channel_reduction", "16"]),
    ],
)
def test_wrong_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError) as error:
        LASResNet(50, **{**SMALL, **kwargs})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("position", ["after_act", "before_norm"])
def test_static_checkpoint_starts_as_the_static_network(position):
    torch.manual_seed(0)
    static = ResNet(50, **SMALL)
    static.init_weights()
    static.eval()
    net = LASResNet(50, mode=["channel", "both"] * 2, channel_position=position, **SMALL)
    net.init_weights()
    missing, unexpected = net.load_state_dict(static.state_dict(), strict=False)
    assert not unexpected and missing and all(map(is_masker, missing))
    assert not any(map(is_masker, static.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(net.eval()(images), static(images)):
            torch.testing.assert_close(ours, theirs)
    assert collect_activations(net).rates_channel.min() == 1


def test_inference_equals_masked_dense():
    torch.manual_seed(0)
    net = undecided(LASResNet(50, mode=["channel", "both"], **TWO_STAGES))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outs = net(images)
        with masked_dense():
            expected = net(images)
    for ours, theirs in zip(outs, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_cp", [False, True])
def test_flops_train_every_masker(with_cp):
    torch.manual_seed(0)
    net = undecided(LASResNet(50, mode=["both", "channel"], with_cp=with_cp, **TWO_STAGES)).train()
    for masker in net.maskers():  # where no patch is left, channels cost nothing
        last = masker.last if isinstance(masker, ChannelMasker) else masker.conv
        nn.init.normal_(last.weight, std=0.01)
    outs = net(torch.randn(2, 3, 64, 64))
    activation = collect_activations(net)
    assert activation.masks_channel[0].requires_grad is False
    (flops_report(activation).ratio + 0 * outs[-1].sum()).backward()
    for masker in net.maskers():
        last = masker.last if isinstance(masker, ChannelMasker) else masker.conv
        assert last.weight.grad.isfinite().all() and last.weight.grad.abs().max() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_passes_strided_shortcuts(value):
    """A block without channels would step over it: the image computes all channels instead."""
    torch.manual_seed(0)
    net = undecided(LASResNet(50, mode="channel", base_channels=8, stem_channels=8)).eval()
    x = torch.randn(2, 3, 33, 50)
    x[0, 0, 5, 5] = value
    with torch.no_grad():
        (sparse,) = net(x)
        masks = [block.activation.mask_channel for block in net.blocks()]
        with masked_dense():
            (dense,) = net(x)
    assert not sparse[0].isfinite().all() and not dense[0].isfinite().all()
    assert sparse[1].isfinite().all()
    torch.testing.assert_close(sparse[1], dense[1], rtol=1e-4, atol=1e-4)
    assert min(mask[0].mean() for mask in masks[4:]) == 1  # where the NaN has got into the mean
    assert min(mask[1].mean() for mask in masks) < 1


def test_freezing_and_copies():
    frozen = dict(frozen_stages=1, norm_eval=True, freeze_maskers=False)
    net = LASResNet(50, mode="both", **frozen, **TWO_STAGES).train()
    for name, parameter in net.layer1.named_parameters():
        assert parameter.requires_grad == is_masker(name)
    assert net.layer1[0].masker_channel.training and not net.layer1[0].training
    net(torch.randn(1, 3, 64, 64))
    twin = copy.deepcopy(net)
    assert twin.layer1[0].activation is None
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(again(images), net.eval()(images)):
            torch.testing.assert_close(ours, theirs)


def test_latency_model_knows_channels():
    shape = LASResNet(50, mode="channel", **SMALL).network_shape((64, 64))
    half, whole = (
        block_report("v100", shape.blocks[1], rate_channel=rate).latency_s for rate in (0.5, 1.0)
    )
    assert 0 < half < whole
