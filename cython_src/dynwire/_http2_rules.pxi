# Part of _http2.pyx: what RFC 9113 says in numbers and tables: frames, codes, limits, states, fields.

# ---- constants ---------------------------------------------------------------------------------------------------------

cdef enum:                       # frame types, RFC 9113 section 6
    T_DATA = 0
    T_HEADERS = 1
    T_PRIORITY = 2
    T_RST_STREAM = 3
    T_SETTINGS = 4
    T_PUSH_PROMISE = 5
    T_PING = 6
    T_GOAWAY = 7
    T_WINDOW_UPDATE = 8
    T_CONTINUATION = 9

cdef enum:
    F_END_STREAM = 0x01
    F_ACK = 0x01
    F_END_HEADERS = 0x04
    F_PADDED = 0x08
    F_PRIORITY = 0x20

cdef enum:                       # Http2Stream.bits
    SB_SENT_HEADERS = 1          # other than 1xx: what follows is data or trailers
    SB_GOT_HEADERS = 2
    SB_NO_BODY_IN = 4            # (client) the answer to HEAD, 204, 304
    SB_NO_BODY_OUT = 8           # (server) the same
    SB_END_QUEUED = 16           # END_STREAM goes with the last queued byte, or with the trailers
    SB_READY = 32                # in the ring
    SB_WANTS_ROOM = 64
    SB_RELEASED = 128

cdef enum:
    FRAME_HEAD = 9
    READ_BYTES = 262144          # receive buffer; pages that are never filled cost nothing
    READ_SPARE = 8               # receive buffers kept for the next reads, of all connections
    MAX_BLOCK_FACTOR = 4         # undecoded header block, in multiples of max_header_list: Huffman's worst code has 30 bits
    PATH_LIMIT = 8192            # bytes of :path; longer ones are answered 414
    GOAWAY_DEBUG = 1024          # bytes of GOAWAY's text that are kept
    REFERENCE_FROM = 65536       # payloads from this size on are sent from their own memory
    CUT_SHARED = 16384           # bytes of a DATA frame while several streams have some to send
    CUT_ALONE = 65536
    COPY_BACKLOG = 262144        # framed bytes from which data wait on their streams, where they take turns
    IDLE_BYTES = 8192            # of each buffer of output that a connection without streams keeps
    RESET_RING = 1024            # streams of which it is remembered that they were reset
    QUEUED_TOTAL = 16777216      # queued bytes of all streams from which each may have 16 KiB only

# A stream that lived as long is not charged when the peer resets it: with 1,000 streams at a time these are 1,000 a second.
cdef double RAPID_S = 1.0
cdef int64_t MAX_WINDOW = 0x7FFFFFFF
cdef uint32_t CLIENT_IDS_END = 1 << 30   # a client replaces the connection well before its ids are used up

cdef uint32_t E_NO_ERROR = ErrorCodes.NO_ERROR
cdef uint32_t E_PROTOCOL = ErrorCodes.PROTOCOL_ERROR
cdef uint32_t E_FLOW_CONTROL = ErrorCodes.FLOW_CONTROL_ERROR
cdef uint32_t E_SETTINGS_TIMEOUT = ErrorCodes.SETTINGS_TIMEOUT
cdef uint32_t E_STREAM_CLOSED = ErrorCodes.STREAM_CLOSED
cdef uint32_t E_FRAME_SIZE = ErrorCodes.FRAME_SIZE_ERROR
cdef uint32_t E_REFUSED = ErrorCodes.REFUSED_STREAM
cdef uint32_t E_CANCEL = ErrorCodes.CANCEL
cdef uint32_t E_COMPRESSION = ErrorCodes.COMPRESSION_ERROR
cdef uint32_t E_CALM = ErrorCodes.ENHANCE_YOUR_CALM

