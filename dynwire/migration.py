"""How a stream that lost its worker continues on another one, without a repeat and without a hole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import DynwireError, PeerLost

Resume = Callable[[Any, list[Any]], Any]
"""``resume(payload, delivered)``: the request that continues after ``delivered`` (all items of the caller so far).

Returns None if nothing is missing, so that the stream ends well. Raises `ValueError` if the request cannot be continued.
"""


def resume_tokens(payload: Any, delivered: list[Any]) -> Any:
    """The default, for token streams: ``{"token_ids": […], …}`` answered by items ``{"token_ids": […], "finish_reason": …}``.

    The tokens that were delivered are appended to the prompt, and ``stop_conditions.max_tokens`` and ``min_tokens`` become
    smaller by their number. Raises `ValueError` if request or items look different.
    """
    if not isinstance(payload, dict) or not isinstance(payload.get("token_ids"), list):
        raise ValueError("the request is not a dict with a list token_ids, and no resume= was given")
    tokens: list[Any] = []
    for item in delivered:
        if not isinstance(item, dict) or not isinstance(item.get("token_ids"), list):
            raise ValueError("an item of the reply is not a dict with a list token_ids")
        tokens += item["token_ids"]
    if delivered and delivered[-1].get("finish_reason") is not None:
        return None
    continued = {**payload, "token_ids": payload["token_ids"] + tokens}
    stop = payload.get("stop_conditions")
    if isinstance(stop, dict):
        stop = dict(stop)
        for name in ("max_tokens", "min_tokens"):
            if isinstance(stop.get(name), int):
                stop[name] = max(0, stop[name] - len(tokens))
        if stop.get("max_tokens") == 0:
            return None
        continued["stop_conditions"] = stop
    return continued


class Migration:
    """State of one stream that may migrate: what was delivered, and how often it may still move. No I/O.

    Keeps all items until the stream ends, because ``resume`` may need them; that is why migration is opt-in.
    """

    def __init__(self, payload: Any, limit: int, resume: Resume | None) -> None:
        self.payload = payload
        self.delivered: list[Any] = []
        self.lost: set[int] = set()
        self._original = payload
        self._left = limit
        self._resume = resume or resume_tokens

    def after(self, error: DynwireError, instance_id: int | None) -> bool:
        """The stream broke: prepare ``payload`` for the next worker, or return False if nothing is missing.

        Raises ``error`` itself, with ``delivered`` set, if the stream cannot continue.
        """
        lost = isinstance(error, PeerLost) or (error.sent == "no" and error.retryable)
        if isinstance(error, PeerLost):
            error.delivered = len(self.delivered)
        if not lost or self._left <= 0:
            raise error
        try:
            payload = self._resume(self._original, list(self.delivered))
        except ValueError as reason:
            raise error from reason
        self._left -= 1
        if instance_id is not None:
            self.lost.add(instance_id)
        self.payload = payload
        return payload is not None
