"""The entries of a store: one block of memory for key and value, linked in the order of use.

::

    | next | older | key size | value size | key | value |       a string
    | next | older | key size | IS_SET     | key | Zset * |      a sorted set
       8       8       u32        u32

    | deadline | place in the heap |  in front of either, which is IS_TIMED then; the deadline 0 is none
         8               8

A string may be written over by another one that counts the same: an entry's block has all the room that it counts.

The order of use is a ring through an item that is no entry: its ``next`` is the least recently used entry, its
``older`` the most recently used one. Between entries there may be marks and a place (``marks.pxd``), which have the bit
31 of ``extra``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from imds._kernel.memory cimport alloc_chunk, chunk_size, free
from imds._kernel.skiplist cimport Zset, zset_cost, zset_free
from imds._kernel.table cimport TABLE_SHARE, Item, key_of

cdef enum:
    IS_SET = 1 << 30
    IS_TIMED = 1 << 29
    VALUE_SIZE = (1 << 29) - 1  # no string is longer: it came in a request, of which none is
    DUE_SHARE = 16              # what a timer counts for its place in the heap, in bytes

cdef extern from *:
    """
    #define NOWHERE ((size_t)-1)
    """
    const size_t NOWHERE

ctypedef struct Timer:
    uint64_t when   # milliseconds since 1970, or 0
    size_t place    # in the heap, or NOWHERE


cdef inline bint is_set(const Item *entry) noexcept nogil:
    return entry.extra & IS_SET


cdef inline bint is_timed(const Item *entry) noexcept nogil:
    return entry.extra & IS_TIMED


cdef inline size_t size_of(const Item *entry) noexcept nogil:
    """Return the length of the string that the entry holds."""
    return entry.extra & VALUE_SIZE


cdef inline void set_size(Item *entry, size_t size) noexcept nogil:
    """Say how long the string is that the entry holds."""
    entry.extra = (entry.extra & IS_TIMED) | <uint32_t>size


cdef inline Timer *timer_of(const Item *entry) noexcept nogil:
    """Return the timer in front of an entry that is timed."""
    return <Timer *>entry - 1


cdef inline uint64_t when_of(const Item *entry) noexcept nogil:
    """Return the entry's deadline, 0 if it has none."""
    return timer_of(entry).when if is_timed(entry) else 0


cdef inline uint8_t *value_of(Item *entry) noexcept nogil:
    return key_of(entry) + entry.size


cdef inline Zset *zset_of(Item *entry) noexcept nogil:
    cdef Zset *zset
    memcpy(&zset, value_of(entry), sizeof(zset))
    return zset


cdef inline size_t entry_bytes(size_t key_size, size_t value_size, bint timed) noexcept nogil:
    """Return what a key with a string counts."""
    if timed:
        return chunk_size(sizeof(Timer) + sizeof(Item) + key_size + value_size) + TABLE_SHARE + DUE_SHARE
    return chunk_size(sizeof(Item) + key_size + value_size) + TABLE_SHARE


cdef inline size_t entry_cost(Item *entry) noexcept nogil:
    """Return what the entry counts, its sorted set included. O(1)."""
    if is_set(entry):
        return entry_bytes(entry.size, sizeof(Zset *), is_timed(entry)) + zset_cost(zset_of(entry))
    return entry_bytes(entry.size, size_of(entry), is_timed(entry))


cdef inline Item *entry_new(
    const uint8_t *key, size_t key_size, const void *value, size_t value_size, uint32_t extra
) noexcept nogil:
    """Return an entry that is nowhere yet, or NULL. If it is timed it has no deadline yet."""
    cdef size_t before = sizeof(Timer) if extra & IS_TIMED else 0
    cdef uint8_t *block = <uint8_t *>alloc_chunk(before + sizeof(Item) + key_size + value_size)
    cdef Item *entry = <Item *>(block + before)
    if block == NULL:
        return NULL
    entry.size = <uint32_t>key_size
    entry.extra = extra
    if before:
        timer_of(entry)[0] = Timer(0, NOWHERE)
    if key_size:
        memcpy(key_of(entry), key, key_size)
    if value_size:
        memcpy(value_of(entry), value, value_size)
    return entry


cdef inline Item *entry_room(Item *like, size_t value_size) noexcept nogil:
    """Return an entry of the same key for a string of this length, which is still to be written, or NULL."""
    cdef size_t before = sizeof(Timer) if is_timed(like) else 0
    cdef uint8_t *block = <uint8_t *>alloc_chunk(before + sizeof(Item) + like.size + value_size)
    cdef Item *entry = <Item *>(block + before)
    if block == NULL:
        return NULL
    entry.size = like.size
    entry.extra = <uint32_t>value_size | (like.extra & IS_TIMED)
    if before:
        timer_of(entry)[0] = Timer(0, NOWHERE)
    memcpy(key_of(entry), key_of(like), like.size)
    return entry


cdef inline void shell_free(Item *entry) noexcept nogil:
    """Free the entry, not its sorted set. NULL is fine."""
    if entry != NULL:
        free(<void *>timer_of(entry) if is_timed(entry) else <void *>entry)


cdef inline void entry_free(Item *entry) noexcept nogil:
    """Free the entry and what it holds."""
    if is_set(entry):
        zset_free(zset_of(entry))
    shell_free(entry)


cdef inline void ring_add(Item *ring, Item *entry) noexcept nogil:
    """Make the entry, which is not in the ring, the most recently used."""
    entry.second.older = ring.second.older
    entry.next = ring
    ring.second.older.next = entry
    ring.second.older = entry


cdef inline void ring_put(Item *before, Item *item) noexcept nogil:
    """Put the item, which is not in the ring, behind another one."""
    item.second.older = before
    item.next = before.next
    before.next.second.older = item
    before.next = item


cdef inline void ring_remove(Item *entry) noexcept nogil:
    entry.second.older.next = entry.next
    entry.next.second.older = entry.second.older


cdef inline void ring_touch(Item *ring, Item *entry) noexcept nogil:
    """Make the entry the most recently used."""
    if entry.next != ring:
        ring_remove(entry)
        ring_add(ring, entry)
