# System calls and small helpers shared by the drivers of sockets. Included by _tcpio.pyx and _httpio.pyx.

import errno as errno_module
import hmac
import os
import ssl
import threading

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t
from libc.string cimport memcpy

from ._awaitable cimport CANCELLED, PENDING, RESULT
from ._link cimport MAX_CHUNKS, MAX_TARGETS, META_LIMIT, calls_follow, dw_chunk

from .errors import ForkedManager, MessageTooLarge, PlaneMismatch, ProtocolError, Unauthenticated

include "_driver_calls.pxi"

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
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
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
    ssize_t dw_recv(int fd, dw_chunk *targets, int n, int flags) nogil
    ssize_t dw_sendmsg(int fd, dw_chunk *chunks, int n, int flags) nogil

cdef extern from *:
    """
    static inline ssize_t recv_plain(int fd, void *to, size_t n) { return recv(fd, to, n, MSG_DONTWAIT); }
    """
    ssize_t recv_plain(int fd, void *to, size_t n) nogil

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char *mem, Py_ssize_t size, int flags)
    int PyBUF_READ
    int PyErr_CheckSignals() except -1

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


def read_error_text(int code):
    return f"{errno_module.errorcode.get(code, code)}: {os.strerror(code)}"


cdef object _pack_headers = msgspec.msgpack.Encoder().encode


cdef bytes make_meta(Context context, dict headers):
    """Metadata of a request: headers, and the id if the caller chose one."""
    out = dict(headers) if headers else {}
    if context is not None and context._id is not None:
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


cdef bytes request_meta(Context context):
    """Headers and id that travel with a request: those of its own context, or the trace of the surrounding request."""
    cdef Context parent
    if context is not None:
        keep_id(context)
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
