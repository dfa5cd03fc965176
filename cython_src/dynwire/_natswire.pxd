from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ._link cimport Link, StreamBase
from ._natsproto cimport MessagePort

cdef enum:
    TOKEN_BYTES = 14             # end of an inbox subject: slot (6 hex digits) and sequence number (8) of a request
    SLOT_LIMIT = 0xFFFFFF        # streams of one side; as a slot it stands for the connection itself, in probes
    ITEM_OVERHEAD = 64           # what an item costs in credit beyond its payload, so that empty items are bounded too
    ITEM_ROOM = 128              # bytes of a message that headers of items may take
    CALL_CREDIT = 4096           # granted to a call: one item may always start, a second one is an error
    FIRST_CREDIT = 16384         # granted to a stream at first; grows up to the stream window while it is used up
    FOREIGN_TIMEOUT_MS = 60000   # of requests by tools: most take the first item and tell nobody that they want no more
    PROBE_TOKENS = 1024          # streams that one probe asks for
    INBOX_LIMIT = 512            # bytes of a reply subject
    HEAD_BYTES = 128             # room for the headers of a message without metadata
    FIELDS = 7                   # of a D: line; more are ignored

cdef enum:                       # in_flags of a stream at the server
    F_FOREIGN = 1                # the request had no D: header: any tool of NATS may have sent it
    F_QUEUE = 2                  # it came through the queue group: the caller does not know which worker has it
    F_KNOWN = 4                  # is in `by_reply`

ctypedef struct fields:
    int kind                     # letter of the D: line, or status code
    int count
    uint64_t v[FIELDS]

cdef enum:
    P_UNKNOWN = 0                # nothing was heard yet
    P_ALIVE = 1
    P_GONE = 2                   # nobody listened there; may be back after a while, with its connection
    P_LEAVING = 3                # has said that it takes no more requests

cdef class NatsPeer:
    """A worker as a client sees it."""
    cdef readonly int state              # P_*
    cdef public list waiters             # (drivers) who waits to know whether it is there: futures
    cdef readonly str address
    cdef readonly bytes control          # where messages about streams go; None: not known (yet)
    cdef readonly bytes subject          # what the subjects of its endpoints begin with
    cdef double heard                    # when something came from it
    cdef double probed                   # when it was last asked
    cdef double asked                    # when it was asked for the first time since it was last heard; infinity: was not
    cdef double patience                 # silence after which it is asked
    cdef uint32_t visit                  # last tick that has seen a stream of it …
    cdef bint due                        # … and whether it is to be asked in that
    cdef list lines
    cdef object __weakref__

cdef class NatsTarget:
    """Where the requests of a channel go."""
    cdef readonly NatsPeer peer
    cdef readonly bytes subject

