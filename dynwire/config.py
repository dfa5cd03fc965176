"""Settings: typed, validated, each with its origin. The only module of the package that reads the environment.

A setting is one line in one of the dataclasses below: its variable, how to parse it, its default and what it means.
Parsing, precedence, origins, validation, ``dynwire config show`` and the hints for misspelt names are derived from it.

Precedence: keyword > command line > environment > TOML file (``DYNWIRE_CONFIG``) > default. A variable that is set to the
empty string counts as not set, so that ``DYN_X= command`` in a shell turns it off.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from .errors import ConfigError

logger = logging.getLogger("dynwire.config")

MASK = "********"
PLANES = ("tcp", "http", "nats")


# Kinds of values: each parses text or a Python value, raises ValueError, and says in words what it allows -------------------


class Kind:
    """How a setting is parsed; ``allowed`` completes the sentence "allowed is …"."""

    allowed = "text"

    def parse(self, raw: object) -> Any:
        """Return the typed value; ValueError (with or without a reason) if it is not allowed."""
        if not isinstance(raw, str):
            raise ValueError(f"got {type(raw).__name__}")
        return raw.strip()

    def show(self, value: Any) -> Any:
        """The value as people may see it: JSON-compatible, credentials inside it masked."""
        return value


class Text(Kind):
    """Any text without surrounding white space, or text that matches ``pattern``."""

    def __init__(self, allowed: str = "text", pattern: str = "") -> None:
        self.allowed = allowed
        self._pattern = re.compile(pattern or ".*", re.DOTALL)

    def parse(self, raw: object) -> str:
        value: str = super().parse(os.fspath(raw) if isinstance(raw, os.PathLike) else raw)
        if not self._pattern.fullmatch(value):
            raise ValueError
        return value


class Number(Kind):
    """An int or a finite float from ``low`` to ``high``, both included."""

    def __init__(self, type_: type[int] | type[float], low: float, high: float, unit: str = "") -> None:
        self._type, self._low, self._high = type_, low, high
        what = "an integer" if type_ is int else "a number"
        self.allowed = f"{what}{f' of {unit}' if unit else ''} from {_plain(low)} to {_plain(high)}"

    def parse(self, raw: object) -> int | float:
        if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
            raise ValueError(f"got {type(raw).__name__}")
        if self._type is int and isinstance(raw, float):
            if not raw.is_integer():
                raise ValueError
            raw = int(raw)
        value = self._type(raw)
        if not (math.isfinite(value) and self._low <= value <= self._high):
            raise ValueError
        return value


class Flag(Kind):
    """A truth value in the usual spellings, in any case."""

    allowed = "true, false, 1, 0, yes, no, on or off"
    _WORDS: ClassVar = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

    def parse(self, raw: object) -> bool:
        try:
            return self._WORDS[str(raw).strip().lower()]
        except KeyError:
            raise ValueError from None


class Choice(Kind):
    """One of several words, in any case. ``keyword_only`` words are accepted as keywords and not advertised."""

    def __init__(self, *words: str, keyword_only: tuple[str, ...] = ()) -> None:
        self.words, self.keyword_only = words, keyword_only
        self.allowed = _either(words)

    def parse(self, raw: object) -> str:
        word: str = super().parse(raw).lower()
        if word not in self.words and word not in self.keyword_only:
            raise ValueError
        return word


class Host(Kind):
    """A host name or IP address without a port; IPv6 with or without brackets."""

    def __init__(self, wildcard: bool) -> None:
        self._wildcard = wildcard
        rest = "or a wildcard such as 0.0.0.0" if wildcard else "that peers can connect to, never a wildcard such as 0.0.0.0"
        self.allowed = f"a host name or IP address (no port) {rest}"

    def parse(self, raw: object) -> str:
        import ipaddress

        value: str = super().parse(raw)
        host = value.removeprefix("[").removesuffix("]")
        if not self._wildcard and is_wildcard(host):
            raise ValueError("it is a wildcard")
        if ":" in host:
            ipaddress.ip_address(host)  # its ValueError says "does not appear to be an IPv4 or IPv6 address"
        elif not re.fullmatch(r"[A-Za-z0-9._-]{1,253}|\*", host):
            raise ValueError
        return host


class Urls(Kind):
    """One or several URLs, comma separated or as a list; the first scheme is added where none is given."""

    def __init__(self, *schemes: str) -> None:
        self._schemes = schemes
        self.allowed = f"{schemes[0]}://host:port, several separated by commas (schemes: {', '.join(schemes)})"

    def parse(self, raw: object) -> tuple[str, ...]:
        from urllib.parse import urlsplit

        items = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"got {type(raw).__name__}")
        urls = tuple(url if "://" in url else f"{self._schemes[0]}://{url}" for item in items if (url := item.strip()))
        if not urls:
            raise ValueError("no URL is given")
        for url in urls:
            # the messages of urllib quote parts of the URL, and what it takes for a port can be half a password
            try:
                parts = urlsplit(url)
                good = parts.scheme in self._schemes and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"{mask_url(url)!r} is not one")
        return urls

    def show(self, value: Any) -> Any:
        return [mask_url(url) for url in value]


class Optional_(Kind):
    """Another kind, or None for any of ``words``."""

    def __init__(self, kind: Kind, *words: str) -> None:
        self._kind, self._words = kind, words
        self.allowed = f"{kind.allowed}{f', or {_either(words[:1])} for none' if words else ''}"

    def parse(self, raw: object) -> Any:
        if raw is None or (isinstance(raw, str) and raw.strip().lower() in self._words):
            return None
        return self._kind.parse(raw)

    def show(self, value: Any) -> Any:
        return None if value is None else self._kind.show(value)


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _either(words: tuple[str, ...]) -> str:
    quoted = [repr(word) for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def mask_url(url: str) -> str:
    """The URL with user name, password or token before the last ``@`` replaced by asterisks.

    Everything up to the last ``@`` goes, even slashes and commas that belong there in no valid URL: an invalid one is what
    error messages show.
    """
    return re.sub(r"^(\w+://)?.*@", rf"\g<1>{MASK}@", url, flags=re.DOTALL)


# Declaring settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Meta:
    env: str
    kind: Kind
    doc: str
    unit: str
    secret: bool
    default_text: str


class Setting(NamedTuple):
    """What is known about one setting; see `settings`."""

    name: str
    """dotted name, as in the TOML file: ``tcp.port``"""
    env: str
    kind: Kind
    doc: str
    unit: str
    secret: bool
    default_text: str
    """the default in words, where it is computed"""

    def show(self, value: Any) -> Any:
        """The value as people may see it."""
        return MASK if self.secret and value is not None else self.kind.show(value)


def setting(default: Any, env: str, kind: Kind, doc: str, *, unit: str = "", secret: bool = False, default_text: str = "") -> Any:
    """A dataclass field that is a setting. A callable ``default`` is called whenever the default is needed."""
    metadata = {"setting": _Meta(env, kind, doc, unit, secret, default_text)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


class _Part:
    def __repr__(self) -> str:
        """Like a dataclass's, with secrets masked: configurations end up in logs."""
        shown = []
        for f in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            if f.repr:
                value = getattr(self, f.name)
                meta = f.metadata.get("setting")
                if meta is not None:
                    value = MASK if meta.secret and value is not None else meta.kind.show(value)
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _seconds(low: float = 0.001) -> Number:
    # a day is more than anything here is meant for; infinity would break the bounds of P1
    return Number(float, low, 86400.0, "seconds")


