"""The entries of a store: one block of memory for key and value, linked in the order of use.

::

    | next | older | key size | value size | key | value |       a string
    | next | older | key size | IS_SET     | key | Zset * |      a sorted set
       8       8       u32        u32

The order of use is a ring through an item that is no entry: its ``next`` is the least recently used entry, its
``older`` the most recently used one.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from imds._kernel.memory cimport alloc, chunk_size, free
from imds._kernel.skiplist cimport Zset, zset_cost, zset_free
from imds._kernel.table cimport TABLE_SHARE, Item, key_of

cdef extern from *:
    """
    /* No value is as long: it came in an envelope, which is shorter than 4 GiB and has more in it. */
    #define IS_SET 0xFFFFFFFFu
    """
    const uint32_t IS_SET


cdef inline bint is_set(const Item *entry) noexcept nogil:
    return entry.extra == IS_SET


cdef inline uint8_t *value_of(Item *entry) noexcept nogil:
    return key_of(entry) + entry.size


cdef inline Zset *zset_of(Item *entry) noexcept nogil:
    cdef Zset *zset
    memcpy(&zset, value_of(entry), sizeof(zset))
    return zset


cdef inline size_t entry_bytes(size_t key_size, size_t value_size) noexcept nogil:
    """Return what a key with a string counts."""
    return chunk_size(sizeof(Item) + key_size + value_size) + TABLE_SHARE


cdef inline size_t entry_cost(Item *entry) noexcept nogil:
    """Return what the entry counts, its sorted set included. O(1)."""
    if is_set(entry):
        return entry_bytes(entry.size, sizeof(Zset *)) + zset_cost(zset_of(entry))
    return entry_bytes(entry.size, entry.extra)


cdef inline Item *entry_new(
    const uint8_t *key, size_t key_size, const void *value, size_t value_size, uint32_t extra
) noexcept nogil:
    """Return an entry that is nowhere yet, or NULL."""
    cdef Item *entry = <Item *>alloc(sizeof(Item) + key_size + value_size)
    if entry == NULL:
        return NULL
    entry.size = <uint32_t>key_size
    entry.extra = extra
    if key_size:
        memcpy(key_of(entry), key, key_size)
    if value_size:
        memcpy(value_of(entry), value, value_size)
    return entry


cdef inline void entry_free(Item *entry) noexcept nogil:
    """Free the entry and what it holds."""
    if is_set(entry):
        zset_free(zset_of(entry))
    free(entry)


cdef inline void ring_add(Item *ring, Item *entry) noexcept nogil:
    """Make the entry, which is not in the ring, the most recently used."""
    entry.second.older = ring.second.older
    entry.next = ring
    ring.second.older.next = entry
    ring.second.older = entry


cdef inline void ring_remove(Item *entry) noexcept nogil:
    entry.second.older.next = entry.next
    entry.next.second.older = entry.second.older


cdef inline void ring_touch(Item *ring, Item *entry) noexcept nogil:
    """Make the entry the most recently used."""
    if entry.next != ring:
        ring_remove(entry)
        ring_add(ring, entry)
