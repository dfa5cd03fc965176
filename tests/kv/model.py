"""The index of blocks in plain Python: slow, and short enough to be believed. The oracle of the tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash

Path = tuple[int, ...]
Holder = tuple[int, int]


def block_hashes(
    tokens: Sequence[int], block_size: int, lora: str | None = None, mm_hashes: Sequence[Sequence[int] | None] | None = None
) -> list[int]:
    """Block hashes as docs/kv-events.md defines them."""
    seed = 1337
    if lora is not None:
        seed = (seed + xxhash.xxh3_64_intdigest(lora.encode())) % 2**64
    out = []
    for i in range(len(tokens) // block_size):
        data = struct.pack(f"<{block_size}I", *tokens[i * block_size : (i + 1) * block_size])
        for value in sorted((mm_hashes[i] if mm_hashes is not None else None) or ()):
            data += struct.pack("<Q", value)
        out.append(xxhash.xxh3_64_intdigest(data, seed))
    return out


def sequence_hashes(hashes: Sequence[int]) -> list[int]:
    """Sequence hashes of blocks from the beginning."""
    out: list[int] = []
    for value in hashes:
        out.append(xxhash.xxh3_64_intdigest(struct.pack("<QQ", out[-1], value), 1337) if out else value)
    return out


class ModelTree:
    """Per holder, the path of every block id that it has."""

    def __init__(self) -> None:
        self.blocks: dict[Holder, dict[int, Path]] = {}

    def store(self, holder: Holder, parent_hash: int | None, blocks: Sequence[tuple[int, int]]) -> str:
        mine = self.blocks.setdefault(holder, {})
        path: Path = ()
        if parent_hash is not None:
            if parent_hash not in mine:
                return "unknown_parent"
            path = mine[parent_hash]
        for block_hash, tokens_hash in blocks:
            path = (*path, tokens_hash)
            mine[block_hash] = path
        return "stored"

    def remove(self, holder: Holder, ids: Sequence[int]) -> int:
        mine = self.blocks.get(holder, {})
        return sum(mine.pop(block, None) is not None for block in ids)

    def clear(self, holder: Holder) -> None:
        if holder in self.blocks:
            self.blocks[holder] = {}

    def remove_worker(self, worker_id: int) -> None:
        self.blocks = {holder: mine for holder, mine in self.blocks.items() if holder[0] != worker_id}

    def matches(self, hashes: Sequence[int]) -> dict[Holder, int]:
        out = {}
        for holder, mine in self.blocks.items():
            have = set(mine.values())
            depth = 0
            while depth < len(hashes) and tuple(hashes[: depth + 1]) in have:
                depth += 1
            if depth:
                out[holder] = depth
        return out

    def nodes(self) -> int:
        """Blocks somebody has, and those in front of them."""
        paths = {path for mine in self.blocks.values() for path in mine.values()}
        return len({path[:depth] for path in paths for depth in range(1, len(path) + 1)})