def _bytes(low: int, high: int) -> Number:
    return Number(int, low, high, "bytes")


def _count(low: int, high: int) -> Number:
    return Number(int, low, high)


_PORT = Number(int, 0, 65535)
_U31 = 2**31 - 1


def default_handler_threads() -> int:
    """``min(32, cpus + 4)``, counting the CPUs that this process may use."""
    return min(32, len(os.sched_getaffinity(0)) + 4)


def default_file_dir() -> str:
    """The directory of the file discovery: per user, so that users of one machine neither meet nor block each other."""
    import tempfile  # 7 ms at import time, for one path

    return os.path.join(tempfile.gettempdir(), f"dynwire-{os.getuid()}", "discovery")


# The settings ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class TcpConfig(_Part):
    """The native wire. Times in seconds, sizes in bytes."""

    host: str | None = setting(
        None, "DYN_TCP_RPC_HOST", Optional_(Host(wildcard=True), "auto"), "address to bind", default_text="auto-detected"
    )
    port: int = setting(0, "DYN_TCP_RPC_PORT", _PORT, "port to bind; 0: any free one")
    advertise_host: str | None = setting(
        None,
        "DYNWIRE_TCP_ADVERTISE_HOST",
        Optional_(Host(wildcard=False), "auto"),
        "host that peers are told to connect to",
        default_text="the bound address, or this host's if that is a wildcard",
    )
    max_message_size: int = setting(
        33554432, "DYN_TCP_MAX_MESSAGE_SIZE", _bytes(1, _U31), "largest payload, both directions", unit="bytes"
    )
    request_timeout: float = setting(
        10.0, "DYN_TCP_REQUEST_TIMEOUT", _seconds(), "until a worker has accepted the request", unit="s"
    )
    pool_size: int = setting(50, "DYN_TCP_POOL_SIZE", _count(1, 65535), "connections per peer, at most, opened lazily")
    connect_timeout: float = setting(3.0, "DYN_TCP_CONNECT_TIMEOUT", _seconds(), "until a connection is open", unit="s")
    channel_buffer: int = setting(
        100, "DYN_TCP_CHANNEL_BUFFER", _count(1, 1_000_000), "requests that may wait for a connection's writer; more are refused"
    )
    spin_us: float = setting(
        0.0, "DYNWIRE_TCP_SPIN_US", Number(float, 0, 1_000_000, "microseconds"), "poll this long before sleeping", unit="us"
    )
    keepalive_interval: float = setting(10.0, "DYNWIRE_TCP_KEEPALIVE_INTERVAL", _seconds(0.01), "ping an idle peer", unit="s")
    keepalive_timeout: float = setting(
        10.0, "DYNWIRE_TCP_KEEPALIVE_TIMEOUT", _seconds(0.01), "peer without pong is lost", unit="s"
    )
    max_connections: int = setting(4096, "DYNWIRE_TCP_MAX_CONNECTIONS", _count(1, 1_000_000), "connections to one server")
    max_streams: int = setting(16384, "DYNWIRE_TCP_MAX_STREAMS", _count(1, 1_000_000), "requests at once per connection")
    stream_window: int = setting(
        262144, "DYNWIRE_TCP_STREAM_WINDOW", _bytes(4096, _U31), "unread per stream before its writer waits", unit="bytes"
    )
    connection_window: int = setting(
        67108864, "DYNWIRE_TCP_CONNECTION_WINDOW", _bytes(4096, _U31), "unread per connection before writers wait", unit="bytes"
    )
    congestion: str = setting(
        "auto",
        "DYNWIRE_TCP_CONGESTION",
        Text("'auto', 'system' or a name such as 'reno'", r"[a-z][a-z0-9_]{0,14}"),
        "congestion control; auto: the fastest one for a peer on this host, the system's otherwise",
    )


