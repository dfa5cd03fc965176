"""The system port of a process (``DYN_SYSTEM_PORT``): ``/health``, ``/live`` and ``/metrics`` over HTTP/1.1.

One per process, shared by its managers: the first one that serves or calls with the setting set starts it, the last one that
closes ends it. It has a background event loop of its own, so it outlives the loop of the manager that started it, and can tell
that an event loop does not turn. Managers are asked on their own loops; nothing is counted for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from .config import Config
from .errors import BindError, ConfigError
from .portal import Portal
from .runtime import Report

if TYPE_CHECKING:
    from .wire.http1 import Http1Session

logger = logging.getLogger("dynwire.system")

CONNECTIONS_LIMIT = 32
"""Connections at once; one more is answered with 503. Probes and scrapers need one each."""
REQUEST_S = 5.0
"""How long a client may take to send its request; then it is answered with 408."""
REPLY_S = 5.0
"""How long a client may take to read its reply; then the connection is cut."""
LINGER_S = 0.5
"""How long what a client still sends is read and dropped: closing with unread bytes would take its reply away."""
ANSWER_S = 5.0
"""How long an event loop may take to answer. One that does not is stuck: ``/live`` and ``/health`` say 503."""
CLOSE_S = 2.0
BACKLOG = 64

JSON = b"application/json"
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
PATHS = ("/health", "/live", "/metrics")


class Source(Protocol):
    """A manager, as far as the system port is concerned."""

    def _reporters(self) -> Iterable[tuple[asyncio.AbstractEventLoop, Callable[[], Report]]]: ...


# One per process ----------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_server: SystemServer | None = None
_inherited: list[object] = []
"""In a forked child: the parent's server, whose destructors must not touch what the two processes share."""


def join(source: Source, config: Config) -> None:
    """Serve the system port for this manager too; starts it if it is the process's first. Any thread; does not wait.

    Raises `ConfigError` if a package is missing, and `BindError`. A second manager shares the port there is, whatever its own
    setting says: a different one is warned about.
    """
    global _server
    port = config.system.system_port
    if port is None:
        return
    with _lock:
        if _server is None:
            _server = SystemServer(config.system.system_host, port)
        elif port not in (0, _server.port):
            logger.warning(
                "DYN_SYSTEM_PORT is %d for a further manager, but this process has its system port at %s already, and keeps it",
                port,
                _server.address,
            )
        _server.sources.add(source)


def leave(source: Source) -> None:
    """The manager is closed. Ends the server with its last one, and returns when the port is free again."""
    global _server
    with _lock:
        if _server is None or source not in _server.sources:
            return
        _server.sources.discard(source)
        if not _server.sources:
            server, _server = _server, None
            server.close()


def address() -> str | None:
    """``host:port`` of this process's system port; None if there is none."""
    server = _server
    return None if server is None else server.address


def announcement() -> str:
    """What the start line of a process adds: ``, system port host:port``, or nothing."""
    found = address()
    return "" if found is None else f", system port {found}"


