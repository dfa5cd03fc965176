from libc.stdint cimport uint32_t, uint64_t

# XXH3, 64 bits, as the specification of xxHash 0.8 defines it; needs no GIL
cdef uint64_t xxh3_64(const unsigned char *data, size_t n, uint64_t seed) noexcept nogil
# sequence hash of a block from its parent's sequence hash and its own block hash
cdef uint64_t sequence_hash(uint64_t parent, uint64_t block) noexcept nogil
# token ids (list, tuple or buffer of 4- or 8-byte integers) as u32 little-endian; free() it
cdef uint32_t *tokens_of(object tokens, Py_ssize_t *count) except? NULL
# u64 values of a list, tuple or buffer; free() it
cdef uint64_t *hashes_of(object values, Py_ssize_t *count) except? NULL
