import pytest
import torch

from las_mm.models import LASResNet
from las_mm.models.released import convert_resnet, resnet_arguments

SPEC = dict(family="resnet", depth=50, width=0.125, mode="both")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("masker", ["mlp", "conv_linear"])
def test_released_names(prefix, masker):
    spec = dict(SPEC, channel_masker=masker, channel_reduction=4)
    net = LASResNet(**resnet_arguments(spec))
    released = {
        prefix + key.replace(".masker.", ".masker_spatial."): torch.rand_like(value.float())
        for key, value in net.state_dict().items()
    }
    weights = convert_resnet(released)
    assert net.load_state_dict(weights).missing_keys == []
    assert any("masker_channel" in key for key in weights)


def test_first_paper_called_its_masker_otherwise():
    value = torch.zeros(2)
    weights = convert_resnet({"layer1.0.masker.conv2.bias": value, "layer1.0.conv2.weight": value})
    assert sorted(weights) == ["layer1.0.conv2.weight", "layer1.0.masker.conv.bias"]


def test_arguments_of_a_specification():
    arguments = resnet_arguments(
        dict(
            SPEC,
            source="LAUDNet",
            num_classes=10,
            granularity=[8, 4, 7, 1],
            channel_granularity=[1, 1, 1, 1],
            channel_masker=["MLP"] * 3 + ["conv_linear"],
            channel_masker_layers=1,
            channel_reduction=8,
            channel_mask_position="after_act",
        )
    )
    assert arguments == dict(
        depth=50,
        stem_channels=8,
        base_channels=8,
        mode="both",
        granularity=[8, 4, 7, 1],
        channel_granularity=[1, 1, 1, 1],
        channel_masker=["mlp"] * 3 + ["conv_linear"],
        channel_masker_layers=1,
        channel_reduction=8,
        channel_position="after_act",
    )
    assert resnet_arguments({**SPEC, "granularity": None}) == resnet_arguments(SPEC)
    assert resnet_arguments(SPEC)["channel_position"] == "before_norm"


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(family="vgg", depth=16, mode="layer"), "family .* must be 'resnet', got 'vgg'"),
        (dict(family="resnet", mode="layer"), "must name its depth"),
        (dict(family="resnet", depth=50), "must name its mode"),
    ],
)
def test_wrong_specifications(spec, message):
    with pytest.raises(ValueError, match=message):
        resnet_arguments(spec)
