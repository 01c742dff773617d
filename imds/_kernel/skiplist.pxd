"""Sorted sets: a skip list with spans, and beside a large one a table from member to node.

What always holds (:func:`zset_flaw` looks for the first breach):

* The nodes are in the order of (score, member bytes); no score is NaN or -0.0, no member is there twice.
* A node has one link for each of its levels. On level 0 it is ``next``; on level k it says how many nodes further it
  leads, which makes ranks: the end of the list counts as the place behind the last node.
* A set of more than LARGE members has a table and a tall head. It loses the table below LARGE / 2.
* ``bytes`` is what the allocator takes for the nodes.

::

                  head                                     +--------+--------+
    level 2       [ *, 5, score ] -----------------------> | link 2 | link 1 | ... links stand in front of the node,
    level 1       [ *, 2, score ] ---> [ *, 3, score ] --> +--------+--------+     so that all else has a fixed place
    level 0       next --> node --> node --> node --> ...  | next, score, size, levels, member bytes |
                  0        1         2        3            +-----------------------------------------+

A node of an 8-byte member takes 48 bytes, 70 on average with its links. A member of a small set is found by walking
along level 0: sixty-four nodes at most.
"""

from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from imds._kernel.memory cimport alloc, chunk_size, free
from imds._kernel.table cimport (
    TABLE_SHARE,
    Item,
    Table,
    item_in,
    key_of,
    table_add,
    table_find,
    table_flaw,
    table_free,
    table_free_some,
    table_hash,
    table_init,
    table_remove,
    table_slot,
)


cdef enum:
    LARGE = 64          # members of a set without a table, at most
    LEVELS = 24         # above level 0; every other node of a level is on the next: enough for 2^24 members
    SMALL_LEVELS = 3    # of a set without a table

ctypedef struct Link:
    Item *next
    size_t span
    double score        # of ``next``, so that most steps of a search need not look at the node; at the end INFINITY

ctypedef struct Zset:
    size_t count
    size_t bytes
    Item *head          # its ``extra`` is how many levels it has room for
    Table *table
    Zset *next          # of several whose memory is being freed
    uint64_t seed       # of the table
    uint32_t height     # levels above 0 that have been used


cdef inline Link *link_of(Item *node, uint32_t level) noexcept nogil:
    """Return the link on ``level``, which is 1 or more."""
    return <Link *>node - level


cdef inline size_t node_bytes(size_t size, uint32_t levels) noexcept nogil:
    return chunk_size(sizeof(Item) + levels * sizeof(Link) + size)


cdef inline Item *_new_node(const uint8_t *member, size_t size, double score, uint32_t levels) noexcept nogil:
    cdef uint8_t *block = <uint8_t *>alloc(sizeof(Item) + levels * sizeof(Link) + size)
    if block == NULL:
        return NULL
    cdef Item *node = <Item *>(block + levels * sizeof(Link))
    node.next = NULL
    node.second.score = score
    node.size = <uint32_t>size
    node.extra = levels
    if size:
        memcpy(key_of(node), member, size)
    return node


cdef inline void node_free(Item *node) noexcept nogil:
    free(<Link *>node - node.extra)


cdef inline Zset *zset_new(uint64_t seed) noexcept nogil:
    """Return an empty set, or NULL."""
    cdef Zset *zset = <Zset *>alloc(sizeof(Zset))
    cdef uint32_t level
    if zset == NULL:
        return NULL
    zset.count = zset.bytes = 0
    zset.table = NULL
    zset.seed = seed
    zset.height = 0
    zset.head = _new_node(NULL, 0, 0, SMALL_LEVELS)
    if zset.head == NULL:
        free(zset)
        return NULL
    return zset


cdef inline bint zset_free_some(Zset *zset, size_t most) noexcept nogil:
    """Free ``most`` of the set's nodes and chains; whether that was all. Nothing else may be done with it then."""
    cdef Item *node
    if zset.table != NULL:
        most -= table_free_some(zset.table, most)
        if zset.table.segments == NULL:
            free(zset.table)
            zset.table = NULL
    while most and zset.head.next != NULL:
        node = zset.head.next
        zset.head.next = node.next
        node_free(node)
        most -= 1
    if zset.table != NULL or zset.head.next != NULL:
        return False
    node_free(zset.head)
    free(zset)
    return True


cdef inline void zset_free(Zset *zset) noexcept nogil:
    """Free the set and its nodes. O(n)."""
    zset_free_some(zset, <size_t>-1)