def after_fork_in_child() -> None:
    """The port is the parent's. A manager of the child may open another one."""
    global _lock, _server
    _lock = threading.Lock()
    if _server is not None:
        _server.forget()
        _inherited.append(_server)
        _server = None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `BindError` with what to change."""
    host = host.removeprefix("[").removesuffix("]")
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, number, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise BindError(
            f"the system port cannot listen at {place}: {error.strerror or error}; every process needs its own, a forked child "
            "too: choose another one with DYN_SYSTEM_PORT (0: any free one, off: none), or another address with "
            "DYNWIRE_SYSTEM_HOST",
            address=place,
        ) from error
    return sock


# The server ---------------------------------------------------------------------------------------------------------------------


class SystemServer:
    """Listens at once; see `join` for what it raises."""

    def __init__(self, host: str, port: int) -> None:
        self._exposition = Exposition()
        try:
            from .wire.http1 import Http1Session
        except ImportError as error:
            raise _missing("h11") from error
        self._session: Callable[[], Http1Session] = Http1Session
        self.sources: weakref.WeakSet[Any] = weakref.WeakSet()
        self._socket = bind(host, port)
        bound = self._socket.getsockname()
        self.port: int = bound[1]
        self.address = f"[{bound[0]}]:{self.port}" if ":" in bound[0] else f"{bound[0]}:{self.port}"
        self._tasks: set[asyncio.Task[None]] = set()
        self._portal = Portal("dynwire-system")
        self._listener: asyncio.Server | None = None
        asyncio.run_coroutine_threadsafe(self._start(), self._portal.loop).result(CLOSE_S)
        logger.info("/health, /live and /metrics of this process (pid %d) at http://%s", os.getpid(), self.address)

    async def _start(self) -> None:
        self._listener = await asyncio.start_server(self._connected, sock=self._socket, limit=1 << 14)

    def close(self) -> None:
        """Stop listening, cut what is open, end the thread. Not from the server's own thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._portal.loop).result(CLOSE_S)
        self._portal.close()

    async def _close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S / 2)
        await asyncio.sleep(0)  # transports close their sockets in the next turn

    def forget(self) -> None:
        """In a forked child: give up the descriptor, or the port would stay taken after the parent's end."""
        os.close(self._socket.detach())

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._exchange(reader, writer)
            async with asyncio.timeout(LINGER_S):
                writer.write_eof()
                while await reader.read(1 << 14):
                    pass
        except (OSError, TimeoutError):
            pass  # the client's affair
        except asyncio.CancelledError:
            pass  # closing; start_server would report it as an error of its callback
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request and its reply. No second one: probes come every few seconds, and idle connections would fill the limit."""
        session = self._session()
        if len(self._tasks) > CONNECTIONS_LIMIT:
            status, kind, body = _problem(503, f"{CONNECTIONS_LIMIT} connections are open, which is the limit of the system port")
        else:
            try:
                async with asyncio.timeout(REQUEST_S):
                    target, status, text = await _read_request(session, reader)
            except TimeoutError:
                target, status, text = "", 408, f"no complete request came within {REQUEST_S:g} s"
            if status == 0:
                return
            status, kind, body = _problem(status, text) if status != 200 else await self._answer(target)
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        if session.complete:  # otherwise the session says so itself
            headers.append((b"connection", b"close"))
        session.send_head(status, headers)
        session.send_data(body)
        session.end()
        async with asyncio.timeout(REPLY_S):
            writer.write(session.output())
            await writer.drain()

    async def _answer(self, path: str) -> tuple[int, bytes, bytes]:
        """Status, content type and body."""
        reports, stuck = await self._ask()
        if path == "/metrics":
            return 200, PROMETHEUS, self._exposition.render(reports, stuck)
        if stuck:
            shown = {"status": "stuck", "error": f"{stuck} event loop(s) have not turned for {ANSWER_S:g} s"}
            return 503, JSON, orjson.dumps(shown)
        if path == "/live":
            return 200, JSON, b'{"status":"live"}'
        status = overall(reports)
        instances = [
            {
                "endpoint": served.instance.path,
                "id": f"{served.instance.id:016x}",
                "plane": served.instance.plane,
                "address": served.instance.address,
                "ready": served.ready,
                "in_flight": served.in_flight,
            }
            for report in reports
            for served in report.served
        ]
        body = orjson.dumps({"status": status, "pid": os.getpid(), "instances": instances})
        return 200 if status == "ready" else 503, JSON, body

    async def _ask(self) -> tuple[list[Report], int]:
        """What the managers say, each on its own loop, and how many loops gave no answer. Stopped loops are not asked."""
        here = asyncio.get_running_loop()
        answers: list[asyncio.Future[Report]] = []
        for source in tuple(self.sources):
            for loop, report in source._reporters():
                answer: asyncio.Future[Report] = here.create_future()
                if loop.is_running():
                    with contextlib.suppress(RuntimeError):  # closed in this moment
                        loop.call_soon_threadsafe(_tell, here, answer, report)
                        answers.append(answer)
        if not answers:
            return [], 0
        done, waiting = await asyncio.wait(answers, timeout=ANSWER_S)
        stuck = sum(answer.get_loop() is here for answer in waiting)
        return [answer.result() for answer in answers if answer in done], stuck


def _tell(asking: asyncio.AbstractEventLoop, answer: asyncio.Future[Report], report: Callable[[], Report]) -> None:
    """On a manager's loop: make the report and hand it over."""
    found = report()
    with contextlib.suppress(RuntimeError):  # the system port was closed in the meantime
        asking.call_soon_threadsafe(_take, answer, found)


def _take(answer: asyncio.Future[Report], report: Report) -> None:
    if not answer.done():
        answer.set_result(report)


async def _read_request(session: Http1Session, reader: asyncio.StreamReader) -> tuple[str, int, str]:
    """``(path, 200, "")``, or a status and what is wrong; status 0: the client has gone without asking for anything."""
    while True:
        data = await reader.read(1 << 14)
        events = session.receive(data) if data else session.receive_eof()
        for event in events:
            if event[0] == "error":
                return "", event[1], event[2]
            if event[0] == "request":
                fields = dict(event[1])
                path = fields[b":path"].partition(b"?")[0].decode("latin-1")
                if path not in PATHS:
                    return path, 404, f"there is no {path} here, but {', '.join(PATHS)}"
                if fields[b":method"] not in (b"GET", b"HEAD"):
                    return path, 405, f"{fields[b':method'].decode('latin-1')} is not possible here, GET and HEAD are"
                if ("end",) not in events or any(found[0] == "data" for found in events):
                    return path, 400, "the request has a body, which means nothing here"
                return path, 200, ""
        if not data:
            return "", 0, ""