@dataclass(frozen=True, repr=False)
class HttpConfig(_Part):
    """The http plane. Times in seconds, sizes in bytes."""

    host: str | None = setting(
        None, "DYN_HTTP_RPC_HOST", Optional_(Host(wildcard=True), "auto"), "address to bind", default_text="auto-detected"
    )
    port: int = setting(8888, "DYN_HTTP_RPC_PORT", _PORT, "port to bind; 0: any free one")
    root_path: str = setting(
        "/v1/rpc",
        "DYN_HTTP_RPC_ROOT_PATH",
        Text("a path that begins with '/', without a '/' at its end", r"(/[A-Za-z0-9._~-]+)+"),
        "path before namespace/component/endpoint",
    )
    advertise_host: str | None = setting(
        None,
        "DYNWIRE_HTTP_ADVERTISE_HOST",
        Optional_(Host(wildcard=False), "auto"),
        "host that peers are told to connect to",
        default_text="the bound address, or this host's if that is a wildcard",
    )
    # RFC 9113 §4.2: SETTINGS_MAX_FRAME_SIZE is 2^14 to 2^24 - 1
    max_frame_size: int = setting(
        1048576, "DYN_HTTP2_MAX_FRAME_SIZE", _bytes(16384, 16777215), "largest HTTP/2 frame", unit="bytes"
    )
    max_concurrent_streams: int = setting(
        1000, "DYN_HTTP2_MAX_CONCURRENT_STREAMS", _count(1, _U31), "requests at once per connection"
    )
    pool_max_idle_per_host: int = setting(
        100, "DYN_HTTP2_POOL_MAX_IDLE_PER_HOST", _count(0, 65535), "idle connections kept per peer"
    )
    pool_idle_timeout: float = setting(
        90.0, "DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS", _seconds(), "an idle connection is closed after", unit="s"
    )
    keep_alive_interval: float = setting(
        30.0, "DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS", _seconds(0.01), "ping an idle peer", unit="s"
    )
    keep_alive_timeout: float = setting(
        10.0, "DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS", _seconds(0.01), "peer without pong is lost", unit="s"
    )
    adaptive_window: bool = setting(
        True, "DYN_HTTP2_ADAPTIVE_WINDOW", Flag(), "flow-control window follows the measured bandwidth-delay product"
    )
    stream_window: int = setting(
        1048576,
        "DYNWIRE_HTTP2_STREAM_WINDOW",
        _bytes(65535, _U31),
        "unread per stream before its writer waits; where DYN_HTTP2_ADAPTIVE_WINDOW is on, to begin with",
        unit="bytes",
    )
    connection_window: int = setting(
        4194304, "DYNWIRE_HTTP2_CONNECTION_WINDOW", _bytes(65535, _U31), "the same per connection", unit="bytes"
    )
    tls_cert: str | None = setting(
        None, "DYNWIRE_HTTP_TLS_CERT", Optional_(Text()), "PEM file of the server's certificate; the server then speaks TLS only"
    )
    tls_key: str | None = setting(
        None, "DYNWIRE_HTTP_TLS_KEY", Optional_(Text()), "PEM file of its key", default_text="in the certificate's file"
    )
    tls_ca: str | None = setting(
        None,
        "DYNWIRE_HTTP_TLS_CA",
        Optional_(Text()),
        "PEM file of the authorities that callers trust",
        default_text="the system's",
    )
    engine: str = setting("native", "DYNWIRE_HTTP2_ENGINE", Choice("native", "h2"), "HTTP/2 implementation")


class NatsAuth(NamedTuple):
    """How to authenticate at NATS: ``kind`` is ``userpass``, ``token``, ``nkey`` or ``credentials_file``."""

    kind: str
    value: str
    """the password, token, seed or path"""
    username: str = ""

    def __repr__(self) -> str:
        return f"NatsAuth(kind={self.kind!r})"


