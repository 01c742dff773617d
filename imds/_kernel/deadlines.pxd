"""Deadlines: a heap of the entries that have one, the earliest first; each place has four children.

What always holds (:func:`due_flaw` looks for the first breach):

* No place is before its parent, by (deadline, key bytes).
* An entry that is in the heap says in its timer where. One that is not says NOWHERE.

A place takes 16 bytes, and the timer in front of an entry 16 more (``entry.pxd``). Adding, removing and moving take
O(log n); the earliest is at the top. With four children rather than two there are half as many levels, each of which
has an entry's timer written: of many entries, none is in a cache.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp

from imds._kernel.entry cimport NOWHERE, timer_of
from imds._kernel.memory cimport alloc_grow, free
from imds._kernel.table cimport Item, key_of

cdef enum:
    WAYS = 4

ctypedef struct Due:
    uint64_t when
    Item *entry

ctypedef struct Heap:
    Due *places
    size_t count
    size_t room


cdef inline bint due_reserve(Heap *heap, size_t more) noexcept nogil:
    """Make room for ``more`` entries; whether there is."""
    cdef size_t room
    cdef void *grown
    if heap.room - heap.count >= more:
        return True
    room = 2 * heap.room + more + 16
    grown = alloc_grow(heap.places, room * sizeof(Due))
    if grown == NULL:
        return False
    heap.places = <Due *>grown
    heap.room = room
    return True


cdef inline void due_trim(Heap *heap) noexcept nogil:
    """Give memory back that is mostly empty. Nothing may be waiting to come back then."""
    cdef size_t room = 2 * heap.count + 16
    cdef void *less
    if heap.room > 1024 and heap.count < heap.room // 8:
        less = alloc_grow(heap.places, room * sizeof(Due))
        if less != NULL:
            heap.places = <Due *>less
            heap.room = room


cdef inline bint _sooner(const Due *one, const Due *other) noexcept nogil:
    cdef int order
    cdef uint32_t size
    if one.when != other.when:
        return one.when < other.when
    size = one.entry.size if one.entry.size < other.entry.size else other.entry.size
    order = memcmp(key_of(one.entry), key_of(other.entry), size)
    return order < 0 or (order == 0 and one.entry.size < other.entry.size)


cdef inline void _place(Heap *heap, size_t at, Due due) noexcept nogil:
    heap.places[at] = due
    timer_of(due.entry).place = at


cdef inline void _sift(Heap *heap, size_t at, Due due) noexcept nogil:
    """Put ``due`` where it belongs, from the free place ``at`` up or down."""
    cdef size_t child, other
    while at and _sooner(&due, &heap.places[(at - 1) // WAYS]):
        _place(heap, at, heap.places[(at - 1) // WAYS])
        at = (at - 1) // WAYS
    while True:
        child = WAYS * at + 1
        if child >= heap.count:
            break
        for other in range(child + 1, min(child + WAYS, heap.count)):
            if _sooner(&heap.places[other], &heap.places[child]):
                child = other
        if not _sooner(&heap.places[child], &due):
            break
        _place(heap, at, heap.places[child])
        at = child
    _place(heap, at, due)


cdef inline void due_add(Heap *heap, Item *entry) noexcept nogil:
    """Add an entry with a deadline; there is room."""
    heap.count += 1
    _sift(heap, heap.count - 1, Due(timer_of(entry).when, entry))


cdef inline void due_remove(Heap *heap, Item *entry) noexcept nogil:
    """Remove an entry that is in the heap."""
    cdef size_t at = timer_of(entry).place
    cdef Due last
    timer_of(entry).place = NOWHERE
    heap.count -= 1
    last = heap.places[heap.count]
    if at != heap.count:
        _sift(heap, at, last)


cdef inline void due_move(Heap *heap, Item *entry, uint64_t when) noexcept nogil:
    """Give an entry that is in the heap another deadline."""
    timer_of(entry).when = when
    _sift(heap, timer_of(entry).place, Due(when, entry))


cdef inline const char *due_flaw(const Heap *heap) noexcept nogil:
    """Return what is wrong with the heap, or NULL. O(n)."""
    cdef size_t at
    for at in range(heap.count):
        if timer_of(heap.places[at].entry).place != at:
            return "deadlines: an entry that does not know its place"
        if timer_of(heap.places[at].entry).when != heap.places[at].when or heap.places[at].when == 0:
            return "deadlines: a wrong time"
        if at and _sooner(&heap.places[at], &heap.places[(at - 1) // WAYS]):
            return "deadlines: out of order"
    return NULL
