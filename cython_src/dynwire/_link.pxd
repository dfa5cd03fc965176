from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._buffers cimport Block
from ._bytes cimport dw_chunk

cdef enum:
    MAX_CHUNKS = 16              # of one write
    MAX_TARGETS = 2              # of one read
    META_LIMIT = 32768           # bytes of metadata of one request
    PRODUCE_LIMIT = 262144       # backlog from which handlers wait before they produce more

cdef enum:
    S_ZOMBIE = 1                 # given up on our side; the slot waits for the peer's last frame
    S_ASSEMBLING = 2             # a payload is arriving in pieces
    S_SENDING = 4                # a large payload is leaving
    S_ENDED = 8                  # the last frame has been sent or received
    S_ACCEPTED = 16
    S_PENDING = 32               # (client) not yet written: waits for the connection's writer, a slot or credit
    S_WRITTEN = 64
    S_STOP_EARLY = 128           # the caller asked to stop before its request was sent, or had arrived completely at the server
    S_QUEUED = 256               # (server) in waiting_credit or waiting_writer

cdef class StreamBase:
    cdef Link conn
    cdef uint32_t sid
    cdef uint32_t seq
    cdef uint16_t state
    cdef uint8_t in_flags
    cdef uint8_t reply_kind_      # (server) codec that the caller wants replies in; 0: that of its request
    cdef int64_t send_credit
    cdef int64_t refund           # consumed and not yet announced
    cdef double timer             # when on_timer wants to be called, in the connection's clock; infinity: never
    cdef Block in_block
    cdef uint32_t in_total
    cdef uint32_t in_have
    cdef bint keeps_items         # (client) refunds items when the application takes them; others count as taken on arrival
    cdef object in_target         # (server) endpoint of the request that is being assembled
    cdef object in_meta
    cdef object in_id             # (server) the caller's id of the request, where its machine reads it from elsewhere; or None
    cdef uint32_t in_arg
    cdef int64_t cost             # server: credit to refund when the request ends; client: credit left to the server here
    cdef uint64_t mark            # (client) value of tx_frames_bytes at which the request's frame begins
    cdef object under             # what the machine itself keeps for the stream
    cdef uint32_t attempt         # (server) delivery of a queue by which the request came; 0: it came directly
    cdef uint32_t deliveries      # (server) how often a worker was given the request, as far as is known; 0: it came directly

    cdef int on_item(self, object item, int kind, bint last) except -1
    cdef int on_end(self) except -1
    cdef int on_error(self, int code, bytes body) except -1
    cdef int on_fault(self, object error) except -1
    cdef int on_accept(self) except -1
    cdef int on_cancel(self, int kind) except -1
    cdef int on_stop_early(self) except -1
    cdef int on_credit(self) except -1
    cdef int on_sent(self) except -1
    cdef int on_timer(self, double now) except -1
    cdef int on_lost(self, object error) except -1
    cdef bint on_restart(self) except -1
    cdef int on_freed(self) except -1

