"""A range of scores, as its text says it, and the ranks in it."""

from libc.math cimport INFINITY, nextafter
from libc.stdint cimport uint8_t

from imds._kernel.entry cimport zset_of
from imds._kernel.number cimport read_score
from imds._kernel.request cimport Token
from imds._kernel.skiplist cimport Zset, zset_place
from imds._kernel.table cimport Item

ctypedef struct Bounds:
    double low
    double high
    bint above  # the lower bound itself is not in it
    bint below


cdef inline bint read_bound(const Token *text, double *score, bint *excluded) except -1:
    """Read a score, and whether it is excluded by ``(`` in front; False if it is none."""
    cdef size_t skipped = text.size > 0 and text.at[0] == c'('
    excluded[0] = skipped
    return read_score(text.at + skipped, text.size - skipped, score)


cdef inline bint read_bounds(const Token *low, const Token *high, Bounds *bounds) except -1:
    """Read a range of scores; False if it is none."""
    return read_bound(low, &bounds.low, &bounds.above) and read_bound(high, &bounds.high, &bounds.below)


cdef inline size_t ranks_to(const Zset *zset, double bound, bint included) noexcept nogil:
    """Return how many scores are below the bound, or not above it."""
    cdef const uint8_t *least = <const uint8_t *>b""  # of all members with that score
    if included and bound == INFINITY:
        return zset.count
    return zset_place(zset, nextafter(bound, INFINITY) if included else bound, least, 0)


cdef inline size_t ranks_between(Item *entry, const Bounds *bounds, size_t *start) noexcept nogil:
    """Return how many scores are between the bounds, and at which rank they begin; 0 of no entry."""
    cdef size_t stop
    start[0] = 0
    if entry == NULL:
        return 0
    start[0] = ranks_to(zset_of(entry), bounds.low, bounds.above)
    stop = ranks_to(zset_of(entry), bounds.high, not bounds.below)
    return stop - start[0] if stop > start[0] else 0
