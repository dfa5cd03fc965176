"""Translation of vLLM's cache events, in vLLM's bytes but without vLLM."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec
import pytest

from dynwire.kv_router import RadixTree, compute_block_hashes
from dynwire.vllm.events import HOST, EventSocket, Translator, as_u64
from dynwire.wire.kv_events import cleared, removed, stored

BLOCK_SIZE = 4
TOKENS = list(range(100, 112))
BLOCKS = compute_block_hashes(TOKENS, BLOCK_SIZE)
DIGESTS = [hashlib.sha256(bytes([n])).digest() for n in range(3)]


class Recorder:
    """In the place of a `KvEventPublisher`: keeps the calls, and the tree that they build."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.tree = RadixTree()

    def _apply(self, event: Any) -> None:
        self.tree.apply_event(1, event)

    def publish_stored(self, parent: int | None, blocks: list[int], tokens: list[int], dp_rank: int = 0) -> None:
        self.calls.append(("stored", parent, blocks, tokens, dp_rank))
        self._apply(stored(len(self.calls), parent, list(zip(blocks, tokens, strict=True)), dp_rank))

    def publish_removed(self, blocks: list[int], dp_rank: int = 0) -> None:
        self.calls.append(("removed", blocks, dp_rank))
        self._apply(removed(len(self.calls), blocks, dp_rank))

    def publish_cleared(self, dp_rank: int = 0) -> None:
        self.calls.append(("cleared", dp_rank))
        self._apply(cleared(len(self.calls), dp_rank))


class Engine:
    """Speaks as vLLM's publisher does."""

    def __init__(self, **options: Any) -> None:
        self.recorder = Recorder()
        self.translator = Translator(self.recorder, BLOCK_SIZE)  # type: ignore[arg-type]
        self.sequence = 0

    def publish(self, *events: dict[str, Any], rank: int | None = 0) -> list[tuple[Any, ...]]:
        before = len(self.recorder.calls)
        payload = msgspec.msgpack.encode([12.5, list(events), rank])
        self.translator.on_message([b"", self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1
        return self.recorder.calls[before:]


def block_stored(hashes: list[Any], tokens: list[int], parent: Any = None, **fields: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens}
    usual = {"block_size": BLOCK_SIZE, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0}
    return event | usual | {"kv_cache_spec_kind": "full_attention"} | fields


def block_removed(hashes: list[Any], **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0} | fields


def test_stored_removed_and_cleared() -> None:
    engine = Engine()
    assert engine.publish(block_stored([7, 8], TOKENS[:8])) == [("stored", None, [7, 8], BLOCKS[:2], 0)]
    assert engine.publish(block_stored([9], TOKENS[8:], parent=8)) == [("stored", 8, [9], BLOCKS[2:], 0)]
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 3}
    assert engine.publish(block_removed([9])) == [("removed", [9], 0)]
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 2}
    assert engine.publish({"type": "AllBlocksCleared"}) == [("cleared", 0)]
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {}
    assert (engine.translator.skipped, engine.translator.malformed, engine.translator.lost) == (0, 0, 0)


def test_digests_and_integers_name_the_same_block() -> None:
    engine = Engine()
    short = [int.from_bytes(digest, "big") & (2**64 - 1) for digest in DIGESTS]  # vLLM's own reduction
    assert [as_u64(digest) for digest in DIGESTS] == short
    engine.publish(block_stored(DIGESTS[:2], TOKENS[:8]))
    engine.publish(block_stored([short[2]], TOKENS[8:], parent=DIGESTS[1]))
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 3}
    engine.publish(block_removed([short[1]]), block_removed([DIGESTS[2]]))
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 1}


def test_ranks_are_kept_apart() -> None:
    engine = Engine()
    engine.publish(block_stored([7], TOKENS[:4]), rank=0)
    engine.sequence = 0
    engine.publish(block_stored([7], TOKENS[:4]), rank=1)
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 1, (1, 1): 1} and engine.translator.lost == 0


def test_an_adapter_has_blocks_of_its_own() -> None:
    engine = Engine()
    engine.publish(block_stored([7], TOKENS[:4], lora_name="french", extra_keys=[["french"]]))
    assert engine.recorder.calls == [("stored", None, [7], compute_block_hashes(TOKENS[:4], BLOCK_SIZE, "french"), 0)]


