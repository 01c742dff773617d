"""Sorted sets: a deterministic skip list in chunks, with spans, and beside a large set a table from member to node.

What always holds (:func:`zset_flaw` looks for the first breach):

* Level 0 is all nodes, in the order of (score, member bytes), in a chunk and from chunk to chunk; no score is NaN or
  -0.0, no member is there twice.
* Each level is a list of chunks. One above 0 has a link to every chunk of the level below, in their order, and the
  highest is one chunk, the root. So a set of one chunk has the level 0 alone, and the root of a higher one two links
  or more. No chunk is empty, but for the one of an empty set.
* A link says how many nodes are below it, its span, which makes ranks.
* A link's score parts what is before its chunk, none of it higher, from what is there, none of it lower. It is that of
  a node which was once there: so a chunk's first node comes and goes and no link is touched. The first link of a chunk
  is followed where no other one is, whatever its score.
* A chunk by itself has room for 4 to CHUNK nodes, a power of two; of several, each has room for CHUNK.
* A set of more than LARGE members has a table. It loses it below LARGE / 2.
* ``bytes`` is what the allocator takes for the nodes and the chunks.

::

    level 2                          [ link, link ]
                                       |        `---------------------------.
    level 1     [ link, link, link, link ] ----------------------> [ link, link, link ] ---> nothing
                   |     `-------------.                                            |
    level 0     [ node, node, node ] -> [ node, node, node, node ] -> ... -> [ node, node ] ---> nothing

    a chunk     | next | count, room | scores | nodes |             a node      | score | size | member |
    of links    | next | count, room | scores | chunks | spans |

It is the deterministic skip list of J. I. Munro, T. Papadakis and R. Sedgewick ("Deterministic skip lists", 1992), who
keep the gaps between the elements of a level within bounds rather than leave them to chance, unrolled as a B+ tree
is, and with the spans of W. Pugh's "Skip list cookbook" (1990). With up to 32 to a chunk a search among a thousand
members looks at two or three chunks, among a million at five. A chunk's scores are fetched at once, so that each chunk
is one wait for memory, and they are counted without a branch. A node of an 8-byte member takes 32 bytes, with its part
of a chunk about 60.
"""

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
    CHUNK = 32          # nodes or links of a chunk, at most
    FIRST_ROOM = 4      # of a new set's chunk
    THIN = 8            # a chunk with so many left, or fewer, is joined with a neighbour
    JOINED = 24         # if both together have no more than that
    NODES_AHEAD = 8     # of a walk from node to node
    LEVELS = 20         # above level 0, at most: enough for any memory, as two neighbours have more than THIN together
    CHUNK_HEAD = 16     # bytes of a chunk before its scores
    LINE = 64           # bytes that are fetched at a time
    NEXT = sizeof(void *)  # what an item begins with and a node has not

ctypedef struct Chunk:
    Chunk *next         # on the same level
    uint32_t count
    uint32_t room
    # ``room`` scores follow, and ``room`` addresses of nodes; of links: of chunks, and ``room`` spans

ctypedef struct Place:
    Chunk *chunk
    uint32_t index

ctypedef struct Path:
    Chunk *chunks[LEVELS + 1]      # on each level the last one that does not begin behind a place
    uint32_t indexes[LEVELS + 1]   # of the link that is followed; on level 0 of the place

ctypedef struct Zset:
    size_t count
    size_t bytes
    Chunk *first        # of level 0
    Chunk *root
    Table *table
    Zset *next          # of several whose memory is being freed
    Chunk *below        # while it is: where the level after the root's begins
    uint64_t seed       # of the table
    uint32_t height     # the root's level


cdef inline double *scores_of(Chunk *chunk) noexcept nogil:
    return <double *>(<uint8_t *>chunk + CHUNK_HEAD)


cdef inline Item **nodes_of(Chunk *chunk) noexcept nogil:
    return <Item **>(scores_of(chunk) + chunk.room)


cdef inline Chunk **chunks_of(Chunk *chunk) noexcept nogil:
    return <Chunk **>(scores_of(chunk) + chunk.room)


cdef inline size_t *spans_of(Chunk *chunk) noexcept nogil:
    return <size_t *>(chunks_of(chunk) + chunk.room)


