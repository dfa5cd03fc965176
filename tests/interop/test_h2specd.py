"""Our clients against h2specd, the part of h2spec for clients: a server that breaks the rules, in one way per case.

h2specd listens on a port per case and runs a command for each, with the URL of the port as the last argument. The command is
curl, which hands the URL to the test: so the clients are made as in the other tests, and a case, which has 3 s in all, does not
wait for an interpreter to start.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import socket
import time
from pathlib import Path

import pytest

import dynwire
from tests.faults.conftest import Managers
from tests.plane.faces import Manager

from .conftest import Direct
from .programs import program
from .test_tls import certificate  # noqa: F401

CASES = 57
RUN_S = 180.0
"""for all cases: they cannot take longer, at 3 s each"""
REPLY_S = 2.2
"""h2specd waits 2 s for what a client does"""
LINGER_S = 0.3
"""how long a connection that has survived its case is left open, lest h2specd takes its end for an answer"""

LOG = re.compile(r"\x1b\[[0-9;]*m|[\r\0]|.* use of closed network connection\n")
"""what is taken out: colours, and the complaints of its listeners when it ends"""
RESULT = re.compile(r"[✔×] \d+: (.*)")

MAY_CLOSE = {
    "Sends an invalid PING frame for connection close",  # what it asks for
    # It writes the stream's number in the wrong byte order. HEADERS on stream 2^24 is a PROTOCOL_ERROR before it is looked into.
    "Sends invalid header block fragment",
}
"""h2specd is content with a closed connection wherever it wants an error code. In all other cases it has to get the code."""


async def one_call(manager: Manager, url: str) -> None:
    """Call, and stay until the server has ended the connection. What the call ends with is not the question here."""
    direct = Direct(manager, url)
    for _ in range(2 if direct.blocking else 1):  # a blocking client reads when it calls: again, for what comes later
        try:
            await direct.call({}, REPLY_S)
        except dynwire.DynwireError as error:
            print(f"{url} {type(error).__name__}: {error}")
        if not direct.stats():
            break
    deadline = time.monotonic() + LINGER_S
    while direct.stats() and time.monotonic() < deadline:  # noqa: ASYNC110  # nobody sets an event for it
        await asyncio.sleep(0.01)


def consecutive_ports(count: int) -> int:
    """First of so many ports in a row that are free, below those that Linux gives to connections."""
    for _ in range(100):
        first = random.randrange(10000, 32000 - count)
        socks: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                socks.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for sock in socks:
                sock.close()
    raise AssertionError(f"no {count} free ports in a row")


def decided_by_close(log: str) -> set[str]:
    """The cases in which h2specd saw the end of the connection before anything else that it wanted."""
    found, closed = set(), False
    for line in log.splitlines():
        if "[recv] Connection closed" in line:
            closed = True
        elif result := RESULT.search(line):
            if closed:
                found.add(result[1])
            closed = False
    return found


@pytest.mark.hard_timeout(RUN_S + 20)
@pytest.mark.parametrize("secure", [False, True], ids=["h2c", "tls"])
async def test_h2specd(managers: Managers, certificate: tuple[Path, Path], secure: bool) -> None:  # noqa: F811
    h2specd, curl = shutil.which("h2specd"), program("curl")
    if h2specd is None:
        pytest.skip("h2specd is missing: docs/http2-conformance.md says where it comes from")
    # h2specd takes 2^14 for our largest frame without looking at our SETTINGS, and any PING for the answer to its own: also one
    # of those that measure the path for the adaptive window.
    cert, key = map(str, certificate)
    settings = {"http_max_frame_size": 16384, "http_adaptive_window": False, "http_tls_ca": cert if secure else None}
    async with managers(request_plane="http", **settings) as manager:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split()[0])
            try:
                await one_call(manager, (await reader.readexactly(length)).decode())
            finally:
                writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
                writer.close()
                await writer.wait_closed()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            command = f"{curl} --silent http://127.0.0.1:{server.sockets[0].getsockname()[1]}/ --data"
            options = ["--strict", "--verbose", "--from-port", str(consecutive_ports(CASES)), "--exec", command]
            options += ["--tls", "--cert-file", cert, "--cert-key-file", key] if secure else []
            process = await asyncio.create_subprocess_exec(h2specd, *options, stdout=asyncio.subprocess.PIPE)
            try:
                async with asyncio.timeout(RUN_S):
                    out, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    log = LOG.sub("", out.decode(errors="replace"))
    # it may end with 0 whatever it has found
    assert f"{CASES} tests, {CASES} passed, 0 skipped, 0 failed" in log, log
    assert decided_by_close(log) <= MAY_CLOSE, log