cdef class Link:
    cdef readonly bint is_client
    cdef public bint ready                    # the peer has introduced itself
    cdef public bint draining                 # a farewell was received or sent
    cdef public bint dead
    cdef public object peer                   # address text for errors
    cdef readonly int64_t max_message         # ours
    cdef readonly int64_t peer_max_message
    cdef readonly uint32_t max_streams        # server: ours; client: the server's
    cdef int item_overhead                    # what an item costs in credit beyond its payload
    cdef public bytes connection_id           # 8 bytes, chosen by the client
    cdef double accept_after                  # (server) seconds after which a request without an item yet is accepted
    # clock and counters
    cdef public double last_rx
    cdef double now
    cdef double last_tx                       # when a fragment was last accepted by the socket
    cdef readonly uint64_t rx_bytes
    cdef readonly uint64_t tx_frames_bytes    # bytes of frames (large payloads apart) that were handed to the kernel
    cdef uint64_t handed_bytes                # as far as a write that is going on may have got
    # driver
    cdef bint stepping                        # a handler of this connection is running
    cdef public bint in_dispatch              # inside a read callback: no task is running, output is flushed at its end
    cdef list to_wake                         # streams whose readers are woken once the received bytes are dealt with
    cdef public bint congested                # the peer does not read: producers wait
    cdef object waiting_writer                # deque of streams to call when it reads again
    cdef bint writer_blocked                  # the socket took no more
    cdef int blocked                          # requests queued since then
    # streams
    cdef list slots                           # stream number -> stream or None
    cdef uint32_t *free_slots
    cdef uint32_t free_len
    cdef readonly uint32_t live               # streams in slots
    cdef uint32_t seq
    cdef uint32_t goaway_seq                  # (server) last request taken before the farewell
    cdef double min_timer
    cdef object waiting_credit                # (server) deque of streams that wait for connection credit
    # requests (client)
    cdef public int channel_buffer            # requests that may wait for the writer, a free stream or credit
    cdef public double keepalive_interval
    cdef public double keepalive_timeout
    cdef public str keepalive_setting         # its name, for the error
    cdef object pending                       # deque of requests that wait for a free stream or for credit
    cdef double live_since
    cdef double ping_at
    cdef double ping_sent

    # what drivers override
    cdef int on_hello(self, dict hello) except -1
    cdef object resolve(self, str name)
    cdef StreamBase make_stream(self)
    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, object meta,
                        uint32_t timeout_ms) except -1
    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1
    cdef int on_slot_free(self) except -1
    cdef int on_saturation(self) except -1
    cdef int on_request_sent(self, StreamBase stream) except -1
    cdef int wrote(self) except -1
    cdef int broken(self, object error) except -1

    # what machines implement: receiving
    cdef int recv_targets(self, dw_chunk *targets)
    cdef bint more_expected(self)
    cdef int received(self, size_t n, double now) except -1
    # sending
    cdef bint has_output(self)
    cdef size_t output_backlog(self)
    cdef uint64_t handed_upto(self)
    cdef bint one_piece(self)
    cdef int gather(self, dw_chunk *chunks, size_t limit)
    cdef int sent(self, size_t n) except -1
    # (server)
    cdef bint may_send(self, StreamBase stream) except -1
    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1
    cdef int put_end(self, StreamBase stream) except -1
    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1
    cdef int put_accept(self, StreamBase stream) except -1
    cdef int request_done(self, StreamBase stream) except -1
    # (client)
    cdef bint may_request(self)
    cdef int large_waiting(self)
    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline,
                          double due, double now) except -1
    cdef int put_cancel(self, StreamBase stream, int kind) except -1
    cdef int consumed(self, StreamBase stream, int64_t cost) except -1
    cdef int abandon(self, StreamBase stream, int kind) except -1
    cdef int put_ping(self) except -1
    # both
    cdef int put_goaway(self, int code, str text) except -1
    cdef int farewell(self, str text) except -1
    cdef int last_words(self) except -1
    cdef bint has_unsent(self)
    cdef double next_wakeup(self)
    cdef int time_passed(self, double now) except -1

    # streams
    cdef int take_slot(self, StreamBase stream) except -1
    cdef int put_slot(self, StreamBase stream, uint32_t sid) except -1
    cdef StreamBase get_slot(self, uint32_t sid)
    cdef int free_slot(self, StreamBase stream) except -1
    cdef int arm(self, StreamBase stream, double when) except -1
    cdef int sweep(self, double now) except -1
    cdef list take_all_streams(self)
    cdef int writable_again(self) except -1
    # requests (client)
    cdef int submit(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                    double now) except -1
    cdef int send_pending(self) except -1
    cdef int forget_pending(self, StreamBase stream) except -1
    cdef int refuse_after(self, uint32_t last_seq, object error) except -1
    cdef int refuse_streams(self, uint32_t last_seq, object error) except -1
    cdef bint check_alive(self, double now) except -1
    cdef object overloaded(self, int depth, str text)
    cdef object item_too_large(self, int64_t size, int64_t limit, str endpoint)

cdef bint calls_follow()             # more calls are about to be started on this loop: a request is not written for itself
cdef void set_calls_follow(bint more)

cdef Py_ssize_t size_of(object data) except -1
