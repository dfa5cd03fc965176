"""Addresses, socket options and connect errors of the planes over sockets, shared by their servers and clients."""

from __future__ import annotations

import contextlib

# getaddrinfo imports it for its first host name; a fork() in another thread at that moment would leave its import lock held.
import encodings.idna  # noqa: F401
import errno
import ipaddress
import os
import socket

from ...errors import BindError, ConfigError, ConnectError

SOFTWARE = "dynwire"
SLICE_S = 0.1
"""A thread that waits in a system call looks at its deadlines this often."""
RCVTIMEO = (0).to_bytes(8, "little") + int(SLICE_S * 1e6).to_bytes(8, "little")
"""`SLICE_S` as a struct timeval"""
_FAST_LOCAL = (b"reno", b"cubic")
"""Congestion controls that do not pace: on one host BBR's pacing costs 16 MiB transfers a factor of 2.7."""


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` to its parts; raises `ConfigError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65536:
        text = f"{address!r} is not an address: expected host:port"
        raise ConfigError(text, name="address", value=address, allowed="host:port")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def same_host(sock: socket.socket) -> bool:
    """Is the other end of a connected socket on this host?"""
    try:
        ours, theirs = sock.getsockname()[0], sock.getpeername()[0]
    except OSError:
        return False
    return bool(ours == theirs or ipaddress.ip_address(theirs.split("%")[0]).is_loopback)


def tune(sock: socket.socket, congestion: str) -> None:
    """Options of every connection. ``congestion``: ``auto``, ``system``, or the name of a congestion control.

    ``auto`` chooses reno (or cubic) for a peer on this host where the system allows it, and leaves others alone.
    """
    # Replies are small and wait for nothing: with Nagle's algorithm they would wait for the peer's delayed ACK, 40 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Finds peers whose host is gone, also while nothing is read: 15 s of silence, then three probes 5 s apart.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if congestion == "system":
        return
    if congestion == "auto":
        if same_host(sock):
            for name in _FAST_LOCAL:
                with contextlib.suppress(OSError):  # not in tcp_allowed_congestion_control: the system's default serves as well
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                    return
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    except OSError as error:
        raise ConfigError(
            f"DYNWIRE_TCP_CONGESTION={congestion}: this system does not allow it ({error.strerror}; see "
            "/proc/sys/net/ipv4/tcp_allowed_congestion_control)",
            name="DYNWIRE_TCP_CONGESTION",
            value=congestion,
            allowed="auto, system, or a name that the system allows",
        ) from error


def listen(host: str, port: int, setting: str = "DYN_TCP_RPC", backlog: int = 1024) -> socket.socket:
    """A non-blocking listening socket. Raises `BindError` with address, setting (its names begin with ``setting``) and remedy."""
    where = join_address(host, port)
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise BindError(
            f"cannot listen on {where}: the host does not resolve ({error.strerror}); set {setting}_HOST to an address of "
            "this host",
            address=where,
        ) from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise BindError(f"cannot listen on {where}: {_bind_remedy(error, setting)}", address=where) from error
    return sock


def _bind_remedy(error: OSError, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"the port is in use; stop the process that holds it, or set {setting}_PORT to another port (0: any free one)"
    if error.errno == errno.EACCES:
        return f"ports below 1024 need privileges; set {setting}_PORT to a higher one (0: any free one)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this host has no such address; set {setting}_HOST to one of its own, or to 0.0.0.0 for all"
    return f"{os.strerror(error.errno or 0)}; see {setting}_HOST and {setting}_PORT"


def connect_error(address: str, error: OSError) -> ConnectError:
    """A failed connect in words."""
    if isinstance(error, socket.gaierror):
        text = f"the host of {address} does not resolve ({error.strerror})"
    elif error.errno == errno.ECONNREFUSED:
        text = f"nobody listens at {address} (connection refused): the worker is not running or still starting"
    else:
        text = f"no connection to {address}: {error.strerror or error}"
    made = ConnectError(text, peer=address)
    made.__cause__ = error
    return made


def connect_timeout(address: str, seconds: float) -> ConnectError:
    return ConnectError(
        f"no connection to {address} within {seconds:.3g} s (DYN_TCP_CONNECT_TIMEOUT): host down, packets dropped, or a listener "
        "that does not speak",
        peer=address,
    )
