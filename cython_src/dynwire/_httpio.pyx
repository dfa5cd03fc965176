"""Drivers of the http plane over sockets. They are those of the tcp plane (`_driver_async.pxi`, `_driver_blocking.pxi`), compiled
for `dynwire._httpwire`; what differs is how connections begin and what a client is told that speaks something else.
"""

from ._httpwire cimport HttpWire as Machine

include "_driver_libc.pxi"
include "_driver_async.pxi"
include "_driver_blocking.pxi"


cdef class HttpServerConnection(AsyncServerConnection):
    """The serving side. ``server`` as for the tcp plane, and ``routes``, which its connections share."""

    def __init__(self, loop, sock, peer, server, base_context, **options):
        super().__init__(loop, sock, peer, server, base_context, **options)
        self.connection_id = os.urandom(8)
        self.routes = server.routes
        self.fixed = server.fixed

    cdef int on_hello(self, dict hello) except -1:
        return 0

    cdef int protocol_failure(self, object error) except -1:
        if self.dead:
            return 0
        if isinstance(error, PlaneMismatch) and error.theirs.startswith("dynwire"):
            # Its client tells its caller what it got instead of a HELLO; HTTP/1.1 is what it knows by sight.
            body = (str(error) + "\n").encode()
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n"
            answer = b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body)
            c_send(self.fd, <const char *>answer, len(answer), MSG_DONTWAIT | MSG_NOSIGNAL)
        return AsyncConnection.protocol_failure(self, error)

    def find_request(self, str request_id):
        """Ask the handler of the request with this id to finish early; returns whether there is one here."""
        cdef HandlerTask task
        for item in self.tasks():
            task = item
            if not task.done_ and task.context.id == request_id:
                task.on_cancel(1)
                return True
        return self.stop_request(request_id)
