"""The nats plane's wire, without I/O: requests, items, errors, credit and signs of life as NATS messages.

docs/nats-wire.md specifies every byte. `NatsWire` is the state machine of one side: a client with all its requests to any number
of workers, or a server with all its callers. Messages come in through `receive` and go out through a `MessagePort`; a clock is
passed in (``now``). `EventWire` is the same machine with a Python face, for tests and tools.

NATS carries messages at most once and tells nobody when a peer is gone. So items are numbered, what was granted and what was sent
are totals that later messages repeat, and each side asks the other now and then which of its streams it knows.

Threads: one thread at a time, in the sense of the GIL.
"""

import base64
import hmac
import re

import msgspec
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport INFINITY
from libc.stdint cimport int32_t
from libc.string cimport memchr, memcmp, memcpy

from ._buffers cimport Block, payload_copy, payload_of_block
from ._link cimport (
    META_LIMIT,
    S_ACCEPTED,
    S_ENDED,
    S_PENDING,
    S_QUEUED,
    S_WRITTEN,
    S_ZOMBIE,
    Link,
    StreamBase,
    size_of,
)
from ._natsproto cimport PORT_CLOSED, PORT_UP

from .errors import (
    ConnectError,
    ManagerClosed,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    ProtocolError,
    Unauthenticated,
)
from .wire.faults import error_body

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>

    #define DW_NATS_NONE 0      /* headers without a D: line, or no headers */
    #define DW_NATS_FOUND 1
    #define DW_NATS_STATUS 2    /* a status of the NATS server, 503: nobody listens there */
    #define DW_NATS_BAD (-1)

    typedef struct { int kind; int count; uint64_t v[7]; } dw_nats_fields;

    /* One D: line, from behind the colon. Letter, then decimal numbers of at most 15 digits; what is none makes it a bad line,
       numbers beyond the seventh are for later versions. */
    static int dw_nats_line(const unsigned char *p, const unsigned char *end, dw_nats_fields *f) {
        f->count = 0;
        while (p < end && *p == ' ') p++;
        if (p == end || *p < 'a' || *p > 'z') return DW_NATS_BAD;
        f->kind = *p++;
        while (p < end) {
            uint64_t v = 0; int digits = 0;
            if (*p != ' ') return DW_NATS_BAD;
            while (p < end && *p == ' ') p++;
            if (p == end) break;
            while (p < end && *p != ' ') {
                if (*p < '0' || *p > '9' || ++digits > 15) return DW_NATS_BAD;
                v = v * 10 + (uint64_t)(*p++ - '0');
            }
            if (f->count < 7) f->v[f->count++] = v;
        }
        return DW_NATS_FOUND;
    }

    /* The D: line of a header block ("NATS/1.0", lines, an empty line). *others becomes the offset of the other lines, or 0
       if there are none. We write D: first; who adds headers on the way may put his before it. */
    static int dw_nats_parse(const unsigned char *h, size_t n, dw_nats_fields *f, size_t *others) {
        const unsigned char *p, *end, *eol;
        int found = DW_NATS_NONE, first = 1;
        *others = 0;
        f->kind = 0; f->count = 0;
        if (h == NULL || n == 0) return DW_NATS_NONE;
        if (n < 12 || memcmp(h, "NATS/1.0", 8) != 0) return DW_NATS_BAD;
        if (h[8] == ' ') {
            if (n >= 14 && h[9] >= '0' && h[9] <= '9' && h[10] >= '0' && h[10] <= '9' && h[11] >= '0' && h[11] <= '9') {
                f->kind = (h[9] - '0') * 100 + (h[10] - '0') * 10 + (h[11] - '0');
                return DW_NATS_STATUS;
            }
            return DW_NATS_BAD;
        }
        if (h[8] != '\\r' || h[9] != '\\n') return DW_NATS_BAD;
        end = h + n;
        for (p = h + 10; p < end; p = eol + 2) {
            eol = memchr(p, '\\r', (size_t)(end - p));
            if (eol == NULL || eol + 1 == end || eol[1] != '\\n') return DW_NATS_BAD;
            if (eol == p) return p + 2 == end ? found : DW_NATS_BAD;
            if (p + 2 <= eol && p[0] == 'D' && p[1] == ':' && found == DW_NATS_NONE) {
                found = dw_nats_line(p + 2, eol, f);
                if (found != DW_NATS_FOUND) return found;
                if (first) *others = (size_t)(eol + 2 - h);
            }
            else if (*others == 0) *others = 10;
            first = 0;
        }
        return DW_NATS_BAD;
    }
    /* Is there a line behind this offset? */
    static inline int dw_nats_more(size_t n, size_t at) { return at != 0 && at + 2 < n; }

    static inline int dw_nats_hex(const unsigned char *p, int n, uint32_t *out) {
        uint32_t v = 0; int i;
        for (i = 0; i < n; i++) {
            unsigned char c = p[i];
            if (c >= '0' && c <= '9') v = v << 4 | (uint32_t)(c - '0');
            else if (c >= 'a' && c <= 'f') v = v << 4 | (uint32_t)(c - 'a' + 10);
            else return 0;
        }
        *out = v;
        return 1;
    }
    static inline void dw_nats_put_hex(unsigned char *to, uint32_t v, int n) {
        while (n--) { to[n] = (unsigned char)"0123456789abcdef"[v & 15]; v >>= 4; }
    }
    static inline size_t dw_nats_put_dec(unsigned char *to, uint64_t v) {
        unsigned char scratch[20]; size_t n = 0, i;
        do { scratch[n++] = (unsigned char)('0' + v % 10); v /= 10; } while (v);
        for (i = 0; i < n; i++) to[i] = scratch[n - 1 - i];
        return n;
    }
    /* "NATS/1.0", a D: line with ``count`` numbers, and the empty line unless more lines follow. Returns the length. */
    static inline size_t dw_nats_head(unsigned char *to, char kind, const uint64_t *v, int count, int more) {
        size_t n = 14; int i;
        memcpy(to, "NATS/1.0\\r\\nD: ", 13);
        to[13] = (unsigned char)kind;
        for (i = 0; i < count; i++) { to[n++] = ' '; n += dw_nats_put_dec(to + n, v[i]); }
        memcpy(to + n, "\\r\\n\\r\\n", 4);
        return n + (more ? 2 : 4);
    }
    """
    enum:
        DW_NATS_NONE
        DW_NATS_FOUND
        DW_NATS_STATUS
        DW_NATS_BAD
    ctypedef struct dw_nats_fields:
        pass
    int dw_nats_parse(const unsigned char *h, size_t n, dw_nats_fields *f, size_t *others) noexcept nogil
    bint dw_nats_more(size_t n, size_t at) noexcept nogil
    bint dw_nats_hex(const unsigned char *p, int n, uint32_t *out) noexcept nogil
    void dw_nats_put_hex(unsigned char *to, uint32_t v, int n) noexcept nogil
    size_t dw_nats_put_dec(unsigned char *to, uint64_t v) noexcept nogil
    size_t dw_nats_head(unsigned char *to, char kind, const uint64_t *v, int count, int more) noexcept nogil

cdef int64_t _CREDIT_LIMIT = <int64_t>1 << 40
cdef double GRACE_S = 2.0        # after a connection came back, the peers' may still be on their way
cdef double RETRY_S = 0.1        # how soon they are asked again
NO_RESPONDERS = 503
LIMITS = {
    "token_bytes": TOKEN_BYTES,
    "item_overhead": ITEM_OVERHEAD,
    "item_room": ITEM_ROOM,
    "call_credit": CALL_CREDIT,
    "first_credit": FIRST_CREDIT,
    "meta_limit": META_LIMIT,
    "inbox_limit": INBOX_LIMIT,
    "probe_tokens": PROBE_TOKENS,
}
cdef object _pack = msgspec.msgpack.Encoder().encode
cdef object _unpack_meta = msgspec.msgpack.Decoder(dict[str, str]).decode
cdef object _error_text = msgspec.msgpack.Decoder().decode


# ---- headers of the caller's ---------------------------------------------------------------------------------------------------

# What a header line can carry as it is: the name a token (RFC 9110), the value without control characters and blanks at its ends.
cdef object _name_fits = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
cdef object _value_fits = re.compile(r"(?![ ])[^\x00-\x1f\x7f\ud800-\udfff]*(?<![ ])").fullmatch
cdef tuple _RESERVED = ("d", "dynwire-id", "dynwire-meta", "dynwire-token", "dynwire-inbox")
# Those with this beginning are orders to JetStream.
cdef str _SERVERS_OWN = "nats-"


cdef bytes header_lines(dict headers, object request_id, bytes token):
    """The header lines of a request behind D:, or None. Raises `MessageTooLarge`."""
    cdef list lines = []
    cdef dict rest = {}
    cdef bytes out
    if request_id is not None:
        if request_id and _value_fits(request_id):
            lines.append(f"Dynwire-Id: {request_id}\r\n")
        else:
            rest["x-request-id"] = request_id
    if headers:
        for name, value in headers.items():
            lower = name.lower()
            if _name_fits(name) and _value_fits(value) and lower not in _RESERVED and not lower.startswith(_SERVERS_OWN):
                lines.append(f"{name}: {value}\r\n")
            else:
                rest[name] = value
    if rest:
        lines.append(f"Dynwire-Meta: {base64.b64encode(_pack(rest)).decode()}\r\n")
    if token is not None:
        lines.append(f"Dynwire-Token: {token.decode()}\r\n")
    if not lines:
        return None
    out = "".join(lines).encode()
    if len(out) > META_LIMIT:
        raise MessageTooLarge(
            f"headers of {len(out)} bytes exceed the limit of {META_LIMIT} bytes per request",
            size=len(out), limit=META_LIMIT, setting="(fixed by the wire)",
        )  # fmt: skip
    return out


def write_headers(dict headers, request_id=None, token=None):
    """`header_lines` for tests and tools."""
    return header_lines(headers, request_id, token)


def read_headers(bytes lines):
    """``(headers, request id, token)`` of header lines; names in lower case. What is no header line is left out."""
    cdef dict headers = {}
    request_id = token = None
    for line in lines.decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        value = value.strip(" \t")
        if not colon or not name or name == "d" or name == "dynwire-inbox" or name.startswith(_SERVERS_OWN):
            continue
        if name == "dynwire-id":
            request_id = value
        elif name == "dynwire-token":
            token = value
        elif name == "dynwire-meta":
            try:
                headers.update(_unpack_meta(base64.b64decode(value, validate=True)))
            except (ValueError, msgspec.MsgspecError, RecursionError):
                continue  # not from dynwire
        else:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers, request_id, token


# ---- workers, as clients see them ----------------------------------------------------------------------------------------------


cdef class NatsPeer:
    """A worker: its address, and when it was last heard of. Clients keep one for each."""

    def __init__(self, str address):
        subject = address.removeprefix("nats:")
        if subject == address or not re.fullmatch(r"[A-Za-z0-9_.-]{1,900}", subject):
            raise PlaneMismatch(
                f"{address!r} is not an address of the nats plane (nats:subject); set DYN_REQUEST_PLANE to the same plane on "
                "both sides",
                ours="nats", theirs=address, peer=address,
            )  # fmt: skip
        self.address = address
        self.subject = subject.encode()
        self.control = self.subject + b"._"
        self.heard = -INFINITY
        self.waiters = []
        self.probed = -INFINITY
        self.asked = INFINITY
        self.lines = []

    @property
    def leaving(self):
        """True when it has said that it takes no more requests."""
        return self.state == P_LEAVING


cdef class NatsTarget:
    """One endpoint of a worker."""

    def __init__(self, NatsPeer peer, str endpoint, subject=None):
        self.peer = peer
        self.subject = peer.subject + b"." + endpoint.encode() if subject is None else subject


# ---- the machine ---------------------------------------------------------------------------------------------------------------


cdef class NatsWire(Link):
    """One side of the plane. See the module's docstring."""

    def __cinit__(self):
        self.item_overhead = ITEM_OVERHEAD
        self.tick_at = INFINITY
        self.up_at = -INFINITY
        self.probes = {}
        self.outbox = []
        self.peers = {}
        self.by_reply = {}
        self.targets = {}
        self.callers = {}
        # What was published may have arrived: take_all_streams() is not to think that it is still in a buffer of ours.
        self.handed_bytes = <uint64_t>-1

    def __init__(self, bint is_client, bytes subject not None, *, bytes queue_subject=b"", int64_t max_message=33554432,
                 int64_t max_payload=16777216, max_streams=16384, int64_t stream_window=262144, int64_t budget=33554432,
                 double probe_interval=0.5, int accept_ms=10000, token=None, bytes connection_id=b""):
        self.is_client = is_client
        self.subject = subject
        self.queue_subject = queue_subject
        self.max_message = max_message
        self.peer_max_message = max_message
        self.max_payload = max_payload
        self.max_streams = min(max_streams, SLOT_LIMIT)
        self.stream_window = max(stream_window, FIRST_CREDIT)
        self.budget = max(budget, FIRST_CREDIT)
        self.probe_interval = probe_interval
        self.accept_field = b" %d\r\n" % accept_ms
        self.token = None if token is None else token.encode()
        self.connection_id = connection_id

    cdef int on_peer(self, NatsPeer peer, object error) except -1:
        """(client) The worker answered, or (``error``) is not there."""
        return 0

    # ---- life of the connection ------------------------------------------------------------------------------------------

    cdef bint up(self):
        return self.port is not None and self.port.state == PORT_UP

    cdef int64_t item_limit(self):
        """The largest payload of an item."""
        return min(self.port.max_payload, self.max_payload) - ITEM_ROOM

    cdef int port_changed(self, double now) except -1:
        """The connection to the NATS server came, or went."""
        self.now = now
        if not self.up():
            self.came_back = True
            self.tick_at = INFINITY
            return 0
        if not self.is_client:
            self.peer_max_message = min(self.max_message, self.item_limit())
        self.up_at = now
        waiting, self.outbox = self.outbox, []
        for subject, reply, headers, body in waiting:
            # Perhaps another NATS server, which takes less. Only errors can be as long as that.
            self.put_bytes(subject, reply, headers, self.fitting(headers, body))
        # What was under way when the connection broke may be lost: find out.
        self.ask_all = True
        self.tick_seq = self.seq
        if self.live:
            self.tick_at = now
            self.tick(now)
        self.writable_again()
        if self.is_client and self.pending:
            self.send_pending()
        return self.wrote()

    cdef double next_wakeup(self):
        return min(self.min_timer, self.tick_at)

    cdef int time_passed(self, double now) except -1:
        self.now = now
        if self.min_timer <= now:
            self.sweep(now)
        if self.tick_at <= now:
            self.tick(now)
        return 0

    # ---- receiving -------------------------------------------------------------------------------------------------------

    cdef int receive(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                     const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                     object owner) except -1:
        """One message. `now` was set when the batch began."""
        if self.dead:
            return 0
        if self.is_client:
            return self.from_worker(subject, subject_n, reply, reply_n, headers, headers_n, payload, n, owner)
        return self.from_caller(subject, subject_n, reply, reply_n, headers, headers_n, payload, n, owner)

    cdef int from_worker(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                         const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                         object owner) except -1:
        cdef fields f
        cdef size_t others
        cdef int found
        cdef uint32_t slot, seq
        cdef StreamBase stream
        cdef NatsPeer peer
        cdef size_t prefix_n = PyBytes_GET_SIZE(self.subject)
        if subject_n != prefix_n + TOKEN_BYTES or not dw_nats_hex(subject + prefix_n, 6, &slot) or \
                not dw_nats_hex(subject + prefix_n + 6, 8, &seq):
            self.malformed += 1
            return 0
        found = dw_nats_parse(headers, headers_n, <dw_nats_fields *>&f, &others)
        if slot == SLOT_LIMIT:
            return self.own_message(seq, reply, reply_n, found, &f, payload, n)
        stream = self.get_slot(slot)
        if stream is None or stream.seq != seq:
            self.stale += 1
            return 0
        peer = (<NatsTarget>stream.under).peer
        if found == DW_NATS_STATUS:
            if f.kind == NO_RESPONDERS:
                return self.no_responders(stream)
            self.malformed += 1
            return 0
        if found != DW_NATS_FOUND:
            self.malformed += 1
            return self.lose(stream, ProtocolError(
                f"{peer.address} sent a message that is not of the dynwire nats plane", peer=peer.address, sent="maybe"
            ))  # fmt: skip
        peer.heard = self.now
        peer.patience = self.probe_interval
        if peer.state != P_ALIVE and peer.state != P_LEAVING:
            peer.state = P_ALIVE
        if reply_n and peer.control is None:
            peer.control = PyBytes_FromStringAndSize(<const char *>reply, reply_n)
        if f.kind == c"i":
            return self.item_came(stream, &f, payload, n, owner)
        if f.kind == c"a":
            if f.count > 0 and f.v[0] != stream.in_arg and not self.new_attempt(stream, <uint32_t>f.v[0]):
                return 0
            stream.state |= S_ACCEPTED
            return stream.on_accept()
        if f.kind == c"x":
            if f.count > 0 and f.v[0] != stream.in_arg and not self.new_attempt(stream, <uint32_t>f.v[0]):
                return 0
            stream.state |= S_ENDED
            self.free_slot(stream)
            return stream.on_error(0, PyBytes_FromStringAndSize(<const char *>payload, n))
        if f.kind == c"e":
            if f.count > 1 and f.v[1] != stream.in_arg and not self.new_attempt(stream, <uint32_t>f.v[1]):
                return 0
            if f.count < 1 or f.v[0] < stream.mark:
                self.malformed += 1
                return self.lose(stream, ProtocolError(
                    f"{peer.address} ended a stream before the items that it had sent", peer=peer.address, sent="yes"
                ))  # fmt: skip
            if f.v[0] > stream.mark:
                return self.lose(stream, self.hole(stream, f.v[0]))
            stream.state |= S_ENDED
            self.free_slot(stream)
            return stream.on_end()
        self.malformed += 1  # of a later version, perhaps
        return 0

    cdef int item_came(self, StreamBase stream, fields *f, const unsigned char *payload, size_t n, object owner) except -1:
        cdef bint last
        cdef object item
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        if f.count < 3 or f.v[1] > 2 or f.v[2] > 1:
            self.malformed += 1
            return self.lose(stream, ProtocolError(
                f"{peer.address} sent an item with malformed headers", peer=peer.address, sent="yes"
            ))  # fmt: skip
        if f.count > 3 and f.v[3] != stream.in_arg and not self.new_attempt(stream, <uint32_t>f.v[3]):
            return 0
        if f.v[0] != stream.mark:
            if f.v[0] < stream.mark:
                self.repeated += 1
                return 0
            return self.lose(stream, self.hole(stream, f.v[0]))
        if <int64_t>n > self.max_message:
            return self.lose(stream, MessageTooLarge(
                f"an item of {n} bytes from {peer.address} exceeds this side's limit of {self.max_message} bytes; raise "
                "DYN_TCP_MAX_MESSAGE_SIZE",
                size=n, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", peer=peer.address, phase="reply", sent="yes",
            ))  # fmt: skip
        stream.mark += 1
        last = f.v[2] != 0
        if f.v[1] == 0:
            item = payload_copy(payload, n) if owner is None else payload_of_block(<Block>owner, n)
        else:
            item = PyBytes_FromStringAndSize(<const char *>payload, n)
        if last:
            stream.state |= S_ENDED
            self.free_slot(stream)
        elif not stream.keeps_items:
            self.consumed(stream, <int64_t>n + ITEM_OVERHEAD)
        return stream.on_item(item, <int>f.v[1], last)

    def hole(self, StreamBase stream, index):
        """Items were published and have not arrived."""
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        self.gaps += 1
        return PeerLost(
            f"items of a stream from {peer.address} were lost on their way through the NATS server: {index - stream.mark} from "
            f"number {stream.mark} on (its connection to a client or worker broke, or a client was too slow for it)",
            peer=peer.address, sent="yes", details={"alive": True},
        )  # fmt: skip

    cdef bint new_attempt(self, StreamBase stream, uint32_t attempt) except -1:
        """Another delivery of the request than the one that answered so far. May its message count? If not, it is dropped."""
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        if attempt < stream.in_arg:
            self.stale += 1
            return False
        if stream.mark:
            self.lose(stream, PeerLost(
                f"the request was given to another worker after {stream.mark} items had come from {peer.address}",
                peer=peer.address, sent="yes",
            ))  # fmt: skip
            return False
        stream.in_arg = attempt
        return True

    cdef int no_responders(self, StreamBase stream) except -1:
        """The NATS server had nobody to give the request to: no handler has seen it."""
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        if stream.mark or stream.state & S_ACCEPTED:
            self.malformed += 1
            return 0
        stream.state = (stream.state & ~S_WRITTEN) | S_ENDED
        self.free_slot(stream)
        self.gone(peer)
        return stream.on_lost(self.nobody(peer))

    cdef int lose(self, StreamBase stream, object error) except -1:
        """(client) The stream cannot go on; its handler may still be at it."""
        if stream.conn is not self:
            return 0
        stream.state |= S_ENDED
        if error.sent == "yes":
            stream.state |= S_ACCEPTED  # what came shows that the worker had the request
        self.put_cancel(stream, 2)
        self.free_slot(stream)
        return stream.on_lost(error)

    cdef int own_message(self, uint32_t number, const unsigned char *reply, size_t reply_n, int found, fields *f,
                         const unsigned char *payload, size_t n) except -1:
        """(client) Not about one request: the answer to a probe, or a probe."""
        cdef NatsPeer peer
        cdef bytes body
        if found == DW_NATS_FOUND and f.kind == c"p":
            if reply_n == 0 or reply_n > INBOX_LIMIT or not printable(reply, reply_n):
                self.malformed += 1
                return 0
            body = self.answer_worker(payload, n)
            if body:
                self.put_bytes(PyBytes_FromStringAndSize(<const char *>reply, reply_n), None, _HEAD_O, body)
            return 0
        if found == DW_NATS_FOUND and f.kind == c"g":
            peer = self.peers.get("nats:" + PyBytes_FromStringAndSize(<const char *>payload, n).decode("latin-1"))
            if peer is not None:
                peer.state = P_LEAVING
            return 0
        peer = self.probes.pop(number, None)
        if peer is None:
            self.stale += 1
            return 0
        if found == DW_NATS_STATUS and f.kind == NO_RESPONDERS:
            self.gone(peer)
            if self.came_back and self.now < self.up_at + GRACE_S and peer.heard < self.up_at:
                peer.probed = self.now - 8 * self.probe_interval + RETRY_S  # it may be reconnecting as we did: again soon
                self.tick_at = min(self.tick_at, self.now + RETRY_S)
                return 0
            return self.lose_peer(peer, PeerLost(
                f"{peer.address} is gone: the NATS server says that nobody listens there any more",
                peer=peer.address, sent="maybe",
            ))  # fmt: skip
        if found != DW_NATS_FOUND or f.kind != c"o":
            self.malformed += 1
            return 0
        peer.heard = self.now
        peer.asked = INFINITY
        if peer.state != P_LEAVING:
            peer.state = P_ALIVE
        self.on_peer(peer, None)
        return self.probe_answered(peer, payload, n)

    def nobody(self, NatsPeer peer):
        """The error for a request that nobody took."""
        return ConnectError(
            f"nobody listens at {peer.address}: the worker is gone, or uses another NATS server (NATS_SERVER) or account",
            peer=peer.address,
        )  # fmt: skip

    def gone(self, NatsPeer peer):
        """The NATS server has nobody to give messages for the worker to."""
        if peer.state != P_LEAVING:
            peer.state = P_GONE
        self.on_peer(peer, self.nobody(peer))

    cdef int probe_answered(self, NatsPeer peer, const unsigned char *payload, size_t n) except -1:
        """Lines ``token items``: what the worker has sent of each stream up to this message, or ``-`` if it does not know it."""
        cdef const unsigned char *p = payload
        cdef const unsigned char *end = payload + n
        cdef const unsigned char *eol
        cdef uint32_t slot, seq
        cdef uint64_t count
        cdef StreamBase stream
        while p < end:
            eol = <const unsigned char *>memchr(p, c"\n", end - p)
            if eol is NULL or eol - p < TOKEN_BYTES + 2 or not dw_nats_hex(p, 6, &slot) or not dw_nats_hex(p + 6, 8, &seq):
                self.malformed += 1
                return 0
            p += TOKEN_BYTES + 1
            stream = self.get_slot(slot)
            if stream is not None and stream.seq == seq and (<NatsTarget>stream.under).peer is peer:
                if p[0] == c"-":
                    self.gaps += 1
                    self.lose(stream, PeerLost(
                        f"{peer.address} does not know the request (any more): it or the end of its reply was lost on the way "
                        "through the NATS server", peer=peer.address, sent="maybe", details={"alive": True},
                    ))  # fmt: skip
                elif not decimal(p, eol - p, &count):
                    self.malformed += 1
                    return 0
                elif count > stream.mark:
                    self.lose(stream, self.hole(stream, count))
            p = eol + 1
        return 0

    cdef bytes answer_worker(self, const unsigned char *payload, size_t n):
        """(client) Of the streams that a worker asks for, those that nobody waits for here."""
        cdef const unsigned char *p = payload
        cdef const unsigned char *end = payload + n
        cdef uint32_t slot, seq
        cdef StreamBase stream
        cdef list out = []
        while <size_t>(end - p) >= TOKEN_BYTES + 1 and len(out) < PROBE_TOKENS:
            if p[TOKEN_BYTES] != c"\n" or not dw_nats_hex(p, 6, &slot) or not dw_nats_hex(p + 6, 8, &seq):
                self.malformed += 1
                break
            stream = self.get_slot(slot)
            if stream is None or stream.seq != seq:
                out.append(PyBytes_FromStringAndSize(<const char *>p, TOKEN_BYTES) + b" -\n")
            p += TOKEN_BYTES + 1
        return b"".join(out)

    cdef int lose_peer(self, NatsPeer peer, object error) except -1:
        """(client) The worker is gone, and with it all its streams."""
        cdef StreamBase stream
        peer.asked = INFINITY
        for stream in list(self.slots):
            if stream is not None and stream.conn is self and (<NatsTarget>stream.under).peer is peer:
                stream.state |= S_ENDED
                self.free_slot(stream)
                stream.on_lost(error)
        return 0

    # (server)

    cdef int from_caller(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                         const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                         object owner) except -1:
        cdef fields f
        cdef size_t others
        cdef int found
        cdef int flags = 0
        cdef size_t prefix_n = PyBytes_GET_SIZE(self.subject)
        cdef const unsigned char *rest
        cdef size_t rest_n
        cdef uint32_t slot, seq
        cdef StreamBase stream
        cdef object target, item
        cdef object meta = None
        cdef object request_id = None
        cdef bytes inbox
        found = dw_nats_parse(headers, headers_n, <dw_nats_fields *>&f, &others)
        if subject_n > prefix_n + 1 and subject[prefix_n] == c"." and \
                memcmp(subject, PyBytes_AS_STRING(self.subject), prefix_n) == 0:
            rest = subject + prefix_n + 1
            rest_n = subject_n - prefix_n - 1
            if rest[0] == c"_" and (rest_n == 1 or rest[1] == c"." and memchr(rest + 2, c".", rest_n - 2) is NULL):
                return self.control_message(rest, rest_n, reply, reply_n, found, &f, payload, n)
        else:
            prefix_n = PyBytes_GET_SIZE(self.queue_subject)
            if prefix_n == 0 or subject_n <= prefix_n or memcmp(subject, PyBytes_AS_STRING(self.queue_subject), prefix_n) != 0:
                self.malformed += 1
                return 0
            rest = subject + prefix_n
            rest_n = subject_n - prefix_n
            flags = F_QUEUE
        if found == DW_NATS_STATUS or found == DW_NATS_FOUND and f.kind != c"r" or reply_n == 0 or reply_n > INBOX_LIMIT or \
                not printable(reply, reply_n):
            self.malformed += 1  # nothing that could be answered
            return 0
        inbox = PyBytes_FromStringAndSize(<const char *>reply, reply_n)
        if found == DW_NATS_FOUND:
            if f.count < 4 or f.v[0] > 2 or f.v[1] > 2 or f.v[3] > <uint64_t>0xFFFFFFFF or reply_n <= TOKEN_BYTES or \
                    reply[reply_n - TOKEN_BYTES - 1] != c"." or not dw_nats_hex(reply + reply_n - TOKEN_BYTES, 6, &slot) or \
                    not dw_nats_hex(reply + reply_n - 8, 8, &seq):
                found = DW_NATS_BAD
            elif self.by_reply and inbox in self.by_reply:
                self.repeated += 1
                return 0
        if found == DW_NATS_BAD:
            self.malformed += 1
            return self.answer(inbox, F_FOREIGN, error_body(ProtocolError(
                "the request has malformed headers; see docs/nats-wire.md", sent="no", phase="accept"
            )))  # fmt: skip
        if found == DW_NATS_NONE:
            flags |= F_FOREIGN
            f.v[0] = f.v[1] = 0
            f.v[2] = _CREDIT_LIMIT
            f.v[3] = FOREIGN_TIMEOUT_MS
            f.count = 4
            seq = self.seq = self.seq + 1
        if headers_n > META_LIMIT + HEAD_BYTES:
            return self.answer(inbox, flags, error_body(MessageTooLarge(
                f"headers of {headers_n} bytes exceed the limit of {META_LIMIT} bytes per request",
                size=headers_n, limit=META_LIMIT, setting="(fixed by the wire)", sent="no",
            )))  # fmt: skip
        if <int64_t>n > self.max_message:
            return self.answer(inbox, flags, error_body(MessageTooLarge(
                f"a request of {n} bytes exceeds the worker's limit of {self.max_message} bytes; raise DYN_TCP_MAX_MESSAGE_SIZE "
                "on the worker's side or send less",
                size=n, limit=self.max_message, setting="DYN_TCP_MAX_MESSAGE_SIZE", sent="no",
            )))  # fmt: skip
        if dw_nats_more(headers_n, others) or self.token is not None:
            meta, request_id, token = read_headers(headers[others : headers_n] if others else b"")
            if self.token is not None and not hmac.compare_digest((token or "").encode(), self.token):
                shown = "a wrong token" if token else "no token"
                return self.answer(inbox, flags, error_body(Unauthenticated(
                    f"{shown} was shown; set the worker's DYNWIRE_TOKEN on the caller's side", sent="no"
                )))  # fmt: skip
            if flags & F_FOREIGN:
                kind = _CONTENT_TYPES.get(meta.get("content-type", "").partition(";")[0].strip().lower())
                if kind is not None:
                    f.v[0] = kind
        if self.free_len == 0 and self.live >= self.max_streams:
            return self.answer(inbox, flags, error_body(Overloaded(
                f"{self.live} requests are in flight at the worker (limit {self.max_streams}, set by DYNWIRE_TCP_MAX_STREAMS)",
                depth=self.live, limit=self.max_streams, sent="no", phase="accept",
            )))  # fmt: skip
        self.caller_of(reply, reply_n - TOKEN_BYTES if not flags & F_FOREIGN else 0)
        if self.last_target_name is not None and <size_t>PyBytes_GET_SIZE(self.last_target_name) == rest_n and \
                memcmp(PyBytes_AS_STRING(self.last_target_name), rest, rest_n) == 0:
            target = self.last_target
        else:
            name = PyBytes_FromStringAndSize(<const char *>rest, rest_n)
            target = self.targets.get(name)
            if target is None:
                target = self.resolve(name.decode("utf-8", "replace"))
                if type(target) is not str:
                    self.targets[name] = target  # names that are not served are anybody's, and without end
            if type(target) is not str:
                self.last_target_name = name
                self.last_target = target
        stream = self.make_stream()
        self.take_slot(stream)
        stream.seq = seq
        stream.mark = 0
        stream.under = inbox
        stream.in_flags = <uint8_t>flags
        stream.in_arg = self.tick_no
        stream.in_id = request_id
        stream.reply_kind_ = <uint8_t>f.v[1]
        stream.send_credit = stream.cost = <int64_t>min(f.v[2], <uint64_t>_CREDIT_LIMIT)
        self.accept_after = f.v[4] * 0.00025 if f.count > 4 else INFINITY  # a quarter of the caller's patience
        if f.v[0] == 0:
            item = payload_copy(payload, n) if owner is None else payload_of_block(<Block>owner, n)
        else:
            item = PyBytes_FromStringAndSize(<const char *>payload, n)
        self.before_request(stream, &f)
        self.on_request(stream, target, item, <int>f.v[0], meta, <uint32_t>f.v[3])
        if stream.conn is self:
            # Not answered at once: from now on messages may name it.
            stream.in_flags |= F_KNOWN
            self.by_reply[inbox] = stream
            if self.tick_at == INFINITY:
                self.tick_at = self.now + 4 * self.probe_interval
        return 0

    cdef int before_request(self, StreamBase stream, fields *f) except -1:
        return 0

    cdef int caller_of(self, const unsigned char *reply, size_t n) except -1:
        """Make `connection_id` and `peer` those of the caller whose inboxes begin with ``reply``."""
        cdef bytes prefix
        if n and self.last_caller is not None and <size_t>PyBytes_GET_SIZE(self.last_caller) == n and \
                memcmp(PyBytes_AS_STRING(self.last_caller), reply, n) == 0:
            return 0
        prefix = PyBytes_FromStringAndSize(<const char *>reply, n)
        known = self.callers.get(prefix)
        if known is None:
            try:
                connection_id = bytes.fromhex(prefix[-17:-1].decode("latin-1")) if n else b""
            except ValueError:
                connection_id = b""
            known = (connection_id if len(connection_id) == 8 else b"\0" * 8, f"nats:{prefix[:-1].decode('utf-8', 'replace')}")
            if len(self.callers) >= 4096:
                self.callers.clear()
            self.callers[prefix] = known
        self.last_caller = prefix
        self.connection_id, self.peer = known
        return 0

    cdef int control_message(self, const unsigned char *rest, size_t rest_n, const unsigned char *reply, size_t reply_n,
                             int found, fields *f, const unsigned char *payload, size_t n) except -1:
        """Cancel, credit, probes and their answers; and what the NATS server says about what we have published."""
        cdef StreamBase stream
        cdef uint32_t a, b
        cdef bytes body
        if found == DW_NATS_STATUS:
            if f.kind == NO_RESPONDERS and rest_n == 2 + 8 and dw_nats_hex(rest + 2, 8, &a):
                return self.lose_caller(self.probes.pop(a, None))
            if f.kind == NO_RESPONDERS and rest_n == 2 + TOKEN_BYTES and dw_nats_hex(rest + 2, 6, &a) and \
                    dw_nats_hex(rest + 8, 8, &b):
                stream = self.get_slot(a)
                if stream is not None and stream.seq == b and self.may_lose_caller(stream):
                    self.free_slot(stream)
                    return stream.on_lost(PeerLost("the caller is gone: nobody listens to its inbox", sent="yes"))
                return 0
            self.malformed += 1
            return 0
        if found != DW_NATS_FOUND:
            self.malformed += 1
            return 0
        if f.kind == c"w" or f.kind == c"c":
            if f.count < 1 or n == 0 or n > INBOX_LIMIT or f.kind == c"c" and f.v[0] != 1 and f.v[0] != 2:
                self.malformed += 1
                return 0
            stream = self.by_reply.get(PyBytes_FromStringAndSize(<const char *>payload, n))
            if stream is None:
                self.stale += 1  # it had ended when this was on its way
                return 0
            if f.kind == c"w":
                return self.credit_came(stream, f.v[0])
            return stream.on_cancel(<int>f.v[0])
        if f.kind == c"p":
            if reply_n <= TOKEN_BYTES or reply_n > INBOX_LIMIT or not printable(reply, reply_n):
                self.malformed += 1
                return 0
            self.caller_of(reply, reply_n - TOKEN_BYTES)
            body = self.answer_probe(reply, reply_n - TOKEN_BYTES, payload, n)
            if body is not None:
                self.put_bytes(PyBytes_FromStringAndSize(<const char *>reply, reply_n), None, _HEAD_O, body)
            return 0
        if f.kind == c"o" and rest_n == 2 + 8 and dw_nats_hex(rest + 2, 8, &a):
            prefix = self.probes.pop(a, None)
            if prefix is None:
                self.stale += 1
                return 0
            return self.kill_unknown(prefix, payload, n)
        self.malformed += 1
        return 0

    cdef int credit_came(self, StreamBase stream, uint64_t total) except -1:
        """What the caller has granted since the request, so that a repeated or lost message does no harm."""
        if total > <uint64_t>_CREDIT_LIMIT:
            self.malformed += 1
            return 0
        if <int64_t>total > stream.cost:
            stream.send_credit += <int64_t>total - stream.cost
            stream.cost = <int64_t>total
            return stream.on_credit()
        return 0

    cdef bytes answer_probe(self, const unsigned char *reply, size_t prefix_n, const unsigned char *payload, size_t n):
        """Lines ``token credit`` of a caller: the number of items sent for each, ``-`` where there is no such stream."""
        cdef const unsigned char *p = payload
        cdef const unsigned char *end = payload + n
        cdef const unsigned char *eol
        cdef uint64_t total
        cdef StreamBase stream
        cdef bytes prefix = PyBytes_FromStringAndSize(<const char *>reply, prefix_n)
        cdef list out = []
        while p < end and len(out) < PROBE_TOKENS:
            eol = <const unsigned char *>memchr(p, c"\n", end - p)
            if eol is NULL or eol - p < TOKEN_BYTES + 2 or p[TOKEN_BYTES] != c" " or \
                    not decimal(p + TOKEN_BYTES + 1, eol - p - TOKEN_BYTES - 1, &total):
                self.malformed += 1
                return None
            token = PyBytes_FromStringAndSize(<const char *>p, TOKEN_BYTES)
            stream = self.by_reply.get(prefix + token)
            if stream is not None:
                self.credit_came(stream, total)
            out.append(b"%s -\n" % token if stream is None else b"%s %d\n" % (token, stream.mark))
            p = eol + 1
        return b"".join(out)

    cdef int kill_unknown(self, bytes prefix, const unsigned char *payload, size_t n) except -1:
        """The caller does not wait for these any more; its cancel message was lost."""
        cdef const unsigned char *p = payload
        cdef StreamBase stream
        while n >= TOKEN_BYTES + 3:
            stream = self.by_reply.get(prefix + PyBytes_FromStringAndSize(<const char *>p, TOKEN_BYTES))
            if stream is not None and p[TOKEN_BYTES + 1] == c"-":
                stream.on_cancel(2)
            p += TOKEN_BYTES + 3
            n -= TOKEN_BYTES + 3
        return 0

    cdef int lose_caller(self, bytes prefix) except -1:
        cdef StreamBase stream
        if prefix is None:
            self.stale += 1
            return 0
        if self.came_back and self.now < self.up_at + GRACE_S:
            return 0  # it may be reconnecting as we did; the next tick asks again
        for inbox, stream in list(self.by_reply.items()):
            if stream.conn is self and (<bytes>inbox).startswith(prefix) and not stream.in_flags & F_FOREIGN and \
                    self.may_lose_caller(stream):
                self.free_slot(stream)
                stream.on_lost(PeerLost("the caller is gone: nobody listens to its inboxes", sent="yes"))
        return 0

    cdef bint may_lose_caller(self, StreamBase stream) except -1:
        """The NATS server says that nobody listens for the replies: does that end the request?"""
        return True

    cdef int forget_targets(self) except -1:
        """Endpoints were added or removed."""
        self.targets.clear()
        self.last_target = self.last_target_name = None
        return 0

    # ---- sending ---------------------------------------------------------------------------------------------------------

    cdef int put(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n, const unsigned char *payload,
                 size_t n, object owner) except -1:
        """Publish, or keep for when the connection is back. For small messages; at most one or two of a stream may be kept."""
        if self.up():
            return self.port.publish(subject, reply, headers, headers_n, payload, n, owner)
        if not self.dead:
            self.outbox.append((
                subject, reply, PyBytes_FromStringAndSize(<const char *>headers, headers_n),
                PyBytes_FromStringAndSize(<const char *>payload, n),
            ))  # fmt: skip
        return 0

    cdef int put_bytes(self, bytes subject, bytes reply, bytes headers, bytes body) except -1:
        return self.put(subject, reply, <const unsigned char *>PyBytes_AS_STRING(headers), PyBytes_GET_SIZE(headers),
                        <const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), body)

    # (server)

    cdef bytes own_reply(self, StreamBase stream):
        """The reply subject of messages to a caller who does not know, or ask, which worker has his request.

        If he is gone, the NATS server answers there.
        """
        cdef unsigned char token[TOKEN_BYTES]
        if not stream.in_flags & (F_FOREIGN | F_QUEUE):
            return None
        dw_nats_put_hex(token, stream.sid, 6)
        dw_nats_put_hex(token + 6, stream.seq, 8)
        return self.subject + b"._." + PyBytes_FromStringAndSize(<char *>token, TOKEN_BYTES)

    cdef bint may_send(self, StreamBase stream) except -1:
        if stream.send_credit <= 0:
            return False
        if self.port.state != PORT_UP or self.port.congested:
            self.congested = True
            if not stream.state & S_QUEUED:
                stream.state |= S_QUEUED
                self.waiting_writer.append(stream)
            return False
        return True

    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1:
        cdef unsigned char head[HEAD_BYTES]
        cdef uint64_t v[3]
        cdef size_t head_n
        if stream.state & S_ENDED:
            return 0
        if <int64_t>n > self.item_limit():  # another NATS server than when the item was made
            self.put_error(stream, 0, error_body(self.item_too_large(n, self.item_limit(), "the endpoint")))
            return 0 if last else stream.on_cancel(2)
        stream.send_credit -= <int64_t>n + ITEM_OVERHEAD
        if last:
            stream.state |= S_ENDED
        v[0] = stream.mark
        v[1] = kind
        v[2] = last
        stream.mark += 1
        head_n = dw_nats_head(head, c"i", v, 3, False)
        return self.port.publish(
            <bytes>stream.under, self.own_reply(stream) if stream.in_flags & (F_FOREIGN | F_QUEUE) and not last else None,
            head, head_n, p, n, lasting(owner, n),
        )  # fmt: skip

    cdef int put_end(self, StreamBase stream) except -1:
        cdef unsigned char head[HEAD_BYTES]
        if stream.state & S_ENDED:
            return 0
        stream.state |= S_ENDED
        return self.put(<bytes>stream.under, None, head, dw_nats_head(head, c"e", &stream.mark, 1, False), NULL, 0, None)

    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1:
        if stream.state & S_ENDED:
            return 0
        stream.state |= S_ENDED
        return self.answer(<bytes>stream.under, stream.in_flags, body)

    cdef int answer(self, bytes inbox, int flags, bytes body) except -1:
        """An error as the only or last message of a reply."""
        cdef bytes head = _HEAD_X
        if flags & F_FOREIGN:
            # Other tools find it where NATS services put theirs.
            parts = _error_text(body)
            text = " ".join(f"{parts.get('c')}: {parts.get('m')}".split())
            head = f"NATS/1.0\r\nD: x\r\nNats-Service-Error-Code: 500\r\nNats-Service-Error: {text[:1000]}\r\n\r\n".encode()
        return self.put_bytes(inbox, None, head, self.fitting(head, body))

    cdef bytes fitting(self, bytes headers, bytes body):
        """The body of an error, or of another one where the NATS server does not take so much."""
        if self.up() and len(headers) + len(body) > min(self.port.max_payload, self.max_payload):
            return _TOO_LONG
        return body

    cdef int put_accept(self, StreamBase stream) except -1:
        if stream.state & S_ENDED:
            return 0
        return self.put_bytes(<bytes>stream.under, self.own_reply(stream), _HEAD_A, b"")

    cdef int request_done(self, StreamBase stream) except -1:
        if self.free_slot(stream):
            stream.on_freed()
        return 0

    cdef object item_too_large(self, int64_t size, int64_t limit, str endpoint):
        if limit == self.max_message:
            return Link.item_too_large(self, size, limit, endpoint)
        setting = "nats plane limit" if self.max_payload <= self.port.max_payload else "max_payload of the NATS server"
        return MessageTooLarge(
            f"a reply item of {size} bytes from {endpoint} exceeds the {limit} bytes that one message may have ({setting}); the "
            "tcp plane (DYN_REQUEST_PLANE=tcp) carries larger ones",
            size=size, limit=limit, setting=setting, phase="reply", sent="yes",
        )  # fmt: skip

    # (client)

    cdef int submit(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                    double now) except -1:
        if self.up():
            self.check_size(data, meta)
        elif self.port is not None and self.port.state == PORT_CLOSED:
            raise ManagerClosed("the connection to the NATS server is closed")
        elif len(self.pending) >= self.channel_buffer:
            raise self.overloaded(
                len(self.pending), f"{len(self.pending)} requests already wait for the connection to the NATS server"
            )
        return Link.submit(self, stream, endpoint, data, kind, meta, deadline, due, now)

    cdef int check_size(self, object data, bytes meta) except -1:
        """Raises `MessageTooLarge` for a request that the NATS server would not take."""
        cdef int64_t limit = min(self.port.max_payload, self.max_payload)
        cdef int64_t size = PyBytes_GET_SIZE(data) if type(data) is bytes else size_of(data)
        cdef int64_t head = HEAD_BYTES + (0 if meta is None else PyBytes_GET_SIZE(meta))
        if size + head > limit and size <= self.max_message:
            setting = "nats plane limit" if self.max_payload <= self.port.max_payload else "max_payload of the NATS server"
            raise MessageTooLarge(
                f"a request of {size} bytes exceeds the {limit - head} bytes that one message may have ({setting}: {limit} bytes "
                "with headers); the tcp plane (DYN_REQUEST_PLANE=tcp) carries larger ones",
                size=size, limit=limit - head, setting=setting, peer=self.peer, sent="no",
            )  # fmt: skip
        return 0

    cdef bint may_request(self):
        return (
            self.port is not None and self.port.state == PORT_UP and not self.port.congested
            and self.port.granted + FIRST_CREDIT <= self.budget and (self.free_len > 0 or self.live < self.max_streams)
        )  # fmt: skip

    cdef int book(self, int64_t credit) except -1:
        """Streams of ours may have so much more on its way to this process; less, if it is negative.

        What all clients on a connection have granted counts together: what comes waits in one buffer of the NATS server's.
        """
        self.granted += credit
        if self.port is not None:
            self.port.granted += credit
        return 0

    cdef int on_saturation(self) except -1:
        if self.port is not None and self not in self.port.starving:
            self.port.starving.append(self)
        return 0

    cdef int feed_others(self) except -1:
        """Credit was given back: requests of other clients on this connection may have waited for it."""
        cdef NatsWire other
        for other in list(self.port.starving):
            if not other.pending:
                self.port.starving.remove(other)
            elif other is not self:
                other.now = self.now
                other.send_pending()
        return 0

    cdef bytes inbox_of(self, StreamBase stream):
        cdef Py_ssize_t n = PyBytes_GET_SIZE(self.subject)
        cdef bytes inbox = PyBytes_FromStringAndSize(NULL, n + TOKEN_BYTES)
        cdef unsigned char *p = <unsigned char *>PyBytes_AS_STRING(inbox)
        memcpy(p, PyBytes_AS_STRING(self.subject), n)
        dw_nats_put_hex(p + n, stream.sid, 6)
        dw_nats_put_hex(p + n + 6, stream.seq, 8)
        return inbox

    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                          double now) except -1:
        cdef Py_buffer view
        cdef unsigned char head[HEAD_BYTES]
        cdef uint64_t v[4]
        cdef size_t head_n
        cdef double left
        cdef bytes long_head
        cdef const unsigned char *headers = head
        v[0] = kind
        v[1] = 0
        v[2] = FIRST_CREDIT if stream.keeps_items else CALL_CREDIT
        v[3] = 0
        if deadline != INFINITY:
            left = (deadline - now) * 1000.0
            v[3] = 0 if left >= 4294967295.0 else <uint64_t>max(left, 0.0) + 1
        head_n = dw_nats_head(head, c"r", v, 4, True) - 2  # without its CR LF
        memcpy(head + head_n, PyBytes_AS_STRING(self.accept_field), PyBytes_GET_SIZE(self.accept_field))
        head_n += PyBytes_GET_SIZE(self.accept_field)
        if meta is None:
            memcpy(head + head_n, b"\r\n", 2)
            head_n += 2
        else:
            long_head = PyBytes_FromStringAndSize(<const char *>head, head_n) + meta + b"\r\n"
            headers = <const unsigned char *>PyBytes_AS_STRING(long_head)
            head_n = PyBytes_GET_SIZE(long_head)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.take_slot(stream)
            self.seq += 1
            stream.seq = self.seq
            stream.mark = 0
            stream.in_arg = 1
            stream.cost = stream.send_credit = <int64_t>v[2]
            self.book(stream.send_credit)
            try:
                self.publish_request(stream, <NatsTarget>stream.under, self.inbox_of(stream), headers, head_n,
                                     <const unsigned char *>view.buf, view.len, lasting(data, view.len))
            except BaseException:
                stream.state |= S_ENDED
                self.free_slot(stream)
                raise
        finally:
            PyBuffer_Release(&view)
        stream.state |= S_WRITTEN
        if self.tick_at == INFINITY:
            self.tick_at = now + self.probe_interval * 0.5
            self.tick_seq = self.seq - 1
        self.on_request_sent(stream)
        return self.arm(stream, due)

    cdef int publish_request(self, StreamBase stream, NatsTarget target, bytes inbox, const unsigned char *headers,
                             size_t headers_n, const unsigned char *payload, size_t n, object owner) except -1:
        return self.port.publish(target.subject, inbox, headers, headers_n, payload, n, owner)

    cdef int put_cancel(self, StreamBase stream, int kind) except -1:
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        if peer.control is None or not stream.state & S_WRITTEN:
            return 0
        return self.put_bytes(peer.control, None, _HEAD_C2 if kind == 2 else _HEAD_C1, self.inbox_of(stream))

    cdef int abandon(self, StreamBase stream, int kind) except -1:
        if stream.conn is not self or stream.state & S_ENDED:
            return 0
        self.put_cancel(stream, kind)
        stream.state |= S_ZOMBIE | S_ENDED
        self.free_slot(stream)  # what still comes has the number of a request that is over
        return self.wrote()

    cdef int consumed(self, StreamBase stream, int64_t cost) except -1:
        """The application has taken items of this cost; grant the worker as much again, in halves of the window."""
        if stream is None or stream.conn is not self:
            return 0
        stream.refund += cost
        if stream.refund * 2 >= stream.send_credit:
            return self.grant(stream)
        return 0

    cdef int grant(self, StreamBase stream) except -1:
        cdef int64_t window = stream.send_credit
        cdef unsigned char head[HEAD_BYTES]
        cdef uint64_t total
        cdef bytes inbox
        cdef NatsPeer peer = (<NatsTarget>stream.under).peer
        if window < self.stream_window and not self.port.starving and self.port.granted + window <= self.budget // 2:
            window = min(2 * window, self.stream_window)  # it uses what it gets, and there is enough
        elif window > FIRST_CREDIT and (self.port.starving or self.port.granted > self.budget // 8 * 7):
            window = max(window // 2, <int64_t>FIRST_CREDIT)  # others need it
        stream.cost += stream.refund + window - stream.send_credit
        self.book(window - stream.send_credit)
        stream.send_credit = window
        stream.refund = 0
        if self.up() and peer.control is not None:  # otherwise the next probe says it
            total = <uint64_t>stream.cost
            inbox = self.inbox_of(stream)
            self.port.publish(peer.control, None, head, dw_nats_head(head, c"w", &total, 1, False),
                              <const unsigned char *>PyBytes_AS_STRING(inbox), PyBytes_GET_SIZE(inbox), None)
            self.wrote()
        if self.pending:
            self.send_pending()
        if self.port.starving:
            self.feed_others()
        return 0

    # ---- streams ---------------------------------------------------------------------------------------------------------

    cdef int free_slot(self, StreamBase stream) except -1:
        cdef uint32_t sid = stream.sid
        if stream.conn is not self or stream.state & S_PENDING:
            return 0
        if self.is_client:
            self.book(-stream.send_credit)
            if not Link.free_slot(self, stream):
                return 0
            if self.port.starving:
                self.feed_others()
            return 1
        if stream.in_flags & F_KNOWN:
            stream.in_flags &= ~F_KNOWN
            self.by_reply.pop(stream.under, None)
        if not Link.free_slot(self, stream):
            return 0
        self.free_slots[self.free_len] = sid
        self.free_len += 1
        return 1

    cdef list take_all_streams(self):
        cdef list out = Link.take_all_streams(self)
        self.by_reply.clear()
        self.probes.clear()
        self.outbox.clear()
        self.book(-self.granted)
        self.tick_at = INFINITY
        if self.port is not None and self.port.starving:
            self.feed_others()
        return out

    # ---- signs of life ---------------------------------------------------------------------------------------------------

    cdef int tick(self, double now) except -1:
        """Ask those of whom nothing was heard for a while whether they still know the streams that were there a tick ago."""
        cdef bint stalled = now - self.tick_at > max(1.0, self.probe_interval)
        self.tick_at = INFINITY
        self.tick_no += 1
        self.now = now
        if not self.up() or not self.live:
            return 0
        if self.is_client:
            return self.tick_client(now, stalled)
        return self.tick_server(now)

    cdef int tick_client(self, double now, bint stalled) except -1:
        cdef uint32_t old = self.tick_seq
        cdef StreamBase stream
        cdef NatsPeer peer
        cdef double quiet
        cdef bint all_ = self.ask_all
        cdef list due = []
        cdef list silent = []
        self.tick_seq = self.seq
        self.ask_all = False
        for stream in self.slots:
            if stream is None or <int32_t>(stream.seq - old) > 0:
                continue
            peer = (<NatsTarget>stream.under).peer
            if peer.control is None:
                continue
            if peer.visit != self.tick_no:
                peer.visit = self.tick_no
                if peer.heard > peer.asked or all_:
                    peer.asked = INFINITY
                elif stalled and peer.asked != INFINITY:
                    peer.asked = now  # this loop stood still: the answer may wait in the socket
                if now - peer.asked >= self.keepalive_timeout:
                    silent.append(peer)
                quiet = now - max(peer.heard, peer.probed)
                peer.due = (
                    all_ or quiet >= max(peer.patience, self.probe_interval) or now - peer.probed >= 4 * self.probe_interval
                )
                if peer.due:
                    due.append(peer)
                    peer.lines = []
            if peer.due:
                peer.lines.append(b"%b %d\n" % (self.inbox_of(stream)[-TOKEN_BYTES:], stream.cost))
        for peer in due:
            if peer not in silent:
                lines, peer.lines = peer.lines, []
                self.ask(peer, lines, now)
        self.tick_at = now + self.probe_interval * 0.5
        for peer in silent:
            quiet = now - max(peer.heard, peer.asked)
            self.lose_peer(peer, PeerLost(
                f"{peer.address} gave no sign of life for {quiet:.3g} s (a probe was not answered within "
                f"{self.keepalive_timeout:.3g} s, {self.keepalive_setting})", peer=peer.address, sent="maybe",
            ))  # fmt: skip
        return 0

    cdef int ask(self, NatsPeer peer, list lines, double now) except -1:
        cdef Py_ssize_t at
        peer.patience = min(4 * self.probe_interval, 2 * max(peer.patience, 0.5 * self.probe_interval))
        peer.probed = now
        if peer.asked == INFINITY:
            peer.asked = now
        if len(self.probes) > 4096:
            self.probes.clear()  # not answered, and long forgotten
        for at in range(0, len(lines), PROBE_TOKENS):
            self.probe_no += 1
            self.probes[self.probe_no] = peer
            self.probes_sent += 1
            self.put_bytes(peer.control, b"%bffffff%08x" % (self.subject, self.probe_no), _HEAD_P,
                           b"".join(lines[at : at + PROBE_TOKENS]))
        return self.wrote()

    cdef bint fresh(self, NatsPeer peer, double now):
        """Was the worker there a moment ago, and since the connection came back? If not, asking costs less than a failure."""
        return peer.state == P_ALIVE and now - peer.heard < 4 * self.probe_interval and peer.heard >= self.up_at

    cdef int ping(self, NatsPeer peer, double now) except -1:
        """Ask whether the worker is there; `on_peer` tells."""
        return self.ask(peer, [b""], now)

    cdef int put_goodbye(self) except -1:
        """(server) Tell the callers that no request is taken any more. Who was forgotten here learns it from the NATS server."""
        cdef bytes head = _HEAD_G
        for prefix in self.callers:
            if prefix:
                self.put_bytes(<bytes>prefix + b"ffffff00000000", None, head, self.subject)
        return self.wrote()

    cdef int tick_server(self, double now) except -1:
        """Callers whose streams were there at the last tick: are they, and do they still wait?"""
        cdef StreamBase stream
        cdef dict callers = {}
        cdef Py_ssize_t at
        cdef bint all_ = self.ask_all
        self.ask_all = False
        self.probes.clear()
        for inbox, stream in self.by_reply.items():
            if stream.in_flags & F_FOREIGN or not all_ and <int32_t>(stream.in_arg - self.tick_no) >= -1:
                continue
            callers.setdefault((<bytes>inbox)[:-TOKEN_BYTES], []).append((<bytes>inbox)[-TOKEN_BYTES:] + b"\n")
        for prefix, lines in callers.items():
            for at in range(0, len(lines), PROBE_TOKENS):
                self.probe_no += 1
                self.probes[self.probe_no] = prefix
                self.probes_sent += 1
                self.put_bytes(prefix + b"ffffff%08x" % self.probe_no, b"%b._.%08x" % (self.subject, self.probe_no), _HEAD_P,
                               b"".join(lines[at : at + PROBE_TOKENS]))
        self.tick_at = now + (4 * self.probe_interval if now > self.up_at + GRACE_S else self.probe_interval)
        return self.wrote()

    def stats(self):
        """Counters, for diagnostics and tests."""
        return {
            "peer": self.peer, "streams": self.live, "waiting": len(self.pending), "granted": self.granted, "stale": self.stale,
            "malformed": self.malformed, "repeated": self.repeated, "gaps": self.gaps, "probes": self.probes_sent,
            "draining": self.draining, "up": self.up(),
        }  # fmt: skip


cdef bytes _head(str kind, tuple numbers=()):
    return f"NATS/1.0\r\nD: {' '.join([kind, *map(str, numbers)])}\r\n\r\n".encode()


cdef bytes _HEAD_A = _head("a")
cdef bytes _HEAD_C1 = _head("c", (1,))
cdef bytes _HEAD_C2 = _head("c", (2,))
cdef bytes _HEAD_G = _head("g")
cdef bytes _HEAD_O = _head("o")
cdef bytes _HEAD_P = _head("p")
cdef bytes _HEAD_X = _head("x")
cdef bytes _TOO_LONG = error_body(PeerLost(
    "the worker ended the request with an error whose text exceeds max_payload of the NATS server", sent="yes", retryable=False
))  # fmt: skip
cdef dict _CONTENT_TYPES = {"application/json": 2, "application/msgpack": 1, "application/octet-stream": 0}


cdef int parse_headers(const unsigned char *h, size_t n, fields *f, size_t *others) noexcept nogil:
    return dw_nats_parse(h, n, <dw_nats_fields *>f, others)


cdef bint parse_token(const unsigned char *p, uint32_t *slot, uint32_t *seq) noexcept nogil:
    return dw_nats_hex(p, 6, slot) and dw_nats_hex(p + 6, 8, seq)


cdef bint printable(const unsigned char *p, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        if p[i] <= c" " or p[i] == 127:
            return False
    return True


cdef bint decimal(const unsigned char *p, size_t n, uint64_t *value) noexcept nogil:
    cdef uint64_t v = 0
    cdef size_t i
    if n == 0 or n > 15:
        return False
    for i in range(n):
        if p[i] < c"0" or p[i] > c"9":
            return False
        v = v * 10 + (p[i] - c"0")
    value[0] = v
    return True


cdef object lasting(object owner, size_t n):
    """What keeps the memory of a payload in place until it is written; only large ones are written from there."""
    if n < 65536:
        return None
    return owner if type(owner) is bytes else memoryview(owner)
