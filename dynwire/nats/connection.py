"""One connection to NATS per event loop and configuration, shared by everybody who uses it there.

nats-py connects, authenticates, reconnects and speaks JetStream; messages of the request plane go past it through a port
(`dynwire._natsport`). Everything here runs on the loop that the connection belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import random
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from .._natsport import DENIED, FastPort, PlainPort, PortSubscription
from .._natsproto import CLOSED, DOWN, UP, MessageSink
from ..config import NatsConfig, mask_url
from ..errors import (
    ConfigError,
    ConnectError,
    DynwireError,
    ManagerClosed,
    PermissionDenied,
    Unauthenticated,
)

if TYPE_CHECKING:
    from nats.aio.client import Client, Server

logger = logging.getLogger("dynwire.nats")

PLANE_MAX_PAYLOAD = 16 * 1024 * 1024
"""bytes; whatever the server allows, larger messages are for the tcp plane"""

FAST_VERSIONS = (2, 16)
"""the nats-py whose seams the fast port knows: 2.16.x"""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 0.8
"""between two rounds through the servers; with an attempt on top a server is found within a second of being ready"""

DENIALS = 1000
"""subjects whose refusal is logged, each once; they may be made up without end"""

MAX_PINGS = 2
FLUSH_S = 1.0
"""how long `release` waits until the server has everything that was published"""
CLOSE_S = 2.0

PENDING_BYTES = 2 * 1024 * 1024
"""nats-py's default"""
PLAIN_PENDING_BYTES = 256 * 1024
"""what the fast port lets wait for the socket"""

STABLE_S = 1.0
"""a connection that was lost sooner than this does not begin a new series of attempts: a server that throws everybody out
would be tried without a pause"""

StateCallback = Callable[[int, BaseException | None], None]

INSTALL = "nats needs nats-py and nkeys: pip install 'dynwire[nats]'"

AUTH_SETTINGS = {
    "userpass": "user name and password (NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD)",
    "token": "token (NATS_AUTH_TOKEN)",
    "nkey": "nkey (NATS_AUTH_NKEY)",
    "credentials_file": "credentials file (NATS_AUTH_CREDENTIALS_FILE)",
    "url": "credentials in the URL (NATS_SERVER)",
}

AUTH_WORDS = ("authorization violation", "authentication", "authorization")


class _HopelessError(Exception):
    """Connecting will not succeed by trying again."""


class _Credentials(NamedTuple):
    kind: str
    """a key of AUTH_SETTINGS, or empty"""
    options: dict[str, Any]
    """of nats-py's connect()"""

    def __repr__(self) -> str:
        return f"_Credentials(kind={self.kind!r})"