def test_blocks_of_more_than_tokens_and_what_follows_them_are_left_out() -> None:
    engine = Engine()
    keys = [None, [["image-1", 0]], None]
    assert engine.publish(block_stored([7, 8, 9], TOKENS, extra_keys=keys)) == [("stored", None, [7], BLOCKS[:1], 0)]
    assert engine.publish(block_stored([7], TOKENS[:4], extra_keys=[["salt"]])) == []
    assert engine.translator.skipped == 2


@pytest.mark.parametrize(
    "event",
    [
        block_stored([7], TOKENS[:4], medium="CPU"),
        block_stored([7], TOKENS[:4], kv_cache_spec_kind="sliding_window"),
        block_stored([7], TOKENS[:2], block_size=2),
        block_stored([7], TOKENS[:8]),
        block_removed([7], medium="CPU"),
    ],
    ids=["offloaded", "window", "partial", "holes", "offloaded removal"],
)
def test_what_says_nothing_of_prefixes_on_the_device(event: dict[str, Any]) -> None:
    engine = Engine()
    assert engine.publish(event) == [] and engine.translator.skipped == 1


def test_one_group_of_several_is_followed() -> None:
    engine = Engine()
    engine.publish(block_stored([5], TOKENS[:4], group_idx=0, kv_cache_spec_kind="sliding_window"))
    assert engine.publish(block_stored([7], TOKENS[:4], group_idx=1)) == [("stored", None, [7], BLOCKS[:1], 0)]
    assert engine.publish(block_stored([7], TOKENS[:4], group_idx=2), block_removed([7], group_idx=2)) == []
    assert engine.publish(block_removed([7], group_idx=1)) == [("removed", [7], 0)]


def test_lost_batches_forget_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.publish(block_stored([7, 8], TOKENS[:8]))
    engine.sequence += 2
    assert engine.publish(block_stored([9], TOKENS[:4])) == [("cleared", 0), ("stored", None, [9], BLOCKS[:1], 0)]
    assert engine.translator.lost == 2 and "2 batches" in caplog.text
    assert engine.recorder.tree.find_matches(BLOCKS).scores == {(1, 0): 1}


@pytest.mark.parametrize(
    "parts",
    [
        [b"", b"\0" * 8],
        [b"", b"\0" * 8, b"\xc1"],
        [b"", b"\0" * 8, msgspec.msgpack.encode([1.0, [{"type": "Unheard"}], 0])],
        [b"", b"\0" * 8, msgspec.msgpack.encode([1.0, [{"type": "BlockStored", "block_hashes": "x"}], 0])],
    ],
)
def test_what_cannot_be_read_is_counted(parts: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.translator.on_message(parts)
    engine.translator.on_message(parts)
    assert engine.translator.malformed == 2 and engine.recorder.calls == []
    assert len(caplog.records) == 1


async def test_the_socket_takes_a_publisher_per_rank() -> None:
    zmq = pytest.importorskip("zmq")
    socket = EventSocket(ranks=3)
    context = zmq.Context()
    publishers = [context.socket(zmq.PUB) for _ in range(3)]
    try:
        base, _, port = socket.endpoint.rpartition(":")
        assert base == f"tcp://{HOST}"
        recorder = Recorder()
        socket.relay(Translator(recorder, BLOCK_SIZE))  # type: ignore[arg-type]
        for rank, publisher in enumerate(publishers):
            publisher.connect(f"{base}:{int(port) + rank}")
        sent = [0, 0, 0]
        while {call[-1] for call in recorder.calls if call[0] == "stored"} != {0, 1, 2}:
            for rank, publisher in enumerate(publishers):
                payload = msgspec.msgpack.encode([1.0, [block_stored([7], TOKENS[:4])], rank])
                publisher.send_multipart([b"", sent[rank].to_bytes(8, "big"), payload])
                sent[rank] += 1
            await asyncio.sleep(0.01)
    finally:
        for publisher in publishers:
            publisher.close(linger=0)
        context.term()
        await socket.close()
        await socket.close()
