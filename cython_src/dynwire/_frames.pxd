from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._buffers cimport Block, Payload

cdef extern from *:
    """
    #include <string.h>
    #include <stdint.h>
    /* Little-endian loads and stores; memcpy because frames are not aligned. Compiles to one instruction each. */
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "dynwire's wire codec is written for little-endian hosts"
    #endif
    static inline uint32_t dw_ld32(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline uint16_t dw_ld16(const unsigned char *p) { uint16_t v; memcpy(&v, p, 2); return v; }
    static inline void dw_st32(unsigned char *p, uint32_t v) { memcpy(p, &v, 4); }
    static inline void dw_st16(unsigned char *p, uint16_t v) { memcpy(p, &v, 2); }
    static inline void dw_header(unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint16_t aux,
                                 uint32_t stream, uint32_t arg) {
        dw_st32(p, length); p[4] = type; p[5] = flags; dw_st16(p + 6, aux); dw_st32(p + 8, stream); dw_st32(p + 12, arg);
    }
    typedef struct { const void *base; size_t len; } dw_chunk;
    """
    uint32_t dw_ld32(const unsigned char *p) nogil
    uint16_t dw_ld16(const unsigned char *p) nogil
    void dw_st32(unsigned char *p, uint32_t v) nogil
    void dw_st16(unsigned char *p, uint16_t v) nogil
    void dw_header(unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint16_t aux, uint32_t stream,
                   uint32_t arg) nogil
    ctypedef struct dw_chunk:
        const void *base
        size_t len

cdef enum:
    HEADER_BYTES = 16
    PREFACE_BYTES = 8
    FRAGMENT_FROM = 65536        # payloads from this size on travel as announcement + CONT frames
    FRAGMENT_BYTES = 262144      # body of one CONT frame that we send
    POLITE_FRAGMENT_BYTES = 131072  # the same while small messages use the connection too
    POLITE_IN_FLIGHT = 524288    # and then no more than this much of large payloads is between the two programs
    FRAME_LIMIT = 1048576        # largest CONT body that we accept
    META_LIMIT = 32768           # bytes of metadata of one request
    NAME_LIMIT = 256             # bytes of an endpoint name
    SMALL_LIMIT = 98900          # largest body of any other frame: payload + metadata + name + lengths
    FIRST_READ_BYTES = 4096       # how much is read at first behind a large payload: the next message may be large too
    STAGING_BYTES = 131072       # receive buffer; holds any frame but CONT
    HELLO_LIMIT = 16384
    ENDPOINTS_LIMIT = 4096       # endpoint numbers of one connection
    ITEM_OVERHEAD = 64           # what an item costs in credit beyond its payload, so that empty items are bounded too
    MAX_CHUNKS = 16

cdef enum:
    T_HELLO = 1
    T_REQUEST = 2
    T_DATA = 3
    T_CONT = 4
    T_END = 5
    T_ERROR = 6
    T_CANCEL = 7
    T_WINDOW = 8
    T_ACCEPT = 9
    T_PING = 10
    T_PONG = 11
    T_GOAWAY = 12
    T_OPTIONAL = 128             # types from here on are skipped by those who do not know them

cdef enum:
    F_KIND = 0x03                # 0 raw, 1 msgpack, 2 json
    F_NAMED = 0x04
    F_META = 0x08
    F_FRAGMENTED = 0x10
    F_LAST = 0x20

cdef enum:
    S_ZOMBIE = 1                 # given up on our side; the slot waits for the peer's last frame
    S_ASSEMBLING = 2             # a fragmented payload is arriving
    S_SENDING = 4                # a fragmented payload is leaving
    S_ENDED = 8                  # the last frame has been sent or received
    S_ACCEPTED = 16
    S_PENDING = 32               # (client) not yet written: waits for the connection's writer, a slot or credit
    S_WRITTEN = 64
    S_QUEUED = 256               # (server) in waiting_credit or waiting_writer
    S_STOP_EARLY = 128           # (server) the caller asked to stop before its request had arrived completely

cdef uint32_t CONNECTION_WINDOW_ID

