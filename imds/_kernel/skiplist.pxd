"""Sorted sets: a skip list of chunks, with spans, and beside a large set a table from member to node.

What always holds (:func:`zset_flaw` looks for the first breach):

* The nodes are in the order of (score, member bytes), in a chunk and from chunk to chunk; no score is NaN or -0.0, no
  member is there twice. Only the first chunk may be empty, and only in an empty set.
* A chunk has one link for each of its levels, from 0 on, and each says how many nodes further it leads, which makes
  ranks: the end of the list counts as the place behind the last node.
* A link's score parts what is before its ``next``, none of it higher, from what is there, none of it lower. It is that
  of a node which was once there: so a chunk's first node comes and goes and no link is touched.
* A chunk by itself has room for 4 to CHUNK nodes, a power of two; of several, each has room for CHUNK, and the first,
  where a search begins, has all LEVELS. It keeps them until the set is small again.
* A set of more than LARGE members has a table. It loses it below LARGE / 2.
* ``bytes`` is what the allocator takes for the nodes and the chunks.

::

                first chunk                                       chunk
    link 2    [ *, 57, score ] --------------------------------> [ *, 5, inf ] ---> nothing
    link 1    [ *, 31, score ] ---> [ *, 26, score ] ----------> [ *, 5, inf ]
    link 0    [ *, 12, score ] ---> [ *, 19, score ] --> ... --> [ *, 5, inf ]      links stand in front of their chunk,
              | count, room, levels | scores | nodes |              |               so that all else has a fixed place
                                                  |
                                                  +--> | score, size, member bytes |

This is an unrolled skip list (W. Pugh, "Skip lists: a probabilistic alternative to balanced trees", 1990, with spans as
in its "Skip list cookbook", and several elements to a node): a search among a thousand members looks at half a dozen
chunks and counts scores in the last one, where a node for each member would be twice as many steps, each of which waits
for memory. A node of an 8-byte member takes 32 bytes, with its part of a chunk about 60.
"""

from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memmove

