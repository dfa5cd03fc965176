"""What the cache tells routers: events in the shape of REQUEST_PLANES §4, and the hook that takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class KvEventSink(Protocol):
    """Takes the cache's events in order, on the engine's thread, and must not block: the engine waits for it."""

    def __call__(self, event: dict[str, Any], /) -> object: ...


class KvEvents:
    """Numbers the events of one cache and hands them over.

    An event is ``{"worker_id", "event": {"event_id", "dp_rank", "data"}}``; ``data`` is ``{"stored": {"parent_hash", "blocks":
    [{"block_hash", "tokens_hash"}]}}``, ``{"removed": {"block_hashes"}}`` or ``"cleared"``. ``event_id`` starts at 1 and rises
    by one.
    """

    def __init__(self, sink: KvEventSink | None, worker_id: int | None = None, dp_rank: int = 0) -> None:
        """``worker_id`` None: not known yet; events wait for `identify`."""
        self.sink = sink
        self.dp_rank = dp_rank
        self.last_id = 0
        self._worker_id = worker_id
        self._waiting: list[dict[str, Any]] = []

    def identify(self, worker_id: int) -> None:
        """The worker has its id: hand over what waited for it."""
        self._worker_id = worker_id
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._hand_over(event)

    def stored(self, parent: int | None, blocks: Sequence[tuple[int, int]]) -> None:
        """``blocks``: (engine's hash, tokens hash) of consecutive blocks behind ``parent``."""
        if self.sink is not None:
            found = [{"block_hash": block, "tokens_hash": tokens} for block, tokens in blocks]
            self._send({"stored": {"parent_hash": parent, "blocks": found}})

    def removed(self, blocks: Sequence[int]) -> None:
        if self.sink is not None:
            self._send({"removed": {"block_hashes": list(blocks)}})

    def cleared(self) -> None:
        if self.sink is not None:
            self._send("cleared")

    def _send(self, data: dict[str, Any] | str) -> None:
        self.last_id += 1
        event = {"event_id": self.last_id, "dp_rank": self.dp_rank, "data": data}
        if self._worker_id is None:
            self._waiting.append(event)
        else:
            self._hand_over(event)

    def _hand_over(self, event: dict[str, Any]) -> None:
        assert self.sink is not None
        self.sink({"worker_id": self._worker_id, "event": event})
