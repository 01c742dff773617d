"""UnifiedStore: the compiled twin of ``imds/shard/store.py``, which says what it does and in what order.

What this file adds to the twin's rules:

* All data is in C memory: entries (``entry.pxd``) in a table (``table.pxd``) and in a ring for the order of use, sorted
  sets as skip lists (``skiplist.pxd``). An item has one owner: the table, a set, or the undo list.
* A command first makes sure of the memory for its record and its undo, then changes the data, then writes the
  record: when memory ends, the command answers OOM and nothing has happened but evictions.
* ``used`` counts what glibc's malloc takes for entries and nodes, and TABLE_SHARE bytes for a place in a table.
* Pointers into a table last until the table changes: an eviction changes it.
* No operation takes long but by what it answers: the table grows by one chain at a time, and a large set that is
  gone is freed in the course of the requests that follow, FREED nodes in each.
"""

from os import urandom

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from imds._kernel cimport memory
from imds._kernel.entry cimport (
    IS_SET,
    entry_bytes,
    entry_cost,
    entry_free,
    entry_new,
    is_set,
    ring_add,
    ring_remove,
    ring_touch,
    value_of,
    zset_of,
)
from imds._kernel.memory cimport (
    Buffer,
    alloc_grow,
    buffer_empty,
    buffer_put,
    buffer_put_u32,
    buffer_reserve,
    free,
    get_u32,
    get_u64,
    set_u32,
    set_u64,
)
from imds._kernel.number cimport SCORE_TEXT, read_score, write_digits, write_score
from imds._kernel.record cimport RecordEncoder
from imds._kernel.skiplist cimport (
    Zset,
    node_free,
    zset_add,
    zset_attach,
    zset_cost,
    zset_cost_with,
    zset_detach,
    zset_dice,
    zset_find,
    zset_first,
    zset_flaw,
    zset_free,
    zset_free_some,
    zset_move,
    zset_new,
    zset_rank,
)
from imds._kernel.table cimport (
    Item,
    Table,
    chain_of,
    fetch,
    item_in,
    key_of,
    table_add,
    table_find,
    table_flaw,
    table_free,
    table_guess,
    table_hash,
    table_init,
    table_put,
    table_remove,
    table_slot,
)
from imds._kernel.xxh64 cimport xxh64

from imds.commands import COMMANDS, lookup
from imds.protocol import split_request
from imds.shard import store as _twin

cdef enum:
    MISSING = 1          # statuses of imds/protocol.py
    REQUEST_HEADER = 16  # bytes of imds/envelope.py's headers
    REPLY_HEADER = 12
    RECORD_HEADER = 20
    MOST_TOKENS = 4      # that any command here looks at
    MANY = 1024          # members of a set that is not freed at once
    FREED = 64           # of its nodes, at each request
    ROOM = 256           # bytes of reply buffer that each command finds free
    BROKEN = 1           # an envelope's size, for one that no router makes


ctypedef struct Token:
    const uint8_t *at
    size_t size

ctypedef struct Request:
    const uint8_t *frame     # NULL: malformed
    size_t size
    uint32_t count
    Token tokens[MOST_TOKENS]
    uint64_t hash            # of the key, if there are two tokens or more
    Item *entry              # where the key was found ahead of time, or NULL: a hint

# What lies ahead of the request that is run: each is parsed once, AHEAD requests early, and the memory that it will
# need is fetched meanwhile, in three steps: its chain in the table, its entry, its neighbours in the ring.
cdef enum:
    AHEAD = 16

ctypedef struct Reader:
    const uint8_t *data
    size_t size
    size_t pos               # of the next envelope
    const uint8_t *at        # the next request of this one; NULL: it is malformed from here on
    const uint8_t *end
    uint32_t left            # requests of this envelope
    size_t read
    Request requests[AHEAD]

# Commands that are not here, unknown ones and those of the process, are answered by Python.
cdef enum Name:
    COLD, GET, SET, DEL, ZADD, ZRANGE, ZRANK, ZREM

ctypedef struct Row:
    const char *name
    size_t size
    Name command
    uint32_t tokens  # these three from the table of commands, by _read_table()
    bint write

cdef Row[7] ROWS = [
    Row("get", 3, GET, 0, 0),
    Row("set", 3, SET, 0, 0),
    Row("del", 3, DEL, 0, 0),
    Row("zadd", 4, ZADD, 0, 0),
    Row("zrange", 6, ZRANGE, 0, 0),
    Row("zrank", 5, ZRANK, 0, 0),
    Row("zrem", 4, ZREM, 0, 0),
]


