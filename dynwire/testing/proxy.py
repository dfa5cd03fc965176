"""A TCP proxy that misbehaves on demand: what stands between two peers when the network fails.

    async with FaultProxy(worker_address, to_client=Faults(reset_after=1000)) as proxy:
        ...  # let the caller connect to proxy.address instead

From code without an event loop: ``with running_proxy(worker_address, ...) as proxy``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

CHUNK = 65536
END_S = 5.0
"""How long closing waits for the ends of connections that it has aborted."""
_LINGER_0 = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to the bytes of one direction of one connection. The offsets count forwarded bytes from 0."""

    delay: float = 0.0
    """seconds that every chunk waits before it is forwarded"""
    cut_after: int | None = None
    """both ends see an orderly end of the connection (FIN) after exactly this many bytes"""
    reset_after: int | None = None
    """both ends see a reset (RST) after at most this many bytes; what is on its way may be lost, as with a real one"""
    stall_after: int | None = None
    """after this many bytes nothing more is forwarded, and the sender is no longer read from"""

    def limit(self) -> tuple[int | None, Literal["", "cut", "reset", "stall"]]:
        """The first offset at which something happens, and what."""
        found: tuple[int | None, Literal["", "cut", "reset", "stall"]] = (None, "")
        for offset, kind in ((self.cut_after, "cut"), (self.reset_after, "reset"), (self.stall_after, "stall")):
            if offset is not None and (found[0] is None or offset < found[0]):
                found = (offset, kind)  # type: ignore[assignment]
        return found


Plan = Callable[[int], tuple[Faults, Faults]]


class _Connection:
    def __init__(self, proxy: FaultProxy, number: int) -> None:
        self.proxy = proxy
        self.to_server, self.to_client = proxy.plan(number)
        self.writers: list[asyncio.StreamWriter] = []
        self.forwarded = [0, 0]
        self.broken = asyncio.Event()

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(self.proxy.host, self.proxy.port, limit=CHUNK)
        except OSError:
            self.end("reset")
            return
        self.writers.append(far_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, self.to_server, 0)),
            asyncio.create_task(self._pump(far_reader, writer, self.to_client, 1)),
        ]
        broken = asyncio.create_task(self.broken.wait())
        try:
            both = asyncio.gather(*pumps)
            await asyncio.wait((both, broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*pumps, broken):
                task.cancel()
            await asyncio.gather(*pumps, broken, both, return_exceptions=True)
            self.end("cut")

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults, direction: int) -> None:
        limit, kind = faults.limit()
        try:
            while True:
                await self.proxy.flowing.wait()
                left = CHUNK if limit is None else min(CHUNK, limit - self.forwarded[direction])
                if left == 0:
                    break
                data = await reader.read(left)
                if not data:
                    writer.write_eof()
                    return
                if faults.delay:
                    await asyncio.sleep(faults.delay)
                await self.proxy.flowing.wait()
                writer.write(data)
                self.forwarded[direction] += len(data)
                self.proxy.forwarded[direction] += len(data)
                await writer.drain()
        except OSError:
            self.end("reset")
            return
        if kind == "stall":
            await asyncio.Event().wait()
        self.end("reset" if kind == "reset" else "cut")

    def end(self, kind: Literal["cut", "reset"]) -> None:
        """End both connections now."""
        self.broken.set()
        for writer in self.writers:
            if kind == "cut":
                writer.close()
            else:
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
                writer.transport.abort()
        self.writers.clear()


class FaultProxy:
    """Forwards connections to ``target`` with faults; lives on the event loop it is started on.

    ``target`` is ``host:port`` or, as workers of the http plane have it, ``http://host:port/root``.

    ``to_server`` and ``to_client`` hold for every connection; ``plan`` is asked for each one by its number, from 0, instead.
    """

    def __init__(
        self, target: str, *, to_server: Faults | None = None, to_client: Faults | None = None, plan: Plan | None = None
    ):
        scheme, separator, rest = target.rpartition("://")
        authority, slash, root = rest.partition("/")
        host, _, port = authority.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
        self._around = (scheme + separator, slash + root)
        both = (to_server or Faults(), to_client or Faults())
        self.plan: Plan = plan or (lambda number: both)
        self.address = ""
        """where to connect to: ``127.0.0.1:port``, in a URL if the target is one"""
        self.accepted = 0
        """connections so far"""
        self.forwarded = [0, 0]
        """bytes to the server and to the client, of all connections"""
        self.flowing: asyncio.Event
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{self._around[0]}{host}:{port}{self._around[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, self.accepted)
        self.accepted += 1
        self._connections.add(connection)
        task = asyncio.get_running_loop().create_task(connection.run(reader, writer))
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            self._connections.discard(connection)

        task.add_done_callback(ended)

    def break_all(self, kind: Literal["cut", "reset"] = "reset") -> None:
        """End every connection that is open now; new ones are forwarded as before."""
        for connection in tuple(self._connections):
            connection.end(kind)

    def stall(self) -> None:
        """Forward nothing in any direction until `resume`; connections stay open and are accepted."""
        self.flowing.clear()

    def resume(self) -> None:
        self.flowing.set()

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        self.break_all()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_S)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> FaultProxy:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


@contextlib.contextmanager
def running_proxy(
    target: str, *, to_server: Faults | None = None, to_client: Faults | None = None, plan: Plan | None = None
) -> Iterator[FaultProxy]:
    """A `FaultProxy` on an event loop in a thread of its own, closed at the end of ``with``.

    Its methods belong to that loop; faults are to be given by offset, or by ``plan``.
    """
    proxy = FaultProxy(target, to_server=to_server, to_client=to_client, plan=plan)
    ready = threading.Event()
    stop: list[Callable[[], object]] = []
    problem: list[BaseException] = []

    async def main() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with proxy:
            stop.append(lambda: loop.call_soon_threadsafe(ended.set))
            ready.set()
            await ended.wait()

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  # handed to the thread that waits
            problem.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="fault-proxy", daemon=True)
    thread.start()
    ready.wait()
    if problem:
        raise problem[0]
    try:
        yield proxy
    finally:
        stop[0]()
        thread.join()
