"""Drivers of the http plane over sockets. They are those of the tcp plane (`_driver_async.pxi`, `_driver_blocking.pxi`), compiled
for `dynwire._httpwire`; what differs is how connections begin and what a client is told that speaks something else.
"""

from socket import SHUT_WR

from ._httpwire cimport HttpWire as Machine

include "_driver_libc.pxi"
include "_driver_async.pxi"
include "_semaphore.pxi"
include "_driver_blocking.pxi"


# Closing a socket with unread bytes resets the connection, and the peer may lose the reply that says why: what still comes is
# read and dropped for this long (RFC 9112 section 9.6).
cdef double LINGER_S = 2.0


cdef class HttpServerConnection(AsyncServerConnection):
    """The serving side. ``server`` as for the tcp plane, and ``routes``, which its connections share."""

    cdef double linger_at   # when a connection that is closing is closed whether its peer has done so or not
    cdef bint parting       # told with GOAWAY why, and the peer shall be able to read it: see `dynwire.planes.http.parting`
    cdef double blocked_at  # when the socket last took something, or refused to

    def __init__(self, loop, sock, peer, server, base_context, **options):
        super().__init__(loop, sock, peer, server, base_context, **options)
        self.connection_id = os.urandom(8)
        self.routes = server.routes
        self.fixed = server.fixed
        self.linger_at = INFINITY

    cdef int on_hello(self, dict hello) except -1:
        return 0

    cdef int sent(self, size_t n) except -1:
        if n:
            self.blocked_at = self.now
        return Machine.sent(self, n)

    cdef int wait_writable(self) except -1:
        if not self.writer_blocked:
            self.blocked_at = dw_now()
        return AsyncConnection.wait_writable(self)

    cdef int on_closing(self) except -1:
        if not self.loop.is_closed():
            self.loop.call_soon(self._write_rest)
        return 0

    def _write_rest(self):
        if not self.dead and not self.writer_blocked:
            self.flush()

    cdef int drained(self) except -1:
        if (
            self.closing and not self.dead and self.linger_at == INFINITY and not self.has_output()
            and not (self.tls is not None and self.tls.waiting())
        ):  # fmt: skip
            self.linger_at = dw_now() + LINGER_S
            if self.tls is not None:
                self.tls.say_goodbye()
                self.tls.push(self.fd)
            try:
                self.sock.shutdown(SHUT_WR)
            except OSError:  # the peer has reset the connection
                self.linger_at = 0.0
            self.set_timer()
        return AsyncConnection.drained(self)

    cdef double next_wakeup(self):
        cdef double when = min(Machine.next_wakeup(self), self.linger_at)
        if self.writer_blocked and self.h1 is not None:
            when = min(when, self.blocked_at + self.stall_s)
        return when

    cdef int time_passed(self, double now) except -1:
        AsyncServerConnection.time_passed(self, now)
        if self.dead:
            return 0
        if now >= self.linger_at:
            return self.lost(PeerLost(f"the connection to {self.peer} is over", peer=self.peer, sent="maybe"))
        if self.writer_blocked and self.h1 is not None and now >= self.blocked_at + self.stall_s:
            # HTTP/2 resets streams that do not move on; here the connection is all there is.
            return self.lost(PeerLost(f"{self.peer} has read nothing for {self.stall_s:g} s", peer=self.peer, sent="maybe"))
        return 0

    cdef int protocol_failure(self, object error) except -1:
        if self.dead:
            return 0
        if isinstance(error, PlaneMismatch) and error.theirs == "the dynwire tcp plane":
            # Its client tells its caller what it got instead of a HELLO; HTTP/1.1 is what it knows by sight.
            body = (str(error) + "\n").encode()
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n"
            answer = b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body)
            c_send(self.fd, <const char *>answer, len(answer), MSG_DONTWAIT | MSG_NOSIGNAL)
        self.parting = self.engine is not None
        return AsyncConnection.protocol_failure(self, error)

    cdef int close_socket(self) except -1:
        if self.parting and not self.has_output() and not (self.tls is not None and self.tls.waiting()):
            self.server.parting.add(self.loop, self.sock)
            return 0
        return AsyncConnection.close_socket(self)

    def find_request(self, str request_id):
        """Ask the handler of the request with this id to finish early; returns whether there is one here."""
        cdef HandlerTask task
        for item in self.tasks():
            task = item
            if not task.done_ and task.context.id == request_id:
                task.on_cancel(1)
                return True
        return self.stop_request(request_id)