@dataclass(frozen=True, repr=False)
class NatsConfig(_Part):
    """NATS, for the nats request plane, the event planes over NATS and NATS discovery."""

    servers: tuple[str, ...] = setting(
        ("nats://localhost:4222",), "NATS_SERVER", Urls("nats", "tls", "ws", "wss"), "servers, several separated by commas"
    )
    username: str | None = setting(None, "NATS_AUTH_USERNAME", Optional_(Text()), "with NATS_AUTH_PASSWORD")
    password: str | None = setting(None, "NATS_AUTH_PASSWORD", Optional_(Text()), "with NATS_AUTH_USERNAME", secret=True)
    token: str | None = setting(
        None, "NATS_AUTH_TOKEN", Optional_(Text()), "used if user name and password are not set", secret=True
    )
    nkey: str | None = setting(None, "NATS_AUTH_NKEY", Optional_(Text()), "used if none of the above is set", secret=True)
    credentials_file: str | None = setting(
        None, "NATS_AUTH_CREDENTIALS_FILE", Optional_(Text()), "path, used if none of the above is set"
    )
    prefix: str = setting(
        "dynwire",
        "DYNWIRE_NATS_PREFIX",
        Text("letters, digits, '_' and '-' in parts separated by dots", r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}"),
        "begins every subject, stream and bucket; deployments that share a NATS server need different ones",
    )
    inbox_prefix: str = setting(
        "_INBOX",
        "DYNWIRE_NATS_INBOX_PREFIX",
        Text("letters, digits, '_' and '-' in parts separated by dots", r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,7}"),
        "begins the subjects that replies come to, for users who may subscribe to some only",
    )
    probe_interval: float = setting(
        0.5, "DYNWIRE_NATS_PROBE_INTERVAL", _seconds(0.01), "silence after which a worker is asked for its requests", unit="s"
    )
    keepalive_timeout: float = setting(
        10.0, "DYNWIRE_NATS_KEEPALIVE_TIMEOUT", _seconds(0.01), "a worker that does not answer that is lost", unit="s"
    )
    credit_budget: int = setting(
        33554432,
        "DYNWIRE_NATS_CREDIT_BUDGET",
        _bytes(16384, _U31),
        "what may be on its way to one client; the NATS server drops clients for whom more than its max_pending waits",
        unit="bytes",
    )
    request_mode: str = setting(
        "core", "DYN_NATS_REQUEST_MODE", Choice("core", "jetstream"), "jetstream: requests survive an absent worker"
    )
    connect_timeout: float = setting(
        3.0, "DYNWIRE_NATS_CONNECT_TIMEOUT", _seconds(0.01), "until a server has answered, for each attempt too", unit="s"
    )
    wait: bool = setting(
        True, "DYNWIRE_NATS_WAIT", Flag(), "wait for an absent server at start, up to the connect timeout; false: fail at once"
    )
    ping_interval: float = setting(
        3.0, "DYNWIRE_NATS_PING_INTERVAL", _seconds(0.01), "ping the server; two unanswered: it counts as lost", unit="s"
    )
    port: str = setting(
        "auto",
        "DYNWIRE_NATS_PORT",
        Choice("auto", "fast", "plain"),
        "fast: compiled path through nats-py's transport; plain: its public API only; auto: fast where it is possible",
    )
    tls_ca: str | None = setting(
        None,
        "DYNWIRE_NATS_TLS_CA",
        Optional_(Text()),
        "PEM file of the authorities to trust for tls:// and for servers that demand TLS",
        default_text="the system's",
    )
    tls_cert: str | None = setting(
        None, "DYNWIRE_NATS_TLS_CERT", Optional_(Text()), "PEM file of our certificate, for a server that wants one"
    )
    tls_key: str | None = setting(
        None, "DYNWIRE_NATS_TLS_KEY", Optional_(Text()), "PEM file of its key", default_text="in the certificate's file"
    )
    tls_handshake_first: bool = setting(
        False, "DYNWIRE_NATS_TLS_HANDSHAKE_FIRST", Flag(), "TLS before the server's INFO, as servers with handshake_first want it"
    )

    # Durable requests (request_mode jetstream). JetStream counts in nanoseconds; its duplicate window is at least 100 ms.
    queue_max_age: float = setting(
        3600.0,
        "DYNWIRE_NATS_QUEUE_MAX_AGE",
        Number(float, 1.0, 30 * 86400.0, "seconds"),
        "the longest that a durable request lives, also one without a timeout",
        unit="s",
    )
    queue_max_messages: int = setting(
        100_000, "DYNWIRE_NATS_QUEUE_MAX_MESSAGES", _count(1, _U31), "unfinished durable requests per endpoint; more are refused"
    )
    queue_max_bytes: int = setting(
        268_435_456,
        "DYNWIRE_NATS_QUEUE_MAX_BYTES",
        _bytes(1024, 2**50),
        "the same in bytes; the NATS server sets the space aside",
        unit="bytes",
    )
    queue_storage: str = setting(
        "file", "DYNWIRE_NATS_QUEUE_STORAGE", Choice("file", "memory"), "where the NATS server keeps durable requests"
    )
    queue_replicas: int = setting(
        1, "DYNWIRE_NATS_QUEUE_REPLICAS", _count(1, 5), "servers of a NATS cluster that keep each durable request"
    )
    queue_duplicate_window: float = setting(
        120.0,
        "DYNWIRE_NATS_QUEUE_DUPLICATE_WINDOW",
        _seconds(0.1),
        "a durable request that is sent again within this time is stored once",
        unit="s",
    )
    queue_ack_wait: float = setting(
        10.0,
        "DYNWIRE_NATS_QUEUE_ACK_WAIT",
        _seconds(0.1),
        "a durable request is given to another worker when its worker was silent this long",
        unit="s",
    )
    queue_max_deliver: int = setting(
        5, "DYNWIRE_NATS_QUEUE_MAX_DELIVER", _count(1, 1000), "times a durable request is given to a worker before it fails"
    )
    queue_max_in_flight: int = setting(
        256, "DYNWIRE_NATS_QUEUE_MAX_IN_FLIGHT", _count(1, 65536), "durable requests that one worker takes at once, per endpoint"
    )
    replay_retention: float = setting(
        0.0,
        "DYNWIRE_NATS_REPLAY_RETENTION",
        Number(float, 0.0, 365 * 86400.0, "seconds"),
        "keep copies of durable requests this long, for dynwire replay; 0: none",
        unit="s",
    )
    replay_max_bytes: int = setting(
        1_073_741_824,
        "DYNWIRE_NATS_REPLAY_MAX_BYTES",
        _bytes(1024, 2**50),
        "bytes of those copies per endpoint, the oldest go first",
        unit="bytes",
    )

    @property
    def auth(self) -> NatsAuth | None:
        """The first complete one of user name with password, token, nkey and credentials file; None without any."""
        if self.username is not None and self.password is not None:
            return NatsAuth("userpass", self.password, self.username)
        for kind, value in (("token", self.token), ("nkey", self.nkey), ("credentials_file", self.credentials_file)):
            if value is not None:
                return NatsAuth(kind, value)
        return None


@dataclass(frozen=True, repr=False)
class EventsConfig(_Part):
    """The KV event plane."""

    plane: str = setting(
        "nats", "DYN_EVENT_PLANE", Choice("jetstream", "nats", "zmq", "none"), "how KV cache events travel; nats: core NATS"
    )
    host: str | None = setting(
        None,
        "DYNWIRE_EVENTS_HOST",
        Optional_(Host(wildcard=True), "auto"),
        "address that a worker binds for events over zmq; its port is any free one",
        default_text="auto-detected",
    )
    advertise_host: str | None = setting(
        None,
        "DYNWIRE_EVENTS_ADVERTISE_HOST",
        Optional_(Host(wildcard=False), "auto"),
        "host that routers are told to connect to for events over zmq",
        default_text="the bound address, or this host's if that is a wildcard",
    )

    # The stream of the jetstream plane. JetStream counts in nanoseconds; its duplicate window is at least 100 ms.
    stream_max_messages: int = setting(
        4_000_000,
        "DYNWIRE_EVENTS_STREAM_MAX_MESSAGES",
        _count(1000, 2**40),
        "jetstream: batches of events that a component's stream keeps, the oldest go first",
    )
    stream_max_bytes: int = setting(
        1_073_741_824,
        "DYNWIRE_EVENTS_STREAM_MAX_BYTES",
        _bytes(65536, 2**50),
        "jetstream: the same in bytes; the NATS server sets the space aside",
        unit="bytes",
    )
    stream_max_age: float = setting(
        86400.0,
        "DYNWIRE_EVENTS_STREAM_MAX_AGE",
        Number(float, 1.0, 365 * 86400.0, "seconds"),
        "jetstream: events older than this go",
        unit="s",
    )
    duplicate_window: float = setting(
        120.0,
        "DYNWIRE_EVENTS_DUPLICATE_WINDOW",
        _seconds(0.1),
        "jetstream: a batch that is sent again within this time is stored once",
        unit="s",
    )
    replicas: int = setting(
        1, "DYNWIRE_EVENTS_REPLICAS", _count(1, 5), "jetstream: servers of a NATS cluster that keep events and snapshots"
    )
    router_ttl: float = setting(
        600.0,
        "DYNWIRE_EVENTS_ROUTER_TTL",
        _seconds(0.1),
        "jetstream: a router that was not seen for so long keeps no events in the stream any more",
        unit="s",
    )