cdef class StreamBase:
    cdef WireConnection conn
    cdef uint32_t sid
    cdef uint32_t seq
    cdef uint16_t state
    cdef uint8_t in_flags
    cdef int64_t send_credit
    cdef int64_t refund           # consumed and not yet announced
    cdef double timer             # when on_timer wants to be called, in the connection's clock; infinity: never
    cdef Block in_block
    cdef uint32_t in_total
    cdef uint32_t in_have
    cdef bint keeps_items         # (client) refunds items when the application takes them; others count as taken on arrival
    cdef object in_target         # (server) endpoint of the request that is being assembled
    cdef bytes in_meta
    cdef uint32_t in_arg
    cdef int64_t cost             # server: credit to refund when the request ends; client: credit left to the server here
    cdef uint64_t mark            # (client) value of tx_frames_bytes at which the request's frame begins

    cdef int on_item(self, object item, int kind, bint last) except -1
    cdef int on_end(self) except -1
    cdef int on_error(self, int code, bytes body) except -1
    cdef int on_accept(self) except -1
    cdef int on_cancel(self, int kind) except -1
    cdef int on_stop_early(self) except -1
    cdef int on_credit(self) except -1
    cdef int on_sent(self) except -1
    cdef int on_timer(self, double now) except -1
    cdef int on_lost(self, object error) except -1
    cdef int on_freed(self) except -1

cdef class LargeSend:
    cdef StreamBase stream
    cdef Py_buffer view
    cdef bint held
    cdef size_t offset
    cdef uint32_t sid
    cdef bint dropped

