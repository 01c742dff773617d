"""UnifiedStore: the compiled twin of ``imds/shard/store.py``, which says what it does and in what order.

What this file adds to the twin's rules:

* All data is in C memory: entries (``entry.pxd``) in a table (``table.pxd``) and in a ring for the order of use, sorted
  sets as skip lists (``skiplist.pxd``). An item has one owner: the table, a set, or the undo list.
* A command first makes sure of the memory for its record and its undo, then changes the data, then writes the
  record: when memory ends, the command answers OOM and nothing has happened but evictions.
* Functions of ``imds/shard/keyspace.py`` that are asked for most have a compiled form here (FORMS), for what goes
  well and is not odd; it does the same, to the order of use and the bytes of the log. Whatever else it meets, it
  leaves to the function itself, and has done nothing then.
* The effects of a function of ``imds/shard/keyspace.py`` are gathered beside the log, and become its record at the
  end. When it is refused, or memory ends, what it did is undone: nothing has happened at all.
* An entry is in the heap of deadlines while it is in the table and has one. There is room in the heap for all those
  that the undo list may bring back.
* A set whose entry is exchanged for another (SHELL_ADDED, SHELL_REMOVED) belongs to the one that is in the table.
* ``used`` counts what glibc's malloc takes for entries and nodes, and TABLE_SHARE bytes for a place in a table. The
  marks in the order of use (``marks.pxd``) are not counted: where they are most, they take 2 bytes a key.
* Pointers into a table last until the table changes: an eviction changes it.
* While the data is saved, a place goes through the ring: what is in front of it has been saved, or is in a set that
  was saved as a whole since the beginning.
* No operation takes long but by what it answers: the table grows by one chain at a time, and a large set that is
  gone is freed in the course of the requests that follow, FREED nodes in each.

What can be said without the store is in files of its own: a request's tokens (``request.pxd``), what is fetched ahead
for the next ones (``lookahead.pxd``), a range of scores (``bounds.pxd``). The rest is long for one file because it is one
class: Cython has no class in two files, and a method that is called across modules is not inlined.
"""

