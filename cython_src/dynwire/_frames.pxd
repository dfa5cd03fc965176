from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._buffers cimport Block
from ._link cimport Link, StreamBase, dw_chunk

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
    """
    uint32_t dw_ld32(const unsigned char *p) nogil
    uint16_t dw_ld16(const unsigned char *p) nogil
    void dw_st32(unsigned char *p, uint32_t v) nogil
    void dw_st16(unsigned char *p, uint16_t v) nogil
    void dw_header(unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint16_t aux, uint32_t stream,
                   uint32_t arg) nogil

cdef enum:
    HEADER_BYTES = 16
    PREFACE_BYTES = 8
    FRAGMENT_FROM = 65536        # payloads from this size on travel as announcement + CONT frames
    FRAGMENT_BYTES = 262144      # body of one CONT frame that we send
    POLITE_FRAGMENT_BYTES = 131072  # the same while small messages use the connection too
    POLITE_IN_FLIGHT = 524288    # and then no more than this much of large payloads is between the two programs
    FRAME_LIMIT = 1048576        # largest CONT body that we accept
    NAME_LIMIT = 256             # bytes of an endpoint name
    SMALL_LIMIT = 98900          # largest body of any other frame: payload + metadata + name + lengths
    FIRST_READ_BYTES = 4096       # how much is read at first behind a large payload: the next message may be large too
    STAGING_BYTES = 131072       # receive buffer; holds any frame but CONT
    HELLO_LIMIT = 16384
    ENDPOINTS_LIMIT = 4096       # endpoint numbers of one connection
    ITEM_OVERHEAD = 64           # what an item costs in credit beyond its payload, so that empty items are bounded too

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

cdef uint32_t CONNECTION_WINDOW_ID

cdef class LargeSend:
    cdef StreamBase stream
    cdef Py_buffer view
    cdef bint held
    cdef size_t offset
    cdef uint32_t sid
    cdef bint dropped

cdef class WireConnection(Link):
    # limits
    cdef readonly int64_t stream_window       # what we grant per stream
    cdef readonly int64_t connection_window   # what we grant per connection
    cdef readonly int64_t peer_stream_window
    cdef readonly int64_t peer_connection_window
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
    cdef readonly uint64_t landed_bytes       # written by the kernel straight into their payload
    cdef readonly uint64_t rx_frames
    cdef readonly uint64_t tx_frames
    cdef bint preface_done
    # send
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
    cdef list interned                        # (server) endpoint number -> target
    cdef dict endpoint_numbers                # (client)

    cdef int on_pong(self, uint32_t a, uint32_t b) except -1
    # receiving
    cdef void recv_target(self, unsigned char **base, size_t *size)
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
    cdef void drop_large(self, StreamBase stream)
    cdef bint large_must_wait(self)
