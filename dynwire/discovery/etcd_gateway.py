"""etcd's JSON gateway: questions and answers, several endpoints, users. Knows nothing of what is stored."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from ..config import mask_url

if TYPE_CHECKING:
    import httpx

REPLY_S = 2.0
"""How long an endpoint may take for one answer, before the next one is asked"""
AT_ONCE = 32
"""connections to etcd at the same time: registering many instances waits for one another instead of opening hundreds"""

NOT_FOUND, PERMISSION_DENIED, UNAVAILABLE, UNAUTHENTICATED = 5, 7, 14, 16  # gRPC status codes
NO_GATEWAY = 12  # gRPC's "unimplemented"

_T = TypeVar("_T")


class Header(msgspec.Struct):
    # The gateway writes 64-bit numbers as strings, and leaves out what is 0 or empty.
    revision: int = 0


class KeyValue(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0


class Range(msgspec.Struct):
    header: Header
    kvs: list[KeyValue] = []


class Done(msgspec.Struct):
    header: Header


class Lease(msgspec.Struct):
    ID: int = 0
    TTL: int = 0
    """0: there is no such lease"""


class Kept(msgspec.Struct):
    result: Lease


class Event(msgspec.Struct):
    kv: KeyValue
    type: str = "PUT"


class Watched(msgspec.Struct):
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""
    events: list[Event] = []


class Problem(msgspec.Struct):
    message: str = ""
    code: int = 0
    grpc_code: int = 0


class WatchLine(msgspec.Struct):
    result: Watched | None = None
    error: Problem | None = None


class Token(msgspec.Struct):
    token: str = ""


class Refused(Exception):
    """etcd has answered, with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Away(Exception):
    """No endpoint has answered, or none with a majority behind it; the text says which and why."""


class _Endpoint:
    __slots__ = ("password", "shown", "token", "url", "user")

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.shown = mask_url(url)
        self.user, self.password = unquote(parts.username or ""), unquote(parts.password or "")
        # without user and password: they belong into no header but the token's, and httpx logs URLs
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self.token = ""


