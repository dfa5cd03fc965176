from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._buffers cimport Block
from ._bytes cimport dw_buf, dw_chunk
from ._http2 cimport Http2Engine, Http2Owner, Http2Stream
from ._link cimport Link, StreamBase

cdef enum:
    ITEM_HEADER = 5              # before each item in the format of our own client: u8 kind, u32 length, big-endian
    ITEM_ERROR = 3               # kinds beyond those of codec.KINDS
    LARGE_ITEM = 65536           # from this size on an item lives in a pooled block, and is sent from its owner's memory
    ERROR_BODY = 65536           # bytes of a foreign error page that are kept
    SNIFF_BYTES = 65536          # receive buffer of a connection that is not HTTP/2 (yet)

cdef class Exchange:
    cdef Http2Stream h2            # None on HTTP/1.1
    cdef StreamBase stream         # call or handler; None when it is over, for pages and for requests to stop
    # request (server)
    cdef object endpoint           # its name
    cdef int kind
    cdef int shape
    cdef uint32_t timeout_ms
    cdef double accept_s
    cdef object meta               # headers for the handler's context, or None
    cdef object request_id         # str or None
    cdef uint32_t seq
    cdef object page               # RequestHead of something that is no endpoint, or None
    cdef bint is_head              # HEAD
    # body of a request, or of a reply that is not in items
    cdef int64_t length            # content-length, -1 without
    cdef size_t have
    cdef dw_buf body
    cdef Block block
    # reply
    cdef bint begun
    cdef bint ended
    cdef bint lingers              # (server) answered in full, but the client has not ended the request: see `linger`
    cdef size_t dropped            # bytes of it that came since then
    cdef object encoder
    # reply (client)
    cdef int status
    cdef bint items
    cdef object reply_headers
    cdef unsigned char head[ITEM_HEADER]
    cdef uint8_t head_have
    cdef uint8_t item_kind
    cdef uint32_t item_size
    cdef size_t item_have
    cdef size_t early_now          # bytes of the item that is arriving which were given back already
    cdef size_t early              # the same for all items that the application has not taken yet
    cdef size_t unread             # bytes of items that were delivered and that it has not taken

cdef class _Events(Http2Owner):
    cdef HttpWire wire

