"""What lies ahead of the request that is run, or of the record that is replayed.

Each is parsed once, AHEAD requests early, and the memory that it will need is fetched meanwhile, in steps, each so
many requests early that what the last one asked for has arrived: its chain in the table; its entry; the entry's
neighbours in the ring, and the sorted set that it has; a member's chain in that set; the member's node. All of
them are hints: a request may change what the ones behind it will find.
"""

from libc.stdint cimport uint8_t, uint32_t

from imds._kernel.entry cimport is_set, size_of, value_of, zset_of
from imds._kernel.memory cimport get_u32
from imds._kernel.request cimport Request, Token, parse, skip
from imds._kernel.skiplist cimport Zset, node_fetch, zset_fetch
from imds._kernel.table cimport Bucket, Item, Table, chain_of, fetch, table_guess, table_hash

cdef enum:
    MAX_COUNT = 1 << 24  # requests in one envelope
    REQUEST_HEADER = 16  # bytes of imds/envelope.py's header
    RECORD_HEADER = 20
    BROKEN = 1           # an envelope's size, for one that no router makes

cdef enum:
    AHEAD = 16
    ENTRY_AHEAD = 12
    AROUND_AHEAD = 8
    CHAIN_AHEAD = 6
    NODE_AHEAD = 3

ctypedef struct Reader:
    const uint8_t *data
    size_t size
    size_t pos               # of the next envelope
    const uint8_t *at        # the next request of this one; NULL: it is malformed from here on
    const uint8_t *end
    uint32_t left            # requests of this envelope
    size_t read
    Request requests[AHEAD]

ctypedef struct Keys:        # those of one request
    Request *only            # of which this is the only key, or NULL
    Token last               # that was read
    uint32_t step            # tokens from one to the next
    uint32_t left            # to be read
    size_t run               # how many were returned
    Reader reader            # has each as a request of its own


cdef inline size_t envelope_size(const uint8_t *data, size_t size, size_t pos) noexcept nogil:
    """Return the bytes of the envelope at ``pos``, 0 if it is cut short, BROKEN if no router makes it."""
    cdef uint32_t length, count
    if size - pos < REQUEST_HEADER:
        return 0
    length = get_u32(data + pos)
    count = get_u32(data + pos + 8)
    if length < 12 or count > MAX_COUNT or count > (length - 12) // 4 or get_u32(data + pos + 12) != 0:
        return BROKEN
    return 4 + <size_t>length if length <= size - pos - 4 else 0


cdef inline void read_ahead(Reader *reader, const Table *table) noexcept nogil:
    """Read one request more, if there is one."""
    cdef size_t size
    while reader.left == 0:
        size = envelope_size(reader.data, reader.size, reader.pos)
        if size == 0 or size == BROKEN:
            return
        reader.left = get_u32(reader.data + reader.pos + 8)
        reader.at = reader.data + reader.pos + REQUEST_HEADER
        reader.pos += size
        reader.end = reader.data + reader.pos
    reader.left -= 1
    reader.at = take_request(reader, reader.at, reader.end, table)


cdef inline const uint8_t *take_request(
    Reader *reader, const uint8_t *at, const uint8_t *end, const Table *table
) noexcept nogil:
    """Make the request at ``at`` the next one, and have its chain fetched; return as :func:`parse` does."""
    cdef Request *request = &reader.requests[reader.read % AHEAD]
    reader.read += 1
    at = parse(at, end, request)
    begin_request(request, table)
    return at


cdef inline void begin_request(Request *request, const Table *table) noexcept nogil:
    """Have the chain of a request's key fetched."""
    request.entry = NULL
    request.member_hash = 0
    if request.frame != NULL and request.count > 1:
        request.hash = table_hash(table, request.tokens[1].at, request.tokens[1].size)
        fetch(chain_of(table, request.hash))


cdef inline void fetch_entry_in(Request *request, const Bucket *bucket) noexcept nogil:
    """Have the entry of a request fetched, if it is in this bucket, which has arrived."""
    request.entry = table_guess(bucket, request.hash)
    if request.entry != NULL:
        fetch(request.entry)
        fetch(<uint8_t *>request.entry + 64)


cdef inline void fetch_entry(Request *request, const Table *table) noexcept nogil:
    """Have the entry of a request fetched, whose chain has arrived, or the chain's next bucket."""
    cdef const Bucket *bucket
    if request.frame != NULL and request.count > 1:
        bucket = chain_of(table, request.hash)
        fetch_entry_in(request, bucket)
        if request.entry == NULL and bucket.more != NULL:
            fetch(bucket.more)


cdef inline void fetch_around(Request *request, const Table *table) noexcept nogil:
    """Have fetched what belongs to an entry that has arrived, or the entry itself, if it is in a second bucket."""
    cdef const Bucket *bucket
    cdef Item *entry = request.entry
    if entry != NULL:
        fetch(entry.next)
        fetch(entry.second.older)
        if is_set(entry):
            fetch(zset_of(entry))
        else:
            fetch(value_of(entry) + size_of(entry))  # where a string of usual size ends
    elif request.frame != NULL and request.count > 1:
        bucket = chain_of(table, request.hash).more
        if bucket != NULL:
            fetch_entry_in(request, bucket)


