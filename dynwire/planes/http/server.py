"""The serving side of the http plane."""

from __future__ import annotations

import inspect
import socket
import time
from typing import Any

from ..._httpio import HttpServerConnection
from ..._version import __version__
from ...config import Config
from ...errors import DynwireError
from ...wire import http_api
from ..sockets.address import split_address
from ..sockets.server import AsyncSocketServer
from .address import HttpAddress, http2_limits
from .offenders import PAUSE_S, Offenders, is_abuse
from .parting import Parting
from .tls import server_context

_JSON_HEAD: http_api.Headers = [(b"content-type", http_api.JSON)]


class AsyncHttpServer(AsyncSocketServer):
    """Serves endpoints over HTTP/2 and, on the same port, HTTP/1.1; besides pages for operators and their tools."""

    plane = "http"
    setting = "DYN_HTTP_RPC"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.routes: dict[bytes, str] = {}
        """paths that were asked for, and their endpoints; shared by all connections"""
        self._limits = http2_limits(config)
        self._limits["max_concurrent_streams"] = config.http.max_concurrent_streams
        self._live = http_api.live_page()
        self.fixed: dict[bytes, tuple[http_api.Headers, bytes]] = {
            b"/live": ([(b":status", b"200"), *_JSON_HEAD, (b"content-length", b"%d" % len(self._live))], self._live)
        }
        """pages that are the same for everybody, answered in compiled code"""
        self._tls = server_context(config)
        self._scheme = "http" if self._tls is None else "https"
        self._offenders = Offenders()
        self.parting = Parting()
        """sockets of connections that broke the protocol, which these hand over"""

    @property
    def port(self) -> int:
        return self._config.http.port

    def advertise(self, host: str, port: int) -> str:
        return str(HttpAddress(self._scheme, host, port, self._config.http.root_path))

    def make_connection(self, sock: socket.socket, peer: str) -> HttpServerConnection:
        return HttpServerConnection(
            self._loop,
            sock,
            peer,
            self,
            self._base_context,
            tracebacks=self._config.remote_tracebacks,
            spin_us=self._config.tcp.spin_us,
            root=self._config.http.root_path,
            token=self._config.token,
            pages=self._page,
            scheme=self._scheme,
            tls=self._tls,
            **self._limits,
        )

    def admit(self, connection: HttpServerConnection, host: str) -> None:
        connection.leniency = self._offenders.leniency(host, time.monotonic())
        if self._offenders.paused(connection.leniency):
            # It is not read meanwhile, so whoever connects again and again costs next to nothing.
            self._loop.call_later(PAUSE_S, self._open, connection)
        else:
            connection.open()

    def _open(self, connection: HttpServerConnection) -> None:
        if not connection.dead:
            connection.open()

    def _gone(self, connection: HttpServerConnection, error: DynwireError) -> None:
        super()._gone(connection, error)
        if is_abuse(error):
            host = split_address(str(connection.peer))[0]
            if self._offenders.note(host, time.monotonic()):
                self._log.warning("%s; new connections from %s are read after %g s, with smaller budgets", error, host, PAUSE_S)

    async def close(self, grace: float = 0.0) -> None:
        await super().close(grace)
        self.parting.close()

    # Pages -------------------------------------------------------------------------------------------------------------------

    def _page(self, head: http_api.RequestHead) -> tuple[int, http_api.Headers, bytes]:
        """Status, headers and body for everything that is no endpoint."""
        root = self._config.http.root_path
        if head.page == "live":
            return 200, _JSON_HEAD, self._live
        if head.page == "ready":
            reasons = self._reasons()
            return 503 if reasons else 200, _JSON_HEAD, http_api.ready_page(not reasons, reasons)
        if head.page == "stop":
            found = any(connection.find_request(head.request_id) for connection in self._connections)
            if found:
                return 204, [], b""
            raise http_api.HttpFault(404, "Not Found", f"no request with the id {head.request_id!r} is running here")
        if head.page == "openapi":
            return 200, _JSON_HEAD, http_api.openapi_page(self._infos(), root, version=__version__)
        about = {"software": f"dynwire {__version__}", "address": self.address, "engine": self._config.http.engine}
        return 200, _JSON_HEAD, http_api.endpoints_page(self._infos(), root, about)

    def _reasons(self) -> list[str]:
        """Why requests are not welcome now; empty if they are."""
        if self._closed:
            return ["the server is closing"]
        if not self.entries:
            return ["no endpoint is served"]
        draining = sorted(name for name, entry in self.entries.items() if entry.draining)
        if len(draining) == len(self.entries):
            return [f"{name} is shutting down" for name in draining]
        return []

    def _infos(self) -> list[http_api.EndpointInfo]:
        return [_info(name, entry) for name, entry in self.entries.items()]


def _info(name: str, entry: Any) -> http_api.EndpointInfo:
    handler = entry.handler
    return http_api.EndpointInfo(
        endpoint=name,
        streaming=handler.streaming,
        in_flight=entry.in_flight,
        max_in_flight=entry.max_in_flight,
        description=inspect.getdoc(handler.function) or "",
        request_type=handler.request_type,
    )
