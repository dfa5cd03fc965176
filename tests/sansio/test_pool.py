"""The buffer pool and payloads: size classes, budget, and memory that returns when its last view is gone."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import random
import threading
from array import array

import pytest

from dynwire._buffers import Block, BufferPool, Payload, get_pool
from dynwire._frames import EventConnection

from . import oracle as o
from . import pair

KIB64 = 65536
SIZES = (0, 1, 103, 104, 105, 1000, 65535, 65536, 65537, 300_000, 2 << 20, (2 << 20) + 1)


def received(payload: bytes) -> Payload:
    """A payload as a connection makes it; the connection is closed."""
    conn = pair.server()
    frames = [o.request(0, payload, name=b"a")]
    if len(payload) >= KIB64:
        frames = [o.request(0, name=b"a", announce=len(payload)), *o.fragments(0, payload)]
    pair.feed(conn, *frames)
    pair.close(conn)
    return conn.last_payload


# --- pool ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "capacity"),
    [
        (0, KIB64),
        (1, KIB64),
        (KIB64, KIB64),
        (KIB64 + 1, 2 * KIB64),
        (2 * KIB64, 2 * KIB64),
        ((1 << 20) + 1, 2 << 20),
        (5 << 20, 8 << 20),
    ],
)
def test_size_classes(size: int, capacity: int) -> None:
    pool = BufferPool()
    block = pool.acquire(size)
    assert len(block) == size == memoryview(block).nbytes
    assert pool.in_use_bytes == capacity and pool.in_use_blocks == 1
    assert block.address % (2 << 20 if capacity >= 2 << 20 else 4096) == 0
    del block
    assert pool.in_use_bytes == pool.in_use_blocks == 0
    assert pool.cached_bytes == capacity and pool.cached_blocks == 1


def test_blocks_are_reused_by_class_last_in_first_out() -> None:
    pool = BufferPool()
    first, second, other = pool.acquire(1), pool.acquire(KIB64), pool.acquire(KIB64 + 1)
    places = first.address, second.address, other.address
    assert len(set(places)) == 3
    del first, second, other
    assert pool.acquire(2 * KIB64).address == places[2]
    again = [pool.acquire(100), pool.acquire(200)]
    assert [b.address for b in again] == [places[1], places[0]]
    assert (pool.hits, pool.misses) == (3, 3)
    stats = pool.stats()
    assert stats["hits"] == 3 and stats["misses"] == 3 and stats["in_use_blocks"] == 2 and stats["cached_blocks"] == 1


def test_budget_bounds_what_is_kept() -> None:
    pool = BufferPool(3 * KIB64)
    blocks = [pool.acquire(KIB64) for _ in range(5)]
    assert pool.in_use_bytes == 5 * KIB64, "the budget is not a limit for what is in use"
    while blocks:
        blocks.pop()
        assert pool.cached_bytes == 0 or pool.in_use_bytes + pool.cached_bytes <= pool.budget_bytes
    assert (pool.cached_blocks, pool.returned_to_system) == (3, 2)
    pool.trim()
    assert pool.cached_blocks == pool.cached_bytes == 0


@pytest.mark.parametrize("budget", [0, 1, KIB64 - 1])
def test_a_small_budget_keeps_nothing(budget: int) -> None:
    pool = BufferPool(budget)
    pool.acquire(1)
    assert (pool.cached_blocks, pool.returned_to_system) == (0, 1)


def test_trim_leaves_blocks_in_use_alone() -> None:
    pool = BufferPool()
    block = pool.acquire(10)
    memoryview(block)[:] = b"0123456789"
    pool.acquire(10)
    pool.trim()
    assert bytes(block) == b"0123456789"
    assert pool.stats() == {
        "budget_bytes": 134217728, "in_use_bytes": KIB64, "in_use_blocks": 1, "cached_bytes": 0, "cached_blocks": 0, "hits": 0,
        "misses": 2, "returned_to_system": 0,
    }  # fmt: skip


def test_a_block_outlives_its_pool() -> None:
    block = BufferPool().acquire(10)
    gc.collect()
    memoryview(block)[:] = b"0123456789"
    assert bytes(block) == b"0123456789"


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="-1"):
        BufferPool(-1)
    with pytest.raises(ValueError, match="-1"):
        BufferPool().acquire(-1)
    with pytest.raises(TypeError):
        BufferPool().acquire("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="acquire"):
        Block()
    pool = BufferPool()
    with pytest.raises(MemoryError, match="8589934592"):
        pool.acquire(1 << 33)
    assert pool.in_use_blocks == 0


def test_a_size_that_no_machine_has_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        BufferPool().acquire(1 << 70)


def test_a_block_returns_when_its_last_view_is_gone() -> None:
    pool = BufferPool()
    block = pool.acquire(1000)
    view = memoryview(block)
    part = view[10:20]
    del block
    assert pool.in_use_blocks == 1
    part[:] = b"0123456789"
    del view
    assert pool.in_use_blocks == 1 and bytes(part) == b"0123456789"
    part.release()
    assert pool.in_use_blocks == 0 and pool.cached_blocks == 1


# --- payloads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["made from bytes", "made from bytearray", "received"])
def test_payload_is_its_bytes(size: int, how: str) -> None:
    data = random.Random(size).randbytes(size)
    blocks = pair.in_use()
    payload = {"made from bytes": Payload, "made from bytearray": lambda d: Payload(bytearray(d)), "received": received}[how](
        data
    )
    assert pair.in_use()[0] - blocks[0] == (size >= KIB64 and how != "made from bytes")
    assert bytes(payload) == payload.tobytes() == data and len(payload) == size
    assert payload == data and data == payload and payload == Payload(data) and hash(payload) == hash(data)
    assert payload == memoryview(data) and payload == bytearray(data) and payload == array("B", data)
    assert payload != data + b"x" and payload != b"\0" + data and payload != "text" and payload is not None
    assert (payload == data[:-1] + b"?") is False or not data
    copied = pickle.loads(pickle.dumps(payload))
    assert (type(copied) is Payload and copied == payload and copied.address != payload.address) or how == "made from bytes"
    assert copy.copy(payload) == copy.deepcopy(payload) == payload
    with memoryview(payload) as view:
        assert view.readonly and view.nbytes == size and view.contiguous and bytes(view) == data
        assert {payload: 1}[Payload(data)] == 1
    assert repr(payload).startswith(f"<dynwire.Payload {size} bytes ")
    payload.release()
    assert pair.in_use() == blocks or how == "received"  # the connection keeps its last payload, for tests


@pytest.mark.parametrize("size", SIZES)
def test_payload_is_read_only(size: int) -> None:
    payload = Payload(bytearray(size))
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(b"x" * 10).readinto(payload)  # type: ignore[arg-type]
    view = memoryview(payload)
    if size:
        with pytest.raises(TypeError):
            view[0] = 1
    with pytest.raises(AttributeError):
        payload.data = b""  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", SIZES)
def test_release(size: int) -> None:
    blocks = pair.in_use()
    payload = Payload(bytearray(size))
    view = memoryview(payload)
    part = view[1:]
    for left in (part, view):
        with pytest.raises(BufferError, match="views"):
            payload.release()
        assert len(payload) == size
        left.release()
    payload.release()
    payload.release()
    assert pair.in_use() == blocks
    assert len(payload) == 0 and payload != b"" and payload == payload and "released" in repr(payload)
    for use in (bytes, hash, pickle.dumps, Payload.tobytes):
        with pytest.raises(ValueError, match="released"):
            use(payload)  # type: ignore[operator]
    with pytest.raises(BufferError, match="released"):
        memoryview(payload)
    with pytest.raises(ValueError, match="released"), payload:
        pass


def test_with_gives_the_memory_back() -> None:
    blocks = pair.in_use()
    with Payload(bytearray(KIB64)) as payload:
        assert pair.in_use()[0] == blocks[0] + 1
    assert pair.in_use() == blocks and len(payload) == 0


def test_a_view_keeps_the_memory_of_a_dropped_payload() -> None:
    blocks = pair.in_use()
    data = random.Random(5).randbytes(200_000)
    view = memoryview(Payload(bytearray(data)))[1000:2000]
    noise = [Payload(bytearray(200_000)) for _ in range(50)]
    assert bytes(view) == data[1000:2000]
    noise.clear()
    get_pool().trim()
    noise = [Payload(bytearray(b"\xff" * 200_000)) for _ in range(50)]
    assert bytes(view) == data[1000:2000]
    noise.clear()
    view.release()
    assert pair.in_use() == blocks


def test_received_payloads_survive_connection_and_pool_pressure() -> None:
    rng = random.Random(9)
    data = [rng.randbytes(rng.choice((10, 200, 70_000, 300_000))) for _ in range(40)]
    payloads = [received(d) for d in data]
    gc.collect()
    get_pool().trim()
    churn = [received(b"\xee" * 300_000) for _ in range(20)]
    del churn
    assert payloads == data
    assert len({p.address for p in payloads}) == len(data)


def test_inline_payloads_share_no_memory() -> None:
    payloads = [Payload(bytes([i]) * 50) for i in range(200)]
    assert [bytes(p) for p in payloads] == [bytes([i]) * 50 for i in range(200)]


@pytest.mark.parametrize("size", [105, 1000, 100_000])
def test_bytes_are_referred_to_not_copied(size: int) -> None:
    data = bytes(size)
    payload = Payload(data)
    assert bytes(payload) is data


def test_not_bytes_like() -> None:
    for value in ("text", 5, None, [1]):
        with pytest.raises(TypeError):
            Payload(value)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        Payload(memoryview(b"abcdef")[::2])
    assert Payload(b"ace") == memoryview(b"abcdef")[::2] != Payload(b"abc")


def test_a_payload_cannot_be_filled_again_under_its_views() -> None:
    payload = Payload(bytearray(b"a" * 50))  # inline: the memory stays valid, so that this test is safe
    view = memoryview(payload)
    with contextlib.suppress(BufferError, TypeError, ValueError):
        payload.__init__(b"b" * 50)  # type: ignore[misc]
    assert bytes(view) == b"a" * 50


# --- threads ------------------------------------------------------------------------------------------------------------------


def test_threads_hammer_the_pool() -> None:
    """Every thread sees the bytes it wrote; in the end nothing is in use and every block was counted."""
    pool = BufferPool(64 * KIB64)
    default = pair.in_use()
    barrier = threading.Barrier(8)
    problems: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[tuple[Block, memoryview, bytes]] = []
        payloads: list[tuple[Payload, bytes]] = []
        barrier.wait()
        for _ in range(400):
            mark = rng.randbytes(16)
            block = pool.acquire(rng.choice((16, KIB64, KIB64 + 1, 300_000)))
            view = memoryview(block)
            view[:16] = mark
            view[-16:] = mark
            held.append((block, view, mark))
            data = mark * rng.choice((1, 10, 5000))
            payloads.append((Payload(bytearray(data)), data))
            if len(held) > 10:
                block, view, mark = held.pop(rng.randrange(len(held)))
                if bytes(view[:16]) != mark or bytes(view[-16:]) != mark:
                    problems.append("a block changed under its owner")
                payload, data = payloads.pop(rng.randrange(len(payloads)))
                if payload != data:
                    problems.append("a payload changed")
                if rng.random() < 0.5:
                    payload.release()
            if rng.random() < 0.01:
                pool.trim()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert pool.in_use_blocks == pool.in_use_bytes == 0
    assert pool.hits + pool.misses == 8 * 400
    assert pool.cached_bytes <= pool.budget_bytes
    assert pair.in_use() == default


def test_threads_share_a_payload() -> None:
    payload = Payload(bytearray(b"z" * 100_000))
    barrier = threading.Barrier(4)
    counts: list[int] = []

    def work() -> None:
        barrier.wait()
        total = 0
        for _ in range(500):
            with memoryview(payload) as view:
                total += view[99_999]
        counts.append(total)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [500 * ord("z")] * 4
    payload.release()


def test_connections_of_many_threads_share_the_pool() -> None:
    """Each connection belongs to one thread; the pool to all."""
    blocks = pair.in_use()
    problems: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        p = pair.Pair()
        payload = rng.randbytes(150_000)
        for _ in range(20):
            p.client.request("a", payload)
            (event,) = (e for e in p.to_server() if e[0] == "request")
            if event[3] != payload:
                problems.append(seed)
            p.server.send_item(event[1], payload, last=True)
            p.to_client()
            p.server.finish(event[1])
            p.settle()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert pair.in_use() == blocks


def test_events_are_plain_bytes() -> None:
    conn = EventConnection(False)
    conn.receive(o.PREFACE + o.encode(o.hello()))
    ((*_, payload, _, _, _),) = pair.feed(conn, o.request(0, b"x", name=b"a"))
    assert type(payload) is bytes and type(conn.last_payload) is Payload
