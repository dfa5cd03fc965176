"""HTTP/2 without I/O: one connection, either role (RFC 9113). Bytes and a clock go in, callbacks and bytes come out.

`Http2Engine` is what the drivers know. `NativeEngine` is the implementation of this package; `dynwire._http2lib` has one over
the h2 library. An engine calls its `Http2Owner`. `Http2Connection` is an owner with a Python face (events as tuples), for
tests, fuzzers and tools.

An engine is driven like this: put bytes where `recv_target` says and report them with `received`; it calls back. What is to be
written, `gather` says; how much of it was accepted, `sent`.

Callbacks may call the engine: `send_headers`, `send_data`, `reset` and the rest of the sending side, `consumed`, `release`,
`open_stream`; not `received`, `on_time`, `gather` or `sent`. A stream that the peer has reset, or that is closed for another
reason, may still be named: sending on it does nothing (a later frame of the same read may have ended what an earlier one
began). Http2Stream objects are never used for a second stream.

Threads: one thread at a time, in the sense of the GIL. No method releases it. A writer may release it between `gather` and
`sent`: nothing in between moves the memory that `gather` named.
"""

import collections

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.ref cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove

from ._bytes cimport (
    dw_buf,
    dw_buf_free,
    dw_buf_reserve,
    dw_chunk,
    dw_ld16be,
    dw_ld24be,
    dw_ld32be,
    dw_ld64be,
    dw_st24be,
    dw_st32be,
    dw_st64be,
)
from ._hpack cimport HpackDecoder, HpackEncoder, hpack_intern

from ._hpack import HpackError

KINDS = ("request", "response", "informational", "trailers")
cdef tuple _KINDS = KINDS
cdef tuple _STATES = ("idle", "open", "half-closed (local)", "half-closed (remote)", "closed")


class Http2ConnectionError(Exception):
    """The connection is over because of what the peer did: ``code`` (of RFC 9113 section 7) and ``text`` (why).

    Raised by an engine's methods, after it has queued GOAWAY. Drivers translate it into an error of `dynwire.errors`.
    """

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self):
        return f"{error_name(self.code)} ({self.text})"


def error_name(code):
    """``ENHANCE_YOUR_CALM`` and the like; codes that RFC 9113 does not know in hexadecimal."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"0x{code:x}"


@cython.freelist(256)
cdef class Http2Stream:
    """One stream. Belongs to its engine; ``data`` is the owner's."""


cdef class Http2Owner:
    """What an engine calls. Every method does nothing here."""

    cdef int on_headers(self, Http2Stream stream, list headers, int kind, bint end) except -1:
        """A header block. ``headers`` is shared (HPACK hands out the same list for the same block): do not change it."""
        return 0

    cdef int on_data(self, Http2Stream stream, const unsigned char *p, size_t n, bint end) except -1:
        """A piece of the body, in memory that is valid during the call only. Give the bytes back with ``consumed``, also when
        the stream has gone in the meantime. A long DATA frame comes in several pieces. ``n`` may be 0 with ``end``."""
        return 0

    cdef int on_reset(self, Http2Stream stream, uint32_t code, bint remote) except -1:
        """RST_STREAM by the peer, or (``remote`` False) by the engine because of what the peer did. `on_closed` follows."""
        return 0

    cdef int on_room(self, Http2Stream stream) except -1:
        """More may be queued; once after every time that `Http2Engine.room` has said no."""
        return 0

    cdef int on_closed(self, Http2Stream stream) except -1:
        """Once for each stream of which the owner knows: both directions are over and everything is framed."""
        return 0

    cdef int on_settings(self) except -1:
        return 0

    cdef int on_settings_ack(self) except -1:
        return 0

    cdef int on_pong(self, uint64_t payload) except -1:
        """The answer to a PING; also one that was never sent, so compare ``payload``."""
        return 0

    cdef int on_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1:
        """Client: streams above ``last_id`` have been closed as not processed before this: `on_reset` with REFUSED_STREAM."""
        return 0

    cdef int on_capacity(self) except -1:
        """Client: `Http2Engine.open_stream` may succeed again; once after every time that it has returned None."""
        return 0

    cdef int on_output(self) except -1:
        """Something was queued for writing."""
        return 0


