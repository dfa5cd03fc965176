"""HPACK, the header compression of HTTP/2 (RFC 7541): decoder, encoder, Huffman code. No I/O.

The static table and the Huffman codes come from the ``hpack`` package, so that they cannot drift; all else is here, because
hpack needs 13 us for a request of eight indexed fields, more than the rest of a request costs.

Fields are ``(name, value)`` tuples of bytes. The decoder's dynamic table holds the very tuples that it hands out: an indexed
field costs no allocation, and a block of nothing but indexed fields that comes again costs one comparison.

A field's "never indexed" mark (RFC 7541 6.2.3) binds intermediaries that encode the field again. dynwire is none: the decoder
does not pass the mark on, and the encoder decides by name (``SENSITIVE``).

Threads: every operation runs under the GIL; one decoder or encoder may be used by one thread at a time. Blocks have to be
decoded in the order in which they were encoded, each exactly once; after an ``HpackError`` the table cannot be trusted any
more, and the connection has to be closed with COMPRESSION_ERROR (RFC 9113 4.3).
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.ref cimport Py_XDECREF, Py_XINCREF, PyObject
from libc.stdint cimport SIZE_MAX, UINT32_MAX, int16_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from hpack.huffman_constants import REQUEST_CODES as _codes
from hpack.huffman_constants import REQUEST_CODES_LENGTH as _lengths
from hpack.table import HeaderTable as _HeaderTable

from ._bytes cimport dw_buf, dw_buf_free, dw_buf_reserve

cdef extern from "Python.h":
    # borrowed references and the like, which Cython's own declarations turn into objects
    PyObject *bytes_from "PyBytes_FromStringAndSize"(const char *p, Py_ssize_t n)
    char *bytes_data "PyBytes_AS_STRING"(PyObject *o)
    Py_ssize_t bytes_size "PyBytes_GET_SIZE"(PyObject *o)
    bint bytes_exact "PyBytes_CheckExact"(PyObject *o)
    PyObject *tuple_new "PyTuple_New"(Py_ssize_t n)
    PyObject *tuple_get "PyTuple_GET_ITEM"(PyObject *o, Py_ssize_t i)
    void tuple_set "PyTuple_SET_ITEM"(PyObject *o, Py_ssize_t i, PyObject *item)
    bint tuple_exact "PyTuple_CheckExact"(PyObject *o)
    Py_ssize_t tuple_size "PyTuple_GET_SIZE"(PyObject *o)
    PyObject *list_get "PyList_GET_ITEM"(PyObject *o, Py_ssize_t i)
    Py_ssize_t list_size "PyList_GET_SIZE"(PyObject *o)
    list new_list "PyList_New"(Py_ssize_t n)
    void list_set "PyList_SET_ITEM"(PyObject *o, Py_ssize_t i, PyObject *item)
    Py_hash_t hash_of "PyObject_Hash"(PyObject *o)   # of exact bytes: remembered by the object, and cannot fail

cdef enum:
    STATIC = 61                  # entries of the static table (RFC 7541 appendix A)
    NAME_SLOTS = 256
    SCRATCH = 1024               # decoded Huffman strings up to this size need no memory of their own
    SHORT_COOKIE = 20            # cookies below this could be guessed by compressing guesses (RFC 7541 7.1.3)

cdef enum:
    # what _parse and its helpers return
    OK = 0
    E_MEMORY = 1
    E_TRUNCATED = 2
    E_INTEGER = 3
    E_INDEX = 4
    E_UPDATE_LATE = 5
    E_UPDATE_LARGE = 6
    E_UPDATE_MISSING = 7
    E_HUFFMAN = 8

cdef tuple ERRORS = (
    "",
    "out of memory",
    "the block ends inside a field",
    "integer above 2^32 - 1, or of more than six bytes",
    "index 0 or beyond the table",
    "table size update behind a field",
    "table size update above the limit",
    "the limit was lowered, and the block does not begin with a table size update to that or less",
    "Huffman code: invalid padding or EOS",
)

# how the encoder writes a field that is not in a table
cdef enum:
    P_INDEX = 0
    P_WITHOUT = 1
    P_NEVER = 2
    P_COOKIE = 3                 # P_NEVER when short, else P_INDEX

NEVER_INDEXED = frozenset([
    b"age", b"baggage", b"content-length", b"content-range", b"date", b"etag", b"expires", b"grpc-timeout", b"idempotency-key",
    b"if-modified-since", b"if-none-match", b"if-range", b"if-unmodified-since", b"last-modified", b"range", b"retry-after",
    b"server-timing", b"traceparent", b"tracestate", b"x-request-id",
])
"""sent as literals without indexing: values that do not come again would push useful ones out of the table"""

SENSITIVE = frozenset([b"authorization", b"proxy-authorization", b"set-cookie", b"x-dynwire-token"])
"""sent as never-indexed literals, so that no table on the way keeps them; short cookies too (RFC 7541 7.1)"""


class HpackError(ValueError):
    """A block that breaks RFC 7541. The decoder's table is undefined from here on: close the connection."""


