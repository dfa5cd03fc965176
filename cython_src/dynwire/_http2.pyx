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
    the bursts of two token buckets, of which 33 and 330 of 1,000 and 10,000 come back every second. ``handshake_s``: seconds to
    the preface, and to the acknowledgement of SETTINGS; ``stall_s``: without progress of a queue.
    """

    def __init__(self, Http2Owner owner not None, bint is_client, *, max_frame_size=1048576, max_concurrent_streams=1000,
                 stream_window=1048576, connection_window=4194304, max_header_list=65536, max_header_fields=100,
                 continuation_frames=8, settings_entries=32, control_backlog=1000, empty_data=100, resets=1000, glitches=10000,
                 tiny_data=67108864, double handshake_s=10.0, double stall_s=30.0):
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
        self.tiny_data = tiny_data
        self.handshake_s = handshake_s
        self.stall_s = stall_s
        self.streams = {}
        dw_bucket_init(&self.resets, resets, resets * 0.033)
        dw_bucket_init(&self.glitches, glitches, glitches * 0.033)
        dw_bucket_init(&self.empty, empty_data, empty_data * 0.033)

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
        """Whether more should be queued now. After False, `Http2Owner.on_room` tells when."""
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


# ---- constants ---------------------------------------------------------------------------------------------------------

cdef enum:                       # frame types, RFC 9113 section 6
    T_DATA = 0
    T_HEADERS = 1
    T_PRIORITY = 2
    T_RST_STREAM = 3
    T_SETTINGS = 4
    T_PUSH_PROMISE = 5
    T_PING = 6
    T_GOAWAY = 7
    T_WINDOW_UPDATE = 8
    T_CONTINUATION = 9

cdef enum:
    F_END_STREAM = 0x01
    F_ACK = 0x01
    F_END_HEADERS = 0x04
    F_PADDED = 0x08
    F_PRIORITY = 0x20

cdef enum:                       # Http2Stream.bits
    SB_SENT_HEADERS = 1          # other than 1xx: what follows is data or trailers
    SB_GOT_HEADERS = 2
    SB_NO_BODY_IN = 4            # (client) the answer to HEAD, 204, 304
    SB_NO_BODY_OUT = 8           # (server) the same
    SB_END_QUEUED = 16           # END_STREAM goes with the last queued byte, or with the trailers
    SB_READY = 32                # in the ring
    SB_WANTS_ROOM = 64
    SB_RELEASED = 128

cdef enum:
    FRAME_HEAD = 9
    READ_BYTES = 262144          # receive buffer; pages that are never filled cost nothing
    READ_SPARE = 8               # receive buffers kept for the next reads, of all connections
    MAX_BLOCK_FACTOR = 4         # undecoded header block, in multiples of max_header_list: Huffman's worst code has 30 bits
    PATH_LIMIT = 8192            # bytes of :path; longer ones are answered 414
    GOAWAY_DEBUG = 1024          # bytes of GOAWAY's text that are kept
    REFERENCE_FROM = 65536       # payloads from this size on are sent from their own memory
    CUT_SHARED = 16384           # bytes of a DATA frame while several streams have some to send
    CUT_ALONE = 65536
    COPY_BACKLOG = 262144        # framed bytes from which data wait on their streams, where they take turns
    IDLE_BYTES = 8192            # of each buffer of output that a connection without streams keeps
    TINY = 256                   # DATA frames with less than this are charged with the difference until they are read
    RESET_RING = 1024            # streams of which it is remembered that they were reset
    QUEUED_TOTAL = 16777216      # queued bytes of all streams from which each may have 16 KiB only

cdef int64_t MAX_WINDOW = 0x7FFFFFFF
cdef uint32_t CLIENT_IDS_END = 1 << 30   # a client replaces the connection well before its ids are used up

cdef uint32_t E_NO_ERROR = ErrorCodes.NO_ERROR
cdef uint32_t E_PROTOCOL = ErrorCodes.PROTOCOL_ERROR
cdef uint32_t E_FLOW_CONTROL = ErrorCodes.FLOW_CONTROL_ERROR
cdef uint32_t E_SETTINGS_TIMEOUT = ErrorCodes.SETTINGS_TIMEOUT
cdef uint32_t E_STREAM_CLOSED = ErrorCodes.STREAM_CLOSED
cdef uint32_t E_FRAME_SIZE = ErrorCodes.FRAME_SIZE_ERROR
cdef uint32_t E_REFUSED = ErrorCodes.REFUSED_STREAM
cdef uint32_t E_CANCEL = ErrorCodes.CANCEL
cdef uint32_t E_COMPRESSION = ErrorCodes.COMPRESSION_ERROR
cdef uint32_t E_CALM = ErrorCodes.ENHANCE_YOUR_CALM

cdef uint32_t S_TABLE_SIZE = SettingCodes.HEADER_TABLE_SIZE
cdef uint32_t S_ENABLE_PUSH = SettingCodes.ENABLE_PUSH
cdef uint32_t S_MAX_STREAMS = SettingCodes.MAX_CONCURRENT_STREAMS
cdef uint32_t S_INITIAL_WINDOW = SettingCodes.INITIAL_WINDOW_SIZE
cdef uint32_t S_MAX_FRAME = SettingCodes.MAX_FRAME_SIZE
cdef uint32_t S_MAX_LIST = SettingCodes.MAX_HEADER_LIST_SIZE
cdef uint32_t S_NO_PRIORITIES = 0x9      # RFC 9218 section 2.1; h2 has no name for it

cdef bytes _PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
cdef size_t _PREFACE_SIZE = 24

# ---- states (RFC 9113 section 5.1) -------------------------------------------------------------------------------------
#
# What a frame means depends on where its stream stands. Beyond the states of the RFC, a closed stream is told apart by how it
# was closed; of the oldest ones this is forgotten.

cdef enum:
    X_ENDED = 4                  # = ST_CLOSED: END_STREAM in both directions
    X_RESET_BY_US = 5
    X_RESET_BY_PEER = 6
    X_FORGOTTEN = 7              # closed, or never used and passed over by a higher id
    X_COUNT = 8

cdef enum:                       # columns
    I_HEADERS = 0
    I_DATA = 1
    I_RST = 2
    I_WINDOW = 3

cdef enum:
    V_OK = 0
    V_IGNORE = 1
    V_STREAM_CLOSED = 2          # stream error STREAM_CLOSED
    V_CLOSED = 3                 # connection error STREAM_CLOSED
    V_PROTOCOL = 4               # connection error PROTOCOL_ERROR

cdef unsigned char VERDICTS[X_COUNT][4]

_VERDICTS = {
    # "Receiving any frame other than HEADERS or PRIORITY on a stream in this state MUST be treated as a connection error"
    ST_IDLE: (V_OK, V_PROTOCOL, V_PROTOCOL, V_PROTOCOL),
    ST_OPEN: (V_OK, V_OK, V_OK, V_OK),
    ST_HALF_LOCAL: (V_OK, V_OK, V_OK, V_OK),
    # "additional frames, other than WINDOW_UPDATE, PRIORITY, or RST_STREAM, … a stream error of type STREAM_CLOSED"
    ST_HALF_REMOTE: (V_STREAM_CLOSED, V_STREAM_CLOSED, V_OK, V_OK),
    # after END_STREAM: "a connection error of type STREAM_CLOSED"; WINDOW_UPDATE and RST_STREAM may have been on their way
    X_ENDED: (V_CLOSED, V_CLOSED, V_IGNORE, V_IGNORE),
    # "An endpoint that sends a RST_STREAM … MUST ignore frames that it receives on closed streams after it has sent" it
    X_RESET_BY_US: (V_IGNORE, V_IGNORE, V_IGNORE, V_IGNORE),
    # "Receiving any frame other than PRIORITY … after receiving a RST_STREAM … a stream error of type STREAM_CLOSED"
    X_RESET_BY_PEER: (V_STREAM_CLOSED, V_STREAM_CLOSED, V_IGNORE, V_IGNORE),
    # 5.1.1: an id that is not higher than those before: connection error PROTOCOL_ERROR
    X_FORGOTTEN: (V_PROTOCOL, V_CLOSED, V_IGNORE, V_IGNORE),
}


cdef int _fill_verdicts() except -1:
    for situation, row in _VERDICTS.items():
        for kind, verdict in enumerate(row):
            VERDICTS[<int>situation][<int>kind] = verdict
    return 0


_fill_verdicts()

# ---- fields (RFC 9113 section 8) ---------------------------------------------------------------------------------------

cdef unsigned char NAME_BYTES[256]       # 1: may stand in a field name: token characters (RFC 9110 5.6.2) but upper case
cdef unsigned char VALUE_BYTES[256]      # bits: 1 may stand in a value, 2 in :path, 4 in :method, 8 in :authority


cdef int _fill_tables() except -1:
    cdef int c
    cdef bytes letters = b"abcdefghijklmnopqrstuvwxyz"
    # RFC 3986 3.2.2 and 3.2.3: host and port; no "@", that is no user information (RFC 9113 8.3.1)
    cdef bytes authority = letters + letters.upper() + b"0123456789-._~!$&'()*+,;=%:[]"
    cdef bytes token = b"!#$%&'*+-.^_`|~0123456789" + letters
    for c in range(256):
        NAME_BYTES[c] = c in token
        # HTAB and SP within a value; no other control characters (RFC 9113 8.2.1 names NUL, CR and LF; RFC 9110 5.5 the rest)
        VALUE_BYTES[c] = 1 if c in b"\t " else 0 if c < 0x20 or c == 0x7F else 3
        if c in token.upper() or c in token:
            VALUE_BYTES[c] |= 4
        if c in authority:
            VALUE_BYTES[c] |= 8
    return 0


_fill_tables()

# Objects that HPACK uses for these names, so that they are compared by identity.
cdef object _intern(bytes name):
    return hpack_intern(<const unsigned char *><char *>name, len(name))


cdef object N_METHOD = _intern(b":method")
cdef object N_SCHEME = _intern(b":scheme")
cdef object N_PATH = _intern(b":path")
cdef object N_AUTHORITY = _intern(b":authority")
cdef object N_STATUS = _intern(b":status")
cdef object N_LENGTH = _intern(b"content-length")
cdef object N_HOST = _intern(b"host")

cdef enum:                       # results of the checks
    C_OK = 0
    C_MALFORMED = 1
    C_PATH_TOO_LONG = 2
    C_CONNECT = 3


cdef inline bint _good_name(const unsigned char *p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return False
    for i in range(n):
        if not NAME_BYTES[p[i]]:
            return False
    return True


cdef inline bint _good_value(const unsigned char *p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return True
    if p[0] == 0x20 or p[0] == 0x09 or p[n - 1] == 0x20 or p[n - 1] == 0x09:
        return False
    for i in range(n):
        if not VALUE_BYTES[p[i]]:
            return False
    return True


cdef inline bint _good_bytes(const unsigned char *p, Py_ssize_t n, int level) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return False
    for i in range(n):
        if not VALUE_BYTES[p[i]] & level:
            return False
    return True


cdef inline bint _is_trailers(const unsigned char *value) noexcept:
    """A word of a grammar, so case does not matter (RFC 9110 10.1.4, RFC 5234 2.3)."""
    cdef int i
    for i in range(8):
        if value[i] | 0x20 != <unsigned char>b"trailers"[i]:
            return False
    return True


cdef inline bint _forbidden(const unsigned char *name, Py_ssize_t n, const unsigned char *value, Py_ssize_t size) noexcept:
    """Fields that are about the connection (RFC 9113 8.2.2)."""
    if n == 2:
        return memcmp(name, "te", 2) == 0 and not (size == 8 and _is_trailers(value))
    if n == 7:
        return memcmp(name, "upgrade", 7) == 0
    if n == 10:
        return memcmp(name, "connection", 10) == 0 or memcmp(name, "keep-alive", 10) == 0
    if n == 16:
        return memcmp(name, "proxy-connection", 16) == 0
    if n == 17:
        return memcmp(name, "transfer-encoding", 17) == 0
    return False


cdef inline int64_t _length(const unsigned char *p, Py_ssize_t n) noexcept:
    """Value of content-length, or -2: not a number, or one above 10^18."""
    cdef Py_ssize_t i
    cdef int64_t value = 0
    if n == 0 or n > 18:
        return -2
    for i in range(n):
        if not 0x30 <= p[i] <= 0x39:
            return -2
        value = value * 10 + (p[i] - 0x30)
    return value


# ---- native engine -----------------------------------------------------------------------------------------------------

cdef unsigned char *_spare[READ_SPARE]
cdef int _spares = 0


cdef class Piece:
    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)
        dw_buf_free(&self.own)


cdef void _trim(NativeEngine e) noexcept:
    """Without streams, no more than a few KiB stay: a burst should not keep its peak for the life of the connection."""
    if e.live:
        return
    if e.wbuf.cap > IDLE_BYTES and e.wpos == e.wbuf.n:
        dw_buf_free(&e.wbuf)
        e.wpos = 0
    if e.obuf.cap > IDLE_BYTES and e.obuf.n == 0:
        dw_buf_free(&e.obuf)


cdef class NativeEngine(Http2Engine):
    """The state machine of this package."""

    def __init__(self, Http2Owner owner not None, bint is_client, **limits):
        super().__init__(owner, is_client, **limits)
        self.decoder = HpackDecoder(4096, self.max_header_list, self.max_header_fields)
        self.encoder = HpackEncoder(4096)
        self.settings_sent = collections.deque()
        self.ring = collections.deque()
        self.ref_pieces = []
        self.roomless = []
        self.peer_values = {}
        self.recv_window = self.send_window = self.peer_initial = 65535
        self.granted = 65535
        # Until our SETTINGS have been acknowledged the peer may still count on 65,535 (RFC 9113 6.9.2).
        self.local_initial = max(self.stream_window, <uint32_t>65535)
        self.peer_max_frame = 16384
        # RFC 9113 6.5.2 sets no limit before SETTINGS; 100 is the least that it recommends, so what servers will have
        self.peer_max_streams = 100
        self.next_id = 1
        self.goaway_last = 0x7FFFFFFF
        self.started_at = self.stall_at = INFINITY
        if not is_client:
            self.next_id = 2
        else:
            self.preface_at = _PREFACE_SIZE

    def __dealloc__(self):
        free(self.rbuf)
        free(self.reset_ring)
        dw_buf_free(&self.block)
        dw_buf_free(&self.obuf)
        dw_buf_free(&self.wbuf)

    # ---- receiving -----------------------------------------------------------------------------------------------------

    cdef void recv_target(self, unsigned char **base, size_t *size):
        global _spares
        cdef size_t have = self.rend - self.rpos
        cdef unsigned char *p
        if self.rbuf is NULL:
            if _spares:
                _spares -= 1
                self.rbuf = _spare[_spares]
            else:
                self.rbuf = <unsigned char *>malloc(READ_BYTES)
            self.rcap = READ_BYTES
            if self.rbuf is NULL:  # the caller sees a buffer without room
                self.rcap = 0
        elif self.rpos:
            if have:
                memmove(self.rbuf, self.rbuf + self.rpos, have)
            self.rpos = 0
            self.rend = have
        if self.need > self.rcap and self.rbuf is not NULL:  # a header block, see _headers for the limit
            p = <unsigned char *>realloc(self.rbuf, self.need)
            if p is not NULL:
                self.rbuf = p
                self.rcap = self.need
        base[0] = self.rbuf + self.rend
        size[0] = self.rcap - self.rend

    cdef int received(self, size_t n, double now) except -1:
        global _spares
        self.now = now
        if n:
            self.rx_bytes += n
            self.last_rx = now
            self.rend += n
        try:
            if n and not self.dead:
                self.parse()
        finally:
            if self.dead or self.rpos == self.rend:
                self.rpos = self.rend = self.need = 0
                if self.rbuf is not NULL:
                    # The next read, of whichever connection, finds it in the processor's cache.
                    if _spares < READ_SPARE and self.rcap == READ_BYTES:
                        _spare[_spares] = self.rbuf
                        _spares += 1
                    else:
                        free(self.rbuf)
                    self.rbuf = NULL
                    self.rcap = 0
                _trim(self)
        return 0

    cdef int fail(self, uint32_t code, str text) except -1:
        """Connection error (RFC 9113 5.4.1): GOAWAY, and nothing after it."""
        cdef unsigned char body[8]
        cdef bytes debug = text.encode()
        if not self.dead:
            debug = bytes(8) + debug
            dw_st32be(body, min(self.last_peer_id, self.goaway_last))
            dw_st32be(body + 4, code)
            memcpy(PyBytes_AS_STRING(debug), body, 8)
            self._put(T_GOAWAY, 0, 0, <const unsigned char *>PyBytes_AS_STRING(debug), PyBytes_GET_SIZE(debug))
            self.dead = True
            self.draining = True
            self.data_stream = None
            self.ring.clear()
            for stream in self.streams.values():
                (<Http2Stream>stream).bits &= ~SB_READY
                self._drop_queue(<Http2Stream>stream)
            self.owner.on_output()
        raise Http2ConnectionError(code, text)

    cdef int parse(self) except -1:
        cdef size_t avail, take
        cdef const unsigned char *p
        cdef uint32_t length
        if self.preface_at < _PREFACE_SIZE:
            if not self._preface():
                return 0
        while not self.dead:
            avail = self.rend - self.rpos
            if self.data_stream is not None:
                if avail == 0:
                    break
                self._data_bytes()
                continue
            if self.skip_left:
                take = min(self.skip_left, avail)
                self.rpos += take
                self.skip_left -= take
                if self.skip_left:
                    break
                continue
            if avail < FRAME_HEAD:
                self.need = FRAME_HEAD
                break
            p = self.rbuf + self.rpos
            length = dw_ld24be(p)
            if self._frame(p, length, p[3], p[4], dw_ld32be(p + 5) & 0x7FFFFFFF):
                break
        return 0

    cdef int _preface(self) except -1:
        """Compare what has come with the client's preface (RFC 9113 3.4); returns whether all of it has."""
        cdef size_t n = min(_PREFACE_SIZE - self.preface_at, self.rend - self.rpos)
        if memcmp(self.rbuf + self.rpos, PyBytes_AS_STRING(_PREFACE) + self.preface_at, n):
            self.fail(E_PROTOCOL, "expected the HTTP/2 preface")
        self.rpos += n
        self.preface_at += n
        return self.preface_at == _PREFACE_SIZE

    cdef int _frame(self, const unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint32_t sid) except -1:
        """Deal with the frame at ``p``; returns 1 when more of it has to come first."""
        cdef size_t whole = FRAME_HEAD + <size_t>length
        cdef size_t avail = self.rend - self.rpos
        cdef int situation
        cdef Http2Stream s
        if not self.ready and (type != T_SETTINGS or flags & F_ACK):
            # RFC 9113 3.4: the first frame of either side
            if self.is_client and memcmp(p, "HTTP/1.", 7) == 0:
                self.fail(E_PROTOCOL, "the peer spoke HTTP/1.1, expected HTTP/2")
            self.fail(E_PROTOCOL, "the first frame was not SETTINGS")
        if length > self.max_frame_size:
            self.fail(E_FRAME_SIZE, f"a frame of {length} bytes, {self.max_frame_size} are allowed")
        if self.block_sid and (type != T_CONTINUATION or sid != self.block_sid):
            self.fail(E_PROTOCOL, "a header block was interrupted")  # 6.2
        if type == T_DATA:
            return self._data(p, length, flags, sid)
        if type == T_HEADERS or type == T_CONTINUATION:
            if type == T_CONTINUATION:
                if not self.block_sid:
                    self.fail(E_PROTOCOL, "CONTINUATION without a header block")
                if self.block_frames == self.continuation_frames:
                    self.fail(E_CALM, "too_many_continuations")
            elif sid == 0 or not sid & 1:
                self.fail(E_PROTOCOL, f"HEADERS on stream {sid}")
            if self.block.n + length > <size_t>MAX_BLOCK_FACTOR * self.max_header_list + 261:  # padding, priority
                self.fail(E_CALM, "header_list_way_too_large")
            if avail < whole:
                self.need = whole
                return 1
            self.rpos += whole
            self._headers(p, length, flags, sid)
            return 0
        if type == T_WINDOW_UPDATE:
            if length != 4:
                self.fail(E_FRAME_SIZE, "WINDOW_UPDATE has 4 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            return self._window_update(sid, dw_ld32be(p + FRAME_HEAD) & 0x7FFFFFFF)
        if type == T_RST_STREAM:
            if length != 4:
                self.fail(E_FRAME_SIZE, "RST_STREAM has 4 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            if sid == 0:
                self.fail(E_PROTOCOL, "RST_STREAM on stream 0")
            s = self._find(sid)
            if self._verdict(<int>s.state if s is not None else self._situation(sid), I_RST, sid, s):
                return 0
            if not self.is_client:
                self._charge("too_many_resets")
            s.state = ST_CLOSED  # nothing that the owner does in the callback is sent any more
            self.owner.on_reset(s, dw_ld32be(p + FRAME_HEAD), True)
            self._close(s, X_RESET_BY_PEER)
            return 0
        if type == T_SETTINGS:
            if sid:
                self.fail(E_PROTOCOL, "SETTINGS on a stream")
            if length % 6 or (flags & F_ACK and length):
                self.fail(E_FRAME_SIZE, "SETTINGS has entries of 6 bytes, its acknowledgement none")
            if length > 6 * self.settings_entries:
                self.fail(E_CALM, "too_many_settings")
            if avail < whole:
                return 1
            self.rpos += whole
            self._settings(p + FRAME_HEAD, length, flags)
            return 0
        if type == T_PING:
            if sid:
                self.fail(E_PROTOCOL, "PING on a stream")
            if length != 8:
                self.fail(E_FRAME_SIZE, "PING has 8 bytes")
            if avail < whole:
                return 1
            self.rpos += whole
            self._glitch("too_many_pings")
            if flags & F_ACK:
                self.owner.on_pong(dw_ld64be(p + FRAME_HEAD))
            else:
                self._put_control(T_PING, F_ACK, 0, p + FRAME_HEAD, 8)
                self.owner.on_output()
            return 0
        if type == T_GOAWAY:
            if sid:
                self.fail(E_PROTOCOL, "GOAWAY on a stream")
            if length < 8:
                self.fail(E_FRAME_SIZE, "GOAWAY has 8 bytes or more")
            if avail < min(whole, <size_t>(FRAME_HEAD + 8 + GOAWAY_DEBUG)):
                return 1
            self.skip_left = whole - min(whole, avail)
            self.rpos += min(whole, avail)
            self._goaway(p + FRAME_HEAD, min(length, <uint32_t>(8 + GOAWAY_DEBUG)))
            return 0
        if type == T_PRIORITY:
            # RFC 9113 5.3.2 deprecates it; what RFC 7540 5.3.1 and 6.3 call errors still is
            if sid == 0:
                self.fail(E_PROTOCOL, "PRIORITY on stream 0")
            if length == 5 and avail < whole:
                return 1
            self._glitch("too_many_priorities")
            s = self._find(sid)
            situation = <int>s.state if s is not None else self._situation(sid)
            if length != 5:
                if situation == ST_IDLE:  # where RST_STREAM would be an error of ours
                    self.fail(E_FRAME_SIZE, "PRIORITY has 5 bytes")
                self.skip_left = whole
                self._stream_error(sid, s, E_FRAME_SIZE)
                return 0
            self.rpos += whole
            if dw_ld32be(p + FRAME_HEAD) & 0x7FFFFFFF == sid:
                if situation == ST_IDLE:
                    self.fail(E_PROTOCOL, "a stream that depends on itself")
                self._stream_error(sid, s, E_PROTOCOL)
            return 0
        if type == T_PUSH_PROMISE:
            # 8.4: a client cannot push, and we do not allow it to a server
            self.fail(E_PROTOCOL, "PUSH_PROMISE")
        self._glitch("too_many_unknown_frames")  # 4.1: unknown types are ignored
        self.skip_left = whole
        return 0

    cdef int _glitch(self, str text) except -1:
        """Charge the peer for a frame that has no use by itself; what goes with the data that we send is free."""
        if self.credit > 0:
            self.credit -= 1
        elif not dw_bucket_take(&self.glitches, self.now, 1.0):
            self.fail(E_CALM, text)
        return 0

    cdef int _charge(self, str text) except -1:
        """Charge the peer for a stream that was reset, whoever did it (CVE-2023-44487, CVE-2025-8671)."""
        if not dw_bucket_take(&self.resets, self.now, 1.0):
            self.fail(E_CALM, text)
        return 0

    cdef Http2Stream _find(self, uint32_t sid):
        cdef PyObject *found
        if self.hot is not None and self.hot.id == sid:
            return self.hot
        found = PyDict_GetItem(self.streams, sid)
        if found is NULL:
            return None
        self.hot = <Http2Stream>found
        return self.hot

    cdef int _situation(self, uint32_t sid):
        """Where a stream that is not in `streams` stands."""
        cdef uint32_t i, entry
        if not sid & 1:
            return ST_IDLE  # pushed streams do not exist
        if self.is_client:
            if sid > self.highest_sent:
                return ST_IDLE
        elif sid > self.last_peer_id:
            return X_RESET_BY_US if sid > self.goaway_last else ST_IDLE
        if sid > self.goaway_last:
            return X_RESET_BY_US
        for i in range(min(self.ended_at, <uint32_t>32)):
            if self.ended_ring[i] == sid:
                return X_ENDED
        for i in range(min(self.reset_at, self.reset_cap)):
            entry = self.reset_ring[i]
            if entry | 1 == sid:
                return X_RESET_BY_US if entry & 1 else X_RESET_BY_PEER
        # A client has opened every id up to its highest, so the stream was closed; it may have been cancelled long ago.
        return X_RESET_BY_US if self.is_client else X_FORGOTTEN

    cdef int _remember(self, uint32_t sid, int reason) except -1:
        cdef uint32_t cap
        cdef uint32_t *ring
        if reason == X_ENDED:
            self.ended_ring[self.ended_at & 31] = sid
            self.ended_at += 1
            return 0
        if self.reset_at >= self.reset_cap < RESET_RING:
            cap = max(self.reset_cap * 4, <uint32_t>16)
            ring = <uint32_t *>realloc(self.reset_ring, cap * sizeof(uint32_t))
            if ring is NULL:
                raise MemoryError()
            self.reset_ring = ring
            self.reset_cap = cap
        # stream ids of peers and ours that have been used are odd: the lowest bit is free
        self.reset_ring[self.reset_at & (self.reset_cap - 1)] = sid if reason == X_RESET_BY_US else sid - 1
        self.reset_at += 1
        return 0

    cdef int _verdict(self, int situation, int kind, uint32_t sid, Http2Stream s) except -1:
        """Do what the table says; returns whether the frame is done with."""
        cdef int verdict = VERDICTS[situation][kind]
        if verdict == V_OK and (s is not None or kind == I_HEADERS):
            return 0
        if verdict == V_IGNORE:
            self._glitch("too_many_frames_on_closed_streams")
        elif verdict == V_STREAM_CLOSED:
            self._stream_error(sid, s, E_STREAM_CLOSED)
        elif verdict == V_CLOSED:
            self.fail(E_STREAM_CLOSED, f"a frame on stream {sid}, which has ended")
        else:
            self.fail(E_PROTOCOL, f"a frame on stream {sid}, which is not open")
        return 1

    cdef int _stream_error(self, uint32_t sid, Http2Stream s, uint32_t code) except -1:
        """RST_STREAM because of what the peer did."""
        self._charge("too_many_internal_resets")
        self._put_rst(sid, code)
        self.owner.on_output()
        if s is None:
            if self._situation(sid) != X_RESET_BY_US:
                self._remember(sid, X_RESET_BY_US)
        else:
            s.state = ST_CLOSED
            self.owner.on_reset(s, code, False)
            self._close(s, X_RESET_BY_US)
        return 0

    cdef Http2Stream _new_stream(self, uint32_t sid):
        cdef Http2Stream s = Http2Stream.__new__(Http2Stream)
        s.id = sid
        s.send_window = self.peer_initial
        s.recv_window = self.local_initial
        s.expected = -1
        self.streams[sid] = s
        s.counted = True
        self.live += 1
        return s

    cdef int _uncount(self, Http2Stream s) except -1:
        """The stream does not count any more. The owner may release it while it is being told of the end, so this comes twice."""
        if s.counted:
            s.counted = False
            self.live -= 1
        return 0

    cdef int _close(self, Http2Stream s, int reason) except -1:
        """The stream is over. The caller has told of a reset before."""
        s.state = ST_CLOSED
        if self.streams.pop(s.id, None) is None:
            return 0
        if self.hot is s:
            self.hot = None
        if not self.is_client or s.id <= self.highest_sent:
            self._remember(s.id, reason)
        if s.queued or s.pieces is not None:
            self._drop_queue(s)
        if s.bits & SB_READY:
            self._unready(s)
        if self.data_stream is s:
            # in the middle of a DATA frame: nobody takes the rest
            self.data_stream = None
            self.skip_left = self.data_left + self.pad_left
            self._give_back(None, self.data_left)
        if self.is_client or s.bits & SB_RELEASED:
            self._uncount(s)
        s.trailers = None
        self.owner.on_closed(s)
        if self.wants_capacity and self.live < self.peer_max_streams:
            self.wants_capacity = False
            self.owner.on_capacity()
        return 0

    # ---- DATA and windows ------------------------------------------------------------------------------------------------

    cdef int _data(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1:
        """A DATA frame begins (RFC 9113 6.1, 6.9)."""
        cdef uint32_t padding = 0
        cdef uint32_t head = FRAME_HEAD
        cdef uint32_t size = length
        cdef bint end = flags & F_END_STREAM
        cdef int situation
        cdef Http2Stream s
        if sid == 0:
            self.fail(E_PROTOCOL, "DATA on stream 0")
        if flags & F_PADDED:
            if length == 0:
                self.fail(E_FRAME_SIZE, "DATA without its pad length")
            if self.rend - self.rpos < FRAME_HEAD + 1:
                self.need = FRAME_HEAD + 1
                return 1
            padding = p[FRAME_HEAD]
            if padding >= length:
                self.fail(E_PROTOCOL, "DATA with more padding than bytes")
            head += 1
            size = length - 1 - padding
        if length > self.recv_window:
            self.fail(E_FLOW_CONTROL, "DATA beyond the connection's window")
        self.rpos += head
        self.recv_window -= length
        self.flow_received += length
        s = self._find(sid)
        situation = <int>s.state if s is not None else self._situation(sid)
        if VERDICTS[situation][I_DATA] != V_OK or s is None:
            # the bytes count for the connection, or its window would leak (6.9)
            self.skip_left = size + padding
            self._verdict(situation, I_DATA, sid, s)
            return self._give_back(None, length)
        s.arrived += size
        if (
            (length and length > s.recv_window)  # a window below zero allows END_STREAM without bytes
            or (self.is_client and not s.bits & SB_GOT_HEADERS)
            or (s.expected >= 0 and (s.arrived > s.expected or (end and s.arrived != s.expected)))
            or (size and s.bits & SB_NO_BODY_IN)
        ):
            # 6.9.1; 8.1: a response begins with HEADERS; 8.1.1: content-length; RFC 9110 9.3.2, 15.3.5, 15.4.5: no content
            self.skip_left = size + padding
            self._give_back(None, length)
            self._stream_error(sid, s, E_FLOW_CONTROL if length and length > s.recv_window else E_PROTOCOL)
            return 0
        s.recv_window -= length
        if size < TINY and not end:
            if size == 0:
                if not dw_bucket_take(&self.empty, self.now, 1.0):
                    self.fail(E_CALM, "too_many_data_frames")
            else:
                self.tiny_spent += TINY - size
                if self.tiny_spent > self.tiny_data:
                    self.fail(E_CALM, "too_many_small_data_frames")
        if flags & F_PADDED:
            self._give_back(s, padding + 1)
        self.data_stream = s
        self.data_left = size
        self.pad_left = padding
        self.data_end = end
        if size == 0:
            self._data_bytes()
        return 0

    cdef int _data_bytes(self) except -1:
        """Hand on what has come of the current DATA frame."""
        cdef Http2Stream s = self.data_stream
        cdef size_t take = min(self.data_left, self.rend - self.rpos)
        cdef const unsigned char *p = self.rbuf + self.rpos
        self.rpos += take
        self.data_left -= take
        self.unread += take
        if self.data_left:
            self.owner.on_data(s, p, take, False)
            return 0
        self.data_stream = None
        self.skip_left = self.pad_left
        if not self.data_end:
            if take:
                self.owner.on_data(s, p, take, False)
            return 0
        if s.state == ST_OPEN:
            s.state = ST_HALF_REMOTE
            self.owner.on_data(s, p, take, True)
            return 0
        self.owner.on_data(s, p, take, True)
        if s.state == ST_HALF_LOCAL:
            self._close(s, X_ENDED)
        return 0

    cdef int _give_back(self, Http2Stream s, int64_t n) except -1:
        """Grant ``n`` bytes again, at half the window."""
        if n == 0:
            return 0
        self.unannounced += n
        if self.unannounced * 2 >= self.connection_window and not self.dead:
            self._put_update(0, <uint32_t>self.unannounced)
            self.recv_window += self.unannounced
            self.granted += self.unannounced
            self.unannounced = 0
            self.owner.on_output()
        if s is not None and (s.state == ST_OPEN or s.state == ST_HALF_LOCAL):
            s.unannounced += n
            if s.unannounced * 2 >= self.stream_window and not self.dead:
                self._put_update(s.id, <uint32_t>s.unannounced)
                s.recv_window += s.unannounced
                s.unannounced = 0
                self.owner.on_output()
        return 0

    cdef int consumed(self, Http2Stream s, size_t n) except -1:
        if <int64_t>n >= self.unread:
            n = self.unread
            self.unread = 0
            self.tiny_spent = 0
        else:
            self.tiny_spent -= <int64_t>(<double>self.tiny_spent * n / self.unread)
            self.unread -= n
        return self._give_back(s, n)

    cdef int set_windows(self, uint32_t stream, uint64_t connection) except -1:
        cdef int64_t delta, now
        stream = min(stream, <uint32_t>MAX_WINDOW)
        if stream > self.stream_window and not self.dead:
            now = max(stream, self.local_initial)
            delta = now - self.local_initial
            self.stream_window = stream
            self._put_settings([(S_INITIAL_WINDOW, stream)], stream)
            # The peer counts on the smaller window until it reads this; allowing more for that time does no harm.
            self.local_initial = now
            for item in self.streams.values():
                (<Http2Stream>item).recv_window += delta
            self.owner.on_output()
        connection = min(connection, <uint64_t>MAX_WINDOW)
        if <int64_t>connection > self.connection_window and not self.dead:
            delta = <int64_t>connection - self.connection_window
            self.connection_window = connection
            if self.started_at != INFINITY:
                self._put_update(0, <uint32_t>delta)
                self.recv_window += delta
                self.granted += delta
                self.owner.on_output()
        return 0

    cdef int _window_update(self, uint32_t sid, uint32_t increment) except -1:
        """RFC 9113 6.9."""
        cdef Http2Stream s
        cdef int situation
        if sid == 0:
            self._glitch("too_many_window_updates")
            if increment == 0:
                self.fail(E_PROTOCOL, "WINDOW_UPDATE of 0")
            if self.send_window + increment > MAX_WINDOW:
                self.fail(E_FLOW_CONTROL, "the connection's window exceeds 2^31-1")
            self.send_window += increment
            if self.ring and self.send_window > 0:
                self.owner.on_output()
            return 0
        s = self._find(sid)
        situation = <int>s.state if s is not None else self._situation(sid)
        if self._verdict(situation, I_WINDOW, sid, s):
            return 0
        self._glitch("too_many_window_updates")
        if increment == 0:
            return self._stream_error(sid, s, E_PROTOCOL)
        if s.send_window + increment > MAX_WINDOW:
            return self._stream_error(sid, s, E_FLOW_CONTROL)
        s.send_window += increment
        if s.queued and s.send_window > 0:
            self._make_ready(s)
            if self.send_window > 0:
                self.owner.on_output()
        return 0

    # ---- header blocks ---------------------------------------------------------------------------------------------------

    cdef int _headers(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1:
        """A HEADERS or CONTINUATION frame (RFC 9113 6.2, 6.10), complete."""
        cdef uint32_t padding = 0
        cdef bint selfdep = False
        cdef unsigned char *room
        cdef size_t n
        cdef bint first = p[3] == T_HEADERS
        p += FRAME_HEAD
        if first:
            if flags & F_PADDED:
                if length == 0:
                    self.fail(E_FRAME_SIZE, "HEADERS without its pad length")
                padding = p[0]
                p += 1
                length -= 1
            if flags & F_PRIORITY:
                if length < 5:
                    self.fail(E_FRAME_SIZE, "HEADERS without its priority")
                selfdep = dw_ld32be(p) & 0x7FFFFFFF == sid
                p += 5
                length -= 5
            if padding > length:
                self.fail(E_PROTOCOL, "HEADERS with more padding than bytes")
            length -= padding
            if flags & F_END_HEADERS:
                return self._block(p, length, flags, sid, selfdep)
            self.block_sid = sid
            self.block_flags = flags
            self.block_selfdep = selfdep
            self.block_frames = 0
        else:
            self.block_frames += 1
        room = dw_buf_reserve(&self.block, length)
        if room is NULL:
            raise MemoryError()
        memcpy(room, p, length)
        self.block.n += length
        if not first and flags & F_END_HEADERS:
            self.block_sid = 0
            n = self.block.n
            self.block.n = 0
            try:
                self._block(self.block.p, n, self.block_flags, sid, self.block_selfdep)
            finally:
                dw_buf_free(&self.block)
        return 0

    cdef int _block(self, const unsigned char *p, size_t n, uint8_t flags, uint32_t sid, bint selfdep) except -1:
        """A complete header block. It is decoded whatever becomes of it: both tables have to stay equal (RFC 9113 4.3)."""
        cdef list headers
        cdef bint end = flags & F_END_STREAM
        cdef int situation, overflow
        cdef Http2Stream s
        try:
            headers = self.decoder.decode(p, n)
        except HpackError as error:
            self.fail(E_COMPRESSION, str(error))
        overflow = self.decoder.overflow
        if overflow == 2:
            self.fail(E_CALM, "header_list_way_too_large")
        s = self._find(sid)
        if s is None and not self.is_client and sid > self.last_peer_id:
            return self._request(headers, end, sid, overflow, selfdep)
        situation = <int>s.state if s is not None else self._situation(sid)
        if self.is_client and situation == ST_IDLE:
            self.fail(E_PROTOCOL, f"HEADERS on stream {sid}, which is idle")
        if self._verdict(situation, I_HEADERS, sid, s):
            return 0
        if selfdep:
            return self._stream_error(sid, s, E_PROTOCOL)
        if overflow:
            if not self.is_client and not s.bits & SB_SENT_HEADERS:
                self.send_headers(s, [(N_STATUS, b"431")], True)
                if s.state != ST_CLOSED:
                    self._stream_error(sid, s, E_NO_ERROR)
                return 0
            return self._stream_error(sid, s, E_CALM)
        if s.bits & SB_GOT_HEADERS:
            # 8.1: trailers end the stream and have no pseudo-header fields
            if not end or self._check_trailers(headers) or (s.expected >= 0 and s.arrived != s.expected):
                return self._stream_error(sid, s, E_PROTOCOL)
            return self._ended(s, headers, K_TRAILERS)
        return self._response(s, headers, end)

    cdef int _ended(self, Http2Stream s, list headers, int kind) except -1:
        """Hand on a block with END_STREAM."""
        if s.state == ST_OPEN:
            s.state = ST_HALF_REMOTE
            return self.owner.on_headers(s, headers, kind, True)
        self.owner.on_headers(s, headers, kind, True)
        if s.state == ST_HALF_LOCAL:
            self._close(s, X_ENDED)
        return 0

    cdef int _request(self, list headers, bint end, uint32_t sid, int overflow, bint selfdep) except -1:
        """(server) HEADERS with a new id."""
        cdef Http2Stream s
        cdef int check
        self.last_peer_id = sid
        if sid > self.goaway_last:  # 6.8: "any frames that alter connection state cannot be completely ignored"
            return self._glitch("too_many_frames_on_closed_streams")
        if sid == 0x7FFFFFFF and not self.draining:
            self.goaway(E_NO_ERROR, b"stream ids are used up", True)
        if self.live >= self.max_concurrent_streams:
            return self._stream_error(sid, None, E_REFUSED)  # 5.1.2; the client may repeat the request
        if selfdep:
            return self._stream_error(sid, None, E_PROTOCOL)
        if overflow:
            return self._answer(sid, b"431", end)  # RFC 6585
        if headers is not self.valid_request:
            check = self._check_request(headers)
            if check == C_MALFORMED:
                return self._stream_error(sid, None, E_PROTOCOL)
            if check == C_PATH_TOO_LONG:
                return self._answer(sid, b"414", end)
            if check == C_CONNECT:
                return self._answer(sid, b"501", end)
            self.valid_request = headers
            self.valid_length = self.v_length
            self.valid_head = self.v_head
        if end and self.valid_length > 0:
            return self._stream_error(sid, None, E_PROTOCOL)
        s = self._new_stream(sid)
        self.hot = s
        s.state = ST_HALF_REMOTE if end else ST_OPEN
        s.bits = SB_GOT_HEADERS | (SB_NO_BODY_OUT if self.valid_head else 0)
        s.expected = self.valid_length
        self.credit += 4
        return self.owner.on_headers(s, headers, K_REQUEST, end)

    cdef int _answer(self, uint32_t sid, bytes status, bint end) except -1:
        """(server) Answer a request of which the owner does not learn."""
        self._put_block(sid, [(N_STATUS, status)], True)
        self.owner.on_output()
        if end:
            self._remember(sid, X_ENDED)
            return self._glitch("too_many_bad_requests")
        # 8.1: the whole response was sent, the rest of the request is of no use
        return self._stream_error(sid, None, E_NO_ERROR)

    cdef int _response(self, Http2Stream s, list headers, bint end) except -1:
        """(client) The first block after the request, or after informational ones."""
        cdef int status
        if headers is not self.valid_response:
            if self._check_response(headers):
                return self._stream_error(s.id, s, E_PROTOCOL)
            self.valid_response = headers
            self.valid_response_length = self.v_length
            self.valid_status = self.v_status
        status = self.valid_status
        if status < 200:
            # 8.1: not the final one; 8.6: HTTP/2 has no 101
            if end or status == 101:
                return self._stream_error(s.id, s, E_PROTOCOL)
            self._glitch("too_many_informational_responses")
            return self.owner.on_headers(s, headers, K_INFORMATIONAL, False)
        s.bits |= SB_GOT_HEADERS
        if status == 204 or status == 304:
            s.bits |= SB_NO_BODY_IN
        if not s.bits & SB_NO_BODY_IN:
            s.expected = self.valid_response_length
            if end and s.expected > 0:
                return self._stream_error(s.id, s, E_PROTOCOL)
        if end:
            return self._ended(s, headers, K_RESPONSE)
        return self.owner.on_headers(s, headers, K_RESPONSE, False)

    # ---- fields ----------------------------------------------------------------------------------------------------------

    cdef int _check_request(self, list headers) except -1:
        """RFC 9113 8.2, 8.3.1. Also sets v_length and v_head."""
        cdef tuple pair
        cdef object name, value
        cdef object method = None, scheme = None, path = None, authority = None, host = None
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        cdef int64_t length
        cdef bint regular = False
        cdef bint star
        self.v_length = -1
        self.v_head = False
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if n and p[0] == 0x3A:
                if regular:
                    return C_MALFORMED
                if name is N_METHOD:
                    if method is not None or not _good_bytes(v, size, 4):
                        return C_MALFORMED
                    method = value
                elif name is N_PATH:
                    if path is not None or not _good_bytes(v, size, 2):
                        return C_MALFORMED
                    path = value
                elif name is N_SCHEME:
                    if scheme is not None:
                        return C_MALFORMED
                    scheme = value
                elif name is N_AUTHORITY:
                    if authority is not None or not _good_bytes(v, size, 8):
                        return C_MALFORMED
                    authority = value
                else:
                    return C_MALFORMED
                continue
            regular = True
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):
                return C_MALFORMED
            if name is N_LENGTH:
                length = _length(v, size)
                if length < 0 or (self.v_length >= 0 and length != self.v_length):
                    return C_MALFORMED
                self.v_length = length
            elif name is N_HOST:
                if host is not None or not _good_bytes(v, size, 8):
                    return C_MALFORMED
                host = value
        if method is None or (authority is None and host is None):
            return C_MALFORMED
        if authority is not None and host is not None and authority != host:
            return C_MALFORMED
        if method == b"CONNECT":  # 8.5: without :scheme and :path
            return C_MALFORMED if scheme is not None or path is not None or authority is None else C_CONNECT
        if path is None or not (scheme == b"http" or scheme == b"https"):
            return C_MALFORMED
        if PyBytes_AS_STRING(path)[0] != 0x2F:
            star = PyBytes_GET_SIZE(path) == 1 and PyBytes_AS_STRING(path)[0] == 0x2A
            if not star or method != b"OPTIONS":
                return C_MALFORMED
        if PyBytes_GET_SIZE(path) > PATH_LIMIT:
            return C_PATH_TOO_LONG
        self.v_head = method == b"HEAD"
        return C_OK

    cdef int _check_response(self, list headers) except -1:
        """RFC 9113 8.2, 8.3.2. Also sets v_length and v_status."""
        cdef tuple pair
        cdef object name, value
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        cdef int64_t length
        cdef bint regular = False
        self.v_length = -1
        self.v_status = 0
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if n and p[0] == 0x3A:
                if regular or name is not N_STATUS or self.v_status or size != 3:
                    return C_MALFORMED
                self.v_status = <int>_length(v, size)
                if self.v_status < 100:
                    return C_MALFORMED
                continue
            regular = True
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):
                return C_MALFORMED
            if name is N_LENGTH:
                length = _length(v, size)
                if length < 0 or (self.v_length >= 0 and length != self.v_length):
                    return C_MALFORMED
                self.v_length = length
        return C_OK if self.v_status else C_MALFORMED

    cdef int _check_trailers(self, list headers) except -1:
        cdef tuple pair
        cdef object name, value
        cdef const unsigned char *p
        cdef const unsigned char *v
        cdef Py_ssize_t n, size
        for pair in headers:
            name = <object>PyTuple_GET_ITEM(pair, 0)
            value = <object>PyTuple_GET_ITEM(pair, 1)
            p = <const unsigned char *>PyBytes_AS_STRING(name)
            n = PyBytes_GET_SIZE(name)
            v = <const unsigned char *>PyBytes_AS_STRING(value)
            size = PyBytes_GET_SIZE(value)
            if not _good_name(p, n) or not _good_value(v, size) or _forbidden(p, n, v, size):  # a colon is no name byte
                return C_MALFORMED
        return C_OK

    # ---- connection frames -----------------------------------------------------------------------------------------------

    cdef int _settings(self, const unsigned char *p, uint32_t length, uint8_t flags) except -1:
        """RFC 9113 6.5."""
        cdef uint32_t at = 0
        cdef uint32_t code, value
        cdef int64_t window = -1
        cdef bint first = not self.ready
        if flags & F_ACK:
            if not self.settings_sent:
                return self._glitch("too_many_settings")
            window = <int64_t>self.settings_sent.popleft()[1]
            if 0 <= window < self.local_initial and window == self.stream_window:
                # only the first SETTINGS can have made it smaller: from 65,535
                for item in self.streams.values():
                    (<Http2Stream>item).recv_window += window - self.local_initial
                self.local_initial = window
            return self.owner.on_settings_ack()
        self._glitch("too_many_settings")
        while at < length:
            code = dw_ld16be(p + at)
            value = dw_ld32be(p + at + 2)
            at += 6
            if code == S_INITIAL_WINDOW:
                if value > MAX_WINDOW:
                    self.fail(E_FLOW_CONTROL, "SETTINGS_INITIAL_WINDOW_SIZE above 2^31-1")
                window = value
            elif code == S_MAX_FRAME:
                if not 16384 <= value <= 16777215:
                    self.fail(E_PROTOCOL, "SETTINGS_MAX_FRAME_SIZE outside of 16384 to 16777215")
                self.peer_max_frame = value
            elif code == S_TABLE_SIZE:
                self.encoder.set_table_limit(value)
            elif code == S_MAX_STREAMS:
                self.peer_max_streams = value
            elif code == S_ENABLE_PUSH:
                if value > 1 or (value and self.is_client):
                    self.fail(E_PROTOCOL, "SETTINGS_ENABLE_PUSH")
            elif code > 0x20:
                continue  # unknown ones are ignored, and not remembered
            self.peer_values[code] = value
        if window >= 0:
            self._shift_windows(window - self.peer_initial)
            self.peer_initial = window
        self.ready = True
        if first and S_MAX_STREAMS not in self.peer_values:
            self.peer_max_streams = 0x7FFFFFFF
        self._put_control(T_SETTINGS, F_ACK, 0, NULL, 0)
        self.owner.on_output()
        self.owner.on_settings()
        if self.wants_capacity and self.live < self.peer_max_streams:
            self.wants_capacity = False
            self.owner.on_capacity()
        return 0

    cdef int _shift_windows(self, int64_t delta) except -1:
        """The peer's initial window has changed: windows of open streams move with it, below zero too (RFC 9113 6.9.2)."""
        cdef Http2Stream s
        if delta == 0:
            return 0
        for s in self.streams.values():
            s.send_window += delta
            if s.send_window > MAX_WINDOW:
                self.fail(E_FLOW_CONTROL, "SETTINGS_INITIAL_WINDOW_SIZE takes a window above 2^31-1")
            if s.queued:
                if s.send_window > 0:
                    self._make_ready(s)
                elif s.bits & SB_READY:
                    self._unready(s)
        return 0

    cdef int _goaway(self, const unsigned char *p, uint32_t length) except -1:
        """RFC 9113 6.8."""
        cdef uint32_t last = dw_ld32be(p) & 0x7FFFFFFF
        cdef uint32_t code = dw_ld32be(p + 4)
        cdef bytes debug = PyBytes_FromStringAndSize(<char *>p + 8, length - 8)
        cdef Http2Stream s
        self.draining = True
        self._glitch("too_many_goaways")
        if self.is_client:
            for sid in sorted(self.streams):
                if sid > last:
                    s = self.streams.get(sid)
                    if s is not None:
                        s.state = ST_CLOSED
                        self.owner.on_reset(s, E_REFUSED, True)
                        self._close(s, X_RESET_BY_US)  # what the peer still sends on it is ignored
        return self.owner.on_goaway(last, code, debug)

    # ---- sending ---------------------------------------------------------------------------------------------------------

    cdef unsigned char *_reserve(self, size_t n) except NULL:
        cdef unsigned char *p = dw_buf_reserve(&self.obuf, n)
        if p is NULL:
            raise MemoryError()
        return p

    cdef int _put(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1:
        cdef unsigned char *p
        if self.dead:
            return 0
        p = self._reserve(FRAME_HEAD + n)
        dw_st24be(p, <uint32_t>n)
        p[3] = type
        p[4] = flags
        dw_st32be(p + 5, sid)
        if n:
            memcpy(p + FRAME_HEAD, body, n)
        self.obuf.n += FRAME_HEAD + n
        self.last_sid = 0
        return 0

    cdef int _put_control(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1:
        """A frame that the peer made us send. It has to read them, too."""
        self.control_o += 1
        if self.control_o + self.control_w > self.control_backlog:
            self.fail(E_CALM, "too_many_unread_answers")
        return self._put(type, flags, sid, body, n)

    cdef int _put_rst(self, uint32_t sid, uint32_t code) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, code)
        return self._put_control(T_RST_STREAM, 0, sid, body, 4)

    cdef int _put_own_rst(self, uint32_t sid, uint32_t code) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, code)
        return self._put(T_RST_STREAM, 0, sid, body, 4)

    cdef int _put_update(self, uint32_t sid, uint32_t increment) except -1:
        cdef unsigned char body[4]
        dw_st32be(body, increment)
        return self._put(T_WINDOW_UPDATE, 0, sid, body, 4)

    cdef int _put_settings(self, list pairs, int64_t window) except -1:
        cdef bytes body = b"".join([int(code).to_bytes(2, "big") + int(value).to_bytes(4, "big") for code, value in pairs])
        self._put(T_SETTINGS, 0, 0, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
        self.settings_sent.append((self.now, window))
        return 0

    cdef int start(self, double now) except -1:
        cdef list pairs = []
        self.now = now
        self.started_at = now
        if self.is_client:
            memcpy(self._reserve(_PREFACE_SIZE), PyBytes_AS_STRING(_PREFACE), _PREFACE_SIZE)
            self.obuf.n += _PREFACE_SIZE
            pairs.append((S_ENABLE_PUSH, 0))
        else:
            pairs.append((S_MAX_STREAMS, self.max_concurrent_streams))
        pairs.append((S_INITIAL_WINDOW, self.stream_window))
        pairs.append((S_MAX_FRAME, self.max_frame_size))
        pairs.append((S_MAX_LIST, self.max_header_list))
        pairs.append((S_NO_PRIORITIES, 1))
        self._put_settings(pairs, self.stream_window)
        if self.connection_window > 65535:
            self._put_update(0, <uint32_t>(self.connection_window - 65535))
            self.recv_window += self.connection_window - 65535
            self.granted += self.connection_window - 65535
        return self.owner.on_output()

    cdef Http2Stream open_stream(self):
        cdef Http2Stream s
        if not self.is_client:
            raise RuntimeError("only a client opens streams")
        if self.next_id >= CLIENT_IDS_END:
            self.exhausted = True
        if self.dead or self.draining or self.exhausted:
            return None
        if self.live >= self.peer_max_streams:
            self.wants_capacity = True
            return None
        s = self._new_stream(self.next_id)
        self.next_id += 2
        return s

    cdef int _put_block(self, uint32_t sid, list headers, bint end) except -1:
        """HEADERS, and CONTINUATION where the peer's frames are too small for the block."""
        cdef size_t start = self.obuf.n
        cdef size_t size, at, part
        cdef Py_ssize_t frames, i
        cdef uint8_t flags
        cdef unsigned char *p
        if self.dead:
            return 0
        self._reserve(FRAME_HEAD)
        self.obuf.n += FRAME_HEAD
        try:
            self.encoder.encode(headers, &self.obuf)
        except BaseException:  # noqa: BLE001 - the frame's head must not stay
            self.obuf.n = start
            raise
        self.last_sid = 0
        size = self.obuf.n - start - FRAME_HEAD
        frames = 1 + (size - 1) // self.peer_max_frame if size else 1
        if frames > 1:
            self._reserve((frames - 1) * FRAME_HEAD)
            self.obuf.n += (frames - 1) * FRAME_HEAD
        p = self.obuf.p + start
        for i in range(frames - 1, -1, -1):
            at = <size_t>i * self.peer_max_frame
            part = min(size - at, <size_t>self.peer_max_frame)
            if i:
                memmove(p + at + (i + 1) * FRAME_HEAD, p + FRAME_HEAD + at, part)
            flags = F_END_HEADERS if i == frames - 1 else 0
            if i == 0 and end:
                flags |= F_END_STREAM
            dw_st24be(p + at + i * FRAME_HEAD, <uint32_t>part)
            p[at + i * FRAME_HEAD + 3] = T_CONTINUATION if i else T_HEADERS
            p[at + i * FRAME_HEAD + 4] = flags
            dw_st32be(p + at + i * FRAME_HEAD + 5, sid)
        return 0

    cdef int send_headers(self, Http2Stream s, list headers, bint end) except -1:
        cdef tuple pair
        cdef bytes status
        if s.state == ST_CLOSED or s.state == ST_HALF_LOCAL or s.bits & SB_END_QUEUED or self.dead:
            return 0
        self.credit += 4
        if s.bits & SB_SENT_HEADERS:
            # trailers, which always end the stream
            if s.queued:
                s.trailers = headers
                s.bits |= SB_END_QUEUED
                return 0
            self._put_block(s.id, headers, True)
            self.owner.on_output()
            return self._local_end(s)
        if self.is_client:
            if s.id < self.highest_sent:
                raise RuntimeError(f"stream {s.id} begins after {self.highest_sent}: that has closed it (RFC 9113 5.1.1)")
            for pair in headers:
                if pair[0] == b":method":
                    if pair[1] == b"HEAD":
                        s.bits |= SB_NO_BODY_IN
                    break
            self._put_block(s.id, headers, end)
            s.bits |= SB_SENT_HEADERS
            s.state = ST_OPEN
            self.highest_sent = s.id
        else:
            status = headers[0][1]
            if status.startswith(b"1"):
                self._put_block(s.id, headers, False)
                return self.owner.on_output()
            if s.bits & SB_NO_BODY_OUT or status == b"204" or status == b"304":
                end = True
            self._put_block(s.id, headers, end)
            s.bits |= SB_SENT_HEADERS
        self.owner.on_output()
        return self._local_end(s) if end else 0

    cdef int _local_end(self, Http2Stream s) except -1:
        """END_STREAM was framed."""
        if s.state == ST_OPEN:
            s.state = ST_HALF_LOCAL
        elif s.state == ST_HALF_REMOTE:
            self._close(s, X_ENDED)
        return 0

    cdef int send_data(self, Http2Stream s, const unsigned char *p, size_t n, object keep, bint end) except -1:
        if s.state == ST_CLOSED or s.state == ST_HALF_LOCAL or s.bits & SB_END_QUEUED or self.dead or (n == 0 and not end):
            return 0
        if not s.bits & SB_SENT_HEADERS:
            raise RuntimeError(f"data on stream {s.id} before its headers")
        if s.queued == 0 and (
            n == 0
            or (
                <int64_t>n <= s.send_window
                and <int64_t>n <= self.send_window
                and (n < REFERENCE_FROM or keep is None)
                and self.obuf.n < COPY_BACKLOG
                # others wait for the connection's window: they get the end of it
                and (<int64_t>n + CUT_ALONE <= self.send_window or not self.ring)
            )
        ):
            self._put_data(s, p, n, end)
            self.owner.on_output()
            return self._local_end(s) if end else 0
        if end:
            s.bits |= SB_END_QUEUED
        if n:
            self._queue(s, p, n, keep)
        if s.bits & SB_READY and self.send_window > 0:
            self.owner.on_output()
        return 0

    cdef int _put_data(self, Http2Stream s, const unsigned char *p, size_t n, bint end) except -1:
        """Frame bytes that the windows allow. They are added to the frame before them if that is DATA of the same stream."""
        cdef size_t cut = min(<size_t>self.peer_max_frame, <size_t>(CUT_SHARED if self.ring else CUT_ALONE))
        cdef size_t part, before
        cdef unsigned char *q
        cdef bint first = True
        s.send_window -= n
        self.send_window -= n
        if self.last_sid == s.id:
            q = self.obuf.p + self.last_at
            before = dw_ld24be(q)
            if before + n <= min(cut, <size_t>CUT_SHARED):
                if n:
                    memcpy(self._reserve(n), p, n)
                    self.obuf.n += n
                    q = self.obuf.p + self.last_at
                    dw_st24be(q, <uint32_t>(before + n))
                if end:
                    q[4] = F_END_STREAM
                    self.last_sid = 0
                return 0
        while n or first:
            first = False
            part = min(n, cut)
            self.last_at = self.obuf.n
            n -= part
            self._put(T_DATA, F_END_STREAM if end and n == 0 else 0, s.id, p, part)
            self.credit += 20
            p += part
        self.last_sid = 0 if end else s.id
        return 0

    cdef int _queue(self, Http2Stream s, const unsigned char *p, size_t n, object keep) except -1:
        cdef Piece piece = None
        cdef unsigned char *q
        if s.pieces is None:
            s.pieces = []
        if n >= REFERENCE_FROM and keep is not None:
            piece = Piece.__new__(Piece)
            PyObject_GetBuffer(keep, &piece.view, PyBUF_SIMPLE)
            piece.held = True
            piece.base = p
            piece.size = n
            s.pieces.append(piece)
        else:
            if s.pieces:
                piece = s.pieces[-1]
            if piece is None or piece.held:
                piece = Piece.__new__(Piece)
                s.pieces.append(piece)
            elif piece.offset * 2 > piece.own.n:  # otherwise a queue that is never empty would keep all that it has sent
                memmove(piece.own.p, piece.own.p + piece.offset, piece.own.n - piece.offset)
                piece.own.n -= piece.offset
                piece.size -= piece.offset
                piece.offset = 0
            q = dw_buf_reserve(&piece.own, n)
            if q is NULL:
                raise MemoryError()
            memcpy(q, p, n)
            piece.own.n += n
            piece.size += n
        if s.queued == 0:
            s.progress = self.now
            self.stall_at = min(self.stall_at, self.now + self.stall_s)
        s.queued += n
        self.queued_total += n
        if s.send_window > 0:
            self._make_ready(s)
        return 0

    cdef int _make_ready(self, Http2Stream s) except -1:
        if not s.bits & SB_READY:
            s.bits |= SB_READY
            self.ring.append(s)
        return 0

    cdef int _unready(self, Http2Stream s) except -1:
        if s.bits & SB_READY:
            s.bits &= ~SB_READY
            if s in self.ring:
                self.ring.remove(s)
        return 0

    cdef int _drop_queue(self, Http2Stream s) except -1:
        self.queued_total -= s.queued
        s.queued = 0
        s.pieces = None
        return 0

    cdef int _framed(self, Http2Stream s, size_t n) except -1:
        """``n`` queued bytes of the stream at the head of the ring were framed; windows have been counted."""
        s.queued -= n
        self.queued_total -= n
        s.progress = self.now
        self.ring.popleft()
        s.bits &= ~SB_READY
        if s.queued:
            if s.send_window > 0:
                self._make_ready(s)
            return 0
        s.pieces = None
        if s.bits & SB_END_QUEUED:
            if s.trailers is not None:
                self._put_block(s.id, s.trailers, True)
                s.trailers = None
            return self._local_end(s)
        return 0

    cdef int _frame_copies(self) except -1:
        """Frame queued bytes that were copied, streams taking turns, into obuf."""
        cdef Http2Stream s
        cdef Piece piece
        cdef size_t n
        cdef size_t passed = 0  # streams in a row whose next bytes are sent from their own memory
        while passed < <size_t>len(self.ring) and self.obuf.n < COPY_BACKLOG and self.send_window > 0:
            s = self.ring[0]
            piece = s.pieces[0]
            if piece.held:
                self.ring.rotate(-1)
                passed += 1
                continue
            passed = 0
            n = piece.size - piece.offset
            if len(self.ring) > 1:
                n = min(n, <size_t>CUT_SHARED)
            n = min(n, min(<size_t>self.peer_max_frame, <size_t>CUT_ALONE))
            n = min(n, <size_t>min(s.send_window, self.send_window))
            self._put_data(s, piece.own.p + piece.offset, n,
                           n == s.queued and s.bits & SB_END_QUEUED and s.trailers is None)
            piece.offset += n
            if piece.offset == piece.size:
                s.pieces.pop(0)
            self._framed(s, n)
        return 0

    cdef int _frame_refs(self, size_t limit) except -1:
        """Frame queued bytes in their own memory, streams taking turns. Stops when
        obuf is in use: trailers, or what a callback sends, may belong to a stream that comes next, and is written later."""
        cdef Http2Stream s
        cdef Piece piece
        cdef size_t n
        cdef size_t passed = 0
        cdef size_t total = 0
        cdef RefFrame *ref
        while passed < <size_t>len(self.ring) and self.ref_n < 7 and total < limit and self.send_window > 0 and self.obuf.n == 0:
            s = self.ring[0]
            piece = s.pieces[0]
            if not piece.held:
                self.ring.rotate(-1)
                passed += 1
                continue
            passed = 0
            n = min(piece.size - piece.offset, <size_t>(CUT_SHARED if len(self.ring) > 1 else CUT_ALONE))
            n = min(min(n, <size_t>self.peer_max_frame), limit - total)
            n = min(n, <size_t>min(s.send_window, self.send_window))
            ref = &self.refs[self.ref_n]
            ref.base = piece.base + piece.offset
            ref.size = n
            dw_st24be(ref.head, <uint32_t>n)
            ref.head[3] = T_DATA
            ref.head[4] = F_END_STREAM if n == s.queued and s.bits & SB_END_QUEUED and s.trailers is None else 0
            dw_st32be(ref.head + 5, s.id)
            self.ref_pieces.append(piece)
            self.ref_n += 1
            self.ref_bytes += FRAME_HEAD + n
            total += n
            s.send_window -= n
            self.send_window -= n
            self.credit += 20
            piece.offset += n
            if piece.offset == piece.size:
                s.pieces.pop(0)
            self._framed(s, n)
        return 0

    cdef bint room(self, Http2Stream s):
        cdef size_t limit = STREAM_BACKLOG if self.queued_total < QUEUED_TOTAL else CUT_SHARED
        if s.queued <= limit and self.backlog() <= CONNECTION_BACKLOG:
            return True
        if s.state != ST_CLOSED and not s.bits & SB_WANTS_ROOM:
            s.bits |= SB_WANTS_ROOM
            self.roomless.append(s)
        return False

    cdef int _tell_room(self) except -1:
        cdef list waiting
        cdef Http2Stream s
        cdef size_t limit = STREAM_BACKLOG // 2 if self.queued_total < QUEUED_TOTAL else CUT_SHARED
        if self.backlog() > CONNECTION_BACKLOG // 2:
            return 0
        waiting = self.roomless
        self.roomless = []
        for s in waiting:
            if s.state == ST_CLOSED:
                s.bits &= ~SB_WANTS_ROOM
            elif s.queued > limit:
                self.roomless.append(s)
            else:
                s.bits &= ~SB_WANTS_ROOM
                self.owner.on_room(s)
        return 0

    cdef int reset(self, Http2Stream s, uint32_t code) except -1:
        if s.state == ST_CLOSED:
            return 0
        if s.state != ST_IDLE:
            # our own decision, not an answer to the peer: not counted as one
            self._put_own_rst(s.id, code)
            self.owner.on_output()
        return self._close(s, X_RESET_BY_US)

    cdef int release(self, Http2Stream s) except -1:
        if not s.bits & SB_RELEASED:
            s.bits |= SB_RELEASED
            if s.state == ST_CLOSED and not self.is_client:
                self._uncount(s)
                _trim(self)
        return 0

    cdef int ping(self, uint64_t payload) except -1:
        cdef unsigned char body[8]
        dw_st64be(body, payload)
        self._put(T_PING, 0, 0, body, 8)
        self.credit += 1  # for its answer
        return self.owner.on_output()

    cdef int goaway(self, uint32_t code, bytes debug, bint final) except -1:
        cdef bytes body
        if self.dead:
            return 0
        if final and not self.is_client:
            self.goaway_last = min(self.goaway_last, self.last_peer_id)
        last = 0 if self.is_client and final else self.goaway_last
        self.draining = True
        body = int(last).to_bytes(4, "big") + int(code).to_bytes(4, "big") + debug
        self._put(T_GOAWAY, 0, 0, <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
        return self.owner.on_output()

    cdef bint has_output(self):
        return (
            self.obuf.n > 0
            or self.wpos < self.wbuf.n
            or self.ref_i < self.ref_n
            or (self.send_window > 0 and not self.dead and len(self.ring) > 0)
        )

    cdef size_t backlog(self):
        return self.obuf.n + self.wbuf.n - self.wpos + self.ref_bytes

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        """Order: the rest of what was named before, then everything in obuf, then frames in their own memory in turn."""
        cdef int n = 0
        cdef int i
        cdef size_t done
        cdef dw_buf swap
        if self.wpos == self.wbuf.n and self.ref_i == self.ref_n:
            self.ref_i = self.ref_n = 0
            if self.ring and not self.dead:
                self._frame_copies()
            swap = self.wbuf
            self.wbuf = self.obuf
            self.obuf = swap
            self.obuf.n = 0
            self.wpos = 0
            self.last_sid = 0
            self.control_w = self.control_o
            self.control_o = 0
            if self.ring and not self.dead:
                self._frame_refs(max(limit, <size_t>CUT_SHARED))
        if self.wpos < self.wbuf.n:
            chunks[n].base = self.wbuf.p + self.wpos
            chunks[n].len = self.wbuf.n - self.wpos
            n += 1
        done = self.ref_done
        for i in range(self.ref_i, self.ref_n):
            if done < FRAME_HEAD:
                chunks[n].base = self.refs[i].head + done
                chunks[n].len = FRAME_HEAD - done
                n += 1
                done = FRAME_HEAD
            chunks[n].base = self.refs[i].base + (done - FRAME_HEAD)
            chunks[n].len = self.refs[i].size - (done - FRAME_HEAD)
            n += 1
            done = 0
        return n

    cdef int sent(self, size_t n) except -1:
        cdef size_t take = min(n, self.wbuf.n - self.wpos)
        self.wpos += take
        n -= take
        if self.wpos == self.wbuf.n:
            self.control_w = 0
            if self.wbuf.cap > COPY_BACKLOG:
                dw_buf_free(&self.wbuf)
                self.wpos = 0
            _trim(self)
        while n:
            take = min(n, FRAME_HEAD + self.refs[self.ref_i].size - self.ref_done)
            self.ref_done += take
            self.ref_bytes -= take
            n -= take
            if self.ref_done == FRAME_HEAD + self.refs[self.ref_i].size:
                self.ref_done = 0
                self.ref_i += 1
                if self.ref_i == self.ref_n:
                    self.ref_pieces.clear()
        if self.roomless:
            self._tell_room()
        return 0

    # ---- time ------------------------------------------------------------------------------------------------------------

    cdef double next_wakeup(self):
        cdef double when = INFINITY
        if self.dead:
            return when
        if not self.ready:
            when = self.started_at + self.handshake_s
        if self.settings_sent:
            when = min(when, <double>self.settings_sent[0][0] + self.handshake_s)
        if self.queued_total:
            when = min(when, self.stall_at)
        return when

    cdef int on_time(self, double now) except -1:
        cdef Http2Stream s
        self.now = now
        if self.dead:
            return 0
        if not self.ready and now >= self.started_at + self.handshake_s:
            self.fail(E_PROTOCOL if self.preface_at < _PREFACE_SIZE else E_SETTINGS_TIMEOUT,
                      f"no {'SETTINGS' if self.preface_at == _PREFACE_SIZE else 'preface'} within {self.handshake_s:g} s")
        if self.settings_sent and now >= <double>self.settings_sent[0][0] + self.handshake_s:
            self.fail(E_SETTINGS_TIMEOUT, f"SETTINGS were not acknowledged within {self.handshake_s:g} s")
        if now < self.stall_at:
            return 0
        self.stall_at = INFINITY
        if not self.queued_total:
            return 0
        for s in list(self.streams.values()):
            if not s.queued:
                continue
            if now >= s.progress + self.stall_s:
                self._put_own_rst(s.id, E_CANCEL)
                self.owner.on_output()
                s.state = ST_CLOSED
                self.owner.on_reset(s, E_CANCEL, False)
                self._close(s, X_RESET_BY_US)
            else:
                self.stall_at = min(self.stall_at, s.progress + self.stall_s)
        return 0

    # ---- for tests and diagnostics -------------------------------------------------------------------------------------

    cdef list take_streams(self):
        cdef list out = Http2Engine.take_streams(self)
        cdef Http2Stream s
        self.ring.clear()
        self.roomless.clear()
        self.hot = self.data_stream = None
        for s in out:
            self._uncount(s)
        return out

    cdef dict peer_settings(self):
        return dict(self.peer_values)

    cdef dict counters(self):
        cdef Http2Stream s
        streams = {}
        for s in self.streams.values():
            streams[s.id] = {
                "send_window": s.send_window, "recv_window": s.recv_window, "unannounced": s.unannounced, "queued": s.queued,
                "arrived": s.arrived,
            }  # fmt: skip
        return {
            "send_window": self.send_window, "recv_window": self.recv_window, "unannounced": self.unannounced,
            "granted": self.granted, "received": self.flow_received, "unread": self.unread, "queued": self.queued_total,
            "backlog": self.backlog(), "streams": streams,
            "held": self.rcap + self.block.cap + self.obuf.cap + self.wbuf.cap,
        }  # fmt: skip


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