cdef uint32_t S_TABLE_SIZE = SettingCodes.HEADER_TABLE_SIZE
cdef uint32_t S_ENABLE_PUSH = SettingCodes.ENABLE_PUSH
cdef uint32_t S_MAX_STREAMS = SettingCodes.MAX_CONCURRENT_STREAMS
cdef uint32_t S_INITIAL_WINDOW = SettingCodes.INITIAL_WINDOW_SIZE
cdef uint32_t S_MAX_FRAME = SettingCodes.MAX_FRAME_SIZE
cdef uint32_t S_MAX_LIST = SettingCodes.MAX_HEADER_LIST_SIZE
cdef uint32_t S_NO_PRIORITIES = 0x9      # RFC 9218 section 2.1; h2 has no name for it

cdef bytes _PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
cdef size_t _PREFACE_SIZE = 24

# ---- states (RFC 9113 section 5.1) -------------------------------------------------------------------------------------
#
# What a frame means depends on where its stream stands. Beyond the states of the RFC, a closed stream is told apart by how it
# was closed; of the oldest ones this is forgotten.

cdef enum:
    X_ENDED = 4                  # = ST_CLOSED: END_STREAM in both directions
    X_RESET_BY_US = 5
    X_RESET_BY_PEER = 6
    X_FORGOTTEN = 7              # closed, or never used and passed over by a higher id
    X_COUNT = 8

cdef enum:                       # columns
    I_HEADERS = 0
    I_DATA = 1
    I_RST = 2
    I_WINDOW = 3

cdef enum:
    V_OK = 0
    V_IGNORE = 1
    V_STREAM_CLOSED = 2          # stream error STREAM_CLOSED
    V_CLOSED = 3                 # connection error STREAM_CLOSED
    V_PROTOCOL = 4               # connection error PROTOCOL_ERROR

cdef unsigned char VERDICTS[X_COUNT][4]

_VERDICTS = {
    # "Receiving any frame other than HEADERS or PRIORITY on a stream in this state MUST be treated as a connection error"
    ST_IDLE: (V_OK, V_PROTOCOL, V_PROTOCOL, V_PROTOCOL),
    ST_OPEN: (V_OK, V_OK, V_OK, V_OK),
    ST_HALF_LOCAL: (V_OK, V_OK, V_OK, V_OK),
    # "additional frames, other than WINDOW_UPDATE, PRIORITY, or RST_STREAM, … a stream error of type STREAM_CLOSED"
    ST_HALF_REMOTE: (V_STREAM_CLOSED, V_STREAM_CLOSED, V_OK, V_OK),
    # after END_STREAM: "a connection error of type STREAM_CLOSED"; WINDOW_UPDATE and RST_STREAM may have been on their way
    X_ENDED: (V_CLOSED, V_CLOSED, V_IGNORE, V_IGNORE),
    # "An endpoint that sends a RST_STREAM … MUST ignore frames that it receives on closed streams after it has sent" it
    X_RESET_BY_US: (V_IGNORE, V_IGNORE, V_IGNORE, V_IGNORE),
    # "Receiving any frame other than PRIORITY … after receiving a RST_STREAM … a stream error of type STREAM_CLOSED"
    X_RESET_BY_PEER: (V_STREAM_CLOSED, V_STREAM_CLOSED, V_IGNORE, V_IGNORE),
    # 5.1.1: an id that is not higher than those before: connection error PROTOCOL_ERROR
    X_FORGOTTEN: (V_PROTOCOL, V_CLOSED, V_IGNORE, V_IGNORE),
}


cdef int _fill_verdicts() except -1:
    for situation, row in _VERDICTS.items():
        for kind, verdict in enumerate(row):
            VERDICTS[<int>situation][<int>kind] = verdict
    return 0


_fill_verdicts()

# ---- fields (RFC 9113 section 8) ---------------------------------------------------------------------------------------

cdef unsigned char NAME_BYTES[256]       # 1: may stand in a field name: token characters (RFC 9110 5.6.2) but upper case
cdef unsigned char VALUE_BYTES[256]      # bits: 1 may stand in a value, 2 in :path, 4 in :method, 8 in :authority