# ---- Huffman code (RFC 7541 5.2, appendix B) -----------------------------------------------------------------------------

ctypedef struct Step:
    # One input byte in one state. A state is a node of the code tree; 256 inner nodes for 257 symbols. The shortest code has 5
    # bits, so that a byte completes two symbols at most.
    uint8_t next
    uint8_t count                # symbols completed, or BROKEN
    uint8_t[2] symbols

cdef enum:
    BROKEN = 255                 # EOS inside the string
    EOS = 256

cdef Step[256][256] steps
cdef uint8_t[256] final          # whether the string may end in a state: at most 7 bits behind the last symbol, all ones
cdef uint32_t[257] codes
cdef uint8_t[257] code_bits


cdef int build_huffman() except -1:
    cdef int16_t[256][2] children   # inner node, or ~symbol
    cdef int node, child, bit, depth, nodes = 1, symbol, state, byte
    cdef Step step
    memset(children, 0, sizeof(children))
    for symbol in range(257):
        codes[symbol] = _codes[symbol]
        code_bits[symbol] = _lengths[symbol]
        node = 0
        for depth in range(code_bits[symbol] - 1, -1, -1):
            bit = (codes[symbol] >> depth) & 1
            if depth == 0:
                children[node][bit] = <int16_t>~symbol
            elif children[node][bit] == 0:
                if nodes == 256:
                    raise ImportError("the Huffman codes of the hpack package are no complete prefix code")
                children[node][bit] = <int16_t>nodes
                node = nodes
                nodes += 1
            else:
                node = children[node][bit]
    for state in range(256):
        for byte in range(256):
            memset(&step, 0, sizeof(step))
            node = state
            for depth in range(7, -1, -1):
                child = children[node][(byte >> depth) & 1]
                if child >= 0:
                    node = child
                elif ~child == EOS:
                    step.count = BROKEN
                    break
                else:
                    step.symbols[step.count] = <uint8_t>~child
                    step.count += 1
                    node = 0
            step.next = <uint8_t>node
            steps[state][byte] = step
    node = 0
    for _ in range(8):
        final[node] = 1
        node = children[node][1]
    return 0


cdef inline size_t huffman_room(size_t n) noexcept nogil:
    """Bytes that huffman_read may write for ``n`` bytes of code: 8/5 of them, and the unused half of the last pair."""
    return n + (n >> 1) + (n >> 3) + 3


cdef Py_ssize_t huffman_read(const unsigned char *p, size_t n, unsigned char *out) noexcept nogil:
    """Number of bytes decoded into ``out``, which has huffman_room(n); -1 if the code is broken."""
    cdef const unsigned char *end = p + n
    cdef unsigned char *start = out
    cdef unsigned int state = 0
    cdef Step step
    while p < end:
        step = steps[state][p[0]]
        p += 1
        if step.count == BROKEN:
            return -1
        out[0] = step.symbols[0]
        out[1] = step.symbols[1]
        out += step.count
        state = step.next
    return out - start if final[state] else -1


cdef bytes hpack_huffman_decode(const unsigned char *p, size_t n):
    cdef unsigned char[SCRATCH] scratch
    cdef unsigned char *out = scratch
    cdef Py_ssize_t size
    if huffman_room(n) > SCRATCH:
        out = <unsigned char *>PyMem_Malloc(huffman_room(n))
        if out == NULL:
            raise MemoryError()
    try:
        size = huffman_read(p, n, out)
        if size < 0:
            raise HpackError(ERRORS[E_HUFFMAN])
        return PyBytes_FromStringAndSize(<char *>out, size)
    finally:
        if out != scratch:
            PyMem_Free(out)


cdef size_t hpack_huffman_size(const unsigned char *p, size_t n) noexcept nogil:
    cdef size_t bits = 0, i
    for i in range(n):
        bits += code_bits[p[i]]
    return (bits + 7) >> 3


cdef unsigned char *huffman_write(const unsigned char *p, size_t n, unsigned char *out) noexcept nogil:
    """Returns the end of what was written: hpack_huffman_size(p, n) bytes."""
    cdef uint64_t bits = 0       # the low `held` ones wait to be written
    cdef unsigned int held = 0
    cdef size_t i
    for i in range(n):
        bits = (bits << code_bits[p[i]]) | codes[p[i]]
        held += code_bits[p[i]]
        while held >= 8:
            held -= 8
            out[0] = <unsigned char>(bits >> held)
            out += 1
    if held:
        # filled up with the first bits of EOS, all ones
        out[0] = <unsigned char>((bits << (8 - held)) | (0xFF >> held))
        out += 1
    return out


