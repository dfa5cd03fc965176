"""Fixtures for tests of services that use dynwire. pytest finds them by itself once dynwire is installed.

``nats_server``       a real nats-server with JetStream, one per session (per worker of pytest-xdist)
``nats_prefix``       a prefix for subjects and buckets that no other test uses
``dynwire_manager``   makes managers with settings of their own, and closes them
``dynwire_ports``     free ports

Nothing of dynwire is imported, and nothing started, before a test asks for a fixture. ``-p no:dynwire`` turns the plugin off.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..manager import NetworkManager
    from ..nats.server import NatsServer


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    """A nats-server with JetStream on a free port of 127.0.0.1; its storage goes with it at the end of the session.

    All tests of a session share it, so use names of your own (``nats_prefix``), and start a `dynwire.nats.server.NatsServer`
    for a test that kills it or wants other settings. Tests are skipped where no nats-server is installed.
    """
    from ..errors import ConfigError
    from ..nats.server import NatsServer, find_binary

    try:
        binary = find_binary()
    except ConfigError as error:
        pytest.skip(str(error))
    with NatsServer(jetstream=True, binary=binary) as server:
        yield server


@pytest.fixture
def nats_prefix() -> str:
    """A name that no other test has, good as a subject's first part, and as a part of a stream's or bucket's name."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def dynwire_ports(request: pytest.FixtureRequest) -> Callable[[], int]:
    """``dynwire_ports()`` returns a tcp port of 127.0.0.1 that is free, another one with every call.

    Workers of pytest-xdist get different ones. Nobody keeps the port free: prefer port 0 and asking for the address where that
    is possible.
    """
    from ..nats.server import free_port

    number, count = 0, 1
    worker: dict[str, Any] | None = getattr(request.config, "workerinput", None)
    if worker is not None:
        found = re.fullmatch(r"gw(\d+)", worker["workerid"])
        # a worker that replaces a crashed one has a number beyond the count
        count = max(1, int(worker["workercount"]))
        number = int(found[1]) % count if found else 0
    return lambda: free_port(share=(number, count))


class Managers:
    """What the fixture ``dynwire_manager`` is: call it with settings to get a `dynwire.NetworkManager`."""

    def __init__(self, directory: Path, request: pytest.FixtureRequest) -> None:
        self._directory = directory
        self._request = request
        self._made: list[NetworkManager] = []

    def settings(self, **settings: object) -> dict[str, Any]:
        """``settings`` with discovery in the test's directory; where NATS is used, with ``nats_server`` and ``nats_prefix``.

        For a `dynwire.AsyncNetworkManager`, which the test has to close on its event loop.
        """
        from ..config import load_config

        full: dict[str, Any] = {"discovery": "file", "discovery_file_dir": str(self._directory), **settings}
        config = load_config(full)
        uses_nats = "nats" in (config.request_plane, config.discovery.backend)
        if uses_nats and config.origins["nats.servers"] == "default":
            server: NatsServer = self._request.getfixturevalue("nats_server")
            full["nats_servers"] = server.url
        if uses_nats and config.origins["nats.prefix"] == "default":
            full["nats_prefix"] = self._request.getfixturevalue("nats_prefix")
        return full

    def environment(self, **settings: object) -> dict[str, str]:
        """The same `settings` as variables, for processes that a test starts."""
        from ..config import load_config
        from ..config import settings as known

        chosen = load_config(self.settings(**settings), environ={})
        found: dict[str, str] = {}
        for setting in known():
            value = chosen.get(setting.name)
            if chosen.origins.get(setting.name) == "keyword" and value is not None:
                found[setting.env] = ",".join(value) if isinstance(value, tuple) else str(value)
        return found

    def __call__(self, **settings: object) -> NetworkManager:
        """A new manager with `settings`, closed when the test ends. Raises `ConfigError`."""
        from ..manager import NetworkManager

        manager = NetworkManager(**self.settings(**settings))
        self._made.append(manager)
        return manager

    def close(self) -> None:
        for manager in reversed(self._made):
            manager.close()
        self._made.clear()


@pytest.fixture
def dynwire_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Managers]:
    """``dynwire_manager(request_plane="tcp", ...)`` returns a `dynwire.NetworkManager`, closed when the test ends.

    The managers of one test see each other through file discovery in its ``tmp_path``, and nobody else's. ``.settings()``
    gives the keywords for an `AsyncNetworkManager`, ``.environment()`` the variables for other processes.
    """
    managers = Managers(tmp_path / "dynwire-discovery", request)
    yield managers
    managers.close()