cdef inline size_t _cost(size_t count, size_t bytes, bint table, uint32_t head_levels) noexcept nogil:
    cdef size_t cost = chunk_size(sizeof(Zset)) + node_bytes(0, head_levels) + bytes
    return cost + chunk_size(sizeof(Table)) + count * TABLE_SHARE if table else cost


cdef inline size_t zset_cost(const Zset *zset) noexcept nogil:
    """Return the bytes that the set is counted with."""
    return _cost(zset.count, zset.bytes, zset.table != NULL, zset.head.extra)


cdef inline size_t zset_cost_with(const Zset *zset, size_t size, uint32_t levels) noexcept nogil:
    """Return what it will be with one more member of ``size`` bytes."""
    cdef bint table = zset.table != NULL or zset.count >= LARGE
    return _cost(
        zset.count + 1, zset.bytes + node_bytes(size, levels), table, LEVELS if table else zset.head.extra
    )


cdef inline uint32_t zset_dice(const Zset *zset, uint64_t *state) noexcept nogil:
    """Draw the levels of a new node: one more with probability 1/2 each time. Xorshift64."""
    cdef uint64_t x = state[0]
    cdef uint32_t levels = 0, most = LEVELS if zset.count >= LARGE or zset.table != NULL else SMALL_LEVELS
    x ^= x << 13
    x ^= x >> 7
    x ^= x << 17
    state[0] = x
    x >>= 16  # the low bits of neighbours are alike
    while levels < most and x & 1 == 0:
        levels += 1
        x >>= 1
    return levels