cdef class WireConnection:
    cdef readonly bint is_client
    cdef public bint ready                    # hello received
    cdef public bint draining                 # goaway received or sent
    cdef public bint dead
    cdef public object peer                   # address text for errors
    # limits
    cdef readonly int64_t max_message         # ours
    cdef readonly int64_t peer_max_message
    cdef readonly uint32_t max_streams        # server: ours; client: the server's
    cdef readonly int64_t stream_window       # what we grant per stream
    cdef readonly int64_t connection_window   # what we grant per connection
    cdef readonly int64_t peer_stream_window
    cdef readonly int64_t peer_connection_window
    cdef public bytes connection_id           # 8 bytes, chosen by the client
    # receive
    cdef unsigned char *rbuf
    cdef size_t rpos, rend
    cdef unsigned char *land
    cdef size_t land_left
    cdef StreamBase land_stream
    cdef Block land_block                     # keeps the memory that the kernel may be writing to, whatever becomes of the stream
    cdef size_t skip_left
    cdef uint32_t assembling
    cdef bint expect_large                    # the last thing that came was the end of a large payload
    cdef readonly uint64_t rx_bytes
    cdef readonly uint64_t landed_bytes       # written by the kernel straight into their payload
    cdef readonly uint64_t rx_frames
    cdef readonly uint64_t tx_frames
    cdef bint preface_done
    cdef public double last_rx
    cdef double now
    # send
    cdef uint64_t handed_bytes                # as far as a write that is going on may have got
    cdef double last_tx                       # when a fragment was last accepted by the socket
    cdef bint stepping                        # (driver) a handler of this connection is running
    cdef readonly uint64_t tx_frames_bytes    # bytes of frames (large payloads apart) that were handed to the kernel
    cdef public bint in_dispatch              # (driver) inside a read callback: no task is running, output is flushed at its end
    cdef list to_wake                         # (driver) streams whose readers are woken once the received bytes are dealt with
    cdef public bint congested                # (driver) the peer does not read: producers wait
    cdef object waiting_writer                # deque of streams to call when it reads again
    cdef unsigned char *obuf
    cdef size_t ocap, oend
    cdef unsigned char *wbuf
    cdef size_t wcap, wpos, wend
    cdef object large                         # deque of LargeSend, round robin
    cdef double small_until                   # until then the connection counts as used by small messages too
    cdef uint64_t large_sent                  # bytes of fragments written
    cdef uint64_t large_acked                 # of these, the peer has read (it has answered the PING behind them)
    cdef LargeSend cur                        # fragment that was sent in part
    cdef unsigned char cur_header[HEADER_BYTES]
    cdef size_t cur_len, cur_done             # header + slice
    cdef bint cur_after                       # it stands behind the frames in what gather named
    cdef int64_t send_credit
    cdef int64_t recv_credit
    cdef int64_t refund
    # streams
    cdef list slots                           # stream number -> stream or None
    cdef uint32_t *free_slots
    cdef uint32_t free_len
    cdef readonly uint32_t live               # streams in slots
    cdef uint32_t seq
    cdef uint32_t goaway_seq                  # (server) last request taken before GOAWAY
    cdef double min_timer
    cdef list interned                        # (server) endpoint number -> target
    cdef uint16_t next_endpoint
    cdef object waiting_credit                # (server) deque of streams that wait for connection credit

    # what drivers override
    cdef int on_hello(self, dict hello) except -1
    cdef object resolve(self, str name)
    cdef StreamBase make_stream(self)
    cdef int on_request(self, StreamBase stream, object target, object payload, int kind, bytes meta,
                        uint32_t timeout_ms) except -1
    cdef int on_goaway(self, int code, uint32_t last_seq, str text) except -1
    cdef int on_pong(self, uint32_t a, uint32_t b) except -1
    cdef int on_slot_free(self) except -1
    cdef int wrote(self) except -1

    # receiving
    cdef void recv_target(self, unsigned char **base, size_t *size)
    cdef int received(self, size_t n, double now) except -1
    cdef int parse(self) except -1
    cdef int dispatch(self, unsigned char *p, uint32_t length) except -1
    cdef int finish_landing(self) except -1
    cdef int fail(self, str text) except -1
    cdef bint _parse_preface(self, unsigned char *p, size_t avail) except -1
    cdef int _assembly_over(self, StreamBase stream) except -1
    cdef int _deliver(self, StreamBase stream, object item, int flags, uint32_t size) except -1
    cdef int _hello(self, unsigned char *body, uint32_t length) except -1
    cdef int _announce(self, StreamBase stream, uint32_t total, uint8_t flags) except -1
    cdef int _request(self, unsigned char *p, uint32_t length) except -1
    cdef int _window(self, uint32_t sid, uint32_t increment) except -1
    cdef size_t _sent_fragment(self, size_t n) except? 0
    # sending
    cdef unsigned char *reserve(self, size_t n) except NULL
    cdef int put_frame(self, uint8_t type, uint8_t flags, uint16_t aux, uint32_t sid, uint32_t arg,
                       const unsigned char *body, size_t n) except -1
    cdef int add_large(self, StreamBase stream, object owner) except -1
    cdef int put_request(self, StreamBase stream, uint16_t endpoint, bytes name, const unsigned char *p, size_t n,
                         object owner, int kind, bytes meta, uint32_t timeout_ms) except -1
    cdef int put_item(self, StreamBase stream, const unsigned char *p, size_t n, object owner, int kind, bint last) except -1
    cdef int put_end(self, StreamBase stream) except -1
    cdef int put_error(self, StreamBase stream, int code, bytes body) except -1
    cdef int put_cancel(self, StreamBase stream, int kind) except -1
    cdef int put_goaway(self, int code, str text) except -1
    cdef int consumed(self, StreamBase stream, int64_t cost) except -1
    cdef int request_done(self, StreamBase stream) except -1
    cdef void drop_large(self, StreamBase stream)
    cdef bint has_output(self)
    cdef bint large_must_wait(self)
    cdef size_t output_backlog(self)
    cdef int gather(self, dw_chunk *chunks, size_t limit)
    cdef int sent(self, size_t n) except -1
    # streams
    cdef int take_slot(self, StreamBase stream) except -1
    cdef int put_slot(self, StreamBase stream, uint32_t sid) except -1
    cdef StreamBase get_slot(self, uint32_t sid)
    cdef int free_slot(self, StreamBase stream) except -1
    cdef int abandon(self, StreamBase stream, int kind) except -1
    cdef int arm(self, StreamBase stream, double when) except -1
    cdef int sweep(self, double now) except -1
    cdef list take_all_streams(self)
    cdef bint may_send(self, StreamBase stream) except -1
    # requests (client)
    cdef public int channel_buffer            # requests that may wait for the writer, a free stream or credit
    cdef public double keepalive_interval
    cdef public double keepalive_timeout
    cdef bint writer_blocked                  # (driver) the socket took no more
    cdef int blocked                          # requests queued since then
    cdef object pending                       # deque of requests that wait for a free stream or for credit
    cdef dict endpoint_numbers
    cdef double live_since
    cdef double ping_at
    cdef double ping_sent
    cdef int submit(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                    double now) except -1
    cdef int send_request(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline,
                          double due, double now) except -1
    cdef int send_pending(self) except -1
    cdef int forget_pending(self, StreamBase stream) except -1
    cdef int refuse_after(self, uint32_t last_seq, object error) except -1
    cdef bint check_alive(self, double now) except -1
    cdef double next_wakeup(self)
    cdef object overloaded(self, int depth, str text)
    cdef int on_saturation(self) except -1
    cdef int on_request_sent(self, StreamBase stream) except -1
    cdef int writable_again(self) except -1
