"""Packed weights follow what they were made from, however it is written, or the call raises."""

import copy
import logging

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import las_mm
import needs
from las_mm import compat, ops
from las_mm.models import LASResNet, plan, sparse

pytestmark = pytest.mark.skipif(
    not ops.has_kernels("cpu"),
    reason="NATIVE OPS NOT BUILT: run `pip install -e . --no-build-isolation`",
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    class Fixed:
        def lookup(self, kind, device_type="cpu"):
            return plan.Choice(winograd=kind.tiled)

    monkeypatch.setattr("las_mm.models.plan.current_plan", Fixed)


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    options = dict(base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3))
    net = LASResNet(50, **{**options, **kwargs})
    for masker in net.maskers():
        nn.init.normal_(masker.conv.weight, std=0.5)
        nn.init.constant_(masker.conv.bias, 1.0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return net.eval()


def images(height, width):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs(net, x):
    with torch.no_grad():
        return torch.cat([out.flatten() for out in net(x)])


def dense_outputs(net, x):
    with sparse.masked_dense():
        return outputs(net, x)


def distance(outs, want):
    return ((outs - want).abs().max() / want.abs().max()).item()


def error(net, x):
    return distance(outputs(net, x), dense_outputs(net, x))


# Written where torch does not count --------------------------------------------------------------


def from_vector(net):
    other = parameters_to_vector(make(seed=5).parameters()).detach()
    vector_to_parameters(other, net.parameters())


def through_data(net):
    for parameter, other in zip(net.parameters(), make(seed=5).parameters()):
        parameter.data.copy_(other)


def scaled_data(net):
    for parameter in net.parameters():
        parameter.data.mul_(1 + 1e-3)


def swapped_data(net):
    """EMAHook before and after a validation."""
    for parameter, other in zip(net.parameters(), make(seed=5).parameters()):
        kept = parameter.data.clone()
        parameter.data.copy_(other.data)
        other.data.copy_(kept)


def new_data(net):
    for parameter, other in zip(net.parameters(), make(seed=5).parameters()):
        parameter.data = other.data


def statistics(net):
    for buffer in net.buffers():
        buffer.data.mul_(2)


def through_numpy(net):
    net.layer4[1].conv2.weight.detach().numpy()[:] *= -2


def one_filter_of_a_small_layer(net):
    net.layer1[0].conv1.weight.data[3].zero_()


@pytest.mark.parametrize(
    "write",
    [
        from_vector,
        through_data,
        scaled_data,
        swapped_data,
        new_data,
        statistics,
        through_numpy,
        one_filter_of_a_small_layer,
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (500, 800)], ids=["few positions", "many"])
def test_uncounted_writes_are_noticed_at_once(write, size):
    net, x = las_mm.prepare(make()), images(*size)
    before = outputs(net, x)
    write(net)
    assert distance(dense_outputs(net, x), before) > 1e-3
    assert error(net, x) < 1e-4


@pytest.fixture
def like_a_gpu(monkeypatch):
    """No native fingerprint, as on a GPU; returns how often contents were waited for."""
    waits = []
    equal = torch.equal
    monkeypatch.setattr(ops, "has_fingerprint", lambda device: False)
    monkeypatch.setattr(
        "las_mm.models.snapshot.torch.equal", lambda *args: (waits.append(args), equal(*args))[1]
    )
    return waits


@pytest.mark.parametrize(
    "write", [from_vector, through_data, scaled_data, swapped_data, new_data, through_numpy]
)
def test_without_the_native_fingerprint_dense_writes_are_noticed(like_a_gpu, write):
    net, x = las_mm.prepare(make()), images(64, 64)
    before = outputs(net, x)
    write(net)
    assert distance(dense_outputs(net, x), before) > 1e-3
    assert error(net, x) < 1e-4


def test_without_the_native_fingerprint_a_forward_waits_once(like_a_gpu):
    net, x = las_mm.prepare(make()), images(64, 64)
    packed = [block._executor for block in net.blocks()]
    like_a_gpu.clear()
    outputs(net, x)
    assert len(like_a_gpu) == 1
    assert all(block._executor is fast for block, fast in zip(net.blocks(), packed))
    with torch.no_grad():  # a block alone compares its own
        net.layer1[0].conv1.weight.data.neg_()
        features = torch.randn(1, 8, 16, 16)
        out = net.layer1[0](features)
        with sparse.masked_dense():
            assert distance(out, net.layer1[0](features)) < 1e-4


def test_without_the_native_fingerprint_statistics_take_turns(like_a_gpu):
    net, x = las_mm.prepare(make()), images(64, 64)
    outputs(net, x)
    net.layer3[2].norm2.running_mean.data.add_(1)
    for _ in range(17):
        outputs(net, x)
    assert error(net, x) < 1e-4
    net.layer4[1].norm2.running_mean.data.add_(1)
    las_mm.prepare(net)  # compares everything
    assert error(net, x) < 1e-4


def test_moving_average_that_is_evaluated_in_between():
    """mmengine's AveragedModel stays in eval mode and writes through .data."""
    source = make(seed=5)
    average, x = ExponentialMovingAverage(make(), momentum=0.5).eval(), images(64, 64)
    average.update_parameters(source)  # the first one copies
    for _ in range(2):
        outputs(average.module, x)
        for parameter in source.parameters():
            parameter.data.add_(0.01)
        average.update_parameters(source)
        assert error(average.module, x) < 1e-4


@pytest.mark.parametrize("mode", ["static", "channel", "both"])
def test_every_mode_follows(mode):
    torch.manual_seed(0)
    net, x = LASResNet(50, mode=mode, base_channels=8, stem_channels=8).eval(), images(64, 64)
    outputs(net, x)
    for parameter in net.parameters():
        parameter.data.mul_(1.1)
    assert error(net, x) < 1e-4


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        net, other = make(), make(seed=5)
        x = images(64, 64)
        outputs(net, x)
        for parameter, value in zip(net.parameters(), other.parameters()):
            parameter.copy_(value)
        assert error(net, x) < 1e-4


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(
        "las_mm.models.snapshot.print_log",
        lambda text, logger, level: lines.append((level, text)),
    )
    return lines


def one_value(net):
    """Of a large tensor, none that is sampled."""
    net.layer2[1].conv2.weight.data.view(-1)[1000] += 1000


def test_one_value_is_noticed_at_once_where_there_are_many_positions(logged):
    net, x = las_mm.prepare(make()), images(384, 384)
    outputs(net, x)
    one_value(net)
    assert error(net, x) < 1e-4
    assert not logged


def test_one_value_is_noticed_in_turn_where_there_are_few(logged):
    net, x = las_mm.prepare(make()), images(40, 40)
    with torch.no_grad():
        one_value(net)
        for _ in range(ops.PARTS):
            net(x)
    assert error(net, x) < 1e-4
    assert len(logged) == 1 and logged[0][0] == logging.WARNING
    assert "call las_mm.prepare(model)" in logged[0][1]


def test_prepare_compares_everything(logged):
    net = las_mm.prepare(make())
    one_value(net)
    las_mm.prepare(net)
    assert error(net, images(40, 40)) < 1e-4
    assert not logged


def test_nothing_is_packed_twice_without_a_reason():
    net, x = las_mm.prepare(make()), images(64, 64)
    packed = [block._executor for block in net.blocks()]
    for _ in range(3):
        outputs(net, x)
    las_mm.prepare(net)
    assert all(block._executor is fast for block, fast in zip(net.blocks(), packed))


# torch.compile and torch.export ------------------------------------------------------------------

TINY = dict(base_channels=4, stem_channels=4, num_stages=1, out_indices=(0,), strides=(1,))
TINY["dilations"] = (1,)
CHANGED = r"have changed since they were packed.*las_mm\.prepare\(model\)"


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load_other(net):
    net.load_state_dict(make(seed=5, **TINY).state_dict())


def optimizer_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    with torch.enable_grad():
        net.requires_grad_().forward(images(32, 32))[0].square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def double_data(net):
    net.layer1[1].conv2.weight.data.mul_(2)


def replaced_parameter(net):
    net.layer1[1].conv2.weight = nn.Parameter(net.layer1[1].conv2.weight.detach() * 2)


def replaced_module(net):
    net.layer1[1].conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)


