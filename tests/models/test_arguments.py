"""What a config of another backbone may leave in, and what it may not."""

import pytest
import torch

from las_mm import preflight
from las_mm.models import LASDenseNet, LASRegNet, LASResNet
from las_mm.models.arguments import dilations_of_blocks

SMALL = dict(base_channels=4, stem_channels=4)

NOTHING = dict(
    pretrained=None,
    dcn=None,
    stage_with_dcn=(False, True, True, True),  # without dcn, as in mmdet
    plugins=[],
    gcb=None,
    stage_with_gcb=(False,) * 4,
    gen_attention=None,
    stage_with_gen_attention=((), (), (), ()),
    sac=None,
    groups=1,
    base_width=4,
    contract_dilation=False,
    multi_grid=None,
)


@pytest.fixture(autouse=True)
def scope():
    yield
    preflight.reset_scope()


def test_what_asks_for_nothing_is_taken():
    net = LASResNet(50, **SMALL, **NOTHING)
    plain = LASResNet(50, **SMALL)
    assert str(net) == str(plain)
    assert LASRegNet("regnetx_400mf", **NOTHING).conv1.in_channels == 3
    assert LASResNet(50, base_channels=8, stem_channels=None).conv1.out_channels == 8


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (dict(pretrained="torchvision://resnet50"), "init_cfg=dict(type='Pretrained', checkpoint="),
        (dict(dcn=dict(type="DCNv2")), "no deformable convolutions"),
        (dict(dcn=dict(type="DCN"), stage_with_dcn=(False, True, True, True)), "deformable"),
        (dict(plugins=[dict(cfg=dict(type="ContextBlock"))]), "no modules between"),
        (dict(gen_attention=dict(num_heads=8)), "no modules between"),
        (dict(gcb=dict(ratio=0.25)), "no modules between"),
        (dict(groups=32, base_width=4), "las_mm.LASRegNet"),
    ],
)
@pytest.mark.parametrize("backbone", [LASResNet, LASRegNet])
def test_what_a_dynamic_backbone_has_not(backbone, argument, words):
    first = 50 if backbone is LASResNet else "regnetx_400mf"
    with pytest.raises(ValueError) as error:
        backbone(first, **argument)
    (name, value), *_ = argument.items()
    assert str(error.value).startswith(f"{name}={value!r} is no argument of {backbone.__name__}: ")
    assert words in str(error.value)


def test_a_misspelt_argument_names_the_users_class():
    class Mine(LASResNet):
        def __init__(self, sharpness=1, **kwargs):
            super().__init__(50, **SMALL, **kwargs)

    for cls, wrong, close in (
        (Mine, "granularty", "granularity"),
        (Mine, "sharpnes", "sharpness"),
        (Mine, "norm_evl", "norm_eval"),
        (LASRegNet, "se_pol", "se_pool"),
        (LASRegNet, "stemchannels", "stem_channels"),
    ):
        first = ["regnetx_400mf"] if cls is LASRegNet else []
        with pytest.raises(TypeError) as error:
            cls(*first, **{wrong: 1})
        assert str(error.value).startswith(f"{cls.__name__} has no argument {wrong!r}; did you me")
        assert close in str(error.value)
    with pytest.raises(TypeError, match="LASResNet has no argument 'xyzzy'; it has depth, mode, "):
        LASResNet(50, xyzzy=1)


