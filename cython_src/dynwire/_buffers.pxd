from libc.stdint cimport uint64_t

cdef enum:
    INLINE_BYTES = 104        # payloads up to this many bytes live inside the Payload object itself
    BLOCK_MIN_BYTES = 65536   # payloads from this size on live in pooled blocks; between the two in a bytes object
    N_CLASSES = 17            # 64 KiB << 0 … 64 KiB << 16 (4 GiB)

cdef class BufferPool:
    cdef readonly uint64_t budget_bytes
    cdef readonly uint64_t in_use_bytes
    cdef readonly uint64_t cached_bytes
    cdef readonly uint64_t in_use_blocks
    cdef readonly uint64_t cached_blocks
    cdef readonly uint64_t hits
    cdef readonly uint64_t misses
    cdef readonly uint64_t returned_to_system
    cdef Block take(self, size_t size)
    cdef void give_back(self, unsigned char *data, size_t capacity, int size_class) noexcept
    cdef _drop_cached(self)
    cdef unsigned char *chains[N_CLASSES]   # intrusive free lists: the first word of a free block points to the next
    cdef uint64_t chain_lengths[N_CLASSES]

cdef class Block:
    cdef unsigned char *data
    cdef size_t size                     # bytes asked for
    cdef size_t capacity                 # bytes of its size class
    cdef int size_class
    cdef BufferPool pool
    cdef Py_ssize_t exports

cdef class Payload:
    cdef const unsigned char *data
    cdef Py_ssize_t size
    cdef Py_ssize_t exports
    cdef object owner                    # None (inline), bytes or Block
    cdef bint released
    cdef bint filled
    cdef int _check(self) except -1
    cdef unsigned char inline_[INLINE_BYTES]

cdef Payload payload_copy(const unsigned char *data, Py_ssize_t size)
cdef Payload payload_of_block(Block block, Py_ssize_t size)
cdef BufferPool default_pool
