"""Addresses whose connections had to be closed because they abused HTTP/2, and how the next ones from there are met.

The budgets of `dynwire._http2` belong to a connection, and whoever connects again has a new one. So a server remembers for a
while from where it was abused. The next connection from there begins with half of the budgets, the one after that with a quarter,
down to a sixteenth, and from the second offence on it is read only after a pause. Nothing else is refused, and connections that
are open already are left alone: behind the same address there may be a proxy or a whole machine full of other callers.
"""

from __future__ import annotations

import ipaddress

from ...errors import DynwireError

PAUSE_S = 0.25
"""Between accepting and reading. A caller at the same address waits for it once per connection; health checkers wait for 1 s."""
_HALF_LIFE_S = 10.0
_MOST = 8.0
"""offences that are remembered; after the last one it takes 20 s to a quarter of the budgets, and 40 s to all of them"""
_LEAST = 4
"""halvings: 62 of 1,000 resets and 625 of 10,000 other frames stay; both fill up at the usual rate"""
_ADDRESSES = 4096
"""of which offences are remembered, 1 MiB at the most; beyond, the one that has been well-behaved for the longest is forgotten"""


class Offenders:
    """The table. Time comes in as an argument, in seconds."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float]] = {}  # network -> offences, and when they were that many; oldest first

    def __len__(self) -> int:
        return len(self._found)

    def note(self, host: str, now: float) -> bool:
        """A connection of this host was closed for abuse; returns whether this is where the pauses begin."""
        network = network_of(host)
        before = self._offences(network, now)
        self._found.pop(network, None)
        if len(self._found) >= _ADDRESSES:
            del self._found[next(iter(self._found))]
        after = min(before + 1.0, _MOST)
        self._found[network] = (after, now)
        return self.paused(_share(after)) and not self.paused(_share(before))

    def leniency(self, host: str, now: float) -> float:
        """The share of the budgets that a new connection of this host begins with: 1, 1/2, … 1/16."""
        return _share(self._offences(network_of(host), now)) if self._found else 1.0

    @staticmethod
    def paused(leniency: float) -> bool:
        return leniency <= 0.25

    def _offences(self, network: str, now: float) -> float:
        count, at = self._found.get(network, (0.0, now))
        return float(count * 0.5 ** ((now - at) / _HALF_LIFE_S))


def _share(offences: float) -> float:
    return float(0.5 ** min(round(offences), _LEAST))


def network_of(host: str) -> str:
    """What is taken for one peer: an IPv4 address, or the 64 bits of an IPv6 one that a network assigns."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def is_abuse(error: DynwireError) -> bool:
    """Was the connection closed with ENHANCE_YOUR_CALM?"""
    return (error.details or {}).get("http2_code") == "ENHANCE_YOUR_CALM"