def _read_table():
    for i in range(7):
        command = COMMANDS[ROWS[i].name.decode()]
        assert command.min_tokens == command.max_tokens <= MOST_TOKENS
        ROWS[i].tokens = command.min_tokens
        ROWS[i].write = command.write
    assert sum(command.in_store for command in COMMANDS.values()) == 7


_read_table()

# Whole reply frames.
cdef bytes DONE = _twin._DONE
cdef bytes NONE = _twin._NONE
cdef bytes WRONG_TYPE = _twin._WRONG_TYPE
cdef bytes BAD_SCORE = _twin._BAD_SCORE
cdef bytes OUT_OF_MEMORY = _twin._OUT_OF_MEMORY
cdef bytes TOO_LARGE = _twin._TOO_LARGE
cdef bytes UNKNOWN_COMMAND = _twin._UNKNOWN_COMMAND
cdef bytes WRONG_ARITY = _twin._WRONG_ARITY
cdef bytes MALFORMED = _twin._MALFORMED
cdef bytes TOO_LONG = _twin._TOO_LONG
cdef size_t SHORT = _twin.SHORT
cdef uint32_t MAX_COUNT = _twin.MAX_COUNT
assert max(map(len, (DONE, WRONG_TYPE, BAD_SCORE, OUT_OF_MEMORY, TOO_LARGE, MALFORMED, TOO_LONG))) <= SHORT < ROOM

# What rollback does. ADDED: free the entry. REPLACED: put ``other`` in its place. REMOVED: put it back. Then the
# same for a sorted set's node, which is ``other``.
cdef enum Change:
    ADDED, REPLACED, REMOVED, MEMBER_ADDED, MEMBER_MOVED, MEMBER_REMOVED

ctypedef struct Undo:
    Change change
    Item *entry
    Item *other
    double score


cdef const uint8_t *parse(const uint8_t *at, const uint8_t *end, Request *request) noexcept nogil:
    """Find the tokens of the request at ``at``; return where it ends, or NULL if it ends behind ``end``."""
    cdef uint32_t i
    cdef size_t size
    request.frame = NULL
    if at == NULL or end - at < 4:
        return NULL
    cdef const uint8_t *start = at
    request.count = get_u32(at)
    at += 4
    for i in range(request.count):
        if end - at < 4:
            return NULL
        size = get_u32(at)
        at += 4
        if <size_t>(end - at) < size:
            return NULL
        if i < MOST_TOKENS:
            request.tokens[i].at = at
            request.tokens[i].size = size
        at += size
    request.frame = start
    request.size = <size_t>(at - start)
    return at


cdef size_t envelope_size(const uint8_t *data, size_t size, size_t pos) noexcept nogil:
    """Return the bytes of the envelope at ``pos``, 0 if it is cut short, BROKEN if no router makes it."""
    cdef uint32_t length, count
    if size - pos < REQUEST_HEADER:
        return 0
    length = get_u32(data + pos)
    count = get_u32(data + pos + 8)
    if length < 12 or count > MAX_COUNT or count > (length - 12) // 4 or get_u32(data + pos + 12) != 0:
        return BROKEN
    return 4 + <size_t>length if length <= size - pos - 4 else 0


cdef void read_ahead(Reader *reader, const Table *table) noexcept nogil:
    """Read one request more, if there is one, and have its chain fetched."""
    cdef Request *request = &reader.requests[reader.read % AHEAD]
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
    reader.read += 1
    reader.at = parse(reader.at, reader.end, request)
    request.entry = NULL
    if reader.at != NULL and request.count > 1:
        request.hash = table_hash(table, request.tokens[1].at, request.tokens[1].size)
        fetch(chain_of(table, request.hash))


cdef void fetch_entry(Request *request, const Table *table) noexcept nogil:
    """Have the entry of a request fetched, whose chain has arrived."""
    if request.frame != NULL and request.count > 1:
        request.entry = table_guess(table, request.hash)
        if request.entry != NULL:
            fetch(request.entry)
            fetch(<uint8_t *>request.entry + 64)


cdef void fetch_neighbours(const Request *request) noexcept nogil:
    """Have the ring's memory fetched around an entry that has arrived. No entry is freed while requests run."""
    if request.entry != NULL:
        fetch(request.entry.next)
        fetch(request.entry.second.older)


cdef const Row *find_row(const Token *name) noexcept nogil:
    """Return the row of the command called ``name`` in any mixture of cases, or NULL."""
    cdef int i
    cdef size_t j
    for i in range(7):
        if ROWS[i].size == name.size:
            j = 0
            while j < name.size and name.at[j] | 0x20 == <uint8_t>ROWS[i].name[j]:
                j += 1
            if j == name.size:
                return &ROWS[i]
    return NULL


