"""Long runs and many threads: no leak, no state shared between calls."""

import threading

import pytest
import torch

from las_mm import ops

from . import cases

MEBIBYTE = 2**20
FORWARDS, WARM_UP = 10_000, 1_000


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def small_blocks():
    """Blocks of different geometry, mask and code path."""
    b = cases.Block
    bf16 = torch.bfloat16
    return [
        b(1, (6, 5), (8, 4, 8), 2, winograd="both"),
        b(2, (5, 7), (8, 4, 8), 1, mask_kind="0.1", dtype=bf16, layout="channels_last"),
        b(1, (8, 8), (4, 8, 8), 4, mask_kind="single", strides=(1, 2), downsample=True),
        b(1, (4, 4), (8, 8, 8), 3, mask_kind="full", groups=2),
        b(1, (5, 4), (8, 4, 8), 2, mask_kind="empty", dilation=2),
    ]


def call_of(block):
    x, arguments = block.x, block.arguments
    return lambda: torch.ops.las_mm.sparse_bottleneck(x, *arguments)


@pytest.mark.skipif(cases.SANITIZED, reason="ASan keeps freed memory")
def test_memory_stays_flat():
    calls = [call_of(block) for block in small_blocks()]
    for i in range(FORWARDS + WARM_UP):
        if i == WARM_UP:
            before = resident_bytes()
        calls[i % len(calls)]()
    grown = resident_bytes() - before
    assert grown < 2 * MEBIBYTE, f"{FORWARDS} forwards grew by {grown / MEBIBYTE:.1f} MiB"


@pytest.mark.skipif(cases.SANITIZED, reason="ASan keeps freed memory")
def test_errors_do_not_leak():
    block = small_blocks()[0]
    x, (mask, *rest) = block.x, block.arguments
    mask = torch.full(mask.shape, torch.nan)
    for i in range(2_200):
        if i == 200:
            before = resident_bytes()
        with pytest.raises(ValueError):
            torch.ops.las_mm.sparse_bottleneck(x, mask, *rest)
    assert resident_bytes() - before < 2 * MEBIBYTE


def in_threads(*functions):
    """Run the functions at the same time; raise what they raise."""
    errors, barrier = [], threading.Barrier(len(functions))

    def guarded(function):
        try:
            barrier.wait(60)
            function()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("number", [1, 2])
def test_python_threads_do_not_disturb_each_other(number):
    big = [
        cases.Block(2, (14, 13), (40, 72, 40), 3, winograd="both", threads=number),
        cases.Block(1, (17, 9), (24, 24, 24), 4, dtype=torch.bfloat16, layout="channels_last"),
    ]
    pairs = [big, small_blocks()[:2]]
    for pair in pairs:
        calls = [call_of(block) for block in pair]
        with cases.threads(number):
            alone = [call() for call in calls]

            def repeat(call, expected):
                for _ in range(max(3, int(200 * min(1, cases.SCALE)))):
                    assert torch.equal(call(), expected)

            in_threads(*[lambda c=c, e=e: repeat(c, e) for c, e in zip(calls, alone)])


def test_in_place_in_threads():
    block = cases.Block(1, (13, 12), (24, 16, 24), 3)
    x, arguments = block.x.abs(), block.arguments
    expected = x.clone()
    torch.ops.las_mm.sparse_bottleneck_(expected, *arguments)

    def repeat():
        for _ in range(100):
            copy = x.clone()
            torch.ops.las_mm.sparse_bottleneck_(copy, *arguments)
            assert torch.equal(copy, expected)

    in_threads(repeat, repeat)


def test_number_of_threads_changes_between_calls():
    block = cases.Block(3, (24, 23), (40, 40, 40), 2, winograd="both")
    expected, scale = block.expected(block.x)
    call, results = call_of(block), []
    for number in (1, 2, 4, 1, 3):
        with cases.threads(number):
            in_threads(lambda: results.append(call()))
            results.append(call())
            halo, _ = ops.dilate_mask(block.mask, 2, block.size)
            assert halo.shape[0] == 3
    for result in results:
        cases.assert_close(result, expected, scale, torch.float32)
