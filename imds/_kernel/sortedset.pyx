"""SortedSet: the compiled twin of ``imds/shard/sortedset.py``, over the skip list that the store uses."""

from os import urandom

from libc.stdint cimport uint8_t

from imds._kernel cimport memory
from imds._kernel.skiplist cimport (
    Place,
    Zset,
    node_at,
    place_next,
    zset_add,
    zset_cost,
    zset_find,
    zset_at,
    zset_first,
    zset_flaw,
    zset_free,
    zset_move,
    zset_detach,
    zset_new,
    zset_place,
    zset_rank,
    node_free,
)
from imds._kernel.table cimport Item, key_of


cdef class SortedSet:
    """Members (bytes) with scores, in the order of (score, member)."""

    cdef Zset *_zset

    def __cinit__(self):
        self._zset = zset_new(int.from_bytes(urandom(8), "big"))
        if self._zset == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._zset != NULL:
            zset_free(self._zset)

    def __len__(self):
        return self._zset.count

    @property
    def used(self):
        """The counted memory in bytes."""
        return zset_cost(self._zset)

    cdef Item *_find(self, bytes member):
        return zset_find(self._zset, <const uint8_t *><char *>member, <size_t>len(member))

    def add(self, bytes member not None, double score):
        """Give ``member`` this score: True if it is new, False if it moved, None if nothing changed."""
        cdef Item *node
        if score != score:
            raise ValueError("NaN is no score")
        if <size_t>len(member) > 0xFFFFFFFF:
            raise OverflowError("a member of 4 GiB or more")
        score += 0.0  # -0.0 becomes 0.0
        node = self._find(member)
        if node != NULL:
            if node.second.score == score:
                return None
            if not zset_move(self._zset, node, score):
                raise MemoryError
            return False
        if zset_add(
            self._zset,
            <const uint8_t *><char *>member,
            <size_t>len(member),
            score,
        ) == NULL:
            raise MemoryError
        return True

    def remove(self, bytes member not None):
        """Remove ``member``; return whether it was here."""
        cdef Item *node = self._find(member)
        if node == NULL:
            return False
        zset_detach(self._zset, node)
        node_free(node)
        return True

    def score(self, bytes member not None):
        """Return the score of ``member``, or None if it is not here."""
        cdef Item *node = self._find(member)
        return None if node == NULL else node.second.score

    def rank(self, bytes member not None):
        """Return how many pairs come before ``member``'s, or None if it is not here."""
        cdef Item *node = self._find(member)
        return None if node == NULL else zset_rank(self._zset, node)

    def range(self, double low, double high):
        """Return the pairs with ``low <= score <= high`` in order."""
        cdef list pairs = []
        cdef Place place
        cdef Item *node
        if low <= high:  # which NaN is not
            place = zset_first(self._zset, low)
            node = node_at(&place)
            while node != NULL and node.second.score <= high:
                pairs.append((node.second.score, (<char *>key_of(node))[: node.size]))
                place_next(&place)
                node = node_at(&place)
        return pairs

    def place(self, double score, bytes member not None):
        """Return how many pairs come before (score, member)."""
        return zset_place(self._zset, score, <const uint8_t *><char *>member, <size_t>len(member))

    def slice(self, size_t start, size_t stop):
        """Return the pairs from rank ``start`` to before ``stop``."""
        cdef list pairs = []
        cdef Place place = zset_at(self._zset, start)
        cdef Item *node = node_at(&place)
        while node != NULL and start < stop:
            pairs.append((node.second.score, (<char *>key_of(node))[: node.size]))
            place_next(&place)
            node = node_at(&place)
            start += 1
        return pairs

    def check(self):
        """Raise AssertionError unless every rule at the top of ``skiplist.pxd`` holds."""
        cdef const char *flaw = zset_flaw(self._zset)
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()}: {self._zset.count} members, height {self._zset.height}")


def alloc_fails_at(size_t n):
    """For tests: make the n-th allocation of this module fail, once; 0 ends it. Return what was left to count."""
    left = memory.alloc_fails_at
    memory.alloc_fails_at = n
    return left
