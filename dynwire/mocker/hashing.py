"""Hashes of KV cache blocks (REQUEST_PLANES §4). The only place of the simulated engine that knows where they come from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

SEED = 1337

_digest = xxhash.xxh3_64_intdigest


def block_hash(tokens: array[int]) -> int:
    """XXH3-64 of the token ids of one block, u32 little-endian each (``array("I")`` on the machines that dynwire runs on)."""
    return _digest(tokens.tobytes(), SEED)


def sequence_hash(parent: int | None, block: int) -> int:
    """Hash of a block and all blocks before it; ``parent`` is that of the block before, None for the first block."""
    if parent is None:
        return block
    return _digest(parent.to_bytes(8, "little") + block.to_bytes(8, "little"), SEED)


def block_hashes(tokens: array[int], block_size: int) -> list[int]:
    """The hash of every full block."""
    raw, width = tokens.tobytes(), 4 * block_size
    return [_digest(raw[at : at + width], SEED) for at in range(0, len(raw) // width * width, width)]


def sequence_hashes(blocks: Sequence[int]) -> list[int]:
    hashes: list[int] = []
    parent = None
    for block in blocks:
        parent = sequence_hash(parent, block)
        hashes.append(parent)
    return hashes