@dataclass(frozen=True, repr=False)
class DiscoveryConfig(_Part):
    """How instances are found."""

    backend: str = setting(
        "file", "DYN_DISCOVERY_BACKEND", Choice("mem", "file", "etcd", "nats"), "mem: one process, file: one machine"
    )
    file_dir: str = setting(
        default_file_dir,
        "DYN_FILE_KV",
        Text("a path", r"[^\0]+"),
        "directory of the file backend",
        default_text="a directory per user under the temporary directory",
    )
    ttl: float = setting(10.0, "DYNWIRE_DISCOVERY_TTL", _seconds(0.1), "an instance without heartbeat is gone after", unit="s")
    etcd_endpoints: tuple[str, ...] = setting(
        ("http://localhost:2379",), "ETCD_ENDPOINTS", Urls("http", "https"), "etcd servers, several separated by commas"
    )


@dataclass(frozen=True, repr=False)
class SystemConfig(_Part):
    """Ports for people and monitoring."""

    http_port: int = setting(8000, "DYN_HTTP_PORT", _PORT, "port of the frontend; 0: any free one")
    system_port: int | None = setting(
        None,
        "DYN_SYSTEM_PORT",
        Optional_(_PORT, "off", "none", "-1"),
        "port of /health, /live and /metrics; 0: any free one",
        default_text="off",
    )
    system_host: str = setting(
        "127.0.0.1",
        "DYNWIRE_SYSTEM_HOST",
        Host(wildcard=True),
        "address to bind for the system port; whoever reaches it sees endpoints and addresses",
    )


ROUTER_MODES = ("round-robin", "random", "p2c", "least-loaded", "kv")


@dataclass(frozen=True, repr=False)
class RouterConfig(_Part):
    """How a frontend chooses a worker. What says kv has no effect in the other modes."""

    mode: str = setting("round-robin", "DYN_ROUTER_MODE", Choice(*ROUTER_MODES), "how workers are chosen")
    kv_events: bool = setting(True, "DYN_ROUTER_USE_KV_EVENTS", Flag(), "kv: follow the workers' events; off: guess their caches")
    kv_overlap_score_weight: float = setting(
        1.0, "DYN_KV_OVERLAP_SCORE_WEIGHT", Number(float, 0, 1e6), "kv: weight of prompt blocks that are not cached"
    )
    temperature: float = setting(0.0, "DYN_ROUTER_TEMPERATURE", Number(float, 0, 1e6), "kv: 0 takes the best worker")
    replica_sync: bool = setting(False, "DYN_ROUTER_REPLICA_SYNC", Flag(), "kv: share the active load between routers")
    reset_states: bool = setting(
        False,
        "DYN_ROUTER_RESET_STATES",
        Flag(),
        "kv, events over jetstream: start without stored events and snapshot, delete them",
    )
    snapshot_threshold: int = setting(
        1_000_000,
        "DYN_ROUTER_SNAPSHOT_THRESHOLD",
        _count(1, 2**40),
        "kv, events over jetstream: messages in the stream after which a router stores its index and purges them",
    )
    id: str | None = setting(
        None,
        "DYNWIRE_ROUTER_ID",
        Optional_(Text("1 to 64 letters, digits, '_' and '-'", r"[A-Za-z0-9_-]{1,64}"), "auto"),
        "kv, events over jetstream: name under which the server keeps this router's place in the events",
        default_text="a new one for every process",
    )
    kv_cache_block_size: int | None = setting(
        None,
        "DYN_KV_CACHE_BLOCK_SIZE",
        Optional_(_count(1, 1 << 20), "auto"),
        "kv: tokens per block",
        unit="tokens",
        default_text="what the model's card says",
    )
    booking_ttl: float = setting(
        600.0,
        "DYNWIRE_ROUTER_BOOKING_TTL",
        _seconds(),
        "router service: load that callers have booked and never freed is released after",
        unit="s",
    )