def _problem(status: int, text: str) -> tuple[int, bytes, bytes]:
    return status, JSON, orjson.dumps({"error": text})


def overall(reports: Iterable[Report]) -> str:
    """``ready``, ``starting`` or ``draining``.

    Ready is a process with a ready instance, and one that only calls. One that has served and serves nothing any more stays
    draining: nobody should send it work.
    """
    reports = tuple(reports)
    if any(served.ready for report in reports for served in report.served):
        return "ready"
    if any(report.starting for report in reports):
        return "starting"
    return "draining" if any(report.has_served for report in reports) else "ready"


# Prometheus ---------------------------------------------------------------------------------------------------------------------


def _missing(package: str) -> ConfigError:
    text = f"DYN_SYSTEM_PORT needs {package}: pip install 'dynwire[system]', or set DYN_SYSTEM_PORT=off"
    return ConfigError(text, name="DYN_SYSTEM_PORT", allowed="off, or a port with its packages")


OPEN = (
    ("streams", "open_requests", "Requests that are open on the connections"),
    ("backlog", "write_backlog_bytes", "Bytes that wait for peers to read"),
    ("rx_bytes", "open_connections_received_bytes", "Bytes received on the connections that are open now"),
    ("tx_bytes", "open_connections_sent_bytes", "Bytes sent on the connections that are open now; http plane"),
    ("waiting", "waiting_requests", "Requests that wait for an answer; nats plane"),
)
"""counter of a connection -> gauge. No totals: the counters go with their connection."""

TOTALS = (
    ("stale", "nats_stale_messages", "Messages for requests that had ended"),
    ("malformed", "nats_malformed_messages", "Messages that were none of dynwire's"),
    ("repeated", "nats_repeated_items", "Items that came twice and were dropped"),
    ("gaps", "nats_gaps", "Times that items were missing"),
    ("probes", "nats_probes", "Questions whether the other side still lives"),
)
"""counter of a nats server or client, which lives as long as its manager -> counter"""


class Exposition:
    """Prometheus' text format. One thread. Raises `ConfigError` if prometheus-client is missing."""

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
            from prometheus_client.exposition import generate_latest
            from prometheus_client.registry import Collector
        except ImportError as error:
            raise _missing("prometheus-client") from error

        self._reports: list[Report] = []
        self._stuck = 0
        exposition = self

        class Managers(Collector):
            def collect(self) -> Iterator[Any]:
                return collect(exposition._reports, exposition._stuck)

        # a registry of its own: what the process registers in the global one is its own affair
        self._registry = CollectorRegistry()
        self._registry.register(Managers())
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._encode = generate_latest

    def render(self, reports: list[Report], stuck: int) -> bytes:
        """The text."""
        self._reports, self._stuck = reports, stuck
        return self._encode(self._registry)


def collect(reports: list[Report], stuck: int) -> Iterator[Any]:
    """Prometheus' view of the managers, several together."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    in_flight: defaultdict[tuple[str, str], int] = defaultdict(int)
    instances: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    links: defaultdict[tuple[str, str], int] = defaultdict(int)
    numbers: dict[str, defaultdict[tuple[str, str], int]] = {key: defaultdict(int) for key, *_ in (*OPEN, *TOTALS)}
    for report in reports:
        for served in report.served:
            path, plane = served.instance.path, served.instance.plane
            in_flight[path, plane] += served.in_flight
            instances[path, plane, "ready" if served.ready else "draining"] += 1
        for side, found in (("server", report.server), ("client", report.clients)):
            for stats in found:
                links[report.plane, side] += 1
                for key, sums in numbers.items():
                    if key in stats:
                        sums[report.plane, side] += stats[key]

    def family(kind: Any, name: str, text: str, labels: list[str], values: dict[Any, int]) -> Any:
        made = kind("dynwire_" + name, text, labels=labels)
        for key, value in sorted(values.items()):
            made.add_metric(key, value)
        return made

    sides = ["plane", "side"]
    yield GaugeMetricFamily("dynwire_stuck_event_loops", f"Event loops that did not turn for {ANSWER_S:g} s", stuck)
    yield family(GaugeMetricFamily, "requests_in_flight", "Requests that are running", ["endpoint", "plane"], in_flight)
    yield family(GaugeMetricFamily, "instances", "Instances that this process serves", ["endpoint", "plane", "state"], instances)
    yield family(GaugeMetricFamily, "connections", "Connections to peers, or to NATS", sides, links)
    for kind, table in ((GaugeMetricFamily, OPEN), (CounterMetricFamily, TOTALS)):
        for key, name, text in table:
            if numbers[key]:
                yield family(kind, name, text, sides, numbers[key])
