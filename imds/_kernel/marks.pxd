"""When the entries of a store were used last: marks in the order of use, so that no entry has a time.

A mark is an item of the ring (``entry.pxd``) that is no entry, and in no table. It has a second, of a clock that never
runs back. What always holds (:func:`ring_flaw` looks for the first breach):

* What is in the ring behind a mark, towards the most recently used end, was used in its second or later; what is
  in front of it, in that second or earlier; everything in the ring, in ``floor`` or later.
* So seconds do not fall from ``floor`` to the newest mark. The list of marks has the order of the ring.

::

    floor 2 |  a  b  [5]  c  [9]  d  e  f      from the least recently used; c was used at 5 or later, by 9

A store adds a mark before the first use in each second, and after MARK_EVERY uses: the second of the nearest mark in front
of an entry is that of its last use then, and not many steps away. Old marks are taken out again, so that they stay few:
while there are more than FEW, and one for SHARE entries, each new one has two others looked at, by a hand that goes
round from the newest to the oldest. A mark goes:

* if another one follows at once, or nothing is in front of it (``floor`` says the same then);
* if fewer than SPARSE entries are between its neighbours, and the time between those is at most 1/256 of what has passed
  since.

A place is neither entry nor mark: where a save has come to (``store.pyx``). Nothing is known by it.

So the second that is found for an entry is never later than that of its use, and the idle time by it at most 1/256 more
than the true one. At most there are about entries / (SPARSE / 2) marks, and some thousands that are kept for being far
apart in time. Under load there are about entries / SHARE.
"""

from libc.stdint cimport uint32_t, uint64_t

from imds._kernel.entry cimport ring_add, ring_remove
from imds._kernel.memory cimport alloc, free
from imds._kernel.table cimport Item

cdef enum:
    IS_MARK = 0x80000000  # in ``extra``
    IS_PLACE = 0x80000001
    MARK_EVERY = 4096     # uses, after which there is another mark though no second has passed
    SPARSE = 64
    FEW = 64
    SHARE = 128

ctypedef struct Mark:
    Item item  # ``size`` is the second
    Mark *newer
    Mark *older

ctypedef struct Marks:
    Mark *newest
    Mark *oldest
    Mark *hand       # what is looked at next; NULL: it begins again behind the newest
    size_t count
    uint32_t floor


cdef inline bint is_mark(const Item *item) noexcept nogil:
    return item.extra == IS_MARK


cdef inline bint is_place(const Item *item) noexcept nogil:
    return item.extra == IS_PLACE


cdef inline bint is_entry(const Item *item) noexcept nogil:
    """Whether the item is an entry, or the ring's own."""
    return not item.extra & IS_MARK


cdef inline Item *past_marks(Item *item) noexcept nogil:
    """Return the item, or the first behind it that is neither mark nor place: an entry, or the ring's own."""
    while not is_entry(item):
        item = item.next
    return item


cdef inline uint32_t marks_latest(const Marks *marks) noexcept nogil:
    """Return the second from which on everything behind the newest mark was used."""
    return marks.newest.item.size if marks.newest != NULL else marks.floor


cdef inline uint32_t marks_second(const Marks *marks, const Item *ring, const Item *entry) noexcept nogil:
    """Return the second from which on the entry was used last. O(entries up to the next mark)."""
    cdef const Item *item = entry.second.older
    while item != ring and not is_mark(item):
        item = item.second.older
    return marks.floor if item == ring else item.size


cdef inline void mark_free(Marks *marks, Mark *mark) noexcept nogil:
    """Take the mark out."""
    if marks.hand == mark:
        marks.hand = mark.older
    if mark.newer != NULL:
        mark.newer.older = mark.older
    else:
        marks.newest = mark.older
    if mark.older != NULL:
        mark.older.newer = mark.newer
    else:
        marks.oldest = mark.newer
    marks.count -= 1
    ring_remove(&mark.item)
    free(mark)


