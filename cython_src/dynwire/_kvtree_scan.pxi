# Reads events from JSON and msgpack straight into arrays: with an object per block, making the objects would cost more than the
# tree. What is not in the usual shape is left to msgspec, which also words the errors.


cdef int parsed_reserve(Parsed *parsed, size_t n) except -1:
    cdef uint64_t *more
    if n <= parsed.room:
        return 0
    n = max(n, parsed.room * 2)
    more = <uint64_t *>realloc(parsed.blocks, n * 8)
    if more is NULL:
        raise MemoryError()
    parsed.blocks = more
    more = <uint64_t *>realloc(parsed.tokens, n * 8)
    if more is NULL:
        raise MemoryError()
    parsed.tokens = more
    more = <uint64_t *>realloc(parsed.keys, n * 8)
    if more is NULL:
        raise MemoryError()
    parsed.keys = more
    parsed.room = n
    return 0


cdef bint scan_event(Parsed *parsed, bytes data, bint whole) except -1:
    """Read an encoded event, with its worker if ``whole``. False: it has another shape, or is none."""
    cdef Scan s
    s.p = data
    s.end = s.p + len(data)
    parsed.kind = 0
    parsed.n = 0
    parsed.dp_rank = 0
    parsed.has_parent = False
    if s.p < s.end and s.p[0] == c"{":
        if not (json_router(&s, parsed) if whole else json_event(&s, parsed)):
            return False
        json_space(&s)
    elif not (pack_router(&s, parsed) if whole else pack_event(&s, parsed)):
        return False
    return s.p == s.end and parsed.kind != 0


# ---- JSON ----------------------------------------------------------------------------------------------------------------


cdef inline void json_space(Scan *s) noexcept:
    while s.p < s.end and (s.p[0] == 32 or s.p[0] == 10 or s.p[0] == 13 or s.p[0] == 9):
        s.p += 1


cdef inline bint json_mark(Scan *s, unsigned char mark) noexcept:
    json_space(s)
    if s.p < s.end and s.p[0] == mark:
        s.p += 1
        return True
    return False


cdef inline bint json_number(Scan *s, uint64_t *value) noexcept:
    """Digits that fit into 64 bits, and no more of a number behind them."""
    cdef const unsigned char *start
    cdef uint64_t out = 0, eight = 0
    cdef unsigned char digit
    json_space(s)
    start = s.p
    while s.end - s.p >= 8 and s.p - start < 16 and dw_eight_digits(s.p, &eight):
        out = out * 100000000 + eight
        s.p += 8
    while s.p < s.end and c"0" <= s.p[0] <= c"9":
        digit = s.p[0] - c"0"
        if out > 1844674407370955161ULL or (out == 1844674407370955161ULL and digit > 5):
            return False
        out = out * 10 + digit
        s.p += 1
    if s.p == start or (start[0] == c"0" and s.p - start > 1) or s.p == s.end:
        return False
    if s.p[0] == c"." or s.p[0] == c"e" or s.p[0] == c"E":
        return False
    value[0] = out
    return True


cdef inline bint json_text(Scan *s, const unsigned char **text, size_t *n) noexcept:
    if not json_mark(s, c'"'):
        return False
    text[0] = s.p
    while s.p < s.end and s.p[0] != c'"' and s.p[0] != c"\\":
        s.p += 1
    if s.p == s.end or s.p[0] != c'"':
        return False
    n[0] = s.p - text[0]
    s.p += 1
    return True


cdef inline bint json_key(Scan *s, const unsigned char **text, size_t *n) noexcept:
    return json_text(s, text, n) and json_mark(s, c":")


cdef inline bint is_(const unsigned char *text, size_t n, const char *name, size_t length) noexcept:
    return n == length and memcmp(text, name, n) == 0


