from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef DYNWIRE_BYTES
    #define DYNWIRE_BYTES
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    /* Network byte order. Shifts instead of memcpy and a swap: right on any host, and compilers make one load of each. */
    static inline uint16_t dw_ld16be(const unsigned char *p) { return (uint16_t)((p[0] << 8) | p[1]); }
    static inline uint32_t dw_ld24be(const unsigned char *p) { return ((uint32_t)p[0] << 16) | ((uint32_t)p[1] << 8) | p[2]; }
    static inline uint32_t dw_ld32be(const unsigned char *p) {
        return ((uint32_t)p[0] << 24) | ((uint32_t)p[1] << 16) | ((uint32_t)p[2] << 8) | p[3];
    }
    static inline uint64_t dw_ld64be(const unsigned char *p) { return ((uint64_t)dw_ld32be(p) << 32) | dw_ld32be(p + 4); }
    static inline void dw_st16be(unsigned char *p, uint16_t v) { p[0] = (unsigned char)(v >> 8); p[1] = (unsigned char)v; }
    static inline void dw_st24be(unsigned char *p, uint32_t v) {
        p[0] = (unsigned char)(v >> 16); p[1] = (unsigned char)(v >> 8); p[2] = (unsigned char)v;
    }
    static inline void dw_st32be(unsigned char *p, uint32_t v) {
        p[0] = (unsigned char)(v >> 24); p[1] = (unsigned char)(v >> 16); p[2] = (unsigned char)(v >> 8);
        p[3] = (unsigned char)v;
    }
    static inline void dw_st64be(unsigned char *p, uint64_t v) {
        dw_st32be(p, (uint32_t)(v >> 32)); dw_st32be(p + 4, (uint32_t)v);
    }

    /* Bytes that grow at the end. All zero is an empty buffer; whoever declares one calls dw_buf_free. */
    typedef struct { unsigned char *p; size_t n; size_t cap; } dw_buf;
    /* Where n more bytes may be written (behind b->n, which the caller then moves on), NULL when out of memory: the buffer is
       then unchanged. The memory moves when it grows: pointers into it last until the next call. Needs no GIL. */
    static inline unsigned char *dw_buf_reserve(dw_buf *b, size_t n) {
        size_t cap; unsigned char *p;
        if (n <= b->cap - b->n && b->p != NULL) return b->p + b->n;
        if (n > ((size_t)-1 >> 2) || b->n > ((size_t)-1 >> 2)) return NULL;
        cap = b->cap < 256 ? 256 : b->cap * 2;
        if (cap < b->n + n) cap = b->n + n;
        p = (unsigned char *)realloc(b->p, cap);
        if (p == NULL) return NULL;
        b->p = p;
        b->cap = cap;
        return p + b->n;
    }
    static inline void dw_buf_free(dw_buf *b) { free(b->p); b->p = NULL; b->n = 0; b->cap = 0; }
    #endif
    #ifndef DW_CHUNK
    #define DW_CHUNK
    /* What to write next: memory that stays put until the writer says how much of it was sent. */
    typedef struct { const void *base; size_t len; } dw_chunk;
    #endif
    """
    uint16_t dw_ld16be(const unsigned char *p) noexcept nogil
    uint32_t dw_ld24be(const unsigned char *p) noexcept nogil
    uint32_t dw_ld32be(const unsigned char *p) noexcept nogil
    uint64_t dw_ld64be(const unsigned char *p) noexcept nogil
    void dw_st16be(unsigned char *p, uint16_t v) noexcept nogil
    void dw_st24be(unsigned char *p, uint32_t v) noexcept nogil
    void dw_st32be(unsigned char *p, uint32_t v) noexcept nogil
    void dw_st64be(unsigned char *p, uint64_t v) noexcept nogil

    ctypedef struct dw_buf:
        unsigned char *p
        size_t n
        size_t cap
    unsigned char *dw_buf_reserve(dw_buf *b, size_t n) noexcept nogil
    void dw_buf_free(dw_buf *b) noexcept nogil

    ctypedef struct dw_chunk:
        const void *base
        size_t len