cdef int _fill_tables() except -1:
    cdef int c
    cdef bytes letters = b"abcdefghijklmnopqrstuvwxyz"
    # RFC 3986 3.2.2 and 3.2.3: host and port; no "@", that is no user information (RFC 9113 8.3.1)
    cdef bytes authority = letters + letters.upper() + b"0123456789-._~!$&'()*+,;=%:[]"
    cdef bytes token = b"!#$%&'*+-.^_`|~0123456789" + letters
    for c in range(256):
        NAME_BYTES[c] = c in token
        # HTAB and SP within a value; no other control characters (RFC 9113 8.2.1 names NUL, CR and LF; RFC 9110 5.5 the rest)
        VALUE_BYTES[c] = 1 if c in b"\t " else 0 if c < 0x20 or c == 0x7F else 3
        if c in token.upper() or c in token:
            VALUE_BYTES[c] |= 4
        if c in authority:
            VALUE_BYTES[c] |= 8
    return 0


_fill_tables()

# Objects that HPACK uses for these names, so that they are compared by identity.
cdef object _intern(bytes name):
    return hpack_intern(<const unsigned char *><char *>name, len(name))


cdef object N_METHOD = _intern(b":method")
cdef object N_SCHEME = _intern(b":scheme")
cdef object N_PATH = _intern(b":path")
cdef object N_AUTHORITY = _intern(b":authority")
cdef object N_STATUS = _intern(b":status")
cdef object N_LENGTH = _intern(b"content-length")
cdef object N_HOST = _intern(b"host")

cdef enum:                       # results of the checks
    C_OK = 0
    C_MALFORMED = 1
    C_PATH_TOO_LONG = 2
    C_CONNECT = 3


cdef inline bint _good_name(const unsigned char *p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return False
    for i in range(n):
        if not NAME_BYTES[p[i]]:
            return False
    return True


cdef inline bint _good_value(const unsigned char *p, Py_ssize_t n) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return True
    if p[0] == 0x20 or p[0] == 0x09 or p[n - 1] == 0x20 or p[n - 1] == 0x09:
        return False
    for i in range(n):
        if not VALUE_BYTES[p[i]]:
            return False
    return True


cdef inline bint _good_bytes(const unsigned char *p, Py_ssize_t n, int level) noexcept:
    cdef Py_ssize_t i
    if n == 0:
        return False
    for i in range(n):
        if not VALUE_BYTES[p[i]] & level:
            return False
    return True


cdef inline bint _is_trailers(const unsigned char *value) noexcept:
    """A word of a grammar, so case does not matter (RFC 9110 10.1.4, RFC 5234 2.3)."""
    cdef int i
    for i in range(8):
        if value[i] | 0x20 != <unsigned char>b"trailers"[i]:
            return False
    return True


cdef inline bint _forbidden(const unsigned char *name, Py_ssize_t n, const unsigned char *value, Py_ssize_t size) noexcept:
    """Fields that are about the connection (RFC 9113 8.2.2)."""
    if n == 2:
        return memcmp(name, "te", 2) == 0 and not (size == 8 and _is_trailers(value))
    if n == 7:
        return memcmp(name, "upgrade", 7) == 0
    if n == 10:
        return memcmp(name, "connection", 10) == 0 or memcmp(name, "keep-alive", 10) == 0
    if n == 16:
        return memcmp(name, "proxy-connection", 16) == 0
    if n == 17:
        return memcmp(name, "transfer-encoding", 17) == 0
    return False


cdef inline int64_t _length(const unsigned char *p, Py_ssize_t n) noexcept:
    """Value of content-length, or -2: not a number, or one above 10^18."""
    cdef Py_ssize_t i
    cdef int64_t value = 0
    if n == 0 or n > 18:
        return -2
    for i in range(n):
        if not 0x30 <= p[i] <= 0x39:
            return -2
        value = value * 10 + (p[i] - 0x30)
    return value
