from collections.abc import Iterable, Sequence

from typing_extensions import Buffer

SEED: int

def xxh3(data: Buffer, seed: int = 0) -> int: ...
def lora_seed(name: str | None = None) -> int: ...
def compute_block_hashes(
    tokens: Iterable[int] | Buffer,
    block_size: int,
    lora: str | None = None,
    mm_hashes: Sequence[Iterable[int] | None] | None = None,
) -> list[int]: ...
def compute_sequence_hashes(
    tokens: Iterable[int] | Buffer,
    block_size: int,
    lora: str | None = None,
    mm_hashes: Sequence[Iterable[int] | None] | None = None,
) -> list[int]: ...
def sequence_hashes(block_hashes: Iterable[int] | Buffer, parent: int | None = None) -> list[int]: ...
