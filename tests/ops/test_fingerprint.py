"""las_mm::fingerprint: no changed value goes unnoticed."""

import pytest
import torch

import needs
from las_mm import ops
from las_mm.ops import contents as module

needs_native = pytest.mark.skipif(not ops.has_fingerprint("cpu"), reason="NATIVE OPS NOT BUILT")
SIZES = [0, 1, 3, 7, 4096, 4097, 5000, 20001]


def values(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", SIZES)
def test_the_whole_shows_every_value(size, dtype):
    tensor = values(size).mul(50).to(dtype)
    before = ops.fingerprint([tensor])
    assert ops.fingerprint([tensor.clone()]) == before
    for index in {0, 1, size // 3, size // 2, size - 2, size - 1} & set(range(size)):
        changed = tensor.clone()
        changed[index] = changed[index] + 1
        assert ops.fingerprint([changed]) != before
        if dtype.is_floating_point and tensor[index] != 0:
            changed[index] = -tensor[index]  # one bit
            assert ops.fingerprint([changed]) != before


@needs_native
@pytest.mark.parametrize("parts", [2, 7, 256])
def test_parts_cover_everything_once(parts):
    tensor = values(10007)
    before = [ops.fingerprint([tensor], i, parts)[1] for i in range(parts)]
    for index in range(0, 10007, 331):
        changed = tensor.clone()
        changed[index] += 1
        after = [ops.fingerprint([changed], i, parts)[1] for i in range(parts)]
        assert sum(a != b for a, b in zip(after, before)) == 1


@needs_native
@pytest.mark.parametrize("change", [torch.neg, lambda t: t * 1.001, lambda t: t.roll(1)])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (256, 64, 1, 1), (512, 512, 3, 3)])
def test_samples_show_dense_changes(shape, change):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = ops.fingerprint([tensor], 0, ops.PARTS)
    changed = change(tensor.view(-1)).view(shape)
    assert ops.fingerprint([changed], 0, ops.PARTS)[0] != before[0]


@needs_native
def test_does_not_depend_on_threads_or_on_how_tensors_are_viewed():
    tensors = [values(70000).view(70, 1000), values(8), values(30000, 1)]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.fingerprints(tensors))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert ops.fingerprint([tensors[0][:, ::2]]) == ops.fingerprint([tensors[0][:, ::2].clone()])
    assert ops.fingerprint(tensors[:1]) != ops.fingerprint(tensors[1:2])


@needs_native
def test_memory_formats_are_read_in_place():
    plain = values(64 * 64 * 9).view(64, 64, 3, 3)
    last = plain.contiguous(memory_format=torch.channels_last)
    before = ops.fingerprint([last])
    last[5, 6, 1, 1] += 1
    assert ops.fingerprint([last]) != before


def test_reference_and_native_refuse_the_same_parts():
    for run in (ops.fingerprint, module._fingerprint_reference):
        for part, parts in ((-1, 2), (2, 2), (0, 0)):
            with pytest.raises(ValueError, match=f"got {part} of {parts}"):
                run([values(3)], part, parts)


@pytest.mark.parametrize("positions", [1, ops.MANY_POSITIONS])
@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_native), "samples"])
def test_unchanged(form, positions):
    sources, value = [values(9000).view(90, 100), values(10)], values(4)
    if form == "native":
        run, expected = ops.unchanged, torch.tensor(ops.fingerprints(sources))
    else:  # as on a GPU
        run = module._unchanged_reference
        expected = torch.cat([ops.sample_view(source) for source in sources])
    out = run(value, sources, expected, positions)
    assert torch.equal(out, value) and out.data_ptr() != value.data_ptr()
    for changed in ([-sources[0], sources[1]], [sources[0], sources[1] * 1.01]):
        with pytest.raises(RuntimeError, match="export it again"):
            run(value, changed, expected, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sample_view_reads_what_is_there_now(dtype, layout):
    tensor = values(64 * 32 * 9).view(64, 32, 3, 3).to(dtype, memory_format=layout)
    view = ops.sample_view(tensor)
    before = view.clone()
    assert len(view) in (64, 65) and torch.equal(view, ops.sample_view(tensor))
    tensor.mul_(1.5)
    assert (view != before).float().mean() > 0.9
    assert len(ops.sample_view(values(3))) == 3 and len(ops.sample_view(values(0))) == 0


@needs_native
def test_unchanged_draws_every_part():
    sources, value = [values(9000)], values(4)
    expected = torch.tensor(ops.fingerprints(sources, 4))
    sources[0][5000] += 1  # not sampled
    found = 0
    for _ in range(200):
        try:
            ops.unchanged(value, sources, expected, 1)
        except RuntimeError:
            found += 1
    assert 10 < found < 120  # one of four parts


@needs.OPCHECK
@needs_native
@needs.OPCHECK
def test_opcheck():
    sources = [values(9000)]
    expected = torch.tensor(ops.fingerprints(sources))
    torch.library.opcheck(torch.ops.las_mm.unchanged.default, (values(4), sources, expected, 1000))
