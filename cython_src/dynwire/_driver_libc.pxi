# System calls and small helpers shared by the drivers. Included by _tcpio.pyx and _httpio.pyx.

import asyncio
import errno as errno_module
import hmac
import os
import ssl
import threading

import msgspec
from cpython.bytes cimport PyBytes_CheckExact
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy
from libc.math cimport INFINITY
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._awaitable cimport (
    CANCELLED,
    PENDING,
    RESULT,
    CallFuture,
    ChannelBase,
    EndpointEntry,
    HandlerTask,
    ItemReader,
    Waiter,
    leave_task,
    make_item_stream,
    wake_readers,
)
from ._context cimport CTX_KILLED, Context, current_context
from ._link cimport (
    MAX_CHUNKS,
    MAX_TARGETS,
    META_LIMIT,
    Link,
    StreamBase,
    dw_chunk,
)

from ._context import INHERITED_HEADERS
from .codec import encode as _encode_with, msgpack_encode
from .errors import (
    Cancelled,
    ConfigError,
    ConnectError,
    DeadlineExceeded,
    DynwireError,
    EndpointNotFound,
    ForkedManager,
    ManagerClosed,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PlaneMismatch,
    ProtocolError,
    Unauthenticated,
)
from .types import Timeouts
from .wire.faults import error_body, for_request

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int fd, const void *buf, size_t n, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    int SHUT_RDWR
    int c_shutdown "shutdown"(int fd, int how)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    short POLLIN
    short POLLOUT

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from *:
    """
    #include <time.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    static inline double dw_now(void) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    }
    /* dw_chunk has the layout of struct iovec, by construction on Linux: pointer, then size_t. */
    _Static_assert(sizeof(dw_chunk) == sizeof(struct iovec), "dw_chunk must match struct iovec");
    static inline ssize_t dw_sendmsg(int fd, dw_chunk *chunks, int n, int flags) {
        if (n == 1) return send(fd, chunks[0].base, chunks[0].len, flags);
        struct msghdr m; memset(&m, 0, sizeof m);
        m.msg_iov = (struct iovec *)chunks; m.msg_iovlen = (size_t)n;
        return sendmsg(fd, &m, flags);
    }
    static inline ssize_t dw_recv(int fd, dw_chunk *targets, int n, int flags) {
        if (n == 1) return recv(fd, (void *)targets[0].base, targets[0].len, flags);
        struct msghdr m; memset(&m, 0, sizeof m);
        m.msg_iov = (struct iovec *)targets; m.msg_iovlen = (size_t)n;
        return recvmsg(fd, &m, flags);
    }
    """
    double dw_now() nogil
    ssize_t dw_recv(int fd, dw_chunk *targets, int n, int flags) nogil
    ssize_t dw_sendmsg(int fd, dw_chunk *chunks, int n, int flags) nogil

cdef extern from *:
    """
    static inline ssize_t recv_plain(int fd, void *to, size_t n) { return recv(fd, to, n, MSG_DONTWAIT); }
    """
    ssize_t recv_plain(int fd, void *to, size_t n) nogil

cdef extern from "Python.h":
    int PyObject_CheckBuffer(object)
    object PyMemoryView_FromMemory(char *mem, Py_ssize_t size, int flags)
    int PyBUF_READ
    int PyErr_CheckSignals() except -1
    Py_ssize_t Py_REFCNT(object)

cdef enum:
    CONGESTED_BYTES = 262144      # backlog of frames from which producers wait for the socket
    STOP_READING_BYTES = 1048576  # backlog from which nothing more is read from a peer that does not read its replies
    LAST_EARLY_FLUSH = 65536      # and the last one
    EARLY_FLUSH = 4096            # first of the geometric thresholds (x4 each) at which a read callback writes before its end
    FIRST_READ = 16384            # bytes that a server reads at a time from a new connection; what is dealt with quickly grows
    LEAST_READ = 4096             # and what takes long shrinks, down to this
    GOAWAY_NORMAL = 0
    GOAWAY_PROTOCOL = 1
    GOAWAY_UNAUTHENTICATED = 2
    GOAWAY_OVERLOADED = 3
    GOAWAY_VERSION = 4