def stem_only(net):
    net.norm1.bias.data.add_(1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_network_follows_or_raises(dynamo, backend):
    net, x = las_mm.prepare(make(**TINY)), images(32, 32)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    before = outputs(compiled, x)
    torch.testing.assert_close(before, dense_outputs(net, x))
    for change in (
        load_other,
        optimizer_step,
        double_data,
        replaced_parameter,
        replaced_module,
        stem_only,
    ):
        change(net)
        with pytest.raises(RuntimeError, match=CHANGED):
            outputs(compiled, x)
        las_mm.prepare(net)
        if not compat.COMPILE_SEES_MODULES:
            try:  # it compiles anew, or says that one has to
                outputs(compiled, x)
            except RuntimeError as error:
                assert "and torch.compile again" in str(error)
                torch._dynamo.reset()
                compiled = torch.compile(net, backend=backend, fullgraph=True)
        torch.testing.assert_close(outputs(compiled, x), dense_outputs(net, x))


@needs.ONE_COMPILATION
def test_a_new_preparation_compiles_nothing_anew(dynamo):
    net, x, compilations = las_mm.prepare(make(**TINY)), images(32, 32), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for seed in range(3):
        outputs(compiled, x)
        net.load_state_dict(make(seed=seed, **TINY).state_dict())
        las_mm.prepare(net)
    net.train()
    las_mm.prepare(net.eval())
    torch.testing.assert_close(outputs(compiled, x), dense_outputs(net, x))
    assert len(compilations) == 1


def test_copies_are_watched_on_their_own(dynamo):
    net, x = las_mm.prepare(make(**TINY)), images(32, 32)
    twin = las_mm.prepare(copy.deepcopy(net))
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    outputs(compiled, x)
    load_other(net)
    torch.testing.assert_close(outputs(compiled, x), dense_outputs(twin, x))
    load_other(twin)
    with pytest.raises(RuntimeError, match=CHANGED):
        outputs(compiled, x)


@needs.EXPORT
@pytest.mark.parametrize("strict", [False, True])
def test_exported_program_raises_with_other_weights(dynamo, strict):
    net, x = las_mm.prepare(make(**TINY)), images(32, 32)
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=strict)
    module = program.module()
    torch.testing.assert_close(outputs(module, x), dense_outputs(net, x))
    own = {key: value.clone() for key, value in net.state_dict().items()}
    for change in (make(seed=5, **TINY).state_dict(), {"conv1.weight": own["conv1.weight"] * 2}):
        module.load_state_dict({**own, **change}, strict=False)
        with pytest.raises(RuntimeError, match="packed for torch.export.*export it again"):
            outputs(module, x)
    module.load_state_dict(own, strict=False)
    torch.testing.assert_close(outputs(module, x), dense_outputs(net, x))
