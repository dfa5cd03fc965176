"""Whether a worker publishes what happens in its KV cache."""

from __future__ import annotations

from ..config import Config

KV_EVENTS_CHOICES = ("auto", "on", "off")
KV_EVENTS_HELP = "publish what the cache holds on the event plane; auto: if DYN_EVENT_PLANE or NATS_SERVER is set"


def publishes_kv_events(choice: str, config: Config) -> bool:
    """Whether cache events are published. By default only if somebody has said how, so that a laptop needs no NATS server."""
    if config.events.plane == "none" or choice == "off":
        return False
    return choice == "on" or any(config.origins.get(name, "default") != "default" for name in ("events.plane", "nats.servers"))
