"""What limits the blocks of a kernel that a multiprocessor of a GPU holds at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has.

    Attributes:
        warps: Resident at a time.
        blocks: Resident at a time.
        shared: KiB of shared memory.
        block_shared: KiB of it that one block may have, if its kernel opts in.
    """

    warps: int
    blocks: int
    shared: int
    block_shared: int


# CUDA programming guide, "Technical Specifications per Compute Capability"; the limits of blocks
# and the rules in `blocks_per_multiprocessor` also stand in the toolkit's cuda_occupancy.h.
LIMITS = {
    70: Limits(64, 32, 96, 96),
    72: Limits(64, 32, 96, 96),
    75: Limits(32, 16, 64, 64),
    80: Limits(64, 32, 164, 163),
    86: Limits(48, 16, 100, 99),
    87: Limits(48, 16, 164, 163),
    89: Limits(48, 24, 100, 99),
    90: Limits(64, 32, 228, 227),
    100: Limits(64, 32, 228, 227),
    103: Limits(64, 32, 228, 227),
    120: Limits(48, 24, 100, 99),
    121: Limits(48, 24, 100, 99),
}
REGISTERS = 65536  # of a multiprocessor
PARTITIONS = 4  # of a multiprocessor; each has a share of registers and warps
REGISTER_UNIT = 256  # registers are given to warps in multiples of this


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def shared_limit(architecture: int, shared: int) -> int:
    """Blocks that fit into shared memory, each with ``shared`` bytes."""
    limits = LIMITS[architecture]
    if shared > limits.block_shared * 1024:
        return 0
    recent = architecture >= 80
    each = round_up(shared + (1024 if recent else 0), 128 if recent else 256)
    return limits.shared * 1024 // each if each else limits.blocks


def blocks_per_multiprocessor(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time.

    Args:
        architecture: Compute capability times ten; a key of :data:`LIMITS`.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of shared memory of a block, static and dynamic.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    warp_registers = round_up(max(registers, 1) * 32, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // warp_registers * PARTITIONS // warps
    by_shared = shared_limit(architecture, shared)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)
