"""Settings of the nats plane, as its compiled parts want them."""

from __future__ import annotations

from typing import Any

from ..._natsio import RequestOptions
from ...config import Config
from ...nats.connection import PLANE_MAX_PAYLOAD


def request_options(config: Config) -> RequestOptions:
    tcp = config.tcp
    return RequestOptions(
        accept_timeout=tcp.request_timeout,
        connect_timeout=config.nats.connect_timeout,
        total_timeout=config.default_timeout,
        codec=config.codec,
        channel_buffer=tcp.channel_buffer,
        keepalive_timeout=config.nats.keepalive_timeout,
        keepalive_setting="DYNWIRE_NATS_KEEPALIVE_TIMEOUT",
    )


def wire_limits(config: Config) -> dict[str, Any]:
    tcp = config.tcp
    return {
        "max_message": tcp.max_message_size,
        "max_payload": PLANE_MAX_PAYLOAD,
        "max_streams": tcp.max_streams,
        "stream_window": tcp.stream_window,
        "budget": config.nats.credit_budget,
        "probe_interval": config.nats.probe_interval,
        "token": config.token,
    }
