"""The native wire, without I/O: frames, streams, credit. Bytes and a clock go in, events and bytes come out.

docs/wire.md specifies every byte. `WireConnection` is the state machine of one connection in either role. The drivers in
`dynwire._tcpio` subclass it and `StreamBase` and are called through C methods; `EventConnection` is the same machine with a
Python face (events as tuples), for tests, fuzzers and tools.

The machine is driven like this: put bytes where `recv_target` says and report them with `received`; it calls back for every
complete request, item or error. Frames to send collect in two buffers (one is filled while the other is being written) and
large payloads are sent from their own memory; `gather` says what to write, `sent` how much of it was accepted.

Threads: one thread at a time, in the sense of the GIL. No method releases it. A writer may release it between `gather` and
`sent`: nothing in between moves the memory that `gather` named.
"""

import collections

import msgspec
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove

from ._buffers cimport Block, Payload, default_pool, payload_copy, payload_of_block
from ._link cimport (
    MAX_CHUNKS,
    META_LIMIT,
    PRODUCE_LIMIT,
    S_ACCEPTED,
    S_ASSEMBLING,
    S_ENDED,
    S_QUEUED,
    S_SENDING,
    S_STOP_EARLY,
    S_WRITTEN,
    S_ZOMBIE,
    Link,
    StreamBase,
    dw_chunk,
)

from .errors import PlaneMismatch, ProtocolError

WIRE_MAJOR = 1
WIRE_MINOR = 0
cdef bytes _PREFACE = b"DYNW" + bytes([WIRE_MAJOR, WIRE_MINOR, 0, 0])
PREFACE = _PREFACE
cdef uint32_t CONNECTION_WINDOW_ID = 0xFFFFFFFF
cdef int64_t _CREDIT_LIMIT = <int64_t>1 << 40
# Set in the first half of a PING whose other bits tell how much of large payloads stands before it.
cdef uint32_t _MARK = 0x80000000
cdef double _SMALL_S = 0.05
cdef double _UPLOAD_S = 60.0             # a request without a deadline of its own has to arrive completely within this time
cdef size_t _UNREAD_LIMIT = 2097152
cdef object _pack = msgspec.msgpack.encode
cdef object _unpack = msgspec.msgpack.decode

FRAME_TYPES = {
    1: "HELLO", 2: "REQUEST", 3: "DATA", 4: "CONT", 5: "END", 6: "ERROR",
    7: "CANCEL", 8: "WINDOW", 9: "ACCEPT", 10: "PING", 11: "PONG", 12: "GOAWAY",
}  # fmt: skip

LIMITS = {
    "header_bytes": HEADER_BYTES,
    "preface_bytes": PREFACE_BYTES,
    "fragment_from": FRAGMENT_FROM,
    "fragment_bytes": FRAGMENT_BYTES,
    "frame_limit": FRAME_LIMIT,
    "meta_limit": META_LIMIT,
    "name_limit": NAME_LIMIT,
    "small_limit": SMALL_LIMIT,
    "hello_limit": HELLO_LIMIT,
    "endpoints_limit": ENDPOINTS_LIMIT,
    "item_overhead": ITEM_OVERHEAD,
}


class Hello(msgspec.Struct, kw_only=True):
    """What each side says first. Sizes in bytes. Unknown fields are ignored, so later versions may add some."""

    software: str = ""
    max_message: int
    max_streams: int
    stream_window: int
    connection_window: int
    id: bytes = b""
    """(client) 8 random bytes; prefix of request ids"""
    token: str | None = None
    """(client) shared secret"""
    accept_timeout_ms: int = 10000
    """(client) how long it waits for ACCEPT or an item"""
    codecs: list[str] = []


cdef object _hello_decoder = msgspec.msgpack.Decoder(Hello)


