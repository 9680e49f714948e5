"""Whether weights still hold what packed forms were made from, also where torch cannot tell.

torch counts the writes to a tensor, but not those through ``parameter.data`` or a numpy view, and
none to a tensor made in inference mode. Their contents tell. Reading all of them takes a tenth as
long as a ResNet on one image of 224 x 224 pixels, so a *fingerprint* has two hashes: of samples
(small tensors whole, 16 evenly spaced pairs of values of others), which every dense update changes,
and of one of several parts, which take turns. One changed value always changes the hash over it.

Where there is no native kernel for that (a GPU), *samples* are gathered and compared instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from las_mm import compat
from las_mm.ops.library import LIBRARY

MANY_POSITIONS = (
    2048  # of a block's outputs, from which on reading all its weights costs less than 1 %
)
PARTS = 256
PREPARE_FIRST = (
    "weights have to be packed before torch.compile or torch.export: call "
    "las_mm.prepare(model.eval()) first"
)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

LIBRARY.define("fingerprint(Tensor[] tensors, int part, int parts) -> (int, int)")
LIBRARY.define(
    "unchanged(Tensor value, Tensor[] sources, Tensor expected, SymInt positions) -> Tensor"
)


def _fingerprint_reference(tensors: Sequence[Tensor], part: int, parts: int) -> tuple[int, int]:
    if parts < 1 or not 0 <= part < parts:
        raise ValueError(f"part must be from 0 to parts - 1, got {part} of {parts}")
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return int.from_bytes(digest.digest(), "little"), part


def _unchanged_reference(
    value: Tensor, sources: Sequence[Tensor], expected: Tensor, positions: int
) -> Tensor:
    if not torch.equal(torch.cat([sample_view(source) for source in sources]), expected):
        raise RuntimeError(
            "weights have changed since they were packed for torch.export, and the exported "
            "program does not follow: load them into the model, call las_mm.prepare(model) and "
            "export it again"
        )
    return value.clone()


LIBRARY.impl("fingerprint", _fingerprint_reference, "CompositeExplicitAutograd")
LIBRARY.impl("unchanged", _unchanged_reference, "CompositeExplicitAutograd")


@compat.register_fake("las_mm::fingerprint", lib=LIBRARY)
def _fingerprint_fake(tensors: Sequence[Tensor], part: int, parts: int) -> tuple[int, int]:
    # torch.compile takes packing apart where the error of a first frame sent it to Python.
    raise RuntimeError(PREPARE_FIRST)


@compat.register_fake("las_mm::unchanged", lib=LIBRARY)
def _unchanged_fake(
    value: Tensor, sources: Sequence[Tensor], expected: Tensor, positions: int
) -> Tensor:
    return torch.empty_like(value)


def fingerprint(tensors: Sequence[Tensor], part: int = 0, parts: int = 1) -> tuple[int, int]:
    """Hashes of the tensors' bytes in the order of memory, the same on every CPU.

    Args:
        tensors: Dense, all on one device.
        part: Which part of each large tensor to read.
        parts: How many there are; 1: everything is read.

    Returns:
        Hash of samples, hash of the part.

    Raises:
        ValueError: No such part.
    """
    return torch.ops.las_mm.fingerprint(tensors, part, parts)


def fingerprints(tensors: Sequence[Tensor], parts: int = PARTS) -> list[int]:
    """What later fingerprints are compared with: of samples, of everything, of each part."""
    samples, everything = fingerprint(tensors)
    return [samples, everything, *(fingerprint(tensors, i, parts)[1] for i in range(parts))]


def sample_view(tensor: Tensor) -> Tensor:
    """Up to 64 values, evenly spaced in memory, as integers of their bits: a view, not a copy.

    Args:
        tensor: Dense, in any memory format.
    """
    count = tensor.numel()
    step = count // 64 | 1  # odd: meets every column of a matrix in turn
    values = tensor.detach().as_strided((-(-count // step),), (step,))
    return values.view(_INTEGERS[tensor.element_size()])


def unchanged(value: Tensor, sources: Sequence[Tensor], expected: Tensor, positions: int) -> Tensor:
    """A copy of ``value`` if ``sources`` hold what ``expected`` says; for exported programs.

    Whatever uses the copy cannot run without the check.

    Args:
        value: Any tensor, best a small one.
        sources: As in :func:`fingerprint`.
        expected: Their :func:`fingerprints`, int64; on a GPU their samples, one after the other.
        positions: Of the outputs that ``sources`` are used for: the more, the more is read.

    Raises:
        RuntimeError: The sources have changed.
    """
    return torch.ops.las_mm.unchanged(value, sources, expected, positions)
