from libc.stdint cimport int64_t

cdef enum:
    PORT_DOWN = 0        # no connection to a NATS server at the moment; nats-py is reconnecting
    PORT_UP = 1
    PORT_CLOSED = 2      # for good

cdef class MessageSink:
    """Gets the messages of one or several subscriptions, on the event loop of their connection."""

    # ``headers`` is the whole block from "NATS/1.0" to the empty line, or NULL. The memory is valid during the call only, except that
    # ``owner``, if not None, is the Block (_buffers) whose first ``n`` bytes are the payload, and may be kept.
    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1
    # The messages of one read begin (True), or have all been delivered (False). Between the two no task is running (fast port), and
    # what is published leaves together after the second.
    cdef int on_batch(self, bint begin) except -1
    cdef int on_state(self, int state, object error) except -1
    cdef int on_writable(self) except -1                           # ``congested`` has become false

cdef class MessagePort:
    """The way out to the NATS server. Used from the loop's thread only."""

    cdef readonly bint fast              # compiled path; False: nats-py's public API
    cdef readonly int state              # PORT_*
    cdef readonly bint congested         # the server does not read: producers wait for on_writable
    cdef readonly int64_t max_payload    # what the server announced, in bytes, headers included

    # ``reply`` may be None, ``headers`` NULL. Copies what it needs, or keeps ``owner`` (the object that holds the payload) until it is written.
    # Raises ConnectionError-like typed errors only when closed; while down it raises PeerLost(sent="no"): the caller has to look at ``state``.
    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1
    cdef int flush(self) except -1       # write now what was published, instead of at the end of the batch or turn
    cdef size_t backlog(self)            # bytes published and not accepted by the socket
