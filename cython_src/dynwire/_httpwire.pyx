"""Requests, replies and items over HTTP/2 and HTTP/1.1, without I/O: what `dynwire._frames` is for the native wire.

`HttpWire` is a `Link` whose frames an HTTP/2 engine (`dynwire._http2`) reads and writes; on the server's side a connection that
turns out to speak HTTP/1.1 is served through `dynwire.wire.http1`. What a request's head means, what errors and pages look
like, and every format but one stand in `dynwire.wire.http_api`; compiled here is what our own client sends and gets, and the
usual request of others.

Format of replies to our own client (``application/vnd.dynwire.items``): for each item u8 kind (0 raw, 1 msgpack, 2 json, 3 error:
a body of `dynwire.wire.faults`), u32 big-endian length, payload. So a connection through a proxy carries the same items, errors
included, as a direct one. The response's head says that the request has been accepted.

Flow control: a reader's items are given back to the window when the application takes them. An item larger than the window
can arrive only because its bytes are given back early, which happens while nothing else of the stream is unread: what a stream
may hold is its window and one item. Requests are given back as they arrive, because a handler gets whole requests; the bytes
held for them are bounded per connection, and one more is refused.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.string cimport memcpy

import hmac
from http import HTTPStatus

import msgspec

from ._buffers cimport default_pool, payload_copy, payload_of_block
from ._bytes cimport dw_buf_free, dw_buf_reserve, dw_ld32be, dw_st32be
from ._hpack cimport hpack_intern
from ._http2 cimport K_INFORMATIONAL, K_TRAILERS, ST_CLOSED, ST_HALF_LOCAL, ST_HALF_REMOTE
from ._link cimport (
    S_ACCEPTED,
    S_ASSEMBLING,
    S_ENDED,
    S_QUEUED,
    S_SENDING,
    S_STOP_EARLY,
    S_WRITTEN,
)

from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from ._frames import describe_foreign
from ._http2 import Http2ConnectionError, NativeEngine, error_name
from .errors import (
    DynwireError,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    ProtocolError,
    Unauthenticated,
)
from .wire import http_api
from .wire.faults import error_from_body

cdef extern from "Python.h":
    bytes PyBytes_FromFormat(const char *format, ...)

cdef enum:
    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    REFUSED_STREAM = 7
    CANCEL = 8
    ENHANCE_YOUR_CALM = 11

assert [
    ErrorCodes(code).name
    for code in (NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM)
] == [
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "REFUSED_STREAM", "CANCEL", "ENHANCE_YOUR_CALM",
]  # fmt: skip
cdef object _MAX_STREAMS_SETTING = int(SettingCodes.MAX_CONCURRENT_STREAMS)

cdef enum:
    SH_ITEMS = 1
    SH_JSON = 2
    SH_NDJSON = 3
    SH_SSE = 4
    SH_MSGPACK = 5
    SH_RAW = 6
    SH_AUTO = 7

cdef enum:
    BODY_BUDGET = 67108864       # bytes of requests that one connection may have in memory, beyond one of the largest size
    H1_BACKLOG = 262144
    SCRATCH_KEPT = 32768         # bytes of the buffer for encoding that a connection keeps
    CACHED_NAMES = 4096          # paths and types that are remembered; a client may invent any number
    LINGERING = 8                # requests of a connection that are answered and may still end by themselves
    LINGER_BYTES = 65536         # of their bodies that are dropped before the client is told that the rest is not wanted

cdef dict _SHAPES = {"items": SH_ITEMS, "json": SH_JSON, "ndjson": SH_NDJSON, "sse": SH_SSE, "msgpack": SH_MSGPACK, "raw": SH_RAW,
                     "auto": SH_AUTO}  # fmt: skip
cdef tuple _SHAPE_NAMES = ("", "items", "json", "ndjson", "sse", "msgpack", "raw", "auto")
cdef double _UPLOAD_S = 60.0     # a request without a deadline of its own has to arrive completely within this time
cdef double _BDP_FIRST_S = 0.1   # between the first two measurements of the round trip
cdef double _BDP_LAST_S = 10.0
cdef uint64_t _BDP_LIMIT = 16777216  # no window grows beyond it: what a peer may leave in our memory, and 50 ms at 2.6 Gbit/s


cdef inline bytes _intern(bytes name):
    return hpack_intern(<const unsigned char *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))


cdef bytes _METHOD = _intern(b":method")
cdef bytes _PATH = _intern(b":path")
cdef bytes _SCHEME = _intern(b":scheme")
cdef bytes _AUTHORITY = _intern(b":authority")
cdef bytes _STATUS = _intern(b":status")
cdef bytes _TYPE = _intern(b"content-type")
cdef bytes _LENGTH = _intern(b"content-length")
cdef bytes _ACCEPT = _intern(b"accept")
cdef bytes _AGENT = _intern(b"user-agent")
cdef bytes _ENCODING = _intern(b"accept-encoding")
cdef bytes _TIMEOUT = _intern(b"x-request-timeout-ms")
cdef bytes _ID = _intern(b"x-request-id")
cdef bytes _PATIENCE = _intern(b"x-dynwire-accept-timeout-ms")
cdef bytes _AUTHORIZATION = _intern(b"authorization")
cdef bytes _POST = b"POST"
cdef bytes _OK = b"200"
cdef bytes _ITEMS_TYPE = http_api.ITEMS
cdef tuple _ITEMS_FIELD = (_TYPE, _ITEMS_TYPE)
cdef list _ITEMS_HEAD = [(_STATUS, _OK), _ITEMS_FIELD]
cdef tuple _RAW_FIELD = (_TYPE, http_api.RAW)
cdef tuple _JSON_FIELD = (_TYPE, http_api.JSON)
cdef tuple _STATUS_OK = (_STATUS, _OK)
cdef tuple _KIND_FIELDS = (_RAW_FIELD, (_TYPE, http_api.MSGPACK), _JSON_FIELD)
cdef dict _NAMES = {name: name for name in (_TIMEOUT, _ID, _PATIENCE)}
# Bounded caches: what the header values of usual requests mean.
cdef dict _types = {}
cdef dict _accepts = {None: SH_AUTO}
cdef object _unpack = msgspec.msgpack.decode


cdef int64_t _digits(bytes value) except -2:
    """A decimal number of at most 15 digits, -1 if it is none."""
    cdef Py_ssize_t i
    cdef int64_t n = 0
    cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    if size == 0 or size > 15:
        return -1
    for i in range(size):
        if p[i] < 48 or p[i] > 57:
            return -1
        n = n * 10 + (p[i] - 48)
    return n


cdef str _visible(bytes value):
    """A request id as text, None if it is not 1 to 128 visible ASCII characters."""
    cdef Py_ssize_t i
    cdef Py_ssize_t size = PyBytes_GET_SIZE(value)
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(value)
    if size == 0 or size > 128:
        return None
    for i in range(size):
        if p[i] < 33 or p[i] > 126:
            return None
    return value.decode("ascii")


cdef class Exchange:
    """One request and its reply on one connection."""

    def __cinit__(self):
        self.length = -1
        self.accept_s = INFINITY

    def __dealloc__(self):
        dw_buf_free(&self.body)


cdef class _Events(Http2Owner):
    """What the engine calls: hands everything to the wire, until the connection is gone."""

    cdef int on_headers(self, Http2Stream stream, list headers, int kind, bint end) except -1:
        return 0 if self.wire is None else self.wire.h2_headers(stream, headers, kind, end)

    cdef int on_data(self, Http2Stream stream, const unsigned char *p, size_t n, bint end) except -1:
        return 0 if self.wire is None else self.wire.h2_data(stream, p, n, end)

    cdef int on_reset(self, Http2Stream stream, uint32_t code, bint remote) except -1:
        return 0 if self.wire is None else self.wire.h2_reset(stream, code, remote)

    cdef int on_room(self, Http2Stream stream) except -1:
        return 0 if self.wire is None else self.wire.h2_room(stream)

    cdef int on_closed(self, Http2Stream stream) except -1:
        return 0 if self.wire is None else self.wire.h2_closed(stream)

    cdef int on_settings(self) except -1:
        return 0 if self.wire is None else self.wire.h2_settings()

    cdef int on_pong(self, uint64_t payload) except -1:
        return 0 if self.wire is None else self.wire.h2_pong(payload)

    cdef int on_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1:
        return 0 if self.wire is None else self.wire.h2_goaway(last_id, code, debug)

    cdef int on_capacity(self) except -1:
        return 0 if self.wire is None else self.wire.h2_capacity()

    cdef int on_output(self) except -1:
        return 0 if self.wire is None else self.wire.wrote()


# Payloads of our own PINGs, so that an ACK of somebody else's is ignored.
cdef uint64_t _PING_ALIVE = 0x64796e7769726501
cdef uint64_t _PING_BDP = 0x64796e7769726502
cdef uint64_t _PING_LEAVING = 0x64796e7769726503


cdef class HttpWire(Link):
    """State machine of one connection of the http plane. See the module's docstring."""

    def __init__(self, bint is_client, *, max_message=33554432, str root="/v1/rpc", str authority="", str scheme="http",
                 token=None, str engine="native", bint adaptive=True, pages=None, lock=None, **limits):
        self.is_client = is_client
        self.lock = lock
        self.max_message = max_message
        self.peer_max_message = max_message
        self.root = root
        self.authority = authority
        self.scheme = scheme
        self.token = None if token is None else token.encode()
        self.pages = pages
        self.engine_name = engine
        self.adaptive = adaptive
        self.limits = limits
        self.leniency = 1.0
        self.head_at = INFINITY
        self.handshake_s = limits.get("handshake_s", 10.0)
        self.stall_s = limits.get("stall_s", 30.0)
        self.item_overhead = ITEM_HEADER
        self.prefixes = {}
        self.stops = []
        self.first_bytes = b""
        self.routes = {}
        self.bdp_sent = -1.0
        self.bdp_rtt = INFINITY
        self.bdp_delay = _BDP_FIRST_S
        self.max_streams = 100  # until the server's SETTINGS have come (RFC 9113 6.5.2)
        if is_client:
            self.make_engine()
        else:
            self.max_streams = limits.get("max_concurrent_streams", 1000)

    def __dealloc__(self):
        dw_buf_free(&self.early_in)
        dw_buf_free(&self.h1_out)
        dw_buf_free(&self.scratch)

    cdef int make_engine(self) except -1:
        if self.engine_name == "native":
            cls = NativeEngine
        else:
            from ._http2lib import LibraryEngine as cls
        self.events = _Events.__new__(_Events)
        self.events.wire = self
        limits = self.limits if self.leniency == 1.0 else {**self.limits, "leniency": self.leniency}
        self.engine = cls(self.events, self.is_client, **limits)
        self.bdp_estimate = self.engine.stream_window
        self.window_ratio = <double>self.engine.connection_window / self.engine.stream_window
        return 0

    def start(self, *, str software="", bytes connection_id=b"", token=None, accept_timeout_ms=10000):
        """(client) Queue preface and SETTINGS."""
        self.connection_id = connection_id
        self.patience = (_PATIENCE, str(accept_timeout_ms).encode())
        self.engine.start(self.now)

    @property
    def protocol(self):
        """``h2``, ``http/1.1``, or None while it is not known."""
        if self.engine is not None:
            return "h2"
        return None if self.h1 is None else "http/1.1"

    def stats(self):
        """Counters of the connection, for diagnostics and tests; ``held``: bytes of its own buffers, streams' not included."""
        out = {
            "peer": self.peer, "protocol": self.protocol, "engine": self.engine_name, "streams": self.live,
            "rx_bytes": self.rx_bytes, "tx_bytes": self.tx_frames_bytes, "backlog": self.output_backlog(),
            "draining": self.draining, "body_bytes": self.body_bytes, "window": self.bdp_estimate,
            "held": self.early_in.cap + self.h1_out.cap + self.scratch.cap,
        }  # fmt: skip
        if self.engine is not None:
            out["windows"] = self.engine.counters()
            out["held"] += out["windows"]["held"]
        return out

    # ---- threads ---------------------------------------------------------------------------------------------------------

    # The h2 library is Python code, in which threads take turns anywhere: one at a time may be in it, and a request's stream is
    # opened and its headers are written in one go. The native engine needs no lock, it never releases the GIL.

    cdef int received(self, size_t n, double now) except -1:
        if self.lock is None:
            return self.received_(n, now)
        with self.lock:
            return self.received_(n, now)

    cdef int consumed(self, StreamBase stream, int64_t cost) except -1:
        if self.lock is None:
            return self.consumed_(stream, cost)
        with self.lock:
            return self.consumed_(stream, cost)

    cdef int put_cancel(self, StreamBase stream, int kind) except -1:
        if self.lock is None:
            return self.put_cancel_(stream, kind)
        with self.lock:
            return self.put_cancel_(stream, kind)

    cdef int abandon(self, StreamBase stream, int kind) except -1:
        if self.lock is None:
            return self.abandon_(stream, kind)
        with self.lock:
            return self.abandon_(stream, kind)

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        if self.lock is None:
            return self.gather_(chunks, limit)
        with self.lock:
            return self.gather_(chunks, limit)

    cdef int sent(self, size_t n) except -1:
        if self.lock is None:
            return self.sent_(n)
        with self.lock:
            return self.sent_(n)

    cdef int time_passed(self, double now) except -1:
        if self.lock is None:
            return self.time_passed_(now)
        with self.lock:
            return self.time_passed_(now)

    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                          double now) except -1:
        if self.lock is None:
            return self.send_request_(stream, endpoint, data, kind, meta, deadline, due, now)
        with self.lock:
            return self.send_request_(stream, endpoint, data, kind, meta, deadline, due, now)

    # ---- receiving -----------------------------------------------------------------------------------------------------

    cdef int recv_targets(self, dw_chunk *targets):
        cdef unsigned char *base
        cdef size_t size
        if self.engine is not None:
            self.engine.recv_target(&base, &size)
        else:
            base = dw_buf_reserve(&self.early_in, SNIFF_BYTES)
            size = SNIFF_BYTES if base is not NULL else 0
        targets[0].base = base
        targets[0].len = size
        self.landed_at = base
        return 1

    cdef int received_(self, size_t n, double now) except -1:
        self.rx_bytes += n
        self.now = now
        self.last_rx = now
        if self.engine is not None:
            if self.is_client and not self.engine.ready:
                self.check_server(n)
            try:
                self.engine.received(n, now)
            except Http2ConnectionError as error:
                raise self.connection_error(error) from error
            return 0
        self.early_in.n += n
        if self.h1 is None:
            return self.sniff()
        return self.h1_received()

    def connection_error(self, error):
        """The engine's refusal of what the peer did, as an error of ours."""
        return ProtocolError(
            f"{'server' if self.is_client else 'client'} {self.peer or ''} broke HTTP/2: {error}", peer=self.peer,
            offset=self.rx_bytes, sent="maybe", details={"http2_code": error_name(error.code)},
        )  # fmt: skip

    cdef int check_server(self, size_t n) except -1:
        """(client) The first bytes have to be the header of a SETTINGS frame (RFC 9113 3.4)."""
        cdef const unsigned char *p = self.landed_at
        cdef size_t have = min(n, <size_t>(256 - len(self.first_bytes)))
        if self.rx_bytes - n >= 9:
            return 0
        self.first_bytes += PyBytes_FromStringAndSize(<const char *>p, have)
        head = self.first_bytes
        # A frame of length < 2^16, type 4 (or 7: GOAWAY), stream 0.
        if head[0:1] == b"\0" and (len(head) < 4 or head[3] in (4, 7)) and not head[5:9].strip(b"\0"):
            return 0
        theirs = "the dynwire tcp plane" if b"dynwire tcp plane" in head else describe_foreign(head[:64])
        if theirs == "HTTP/2":  # no other plane but wrong frames: the engine says what is wrong, to the server by GOAWAY
            return 0
        raise PlaneMismatch(
            f"{self.peer} speaks {theirs}, but this is the dynwire http plane, which needs HTTP/2 there: the worker is on "
            "another plane (check DYN_REQUEST_PLANE on both sides), or a proxy before it does not speak HTTP/2 without TLS",
            ours="http (HTTP/2)", theirs=theirs, peer=self.peer, details={"head": head[:64].decode("latin-1")},
        )  # fmt: skip

    cdef int sniff(self) except -1:
        """(server) Which protocol are the first bytes?"""
        # A request line is told by its end, or by its length (http1.TARGET_LIMIT).
        head = PyBytes_FromStringAndSize(<char *>self.early_in.p, min(self.early_in.n, <size_t>(8192 + 128)))
        if head[:4] == b"PRI ":
            return self.switch_to_h2()
        from .wire import http1  # and with it h11

        what = http1.sniff(head)
        if what == "h2":
            return self.switch_to_h2()
        if what == "http1":
            self.h1 = http1.Http1Session(self.scheme)
            self.ready = True
            return self.h1_received()
        if what == "other":
            raise http1.foreign(head, self.peer)
        return 0

    cdef int switch_to_h2(self) except -1:
        cdef unsigned char *base
        cdef size_t size
        cdef size_t done = 0
        cdef size_t n = self.early_in.n
        self.make_engine()
        self.engine.start(self.now)
        try:
            while done < n:
                self.engine.recv_target(&base, &size)
                size = min(size, n - done)
                memcpy(base, self.early_in.p + done, size)
                done += size
                self.engine.received(size, self.now)
        except Http2ConnectionError as error:
            raise self.connection_error(error) from error
        finally:
            dw_buf_free(&self.early_in)
        return 0

    # ---- HTTP/1.1 (server) ---------------------------------------------------------------------------------------------

    cdef int h1_received(self) except -1:
        """Deal with what has come, and with the requests after it for as long as each is answered at once."""
        cdef Exchange ex
        cdef list events
        if self.closing:  # the driver reads on so that the last reply arrives, not because anybody wants it
            self.early_in.n = 0
            return 0
        chunk = PyBytes_FromStringAndSize(<char *>self.early_in.p, self.early_in.n)
        self.early_in.n = 0
        self.in_h1 = True  # the events belong to one request: the next one may not begin before they are dealt with
        try:
            while True:
                events = self.h1.receive(chunk)
                chunk = b""
                for event in events:
                    self.h1_event(event)
                if not events or self.h1_exchange is not None or self.dead:
                    break
        finally:
            self.in_h1 = False
        self.h1_flush()
        ex = self.h1_exchange
        if self.h1.must_close or self.h1.idle or not (ex is None or ex.page is not None):
            self.head_at = INFINITY  # a body for a handler has its own deadline
        elif self.head_at == INFINITY:
            self.head_at = self.now + self.handshake_s
        if not self.h1.wants_data and not self.h1.must_close:
            raise ProtocolError(
                f"client {self.peer} sends on while its request has not been answered", peer=self.peer, offset=self.rx_bytes,
                sent="maybe",
            )  # fmt: skip
        return 0

    cdef int h1_event(self, tuple event) except -1:
        cdef Exchange ex = self.h1_exchange
        cdef StreamBase stream
        cdef bytes data
        name = event[0]
        if name == "request":
            ex = self.h1_exchange = self.read_or_refuse(event[1], None)
            if ex is not None:
                self.request_began(ex, False)
                if self.h1.expects_continue and not ex.ended:
                    self.h1.send_continue()
        elif name == "error":
            if ex is None:
                ex = self.h1_exchange = Exchange.__new__(Exchange)
            fault = http_api.HttpFault(event[1], HTTPStatus(event[1]).phrase, event[2])
            stream = ex.stream
            if stream is None:
                return self.answer_fault(ex, fault)
            status, headers, body = fault.response(ex.request_id or "")
            self.answer(ex, status, headers, body)
            stream.state = (stream.state & ~S_ASSEMBLING) | S_ENDED
            return self.request_done(stream)
        elif ex is None or ex.ended:
            pass  # of a request that has been answered already
        elif name == "data":
            data = event[1]
            self.request_data(ex, <const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), False)
        else:
            self.request_data(ex, NULL, 0, True)
        return 0

    cdef int h1_flush(self) except -1:
        """Take what the session wants to be written."""
        cdef bytes out = self.h1.output()
        cdef unsigned char *p
        if out:
            p = dw_buf_reserve(&self.h1_out, PyBytes_GET_SIZE(out))
            if p is NULL:
                raise MemoryError()
            memcpy(p, PyBytes_AS_STRING(out), PyBytes_GET_SIZE(out))
            self.h1_out.n += PyBytes_GET_SIZE(out)
            self.wrote()
        return self.close_soon() if self.h1.must_close else 0

    cdef int close_soon(self) except -1:
        """(HTTP/1.1) Nothing more is to be said on this connection."""
        if self.closing:
            return 0
        self.closing = True
        return self.on_closing()

    cdef int on_closing(self) except -1:
        """The driver is to close the connection when everything is written."""
        return 0

    # ---- from the engine -------------------------------------------------------------------------------------------------

    cdef int h2_headers(self, Http2Stream h2, list headers, int kind, bint end) except -1:
        cdef Exchange ex
        if not self.is_client:
            if kind == K_TRAILERS:
                if end:
                    return self.h2_data(h2, NULL, 0, True)
                return 0
            if end and self.fixed is not None and self.answer_fixed(h2, headers):
                return 0
            ex = self.read_or_refuse(headers, h2)
            if ex is None:
                return 0
            return self.request_began(ex, end)
        ex = h2.data
        if ex is None or kind == K_INFORMATIONAL:
            return 0
        if kind == K_TRAILERS:
            return self.response_items(ex, NULL, 0, True) if ex.items else self.response_ended(ex)
        return self.response_began(ex, headers, end)

    cdef int h2_data(self, Http2Stream h2, const unsigned char *p, size_t n, bint end) except -1:
        cdef Exchange ex = h2.data
        if n and self.adaptive:
            self.measure(n)
        if ex is None or ex.ended:
            self.engine.consumed(h2, n)
            if ex is not None and ex.lingers and not end:
                ex.dropped += n
                if ex.dropped > LINGER_BYTES:
                    return self.stop_lingering(ex)
            return 0
        if not self.is_client:
            self.engine.consumed(h2, n)
            return self.request_data(ex, p, n, end)
        if ex.items:
            return self.response_items(ex, p, n, end)
        self.engine.consumed(h2, n)
        if ex.stream is None:
            return 0
        if ex.have + n > (<size_t>self.max_message if 200 <= ex.status < 300 else ERROR_BODY):
            if not 200 <= ex.status < 300:
                n = ERROR_BODY - ex.have
            else:
                return self.fault(ex, MessageTooLarge(
                    f"a reply from {self.peer} exceeds this side's limit of {self.max_message} bytes (DYN_TCP_MAX_MESSAGE_SIZE)",
                    size=ex.have + n, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", peer=self.peer, sent="yes",
                    request_id=ex.request_id,
                ), CANCEL)  # fmt: skip
        if n:
            self.body_add(ex, p, n)
        return self.response_ended(ex) if end else 0

    cdef int h2_reset(self, Http2Stream h2, uint32_t code, bint remote) except -1:
        cdef Exchange ex = h2.data
        cdef StreamBase stream
        if ex is None or ex.stream is None:
            if not self.is_client:
                self.engine.release(h2)
            return 0
        stream = ex.stream
        if not self.is_client:
            ex.ended = True
            if stream.state & S_ASSEMBLING:
                return self.request_done(stream)
            return stream.on_cancel(2)
        if code == REFUSED_STREAM:
            stream.state &= ~S_WRITTEN
            error = PeerLost(
                f"{self.peer} did not process the request (REFUSED_STREAM)", peer=self.peer, sent="no", details={"refused": True}
            )
        elif not remote:
            error = ProtocolError(
                f"{self.peer} broke HTTP/2 on this request's stream ({error_name(code)})", peer=self.peer, sent="maybe",
                phase="reply",
            )  # fmt: skip
        elif code == ENHANCE_YOUR_CALM:
            text = f"{self.peer} reset the stream (ENHANCE_YOUR_CALM)"
            error = Overloaded(text, depth=0, limit=0, peer=self.peer, sent="maybe")
        else:
            error = PeerLost(f"{self.peer} reset the stream ({error_name(code)})", peer=self.peer, sent="maybe")
        self.finish_call(ex)
        return stream.on_lost(error)

    cdef int h2_room(self, Http2Stream h2) except -1:
        cdef Exchange ex = h2.data
        if ex is None or ex.stream is None or self.is_client:
            return 0
        if ex.stream.state & S_QUEUED:
            ex.stream.state &= ~S_QUEUED
            return ex.stream.on_credit()
        return 0

    cdef int h2_closed(self, Http2Stream h2) except -1:
        cdef Exchange ex = h2.data
        cdef StreamBase stream
        if self.is_client or ex is None:
            return 0
        if ex.lingers:
            return self.stop_lingering(ex)
        if ex.stream is None:
            return 0
        stream = ex.stream
        if stream.state & S_SENDING:
            stream.state &= ~S_SENDING
            return stream.on_sent()
        return 0

    cdef int h2_settings(self) except -1:
        cdef dict settings = self.engine.peer_settings()
        first = not self.ready
        self.ready = True
        if self.is_client:
            self.max_streams = min(<object>settings.get(_MAX_STREAMS_SETTING, 1 << 24), 1 << 24)
        if first:
            if not self.is_client:
                self.connection_id = self.connection_id or b"\0" * 8
            self.on_hello({"settings": settings})
        return self.h2_capacity()

    cdef int h2_pong(self, uint64_t payload) except -1:
        cdef double rtt
        if payload == _PING_LEAVING:
            return self.engine.goaway(NO_ERROR, b"", True)
        if payload != _PING_BDP or self.bdp_sent < 0:
            return 0
        # The shortest is the path's own; what stands behind data in a queue takes longer. A path that has become longer is
        # believed in steps.
        rtt = max(self.now - self.bdp_sent, 1e-6)
        self.bdp_rtt = min(rtt, self.bdp_rtt * 1.125)
        self.bdp_sent = -1.0
        self.bdp_next = self.now + self.bdp_delay
        self.bdp_delay = min(self.bdp_delay * 4, _BDP_LAST_S)
        return 0

    cdef int measure(self, size_t n) except -1:
        """Count what arrives in one round trip: near to a whole window it was the window that limited the sender.

        hyper decides when a PING comes back (HTTP2.md 4.4): a window too small then costs two round trips for every doubling.
        A round trip that is known needs no PING to be counted, and one that is still going on is not shorter than what it has
        taken so far: both allow to grow while the data arrive, so that the peer has the new window in the next round trip.
        Four times, because a full window tells nothing about how much more the path carries. More than the path carries in
        its shortest round trip is not granted: 2/3 of a window beyond 1.5 times that never arrive within it.
        """
        if self.bdp_estimate >= _BDP_LIMIT:
            return 0
        if self.bdp_sent < 0 and self.now >= self.bdp_next:
            self.bdp_sent = self.now
            self.engine.ping(_PING_BDP)
        if self.now - self.bdp_from > self.bdp_rtt:
            self.bdp_from = self.now
            self.bdp_bytes = 0
        self.bdp_bytes += n
        if 3 * self.bdp_bytes >= 2 * self.bdp_estimate:
            self.bdp_estimate = min(4 * self.bdp_estimate, _BDP_LIMIT)
            # The connection's window keeps its proportion: a single slow reader could fill it and hold up all others.
            self.engine.set_windows(
                <uint32_t>self.bdp_estimate,
                max(<uint64_t>min(self.window_ratio * self.bdp_estimate, 2147483647.0), <uint64_t>self.engine.connection_window),
            )
            self.bdp_bytes = 0
            self.bdp_delay = _BDP_FIRST_S
            self.bdp_next = min(self.bdp_next, self.now + self.bdp_delay)
        return 0

    cdef int h2_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1:
        text = debug[:1024].decode("utf-8", "replace")
        self.draining = True
        if code == NO_ERROR:
            return self.on_goaway(0, self.seq, text or "it sends GOAWAY")
        shown = f"GOAWAY {error_name(code)}" + (f" ({text})" if text else "")
        return self.on_goaway(3 if code == ENHANCE_YOUR_CALM else 1, self.seq, shown)

    cdef int h2_capacity(self) except -1:
        if self.is_client:
            if self.stops:
                self.send_stops()
            self.on_slot_free()
        return 0

    cdef bint answer_fixed(self, Http2Stream h2, list headers) except -1:
        """Answer ``GET`` of a page that never changes, whatever the other headers say; False if it is something else."""
        cdef object name
        cdef tuple reply = None
        cdef bytes body
        for pair in headers:
            name = (<tuple>pair)[0]
            if name is _METHOD:
                if (<tuple>pair)[1] != b"GET":
                    return False
            elif name is _PATH:
                reply = self.fixed.get((<tuple>pair)[1])
                if reply is None:
                    return False
            elif name is _ID:
                return False  # it belongs into the answer
        if reply is None:
            return False
        body = reply[1]
        self.engine.send_headers(h2, reply[0], False)
        self.engine.send_data(h2, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), None, True)
        self.engine.release(h2)
        return True

    # ---- server: requests ------------------------------------------------------------------------------------------------

    cdef Exchange read_or_refuse(self, list headers, Http2Stream h2):
        """The head of a request; None if it was answered because of its head."""
        cdef Exchange ex
        try:
            ex = self.read_head(headers)
        except http_api.HttpFault as fault:
            ex = Exchange.__new__(Exchange)
            ex.h2 = h2
            if h2 is not None:
                h2.data = ex
            else:
                self.h1_exchange = ex
            ex.is_head = (_METHOD, b"HEAD") in headers
            ex.request_id = _visible(dict(headers).get(_ID, b""))
            self.answer_fault(ex, fault)
            return None
        ex.h2 = h2
        if h2 is not None:
            h2.data = ex
        return ex

    cdef Exchange read_head(self, list headers):
        """What is asked for. Raises `HttpFault`. The usual request is read here, any other one by `http_api.parse_head`."""
        cdef Exchange ex = Exchange.__new__(Exchange)
        cdef object name, value, found
        cdef object method = None
        cdef object path = None
        cdef object content_type = None
        cdef object accept = None
        cdef object authorization = None
        cdef int64_t number
        cdef int accepts = 0
        cdef bint usual = True
        for pair in headers:
            name = (<tuple>pair)[0]
            value = (<tuple>pair)[1]
            if name is _METHOD:
                method = value
            elif name is _PATH:
                path = value
            elif name is _SCHEME or name is _AUTHORITY or name is _AGENT or name is _ENCODING:
                pass
            elif name is _TYPE:
                content_type = value
            elif name is _ACCEPT:
                accepts += 1  # several are one list, which the last of them does not tell
                usual = usual and accepts == 1
                accept = value
            elif name is _LENGTH:
                ex.length = _digits(value)
            elif name is _AUTHORIZATION:
                authorization = value
                usual = usual and self.token is not None
            else:
                name = _NAMES.get(name)
                if name is None:
                    usual = False  # for the handler's context
                elif name is _ID:
                    ex.request_id = _visible(value)
                    usual = usual and ex.request_id is not None
                else:
                    number = _digits(value)
                    if number < 0 or number > 0xFFFFFFFF:
                        usual = False
                    elif name is _TIMEOUT:
                        ex.timeout_ms = <uint32_t>number
                    else:
                        ex.accept_s = number / 4000.0  # a quarter of the caller's patience, as on the native wire
        if usual and method == _POST:
            ex.endpoint = self.routes.get(path)
            if ex.endpoint is not None:
                found = _types.get(content_type)
                if found is not None:
                    ex.kind = found
                    found = _accepts.get(accept)
                    if found is not None:
                        ex.shape = found
                        if self.token is None or hmac.compare_digest(authorization or b"", b"Bearer " + <bytes>self.token):
                            return ex
        head = http_api.parse_head(headers, self.root)
        if head.content_length is not None:
            ex.length = head.content_length  # names of HTTP/1.1 are not interned, so the loop above has not seen it
        ex.is_head = head.method == "HEAD"
        ex.request_id = head.request_id or None
        if self.token is not None and head.page not in ("live", "ready"):
            if not hmac.compare_digest((head.token or "").encode(), <bytes>self.token):
                shown = "a wrong token" if head.token else "no token"
                ex.page = Unauthenticated(
                    f"{shown} was shown (authorization: Bearer …); set the worker's DYNWIRE_TOKEN on the caller's side",
                    peer=self.peer, sent="no",
                )  # fmt: skip
                ex.shape = _SHAPES[head.shape]
                return ex
        if head.page != "endpoint":
            ex.page = head
            return ex
        ex.endpoint = head.endpoint
        ex.kind = head.kind
        ex.shape = _SHAPES[head.shape]
        ex.timeout_ms = head.timeout_ms
        ex.accept_s = head.accept_timeout_ms / 4000.0 if head.accept_timeout_ms else INFINITY
        ex.meta = head.headers or None
        if len(self.routes) < CACHED_NAMES:
            self.routes[path] = ex.endpoint
        if len(_types) < CACHED_NAMES:
            _types[content_type] = ex.kind
        if accepts <= 1 and len(_accepts) < CACHED_NAMES:
            _accepts[accept] = ex.shape
        return ex

    cdef int request_began(self, Exchange ex, bint end) except -1:
        cdef StreamBase stream
        if ex.page is not None:
            if end:
                return self.answer_page(ex)
            return 0  # a body that nobody wants is read first
        if ex.length > self.max_message:
            return self.refuse_exchange(ex, self.too_large(ex.length))
        if <int64_t>self.body_bytes + ex.length > BODY_BUDGET + self.max_message:
            return self.refuse_exchange(ex, self.too_much())
        stream = self.make_stream()
        ex.stream = stream
        stream.under = ex
        if self.free_len:
            self.free_len -= 1
            self.put_slot(stream, self.free_slots[self.free_len])
        else:
            self.put_slot(stream, self.live)
        self.seq += 1
        stream.seq = self.seq
        stream.in_id = ex.request_id
        if ex.request_id is None:
            ex.seq = stream.seq  # the context makes the same id of it when somebody asks
        stream.reply_kind_ = 1 if ex.shape == SH_MSGPACK else 2 if ex.shape > SH_ITEMS else 0
        if end:
            return self.request_ended(ex, NULL, 0)
        stream.state |= S_ASSEMBLING
        self.arm(stream, self.now + (ex.timeout_ms * 0.001 if ex.timeout_ms else _UPLOAD_S))
        return 0

    cdef object too_large(self, int64_t size):
        return MessageTooLarge(
            f"a request of {size} bytes exceeds the limit of {self.max_message} bytes (DYN_TCP_MAX_MESSAGE_SIZE on the worker's "
            "side)",
            size=size, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", sent="no", phase="send",
        )  # fmt: skip

    cdef object too_much(self):
        return Overloaded(
            f"requests of {self.body_bytes} bytes are in memory for this connection, the limit is "
            f"{BODY_BUDGET + self.max_message} bytes",
            depth=self.body_bytes, limit=BODY_BUDGET + self.max_message, retry_after=1.0, sent="no", phase="accept",
        )  # fmt: skip

    cdef int request_data(self, Exchange ex, const unsigned char *p, size_t n, bint end) except -1:
        cdef StreamBase stream = ex.stream
        if ex.page is not None:
            return self.answer_page(ex) if end else 0
        if stream is None:
            return 0
        if end and ex.have == 0:
            if <int64_t>n > self.max_message:
                return self.refuse_exchange(ex, self.too_large(n))
            return self.request_ended(ex, p, n)
        if n:
            if <int64_t>(ex.have + n) > self.max_message:
                return self.refuse_exchange(ex, self.too_large(ex.have + n))
            if <int64_t>(self.body_bytes + n) > BODY_BUDGET + self.max_message:
                return self.refuse_exchange(ex, self.too_much())
            self.body_add(ex, p, n)
            self.body_bytes += n
            stream.in_have = <uint32_t>ex.have
            stream.in_total = <uint32_t>max(ex.length, <int64_t>ex.have)
        return self.request_ended(ex, NULL, 0) if end else 0

    cdef int body_add(self, Exchange ex, const unsigned char *p, size_t n) except -1:
        """Collect a body: in a pooled block if its length is known and large, else in a buffer that grows."""
        cdef unsigned char *to
        if ex.have == 0 and ex.length >= LARGE_ITEM and ex.length <= self.max_message:
            ex.block = default_pool.take(ex.length)
        if ex.block is not None:
            if ex.have + n > ex.block.size:  # more than content-length said: the engine has reset the stream
                return 0
            memcpy(ex.block.data + ex.have, p, n)
        else:
            to = dw_buf_reserve(&ex.body, n)
            if to is NULL:
                raise MemoryError()
            memcpy(to, p, n)
            ex.body.n += n
        ex.have += n
        return 0

    cdef object body_of(self, Exchange ex, int kind):
        """The collected body: raw bytes as a Payload, others as bytes (or what has their buffer)."""
        cdef Block block
        if ex.block is not None:
            block, ex.block = ex.block, None
            return payload_of_block(block, ex.have)
        found = self.body_of_piece(ex.body.p, ex.body.n, kind)
        dw_buf_free(&ex.body)
        return found

    cdef int request_ended(self, Exchange ex, const unsigned char *p, size_t n) except -1:
        cdef StreamBase stream = ex.stream
        cdef object payload
        if ex.have == 0:
            ex.have = n
            self.body_bytes += n
            payload = self.body_of_piece(p, n, ex.kind)
        else:
            payload = self.body_of(ex, ex.kind)
        stream.state &= ~S_ASSEMBLING
        self.accept_after = ex.accept_s
        return self.on_request(stream, self.resolve(ex.endpoint), payload, ex.kind, ex.meta, ex.timeout_ms)

    cdef object body_of_piece(self, const unsigned char *p, size_t n, int kind):
        cdef Block block
        if kind:
            return PyBytes_FromStringAndSize(<char *>p, n)
        if n < LARGE_ITEM:
            return payload_copy(p, n)
        block = default_pool.take(n)
        memcpy(block.data, p, n)
        return payload_of_block(block, n)

    def stop_request(self, str request_id):
        """(server) The caller of a request that is still arriving asks to stop early; returns whether it was found."""
        cdef StreamBase stream
        for found in self.slots:
            if found is not None:
                stream = found
                if stream.state & S_ASSEMBLING and stream.in_id == request_id:
                    stream.state |= S_STOP_EARLY
                    stream.on_stop_early()
                    return True
        return False

    # ---- server: replies -------------------------------------------------------------------------------------------------

    cdef int reply_head(self, Exchange ex, list headers, bint end) except -1:
        ex.begun = True
        if ex.h2 is not None:
            self.engine.send_headers(ex.h2, headers, end)
        else:
            self.h1.send_head(int((<tuple>headers[0])[1]), headers[1:], end)
        if end:
            ex.ended = True
        return 0

    cdef int reply_data(self, Exchange ex, const unsigned char *p, size_t n, object keep, bint end) except -1:
        if ex.h2 is not None:
            self.engine.send_data(ex.h2, p, n, keep, end)
        else:
            if n:
                self.h1.send_data(PyBytes_FromStringAndSize(<char *>p, n))
            if end:
                self.h1.end()
            self.h1_flush()
        if end:
            ex.ended = True
        return 0

    cdef int answer(self, Exchange ex, int status, list headers, bytes body) except -1:
        """A whole reply at once."""
        cdef list fields = [(_STATUS, str(status).encode()), *headers]
        if ex.begun:
            return 0
        if ex.is_head or not body:
            self.reply_head(ex, fields, True)
            if ex.h2 is None:
                self.h1_flush()
        else:
            self.reply_head(ex, fields, False)
            self.reply_data(ex, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), None, True)
        self.wrote()
        return 0

    cdef int answer_page(self, Exchange ex) except -1:
        page, ex.page = ex.page, None
        if isinstance(page, DynwireError):
            return self.refuse_exchange(ex, page)
        try:
            status, headers, body = self.pages(page)
        except http_api.HttpFault as fault:
            return self.answer_fault(ex, fault)
        fields = [*headers, (_LENGTH, str(len(body)).encode())]
        if ex.request_id is not None:
            fields.append((_ID, (<str>ex.request_id).encode("latin-1")))
        self.answer(ex, status, fields, body)
        return self.reply_ended(ex)

    cdef int answer_fault(self, Exchange ex, object fault) except -1:
        status, headers, body = fault.response(ex.request_id or "")
        self.answer(ex, status, headers, body)
        return self.reply_ended(ex)

    cdef int refuse_exchange(self, Exchange ex, object error) except -1:
        """Answer a request that no handler will see with this error."""
        cdef StreamBase stream = ex.stream
        self.put_fault(ex, error)
        if stream is None:
            return self.reply_ended(ex)
        stream.state = (stream.state & ~S_ASSEMBLING) | S_ENDED
        return self.request_done(stream)

    cdef int put_fault(self, Exchange ex, object error) except -1:
        """End the reply with an error."""
        cdef bytes data
        if ex.ended:
            return 0
        if not ex.begun:
            status, headers, data = http_api.refusal(_SHAPE_NAMES[ex.shape or SH_AUTO], error, self.id_text(ex))
            return self.answer(ex, status, headers, data)
        if ex.encoder is None:
            ex.encoder = http_api.reply_encoder("items", True)
        data = ex.encoder.error(error, ex.request_id or "")
        if not data:  # this shape has no words for it: the reply must not look complete
            ex.ended = True
            if ex.h2 is not None:
                self.engine.reset(ex.h2, INTERNAL_ERROR)
            else:
                self.h1.abort()
                self.h1_flush()
            return self.wrote()
        self.reply_data(ex, <const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), None, True)
        return self.wrote()

    cdef int reply_ended(self, Exchange ex) except -1:
        """The reply is complete, and nothing runs for the request any more."""
        if ex.h2 is not None:
            if ex.h2.state != ST_CLOSED and ex.h2.state != ST_HALF_REMOTE and ex.ended and not ex.h2.queued:
                # The rest of the request is not wanted (RFC 9113 8.1). It is taken and dropped where the reply itself still
                # waits for the window: a reset would cut it.
                if self.linger(ex):
                    return 0
                self.engine.reset(ex.h2, NO_ERROR)
            self.engine.release(ex.h2)
        elif ex is self.h1_exchange:
            self.h1_exchange = None
            if self.draining:
                self.h1.abort()  # nothing more is read
            if self.h1.must_close:
                self.close_soon()
            elif not self.in_h1:
                try:
                    self.h1_received()  # a pipelined request may be waiting
                except ProtocolError as error:
                    self.broken(error)
        return 0

    cdef bint linger(self, Exchange ex) except -1:
        """Leave the stream open for the rest of a request that was answered before its end; False if it cannot stay.

        RFC 9113 8.1 lets a server reset it at once with NO_ERROR, but then what comes next is dropped unseen, faulty or not. Most
        refused requests have a short body right behind their head: they may end by themselves, and are checked until then. The
        stream counts as open for so long, so few may stay, and of a low limit none.
        """
        if ex.h2.state != ST_HALF_LOCAL:
            return False
        most = min(LINGERING, self.max_streams // 8)
        if most == 0:
            return False
        if self.lingering is None:
            self.lingering = []
        elif len(self.lingering) >= most:
            self.stop_lingering(<Exchange>self.lingering[0])
        ex.lingers = True
        self.lingering.append(ex)
        return True

    cdef int stop_lingering(self, Exchange ex) except -1:
        """The request has ended, or the client sends too much of it."""
        ex.lingers = False
        self.lingering.remove(ex)
        self.engine.reset(ex.h2, NO_ERROR)  # nothing where the stream is closed
        return self.engine.release(ex.h2)

    cdef bint may_send(self, StreamBase stream) except -1:
        cdef Exchange ex = stream.under
        if stream.state & S_SENDING:
            return False
        if ex is None or ex.ended:
            return True  # it is gone: items go nowhere
        if ex.h2 is not None:
            if self.engine.room(ex.h2):
                return True
            stream.state |= S_QUEUED
            return False
        if self.output_backlog() < H1_BACKLOG:
            return True
        self.congested = True
        if not stream.state & S_QUEUED:
            stream.state |= S_QUEUED
            self.waiting_writer.append(stream)
        return False

    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1:
        cdef Exchange ex = stream.under
        cdef unsigned char *out
        cdef unsigned char head[ITEM_HEADER]
        if last:
            stream.state |= S_ENDED
        if ex is None or ex.ended:
            return 0
        if ex.shape != SH_ITEMS:
            self.put_encoded(ex, p, n, kind, last)
        else:
            if not ex.begun:
                self.reply_head(ex, _ITEMS_HEAD, False)
            if n < LARGE_ITEM:
                out = dw_buf_reserve(&self.scratch, n + ITEM_HEADER)
                if out is NULL:
                    raise MemoryError()
                out[0] = <unsigned char>kind
                dw_st32be(out + 1, <uint32_t>n)
                if n:
                    memcpy(out + ITEM_HEADER, p, n)
                self.reply_data(ex, out, n + ITEM_HEADER, None, last)
                if self.scratch.cap > SCRATCH_KEPT:
                    dw_buf_free(&self.scratch)
            else:
                head[0] = <unsigned char>kind
                dw_st32be(head + 1, <uint32_t>n)
                self.reply_data(ex, head, ITEM_HEADER, None, False)
                self.reply_data(ex, p, n, owner, last)
        if last and ex.h2 is not None and ex.h2.queued:
            stream.state |= S_SENDING
        return 0

    cdef str id_text(self, Exchange ex):
        return ex.request_id if ex.request_id is not None else self.id_of(ex).decode()

    cdef int add_id(self, Exchange ex, list fields) except -1:
        """The request's id for a response's head. One that no header can carry (of x-dynwire-id) only its caller knows."""
        cdef bytes value
        if ex.request_id is None:
            fields.append((_ID, self.id_of(ex)))
        else:
            value = (<str>ex.request_id).encode()
            if _visible(value) is not None:
                fields.append((_ID, value))
        return 0

    cdef bytes id_of(self, Exchange ex):
        """The id that the context of a request makes of connection and number, where its caller has not chosen one."""
        if self.id_prefix is None:
            self.id_prefix = self.connection_id.hex().encode()
        return PyBytes_FromFormat("%s-%x", PyBytes_AS_STRING(self.id_prefix), ex.seq)

    cdef int put_encoded(self, Exchange ex, const unsigned char *p, size_t n, int kind, bint last) except -1:
        """An item for somebody else's client."""
        cdef bytes data
        cdef unsigned char *out
        cdef size_t size
        cdef list fields
        if last and not ex.begun and not ex.is_head and (
            kind == 2 and ex.shape <= SH_JSON or kind == 2 and ex.shape == SH_AUTO or kind == 0 and ex.shape >= SH_RAW
        ):
            size = n + 1 if kind else n  # a document ends with a line end, for people with a shell
            fields = [_STATUS_OK, <tuple>_KIND_FIELDS[kind], (_LENGTH, PyBytes_FromFormat("%zu", size))]
            self.add_id(ex, fields)
            self.reply_head(ex, fields, size == 0)
            if kind:
                out = dw_buf_reserve(&self.scratch, size)
                if out is NULL:
                    raise MemoryError()
                memcpy(out, p, n)
                out[n] = 10
                self.reply_data(ex, out, size, None, True)
                if self.scratch.cap > SCRATCH_KEPT:
                    dw_buf_free(&self.scratch)
            elif n:
                self.reply_data(ex, p, n, None, True)
            elif ex.h2 is None:
                self.h1_flush()
            return 0
        if ex.shape == SH_RAW and ex.begun:  # the bytes are the item: nothing to encode
            return self.reply_data(ex, p, n, None, last)
        if ex.encoder is None:
            ex.encoder = http_api.reply_encoder(_SHAPE_NAMES[ex.shape], not last, kind)
        data = ex.encoder.item(PyBytes_FromStringAndSize(<char *>p, n), kind, last)
        if not ex.begun:
            fields = [_STATUS_OK, *ex.encoder.head()]
            self.add_id(ex, fields)
            self.reply_head(ex, fields, False)
        return self.reply_data(ex, <const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), None, last)

    cdef int put_end(self, StreamBase stream) except -1:
        cdef Exchange ex = stream.under
        cdef bytes data = b""
        stream.state |= S_ENDED
        if ex is None or ex.ended:
            return 0
        if ex.shape == SH_ITEMS:
            if not ex.begun:
                self.reply_head(ex, _ITEMS_HEAD, True)
                if ex.h2 is None:
                    self.h1_flush()
                return 0
        else:
            if ex.encoder is None:
                ex.encoder = http_api.reply_encoder(_SHAPE_NAMES[ex.shape], True)
            if not ex.begun:
                fields = [_STATUS_OK, *ex.encoder.head()]
                self.add_id(ex, fields)
                self.reply_head(ex, fields, False)
            data = ex.encoder.end()
        self.reply_data(ex, <const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), None, True)
        if ex.h2 is not None and ex.h2.queued:
            stream.state |= S_SENDING
        return 0

    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1:
        cdef Exchange ex = stream.under
        stream.state |= S_ENDED
        stream.state &= ~S_SENDING
        if ex is None or ex.ended:
            if ex is not None and ex.h2 is not None and ex.h2.queued:
                self.engine.reset(ex.h2, CANCEL)  # a reply that is still leaving and that nobody wants
            return 0
        return self.put_fault(ex, error_from_body(body, peer=ex.endpoint, request_id=ex.request_id))

    cdef int put_accept(self, StreamBase stream) except -1:
        cdef Exchange ex = stream.under
        if ex is None or ex.begun or ex.shape != SH_ITEMS:
            return 0  # others learn the status with the first item or the error
        self.reply_head(ex, _ITEMS_HEAD, False)
        return self.h1_flush() if ex.h2 is None else 0

    cdef int request_done(self, StreamBase stream) except -1:
        cdef Exchange ex = stream.under
        if not self.free_slot(stream):
            return 0  # it was done already
        stream.under = None
        if ex is not None:
            ex.stream = None
            self.body_bytes -= ex.have
            dw_buf_free(&ex.body)
            ex.block = None
        stream.on_freed()
        return self.reply_ended(ex) if ex is not None else 0

    cdef int free_slot(self, StreamBase stream) except -1:
        cdef uint32_t sid = stream.sid
        if stream.conn is not self:
            return 0
        if stream.state & S_QUEUED and stream not in self.waiting_writer:
            stream.state &= ~S_QUEUED
        if not Link.free_slot(self, stream):
            return 0
        if not self.is_client:
            self.free_slots[self.free_len] = sid
            self.free_len += 1
        return 1

    # ---- client ----------------------------------------------------------------------------------------------------------

    cdef bint may_request(self):
        if self.engine.live >= self.max_streams:
            # A call ends with its last byte, its stream a moment later: nobody asks again then unless the engine says so.
            self.engine.wants_capacity = True
            return False
        return self.live < self.max_streams and not self.engine.draining

    cdef list prefix_of(self, str endpoint):
        cdef list fields = self.prefixes.get(endpoint)
        if fields is None:
            fields = [
                (_METHOD, _POST), (_SCHEME, self.scheme.encode()), (_AUTHORITY, self.authority.encode()),
                (_PATH, f"{self.root}/{endpoint.replace('.', '/')}".encode()), (_ACCEPT, _ITEMS_TYPE), self.patience,
                *([(_AUTHORIZATION, b"Bearer " + self.token)] if self.token is not None else ()),
            ]  # fmt: skip
            self.prefixes[endpoint] = fields
        return fields

    cdef int send_request_(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                           double now) except -1:
        cdef Exchange ex = Exchange.__new__(Exchange)
        cdef Http2Stream h2
        cdef list fields = list(self.prefix_of(endpoint))
        cdef list more = None
        cdef Py_buffer view
        cdef double left
        cdef bint large
        fields.append(<tuple>_KIND_FIELDS[kind])
        if deadline != INFINITY:
            left = (deadline - now) * 1000.0
            if left < 4294967295.0:
                fields.append((_TIMEOUT, str(<uint32_t>max(left, 0.0) + 1).encode()))
        # What may fail comes before the stream: one that is opened and not used would count for ever.
        if meta is not None:
            headers = _unpack(meta, type=dict[str, str])
            ex.request_id = headers.pop("x-request-id", None)
            more = http_api.request_headers(request_id=ex.request_id or "", headers=headers)
            fields.extend(more)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.engine.now = now
            h2 = self.engine.open_stream()
            if h2 is None or self.dead:  # Python code has run, and with it another thread that may have closed it
                raise PeerLost(
                    f"the connection to {self.peer} takes no further requests", peer=self.peer, sent="no",
                    details={"refused": True},
                )  # fmt: skip
            ex.h2 = h2
            ex.stream = stream
            h2.data = ex
            stream.under = ex
            self.take_slot(stream)
            if self.live == 1:
                self.live_since = now
                self.ping_at = now + self.keepalive_interval
            self.seq += 1
            stream.seq = self.seq
            self.on_request_sent(stream)
            if ex.request_id is None:
                ex.request_id = f"{self.connection_id.hex()}-{stream.seq:x}"
                fields.append((_ID, (<str>ex.request_id).encode("latin-1")))
            large = view.len >= LARGE_ITEM
            if large:
                fields.append((_LENGTH, str(view.len).encode()))
            stream.mark = self.tx_frames_bytes + self.engine.backlog()
            stream.state |= S_WRITTEN  # before anything that may run Python code: until `mark` is passed it does not count
            self.engine.send_headers(h2, fields, view.len == 0)
            if view.len:
                self.engine.send_data(h2, <const unsigned char *>view.buf, view.len, data if large else None, True)
        finally:
            PyBuffer_Release(&view)
        if ex.stream is not None:
            self.arm(stream, due)
        if self.engine.exhausted and not self.draining:
            # Stream ids are used up: those in flight go on, further requests get another connection (RFC 9113 5.1.1).
            self.draining = True
            self.on_saturation()
        return 0

    cdef int finish_call(self, Exchange ex) except -1:
        """(client) The call is over; what has arrived of an item in vain is given back."""
        cdef StreamBase stream = ex.stream
        if stream is None:
            return 0
        ex.stream = None
        stream.state |= S_ENDED
        self.free_slot(stream)
        if ex.item_have:
            self.engine.consumed(None, ex.item_have - ex.early_now)
            ex.early -= ex.early_now
            ex.item_have = ex.early_now = 0
        dw_buf_free(&ex.body)
        ex.block = None
        return 0

    cdef int fault(self, Exchange ex, object error, uint32_t code) except -1:
        """(client) End a call because of what came for it."""
        cdef StreamBase stream = ex.stream
        if stream is None:
            return 0
        self.finish_call(ex)
        self.engine.reset(ex.h2, code)
        self.wrote()
        return stream.on_fault(error)

    cdef int response_began(self, Exchange ex, list headers, bint end) except -1:
        cdef object name
        cdef StreamBase stream = ex.stream
        if stream is None:
            return 0
        for pair in headers:
            name = (<tuple>pair)[0]
            if name is _STATUS:
                if (<tuple>pair)[1] is _OK or (<tuple>pair)[1] == _OK:
                    ex.status = 200
                else:
                    ex.status = int((<tuple>pair)[1])
            elif name is _TYPE:
                if (<tuple>pair)[1] == _ITEMS_TYPE:
                    ex.items = True
            elif name is _LENGTH:
                ex.length = _digits((<tuple>pair)[1])
        ex.reply_headers = headers
        if ex.status == 200:
            stream.state |= S_ACCEPTED
            stream.on_accept()
        if end:
            return self.response_items(ex, NULL, 0, True) if ex.items else self.response_ended(ex)
        return 0

    cdef int response_ended(self, Exchange ex) except -1:
        """A reply that is not in items is complete: somebody else's server, or an error."""
        cdef StreamBase stream = ex.stream
        cdef int kind
        cdef object item
        if stream is None:
            return 0
        kind = http_api.reply_kind(ex.reply_headers) if 200 <= ex.status < 300 else -1
        if kind >= 0:
            item = self.body_of(ex, kind)
            self.finish_call(ex)
            self.end_upload(ex)
            if not stream.keeps_items:
                return stream.on_item(item, kind, True)
            ex.early += len(item) + ITEM_HEADER  # given back when it arrived
            return stream.on_item(item, kind, True)
        body = bytes(self.body_of(ex, 1))
        error = http_api.error_from_response(ex.status, ex.reply_headers, body, peer=self.peer, request_id=ex.request_id)
        self.finish_call(ex)
        self.end_upload(ex)
        return stream.on_fault(error)

    cdef int end_upload(self, Exchange ex) except -1:
        """The reply is complete; if the request has not left completely, the server does not want the rest."""
        if ex.h2.queued:
            self.engine.reset(ex.h2, CANCEL)
        return 0

    cdef int response_items(self, Exchange ex, const unsigned char *p, size_t n, bint end) except -1:
        cdef size_t take, size
        cdef object item
        cdef StreamBase stream
        cdef unsigned char *to
        while n:
            if ex.stream is None:
                # More than belongs to the reply: nobody will take it, and its end may never come.
                self.engine.consumed(None, n)
                self.engine.reset(ex.h2, CANCEL)
                return self.wrote()
            if ex.head_have < ITEM_HEADER:
                if ex.head_have == 0 and n >= ITEM_HEADER:
                    ex.item_kind = p[0]
                    ex.item_size = dw_ld32be(p + 1)
                    size = ex.item_size
                    if n - ITEM_HEADER >= size and ex.item_kind <= 2 and <int64_t>size <= self.max_message and size < LARGE_ITEM:
                        # Whole, and the usual case.
                        if ex.item_kind:
                            item = PyBytes_FromStringAndSize(<char *>p + ITEM_HEADER, size)
                        else:
                            item = payload_copy(p + ITEM_HEADER, size)
                        p += ITEM_HEADER + size
                        n -= ITEM_HEADER + size
                        self.deliver(ex, item, ex.item_kind, size, end and n == 0)
                        continue
                take = min(n, <size_t>(ITEM_HEADER - ex.head_have))
                memcpy(ex.head + ex.head_have, p, take)
                ex.head_have += <uint8_t>take
                ex.item_have += take
                p += take
                n -= take
                if ex.head_have < ITEM_HEADER:
                    break
                ex.item_kind = ex.head[0]
                ex.item_size = dw_ld32be(ex.head + 1)
                if ex.item_kind > ITEM_ERROR:
                    self.engine.consumed(None, n)
                    return self.fault(ex, ProtocolError(
                        f"{self.peer} sent an item of kind {ex.item_kind}", peer=self.peer, phase="reply", sent="yes",
                        request_id=ex.request_id,
                    ), PROTOCOL_ERROR)  # fmt: skip
                if <int64_t>ex.item_size > self.max_message:
                    self.engine.consumed(None, n)
                    return self.fault(ex, MessageTooLarge(
                        f"a reply item of {ex.item_size} bytes from {self.peer} exceeds this side's limit of {self.max_message} "
                        "bytes; raise DYN_TCP_MAX_MESSAGE_SIZE",
                        size=ex.item_size, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", peer=self.peer,
                        phase="reply", sent="yes", request_id=ex.request_id,
                    ), CANCEL)  # fmt: skip
                if ex.item_size >= LARGE_ITEM:
                    ex.block = default_pool.take(ex.item_size)
            take = min(n, <size_t>ex.item_size + ITEM_HEADER - ex.item_have)
            if ex.block is not None:
                memcpy(ex.block.data + (ex.item_have - ITEM_HEADER), p, take)
            elif take:
                to = dw_buf_reserve(&ex.body, take)
                if to is NULL:
                    raise MemoryError()
                memcpy(to, p, take)
                ex.body.n += take
            ex.item_have += take
            p += take
            n -= take
            if ex.item_have < <size_t>ex.item_size + ITEM_HEADER:
                break
            size = ex.item_size
            if ex.item_kind == ITEM_ERROR:
                if ex.block is None:
                    body = PyBytes_FromStringAndSize(<char *>ex.body.p, ex.body.n)
                else:
                    body = bytes(payload_of_block(ex.block, size))
                stream = ex.stream
                self.finish_call(ex)
                self.end_upload(ex)
                stream.on_error(0, body)
                continue
            if ex.block is not None:
                item = payload_of_block(ex.block, size)
                ex.block = None
            elif ex.item_kind:
                item = PyBytes_FromStringAndSize(<char *>ex.body.p, ex.body.n)
            else:
                item = payload_copy(ex.body.p, ex.body.n)
            if ex.body.cap > 4096:
                dw_buf_free(&ex.body)
            ex.body.n = 0
            ex.head_have = 0
            ex.item_have = 0
            ex.early_now = 0
            self.deliver(ex, item, ex.item_kind, size, end and n == 0)
        stream = ex.stream
        if stream is None:
            return 0
        if end:
            broken = ex.head_have > 0
            self.finish_call(ex)
            self.end_upload(ex)
            if broken:
                error = PeerLost(f"{self.peer} ended the reply in the middle of an item", peer=self.peer, sent="yes")
                return stream.on_lost(error)
            return stream.on_end()
        if ex.item_have > ex.early_now and ex.unread == 0:
            # Nothing else of the stream is unread: the item may need more than the window to become complete.
            self.give_back_early(ex)
        return 0

    cdef int give_back_early(self, Exchange ex) except -1:
        cdef size_t n = ex.item_have - ex.early_now
        ex.early_now = ex.item_have
        ex.early += n
        return self.engine.consumed(ex.h2, n)

    cdef int deliver(self, Exchange ex, object item, int kind, size_t size, bint last) except -1:
        cdef StreamBase stream = ex.stream
        if last:
            self.finish_call(ex)
            self.end_upload(ex)
        if not stream.keeps_items:
            self.consumed(stream, size + ITEM_HEADER)
        else:
            ex.unread += size + ITEM_HEADER
        return stream.on_item(item, kind, last)

    cdef int consumed_(self, StreamBase stream, int64_t cost) except -1:
        cdef Exchange ex = None if stream is None else stream.under
        cdef int64_t given
        if ex is None:
            return self.engine.consumed(None, cost)
        given = min(<int64_t>ex.early, cost)
        ex.early -= given
        if cost > given:
            self.engine.consumed(ex.h2, cost - given)
        if stream.keeps_items:
            ex.unread = ex.unread - cost if ex.unread > <size_t>cost else 0
            if ex.unread == 0 and ex.stream is not None and ex.item_have > ex.early_now:
                self.give_back_early(ex)
        return 0

    cdef int put_cancel_(self, StreamBase stream, int kind) except -1:
        """(client) Ask the handler to finish early: a request of its own, which names this one by its id."""
        cdef Exchange ex = stream.under
        if ex is None or ex.stream is None or kind != 1:
            return 0
        self.stops.append(ex.request_id)
        return self.send_stops()

    cdef int send_stops(self) except -1:
        cdef Http2Stream h2
        cdef Exchange ex
        while self.stops:
            h2 = self.engine.open_stream()
            if h2 is None:
                return 0  # when a stream is free
            ex = Exchange.__new__(Exchange)
            ex.h2 = h2
            h2.data = ex
            fields = list(self.prefix_of("stop"))
            fields.extend(http_api.request_headers(request_id=self.stops.pop(0)))
            self.engine.send_headers(h2, fields, True)
        return self.wrote()

    cdef int abandon_(self, StreamBase stream, int kind) except -1:
        cdef Exchange ex = stream.under
        if ex is None or ex.stream is not stream:
            return 0
        self.finish_call(ex)
        self.engine.reset(ex.h2, CANCEL)
        return self.wrote()

    cdef int put_ping(self) except -1:
        return self.engine.ping(_PING_ALIVE)

    # ---- both ------------------------------------------------------------------------------------------------------------

    cdef int put_goaway(self, int code, str text) except -1:
        self.draining = True
        # Requests that cross it are refused one by one (they do not count as told by this GOAWAY, whose last id is 2^31 - 1).
        self.goaway_seq = self.seq + 0x40000000
        if self.engine is None:
            if self.h1 is not None and self.h1_exchange is None:
                self.h1.abort()  # nothing more is read
                self.close_soon()
            return 0
        if code == 0 and not self.is_client:
            self.engine.goaway(NO_ERROR, text.encode(), False)
            return self.engine.ping(_PING_LEAVING)
        return self.engine.goaway(NO_ERROR if code == 0 else PROTOCOL_ERROR, text.encode(), True)

    cdef int farewell(self, str text) except -1:
        return 0  # the engine has queued GOAWAY

    cdef int last_words(self) except -1:
        if self.engine is not None and not self.is_client:
            self.engine.goaway(NO_ERROR, b"", True)
        return 0

    cdef bint has_output(self):
        if self.engine is not None:
            return self.engine.has_output()
        return self.h1_sent < self.h1_out.n

    cdef bint has_unsent(self):
        if self.has_output():
            return True
        if self.engine is not None:
            for found in self.engine.streams.values():
                if (<Http2Stream>found).queued:
                    return True  # the peer's window is closed
        return False

    cdef size_t output_backlog(self):
        if self.engine is not None:
            return self.engine.backlog()
        return self.h1_out.n - self.h1_sent

    cdef bint one_piece(self):
        return True

    cdef uint64_t handed_upto(self):
        return self.tx_frames_bytes + self.gathered

    cdef int gather_(self, dw_chunk *chunks, size_t limit) except -1:
        cdef int n, i
        if self.engine is not None:
            n = self.engine.gather(chunks, limit)
            self.gathered = 0
            for i in range(n):
                self.gathered += chunks[i].len
            return n
        if self.h1_sent == self.h1_out.n:
            return 0
        # Its memory may move when more is added: the asyncio driver, the only one that serves, writes at once.
        chunks[0].base = self.h1_out.p + self.h1_sent
        chunks[0].len = self.h1_out.n - self.h1_sent
        return 1

    cdef int sent_(self, size_t n) except -1:
        self.tx_frames_bytes += n
        if self.engine is not None:
            return self.engine.sent(n)
        self.h1_sent += n
        if self.h1_sent == self.h1_out.n:
            self.h1_sent = self.h1_out.n = 0
            if self.h1_out.cap > 262144:
                dw_buf_free(&self.h1_out)
        return 0

    cdef double next_wakeup(self):
        cdef double when = min(Link.next_wakeup(self), self.head_at)
        return min(when, self.engine.next_wakeup()) if self.engine is not None else when

    cdef int time_passed_(self, double now) except -1:
        self.now = now
        Link.time_passed(self, now)
        if now >= self.head_at and not self.dead:
            return self.broken(ProtocolError(
                f"client {self.peer} did not complete its HTTP/1.1 request within {self.handshake_s:g} s", peer=self.peer,
                offset=self.rx_bytes, sent="maybe",
            ))  # fmt: skip
        if self.engine is not None and not self.dead:
            try:
                self.engine.on_time(now)
            except Http2ConnectionError as error:
                return self.broken(self.connection_error(error))
        return 0

    cdef list take_all_streams(self):
        cdef list out = Link.take_all_streams(self)
        cdef Exchange ex
        for stream in out:
            ex = (<StreamBase>stream).under
            if ex is not None:
                ex.stream = None
                ex.ended = True
                ex.block = None  # of an item or a request that has not arrived completely
        self.lingering = None
        if self.events is not None:
            self.events.wire = None  # the engine says nothing more, and nothing keeps the connection alive
        return out