cdef class HttpWire(Link):
    cdef readonly Http2Engine engine
    cdef _Events events
    cdef object lock               # of connections that threads share, where the engine is not our own; or None
    cdef readonly str root         # path before the endpoints
    cdef readonly str authority
    cdef readonly str scheme
    cdef object token
    cdef object pages              # (server) callable(head, request_id) -> (status, headers, body)
    cdef dict limits
    cdef str engine_name
    cdef bint adaptive
    cdef public double leniency    # (server) share of its budgets that the engine begins with, see Http2Engine
    # server: what comes before it is known which protocol the peer speaks, and HTTP/1.1
    cdef object h1
    cdef dw_buf early_in
    cdef dw_buf h1_out
    cdef size_t h1_sent
    cdef Exchange h1_exchange
    cdef bint closing              # close when everything is written
    cdef double head_at            # when the head of a request has to be there; infinity: none has begun
    cdef double handshake_s, stall_s   # as for the engine
    cdef readonly size_t body_bytes    # of requests that have not been answered
    cdef bint in_h1                # events of a request are being dealt with
    cdef public dict fixed         # path -> (header list, body): pages that are the same for everybody
    cdef bytes id_prefix
    cdef public dict routes        # path -> endpoint, of usual requests; servers share one among their connections
    cdef list lingering            # exchanges, the oldest first
    # client
    cdef dict prefixes             # endpoint -> constant header fields
    cdef tuple patience            # header field
    cdef unsigned char *landed_at
    cdef uint64_t gathered         # bytes that `gather` has named last
    cdef bytes first_bytes
    cdef list stops                # request ids of which the server has to be told
    # adaptive window
    cdef double bdp_sent           # the PING that is under way, negative without one
    cdef double bdp_rtt            # shortest round trip, infinity before the first
    cdef double bdp_next           # no PING before
    cdef double bdp_delay          # between PINGs
    cdef double bdp_from           # since when bytes are counted
    cdef uint64_t bdp_bytes
    cdef uint64_t bdp_estimate
    cdef double window_ratio       # of the connection's window to that of a stream
    cdef dw_buf scratch

    cdef int received_(self, size_t n, double now) except -1
    cdef int consumed_(self, StreamBase stream, int64_t cost) except -1
    cdef int put_cancel_(self, StreamBase stream, int kind) except -1
    cdef int abandon_(self, StreamBase stream, int kind) except -1
    cdef int gather_(self, dw_chunk *chunks, size_t limit) except -1
    cdef int sent_(self, size_t n) except -1
    cdef int time_passed_(self, double now) except -1
    cdef int send_request_(self, StreamBase stream, str endpoint, object data, int kind, bytes meta, double deadline, double due,
                           double now) except -1
    cdef int make_engine(self) except -1
    cdef int check_server(self, size_t n) except -1
    cdef int h1_flush(self) except -1
    cdef Exchange read_or_refuse(self, list headers, Http2Stream h2)
    cdef object too_large(self, int64_t size)
    cdef object too_much(self)
    cdef object body_of(self, Exchange ex, int kind)
    cdef object body_of_piece(self, const unsigned char *p, size_t n, int kind)
    cdef int answer_fault(self, Exchange ex, object fault) except -1
    cdef int put_fault(self, Exchange ex, object error) except -1
    cdef bint linger(self, Exchange ex) except -1
    cdef int stop_lingering(self, Exchange ex) except -1
    cdef int end_upload(self, Exchange ex) except -1
    cdef int give_back_early(self, Exchange ex) except -1
    cdef int switch_to_h2(self) except -1
    cdef int sniff(self) except -1
    cdef int h1_received(self) except -1
    cdef int h1_event(self, tuple event) except -1
    cdef int close_soon(self) except -1
    cdef int on_closing(self) except -1
    # from the engine
    cdef int h2_headers(self, Http2Stream h2, list headers, int kind, bint end) except -1
    cdef int h2_data(self, Http2Stream h2, const unsigned char *p, size_t n, bint end) except -1
    cdef int h2_reset(self, Http2Stream h2, uint32_t code, bint remote) except -1
    cdef int h2_room(self, Http2Stream h2) except -1
    cdef int h2_closed(self, Http2Stream h2) except -1
    cdef int h2_settings(self) except -1
    cdef int h2_pong(self, uint64_t payload) except -1
    cdef int h2_goaway(self, uint32_t last_id, uint32_t code, bytes debug) except -1
    cdef int h2_capacity(self) except -1
    # server
    cdef bint answer_fixed(self, Http2Stream h2, list headers) except -1
    cdef bytes id_of(self, Exchange ex)
    cdef str id_text(self, Exchange ex)
    cdef int add_id(self, Exchange ex, list fields) except -1
    cdef Exchange read_head(self, list headers)
    cdef int request_began(self, Exchange ex, bint end) except -1
    cdef int request_data(self, Exchange ex, const unsigned char *p, size_t n, bint end) except -1
    cdef int request_ended(self, Exchange ex, const unsigned char *p, size_t n) except -1
    cdef int answer(self, Exchange ex, int status, list headers, bytes body) except -1
    cdef int answer_page(self, Exchange ex) except -1
    cdef int refuse_exchange(self, Exchange ex, object error) except -1
    cdef int reply_head(self, Exchange ex, list headers, bint end) except -1
    cdef int reply_data(self, Exchange ex, const unsigned char *p, size_t n, object keep, bint end) except -1
    cdef int reply_ended(self, Exchange ex) except -1
    cdef int put_encoded(self, Exchange ex, const unsigned char *p, size_t n, int kind, bint last) except -1
    cdef int body_add(self, Exchange ex, const unsigned char *p, size_t n) except -1
    # client
    cdef list prefix_of(self, str endpoint)
    cdef int response_began(self, Exchange ex, list headers, bint end) except -1
    cdef int response_items(self, Exchange ex, const unsigned char *p, size_t n, bint end) except -1
    cdef int response_ended(self, Exchange ex) except -1
    cdef int deliver(self, Exchange ex, object item, int kind, size_t size, bint last) except -1
    cdef int finish_call(self, Exchange ex) except -1
    cdef int fault(self, Exchange ex, object error, uint32_t code) except -1
    cdef int send_stops(self) except -1
    # adaptive window
    cdef int measure(self, size_t n) except -1
