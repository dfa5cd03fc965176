from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ._bytes cimport dw_buf, dw_chunk
from ._hpack cimport HpackDecoder, HpackEncoder

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
    cdef bint counted            # in Http2Engine.live
    cdef int64_t send_window, recv_window
    cdef size_t queued           # bytes handed to send_data and not framed yet
    cdef public object data      # the owner's object for the stream
    # the engine's part
    cdef int64_t unannounced     # bytes consumed and not yet granted again
    cdef int64_t expected        # content-length; -1: not given
    cdef int64_t arrived         # bytes of the body
    cdef double progress         # when bytes of its queue were framed last; before it had any: when it was opened
    cdef uint32_t answered       # server: number of the read during or after which the response's head was sent, 0: not yet
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
    cdef bint wants_capacity             # client: tell the owner when there is room for a stream
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
    cdef readonly double handshake_s
    cdef readonly double stall_s
    cdef dw_bucket resets                # streams reset by the peer early, or by us because of what the peer did
    cdef dw_bucket glitches              # what costs us little but has no use
    cdef dw_bucket empty                 # DATA frames with nothing in them
    cdef dict streams                    # open streams by id

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
    cdef list take_streams(self)         # empties `streams`; for a connection that is gone. No callbacks
    cdef dict peer_settings(self)        # what the peer announced, by code, for on_settings
    cdef dict counters(self)             # windows and queues, for tests and diagnostics

ctypedef struct RefFrame:        # a DATA frame that is sent from its payload's own memory
    unsigned char head[9]
    const unsigned char *base
    size_t size

cdef class Piece:
    """Bytes of one stream that are not framed yet: copied, or in the memory of an object that is held."""
    cdef Py_buffer view
    cdef bint held
    cdef dw_buf own
    cdef const unsigned char *base   # of held memory
    cdef size_t size
    cdef size_t offset           # as far as it is framed