class Gateway:
    """Asks one etcd, at any of ``endpoints``. Belongs to the event loop it is opened on.

    ``on_moved`` is called when another endpoint than before has answered.
    """

    def __init__(self, endpoints: tuple[str, ...], on_moved: Callable[[], object]) -> None:
        self._endpoints = tuple(_Endpoint(url) for url in endpoints)
        self.shown = ",".join(endpoint.shown for endpoint in self._endpoints)
        self._on_moved = on_moved
        self._current = 0  # the endpoint that answered last
        self._http: httpx.AsyncClient | None = None
        self.opened = False

    def open(self) -> None:
        """Connections are made by the first questions. After `close` it may be opened anew."""
        self._http = _client(self._endpoints)
        self.opened = True

    async def close(self) -> None:
        assert self._http is not None
        self.opened = False
        await self._http.aclose()

    async def call(self, method: str, body: dict[str, Any], kind: type[_T]) -> _T:
        """The answer of the first endpoint that gives one, beginning with the one that did last time.

        Everything that is asked may be asked twice: a lease that was granted without our hearing of it expires.
        Raises `Away` and `Refused`.
        """
        import httpx

        assert self._http is not None
        first, reasons = self._current, []
        for number in range(first, first + len(self._endpoints)):
            endpoint = self._endpoints[number % len(self._endpoints)]
            try:
                raw = await self._ask(endpoint, method, body)
                answer = msgspec.json.decode(raw, type=kind, strict=False)
            except httpx.TransportError as error:
                reasons.append(f"{endpoint.shown}: {_text(error)}")
            except msgspec.MsgspecError as error:
                raise Refused(NO_GATEWAY, f"{endpoint.shown} answers like no etcd ({error})") from error
            except Refused as refused:
                if refused.code != UNAVAILABLE:
                    raise
                reasons.append(f"{endpoint.shown}: {refused}")
            else:
                if self._current != number % len(self._endpoints):
                    self._current = number % len(self._endpoints)
                    self._on_moved()  # a watch there may be as silent as the one who did not answer
                return answer
        raise Away("; ".join(reasons))

    async def _ask(self, endpoint: _Endpoint, method: str, body: dict[str, Any]) -> bytes:
        headers = await self._headers(endpoint)
        try:
            return await self._post(endpoint, method, body, headers)
        except Refused as refused:
            if refused.code != UNAUTHENTICATED or not endpoint.user:
                raise
        endpoint.token = ""  # it was valid for some minutes, or until etcd was started again
        return await self._post(endpoint, method, body, await self._headers(endpoint))

    async def _headers(self, endpoint: _Endpoint) -> dict[str, str]:
        if not endpoint.user:
            return {}
        if not endpoint.token:
            try:
                raw = await self._post(endpoint, "auth/authenticate", {"name": endpoint.user, "password": endpoint.password}, {})
            except Refused as refused:
                if refused.code == UNAVAILABLE:
                    raise
                raise Refused(UNAUTHENTICATED, str(refused)) from refused
            endpoint.token = msgspec.json.decode(raw, type=Token).token
        return {"Authorization": endpoint.token}

    async def _post(self, endpoint: _Endpoint, method: str, body: dict[str, Any], headers: dict[str, str]) -> bytes:
        assert self._http is not None
        url = f"{endpoint.url}/v3/{method}"
        reply = await self._http.post(url, content=msgspec.json.encode(body), headers=headers)
        if reply.status_code != 200:
            raise _refusal(reply.status_code, reply.content)
        return reply.content

    async def watch(self, request: dict[str, Any]) -> AsyncGenerator[Watched, None]:
        """What the endpoint that answered last tells of a watch, until it ends it. Is silent while nothing changes.

        Raises `Refused`, and TimeoutError when the connection is lost.
        """
        import httpx

        assert self._http is not None
        endpoint = self._endpoints[self._current]
        body = msgspec.json.encode({"create_request": request})
        try:
            headers = await self._headers(endpoint)
            url = f"{endpoint.url}/v3/watch"
            # no limit for reading: it is silent while nothing changes
            patience = httpx.Timeout(REPLY_S, read=None, pool=None)
            async with self._http.stream("POST", url, content=body, headers=headers, timeout=patience) as reply:
                if reply.status_code != 200:
                    raise _refusal(reply.status_code, await reply.aread())
                async for line in reply.aiter_lines():
                    told = msgspec.json.decode(line, type=WatchLine, strict=False)
                    if told.error is not None:
                        raise Refused(told.error.grpc_code, told.error.message)
                    result = told.result or Watched()
                    if result.canceled and not result.compact_revision:
                        denied = "permission" in result.cancel_reason.lower()
                        raise Refused(PERMISSION_DENIED if denied else 0, f"it ends the watch: {result.cancel_reason}")
                    yield result
        except httpx.TransportError as error:
            raise TimeoutError from error
        except msgspec.MsgspecError as error:
            raise Refused(NO_GATEWAY, f"{endpoint.shown} answers like no etcd ({error})") from error


def _client(endpoints: tuple[_Endpoint, ...]) -> httpx.AsyncClient:
    import httpx

    # The system's certificate authorities, as for the other planes; httpx alone would bring its own list.
    verify: ssl.SSLContext | Literal[False] = False
    if any(endpoint.url.startswith("https:") for endpoint in endpoints):
        verify = ssl.create_default_context()
    return httpx.AsyncClient(
        verify=verify,
        trust_env=False,  # a proxy of the environment is for the world outside
        timeout=httpx.Timeout(REPLY_S, pool=None),
        limits=httpx.Limits(max_connections=AT_ONCE),
    )


def _refusal(status: int, content: bytes) -> Refused:
    try:
        problem = msgspec.json.decode(content, type=Problem)
    except msgspec.MsgspecError:
        text = f"status {status} without an error of etcd's"
        return Refused(UNAVAILABLE if status >= 500 else NO_GATEWAY, text)
    # 4: no answer in time, which is what a member without a majority says
    code = UNAVAILABLE if problem.code in (4, UNAVAILABLE) else problem.code
    if "user name is empty" in problem.message:
        code = UNAUTHENTICATED
    return Refused(code, problem.message.removeprefix("etcdserver: "))


def _text(error: BaseException) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return f"no answer in {REPLY_S:g} s"
    return str(error) or type(error).__name__