cdef inline size_t node_bytes(size_t size) noexcept nogil:
    return chunk_size(sizeof(Item) - NEXT + size)


cdef inline size_t _chunk_size(uint32_t room, bint links) noexcept nogil:
    return CHUNK_HEAD + room * (sizeof(double) + sizeof(void *) + (sizeof(size_t) if links else 0))


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


cdef inline Chunk *_new_chunk(Zset *zset, uint32_t room, bint links) noexcept nogil:
    """Return an empty chunk, counted, or NULL."""
    cdef Chunk *chunk = <Chunk *>alloc(_chunk_size(room, links))
    if chunk == NULL:
        return NULL
    chunk.next = NULL
    chunk.count = 0
    chunk.room = room
    zset.bytes += chunk_size(_chunk_size(room, links))
    return chunk


cdef inline void _free_chunk(Zset *zset, Chunk *chunk, bint links) noexcept nogil:
    if chunk != NULL:
        zset.bytes -= chunk_size(_chunk_size(chunk.room, links))
        free(chunk)


cdef inline Zset *zset_new(uint64_t seed) noexcept nogil:
    """Return an empty set, or NULL."""
    cdef Zset *zset = <Zset *>alloc(sizeof(Zset))
    if zset == NULL:
        return NULL
    zset.count = zset.bytes = 0
    zset.table = NULL
    zset.below = NULL
    zset.seed = seed
    zset.height = 0
    zset.first = zset.root = _new_chunk(zset, FIRST_ROOM, False)
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
    while most and zset.height:
        chunk = zset.root
        if zset.below == NULL:
            zset.below = chunks_of(chunk)[0]
        zset.root = chunk.next
        free(chunk)
        most -= 1
        if zset.root == NULL:
            zset.root = zset.below
            zset.below = NULL
            zset.height -= 1
    while most and zset.first != NULL:
        chunk = zset.first
        while most and chunk.count:
            chunk.count -= 1
            node_free(nodes_of(chunk)[chunk.count])
            most -= 1
        if chunk.count == 0:
            zset.first = chunk.next
            free(chunk)
    if zset.table != NULL or zset.first != NULL or zset.height:
        return False
    free(zset)
    return True


cdef inline void zset_free(Zset *zset) noexcept nogil:
    """Free the set and its nodes. O(n)."""
    zset_free_some(zset, <size_t>-1)


cdef inline size_t zset_growth(const Zset *zset) noexcept nogil:
    """Return how many bytes one more node in any chunk may take at most, but for the node's own."""
    cdef Chunk *first = zset.first
    if zset.height == 0:
        if first.count < first.room:
            return 0
        if first.room < CHUNK:
            return chunk_size(_chunk_size(2 * first.room, False)) - chunk_size(_chunk_size(first.room, False))
    return chunk_size(_chunk_size(CHUNK, False)) + (zset.height + 1) * chunk_size(_chunk_size(CHUNK, True))


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
        chunk = chunk.next
    return NULL


cdef inline Item *_first_below(Chunk *chunk, uint32_t level) noexcept nogil:
    """Return the first node at or below a chunk of this level."""
    while level:
        chunk = chunks_of(chunk)[0]
        level -= 1
    return nodes_of(chunk)[0]