cdef inline void marks_trim(Marks *marks, const Item *ring) noexcept nogil:
    """Take out the marks at the least recently used end. O(1) for each that was added."""
    while marks.oldest != NULL and (ring.next.next if is_place(ring.next) else ring.next) == &marks.oldest.item:
        marks.floor = marks.oldest.item.size
        mark_free(marks, marks.oldest)


cdef inline bint _is_sparse(const Item *ring, const Mark *mark) noexcept nogil:
    """Whether there are fewer than SPARSE entries between the neighbours of a mark that is not the newest."""
    cdef int count = 0
    cdef const Item *item = mark.item.next
    while not is_mark(item):
        count += 1
        if count == SPARSE:
            return False
        item = item.next
    item = mark.item.second.older
    while item != ring and not is_mark(item):
        count += 1
        if count == SPARSE:
            return False
        item = item.second.older
    return True


cdef inline void _look(Marks *marks, const Item *ring, uint32_t second) noexcept nogil:
    """Look at one mark, the newest excepted, and take it out if it may go. O(SPARSE)."""
    cdef Mark *mark = marks.hand if marks.hand != NULL else marks.newest.older
    cdef uint32_t before, behind
    if mark == NULL:
        return
    marks.hand = mark.older
    before = mark.older.item.size if mark.older != NULL else marks.floor
    behind = mark.newer.item.size
    if mark.item.second.older == ring:
        marks_trim(marks, ring)
    elif mark.item.next == &mark.newer.item or (
        <uint64_t>(behind - before) * 256 <= second - behind and _is_sparse(ring, mark)
    ):
        mark_free(marks, mark)


cdef inline void marks_add(Marks *marks, Item *ring, uint32_t second, size_t entries) noexcept nogil:
    """Note that all that is used from now on is used in this second or later. Without memory nothing happens.

    ``entries``: how many are in the ring.
    """
    cdef Mark *mark
    if ring.next == ring:
        marks.floor = second
        return
    if is_mark(ring.second.older):
        ring.second.older.size = second
        return
    mark = <Mark *>alloc(sizeof(Mark))
    if mark == NULL:
        return
    mark.item.size = second
    mark.item.extra = IS_MARK
    mark.newer = NULL
    mark.older = marks.newest
    if marks.newest != NULL:
        marks.newest.newer = mark
    else:
        marks.oldest = mark
    marks.newest = mark
    marks.count += 1
    ring_add(ring, &mark.item)
    if marks.count > FEW + entries // SHARE:  # most looks wait for memory, SPARSE times; so not without need
        _look(marks, ring, second)
        _look(marks, ring, second)


cdef inline const char *ring_flaw(const Marks *marks, const Item *ring, uint32_t second) noexcept nogil:
    """Return what is wrong with the ring and its marks, or NULL; ``second`` is the present one. O(ring)."""
    cdef const Mark *mark = marks.oldest
    cdef const Mark *older = NULL
    cdef const Item *before = ring
    cdef const Item *item = ring.next
    cdef uint32_t latest = marks.floor
    cdef size_t count = 0
    cdef bint met = marks.hand == NULL
    while item != ring:
        if item.second.older != before:
            return "ring: a wrong way back"
        if is_mark(item):
            if mark == NULL or item != &mark.item or mark.older != older:
                return "marks: not in the order of the ring"
            if mark.item.size < latest:
                return "marks: a second before that of the mark in front"
            met |= mark == marks.hand
            latest = mark.item.size
            older = mark
            mark = mark.newer
            count += 1
        before = item
        item = item.next
    if ring.second.older != before:
        return "ring: a wrong way back"
    if mark != NULL or marks.newest != older or marks.count != count:
        return "marks: one that is not in the ring"
    if latest > second:
        return "marks: a second that is still to come"
    if not met:
        return "marks: the hand is at none"
    return NULL