_HTTP_VERBS = (b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT")


def describe_foreign(bytes head):
    """Name of the protocol that the first bytes of a connection look like."""
    if head[:1] in (b"\x15", b"\x16") and head[1:2] in (b"", b"\x03"):
        return "TLS"
    if head.startswith(b"PRI * HTTP/2"):
        return "HTTP/2"
    verb = head.split(b" ", 1)[0]
    if verb in _HTTP_VERBS and not head.startswith(b"CONNECT {"):
        return "HTTP/1.1"
    if head.startswith(b"HTTP/"):
        return "HTTP/1.1"
    if verb in (b"INFO", b"CONNECT", b"-ERR", b"PING\r\n", b"SUB", b"PUB"):
        return "NATS"
    if head.startswith(b"SSH-"):
        return "SSH"
    if head[:2] == b"\xff\x00" or head[:1] == b"\xff":
        return "ZeroMQ"
    if head.startswith(b"\x00\x00") and head[3:4] == b"\x04":
        return "HTTP/2"
    return "an unknown protocol"


cdef class LargeSend:
    """A large payload on its way out: sent from the caller's memory, which is held until the last byte is written."""

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class WireConnection(Link):
    """State machine of one connection. See the module's docstring."""

    def __cinit__(self):
        self.rbuf = <unsigned char *>malloc(STAGING_BYTES)
        if self.rbuf is NULL:
            raise MemoryError()
        self.large = collections.deque()
        self.interned = []
        self.endpoint_numbers = {}
        self.item_overhead = ITEM_OVERHEAD

    def __init__(self, bint is_client, *, max_message=33554432, max_streams=16384, stream_window=262144,
                 connection_window=67108864):
        self.is_client = is_client
        self.max_message = max_message
        self.max_streams = max_streams
        self.stream_window = stream_window
        self.connection_window = connection_window
        self.recv_credit = connection_window

    def __dealloc__(self):
        free(self.rbuf)
        free(self.obuf)
        free(self.wbuf)

    cdef int on_pong(self, uint32_t a, uint32_t b) except -1:
        return 0

    # ---- receiving -----------------------------------------------------------------------------------------------------

    cdef void recv_target(self, unsigned char **base, size_t *size):
        """Where the next bytes from the peer go, and how many at most."""
        cdef size_t have
        if self.land_left:
            base[0] = self.land
            size[0] = self.land_left
            return
        have = self.rend - self.rpos
        if self.rpos:
            if have:
                memmove(self.rbuf, self.rbuf + self.rpos, have)
            self.rpos = 0
            self.rend = have
        base[0] = self.rbuf + have
        size[0] = STAGING_BYTES - have
        if self.expect_large and not have:
            size[0] = FIRST_READ_BYTES  # what is read beyond the announcement is copied
        if self.assembling and not self.skip_left:
            # A large payload is arriving: read exactly to the end of the next header or frame, so that the body of the next
            # fragment is not read into this buffer and copied out of it.
            if have < HEADER_BYTES:
                size[0] = HEADER_BYTES - have
            elif self.rbuf[4] != T_CONT:
                size[0] = min(size[0], HEADER_BYTES + dw_ld32(self.rbuf) - have)

    cdef int recv_targets(self, dw_chunk *targets):
        if self.land_left == 0:
            self.recv_target(<unsigned char **>&targets[0].base, &targets[0].len)
            return 1
        # The rest of the fragment goes where it belongs, the header behind it into the staging buffer.
        self.rpos = self.rend = 0
        targets[0].base = self.land
        targets[0].len = self.land_left
        targets[1].base = self.rbuf
        targets[1].len = HEADER_BYTES
        return 2

    cdef bint more_expected(self):
        return self.assembling > 0

    cdef int received(self, size_t n, double now) except -1:
        cdef size_t rest
        if self.land_left and n > self.land_left:
            rest = n - self.land_left
            self.received(self.land_left, now)
            return self.received(rest, now)
        self.rx_bytes += n
        self.now = now
        self.last_rx = now
        if self.land_left:
            self.land += n
            self.land_left -= n
            self.landed_bytes += n
            if self.land_left == 0:
                self.finish_landing()
            return 0
        self.rend += n
        self.expect_large = False
        return self.parse()

    cdef int fail(self, str text) except -1:
        raise ProtocolError(
            f"{'server' if self.is_client else 'client'} {self.peer or ''} broke the dynwire protocol: {text}",
            peer=self.peer,
            offset=self.rx_bytes - (self.rend - self.rpos),
            sent="maybe",
        )

    cdef int parse(self) except -1:
        cdef size_t avail, take
        cdef unsigned char *p
        cdef uint32_t length
        cdef uint8_t type_
        cdef StreamBase stream
        while not self.dead:
            avail = self.rend - self.rpos
            if self.skip_left:
                take = min(self.skip_left, avail)
                self.rpos += take
                self.skip_left -= take
                if self.skip_left:
                    break
                continue
            p = self.rbuf + self.rpos
            if not self.preface_done:
                if not self._parse_preface(p, avail):
                    break
                continue
            if avail < HEADER_BYTES:
                break
            length = dw_ld32(p)
            type_ = p[4]
            if type_ == T_CONT:
                if not self.ready:
                    self.fail("a CONT frame before HELLO")
                self.rpos += HEADER_BYTES
                self.rx_frames += 1
                if length == 0 or length > FRAME_LIMIT:
                    self.fail(f"a CONT frame of {length} bytes (allowed: 1 to {FRAME_LIMIT})")
                stream = self.get_slot(dw_ld32(p + 8))
                if stream is None or not stream.state & S_ASSEMBLING:
                    if self.is_client or (stream is not None and not stream.state & S_ZOMBIE):
                        self.fail("a CONT frame without an announced payload")
                    self.skip_left = length
                    continue
                if length > stream.in_total - stream.in_have:
                    self.fail(f"fragments of stream {stream.sid} exceed the announced {stream.in_total} bytes")
                take = stream.in_have
                stream.in_have += length
                if stream.in_block is None:  # given up: the rest is not wanted
                    self.skip_left = length
                    if stream.in_have == stream.in_total:
                        self._assembly_over(stream)
                        self._deliver(stream, None, stream.in_flags, stream.in_total)
                    continue
                self.land = stream.in_block.data + take
                self.land_left = length
                self.land_stream = stream
                self.land_block = stream.in_block
                take = min(length, avail - HEADER_BYTES)
                if take:
                    memcpy(self.land, self.rbuf + self.rpos, take)
                    self.rpos += take
                    self.land += take
                    self.land_left -= take
                if self.land_left:
                    break
                self.finish_landing()
                continue
            if length > SMALL_LIMIT:
                self.fail(f"a {FRAME_TYPES.get(type_, type_)} frame of {length} bytes (allowed: {SMALL_LIMIT})")
            if avail < HEADER_BYTES + length:
                break
            self.rpos += HEADER_BYTES + length
            self.rx_frames += 1
            self.dispatch(p, length)
        return 0

    def _check_preface(self, bytes head):
        if head[:4] != b"DYNW"[: len(head)]:
            theirs = describe_foreign(head)
            raise PlaneMismatch(
                f"{self.peer or 'the peer'} speaks {theirs}, but this is the dynwire tcp plane (dynwire/{WIRE_MAJOR}); "
                "both sides need the same DYN_REQUEST_PLANE",
                ours=f"tcp (dynwire/{WIRE_MAJOR})",
                theirs=theirs,
                peer=self.peer,
                details={"head": head[:64].decode("latin-1")},
            )
        if len(head) > 4 and head[4] != WIRE_MAJOR:
            raise PlaneMismatch(
                f"{self.peer or 'the peer'} speaks version {head[4]} of the dynwire wire, this side version {WIRE_MAJOR}; "
                "install the same major version of dynwire on both sides",
                ours=f"dynwire/{WIRE_MAJOR}",
                theirs=f"dynwire/{head[4]}",
                peer=self.peer,
            )

    cdef bint _parse_preface(self, unsigned char *p, size_t avail) except -1:
        if avail:
            self._check_preface(PyBytes_FromStringAndSize(<char *>p, min(avail, 64)))
        if avail < PREFACE_BYTES:
            return False
        self.rpos += PREFACE_BYTES
        self.preface_done = True
        return True

    cdef int _assembly_over(self, StreamBase stream) except -1:
        stream.state &= ~S_ASSEMBLING
        stream.in_block = None
        self.assembling -= 1
        return 0

    cdef int finish_landing(self) except -1:
        """The current fragment is complete; deliver the payload if it was the last one."""
        cdef StreamBase stream = self.land_stream
        cdef Block block
        cdef Payload payload
        self.land_stream = None
        self.land_block = None
        self.land = NULL
        if stream.in_have < stream.in_total or not stream.state & S_ASSEMBLING:
            return 0
        block = stream.in_block
        self._assembly_over(stream)
        self.expect_large = True
        if block is None:
            return 0
        payload = payload_of_block(block, stream.in_total)
        block = None
        if self.is_client:
            return self._deliver(stream, payload, stream.in_flags, stream.in_total)
        target, stream.in_target = stream.in_target, None
        return self.on_request(stream, target, payload, stream.in_flags & F_KIND, stream.in_meta, stream.in_arg)

    cdef int _deliver(self, StreamBase stream, object item, int flags, uint32_t size) except -1:
        """(client) A complete item has arrived."""
        cdef bint last = (flags & F_LAST) != 0
        if stream.state & S_ZOMBIE:
            self.consumed(None, size + ITEM_OVERHEAD)
            if last:
                self.free_slot(stream)
            return 0
        if last:
            stream.state |= S_ENDED
            self.free_slot(stream)
        if not stream.keeps_items:
            self.consumed(stream, size + ITEM_OVERHEAD)
        return stream.on_item(item, flags & F_KIND, last)

    cdef int dispatch(self, unsigned char *p, uint32_t length) except -1:
        """One complete frame other than CONT."""
        cdef uint8_t type_ = p[4]
        cdef uint8_t flags = p[5]
        cdef uint32_t sid = dw_ld32(p + 8)
        cdef uint32_t arg = dw_ld32(p + 12)
        cdef unsigned char *body = p + HEADER_BYTES
        cdef StreamBase stream
        cdef object item
        cdef int kind
        if not self.ready:
            if type_ == T_HELLO:
                return self._hello(body, length)
            if type_ == T_GOAWAY and self.is_client:
                return self.on_goaway(dw_ld16(p + 6), arg, _text(body, length))
            self.fail(f"a {FRAME_TYPES.get(type_, type_)} frame before HELLO")
        if type_ == T_DATA and self.is_client:
            stream = self.get_slot(sid)
            if stream is None or stream.state & S_ASSEMBLING:
                self.fail(f"DATA on stream {sid}, which is not open for it")
            if self.recv_credit <= 0 or stream.cost <= 0:
                self.fail(f"an item on stream {sid} beyond the granted credit")
            if (flags & F_KIND) == 3:
                self.fail("an item of kind 3")
            if flags & F_FRAGMENTED:
                if length != 4:
                    self.fail("an announcement whose body is not 4 bytes")
                length = dw_ld32(body)
                self._announce(stream, length, flags)
                self.recv_credit -= <int64_t>length + ITEM_OVERHEAD
                stream.cost -= <int64_t>length + ITEM_OVERHEAD
                return 0
            if length > self.max_message:
                self.fail(f"an item of {length} bytes; this side announced a limit of {self.max_message}")
            self.recv_credit -= length + ITEM_OVERHEAD
            stream.cost -= length + ITEM_OVERHEAD
            if stream.state & S_ZOMBIE:
                return self._deliver(stream, None, flags, length)
            kind = flags & F_KIND
            if kind == 0:
                item = payload_copy(body, length)
            else:
                item = PyBytes_FromStringAndSize(<char *>body, length)
            return self._deliver(stream, item, flags, length)
        if type_ == T_REQUEST and not self.is_client:
            return self._request(p, length)
        if type_ == T_WINDOW:
            return self._window(sid, arg)
        if type_ == T_END or type_ == T_ERROR or type_ == T_ACCEPT:
            if not self.is_client:
                self.fail(f"a {FRAME_TYPES[type_]} frame from a client")
            stream = self.get_slot(sid)
            if stream is None:
                if self.draining:
                    return 0  # a refusal of a request that crossed the GOAWAY, which had told as much
                self.fail(f"{FRAME_TYPES[type_]} on stream {sid}, which is not open")
            if type_ == T_END and stream.state & S_ASSEMBLING and not stream.state & S_ZOMBIE:
                self.fail(f"END on stream {sid} within an item of {stream.in_total} bytes")
            if type_ == T_ACCEPT:
                stream.state |= S_ACCEPTED
                if not stream.state & S_ZOMBIE:
                    stream.on_accept()
                return 0
            if stream.state & S_ASSEMBLING:
                self._assembly_over(stream)
                self.consumed(None, <int64_t>stream.in_total + ITEM_OVERHEAD)
            zombie = stream.state & S_ZOMBIE
            stream.state |= S_ENDED
            self.drop_large(stream)
            self.free_slot(stream)
            if zombie:
                return 0
            if type_ == T_END:
                return stream.on_end()
            return stream.on_error(dw_ld16(p + 6), PyBytes_FromStringAndSize(<char *>body, length))
        if type_ == T_CANCEL:
            if self.is_client:
                self.fail("a CANCEL frame from a server")
            kind = dw_ld16(p + 6)
            if kind != 1 and kind != 2:
                self.fail(f"a CANCEL frame of kind {kind}")
            stream = self.get_slot(sid)
            if stream is None:
                return 0  # it had ended when this was on its way
            if stream.state & S_ASSEMBLING:
                if kind == 1:
                    stream.state |= S_STOP_EARLY
                    return stream.on_stop_early()
                if kind == 2:
                    self._assembly_over(stream)
                    stream.in_target = None
                    self.put_error(stream, 0, _CANCELLED_EARLY)
                    self.request_done(stream)
                    self.wrote()
                return 0
            return stream.on_cancel(kind)
        if type_ == T_PING:
            if self.output_backlog() > _UNREAD_LIMIT:
                self.fail(f"{self.output_backlog()} bytes of answers wait because it does not read them, and it asks on")
            self.put_frame(T_PONG, 0, 0, sid, arg, NULL, 0)
            return self.wrote()
        if type_ == T_PONG:
            if sid & _MARK:
                # Answers can come late, when more was already counted as read.
                self.large_acked = max(self.large_acked, (<uint64_t>(sid & ~_MARK) << 32) | arg)
                return self.wrote()
            return self.on_pong(sid, arg)
        if type_ == T_GOAWAY:
            self.draining = True
            return self.on_goaway(dw_ld16(p + 6), arg, _text(body, length))
        if type_ >= T_OPTIONAL:
            return 0
        self.fail(f"an unexpected frame of type {FRAME_TYPES.get(type_, type_)}")

    cdef int _hello(self, unsigned char *body, uint32_t length) except -1:
        if length > HELLO_LIMIT:
            self.fail(f"a HELLO of {length} bytes (allowed: {HELLO_LIMIT})")
        try:
            hello = _hello_decoder.decode(PyBytes_FromStringAndSize(<char *>body, length))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(
                f"{self.peer or 'the peer'} sent a HELLO that does not decode: {error}", peer=self.peer, offset=self.rx_bytes
            ) from error
        if not (
            0 < hello.max_message < 1 << 32
            and 0 < hello.max_streams <= 1 << 24
            and 0 < hello.stream_window <= 1 << 40
            and 0 < hello.connection_window <= 1 << 40
            and 0 <= hello.accept_timeout_ms < 1 << 32
            and len(hello.id) in (0, 8)
        ):
            self.fail("a HELLO with a limit outside the allowed range")
        self.peer_max_message = hello.max_message
        self.peer_stream_window = hello.stream_window
        self.peer_connection_window = hello.connection_window
        self.send_credit = hello.connection_window
        if self.is_client:
            self.max_streams = hello.max_streams
        else:
            self.connection_id = hello.id or b"\0" * 8
        self.ready = True
        return self.on_hello(msgspec.structs.asdict(hello))

    cdef int _announce(self, StreamBase stream, uint32_t total, uint8_t flags) except -1:
        """The payload of ``total`` bytes follows in CONT frames."""
        if total > self.max_message:
            self.fail(f"a payload of {total} bytes; this side announced a limit of {self.max_message}")
        if total < FRAGMENT_FROM:
            # Such a payload has no reason to be fragmented, and each takes a block of at least that size from the pool.
            what = f"{total} bytes, fewer than {FRAGMENT_FROM}" if total else "an empty payload"
            self.fail(f"an announcement of {what}")
        stream.in_total = total
        stream.in_have = 0
        stream.in_flags = flags
        stream.state |= S_ASSEMBLING
        self.assembling += 1
        if not stream.state & S_ZOMBIE:
            stream.in_block = default_pool.take(total)
        return 0

    cdef int _request(self, unsigned char *p, uint32_t length) except -1:
        cdef uint8_t flags = p[5]
        cdef uint16_t endpoint = dw_ld16(p + 6)
        cdef uint32_t sid = dw_ld32(p + 8)
        cdef uint32_t arg = dw_ld32(p + 12)
        cdef unsigned char *body = p + HEADER_BYTES
        cdef uint32_t left = length
        cdef uint32_t n, total
        cdef StreamBase stream
        cdef object target, payload
        cdef bytes meta = None
        if flags & F_NAMED:
            if left < 2 or dw_ld16(body) > left - 2 or dw_ld16(body) == 0 or dw_ld16(body) > NAME_LIMIT:
                self.fail("a REQUEST with a malformed endpoint name")
            n = dw_ld16(body)
            if endpoint != len(self.interned) or endpoint >= ENDPOINTS_LIMIT:
                self.fail(f"endpoint number {endpoint} out of turn (next: {len(self.interned)}, limit: {ENDPOINTS_LIMIT})")
            try:
                name = PyBytes_FromStringAndSize(<char *>body + 2, n).decode("utf-8")
            except UnicodeDecodeError:
                self.fail("an endpoint name that is not UTF-8")
            self.interned.append(self.resolve(name))
            body += 2 + n
            left -= 2 + n
        if endpoint >= len(self.interned):
            self.fail(f"endpoint number {endpoint}, which was never named")
        target = self.interned[endpoint]
        if type(target) is str:  # was not served when it was named; it may be now
            target = self.resolve(target)
            self.interned[endpoint] = target
        if flags & F_META:
            if left < 4 or dw_ld32(body) > left - 4 or dw_ld32(body) > META_LIMIT:
                self.fail("a REQUEST with malformed metadata")
            n = dw_ld32(body)
            meta = PyBytes_FromStringAndSize(<char *>body + 4, n)
            body += 4 + n
            left -= 4 + n
        if (flags & F_KIND) == 3:
            self.fail("a REQUEST of kind 3")
        if sid >= self.max_streams:
            self.fail(f"stream {sid}; this side announced at most {self.max_streams} streams")
        if self.get_slot(sid) is not None:
            self.fail(f"a REQUEST on stream {sid}, which is in use")
        if self.recv_credit <= 0:
            self.fail("a REQUEST beyond the granted credit")
        total = left
        if flags & F_FRAGMENTED:
            if left != 4:
                self.fail("an announcement whose body is not 4 bytes")
            total = dw_ld32(body)
        if total > self.max_message:
            self.fail(f"a request of {total} bytes; this side announced a limit of {self.max_message}")
        stream = self.make_stream()
        self.put_slot(stream, sid)
        self.seq += 1
        stream.seq = self.seq
        stream.send_credit = self.peer_stream_window
        stream.cost = <int64_t>total + ITEM_OVERHEAD
        self.recv_credit -= stream.cost
        if flags & F_FRAGMENTED:
            self._announce(stream, total, flags)
            stream.in_target = target
            stream.in_meta = meta
            stream.in_arg = arg
            self.arm(stream, self.now + (arg * 0.001 if arg else _UPLOAD_S))
            return 0
        if flags & F_KIND:
            payload = PyBytes_FromStringAndSize(<char *>body, left)
        else:
            payload = payload_copy(body, left)
        return self.on_request(stream, target, payload, flags & F_KIND, meta, arg)

    cdef int _window(self, uint32_t sid, uint32_t increment) except -1:
        cdef StreamBase stream
        if sid == CONNECTION_WINDOW_ID:
            self.send_credit += increment
            if self.send_credit > _CREDIT_LIMIT:
                self.fail("more connection credit than 2^40 bytes")
            if self.send_credit > 0:
                while self.waiting_credit and self.send_credit > 0:
                    stream = self.waiting_credit.popleft()
                    stream.state &= ~S_QUEUED
                    if stream.conn is self:
                        stream.on_credit()
                self.on_slot_free()
            return 0
        if self.is_client:
            self.fail("a WINDOW frame for a stream from a server")
        stream = self.get_slot(sid)
        if stream is None:
            return 0  # it had ended when this was on its way
        stream.send_credit += increment
        if stream.send_credit > _CREDIT_LIMIT:
            self.fail("more stream credit than 2^40 bytes")
        return stream.on_credit()

    # ---- sending -------------------------------------------------------------------------------------------------------

    def start(self, *, str software, bytes connection_id=b"", token=None, accept_timeout_ms=10000):
        """Queue preface and HELLO. A server calls this after the client's preface was seen to be right."""
        if self.is_client:
            self.connection_id = connection_id
        hello = _pack(Hello(
            software=software, max_message=self.max_message, max_streams=self.max_streams, stream_window=self.stream_window,
            connection_window=self.connection_window, id=connection_id, token=token, accept_timeout_ms=accept_timeout_ms,
            codecs=["raw", "msgpack", "json"],
        ))  # fmt: skip
        cdef unsigned char *p = self.reserve(PREFACE_BYTES)
        memcpy(p, PyBytes_AS_STRING(_PREFACE), PREFACE_BYTES)
        self.oend += PREFACE_BYTES
        self.put_frame(T_HELLO, 0, 0, 0, 0, <const unsigned char *>PyBytes_AS_STRING(hello), PyBytes_GET_SIZE(hello))

    cdef unsigned char *reserve(self, size_t n) except NULL:
        cdef size_t cap
        cdef unsigned char *p
        if self.oend + n > self.ocap:
            cap = max(self.ocap * 2, <size_t>4096)
            while cap < self.oend + n:
                cap *= 2
            p = <unsigned char *>realloc(self.obuf, cap)
            if p is NULL:
                raise MemoryError()
            self.obuf = p
            self.ocap = cap
        return self.obuf + self.oend

    cdef int put_frame(self, uint8_t type, uint8_t flags, uint16_t aux, uint32_t sid, uint32_t arg,
                       const unsigned char *body, size_t n) except -1:
        cdef unsigned char *p = self.reserve(HEADER_BYTES + n)
        dw_header(p, <uint32_t>n, type, flags, aux, sid, arg)
        if n:
            memcpy(p + HEADER_BYTES, body, n)
        self.oend += HEADER_BYTES + n
        self.tx_frames += 1
        return 0

    cdef int add_large(self, StreamBase stream, object owner) except -1:
        cdef LargeSend large = LargeSend.__new__(LargeSend)
        PyObject_GetBuffer(owner, &large.view, PyBUF_SIMPLE)
        large.held = True
        large.stream = stream
        large.sid = stream.sid
        stream.state |= S_SENDING
        self.large.append(large)
        return 0

    cdef int put_request(self, StreamBase stream, uint16_t endpoint, bytes name, const unsigned char *p, size_t n, object owner,
                         int kind, bytes meta, uint32_t timeout_ms) except -1:
        """(client) The stream has a slot. Payloads from FRAGMENT_FROM on are sent from ``owner``'s memory."""
        cdef uint8_t flags = kind
        cdef size_t size = HEADER_BYTES
        cdef size_t meta_len = 0
        cdef unsigned char *out
        if name is not None:
            flags |= F_NAMED
            size += 2 + PyBytes_GET_SIZE(name)
        if meta is not None:
            flags |= F_META
            meta_len = PyBytes_GET_SIZE(meta)
            size += 4 + meta_len
        if n >= FRAGMENT_FROM:
            flags |= F_FRAGMENTED
            size += 4
        else:
            size += n
        out = self.reserve(size)
        dw_header(out, <uint32_t>(size - HEADER_BYTES), T_REQUEST, flags, endpoint, stream.sid, timeout_ms)
        out += HEADER_BYTES
        if name is not None:
            dw_st16(out, <uint16_t>PyBytes_GET_SIZE(name))
            memcpy(out + 2, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
            out += 2 + PyBytes_GET_SIZE(name)
        if meta is not None:
            dw_st32(out, <uint32_t>meta_len)
            memcpy(out + 4, PyBytes_AS_STRING(meta), meta_len)
            out += 4 + meta_len
        if flags & F_FRAGMENTED:
            self.add_large(stream, owner)
            dw_st32(out, <uint32_t>n)
        else:
            self.small_until = self.now + _SMALL_S
            if n:
                memcpy(out, p, n)
        stream.mark = self.tx_frames_bytes + self.output_backlog()
        self.oend += size
        self.tx_frames += 1
        self.seq += 1
        stream.seq = self.seq
        stream.state |= S_WRITTEN
        stream.cost = self.stream_window
        self.send_credit -= <int64_t>n + ITEM_OVERHEAD
        return 0

    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1:
        """(server) The caller has seen that connection and stream have credit and that no large item of the stream is leaving."""
        cdef uint8_t flags = kind | (F_LAST if last else 0)
        cdef unsigned char size[4]
        self.send_credit -= <int64_t>n + ITEM_OVERHEAD
        stream.send_credit -= <int64_t>n + ITEM_OVERHEAD
        if last:
            stream.state |= S_ENDED
        if n >= FRAGMENT_FROM:
            self.add_large(stream, owner)
            dw_st32(size, <uint32_t>n)
            return self.put_frame(T_DATA, flags | F_FRAGMENTED, 0, stream.sid, 0, size, 4)
        self.small_until = self.now + _SMALL_S
        return self.put_frame(T_DATA, flags, 0, stream.sid, 0, p, n)

    cdef int put_end(self, StreamBase stream) except -1:
        stream.state |= S_ENDED
        return self.put_frame(T_END, 0, 0, stream.sid, 0, NULL, 0)

    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1:
        stream.state |= S_ENDED
        self.drop_large(stream)
        return self.put_frame(T_ERROR, 0, <uint16_t>code, stream.sid, 0, <const unsigned char *>PyBytes_AS_STRING(body),
                              PyBytes_GET_SIZE(body))

    cdef int put_cancel(self, StreamBase stream, int kind) except -1:
        return self.put_frame(T_CANCEL, 0, <uint16_t>kind, stream.sid, 0, NULL, 0)

    cdef int put_goaway(self, int code, str text) except -1:
        cdef bytes body = text.encode("utf-8", "replace")[:1024]
        self.draining = True
        self.goaway_seq = self.seq
        return self.put_frame(T_GOAWAY, 0, <uint16_t>code, 0, self.seq, <const unsigned char *>PyBytes_AS_STRING(body),
                              PyBytes_GET_SIZE(body))

    cdef int consumed(self, StreamBase stream, int64_t cost) except -1:
        """(client) The application has taken items of this cost; grant the peer as much again, in halves of the window."""
        cdef uint32_t grant
        self.refund += cost
        if self.refund * 2 >= self.connection_window:
            grant = <uint32_t>min(self.refund, <int64_t>0x7FFFFFFF)
            self.put_frame(T_WINDOW, 0, 0, CONNECTION_WINDOW_ID, grant, NULL, 0)
            self.recv_credit += grant
            self.refund -= grant
            self.wrote()
        if stream is not None and not stream.state & (S_ENDED | S_ZOMBIE):
            stream.refund += cost
            if stream.refund * 2 >= self.stream_window:
                grant = <uint32_t>min(stream.refund, <int64_t>0x7FFFFFFF)
                self.put_frame(T_WINDOW, 0, 0, stream.sid, grant, NULL, 0)
                stream.cost += grant
                stream.refund -= grant
                self.wrote()
        return 0

    cdef int request_done(self, StreamBase stream) except -1:
        """(server) The last frame of the stream is queued: its slot is free for the client, its request's memory is refunded."""
        if not self.free_slot(stream):
            return 0  # it was done already
        stream.on_freed()
        return self.consumed(None, stream.cost)

    cdef void drop_large(self, StreamBase stream):
        """Stop sending the stream's large payload. A fragment that has begun is finished: the peer counts on its length."""
        if stream.state & S_SENDING:
            stream.state &= ~S_SENDING
            for item in self.large:
                if (<LargeSend>item).stream is stream:
                    (<LargeSend>item).dropped = True
                    (<LargeSend>item).stream = None
                    self.large.remove(item)
                    break

    cdef bint has_output(self):
        return self.oend > 0 or self.wpos < self.wend or self.cur is not None or (
            len(self.large) > 0 and not self.large_must_wait()
        )

    cdef size_t output_backlog(self):
        """Bytes in the buffers for frames; large payloads in their owners' memory do not count."""
        return self.oend + self.wend - self.wpos

    cdef uint64_t handed_upto(self):
        return self.tx_frames_bytes + (self.wend - self.wpos)

    cdef bint one_piece(self):
        return self.land_left == 0 and self.assembling == 0 and self.cur is None and self.wpos == self.wend and not self.large

    cdef int gather(self, dw_chunk *chunks, size_t limit):
        """Fill in what to write next, about ``limit`` bytes of large payloads included; returns the number of chunks.

        Order: the rest of a fragment that was cut short, then every frame that is queued, then fragments of large payloads in
        turn. So a small call overtakes large ones after at most one fragment. Memory stays put until `sent` or the next `gather`.
        """
        cdef int n = 0
        cdef size_t total = 0
        cdef size_t done, size
        cdef size_t fragment = FRAGMENT_BYTES
        cdef LargeSend large
        cdef unsigned char *swap
        cdef size_t swap_cap
        if self.cur is not None:
            done = self.cur_done
            if done < HEADER_BYTES:
                chunks[n].base = self.cur_header + done
                chunks[n].len = HEADER_BYTES - done
                n += 1
                done = HEADER_BYTES
            chunks[n].base = <unsigned char *>self.cur.view.buf + self.cur.offset + (done - HEADER_BYTES)
            chunks[n].len = self.cur_len - done
            total += chunks[n].len
            n += 1
        if self.wpos == self.wend and self.oend:
            swap = self.wbuf
            swap_cap = self.wcap
            self.wbuf = self.obuf
            self.wcap = self.ocap
            self.wpos = 0
            self.wend = self.oend
            self.obuf = swap
            self.ocap = swap_cap
            self.oend = 0
        if self.wpos < self.wend:
            chunks[n].base = self.wbuf + self.wpos
            chunks[n].len = self.wend - self.wpos
            n += 1
        # A fragment may not overtake its announcement, which could be among the frames that are not being written yet.
        if self.cur is None and self.oend == 0 and len(self.large) and not self.large_must_wait():
            if self.now < self.small_until:
                fragment = POLITE_FRAGMENT_BYTES
            large = <LargeSend>self.large[0]
            size = min(<size_t>large.view.len - large.offset, fragment)
            dw_header(self.cur_header, <uint32_t>size, T_CONT, 0, 0, large.sid, 0)
            self.cur = large
            self.cur_len = HEADER_BYTES + size
            self.cur_done = 0
            chunks[n].base = self.cur_header
            chunks[n].len = HEADER_BYTES
            chunks[n + 1].base = <unsigned char *>large.view.buf + large.offset
            chunks[n + 1].len = size
            n += 2
            self.cur_after = True
        else:
            self.cur_after = False
        return n

    cdef bint large_must_wait(self):
        """While small messages use the connection too, large payloads keep the queue between the two programs short.

        What is in the socket buffers cannot be overtaken any more, and with large payloads that is megabytes.
        """
        return self.now < self.small_until and self.large_sent - self.large_acked >= POLITE_IN_FLIGHT

    cdef int sent(self, size_t n) except -1:
        """The first ``n`` bytes of what `gather` named were written."""
        cdef size_t take
        if self.cur is not None and not self.cur_after:
            n = self._sent_fragment(n)
        take = min(n, self.wend - self.wpos)
        self.wpos += take
        self.tx_frames_bytes += take
        n -= take
        if self.wpos == self.wend and self.wcap > 262144:
            free(self.wbuf)  # a burst should not keep its peak for the life of the connection
            self.wbuf = NULL
            self.wcap = self.wpos = self.wend = 0
        if self.cur is not None and self.cur_after:
            if n == 0:
                self.cur = None  # untouched: choose again next time
            else:
                self._sent_fragment(n)
        return 0

    cdef size_t _sent_fragment(self, size_t n) except? 0:
        """Count ``n`` bytes towards the current fragment; returns what is left over."""
        cdef LargeSend large = self.cur
        cdef StreamBase stream
        cdef size_t take = min(n, self.cur_len - self.cur_done)
        self.cur_done += take
        if self.cur_done < self.cur_len:
            return n - take
        self.cur = None
        self.tx_frames += 1
        large.offset += self.cur_len - HEADER_BYTES
        self.large_sent += self.cur_len - HEADER_BYTES
        self.last_tx = self.now
        if self.now < self.small_until:
            self.put_frame(T_PING, 0, 0, _MARK | <uint32_t>(self.large_sent >> 32), <uint32_t>self.large_sent, NULL, 0)
        else:
            self.large_acked = self.large_sent
        if large.dropped:
            return n - take
        if large.offset == <size_t>large.view.len:
            self.large.popleft() if self.large[0] is large else self.large.remove(large)
            stream = large.stream
            large.stream = None
            PyBuffer_Release(&large.view)
            large.held = False
            stream.state &= ~S_SENDING
            stream.on_sent()
        elif len(self.large) > 1 and self.large[0] is large:
            self.large.rotate(-1)
        return n - take

    def stats(self):
        """Counters of the connection, for diagnostics and tests."""
        return {
            "peer": self.peer, "streams": self.live, "rx_bytes": self.rx_bytes, "landed_bytes": self.landed_bytes,
            "rx_frames": self.rx_frames, "tx_frames": self.tx_frames, "backlog": self.output_backlog(), "draining": self.draining,
        }  # fmt: skip

    # ---- requests (client) -----------------------------------------------------------------------------------------------

    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                          double now) except -1:
        cdef bytes name = None
        cdef uint32_t timeout_ms = 0
        cdef double left
        cdef Py_buffer view
        cdef const unsigned char *p
        cdef Py_ssize_t size
        cdef bint held = False
        number = self.endpoint_numbers.get(endpoint)
        if number is None:
            number = len(self.endpoint_numbers)
            if number >= ENDPOINTS_LIMIT:
                raise self.overloaded(number, f"{number} endpoints are in use on the connection to {self.peer}")
            name = endpoint.encode()
        if deadline != INFINITY:
            left = (deadline - now) * 1000.0
            timeout_ms = 0 if left >= 4294967295.0 else <uint32_t>max(left, 0.0) + 1
        if type(data) is bytes:
            p = <const unsigned char *>PyBytes_AS_STRING(data)
            size = PyBytes_GET_SIZE(data)
        else:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            held = True
            p = <const unsigned char *>view.buf
            size = view.len
        try:
            self.take_slot(stream)
            if self.live == 1:
                self.live_since = now
                self.ping_at = now + self.keepalive_interval
            self.put_request(stream, number, name, p, size, data, kind, meta, timeout_ms)
            if name is not None:
                self.endpoint_numbers[endpoint] = number
        finally:
            if held:
                PyBuffer_Release(&view)
        self.on_request_sent(stream)
        self.arm(stream, due)
        return 0

    cdef int refuse_streams(self, uint32_t last_seq, object error) except -1:
        cdef StreamBase stream
        for stream in list(self.slots):
            # Serial arithmetic: sequence numbers wrap after 2^32 requests.
            if stream is not None and <int32_t>(stream.seq - last_seq) > 0:
                zombie = stream.state & S_ZOMBIE
                stream.state = (stream.state & ~S_WRITTEN) | S_ENDED
                self.drop_large(stream)
                self.free_slot(stream)
                if not zombie:
                    stream.on_lost(error)
        return 0

    cdef bint may_request(self):
        return self.send_credit > 0 and (self.free_len > 0 or self.live < self.max_streams)

    cdef int large_waiting(self):
        return len(self.large)

    cdef int farewell(self, str text) except -1:
        if self.preface_done and self.ready:
            self.put_goaway(1, text)
        return 0

    cdef int put_ping(self) except -1:
        return self.put_frame(T_PING, 0, 0, 0, 0, NULL, 0)

    cdef int put_accept(self, StreamBase stream) except -1:
        return self.put_frame(T_ACCEPT, 0, 0, stream.sid, 0, NULL, 0)

    cdef bint may_send(self, StreamBase stream) except -1:
        if stream.state & S_SENDING or stream.send_credit <= 0:
            return False
        if self.send_credit <= 0:
            waiting = self.waiting_credit
        elif self.congested or self.output_backlog() > PRODUCE_LIMIT:
            self.congested = True
            waiting = self.waiting_writer
        else:
            return True
        if not stream.state & S_QUEUED:
            stream.state |= S_QUEUED
            waiting.append(stream)
        return False

    # ---- streams -------------------------------------------------------------------------------------------------------

    cdef int free_slot(self, StreamBase stream) except -1:
        if stream.conn is not self:
            return 0
        if stream.state & S_ASSEMBLING:
            self._assembly_over(stream)
        if self.land_stream is stream and not self.is_client:
            # Given up within a fragment. (A blocking client may be reading into that memory at this moment; servers never are.)
            self.skip_left = self.land_left
            self.land_left = 0
            self.land = NULL
            self.land_stream = None
            self.land_block = None
        return Link.free_slot(self, stream)

    cdef int abandon(self, StreamBase stream, int kind) except -1:
        """(client) Nobody waits for the stream any more: cancel it and swallow what still comes."""
        if stream.state & (S_ZOMBIE | S_ENDED):
            return 0
        stream.state |= S_ZOMBIE
        stream.timer = INFINITY
        if stream.state & S_ASSEMBLING and self.land_stream is not stream:
            stream.in_block = None
        self.drop_large(stream)
        self.put_cancel(stream, kind)
        return self.wrote()

    cdef list take_all_streams(self):
        cdef list out = Link.take_all_streams(self)
        self.assembling = 0
        self.large.clear()
        self.interned.clear()
        return out


cdef str _text(const unsigned char *p, size_t n):
    return PyBytes_FromStringAndSize(<char *>p, min(n, <size_t>1024)).decode("utf-8", "replace")


cdef bytes _CANCELLED_EARLY = _pack({"c": "cancelled", "m": "killed before the request had arrived completely", "s": "no"})


# ---- Python face -------------------------------------------------------------------------------------------------------


cdef class EventStream(StreamBase):
    """A stream of an `EventConnection`. Its events are tuples ``(name, stream_id, …)``."""

    cdef readonly WireConnection owner

    cdef int on_item(self, object item, int kind, bint last) except -1:
        (<EventConnection>self.owner).events.append(("item", self.sid, bytes(item), kind, last))
        return 0

    cdef int on_end(self) except -1:
        (<EventConnection>self.owner).events.append(("end", self.sid))
        return 0

    cdef int on_error(self, int code, bytes body) except -1:
        (<EventConnection>self.owner).events.append(("error", self.sid, code, body))
        return 0

    cdef int on_accept(self) except -1:
        (<EventConnection>self.owner).events.append(("accept", self.sid))
        return 0

    cdef int on_cancel(self, int kind) except -1:
        (<EventConnection>self.owner).events.append(("cancel", self.sid, kind))
        return 0

    cdef int on_stop_early(self) except -1:
        (<EventConnection>self.owner).events.append(("cancel", self.sid, 1))
        return 0

    cdef int on_credit(self) except -1:
        (<EventConnection>self.owner).events.append(("credit", self.sid))
        return 0

    cdef int on_sent(self) except -1:
        (<EventConnection>self.owner).events.append(("sent", self.sid))
        return 0

    cdef int on_timer(self, double now) except -1:
        self.timer = INFINITY
        (<EventConnection>self.owner).events.append(("timer", self.sid, now))
        return 0

    @property
    def id(self):
        return self.sid

    @property
    def credit(self):
        """(server) bytes that may be sent before the next item has to wait; an item may start while it is positive."""
        return self.send_credit

    @property
    def sending(self):
        """True while a large item is leaving; the next one has to wait."""
        return bool(self.state & S_SENDING)


cdef class EventConnection(WireConnection):
    """The state machine with a Python face, for tests and tools.

    ``receive(data)`` returns events, ``output()`` the bytes to send. Events: ``("hello", dict)``,
    ``("request", stream_id, endpoint, payload, kind, meta, timeout_ms)``, ``("item", stream_id, bytes, kind, last)``,
    ``("end", id)``, ``("error", id, code, body)``, ``("accept", id)``, ``("cancel", id, kind)``, ``("credit", id)``,
    ``("sent", id)``, ``("timer", id, now)``, ``("goaway", code, last_seq, text)``, ``("pong", a, b)``.
    Bytes that break the protocol raise `ProtocolError` or `PlaneMismatch`.
    """

    cdef readonly list events
    cdef dict names
    cdef readonly object last_payload

    def __init__(self, bint is_client, **limits):
        super().__init__(is_client, **limits)
        self.events = []
        self.names = {}

    cdef int on_hello(self, dict hello) except -1:
        self.events.append(("hello", hello))
        return 0

    cdef StreamBase make_stream(self):
        cdef EventStream stream = EventStream.__new__(EventStream)
        stream.owner = self
        stream.keeps_items = True
        return stream

    cdef object resolve(self, str name):
        return (name,)

    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, object meta,
                        uint32_t timeout_ms) except -1:
        self.last_payload = payload
        self.events.append(("request", stream.sid, target[0], bytes(payload), kind, meta, timeout_ms))
        return 0

    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1:
        self.events.append(("goaway", code, last_seq, text))
        return 0

    cdef int on_pong(self, uint32_t a, uint32_t b) except -1:
        self.events.append(("pong", a, b))
        return 0

    def receive(self, data, double now=0.0):
        """Feed bytes (any cut); returns the list of events they complete."""
        cdef const unsigned char[::1] view
        cdef unsigned char *base
        cdef size_t size, done = 0
        if len(data):
            view = data
            while done < <size_t>view.shape[0] and not self.dead:
                self.recv_target(&base, &size)
                size = min(size, <size_t>view.shape[0] - done)
                memcpy(base, &view[done], size)
                done += size
                self.received(size, now)
        out = self.events
        self.events = []
        return out

    def target(self):
        """``(address, size)`` of where the next received bytes go: the payload's own memory in the middle of a large payload."""
        cdef unsigned char *base
        cdef size_t size
        self.recv_target(&base, &size)
        return <size_t>base, size

    def output(self, limit=None):
        """Take bytes to send: all, or what one write of about ``limit`` bytes would carry."""
        cdef dw_chunk chunks[MAX_CHUNKS]
        cdef int n, i
        cdef size_t total, room
        cdef list out = []
        while self.has_output():
            n = self.gather(chunks, 1048576)
            if n == 0:
                break
            total = 0
            room = 0xFFFFFFFF if limit is None else limit
            for i in range(n):
                size = min(chunks[i].len, room)
                if size:
                    out.append(PyBytes_FromStringAndSize(<char *>chunks[i].base, size))
                total += size
                room -= size
            self.sent(total)
            if limit is not None:
                break
        return b"".join(out)

    def request(self, str endpoint, payload=b"", *, int kind=0, meta=None, timeout_ms=0):
        """(client) Start a request; returns its stream id, or None when there is no free stream or no credit."""
        cdef EventStream stream = EventStream.__new__(EventStream)
        cdef const unsigned char[::1] view = payload if len(payload) else b"\0"
        stream.owner = self
        stream.keeps_items = True
        if self.send_credit <= 0 or not self.take_slot(stream):
            return None
        name = None
        if endpoint not in self.names:
            self.names[endpoint] = len(self.names)
            name = endpoint.encode()
        self.put_request(stream, self.names[endpoint], name, &view[0], len(payload), payload, kind, meta, timeout_ms)
        return stream.sid

    def _open_stream(self, uint32_t sid):
        stream = self.get_slot(sid)
        if stream is None:
            raise KeyError(f"stream {sid} is not open")
        return stream

    def stream(self, uint32_t sid):
        """The open stream with that id, or None."""
        return self.get_slot(sid)

    def send_item(self, uint32_t sid, payload, *, int kind=0, bint last=False):
        """(server) Send an item; returns False when credit is missing or a large item is still leaving."""
        cdef StreamBase stream = self._open_stream(sid)
        cdef const unsigned char[::1] view = payload if len(payload) else b"\0"
        if self.send_credit <= 0 or stream.send_credit <= 0 or stream.state & S_SENDING:
            return False
        self.put_item(stream, &view[0], len(payload), payload, kind, last)
        if last and not stream.state & S_SENDING:
            self.request_done(stream)
        return True

    def send_end(self, uint32_t sid):
        cdef StreamBase stream = self._open_stream(sid)
        self.put_end(stream)
        self.request_done(stream)

    def send_error(self, uint32_t sid, int code, bytes body):
        cdef StreamBase stream = self._open_stream(sid)
        self.put_error(stream, code, body)
        self.request_done(stream)

    def send_accept(self, uint32_t sid):
        self.put_frame(T_ACCEPT, 0, 0, sid, 0, NULL, 0)

    def send_ping(self, uint32_t a, uint32_t b):
        self.put_frame(T_PING, 0, 0, a, b, NULL, 0)

    def send_goaway(self, int code, str text):
        self.put_goaway(code, text)

    def finish(self, uint32_t sid):
        """(server) Free a stream whose last, large item has left (after its ``sent`` event)."""
        self.request_done(self._open_stream(sid))

    def cancel(self, uint32_t sid, int kind):
        """(client) 1: ask to stop, 2: kill and forget."""
        cdef StreamBase stream = self._open_stream(sid)
        if kind == 2:
            self.abandon(stream, kind)
        else:
            self.put_cancel(stream, kind)

    def take(self, sid, int64_t cost):
        """(client) The application has taken items of this cost (payload + overhead each)."""
        self.consumed(None if sid is None else self._open_stream(sid), cost)

    def set_timer(self, uint32_t sid, double when):
        self.arm(self._open_stream(sid), when)

    def on_time(self, double now):
        """Let timers fire; returns the events. ``next_timer`` is when to call again."""
        self.sweep(now)
        out = self.events
        self.events = []
        return out

    @property
    def next_timer(self):
        return self.min_timer

    @property
    def credit(self):
        """Bytes this side may send before it has to wait."""
        return self.send_credit

    @property
    def buffered(self):
        """Received bytes that wait for the rest of their frame."""
        return self.rend - self.rpos