cdef inline uint32_t _link(Chunk *chunk, uint32_t level, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Return which of the links of a chunk is the last whose chunk does not begin behind (score, member), or 0."""
    cdef const double *scores = scores_of(chunk)
    cdef uint32_t index = 0, i
    cdef Item *first
    for i in range(1, chunk.count):
        index += scores[i] < score
    while index + 1 < chunk.count and scores[index + 1] == score:  # seldom
        first = _first_below(chunks_of(chunk)[index + 1], level - 1)
        if first.second.score != score or _order(first, member, size) > 0:
            break
        index += 1
    return index


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


cdef inline void _fetch_scores(Chunk *chunk) noexcept nogil:
    """Have fetched what a search looks at in a chunk that is full."""
    cdef size_t at = 0
    while at < CHUNK_HEAD + CHUNK * sizeof(double):
        fetch(<uint8_t *>chunk + at)
        at += LINE


cdef inline void zset_fetch(const Zset *zset) noexcept nogil:
    """Have fetched what a search begins with."""
    _fetch_scores(zset.root)


cdef inline Chunk *_down(
    Chunk *chunk, uint32_t level, double score, const uint8_t *member, size_t size, Path *path
) noexcept nogil:
    """Take one step of the way to (score, member), from a chunk of links, and return the chunk that it leads to."""
    cdef uint32_t index = _link(chunk, level, score, member, size)
    path.chunks[level] = chunk
    path.indexes[level] = index
    chunk = chunks_of(chunk)[index]
    _fetch_scores(chunk)
    return chunk


cdef inline void _seek(
    const Zset *zset, double score, const uint8_t *member, size_t size, Path *path
) noexcept nogil:
    """Find the way to (score, member), or to where it belongs. O(log n)."""
    cdef Chunk *chunk = zset.root
    cdef uint32_t level = zset.height
    while level:
        chunk = _down(chunk, level, score, member, size, path)
        level -= 1
    path.chunks[0] = chunk
    path.indexes[0] = _index(chunk, score, member, size)


cdef inline void _seek_both(const Zset *zset, Item *node, Path *path, double score, Path *other) noexcept nogil:
    """Find the ways to ``node`` and to where its member belongs with another score.

    Both at once: each step waits for memory, and the two do not wait for each other.
    """
    cdef Chunk *here = zset.root
    cdef Chunk *there = zset.root
    cdef uint32_t level = zset.height
    cdef double old = node.second.score
    cdef const uint8_t *member = key_of(node)
    while level:
        here = _down(here, level, old, member, node.size, path)
        there = _down(there, level, score, member, node.size, other)
        level -= 1
    path.chunks[0] = here
    path.indexes[0] = _index(here, old, member, node.size)
    other.chunks[0] = there
    other.indexes[0] = _index(there, score, member, node.size)


cdef inline size_t zset_place(const Zset *zset, double score, const uint8_t *member, size_t size) noexcept nogil:
    """Return how many nodes come before (score, member). O(log n)."""
    cdef Chunk *chunk = zset.root
    cdef Path path
    cdef size_t rank = 0
    cdef uint32_t level = zset.height, i
    while level:
        chunk = _down(chunk, level, score, member, size, &path)
        for i in range(path.indexes[level]):
            rank += spans_of(path.chunks[level])[i]
        level -= 1
    return rank + _index(chunk, score, member, size)


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
    fetch(place.chunk.next)


cdef inline void place_next(Place *place) noexcept nogil:
    """Move to the next node."""
    place.index += 1
    if place.index + NODES_AHEAD <= place.chunk.count:
        node_fetch(nodes_of(place.chunk)[place.index + NODES_AHEAD - 1])
    elif place.index == place.chunk.count and place.chunk.next != NULL:
        place.chunk = place.chunk.next
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
    place.index = path.indexes[0]
    if place.index == place.chunk.count and place.chunk.next != NULL:
        place.chunk = place.chunk.next
        place.index = 0
    fetch_on(&place)
    return place


cdef inline Place zset_at(const Zset *zset, size_t rank) noexcept nogil:
    """Return the place of the node of this rank. O(log n)."""
    cdef Place place
    cdef uint32_t level = zset.height, index
    cdef const size_t *spans
    place.chunk = zset.root
    if rank >= zset.count:
        rank = zset.count
    while level:
        spans = spans_of(place.chunk)
        index = 0
        while index + 1 < place.chunk.count and spans[index] <= rank:
            rank -= spans[index]
            index += 1
        place.chunk = chunks_of(place.chunk)[index]
        level -= 1
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


cdef inline size_t _nodes_below(Chunk *chunk, uint32_t start, bint links) noexcept nogil:
    """Return how many nodes are in a chunk, or below its links, from ``start`` on."""
    cdef size_t nodes = 0
    cdef uint32_t i
    if not links:
        return chunk.count - start
    for i in range(start, chunk.count):
        nodes += spans_of(chunk)[i]
    return nodes


cdef inline size_t _pour(Chunk *chunk, uint32_t start, Chunk *into, bint links) noexcept nogil:
    """Move what a chunk has from ``start`` on behind what another one has, which has room; return how many nodes it is."""
    cdef uint32_t count = chunk.count - start
    cdef size_t nodes = _nodes_below(chunk, start, links)
    memcpy(scores_of(into) + into.count, scores_of(chunk) + start, count * sizeof(double))
    memcpy(nodes_of(into) + into.count, nodes_of(chunk) + start, count * sizeof(void *))
    if links:
        memcpy(spans_of(into) + into.count, spans_of(chunk) + start, count * sizeof(size_t))
    into.count += count
    chunk.count = start
    return nodes


cdef inline void _put_link(Chunk *chunk, uint32_t index, double score, Chunk *to, size_t span) noexcept nogil:
    """Put a link into a chunk that has room."""
    cdef size_t *spans = spans_of(chunk) + index
    memmove(spans + 1, spans, (chunk.count - index) * sizeof(size_t))
    spans[0] = span
    _put_in(chunk, index, <Item *>to, score)


cdef inline void _take_link(Chunk *chunk, uint32_t index) noexcept nogil:
    cdef size_t *spans = spans_of(chunk) + index
    memmove(spans, spans + 1, (chunk.count - index - 1) * sizeof(size_t))
    _take_out(chunk, index)


cdef inline void _count_on(const Zset *zset, const Path *path, size_t number) noexcept nogil:
    """There are ``number`` nodes more at the end of the path; -1 is one less."""
    cdef uint32_t level
    for level in range(1, zset.height + 1):
        spans_of(path.chunks[level])[path.indexes[level]] += number


cdef inline bint _resize_first(Zset *zset, uint32_t room) noexcept nogil:
    """Give the only chunk of a set another room; False, and nothing done, if there is no memory."""
    cdef Chunk *first = _new_chunk(zset, room, False)
    if first == NULL:
        return False
    _pour(zset.first, 0, first, False)
    _free_chunk(zset, zset.first, False)
    zset.first = zset.root = first
    return True


cdef inline bint _split(Zset *zset, Path *path) noexcept nogil:
    """Part the full chunk on level 0 of a path in two, and as many above it as are full; the path leads on.

    False, and nothing done, if there is no memory. Who adds at the end leaves full chunks behind.
    """
    cdef Chunk *new[LEVELS + 1]
    cdef Chunk *root = NULL
    cdef Chunk *chunk
    cdef uint32_t top = 0, level, kept
    cdef double score
    cdef size_t span
    cdef bint enough
    while top < zset.height and path.chunks[top + 1].count == CHUNK:
        top += 1
    enough = top < LEVELS
    for level in range(top + 1):
        new[level] = _new_chunk(zset, CHUNK, level > 0)
        enough = enough and new[level] != NULL
    if top == zset.height:
        root = _new_chunk(zset, CHUNK, True)
        enough = enough and root != NULL
    if not enough:
        for level in range(top + 1):
            _free_chunk(zset, new[level], level > 0)
        _free_chunk(zset, root, True)
        return False
    if root != NULL:
        _put_link(root, 0, scores_of(zset.root)[0], zset.root, zset.count)
        zset.root = root
        zset.height += 1
        path.chunks[zset.height] = root
        path.indexes[zset.height] = 0
    level = top + 1
    while level:
        level -= 1
        chunk = path.chunks[level]
        kept = CHUNK // 2
        if chunk.next == NULL and path.indexes[level] + (level > 0) == <uint32_t>CHUNK:
            kept = CHUNK - 1
        elif level == 0 and path.indexes[0] == 0 and chunk == zset.first:
            kept = 1
        score = scores_of(chunk)[kept]
        span = _pour(chunk, kept, new[level], level > 0)
        new[level].next = chunk.next
        chunk.next = new[level]
        spans_of(path.chunks[level + 1])[path.indexes[level + 1]] -= span
        _put_link(path.chunks[level + 1], path.indexes[level + 1] + 1, score, new[level], span)
        if path.indexes[level] >= kept + (level == 0):
            path.chunks[level] = new[level]
            path.indexes[level] -= kept
            path.indexes[level + 1] += 1
    return True


cdef inline bint _make_place(Zset *zset, Path *path) noexcept nogil:
    """See to it that the chunk at the end of a path is not full; False if there is no memory."""
    if path.chunks[0].room == CHUNK:
        return _split(zset, path)
    if not _resize_first(zset, 2 * path.chunks[0].room):
        return False
    path.chunks[0] = zset.first
    return True


cdef inline Chunk *_chunk_before(const Zset *zset, const Path *path, uint32_t level) noexcept nogil:
    """Return the chunk before that of a path on a level, NULL if it is the first."""
    cdef uint32_t up = level + 1
    cdef Chunk *chunk
    while up <= zset.height and path.indexes[up] == 0:
        up += 1
    if up > zset.height:
        return NULL
    chunk = chunks_of(path.chunks[up])[path.indexes[up] - 1]
    while up > level + 1:
        up -= 1
        chunk = chunks_of(chunk)[chunk.count - 1]
    return chunk


cdef inline void _join(Zset *zset, Chunk *above, uint32_t index, bint links) noexcept nogil:
    """Move what the chunk behind a link has into the one before it, which has room, and free it."""
    cdef Chunk *chunk = chunks_of(above)[index]
    cdef Chunk *before = chunks_of(above)[index - 1]
    if links:  # what was a first link has a score that matters now
        scores_of(chunk)[0] = scores_of(above)[index]
    spans_of(above)[index - 1] += _pour(chunk, 0, before, links)
    before.next = chunk.next
    _free_chunk(zset, chunk, links)
    _take_link(above, index)


cdef inline void _thin_out(Zset *zset, const Path *path) noexcept nogil:
    """After a node went from the end of a path, see to its chunk, and those above it, if they are thin. O(log n).

    The path leads nowhere then.
    """
    cdef Chunk *chunk
    cdef Chunk *above
    cdef Chunk *before
    cdef uint32_t level, index
    for level in range(zset.height):
        chunk = path.chunks[level]
        above = path.chunks[level + 1]
        index = path.indexes[level + 1]
        if chunk.count > THIN:
            return
        if chunk.count == 0:
            before = _chunk_before(zset, path, level)
            if before != NULL:
                before.next = chunk.next
            elif level == 0:
                zset.first = chunk.next
            _free_chunk(zset, chunk, level > 0)
            _take_link(above, index)
        elif index + 1 < above.count and chunk.count + chunks_of(above)[index + 1].count <= JOINED:
            _join(zset, above, index + 1, level > 0)
        elif index > 0 and chunk.count + chunks_of(above)[index - 1].count <= JOINED:
            _join(zset, above, index, level > 0)
        else:
            return
    while zset.height and zset.root.count == 1:
        chunk = zset.root
        zset.root = chunks_of(chunk)[0]
        zset.height -= 1
        _free_chunk(zset, chunk, True)


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
    if path.chunks[0].count == path.chunks[0].room and not _make_place(zset, &path):
        return False
    if zset.table == NULL and zset.count >= LARGE and not _make_table(zset):
        return False
    if zset.table != NULL and not table_add(
        zset.table, table_hash(zset.table, key_of(node), node.size), node
    ):
        return False
    _put_in(path.chunks[0], path.indexes[0], node, node.second.score)
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
    _take_out(path.chunks[0], path.indexes[0])
    _count_on(zset, &path, <size_t>-1)
    zset.count -= 1
    zset.bytes -= node_bytes(node.size)
    _thin_out(zset, &path)
    if zset.table != NULL:
        table_remove(
            zset.table, table_hash(zset.table, key_of(node), node.size), table_slot(zset.table, node)
        )
        if zset.count < LARGE // 2:
            table_free(zset.table)
            free(zset.table)
            zset.table = NULL
    if zset.count <= THIN and zset.height == 0 and zset.first.room > 2 * THIN:
        _resize_first(zset, 2 * THIN)  # without memory it stays as it is, until the next one goes


cdef inline bint zset_move(Zset *zset, Item *node, double score) noexcept nogil:
    """Give ``node`` another score; False, and nothing that matters done, if there is no memory. O(log n)."""
    cdef Path path
    cdef Path to
    cdef Chunk *chunk
    _seek_both(zset, node, &path, score, &to)
    if path.chunks[0] != to.chunks[0] and to.chunks[0].count == CHUNK:
        if not _split(zset, &to):
            return False
        _seek_both(zset, node, &path, score, &to)
    if path.chunks[0] == to.chunks[0]:
        chunk = path.chunks[0]
        _take_out(chunk, path.indexes[0])
        _put_in(chunk, to.indexes[0] - (to.indexes[0] > path.indexes[0]), node, score)
        node.second.score = score
        return True
    _take_out(path.chunks[0], path.indexes[0])
    _count_on(zset, &path, <size_t>-1)
    _put_in(to.chunks[0], to.indexes[0], node, score)
    _count_on(zset, &to, 1)
    node.second.score = score
    _thin_out(zset, &path)
    return True


cdef inline Item *_last_below(Chunk *chunk, uint32_t level) noexcept nogil:
    while level:
        chunk = chunks_of(chunk)[chunk.count - 1]
        level -= 1
    return nodes_of(chunk)[chunk.count - 1]


cdef inline const char *_level_flaw(
    const Zset *zset, uint32_t level, Chunk *chunk, Chunk *below, size_t *bytes
) noexcept nogil:
    """Return what is wrong with a level of links, whose first chunk and that of the level below these are, or NULL."""
    cdef Chunk *before = NULL
    cdef uint32_t i
    while chunk != NULL:
        if chunk.count == 0 or chunk.count > CHUNK or chunk.room != CHUNK:
            return "sorted set: a chunk of links with no link, or with other measures"
        for i in range(chunk.count):
            if chunks_of(chunk)[i] != below:
                return "sorted set: a link that misses a chunk"
            if spans_of(chunk)[i] != _nodes_below(below, 0, level > 1):
                return "sorted set: a wrong span"
            if i and not (
                _last_below(before, level - 1).second.score
                <= scores_of(chunk)[i]
                <= _first_below(below, level - 1).second.score
            ):
                return "sorted set: a link whose score parts nothing"
            before = below
            below = below.next
        bytes[0] += chunk_size(_chunk_size(CHUNK, True))
        chunk = chunk.next
    if below != NULL:
        return "sorted set: a chunk without a link"
    return NULL


cdef inline const char *zset_flaw(const Zset *zset) noexcept nogil:
    """Return what is wrong with the set, or NULL. O(n log n)."""
    cdef Chunk *first[LEVELS + 1]
    cdef Chunk *chunk
    cdef Item *node
    cdef Item *before = NULL
    cdef size_t count = 0, total = 0
    cdef uint32_t level, i
    cdef double score
    cdef const char *flaw
    if zset.height > LEVELS or zset.root.next != NULL or (zset.height and zset.root.count < 2):
        return "sorted set: a root that is none"
    first[zset.height] = zset.root
    for level in range(zset.height, 0, -1):
        first[level - 1] = chunks_of(first[level])[0]
    if first[0] != zset.first:
        return "sorted set: the first link does not lead to the first chunk"
    chunk = zset.first
    while chunk != NULL:
        if chunk.count == 0 and zset.count:
            return "sorted set: an empty chunk"
        if chunk.count > chunk.room or chunk.room > CHUNK or (zset.height and chunk.room != CHUNK):
            return "sorted set: a chunk with other measures"
        total += chunk_size(_chunk_size(chunk.room, False))
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
            before = node
        chunk = chunk.next
    for level in range(1, zset.height + 1):
        flaw = _level_flaw(zset, level, first[level], first[level - 1], &total)
        if flaw != NULL:
            return flaw
    if count != zset.count or total != zset.bytes:
        return "sorted set: count or bytes are wrong"
    count = 0
    chunk = zset.first
    while chunk != NULL:
        for i in range(chunk.count):
            if zset_rank(zset, nodes_of(chunk)[i]) != count:
                return "sorted set: a member of another rank"
            count += 1
        chunk = chunk.next
    if zset.table == NULL and count > LARGE:
        return "sorted set: large without a table"
    if zset.table != NULL and count < LARGE // 2:
        return "sorted set: small with a table"
    if zset.table != NULL and zset.table.count != count:
        return "sorted set: its table has another count"
    return table_flaw(zset.table) if zset.table != NULL else NULL