cdef bint json_router(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0
    cdef int seen = 0
    if not json_mark(s, c"{"):
        return False
    while True:
        if not json_key(s, &key, &n):
            return False
        if is_(key, n, "worker_id", 9):
            if not json_number(s, &parsed.worker_id):
                return False
            seen |= 1
        elif is_(key, n, "event", 5):
            if not json_event(s, parsed):
                return False
            seen |= 2
        else:
            return False
        if not json_mark(s, c","):
            return json_mark(s, c"}") and seen == 3


cdef bint json_event(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0
    cdef uint64_t number
    cdef int seen = 0
    if not json_mark(s, c"{"):
        return False
    while True:
        if not json_key(s, &key, &n):
            return False
        if is_(key, n, "event_id", 8):
            if not json_number(s, &number):
                return False
            seen |= 1
        elif is_(key, n, "dp_rank", 7):
            if not json_number(s, &parsed.dp_rank):
                return False
        elif is_(key, n, "data", 4):
            if not json_data(s, parsed):
                return False
            seen |= 2
        else:
            return False
        if not json_mark(s, c","):
            return json_mark(s, c"}") and seen == 3


cdef bint json_data(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0
    json_space(s)
    if s.p < s.end and s.p[0] == c'"':
        if not json_text(s, &key, &n) or not is_(key, n, "cleared", 7):
            return False
        parsed.kind = IS_CLEARED
        return True
    if not json_mark(s, c"{") or not json_key(s, &key, &n):
        return False
    if is_(key, n, "stored", 6):
        parsed.kind = IS_STORED
        return json_stored(s, parsed) and json_mark(s, c"}")
    if not is_(key, n, "removed", 7) or not json_mark(s, c"{") or not json_key(s, &key, &n):
        return False
    parsed.kind = IS_REMOVED
    if not is_(key, n, "block_hashes", 12) or not json_mark(s, c"["):
        return False
    if not json_mark(s, c"]"):
        while True:
            parsed_reserve(parsed, parsed.n + 1)
            if not json_number(s, &parsed.blocks[parsed.n]):
                return False
            parsed.n += 1
            if not json_mark(s, c","):
                break
        if not json_mark(s, c"]"):
            return False
    return json_mark(s, c"}") and json_mark(s, c"}")


cdef bint json_stored(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0
    cdef int seen = 0
    if not json_mark(s, c"{"):
        return False
    while True:
        if not json_key(s, &key, &n):
            return False
        if is_(key, n, "parent_hash", 11):
            json_space(s)
            if s.end - s.p > 4 and memcmp(s.p, b"null", 4) == 0:
                s.p += 4
            elif json_number(s, &parsed.parent):
                parsed.has_parent = True
            else:
                return False
            seen |= 1
        elif is_(key, n, "blocks", 6):
            if not json_blocks(s, parsed):
                return False
            seen |= 2
        else:
            return False
        if not json_mark(s, c","):
            return json_mark(s, c"}") and seen == 3


cdef inline bint json_literal(Scan *s, const char *text, size_t n) noexcept:
    json_space(s)
    if <size_t>(s.end - s.p) >= n and memcmp(s.p, text, n) == 0:
        s.p += n
        return True
    return False


cdef inline bint json_usual_block(Scan *s, uint64_t *block, uint64_t *tokens) noexcept:
    """A block with its fields in their usual order."""
    return (
        json_literal(s, b'{"block_hash"', 13) and json_mark(s, c":") and json_number(s, block) and json_mark(s, c",")
        and json_literal(s, b'"tokens_hash"', 13) and json_mark(s, c":") and json_number(s, tokens) and json_mark(s, c"}")
    )


cdef bint json_blocks(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef const unsigned char *start
    cdef size_t n = 0
    cdef int seen
    if not json_mark(s, c"["):
        return False
    if json_mark(s, c"]"):
        return True
    while True:
        parsed_reserve(parsed, parsed.n + 1)
        start = s.p
        if not json_usual_block(s, &parsed.blocks[parsed.n], &parsed.tokens[parsed.n]):
            s.p = start
            seen = 0
            if not json_mark(s, c"{"):
                return False
            while True:
                if not json_key(s, &key, &n):
                    return False
                if is_(key, n, "block_hash", 10):
                    if not json_number(s, &parsed.blocks[parsed.n]):
                        return False
                    seen |= 1
                elif is_(key, n, "tokens_hash", 11):
                    if not json_number(s, &parsed.tokens[parsed.n]):
                        return False
                    seen |= 2
                else:
                    return False
                if not json_mark(s, c","):
                    break
            if not json_mark(s, c"}") or seen != 3:
                return False
        parsed.n += 1
        if not json_mark(s, c","):
            return json_mark(s, c"]")


# ---- msgpack -------------------------------------------------------------------------------------------------------------


cdef inline bint pack_sized(Scan *s, unsigned char fix, unsigned char mask, unsigned char code16, size_t *n) noexcept:
    """Header of a map or an array."""
    cdef size_t left = s.end - s.p
    if left < 1:
        return False
    if s.p[0] & mask == fix:
        n[0] = s.p[0] & 0x0F
        s.p += 1
        return True
    if s.p[0] == code16 and left >= 3:
        n[0] = dw_ld16be(s.p + 1)
        s.p += 3
        return True
    if s.p[0] == code16 + 1 and left >= 5:
        n[0] = dw_ld32be(s.p + 1)
        s.p += 5
        return True
    return False


cdef inline bint pack_map(Scan *s, size_t *n) noexcept:
    return pack_sized(s, 0x80, 0xF0, 0xDE, n)


cdef inline bint pack_array(Scan *s, size_t *n) noexcept:
    # every element takes a byte at least: a longer array than the data is none
    return pack_sized(s, 0x90, 0xF0, 0xDC, n) and n[0] <= <size_t>(s.end - s.p)


cdef inline bint pack_text(Scan *s, const unsigned char **text, size_t *n) noexcept:
    if s.p < s.end and s.p[0] & 0xE0 == 0xA0:
        n[0] = s.p[0] & 0x1F
        s.p += 1
        if n[0] <= <size_t>(s.end - s.p):
            text[0] = s.p
            s.p += n[0]
            return True
    return False


cdef inline bint pack_number(Scan *s, uint64_t *value) noexcept:
    cdef size_t left = s.end - s.p
    cdef unsigned char code
    if left < 1:
        return False
    code = s.p[0]
    if code < 0x80:
        value[0] = code
        s.p += 1
    elif code == 0xCF and left >= 9:
        value[0] = dw_ld64be(s.p + 1)
        s.p += 9
    elif code == 0xCE and left >= 5:
        value[0] = dw_ld32be(s.p + 1)
        s.p += 5
    elif code == 0xCD and left >= 3:
        value[0] = dw_ld16be(s.p + 1)
        s.p += 3
    elif code == 0xCC and left >= 2:
        value[0] = s.p[1]
        s.p += 2
    else:
        return False
    return True


cdef bint pack_router(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0, pairs = 0
    cdef int seen = 0
    if not pack_map(s, &pairs):
        return False
    for _ in range(pairs):
        if not pack_text(s, &key, &n):
            return False
        if is_(key, n, "worker_id", 9):
            if not pack_number(s, &parsed.worker_id):
                return False
            seen |= 1
        elif is_(key, n, "event", 5):
            if not pack_event(s, parsed):
                return False
            seen |= 2
        else:
            return False
    return seen == 3


cdef bint pack_event(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0, pairs = 0
    cdef uint64_t number
    cdef int seen = 0
    if not pack_map(s, &pairs):
        return False
    for _ in range(pairs):
        if not pack_text(s, &key, &n):
            return False
        if is_(key, n, "event_id", 8):
            if not pack_number(s, &number):
                return False
            seen |= 1
        elif is_(key, n, "dp_rank", 7):
            if not pack_number(s, &parsed.dp_rank):
                return False
        elif is_(key, n, "data", 4):
            if not pack_data(s, parsed):
                return False
            seen |= 2
        else:
            return False
    return seen == 3


cdef bint pack_data(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0, i
    if pack_text(s, &key, &n):
        parsed.kind = IS_CLEARED
        return is_(key, n, "cleared", 7)
    if not pack_map(s, &n) or n != 1 or not pack_text(s, &key, &n):
        return False
    if is_(key, n, "stored", 6):
        parsed.kind = IS_STORED
        return pack_stored(s, parsed)
    if not is_(key, n, "removed", 7) or not pack_map(s, &n) or n != 1 or not pack_text(s, &key, &n):
        return False
    parsed.kind = IS_REMOVED
    if not is_(key, n, "block_hashes", 12) or not pack_array(s, &n):
        return False
    parsed_reserve(parsed, n)
    for i in range(n):
        if not pack_number(s, &parsed.blocks[i]):
            return False
    parsed.n = n
    return True


cdef bint pack_stored(Scan *s, Parsed *parsed) except -1:
    cdef const unsigned char *key = NULL
    cdef size_t n = 0, pairs = 0, count = 0, i
    cdef int seen = 0, both
    if not pack_map(s, &pairs):
        return False
    for _ in range(pairs):
        if not pack_text(s, &key, &n):
            return False
        if is_(key, n, "parent_hash", 11):
            if s.p < s.end and s.p[0] == 0xC0:
                s.p += 1
            elif pack_number(s, &parsed.parent):
                parsed.has_parent = True
            else:
                return False
            seen |= 1
        elif is_(key, n, "blocks", 6):
            if not pack_array(s, &count):
                return False
            parsed_reserve(parsed, count)
            for i in range(count):
                if not pack_map(s, &n) or n != 2:
                    return False
                both = 0
                while both != 3:
                    if not pack_text(s, &key, &n):
                        return False
                    if is_(key, n, "block_hash", 10) and not both & 1:
                        if not pack_number(s, &parsed.blocks[i]):
                            return False
                        both |= 1
                    elif is_(key, n, "tokens_hash", 11) and not both & 2:
                        if not pack_number(s, &parsed.tokens[i]):
                            return False
                        both |= 2
                    else:
                        return False
            parsed.n = count
            seen |= 2
        else:
            return False
    return seen == 3