cdef class NatsWire(Link):
    cdef MessagePort port                # None until there is a connection
    cdef readonly bytes subject          # client: its inboxes begin with it; server: the subjects of its endpoints
    cdef readonly bytes queue_subject    # (server) what subjects of queue groups begin with
    cdef readonly int64_t max_payload    # of the plane, in bytes with headers; the NATS server's may be lower
    cdef readonly int64_t stream_window
    cdef readonly int64_t budget         # (client) what may be granted to all streams of all clients on its connection
    cdef readonly int64_t granted        # (client) windows of its streams in flight
    cdef readonly double probe_interval  # s
    cdef double tick_at
    cdef uint32_t tick_no
    cdef uint32_t tick_seq               # (client) requests up to this one were there at the last tick
    cdef bint ask_all                    # (client) at the next tick: the connection was lost
    cdef double up_at                    # when the connection came back
    cdef bint came_back                  # it was lost before
    cdef uint32_t probe_no
    cdef public object peers             # (client) address -> NatsPeer
    cdef dict probes                     # number of a probe that is not answered -> NatsPeer (client), inbox prefix (server)
    cdef list outbox                     # messages that wait for the connection: (subject, reply, headers, body)
    cdef bytes accept_field              # (client) last field of its requests
    cdef bytes token                     # shared secret, or None
    # (server)
    cdef dict by_reply                   # inbox -> stream, of requests that were not answered at once
    cdef dict targets                    # endpoint as bytes -> what `resolve` has returned
    cdef bytes last_target_name
    cdef object last_target
    cdef dict callers                    # inbox prefix -> (connection id, peer)
    cdef bytes last_caller
    # counters
    cdef readonly uint64_t stale         # messages for requests that are over
    cdef readonly uint64_t malformed     # messages that were dropped because they make no sense
    cdef readonly uint64_t repeated      # requests and items that had come already
    cdef readonly uint64_t gaps          # streams that ended because items were lost
    cdef readonly uint64_t probes_sent

    # what drivers call
    cdef int receive(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                     const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                     object owner) except -1
    cdef int port_changed(self, double now) except -1
    cdef int forget_targets(self) except -1
    cdef bint fresh(self, NatsPeer peer, double now)
    cdef int ping(self, NatsPeer peer, double now) except -1
    cdef int put_goodbye(self) except -1
    # what drivers override
    cdef int on_peer(self, NatsPeer peer, object error) except -1
    # what durable mode overrides
    cdef int publish_request(self, StreamBase stream, NatsTarget target, bytes inbox, const unsigned char *headers,
                             size_t headers_n, const unsigned char *payload, size_t n, object owner) except -1
    cdef bint new_attempt(self, StreamBase stream, uint32_t attempt) except -1
    # receiving
    cdef int from_worker(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                         const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                         object owner) except -1
    cdef int from_caller(self, const unsigned char *subject, size_t subject_n, const unsigned char *reply, size_t reply_n,
                         const unsigned char *headers, size_t headers_n, const unsigned char *payload, size_t n,
                         object owner) except -1
    cdef int control_message(self, const unsigned char *rest, size_t rest_n, const unsigned char *reply, size_t reply_n,
                             int found, fields *f, const unsigned char *payload, size_t n) except -1
    cdef int own_message(self, uint32_t number, const unsigned char *reply, size_t reply_n, int found, fields *f,
                         const unsigned char *payload, size_t n) except -1
    cdef int item_came(self, StreamBase stream, fields *f, const unsigned char *payload, size_t n, object owner) except -1
    cdef int no_responders(self, StreamBase stream) except -1
    cdef int credit_came(self, StreamBase stream, uint64_t total) except -1
    cdef int before_request(self, StreamBase stream, fields *f) except -1
    cdef bint may_lose_caller(self, StreamBase stream) except -1
    cdef int caller_of(self, const unsigned char *reply, size_t n) except -1
    cdef bytes answer_probe(self, const unsigned char *reply, size_t reply_n, const unsigned char *payload, size_t n)
    cdef bytes answer_worker(self, const unsigned char *payload, size_t n)
    cdef int probe_answered(self, NatsPeer peer, const unsigned char *payload, size_t n) except -1
    cdef int kill_unknown(self, bytes prefix, const unsigned char *payload, size_t n) except -1
    cdef int lose(self, StreamBase stream, object error) except -1
    cdef int lose_peer(self, NatsPeer peer, object error) except -1
    cdef int lose_caller(self, bytes prefix) except -1
    # sending
    cdef bint up(self)
    cdef int put(self, bytes subject, bytes reply, const unsigned char *headers, size_t headers_n, const unsigned char *payload,
                 size_t n, object owner) except -1
    cdef int put_bytes(self, bytes subject, bytes reply, bytes headers, bytes body) except -1
    cdef bytes inbox_of(self, StreamBase stream)
    cdef bytes own_reply(self, StreamBase stream)
    cdef int book(self, int64_t credit) except -1
    cdef int feed_others(self) except -1
    cdef int64_t item_limit(self)
    cdef int check_size(self, object data, bytes meta) except -1
    cdef int answer(self, bytes inbox, int flags, bytes body) except -1
    cdef bytes fitting(self, bytes headers, bytes body)
    cdef int grant(self, StreamBase stream) except -1
    cdef int tick(self, double now) except -1
    cdef int tick_client(self, double now, bint stalled) except -1
    cdef int tick_server(self, double now) except -1
    cdef int ask(self, NatsPeer peer, list lines, double now) except -1

cdef enum:                       # what parse_headers returns
    HEADERS_NONE = 0             # without a D: line
    HEADERS_FOUND = 1
    HEADERS_STATUS = 2           # from the NATS server
    HEADERS_BAD = -1

cdef int parse_headers(const unsigned char *h, size_t n, fields *f, size_t *others) noexcept nogil
cdef bint parse_token(const unsigned char *p, uint32_t *slot, uint32_t *seq) noexcept nogil
cdef bytes header_lines(dict headers, object request_id, bytes token)