from imds._kernel.memory cimport alloc, chunk_size, free
from imds._kernel.table cimport (
    TABLE_SHARE,
    Item,
    Table,
    fetch,
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
    CHUNK = 32          # nodes of a chunk, at most
    FIRST_ROOM = 4      # of a new set's chunk
    THIN = 8            # a chunk with so many nodes left, or fewer, is joined by the next one
    JOINED = 24         # if both together have no more than that
    NODES_AHEAD = 8     # of a walk from node to node
    LEVELS = 20         # above level 0; every other chunk of a level is on the next: enough for 2^20 chunks
    CHUNK_HEAD = 16     # bytes of a chunk before its scores
    NEXT = sizeof(void *)  # what an item begins with and a node has not

ctypedef struct Link:
    Chunk *next
    size_t span
    double score        # at the end INFINITY

ctypedef struct Chunk:
    uint32_t count
    uint32_t room
    uint32_t levels
    # ``room`` scores follow, and ``room`` addresses of nodes

ctypedef struct Place:
    Chunk *chunk
    uint32_t index

ctypedef struct Path:
    Chunk *chunks[LEVELS + 1]   # on each level the last one that does not begin behind a place
    size_t ranks[LEVELS + 1]    # how many nodes are before it
    uint32_t index              # of the place in the chunk on level 0

ctypedef struct Zset:
    size_t count
    size_t bytes
    Chunk *first
    Table *table
    Zset *next          # of several whose memory is being freed
    uint64_t seed       # of the table
    uint64_t dice
    uint32_t height     # levels above 0 that have been used


cdef inline Link *link_of(Chunk *chunk, uint32_t level) noexcept nogil:
    return <Link *>chunk - 1 - level


cdef inline double *scores_of(Chunk *chunk) noexcept nogil:
    return <double *>(<uint8_t *>chunk + CHUNK_HEAD)


cdef inline Item **nodes_of(Chunk *chunk) noexcept nogil:
    return <Item **>(scores_of(chunk) + chunk.room)


cdef inline size_t node_bytes(size_t size) noexcept nogil:
    return chunk_size(sizeof(Item) - NEXT + size)


cdef inline size_t _chunk_bytes(uint32_t room, uint32_t levels) noexcept nogil:
    return chunk_size(CHUNK_HEAD + (levels + 1) * sizeof(Link) + room * (sizeof(double) + sizeof(Item *)))


cdef inline Item *_new_node(const uint8_t *member, size_t size, double score) noexcept nogil:
    cdef uint8_t *block = <uint8_t *>alloc(sizeof(Item) - NEXT + size)
    if block == NULL:
        return NULL
    cdef Item *node = <Item *>(<uintptr_t>block - NEXT)  # an integer: it is in no block
    node.second.score = score
    node.size = <uint32_t>size
    node.extra = 0
    if size:
        memcpy(key_of(node), member, size)
    return node


cdef inline void node_free(Item *node) noexcept nogil:
    free(<void *>(<uintptr_t>node + NEXT))


cdef inline Chunk *_new_chunk(Zset *zset, uint32_t room, uint32_t levels) noexcept nogil:
    """Return an empty chunk, counted, whose links lead nowhere, or NULL."""
    cdef uint8_t *block = <uint8_t *>alloc(
        CHUNK_HEAD + (levels + 1) * sizeof(Link) + room * (sizeof(double) + sizeof(Item *))
    )
    cdef Chunk *chunk
    cdef uint32_t level
    if block == NULL:
        return NULL
    chunk = <Chunk *>(block + (levels + 1) * sizeof(Link))
    chunk.count = 0
    chunk.room = room
    chunk.levels = levels
    for level in range(levels + 1):
        link_of(chunk, level).next = NULL
        link_of(chunk, level).span = 0
        link_of(chunk, level).score = INFINITY
    zset.bytes += _chunk_bytes(room, levels)
    return chunk


cdef inline void _free_chunk(Zset *zset, Chunk *chunk) noexcept nogil:
    zset.bytes -= _chunk_bytes(chunk.room, chunk.levels)
    free(link_of(chunk, chunk.levels))


cdef inline Zset *zset_new(uint64_t seed) noexcept nogil:
    """Return an empty set, or NULL."""
    cdef Zset *zset = <Zset *>alloc(sizeof(Zset))
    if zset == NULL:
        return NULL
    zset.count = zset.bytes = 0
    zset.table = NULL
    zset.seed = seed
    zset.dice = seed | 1
    zset.height = 0
    zset.first = _new_chunk(zset, FIRST_ROOM, 0)
    if zset.first == NULL:
        free(zset)
        return NULL
    return zset


cdef inline bint zset_free_some(Zset *zset, size_t most) noexcept nogil:
    """Free ``most`` of the set's nodes and chains; whether that was all. Nothing else may be done with it then."""
    cdef Chunk *chunk
    if zset.table != NULL:
        most -= table_free_some(zset.table, most)
        if zset.table.segments == NULL:
            free(zset.table)
            zset.table = NULL
    while most and zset.first != NULL:
        chunk = zset.first
        while most and chunk.count:
            chunk.count -= 1
            node_free(nodes_of(chunk)[chunk.count])
            most -= 1
        if chunk.count == 0:
            zset.first = link_of(chunk, 0).next
            _free_chunk(zset, chunk)
    if zset.table != NULL or zset.first != NULL:
        return False
    free(zset)
    return True


cdef inline void zset_free(Zset *zset) noexcept nogil:
    """Free the set and its nodes. O(n)."""
    zset_free_some(zset, <size_t>-1)


cdef inline bint _alone(const Zset *zset) noexcept nogil:
    """Whether the set has one chunk."""
    return link_of(zset.first, 0).next == NULL


cdef inline uint32_t _draw(uint64_t *dice) noexcept nogil:
    """Draw the levels of a new chunk: one more with probability 1/2 each time. Xorshift64."""
    cdef uint64_t x = dice[0]
    cdef uint32_t levels = 0
    x ^= x << 13
    x ^= x >> 7
    x ^= x << 17
    dice[0] = x
    x >>= 16  # the low bits of neighbours are alike
    while levels < LEVELS and x & 1 == 0:
        levels += 1
        x >>= 1
    return levels


cdef inline size_t zset_growth(const Zset *zset) noexcept nogil:
    """Return how many bytes one more node in any chunk may take, but for the node's own."""
    cdef Chunk *first = zset.first
    cdef uint64_t dice = zset.dice
    cdef size_t tall = _chunk_bytes(CHUNK, LEVELS)
    if not _alone(zset):
        return _chunk_bytes(CHUNK, _draw(&dice))
    if first.count < first.room:
        return 0
    if first.room < CHUNK:
        return _chunk_bytes(2 * first.room, 0) - _chunk_bytes(first.room, 0)
    return _chunk_bytes(CHUNK, _draw(&dice)) + tall - _chunk_bytes(CHUNK, first.levels)


cdef inline size_t _cost(size_t count, size_t bytes, bint table) noexcept nogil:
    cdef size_t cost = chunk_size(sizeof(Zset)) + bytes
    return cost + chunk_size(sizeof(Table)) + count * TABLE_SHARE if table else cost


cdef inline size_t zset_cost(const Zset *zset) noexcept nogil:
    """Return the bytes that the set is counted with."""
    return _cost(zset.count, zset.bytes, zset.table != NULL)


cdef inline size_t zset_cost_with(const Zset *zset, size_t size) noexcept nogil:
    """Return what it will be at most with one more member of ``size`` bytes."""
    cdef bint table = zset.table != NULL or zset.count >= LARGE
    return _cost(zset.count + 1, zset.bytes + node_bytes(size) + zset_growth(zset), table)


cdef inline int _order(Item *node, const uint8_t *member, size_t size) noexcept nogil:
    """Return less than 0, 0 or more than 0: how the node's member compares with another one."""
    cdef int order = memcmp(key_of(node), member, node.size if node.size < size else size)
    if order:
        return order
    return (node.size > size) - (node.size < size)


cdef inline Item *zset_find(const Zset *zset, const uint8_t *member, size_t size) noexcept nogil:
    """Return the member's node, or NULL."""
    cdef Chunk *chunk = zset.first
    cdef Item **nodes
    cdef uint64_t *slot
    cdef uint32_t i
    if zset.table != NULL:
        slot = table_find(zset.table, table_hash(zset.table, member, size), member, size)
        return item_in(slot[0]) if slot != NULL else NULL
    while chunk != NULL:
        nodes = nodes_of(chunk)
        for i in range(chunk.count):
            if nodes[i].size == size and memcmp(key_of(nodes[i]), member, size) == 0:
                return nodes[i]
        chunk = link_of(chunk, 0).next
    return NULL


cdef inline bint _leads_on(const Link *link, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Whether the link's chunk does not begin behind (score, member)."""
    cdef Item *first
    if link.score != score:
        return link.score < score
    if link.next == NULL:
        return False
    first = nodes_of(link.next)[0]
    return first.second.score == score and _order(first, member, size) <= 0


cdef inline uint32_t _index(Chunk *chunk, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Return how many nodes of the chunk come before (score, member)."""
    cdef const double *scores = scores_of(chunk)
    cdef uint32_t low = 0, high, middle, i
    for i in range(chunk.count):
        low += scores[i] < score
    if low == chunk.count or scores[low] != score:  # mostly
        return low
    high = low + 1
    while high < chunk.count and scores[high] == score:
        high += 1
    while low < high:
        middle = (low + high) // 2
        if _order(nodes_of(chunk)[middle], member, size) < 0:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline void _seek(
    const Zset *zset, double score, const uint8_t *member, size_t size, Path *path
) noexcept nogil:
    """Find the way to (score, member), or to where it belongs. O(log n)."""
    cdef Chunk *chunk = zset.first
    cdef size_t rank = 0
    cdef uint32_t level = zset.height + 1
    cdef Link *link
    while level:
        level -= 1
        link = link_of(chunk, level)
        while _leads_on(link, score, member, size):
            rank += link.span
            chunk = link.next
            link = link_of(chunk, level)
        path.chunks[level] = chunk
        path.ranks[level] = rank
    path.index = _index(chunk, score, member, size)


cdef inline void _seek_both(const Zset *zset, Item *node, Path *path, double score, Path *other) noexcept nogil:
    """Find the ways to ``node`` and to where its member belongs with another score.

    Both at once: each step waits for memory, and the two do not wait for each other.
    """
    cdef Chunk *here = zset.first
    cdef Chunk *there = zset.first
    cdef size_t rank = 0, other_rank = 0
    cdef uint32_t level = zset.height + 1
    cdef double old = node.second.score
    cdef const uint8_t *member = key_of(node)
    cdef Link *link
    cdef Link *other_link
    cdef bint on, other_on
    while level:
        level -= 1
        link = link_of(here, level)
        other_link = link_of(there, level)
        while True:
            on = _leads_on(link, old, member, node.size)
            other_on = _leads_on(other_link, score, member, node.size)
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
        path.chunks[level] = here
        path.ranks[level] = rank
        other.chunks[level] = there
        other.ranks[level] = other_rank
    path.index = _index(here, old, member, node.size)
    other.index = _index(there, score, member, node.size)


cdef inline size_t zset_place(const Zset *zset, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Return how many nodes come before (score, member). O(log n)."""
    cdef Path path
    _seek(zset, score, member, size, &path)
    return path.ranks[0] + path.index


cdef inline size_t zset_rank(const Zset *zset, Item *node) noexcept nogil:
    """Return how many nodes come before ``node``. O(log n)."""
    return zset_place(zset, node.second.score, key_of(node), node.size)


cdef inline Item *node_at(const Place *place) noexcept nogil:
    """Return the node at a place; NULL behind the last one."""
    return nodes_of(place.chunk)[place.index] if place.index < place.chunk.count else NULL


cdef inline void node_fetch(Item *node) noexcept nogil:
    """Have a node fetched: it begins with its score, and its member may be in another line."""
    fetch(&node.second)
    fetch(key_of(node))


cdef inline void fetch_on(const Place *place) noexcept nogil:
    """Have fetched what a walk from a place on meets first: nodes of this chunk, and the next one."""
    cdef uint32_t index
    for index in range(place.index, min(place.index + NODES_AHEAD, place.chunk.count)):
        node_fetch(nodes_of(place.chunk)[index])
    fetch(link_of(place.chunk, 0).next)


cdef inline void place_next(Place *place) noexcept nogil:
    """Move to the next node."""
    place.index += 1
    if place.index + NODES_AHEAD <= place.chunk.count:
        node_fetch(nodes_of(place.chunk)[place.index + NODES_AHEAD - 1])
    elif place.index == place.chunk.count and link_of(place.chunk, 0).next != NULL:
        place.chunk = link_of(place.chunk, 0).next
        place.index = 0
        fetch_on(place)


cdef inline Place zset_start(const Zset *zset) noexcept nogil:
    """Return the place of the first node."""
    cdef Place place
    place.chunk = zset.first
    place.index = 0
    return place


cdef inline Place zset_first(const Zset *zset, double score) noexcept nogil:
    """Return the place of the first node whose score is not less than ``score``. O(log n)."""
    cdef Path path
    cdef Place place
    _seek(zset, score, <const uint8_t *>zset, 0, &path)  # of no bytes, wherever they are
    place.chunk = path.chunks[0]
    place.index = path.index
    if place.index == place.chunk.count and link_of(place.chunk, 0).next != NULL:
        place.chunk = link_of(place.chunk, 0).next
        place.index = 0
    fetch_on(&place)
    return place


cdef inline Place zset_at(const Zset *zset, size_t rank) noexcept nogil:
    """Return the place of the node of this rank. O(log n)."""
    cdef Place place
    cdef uint32_t level = zset.height + 1
    place.chunk = zset.first
    if rank >= zset.count:
        rank = zset.count
    while level:
        level -= 1
        while link_of(place.chunk, level).next != NULL and link_of(place.chunk, level).span <= rank:
            rank -= link_of(place.chunk, level).span
            place.chunk = link_of(place.chunk, level).next
    place.index = <uint32_t>rank
    fetch_on(&place)
    return place


cdef inline void _put_in(Chunk *chunk, uint32_t index, Item *node, double score) noexcept nogil:
    """Put a node into a chunk that has room."""
    cdef double *scores = scores_of(chunk) + index
    cdef Item **nodes = nodes_of(chunk) + index
    cdef size_t behind = chunk.count - index
    memmove(scores + 1, scores, behind * sizeof(double))
    memmove(nodes + 1, nodes, behind * sizeof(Item *))
    scores[0] = score
    nodes[0] = node
    chunk.count += 1


cdef inline void _take_out(Chunk *chunk, uint32_t index) noexcept nogil:
    cdef double *scores = scores_of(chunk) + index
    cdef Item **nodes = nodes_of(chunk) + index
    cdef size_t behind = chunk.count - index - 1
    memmove(scores, scores + 1, behind * sizeof(double))
    memmove(nodes, nodes + 1, behind * sizeof(Item *))
    chunk.count -= 1


cdef inline void _pour(Chunk *chunk, uint32_t start, Chunk *into) noexcept nogil:
    """Move the nodes from ``start`` on behind those of another chunk, which has room."""
    cdef uint32_t count = chunk.count - start
    memcpy(scores_of(into) + into.count, scores_of(chunk) + start, count * sizeof(double))
    memcpy(nodes_of(into) + into.count, nodes_of(chunk) + start, count * sizeof(Item *))
    into.count += count
    chunk.count = start


cdef inline void _count_on(const Zset *zset, const Path *path, size_t number) noexcept nogil:
    """There are ``number`` nodes more at the end of the path; -1 is one less."""
    cdef uint32_t level
    for level in range(zset.height + 1):
        link_of(path.chunks[level], level).span += number


cdef inline bint _resize_first(Zset *zset, uint32_t room, uint32_t levels) noexcept nogil:
    """Give the chunk of a set that has one other measures; False, and nothing done, if there is no memory."""
    cdef Chunk *first = _new_chunk(zset, room, levels)
    if first == NULL:
        return False
    _pour(zset.first, 0, first)
    link_of(first, 0).span = first.count
    _free_chunk(zset, zset.first)
    zset.first = first
    return True


cdef inline bint _split(Zset *zset, Path *path) noexcept nogil:
    """Part the full chunk on level 0 of a path in two, of which it may lead to either afterwards.

    False, and nothing that matters done, if there is no memory. Who adds at one of the ends leaves full chunks behind.
    """
    cdef Chunk *chunk = path.chunks[0]
    cdef Chunk *new
    cdef Link *link
    cdef Link *before
    cdef uint32_t level
    cdef uint32_t kept = CHUNK // 2
    cdef size_t rank
    if _alone(zset) and zset.first.levels < LEVELS:
        if not _resize_first(zset, CHUNK, LEVELS):
            return False
        chunk = path.chunks[0] = zset.first
    new = _new_chunk(zset, CHUNK, _draw(&zset.dice))
    if new == NULL:
        return False
    if path.index == <uint32_t>CHUNK and link_of(chunk, 0).next == NULL:
        kept = CHUNK - 1
    elif path.index == 0 and chunk == zset.first:
        kept = 1
    while zset.height < new.levels:
        zset.height += 1
        path.chunks[zset.height] = zset.first
        path.ranks[zset.height] = 0
        link_of(zset.first, zset.height).next = NULL
        link_of(zset.first, zset.height).score = INFINITY
        link_of(zset.first, zset.height).span = zset.count
    rank = path.ranks[0] + kept
    for level in range(new.levels + 1):
        before = link_of(path.chunks[level], level)
        link = link_of(new, level)
        link.next = before.next
        link.score = before.score
        link.span = before.span - (rank - path.ranks[level])
        before.next = new
        before.score = scores_of(chunk)[kept]
        before.span = rank - path.ranks[level]
    _pour(chunk, kept, new)
    return True


cdef inline bint _make_place(Zset *zset, Path *path) noexcept nogil:
    """See to it that the chunk of a path is not full; False if there is no memory. The path may have to be found anew."""
    cdef Chunk *chunk = path.chunks[0]
    return _resize_first(zset, 2 * chunk.room, 0) if chunk.room < CHUNK else _split(zset, path)


cdef inline void _join(Zset *zset, Chunk *chunk, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Move all nodes of a chunk that is not the first into the one before it, which has room, and free it.

    (score, member) is the chunk's first node, or the last one that was there.
    """
    cdef Chunk *before = zset.first
    cdef uint32_t level = zset.height + 1
    cdef Link *link
    while level:
        level -= 1
        link = link_of(before, level)
        while link.next != chunk and _leads_on(link, score, member, size):
            before = link.next
            link = link_of(before, level)
        if link.next == chunk:
            link.span += link_of(chunk, level).span
            link.score = link_of(chunk, level).score
            link.next = link_of(chunk, level).next
    _pour(chunk, 0, before)
    _free_chunk(zset, chunk)


cdef inline void _thin_out(Zset *zset, Path *path, double score, const uint8_t *member, size_t size) noexcept nogil:
    """After a node went from the end of a path, have its chunk join a neighbour if it should. O(log n)."""
    cdef Chunk *chunk = path.chunks[0]
    cdef Chunk *next = link_of(chunk, 0).next
    cdef Item *first
    if chunk.count > THIN:
        return
    if chunk.count == 0 and chunk != zset.first:
        _join(zset, chunk, score, member, size)
    elif next != NULL and chunk.count + next.count <= <uint32_t>(JOINED if chunk.count else CHUNK):
        first = nodes_of(next)[0]
        _join(zset, next, first.second.score, key_of(first), first.size)


cdef inline bint _make_table(Zset *zset) noexcept nogil:
    """Give the set its table; False, and nothing done, if there is no memory."""
    cdef Table *table
    cdef Place place = zset_start(zset)
    cdef Item *node = node_at(&place)
    table = <Table *>alloc(sizeof(Table))
    if table == NULL:
        return False
    if not table_init(table, zset.seed):
        free(table)
        return False
    while node != NULL:
        if not table_add(table, table_hash(table, key_of(node), node.size), node):
            table_free(table)
            free(table)
            return False
        place_next(&place)
        node = node_at(&place)
    zset.table = table
    return True


cdef inline bint zset_attach(Zset *zset, Item *node) noexcept nogil:
    """Add ``node``, whose member is not here; False if there is no memory. O(log n)."""
    cdef Path path
    _seek(zset, node.second.score, key_of(node), node.size, &path)
    if path.chunks[0].count == path.chunks[0].room:
        if not _make_place(zset, &path):
            return False
        _seek(zset, node.second.score, key_of(node), node.size, &path)
    if zset.table == NULL and zset.count >= LARGE and not _make_table(zset):
        return False
    if zset.table != NULL and not table_add(
        zset.table, table_hash(zset.table, key_of(node), node.size), node
    ):
        return False
    _put_in(path.chunks[0], path.index, node, node.second.score)
    _count_on(zset, &path, 1)
    zset.count += 1
    zset.bytes += node_bytes(node.size)
    return True


cdef inline Item *zset_add(Zset *zset, const uint8_t *member, size_t size, double score) noexcept nogil:
    """Add a member that is not here; NULL if there is no memory. O(log n)."""
    cdef Item *node = _new_node(member, size, score)
    if node != NULL and not zset_attach(zset, node):
        node_free(node)
        return NULL
    return node


cdef inline void zset_detach(Zset *zset, Item *node) noexcept nogil:
    """Take ``node`` out; it is the caller's now. O(log n)."""
    cdef Path path
    _seek(zset, node.second.score, key_of(node), node.size, &path)
    _take_out(path.chunks[0], path.index)
    _count_on(zset, &path, <size_t>-1)
    zset.count -= 1
    zset.bytes -= node_bytes(node.size)
    _thin_out(zset, &path, node.second.score, key_of(node), node.size)
    if zset.table != NULL:
        table_remove(
            zset.table, table_hash(zset.table, key_of(node), node.size), table_slot(zset.table, node)
        )
        if zset.count < LARGE // 2:
            table_free(zset.table)
            free(zset.table)
            zset.table = NULL
    if zset.count <= THIN and zset.first.levels and _alone(zset):
        zset.height = 0
        _resize_first(zset, 2 * THIN, 0)  # without memory it stays as it is, until the next one goes


cdef inline bint zset_move(Zset *zset, Item *node, double score) noexcept nogil:
    """Give ``node`` another score; False, and nothing that matters done, if there is no memory. O(log n)."""
    cdef Path path
    cdef Path to
    cdef double old = node.second.score
    cdef Chunk *chunk
    _seek_both(zset, node, &path, score, &to)
    if path.chunks[0] != to.chunks[0] and to.chunks[0].count == CHUNK:
        if not _split(zset, &to):
            return False
        _seek_both(zset, node, &path, score, &to)
    if path.chunks[0] == to.chunks[0]:
        chunk = path.chunks[0]
        _take_out(chunk, path.index)
        _put_in(chunk, to.index - (to.index > path.index), node, score)
        node.second.score = score
        return True
    _take_out(path.chunks[0], path.index)
    _count_on(zset, &path, <size_t>-1)
    _put_in(to.chunks[0], to.index, node, score)
    _count_on(zset, &to, 1)
    node.second.score = score
    _thin_out(zset, &path, old, key_of(node), node.size)
    return True


cdef inline const char *zset_flaw(const Zset *zset) noexcept nogil:
    """Return what is wrong with the set, or NULL. O(n log n)."""
    cdef Chunk *chunk = zset.first
    cdef Item *node
    cdef Item *before = NULL
    cdef Chunk *path[LEVELS + 1]   # on each level the chunk that must be linked to the next one of that level
    cdef size_t ranks[LEVELS + 1]
    cdef size_t count = 0, total = 0
    cdef uint32_t level, i
    cdef double score
    if zset.height > LEVELS or zset.height > chunk.levels:
        return "sorted set: higher than its first chunk"
    for level in range(zset.height + 1):
        path[level] = NULL
    while chunk != NULL:
        if chunk.count == 0 and zset.count:
            return "sorted set: an empty chunk"
        if chunk.count > chunk.room or chunk.room > CHUNK:
            return "sorted set: a chunk with more than it has room for"
        if not _alone(zset) and (chunk.room != CHUNK or zset.first.levels != LEVELS):
            return "sorted set: a small chunk among others"
        if chunk != zset.first and chunk.levels > zset.height:
            return "sorted set: a chunk above the height"
        for level in range(min(chunk.levels, zset.height) + 1):
            if path[level] != NULL:
                if link_of(path[level], level).next != chunk:
                    return "sorted set: a link that misses a chunk"
                if link_of(path[level], level).score != link_of(path[0], 0).score:
                    return "sorted set: links of other scores to one chunk"
                if ranks[level] + link_of(path[level], level).span != count:
                    return "sorted set: a wrong span"
        if before != NULL and not (
            before.second.score <= link_of(path[0], 0).score <= nodes_of(chunk)[0].second.score
        ):
            return "sorted set: a link whose score parts nothing"
        for level in range(min(chunk.levels, zset.height) + 1):
            path[level] = chunk
            ranks[level] = count
        total += _chunk_bytes(chunk.room, chunk.levels)
        for i in range(chunk.count):
            node = nodes_of(chunk)[i]
            count += 1
            total += node_bytes(node.size)
            score = node.second.score
            if score != score or (score == 0 and 1 / score < 0):
                return "sorted set: a score that is NaN or -0.0"
            if scores_of(chunk)[i] != score:
                return "sorted set: a node with another score than its chunk says"
            if before != NULL and (
                before.second.score > score
                or (before.second.score == score and _order(before, key_of(node), node.size) >= 0)
            ):
                return "sorted set: out of order"
            if zset_find(zset, key_of(node), node.size) != node:
                return "sorted set: a member that is not found"
            if zset_rank(zset, node) != count - 1:
                return "sorted set: a member of another rank"
            before = node
        chunk = link_of(chunk, 0).next
    for level in range(zset.height + 1):
        if link_of(path[level], level).next != NULL or link_of(path[level], level).score != INFINITY:
            return "sorted set: a link beyond the end"
        if ranks[level] + link_of(path[level], level).span != count:
            return "sorted set: a wrong span at the end"
    if count != zset.count or total != zset.bytes:
        return "sorted set: count or bytes are wrong"
    if zset.table == NULL and count > LARGE:
        return "sorted set: large without a table"
    if zset.table != NULL and count < LARGE // 2:
        return "sorted set: small with a table"
    if zset.table != NULL and zset.table.count != count:
        return "sorted set: its table has another count"
    return table_flaw(zset.table) if zset.table != NULL else NULL