cdef class NativeEngine(Http2Engine):
    # receiving
    cdef unsigned char *rbuf     # NULL while nothing is being read
    cdef size_t rcap, rpos, rend
    cdef size_t need             # bytes of the incomplete frame at rpos that have to be there before it can be dealt with
    cdef size_t preface_at       # bytes of the client's preface that have come
    cdef size_t skip_left        # bytes of the current frame that nobody wants
    cdef size_t data_left        # bytes of the current DATA frame that are still to come, without the padding
    cdef size_t pad_left
    cdef bint data_end
    cdef Http2Stream data_stream
    cdef dw_buf block            # header block that arrives in several frames
    cdef uint32_t block_sid
    cdef uint8_t block_flags
    cdef bint block_selfdep
    cdef uint32_t block_frames
    cdef HpackDecoder decoder
    cdef uint32_t last_peer_id   # server: highest id that a request had
    cdef uint32_t goaway_last    # server: newer streams are ignored
    cdef Http2Stream hot         # the stream that was looked up last
    cdef uint32_t reads          # calls of `received` that brought something
    cdef int64_t recv_window     # connection: what the peer may still send
    cdef int64_t unannounced
    cdef int64_t unread          # body bytes at the owner
    cdef int64_t credit          # control frames that are free of charge because of what we have sent
    cdef uint64_t granted, flow_received
    cdef list valid_request      # the last header block that passed, see _check_request
    cdef int64_t valid_length
    cdef bint valid_head
    cdef list valid_response
    cdef int64_t valid_response_length
    cdef int valid_status
    # of the header block that was checked last
    cdef int64_t v_length
    cdef bint v_head
    cdef int v_status
    cdef uint32_t *reset_ring    # ids of streams that were reset, lowest bit: by us
    cdef uint32_t reset_cap, reset_at
    cdef uint32_t ended_ring[32]
    cdef uint32_t ended_at
    cdef object settings_sent    # deque of (time, stream window) of SETTINGS that wait for their ACK
    cdef int64_t local_initial   # stream window that new streams begin with
    # sending
    cdef HpackEncoder encoder
    cdef uint32_t peer_max_frame
    cdef int64_t peer_initial
    cdef uint32_t peer_max_streams
    cdef dict peer_values
    cdef public uint32_t next_id         # client; tests set it near the end
    cdef uint32_t highest_sent
    cdef int64_t send_window
    cdef dw_buf obuf, wbuf
    cdef size_t wpos
    cdef uint32_t last_sid       # the frame at the end of obuf, at last_at, is DATA of this stream; 0: none
    cdef size_t last_at
    cdef uint32_t control_o, control_w   # answers that the peer made us queue, in obuf and wbuf
    cdef RefFrame refs[7]
    cdef list ref_pieces
    cdef int ref_n, ref_i
    cdef size_t ref_done
    cdef size_t ref_bytes        # of all that is not written
    cdef object ring             # deque of streams with bytes to frame and a window to do so
    cdef size_t queued_total
    cdef list roomless           # streams for which room() has said no
    cdef double started_at, stall_at

    # receiving
    cdef int fail(self, uint32_t code, str text) except -1
    cdef int parse(self) except -1
    cdef int _preface(self) except -1
    cdef int _frame(self, const unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint32_t sid) except -1
    cdef int _data(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1
    cdef int _data_bytes(self) except -1
    cdef int _headers(self, const unsigned char *p, uint32_t length, uint8_t flags, uint32_t sid) except -1
    cdef int _block(self, const unsigned char *p, size_t n, uint8_t flags, uint32_t sid, bint selfdep) except -1
    cdef int _request(self, list headers, bint end, uint32_t sid, int overflow, bint selfdep) except -1
    cdef int _response(self, Http2Stream s, list headers, bint end) except -1
    cdef int _ended(self, Http2Stream s, list headers, int kind) except -1
    cdef int _answer(self, uint32_t sid, bytes status, bint end) except -1
    cdef int _settings(self, const unsigned char *p, uint32_t length, uint8_t flags) except -1
    cdef int _shift_windows(self, int64_t delta) except -1
    cdef int _window_update(self, uint32_t sid, uint32_t increment) except -1
    cdef int _goaway(self, const unsigned char *p, uint32_t length) except -1
    cdef int _glitch(self, str text) except -1
    cdef int _charge(self, str text) except -1
    cdef bint _rapid(self, Http2Stream s)
    cdef int _situation(self, uint32_t sid)
    cdef int _verdict(self, int situation, int kind, uint32_t sid, Http2Stream s) except -1
    cdef int _stream_error(self, uint32_t sid, Http2Stream s, uint32_t code) except -1
    cdef Http2Stream _find(self, uint32_t sid)
    cdef Http2Stream _new_stream(self, uint32_t sid)
    cdef int _uncount(self, Http2Stream s) except -1
    cdef int _close(self, Http2Stream s, int reason) except -1
    cdef int _remember(self, uint32_t sid, int reason) except -1
    cdef int _check_request(self, list headers) except -1
    cdef int _check_response(self, list headers) except -1
    cdef int _check_trailers(self, list headers) except -1
    cdef int _give_back(self, Http2Stream s, int64_t n) except -1
    # sending
    cdef unsigned char *_reserve(self, size_t n) except NULL
    cdef int _put(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1
    cdef int _put_control(self, uint8_t type, uint8_t flags, uint32_t sid, const unsigned char *body, size_t n) except -1
    cdef int _put_rst(self, uint32_t sid, uint32_t code) except -1
    cdef int _put_own_rst(self, uint32_t sid, uint32_t code) except -1
    cdef int _put_update(self, uint32_t sid, uint32_t increment) except -1
    cdef int _put_settings(self, list pairs, int64_t window) except -1
    cdef int _put_block(self, uint32_t sid, list headers, bint end) except -1
    cdef int _put_data(self, Http2Stream s, const unsigned char *p, size_t n, bint end) except -1
    cdef int _queue(self, Http2Stream s, const unsigned char *p, size_t n, object keep) except -1
    cdef int _make_ready(self, Http2Stream s) except -1
    cdef int _unready(self, Http2Stream s) except -1
    cdef int _framed(self, Http2Stream s, size_t n) except -1
    cdef int _local_end(self, Http2Stream s) except -1
    cdef int _drop_queue(self, Http2Stream s) except -1
    cdef int _frame_copies(self) except -1
    cdef int _frame_refs(self, size_t limit) except -1
    cdef int _tell_room(self) except -1
