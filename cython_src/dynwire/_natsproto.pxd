from libc.stdint cimport int64_t, uint64_t

from ._buffers cimport Block
from ._bytes cimport dw_buf, dw_chunk

cdef enum:
    PORT_DOWN = 0        # no connection to a NATS server at the moment; nats-py is reconnecting
    PORT_UP = 1
    PORT_CLOSED = 2      # for good

cdef enum:
    READ_BUFFER = 131072         # bytes; holds a control line and a message below LARGE_MESSAGE, with room for what follows
    LARGE_MESSAGE = 65536        # bytes of headers and payload from which a message that is not there completely lands in a Block
    LAST_PIECE = 32768           # the last bytes of a large payload come through the read buffer, with what follows them
    CONTROL_LINE = 4096          # the server's default for what clients publish (max_control_line)
    LINE_SLACK = 1024            # what the server may add to it: subscription id, sizes, JetStream's reply subject
    INFO_LINE = 65536            # the server's description of itself, with the URLs of its cluster
    HEADER_SLACK = 65536         # what the server may add to a message of max_payload bytes: JetStream's headers, traces

cdef enum:
    OP_MSG = 1           # (OP_MSG, sid, subject, reply, payload, headers or None), all bytes
    OP_INFO = 2          # (OP_INFO, JSON text)
    OP_ERR = 3           # (OP_ERR, text with its quotes)
    OP_PING = 4          # (OP_PING,)
    OP_PONG = 5

cdef class MessageSink:
    """Gets the messages of one or several subscriptions, on the event loop of their connection."""

    # ``headers`` is the whole block from "NATS/1.0" to the empty line, or NULL; whoever published it chose its bytes, nobody has
    # checked them. The memory is valid during the call only, except that ``owner``, if not None, is the Block (_buffers) whose
    # first ``n`` bytes are the payload, and may be kept. All calls come from callbacks of the loop: no task is running.
    cdef int on_message(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                        const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                        object owner) except -1
    # The messages of one read begin (True), or have all been delivered (False). Between the two no task is running, and
    # what is published leaves together after the second.
    cdef int on_batch(self, bint begin) except -1
    # ``state`` is PORT_*, ``error`` the reason or None. PORT_UP with an error: the connection stays, but the server refused
    # something (PermissionDenied, its ``details`` name operation and subject).
    cdef int on_state(self, int state, object error) except -1
    cdef int on_writable(self) except -1                           # ``congested`` has become false

cdef class MessagePort:
    """The way out to the NATS server. Used from the loop's thread only."""

    cdef readonly bint fast              # compiled path; False: nats-py's public API
    cdef readonly int state              # PORT_*
    cdef readonly bint congested         # the server does not read: producers wait for on_writable
    cdef readonly int64_t max_payload    # what the server announced, in bytes, headers included
    cdef readonly int64_t granted        # (plane) windows of the streams of all clients that use this connection
    cdef list starving                   # (plane) clients with requests that wait for some of that

    # ``reply`` may be None, ``headers`` NULL. Copies what it needs, or keeps ``owner`` (the object that holds the payload) until
    # it is written: from 64 KiB on the memory must not change as long as ``owner`` is referred to.
    # Raises ManagerClosed when closed,
    # PeerLost(sent="no") while down (the caller has to look at ``state``), and MessageTooLarge when headers and payload exceed
    # ``max_payload`` (the server would close the connection).
    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1
    cdef int flush(self) except -1       # write now what was published, instead of at the end of the batch or turn
    cdef size_t backlog(self)            # bytes published and not accepted by the socket

cdef int check_subject(bytes subject) except -1

cdef class NatsParser:
    cdef dict sinks                      # subscription id -> MessageSink; shared with whoever subscribes
    cdef readonly list others            # operations that are not for a sink, oldest first; the reader takes them away
    cdef readonly size_t others_bytes    # what their messages hold
    cdef readonly int64_t max_payload
    cdef readonly uint64_t received      # bytes
    cdef readonly uint64_t messages      # delivered to sinks
    cdef bint stopped                    # nothing more is parsed: the connection is closed, or the peer broke the protocol
    cdef unsigned char *buf
    cdef size_t start, end               # what was read and not parsed
    cdef size_t wanted                   # parsing again makes no sense before so many bytes are there
    cdef uint64_t last_sid
    cdef MessageSink last_sink
    cdef list batch                      # sinks that were told of a batch
    cdef MessageSink batch_sink          # the last of them that got a message
    # the large message that is arriving
    cdef bint large
    cdef uint64_t large_sid
    cdef size_t subject_n, reply_n, header_n, header_have, payload_n, payload_have
    cdef dw_buf names                    # subject and reply
    cdef dw_buf header
    cdef Block block
    cdef bint into_block                 # where target() has sent the reader

    cdef unsigned char *target(self, size_t *room) except NULL
    cdef int advance(self, size_t n) except -1
    cdef int end_batch(self) except -1
    cdef int parse(self) except -1
    cdef int check_beginning(self, const unsigned char *line, size_t n) except -1
    cdef int control_line(self, const unsigned char *line, size_t n) except -1
    cdef int message_line(self, const unsigned char *line, size_t n, bint with_headers) except -1
    cdef int start_large(self, uint64_t sid, const unsigned char *subject, size_t subject_n, const unsigned char *reply,
                         size_t reply_n, size_t header_n, size_t payload_n) except -1
    cdef bint fill_large(self) except -1
    cdef int deliver(self, uint64_t sid, const unsigned char *subject, size_t subject_n, const unsigned char *reply,
                     size_t reply_n, const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                     object owner) except -1
    cdef int forget_sink(self, uint64_t sid) except -1
    cdef int broken(self, str what) except -1
    cdef int sink_failed(self, MessageSink sink, object error) except -1
    cdef bytes line(self)

cdef class NatsWriter:
    cdef dw_buf buf
    cdef size_t head                     # bytes of buf that were taken
    cdef list references                 # of _Reference: payloads that lie elsewhere, in order
    cdef size_t reference_bytes
    cdef readonly uint64_t messages

    cdef int raw(self, const unsigned char *data, size_t n, object owner) except -1
    cdef int publish(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n,
                     const unsigned char *payload, size_t n, object owner) except -1
    cdef int refer(self, const unsigned char *data, size_t n, object owner) except -1
    cdef size_t pending(self)
    cdef int gather(self, dw_chunk *chunks, int most)
    cdef int sent(self, size_t n) except -1
    cdef object piece(self)
    cdef int clear(self) except -1