@dataclass(frozen=True, repr=False)
class FrontendConfig(_Part):
    """The OpenAI-compatible frontend."""

    host: str | None = setting(
        None,
        "DYN_HTTP_HOST",
        Optional_(Host(wildcard=True), "auto"),
        "address to bind",
        default_text="127.0.0.1 with file or mem discovery, otherwise 0.0.0.0",
    )
    server: str = setting("granian", "DYNWIRE_FRONTEND_SERVER", Choice("granian", "uvicorn"), "HTTP server")
    namespace: str | None = setting(None, "DYN_NAMESPACE", Optional_(Text()), "serve models of this namespace only")
    migration_limit: int = setting(
        0, "DYN_MIGRATION_LIMIT", _count(0, 1000), "times that an answer may move to another worker when its worker is lost"
    )
    max_in_flight: int = setting(
        4096, "DYNWIRE_FRONTEND_MAX_IN_FLIGHT", _count(1, 1_000_000), "requests at once; one more is answered with 429"
    )
    busy_threshold: float | None = setting(
        None,
        "DYN_BUSY_THRESHOLD",
        Optional_(Number(float, 0.001, 1000), "off", "none"),
        "requests in flight per sequence that a model's workers can run; at this load requests are answered with 503",
        default_text="off",
    )
    retry_after: float = setting(
        1.0, "DYNWIRE_FRONTEND_RETRY_AFTER", _seconds(), "what refused clients are told to wait", unit="s"
    )
    body_limit_mb: float = setting(
        16.0, "DYN_HTTP_BODY_LIMIT_MB", Number(float, 0.001, 4096, "megabytes"), "largest request", unit="MiB"
    )
    request_timeout: float | None = setting(
        None, "DYNWIRE_FRONTEND_REQUEST_TIMEOUT", Optional_(_seconds(), "none", "off"), "total time of an answer", unit="s"
    )
    grace: float = setting(
        30.0, "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", _seconds(0), "how long a shutdown waits for answers", unit="s"
    )
    api_keys: str | None = setting(
        None,
        "DYNWIRE_API_KEYS",
        Optional_(Text()),
        "keys of clients, separated by commas",
        secret=True,
        default_text="none: open",
    )
    api_key_file: str | None = setting(
        None, "DYNWIRE_API_KEY_FILE", Optional_(Text("a path", r"[^\0]+")), "file with one key per line"
    )


