"""Sockets whose connection was given up with GOAWAY, until the peer has had time to read why.

A socket that is closed with unread bytes resets the connection, and then the peer's system may drop the GOAWAY that it has
received but its program has not read (RFC 9112 section 9.6 on the same in HTTP/1.1). So what still comes is read and dropped, for
a while and up to a number of bytes. Nothing of the connection is left then but the socket.
"""

from __future__ import annotations

import asyncio
import socket

_LINGER_S = 1.0
"""for a program that is about to read; a peer that does not close costs a descriptor for so long"""
_BYTES = 262144
"""of what is dropped: the four largest reads"""
_READ = 65536
_MOST = 32
"""sockets; beyond, they are closed at once, so that those who break the protocol on purpose hold no more"""


class Parting:
    """The sockets of one server. Used from the loop's thread only."""

    def __init__(self) -> None:
        self._sockets: set[_Socket] = set()

    def __len__(self) -> int:
        return len(self._sockets)

    def add(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        """Take over a socket on which everything has been written; it is closed in time."""
        try:
            if loop.is_closed() or len(self._sockets) >= _MOST:
                sock.close()
            else:
                sock.shutdown(socket.SHUT_WR)
                self._sockets.add(_Socket(loop, sock, self._sockets))
        except OSError:  # the peer has reset the connection
            sock.close()

    def close(self) -> None:
        """Close all of them now."""
        for each in list(self._sockets):
            each.close()


class _Socket:
    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, others: set[_Socket]) -> None:
        self._loop = loop
        self._sock = sock
        self._others = others
        self._left = _BYTES
        self._timer = loop.call_later(_LINGER_S, self.close)
        loop.add_reader(sock.fileno(), self._drop)

    def _drop(self) -> None:
        try:
            size = len(self._sock.recv(_READ))
        except BlockingIOError:
            return
        except OSError:  # reset, which is an end too
            size = 0
        self._left -= size
        if size == 0 or self._left <= 0:
            self.close()

    def close(self) -> None:
        self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._others.discard(self)