# Time that one connection may take of a turn of a server's loop, if what it has read allows that to be seen in time.
cdef double TURN_S = 0.0005

cdef enum:
    TLS_READ = 65536              # ciphertext read at once
    TLS_EMPTY = -3


cdef class TlsLayer:
    """TLS between a machine and its socket, without I/O of its own but the two calls on the descriptor it is given.

    `shaking` is true until the handshake is done; before that nothing of the machine's can be sent.

    Python's `ssl` releases the GIL within an operation, and OpenSSL allows one at a time on an object: one thread may be reading
    a connection while another one writes it. The lock is reentrant because a finalizer may write.
    """
    cdef object lock
    cdef object obj
    cdef object incoming
    cdef object outgoing
    cdef object peer
    cdef bint shaking
    cdef bytes out                 # ciphertext that is being written
    cdef Py_ssize_t out_at
    cdef readonly object alpn

    def __init__(self, context, bint server_side, hostname, peer):
        self.lock = threading.RLock()
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.obj = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=hostname)
        self.peer = peer
        self.shaking = True

    cdef ssize_t recv(self, int fd, dw_chunk *target, bint from_socket) except -2:
        """Plaintext into ``target``: its length, 0 at the end, -1 with errno. Never waits. Raises `ConnectError`.

        Without ``from_socket`` only what has been read already, and TLS_EMPTY after that: the socket does not announce it again.
        """
        cdef char scratch[TLS_READ]
        cdef ssize_t n
        cdef bytes data
        while True:
            try:
                with self.lock:
                    if self.shaking:
                        self.obj.do_handshake()
                        self.shaking = False
                        self.alpn = self.obj.selected_alpn_protocol()
                    data = self.obj.read(target.len)
            except ssl.SSLWantReadError:
                if not from_socket:
                    return TLS_EMPTY
                n = recv_plain(fd, scratch, TLS_READ)
                if n <= 0:
                    return n
                with self.lock:
                    self.incoming.write(scratch[:n])
                continue
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                reason = getattr(error, "verify_message", None) or error.reason or str(error)
                what = "the handshake" if self.shaking else "a record"
                raise ConnectError(f"TLS with {self.peer}: {what} failed ({reason})", peer=self.peer, sent="maybe") from error
            n = len(data)
            memcpy(<void *>target.base, <const char *>data, n)
            return n

    cdef int encrypt(self, dw_chunk *chunks, int n) except -1:
        """Take everything that ``chunks`` name."""
        cdef size_t done
        cdef int i
        for i in range(n):
            done = 0
            while done < chunks[i].len:
                rest = PyMemoryView_FromMemory(<char *>chunks[i].base + done, chunks[i].len - done, PyBUF_READ)
                with self.lock:
                    done += <size_t>self.obj.write(rest)
        return 0

    cdef ssize_t push(self, int fd) except -2:
        """Write ciphertext: 1 when all of it has left, 0 when the socket takes no more, -1 with errno. Never waits."""
        cdef ssize_t n
        while True:
            if self.out is None:
                with self.lock:
                    if not self.outgoing.pending:
                        return 1
                    self.out = self.outgoing.read()
                self.out_at = 0
            n = c_send(fd, <const char *>self.out + self.out_at, len(self.out) - self.out_at, MSG_DONTWAIT | MSG_NOSIGNAL)
            if n < 0:
                if errno == EINTR:
                    continue
                return 0 if errno == EAGAIN else -1
            self.out_at += n
            if self.out_at == len(self.out):
                self.out = None

    cdef bint waiting(self):
        """Is there ciphertext to write?"""
        return self.out is not None or self.outgoing.pending > 0

    cdef int say_goodbye(self) except -1:
        """Queue close_notify, so that the peer can tell the end from a cut."""
        if not self.shaking:
            try:
                with self.lock:
                    self.obj.unwrap()
            except ssl.SSLError:  # it wants the peer's answer, which nobody waits for
                pass
        return 0