def test_preflight_says_it_in_one_sentence():
    from mmengine.config import Config

    cfg = Config(dict(model=dict(type="las_mm.LASResNet", depth=50, granularty=4)))
    with pytest.raises(preflight.UserError) as error:
        preflight.build_model(cfg)
    expected = "LASResNet has no argument 'granularty'; did you mean granularity"
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(freeze_maskers="no"), "freeze_maskers must be True or False, got 'no'"),
        (dict(norm_eval="false"), "norm_eval must be True or False, got 'false'"),
        (dict(with_cp=1), "with_cp must be True or False, got 1"),
        (dict(style="tensorflow"), "style must be 'pytorch' or 'caffe', got 'tensorflow'"),
        (dict(strides=(1, 2, 2)), r"strides needs 4 values .* got \(1, 2, 2\)"),
        (dict(dilations=(1, 1, 2)), r"dilations needs 4 values .* got \(1, 1, 2\)"),
        (dict(num_stages=3), r"strides needs 3 values .* got \(1, 2, 2, 2\)"),
        (
            dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1)),
            "out_indices must name stages 0 to 2, got 3",
        ),
        (dict(num_stages=5), "num_stages must be 1 to 4, got 5"),
        (dict(contract_dilation=1), "contract_dilation must be True or False, got 1"),
        (dict(out_indices=3), r"out_indices must be a tuple of stages, such as \(3,\), got 3"),
        (dict(out_indices=()), r"out_indices must be a tuple of stages.* got \(\)"),
        (dict(out_indices=(0.5,)), "out_indices must name stages 0 to 3, got 0.5"),
        (dict(frozen_stages="1"), "frozen_stages must be an integer, -1 for none, got '1'"),
        (dict(frozen_stages=5), "frozen_stages must be -1 to 4, got 5"),
        (dict(base_channels=0), "base_channels must be a positive integer, got 0"),
        (dict(in_channels="3"), "in_channels must be a positive integer, got '3'"),
        (dict(stem_channels=-4), "stem_channels must be a positive integer, got -4"),
        (dict(dilations=(1, 1, 1, 0)), "dilations must be positive integers, one per stage"),
        (dict(strides=2), "strides must be positive integers, one per stage, got 2"),
        (dict(drop_path_rate=2.0), "drop_path_rate must be a number from 0 to 1, got 2.0"),
        (dict(norm_cfg=None), r"norm_cfg must be a dict with a type, such as dict\(type='BN'\)"),
        (dict(conv_cfg=5), "conv_cfg must be None or a dict, got 5"),
        (dict(multi_grid=(1, 2)), r"multi_grid needs 3 positive integers .* got \(1, 2\)"),
        (dict(multi_grid=(1, 0, 2)), "multi_grid needs 3 positive integers"),
        (
            dict(mode="channel", channel_masker="conv_linear", channel_masker_layers=1),
            "channel_masker_layers=1 has no effect on a 'conv_linear' masker",
        ),
    ],
)
def test_wrong_values(argument, message):
    with pytest.raises(ValueError, match=message):
        LASResNet(50, **{**SMALL, **argument})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(arch="120"), "arch of LASDenseNet must be one of 121, .* got '120'"),
        (
            dict(arch=dict(depths=[2])),
            "arch of LASDenseNet must be a name or a dict of growth_rate",
        ),
        (
            dict(arch=dict(growth_rate=0, depths=[2, 2], init_channels=4)),
            "growth_rate, depths .a list. and init_channels, positive integers",
        ),
        (dict(out_indices=(7,)), "out_indices must name stages 0 to 3, got 7"),
        (dict(out_indices=-5), "out_indices must name stages 0 to 3, got -1"),
        (dict(frozen_stages=9), "frozen_stages must be -1 to 4, got 9"),
        (dict(bn_size=0), "bn_size must be a positive integer, got 0"),
        (dict(drop_rate=2), "drop_rate must be a number from 0 to 1, got 2"),
        (dict(act_cfg=None), r"act_cfg must be a dict with a type, such as dict\(type='ReLU'\)"),
    ],
)
def test_wrong_values_of_a_densenet(argument, message):
    with pytest.raises(ValueError, match=message):
        LASDenseNet(**argument)


def test_stages_counted_from_the_last():
    arch = dict(growth_rate=8, depths=[1, 2], init_channels=8)
    assert list(LASDenseNet(arch, out_indices=(0, -1)).out_indices) == [0, 1]
    assert list(LASDenseNet(arch, out_indices=-1).out_indices) == [1]


def test_options_without_effect_on_a_regnet():
    with pytest.raises(ValueError, match="se_pool='all' has no effect on regnetx_400mf, which has"):
        LASRegNet("regnetx_400mf", se_pool="all")
    with pytest.raises(ValueError, match="deep_stem is of a ResNet"):
        LASRegNet("regnetx_400mf", deep_stem=True)
    with pytest.raises(ValueError, match="contract_dilation=True is no argument of LASRegNet"):
        LASRegNet("regnetx_400mf", contract_dilation=True)
    with pytest.raises(ValueError, match="freeze_maskers must be True or False, got 'no'"):
        LASRegNet("regnetx_400mf", freeze_maskers="no")


def test_dilations_of_segmentation_networks():
    """mmseg's PSPNet and DeepLabV3: output stride 8, first dilation contracted, multi-grid."""
    common = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), avg_down=True, **SMALL)
    net = LASResNet(50, contract_dilation=True, **common).eval()
    assert [b.dilation for b in net.layer3] == [1] + [2] * 5
    assert [b.conv2.dilation[0] for b in net.layer4] == [2, 4, 4]
    grid = LASResNet(50, multi_grid=(1, 2, 4), out_indices=(2, 3), **common)
    assert [b.dilation for b in grid.layer3] == [2] * 6
    assert [b.dilation for b in grid.layer4] == [1, 2, 4]
    with torch.no_grad():
        (out,) = net(torch.rand(1, 3, 64, 64))
    assert out.shape[2:] == (8, 8)
    shapes = net.network_shape((64, 64)).stages()[4]
    assert [shape.dilation for shape in shapes] == [2, 4, 4]
    assert dilations_of_blocks(2, 1, True, None) == [1, 1]


def test_contracted_dilation_runs_the_same_on_both_paths():
    from las_mm.models.sparse import masked_dense

    torch.manual_seed(0)
    net = LASResNet(
        50, contract_dilation=True, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), **SMALL
    ).eval()
    for masker in net.maskers():
        torch.nn.init.normal_(masker.conv.weight, std=2)
        torch.nn.init.zeros_(masker.conv.bias)
    x = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        (sparse,) = net(x)
        with masked_dense():
            (dense,) = net(x)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
