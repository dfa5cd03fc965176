"""The NATS client protocol, without I/O: what the server sends is parsed, what is published is written into a buffer."""


cdef class MessageSink:
    """Gets the messages of one or several subscriptions. Subclasses say what happens."""

    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1:
        return 0

    cdef int on_batch(self, bint begin) except -1:
        return 0

    cdef int on_state(self, int state, object error) except -1:
        return 0

    cdef int on_writable(self) except -1:
        return 0


cdef class MessagePort:
    """The way out to the NATS server."""

    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1:
        return 0

    cdef int flush(self) except -1:
        return 0

    cdef size_t backlog(self):
        return 0
