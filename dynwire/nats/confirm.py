"""Which published requests the queue has not confirmed yet, and when to publish them again. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Hashable

RETRY_S = 1.0
"""without a word from the stream for so long, a request is published again, with the same id; twice as long each time"""

MAX_RETRY_S = 5.0

MARGIN_S = 1.0
"""kept from the end of the duplicate window: the server's clock, and what is on its way"""


class _Entry:
    __slots__ = ("due", "first", "pause")

    def __init__(self, now: float) -> None:
        self.first = now
        self.pause = RETRY_S
        self.due = now + RETRY_S


class Unconfirmed:
    """Requests that were published and not confirmed, by any key."""

    def __init__(self, duplicate_window: float) -> None:
        self.window = max(duplicate_window - MARGIN_S, duplicate_window / 2)
        """seconds after the first attempt in which a repetition is safe: the stream stores it once"""
        self._entries: dict[Hashable, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def published(self, key: Hashable, now: float) -> None:
        """Its first attempt is on its way."""
        self._entries[key] = _Entry(now)

    def settled(self, key: Hashable) -> bool:
        """It was confirmed, refused, or given up; False if it was settled before (a second answer, to a repetition)."""
        return self._entries.pop(key, None) is not None

    def due(self, now: float) -> tuple[list[Hashable], list[Hashable]]:
        """``(publish again now, give up)``.

        The latter have left the duplicate window, and nobody knows whether they are stored.
        """
        again: list[Hashable] = []
        lost: list[Hashable] = []
        for key, entry in self._entries.items():
            if now - entry.first > self.window:
                lost.append(key)
            elif entry.due <= now:
                again.append(key)
                entry.pause = min(2 * entry.pause, MAX_RETRY_S)
                entry.due = now + entry.pause
        for key in lost:
            del self._entries[key]
        return again, lost

    def all_due(self, now: float) -> None:
        """The connection is new: what was not confirmed on the old one goes out again at once."""
        for entry in self._entries.values():
            entry.due = now
            entry.pause = RETRY_S

    def clear(self) -> None:
        self._entries.clear()

    def next_due(self) -> float | None:
        """When `due` has to be called next, or None."""
        return min((min(entry.due, entry.first + self.window) for entry in self._entries.values()), default=None)