cdef int hpack_huffman_encode(const unsigned char *p, size_t n, dw_buf *out) except -1:
    cdef size_t size = hpack_huffman_size(p, n)
    cdef unsigned char *at = dw_buf_reserve(out, size)
    if at == NULL:
        raise MemoryError()
    huffman_write(p, n, at)
    out.n += size
    return 0


# ---- well-known names and the static table -------------------------------------------------------------------------------

NAMES = (
    b"baggage", b"connection", b"grpc-timeout", b"idempotency-key", b"keep-alive", b":protocol", b"priority",
    b"proxy-connection", b"server-timing", b"te", b"traceparent", b"tracestate", b"trailer", b"upgrade", b"x-dynwire-token",
    b"x-request-id",
)
"""names that are interned like those of the static table"""

ctypedef struct Known:
    PyObject *name               # interned, or NULL
    uint8_t policy
    uint8_t first                # its first entry in the static table, 0 if it has none
    uint8_t entries              # how many follow one another there

cdef PyObject *static_pairs[STATIC + 1]      # from 1; static_table keeps them alive
cdef size_t[STATIC + 1] static_sizes
cdef tuple static_table
cdef dict interned = {}                      # name -> itself; keeps the names alive
cdef PyObject *name_slots[NAME_SLOTS]        # the same, open addressing, by bytes on the wire
cdef Known[NAME_SLOTS] known_slots           # the same by the hash of the bytes object


cdef inline unsigned int name_slot(const unsigned char *p, size_t n) noexcept:
    # Three bytes tell the names apart well enough; a slot more or less costs a comparison of lengths
    return <unsigned int>(n * 37 + p[0] * 5 + p[n >> 1] * 11 + p[n - 1] * 23) & (NAME_SLOTS - 1)


cdef PyObject *name_from(const unsigned char *p, size_t n) noexcept:
    """New reference to the interned object or to a new one; NULL when out of memory."""
    cdef unsigned int slot
    cdef PyObject *name
    if n:
        slot = name_slot(p, n)
        while name_slots[slot] != NULL:
            name = name_slots[slot]
            if <size_t>bytes_size(name) == n and memcmp(bytes_data(name), p, n) == 0:
                Py_XINCREF(name)
                return name
            slot = (slot + 1) & (NAME_SLOTS - 1)
    return bytes_from(<const char *>p, n)


cdef bytes hpack_intern(const unsigned char *p, size_t n):
    cdef PyObject *name = name_from(p, n)
    if name == NULL:
        raise MemoryError()
    result = <bytes>name
    Py_XDECREF(name)
    return result


cdef inline bint same_bytes(PyObject *a, PyObject *b) noexcept:
    return a == b or bytes_size(a) == bytes_size(b) and memcmp(bytes_data(a), bytes_data(b), bytes_size(a)) == 0


cdef Known *known_name(PyObject *name, uint32_t name_hash) noexcept:
    """The slot of a well-known name; for others an empty one, which says: index it, not in the static table."""
    cdef Known *known = &known_slots[name_hash & (NAME_SLOTS - 1)]
    while known.name != NULL and not same_bytes(known.name, name):
        name_hash += 1
        known = &known_slots[name_hash & (NAME_SLOTS - 1)]
    return known


cdef int intern(bytes name) except -1:
    cdef const unsigned char *p = <const unsigned char *>PyBytes_AS_STRING(name)
    cdef unsigned int slot = name_slot(p, PyBytes_GET_SIZE(name))
    if name in interned:
        return 0
    if len(interned) == NAME_SLOTS // 2:
        raise ImportError("NAME_SLOTS is too small")
    interned[name] = name
    while name_slots[slot] != NULL:
        slot = (slot + 1) & (NAME_SLOTS - 1)
    name_slots[slot] = <PyObject *>name
    known_name(<PyObject *>name, <uint32_t>hash_of(<PyObject *>name)).name = <PyObject *>name
    return 0


