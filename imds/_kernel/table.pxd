"""A hash table of items that carry their own keys, by linear hashing in cache lines.

What always holds (:func:`table_flaw` looks for the first breach):

* There are ``buckets`` chains. A hash belongs to chain ``hash mod 2m`` if there is such a chain, else to
  ``hash mod m``, where m is the largest power of two that is not above ``buckets``.
* In a chain all buckets but the last are full, and the last has no gap; only a chain's first may be empty.
* ``count`` is the number of items; an item stands in its chain once.

::

    segments   [ * | * | ... ]          each 64 KiB, but the first, which doubles up to that size
                 |
    bucket     | slot | slot | slot | slot | slot | slot | slot | more |   64 bytes: one cache line
                 |                                                |
               16 bits of the hash, 48 bits of address            +--> another bucket, rarely

    item       | owner's | owner's | size, extra | key ...
                  8 bytes   8 bytes    u32   u32   size bytes

Growing by one chain splits one other: what an operation pays for is a handful of items, however large the table
is, and no memory is ever held twice. A search reads one cache line of the table and, but for one in 9,000 misses,
no other item than the one it looks for. At FILL items to a bucket it takes about 15 bytes for an item.

An item is copied by nobody: the table has its address only, and its owner frees it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy

from imds._kernel.memory cimport alloc, alloc_grow, alloc_lines, chunk_size, free
from imds._kernel.xxh64 cimport xxh64


ctypedef union Second:
    Item *older     # in a store: the neighbour in the order of use
    double score    # in a sorted set

ctypedef struct Item:
    Item *next      # in a store: the next one used later; a node of a sorted set begins behind it
    Second second
    uint32_t size   # of the key
    uint32_t extra  # the owner's
    # the key's bytes follow

cdef enum:
    SLOTS = 7              # in a bucket
    FILL = 5               # items to a bucket on average, at most: 13 % of the chains have a second bucket then
    FIRST_BUCKETS = 4
    SEGMENT = 1024         # buckets in a segment
    SEGMENT_BITS = 10
    ADDRESS_BITS = 48      # of an address that the system gives out
    TABLE_SHARE = 16       # what an item counts for its part of the table, in bytes

ctypedef struct Bucket:
    uint64_t slots[SLOTS]
    Bucket *more

ctypedef struct Table:
    uint64_t seed
    size_t count            # items
    size_t buckets          # chains
    size_t mask             # m - 1
    size_t room             # chains that the segments have room for
    Bucket **segments
    size_t segments_room    # places in ``segments``


cdef extern from *:
    """
    #if defined(__GNUC__)
    /* With an effect that gcc can see: it leaves out the calls of a function which does nothing but prefetch. */
    #define fetch(address) do { __builtin_prefetch(address); __asm__ volatile(""); } while (0)
    #define lowest_bit(bits) __builtin_ctz(bits)
    #else
    #define fetch(address) ((void)(address))
    static inline int lowest_bit(unsigned int bits) { int i = 0; while (!(bits >> i & 1)) i++; return i; }
    #endif
    """
    void fetch(const void *address) noexcept nogil  # into the cache; any address will do
    int lowest_bit(unsigned int bits) noexcept nogil  # of some that are set, which it is


cdef inline uint8_t *key_of(Item *item) noexcept nogil:
    return <uint8_t *>item + sizeof(Item)


cdef inline uint64_t _slot(uint64_t hash, Item *item) noexcept nogil:
    return (hash >> ADDRESS_BITS << ADDRESS_BITS) | <uint64_t><uintptr_t>item


cdef inline Item *item_in(uint64_t slot) noexcept nogil:
    return <Item *><uintptr_t>(slot << (64 - ADDRESS_BITS) >> (64 - ADDRESS_BITS))


cdef inline uint64_t table_hash(const Table *table, const uint8_t *key, size_t size) noexcept nogil:
    return xxh64(key, size, table.seed)


cdef inline uint64_t _hash_of(const Table *table, Item *item) noexcept nogil:
    return xxh64(key_of(item), item.size, table.seed)


cdef inline Bucket *_bucket(const Table *table, size_t chain) noexcept nogil:
    return table.segments[chain >> SEGMENT_BITS] + (chain & (SEGMENT - 1))


cdef inline Bucket *chain_of(const Table *table, uint64_t hash) noexcept nogil:
    cdef size_t chain = <size_t>hash & (2 * table.mask + 1)
    cdef size_t there = <size_t>0 - <size_t>(chain < table.buckets)  # all bits or none: nobody could predict a branch
    return _bucket(table, chain & (table.mask | there))


cdef inline bint table_init(Table *table, uint64_t seed) noexcept nogil:
    """Make an empty table; False if there is no memory, and nothing to free."""
    table.seed = seed
    table.count = 0
    table.buckets = table.room = 0
    table.mask = FIRST_BUCKETS - 1
    table.segments_room = 1
    table.segments = <Bucket **>alloc(sizeof(Bucket *))
    if table.segments == NULL:
        return False
    table.segments[0] = <Bucket *>alloc_lines(FIRST_BUCKETS * sizeof(Bucket))
    if table.segments[0] == NULL:
        table_free(table)
        return False
    table.buckets = table.room = FIRST_BUCKETS
    return True


cdef inline size_t table_free_some(Table *table, size_t most) noexcept nogil:
    """Free ``most`` chains, and after the last one the rest of the table, not the items; return how many it had.

    Nothing else may be done with the table then, but this again, until ``segments`` is NULL.
    """
    cdef size_t freed = 0
    while table.buckets and freed < most:
        table.buckets -= 1
        freed += 1
        _free_chain(_bucket(table, table.buckets).more)
        if table.buckets & (SEGMENT - 1) == 0:
            free(table.segments[table.buckets >> SEGMENT_BITS])
    if table.buckets == 0:
        free(table.segments)
        table.segments = NULL
    return freed


cdef inline void table_free(Table *table) noexcept nogil:
    """Free the table, not the items. One of zeros, never made, is fine."""
    table_free_some(table, <size_t>-1)


cdef inline unsigned int _is_alike(const Bucket *bucket, uint64_t hash, int i) noexcept nogil:
    return <unsigned int>((bucket.slots[i] ^ hash) >> ADDRESS_BITS == 0) << i


cdef inline unsigned int _alike(const Bucket *bucket, uint64_t hash) noexcept nogil:
    """Return a bit for each slot with the 16 bits of this hash; an empty slot may have them.

    Without a branch: in which slot an item is cannot be predicted. Written out: at -O2 gcc unrolls no such loop.
    """
    return (
        _is_alike(bucket, hash, 0) | _is_alike(bucket, hash, 1) | _is_alike(bucket, hash, 2)
        | _is_alike(bucket, hash, 3) | _is_alike(bucket, hash, 4) | _is_alike(bucket, hash, 5)
        | _is_alike(bucket, hash, SLOTS - 1)
    )


cdef inline uint64_t *table_find(const Table *table, uint64_t hash, const uint8_t *key, size_t size) noexcept nogil:
    """Return the slot of the item with this key, or NULL. It stays right until the table changes."""
    cdef Bucket *bucket = chain_of(table, hash)
    cdef uint64_t slot
    cdef Item *item
    cdef unsigned int found
    cdef int i
    while bucket != NULL:
        found = _alike(bucket, hash)
        while found:
            i = lowest_bit(found)
            slot = bucket.slots[i]
            item = item_in(slot)
            if slot != 0 and item.size == size and memcmp(key_of(item), key, size) == 0:
                return &bucket.slots[i]
            found &= found - 1
        bucket = bucket.more
    return NULL


cdef inline Item *table_guess(const Bucket *bucket, uint64_t hash) noexcept nogil:
    """Return the item in a bucket that has this hash, most likely; NULL: it is not in this bucket.

    No item is read, and no other bucket.
    """
    cdef unsigned int found = _alike(bucket, hash)
    return item_in(bucket.slots[lowest_bit(found)]) if found else NULL


cdef inline uint64_t *table_slot(const Table *table, Item *item) noexcept nogil:
    """Return the slot of this very item, or NULL."""
    cdef uint64_t hash = _hash_of(table, item)
    cdef Bucket *bucket = chain_of(table, hash)
    cdef int i
    while bucket != NULL:
        for i in range(SLOTS):
            if bucket.slots[i] == _slot(hash, item):
                return &bucket.slots[i]
        bucket = bucket.more
    return NULL


cdef inline void table_put(uint64_t *slot, Item *item) noexcept nogil:
    """Put ``item`` in the place of one that has the same key."""
    slot[0] = (slot[0] >> ADDRESS_BITS << ADDRESS_BITS) | <uint64_t><uintptr_t>item


cdef inline bint _append(Bucket *bucket, uint64_t slot, Bucket **spare) noexcept nogil:
    """Add ``slot`` to the chain of ``bucket``; a further bucket comes from ``spare``, or from the allocator."""
    cdef int i
    while bucket.more != NULL:
        bucket = bucket.more
    for i in range(SLOTS):
        if bucket.slots[i] == 0:
            bucket.slots[i] = slot
            return True
    cdef Bucket *more = spare[0]
    if more != NULL:
        spare[0] = more.more
    else:
        more = <Bucket *>alloc_lines(sizeof(Bucket))
        if more == NULL:
            return False
    more.slots[0] = slot
    for i in range(1, SLOTS):
        more.slots[i] = 0
    more.more = NULL
    bucket.more = more
    return True


cdef inline bint _more_room(Table *table) noexcept nogil:
    """Make room for one chain more: twice the first segment, or another."""
    cdef Bucket *segment
    cdef void *places
    cdef size_t count
    if table.room < SEGMENT:
        segment = <Bucket *>alloc_lines(2 * table.room * sizeof(Bucket))
        if segment == NULL:
            return False
        memcpy(segment, table.segments[0], table.room * sizeof(Bucket))
        free(table.segments[0])
        table.segments[0] = segment
        table.room *= 2
        return True
    count = table.room >> SEGMENT_BITS
    if count == table.segments_room:
        places = alloc_grow(table.segments, 2 * count * sizeof(Bucket *))
        if places == NULL:
            return False
        table.segments = <Bucket **>places
        table.segments_room = 2 * count
    segment = <Bucket *>alloc_lines(SEGMENT * sizeof(Bucket))
    if segment == NULL:
        return False
    table.segments[count] = segment
    table.room += SEGMENT
    return True


cdef inline void _clear(Bucket *bucket) noexcept nogil:
    cdef int i
    for i in range(SLOTS):
        bucket.slots[i] = 0
    bucket.more = NULL


cdef inline void _deal(
    const Table *table, Bucket *source, size_t bit, Bucket *low, Bucket *high, Bucket **spare
) noexcept nogil:
    """Empty the chain of ``source``: into ``high`` what has ``bit`` in its hash, the rest into ``low``.

    A bucket that has been read is spare for what is still to be placed. So a split (``source`` is ``low``) needs
    no memory: the items of k buckets fill k + 1 at most, and two are there. A join needs one bucket more.
    """
    cdef Bucket here
    cdef Bucket *next = source
    cdef int i
    while next != NULL:
        here = next[0]
        if next == source:
            _clear(source)
        else:
            next.more = spare[0]
            spare[0] = next
        next = here.more
        for i in range(SLOTS):
            if here.slots[i] == 0:
                break
            _append(high if bit and _hash_of(table, item_in(here.slots[i])) & bit else low, here.slots[i], spare)


cdef inline void _free_chain(Bucket *bucket) noexcept nogil:
    cdef Bucket *next
    while bucket != NULL:
        next = bucket.more
        free(bucket)
        bucket = next


cdef inline void _grow(Table *table) noexcept nogil:
    """Split one chain. Without memory nothing happens: chains are longer, and the next item tries again."""
    cdef Bucket *spare = NULL
    cdef Bucket *low
    cdef int i
    if table.buckets == table.room and not _more_room(table):
        return
    low = _bucket(table, table.buckets - table.mask - 1)
    _deal(table, low, table.mask + 1, low, _bucket(table, table.buckets), &spare)
    _free_chain(spare)
    table.buckets += 1
    if table.buckets == 2 * (table.mask + 1):
        table.mask = 2 * table.mask + 1
    # FILL items later the next chain is split, and the hash of each of its items made anew.
    low = _bucket(table, table.buckets - table.mask - 1)
    for i in range(SLOTS):
        fetch(item_in(low.slots[i]))


cdef inline void _shrink(Table *table) noexcept nogil:
    """Join the last chain to the one that it was split from. Without memory nothing happens."""
    cdef Bucket *spare = <Bucket *>alloc_lines(sizeof(Bucket))
    cdef Bucket *into
    if spare == NULL:
        return
    if table.buckets == table.mask + 1:
        table.mask //= 2
    table.buckets -= 1
    into = _bucket(table, table.buckets - table.mask - 1)
    _deal(table, _bucket(table, table.buckets), 0, into, into, &spare)
    _free_chain(spare)
    if table.room > SEGMENT and table.buckets == table.room - SEGMENT:
        table.room -= SEGMENT
        free(table.segments[table.room >> SEGMENT_BITS])


cdef inline bint table_add(Table *table, uint64_t hash, Item *item) noexcept nogil:
    """Add an item whose key is not here; False if there is no memory."""
    cdef Bucket *none = NULL
    if <uint64_t><uintptr_t>item >> ADDRESS_BITS:
        return False  # an address that no slot can hold; no system of today gives it out unasked
    if not _append(chain_of(table, hash), _slot(hash, item), &none):
        return False
    table.count += 1
    if table.count > table.buckets * FILL:
        _grow(table)
    return True


cdef inline void table_remove(Table *table, uint64_t hash, uint64_t *slot) noexcept nogil:
    """Remove the item in ``slot``, where table_find or table_slot found it."""
    cdef Bucket *bucket = chain_of(table, hash)
    cdef Bucket *before = NULL
    cdef int i = SLOTS - 1
    while bucket.more != NULL:
        before = bucket
        bucket = bucket.more
    while bucket.slots[i] == 0:
        i -= 1
    slot[0] = bucket.slots[i]
    bucket.slots[i] = 0
    if i == 0 and before != NULL:
        before.more = NULL
        free(bucket)
    table.count -= 1
    if table.count < table.buckets * (FILL // 2) and table.buckets > FIRST_BUCKETS:
        _shrink(table)


cdef inline uint64_t _reversed(uint64_t bits) noexcept nogil:
    cdef uint64_t found = 0
    cdef int i
    for i in range(64):
        found = found << 1 | (bits & 1)
        bits >>= 1
    return found


cdef inline Bucket *table_walk(const Table *table, uint64_t *cursor) noexcept nogil:
    """Return the chain that a walk over the table comes to at ``cursor``, and move that on; it is 0 at the end.

    A chain has all hashes with the same low bits: as many as tell it apart from the others. The walk takes the
    chains in the order of these bits read backwards. A chain that is split, or joined to another, keeps its place
    in that order; so whatever is in the table from the walk's start to its end is met, if perhaps twice. (The
    order is that of Redis' SCAN, by Pieter Noordhuis.)
    """
    cdef size_t mask = 2 * table.mask + 1, chain = <size_t>cursor[0] & mask
    if chain >= table.buckets:
        chain &= table.mask
    if chain <= table.mask and chain + table.mask + 1 >= table.buckets:
        mask = table.mask  # it has not been split yet
    cursor[0] = _reversed(_reversed(cursor[0] | ~<uint64_t>mask) + 1)
    return _bucket(table, chain)


cdef inline Item *table_random(const Table *table, uint64_t dice) noexcept nogil:
    """Return an item by chance, or NULL if there is none. Items of short chains are somewhat more likely."""
    cdef Bucket *bucket
    cdef size_t count = 0
    cdef int i
    if table.count == 0:
        return NULL
    while True:
        bucket = _bucket(table, dice % table.buckets)
        while bucket != NULL and bucket.slots[0]:
            for i in range(SLOTS):
                count += bucket.slots[i] != 0
            bucket = bucket.more
        if count:
            break
        dice = dice * 6364136223846793005u + 1442695040888963407u
        dice ^= dice >> 29
    count = (dice >> 40) % count
    bucket = _bucket(table, dice % table.buckets)
    while count >= SLOTS:
        count -= SLOTS
        bucket = bucket.more
    return item_in(bucket.slots[count])


cdef inline const char *table_flaw(const Table *table) noexcept nogil:
    """Return what is wrong with the table, or NULL. O(items)."""
    cdef size_t chain, m = table.mask + 1, items = 0
    cdef uint64_t hash
    cdef Bucket *bucket
    cdef bint ended, first
    cdef int i
    if m & (m - 1) or not m <= table.buckets < 2 * m or table.buckets > table.room:
        return "table: mask, chains and room do not fit"
    for chain in range(table.buckets):
        bucket = _bucket(table, chain)
        ended = False
        first = True
        while bucket != NULL:
            if ended or not (first or bucket.slots[0]):
                return "table: a bucket behind the end of its chain"
            for i in range(SLOTS):
                if bucket.slots[i] == 0:
                    ended = True
                    continue
                if ended:
                    return "table: a gap in a bucket"
                items += 1
                hash = _hash_of(table, item_in(bucket.slots[i]))
                if _bucket(table, chain) != chain_of(table, hash):
                    return "table: an item in a chain of another hash"
                if (hash ^ bucket.slots[i]) >> ADDRESS_BITS:
                    return "table: a slot with a wrong part of its hash"
            first = False
            bucket = bucket.more
    if items != table.count:
        return "table: count is wrong"
    return NULL