cdef class Http2Engine:
    """One HTTP/2 connection without I/O. Abstract.

    Limits are keyword arguments; the consequences of each are those of HTTP2.md section 3. ``resets`` and ``glitches`` are
    the bursts of two token buckets, of which 33 and 330 of 1,000 and 10,000 come back every second; a connection begins with
    the share ``leniency`` of them. ``handshake_s``: seconds to the preface, and to the acknowledgement of SETTINGS; ``stall_s``:
    without progress of a queue.
    """

    def __init__(self, Http2Owner owner not None, bint is_client, *, max_frame_size=1048576, max_concurrent_streams=1000,
                 stream_window=1048576, connection_window=4194304, max_header_list=65536, max_header_fields=100,
                 continuation_frames=8, settings_entries=32, control_backlog=1000, empty_data=100, resets=1000, glitches=10000,
                 double handshake_s=10.0, double stall_s=30.0, double leniency=1.0):
        if not 16384 <= max_frame_size <= 16777215:
            raise ValueError(f"max_frame_size={max_frame_size}: RFC 9113 allows 16384 to 16777215")
        if not 0 < stream_window <= 0x7FFFFFFF:
            raise ValueError(f"stream_window={stream_window}: RFC 9113 allows up to 2147483647")
        if not 65535 <= connection_window <= 0x7FFFFFFF:
            raise ValueError(f"connection_window={connection_window}: RFC 9113 allows 65535 to 2147483647")
        self.owner = owner
        self.is_client = is_client
        self.max_frame_size = max_frame_size
        self.max_concurrent_streams = max_concurrent_streams
        self.stream_window = stream_window
        self.connection_window = connection_window
        self.max_header_list = max_header_list
        self.max_header_fields = max_header_fields
        self.continuation_frames = continuation_frames
        self.settings_entries = settings_entries
        self.control_backlog = control_backlog
        self.handshake_s = handshake_s
        self.stall_s = stall_s
        self.streams = {}
        dw_bucket_init(&self.resets, resets, resets * 0.033)
        dw_bucket_init(&self.glitches, glitches, glitches * 0.033)
        dw_bucket_init(&self.empty, empty_data, empty_data * 0.033)
        self.resets.tokens *= leniency
        self.glitches.tokens *= leniency

    cdef void recv_target(self, unsigned char **base, size_t *size):
        """Where the next bytes from the peer go, and how many at most. The memory is the engine's until `received`, to which
        ``n=0`` may be reported; an idle engine has no such memory."""
        base[0] = NULL
        size[0] = 0

    cdef int received(self, size_t n, double now) except -1:
        """``n`` bytes were put where `recv_target` said. Raises `Http2ConnectionError` after queueing GOAWAY."""
        raise NotImplementedError

    cdef int start(self, double now) except -1:
        """Queue the preface, SETTINGS and a WINDOW_UPDATE for the connection."""
        raise NotImplementedError

    cdef Http2Stream open_stream(self):
        """(client) A new stream, or None: at the peer's limit (100 until its SETTINGS came), after GOAWAY, or when ids are used
        up (``exhausted``, from id 2^30). Streams have to be begun (`send_headers`) in the order in which they were opened."""
        raise NotImplementedError

    cdef int send_headers(self, Http2Stream s, list headers, bint end) except -1:
        """A header block: request, response, 1xx (a ``:status`` of that kind, without ``end``) or trailers. The list may be kept
        until queued data have been framed."""
        raise NotImplementedError

    cdef int send_data(self, Http2Stream s, const unsigned char *p, size_t n, object keep, bint end) except -1:
        """Queue any amount. Copied, unless ``keep`` is an object with a buffer at ``p`` and ``n`` is 64 KiB or more: that memory
        is held and sent from, until it is written or the stream is reset."""
        raise NotImplementedError

    cdef bint room(self, Http2Stream s):
        """Whether more should be queued now. After False, `Http2Owner.on_room` tells when, unless the connection is dead."""
        raise NotImplementedError

    cdef int reset(self, Http2Stream s, uint32_t code) except -1:
        """RST_STREAM; what is queued and not framed is dropped. `on_closed` follows, `on_reset` does not."""
        raise NotImplementedError

    cdef int release(self, Http2Stream s) except -1:
        """(server) The handler of the stream has stopped. Until then a closed stream counts towards MAX_CONCURRENT_STREAMS, so
        that a peer which opens and resets streams cannot start more handlers than that (CVE-2023-44487)."""
        raise NotImplementedError

    cdef int consumed(self, Http2Stream s, size_t n) except -1:
        """``n`` bytes of the body have been read by the application. ``s`` may be None or gone."""
        raise NotImplementedError

    cdef int set_windows(self, uint32_t stream, uint64_t connection) except -1:
        """Grow the windows that we grant; smaller values are ignored."""
        raise NotImplementedError

    cdef int ping(self, uint64_t payload) except -1:
        raise NotImplementedError

    cdef int goaway(self, uint32_t code, bytes debug, bint final) except -1:
        """``final`` False: last id 2^31-1, the announcement of a graceful end. True: the real last id; newer streams are ignored
        from then on."""
        raise NotImplementedError

    cdef bint has_output(self):
        raise NotImplementedError

    cdef size_t backlog(self):
        """Bytes that are framed and not written. What waits for the peer's windows does not count, so reading may be paused by
        this number without waiting for ever."""
        raise NotImplementedError

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        """Fill in what to write next (room for H2_CHUNKS chunks), with about ``limit`` bytes of payloads that are sent from their
        own memory; returns the number of chunks. Memory stays put until `sent`."""
        raise NotImplementedError

    cdef int sent(self, size_t n) except -1:
        """The first ``n`` bytes of what `gather` named were written."""
        raise NotImplementedError

    cdef double next_wakeup(self):
        """When `on_time` wants to be called; infinity: never."""
        raise NotImplementedError

    cdef int on_time(self, double now) except -1:
        """Deadlines: ``handshake_s`` and ``stall_s`` (RST CANCEL)."""
        raise NotImplementedError

    cdef list take_streams(self):
        """All open streams; they are closed, without callbacks. For a connection that is gone."""
        cdef list out = list(self.streams.values())
        cdef Http2Stream s
        self.streams.clear()
        for s in out:
            s.state = ST_CLOSED
        return out

    cdef dict peer_settings(self):
        raise NotImplementedError

    cdef dict counters(self):
        raise NotImplementedError