from os import urandom

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.limits cimport LLONG_MAX
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from imds._kernel cimport memory
from imds._kernel.deadlines cimport (
    Heap,
    due_add,
    due_flaw,
    due_move,
    due_remove,
    due_reserve,
    due_trim,
)
from imds._kernel.entry cimport (
    IS_SET,
    IS_TIMED,
    NOWHERE,
    VALUE_SIZE,
    entry_bytes,
    entry_cost,
    entry_free,
    entry_new,
    entry_room,
    is_set,
    is_timed,
    ring_add,
    ring_put,
    ring_remove,
    ring_touch,
    set_size,
    shell_free,
    size_of,
    timer_of,
    value_of,
    when_of,
    zset_of,
)
from imds._kernel.bounds cimport Bounds, ranks_between, read_bounds
from imds._kernel.executor cimport Executor
from imds._kernel.lookahead cimport (
    AHEAD,
    BROKEN,
    MAX_COUNT,
    RECORD_HEADER,
    REQUEST_HEADER,
    Keys,
    Reader,
    begin_keys,
    envelope_size,
    look_ahead,
    next_key,
    read_ahead,
    read_record,
)
from imds._kernel.marks cimport (
    IS_PLACE,
    MARK_EVERY,
    Marks,
    is_entry,
    is_mark,
    marks_add,
    marks_latest,
    marks_second,
    marks_trim,
    past_marks,
    ring_flaw,
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
from imds._kernel.number cimport SCORE_TEXT, read_score, write_digits, write_integer, write_score
from imds._kernel.record cimport RecordEncoder
from imds._kernel.request cimport (
    MOST_TOKENS,
    Request,
    Token,
    is_lower,
    is_word,
    parse,
    put_frame,
    read_integer,
    read_number,
    skip,
    token_of,
)
from imds._kernel.skiplist cimport (
    Zset,
    Place,
    node_at,
    node_free,
    place_next,
    zset_add,
    zset_at,
    zset_attach,
    zset_cost,
    zset_cost_with,
    zset_detach,
    zset_find,
    zset_first,
    zset_flaw,
    zset_free,
    zset_free_some,
    zset_growth,
    zset_move,
    zset_new,
    zset_place,
    zset_rank,
    zset_start,
)
from imds._kernel.table cimport (
    SLOTS,
    Bucket,
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
    table_hash,
    table_init,
    table_put,
    table_random,
    table_remove,
    table_slot,
    table_walk,
)
from imds._kernel.xxh64 cimport xxh64

from imds.commands import COMMANDS, lookup
from imds.protocol import split_request
from imds.shard import store as _twin
from imds.shard.keyspace import FUNCTIONS, Refused, encode
from imds.shard.record import MAX_EFFECT as _MAX_EFFECT

cdef enum:
    MISSING = 1          # statuses of imds/protocol.py
    LIST = 3
    REPLY_HEADER = 12    # bytes of imds/envelope.py's header
    MANY = 1024          # members of a set that is not freed at once
    FREED = 64           # of its nodes, at each request
    ROOM = 256           # bytes of reply buffer that each command finds free


# Commands that are not here, unknown ones and those of the process, are answered by Python.
cdef enum Name:
    COLD, GET, SET, DEL, ZADD, ZRANGE, ZRANK, ZREM

ctypedef struct Row:
    const char *name
    size_t size
    Name command
    uint32_t tokens  # of the form that is here; others are functions. These two by _read_table()
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
    assert len(_twin.HOT) == 7
    for i in range(7):
        command = COMMANDS[ROWS[i].name.decode()]
        ROWS[i].tokens = _twin.HOT[command.name]
        ROWS[i].write = command.write
        assert command.arity_ok(ROWS[i].tokens) and ROWS[i].tokens <= MOST_TOKENS


_read_table()

# Functions that have a compiled form, and with how many tokens. The rest of them, and of their cases, is Python's.
cdef enum Form:
    ADD, EXISTS, TTL, EXPIRE, STAY, TYPE, TOUCH, DELETE
    SETEX, SETWORDS, SETNX, GETSET, GETDEL, GETEX, APPEND, STRLEN, GETRANGE, MGET, MSET
    ZADDS, ZINCRBY, ZSCORE, ZMSCORE, ZCARD, ZCOUNT, ZREVRANK, ZRANKS, ZSCORES, ZTAKES, ZPOP, ZTAKERANKS, ZTAKESCORES

cdef enum Outcome:
    ANSWERED, REFUSED, LEFT  # LEFT: to the function

ctypedef struct FormRow:
    const char *name
    size_t size
    Form form
    uint32_t least  # tokens
    uint32_t most
    int64_t unit    # what its number is multiplied with: milliseconds, a sign, or what there is no number for
    bint write      # by _read_forms()

cdef enum:
    ANY = 0xFFFFFFFF

cdef enum:
    FORM_COUNT = 43

cdef FormRow[FORM_COUNT] FORMS = [  # in the order of the names' lengths
    FormRow("set", 3, SETWORDS, 4, 6, 0, 0),
    FormRow("ttl", 3, TTL, 2, 2, 1000, 0),
    FormRow("del", 3, DELETE, 3, ANY, 0, 0),
    FormRow("pttl", 4, TTL, 2, 2, 1, 0),
    FormRow("incr", 4, ADD, 2, 2, 1, 0),
    FormRow("decr", 4, ADD, 2, 2, -1, 0),
    FormRow("mget", 4, MGET, 2, ANY, 0, 0),
    FormRow("mset", 4, MSET, 3, ANY, 0, 0),
    FormRow("type", 4, TYPE, 2, 2, 0, 0),
    FormRow("zrem", 4, ZTAKES, 4, ANY, 0, 0),
    FormRow("zadd", 4, ZADDS, 6, ANY, 0, 0),
    FormRow("setex", 5, SETEX, 4, 4, 1000, 0),
    FormRow("setnx", 5, SETNX, 3, 3, 0, 0),
    FormRow("getex", 5, GETEX, 2, 4, 0, 0),
    FormRow("zcard", 5, ZCARD, 2, 2, 0, 0),
    FormRow("touch", 5, TOUCH, 2, ANY, 0, 0),
    FormRow("incrby", 6, ADD, 3, 3, 1, 0),
    FormRow("append", 6, APPEND, 3, 3, 0, 0),
    FormRow("getset", 6, GETSET, 3, 3, 0, 0),
    FormRow("getdel", 6, GETDEL, 2, 2, 0, 0),
    FormRow("zcount", 6, ZCOUNT, 4, 4, 0, 0),
    FormRow("decrby", 6, ADD, 3, 3, -1, 0),
    FormRow("exists", 6, EXISTS, 2, ANY, 0, 0),
    FormRow("expire", 6, EXPIRE, 3, 3, 1000, 0),
    FormRow("psetex", 6, SETEX, 4, 4, 1, 0),
    FormRow("strlen", 6, STRLEN, 2, 2, 0, 0),
    FormRow("unlink", 6, DELETE, 2, ANY, 0, 0),
    FormRow("zscore", 6, ZSCORE, 3, 3, 0, 0),
    FormRow("pexpire", 7, EXPIRE, 3, 3, 1, 0),
    FormRow("persist", 7, STAY, 2, 2, 0, 0),
    FormRow("zincrby", 7, ZINCRBY, 4, 4, 0, 0),
    FormRow("zmscore", 7, ZMSCORE, 3, ANY, 0, 0),
    FormRow("zpopmin", 7, ZPOP, 2, 3, 1, 0),
    FormRow("zpopmax", 7, ZPOP, 2, 3, -1, 0),
    FormRow("getrange", 8, GETRANGE, 4, 4, 0, 0),
    FormRow("zrevrank", 8, ZREVRANK, 3, 3, 0, 0),
    FormRow("zrevrange", 9, ZRANKS, 4, 5, -1, 0),
    FormRow("pexpireat", 9, EXPIRE, 3, 3, 0, 0),
    FormRow("zrangebyrank", 12, ZRANKS, 4, 5, 1, 0),
    FormRow("zrangebyscore", 13, ZSCORES, 4, 8, 1, 0),
    FormRow("zremrangebyrank", 15, ZTAKERANKS, 4, 4, 0, 0),
    FormRow("zremrangebyscore", 16, ZTAKESCORES, 4, 4, 0, 0),
    FormRow("zrevrangebyscore", 16, ZSCORES, 4, 8, -1, 0),
]


def _read_forms():
    for i in range(FORM_COUNT):
        command = COMMANDS[FORMS[i].name.decode()]
        FORMS[i].write = command.write
        assert command.name in FUNCTIONS and <size_t>len(command.name) == FORMS[i].size
        assert i == 0 or FORMS[i - 1].size <= FORMS[i].size
        assert command.min_tokens <= FORMS[i].least and (FORMS[i].most == ANY or FORMS[i].most <= command.max_tokens)


_read_forms()

cdef int64_t LATEST = 1 << 50  # milliseconds: deadlines beyond, and numbers like these, are Python's

# What a log may hold, and of how many tokens.
cdef enum Kind:
    NO_EFFECT, PUT, REMOVE, ZPUT, ZTAKE, WRITE_AT, SET_DEADLINE, PERSIST, MOVE

ctypedef struct Effect:
    const char *name
    size_t size
    Kind kind
    uint32_t tokens

cdef Effect[8] EFFECTS = [
    Effect("set", 3, PUT, 3),
    Effect("del", 3, REMOVE, 2),
    Effect("zadd", 4, ZPUT, 4),
    Effect("zrem", 4, ZTAKE, 3),
    Effect("setrange", 8, WRITE_AT, 4),
    Effect("pexpireat", 9, SET_DEADLINE, 3),
    Effect("persist", 7, PERSIST, 2),
    Effect("rename", 6, MOVE, 3),
]
assert {EFFECTS[i].name: EFFECTS[i].tokens for i in range(8)} == _twin.EFFECTS
cdef uint64_t MAX_EFFECT = _MAX_EFFECT
cdef uint64_t MAX_STRING = _twin.MAX_STRING

# Each command's row and function, by both usual spellings of its name; others go through lookup(). A command that
# is here in its only form has none.
cdef dict CALLS = {
    spelling: (command, FUNCTIONS.get(name))
    for name, command in COMMANDS.items()
    if name in FUNCTIONS or name in _twin.HOT
    for spelling in (name.encode(), name.upper().encode())
}

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
cdef bytes STRING_TYPE = encode(b"string")
cdef bytes SET_TYPE = encode(b"zset")
cdef bytes NO_TYPE = encode(b"none")
cdef size_t SHORT = _twin.SHORT
assert MAX_COUNT == _twin.MAX_COUNT
assert max(map(len, (DONE, WRONG_TYPE, BAD_SCORE, OUT_OF_MEMORY, TOO_LARGE, MALFORMED, TOO_LONG))) <= SHORT < ROOM

# What rollback does. ADDED: free the entry. REPLACED: put ``other`` in its place. WRITTEN: put back the string, of
# which size and bytes are in ``_kept`` from ``old.kept`` on. REMOVED: put the entry back. Then the same for a sorted
# set's node, which is ``other``. SHELL_ADDED and SHELL_REMOVED: the same as for entries, but for the set, which
# another entry has. TIMED: the deadline was ``old.when``.
cdef enum Change:
    ADDED, REPLACED, WRITTEN, REMOVED
    MEMBER_ADDED, MEMBER_MOVED, MEMBER_REMOVED
    SHELL_ADDED, SHELL_REMOVED, TIMED

ctypedef union Old:
    double score
    uint64_t when
    size_t kept

ctypedef struct Undo:
    Change change
    Item *entry
    Item *other
    Old old

cdef enum:
    UNDO_MOST = 3  # of one effect


cdef int refuse(bytes refusal) except -1:
    """Raise what a command is refused by, if it is."""
    if refusal is not None:
        raise Refused(refusal)
    return 0


cdef int walk_chain(const Table *table, uint64_t *cursor, list found) except -1:
    """Append the (score, key) pairs of one chain, and move the cursor on. A store's entries have no score."""
    cdef const Bucket *bucket = table_walk(table, cursor)
    cdef Item *item
    cdef int i
    while bucket != NULL:
        for i in range(SLOTS):
            if bucket.slots[i] == 0:
                break
            item = item_in(bucket.slots[i])
            found.append((item.second.score, (<char *>key_of(item))[: item.size]))
        bucket = bucket.more
    return 0


cdef const Effect *find_effect(const Request *request) noexcept nogil:
    """Return which effect the request is, or NULL."""
    cdef int i
    for i in range(8):
        if (
            request.count == EFFECTS[i].tokens
            and request.tokens[0].size == EFFECTS[i].size
            and memory.memcmp(request.tokens[0].at, EFFECTS[i].name, EFFECTS[i].size) == 0
        ):
            return &EFFECTS[i]
    return NULL


cdef int save_effect(
    RecordEncoder log,
    const char *name,
    size_t size,
    uint32_t count,
    const Token *key,
    const Token *second,
    const Token *third,
) except -1:
    """Add an effect to a log that is not the store's own."""
    if not log.reserve(20 + size + key.size + second.size + (third.size if third != NULL else 0)):
        raise MemoryError
    log.end(put_frame(log.begin(), name, size, count, key, second, third))
    return 0


cdef const FormRow *find_form(const Request *request) noexcept nogil:
    """Return the form for the request, or NULL."""
    cdef int i
    cdef const FormRow *row
    for i in range(FORM_COUNT):
        row = &FORMS[i]
        if row.size > request.tokens[0].size:
            return NULL
        if (
            row.size == request.tokens[0].size
            and row.least <= request.count <= row.most
            and is_word(&request.tokens[0], row.name)
        ):
            return row
    return NULL


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


cdef class UnifiedStore(Executor):
    """The data of one shard; see the twin for arguments and attributes."""

    cdef public bytes readonly
    cdef public uint64_t capacity, maxmemory, max_response
    cdef public bint evict
    cdef readonly uint64_t used, ops, hits, misses, evictions, expirations
    cdef object _hooks
    cdef Table _table
    cdef Item _ring
    cdef size_t _replies     # where the replies of the running envelope begin in _out
    cdef Undo *_undo
    cdef size_t _undo_count, _undo_room
    cdef Buffer _kept        # strings that were written over: size, bytes
    cdef uint64_t _evicted, _expired  # since the last commit
    cdef Heap _due
    cdef Buffer _frames      # the effects of the running function
    cdef bint _gathering     # there is one
    cdef bint _reading       # and it is no write
    cdef uint64_t _changes   # calls that may have changed data or order, for entries()
    cdef uint64_t _dice
    cdef bint _replaying
    cdef bytes _refusal      # what a form is refused by
    cdef Zset *_gone         # large sets that are being freed
    cdef readonly size_t dying  # how many
    cdef Marks _marks
    cdef uint64_t _clock     # milliseconds by which ``now`` has gone on since it was set first
    cdef uint64_t _seen      # the ``now`` that it was moved on by
    cdef uint32_t _second    # of the clock
    cdef uint64_t _uses      # since a mark was added
    cdef uint64_t _past_uses # before that
    cdef readonly uint64_t unmet
    cdef bint _saving
    cdef Item _place         # in the ring while the data is saved: what is in front of it has been, or was used since
    cdef uint64_t _saved_at  # how many uses there had been then
    cdef bytes _rest         # the key of a set that is saved in parts, or None; and the pair with which it goes on
    cdef double _rest_score
    cdef bytes _rest_member
    cdef set _whole          # the keys of sets that were saved in parts, all of them

    def __cinit__(self):
        self._ring.next = self._ring.second.older = &self._ring
        self._place.extra = IS_PLACE
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
        cdef Item *entry
        cdef Item *next
        if self._saving:
            ring_remove(&self._place)
        entry = self._ring.next
        self._forget()
        while self._gone != NULL:
            self._free_some(<size_t>-1)
        while entry != &self._ring:
            next = entry.next
            entry_free(entry)
            entry = next
        table_free(&self._table)
        free(self._due.places)
        free(self._frames.data)
        free(self._undo)
        free(self._kept.data)
        free(self._out.data)

    @property
    def keys(self):
        """How many keys there are."""
        return self._table.count

    @property
    def timed(self):
        """How many keys have a deadline."""
        return self._due.count

    @property
    def next_deadline(self):
        """The earliest deadline, 0 if there is none."""
        return self._due.places[0].when if self._due.count else 0

    # ---- batches ---------------------------------------------------------------------------------

    cdef size_t run_batch(self, const uint8_t *data, size_t size) except? 0:
        cdef size_t pos = 0, envelope, total, run = 0
        cdef uint32_t count, done
        cdef Reader reader
        cdef Request *request
        self._changes += 1
        self._out.size = 0
        if self.now != self._seen or self._uses >= MARK_EVERY:
            self._tick()
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
            self._uses += count
            self._reserve_reply(REPLY_HEADER)
            self._out.size += REPLY_HEADER
            self._replies = self._out.size
            for done in range(count):
                while reader.read < run + AHEAD:
                    total = reader.read
                    read_ahead(&reader, &self._table)
                    if reader.read == total:
                        break
                look_ahead(&reader, run, &self._table)
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
        cdef const FormRow *form
        if self._gone != NULL:
            self._free_some(FREED)
        if request.count == 0:
            self._reply(UNKNOWN_COMMAND)
            return 0
        row = find_row(&request.tokens[0])
        if row == NULL or request.count != row.tokens:
            form = find_form(request)
            if form == NULL or (form.write and self.readonly is not None) or not self._form(form, request):
                self._cold(request)
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
        """Answer what has no place in this file: a function of a command, or a hook."""
        cdef bytes name, frame
        cdef list tokens
        frame = UNKNOWN_COMMAND
        if request.tokens[0].size <= 64:
            name = request.tokens[0].at[: request.tokens[0].size]
            call = CALLS.get(name)
            command = lookup(name) if call is None else call[0]
            if call is None and command is not None:
                call = CALLS.get(command.name.encode())
            hook = None
            if call is None:
                hook = self._hooks.get(command.name if command is not None else name.decode(errors="replace"))
            if (call is not None or hook is not None) and command is not None and not command.arity_ok(request.count):
                frame = WRONG_ARITY
            elif call is not None:
                if command.write and self.readonly is not None:
                    frame = self.readonly
                else:
                    tokens, _ = split_request(<bytes>request.frame[: request.size])
                    return self._call(command.write, call[1], tokens)
            elif hook is not None:
                tokens, _ = split_request(<bytes>request.frame[: request.size])
                frame = hook(tokens[1:])
        self._reserve_reply(<size_t>len(frame))
        if self._too_long(<size_t>len(frame)):
            frame = TOO_LONG
        self._reply(frame)
        return 0

    cdef int _call(self, bint write, object function, list tokens) except -1:
        """Run a command's function; it has all of its effects, as one record, or none."""
        cdef bytes frame
        cdef size_t undo = self._undo_count
        cdef uint64_t evicted = self._evicted, expired = self._expired
        cdef bint done = False
        tokens[0] = self
        self._frames.size = 0
        self._gathering = True
        self._reading = not write
        try:
            frame = encode(function(*tokens))
            self._reserve_reply(<size_t>len(frame))
            if self._too_long(<size_t>len(frame)):
                frame = TOO_LONG
            elif self._seal():
                done = True
            else:
                frame = OUT_OF_MEMORY
        except Refused as refused:
            frame = refused.reply
        except MemoryError:
            frame = OUT_OF_MEMORY
        finally:
            self._gathering = self._reading = False
            buffer_empty(&self._frames)
        if not done:
            self._undo_to(undo, evicted, expired)
        self._reserve_reply(<size_t>len(frame))
        self._reply(frame)
        return 0

    cdef bint _seal(self) noexcept:
        """Log what a function has gathered: one record, or more if it is too much for one; False without memory."""
        cdef size_t start = 0, end = 0, at, size = self._frames.size
        cdef uint32_t left
        cdef const uint8_t *data = self._frames.data
        if size and not self.log.reserve(size + 20 * (size // (MAX_EFFECT // 2) + 1)):
            return False
        while start < size:
            at = start
            while at < size:
                left = get_u32(data + at)
                at += 4
                while left:
                    at += 4 + get_u32(data + at)
                    left -= 1
                if at - start > MAX_EFFECT and end > start:
                    break
                end = at
            self.log.put(data + start, end - start)
            start = end
        return True

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

    def together(self, act):
        """Return what ``act`` returns, its effects one record; None, and nothing has happened, if it is too large."""
        cdef size_t undo = self._undo_count
        cdef uint64_t evicted = self._evicted, expired = self._expired
        place = self.log.place()
        reply = act()
        if self.log.join(place):
            return reply
        self._undo_to(undo, evicted, expired)
        self.log.cut(place)
        return None

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
        elif self._too_long(8 + size_of(entry)):
            self._reply(TOO_LONG)
        else:
            self._reserve_reply(8 + size_of(entry))
            buffer_put_u32(&self._out, 4 + <uint32_t>size_of(entry))
            buffer_put_u32(&self._out, 0)
            buffer_put(&self._out, value_of(entry), size_of(entry))
        return 0

    cdef int _set(self, Request *request) except -1:
        cdef bytes refusal = self._put(
            &request.tokens[1], request.hash, self._find(request), &request.tokens[2], 0, request.size
        )
        if refusal is not None:
            self._reply(refusal)
        else:
            self._effect(request)
        return 0

    cdef bytes _put(
        self, const Token *key, uint64_t hash, Item *old, const Token *value, uint64_t when, size_t effect
    ):
        """Make the key hold a string; return a refusal, or None: an effect of that size may be logged then."""
        cdef size_t cost
        cdef int64_t change
        cdef Item *entry
        if value.size > VALUE_SIZE:
            return TOO_LARGE
        cost = entry_bytes(key.size, value.size, when != 0)
        change = <int64_t>cost - (<int64_t>entry_cost(old) if old != NULL else 0)
        refusal = self._make_room(old == NULL, change, cost)
        if refusal is not None:
            return refusal
        if old != NULL and not change and not is_set(old) and (is_timed(old) if when else not is_timed(old)):
            return None if self._write_over(old, value, when, effect) else OUT_OF_MEMORY
        entry = entry_new(
            key.at, key.size, value.at, value.size, <uint32_t>value.size | (IS_TIMED if when else 0)
        )
        if entry == NULL or not self._reserve(effect) or (when and not due_reserve(&self._due, 1)):
            shell_free(entry)
            return OUT_OF_MEMORY
        if old != NULL:
            if when_of(old):
                due_remove(&self._due, old)
            table_put(table_slot(&self._table, old), entry)
            ring_remove(old)
            self._remember(REPLACED, entry, old)
        else:
            if not table_add(&self._table, hash, entry):
                shell_free(entry)
                return OUT_OF_MEMORY
            self._remember(ADDED, entry, NULL)
        ring_add(&self._ring, entry)
        if when:
            timer_of(entry).when = when
            due_add(&self._due, entry)
        self.used += change
        return None

    cdef bint _write_over(self, Item *entry, const Token *value, uint64_t when, size_t effect) noexcept:
        """Give an entry another string for which its block has the room, and if it is timed a deadline; whether it worked.

        Nearly all that sets do is this, and it asks the allocator for nothing: a block that was freed is cold
        when it comes back, and waiting for it took a quarter of a shard's time.
        """
        cdef size_t size = size_of(entry)
        if when and not due_reserve(&self._due, 1):
            return False
        if not self._replaying:  # which is never undone
            if not self._reserve(effect) or not buffer_reserve(&self._kept, 4 + size):
                return False
            self._undo[self._undo_count].old.kept = self._kept.size
            self._remember(WRITTEN, entry, NULL)
            buffer_put_u32(&self._kept, <uint32_t>size)
            buffer_put(&self._kept, value_of(entry), size)
            if when:
                self._undo[self._undo_count].old.when = timer_of(entry).when
                self._remember(TIMED, entry, NULL)
        set_size(entry, value.size)
        if value.size:
            memory.memcpy(value_of(entry), value.at, value.size)
        ring_touch(&self._ring, entry)
        if when:
            self._set_timer(entry, when)
        return True

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
        cdef double score
        cdef Item *entry
        cdef bytes refusal
        cdef bint changed = False
        if not read_score(request.tokens[2].at, request.tokens[2].size, &score):
            self._reply(BAD_SCORE)
            return 0
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            self._reply(WRONG_TYPE)
            return 0
        refusal = self._zput(
            &request.tokens[1], request.hash, entry, &request.tokens[3], score, request.size, &changed
        )
        if refusal is not None:
            self._reply(refusal)
        elif changed:
            self._effect(request)
        else:
            self._reply(DONE)
        return 0

    cdef bytes _zput(
        self,
        const Token *key,
        uint64_t hash,
        Item *entry,
        const Token *member,
        double score,
        size_t effect,
        bint *changed,
    ):
        """Add a member to the set, which may not be there yet, or move it; return a refusal, or None.

        If that changed anything, an effect of that size may be logged.
        """
        cdef Item *node
        cdef Zset *zset
        cdef size_t before, after
        cdef double old
        if entry == NULL:
            return self._zput_new(key, hash, member, score, effect, changed)
        zset = zset_of(entry)
        node = zset_find(zset, member.at, member.size)
        before = zset_cost(zset)
        if node != NULL:
            old = node.second.score
            if old == score:
                return None
            if self.evict and self.maxmemory:  # a move is never refused, but has others go for what it takes
                after = before + zset_growth(zset)
                self._make_room(
                    False, <int64_t>(after - before), entry_bytes(key.size, sizeof(Zset *), is_timed(entry)) + after
                )
            if self._reserve(effect) and zset_move(zset, node, score):
                self._remember_score(MEMBER_MOVED, entry, node, old)
                changed[0] = True
            self.used += zset_cost(zset) - before
            return None if changed[0] else OUT_OF_MEMORY
        after = zset_cost_with(zset, member.size)
        refusal = self._make_room(
            False, <int64_t>(after - before), entry_bytes(key.size, sizeof(Zset *), is_timed(entry)) + after
        )
        if refusal is not None:
            return refusal
        if self._reserve(effect):
            node = zset_add(zset, member.at, member.size, score)
        self.used += zset_cost(zset) - before
        if node == NULL:
            return OUT_OF_MEMORY
        self._remember(MEMBER_ADDED, entry, node)
        changed[0] = True
        return None

    cdef bytes _zput_new(
        self, const Token *key, uint64_t hash, const Token *member, double score, size_t effect, bint *changed
    ):
        """The same for a key that is not here."""
        cdef Zset *zset = zset_new(self._table.seed)
        cdef Item *entry = NULL
        cdef size_t cost
        cdef bytes refusal = OUT_OF_MEMORY
        if zset != NULL and zset_add(zset, member.at, member.size, score) != NULL:
            cost = entry_bytes(key.size, sizeof(Zset *), False) + zset_cost(zset)
            refusal = self._make_room(True, <int64_t>cost, cost)
            if refusal is None:
                entry = entry_new(key.at, key.size, &zset, sizeof(zset), IS_SET)
                if entry != NULL and self._reserve(effect) and table_add(&self._table, hash, entry):
                    ring_add(&self._ring, entry)
                    self.used += cost
                    self._remember(ADDED, entry, NULL)
                    changed[0] = True
                    return None
                refusal = OUT_OF_MEMORY
        shell_free(entry)
        if zset != NULL:
            zset_free(zset)
        return refusal

    cdef int _zrem(self, Request *request) except -1:
        cdef Token *member = &request.tokens[2]
        cdef Item *entry = self._find(request)
        cdef Item *node
        if entry == NULL:
            self._reply(NONE)
            return 0
        if not is_set(entry):
            self._reply(WRONG_TYPE)
            return 0
        node = zset_find(zset_of(entry), member.at, member.size)
        if node == NULL:
            self._reply(NONE)
        elif not self._reserve(request.size):
            self._reply(OUT_OF_MEMORY)
        else:
            self._ztake(entry, node)
            self._effect(request)
        return 0

    cdef void _ztake(self, Item *entry, Item *node) noexcept:
        """Remove a member, and with its last one the set; there is room for the undo."""
        cdef Zset *zset = zset_of(entry)
        if zset.count == 1:
            self._drop(entry)
            return
        self._remember(MEMBER_REMOVED, entry, node)
        self.used -= zset_cost(zset)
        zset_detach(zset, node)
        self.used += zset_cost(zset)

    cdef int _zrange(self, Request *request) except -1:
        cdef double low, high
        cdef Item *entry
        cdef Item *node
        cdef Place place
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
        place = zset_first(zset_of(entry), low)
        node = node_at(&place)
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
            place_next(&place)
            node = node_at(&place)
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

    # ---- compiled forms of functions ---------------------------------------------------------------

    cdef bint _form(self, const FormRow *row, Request *request) except -1:
        """Run a form: all of its effects are one record, or none. False, and nothing has happened: it is left."""
        cdef size_t undo = self._undo_count, out = self._out.size
        cdef uint64_t evicted = self._evicted, expired = self._expired
        cdef Outcome outcome = LEFT
        self._refusal = OUT_OF_MEMORY
        self._frames.size = 0
        self._gathering = True
        try:
            outcome = self._run_form(row, request)
            if outcome == ANSWERED and not self._seal():
                outcome = REFUSED
        except MemoryError:
            outcome = REFUSED
        finally:
            self._gathering = False
            buffer_empty(&self._frames)
        if outcome == ANSWERED:
            return True
        self._undo_to(undo, evicted, expired)
        self._out.size = out
        if outcome == REFUSED:
            self._reply(self._refusal)
        return outcome == REFUSED

    cdef Outcome _run_form(self, const FormRow *row, Request *request) except? LEFT:
        if row.form == ADD:
            return self._add(request, row.unit)
        if row.form == EXISTS:
            return self._exists(request)
        if row.form == TTL:
            return self._ttl(request, row.unit)
        if row.form == EXPIRE:
            return self._expire_at(request, row.unit)
        if row.form == STAY:
            return self._stay(request)
        if row.form == TYPE:
            return self._type(request)
        if row.form == TOUCH:
            return self._touch(request)
        if row.form == SETEX:
            return self._setex(request, row.unit)
        if row.form == SETWORDS:
            return self._set_words(request)
        if row.form == SETNX:
            return self._setnx(request)
        if row.form == GETSET or row.form == GETDEL:
            return self._get_before(request)
        if row.form == GETEX:
            return self._getex(request)
        if row.form == APPEND:
            return self._append(request)
        if row.form == STRLEN:
            return self._strlen(request)
        if row.form == GETRANGE:
            return self._getrange(request)
        if row.form == MGET:
            return self._mget(request)
        if row.form == MSET:
            return self._mset(request)
        if row.form == DELETE:
            return self._delete(request)
        if row.form == ZADDS:
            return self._zadds(request)
        if row.form == ZINCRBY:
            return self._zincrby(request)
        if row.form == ZSCORE:
            return self._zscore(request)
        if row.form == ZMSCORE:
            return self._zmscore(request)
        if row.form == ZCARD:
            return self._zcard(request)
        if row.form == ZCOUNT:
            return self._zcount(request)
        if row.form == ZREVRANK:
            return self._zrevrank(request)
        if row.form == ZRANKS:
            return self._zranks(request, row.unit < 0)
        if row.form == ZSCORES:
            return self._zscores(request, row.unit < 0)
        if row.form == ZTAKES:
            return self._ztakes(request)
        if row.form == ZPOP:
            return self._zpop(request, row.unit < 0)
        return self._ztake_range(request, row.form == ZTAKESCORES)

    cdef Outcome _number(self, int64_t number) noexcept:
        """Reply a number."""
        cdef size_t size = write_integer(self._out.data + self._out.size + 8, number)
        buffer_put_u32(&self._out, <uint32_t>(4 + size))
        buffer_put_u32(&self._out, 0)
        self._out.size += size
        return ANSWERED

    cdef Outcome _score(self, double score) except? LEFT:
        """Reply a score."""
        cdef size_t size = write_score(self._out.data + self._out.size + 8, score)
        buffer_put_u32(&self._out, <uint32_t>(4 + size))
        buffer_put_u32(&self._out, 0)
        self._out.size += size
        return ANSWERED

    cdef Outcome _done(self) noexcept:
        self._reply(DONE)
        return ANSWERED

    cdef Outcome _refuse(self, bytes refusal) noexcept:
        self._refusal = refusal
        return REFUSED

    cdef Item *_look_at(self, const Request *one, bint use) except? NULL:
        """Return the entry of one of several keys, or NULL."""
        self._count_use()
        return self._look(&one.tokens[1], one.hash, use)

    cdef inline void _count_look(self, Item *entry) noexcept:
        if entry == NULL:
            self.misses += 1
        else:
            self.hits += 1

    cdef bytes _put_logged(self, const Token *key, uint64_t hash, Item *old, const Token *value, uint64_t when):
        """Make the key hold a string, with its effects; return a refusal, or None."""
        cdef uint8_t digits[20]
        cdef Token text = Token(<const uint8_t *>digits, write_digits(digits, when))
        cdef size_t effect = 19 + key.size + value.size + 25 + key.size + text.size
        cdef bytes refusal = self._put(key, hash, old, value, when, effect)
        if refusal is None:
            self._log(b"set", 3, 3, key, value, NULL)
            if when:
                self._log(b"pexpireat", 9, 3, key, &text, NULL)
        return refusal

    cdef bytes _zput_logged(
        self, const Token *key, uint64_t hash, Item *entry, const Token *member, double score
    ):
        """Add the member, or move it, with its effect; return a refusal, or None."""
        cdef uint8_t digits[SCORE_TEXT]
        cdef Token text = Token(<const uint8_t *>digits, write_score(digits, score))
        cdef bint changed = False
        cdef size_t effect = 24 + key.size + text.size + member.size
        cdef bytes refusal = self._zput(key, hash, entry, member, score, effect, &changed)
        if refusal is None and changed:
            self._log(b"zadd", 4, 4, key, &text, member)
        return refusal

    cdef Outcome _add(self, Request *request, int64_t sign) except? LEFT:
        """``incr incrby decr decrby`` of an integer that is there."""
        cdef Item *entry
        cdef Token old, new
        cdef uint8_t digits[20]
        cdef int64_t number, change = 1
        cdef bytes refusal
        if request.count == 3 and not read_integer(&request.tokens[2], &change):
            return LEFT
        if not -LATEST < change < LATEST:
            return LEFT
        entry = self._find(request)
        if entry == NULL or is_set(entry):
            return LEFT
        old = Token(value_of(entry), size_of(entry))
        if not read_integer(&old, &number) or not -(<int64_t>1 << 62) < number < <int64_t>1 << 62:
            return LEFT
        number += sign * change
        new = Token(<const uint8_t *>digits, write_integer(digits, number))
        refusal = self._put_logged(&request.tokens[1], request.hash, entry, &new, when_of(entry))
        return self._number(number) if refusal is None else self._refuse(refusal)

    cdef Outcome _exists(self, Request *request) except? LEFT:
        cdef Keys keys
        cdef int64_t found = 0
        cdef uint32_t i
        begin_keys(&keys, request, 1)
        for i in range(1, request.count):
            found += self._look_at(next_key(&keys, &self._table), False) != NULL
        return self._number(found)

    cdef Outcome _ttl(self, Request *request, int64_t unit) except? LEFT:
        cdef Item *entry = self._look(&request.tokens[1], request.hash, False)
        cdef int64_t left
        if entry == NULL or not when_of(entry):
            return self._number(-2 if entry == NULL else -1)
        left = <int64_t>(when_of(entry) - self.now) if when_of(entry) > self.now else 0
        return self._number((left + unit // 2) // unit)

    cdef Outcome _expire_at(self, Request *request, int64_t unit) except? LEFT:
        """``expire pexpire`` by a time in the future, ``pexpireat`` (unit 0) at one."""
        cdef int64_t number
        cdef uint64_t when = 0
        cdef Item *entry
        cdef bytes refusal
        if unit:
            when = self._after(&request.tokens[2], unit)
        elif read_integer(&request.tokens[2], &number) and 0 < number < LATEST // 1000 * 1000:
            when = <uint64_t>number
        if when <= self.now:
            return LEFT
        entry = self._look(&request.tokens[1], request.hash, False)
        if entry == NULL:
            return self._number(0)
        ring_touch(&self._ring, entry)
        refusal = self._set_deadline(entry, when)
        return self._number(1) if refusal is None else self._refuse(refusal)

    cdef Outcome _stay(self, Request *request) except? LEFT:
        """``persist``."""
        cdef Item *entry = self._find(request)
        cdef bytes refusal
        if entry == NULL or not when_of(entry):
            return self._number(0)
        refusal = self._set_deadline(entry, 0)
        return self._number(1) if refusal is None else self._refuse(refusal)

    cdef Outcome _type(self, Request *request) except? LEFT:
        cdef Item *entry = self._look(&request.tokens[1], request.hash, False)
        self._reply(NO_TYPE if entry == NULL else SET_TYPE if is_set(entry) else STRING_TYPE)
        return ANSWERED

    cdef Outcome _touch(self, Request *request) except? LEFT:
        cdef Keys keys
        cdef int64_t found = 0
        cdef uint32_t i
        begin_keys(&keys, request, 1)
        for i in range(1, request.count):
            found += self._look_at(next_key(&keys, &self._table), True) != NULL
        return self._number(found)

    cdef Outcome _setex(self, Request *request, int64_t unit) except? LEFT:
        """``setex psetex``."""
        cdef uint64_t when = self._after(&request.tokens[2], unit)
        cdef bytes refusal
        if not when:
            return LEFT
        refusal = self._put_logged(
            &request.tokens[1],
            request.hash,
            self._find(request),
            &request.tokens[3],
            when,
        )
        return self._done() if refusal is None else self._refuse(refusal)

    cdef Outcome _set_words(self, Request *request) except? LEFT:
        """``set`` with EX or PX, with NX or XX."""
        cdef Token word = request.tokens[2]
        cdef Item *entry
        cdef uint64_t when = 0
        cdef bint unless = False, only = False
        cdef uint32_t left = request.count - 3
        cdef bytes refusal
        while left:
            skip(&word)
            left -= 1
            if is_word(&word, b"nx") and not only:
                unless = True
            elif is_word(&word, b"xx") and not unless:
                only = True
            elif left and not when:
                when = self._until(&word)
                if not when:
                    return LEFT
                skip(&word)
                left -= 1
            else:
                return LEFT
        entry = self._find(request)
        if (unless and entry != NULL) or (only and entry == NULL):
            self._reply(NONE)
            return ANSWERED
        refusal = self._put_logged(&request.tokens[1], request.hash, entry, &request.tokens[2], when)
        return self._done() if refusal is None else self._refuse(refusal)

    cdef uint64_t _until(self, const Token *option) noexcept:
        """Return the deadline that EX or PX and the number behind it say, 0 if it is another word or number."""
        cdef Token text = option[0]
        cdef bint seconds = is_word(option, b"ex")
        if not seconds and not is_word(option, b"px"):
            return 0
        skip(&text)
        return self._after(&text, 1000 if seconds else 1)

    cdef uint64_t _after(self, const Token *text, int64_t unit) noexcept:
        """Return the deadline that is so many times ``unit`` from now, 0 if the text is no such number."""
        cdef int64_t number
        if not read_integer(text, &number) or not 0 < number < LATEST // 1000:
            return 0
        return <uint64_t>(number * unit) + self.now

    cdef Outcome _getex(self, Request *request) except? LEFT:
        """``getex``: answer the string, then change when it expires."""
        cdef uint64_t when = 0
        cdef Item *entry
        cdef bytes refusal = None
        if request.count == 3 and not is_word(&request.tokens[2], b"persist"):
            return LEFT
        if request.count == 4:
            when = self._until(&request.tokens[2])
            if not when:
                return LEFT
        entry = self._find(request)
        if entry == NULL:
            self._reply(NONE)
            return ANSWERED
        if is_set(entry):
            return LEFT
        if self._too_long(8 + size_of(entry)):
            refusal = TOO_LONG
        else:
            self._part(entry, 0, size_of(entry))
            if request.count > 2:
                refusal = self._set_deadline(entry, when)
        return ANSWERED if refusal is None else self._refuse(refusal)

    cdef Outcome _get_before(self, Request *request) except? LEFT:
        """``getset``, and ``getdel``: answer the string, then change it."""
        cdef Item *entry = self._find(request)
        cdef bint long = False
        cdef bytes refusal = None
        if entry != NULL and is_set(entry):
            return LEFT
        if entry == NULL:
            self._reply(NONE)
        else:
            long = self._too_long(8 + size_of(entry))
            if not long:
                self._part(entry, 0, size_of(entry))
        if request.count == 3:
            refusal = self._put_logged(&request.tokens[1], request.hash, entry, &request.tokens[2], 0)
        elif entry != NULL and not self._remove(entry):
            return REFUSED
        if refusal is None and long:
            refusal = TOO_LONG
        return ANSWERED if refusal is None else self._refuse(refusal)

    cdef Outcome _append(self, Request *request) except? LEFT:
        cdef Token *key = &request.tokens[1]
        cdef Token *data = &request.tokens[2]
        cdef Item *entry = self._find(request)
        cdef size_t size
        cdef bytes refusal = None
        if entry != NULL and is_set(entry):
            return LEFT
        size = data.size if entry == NULL else size_of(entry) + data.size
        if key.size + size > MAX_STRING:
            return LEFT
        if entry == NULL:
            refusal = self._put_logged(key, request.hash, NULL, data, 0)
        elif data.size:
            refusal = self._write_at(entry, size_of(entry), data)
        return self._number(<int64_t>size) if refusal is None else self._refuse(refusal)

    cdef Outcome _getrange(self, Request *request) except? LEFT:
        cdef int64_t first, last, size
        cdef Item *entry
        if not read_integer(&request.tokens[2], &first) or not read_integer(&request.tokens[3], &last):
            return LEFT
        if not (-LATEST < first < LATEST and -LATEST < last < LATEST):
            return LEFT
        entry = self._find(request)
        if entry != NULL and is_set(entry):
            return LEFT
        self._count_look(entry)
        size = 0 if entry == NULL else <int64_t>size_of(entry)
        if first < 0 and last < 0 and first > last:
            size = 0
        first = (first + size if first + size > 0 else 0) if first < 0 else first
        last = (last + size if last + size > 0 else 0) if last < 0 else last
        last = last if last < size else size - 1
        size = last - first + 1 if first <= last else 0
        if self._too_long(8 + <size_t>size):
            return self._refuse(TOO_LONG)
        self._part(entry, <size_t>first, <size_t>size)
        return ANSWERED

    cdef int _part(self, Item *entry, size_t start, size_t size) except -1:
        """Reply a part of the string."""
        self._reserve_reply(8 + size)
        buffer_put_u32(&self._out, 4 + <uint32_t>size)
        buffer_put_u32(&self._out, 0)
        if size:
            buffer_put(&self._out, value_of(entry) + start, size)
        return 0

    cdef Outcome _setnx(self, Request *request) except? LEFT:
        cdef bytes refusal
        if self._find(request) != NULL:
            return self._number(0)
        refusal = self._put_logged(&request.tokens[1], request.hash, NULL, &request.tokens[2], 0)
        return self._number(1) if refusal is None else self._refuse(refusal)

    cdef Outcome _strlen(self, Request *request) except? LEFT:
        cdef Item *entry = self._find(request)
        if entry != NULL and is_set(entry):
            return LEFT
        self._count_look(entry)
        return self._number(0 if entry == NULL else <int64_t>size_of(entry))

    cdef Outcome _mget(self, Request *request) except? LEFT:
        cdef size_t start = self._out.size, size
        cdef Keys keys
        cdef Item *entry
        cdef bint long = False
        cdef uint32_t i
        self._reserve_reply(12)
        self._out.size += 12
        begin_keys(&keys, request, 1)
        for i in range(1, request.count):
            entry = self._look_at(next_key(&keys, &self._table), False)
            if entry == NULL or not is_set(entry):
                self._count_look(entry)
            if entry != NULL and not is_set(entry):
                ring_touch(&self._ring, entry)
            if long:
                continue
            if entry == NULL or is_set(entry):
                self._reserve_reply(4)
                buffer_put_u32(&self._out, 0xFFFFFFFF)
            else:
                size = size_of(entry)
                self._reserve_reply(4 + size)
                buffer_put_u32(&self._out, <uint32_t>size)
                buffer_put(&self._out, value_of(entry), size)
            size = self._out.size - start
            long = size > SHORT and self._out.size - self._replies > self.max_response
        if long:
            return self._refuse(TOO_LONG)
        set_u32(self._out.data + start, <uint32_t>(self._out.size - start - 4))
        set_u32(self._out.data + start + 4, LIST)
        set_u32(self._out.data + start + 8, request.count - 1)
        return ANSWERED

    cdef Outcome _mset(self, Request *request) except? LEFT:
        cdef Keys keys
        cdef Request *one
        cdef Token value
        cdef uint32_t i
        cdef bytes refusal
        if request.count % 2 == 0:
            return LEFT
        begin_keys(&keys, request, 2)
        for i in range(1, request.count, 2):
            one = next_key(&keys, &self._table)
            value = one.tokens[1]
            skip(&value)
            refusal = self._put_logged(&one.tokens[1], one.hash, self._look_at(one, True), &value, 0)
            if refusal is not None:
                return self._refuse(refusal)
        return self._done()

    cdef Outcome _delete(self, Request *request) except? LEFT:
        cdef Keys keys
        cdef Item *entry
        cdef int64_t found = 0
        cdef uint32_t i
        begin_keys(&keys, request, 1)
        for i in range(1, request.count):
            entry = self._look_at(next_key(&keys, &self._table), True)
            if entry != NULL:
                if not self._remove(entry):
                    return REFUSED
                found += 1
        return self._number(found)

    cdef Outcome _zadds(self, Request *request) except? LEFT:
        """``zadd`` of several pairs, without an option."""
        cdef Token *key = &request.tokens[1]
        cdef Token text, member
        cdef Item *entry
        cdef Item *node
        cdef double score
        cdef int64_t added = 0
        cdef uint32_t i
        cdef bytes refusal
        if request.count % 2:
            return LEFT
        member = key[0]
        for i in range(2, request.count, 2):
            text = member
            skip(&text)
            if not read_score(text.at, text.size, &score):
                return LEFT
            member = text
            skip(&member)
        entry = self._find(request)
        if entry != NULL and is_set(entry) == 0:
            return LEFT
        member = key[0]
        for i in range(2, request.count, 2):
            text = member
            skip(&text)
            read_score(text.at, text.size, &score)
            member = text
            skip(&member)
            entry = self._find(request)
            node = zset_find(zset_of(entry), member.at, member.size) if entry != NULL else NULL
            if node == NULL:
                added += 1
            elif node.second.score == score:
                continue
            refusal = self._zput_logged(key, request.hash, entry, &member, score)
            if refusal is not None:
                return self._refuse(refusal)
        return self._number(added)

    cdef Outcome _zincrby(self, Request *request) except? LEFT:
        cdef Token *member = &request.tokens[3]
        cdef double score
        cdef Item *entry
        cdef Item *node
        cdef bytes refusal
        if not read_score(request.tokens[2].at, request.tokens[2].size, &score):
            return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        node = zset_find(zset_of(entry), member.at, member.size) if entry != NULL else NULL
        if node != NULL:
            score += node.second.score
            if score != score:
                return LEFT
            score += 0.0
        if node == NULL or node.second.score != score:
            refusal = self._zput_logged(&request.tokens[1], request.hash, entry, member, score)
            if refusal is not None:
                return self._refuse(refusal)
        return self._score(score)

    cdef Outcome _zscore(self, Request *request) except? LEFT:
        cdef Item *entry = self._find(request)
        cdef Item *node = NULL
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        if entry != NULL:
            node = zset_find(zset_of(entry), request.tokens[2].at, request.tokens[2].size)
        if node != NULL:
            return self._score(node.second.score)
        self._reply(NONE)
        return ANSWERED

    cdef Outcome _zcard(self, Request *request) except? LEFT:
        cdef Item *entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        return self._number(0 if entry == NULL else <int64_t>zset_of(entry).count)

    cdef Outcome _zranks(self, Request *request, bint reverse) except? LEFT:
        """``zrangebyrank``, and ``zrevrange``, which counts from the other end."""
        cdef Item *entry
        cdef int64_t first, last, count
        cdef size_t number
        cdef bint scores = request.count == 5
        if scores and not is_word(&request.tokens[4], b"withscores"):
            return LEFT
        if not read_integer(&request.tokens[2], &first) or not read_integer(&request.tokens[3], &last):
            return LEFT
        if not (-LATEST < first < LATEST and -LATEST < last < LATEST):
            return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        count = <int64_t>zset_of(entry).count if entry != NULL else 0
        first = (first + count if first + count > 0 else 0) if first < 0 else first
        last = last + count if last < 0 else last
        if last >= count:
            last = count - 1
        number = <size_t>(last - first + 1) if first <= last else 0
        return self._pairs(entry, <size_t>(count - 1 - last if reverse else first), number, scores, reverse)

    cdef Outcome _pairs(self, Item *entry, size_t rank, size_t number, bint scores, bint reverse) except? LEFT:
        """Reply so many members from a rank on, the last one first with ``reverse``."""
        cdef size_t start = self._out.size
        self._reserve_reply(12)
        self._out.size += 12
        if number and not self._put_pairs(zset_at(zset_of(entry), rank), number, scores, reverse):
            return self._refuse(TOO_LONG)
        set_u32(self._out.data + start, <uint32_t>(self._out.size - start - 4))
        set_u32(self._out.data + start + 4, LIST)
        set_u32(self._out.data + start + 8, <uint32_t>(number * 2 if scores else number))
        return ANSWERED

    cdef Outcome _zscores(self, Request *request, bint reverse) except? LEFT:
        """``zrangebyscore``, and ``zrevrangebyscore``."""
        cdef Item *entry
        cdef Bounds bounds
        cdef Token word = request.tokens[3]
        cdef int64_t offset = 0, most = -1
        cdef size_t start, number
        cdef bint scores = False
        cdef uint32_t left = request.count - 4
        if not read_bounds(&request.tokens[3 if reverse else 2], &request.tokens[2 if reverse else 3], &bounds):
            return LEFT
        while left:
            skip(&word)
            left -= 1
            if is_word(&word, b"withscores"):
                scores = True
            elif is_word(&word, b"limit") and left >= 2:
                skip(&word)
                if not read_integer(&word, &offset):
                    return LEFT
                skip(&word)
                if not read_integer(&word, &most):
                    return LEFT
                left -= 2
            else:
                return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        number = ranks_between(entry, &bounds, &start)
        if offset < 0 or <uint64_t>offset > number:
            offset = <int64_t>number
        number -= <size_t>offset
        start = start if reverse else start + <size_t>offset
        if 0 <= most and <uint64_t>most < number:
            start = start + number - <size_t>most if reverse else start
            number = <size_t>most
        return self._pairs(entry, start, number, scores, reverse)

    cdef Outcome _zcount(self, Request *request) except? LEFT:
        cdef Item *entry
        cdef Bounds bounds
        cdef size_t start
        if not read_bounds(&request.tokens[2], &request.tokens[3], &bounds):
            return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        return self._number(<int64_t>ranks_between(entry, &bounds, &start))

    cdef Outcome _zrevrank(self, Request *request) except? LEFT:
        cdef Item *entry = self._find(request)
        cdef Item *node = NULL
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        if entry != NULL:
            node = zset_find(zset_of(entry), request.tokens[2].at, request.tokens[2].size)
        if node != NULL:
            return self._number(<int64_t>(zset_of(entry).count - 1 - zset_rank(zset_of(entry), node)))
        self._reply(NONE)
        return ANSWERED

    cdef Outcome _zmscore(self, Request *request) except? LEFT:
        cdef size_t start = self._out.size, size
        cdef Token member = request.tokens[1]
        cdef Item *entry = self._find(request)
        cdef Item *node
        cdef uint32_t i
        if entry != NULL and not is_set(entry):
            return LEFT
        self._count_look(entry)
        self._reserve_reply(12)
        self._out.size += 12
        for i in range(2, request.count):
            skip(&member)
            node = zset_find(zset_of(entry), member.at, member.size) if entry != NULL else NULL
            self._reserve_reply(4 + SCORE_TEXT)
            size = 0
            if node == NULL:
                buffer_put_u32(&self._out, 0xFFFFFFFF)
            else:
                size = write_score(self._out.data + self._out.size + 4, node.second.score)
                buffer_put_u32(&self._out, <uint32_t>size)
                self._out.size += size
            size = self._out.size - start
            if size > SHORT and self._out.size - self._replies > self.max_response:
                return self._refuse(TOO_LONG)
        set_u32(self._out.data + start, <uint32_t>(self._out.size - start - 4))
        set_u32(self._out.data + start + 4, LIST)
        set_u32(self._out.data + start + 8, request.count - 2)
        return ANSWERED

    cdef Outcome _ztakes(self, Request *request) except? LEFT:
        """``zrem`` of several members."""
        cdef Token member = request.tokens[1]
        cdef Item *entry = self._find(request)
        cdef Item *node
        cdef int64_t found = 0
        cdef uint32_t i
        cdef bint last = False
        if entry != NULL and not is_set(entry):
            return LEFT
        for i in range(2, request.count):
            if entry == NULL or last:
                break
            skip(&member)
            node = zset_find(zset_of(entry), member.at, member.size)
            if node != NULL:
                last = zset_of(entry).count == 1
                if not self._ztake_logged(entry, node):
                    return REFUSED
                found += 1
        return self._number(found)

    cdef Outcome _zpop(self, Request *request, bint highest) except? LEFT:
        """``zpopmin``, and ``zpopmax``."""
        cdef Item *entry
        cdef int64_t most = 1
        cdef size_t number
        if request.count == 3 and (not read_integer(&request.tokens[2], &most) or most < 0):
            return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        number = zset_of(entry).count if entry != NULL else 0
        if <uint64_t>most < number:
            number = <size_t>most
        if self._pairs(entry, zset_of(entry).count - number if highest and number else 0, number, True, highest) == REFUSED:
            return REFUSED
        return ANSWERED if self._ztake_some(entry, 0, number, highest) else REFUSED

    cdef Outcome _ztake_range(self, Request *request, bint scores) except? LEFT:
        """``zremrangebyscore``, and ``zremrangebyrank``."""
        cdef Item *entry
        cdef Bounds bounds
        cdef int64_t first = 0, last = 0, count
        cdef size_t start, number
        if scores:
            if not read_bounds(&request.tokens[2], &request.tokens[3], &bounds):
                return LEFT
        elif not read_integer(&request.tokens[2], &first) or not read_integer(&request.tokens[3], &last):
            return LEFT
        if not (-LATEST < first < LATEST and -LATEST < last < LATEST):
            return LEFT
        entry = self._find(request)
        if entry != NULL and not is_set(entry):
            return LEFT
        if scores:
            number = ranks_between(entry, &bounds, &start)
        else:
            count = <int64_t>zset_of(entry).count if entry != NULL else 0
            first = (first + count if first + count > 0 else 0) if first < 0 else first
            last = last + count if last < 0 else last
            last = last if last < count else count - 1
            start = <size_t>first
            number = <size_t>(last - first + 1) if first <= last else 0
        return self._number(<int64_t>number) if self._ztake_some(entry, start, number, False) else REFUSED

    cdef bint _ztake_some(self, Item *entry, size_t rank, size_t number, bint highest) except -1:
        """Remove so many members from a rank on, or the highest ones, logged; False without memory."""
        cdef Zset *zset
        cdef Place place
        while number:
            zset = zset_of(entry)
            place = zset_at(zset, zset.count - 1 if highest else rank)
            if not self._ztake_logged(entry, node_at(&place)):
                return False
            number -= 1
        return True

    cdef bint _ztake_logged(self, Item *entry, Item *node) noexcept:
        """Remove a member, logged, and with its last one the set; False without memory."""
        cdef Token key = Token(key_of(entry), entry.size)
        cdef Token member = Token(key_of(node), node.size)
        if not self._reserve(20 + key.size + member.size):
            return False
        self._log(b"zrem", 4, 3, &key, &member, NULL)
        self._ztake(entry, node)
        return True

    cdef bint _put_pairs(self, Place place, size_t number, bint scores, bint reverse) except -1:
        """Put so many members into a list's reply, the last one first with ``reverse``; False if it is too long."""
        cdef Item *few[16]
        cdef Item **nodes = few
        cdef Item *one
        cdef size_t i, size
        if reverse:
            if number > 16:
                nodes = <Item **>alloc_grow(NULL, number * sizeof(Item *))
                if nodes == NULL:
                    raise MemoryError
            for i in range(number):
                nodes[number - 1 - i] = node_at(&place)
                place_next(&place)
        try:
            for i in range(number):
                one = nodes[i] if reverse else node_at(&place)
                self._reserve_reply(4 + <size_t>one.size + 4 + SCORE_TEXT)
                buffer_put_u32(&self._out, one.size)
                buffer_put(&self._out, key_of(one), one.size)
                if scores:
                    size = write_score(self._out.data + self._out.size + 4, one.second.score)
                    buffer_put_u32(&self._out, <uint32_t>size)
                    self._out.size += size
                if self._out.size - self._replies > self.max_response and self._out.size - self._replies > SHORT:
                    return False
                if not reverse:
                    place_next(&place)
            return True
        finally:
            if nodes != few:
                free(nodes)

    # ---- what commands are made of ---------------------------------------------------------------

    cdef inline Item *_find(self, const Request *request) except? NULL:
        """Return the entry of the request's key, made the most recently used, or NULL."""
        return self._look(&request.tokens[1], request.hash, True)

    cdef inline Item *_look(self, const Token *key, uint64_t hash, bint use) except? NULL:
        """The same for any key, made the most recently used only with ``use``. MemoryError: it could not go."""
        cdef uint64_t *slot = table_find(&self._table, hash, key.at, key.size)
        cdef Item *entry
        if slot == NULL:
            return NULL
        entry = item_in(slot[0])
        if is_timed(entry) and timer_of(entry).when - 1 < self.now:  # 0, for none, is more than any time then
            if self.readonly is None and not self._expire(entry):
                raise MemoryError
            return NULL
        if use:
            ring_touch(&self._ring, entry)
        return entry

    cdef inline Item *_read(self, const Request *request) except? NULL:
        """The same as _find, counted as a hit or a miss."""
        cdef Item *entry = self._find(request)
        if entry == NULL:
            self.misses += 1
        else:
            self.hits += 1
        return entry

    cdef void _drop(self, Item *entry) noexcept:
        """Remove the entry, so that it can be put back; there is room for the undo."""
        self._take_out(entry)
        self._remember(REMOVED, entry, NULL)

    cdef void _take_out(self, Item *entry) noexcept:
        """Take the entry out of table, ring and heap."""
        cdef uint64_t hash = table_hash(&self._table, key_of(entry), entry.size)
        table_remove(&self._table, hash, table_slot(&self._table, entry))
        ring_remove(entry)
        if when_of(entry):
            due_remove(&self._due, entry)
        self.used -= entry_cost(entry)

    cdef bint _put_back(self, Item *entry) noexcept:
        """Put the entry into all of them, the heap having room; False if the table has none."""
        if not table_add(&self._table, table_hash(&self._table, key_of(entry), entry.size), entry):
            return False
        ring_add(&self._ring, entry)
        if when_of(entry):
            due_add(&self._due, entry)
        self.used += entry_cost(entry)
        return True

    cdef bytes _make_room(self, bint new, int64_t change, size_t alone):
        """Evict until a write fits that counts ``change`` bytes more; return a refusal, or None."""
        cdef uint64_t capacity = self.capacity if new and not self._replaying else 0
        cdef uint64_t maxmemory = self.maxmemory if change > 0 and not self._replaying else 0
        while (capacity and self._table.count >= capacity) or (maxmemory and self.used + change > maxmemory):
            if maxmemory and alone > maxmemory:
                return TOO_LARGE
            if not self.evict or not self._evict():
                return OUT_OF_MEMORY
        return None

    cdef bint _evict(self) noexcept:
        """Remove the least recently used key; False if there is no memory to log it."""
        cdef Item *last
        marks_trim(&self._marks, &self._ring)
        if not self._remove(past_marks(self._ring.next)):
            return False
        last = past_marks(self._ring.next)
        if last != &self._ring:  # it will probably go next, and the one behind it after that
            fetch(chain_of(&self._table, table_hash(&self._table, key_of(last), last.size)))
            fetch(last.next)
        self.evictions += 1
        self._evicted += 1
        return True

    cdef bint _expire(self, Item *entry) noexcept:
        """Remove a key whose deadline has come; False if there is no memory to log it."""
        if not self._remove(entry):
            return False
        self.expirations += 1
        self._expired += 1
        return True

    cdef bint _remove(self, Item *entry) noexcept:
        """Remove the key, logged; False if there is no memory for that."""
        cdef Token key = Token(key_of(entry), entry.size)
        if not self._reserve(15 + key.size):
            return False
        self._log(b"del", 3, 2, &key, NULL, NULL)
        self._drop(entry)
        return True

    # ---- times of use ----------------------------------------------------------------------------

    cdef void _tick(self) noexcept:
        """Move the clock on, to what ``now`` is, and have a mark for what is used from here on."""
        if self._seen < self.now and self._seen:
            self._clock += self.now - self._seen
            self._second = <uint32_t>min(self._clock // 1000, <uint64_t>0xFFFFFFFF)  # 136 years
        self._seen = self.now
        if self._second != marks_latest(&self._marks) or self._uses >= MARK_EVERY:
            self._mark()

    cdef void _mark(self) noexcept:
        self._past_uses += self._uses
        self._uses = 0
        marks_add(&self._marks, &self._ring, self._second, self._table.count)

    cdef inline void _count_use(self) noexcept:
        """Count a use that is not one request's only one; with many there is a mark among them."""
        self._uses += 1
        if self._uses >= MARK_EVERY:
            self._mark()

    def idle(self, bytes key not None):
        """Return the seconds since the key's last use."""
        cdef Item *entry = self._entry(key, False)
        return None if entry == NULL else self._second - marks_second(&self._marks, &self._ring, entry)

    # ---- the operations of keyspace.py ---------------------------------------------------------------

    cdef Item *_entry(self, bytes key, bint use) except? NULL:
        """Return the key's entry, made the most recently used with ``use``, or NULL."""
        cdef Token token = token_of(key)
        self._count_use()
        return self._look(&token, table_hash(&self._table, token.at, token.size), use)

    cdef Item *_there(self, bytes key) except NULL:
        """Return the key's entry, which is there."""
        cdef Item *entry = self._entry(key, True)
        if entry == NULL:
            raise KeyError(key)
        return entry

    cdef Item *_set_at(self, bytes key) except? NULL:
        """Return the entry of a sorted set, or NULL."""
        cdef Item *entry = self._entry(key, True)
        if entry != NULL and not is_set(entry):
            raise Refused(WRONG_TYPE)
        return entry

    cdef int _count(self, Item *entry) except -1:
        """Count a look at a key by a command that reads."""
        if self._reading:
            if entry == NULL:
                self.misses += 1
            else:
                self.hits += 1
        return 0

    def kind(self, bytes key not None):
        """Return what the key holds."""
        cdef Item *entry = self._entry(key, False)
        if entry == NULL:
            return None
        return "zset" if is_set(entry) else "string"

    def touch(self, bytes key not None):
        """Make the key the most recently used; return whether it is there."""
        return self._entry(key, True) != NULL

    def remove(self, bytes key not None):
        """Remove the key; return whether it was there."""
        cdef Item *entry = self._entry(key, True)
        if entry == NULL:
            return False
        if not self._remove(entry):
            raise MemoryError
        return True

    def move(self, bytes key not None, bytes to not None):
        """Give what ``key`` holds another key."""
        cdef Token target = token_of(to)
        refuse(self._move(self._there(key), &target))

    cdef bytes _move(self, Item *entry, const Token *to):
        """Give the entry another key; return a refusal, or None."""
        cdef Token key = Token(key_of(entry), entry.size)
        cdef uint64_t hash = table_hash(&self._table, to.at, to.size)
        cdef Item *old = self._look(to, hash, True)
        cdef Item *moved
        cdef size_t size = sizeof(Zset *) if is_set(entry) else size_of(entry)
        cdef size_t before = entry_bytes(key.size, size, is_timed(entry))
        cdef size_t after = entry_bytes(to.size, size, is_timed(entry))
        if self._saving:
            self._save_anew(to)
        ring_touch(&self._ring, entry)
        refusal = self._make_room(False, <int64_t>after - <int64_t>before, entry_cost(entry) - before + after)
        if refusal is not None:
            return refusal
        old = self._look(to, hash, False)
        moved = entry_new(to.at, to.size, value_of(entry), size, entry.extra)
        if moved == NULL or not self._reserve(22 + key.size + to.size) or not table_add(&self._table, hash, moved):
            shell_free(moved)
            return OUT_OF_MEMORY
        self._log(b"rename", 6, 3, &key, to, NULL)
        if old != NULL:
            self._drop(old)
        self._exchange(entry, moved, when_of(entry))
        return None

    cdef void _exchange(self, Item *entry, Item *other, uint64_t when) noexcept:
        """Remove ``entry`` for ``other``, which holds the same and is in the table; there is room for the undo."""
        self._take_out(entry)
        self._remember(SHELL_REMOVED, entry, NULL)
        ring_add(&self._ring, other)
        self.used += entry_cost(other)
        self._remember(SHELL_ADDED, other, NULL)
        if is_timed(other):
            self._set_timer(other, when)

    def deadline(self, bytes key not None):
        """Return the deadline, 0 if there is none, None if there is no key."""
        cdef Item *entry = self._entry(key, False)
        return None if entry == NULL else when_of(entry)

    def set_deadline(self, bytes key not None, uint64_t when):
        """Set the deadline, or remove it by 0."""
        refuse(self._set_deadline(self._there(key), when))

    cdef bytes _set_deadline(self, Item *entry, uint64_t when):
        """Give the entry a deadline, 0 for none; return a refusal, or None."""
        cdef Token key = Token(key_of(entry), entry.size)
        cdef uint8_t digits[20]
        cdef Token text = Token(<const uint8_t *>digits, write_digits(digits, when))
        cdef Item *timed
        cdef size_t size = sizeof(Zset *) if is_set(entry) else size_of(entry)
        cdef size_t before, after
        if when_of(entry) == when:
            return None
        if not is_timed(entry):
            before = entry_bytes(key.size, size, False)
            after = entry_bytes(key.size, size, True)
            refusal = self._make_room(False, <int64_t>(after - before), entry_cost(entry) - before + after)
            if refusal is not None:
                return refusal
        if not self._reserve(25 + key.size + text.size) or not due_reserve(&self._due, 1):
            return OUT_OF_MEMORY
        if is_timed(entry):
            self._undo[self._undo_count].old.when = timer_of(entry).when
            self._remember(TIMED, entry, NULL)
            self._set_timer(entry, when)
        else:
            timed = entry_new(key.at, key.size, value_of(entry), size, entry.extra | IS_TIMED)
            if timed == NULL or not table_add(
                &self._table, table_hash(&self._table, key.at, key.size), timed
            ):
                shell_free(timed)
                return OUT_OF_MEMORY
            self._exchange(entry, timed, when)
        if when:
            self._log(b"pexpireat", 9, 3, &key, &text, NULL)
        else:
            self._log(b"persist", 7, 2, &key, NULL, NULL)
        return None

    def memory(self, bytes key not None):
        """Return what the key is counted with."""
        cdef Item *entry = self._entry(key, False)
        return None if entry == NULL else entry_cost(entry)

    def scan(self, uint64_t cursor, size_t count):
        """Return the next cursor and about ``count`` keys."""
        cdef list found = []
        cdef list chain = []
        while True:
            walk_chain(&self._table, &cursor, chain)
            found += [key for _score, key in chain if self.kind(key) is not None]
            chain.clear()
            if cursor == 0 or <size_t>len(found) >= count:
                return cursor, found

    def random_key(self):
        """Return a key by chance."""
        cdef Item *entry
        self._dice ^= self._dice << 13
        self._dice ^= self._dice >> 7
        self._dice ^= self._dice << 17
        entry = table_random(&self._table, self._dice)
        return None if entry == NULL else (<char *>key_of(entry))[: entry.size]

    def recent(self, size_t count):
        """Return the keys that were used last, latest first."""
        cdef Item *entry = self._ring.second.older
        cdef list found = []
        while entry != &self._ring and <size_t>len(found) < count:
            if is_entry(entry):
                found.append((<char *>key_of(entry))[: entry.size])
            entry = entry.second.older
        return [key for key in found if self.kind(key) is not None]  # afterwards, as it may remove

    def flush(self):
        """Remove every key."""
        marks_trim(&self._marks, &self._ring)
        while self._table.count:
            if not self._remove(past_marks(self._ring.next)):
                raise MemoryError
            marks_trim(&self._marks, &self._ring)

    def string(self, bytes key not None):
        """Return the string."""
        cdef Item *entry = self._entry(key, True)
        self._count(entry)
        if entry == NULL:
            return None
        if is_set(entry):
            raise Refused(WRONG_TYPE)
        return (<char *>value_of(entry))[: size_of(entry)]

    def put(self, bytes key not None, bytes value not None, uint64_t when=0):
        """Make the key hold a string."""
        cdef Token name = token_of(key)
        cdef Token content = token_of(value)
        cdef uint8_t digits[20]
        cdef Token text = Token(<const uint8_t *>digits, write_digits(digits, when))
        cdef uint64_t hash = table_hash(&self._table, name.at, name.size)
        cdef size_t effect = 19 + name.size + content.size + 25 + name.size + text.size
        self._count_use()
        refuse(self._put(&name, hash, self._look(&name, hash, True), &content, when, effect))
        self._log(b"set", 3, 3, &name, &content, NULL)
        if when:
            self._log(b"pexpireat", 9, 3, &name, &text, NULL)

    def write_at(self, bytes key not None, size_t offset, bytes data not None):
        """Overwrite a part of the string, which is there."""
        cdef Token content = token_of(data)
        refuse(self._write_at(self._there(key), offset, &content))
        return size_of(self._there(key))

    cdef bytes _write_at(self, Item *old, size_t offset, const Token *data):
        """Put a string in the entry's place that has this in it; return a refusal, or None."""
        cdef Token key = Token(key_of(old), old.size)
        cdef uint8_t digits[20]
        cdef Token text = Token(<const uint8_t *>digits, write_digits(digits, offset))
        cdef size_t end = offset + data.size
        cdef size_t size = end if end > size_of(old) else size_of(old)
        cdef size_t before = size_of(old)
        cdef Item *entry
        cdef size_t cost = entry_bytes(key.size, size, is_timed(old))
        if size > VALUE_SIZE:
            return TOO_LARGE
        refusal = self._make_room(False, <int64_t>cost - <int64_t>entry_cost(old), cost)
        if refusal is not None:
            return refusal
        entry = entry_room(old, size)
        if entry == NULL or not self._reserve(28 + key.size + text.size + data.size):
            shell_free(entry)
            return OUT_OF_MEMORY
        memory.memcpy(value_of(entry), value_of(old), before)
        if offset > before:
            memory.memset(value_of(entry) + before, 0, offset - before)
        memory.memcpy(value_of(entry) + offset, data.at, data.size)
        self._log(b"setrange", 8, 4, &key, &text, data)
        table_put(table_slot(&self._table, old), entry)
        ring_remove(old)
        ring_add(&self._ring, entry)
        if is_timed(old):
            if timer_of(old).when:
                due_remove(&self._due, old)
            self._set_timer(entry, timer_of(old).when)
        self._remember(REPLACED, entry, old)
        self.used += cost - entry_cost(old)
        return None

    def members(self, bytes key not None):
        """Return how many members the sorted set has."""
        cdef Item *entry = self._entry(key, True)
        self._count(entry)
        if entry == NULL:
            return 0
        if not is_set(entry):
            raise Refused(WRONG_TYPE)
        return zset_of(entry).count

    def zscore(self, bytes key not None, bytes member not None):
        """Return the member's score."""
        cdef Item *entry = self._set_at(key)
        cdef Token name = token_of(member)
        cdef Item *node = zset_find(zset_of(entry), name.at, name.size) if entry != NULL else NULL
        return None if node == NULL else node.second.score

    def zplace(self, bytes key not None, double score, bytes member not None=b""):
        """Return how many pairs come before (score, member)."""
        cdef Item *entry = self._set_at(key)
        cdef Token name = token_of(member)
        return 0 if entry == NULL else zset_place(zset_of(entry), score, name.at, name.size)

    def zslice(self, bytes key not None, size_t start, size_t stop):
        """Return the pairs from rank ``start`` to before ``stop``."""
        cdef Item *entry = self._set_at(key)
        cdef Place place
        cdef Item *node = NULL
        cdef list pairs = []
        if entry != NULL:
            place = zset_at(zset_of(entry), start)
            node = node_at(&place)
        while node != NULL and start < stop:
            pairs.append((node.second.score, (<char *>key_of(node))[: node.size]))
            place_next(&place)
            node = node_at(&place)
            start += 1
        return pairs

    def zput(self, bytes key not None, double score, bytes member not None):
        """Add the member, or move it."""
        cdef Token name = token_of(key)
        cdef Token content = token_of(member)
        cdef uint8_t digits[SCORE_TEXT]
        cdef Token text = Token(<const uint8_t *>digits, write_score(digits, score))
        cdef uint64_t hash = table_hash(&self._table, name.at, name.size)
        cdef bint changed = False
        cdef size_t effect = 24 + name.size + text.size + content.size
        refuse(self._zput(&name, hash, self._set_at(key), &content, score, effect, &changed))
        if changed:
            self._log(b"zadd", 4, 4, &name, &text, &content)

    def ztake(self, bytes key not None, bytes member not None):
        """Remove the member."""
        cdef Item *entry = self._set_at(key)
        cdef Token content = token_of(member)
        cdef Item *node = zset_find(zset_of(entry), content.at, content.size) if entry != NULL else NULL
        if node == NULL:
            return False
        if not self._ztake_logged(entry, node):
            raise MemoryError
        return True

    def zscan(self, bytes key not None, uint64_t cursor, size_t count):
        """Return the next cursor and about ``count`` pairs; all of them of a set without a table."""
        cdef Item *entry = self._set_at(key)
        cdef Zset *zset
        cdef list found = []
        if entry == NULL:
            return 0, found
        zset = zset_of(entry)
        if zset.table == NULL:
            return 0, self.zslice(key, 0, zset.count)
        while True:
            walk_chain(zset.table, &cursor, found)
            if cursor == 0 or <size_t>len(found) >= count:
                return cursor, found

    # ---- effects and their undo ------------------------------------------------------------------

    cdef bint _reserve(self, size_t size) noexcept:
        """Make sure of the memory for effects of ``size`` bytes and their undo; False if there is none."""
        cdef void *grown
        cdef size_t room
        if self._undo_room - self._undo_count < UNDO_MOST:
            room = 2 * self._undo_room + 64
            grown = alloc_grow(self._undo, room * sizeof(Undo))
            if grown == NULL:
                return False
            self._undo = <Undo *>grown
            self._undo_room = room
        if self._replaying:
            return True
        return buffer_reserve(&self._frames, size) if self._gathering else self.log.reserve(size)

    cdef inline void _remember(self, Change change, Item *entry, Item *other) noexcept:
        cdef Undo *undo = &self._undo[self._undo_count]
        undo.change = change
        undo.entry = entry
        undo.other = other
        self._undo_count += 1

    cdef inline void _remember_score(self, Change change, Item *entry, Item *node, double score) noexcept:
        self._undo[self._undo_count].old.score = score
        self._remember(change, entry, node)

    cdef void _log(
        self,
        const char *name,
        size_t size,
        uint32_t count,
        const Token *key,
        const Token *second,
        const Token *third,
    ) noexcept:
        """Log an effect of ``count`` tokens, the name among them; there is room."""
        cdef uint8_t *start
        cdef size_t written
        if self._replaying:
            return
        start = self._frames.data + self._frames.size if self._gathering else self.log.begin()
        written = put_frame(start, name, size, count, key, second, third)
        if self._gathering:
            self._frames.size += written
        else:
            self.log.end(written)

    cdef inline void _effect(self, Request *request) noexcept:
        """Log the request, its name in lower case, and reply that it is done."""
        cdef uint8_t *at
        cdef size_t i
        if not self._replaying:
            if is_lower(&request.tokens[0]):
                self.log.put(request.frame, request.size)
            else:
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
        shell_free(entry)
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
            elif undo.change == SHELL_REMOVED:
                shell_free(undo.entry)
            elif undo.change == MEMBER_REMOVED:
                node_free(undo.other)
        self._undo_count = 0
        buffer_empty(&self._kept)
        due_trim(&self._due)
        if self._undo_room > 1 << 16:
            free(self._undo)
            self._undo = NULL
            self._undo_room = 0

    cpdef commit(self):
        """The effects since the last commit are in the file: they stay."""
        self._changes += 1
        self._forget()
        self._evicted = self._expired = 0
        self.log.commit()

    def rollback(self):
        """They are not: put back the data, and take the records back. O(effects).

        Raises MemoryError if a table cannot get a bucket back, or a sorted set a chunk; the store is of no use then.
        """
        self._changes += 1
        self._undo_to(0, 0, 0)
        self.log.rollback()

    cdef int _undo_to(self, size_t count, uint64_t evicted, uint64_t expired) except -1:
        """Put back the data, until ``count`` effects, with so many evictions and expirations, are left to undo."""
        cdef Undo *undo
        cdef Item *entry
        cdef Zset *zset
        cdef size_t size
        while self._undo_count > count:
            self._undo_count -= 1
            self._count_use()
            undo = &self._undo[self._undo_count]
            entry = undo.entry
            if undo.change == REPLACED:
                if when_of(entry):
                    due_remove(&self._due, entry)
                table_put(table_slot(&self._table, entry), undo.other)
                ring_remove(entry)
                ring_add(&self._ring, undo.other)
                if when_of(undo.other):
                    due_add(&self._due, undo.other)
                self.used += entry_cost(undo.other) - entry_cost(entry)
                self._free(entry)
            elif undo.change == WRITTEN:
                self._kept.size = undo.old.kept
                size = get_u32(self._kept.data + self._kept.size)
                set_size(entry, size)
                memory.memcpy(value_of(entry), self._kept.data + self._kept.size + 4, size)
                ring_touch(&self._ring, entry)
            elif undo.change == ADDED:
                self._take_out(entry)
                self._free(entry)
            elif undo.change == SHELL_ADDED:
                self._take_out(entry)
                shell_free(entry)
            elif undo.change == REMOVED or undo.change == SHELL_REMOVED:
                if not self._put_back(entry):
                    raise MemoryError
            elif undo.change == TIMED:
                self._set_timer(entry, undo.old.when)
                ring_touch(&self._ring, entry)
            else:
                zset = zset_of(entry)
                self.used -= zset_cost(zset)
                if undo.change == MEMBER_ADDED:
                    zset_detach(zset, undo.other)
                    node_free(undo.other)
                elif not (
                    zset_move(zset, undo.other, undo.old.score)
                    if undo.change == MEMBER_MOVED
                    else zset_attach(zset, undo.other)
                ):
                    raise MemoryError
                self.used += zset_cost(zset)
        self.evictions -= self._evicted - evicted
        self.expirations -= self._expired - expired
        self._evicted = evicted
        self._expired = expired
        return 0

    cdef void _set_timer(self, Item *entry, uint64_t when) noexcept:
        """Give a timed entry this deadline, 0 for none; the heap has room."""
        if when and timer_of(entry).when:
            due_move(&self._due, entry, when)
            return
        if timer_of(entry).when:
            due_remove(&self._due, entry)
        timer_of(entry).when = when
        if when:
            due_add(&self._due, entry)

    def expire(self, size_t most):
        """Remove, logged, up to ``most`` keys whose deadline has come, earliest first; return how many."""
        cdef size_t done = 0
        self._changes += 1
        self._tick()
        while done < most and self._due.count and self._due.places[0].when <= self.now:
            if not self._expire(self._due.places[0].entry):
                break  # there is no memory to log it; another time
            done += 1
        return done

    def replay(self, records):
        """Apply the effects of ``records``, whole and verified; return how many there are.

        Raises ValueError for an effect that is no write of this version; those before it have been applied.
        """
        cdef Py_buffer view
        self._changes += 1
        PyObject_GetBuffer(records, &view, PyBUF_SIMPLE)
        now = self.now
        self.now = 0
        self._replaying = True
        try:
            return self._replay(<const uint8_t *>view.buf, <size_t>view.len)
        finally:
            self._forget()  # and not before: what is freed may have been read ahead
            self._replaying = False
            self.now = now
            PyBuffer_Release(&view)

    cdef object _replay(self, const uint8_t *data, size_t size):
        cdef size_t pos = 0, length
        cdef uint64_t count = 0
        cdef Reader reader
        cdef Request *request
        reader.data = data
        reader.size = size
        reader.pos = reader.read = 0
        while pos < size:
            while reader.read < count + AHEAD and reader.pos < size:
                read_record(&reader, &self._table)
            look_ahead(&reader, count, &self._table)
            length = get_u32(data + pos + 8) if size - pos >= RECORD_HEADER else size
            if length > size - pos - RECORD_HEADER:
                raise ValueError("the records end within one")
            pos += RECORD_HEADER
            request = &reader.requests[count % AHEAD]
            if not self._apply_record(request, data + pos + length):
                start = (<char *>data + pos)[: length if length < 60 else <size_t>60]
                number = get_u64(data + pos - 8)
                raise ValueError(f"record {number} is no write of this version: {start!r}")
            pos += length
            count += 1
        return count

    cdef bint _apply_record(self, Request *request, const uint8_t *end) except -1:
        """Apply a record, of which this is the first effect; False if it is not effects as a whole, up to ``end``."""
        cdef Request other
        cdef const Effect *effect
        cdef const uint8_t *at
        if request.frame == NULL:
            return False
        if request.frame + request.size == end:  # most are one effect
            effect = find_effect(request)
            self._count_use()
            return effect != NULL and self._apply(effect.kind, request)
        at = request.frame
        while at != end:
            at = parse(at, end, &other)
            if at == NULL or find_effect(&other) == NULL:
                return False
        at = request.frame
        while at != end:
            at = parse(at, end, &other)
            effect = find_effect(&other)
            other.hash = table_hash(&self._table, other.tokens[1].at, other.tokens[1].size)
            self._count_use()
            if not self._apply(effect.kind, &other):
                return False
        return True

    cdef bint _apply(self, Kind kind, Request *request) except -1:
        """Apply an effect of the log; False if there can be none like it."""
        cdef Token *key = &request.tokens[1]
        cdef Token *second = &request.tokens[2]
        cdef Token *third = &request.tokens[3]
        cdef Item *entry = self._find(request)
        cdef Item *node
        cdef double score
        cdef uint64_t number = 0
        cdef bint changed = False
        cdef bytes refusal = None
        if kind == PUT:
            refusal = self._put(key, request.hash, entry, second, 0, 0)
        elif kind == REMOVE:
            if entry != NULL and not self._remove(entry):
                raise MemoryError
        elif kind == ZPUT:
            if (entry != NULL and not is_set(entry)) or not read_score(second.at, second.size, &score):
                return False
            refusal = self._zput(key, request.hash, entry, third, score, 0, &changed)
        elif kind == ZTAKE:
            if entry != NULL and not is_set(entry):
                return False
            node = zset_find(zset_of(entry), second.at, second.size) if entry != NULL else NULL
            if node != NULL:
                if not self._reserve(0):
                    raise MemoryError
                self._ztake(entry, node)
        elif kind == MOVE and key.size == second.size and memory.memcmp(key.at, second.at, key.size) == 0:
            return False
        elif kind == SET_DEADLINE and not (read_number(second, <uint64_t>LLONG_MAX, &number) and number):
            return False
        elif kind == WRITE_AT and not read_number(second, MAX_STRING, &number):
            return False
        elif entry == NULL:
            self.unmet += 1
            if kind == MOVE:
                entry = self._look(second, table_hash(&self._table, second.at, second.size), True)
                if entry != NULL and not self._remove(entry):
                    raise MemoryError
        elif kind == WRITE_AT:
            if is_set(entry):
                return False
            refusal = self._write_at(entry, <size_t>number, third)
        elif kind == MOVE:
            refusal = self._move(entry, second)
        else:
            refusal = self._set_deadline(entry, number)
        if refusal is not None:
            raise MemoryError
        return True

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
        """Yield each key with its string or its (score, member) pairs, and its deadline, least recently used first."""
        cdef Item *entry = past_marks(self._ring.next)
        cdef Item *node
        cdef Place place
        cdef list pairs
        changes = self._changes
        while entry != &self._ring:
            key = (<char *>key_of(entry))[: entry.size]
            if is_set(entry):
                pairs = []
                place = zset_start(zset_of(entry))
                node = node_at(&place)
                while node != NULL:
                    pairs.append((node.second.score, (<char *>key_of(node))[: node.size]))
                    place_next(&place)
                    node = node_at(&place)
                yield key, pairs, when_of(entry)
            else:
                yield key, (<char *>value_of(entry))[: size_of(entry)], when_of(entry)
            if self._changes != changes:
                raise RuntimeError("the store changed between two of its entries")
            entry = past_marks(entry.next)

    def save(self, RecordEncoder log not None, size_t room):
        """Add the effects that make the data to ``log``; yield after each ``room`` bytes or so, but for the last."""
        if self._saving:
            raise RuntimeError("the data is being saved already")
        self._saving = True
        self._saved_at = self._past_uses + self._uses
        self._whole = set()
        ring_put(&self._ring, &self._place)
        try:
            while self._save_some(log, room):
                yield
        finally:
            ring_remove(&self._place)
            self._saving = False
            self._rest = self._rest_member = None
            self._whole = None

    cdef bint _save_some(self, RecordEncoder log, size_t room) except -1:
        """Go on with ``save`` for about ``room`` bytes; return whether there is more.

        What is used meanwhile comes behind the place again, and is saved again: so it has its place in the order of use,
        and nothing is left out that was not saved before. The place has to move on faster than that.
        """
        cdef uint64_t uses = self._past_uses + self._uses
        cdef uint64_t least = 2 * (uses - self._saved_at), passed = 0
        cdef size_t limit = log.held() + room
        cdef Item *entry
        cdef Token key, text
        cdef uint8_t digits[SCORE_TEXT]
        self._saved_at = uses
        if self._rest is not None:
            self._save_rest(log, limit)
        while self._rest is None and (log.held() < limit or passed < least):
            entry = past_marks(self._place.next)
            if entry == &self._ring:
                return False
            passed += 1
            ring_remove(&self._place)
            ring_put(entry, &self._place)
            key = Token(key_of(entry), entry.size)
            if not is_set(entry):
                text = Token(value_of(entry), size_of(entry))
                save_effect(log, b"set", 3, 3, &key, &text, NULL)
                if when_of(entry):
                    text = Token(<const uint8_t *>digits, write_digits(digits, when_of(entry)))
                    save_effect(log, b"pexpireat", 9, 3, &key, &text, NULL)
            elif not self._whole or (<char *>key.at)[: key.size] not in self._whole:
                self._save_set(log, entry, zset_start(zset_of(entry)), max(limit, log.held() + room))
        return True

    cdef int _save_rest(self, RecordEncoder log, size_t limit) except -1:
        """Go on with a set, if it is still one."""
        cdef Token key = token_of(self._rest)
        cdef Token member = token_of(self._rest_member)
        cdef uint64_t *slot = table_find(
            &self._table, table_hash(&self._table, key.at, key.size), key.at, key.size
        )
        cdef bytes name = self._rest
        cdef Item *entry
        cdef Zset *zset
        self._rest = None
        if slot != NULL and is_set(item_in(slot[0])):
            entry = item_in(slot[0])
            zset = zset_of(entry)
            self._save_set(log, entry, zset_at(zset, zset_place(zset, self._rest_score, member.at, member.size)), limit)
            if self._rest is None:
                self._whole.add(name)
        return 0

    cdef int _save_set(self, RecordEncoder log, Item *entry, Place place, size_t limit) except -1:
        """Save a set from a place on; what there is no room for is the rest."""
        cdef Token key = Token(key_of(entry), entry.size)
        cdef Token text, member
        cdef uint8_t digits[SCORE_TEXT]
        cdef Item *node = node_at(&place)
        while node != NULL and log.held() < limit:
            text = Token(<const uint8_t *>digits, write_score(digits, node.second.score))
            member = Token(key_of(node), node.size)
            save_effect(log, b"zadd", 4, 4, &key, &text, &member)
            place_next(&place)
            node = node_at(&place)
        if node != NULL:
            self._rest = (<char *>key.at)[: key.size]
            self._rest_score = node.second.score
            self._rest_member = (<char *>key_of(node))[: node.size]
        elif when_of(entry):
            text = Token(<const uint8_t *>digits, write_digits(digits, when_of(entry)))
            save_effect(log, b"pexpireat", 9, 3, &key, &text, NULL)
        return 0

    cdef void _save_anew(self, const Token *key) except *:
        """A key gets what another one holds: it will be met again, and then has to be saved as a whole."""
        cdef bytes name = (<char *>key.at)[: key.size]
        self._whole.discard(name)
        if self._rest == name:
            self._rest = None

    def digest(self):
        """Return 64 bits that are equal for equal data, whatever the order of use. O(data)."""
        cdef Item *entry = past_marks(self._ring.next)
        cdef Item *node
        cdef Place place
        cdef uint64_t total = 0, chain, bits
        cdef uint8_t score[8]
        while entry != &self._ring:
            if is_set(entry):
                chain = xxh64(key_of(entry), entry.size, 2)
                place = zset_start(zset_of(entry))
                node = node_at(&place)
                while node != NULL:
                    memory.memcpy(&bits, &node.second.score, 8)
                    set_u64(score, bits)
                    chain = xxh64(key_of(node), node.size, xxh64(score, 8, chain))
                    place_next(&place)
                    node = node_at(&place)
            else:
                chain = xxh64(value_of(entry), size_of(entry), xxh64(key_of(entry), entry.size, 1))
            if when_of(entry):
                set_u64(score, when_of(entry))
                chain = xxh64(score, 8, chain)
            total += chain
            entry = past_marks(entry.next)
        return total

    def check(self):
        """Raise AssertionError unless the rules of this file and of the twin hold. O(data)."""
        cdef Item *entry
        cdef const char *flaw = table_flaw(&self._table)
        cdef size_t count = 0, used = 0, timed = 0
        if flaw == NULL:
            flaw = due_flaw(&self._due)
        if flaw == NULL:
            flaw = ring_flaw(&self._marks, &self._ring, self._second)
        state = f"{self.keys} keys, used {self.used}, {self._undo_count} to undo"
        entry = past_marks(self._ring.next)
        while flaw == NULL and entry != &self._ring:
            count += 1
            used += entry_cost(entry)
            timed += when_of(entry) != 0
            if table_slot(&self._table, entry) == NULL:
                flaw = "store: a key that is not found"
            elif is_timed(entry) and (when_of(entry) != 0) is not (timer_of(entry).place != NOWHERE):
                flaw = "store: a deadline that is not in the heap, or a place in it without one"
            elif is_set(entry) and zset_of(entry).count == 0:
                flaw = "store: an empty set"
            elif is_set(entry):
                flaw = zset_flaw(zset_of(entry))
            entry = past_marks(entry.next)
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()}: {state}")
        if count != self._table.count:
            raise AssertionError(f"{count} keys in the ring: {state}")
        if used != self.used:
            raise AssertionError(f"counted {used}: {state}")
        if timed != self._due.count:
            raise AssertionError(f"{timed} keys with a deadline, {self._due.count} in the heap: {state}")
        if self._gathering or self._reading:
            raise AssertionError(f"a function that has not ended: {state}")
        if self._expired > self.expirations:
            raise AssertionError(f"{self._expired} of {self.expirations} gone: {state}")
        if self._evicted > self.evictions:
            raise AssertionError(f"{self._evicted} of {self.evictions} evicted: {state}")
        if self.log.pending() and not self._undo_count:
            raise AssertionError(f"effects that cannot be undone: {state}")


def alloc_fails_at(size_t n):
    """For tests: make the n-th allocation of this module fail, once; 0 ends it. Return what was left to count."""
    left = memory.alloc_fails_at
    memory.alloc_fails_at = n
    return left


def marks_of(UnifiedStore store not None):
    """For tests: how many entries are in front of the first mark, and behind each."""
    cdef Item *item = store._ring.next
    cdef size_t count = 0
    counts = []
    while item != &store._ring:
        if is_mark(item):
            counts.append(count)
            count = 0
        else:
            count += 1
        item = item.next
    return [*counts, count]