cdef inline void fetch_chain(Request *request) noexcept nogil:
    """Have the chain of a member fetched, in a sorted set that has arrived."""
    cdef const Token *member
    cdef const Zset *zset
    if request.entry != NULL and is_set(request.entry):
        member = member_of(request)
        zset = zset_of(request.entry)
        if member != NULL and zset.table != NULL:
            request.member_hash = table_hash(zset.table, member.at, member.size)
            fetch(chain_of(zset.table, request.member_hash))


cdef inline void fetch_node(Request *request) noexcept nogil:
    """Have the node fetched of a member whose chain has arrived."""
    cdef Item *node
    cdef const Zset *zset
    if request.member_hash and is_set(request.entry):
        zset = zset_of(request.entry)
        if zset.table != NULL:
            node = table_guess(chain_of(zset.table, request.member_hash), request.member_hash)
            if node != NULL:
                node_fetch(node)
                zset_fetch(zset)


cdef inline const Token *member_of(const Request *request) noexcept nogil:
    """Return the member of ``zadd key score member``, ``zrank`` and others of their form, or NULL."""
    cdef const Token *name = &request.tokens[0]
    if request.frame == NULL or name.size < 4 or name.size > 6 or name.at[0] | 32 != c"z":
        return NULL
    if request.count == 4 and name.size == 4:
        return &request.tokens[3]
    if request.count == 3:
        return &request.tokens[2]
    return NULL


cdef inline void look_ahead(Reader *reader, size_t run, const Table *table) noexcept nogil:
    """Before request ``run`` is run: have fetched, for those that were read after it, what each needs next."""
    cdef size_t i
    if run == 0:  # nobody has looked ahead for the first ones
        for i in range(min(<size_t>ENTRY_AHEAD, reader.read)):
            fetch_entry(&reader.requests[i], table)
        for i in range(min(<size_t>AROUND_AHEAD, reader.read)):
            fetch_around(&reader.requests[i], table)
        for i in range(min(<size_t>CHAIN_AHEAD, reader.read)):
            fetch_chain(&reader.requests[i])
        for i in range(min(<size_t>NODE_AHEAD, reader.read)):
            fetch_node(&reader.requests[i])
    if run + ENTRY_AHEAD < reader.read:
        fetch_entry(&reader.requests[(run + ENTRY_AHEAD) % AHEAD], table)
    if run + AROUND_AHEAD < reader.read:
        fetch_around(&reader.requests[(run + AROUND_AHEAD) % AHEAD], table)
    if run + CHAIN_AHEAD < reader.read:
        fetch_chain(&reader.requests[(run + CHAIN_AHEAD) % AHEAD])
    if run + NODE_AHEAD < reader.read:
        fetch_node(&reader.requests[(run + NODE_AHEAD) % AHEAD])


cdef inline void begin_keys(Keys *keys, Request *request, uint32_t step) noexcept nogil:
    """Have :func:`next_key` return the keys of a request: each ``step``-th token, from the one behind the name on."""
    keys.left = (request.count - 1) // step
    keys.only = request if keys.left == 1 else NULL
    keys.last = request.tokens[0]
    keys.step = step
    keys.run = keys.reader.read = 0


cdef inline Request *next_key(Keys *keys, const Table *table) noexcept nogil:
    """Return a key that there is as a request of its own: tokens[1], and its hash; those behind it are looked ahead for."""
    cdef size_t run = keys.run
    cdef Request *one
    cdef uint32_t i
    if keys.only != NULL:
        return keys.only
    while keys.left and keys.reader.read < run + AHEAD:
        for i in range(keys.step if keys.reader.read else 1):
            skip(&keys.last)
        one = &keys.reader.requests[keys.reader.read % AHEAD]
        one.frame = keys.last.at
        one.count = 2
        one.tokens[0].size = 0
        one.tokens[1] = keys.last
        begin_request(one, table)
        keys.reader.read += 1
        keys.left -= 1
    look_ahead(&keys.reader, run, table)
    keys.run += 1
    return &keys.reader.requests[run % AHEAD]


cdef inline void read_record(Reader *reader, const Table *table) noexcept nogil:
    """Read one record more: its first effect, which is mostly all of it, becomes a request."""
    cdef const uint8_t *at = reader.data + reader.pos
    cdef size_t left = reader.size - reader.pos
    cdef size_t length = 0
    if left >= RECORD_HEADER and get_u32(at + 8) <= left - RECORD_HEADER:
        length = get_u32(at + 8)
        at += RECORD_HEADER
        reader.pos += RECORD_HEADER + length
    else:
        reader.pos = reader.size  # what is left is no record, and no request
    take_request(reader, at, at + length, table)