include "_http2_rules.pxi"
include "_http2_native.pxi"


# ---- Python face -------------------------------------------------------------------------------------------------------


cdef Http2Engine _make_engine(str name, Http2Owner owner, bint is_client, dict limits):
    if name == "native":
        return NativeEngine(owner, is_client, **limits)
    if name == "h2":
        from ._http2lib import LibraryEngine

        return LibraryEngine(owner, is_client, **limits)
    raise ValueError(f"engine={name!r}: 'native' or 'h2'")


cdef class Http2Connection(Http2Owner):
    """A connection with a Python face, for tests and tools.

    ``receive(data)`` returns events, ``output()`` the bytes to send. Events: ``("headers", sid, headers, kind, end)`` with kind
    ``"request"``, ``"response"``, ``"informational"`` or ``"trailers"``; ``("data", sid, bytes, end)``;
    ``("reset", sid, code, remote)``; ``("closed", sid)``; ``("room", sid)``; ``("settings", {code: value})``;
    ``("settings_ack",)``; ``("pong", bytes8)``; ``("goaway", last_id, code, debug)``; ``("capacity",)``.
    What the peer does raises nothing: ``("error", code, text)`` is then the last event and the connection is over.
    Streams are named by their ids; unknown ones and those that have gone are ignored.
    """

    cdef Http2Engine engine
    cdef readonly str engine_name
    cdef list events
    cdef dict streams
    cdef bint auto_release
    cdef readonly int output_calls

    def __init__(self, str role, *, str engine="native", bint auto_release=True, **limits):
        if role not in ("client", "server"):
            raise ValueError(f"role={role!r}: 'client' or 'server'")
        self.events = []
        self.streams = {}
        self.auto_release = auto_release
        self.engine_name = engine
        self.engine = _make_engine(engine, self, role == "client", limits)

    cdef int on_headers(self, Http2Stream stream, list headers, int kind, bint end) except -1:
        if kind == K_REQUEST:
            self.streams[stream.id] = stream
        self.events.append(("headers", stream.id, headers, _KINDS[kind], end))
        return 0

    cdef int on_data(self, Http2Stream stream, const unsigned char *p, size_t n, bint end) except -1:
        self.events.append(("data", stream.id, PyBytes_FromStringAndSize(<char *>p, n) if n else b"", end))
        return 0

    cdef int on_reset(self, Http2Stream stream, uint32_t code, bint remote) except -1:
        self.events.append(("reset", stream.id, code, remote))
        if self.auto_release:
            self.engine.release(stream)  # as an owner whose handler stops at once
        return 0

    cdef int on_room(self, Http2Stream stream) except -1:
        self.events.append(("room", stream.id))
        return 0

    cdef int on_closed(self, Http2Stream stream) except -1:
        self.events.append(("closed", stream.id))
        if self.auto_release:
            self.streams.pop(stream.id, None)
            self.engine.release(stream)
        return 0

    cdef int on_settings(self) except -1:
        self.events.append(("settings", self.engine.peer_settings()))
        return 0

    cdef int on_settings_ack(self) except -1:
        self.events.append(("settings_ack",))
        return 0

    cdef int on_pong(self, uint64_t payload) except -1:
        cdef unsigned char raw[8]
        dw_st64be(raw, payload)
        self.events.append(("pong", PyBytes_FromStringAndSize(<char *>raw, 8)))
        return 0

    cdef int on_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1:
        self.events.append(("goaway", last_id, code, debug))
        return 0

    cdef int on_capacity(self) except -1:
        self.events.append(("capacity",))
        return 0

    cdef int on_output(self) except -1:
        self.output_calls += 1
        return 0

    cdef list take(self):
        out = self.events
        self.events = []
        return out

    cdef Http2Stream find(self, uint32_t sid):
        return <Http2Stream>self.streams.get(sid)

    def start(self, double now=0.0):
        self.engine.start(now)

    def receive(self, data, double now=0.0):
        """Feed bytes (any cut); returns the list of events they complete."""
        cdef const unsigned char[::1] view
        cdef unsigned char *base
        cdef size_t size, done = 0
        try:
            if len(data):
                view = data
                while done < <size_t>view.shape[0] and not self.engine.dead:
                    self.engine.recv_target(&base, &size)
                    size = min(size, <size_t>view.shape[0] - done)
                    memcpy(base, &view[done], size)
                    done += size
                    self.engine.received(size, now)
        except Http2ConnectionError as error:
            self.events.append(("error", error.code, error.text))
        return self.take()

    def events_now(self):
        """Events of calls other than `receive` and `on_time`: ``closed`` after `send_data`, ``room`` after `output`."""
        return self.take()

    def open_stream(self):
        """(client) The new stream's id, or None."""
        cdef Http2Stream stream = self.engine.open_stream()
        if stream is None:
            return None
        self.streams[stream.id] = stream
        return stream.id

    def send_headers(self, uint32_t sid, list headers, bint end=False):
        cdef Http2Stream stream = self.find(sid)
        if stream is not None:
            self.engine.send_headers(stream, headers, end)

    def send_data(self, uint32_t sid, data, bint end=False):
        cdef Http2Stream stream = self.find(sid)
        cdef const unsigned char[::1] view
        if stream is None:
            return
        if len(data):
            view = data
            self.engine.send_data(stream, &view[0], view.shape[0], data, end)
        else:
            self.engine.send_data(stream, NULL, 0, None, end)

    def reset(self, uint32_t sid, uint32_t code):
        cdef Http2Stream stream = self.find(sid)
        if stream is not None:
            self.engine.reset(stream, code)

    def release(self, uint32_t sid):
        """(server, ``auto_release=False``) The handler has stopped."""
        cdef Http2Stream stream = <Http2Stream>self.streams.pop(sid, None)
        if stream is not None:
            self.engine.release(stream)

    def consumed(self, sid, size_t n):
        """``sid`` may be None or that of a stream that has gone: the bytes then count for the connection only."""
        self.engine.consumed(None if sid is None else self.find(sid), n)

    def set_windows(self, uint32_t stream, uint64_t connection):
        self.engine.set_windows(stream, connection)

    def ping(self, bytes payload):
        if len(payload) != 8:
            raise ValueError("a PING carries 8 bytes")
        self.engine.ping(dw_ld64be(<const unsigned char *><char *>payload))

    def goaway(self, uint32_t code=0, bytes debug=b"", bint final=True):
        self.engine.goaway(code, debug, final)

    def room(self, uint32_t sid):
        """False also for a stream that has gone."""
        cdef Http2Stream stream = self.find(sid)
        return stream is not None and self.engine.room(stream)

    def output(self, limit=None):
        """Take bytes to send: all, or what one write of at most ``limit`` bytes would carry."""
        cdef dw_chunk chunks[H2_CHUNKS]
        cdef int n, i
        cdef size_t total, size, left
        cdef list out = []
        while self.engine.has_output():
            n = self.engine.gather(chunks, 1048576)
            if n == 0:
                break
            total = 0
            left = <size_t>-1 if limit is None else limit
            for i in range(n):
                size = min(chunks[i].len, left)
                if size:
                    out.append(PyBytes_FromStringAndSize(<char *>chunks[i].base, size))
                total += size
                left -= size
            self.engine.sent(total)
            if limit is not None:
                break
        return b"".join(out)

    def chunks(self):
        """``(address, size)`` of what one write would carry, which then counts as not written."""
        cdef dw_chunk chunks[H2_CHUNKS]
        cdef int n = self.engine.gather(chunks, 1048576)
        cdef list out = [(<size_t>chunks[i].base, chunks[i].len) for i in range(n)]
        self.engine.sent(0)
        return out

    def on_time(self, double now):
        """Let deadlines pass; returns the events. ``next_wakeup`` is when to call again."""
        try:
            self.engine.on_time(now)
        except Http2ConnectionError as error:
            self.events.append(("error", error.code, error.text))
        return self.take()

    def state(self, uint32_t sid):
        """Name of a stream's state (RFC 9113 section 5.1); ``"closed"`` for one that is not known (any more)."""
        cdef Http2Stream stream = self.find(sid)
        return "closed" if stream is None else _STATES[stream.state]

    def ledger(self):
        """Counters of flow control: ``send_window``, ``recv_window``, ``granted`` (bytes ever granted to the peer), ``received``
        (flow-controlled bytes that came), ``queued``, ``backlog``, and ``streams`` with such counters by stream id."""
        return self.engine.counters()

    @property
    def next_wakeup(self):
        return self.engine.next_wakeup()

    @property
    def live(self):
        return self.engine.live

    @property
    def dead(self):
        return self.engine.dead

    @property
    def ready(self):
        return self.engine.ready

    @property
    def draining(self):
        return self.engine.draining

    @property
    def exhausted(self):
        return self.engine.exhausted