cdef int build_static() except -1:
    global static_table
    cdef int index, policy
    cdef Known *known
    table = []
    for name, value in _HeaderTable.STATIC_TABLE:
        intern(name)
        table.append((interned[name], value))
    static_table = tuple(table)
    if len(static_table) != STATIC:
        raise ImportError("the static table of the hpack package is not that of RFC 7541")
    for index, pair in enumerate(static_table, 1):
        static_pairs[index] = <PyObject *>pair
        static_sizes[index] = len(pair[0]) + len(pair[1]) + ENTRY_OVERHEAD
        name = pair[0]
        known = known_name(<PyObject *>name, <uint32_t>hash_of(<PyObject *>name))
        if known.first == 0:
            known.first = index
        if known.first + known.entries != index:
            raise ImportError("the static table of the hpack package does not have entries of one name together")
        known.entries += 1
    for names, policy in ((NAMES, P_INDEX), (NEVER_INDEXED, P_WITHOUT), (SENSITIVE, P_NEVER), ((b"cookie",), P_COOKIE)):
        for name in names:
            intern(name)
            known_name(<PyObject *>name, <uint32_t>hash_of(<PyObject *>name)).policy = policy
    return 0


build_huffman()
build_static()


# ---- dynamic table -------------------------------------------------------------------------------------------------------

cdef inline Entry *table_entry(Table *table, uint32_t age) noexcept:
    """By age from 1, the newest; the caller has compared it with the count."""
    return &table.ring[(table.head - age) & table.mask]


cdef void table_evict(Table *table) noexcept:
    cdef Entry *oldest = table_entry(table, table.count)
    table.used -= oldest.size
    table.count -= 1
    Py_XDECREF(oldest.pair)


cdef int table_room(Table *table) noexcept:
    """Make room for one more entry in the ring; -1 when out of memory. Sizes bound the number of entries to maximum / 32."""
    cdef Entry *ring
    cdef uint32_t i, entries = 16
    if table.ring != NULL:
        if table.count <= table.mask:
            return 0
        entries = (table.mask + 1) * 2
    ring = <Entry *>PyMem_Malloc(entries * sizeof(Entry))
    if ring == NULL:
        return -1
    for i in range(table.count):
        ring[i] = table_entry(table, table.count - i)[0]
    PyMem_Free(table.ring)
    table.ring = ring
    table.mask = entries - 1
    table.head = table.count
    return 0


cdef inline void table_push(Table *table, PyObject *pair, size_t size) noexcept:
    """Keeps a reference of its own. table_room has succeeded, and the size fits."""
    cdef Entry *entry = &table.ring[table.head & table.mask]
    Py_XINCREF(pair)
    entry.pair = pair
    entry.size = size
    table.head += 1
    table.count += 1
    table.used += size


cdef void table_free(Table *table) noexcept:
    while table.count:
        table_evict(table)
    PyMem_Free(table.ring)
    table.ring = NULL


# ---- decoder -------------------------------------------------------------------------------------------------------------

ctypedef struct Text:
    const unsigned char *p       # in the block or in `out`
    size_t n
    unsigned char *out           # scratch, or memory to be freed


cdef inline int read_integer(const unsigned char **at, const unsigned char *end, unsigned int mask, uint32_t *value) noexcept:
    """RFC 7541 5.1. ``mask`` has the prefix bits; there is at least one byte."""
    cdef const unsigned char *p = at[0]
    cdef uint64_t total = p[0] & mask
    cdef unsigned int shift = 0
    p += 1
    if total == mask:
        while True:
            if p == end:
                return E_TRUNCATED
            # five bytes hold any 32 bit number; more would be zeros that only cost time
            if shift > 28:
                return E_INTEGER
            total += <uint64_t>(p[0] & 0x7F) << shift
            shift += 7
            p += 1
            if p[-1] < 0x80:
                break
        if total > UINT32_MAX:
            return E_INTEGER
    value[0] = <uint32_t>total
    at[0] = p
    return OK


cdef inline int read_text(const unsigned char **at, const unsigned char *end, Text *text, unsigned char *scratch) noexcept:
    """RFC 7541 5.2. What is in text.out afterwards goes to free_text."""
    cdef uint32_t n
    cdef bint coded
    cdef int error
    cdef Py_ssize_t size
    if at[0] == end:
        return E_TRUNCATED
    coded = at[0][0] & 0x80
    error = read_integer(at, end, 0x7F, &n)
    if error:
        return error
    if n > <size_t>(end - at[0]):
        return E_TRUNCATED
    text.p = at[0]
    text.n = n
    at[0] += n
    if coded:
        if huffman_room(n) > SCRATCH:
            text.out = <unsigned char *>PyMem_Malloc(huffman_room(n))
            if text.out == NULL:
                return E_MEMORY
        else:
            text.out = scratch
        size = huffman_read(text.p, n, text.out)
        if size < 0:
            return E_HUFFMAN
        text.p = text.out
        text.n = size
    return OK


cdef inline void free_text(Text *text, unsigned char *scratch) noexcept:
    if text.out != NULL and text.out != scratch:
        PyMem_Free(text.out)
    text.out = NULL


