"""A `Peer` over TCP: conformance cases against a server in a process of its own."""

from __future__ import annotations

import contextlib
import socket

from . import frames as f
from .peer import Peer

SILENCE_S = 5.0
"""without a byte for so long, the endpoint counts as silent; no case that passes waits for it"""


class SocketPeer(Peer):
    def __init__(self, port: int, post: bytes) -> None:
        super().__init__()
        self.post_path = post
        self.gone = False
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=SILENCE_S)
        # several writes of a case must not wait for acknowledgements of each other
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fields(self, method: bytes = b"GET", *extra: f.Field) -> list[f.Field]:
        """A POST goes to an endpoint, which waits for the body; all else to a page that is smaller than any window of a case."""
        path = self.post_path if method == b"POST" else b"/live"
        return [(name, path if name == b":path" else value) for name, value in super().fields(method, *extra)]

    @property
    def closed(self) -> bool:
        return self.gone

    def write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # what it sent before stays readable
            self.sock.sendall(data)

    def read(self) -> bool:
        while not self.gone:
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                return False
            except ConnectionResetError:  # it closed with bytes of ours unread
                data = b""
            if not data:
                self.gone = True
            elif self.take(data):
                return True
        return False

    def close(self) -> None:
        self.sock.close()