@dataclass(frozen=True, repr=False)
class Config(_Part):
    """All settings. `load_config` fills one from all sources; ``Config()`` has the defaults and reads nothing."""

    request_plane: str = setting("tcp", "DYN_REQUEST_PLANE", Choice(*PLANES, keyword_only=("memory",)), "how requests travel")
    codec: str = setting("msgpack", "DYNWIRE_CODEC", Choice("msgpack", "json"), "codec of payloads that are not bytes")
    default_timeout: float | None = setting(
        None,
        "DYNWIRE_DEFAULT_TIMEOUT",
        Optional_(_seconds(), "none", "off"),
        "total time of a call that names no timeout",
        unit="s",
    )
    handler_threads: int = setting(
        default_handler_threads,
        "DYNWIRE_HANDLER_THREADS",
        _count(1, 4096),
        "threads for blocking handlers",
        default_text="CPUs + 4, at most 32",
    )
    token: str | None = setting(
        None,
        "DYNWIRE_TOKEN",
        Optional_(Text("text of at least one character", r".+")),
        "shared secret of callers and workers",
        secret=True,
    )
    remote_tracebacks: bool = setting(
        False, "DYNWIRE_REMOTE_TRACEBACKS", Flag(), "send tracebacks of handlers to callers (they show code and values)"
    )
    strict: bool = setting(False, "DYNWIRE_STRICT_CONFIG", Flag(), "an invalid DYN_REQUEST_PLANE is an error, not tcp")
    config_file: str | None = setting(None, "DYNWIRE_CONFIG", Optional_(Text("a path", r"[^\0]+")), "TOML file with settings")

    tcp: TcpConfig = field(default_factory=TcpConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    nats: NatsConfig = field(default_factory=NatsConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """dotted name -> ``default``, ``env DYN_X``, ``file /path.toml``, ``keyword`` or ``command line``"""

    def get(self, name: str) -> Any:
        """The value of a setting by its dotted name, for example ``tcp.port``; AttributeError if there is none."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def listen_hosts(self, plane: str) -> tuple[str, str]:
        """``(host to bind, host to advertise)`` for the server of ``tcp`` or ``http``, or for ``events`` over zmq.

        Without a configured bind host: loopback when discovery cannot reach beyond this machine anyway (``file``, ``mem``),
        so that a laptop works without a network, across changes of network, and exposes nothing to it; otherwise the
        address of this host towards the default route. An advertised host that is configured alone is taken as
        "we are behind this name or NAT", so the wildcard is bound. Raises `ConfigError` for an advertised wildcard.
        """
        part = self.http if plane == "http" else self.events if plane == "events" else self.tcp
        bind = part.host
        if bind is None:
            if part.advertise_host is not None:
                bind = "0.0.0.0"
            elif self.discovery.backend in ("file", "mem"):
                bind = "127.0.0.1"
            else:
                bind = detect_host()
        return bind, advertised_host(bind, part.advertise_host)


_PARTS: dict[str, type] = {
    f.name: f.default_factory  # the default factory of a part is its class
    for f in fields(Config)
    if f.default_factory is not MISSING and isinstance(f.default_factory, type) and issubclass(f.default_factory, _Part)
}


def _collect() -> Iterator[Setting]:
    for prefix, cls in (("", Config), *((f"{name}.", part) for name, part in _PARTS.items())):
        for f in fields(cls):
            meta: _Meta | None = f.metadata.get("setting")
            if meta is not None:
                yield Setting(prefix + f.name, meta.env, meta.kind, meta.doc, meta.unit, meta.secret, meta.default_text)


_SETTINGS: dict[str, Setting] = {s.name: s for s in _collect()}

_ALIASES = {"discovery": "discovery.backend", "events": "events.plane", "event_plane": "events.plane", "plane": "request_plane"}
"""Short keywords beside the derived ones."""

_BY_KEY: dict[str, str] = {
    **{s.name.replace(".", "_"): s.name for s in _SETTINGS.values()},
    **{s.env: s.name for s in _SETTINGS.values()},
    **{s.name: s.name for s in _SETTINGS.values()},
    **_ALIASES,
}
"""Every accepted keyword -> dotted name."""


def settings() -> tuple[Setting, ...]:
    """All settings, in the order of their declaration; for documentation and command lines."""
    return tuple(_SETTINGS.values())


# Variables of the public Dynamo project that have no meaning here. Whoever moves over has them set; a warning would be noise.
_FOREIGN = re.compile(
    r"DYN_(LOG|LOGGING|SDK|RUNTIME|COMPUTE|KVBM|ROUTER|KV|LORA|MOCKER|VLLM|SGLANG|TRTLLM|OTEL|DEBUG|PLANNER|PROFILER|DECODER?|"
    r"PREFILL|ENCODER?|MODEL|WORKER|CANARY|HEALTH|METRICS?|AUDIT|DISABLE|ENABLE|FRONTEND|FORWARDPASS|MULTIMODAL|MM|"
    r"TOKENIZER|REQUEST_TRACE|REPLAY|STRIP|IGNORE|NIXL|DEPLOYMENT|PARENT_DGD|DISCOVERY_INSTANCE)(_\w+)?"
    r"|DYN_(NAMESPACE(_\w+)?|COMPONENT|ENDPOINT|ENDPOINT_TYPES|NATS_\w+|SYSTEM_(?!PORT)\w+|ZMQ_\w+|STORE_KV|"
    r"TCP_RESPONSE_\w+|TCP_WORKER_\w+|HTTP_(BODY|GRACEFUL|OVERLOAD|SSE|SVC|HOST)\w*)"
    r"|DYNWIRE_(BUILD|TEST|BENCH)_\w+"
)


# Loading ---------------------------------------------------------------------------------------------------------------------


def load_config(
    overrides: Mapping[str, object] | None = None,
    *,
    cli: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read all sources and return the validated settings.

    ``overrides`` are keywords, ``cli`` comes from a command line; keys of both are names such as ``tcp_port``, ``tcp.port``,
    ``DYN_TCP_RPC_PORT`` or the short forms ``discovery``, ``event_plane``, and a whole part may be given as a mapping
    (``tcp={"port": 0}``). On a command line, and for settings that have no None, the value None means "not given".
    ``environ`` replaces `os.environ`.

    Raises `ConfigError` for an unknown key (names the nearest known one) and for a value that is not allowed (names the
    variable, value, origin and what is allowed). Logs one warning per unknown ``DYN_*`` or ``DYNWIRE_*`` variable.
    """
    env = os.environ if environ is None else environ
    sources: list[dict[str, tuple[object, str]]] = [
        _from_mapping(overrides or {}, "keyword"),
        _from_mapping({k: v for k, v in (cli or {}).items() if v is not None}, "command line"),
        {s.name: (env[s.env], f"env {s.env}") for s in _SETTINGS.values() if env.get(s.env, "").strip()},
    ]
    _warn_about_unknown(env)

    def find(name: str) -> tuple[object, str]:
        for source in sources:
            if name in source:
                return source[name]
        return MISSING, "default"

    # These two decide how the others are read, so they come first and cannot come from the file.
    raw, origin = find("config_file")
    path = None if raw is MISSING else _parse(_SETTINGS["config_file"], raw, origin)
    if path is not None:
        sources.append(_from_file(path))
    raw, origin = find("strict")
    strict = False if raw is MISSING else _parse(_SETTINGS["strict"], raw, origin)

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for s in _SETTINGS.values():
        raw, origin = find(s.name)
        origins[s.name] = origin
        if raw is MISSING:
            continue
        try:
            values[s.name] = _parse(s, raw, origin)
        except ConfigError as error:
            if s.name != "request_plane" or strict or not origin.startswith("env "):
                raise
            # DESIGN §3: a deployment whose environment has a typo runs on the default plane instead of not at all
            logger.error("%s Using 'tcp'.", error)
            values[s.name] = "tcp"
            origins[s.name] = "default"

    parts = {
        name: cls(**{k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")})
        for name, cls in _PARTS.items()
    }
    top = {k: v for k, v in values.items() if "." not in k}
    config = Config(**top, **parts, origins=origins)
    _check_together(config)
    return config


def set_default_variable(name: str, value: str) -> None:
    """Set a variable of another library's, for this process and its children, unless the user has set it."""
    os.environ.setdefault(name, value)


def child_environment(config: Config, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a process that is to have the same settings: ours, with what keywords and the command line said.

    ``variables`` come on top.
    """
    found = dict(os.environ)
    for s in _SETTINGS.values():
        value = config.get(s.name)
        if config.origins.get(s.name) in ("keyword", "command line") and value is not None:
            found[s.env] = ",".join(value) if isinstance(value, tuple) else str(value)
    return {**found, **(variables or {})}


def _parse(s: Setting, raw: object, origin: str) -> Any:
    shown: object = MASK if s.secret else mask_url(str(raw)) if isinstance(s.kind, Urls) else raw
    reason = ""
    try:
        value = s.kind.parse(raw)
        if not (isinstance(s.kind, Choice) and value in s.kind.keyword_only and origin != "keyword"):
            return value
    except (ValueError, OverflowError) as error:
        # Number's conversions say "invalid literal", which "allowed is" says better
        if str(error) and not isinstance(s.kind, Number):
            reason = f": {error}"
    if s.secret:
        reason = ""
    if s.name == "request_plane":
        message = f"Invalid request plane mode {shown!r} ({s.env}, from {origin}). Valid modes are {s.kind.allowed}."
    else:
        message = f"{s.env} ({s.name}, from {origin}) is {shown!r}{reason}; allowed is {s.kind.allowed}"
    raise ConfigError(message, name=s.env, value=shown, allowed=s.kind.allowed)


def _unknown(key: str, where: str, known: list[str]) -> ConfigError:
    return ConfigError(
        f"unknown setting {key!r} {where}{_hint(key, known)}; `dynwire config show` lists all settings",
        name=key,
        allowed=nearest(key, known),
    )


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that looks most like ``name``, or None."""
    import difflib

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def _hint(name: str, known: list[str]) -> str:
    best = nearest(name, known)
    return f"; did you mean {best!r}?" if best else ""


def _from_mapping(given: Mapping[str, object], origin: str) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    for key, value in given.items():
        if key in _PARTS and isinstance(value, Mapping):
            flat: dict[str, object] = {f"{key}.{k}": v for k, v in value.items()}
        elif key in _PARTS and isinstance(value, _Part):
            flat = {f"{key}.{f.name}": getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
        else:
            flat = {key: value}
        for name, raw in flat.items():
            dotted = _BY_KEY.get(name)
            if dotted is None:
                known = [n for n in _BY_KEY if n.isupper() == name.isupper() and ("." in n) == ("." in name)]
                raise _unknown(name, f"given as {origin}", known)
            if raw is None and not isinstance(_SETTINGS[dotted].kind, Optional_):
                continue
            if dotted in found and found[dotted][0] != raw:
                raise ConfigError(
                    f"{_SETTINGS[dotted].env} ({dotted}) is given twice as {origin}, under two names",
                    name=_SETTINGS[dotted].env,
                    allowed="one of the two",
                )
            found[dotted] = (raw, origin)
    return found


def _from_file(path: str) -> dict[str, tuple[object, str]]:
    import tomllib

    allowed = "a readable TOML file"
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"DYNWIRE_CONFIG names {path!r}, which cannot be read: {error.strerror}",
            name="DYNWIRE_CONFIG",
            value=path,
            allowed=allowed,
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"DYNWIRE_CONFIG names {path!r}, which is not TOML: {error}", name="DYNWIRE_CONFIG", value=path, allowed=allowed
        ) from error
    found: dict[str, tuple[object, str]] = {}
    known = list(_SETTINGS)
    for key, value in data.items():
        flat = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        for name, raw in flat.items():
            if name not in _SETTINGS:
                raise _unknown(name, f"in {path}", known)
            if name in ("config_file", "strict"):
                raise ConfigError(
                    f"{name!r} cannot be set in {path}: it decides how that file is read; set {_SETTINGS[name].env} instead",
                    name=name,
                    value=raw,
                    allowed=f"the variable {_SETTINGS[name].env}",
                )
            found[name] = (raw, f"file {path}")
    return found


def _warn_about_unknown(env: Mapping[str, str]) -> None:
    known = [s.env for s in _SETTINGS.values()]
    for name in sorted(env):
        if name.startswith(("DYN_", "DYNWIRE_")) and name not in known and not _FOREIGN.fullmatch(name):
            logger.warning("unknown setting %s in the environment is ignored%s", name, _hint(name, known))


def _check_together(config: Config) -> None:
    tcp = config.tcp
    if tcp.connection_window < tcp.stream_window:
        raise ConfigError(
            f"DYNWIRE_TCP_CONNECTION_WINDOW is {tcp.connection_window} bytes, less than DYNWIRE_TCP_STREAM_WINDOW with "
            f"{tcp.stream_window}: one stream could not use its window",
            name="DYNWIRE_TCP_CONNECTION_WINDOW",
            value=tcp.connection_window,
            allowed=f"at least {tcp.stream_window} bytes",
        )
    if (config.nats.username is None) != (config.nats.password is None):
        present, absent = ("USERNAME", "PASSWORD") if config.nats.password is None else ("PASSWORD", "USERNAME")
        logger.warning("NATS_AUTH_%s is set without NATS_AUTH_%s and is ignored: they work together", present, absent)


# Hosts -----------------------------------------------------------------------------------------------------------------------


def is_wildcard(host: str) -> bool:
    """True for ``0.0.0.0``, ``::``, ``*``, the empty string and their other spellings."""
    import ipaddress
    import socket

    host = host.removeprefix("[").removesuffix("]")
    if host in ("", "*"):
        return True
    try:
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        return address.is_unspecified or (mapped is not None and mapped.is_unspecified)
    except ValueError:
        pass
    try:
        return socket.inet_aton(host) == b"\0\0\0\0"  # "0", "0.0", "0x0": the C library takes them for 0.0.0.0
    except OSError:
        return False


def detect_host() -> str:
    """The address of this host towards the default route, ``127.0.0.1`` without a network. Sends no packet.

    Connecting a datagram socket only chooses a route and with it a source address. The targets are documentation
    addresses (RFC 5737, RFC 3849) that exist nowhere.
    """
    import socket

    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found: str = probe.getsockname()[0]
        except OSError:
            continue
        if not is_wildcard(found):
            return found
    return "127.0.0.1"


def advertised_host(bind_host: str | None, advertise_host: str | None = None) -> str:
    """What peers are told to connect to; never a wildcard.

    ``advertise_host`` if it is given; otherwise the bound host, or the detected address of this host if that is a wildcard
    or None. Raises `ConfigError` if ``advertise_host`` is a wildcard.
    """
    if advertise_host is not None:
        if is_wildcard(advertise_host):
            raise ConfigError(
                f"the advertised host is {advertise_host!r}, a wildcard that no peer can connect to; "
                "wildcards belong into the bind host (DYN_TCP_RPC_HOST, DYN_HTTP_RPC_HOST)",
                name="advertise_host",
                value=advertise_host,
                allowed="a host name or IP address",
            )
        return advertise_host
    if bind_host is None or is_wildcard(bind_host):
        return detect_host()
    return bind_host


# Showing ---------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of ``dynwire config show``."""

    name: str
    value: Any
    """JSON-compatible, secrets masked"""
    origin: str
    env: str
    unit: str
    doc: str
    default: Any


def describe(config: Config) -> list[Row]:
    """All settings of ``config`` with value, origin and meaning; secrets and credentials in URLs are masked."""
    defaults = Config()
    rows = []
    for s in _SETTINGS.values():
        default = s.default_text or s.show(defaults.get(s.name))
        value = s.show(config.get(s.name))
        rows.append(Row(s.name, value, config.origins.get(s.name, "default"), s.env, s.unit, s.doc, default))
    return rows


__all__ = [
    "PLANES",
    "Config",
    "DiscoveryConfig",
    "EventsConfig",
    "FrontendConfig",
    "HttpConfig",
    "NatsAuth",
    "NatsConfig",
    "RouterConfig",
    "Row",
    "Setting",
    "SystemConfig",
    "TcpConfig",
    "advertised_host",
    "default_file_dir",
    "default_handler_threads",
    "describe",
    "detect_host",
    "is_wildcard",
    "load_config",
    "mask_url",
    "settings",
]