cdef object _pack_headers = msgspec.msgpack.Encoder().encode
cdef object _msgpack_encode = msgpack_encode


def read_error_text(int code):
    return f"{errno_module.errorcode.get(code, code)}: {os.strerror(code)}"


cdef class RequestOptions:
    """Settings of a client that every call needs, unpacked once."""
    cdef double accept_timeout
    cdef double connect_timeout
    cdef double total_timeout
    cdef int kind                  # codec of objects: 1 msgpack, 2 json
    cdef int channel_buffer
    cdef double keepalive_interval
    cdef double keepalive_timeout
    cdef str keepalive_setting     # its name, for the error
    cdef double spin_s

    def __init__(self, *, accept_timeout, connect_timeout=3.0, total_timeout=None, codec="msgpack", channel_buffer=100,
                 keepalive_interval=10.0, keepalive_timeout=10.0, keepalive_setting="DYNWIRE_TCP_KEEPALIVE_TIMEOUT",
                 spin_us=0.0):
        self.accept_timeout = accept_timeout
        self.connect_timeout = connect_timeout
        self.total_timeout = INFINITY if total_timeout is None else total_timeout
        self.kind = 2 if codec == "json" else 1
        self.channel_buffer = channel_buffer
        self.keepalive_interval = keepalive_interval
        self.keepalive_timeout = keepalive_timeout
        self.keepalive_setting = keepalive_setting
        self.spin_s = spin_us * 1e-6

    cdef apply(self, Link conn):
        conn.channel_buffer = self.channel_buffer
        conn.keepalive_interval = self.keepalive_interval
        conn.keepalive_timeout = self.keepalive_timeout
        conn.keepalive_setting = self.keepalive_setting


cdef inline double _or_infinity(object value) except? -1.0:
    return INFINITY if value is None else <double>value


cdef bytes make_meta(Context context, dict headers):
    """Metadata of a request: headers, and the id if the caller chose one."""
    out = dict(headers) if headers else {}
    if context is not None and context._id is not None and context._connection_id is None:
        out["x-request-id"] = context._id
    if not out:
        return None
    packed = _pack_headers(out)
    if len(packed) > META_LIMIT:
        raise MessageTooLarge(
            f"headers of {len(packed)} bytes exceed the limit of {META_LIMIT} bytes per request",
            size=len(packed), limit=META_LIMIT, setting="(fixed by the wire)",
        )  # fmt: skip
    return packed


cdef object encode_payload(object payload, int *kind, int default_kind):
    """The bytes-like form of a payload, and the number of its codec."""
    if PyBytes_CheckExact(payload) or PyObject_CheckBuffer(payload):
        kind[0] = 0
        return payload
    kind[0] = default_kind
    if default_kind == 1:
        try:
            return _msgpack_encode(payload)
        except (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError, msgspec.MsgspecError):
            return _encode_with(payload, "msgpack")  # raises a DecodeError that names the type
    return _encode_with(payload, "json")