@cython.final
cdef class HpackDecoder:
    """Decoder of one connection, for the blocks that the peer sends.

    ``table_limit`` holds from the first block on; in HTTP/2 that is 4096 until the peer has acknowledged another
    SETTINGS_HEADER_TABLE_SIZE (then `set_table_limit`). ``max_list`` and ``max_fields`` bound what one block may yield: fields
    beyond are dropped, with the table kept right, and `overflow` says so. Time is bounded by the size of the block alone.
    """

    def __init__(self, uint32_t table_limit=TABLE_CAP, size_t max_list=65536, uint32_t max_fields=100):
        if max_list > SIZE_MAX // 8:
            raise OverflowError("max_list is too large")
        self.table_limit = table_limit
        self.table.maximum = table_limit
        self.max_list = max_list
        self.max_fields = max_fields
        self.smallest_limit = SIZE_MAX

    def __dealloc__(self):
        table_free(&self.table)
        PyMem_Free(self.fields)
        PyMem_Free(self.cached_block)

    @property
    def table_size(self):
        """Size of the dynamic table as RFC 7541 4.1 counts, in bytes."""
        return self.table.used

    @property
    def entries(self):
        """The dynamic table, newest first."""
        cdef uint32_t age
        return [<object>table_entry(&self.table, age).pair for age in range(1, self.table.count + 1)]

    def decode_bytes(self, data):
        """Fields of one whole block (any buffer). Raises HpackError; the list must not be changed."""
        cdef Py_buffer view
        if PyBytes_CheckExact(data):
            return self.decode(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return self.decode(<const unsigned char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    cpdef int set_table_limit(self, uint32_t n) except -1:
        """The peer has acknowledged this SETTINGS_HEADER_TABLE_SIZE.

        If that is below the size in use, the next block has to begin with a table size update (RFC 7541 4.2).
        """
        self.table_limit = n
        self.smallest_limit = min(self.smallest_limit, n)
        self.required_update = self.smallest_limit < self.table.maximum
        # no block is answered from memory until then
        self.generation += 1
        return 0

    cdef list decode(self, const unsigned char *p, size_t n):
        cdef uint64_t generation = self.generation
        cdef uint32_t i
        cdef int error
        cdef list fields
        if n == self.cached_size and generation == self.cached_generation and self.cached is not None \
                and memcmp(p, self.cached_block, n) == 0:
            self.overflow = 0
            return self.cached
        self.overflow = 0
        error = self._parse(p, p + n)
        if error:
            for i in range(self.n_fields):
                Py_XDECREF(self.fields[i])
            self.n_fields = 0
            if error == E_MEMORY:
                raise MemoryError()
            raise HpackError(ERRORS[error])
        # the references move from self.fields into the list
        fields = new_list(self.n_fields)
        for i in range(self.n_fields):
            list_set(<PyObject *>fields, i, self.fields[i])
        self.n_fields = 0
        if generation == self.generation and n <= CACHED_BLOCK and not self.overflow:
            if self.cached_block == NULL:
                self.cached_block = <unsigned char *>PyMem_Malloc(CACHED_BLOCK)
                if self.cached_block == NULL:
                    raise MemoryError()
            memcpy(self.cached_block, p, n)
            self.cached_size = n
            self.cached_generation = generation
            self.cached = fields
        return fields

    cdef int _parse(self, const unsigned char *p, const unsigned char *end) noexcept:
        cdef size_t total = 0, size
        cdef uint32_t index
        cdef int error
        cdef PyObject *pair
        cdef Entry *entry
        while p < end and p[0] & 0xE0 == 0x20:
            error = read_integer(&p, end, 0x1F, &index)
            if error:
                return error
            if index > self.table_limit:
                return E_UPDATE_LARGE
            # hpack and h2 send one update for each change of the limit; any may be the smallest
            if index <= self.smallest_limit:
                self.required_update = False
            self.table.maximum = index
            while self.table.used > index:
                table_evict(&self.table)
            # even if no entry goes: a block with an update must not be answered from the cache
            self.generation += 1
        if self.required_update:
            return E_UPDATE_MISSING
        self.smallest_limit = SIZE_MAX
        while p < end:
            if p[0] & 0x80:
                index = p[0] & 0x7F
                if index == 0x7F:
                    error = read_integer(&p, end, 0x7F, &index)
                    if error:
                        return error
                else:
                    p += 1
                if index <= STATIC:
                    if index == 0:
                        return E_INDEX
                    pair = static_pairs[index]
                    size = static_sizes[index]
                else:
                    index -= STATIC
                    if index > self.table.count:
                        return E_INDEX
                    entry = table_entry(&self.table, index)
                    pair = entry.pair
                    size = entry.size
                error = self._keep(pair, size, &total)
            elif p[0] & 0xE0 == 0x20:
                return E_UPDATE_LATE
            else:
                error = self._literal(&p, end, &total)
            if error:
                return error
        return OK

    cdef int _keep(self, PyObject *pair, size_t size, size_t *total) noexcept:
        """Count a field; add it to the block's unless that makes too much: then it is too much for all that follow, too."""
        cdef PyObject **fields
        total[0] += size
        if total[0] > self.max_list or self.n_fields >= self.max_fields:
            self.overflow = 2 if total[0] > 4 * self.max_list else 1
            return OK
        if self.n_fields == self.fields_room:
            fields = <PyObject **>PyMem_Realloc(self.fields, (self.fields_room * 2 + 16) * sizeof(PyObject *))
            if fields == NULL:
                return E_MEMORY
            self.fields = fields
            self.fields_room = self.fields_room * 2 + 16
        Py_XINCREF(pair)
        self.fields[self.n_fields] = pair
        self.n_fields += 1
        return OK

    cdef int _literal(self, const unsigned char **at, const unsigned char *end, size_t *total) noexcept:
        """A literal field (RFC 7541 6.2), and its way into the table."""
        cdef unsigned char[SCRATCH] scratch
        cdef Text text
        cdef bint indexing = at[0][0] & 0x40
        cdef uint32_t index
        cdef int error
        cdef size_t size
        cdef PyObject *name
        cdef PyObject *value
        cdef PyObject *pair
        text.out = NULL
        # 0x10 ("never indexed") is read like 0x00, see the head of the module
        error = read_integer(at, end, 0x3F if indexing else 0x0F, &index)
        if error:
            return error
        if index == 0:
            error = read_text(at, end, &text, scratch)
            name = NULL if error else name_from(text.p, text.n)
            free_text(&text, scratch)
            if name == NULL:
                return error or E_MEMORY
        else:
            if index <= STATIC:
                pair = static_pairs[index]
            elif index - STATIC <= self.table.count:
                pair = table_entry(&self.table, index - STATIC).pair
            else:
                return E_INDEX
            name = tuple_get(pair, 0)
            Py_XINCREF(name)
        error = read_text(at, end, &text, scratch)
        if error:
            free_text(&text, scratch)
            Py_XDECREF(name)
            return error
        size = <size_t>bytes_size(name) + text.n + ENTRY_OVERHEAD
        if self.overflow and not (indexing and size <= self.table.maximum):
            # dropped in any case: no need for objects
            value = NULL
        else:
            value = bytes_from(<const char *>text.p, text.n)
            if value == NULL:
                error = E_MEMORY
        free_text(&text, scratch)
        if error:
            Py_XDECREF(name)
            return error
        if indexing:
            self.generation += 1
            # an entry larger than the table empties it and does not enter (RFC 7541 4.4); `name` may be that of an evicted entry,
            # hence the reference of our own
            while self.table.count and self.table.used + size > self.table.maximum:
                table_evict(&self.table)
        if value == NULL:
            Py_XDECREF(name)
            return self._keep(NULL, size, total)
        pair = tuple_new(2)
        if pair == NULL:
            Py_XDECREF(name)
            Py_XDECREF(value)
            return E_MEMORY
        tuple_set(pair, 0, name)
        tuple_set(pair, 1, value)
        if indexing and size <= self.table.maximum:
            if table_room(&self.table):
                Py_XDECREF(pair)
                return E_MEMORY
            table_push(&self.table, pair, size)
        error = self._keep(pair, size, total)
        Py_XDECREF(pair)
        return error


# ---- encoder -------------------------------------------------------------------------------------------------------------

cdef inline unsigned char *write_integer(unsigned char *p, unsigned int first, unsigned int mask, uint64_t value) noexcept:
    """RFC 7541 5.1; ``first`` has the bits before the prefix. Returns the end: 11 bytes further on at most."""
    if value < mask:
        p[0] = <unsigned char>(first | value)
        return p + 1
    p[0] = <unsigned char>(first | mask)
    p += 1
    value -= mask
    while value >= 0x80:
        p[0] = <unsigned char>(value | 0x80)
        p += 1
        value >>= 7
    p[0] = <unsigned char>value
    return p + 1


cdef enum:
    INTEGER_ROOM = 11


cdef unsigned char *write_text(unsigned char *p, PyObject *text, bint huffman) noexcept:
    cdef const unsigned char *data = <const unsigned char *>bytes_data(text)
    cdef size_t n = bytes_size(text), size
    if huffman:
        size = hpack_huffman_size(data, n)
        if size < n:
            return huffman_write(data, n, write_integer(p, 0x80, 0x7F, size))
    p = write_integer(p, 0, 0x7F, n)
    memcpy(p, data, n)
    return p + n


cdef list plain_pairs(list headers):
    """The same fields as plain tuples of bytes: subclasses may compare and hash as they like. Raises TypeError."""
    cdef list plain = []
    for pair in headers:
        if not isinstance(pair, tuple) or len(pair) != 2 or type(pair[0]) is not bytes or type(pair[1]) is not bytes:
            raise TypeError(f"a header is a tuple (name, value) of bytes, not {pair!r}")
        plain.append((pair[0], pair[1]))
    return plain


@cython.final
cdef class HpackEncoder:
    """Encoder of one connection, for the blocks that the peer will decode.

    ``table_limit`` is the peer's SETTINGS_HEADER_TABLE_SIZE, in force from the first block on; the table is never larger than
    4096 bytes, whatever the peer allows. ``huffman`` costs time and saves a third of what is not in the table.
    """

    def __init__(self, uint32_t table_limit=TABLE_CAP, bint huffman=False):
        self.table_limit = min(table_limit, <uint32_t>TABLE_CAP)
        self.maximum = self.table_limit
        self.huffman = huffman
        self.smallest_limit = SIZE_MAX

    def __dealloc__(self):
        self._shrink(0)
        PyMem_Free(self.index)

    @property
    def table_size(self):
        """Size of the dynamic table as RFC 7541 4.1 counts, in bytes."""
        return self.used

    @property
    def entries(self):
        """The dynamic table, newest first."""
        cdef uint32_t age
        return [<object>self.index.ring[(self.head - age) & (RING - 1)].pair for age in range(1, self.count + 1)]

    def encode_bytes(self, list headers):
        """One block. Raises TypeError if a header is no tuple of two bytes objects."""
        cdef dw_buf out
        memset(&out, 0, sizeof(out))
        try:
            self.encode(headers, &out)
            return PyBytes_FromStringAndSize(<char *>out.p, out.n)
        finally:
            dw_buf_free(&out)

    cpdef int set_table_limit(self, uint32_t peer) except -1:
        """The peer's SETTINGS_HEADER_TABLE_SIZE. The next block says so where the table's size changes (RFC 7541 4.2)."""
        self.table_limit = min(peer, <uint32_t>TABLE_CAP)
        self.smallest_limit = min(self.smallest_limit, self.table_limit)
        self.update_due = self.table_limit != self.maximum or self.smallest_limit < self.maximum
        return 0

    cdef int encode(self, list headers, dw_buf *out) except -1:
        cdef Py_ssize_t i
        cdef size_t room = 2 * INTEGER_ROOM
        cdef PyObject *pair
        cdef unsigned char *p
        # First everything that can fail, so that our table is never ahead of the peer's
        for i in range(list_size(<PyObject *>headers)):
            pair = list_get(<PyObject *>headers, i)
            if not (tuple_exact(pair) and tuple_size(pair) == 2 and bytes_exact(tuple_get(pair, 0))
                    and bytes_exact(tuple_get(pair, 1))):
                return self.encode(plain_pairs(headers), out)
            room += <size_t>bytes_size(tuple_get(pair, 0)) + <size_t>bytes_size(tuple_get(pair, 1)) + 3 * INTEGER_ROOM
        if self.index == NULL:
            self.index = <Index *>PyMem_Calloc(1, sizeof(Index))
            if self.index == NULL:
                raise MemoryError()
        p = dw_buf_reserve(out, room)
        if p == NULL:
            raise MemoryError()
        if self.update_due:
            if self.smallest_limit < self.table_limit:
                self._shrink(self.smallest_limit)
                p = write_integer(p, 0x20, 0x1F, self.smallest_limit)
            self._shrink(self.table_limit)
            p = write_integer(p, 0x20, 0x1F, self.table_limit)
            self.maximum = self.table_limit
            self.update_due = False
        self.smallest_limit = SIZE_MAX
        for i in range(list_size(<PyObject *>headers)):
            p = self._field(list_get(<PyObject *>headers, i), p)
        out.n = p - out.p
        return 0

    cdef unsigned char *_field(self, PyObject *pair, unsigned char *p) noexcept:
        """Returns the end of what was written."""
        cdef PyObject *name = tuple_get(pair, 0)
        cdef PyObject *value = tuple_get(pair, 1)
        cdef uint32_t name_hash = <uint32_t>hash_of(name)
        cdef Known *known = known_name(name, name_hash)
        cdef size_t value_size = bytes_size(value)
        cdef size_t size = <size_t>bytes_size(name) + value_size + ENTRY_OVERHEAD
        cdef int policy = known.policy
        cdef uint64_t index = known.first
        cdef uint32_t pair_hash = 0
        cdef int i
        cdef uint8_t link
        cdef Indexed *entry
        if policy == P_COOKIE:
            policy = P_NEVER if value_size < SHORT_COOKIE else P_INDEX
        if policy == P_INDEX:
            for i in range(known.first, known.first + known.entries):
                if same_bytes(tuple_get(static_pairs[i], 1), value):
                    return write_integer(p, 0x80, 0x7F, i)
            pair_hash = name_hash * 31 ^ <uint32_t>hash_of(value)
            link = self.index.by_pair[pair_hash & (BUCKETS - 1)]
            while link:
                entry = &self.index.ring[link - 1]
                if entry.pair == pair or entry.pair_hash == pair_hash and same_bytes(tuple_get(entry.pair, 1), value) \
                        and same_bytes(tuple_get(entry.pair, 0), name):
                    return write_integer(p, 0x80, 0x7F, STATIC + self._age(link - 1))
                link = entry.next_pair
            # a value that takes half the table would push out more than it is likely to save
            if value_size > self.maximum // 2 or size > self.maximum:
                policy = P_WITHOUT
        if not index:
            link = self.index.by_name[name_hash & (BUCKETS - 1)]
            while link:
                entry = &self.index.ring[link - 1]
                if entry.name_hash == name_hash and same_bytes(tuple_get(entry.pair, 0), name):
                    index = STATIC + self._age(link - 1)
                    break
                link = entry.next_name
        if policy == P_INDEX:
            # the index of the name is that before the insertion: the peer looks it up first (RFC 7541 4.4)
            p = write_integer(p, 0x40, 0x3F, index)
            self._insert(pair, size, pair_hash, name_hash)
        else:
            p = write_integer(p, 0x10 if policy == P_NEVER else 0, 0x0F, index)
        if not index:
            p = write_text(p, name, self.huffman)
        return write_text(p, value, self.huffman)

    cdef uint32_t _age(self, uint32_t slot) noexcept:
        """From 1, the newest."""
        return ((self.head - 1 - slot) & (RING - 1)) + 1

    cdef void _insert(self, PyObject *pair, size_t size, uint32_t pair_hash, uint32_t name_hash) noexcept:
        cdef uint32_t slot = self.head & (RING - 1)
        cdef Indexed *entry = &self.index.ring[slot]
        cdef uint8_t *by_pair = &self.index.by_pair[pair_hash & (BUCKETS - 1)]
        cdef uint8_t *by_name = &self.index.by_name[name_hash & (BUCKETS - 1)]
        self._shrink(self.maximum - size)
        Py_XINCREF(pair)
        entry.pair = pair
        entry.size = size
        entry.pair_hash = pair_hash
        entry.name_hash = name_hash
        entry.next_pair = by_pair[0]
        by_pair[0] = slot + 1
        entry.next_name = by_name[0]
        by_name[0] = slot + 1
        self.head += 1
        self.count += 1
        self.used += size

    cdef void _shrink(self, size_t size) noexcept:
        """Evict until the table has this size at most."""
        cdef uint32_t slot
        cdef Indexed *entry
        cdef uint8_t *link
        while self.used > size:
            slot = (self.head - self.count) & (RING - 1)
            entry = &self.index.ring[slot]
            link = &self.index.by_pair[entry.pair_hash & (BUCKETS - 1)]
            while link[0] != slot + 1:
                link = &self.index.ring[link[0] - 1].next_pair
            link[0] = 0
            link = &self.index.by_name[entry.name_hash & (BUCKETS - 1)]
            while link[0] != slot + 1:
                link = &self.index.ring[link[0] - 1].next_name
            link[0] = 0
            self.used -= entry.size
            self.count -= 1
            Py_XDECREF(entry.pair)


# ---- for Python ----------------------------------------------------------------------------------------------------------

def huffman_encode(bytes data not None):
    """Huffman code of the bytes, padded as RFC 7541 5.2 demands."""
    cdef size_t size = hpack_huffman_size(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    cdef bytes result = PyBytes_FromStringAndSize(NULL, size)
    huffman_write(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data),
                  <unsigned char *>PyBytes_AS_STRING(result))
    return result


def huffman_decode(bytes data not None):
    """The bytes that the code stands for. Raises HpackError for padding that is not a short beginning of EOS, and for EOS."""
    return hpack_huffman_decode(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


def intern_name(bytes name not None):
    """The object by which the decoder names a field, if the name is a well-known one; otherwise an equal one."""
    return hpack_intern(<const unsigned char *>PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
