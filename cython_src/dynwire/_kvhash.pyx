"""Hashes of KV cache blocks: what routers and workers have to agree on.

A block's hash is XXH3-64 of its token ids (u32 little-endian), seed 1337; only full blocks have one. Its sequence hash covers
all blocks before it: the first block's is its block hash, every further one is XXH3-64 of parent and block hash (u64
little-endian each), seed 1337. The hash is computed here, without a Python call per block: XXH3 after the specification of xxHash
0.8 (doc/xxhash_spec.md there); tests compare it with the `xxhash` package.

All functions: any thread.
"""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.long cimport PyLong_AsUnsignedLongLong

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define DW_P32_1 0x9E3779B1u
    #define DW_P32_2 0x85EBCA77u
    #define DW_P32_3 0xC2B2AE3Du
    #define DW_P64_1 0x9E3779B185EBCA87ull
    #define DW_P64_2 0xC2B2AE3D27D4EB4Full
    #define DW_P64_3 0x165667B19E3779F9ull
    #define DW_P64_4 0x85EBCA77C2B2AE63ull
    #define DW_P64_5 0x27D4EB2F165667C5ull
    #define DW_MX1 0x165667919E3779F9ull
    #define DW_MX2 0x9FB21C651E98DF25ull
    enum { DW_SECRET = 192, DW_STRIPE = 64, DW_STRIPES = (DW_SECRET - DW_STRIPE) / 8 };

    static const unsigned char dw_secret[DW_SECRET] = {
        0xb8,0xfe,0x6c,0x39,0x23,0xa4,0x4b,0xbe,0x7c,0x01,0x81,0x2c,0xf7,0x21,0xad,0x1c,
        0xde,0xd4,0x6d,0xe9,0x83,0x90,0x97,0xdb,0x72,0x40,0xa4,0xa4,0xb7,0xb3,0x67,0x1f,
        0xcb,0x79,0xe6,0x4e,0xcc,0xc0,0xe5,0x78,0x82,0x5a,0xd0,0x7d,0xcc,0xff,0x72,0x21,
        0xb8,0x08,0x46,0x74,0xf7,0x43,0x24,0x8e,0xe0,0x35,0x90,0xe6,0x81,0x3a,0x26,0x4c,
        0x3c,0x28,0x52,0xbb,0x91,0xc3,0x00,0xcb,0x88,0xd0,0x65,0x8b,0x1b,0x53,0x2e,0xa3,
        0x71,0x64,0x48,0x97,0xa2,0x0d,0xf9,0x4e,0x38,0x19,0xef,0x46,0xa9,0xde,0xac,0xd8,
        0xa8,0xfa,0x76,0x3f,0xe3,0x9c,0x34,0x3f,0xf9,0xdc,0xbb,0xc7,0xc7,0x0b,0x4f,0x1d,
        0x8a,0x51,0xe0,0x4b,0xcd,0xb4,0x59,0x31,0xc8,0x9f,0x7e,0xc9,0xd9,0x78,0x73,0x64,
        0xea,0xc5,0xac,0x83,0x34,0xd3,0xeb,0xc3,0xc5,0x81,0xa0,0xff,0xfa,0x13,0x63,0xeb,
        0x17,0x0d,0xdd,0x51,0xb7,0xf0,0xda,0x49,0xd3,0x16,0x55,0x26,0x29,0xd4,0x68,0x9e,
        0x2b,0x16,0xbe,0x58,0x7d,0x47,0xa1,0xfc,0x8f,0xf8,0xb8,0xd1,0x7a,0xd0,0x31,0xce,
        0x45,0xcb,0x3a,0x8f,0x95,0x16,0x04,0x28,0xaf,0xd7,0xfb,0xca,0xbb,0x4b,0x40,0x7e,
    };

    /* Hosts are little-endian, as docs/wire.md says; memcpy compiles to one load. */
    static inline uint64_t dw_u64(const unsigned char *p) { uint64_t v; memcpy(&v, p, 8); return v; }
    static inline uint32_t dw_u32(const unsigned char *p) { uint32_t v; memcpy(&v, p, 4); return v; }
    static inline uint64_t dw_rotl(uint64_t v, int by) { return (v << by) | (v >> (64 - by)); }
    static inline uint64_t dw_fold(uint64_t a, uint64_t b) {
        unsigned __int128 v = (unsigned __int128)a * b;
        return (uint64_t)v ^ (uint64_t)(v >> 64);
    }
    static inline uint64_t dw_avalanche64(uint64_t h) {
        h ^= h >> 33; h *= DW_P64_2; h ^= h >> 29; h *= DW_P64_3; return h ^ (h >> 32);
    }
    static inline uint64_t dw_avalanche3(uint64_t h) { h ^= h >> 37; h *= DW_MX1; return h ^ (h >> 32); }
    static inline uint64_t dw_mix16(const unsigned char *in, const unsigned char *secret, uint64_t seed) {
        return dw_fold(dw_u64(in) ^ (dw_u64(secret) + seed), dw_u64(in + 8) ^ (dw_u64(secret + 8) - seed));
    }
    static uint64_t dw_short(const unsigned char *in, size_t n, uint64_t seed) {
        const unsigned char *s = dw_secret;
        if (n > 8) {
            uint64_t lo = dw_u64(in) ^ ((dw_u64(s + 24) ^ dw_u64(s + 32)) + seed);
            uint64_t hi = dw_u64(in + n - 8) ^ ((dw_u64(s + 40) ^ dw_u64(s + 48)) - seed);
            return dw_avalanche3(n + __builtin_bswap64(lo) + hi + dw_fold(lo, hi));
        }
        if (n >= 4) {
            uint64_t sd = seed ^ ((uint64_t)__builtin_bswap32((uint32_t)seed) << 32);
            uint64_t h = dw_u32(in + n - 4) + ((uint64_t)dw_u32(in) << 32);
            h ^= (dw_u64(s + 8) ^ dw_u64(s + 16)) - sd;
            h ^= dw_rotl(h, 49) ^ dw_rotl(h, 24);
            h *= DW_MX2;
            h ^= (h >> 35) + n;
            h *= DW_MX2;
            return h ^ (h >> 28);
        }
        if (n) {
            uint32_t v = ((uint32_t)in[0] << 16) | ((uint32_t)in[n >> 1] << 24) | in[n - 1] | ((uint32_t)n << 8);
            return dw_avalanche64(v ^ ((uint64_t)(dw_u32(s) ^ dw_u32(s + 4)) + seed));
        }
        return dw_avalanche64(seed ^ dw_u64(s + 56) ^ dw_u64(s + 64));
    }
    static uint64_t dw_medium(const unsigned char *in, size_t n, uint64_t seed) {
        uint64_t h = n * DW_P64_1;
        size_t i;
        if (n <= 128) {
            if (n > 32) {
                if (n > 64) {
                    if (n > 96) h += dw_mix16(in + 48, dw_secret + 96, seed) + dw_mix16(in + n - 64, dw_secret + 112, seed);
                    h += dw_mix16(in + 32, dw_secret + 64, seed) + dw_mix16(in + n - 48, dw_secret + 80, seed);
                }
                h += dw_mix16(in + 16, dw_secret + 32, seed) + dw_mix16(in + n - 32, dw_secret + 48, seed);
            }
            h += dw_mix16(in, dw_secret, seed) + dw_mix16(in + n - 16, dw_secret + 16, seed);
            return dw_avalanche3(h);
        }
        for (i = 0; i < 8; i++) h += dw_mix16(in + 16 * i, dw_secret + 16 * i, seed);
        h = dw_avalanche3(h);
        for (; i < n / 16; i++) h += dw_mix16(in + 16 * i, dw_secret + 16 * (i - 8) + 3, seed);
        h += dw_mix16(in + n - 16, dw_secret + 136 - 17, seed);
        return dw_avalanche3(h);
    }
    static inline void dw_accumulate(uint64_t *acc, const unsigned char *in, const unsigned char *secret) {
        for (int i = 0; i < 8; i++) {
            uint64_t v = dw_u64(in + 8 * i), k = v ^ dw_u64(secret + 8 * i);
            acc[i ^ 1] += v;
            acc[i] += (uint64_t)(uint32_t)k * (k >> 32);
        }
    }
    static uint64_t dw_long(const unsigned char *in, size_t n, uint64_t seed) {
        unsigned char secret[DW_SECRET];
        uint64_t acc[8] = {DW_P32_3, DW_P64_1, DW_P64_2, DW_P64_3, DW_P64_4, DW_P32_2, DW_P64_5, DW_P32_1};
        size_t blocks = (n - 1) / (DW_STRIPE * DW_STRIPES), b, i;
        uint64_t v, h;
        for (i = 0; i < DW_SECRET; i += 16) {
            v = dw_u64(dw_secret + i) + seed; memcpy(secret + i, &v, 8);
            v = dw_u64(dw_secret + i + 8) - seed; memcpy(secret + i + 8, &v, 8);
        }
        for (b = 0; b < blocks; b++, in += DW_STRIPE * DW_STRIPES) {
            for (i = 0; i < DW_STRIPES; i++) dw_accumulate(acc, in + i * DW_STRIPE, secret + 8 * i);
            for (i = 0; i < 8; i++) {
                acc[i] ^= (acc[i] >> 47) ^ dw_u64(secret + DW_SECRET - DW_STRIPE + 8 * i);
                acc[i] *= DW_P32_1;
            }
        }
        h = n * DW_P64_1;
        n -= blocks * DW_STRIPE * DW_STRIPES;
        for (i = 0; i < (n - 1) / DW_STRIPE; i++) dw_accumulate(acc, in + i * DW_STRIPE, secret + 8 * i);
        dw_accumulate(acc, in + n - DW_STRIPE, secret + DW_SECRET - DW_STRIPE - 7);
        for (i = 0; i < 4; i++)
            h += dw_fold(acc[2 * i] ^ dw_u64(secret + 11 + 16 * i), acc[2 * i + 1] ^ dw_u64(secret + 19 + 16 * i));
        return dw_avalanche3(h);
    }
    static uint64_t dw_xxh3(const unsigned char *in, size_t n, uint64_t seed) {
        return n <= 16 ? dw_short(in, n, seed) : n <= 240 ? dw_medium(in, n, seed) : dw_long(in, n, seed);
    }
    """
    uint64_t dw_xxh3(const unsigned char *data, size_t n, uint64_t seed) noexcept nogil

SEED = 1337
cdef uint64_t _SEED = 1337


cdef uint64_t xxh3_64(const unsigned char *data, size_t n, uint64_t seed) noexcept nogil:
    return dw_xxh3(data, n, seed)


cdef uint64_t sequence_hash(uint64_t parent, uint64_t block) noexcept nogil:
    cdef uint64_t[2] pair
    pair[0] = parent
    pair[1] = block
    return dw_xxh3(<const unsigned char *>pair, 16, _SEED)


cdef void *_integers(object values, int width, Py_ssize_t *count, str what) except? NULL:
    """Integers of a list, tuple or buffer, in ``width`` bytes each. Raises `TypeError`, `ValueError`, `OverflowError`."""
    cdef Py_buffer view
    cdef Py_ssize_t n, i
    cdef void *out
    cdef uint64_t value
    cdef uint64_t highest = 0xFFFFFFFF if width == 4 else 0xFFFFFFFFFFFFFFFF
    cdef bint signed_
    if isinstance(values, (list, tuple)) or not PyObject_CheckBuffer(values):
        fast = values if isinstance(values, (list, tuple)) else list(values)
        n = len(fast)
        out = malloc(max(n, 1) * width)
        if out is NULL:
            raise MemoryError()
        try:
            for i in range(n):
                value = PyLong_AsUnsignedLongLong(fast[i])
                if value > highest:
                    raise OverflowError(f"{what} {value} at position {i} does not fit into {8 * width} bits")
                if width == 4:
                    (<uint32_t *>out)[i] = <uint32_t>value
                else:
                    (<uint64_t *>out)[i] = value
        except BaseException:
            free(out)
            raise
        count[0] = n
        return out
    PyObject_GetBuffer(values, &view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
    try:
        code = (view.format if view.format is not NULL else b"B").decode().lstrip("@=<")
        if view.itemsize not in (4, 8) or len(code) != 1 or code not in "iIlLqQ":
            raise ValueError(f"a buffer of {what}s needs items of 4 or 8 bytes (format i, I, l, L, q or Q), not {code!r}")
        signed_ = code in "ilq"
        n = view.len // view.itemsize
        out = malloc(max(n, 1) * width)
        if out is NULL:
            raise MemoryError()
        if view.itemsize == width and not signed_:
            memcpy(out, view.buf, n * width)
        else:
            for i in range(n):
                if view.itemsize == 4:
                    value = (<uint32_t *>view.buf)[i]
                    if signed_ and value > 0x7FFFFFFF:
                        value = 0xFFFFFFFFFFFFFFFF
                else:
                    value = (<uint64_t *>view.buf)[i]
                if value > highest or (signed_ and value > 0x7FFFFFFFFFFFFFFF):
                    free(out)
                    raise OverflowError(f"{what} at position {i} is negative or does not fit into {8 * width} bits")
                if width == 4:
                    (<uint32_t *>out)[i] = <uint32_t>value
                else:
                    (<uint64_t *>out)[i] = value
        count[0] = n
        return out
    finally:
        PyBuffer_Release(&view)


cdef uint32_t *tokens_of(object tokens, Py_ssize_t *count) except? NULL:
    return <uint32_t *>_integers(tokens, 4, count, "token id")


cdef uint64_t *hashes_of(object values, Py_ssize_t *count) except? NULL:
    return <uint64_t *>_integers(values, 8, count, "hash")


cdef list _list_of(const uint64_t *values, Py_ssize_t n):
    cdef Py_ssize_t i
    cdef list out = [None] * n
    for i in range(n):
        out[i] = values[i]
    return out


def xxh3(data, seed=0):
    """XXH3-64 of bytes, as ``xxhash.xxh3_64_intdigest`` gives it."""
    cdef const unsigned char[::1] view = bytes(data) if len(data) else b"\0"
    return dw_xxh3(&view[0], len(data), seed)


def lora_seed(name=None):
    """Seed of the block hashes of requests for a LoRA adapter: 1337 + XXH3-64 of its name, modulo 2^64; 1337 without one."""
    cdef bytes encoded
    if name is None:
        return SEED
    encoded = name.encode()
    return <uint64_t>(_SEED + dw_xxh3(<const unsigned char *>PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded), 0))


cdef object _block_hashes(object tokens, Py_ssize_t block_size, object lora, object mm_hashes, bint sequence):
    cdef Py_ssize_t count = 0, blocks, i, j, extra, size
    cdef uint32_t *ids
    cdef uint64_t *out = NULL
    cdef unsigned char *room = NULL
    cdef uint64_t seed = lora_seed(lora)
    cdef uint64_t value
    if block_size < 1:
        raise ValueError(f"block_size has to be 1 or more, not {block_size}")
    ids = tokens_of(tokens, &count)
    try:
        blocks = count // block_size
        size = block_size * 4
        out = <uint64_t *>malloc(max(blocks, 1) * 8)
        if out is NULL:
            raise MemoryError()
        if mm_hashes is None:
            with nogil:
                for i in range(blocks):
                    out[i] = dw_xxh3(<unsigned char *>ids + i * size, size, seed)
        else:
            if len(mm_hashes) < blocks:
                raise ValueError(
                    f"mm_hashes has {len(mm_hashes)} entries for {blocks} full blocks: one (or None) for each is needed"
                )
            for i in range(blocks):
                added = mm_hashes[i]
                if not added:
                    out[i] = dw_xxh3(<unsigned char *>ids + i * size, size, seed)
                    continue
                added = sorted(added)
                extra = len(added)
                free(room)
                room = <unsigned char *>malloc(size + 8 * extra)
                if room is NULL:
                    raise MemoryError()
                memcpy(room, <unsigned char *>ids + i * size, size)
                for j in range(extra):
                    value = PyLong_AsUnsignedLongLong(added[j])
                    memcpy(room + size + 8 * j, &value, 8)
                out[i] = dw_xxh3(room, size + 8 * extra, seed)
        if sequence:
            for i in range(1, blocks):
                out[i] = sequence_hash(out[i - 1], out[i])
        return _list_of(out, blocks)
    finally:
        free(room)
        free(out)
        free(ids)


def compute_block_hashes(tokens, block_size, lora=None, mm_hashes=None):
    """Hash of every full block of ``tokens``: ``len(tokens) // block_size`` integers of 64 bits; a partial block has none.

    ``tokens``: ids from 0 to 2^32 - 1, as list, tuple, other iterable, or a C-contiguous buffer of 4- or 8-byte integers (array,
    numpy). ``lora``: name of the adapter. ``mm_hashes``: for every full block the 64-bit hashes of the multimodal objects in it,
    or None; they are sorted and appended to the block's bytes. Raises `ValueError`, `OverflowError`, `TypeError`.
    """
    return _block_hashes(tokens, block_size, lora, mm_hashes, False)


def compute_sequence_hashes(tokens, block_size, lora=None, mm_hashes=None):
    """As `compute_block_hashes`, but each hash covers the blocks before it too."""
    return _block_hashes(tokens, block_size, lora, mm_hashes, True)


def sequence_hashes(block_hashes, parent=None):
    """Sequence hashes of consecutive blocks with these block hashes, behind the block whose sequence hash is ``parent``."""
    cdef Py_ssize_t n = 0, i
    cdef uint64_t *values = hashes_of(block_hashes, &n)
    cdef uint64_t before = 0
    try:
        if n and parent is not None:
            before = parent
            values[0] = sequence_hash(before, values[0])
        for i in range(1, n):
            values[i] = sequence_hash(values[i - 1], values[i])
        return _list_of(values, n)
    finally:
        free(values)
