cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ._bytes cimport dw_buf

cdef enum:
    TABLE_CAP = 4096             # the encoder's table is never larger, whatever the peer allows (SETTINGS_HEADER_TABLE_SIZE)
    ENTRY_OVERHEAD = 32          # what an entry counts beyond name and value (RFC 7541 4.1)
    CACHED_BLOCK = 512           # bytes of the longest block that the decoder remembers
    RING = 128                   # TABLE_CAP / ENTRY_OVERHEAD: entries of the encoder's table, and a power of two
    BUCKETS = 256

ctypedef struct Entry:
    PyObject *pair               # owned
    size_t size                  # name + value + ENTRY_OVERHEAD

ctypedef struct Table:
    # Ring of entries, newest at (head - 1) & mask. Not more entries than size limit / 32, so it grows to 128 at most by default.
    Entry *ring                  # NULL before the first insertion: an idle connection has no ring
    uint32_t mask
    uint32_t head
    uint32_t count
    size_t used                  # sum of sizes
    size_t maximum               # what the encoder of this direction has chosen (RFC 7541 4.2)

ctypedef struct Indexed:
    PyObject *pair               # owned
    size_t size
    uint32_t pair_hash
    uint32_t name_hash
    uint8_t next_pair            # next older entry in the same bucket, as slot + 1; 0 at the end
    uint8_t next_name

ctypedef struct Index:
    # The encoder's table: a ring like that of Table, and two hash tables over it, from pairs and from names to the newest entry.
    # The oldest entry is the last one in its buckets.
    Indexed[RING] ring
    uint8_t[BUCKETS] by_pair     # slot + 1
    uint8_t[BUCKETS] by_name


@cython.final
cdef class HpackDecoder:
    cdef readonly uint32_t table_limit  # the SETTINGS_HEADER_TABLE_SIZE that we announced and the peer has acknowledged
    cdef readonly size_t max_list       # bytes, a field counting as name + value + 32
    cdef readonly uint32_t max_fields
    cdef readonly int overflow          # of the last block: 0 complete, 1 over max_list or max_fields, 2 over 4 * max_list
    cdef readonly bint required_update  # the limit went below the table's size: the next block has to begin with a size update
    cdef size_t smallest_limit          # since the last block
    cdef uint64_t generation            # changes when an index may mean another pair, or a size update is due
    cdef Table table
    cdef PyObject **fields              # of the block being decoded, owned
    cdef uint32_t n_fields
    cdef uint32_t fields_room
    cdef list cached                    # what the block cached_block yielded when the table had cached_generation
    cdef unsigned char *cached_block
    cdef size_t cached_size
    cdef uint64_t cached_generation

    # (bytes name, bytes value) tuples of one whole block; raises HpackError. Names that occur in the static table are the
    # table's own objects, see hpack_intern. The list is not the caller's alone: do not change it.
    cdef list decode(self, const unsigned char *p, size_t n)
    cpdef int set_table_limit(self, uint32_t n) except -1
    cdef int _parse(self, const unsigned char *p, const unsigned char *end) noexcept
    cdef int _literal(self, const unsigned char **at, const unsigned char *end, size_t *total) noexcept
    cdef int _keep(self, PyObject *pair, size_t size, size_t *total) noexcept


@cython.final
cdef class HpackEncoder:
    cdef public bint huffman            # literals in Huffman code where that is shorter
    cdef readonly uint32_t table_limit  # what the peer allows, TABLE_CAP at most
    cdef size_t smallest_limit          # since the last block
    cdef bint update_due
    cdef Index *index                   # NULL before the first field that enters it
    cdef uint32_t head                  # slot of the next insertion is head % RING
    cdef uint32_t count
    cdef size_t used
    cdef size_t maximum

    # Appends one block. When it raises (TypeError, MemoryError), nothing has been appended and the encoder can go on.
    cdef int encode(self, list headers, dw_buf *out) except -1
    cpdef int set_table_limit(self, uint32_t peer) except -1
    cdef unsigned char *_field(self, PyObject *pair, unsigned char *p) noexcept
    cdef uint32_t _age(self, uint32_t slot) noexcept
    cdef void _insert(self, PyObject *pair, size_t size, uint32_t pair_hash, uint32_t name_hash) noexcept
    cdef void _shrink(self, size_t size) noexcept


# The object that stands for a well-known name (static table and the names of NAMES), or a new bytes object.
cdef bytes hpack_intern(const unsigned char *p, size_t n)
# Huffman code of RFC 7541 appendix B. decode raises HpackError; size is that of the encoded string; encode appends it.
cdef bytes hpack_huffman_decode(const unsigned char *p, size_t n)
cdef size_t hpack_huffman_size(const unsigned char *p, size_t n) noexcept nogil
cdef int hpack_huffman_encode(const unsigned char *p, size_t n, dw_buf *out) except -1