cdef class UnifiedStore:
    """The data of one shard; see the twin for arguments and attributes."""

    cdef public RecordEncoder log
    cdef public bytes readonly
    cdef public uint64_t capacity, maxmemory, max_response
    cdef public bint evict
    cdef readonly uint64_t used, ops, hits, misses, evictions
    cdef object _hooks
    cdef Table _table
    cdef Item _ring
    cdef Buffer _out
    cdef size_t _replies     # where the replies of the running envelope begin in _out
    cdef Undo *_undo
    cdef size_t _undo_count, _undo_room
    cdef uint64_t _evicted   # since the last commit
    cdef uint64_t _changes   # calls that may have changed data or order, for entries()
    cdef uint64_t _dice
    cdef bint _replaying
    cdef Zset *_gone         # large sets that are being freed
    cdef readonly size_t dying  # how many

    def __cinit__(self):
        self._ring.next = self._ring.second.older = &self._ring
        self._dice = int.from_bytes(urandom(8), "big") | 1
        if not table_init(&self._table, int.from_bytes(urandom(8), "big")):
            raise MemoryError

    def __init__(self, RecordEncoder log not None, *, capacity=0, maxmemory=0, evict=False, hooks=None):
        self.log = log
        self.capacity = capacity
        self.maxmemory = maxmemory
        self.evict = evict
        self.max_response = _twin.MAX_RESPONSE
        self._hooks = dict(hooks or {})

    def __dealloc__(self):
        cdef Item *entry = self._ring.next
        cdef Item *next
        self._forget()
        while self._gone != NULL:
            self._free_some(<size_t>-1)
        while entry != &self._ring:
            next = entry.next
            entry_free(entry)
            entry = next
        table_free(&self._table)
        free(self._undo)
        free(self._out.data)

    @property
    def keys(self):
        """How many keys there are."""
        return self._table.count

    # ---- batches ---------------------------------------------------------------------------------

    def execute(self, data):
        """Run the whole envelopes in ``data``; return how many bytes they took, and the reply envelopes."""
        cdef Py_buffer view
        cdef size_t used
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._changes += 1
            self._out.size = 0
            used = self._run(<const uint8_t *>view.buf, <size_t>view.len)
            return used, PyBytes_FromStringAndSize(<const char *>self._out.data, <Py_ssize_t>self._out.size)
        finally:
            PyBuffer_Release(&view)
            buffer_empty(&self._out)

    cdef size_t _run(self, const uint8_t *data, size_t size) except? 0:
        cdef size_t pos = 0, envelope, total, run = 0
        cdef uint32_t count, done
        cdef Reader reader
        cdef Request *request
        reader.data = data
        reader.size = size
        reader.pos = reader.read = reader.left = 0
        while True:
            envelope = envelope_size(data, size, pos)
            if envelope == BROKEN and pos == 0:
                raise ValueError(f"no router sends an envelope that begins with {data[:REQUEST_HEADER]!r}")
            if envelope == BROKEN or envelope == 0:
                return pos
            count = get_u32(data + pos + 8)
            self.ops += count
            self._reserve_reply(REPLY_HEADER)
            self._out.size += REPLY_HEADER
            self._replies = self._out.size
            for done in range(count):
                while reader.read < run + AHEAD:
                    total = reader.read
                    read_ahead(&reader, &self._table)
                    if reader.read == total:
                        break
                if run + AHEAD // 2 < reader.read:
                    fetch_entry(&reader.requests[(run + AHEAD // 2) % AHEAD], &self._table)
                if run + AHEAD // 4 < reader.read:
                    fetch_neighbours(&reader.requests[(run + AHEAD // 4) % AHEAD])
                request = &reader.requests[run % AHEAD]
                run += 1
                self._reserve_reply(ROOM)
                if request.frame == NULL:
                    self._reply(MALFORMED)
                else:
                    self._answer(request)
            total = self._out.size - self._replies
            if total > 0xFFFFFFFF - 8:
                raise OverflowError("the replies to one envelope are 4 GiB or more")
            set_u32(self._out.data + self._replies - 12, <uint32_t>total + 8)
            set_u32(self._out.data + self._replies - 8, get_u32(data + pos + 4))
            set_u32(self._out.data + self._replies - 4, count)
            pos += envelope

    cdef int _answer(self, Request *request) except -1:
        """Run one request; its reply, or at least ROOM bytes of it, fits into the buffer."""
        cdef const Row *row
        if self._gone != NULL:
            self._free_some(FREED)
        if request.count == 0:
            self._reply(UNKNOWN_COMMAND)
            return 0
        row = find_row(&request.tokens[0])
        if row == NULL:
            self._cold(request)
        elif request.count != row.tokens:
            self._reply(WRONG_ARITY)
        elif row.write and self.readonly is not None:
            self._reserve_reply(<size_t>len(self.readonly))
            self._reply(self.readonly)
        elif row.command == GET:
            self._get(request)
        elif row.command == SET:
            self._set(request)
        elif row.command == DEL:
            self._del(request)
        elif row.command == ZADD:
            self._zadd(request)
        elif row.command == ZRANGE:
            self._zrange(request)
        elif row.command == ZRANK:
            self._zrank(request)
        else:
            self._zrem(request)
        return 0

    cdef int _cold(self, Request *request) except -1:
        """Answer what is no command of the store."""
        cdef bytes name, frame
        cdef list tokens
        frame = UNKNOWN_COMMAND
        if self._hooks and request.tokens[0].size <= 64:
            name = request.tokens[0].at[: request.tokens[0].size]
            command = lookup(name)
            hook = self._hooks.get(command.name if command is not None else name.decode(errors="replace"))
            if hook is not None and command is not None and not command.arity_ok(request.count):
                frame = WRONG_ARITY
            elif hook is not None:
                tokens, _ = split_request(<bytes>request.frame[: request.size])
                frame = hook(tokens[1:])
        self._reserve_reply(<size_t>len(frame))
        if self._too_long(<size_t>len(frame)):
            frame = TOO_LONG
        self._reply(frame)
        return 0

    def run(self, bytes frame not None):
        """Run one request, given as its frame, in the midst of the batch: for hooks; return the reply frame."""
        cdef Request request
        cdef const uint8_t *data = <const uint8_t *><char *>frame
        cdef const uint8_t *end = data + <size_t>len(frame)
        cdef size_t before = self._out.size
        cdef size_t replies = self._replies
        if parse(data, end, &request) != end or request.frame == NULL:
            return MALFORMED
        request.entry = NULL
        if request.count > 1:
            request.hash = table_hash(&self._table, request.tokens[1].at, request.tokens[1].size)
        self._changes += 1
        self._replies = before
        self._reserve_reply(ROOM)
        try:
            self._answer(&request)
            return PyBytes_FromStringAndSize(
                <const char *>self._out.data + before, <Py_ssize_t>(self._out.size - before)
            )
        finally:
            self._out.size = before
            self._replies = replies

    # ---- replies ---------------------------------------------------------------------------------

    cdef inline int _reserve_reply(self, size_t size) except -1:
        if not buffer_reserve(&self._out, size):
            raise MemoryError
        return 0

    cdef inline void _reply(self, bytes frame) noexcept:
        """Append a whole frame, for which there is room."""
        buffer_put(&self._out, <char *>frame, <size_t>len(frame))

    cdef inline bint _too_long(self, size_t size) noexcept:
        """Whether a reply frame of ``size`` bytes may not be sent."""
        return size > SHORT and self._out.size - self._replies + size > self.max_response

    # ---- commands --------------------------------------------------------------------------------

    cdef int _get(self, Request *request) except -1:
        cdef Item *entry = self._read(request)
        if entry == NULL:
            self._reply(NONE)
        elif is_set(entry):
            self._reply(WRONG_TYPE)
        elif self._too_long(8 + <size_t>entry.extra):
            self._reply(TOO_LONG)
        else:
            self._reserve_reply(8 + <size_t>entry.extra)
            buffer_put_u32(&self._out, 4 + entry.extra)
            buffer_put_u32(&self._out, 0)
            buffer_put(&self._out, value_of(entry), entry.extra)
        return 0

    cdef int _set(self, Request *request) except -1:
        cdef Token *key = &request.tokens[1]
        cdef Token *value = &request.tokens[2]
        cdef Item *old = self._find(request)
        cdef size_t cost = entry_bytes(key.size, value.size)
        cdef int64_t change = <int64_t>cost - (<int64_t>entry_cost(old) if old != NULL else 0)
        cdef Item *entry
        if not self._make_room(old == NULL, change, cost):
            return 0
        entry = entry_new(key.at, key.size, value.at, value.size, <uint32_t>value.size)
        if entry == NULL or not self._reserve(request.size):
            free(entry)
            self._reply(OUT_OF_MEMORY)
            return 0
        if old != NULL:
            table_put(table_slot(&self._table, old), entry)
            ring_remove(old)
            self._remember(REPLACED, entry, old, 0)
        else:
            if not table_add(&self._table, request.hash, entry):
                free(entry)
                self._reply(OUT_OF_MEMORY)
                return 0
            self._remember(ADDED, entry, NULL, 0)
        ring_add(&self._ring, entry)
        self.used += change
        self._effect(request)
        return 0

    cdef int _del(self, Request *request) except -1:
        cdef Item *entry = self._find(request)
        if entry == NULL:
            self._reply(NONE)
        elif not self._reserve(request.size):
            self._reply(OUT_OF_MEMORY)
        else:
            self._drop(entry)
            self._effect(request)
        return 0

    cdef int _zadd(self, Request *request) except -1:
        cdef Token *key = &request.tokens[1]
        cdef Token *member = &request.tokens[3]
        cdef double score
        cdef Item *entry
        cdef Item *node
        cdef Zset *zset
        cdef size_t before
        if not read_score(request.tokens[2].at, request.tokens[2].size, &score):
            self._reply(BAD_SCORE)
            return 0
        entry = self._find(request)
        if entry == NULL:
            return self._zadd_new(request, score)
        if not is_set(entry):
            self._reply(WRONG_TYPE)
            return 0
        zset = zset_of(entry)
        node = zset_find(zset, member.at, member.size)
        if node != NULL:
            if node.second.score == score:
                self._reply(DONE)
            elif not self._reserve(request.size):
                self._reply(OUT_OF_MEMORY)
            else:
                self._remember(MEMBER_MOVED, entry, node, node.second.score)
                zset_move(zset, node, score)
                self._effect(request)
            return 0
        cdef uint32_t levels = zset_dice(zset, &self._dice)
        cdef size_t after = zset_cost_with(zset, member.size, levels)
        before = zset_cost(zset)
        if not self._make_room(
            False, <int64_t>(after - before), entry_bytes(key.size, sizeof(Zset *)) + after
        ):
            return 0
        if self._reserve(request.size):
            node = zset_add(zset, member.at, member.size, score, levels)
        self.used += zset_cost(zset) - before
        if node == NULL:
            self._reply(OUT_OF_MEMORY)
            return 0
        self._remember(MEMBER_ADDED, entry, node, 0)
        self._effect(request)
        return 0

    cdef int _zadd_new(self, Request *request, double score) except -1:
        """zadd to a key that is not here."""
        cdef Token *key = &request.tokens[1]
        cdef Token *member = &request.tokens[3]
        cdef Zset *zset = zset_new(self._table.seed)
        cdef Item *entry = NULL
        cdef size_t cost
        if zset == NULL or zset_add(
            zset, member.at, member.size, score, zset_dice(zset, &self._dice)
        ) == NULL:
            self._reply(OUT_OF_MEMORY)
        else:
            cost = entry_bytes(key.size, sizeof(Zset *)) + zset_cost(zset)
            if self._make_room(True, <int64_t>cost, cost):
                entry = entry_new(key.at, key.size, &zset, sizeof(zset), IS_SET)
                if entry != NULL and self._reserve(request.size) and table_add(&self._table, request.hash, entry):
                    ring_add(&self._ring, entry)
                    self.used += cost
                    self._remember(ADDED, entry, NULL, 0)
                    self._effect(request)
                    return 0
                self._reply(OUT_OF_MEMORY)
        free(entry)
        if zset != NULL:
            zset_free(zset)
        return 0

    cdef int _zrem(self, Request *request) except -1:
        cdef Token *member = &request.tokens[2]
        cdef Item *entry = self._find(request)
        cdef Item *node
        cdef Zset *zset
        if entry == NULL:
            self._reply(NONE)
            return 0
        if not is_set(entry):
            self._reply(WRONG_TYPE)
            return 0
        zset = zset_of(entry)
        node = zset_find(zset, member.at, member.size)
        if node == NULL:
            self._reply(NONE)
        elif not self._reserve(request.size):
            self._reply(OUT_OF_MEMORY)
        else:
            if zset.count == 1:
                self._drop(entry)
            else:
                self._remember(MEMBER_REMOVED, entry, node, 0)
                self.used -= zset_cost(zset)
                zset_detach(zset, node)
                self.used += zset_cost(zset)
            self._effect(request)
        return 0

    cdef int _zrange(self, Request *request) except -1:
        cdef double low, high
        cdef Item *entry
        cdef Item *node
        cdef size_t start
        if not (
            read_score(request.tokens[2].at, request.tokens[2].size, &low)
            and read_score(request.tokens[3].at, request.tokens[3].size, &high)
        ):
            self._reply(BAD_SCORE)
            return 0
        entry = self._read(request)
        if entry == NULL:
            self._reply(NONE)
            return 0
        if not is_set(entry):
            self._reply(WRONG_TYPE)
            return 0
        start = self._out.size
        self._out.size += 8
        node = zset_first(zset_of(entry), low)
        while node != NULL and node.second.score <= high:
            self._reserve_reply(SCORE_TEXT + 2 + <size_t>node.size)
            if self._out.size > start + 8:
                self._out.data[self._out.size] = c','
                self._out.size += 1
            self._out.size += write_score(self._out.data + self._out.size, node.second.score)
            self._out.data[self._out.size] = c':'
            self._out.size += 1
            buffer_put(&self._out, key_of(node), node.size)
            if self._out.size - start > SHORT and self._out.size - self._replies > self.max_response:
                self._out.size = start
                self._reply(TOO_LONG)
                return 0
            node = node.next
        if self._out.size == start + 8:
            self._out.size = start
            self._reply(NONE)
            return 0
        set_u32(self._out.data + start, <uint32_t>(self._out.size - start - 4))
        set_u32(self._out.data + start + 4, 0)
        return 0

    cdef int _zrank(self, Request *request) except -1:
        cdef Item *entry = self._read(request)
        cdef Item *node
        cdef size_t size
        if entry == NULL:
            self._reply(NONE)
        elif not is_set(entry):
            self._reply(WRONG_TYPE)
        else:
            node = zset_find(zset_of(entry), request.tokens[2].at, request.tokens[2].size)
            if node == NULL:
                self._reply(NONE)
            else:
                size = write_digits(self._out.data + self._out.size + 8, zset_rank(zset_of(entry), node))
                buffer_put_u32(&self._out, <uint32_t>(4 + size))
                buffer_put_u32(&self._out, 0)
                self._out.size += size
        return 0

    # ---- what commands are made of ---------------------------------------------------------------

    cdef inline Item *_find(self, const Request *request) noexcept:
        """Return the entry of the request's key, made the most recently used, or NULL."""
        cdef const Token *key = &request.tokens[1]
        cdef uint64_t *slot = table_find(&self._table, request.hash, key.at, key.size)
        if slot == NULL:
            return NULL
        ring_touch(&self._ring, item_in(slot[0]))
        return item_in(slot[0])

    cdef inline Item *_read(self, const Request *request) noexcept:
        """The same, counted as a hit or a miss."""
        cdef Item *entry = self._find(request)
        if entry == NULL:
            self.misses += 1
        else:
            self.hits += 1
        return entry

    cdef void _drop(self, Item *entry) noexcept:
        """Remove the entry, so that it can be put back; there is room for the undo."""
        cdef uint64_t hash = table_hash(&self._table, key_of(entry), entry.size)
        table_remove(&self._table, hash, table_slot(&self._table, entry))
        ring_remove(entry)
        self.used -= entry_cost(entry)
        self._remember(REMOVED, entry, NULL, 0)

    cdef bint _make_room(self, bint new, int64_t change, size_t alone) noexcept:
        """Evict until a write fits that counts ``change`` bytes more; False if the refusal has been replied."""
        cdef uint64_t capacity = self.capacity if new and not self._replaying else 0
        cdef uint64_t maxmemory = self.maxmemory if change > 0 and not self._replaying else 0
        while (capacity and self._table.count >= capacity) or (maxmemory and self.used + change > maxmemory):
            if maxmemory and alone > maxmemory:
                self._reply(TOO_LARGE)
                return False
            if not self.evict or not self._evict():
                self._reply(OUT_OF_MEMORY)
                return False
        return True

    cdef bint _evict(self) noexcept:
        """Remove the least recently used key; False if there is no memory to log it."""
        cdef Item *entry = self._ring.next
        cdef size_t size = 15 + <size_t>entry.size
        cdef uint8_t *at
        if not self._reserve(size):
            return False
        at = self.log.begin()
        set_u32(at, 2)
        set_u32(at + 4, 3)
        memory.memcpy(at + 8, b"del", 3)
        set_u32(at + 11, entry.size)
        memory.memcpy(at + 15, key_of(entry), entry.size)
        self.log.end(size)
        self._drop(entry)
        self.evictions += 1
        self._evicted += 1
        return True

    # ---- effects and their undo ------------------------------------------------------------------

    cdef bint _reserve(self, size_t size) noexcept:
        """Make sure of the memory for one effect of ``size`` bytes and its undo; False if there is none."""
        cdef void *grown
        cdef size_t room
        if self._undo_count == self._undo_room:
            room = 2 * self._undo_room + 64
            grown = alloc_grow(self._undo, room * sizeof(Undo))
            if grown == NULL:
                return False
            self._undo = <Undo *>grown
            self._undo_room = room
        return self._replaying or self.log.reserve(size)

    cdef inline void _remember(self, Change change, Item *entry, Item *other, double score) noexcept:
        self._undo[self._undo_count] = Undo(change, entry, other, score)
        self._undo_count += 1

    cdef inline void _effect(self, Request *request) noexcept:
        """Log the request, its name in lower case, and reply that it is done."""
        cdef uint8_t *at
        cdef size_t i
        if not self._replaying:
            at = self.log.begin()
            memory.memcpy(at, request.frame, request.size)
            for i in range(8, 8 + request.tokens[0].size):
                at[i] |= 0x20
            self.log.end(request.size)
        self._reply(DONE)

    cdef void _free(self, Item *entry) noexcept:
        """Free an entry, or begin to."""
        cdef Zset *zset
        if not is_set(entry) or zset_of(entry).count < MANY:
            entry_free(entry)
            return
        zset = zset_of(entry)
        free(entry)
        zset.next = self._gone
        self._gone = zset
        self.dying += 1

    cdef void _free_some(self, size_t most) noexcept:
        """Free some more of a large set that is gone."""
        cdef Zset *next = self._gone.next
        if zset_free_some(self._gone, most):
            self._gone = next
            self.dying -= 1

    cdef void _forget(self) noexcept:
        """Free what only the undo list still has."""
        cdef size_t i
        cdef Undo *undo
        for i in range(self._undo_count):
            undo = &self._undo[i]
            if undo.change == REPLACED:
                self._free(undo.other)
            elif undo.change == REMOVED:
                self._free(undo.entry)
            elif undo.change == MEMBER_REMOVED:
                node_free(undo.other)
        self._undo_count = 0
        if self._undo_room > 1 << 16:
            free(self._undo)
            self._undo = NULL
            self._undo_room = 0

    def commit(self):
        """The effects since the last commit are in the file: they stay."""
        self._changes += 1
        self._forget()
        self._evicted = 0
        self.log.commit()

    def rollback(self):
        """They are not: put back the data, and take the records back. O(effects).

        Raises MemoryError if a table cannot get a bucket back; the store is of no use then.
        """
        cdef Undo *undo
        cdef Item *entry
        cdef Zset *zset
        cdef uint64_t hash
        self._changes += 1
        while self._undo_count:
            self._undo_count -= 1
            undo = &self._undo[self._undo_count]
            entry = undo.entry
            if undo.change == REPLACED:
                table_put(table_slot(&self._table, entry), undo.other)
                ring_remove(entry)
                ring_add(&self._ring, undo.other)
                self.used += entry_cost(undo.other) - entry_cost(entry)
                self._free(entry)
                continue
            if undo.change == ADDED:
                self.used -= entry_cost(entry)
                hash = table_hash(&self._table, key_of(entry), entry.size)
                table_remove(&self._table, hash, table_slot(&self._table, entry))
                ring_remove(entry)
                self._free(entry)
                continue
            if undo.change == REMOVED:
                hash = table_hash(&self._table, key_of(entry), entry.size)
                if not table_add(&self._table, hash, entry):
                    raise MemoryError
                ring_add(&self._ring, entry)
                self.used += entry_cost(entry)
                continue
            zset = zset_of(entry)
            self.used -= zset_cost(zset)
            if undo.change == MEMBER_ADDED:
                zset_detach(zset, undo.other)
                node_free(undo.other)
            elif undo.change == MEMBER_MOVED:
                zset_move(zset, undo.other, undo.score)
            elif not zset_attach(zset, undo.other):
                raise MemoryError
            self.used += zset_cost(zset)
        self.evictions -= self._evicted
        self._evicted = 0
        self.log.rollback()

    def replay(self, records):
        """Apply the effects of ``records``, whole and verified; return how many there are.

        Raises ValueError for an effect that is no write of this version; those before it have been applied.
        """
        cdef Py_buffer view
        self._changes += 1
        PyObject_GetBuffer(records, &view, PyBUF_SIMPLE)
        readonly = self.readonly
        self.readonly = None
        self._replaying = True
        try:
            return self._replay(<const uint8_t *>view.buf, <size_t>view.len)
        finally:
            self._replaying = False
            self.readonly = readonly
            buffer_empty(&self._out)
            PyBuffer_Release(&view)

    cdef object _replay(self, const uint8_t *data, size_t size):
        cdef size_t pos = 0, length
        cdef uint64_t count = 0
        cdef Request request
        cdef const Row *row
        while pos < size:
            length = get_u32(data + pos + 8) if size - pos >= RECORD_HEADER else size
            if length > size - pos - RECORD_HEADER:
                raise ValueError("the records end within one")
            self._out.size = self._replies = 0
            self._reserve_reply(ROOM)
            pos += RECORD_HEADER
            row = NULL
            if parse(data + pos, data + pos + length, &request) == data + pos + length and request.count:
                row = find_row(&request.tokens[0])
            if row != NULL and row.write and memory.memcmp(row.name, request.tokens[0].at, row.size) == 0:
                if request.count > 1:
                    request.hash = table_hash(&self._table, request.tokens[1].at, request.tokens[1].size)
                self._answer(&request)
            if self._out.size == 0 or get_u32(self._out.data + 4) > MISSING:
                if self._out.size == <size_t>len(OUT_OF_MEMORY) and not memory.memcmp(
                    self._out.data, <char *>OUT_OF_MEMORY, self._out.size
                ):
                    raise MemoryError
                effect = (<char *>data + pos)[: length if length < 60 else <size_t>60]
                number = get_u64(data + pos - 8)
                raise ValueError(f"record {number} is no write of this version: {effect!r}")
            self._forget()
            pos += length
            count += 1
        return count

    def enforce_limits(self):
        """Evict, logged, until the data is within its limits, if eviction is the policy."""
        self._changes += 1
        while self.evict and (
            (self.capacity and self._table.count > self.capacity)
            or (self.maxmemory and self.used > self.maxmemory)
        ):
            if not self._evict():
                raise MemoryError

    # ---- the whole of the data -------------------------------------------------------------------

    def entries(self):
        """Yield each key with its string or its (score, member) pairs, least recently used first."""
        cdef Item *entry = self._ring.next
        cdef Item *node
        cdef list pairs
        changes = self._changes
        while entry != &self._ring:
            key = (<char *>key_of(entry))[: entry.size]
            if is_set(entry):
                pairs = []
                node = zset_of(entry).head.next
                while node != NULL:
                    pairs.append((node.second.score, (<char *>key_of(node))[: node.size]))
                    node = node.next
                yield key, pairs
            else:
                yield key, (<char *>value_of(entry))[: entry.extra]
            if self._changes != changes:
                raise RuntimeError("the store changed between two of its entries")
            entry = entry.next

    def digest(self):
        """Return 64 bits that are equal for equal data, whatever the order of use. O(data)."""
        cdef Item *entry = self._ring.next
        cdef Item *node
        cdef uint64_t total = 0, chain, bits
        cdef uint8_t score[8]
        while entry != &self._ring:
            if is_set(entry):
                chain = xxh64(key_of(entry), entry.size, 2)
                node = zset_of(entry).head.next
                while node != NULL:
                    memory.memcpy(&bits, &node.second.score, 8)
                    set_u64(score, bits)
                    chain = xxh64(key_of(node), node.size, xxh64(score, 8, chain))
                    node = node.next
            else:
                chain = xxh64(value_of(entry), entry.extra, xxh64(key_of(entry), entry.size, 1))
            total += chain
            entry = entry.next
        return total

    def check(self):
        """Raise AssertionError unless the rules of this file and of the twin hold. O(data)."""
        cdef Item *entry = self._ring.next
        cdef Item *older = &self._ring
        cdef const char *flaw = table_flaw(&self._table)
        cdef size_t count = 0, used = 0
        state = f"{self.keys} keys, used {self.used}, {self._undo_count} to undo"
        while flaw == NULL and entry != &self._ring:
            count += 1
            used += entry_cost(entry)
            if entry.second.older != older:
                flaw = "ring: a wrong way back"
            elif table_slot(&self._table, entry) == NULL:
                flaw = "store: a key that is not found"
            elif is_set(entry) and zset_of(entry).count == 0:
                flaw = "store: an empty set"
            elif is_set(entry):
                flaw = zset_flaw(zset_of(entry))
            older = entry
            entry = entry.next
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()}: {state}")
        if count != self._table.count or self._ring.second.older != older:
            raise AssertionError(f"{count} keys in the ring: {state}")
        if used != self.used:
            raise AssertionError(f"counted {used}: {state}")
        if self._evicted > self.evictions:
            raise AssertionError(f"{self._evicted} of {self.evictions} evicted: {state}")
        if self.log.pending() and not self._undo_count:
            raise AssertionError(f"effects that cannot be undone: {state}")


def alloc_fails_at(size_t n):
    """For tests: make the n-th allocation of this module fail, once; 0 ends it. Return what was left to count."""
    left = memory.alloc_fails_at
    memory.alloc_fails_at = n
    return left