cdef int set_limits(Waiter call, RequestOptions options, object timeouts, Context context, double now) except -1:
    """Resolve the caller's argument, the client's defaults and the surrounding request into the call's deadlines."""
    cdef double total = options.total_timeout
    cdef double accept = options.accept_timeout
    cdef double first_item = INFINITY
    cdef double between_items = INFINITY
    cdef double deadline
    cdef Context parent
    if timeouts is not None:
        if type(timeouts) is float or type(timeouts) is int:
            total = timeouts
        elif isinstance(timeouts, Timeouts):
            if timeouts.total is not None:
                total = timeouts.total
            if timeouts.accept is not None:
                accept = timeouts.accept
            first_item = _or_infinity(timeouts.first_item)
            between_items = _or_infinity(timeouts.between_items)
        else:
            raise ConfigError(f"timeout is a number of seconds or a Timeouts, got {timeouts!r}", name="timeout", value=timeouts)
        if not (total > 0 and accept > 0 and first_item > 0 and between_items > 0):
            raise DeadlineExceeded(
                f"the timeout of {total:.3g} s had passed before the request was sent", timeout=total, sent="no"
            )
    call.total_timeout = total
    deadline = now + total
    if context is None:
        parent = current_context()
    else:
        parent = context
    if parent is not None and parent._deadline < deadline:
        deadline = parent._deadline
        call.total_timeout = deadline - now
        if deadline <= now:
            raise DeadlineExceeded(
                "the deadline had passed before the request was sent", timeout=call.total_timeout, sent="no",
                phase="total",
            )  # fmt: skip
    call.total_deadline = deadline
    call.phase = "accept"
    call.phase_timeout = accept
    call.phase_deadline = now + accept
    if type(call) is not CallFuture and isinstance(call, ItemReader):
        (<ItemReader>call).first_item_timeout = first_item
        (<ItemReader>call).between_items_timeout = between_items
        if first_item < accept:
            call.phase = "first_item"
            call.phase_timeout = first_item
            call.phase_deadline = now + first_item
    return 0


cdef dict inherited_headers(Context parent):
    headers = parent.headers
    return {name: headers[name] for name in INHERITED_HEADERS if name in headers}


cdef Context inheriting_context():
    """A context for a stream whose caller gave none: deadline and trace are those of the surrounding request, if there is one."""
    cdef Context context = Context.__new__(Context)
    cdef Context parent = current_context()
    context._deadline = INFINITY
    if parent is not None:
        context._deadline = parent._deadline
        if parent._headers is not None:
            context._headers = inherited_headers(parent)
    return context


cdef bytes request_meta(Context context):
    """Headers and id that travel with a request: those of its own context, or the trace of the surrounding request."""
    cdef Context parent
    if context is not None:
        return make_meta(context, context.headers)
    parent = current_context()
    if parent is None or parent._headers is None:
        return None
    return make_meta(None, inherited_headers(parent))


GOAWAY_ERRORS = {
    GOAWAY_NORMAL: PeerLost,
    GOAWAY_PROTOCOL: ProtocolError,
    GOAWAY_UNAUTHENTICATED: Unauthenticated,
    GOAWAY_OVERLOADED: Overloaded,
    GOAWAY_VERSION: PlaneMismatch,
}


cdef object goaway_error(Link conn, int code, str text):
    """The peer closes the connection, or refuses it before it has begun."""
    cls = GOAWAY_ERRORS.get(code, PeerLost)
    if cls is PlaneMismatch:
        return PlaneMismatch(f"{conn.peer}: {text}", ours="dynwire/1", theirs="another version of the wire", peer=conn.peer)
    return cls(f"{conn.peer} closed the connection: {text}", peer=conn.peer, sent="maybe")


cdef object not_taken(Link conn, str text):
    return PeerLost(
        f"{conn.peer} is shutting down ({text}) and did not take the request", peer=conn.peer, sent="no",
        details={"refused": True},
    )  # fmt: skip


cdef object silent_error(Link conn, double now):
    quiet = now - max(conn.last_rx, conn.live_since)
    return PeerLost(
        f"{conn.peer} gave no sign of life for {quiet:.3g} s (a ping was not answered within {conn.keepalive_timeout:.3g} s, "
        f"{conn.keepalive_setting})", peer=conn.peer, sent="maybe",
    )  # fmt: skip


cdef int name_request(Link conn, Waiter call) except -1:
    """Let the request's context know its id, which connection and sequence number make."""
    if call.context is not None and call.context._connection_id is None:
        call.context._connection_id = conn.connection_id
        call.context._seq = call.seq
    return 0
