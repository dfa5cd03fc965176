"""The index of a KV router: which worker has which blocks, as a prefix tree of block hashes.

A node is one block behind one prefix, found by its sequence hash in one table for the whole tree: the sequence hashes of a
prompt are known before the first look-up, so all look-ups can be on their way to memory at once (that, not the work, is what a
match over 10^6 blocks costs). Each node has a bit per holder; a holder is one (worker, dp rank). Each holder has a table from the
engine's own block ids to nodes, because events name blocks by those.

Memory per block: 48 bytes for the node, 10 to 20 in the table (open addressing, at most 4/5 full, doubled), and 20 to 30 in the
holder's (grown by half): 78 to 98 for a block that one worker has, 20 to 30 for each further worker that has it.

Threads: one at a time, in the sense of the GIL. `snapshot` alone releases it: meanwhile others may ask, and what would change
the tree raises `RuntimeError`.
"""

import secrets

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsUnsignedLongLong
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from ._bytes cimport dw_ld16be, dw_ld32be, dw_ld64be
from ._kvhash cimport hashes_of, sequence_hash

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #define dw_prefetch(p) __builtin_prefetch(p)
    static inline uint64_t dw_scatter(uint64_t v, uint64_t secret) {
        unsigned __int128 r = (unsigned __int128)(v ^ secret) * 0x9E3779B97F4A7C15ull;
        return (uint64_t)r ^ (uint64_t)(r >> 64);
    }
    static inline uint32_t dw_lowest(uint64_t v) { return (uint32_t)__builtin_ctzll(v); }
    static inline int dw_ones(uint64_t v) { return __builtin_popcountll(v); }
    /* Eight decimal digits at once: all of 0x30 to 0x39, then pairs, fours and the eight are put together. */
    static inline int dw_eight_digits(const unsigned char *p, uint64_t *out) {
        uint64_t v;
        memcpy(&v, p, 8);
        if (((v & 0xF0F0F0F0F0F0F0F0ull) | (((v + 0x0606060606060606ull) & 0xF0F0F0F0F0F0F0F0ull) >> 4)) != 0x3333333333333333ull)
            return 0;
        v = (v & 0x0F0F0F0F0F0F0F0Full) * 2561 >> 8;
        v = (v & 0x00FF00FF00FF00FFull) * 6553601 >> 16;
        *out = (v & 0x0000FFFF0000FFFFull) * 42949672960001ull >> 32;
        return 1;
    }
    """
    int dw_eight_digits(const unsigned char *p, uint64_t *out) noexcept nogil
    void dw_prefetch(const void *p) noexcept nogil
    uint64_t dw_scatter(uint64_t v, uint64_t secret) noexcept nogil
    uint32_t dw_lowest(uint64_t v) noexcept nogil
    int dw_ones(uint64_t v) noexcept nogil

cdef enum:
    ROOT = 1
    CHUNK_BITS = 12                  # nodes are allocated 4096 at a time, and never move
    CHUNK = 1 << CHUNK_BITS
    AHEAD_SLOT = 16                  # look-ups whose slot of the table is on its way
    AHEAD_NODE = 8                   # and whose node is
    EVICT_AT_ONCE = 64
    SNAPSHOT_VERSION = 1
    LET_OTHERS = 2048                # blocks that `restore` makes before it looks whether others have waited for their turn

# Others get the GIL after so long. It has to be more than the 5 ms after which a waiting thread asks for it
# (sys.setswitchinterval): one that has asked is waited for, one that has not is woken by a release and finds the GIL taken again.
cdef double TURN_S = 0.006

cdef double clock_s() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec * 1e-9


cdef double let_others(double turned_at) noexcept:
    """Offer the GIL if this thread has had it for `TURN_S`; since when it has it."""
    if clock_s() - turned_at < TURN_S:
        return turned_at
    with nogil:
        pass
    return clock_s()


cdef struct Node:
    uint64_t tokens_hash
    uint64_t key                     # sequence hash
    uint64_t bits                    # holders 0 to 63
    uint64_t *more                   # further holders: word 0 is the number of words behind it
    uint32_t parent                  # of a free node: the next free one
    uint32_t children
    uint32_t gen                     # tells a holder's entry whether the node is still the one it was made for
    uint32_t recent                  # rounds of the clock's hand that it survives: 1 when stored, 3 when matched

cdef struct Entry:
    uint64_t block
    uint32_t node                    # 0: empty
    uint32_t gen

cdef struct Holder:
    Entry *entries
    uint32_t size
    uint32_t used                    # entries, stale ones too
    uint32_t stale                   # whose node was evicted
    uint32_t taken                   # in use

cdef enum:
    IS_STORED = 1
    IS_REMOVED = 2
    IS_CLEARED = 3

cdef struct Parsed:
    int kind
    bint has_parent
    uint64_t worker_id
    uint64_t dp_rank
    uint64_t parent
    size_t n                         # blocks
    size_t room
    uint64_t *blocks
    uint64_t *tokens
    uint64_t *keys                   # sequence hashes, filled in when they are stored

cdef struct Scan:
    const unsigned char *p
    const unsigned char *end

include "_kvtree_scan.pxi"

UNKNOWN_PARENT = "unknown_parent"
PARENT_EVICTED = "parent_evicted"
STORED = "stored"
REMOVED = "removed"
CLEARED = "cleared"


class OverlapScores:
    """OverlapScores(scores, tree_sizes)

    Result of `RadixTree.find_matches`: matched blocks from the beginning of the prompt, per (worker_id, dp_rank).
    """

    __slots__ = ("scores", "tree_sizes")

    def __init__(self, scores, tree_sizes):
        self.scores = scores
        self.tree_sizes = tree_sizes

    def __eq__(self, other):
        return isinstance(other, OverlapScores) and self.scores == other.scores

    def __repr__(self):
        return f"OverlapScores({self.scores!r})"


@cython.final
cdef class RadixTree:
    """Prefix tree of the blocks that workers have cached.

    ``budget_bytes`` bounds its memory (0: no bound). When it is reached, leaves that were neither matched nor stored lately are
    forgotten for all workers; a routing decision then sees less of the past, nothing else changes. ``evicted`` counts them.
    """

    cdef Node **chunks
    cdef uint32_t chunk_count
    cdef uint32_t next_node          # first that was never used
    cdef uint32_t free_node
    cdef readonly uint32_t nodes     # in use, the root apart
    cdef uint64_t *table             # tag << 32 | node; 0: empty
    cdef uint32_t table_size
    cdef Holder *holders
    cdef uint32_t holder_count       # slots in `holders`
    cdef dict numbers                # (worker_id, dp_rank) -> number of the holder
    cdef list keys                   # and back
    cdef dict extra                  # holder << 32 | node -> further block ids of that holder for that node
    cdef uint64_t secret             # so that nobody can choose hashes that collide in the tables
    cdef size_t bytes_
    cdef size_t words_bytes
    cdef Parsed parsed               # the event that is being applied; its arrays are used again
    cdef uint32_t hand
    cdef uint32_t readers            # threads that read the tree without the GIL
    cdef readonly size_t budget_bytes
    cdef readonly uint64_t evicted
    cdef readonly uint64_t entries   # (block, holder) pairs

    def __cinit__(self, size_t budget_bytes=0):
        self.secret = secrets.randbits(64)
        self.numbers = {}
        self.keys = []
        self.extra = {}
        self.budget_bytes = budget_bytes
        self.table_size = 64
        self.table = <uint64_t *>calloc(self.table_size, 8)
        if self.table is NULL:
            raise MemoryError()
        self.next_node = ROOT
        self.hand = ROOT
        self.take_node()
        self.nodes = 0

    def __dealloc__(self):
        cdef uint32_t i
        if self.chunks is not NULL:
            for i in range(ROOT, self.next_node):
                free(self.node(i).more)
            for i in range(self.chunk_count):
                free(self.chunks[i])
        free(self.chunks)
        free(self.table)
        if self.holders is not NULL:
            for i in range(self.holder_count):
                free(self.holders[i].entries)
        free(self.holders)
        free(self.parsed.blocks)
        free(self.parsed.tokens)
        free(self.parsed.keys)

    cdef inline int changing(self) except -1:
        """Before every change."""
        if self.readers:
            raise RuntimeError("a snapshot of this tree is being taken in another thread: change it when that is complete")
        return 0

    # ---- nodes -------------------------------------------------------------------------------------------------------------

    cdef inline Node *node(self, uint32_t i) noexcept nogil:
        return &self.chunks[i >> CHUNK_BITS][i & (CHUNK - 1)]

    cdef uint32_t take_node(self) except 0:
        cdef uint32_t i = self.free_node
        cdef Node **chunks
        cdef Node *chunk
        cdef uint32_t gen
        if i:
            self.free_node = self.node(i).parent
            gen = self.node(i).gen
        else:
            i = self.next_node
            if i == 0xFFFFFFFF:
                raise MemoryError("the tree has 2^32 blocks")
            if i >> CHUNK_BITS >= self.chunk_count:
                chunks = <Node **>realloc(self.chunks, (self.chunk_count + 1) * sizeof(Node *))
                if chunks is NULL:
                    raise MemoryError()
                self.chunks = chunks
                chunk = <Node *>calloc(CHUNK, sizeof(Node))
                if chunk is NULL:
                    raise MemoryError()
                chunks[self.chunk_count] = chunk
                self.chunk_count += 1
            self.next_node += 1
            gen = 0
        memset(self.node(i), 0, sizeof(Node))
        self.node(i).gen = gen
        self.nodes += 1
        return i

    cdef void drop_node(self, uint32_t i) noexcept:
        cdef Node *node = self.node(i)
        if node.more is not NULL:
            self.words_bytes -= (node.more[0] + 1) * 8
            free(node.more)
            node.more = NULL
        node.gen += 1
        node.bits = 0
        node.children = 0
        node.parent = self.free_node
        node.key = 0
        self.free_node = i
        self.nodes -= 1

    # ---- the table of nodes ------------------------------------------------------------------------------------------------

    cdef inline uint32_t slot_of(self, uint64_t scattered) noexcept nogil:
        # From the half that stands in the slot too, so that a larger table is made without a look at the nodes.
        return <uint32_t>((<uint64_t><uint32_t>scattered * self.table_size) >> 32)

    cdef inline uint32_t find_child(self, uint32_t parent, uint64_t key, uint64_t tokens_hash) noexcept nogil:
        cdef uint32_t slot
        return self.find_slot(parent, key, tokens_hash, &slot)

    cdef inline uint32_t find_slot(self, uint32_t parent, uint64_t key, uint64_t tokens_hash, uint32_t *where) noexcept nogil:
        """The child of a node, or 0 and the slot where it would go."""
        cdef uint64_t scattered = dw_scatter(key, self.secret)
        cdef uint32_t slot = self.slot_of(scattered)
        cdef uint32_t tag = <uint32_t>scattered
        cdef uint64_t found
        cdef Node *node
        while True:
            found = self.table[slot]
            if found == 0:
                where[0] = slot
                return 0
            if <uint32_t>(found >> 32) == tag:
                node = self.node(<uint32_t>found)
                if node.key == key and node.tokens_hash == tokens_hash and node.parent == parent:
                    return <uint32_t>found
            slot += 1
            if slot == self.table_size:
                slot = 0

    cdef void enter(self, uint32_t i) noexcept nogil:
        cdef uint64_t scattered = dw_scatter(self.node(i).key, self.secret)
        cdef uint32_t slot = self.slot_of(scattered)
        while self.table[slot]:
            slot += 1
            if slot == self.table_size:
                slot = 0
        self.table[slot] = (scattered << 32) | i

    cdef int grow_table(self) except -1:
        cdef uint64_t *old = self.table
        cdef uint32_t size = self.table_size
        cdef uint32_t i, slot
        cdef uint64_t *table
        if self.nodes + 2 < size - size // 5:
            return 0
        table = <uint64_t *>calloc(2 * size, 8)
        if table is NULL:
            raise MemoryError()
        self.table = table
        self.table_size = 2 * size
        for i in range(size):
            if old[i]:
                slot = self.slot_of(old[i] >> 32)
                while table[slot]:
                    slot += 1
                    if slot == self.table_size:
                        slot = 0
                table[slot] = old[i]
        free(old)
        return 0

    cdef void leave(self, uint32_t i) noexcept nogil:
        """Take a node out of the table, and move up what was pushed behind it."""
        cdef uint32_t slot = self.slot_of(dw_scatter(self.node(i).key, self.secret))
        cdef uint32_t hole, home
        while <uint32_t>self.table[slot] != i:
            slot += 1
            if slot == self.table_size:
                slot = 0
        hole = slot
        while True:
            slot += 1
            if slot == self.table_size:
                slot = 0
            if self.table[slot] == 0:
                break
            home = self.slot_of(self.table[slot] >> 32)
            # may it move to the hole? only if its home is not behind the hole, on the way round to its slot
            if (hole < home <= slot) if hole <= slot else (home > hole or home <= slot):
                continue
            self.table[hole] = self.table[slot]
            hole = slot
        self.table[hole] = 0

    cdef void prune(self, uint32_t i) noexcept:
        """Forget the node, and its parents in turn, as long as nobody has them and nothing hangs on them."""
        cdef Node *node
        cdef uint32_t parent
        while i != ROOT:
            node = self.node(i)
            if node.children or node.bits or self.has_more(node):
                return
            parent = node.parent
            self.leave(i)
            self.drop_node(i)
            self.node(parent).children -= 1
            i = parent

    # ---- holders of a node -------------------------------------------------------------------------------------------------

    cdef inline bint has_more(self, Node *node) noexcept nogil:
        cdef uint64_t i
        if node.more is not NULL:
            for i in range(1, node.more[0] + 1):
                if node.more[i]:
                    return True
        return False

    cdef inline bint holds(self, Node *node, uint32_t holder) noexcept nogil:
        if holder < 64:
            return (node.bits >> holder) & 1
        return node.more is not NULL and (holder >> 6) <= node.more[0] and (node.more[holder >> 6] >> (holder & 63)) & 1

    cdef int set_holder(self, Node *node, uint32_t holder) except -1:
        cdef uint64_t words, had = 0
        cdef uint64_t *more
        if holder < 64:
            node.bits |= <uint64_t>1 << holder
            return 0
        words = holder >> 6
        if node.more is not NULL:
            had = node.more[0]
        if had < words:
            more = <uint64_t *>realloc(node.more, (words + 1) * 8)
            if more is NULL:
                raise MemoryError()
            memset(more + had + 1, 0, (words - had) * 8)
            more[0] = words
            self.words_bytes += (words + 1 - (had + 1 if had else 0)) * 8
            node.more = more
        node.more[words] |= <uint64_t>1 << (holder & 63)
        return 0

    cdef inline void clear_holder(self, Node *node, uint32_t holder) noexcept nogil:
        if holder < 64:
            node.bits &= ~(<uint64_t>1 << holder)
        elif node.more is not NULL and (holder >> 6) <= node.more[0]:
            node.more[holder >> 6] &= ~(<uint64_t>1 << (holder & 63))

    # ---- a holder's table of block ids ---------------------------------------------------------------------------------------

    cdef inline uint32_t place_of(self, Holder *holder, uint64_t block) noexcept nogil:
        return <uint32_t>(((dw_scatter(block, self.secret) >> 32) * holder.size) >> 32)

    cdef inline Entry *find_entry(self, Holder *holder, uint64_t block) noexcept nogil:
        """The entry of a block id, stale or not, or NULL."""
        cdef Entry *entry
        if holder.size == 0:
            return NULL
        entry = self.find_place(holder, block)
        return entry if entry.node else NULL

    cdef inline Entry *find_place(self, Holder *holder, uint64_t block) noexcept nogil:
        """The entry of a block id, or the empty one where it would go; the table is not empty."""
        cdef uint32_t place
        cdef Entry *entry
        place = self.place_of(holder, block)
        while True:
            entry = &holder.entries[place]
            if entry.node == 0 or entry.block == block:
                return entry
            place += 1
            if place == holder.size:
                place = 0

    cdef inline bint is_stale(self, Entry *entry) noexcept nogil:
        return self.node(entry.node).gen != entry.gen

    cdef int resize(self, Holder *holder, uint32_t size) except -1:
        """Another table of entries, without the stale ones."""
        cdef Entry *old = holder.entries
        cdef uint32_t before = holder.size
        cdef uint32_t i, place
        cdef bint some_stale = holder.stale > 0  # otherwise the nodes need not be looked at
        cdef Entry *entries = <Entry *>calloc(size, sizeof(Entry))
        if entries is NULL:
            raise MemoryError()
        holder.entries = entries
        holder.size = size
        holder.used = 0
        holder.stale = 0
        for i in range(before):
            if old[i].node and not (some_stale and self.is_stale(&old[i])):
                place = self.place_of(holder, old[i].block)
                while entries[place].node:
                    place += 1
                    if place == size:
                        place = 0
                entries[place] = old[i]
                holder.used += 1
        free(old)
        self.bytes_ += <int64_t>(<int64_t>size - <int64_t>before) * <int64_t>sizeof(Entry)
        return 0

    cdef inline int room_for_entry(self, Holder *holder) except -1:
        if holder.used + 1 <= holder.size - holder.size // 5:
            return 0
        # with a budget, rather many rounds over the table than a larger one
        if holder.stale * (16 if self.budget_bytes else 4) > holder.used:
            return self.resize(holder, holder.size)
        return self.resize(holder, holder.size + holder.size // 2 if holder.size else 16)

    cdef inline int fill_entry(self, Holder *holder, Entry *entry, uint64_t block, uint32_t node) noexcept nogil:
        entry.block = block
        entry.node = node
        entry.gen = self.node(node).gen
        holder.used += 1
        self.entries += 1
        return 0

    cdef void drop_entry(self, Holder *holder, Entry *entry) noexcept nogil:
        cdef uint32_t hole = <uint32_t>(entry - holder.entries)
        cdef uint32_t place = hole
        cdef uint32_t home
        while True:
            place += 1
            if place == holder.size:
                place = 0
            if holder.entries[place].node == 0:
                break
            home = self.place_of(holder, holder.entries[place].block)
            if (hole < home <= place) if hole <= place else (home > hole or home <= place):
                continue
            holder.entries[hole] = holder.entries[place]
            hole = place
        holder.entries[hole].node = 0
        holder.used -= 1

    cdef int forget(self, uint32_t number, Entry *entry) except -1:
        """The holder does not have the block of this entry any more."""
        cdef uint32_t i = entry.node
        cdef bint stale = self.is_stale(entry)
        cdef Holder *holder = &self.holders[number]
        self.drop_entry(holder, entry)
        if stale:
            holder.stale -= 1
            return 0
        self.entries -= 1
        if self.extra:
            key = (<uint64_t>number << 32) | i
            further = self.extra.get(key)
            if further is not None:
                if further > 1:
                    self.extra[key] = further - 1
                else:
                    del self.extra[key]
                return 0
        self.clear_holder(self.node(i), number)
        self.prune(i)
        return 0

    # ---- holders -------------------------------------------------------------------------------------------------------------

    cdef int64_t number_of(self, object worker_id, object dp_rank, bint make) except -2:
        cdef uint32_t number
        cdef Holder *holders
        key = (worker_id, dp_rank)
        found = self.numbers.get(key)
        if found is not None:
            return found
        if not make:
            return -1
        PyLong_AsUnsignedLongLong(worker_id)
        PyLong_AsUnsignedLongLong(dp_rank)
        for number in range(self.holder_count):
            if not self.holders[number].taken:
                break
        else:
            number = self.holder_count
            holders = <Holder *>realloc(self.holders, (number + 1) * sizeof(Holder))
            if holders is NULL:
                raise MemoryError()
            self.holders = holders
            self.holder_count += 1
            self.keys.append(None)
        memset(&self.holders[number], 0, sizeof(Holder))
        self.holders[number].taken = 1
        self.numbers[key] = number
        self.keys[number] = key
        return number

    cdef int empty_holder(self, uint32_t number) except -1:
        cdef Holder *holder = &self.holders[number]
        cdef uint32_t i, node
        self.entries -= holder.used - holder.stale
        for i in range(holder.size):
            node = holder.entries[i].node
            if node and not self.is_stale(&holder.entries[i]):
                if self.extra:
                    self.extra.pop((<uint64_t>number << 32) | node, None)
                if self.holds(self.node(node), number):
                    self.clear_holder(self.node(node), number)
                    self.prune(node)
        free(holder.entries)
        self.bytes_ -= holder.size * sizeof(Entry)
        holder.entries = NULL
        holder.size = holder.used = holder.stale = 0
        return 0

    # ---- memory --------------------------------------------------------------------------------------------------------------

    cdef size_t used_bytes(self) noexcept:
        return self.bytes_ + self.words_bytes + <size_t>self.chunk_count * CHUNK * sizeof(Node) + <size_t>self.table_size * 8

    @property
    def nbytes(self):
        """Bytes of nodes and tables."""
        return self.used_bytes()

    cdef int make_room(self) except -1:
        """Forget some leaves if the budget is used up: CLOCK, so that what was matched or stored lately stays."""
        cdef Node *node
        cdef uint32_t i, parent, seen = 0, gone = 0, limit
        cdef size_t growth = 0
        if self.next_node >> CHUNK_BITS >= self.chunk_count:
            growth = CHUNK * sizeof(Node)
        if self.nodes + 2 >= self.table_size - self.table_size // 5:
            growth += self.table_size * 8
        if self.free_node or self.nodes < 16 or self.used_bytes() + growth <= self.budget_bytes:
            return 0
        limit = 4 * self.next_node
        while gone < EVICT_AT_ONCE and seen < limit:
            self.hand += 1
            if self.hand >= self.next_node:
                self.hand = ROOT + 1
            seen += 1
            i = self.hand
            node = self.node(i)
            if node.key == 0 and node.bits == 0:
                continue  # a free one
            if node.recent:
                node.recent -= 1
                continue
            if node.children:
                continue
            # and what it hangs on, as far as that is not used either: otherwise every leaf would take a round of the clock
            while i != ROOT and not node.recent and not node.children:
                self.release_holders(i)
                parent = node.parent
                self.leave(i)
                self.drop_node(i)
                self.node(parent).children -= 1
                self.evicted += 1
                gone += 1
                i = parent
                node = self.node(i)
            self.prune(i)
        return 0

    cdef int release_holders(self, uint32_t i) except -1:
        """Nobody has the block any more; the holders' entries are stale from now on."""
        cdef Node *node = self.node(i)
        cdef uint32_t number
        for number in range(self.holder_count):
            if self.holds(node, number):
                further = self.extra.pop((<uint64_t>number << 32) | i, 0) if self.extra else 0
                self.holders[number].stale += 1 + <uint32_t>further
                self.entries -= 1 + <uint32_t>further
        return 0

    # ---- events --------------------------------------------------------------------------------------------------------------

    cdef int put(self, uint32_t number, uint32_t parent, uint64_t block, uint64_t tokens_hash, uint64_t key,
                 uint32_t *where) except -1:
        """The holder has this block, whose sequence hash is ``key``, behind that node."""
        cdef uint32_t slot = 0
        cdef uint32_t i
        cdef bint held
        cdef Entry *entry
        cdef Node *node
        cdef Holder *holder = &self.holders[number]
        self.grow_table()
        self.room_for_entry(holder)
        i = self.find_slot(parent, key, tokens_hash, &slot)
        if i == 0:
            if self.budget_bytes:
                self.node(parent).children += 1  # not a leaf, whatever the clock says
                self.make_room()
                self.node(parent).children -= 1
                self.find_slot(parent, key, tokens_hash, &slot)
            i = self.take_node()
            node = self.node(i)
            node.tokens_hash = tokens_hash
            node.key = key
            node.parent = parent
            self.node(parent).children += 1
            self.table[slot] = (dw_scatter(key, self.secret) << 32) | i
        node = self.node(i)
        if node.recent == 0:
            node.recent = 1
        where[0] = i
        entry = self.find_place(holder, block)
        if entry.node:
            if entry.node == i and entry.gen == node.gen:
                return 0
            held = self.holds(node, number)
            self.set_holder(node, number)  # first: what follows may prune
            self.forget(number, entry)
            entry = self.find_place(holder, block)
        else:
            held = self.holds(node, number)
            if not held:
                self.set_holder(node, number)
        if held:
            where_key = (<uint64_t>number << 32) | i
            self.extra[where_key] = self.extra.get(where_key, 0) + 1
        return self.fill_entry(holder, entry, block, i)

    cdef object start_of(self, uint32_t number, object parent_hash, uint32_t *where):
        """Node behind which blocks are stored; None, or why there is none."""
        cdef Entry *entry
        where[0] = ROOT
        if parent_hash is None:
            return None
        entry = self.find_entry(&self.holders[number], PyLong_AsUnsignedLongLong(parent_hash))
        if entry is NULL:  # after evictions nobody can tell any more whether it was ever there
            return PARENT_EVICTED if self.evicted else UNKNOWN_PARENT
        if self.is_stale(entry):
            return PARENT_EVICTED
        where[0] = entry.node
        return None

    cdef int put_all(self, uint32_t number, uint32_t where) except -1:
        """Store the blocks of ``parsed`` behind a node."""
        cdef Parsed *parsed = &self.parsed
        cdef Holder *holder
        cdef uint64_t key
        cdef size_t i, n = parsed.n
        if n == 0:
            return 0
        key = parsed.tokens[0] if where == ROOT else sequence_hash(self.node(where).key, parsed.tokens[0])
        parsed.keys[0] = key
        for i in range(1, n):
            key = sequence_hash(key, parsed.tokens[i])
            parsed.keys[i] = key
        for i in range(n):
            if i + AHEAD_NODE < n:
                holder = &self.holders[number]
                dw_prefetch(&self.table[self.slot_of(dw_scatter(parsed.keys[i + AHEAD_NODE], self.secret))])
                if holder.size:
                    dw_prefetch(&holder.entries[self.place_of(holder, parsed.blocks[i + AHEAD_NODE])])
            self.put(number, where, parsed.blocks[i], parsed.tokens[i], parsed.keys[i], &where)
        return 0

    def store(self, worker_id, dp_rank, parent_hash, block_hashes, tokens_hashes):
        """A worker has stored consecutive blocks behind the block that it calls ``parent_hash`` (None: the beginning).

        ``block_hashes`` are the engine's own ids, ``tokens_hashes`` the block hashes, as many. Returns ``"stored"``;
        ``"unknown_parent"`` if an earlier event is missing, then nothing was stored; ``"parent_evicted"`` if the parent is
        unknown and the budget may have cost it: then nothing was stored either, and no repair would help.
        """
        cdef int64_t number
        cdef uint32_t where = 0
        cdef Py_ssize_t n = 0, m = 0
        self.changing()
        cdef uint64_t *blocks = hashes_of(block_hashes, &n)
        cdef uint64_t *tokens = NULL
        try:
            tokens = hashes_of(tokens_hashes, &m)
            if n != m:
                raise ValueError(f"{n} block hashes and {m} tokens hashes: as many are needed")
            number = self.number_of(worker_id, dp_rank, True)
            refused = self.start_of(<uint32_t>number, parent_hash, &where)
            if refused is not None:
                return refused
            parsed_reserve(&self.parsed, n)
            self.parsed.n = n
            memcpy(self.parsed.blocks, blocks, n * 8)
            memcpy(self.parsed.tokens, tokens, n * 8)
            self.put_all(<uint32_t>number, where)
        finally:
            free(blocks)
            free(tokens)
        return STORED

    def remove(self, worker_id, dp_rank, block_hashes):
        """A worker has evicted the blocks with these ids of its own. Returns how many were known."""
        self.changing()
        cdef int64_t number = self.number_of(worker_id, dp_rank, False)
        cdef Py_ssize_t n = 0, i, known = 0
        cdef uint64_t *blocks
        cdef Entry *entry
        if number < 0:
            return 0
        blocks = hashes_of(block_hashes, &n)
        try:
            for i in range(n):
                entry = self.find_entry(&self.holders[number], blocks[i])
                if entry is not NULL:
                    known += 1
                    self.forget(<uint32_t>number, entry)
        finally:
            free(blocks)
        return known

    def apply_event(self, *args):
        """``apply_event(event)`` with a `dynwire.kv_router.RouterEvent`, or ``apply_event(worker_id, event)``, a `KvCacheEvent`.

        Either may be the same as a dict, or encoded as JSON or msgpack. Returns ``"stored"``, ``"removed"``, ``"cleared"``,
        ``"unknown_parent"`` or ``"parent_evicted"`` (see `store`). Event numbers are not looked at: who receives events closes
        gaps first. Raises `ValueError` for what is no such event; then nothing was changed.
        """
        cdef bint whole = len(args) == 1
        cdef uint64_t worker_id
        if len(args) not in (1, 2):
            raise TypeError(f"apply_event takes an event, or a worker id and an event, not {len(args)} arguments")
        event = args[len(args) - 1]
        if type(event) is bytes and scan_event(&self.parsed, event, whole):
            worker_id = self.parsed.worker_id if whole else PyLong_AsUnsignedLongLong(args[0])
            return self.apply_parsed(worker_id)
        if whole:
            if not hasattr(event, "event"):
                from .wire.kv_events import as_router_event

                event = as_router_event(event)
            worker_id = PyLong_AsUnsignedLongLong(event.worker_id)
            event = event.event
        else:
            worker_id = PyLong_AsUnsignedLongLong(args[0])
            if not hasattr(event, "data"):
                from .wire.kv_events import as_cache_event

                event = as_cache_event(event)
        self.read(event)
        return self.apply_parsed(worker_id)

    cdef int read(self, object event) except -1:
        cdef Parsed *parsed = &self.parsed
        cdef size_t i
        data = event.data
        parsed.dp_rank = PyLong_AsUnsignedLongLong(event.dp_rank)
        parsed.n = 0
        if data == "cleared":
            parsed.kind = IS_CLEARED
            return 0
        stored = data.stored
        if stored is None:
            parsed.kind = IS_REMOVED
            values = data.removed.block_hashes
            parsed_reserve(parsed, len(values))
            for i, value in enumerate(values):
                parsed.blocks[i] = PyLong_AsUnsignedLongLong(value)
            parsed.n = len(values)
            return 0
        parsed.kind = IS_STORED
        parsed.has_parent = stored.parent_hash is not None
        if parsed.has_parent:
            parsed.parent = PyLong_AsUnsignedLongLong(stored.parent_hash)
        values = stored.blocks
        parsed_reserve(parsed, len(values))
        for i, value in enumerate(values):
            parsed.blocks[i] = PyLong_AsUnsignedLongLong(value.block_hash)
            parsed.tokens[i] = PyLong_AsUnsignedLongLong(value.tokens_hash)
        parsed.n = len(values)
        return 0

    cdef object apply_parsed(self, uint64_t worker_id):
        cdef Parsed *parsed = &self.parsed
        self.changing()
        cdef int64_t number = self.number_of(worker_id, parsed.dp_rank, parsed.kind == IS_STORED)
        cdef uint32_t where = 0
        cdef Entry *entry
        cdef size_t i
        if parsed.kind == IS_STORED:
            refused = self.start_of(<uint32_t>number, parsed.parent if parsed.has_parent else None, &where)
            if refused is not None:
                return refused
            self.put_all(<uint32_t>number, where)
            return STORED
        if parsed.kind == IS_CLEARED:
            if number >= 0:
                self.empty_holder(<uint32_t>number)
            return CLEARED
        if number >= 0:
            for i in range(parsed.n):
                entry = self.find_entry(&self.holders[number], parsed.blocks[i])
                if entry is not NULL:
                    self.forget(<uint32_t>number, entry)
        return REMOVED

    def remove_worker(self, worker_id, dp_rank=None):
        """Forget a worker, all its ranks or one."""
        self.changing()
        for key in [k for k in self.numbers if k[0] == worker_id and (dp_rank is None or k[1] == dp_rank)]:
            number = self.numbers.pop(key)
            self.empty_holder(<uint32_t>number)
            self.holders[<uint32_t>number].taken = 0
            self.keys[number] = None

    def clear_all_blocks(self, worker_id):
        """Forget the blocks of a worker, of all its ranks; it stays known."""
        self.changing()
        for key, number in self.numbers.items():
            if key[0] == worker_id:
                self.empty_holder(<uint32_t>number)

    # ---- questions -----------------------------------------------------------------------------------------------------------

    @property
    def workers(self):
        """Known (worker_id, dp_rank), in no order."""
        return list(self.numbers)

    def blocks_of(self, worker_id, dp_rank=0):
        """How many block ids the worker's rank has."""
        cdef int64_t number = self.number_of(worker_id, dp_rank, False)
        return 0 if number < 0 else self.holders[number].used - self.holders[number].stale

    def has(self, worker_id, dp_rank, block_hash):
        """Does the worker's rank have a block with this id?"""
        cdef int64_t number = self.number_of(worker_id, dp_rank, False)
        cdef Entry *entry
        if number < 0:
            return False
        entry = self.find_entry(&self.holders[number], PyLong_AsUnsignedLongLong(block_hash))
        return entry is not NULL and not self.is_stale(entry)

    def find_matches(self, block_hashes, early_exit=False):
        """How many blocks from the prompt's beginning each worker has: `OverlapScores`.

        ``block_hashes``: those of `compute_block_hashes`. A worker counts up to its first missing block; workers without the
        first block are left out. ``early_exit``: stop as soon as a single worker is left.
        """
        cdef Py_ssize_t n = 0, i, ahead, depth = 0
        cdef int apart = 0           # > 0: look-ups rather than neighbours lately
        cdef uint64_t *tokens = hashes_of(block_hashes, &n)
        cdef uint64_t *keys = NULL
        cdef uint64_t *active = NULL
        cdef uint32_t words = (self.holder_count + 63) >> 6
        cdef uint32_t w, at = ROOT, child, slot
        cdef uint64_t scattered, held, left, found
        cdef Node *node
        cdef int alive
        cdef bint only_one = early_exit
        cdef dict scores = {}
        try:
            if n == 0 or words == 0:
                return OverlapScores(scores, {})
            keys = <uint64_t *>malloc(n * 8)
            active = <uint64_t *>malloc(words * 8)
            if keys is NULL or active is NULL:
                raise MemoryError()
            memset(active, 0xFF, words * 8)
            keys[0] = tokens[0]
            for i in range(1, n):
                keys[i] = sequence_hash(keys[i - 1], tokens[i])
            for i in range(n):
                # Blocks that were stored together stand side by side: no look-up is needed along such a run.
                child = at + 1
                if at != ROOT and child < self.next_node:
                    node = self.node(child)
                    if node.parent == at and node.key == keys[i] and node.tokens_hash == tokens[i]:
                        apart -= 1
                    else:
                        child = 0
                else:
                    child = 0
                if child == 0 or apart > 0:
                    if child == 0:
                        if apart <= 0:  # first of a stretch without neighbours: send for what is ahead
                            for ahead in range(i, min(n, i + AHEAD_SLOT)):
                                dw_prefetch(&self.table[self.slot_of(dw_scatter(keys[ahead], self.secret))])
                        apart = AHEAD_SLOT
                    if i + AHEAD_SLOT < n:
                        dw_prefetch(&self.table[self.slot_of(dw_scatter(keys[i + AHEAD_SLOT], self.secret))])
                    if i + AHEAD_NODE < n:
                        scattered = dw_scatter(keys[i + AHEAD_NODE], self.secret)
                        slot = self.slot_of(scattered)
                        found = self.table[slot]
                        if found and <uint32_t>(found >> 32) != <uint32_t>scattered:
                            found = self.table[slot + 1 if slot + 1 < self.table_size else 0]
                        if found:
                            dw_prefetch(self.node(<uint32_t>found))
                    if child == 0:
                        child = self.find_child(at, keys[i], tokens[i])
                if child == 0:
                    break
                node = self.node(child)
                node.recent = 3
                alive = 0
                for w in range(words):
                    held = node.bits if w == 0 else node.more[w] if node.more is not NULL and w <= node.more[0] else 0
                    left = active[w] & ~held
                    if left and depth:
                        self.score(scores, left, w, depth)
                    active[w] &= held
                    alive += dw_ones(active[w])
                if alive == 0:
                    break
                depth += 1
                at = child
                if only_one and alive == 1:
                    break
            if depth:
                for w in range(words):
                    if active[w]:
                        self.score(scores, active[w], w, depth)
            return OverlapScores(scores, {key: self.size_of(key) for key in scores})
        finally:
            free(tokens)
            free(keys)
            free(active)

    cdef size_of(self, key):
        cdef uint32_t number = self.numbers[key]
        return self.holders[number].used - self.holders[number].stale

    cdef int score(self, dict scores, uint64_t bits, uint32_t word, Py_ssize_t depth) except -1:
        cdef uint32_t number
        while bits:
            number = (word << 6) + dw_lowest(bits)
            bits &= bits - 1
            if number < self.holder_count:
                scores[self.keys[number]] = depth
        return 0

    # ---- dump, snapshot --------------------------------------------------------------------------------------------------------

    cdef uint32_t *ordered(self, uint32_t **order) except NULL nogil:
        """Numbers for all nodes, parents before children: number per node (1 is the root), and node per number in ``order``."""
        cdef uint32_t *number = <uint32_t *>calloc(self.next_node, 4)
        cdef uint32_t *out = <uint32_t *>calloc(self.nodes + 2, 4)
        cdef uint32_t *path = <uint32_t *>malloc((self.nodes + 2) * 4)
        cdef uint32_t i, at, given = ROOT, deep
        cdef size_t slot
        cdef Node *node
        if number is NULL or out is NULL or path is NULL:
            free(number)
            free(out)
            free(path)
            with gil:
                raise MemoryError()
        number[ROOT] = ROOT
        out[ROOT] = ROOT
        for slot in range(self.table_size):
            i = <uint32_t>self.table[slot]
            if i == 0:
                continue
            deep = 0
            at = i
            while number[at] == 0:
                path[deep] = at
                deep += 1
                node = self.node(at)
                at = node.parent
            while deep:
                deep -= 1
                given += 1
                number[path[deep]] = given
                out[given] = path[deep]
        free(path)
        order[0] = out
        return number

    def dump(self, worker_id=None):
        """Events that build this tree (or the part of one worker) from nothing: a list of `dynwire.kv_router.RouterEvent`.

        A block behind a prefix that its worker does not have completely is kept: the missing blocks are stored, then removed.
        """
        from .wire.kv_events import EventData, KvCacheEvent, Removed, RouterEvent, Stored, StoredBlock

        cdef uint32_t *order = NULL
        cdef uint32_t *number = self.ordered(&order)
        cdef Holder *holder
        cdef uint32_t i, holder_number, at, previous
        cdef list out = []
        try:
            for key, holder_number in self.numbers.items():
                if worker_id is not None and key[0] != worker_id:
                    continue
                holder = &self.holders[holder_number]
                wanted = {}         # number of a node -> block ids
                holes = []
                for i in range(holder.size):
                    if holder.entries[i].node and not self.is_stale(&holder.entries[i]):
                        wanted.setdefault(number[holder.entries[i].node], []).append(holder.entries[i].block)
                used = {block for blocks in wanted.values() for block in blocks}
                for given in list(wanted):
                    at = self.node(order[<uint32_t>given]).parent
                    while at != ROOT and number[at] not in wanted:
                        block = self.node(at).key
                        while block in used:
                            block = (block + 1) & 0xFFFFFFFFFFFFFFFF
                        used.add(block)
                        wanted[number[at]] = [block]
                        holes.append(block)
                        at = self.node(at).parent
                events = []
                run = None
                previous = 0
                for given in sorted(wanted):
                    at = order[<uint32_t>given]
                    node_parent = self.node(at).parent
                    for position, block in enumerate(wanted[given]):
                        if run is None or position or number[node_parent] != previous:
                            parent_hash = None if node_parent == ROOT else wanted[number[node_parent]][0]
                            run = []
                            events.append(Stored(parent_hash, run))
                        run.append(StoredBlock(block, self.node(at).tokens_hash))
                        if position:
                            run = None
                    previous = given
                data = [EventData(stored=event) for event in events]
                if holes:
                    data.append(EventData(removed=Removed(holes)))
                out.extend(
                    RouterEvent(key[0], KvCacheEvent(event_id, item, key[1])) for event_id, item in enumerate(data, 1)
                )
            return out
        finally:
            free(number)
            free(order)

    def snapshot(self):
        """The whole tree as bytes, for `restore`; about 12 bytes per block and 12 per (block, worker).

        Runs without the GIL: other threads may ask meanwhile; what would change the tree raises `RuntimeError`.
        """
        cdef uint32_t *order = NULL
        cdef uint32_t *number = NULL
        cdef uint32_t i, n = self.nodes, live
        cdef uint32_t given, reading = 0, count = <uint32_t>len(self.numbers)
        cdef size_t size = 16 + <size_t>n * 12
        cdef Holder *holder
        cdef unsigned char *p
        cdef uint64_t *ranks = <uint64_t *>malloc(<size_t>(count or 1) * 16)
        cdef uint32_t *holders = <uint32_t *>malloc(<size_t>(count or 1) * 4)
        try:
            if ranks is NULL or holders is NULL:
                raise MemoryError()
            given = 0
            for key, number_of_holder in self.numbers.items():
                ranks[2 * given] = key[0]
                ranks[2 * given + 1] = key[1]
                holders[given] = number_of_holder
                holder = &self.holders[holders[given]]
                size += 20 + <size_t>(holder.used - holder.stale) * 12
                given += 1
            out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
            p = <unsigned char *>PyBytes_AS_STRING(out)
            reading = 1
            self.readers += 1
            with nogil:
                number = self.ordered(&order)
                memcpy(p, b"DWKV", 4)
                i = SNAPSHOT_VERSION
                memcpy(p + 4, &i, 4)
                memcpy(p + 8, &n, 4)
                memcpy(p + 12, &count, 4)
                p += 16
                for i in range(ROOT + 1, ROOT + 1 + n):
                    memcpy(p, &self.node(order[i]).tokens_hash, 8)
                    memcpy(p + 8, &number[self.node(order[i]).parent], 4)
                    p += 12
                for given in range(count):
                    holder = &self.holders[holders[given]]
                    live = holder.used - holder.stale
                    memcpy(p, &ranks[2 * given], 16)
                    memcpy(p + 16, &live, 4)
                    p += 20
                    for i in range(holder.size):
                        if holder.entries[i].node and not self.is_stale(&holder.entries[i]):
                            memcpy(p, &holder.entries[i].block, 8)
                            memcpy(p + 8, &number[holder.entries[i].node], 4)
                            p += 12
            return out
        finally:
            self.readers -= reading
            free(number)
            free(order)
            free(ranks)
            free(holders)

    @classmethod
    def restore(cls, data, budget_bytes=0):
        """The tree of a `snapshot`. Raises `ValueError` if the bytes are none.

        Takes about a second for 10^6 blocks, and lets other threads run in between: call it from a thread of its own.
        """
        cdef RadixTree tree = cls(budget_bytes)
        tree.fill(bytes(data))
        return tree

    cdef int fill(self, bytes data) except -1:
        cdef double turned_at = clock_s()
        cdef const unsigned char *p = data
        cdef size_t left = len(data)
        cdef uint32_t version, n, holders, i, parent, at, live
        cdef uint32_t *nodes = NULL
        cdef uint64_t tokens_hash, worker, rank, block, key
        cdef int64_t number
        cdef size_t budget = self.budget_bytes
        if left < 16 or data[:4] != b"DWKV":
            raise ValueError("these bytes are no snapshot of a RadixTree")
        memcpy(&version, p + 4, 4)
        memcpy(&n, p + 8, 4)
        memcpy(&holders, p + 12, 4)
        if version != SNAPSHOT_VERSION:
            raise ValueError(f"the snapshot has version {version}, this release reads version {SNAPSHOT_VERSION}")
        p += 16
        left -= 16
        if left < <size_t>n * 12:
            raise ValueError(f"the snapshot is cut: {n} blocks are announced")
        nodes = <uint32_t *>calloc(n + 2, 4)
        if nodes is NULL:
            raise MemoryError()
        nodes[ROOT] = ROOT
        self.budget_bytes = 0  # evictions would pull the ground from under the numbers
        try:
            for i in range(ROOT + 1, ROOT + 1 + n):
                if i % LET_OTHERS == 0:
                    turned_at = let_others(turned_at)
                memcpy(&tokens_hash, p, 8)
                memcpy(&parent, p + 8, 4)
                p += 12
                if parent < ROOT or parent >= i:
                    raise ValueError("the snapshot is damaged: a block stands before its parent")
                parent = nodes[parent]
                key = tokens_hash if parent == ROOT else sequence_hash(self.node(parent).key, tokens_hash)
                if self.find_child(parent, key, tokens_hash):
                    raise ValueError("the snapshot is damaged: a block occurs twice")
                self.grow_table()
                at = self.take_node()
                nodes[i] = at
                self.node(at).tokens_hash = tokens_hash
                self.node(at).key = key
                self.node(at).parent = parent
                self.node(parent).children += 1
                self.enter(at)
            left -= <size_t>n * 12
            for _ in range(holders):
                if left < 20:
                    raise ValueError("the snapshot is cut: a worker is missing")
                memcpy(&worker, p, 8)
                memcpy(&rank, p + 8, 8)
                memcpy(&live, p + 16, 4)
                p += 20
                left -= 20
                if left < <size_t>live * 12:
                    raise ValueError("the snapshot is cut: a worker's blocks are missing")
                number = self.number_of(worker, rank, True)
                for i in range(live):
                    if i % LET_OTHERS == LET_OTHERS - 1:
                        turned_at = let_others(turned_at)
                    memcpy(&block, p, 8)
                    memcpy(&at, p + 8, 4)
                    p += 12
                    if at <= ROOT or at >= ROOT + 1 + n:
                        raise ValueError("the snapshot is damaged: a worker has a block that is not there")
                    at = nodes[at]
                    self.put(<uint32_t>number, self.node(at).parent, block, self.node(at).tokens_hash, self.node(at).key, &parent)
                left -= <size_t>live * 12
            if left:
                raise ValueError(f"{left} bytes follow the end of the snapshot")
            for i in range(ROOT + 1, ROOT + 1 + n):
                if self.node(nodes[i]).key:
                    self.prune(nodes[i])  # blocks that nobody has
        finally:
            free(nodes)
            self.budget_bytes = budget
        return 0

    def __repr__(self):
        return f"<RadixTree {self.nodes} blocks, {len(self.numbers)} workers, {self.used_bytes()} bytes>"