cdef inline bint _less(Item *node, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Whether ``node`` comes before (score, member)."""
    cdef int order
    if node.second.score != score:
        return node.second.score < score
    order = memcmp(key_of(node), member, node.size if node.size < size else size)
    return order < 0 or (order == 0 and node.size < size)


cdef inline Item *zset_find(const Zset *zset, const uint8_t *member, size_t size) noexcept nogil:
    """Return the member's node, or NULL."""
    cdef Item *node
    cdef uint64_t *slot
    if zset.table != NULL:
        slot = table_find(zset.table, table_hash(zset.table, member, size), member, size)
        return item_in(slot[0]) if slot != NULL else NULL
    node = zset.head.next
    while node != NULL and not (node.size == size and memcmp(key_of(node), member, size) == 0):
        node = node.next
    return node


cdef inline bint _link_less(const Link *link, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Whether the link leads to a node before (score, member)."""
    if link.score != score:
        return link.score < score
    return link.next != NULL and _less(link.next, score, member, size)


cdef inline size_t _path(
    const Zset *zset, double score, const uint8_t *member, size_t size, Item **path, size_t *ranks
) noexcept nogil:
    """Find the last node before (score, member) on each level, and its rank (1-based; the head is 0).

    Returns the rank on level 0.
    """
    cdef Item *node = zset.head
    cdef size_t rank = 0
    cdef uint32_t level = zset.height
    cdef Link *link
    while level:
        link = link_of(node, level)
        while _link_less(link, score, member, size):
            rank += link.span
            node = link.next
            link = link_of(node, level)
        path[level] = node
        ranks[level] = rank
        level -= 1
    while node.next != NULL and _less(node.next, score, member, size):
        rank += 1
        node = node.next
    path[0] = node
    ranks[0] = rank
    return rank


cdef inline size_t zset_rank(const Zset *zset, Item *node) noexcept nogil:
    """Return how many nodes come before ``node``. O(log n)."""
    cdef Item *at = zset.head
    cdef size_t rank = 0
    cdef uint32_t level = zset.height
    cdef Link *link
    while level:
        link = link_of(at, level)
        while link.next == node or _link_less(link, node.second.score, key_of(node), node.size):
            rank += link.span
            at = link.next
            link = link_of(at, level)
        if at == node:
            return rank - 1
        level -= 1
    while at != node:
        rank += 1
        at = at.next
    return rank - 1


cdef inline Item *zset_first(const Zset *zset, double score) noexcept nogil:
    """Return the first node whose score is not less than ``score``, or NULL. O(log n)."""
    cdef Item *node = zset.head
    cdef uint32_t level = zset.height
    cdef Link *link
    while level:
        link = link_of(node, level)
        while link.score < score:
            node = link.next
            link = link_of(node, level)
        level -= 1
    while node.next != NULL and node.next.second.score < score:
        node = node.next
    return node.next


cdef inline size_t zset_place(const Zset *zset, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Return how many nodes come before (score, member). O(log n)."""
    cdef Item *path[LEVELS + 1]
    cdef size_t ranks[LEVELS + 1]
    return _path(zset, score, member, size, path, ranks)


cdef inline Item *zset_at(const Zset *zset, size_t rank) noexcept nogil:
    """Return the node of this rank, or NULL. O(log n)."""
    cdef Item *node = zset.head
    cdef uint32_t level = zset.height
    if rank >= zset.count:
        return NULL
    rank += 1
    while level:
        while link_of(node, level).next != NULL and link_of(node, level).span <= rank:
            rank -= link_of(node, level).span
            node = link_of(node, level).next
        level -= 1
    while rank:
        node = node.next
        rank -= 1
    return node


cdef inline void _link(Zset *zset, Item *node, Item **path, size_t *ranks) noexcept nogil:
    """Put ``node`` behind ``path``, its place."""
    cdef uint32_t level
    cdef Link *before
    cdef Link *link
    while zset.height < node.extra:
        zset.height += 1
        path[zset.height] = zset.head
        ranks[zset.height] = 0
        before = link_of(zset.head, zset.height)
        before.next = NULL
        before.score = INFINITY
        before.span = zset.count + 1
    node.next = path[0].next
    path[0].next = node
    for level in range(1, zset.height + 1):
        before = link_of(path[level], level)
        if level <= node.extra:
            link = link_of(node, level)
            link.next = before.next
            link.score = before.score
            link.span = before.span - (ranks[0] - ranks[level])
            before.next = node
            before.score = node.second.score
            before.span = ranks[0] - ranks[level] + 1
        else:
            before.span += 1
    zset.count += 1


cdef inline void _unlink(Zset *zset, Item *node, Item **path) noexcept nogil:
    """Take ``node`` out, which stands behind ``path``."""
    cdef uint32_t level
    cdef Link *before
    path[0].next = node.next
    for level in range(1, zset.height + 1):
        before = link_of(path[level], level)
        if before.next == node:
            before.next = link_of(node, level).next
            before.score = link_of(node, level).score
            before.span += link_of(node, level).span
        before.span -= 1
    zset.count -= 1


cdef inline bint _make_table(Zset *zset) noexcept nogil:
    """Give the set its table and its tall head; False, and nothing done, if there is no memory."""
    cdef Table *table
    cdef Item *head = zset.head
    cdef Item *node
    cdef uint32_t level
    if head.extra < LEVELS:
        head = _new_node(NULL, 0, 0, LEVELS)
        if head == NULL:
            return False
        head.next = zset.head.next
        for level in range(1, zset.height + 1):
            link_of(head, level)[0] = link_of(zset.head, level)[0]
        node_free(zset.head)
        zset.head = head
    table = <Table *>alloc(sizeof(Table))
    if table == NULL:
        return False
    if not table_init(table, zset.seed):
        free(table)
        return False
    node = zset.head.next
    while node != NULL:
        if not table_add(table, table_hash(table, key_of(node), node.size), node):
            table_free(table)
            free(table)
            return False
        node = node.next
    zset.table = table
    return True


cdef inline bint zset_attach(Zset *zset, Item *node) noexcept nogil:
    """Add ``node``, whose member is not here; False, and nothing done, if there is no memory. O(log n)."""
    cdef Item *path[LEVELS + 1]
    cdef size_t ranks[LEVELS + 1]
    if zset.table == NULL and zset.count >= LARGE and not _make_table(zset):
        return False
    if zset.table != NULL and not table_add(
        zset.table, table_hash(zset.table, key_of(node), node.size), node
    ):
        return False
    _path(zset, node.second.score, key_of(node), node.size, path, ranks)
    _link(zset, node, path, ranks)
    zset.bytes += node_bytes(node.size, node.extra)
    return True


cdef inline Item *zset_add(
    Zset *zset, const uint8_t *member, size_t size, double score, uint32_t levels
) noexcept nogil:
    """Add a member that is not here; NULL, and nothing done, if there is no memory. O(log n)."""
    cdef Item *node = _new_node(member, size, score, levels)
    if node != NULL and not zset_attach(zset, node):
        node_free(node)
        return NULL
    return node


cdef inline void zset_detach(Zset *zset, Item *node) noexcept nogil:
    """Take ``node`` out; it is the caller's now. O(log n)."""
    cdef Item *path[LEVELS + 1]
    cdef size_t ranks[LEVELS + 1]
    _path(zset, node.second.score, key_of(node), node.size, path, ranks)
    _unlink(zset, node, path)
    zset.bytes -= node_bytes(node.size, node.extra)
    if zset.table != NULL:
        table_remove(
            zset.table, table_hash(zset.table, key_of(node), node.size), table_slot(zset.table, node)
        )
        if zset.count < LARGE // 2:
            table_free(zset.table)
            free(zset.table)
            zset.table = NULL


cdef inline void _paths(
    const Zset *zset, Item *node, double score, Item **path, size_t *ranks, Item **other, size_t *other_ranks
) noexcept nogil:
    """Find the paths to ``node`` and to where its member belongs with another score, as :func:`_path` finds one.

    Both at once: each step waits for memory, and the two do not wait for each other.
    """
    cdef Item *here = zset.head
    cdef Item *there = zset.head
    cdef size_t rank = 0, other_rank = 0
    cdef uint32_t level = zset.height
    cdef double old = node.second.score
    cdef const uint8_t *member = key_of(node)
    cdef Link *link
    cdef Link *other_link
    cdef bint on, other_on
    while level:
        link = link_of(here, level)
        other_link = link_of(there, level)
        while True:
            on = _link_less(link, old, member, node.size)
            other_on = _link_less(other_link, score, member, node.size)
            if on:
                rank += link.span
                here = link.next
                link = link_of(here, level)
            if other_on:
                other_rank += other_link.span
                there = other_link.next
                other_link = link_of(there, level)
            if not on and not other_on:
                break
        path[level] = here
        ranks[level] = rank
        other[level] = there
        other_ranks[level] = other_rank
        level -= 1
    while here.next != node:
        rank += 1
        here = here.next
    while there.next != NULL and _less(there.next, score, member, node.size):
        other_rank += 1
        there = there.next
    path[0] = here
    ranks[0] = rank
    other[0] = there
    other_ranks[0] = other_rank


cdef inline void zset_move(Zset *zset, Item *node, double score) noexcept nogil:
    """Give ``node`` another score. O(log n)."""
    cdef Item *path[LEVELS + 1]
    cdef size_t ranks[LEVELS + 1]
    cdef Item *to[LEVELS + 1]
    cdef size_t to_ranks[LEVELS + 1]
    cdef uint32_t level
    _paths(zset, node, score, path, ranks, to, to_ranks)
    if to[0] == path[0] or to[0] == node:
        node.second.score = score  # its neighbours stay the same
        for level in range(1, node.extra + 1):
            link_of(path[level], level).score = score
        return
    _unlink(zset, node, path)
    for level in range(zset.height + 1):  # the node is on the way no more
        if to[level] == node:
            to[level] = path[level]
        if to_ranks[level] > ranks[0]:
            to_ranks[level] = ranks[level] if to[level] == path[level] else to_ranks[level] - 1
    node.second.score = score
    _link(zset, node, to, to_ranks)


cdef inline const char *zset_flaw(const Zset *zset) noexcept nogil:
    """Return what is wrong with the set, or NULL. O(n log n)."""
    cdef Item *node = zset.head.next
    cdef Item *before = NULL
    cdef Item *path[LEVELS + 1]    # on each level the node that must be linked to the next one of that level
    cdef size_t ranks[LEVELS + 1]
    cdef size_t count = 0, total = 0
    cdef uint32_t level
    cdef double score
    for level in range(1, zset.height + 1):
        path[level] = zset.head
        ranks[level] = 0
    while node != NULL:
        count += 1
        total += node_bytes(node.size, node.extra)
        score = node.second.score
        if score != score or (score == 0 and 1 / score < 0):
            return "sorted set: a score that is NaN or -0.0"
        if before != NULL and not _less(before, score, key_of(node), node.size):
            return "sorted set: out of order"
        if node.extra > zset.height:
            return "sorted set: a node above the height"
        for level in range(1, node.extra + 1):
            if link_of(path[level], level).next != node:
                return "sorted set: a link that misses a node"
            if link_of(path[level], level).score != score:
                return "sorted set: a link with another score than its node"
            if ranks[level] + link_of(path[level], level).span != count:
                return "sorted set: a wrong span"
            path[level] = node
            ranks[level] = count
        if zset_find(zset, key_of(node), node.size) != node:
            return "sorted set: a member that is not found"
        before = node
        node = node.next
    for level in range(1, zset.height + 1):
        if link_of(path[level], level).next != NULL or link_of(path[level], level).score != INFINITY:
            return "sorted set: a link beyond the end"
        if ranks[level] + link_of(path[level], level).span != count + 1:
            return "sorted set: a wrong span at the end"
    if zset.height > zset.head.extra:
        return "sorted set: higher than its head"
    if count != zset.count or total != zset.bytes:
        return "sorted set: count or bytes are wrong"
    if zset.table == NULL and count > LARGE:
        return "sorted set: large without a table"
    if zset.table != NULL and count < LARGE // 2:
        return "sorted set: small with a table"
    if zset.table != NULL and zset.table.count != count:
        return "sorted set: its table has another count"
    return table_flaw(zset.table) if zset.table != NULL else NULL
