"""All conformance cases, and which of them the h2 library does not pass."""

from __future__ import annotations

from .client import CASES as CLIENT
from .peer import Case, EnginePeer
from .server_generic import CASES as GENERIC
from .server_hpack import CASES as HPACK
from .server_http2 import CASES as HTTP2
from .server_rfc9113 import CASES as RFC9113

SERVER: list[Case] = [*GENERIC, *HTTP2, *HPACK, *RFC9113]
ROLES: dict[str, list[Case]] = {"server": SERVER, "client": CLIENT}


def run(case: Case, role: str, engine: str) -> None:
    """Raises AssertionError, with what the endpoint did, if it did something else than required."""
    case.run(EnginePeer(role, engine, **dict(case.limits)))
