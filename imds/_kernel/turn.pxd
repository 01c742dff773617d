"""Turns and links, as ``switch.pyx`` draws and describes them."""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from imds._kernel cimport memory
from imds._kernel.memory cimport get_u32, set_u32
from imds._kernel.stream cimport Stream, stream_free

cdef enum:
    REQUEST_HEADER = 16  # length, ticket, count, dialect
    REPLY_HEADER = 12  # length, ticket, count
    LENGTH = 4  # of which the length does not count itself

ctypedef struct Group:
    uint8_t *data  # owned; NULL before the replies have come and after they have been emitted
    size_t size
    size_t read
    uint32_t count
    bint arrived

ctypedef struct Turn:
    # Behind it in the same block: Group[groups], then uint16_t order[count].
    PyObject *client  # borrowed; NULL once the client is gone
    Turn *next  # in the client's queue
    uint32_t references
    uint32_t count
    uint32_t emitted
    uint32_t groups


cdef inline Group *groups_of(Turn *turn) noexcept nogil:
    return <Group *>(turn + 1)


cdef inline uint16_t *order_of(Turn *turn) noexcept nogil:
    return <uint16_t *>(groups_of(turn) + turn.groups)


cdef inline Turn *turn_new(uint32_t groups, uint32_t count) noexcept nogil:
    """Return a turn with empty groups, or NULL."""
    cdef size_t head = sizeof(Turn) + groups * sizeof(Group)
    cdef Turn *turn = <Turn *>memory.alloc(head + count * sizeof(uint16_t))
    if turn != NULL:
        memset(turn, 0, head)
        turn.groups = groups
        turn.count = count
    return turn


cdef inline void turn_release(Turn *turn) noexcept nogil:
    """Give up one reference."""
    cdef uint32_t index
    turn.references -= 1
    if turn.references == 0:
        for index in range(turn.groups):
            memory.free(groups_of(turn)[index].data)
        memory.free(turn)


cdef inline bint holds_replies(const uint8_t *data, size_t size, uint32_t count) noexcept nogil:
    """Whether ``data[:size]`` is exactly ``count`` reply frames. O(count)."""
    cdef uint64_t length
    while count:
        if size < 4:
            return False
        length = 4 + <uint64_t>get_u32(data)
        if length > size:
            return False
        data += length
        size -= <size_t>length
        count -= 1
    return size == 0


cdef inline bint group_fill(Group *group, const uint8_t *data, size_t size) noexcept nogil:
    """Copy a group's replies, which ``holds_replies`` accepted; whether there was memory for them."""
    group.data = <uint8_t *>memory.alloc(size)
    if group.data == NULL:
        return False
    memcpy(group.data, data, size)
    group.size = size
    group.arrived = True
    return True


ctypedef struct Pending:
    # An envelope under way.
    Turn *turn  # NULL: a question of the router's own, its token is the next in ``Switch._tokens``
    uint64_t end  # value of ``Link.queued`` after it
    uint32_t count
    uint32_t group  # of the turn

ctypedef struct Link:
    bint up
    int fd  # -1: the switch has not been told
    const uint8_t *down  # the reply while it is not; owned by ``Switch._down``
    size_t down_size
    Stream out
    Stream rest  # a reply envelope of which the end has not arrived
    size_t need  # bytes of ``rest`` below which looking at it is in vain
    uint64_t queued  # bytes ever put into ``out`` since the link came up
    uint64_t sent  # bytes of those that the socket has taken
    uint32_t ticket  # of the next envelope
    uint32_t due  # ticket of the first pending one
    uint32_t noticed  # number of the next notice
    Pending *ring  # of ``room`` places, a power of two; ``pending`` are taken, from ``first`` on
    size_t room
    size_t first
    size_t pending
    # For the turn that is being built:
    int group  # -1: it has nothing for this shard
    uint32_t count  # requests
    size_t header  # where in ``out`` the envelope begins, counted from its front


cdef inline Pending *link_pending(Link *link, size_t index) noexcept nogil:
    return &link.ring[(link.first + index) & (link.room - 1)]


cdef inline bint link_reserve(Link *link) noexcept nogil:
    """Make room for one more pending envelope; whether there is."""
    cdef size_t room, index
    cdef Pending *ring
    if link.pending < link.room:
        return True
    room = 2 * link.room if link.room else 16
    ring = <Pending *>memory.alloc(room * sizeof(Pending))
    if ring == NULL:
        return False
    for index in range(link.pending):
        ring[index] = link_pending(link, index)[0]
    memory.free(link.ring)
    link.ring = ring
    link.room = room
    link.first = 0
    return True


cdef inline void link_push(
    Link *link, Turn *turn, uint32_t group, uint32_t count, size_t size
) noexcept nogil:
    """Note that an envelope of ``size`` bytes has been completed. The ring has room."""
    cdef Pending *entry = link_pending(link, link.pending)
    link.queued += size
    entry.turn = turn
    entry.group = group
    entry.count = count
    entry.end = link.queued
    link.pending += 1
    link.ticket += 1


cdef inline void link_pop(Link *link) noexcept nogil:
    link.first = (link.first + 1) & (link.room - 1)
    link.pending -= 1


cdef inline void put_header(
    uint8_t *at, size_t body, uint32_t ticket, uint32_t count, uint32_t dialect
) noexcept nogil:
    set_u32(at, <uint32_t>(REQUEST_HEADER - LENGTH + body))
    set_u32(at + 4, ticket)
    set_u32(at + 8, count)
    set_u32(at + 12, dialect)


cdef inline void link_reset(Link *link, bint up, int fd, uint32_t ticket) noexcept nogil:
    """Make it a new stream. Nothing is pending."""
    stream_free(&link.out)
    stream_free(&link.rest)
    memory.free(link.ring)
    memset(link, 0, sizeof(Link))
    link.up = up
    link.fd = fd
    link.ticket = link.due = ticket
    link.need = REPLY_HEADER
    link.group = -1
