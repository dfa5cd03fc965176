"""The conformance cases for servers over TCP: raw bytes to any host and port, frames back, as h2spec does it.

``python -m tests.http2.over_socket HOST PORT PATH [CASE …]`` runs all cases, or those whose id begins like one of those named.
The path should take GET and POST with any body, and answer with five bytes or more; an answer before the request is complete
would be taken for a defect by cases about request bodies.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator

from dynwire.wire.http2 import Http2Connection

from . import cases
from .peer import BODY, Case, Peer

SILENCE_S = 15.0
"""how long a server may think; cases that pass do not wait for it"""


class SocketPeer(Peer):
    def __init__(self, host: str, port: int, path: str, silence_s: float = SILENCE_S) -> None:
        super().__init__()
        self.host = f"{host}:{port}".encode()
        self.path = path.encode()
        self.socket = socket.create_connection((host, port), timeout=silence_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ended = False
        self.was_reset = False
        """by TCP: the server has closed its socket with bytes unread, and GOAWAY may have been lost"""

    @property
    def closed(self) -> bool:
        return self.ended

    def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def read(self) -> bool:
        while not self.ended:
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                return False
            except ConnectionResetError:
                self.was_reset = True
                data = b""
            if not data:
                self.ended = True
            elif self.take(data):
                return True
        return False

    def connection_error(self, *codes: int) -> None:
        try:
            super().connection_error(*codes)
        except AssertionError:
            if not self.was_reset or any(frame.type == 7 for frame in self.seen):
                raise

    def close(self) -> None:
        self.socket.close()


def run_case_over_socket(case: Case, host: str, port: int, path: str, silence_s: float = SILENCE_S) -> None:
    """Raises AssertionError, with what the server did, if it did something else than required; OSError if there is none."""
    with contextlib.closing(SocketPeer(host, port, path, silence_s)) as peer:
        case.run(peer)


SOCKET_CASES = [case for case in cases.SERVER if case.socket]


class EngineServer:
    """The smallest server around an `Http2Connection`, to test the runner: one connection at a time, in a thread."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, name="http2 test server")

    def __enter__(self) -> EngineServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # wakes accept(), which close() alone does not
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()

    def serve(self) -> None:
        while True:
            try:
                accepted, _ = self.listener.accept()
            except OSError:
                return
            with accepted, contextlib.suppress(OSError):  # the client has gone: reset, or not connected any more
                self.serve_one(accepted)

    def serve_one(self, accepted: socket.socket) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = Http2Connection("server", engine=self.engine)
        conn.start()
        accepted.sendall(conn.output())
        while not conn.dead and (data := accepted.recv(65536)):
            for event in conn.receive(data):
                if event[0] == "data":
                    conn.consumed(event[1], len(event[2]))
                if event[0] in ("headers", "data") and event[-1]:
                    conn.send_headers(event[1], [(b":status", b"200"), (b"content-type", b"text/plain")])
                    conn.send_data(event[1], BODY, end=True)
            accepted.sendall(conn.output())
        # what has not been read would make the kernel send a reset, which may overtake GOAWAY
        accepted.shutdown(socket.SHUT_WR)
        while accepted.recv(65536):
            pass


def main(arguments: list[str]) -> int:
    host, port, path, *wanted = arguments
    failed = 0
    chosen: Iterator[Case] = (case for case in SOCKET_CASES if not wanted or case.id.startswith(tuple(wanted)))
    for case in chosen:
        try:
            run_case_over_socket(case, host, int(port), path)
        except AssertionError as error:
            failed += 1
            print(f"{case.id} ({case.rfc}) {case.requirement}\n    {error}")
    print(f"{len(SOCKET_CASES) if not wanted else 'chosen'} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