class _Asked:
    """A subscription that the server has not confirmed. A refusal names its subject only, and nats-py writes that small."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.denied = False


@functools.cache
def _import_client() -> type[Client]:
    try:
        from nats.aio.client import Client
        from nats.errors import Error
    except ImportError as error:
        raise ConfigError(INSTALL, name="nats", allowed="pip install 'dynwire[nats]'") from error

    class LastingClient(Client):
        """Connects anew where nats-py closes for good: after any error of the server but a refused permission.

        Users are revoked and connections limited by people, who also take it back. In a version of nats-py without these
        methods nothing is overridden, and the connection ends.
        """

        async def _process_err(self, err_msg: str) -> None:
            text = err_msg.strip("'")
            if "permissions violation" in text:
                await super()._process_err(err_msg)
                return
            error = Error(f"nats: {text}")
            await self._error_cb(error)
            await self._process_op_err(error)

    return LastingClient


def _credentials(config: NatsConfig) -> _Credentials:
    """What to show the server. Raises `ConfigError` for a seed or file that cannot be one; never quotes it."""
    auth = config.auth
    if auth is None:
        parts = [urlsplit(url) for url in config.servers]
        users = {(part.username, part.password) for part in parts if part.username or part.password}
        if len(users) != 1:
            return _Credentials("url" if users else "", {})  # several: nats-py uses those of the server it connects to
        # Members of a cluster that the server tells of have URLs without credentials: these are for them as well.
        user, password = users.pop()
        return _Credentials("url", {"token": user} if password is None else {"user": user or "", "password": password})
    if auth.kind == "userpass":
        return _Credentials(auth.kind, {"user": auth.username, "password": auth.value})
    if auth.kind == "token":
        return _Credentials(auth.kind, {"token": auth.value})
    try:
        import nkeys  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(INSTALL, name="nats", allowed="pip install 'dynwire[nats]'") from error
    if auth.kind == "nkey":
        try:
            nkeys.from_seed(bytearray(auth.value.encode())).wipe()
        except (nkeys.NkeysError, ValueError) as error:
            text = "NATS_AUTH_NKEY is not the seed of an nkey (it begins with SU)"
            raise ConfigError(text, name="NATS_AUTH_NKEY", allowed="the seed of a user's nkey") from error
        return _Credentials(auth.kind, {"nkeys_seed_str": auth.value})
    try:
        with open(auth.value, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"NATS_AUTH_CREDENTIALS_FILE {auth.value!r} cannot be read: {error}",
            name="NATS_AUTH_CREDENTIALS_FILE",
            value=auth.value,
            allowed="a file made by nsc or nats auth",
        ) from error
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise ConfigError(
            f"NATS_AUTH_CREDENTIALS_FILE {auth.value!r} holds no user JWT with its seed",
            name="NATS_AUTH_CREDENTIALS_FILE",
            value=auth.value,
            allowed="a file made by nsc or nats auth",
        )
    return _Credentials(auth.kind, {"user_credentials": auth.value})


def _bare(config: NatsConfig) -> list[str]:
    """The servers without the credentials in their URLs, as the members of a cluster are told."""
    return [parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() for parts in map(urlsplit, config.servers)]


def _tls_context(config: NatsConfig) -> ssl.SSLContext | None:
    """None when nothing of TLS is configured; nats-py then makes a default context for a server that demands it."""
    wanted = config.tls_ca or config.tls_cert or config.tls_handshake_first
    if not wanted and not any(url.startswith(("tls:", "wss:")) for url in config.servers):
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls_ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"DYNWIRE_NATS_TLS_CA {config.tls_ca!r} cannot be used: {error}", name="DYNWIRE_NATS_TLS_CA", value=config.tls_ca
        ) from error
    if config.tls_cert is not None:
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"DYNWIRE_NATS_TLS_CERT {config.tls_cert!r} with DYNWIRE_NATS_TLS_KEY {config.tls_key!r} cannot be used: {error}",
                name="DYNWIRE_NATS_TLS_CERT",
                value=config.tls_cert,
            ) from error
    return context


def _use_fast_port(config: NatsConfig) -> bool:
    if config.port == "plain":
        return False
    from nats.aio.client import __version__

    numbers = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
    reason = ""
    if numbers != FAST_VERSIONS:
        reason = f"nats-py {__version__} is not {'.'.join(map(str, FAST_VERSIONS))}"
    elif any(url.startswith(("ws:", "wss:")) for url in config.servers):
        reason = "NATS_SERVER is a WebSocket"
    if reason:
        logger.warning("NATS messages go through nats-py's public API, which is slower: %s", reason)
    return not reason


class NatsConnection:
    """A connection to NATS; get it with `acquire`, give it back with `release`. One loop, one thread.

    While the server is away nats-py reconnects, for ever; ``up`` and `on_state` tell. A server in lame duck mode is left for
    another one, if there is one.
    """

    def __init__(self, config: NatsConfig, purpose: str) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._name = " ".join(filter(None, ("dynwire", purpose, socket.gethostname(), str(os.getpid()))))
        self._references = 0
        self._connecting: asyncio.Task[None] | None = None
        self._closing = False
        self._keeper: AsyncGenerator[None, None] | None = None
        self._ended = False
        self._callbacks: list[StateCallback] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._last_error: BaseException | None = None
        self._failures = 0
        self._tries: dict[str, int] = {}
        self._lost_server = ""
        self._up_since: float | None = None
        self._reconnecting: set[asyncio.Task[Any]] = set()
        self._place = self._url = ""
        self._denied: set[str] = set()
        self._subscribing: list[_Asked] = []
        self._credentials = _credentials(config)
        self.client: Client = _import_client()()
        fast = _use_fast_port(config)
        self.port: FastPort | PlainPort = (FastPort if fast else PlainPort)(self.client, self._loop)
        if fast:
            # a duck: nats-py asks neither for the class
            self.client._transport = self.port  # type: ignore[assignment]
            self.client._ps = self.port  # type: ignore[assignment]
        self.port.on_denied = self._on_denied

    def __repr__(self) -> str:
        return f"<NatsConnection {self._url or self.servers} {'up' if self.up else 'down'}>"

    # --- sharing

    @classmethod
    async def acquire(cls, config: NatsConfig, timeout: float | None = None, *, purpose: str = "") -> NatsConnection:
        """The connection of the running loop for ``config``; connects if there is none.

        Raises `ConnectError` when no server has answered within ``timeout`` seconds (and the connect timeout of ``config``), or,
        with ``config.wait`` off, as soon as none answers; `Unauthenticated` when the server refuses the credentials;
        `ConfigError` for settings that cannot work. Every successful call needs one `release`.
        """
        loop = asyncio.get_running_loop()
        for key in [key for key in _shared if key[0].is_closed()]:
            del _shared[key]  # whoever closed the loop forgot to release
        connection = _shared.get((loop, config))
        if connection is None or connection._closing:
            connection = cls(config, purpose)
            connection._connecting = loop.create_task(connection._connect(config.connect_timeout))
            _shared[(loop, config)] = connection
        connection._references += 1
        connecting = connection._connecting
        if connecting is not None and not connecting.done():
            try:
                await asyncio.wait([connecting], timeout=timeout)
            except asyncio.CancelledError:
                await connection._abandon()
                raise
        if connecting is not None and (not connecting.done() or connecting.exception() is not None):
            done = connecting.done()
            await connection._abandon()
            if done:
                connecting.result()
            raise connection._given_up(f"{timeout:.3g} s")
        return connection

    async def _abandon(self) -> None:
        """One of those who waited for the connection gives up."""
        self._references -= 1
        connecting = self._connecting
        if self._references == 0 and connecting is not None:
            self._forget()
            connecting.cancel()
            await asyncio.wait([connecting])
            if not connecting.cancelled() and connecting.exception() is None:
                await self._close()

    def _forget(self) -> None:
        self._closing = True
        if _shared.get((self._loop, self.config)) is self:
            del _shared[(self._loop, self.config)]

    async def release(self) -> None:
        """Give the connection back. The last one waits (1 s) until the server has what was published, and closes it."""
        self._references -= 1
        if self._references > 0 or self._ended:
            return
        self._forget()
        try:
            if self.up:
                with contextlib.suppress(*_nats_errors()):
                    await self._flush(FLUSH_S)
        finally:
            await self._close()

    async def _close(self) -> None:
        self._ended = True
        self.port.close_for_good()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.client.close()
        except _nats_errors() as error:
            logger.debug("closing the connection to NATS: %r", error)
        for _ in range(10):
            if not self._reconnecting:
                break
            for task in self._reconnecting:
                task.cancel()
            await asyncio.wait(self._reconnecting, timeout=FIRST_RETRY_S)
        self.port.abort()
        await self.port.finished()
        self._wake()
        if self._keeper is not None:
            await self._keeper.aclose()

    # --- connecting

    def _options(self) -> dict[str, Any]:
        config = self.config
        options: dict[str, Any] = {
            "servers": _bare(config) if self._credentials.kind == "url" and self._credentials.options else list(config.servers),
            "name": self._name,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
            "lame_duck_mode_cb": self._on_lame_duck,
            "reconnect_to_server_handler": self._next_server,
            "connect_timeout": config.connect_timeout,
            "reconnect_time_wait": FIRST_RETRY_S,
            "max_reconnect_attempts": -1,
            "ping_interval": config.ping_interval,
            "max_outstanding_pings": MAX_PINGS,
            "drain_timeout": CLOSE_S,
            "flush_timeout": CLOSE_S,
            # what nats-py holds before it makes publishers wait
            "pending_size": PENDING_BYTES if self.port.fast else PLAIN_PENDING_BYTES,
            **self._credentials.options,
        }
        context = _tls_context(config)
        if context is not None:
            options["tls"] = context
            options["tls_handshake_first"] = config.tls_handshake_first
        return options

    async def _connect(self, timeout: float) -> None:
        options = self._options()
        connecting = self._loop.create_task(self.client.connect(**options))
        try:
            await asyncio.wait([connecting], timeout=timeout)
        finally:
            while not connecting.done():  # some places in nats-py swallow a cancellation
                connecting.cancel()
                await asyncio.wait([connecting], timeout=FIRST_RETRY_S)
            if connecting.cancelled() or connecting.exception() is not None:
                self._forget()
                await self._close()
        if connecting.cancelled():
            raise self._given_up(f"{timeout:.3g} s, DYNWIRE_NATS_CONNECT_TIMEOUT")
        error = connecting.exception()
        if error is not None:
            if isinstance(error, _HopelessError):
                raise self._translated()
            if isinstance(error, DynwireError) or not isinstance(error, Exception):
                raise error
            self._last_error = error
            raise self._translated() from error
        self._keeper = self._until_the_loop_ends()
        await anext(self._keeper)
        if self.port.up():
            self._now_up()

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        """Close it if nobody has released it when the loop ends its generators: `asyncio.run` then still has a loop for it."""
        try:
            yield
        finally:
            self._keeper = None
            if not self._closing:
                self._forget()
                await self._close()

    def _now_up(self) -> None:
        self._last_error = None
        self._up_since = self._loop.time()
        url = self.client.connected_url
        assert url is not None
        self._place, self._url = url.netloc, mask_url(url.geturl())
        self._tell(UP, None)

    @property
    def servers(self) -> str:
        """Where it connects to, without credentials."""
        return ", ".join(map(mask_url, self.config.servers))

    def _translated(self) -> DynwireError:
        """The last thing that went wrong, in our terms. The only place that knows nats-py's."""
        error = self._last_error
        at = f"{self.servers} (NATS_SERVER)"
        if error is None:
            return ConnectError(f"no NATS server answered at {at}", peer=self.servers)
        if isinstance(error, DynwireError):
            return error
        if isinstance(error, ImportError):
            text = f"a WebSocket (ws://, wss:// in NATS_SERVER) needs another package: {error}"
            return _chained(ConfigError(text, name="NATS_SERVER", allowed="nats:// or tls://"), error)
        text = str(error).removeprefix("nats: ").strip("'\"") or type(error).__name__
        if any(word in text.lower() for word in AUTH_WORDS) and not isinstance(error, OSError):
            kind = self._credentials.kind
            shown = f"refused the {AUTH_SETTINGS[kind]}" if kind else "wants credentials, none are set (NATS_AUTH_…)"
            return _chained(Unauthenticated(f"the NATS server at {at} {shown}: {text}", peer=self.servers), error)
        if isinstance(error, ssl.SSLCertVerificationError):
            text = f"TLS: {error.verify_message}; authorities to trust are set with DYNWIRE_NATS_TLS_CA"
        elif isinstance(error, ssl.SSLError):
            text = f"TLS: {error.reason or text}"
        elif isinstance(error, ConnectionRefusedError):
            text = "connection refused"
        elif isinstance(error, TimeoutError):
            text = "it did not answer in time"
        return _chained(ConnectError(f"no connection to NATS at {at}: {text}", peer=self.servers), error)

    def _given_up(self, after: str) -> DynwireError:
        error = self._translated()
        if type(error) is not ConnectError:
            return error
        return _chained(ConnectError(f"{error} (given up after {after})", peer=self.servers), error.__cause__)

    def _next_server(self, pool: list[Server], info: Mapping[str, Any]) -> tuple[Server | None, float]:
        """Which server to try next, and after how long. nats-py asks before every attempt to reconnect."""
        if self._closing:
            raise asyncio.CancelledError  # nats-py's task ends with it
        places = [server.uri.netloc for server in pool]
        tries = [self._tries.get(place, 0) for place in places]
        fewest = min(tries)
        candidates = [i for i, n in enumerate(tries) if n == fewest]
        others = [i for i in candidates if places[i] != self._lost_server]  # the one that was lost comes last in a round
        chosen = random.choice(others or candidates)
        self._tries[places[chosen]] = fewest + 1
        delay = 0.0
        if max(tries) == fewest:  # a round begins
            delay = min(FIRST_RETRY_S * 2 ** min(fewest, 10), LAST_RETRY_S) * random.uniform(0.5, 1.0)
        return pool[chosen], delay

    # --- what nats-py tells

    async def _on_error(self, error: Exception) -> None:
        denied = DENIED.search(str(error))
        if denied is not None:
            self._on_denied(denied[1].lower(), denied[2])
            return
        if self._closing:
            return
        if self.client.is_connected and not isinstance(error, OSError):
            if not isinstance(error, _nats_errors()):
                logger.error("a callback of a NATS subscription has failed", exc_info=error)
                return
            if type(error).__name__ == "SlowConsumerError":
                logger.warning("nats-py dropped a message, because its subscriber does not keep up: %s", error)
                return
        self._last_error = error
        self._failures += 1
        if not self.port.fast and not self.client.is_connected:
            self.port.abort()  # nats-py 2.16 forgets the socket of an attempt to reconnect that has failed
        logger.debug("NATS at %s: %r", self.servers, error)
        if self._connecting is not None and not self._connecting.done() and not self._closing:
            refused = isinstance(self._translated(), (Unauthenticated, ConfigError))
            if refused or (not self.config.wait and self._failures >= len(self.config.servers)):
                raise _HopelessError from error  # ends nats-py's connect()

    async def _on_disconnected(self) -> None:
        if self._closing or self._connecting is None or not self._connecting.done():
            return
        if not self.client.is_reconnecting:  # closed, by whoever; this is then their task
            self.port.go_away()
            return
        task = asyncio.current_task()
        assert task is not None
        for older in self._reconnecting:
            older.cancel()  # again: nats-py did it, and swallows that in places
        self._reconnecting.add(task)
        task.add_done_callback(self._reconnecting_ended)
        lost_error = self.port.error
        self.port.go_away()
        if self._up_since is None:
            return  # it was lost again before anybody could use it
        self._lost_server, lost = self._place, self._url
        if self._loop.time() - self._up_since > STABLE_S:
            self._tries.clear()
        self._up_since = None
        if lost_error is not None:
            self._last_error = lost_error
        logger.warning("the connection to NATS at %s is lost; reconnecting", lost)
        self._tell(DOWN, self._translated())

    def _reconnecting_ended(self, task: asyncio.Task[Any]) -> None:
        """nats-py 2.16 does not look at how its task ends; with an exception nobody would try any more."""
        self._reconnecting.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        logger.debug("nats-py's task that reconnects has failed", exc_info=task.exception())
        if not self._closing and self.client.is_reconnecting and self.client._reconnection_task is task:
            self.client._reconnection_task = self._loop.create_task(self.client._attempt_reconnect())

    async def _on_reconnected(self) -> None:
        if self.port.up():
            self._now_up()
            logger.info("connected to NATS at %s again", self._url)

    async def _on_closed(self) -> None:
        if not self._closing:  # nats-py gave up, which another version of it may do
            self._forget()
            error = self._translated()
            logger.error("nats-py has closed the connection to NATS at %s: %s", self.servers, error)
            self.port.close_for_good(error)
            self._tell(CLOSED, error)

    async def _on_lame_duck(self) -> None:
        here = self.client.connected_url
        others = {server.netloc for server in self.client.servers} - {here.netloc if here is not None else ""}
        if others:
            logger.info("the NATS server %s is going to stop; moving to another one", self.url)
            await self.client.force_reconnect()
        else:
            logger.warning("the NATS server %s is going to stop, and no other one is known (NATS_SERVER)", self.url)

    def _refusal(self, operation: str, subject: str) -> PermissionDenied:
        verb = "publish" if operation == "publish" else "subscribe"
        return PermissionDenied(
            f"the NATS server {self.url} does not allow this user to {verb} to {subject!r}",
            phase="send" if operation == "publish" else "subscribe",
            peer=self.url,
            details={"operation": operation, "subject": subject},
        )

    def _on_denied(self, operation: str, subject: str) -> None:
        """The server refused one operation: the connection stays."""
        error = self._refusal(operation, subject)
        for asked in self._subscribing:
            if operation == "subscription" and asked.subject == subject.lower():
                asked.denied = True
        key = f"{operation} {subject.lower()}"
        if key not in self._denied and len(self._denied) < DENIALS:
            self._denied.add(key)
            logger.warning("%s", error)
        self.port.refused(error)

    def denied(self, operation: str, subject: str) -> PermissionDenied | None:
        """The error for an operation (``publish`` or ``subscribe``) that the server has refused before; None if it has not.

        The server says so at some time after the operation. For those who wait for an answer that cannot come.
        """
        verb, key = ("publish", "publish") if operation == "publish" else ("subscribe", "subscription")
        if f"{key} {subject.lower()}" not in self._denied:
            return None
        return PermissionDenied(
            f"the NATS server {self.url} does not allow this user to {verb} to {subject!r}",
            phase="send" if operation == "publish" else "subscribe",
            peer=self.url,
            details={"operation": operation, "subject": subject},
        )

    def _tell(self, state: int, error: BaseException | None) -> None:
        self._wake()
        for callback in self._callbacks:
            self._loop.call_soon(callback, state, error)  # not in nats-py's task, which an exception would end

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)

    # --- using it

    @property
    def up(self) -> bool:
        """True while there is a server to send to."""
        return self.port.state == UP

    @property
    def url(self) -> str:
        """The server it is connected to, without credentials; while down, the one it was connected to."""
        return self._url

    @property
    def server_info(self) -> dict[str, Any]:
        """What the server said of itself when it was connected to (its INFO)."""
        return dict(self.client._server_info)

    @property
    def max_payload(self) -> int:
        """Largest message in bytes, headers included: what the server announced, and never above 16 MiB."""
        return min(self.port.max_payload, PLANE_MAX_PAYLOAD)

    def on_state(self, callback: StateCallback) -> Callable[[], None]:
        """Call ``callback(state, error)`` from the loop on every change (`_natsproto.UP`, DOWN, CLOSED). Returns what ends it."""
        self._callbacks.append(callback)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return remove

    async def wait_up(self, timeout: float | None = None) -> None:
        """Wait until there is a server. Raises `ConnectError` or `Unauthenticated` after ``timeout`` s; `ManagerClosed`."""
        limit = self.config.connect_timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                while not self.up:
                    if self.port.state == CLOSED:
                        raise ManagerClosed("the connection to NATS is closed", peer=self.servers)
                    future: asyncio.Future[None] = self._loop.create_future()
                    self._waiters.append(future)
                    await future
        except TimeoutError as error:
            raise self._given_up(f"{limit:.3g} s") from error

    async def subscribe(self, subject: str, sink: MessageSink, queue: str = "") -> PortSubscription:
        """Deliver messages of ``subject`` to ``sink``, from now until ``unsubscribe()`` of the result, across reconnects.

        When it returns the server knows of it; while there is no connection, it will be told with the next one. Raises
        `PermissionDenied` when the user may not subscribe there, `ConnectError` when the server does not answer within the
        connect timeout, `ManagerClosed` after the last `release`.
        """
        if self.port.state == CLOSED:
            raise ManagerClosed("the connection to NATS is closed", peer=self.servers)
        asked = _Asked(subject.lower())
        self._subscribing.append(asked)
        try:
            subscription = await self.port.subscribe(subject, sink, queue)
            try:
                await self._confirm()
                if asked.denied:
                    raise self._refusal("subscription", subject)
            except BaseException:
                subscription.unsubscribe()
                raise
        except _nats_errors() as error:
            if type(error).__name__ == "BadSubjectError":
                raise ConfigError(f"{subject!r} is not a NATS subject", name="subject", value=subject) from error
            self._last_error = error
            raise self._translated() from error
        finally:
            self._subscribing.remove(asked)
        return subscription

    async def finish(self, subscription: PortSubscription) -> None:
        """Unsubscribe after what the server had sent so far has been delivered, or at once if the connection does not work."""
        subscription.stop()
        try:
            with contextlib.suppress(DynwireError):
                await self._confirm()
        finally:
            subscription.unsubscribe()

    async def _flush(self, timeout: float) -> None:
        """Wait until the server has everything that was published or told to nats-py. Raises nats-py's errors."""
        async with asyncio.timeout(timeout):
            await self.port.settle()
            await self.client.flush(timeout=timeout)  # type: ignore[arg-type]  # seconds, also fractions

    async def _confirm(self) -> None:
        """Wait until the server has done what it was told. Without a connection there is nothing to wait for."""
        if self.up:
            try:
                await self._flush(self.config.connect_timeout)
            except _nats_errors() as error:
                if self.up:
                    raise ConnectError(f"the NATS server {self.url} did not answer to a subscription", peer=self.url) from error


def _nats_errors() -> tuple[type[Exception], ...]:
    """What nats-py raises for a connection that does not work."""
    from nats.errors import Error

    return (Error, OSError, TimeoutError)


def _chained(error: DynwireError, cause: BaseException | None) -> DynwireError:
    error.__cause__ = cause
    return error


_shared: dict[tuple[asyncio.AbstractEventLoop, NatsConfig], NatsConnection] = {}
_inherited: list[Any] = []


def _after_fork() -> None:
    # Kept, not dropped: destroying a connection would take the parent's socket out of the epoll set that both share.
    _inherited.append(dict(_shared))
    _shared.clear()


os.register_at_fork(after_in_child=_after_fork)
