from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ._bytes cimport dw_chunk

cdef extern from *:
    """
    #ifndef DW_BUCKET
    #define DW_BUCKET
    /* Token bucket: `burst` at once and `rate` per second after that. */
    typedef struct { double tokens, burst, rate, at; } dw_bucket;
    static inline void dw_bucket_init(dw_bucket *b, double burst, double rate) {
        b->tokens = b->burst = burst; b->rate = rate; b->at = 0.0;
    }
    static inline int dw_bucket_take(dw_bucket *b, double now, double n) {
        if (now > b->at) {
            if (b->at > 0.0) b->tokens += (now - b->at) * b->rate;
            if (b->tokens > b->burst) b->tokens = b->burst;
            b->at = now;
        }
        if (b->tokens < n) return 0;
        b->tokens -= n;
        return 1;
    }
    #endif
    """
    ctypedef struct dw_bucket:
        double tokens, burst, rate, at
    void dw_bucket_init(dw_bucket *b, double burst, double rate) nogil
    int dw_bucket_take(dw_bucket *b, double now, double n) nogil   # 0: empty

cdef enum:
    K_REQUEST = 0                # kind of a header block
    K_RESPONSE = 1
    K_INFORMATIONAL = 2
    K_TRAILERS = 3

cdef enum:                       # RFC 9113 section 5.1; without the two states of server push
    ST_IDLE = 0
    ST_OPEN = 1
    ST_HALF_LOCAL = 2            # we have sent END_STREAM
    ST_HALF_REMOTE = 3           # the peer has
    ST_CLOSED = 4

cdef enum:
    STREAM_BACKLOG = 262144      # bytes queued for one stream from which room() says no
    CONNECTION_BACKLOG = 1048576  # framed bytes that wait for the socket from which it says no for every stream
    H2_CHUNKS = 16               # chunks that gather names at most

cdef class Http2Stream:
    cdef readonly uint32_t id
    cdef readonly uint8_t state
    cdef uint8_t bits            # SB_ of the engine
    cdef int64_t send_window, recv_window
    cdef size_t queued           # bytes handed to send_data and not framed yet
    cdef public object data      # the owner's object for the stream
    # the engine's part
    cdef int64_t unannounced     # bytes consumed and not yet granted again
    cdef int64_t expected        # content-length; -1: not given
    cdef int64_t arrived         # bytes of the body
    cdef double progress         # when bytes of its queue were framed last
    cdef list pieces             # queued bytes
    cdef list trailers           # header block that waits for the queued bytes

cdef class Http2Owner:
    """What an engine calls."""
    cdef int on_headers(self, Http2Stream stream, list headers, int kind, bint end) except -1
    cdef int on_data(self, Http2Stream stream, const unsigned char *p, size_t n, bint end) except -1
    cdef int on_reset(self, Http2Stream stream, uint32_t code, bint remote) except -1
    cdef int on_room(self, Http2Stream stream) except -1
    cdef int on_closed(self, Http2Stream stream) except -1
    cdef int on_settings(self) except -1
    cdef int on_settings_ack(self) except -1
    cdef int on_pong(self, uint64_t payload) except -1
    cdef int on_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1
    cdef int on_capacity(self) except -1
    cdef int on_output(self) except -1

cdef class Http2Engine:
    """One HTTP/2 connection without I/O; NativeEngine and LibraryEngine implement it."""
    cdef Http2Owner owner
    cdef readonly bint is_client
    cdef public double now
    cdef readonly uint32_t live          # streams that count towards the limit of streams
    cdef readonly uint64_t rx_bytes
    cdef public double last_rx
    cdef readonly bint ready             # the peer's SETTINGS have come
    cdef public bint draining            # GOAWAY sent or received
    cdef readonly bint exhausted         # client: stream ids are used up
    cdef readonly bint dead              # a connection error: nothing is read any more
    # limits, see HTTP2.md section 3
    cdef readonly uint32_t max_frame_size
    cdef readonly uint32_t max_concurrent_streams
    cdef readonly uint32_t stream_window
    cdef readonly int64_t connection_window
    cdef readonly uint32_t max_header_list
    cdef readonly uint32_t max_header_fields
    cdef readonly uint32_t continuation_frames
    cdef readonly uint32_t settings_entries
    cdef readonly uint32_t control_backlog
    cdef readonly int64_t tiny_data
    cdef dw_bucket resets                # streams reset by the peer, or by us because of what the peer did
    cdef dw_bucket glitches              # what costs us little but has no use
    cdef dw_bucket empty                 # DATA frames with nothing in them

    cdef void recv_target(self, unsigned char **base, size_t *size)
    cdef int received(self, size_t n, double now) except -1
    cdef int start(self, double now) except -1
    cdef Http2Stream open_stream(self)
    cdef int send_headers(self, Http2Stream s, list headers, bint end) except -1
    cdef int send_data(self, Http2Stream s, const unsigned char *p, size_t n, object keep, bint end) except -1
    cdef bint room(self, Http2Stream s)
    cdef int reset(self, Http2Stream s, uint32_t code) except -1
    cdef int release(self, Http2Stream s) except -1
    cdef int consumed(self, Http2Stream s, size_t n) except -1
    cdef int set_windows(self, uint32_t stream, uint64_t connection) except -1
    cdef int ping(self, uint64_t payload) except -1
    cdef int goaway(self, uint32_t code, bytes debug, bint final) except -1
    cdef bint has_output(self)
    cdef size_t backlog(self)
    cdef int gather(self, dw_chunk *chunks, size_t limit)
    cdef int sent(self, size_t n) except -1
    cdef double next_wakeup(self)
    cdef int on_time(self, double now) except -1
    cdef dict peer_settings(self)        # what the peer announced, by code, for on_settings
    cdef dict counters(self)             # windows and queues, for tests and diagnostics

cdef class NativeEngine(Http2Engine):
    pass
