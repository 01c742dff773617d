"""The router's inner loop, compiled. Its twin, ``imds/router/switch.py``, has the picture and the rules.

What differs is how a turn is held, so that a request costs no allocation and no Python object::

    Turn    client, count, emitted
            groups  [ shard 2 | the router | shard 0 ]     who answers some of its requests; for each
                      ``data``: its replies back to back, once they have come; ``read``: emitted of these
            order   [ 0 2 0 0 1 2 ... ]     for each request the number of its group, doubled, + 1 for a write

A turn is emitted by walking ``order`` and taking the next reply of the group that it names. While a turn is
being built, each frame goes straight to the end of its shard's ``out``, behind an envelope header that is
filled in when the turn is closed; until then groups and order stand in arrays that the switch uses again.

What stays true, beside the twin's rules:

* A turn is one block. It is freed when nobody refers to it any more: not its client's queue, no envelope
  under way, no :class:`Question`. A client that dies before its turns leaves them without a client.
* No byte of a frame is read before ``scan_advance`` has found all of it, and no reply before
  ``holds_replies`` has found exactly the number that was asked for.
* An allocation that fails raises MemoryError and leaves whole envelopes and counters that agree: a turn that
  cannot be closed is taken back, and its client ``closing``, because its requests are lost. Where merge
  raised it, drop_link must follow as it does after LinkError.
* Pointers into a Stream hold until the next ``stream_add`` to it.

The structures are in ``stream.pxd``, ``scan.pxd``, ``turn.pxd`` and ``commandtable.pxd``. What remains is
long for one file because its methods work on one turn together.
"""

import selectors
from collections import deque

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from imds._kernel cimport memory
from imds._kernel.commandtable cimport LONGEST, Row, find_row, hash_name
from imds._kernel.poll cimport (
    HAVE_EPOLL,
    READ,
    PollEvent,
    Rounds,
    poll_clock,
    poll_fd,
    poll_gather,
    poll_milliseconds,
    poll_selected,
    rounds_begin,
    rounds_go_on,
)
from imds._kernel.memory cimport Buffer, buffer_put, buffer_reserve, get_u32
from imds._kernel.scan cimport PART, TOO_MANY, WHOLE, Scan, scan_advance, scan_reset
from imds._kernel.socket cimport QUIETLY, SHUT_RDWR, recv, send, shutdown
from imds._kernel.stream cimport (
    Stream,
    stream_add,
    stream_drop,
    stream_free,
    stream_front,
    stream_reserve,
    stream_size,
)
from imds._kernel.turn cimport (
    LENGTH,
    REPLY_HEADER,
    REQUEST_HEADER,
    Group,
    Link,
    Pending,
    Turn,
    group_fill,
    groups_of,
    holds_replies,
    link_pending,
    link_pop,
    link_push,
    link_reserve,
    link_reset,
    order_of,
    put_header,
    turn_new,
    turn_release,
)
from imds._kernel.xxh64 cimport xxh64

from imds import commands as _commands
from imds import envelope as _envelope
from imds import hashslots as _hashslots
from imds import rounds as _rounds
from imds.protocol import MAX_REQUEST, MAX_TOKENS, encode_error
from imds.router import switch as _twin
from imds.router import turns as _turns
from imds.router.switch import LinkError

cdef enum:
    # Not as a literal where it is used: Cython would compute with Python integers there.
    U32_MAX = 0xFFFFFFFFu
    EVENTS = 512  # taken in one turn; the others come in the next

cdef object NOTICE = _twin.NOTICE
cdef uint64_t LEAST_NOTICE = _twin._LEAST_NOTICE
cdef object EPOLL = getattr(selectors, "EpollSelector", None)
cdef size_t RECEIVE = _twin.RECEIVE
cdef size_t RECEIVE_LINK = _twin.RECEIVE_LINK
cdef double TURN = _rounds.TURN
cdef int GATHER_ROUNDS = _turns.GATHER_ROUNDS
cdef uint64_t SLOT_MASK = _hashslots.SLOTS - 1
assert _hashslots.SLOTS & (_hashslots.SLOTS - 1) == 0

assert _envelope.REQUEST.size == REQUEST_HEADER
assert _envelope.REPLY.size == REPLY_HEADER
assert _envelope.LENGTH == LENGTH
cdef uint32_t DIALECT = _envelope.DIALECT_IMDS

# An empty buffer of a client's that is larger than this is given back: there are thousands of clients.
cdef size_t KEEP_CLIENT = 8 << 10

# What is long is copied as seldom as can be. A reply of so many bytes is sent from where it is, if nothing is in its
# way; and where so many bytes of a frame have come, more is received behind them: memory follows what has arrived.
cdef size_t LONG = 16 << 10

cdef bytes UNKNOWN_COMMAND = encode_error(_commands.UNKNOWN_COMMAND)
cdef bytes WRONG_ARITY = encode_error(_commands.WRONG_ARITY)
cdef bytes UNKNOWN_OUTCOME = _twin.UNKNOWN_OUTCOME
cdef bytes RETRY = _twin.RETRY


cdef inline const uint8_t *data_of(bytes value) noexcept:
    return <const uint8_t *>PyBytes_AS_STRING(value)


cdef inline size_t size_of(bytes value) noexcept:
    return <size_t>PyBytes_GET_SIZE(value)


def fail_allocation(size_t number):
    """Make the ``number``-th allocation of this module from now on fail, once; 0: none. For tests."""
    memory.alloc_fails_at = number


# -- the command table, from imds/commands.py ---------------------------------------------------------

cdef list COMMANDS = list(_commands.COMMANDS.values())
cdef uint32_t row_mask = 1
while row_mask < 4 * len(COMMANDS):  # mostly empty, so that a look-up seldom meets a second row
    row_mask <<= 1
row_mask -= 1
cdef Row *rows = <Row *>memory.alloc((row_mask + 1) * sizeof(Row))


cdef int fill_rows() except -1:
    cdef int number
    cdef bytes name
    cdef uint32_t at
    cdef size_t size
    if rows == NULL:
        raise MemoryError
    memset(rows, 0, (row_mask + 1) * sizeof(Row))
    for number, command in enumerate(COMMANDS):
        name = command.name.encode()
        size = len(name)
        if not 0 < size <= LONGEST or name != name.lower():
            raise ValueError(f"command {name!r} has a name over {LONGEST} bytes, or not in lower case")
        at = hash_name(name, size) & row_mask
        while rows[at].size:
            at = (at + 1) & row_mask
        memcpy(rows[at].name, PyBytes_AS_STRING(name), size)
        rows[at].size = size
        rows[at].least = command.min_tokens
        rows[at].most = min(command.max_tokens, 0xFFFFFFFF)
        rows[at].first_key = command.first_key
        rows[at].step = command.key_step
        rows[at].by_key = command.spread in (_commands.Spread.KEY, _commands.Spread.KEYS)
        rows[at].single = command.single() if command.spread is _commands.Spread.KEYS else 0
        rows[at].write = command.write
        rows[at].number = number
        if rows[at].by_key and not 0 < rows[at].first_key < rows[at].least:
            raise ValueError(f"command {name!r} may come without its key")
    return 0


fill_rows()


# -- what the router sees ------------------------------------------------------------------------------

# See the twin in ``imds/router/turns.py``.
ctypedef struct Policy:
    Py_ssize_t window
    size_t gather
    size_t hold
    double wait


cdef class Client:
    """One client's side of the switch; see the twin. ``out`` is how many bytes of replies wait."""

    cdef readonly object owner
    cdef readonly Py_ssize_t inflight
    cdef readonly int fd
    cdef public bint plain
    cdef public bint closing
    cdef public bint captive
    cdef readonly bint paused
    cdef public int choked
    cdef Stream _out
    cdef Stream _rest  # a frame of which the end has not arrived, or all that came while paused
    cdef Scan _scan  # how far that has been looked at
    cdef Turn *_first
    cdef Turn *_last
    cdef uint64_t _mark  # of the last call that returned this client

    def __cinit__(self):
        self.choked = -1
        scan_reset(&self._scan)

    def __dealloc__(self):
        client_leave(self)

    @property
    def out(self):
        return stream_size(&self._out)

    @property
    def held(self):
        return stream_size(&self._rest)


cdef void client_leave(Client client) noexcept:
    """Give up all that the client holds."""
    cdef Turn *turn
    while client._first != NULL:
        turn = client._first
        client._first = turn.next
        turn.client = NULL
        turn_release(turn)
    client._last = NULL
    client.inflight = 0
    stream_free(&client._out)
    stream_free(&client._rest)


cdef int client_emit(Client client) except -1:
    """Move every reply whose turn has come to the client's output."""
    cdef Turn *turn
    cdef Group *group
    cdef Group *groups
    cdef uint16_t *order
    cdef uint64_t size
    while client._first != NULL:
        turn = client._first
        groups = groups_of(turn)
        order = order_of(turn)
        while turn.emitted < turn.count:
            group = &groups[order[turn.emitted] >> 1]
            if not group.arrived:
                return 0
            if group.size - group.read < 4:
                raise RuntimeError("a group of replies ends early")
            size = 4 + <uint64_t>get_u32(group.data + group.read)
            if size > group.size - group.read:
                raise RuntimeError("a group of replies ends early")
            client_put(client, group.data + group.read, <size_t>size)
            group.read += <size_t>size
            if group.read == group.size:
                memory.free(group.data)
                group.data = NULL
            turn.emitted += 1
            client.inflight -= 1
        client_pop(client)
    return 0


cdef inline int client_put(Client client, const uint8_t *replies, size_t size) except -1:
    """Add replies to the client's output; long ones are sent, as far as the socket takes them."""
    cdef Py_ssize_t sent = 0
    if size >= LONG and client.plain and not client.closing and not stream_size(&client._out):
        sent = send(client.fd, replies, size, QUIETLY)
        if sent < 0:  # the next try will meet the reason, too
            sent = 0
    if stream_add(&client._out, replies + sent, size - <size_t>sent):
        return 0
    if not sent:
        raise MemoryError
    shutdown(client.fd, SHUT_RDWR)  # in the midst of a reply: what came next would be taken for its rest
    return 0


cdef inline Stream *client_behind(Client client) noexcept:
    """Return where to receive behind the beginning of a long frame, with the room for it; NULL: there is none."""
    if stream_size(&client._rest) >= LONG and not client.closing and stream_reserve(&client._rest, RECEIVE):
        return &client._rest
    return NULL


cdef inline Stream *link_behind(Link *link) noexcept:
    """Return where to receive behind the beginning of a reply, with the room for it; NULL: there is none."""
    return &link.rest if stream_size(&link.rest) and stream_reserve(&link.rest, RECEIVE_LINK) else NULL


cdef inline size_t in_inbox(const Stream *rest, Py_ssize_t size) noexcept:
    """Return how many bytes were received into the inbox, of ``size``: what came behind ``rest`` is in its place."""
    return <size_t>size if rest == NULL else 0


cdef inline void client_pop(Client client) noexcept:
    """Remove the first turn, of which every reply has been emitted."""
    cdef Turn *turn = client._first
    client._first = turn.next
    if turn.next == NULL:
        client._last = NULL
    turn.client = NULL
    turn_release(turn)


cdef class Question:
    """The place of a reply that the router owes; for :meth:`Switch.answer`."""

    cdef Turn *_turn  # NULL once it has been answered

    def __dealloc__(self):
        if self._turn != NULL:
            turn_release(self._turn)


cdef class Switch:
    """Splits clients' requests by shard and merges the shards' replies; see the twin."""

    cdef readonly int shards
    cdef readonly dict by_fd
    cdef public list held
    cdef public double held_until
    cdef public bint stuck
    cdef public int gathers
    cdef bytes _owners_kept
    cdef const uint8_t *_owners
    cdef uint64_t _seed
    cdef uint64_t _max_tokens
    cdef uint64_t _max_request
    cdef size_t _backlog_limit
    cdef uint32_t _first_ticket
    cdef Link *_links
    cdef list _down  # for each shard the reply while it is down
    cdef list _tokens  # for each shard the tokens of its pending questions
    cdef list _touched  # for each shard what a merge that failed had delivered until then
    cdef list _lost
    cdef uint8_t *_inbox
    cdef uint64_t _mark  # rises with each call that returns clients
    # The turn that is being built:
    cdef Buffer _order
    cdef Buffer _local  # the router's own replies
    cdef uint32_t _count  # requests
    cdef int _groups
    cdef int _local_group  # -1: none
    cdef uint32_t _local_count
    cdef int[129] _shard_of  # each group's shard; the router's is ``shards``

    def __cinit__(
        self,
        slots,
        *,
        uint64_t max_tokens=MAX_TOKENS,
        uint64_t max_request=MAX_REQUEST,
        size_t backlog_limit=1 << 20,
        uint32_t first_ticket=0,
    ):
        cdef int shard
        _twin.check_limits(max_tokens, max_request)
        self._owners_kept = slots.owners
        self._owners = data_of(self._owners_kept)
        if not 1 <= slots.shards <= _hashslots.MAX_SHARDS <= 128:
            raise ValueError(f"{slots.shards} shards")
        if len(self._owners_kept) != _hashslots.SLOTS or max(self._owners_kept) >= slots.shards:
            raise ValueError("a slot map that names shards that are not there")
        self._seed = slots.seed
        self._max_tokens = max_tokens
        self._max_request = max_request
        self._backlog_limit = backlog_limit
        self._first_ticket = first_ticket
        self.by_fd = {}
        self.held = []
        self._inbox = <uint8_t *>memory.alloc(max(RECEIVE, RECEIVE_LINK))
        self._links = <Link *>memory.alloc(slots.shards * sizeof(Link))
        if self._inbox == NULL or self._links == NULL:
            raise MemoryError
        self.shards = slots.shards
        memset(self._links, 0, self.shards * sizeof(Link))
        self._down = [None] * self.shards
        self._tokens = [deque() for _ in range(self.shards)]
        self._touched = [[] for _ in range(self.shards)]
        self._lost = [[] for _ in range(self.shards)]
        self._local_group = -1
        for shard in range(self.shards):
            link_reset(&self._links[shard], False, -1, first_ticket)
            self._set_down(shard, _twin._NEVER_UP)

    def __dealloc__(self):
        cdef int shard
        cdef Link *link
        for shard in range(self.shards):
            link = &self._links[shard]
            while link.pending:
                if link_pending(link, 0).turn != NULL:
                    turn_release(link_pending(link, 0).turn)
                link_pop(link)
            link_reset(link, False, -1, 0)
        memory.free(self._links)
        memory.free(self._inbox)
        memory.free(self._order.data)
        memory.free(self._local.data)

    cdef Link *_link(self, int shard) except NULL:
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        return &self._links[shard]

    cdef inline int _touch(self, Client client, list clients) except -1:
        """Add a client to those that the call returns, if it has output and is not among them."""
        if client._mark != self._mark and stream_size(&client._out):
            client._mark = self._mark
            clients.append(client)
        return 0

    # -- clients ---------------------------------------------------------------------------------------

    def attach(self, owner, int fd=-1):
        """Return the switch's side of a new client, whose socket is ``fd``."""
        cdef Client client = Client.__new__(Client)
        client.owner = owner
        client.fd = fd
        if fd >= 0:
            self.by_fd[fd] = client
        return client

    def detach(self, Client client not None):
        """Forget a client that is gone; the replies that are still under way to it will be dropped."""
        client_leave(client)
        client.closing = True
        client.plain = False
        self.by_fd.pop(client.fd, None)
        client.fd = -1  # its number may soon be another client's

    def refuse(self, Client client not None, bytes reply not None):
        """Answer a client by ``reply``, whatever it sends from now on, and take nothing more from it."""
        _twin.check_reply(reply)
        client.closing = True
        stream_free(&client._rest)
        try:
            self._answer_here(reply)
            self._close(client)
        except BaseException:
            self._abandon(client)
            raise

    def receive(self, Client client not None, int fd):
        """Read once from the client's socket and feed it; return (bytes read, questions)."""
        cdef Stream *rest = client_behind(client)
        cdef Py_ssize_t size = self._receive(fd, rest, RECEIVE)
        cdef list questions = []
        if size:
            self._feed(client, self._inbox, in_inbox(rest, size), questions)
        return size, questions

    def receive_all(self, list clients not None, Py_ssize_t window):
        """Receive from each of these that is plain; return (ended, to think about, questions)."""
        cdef Client client
        cdef list ended = []
        cdef list changed = []
        cdef list questions = []
        for client in clients:
            if client.plain:
                self._receive_plain(client, window, ended, changed, questions)
        return ended, changed, questions

    cdef inline int _receive_plain(
        self, Client client, Py_ssize_t window, list ended, list changed, list questions
    ) except -1:
        cdef Stream *rest = client_behind(client)
        cdef Py_ssize_t size = self._receive_once(client.fd, rest, RECEIVE)
        if size > 0:
            self._feed(client, self._inbox, in_inbox(rest, size), questions)
            if (
                stream_size(&client._out)
                or client.inflight >= window
                or client.choked >= 0
                or client.closing
            ):
                changed.append(client)
        elif size == 0 or (errno != EAGAIN and errno != EINTR):
            ended.append(client)
        return 0

    def flush_all(self, list clients not None, size_t hold=0):
        """Flush each of these clients that is plain; return (left to the router, held back)."""
        cdef list left = []
        cdef list held = []
        self._flush_plain(clients, hold, left, held)
        return left, held

    cdef int _flush_plain(self, list clients, size_t hold, list left, list held) except -1:
        cdef Client client
        cdef Py_ssize_t sent
        cdef size_t size
        for client in clients:
            if client.plain and not client.closing:
                size = stream_size(&client._out)
                if not size:
                    continue
                if size < hold and client._first != NULL and client._first.emitted:
                    held.append(client)
                    continue
                sent = send(client.fd, stream_front(&client._out), size, QUIETLY)
                if sent > 0:
                    stream_drop(&client._out, <size_t>sent, KEEP_CLIENT)
                    if <size_t>sent == size:
                        continue
            left.append(client)
        return 0

    def feed(self, Client client not None, bytes data not None):
        """Take bytes that the client sent; return the first question, if there is one."""
        cdef list questions = []
        self._feed(client, data_of(data), size_of(data), questions)
        return questions

    def resume(self, Client client not None):
        """Look on behind a question of a client; return the next one, if there is one."""
        cdef list questions = []
        client.paused = False
        if stream_size(&client._rest):
            self._feed(client, NULL, 0, questions)
        return questions

    cdef Py_ssize_t _receive(self, int fd, Stream *rest, size_t room) except -1:
        """Receive as :meth:`_receive_once` does. Raises OSError."""
        cdef Py_ssize_t size = self._receive_once(fd, rest, room)
        while size < 0:
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
                return -1
            PyErr_CheckSignals()
            size = self._receive_once(fd, rest, room)
        return size

    cdef inline Py_ssize_t _receive_once(self, int fd, Stream *rest, size_t room) noexcept:
        """Receive ``room`` bytes at most, behind ``rest``, which has the room, or into the inbox if that is NULL."""
        cdef Py_ssize_t size
        if rest == NULL:
            return recv(fd, self._inbox, room, 0)
        size = recv(fd, rest.held.data + rest.held.size, room, 0)
        if size > 0:
            rest.held.size += <size_t>size
        return size

    cdef int _feed(self, Client client, const uint8_t *data, size_t size, list questions) except -1:
        cdef bint rested = stream_size(&client._rest) > 0
        cdef size_t used
        if client.closing:
            return 0
        if rested or client.paused:
            if size and not stream_add(&client._rest, data, size):
                client.closing = True
                raise MemoryError
            if client.paused:
                return 0
            data = stream_front(&client._rest)
            size = stream_size(&client._rest)
            if size < client._scan.need:
                return 0
        try:
            used = self._split(client, data, size, questions)
            self._close(client)
        except BaseException:
            self._abandon(client)
            raise
        if rested:
            stream_drop(&client._rest, used, KEEP_CLIENT)
        elif used < size and not stream_add(&client._rest, data + used, size - used):
            client.closing = True
            raise MemoryError
        return 0

    cdef size_t _split(self, Client client, const uint8_t *data, size_t size, list questions) except? 0:
        """Put each whole request in ``data`` into the turn being built; return the bytes used."""
        cdef size_t position = 0
        cdef uint64_t length = 0
        cdef const uint8_t *frame
        cdef const uint8_t *key
        cdef uint32_t count, index
        cdef Row *row
        cdef Link *link
        cdef int found
        while position < size:
            frame = data + position
            found = scan_advance(
                &client._scan, frame, size - position, self._max_tokens, self._max_request, &length
            )
            if found != WHOLE:
                if found == PART:
                    return position
                client.closing = True
                self._answer_here(self._malformed(found, length))
                return size
            position += <size_t>length
            count = get_u32(frame)
            row = find_row(rows, row_mask, frame + 8, get_u32(frame + 4)) if count else NULL
            if client.captive:
                self._ask_router(client, row, frame, <size_t>length, questions)
                return position
            if row == NULL:
                self._answer_here(UNKNOWN_COMMAND)
            elif not row.least <= count <= row.most or (
                row.step > 1 and (count - row.first_key) % row.step
            ):
                self._answer_here(WRONG_ARITY)
            elif not row.by_key or (row.single and count != row.single):
                self._ask_router(client, row, frame, <size_t>length, questions)
                return position
            else:
                key = frame + 4
                for index in range(row.first_key):
                    key += 4 + <size_t>get_u32(key)
                link = &self._links[self._owners[self._slot(key + 4, get_u32(key))]]
                if link.up:
                    self._forward(link, frame, <size_t>length, row.write)
                else:
                    self._answer_locally(link.down, link.down_size)
        return position

    cdef int _ask_router(
        self, Client client, const Row *row, const uint8_t *frame, size_t size, list questions
    ) except -1:
        """Hand a request to the router, and pause its client."""
        cdef bytes kept = PyBytes_FromStringAndSize(<const char *>frame, <Py_ssize_t>size)
        self._close(client)
        questions.append(
            (self._question(client), client, COMMANDS[row.number] if row != NULL else None, kept)
        )
        client.paused = True
        return 0

    cdef bytes _malformed(self, int found, uint64_t value):
        """Return the reply to a frame that announces too much, in FrameScan's words."""
        if found == TOO_MANY:
            return encode_error(
                f"ERR protocol error: {value} tokens announced, the limit is {self._max_tokens}"
            )
        return encode_error(
            f"ERR protocol error: request of {value} bytes or more announced, "
            f"the limit is {self._max_request}"
        )

    cdef inline size_t _slot(self, const uint8_t *key, size_t size) noexcept nogil:
        """Return the slot of a key: of the text in its first ``{...}``, if there is any."""
        cdef const uint8_t *left = <const uint8_t *>memchr(key, b"{", size)
        cdef const uint8_t *right
        if left != NULL:
            left += 1
            right = <const uint8_t *>memchr(left, b"}", <size_t>(key + size - left))
            if right != NULL and right > left:
                key = left
                size = <size_t>(right - left)
        return <size_t>(xxh64(key, size, self._seed) & SLOT_MASK)

    cdef inline int _note(self, int group, bint write) except -1:
        """Append a request to the order of the turn being built."""
        if not buffer_reserve(&self._order, sizeof(uint16_t)):
            raise MemoryError
        (<uint16_t *>(self._order.data + self._order.size))[0] = <uint16_t>(2 * group + write)
        self._order.size += sizeof(uint16_t)
        self._count += 1
        return 0

    cdef inline int _forward(self, Link *link, const uint8_t *frame, size_t size, bint write) except -1:
        """Append a frame to the envelope that the turn being built has for a shard."""
        if link.group < 0:
            link.header = stream_size(&link.out)
            if not stream_reserve(&link.out, REQUEST_HEADER + size):
                raise MemoryError
            link.out.held.size += REQUEST_HEADER  # filled in by _close
            link.group = self._groups
            link.count = 0
            self._shard_of[self._groups] = <int>(link - self._links)
            self._groups += 1
        if stream_size(&link.out) - link.header > U32_MAX - size:
            raise OverflowError("an envelope of 4 GiB")
        if not stream_add(&link.out, frame, size):
            raise MemoryError
        link.count += 1
        return self._note(link.group, write)

    cdef inline int _answer_locally(self, const uint8_t *reply, size_t size) except -1:
        """Answer a request of the turn being built by the router's own reply."""
        if not buffer_reserve(&self._local, size):
            raise MemoryError
        if self._local_group < 0:
            self._local_group = self._groups
            self._local_count = 0
            self._shard_of[self._groups] = self.shards
            self._groups += 1
        buffer_put(&self._local, reply, size)
        self._local_count += 1
        return self._note(self._local_group, False)

    cdef int _answer_here(self, bytes reply) except -1:
        return self._answer_locally(data_of(reply), size_of(reply))

    cdef int _close(self, Client client) except -1:
        """Complete the turn being built and its envelopes; if that fails, :meth:`_abandon` must follow."""
        cdef int index
        cdef Link *link
        cdef Turn *turn
        cdef Group *groups
        cdef uint8_t *header
        cdef size_t size
        if not self._count:
            return 0
        for index in range(self._groups):
            if index != self._local_group and not link_reserve(&self._links[self._shard_of[index]]):
                raise MemoryError
        turn = turn_new(<uint32_t>self._groups, self._count)
        if turn == NULL:
            raise MemoryError
        turn.references = 1
        groups = groups_of(turn)
        if self._local_group >= 0:
            groups[self._local_group].count = self._local_count
            if not group_fill(&groups[self._local_group], self._local.data, self._local.size):
                turn_release(turn)
                raise MemoryError
        # From here on nothing fails.
        memcpy(order_of(turn), self._order.data, self._count * sizeof(uint16_t))
        for index in range(self._groups):
            if index == self._local_group:
                continue
            link = &self._links[self._shard_of[index]]
            size = stream_size(&link.out) - link.header
            header = stream_front(&link.out) + link.header
            put_header(header, size - REQUEST_HEADER, link.ticket, link.count, DIALECT)
            link_push(link, turn, <uint32_t>index, link.count, size)
            groups[index].count = link.count
            turn.references += 1
            link.group = -1
            if stream_size(&link.out) > self._backlog_limit:
                client.choked = self._shard_of[index]
        self._enqueue(client, turn)
        index = self._local_group
        self._forget()
        if index >= 0:
            client_emit(client)
        return 0

    cdef void _enqueue(self, Client client, Turn *turn) noexcept:
        turn.client = <PyObject *>client
        if client._last == NULL:
            client._first = turn
        else:
            client._last.next = turn
        client._last = turn
        client.inflight += turn.count

    cdef inline void _forget(self) noexcept:
        """Start a new turn."""
        self._order.size = 0
        self._count = 0
        self._groups = 0
        if self._local_group >= 0:
            self._local_group = -1
            memory.buffer_empty(&self._local)

    cdef void _abandon(self, Client client) noexcept:
        """Take back what the turn being built has put into the shards' output."""
        cdef int index
        cdef Link *link
        for index in range(self._groups):
            if index != self._local_group:
                link = &self._links[self._shard_of[index]]
                link.out.held.size = link.out.start + link.header
                link.group = -1
        self._forget()
        client.closing = True

    cdef Question _question(self, Client client):
        """Make a turn of one request that the router will answer."""
        cdef Question question = Question.__new__(Question)
        cdef Turn *turn = turn_new(1, 1)
        if turn == NULL:
            raise MemoryError
        turn.references = 2
        order_of(turn)[0] = 0
        groups_of(turn).count = 1
        question._turn = turn
        self._enqueue(client, turn)
        return question

    def answer(self, Question turn not None, bytes reply not None):
        """Give the reply to a request that feed returned; return the client if it has output now."""
        cdef Turn *place = turn._turn
        cdef Client client = None
        _twin.check_reply(reply)
        if place == NULL:
            return None
        if place.client != NULL:
            client = <Client>place.client
            if not group_fill(groups_of(place), data_of(reply), size_of(reply)):
                raise MemoryError
        turn._turn = NULL
        turn_release(place)
        if client is None:
            return None
        client_emit(client)
        return client if stream_size(&client._out) else None

    cdef size_t _send(self, int fd, Stream *stream, size_t keep) except? 0:
        """Write what a socket takes of ``stream``; return the bytes taken."""
        cdef Py_ssize_t size
        while stream_size(stream):
            size = send(fd, stream_front(stream), stream_size(stream), QUIETLY)
            if size >= 0:
                stream_drop(stream, <size_t>size, keep)
                return <size_t>size
            if errno == EAGAIN:  # which is EWOULDBLOCK on every system that Python serves
                break
            if errno != EINTR:
                PyErr_SetFromErrno(OSError)
                return 0
            PyErr_CheckSignals()
        return 0

    def flush(self, Client client not None, int fd):
        """Write what the socket takes of the client's replies; return the bytes that are left."""
        self._send(fd, &client._out, KEEP_CLIENT)
        return stream_size(&client._out)

    # -- shards ----------------------------------------------------------------------------------------

    cdef int _set_down(self, int shard, bytes reply) except -1:
        self._down[shard] = reply
        self._links[shard].down = data_of(reply)
        self._links[shard].down_size = size_of(reply)
        return 0

    def raise_link(self, int shard, int fd=-1):
        """The stream to ``shard`` is there, new and empty, at ``fd``: its keys are served from now on."""
        cdef Link *link = self._link(shard)
        if link.up:
            raise ValueError(f"the link to shard {shard} is up")
        link_reset(link, True, fd, self._first_ticket)
        if fd >= 0:
            self.by_fd[fd] = shard
        self._tokens[shard].clear()
        self._touched[shard], self._lost[shard] = [], []

    def drop_link(self, int shard, bytes reply not None):
        """The stream to ``shard`` is gone: answer what is under way now, and its keys by ``reply``."""
        cdef Link *link = self._link(shard)
        cdef Client client
        cdef list clients = []
        cdef list lost
        _twin.check_reply(reply)
        self._mark += 1
        for client in self._touched[shard]:
            self._touch(client, clients)
        lost = self._lost[shard]
        link.up = False
        try:
            while link.pending:
                self._drop_pending(shard, link, clients, lost)
        except BaseException:
            self._touched[shard] = clients
            raise
        self.by_fd.pop(link.fd, None)
        link_reset(link, False, -1, self._first_ticket)
        self._set_down(shard, reply)
        self._touched[shard], self._lost[shard] = [], []
        return clients, lost

    cdef int _drop_pending(self, int shard, Link *link, list clients, list lost) except -1:
        """Answer, or count as lost, the first pending envelope of a link that is gone."""
        cdef Pending entry = link_pending(link, 0)[0]
        cdef Client client
        if entry.turn == NULL:
            lost.append((self._tokens[shard].popleft(), entry.end <= link.sent))
            link_pop(link)
            return 0
        client = <Client>entry.turn.client if entry.turn.client != NULL else None
        if client is not None:
            self._give_up(entry.turn, entry.group, entry.end <= link.sent)
        link_pop(link)
        turn_release(entry.turn)
        if client is not None:
            client_emit(client)
            self._touch(client, clients)
        return 0

    cdef int _give_up(self, Turn *turn, uint32_t group, bint sent) except -1:
        """Fill a group of a turn by RETRY, and UNKNOWN for writes that the shard may have ``sent``."""
        cdef uint32_t index
        cdef uint16_t entry
        cdef bytes reply
        cdef list replies = []
        if groups_of(turn)[group].arrived:  # just before a merge ran out of memory
            return 0
        for index in range(turn.count):
            entry = order_of(turn)[index]
            if entry >> 1 == group:
                replies.append(UNKNOWN_OUTCOME if sent and entry & 1 else RETRY)
        reply = b"".join(replies)
        if not group_fill(&groups_of(turn)[group], data_of(reply), size_of(reply)):
            raise MemoryError
        return 0

    def is_up(self, int shard):
        """Whether there is a stream to ``shard``."""
        return self._link(shard).up

    def set_down_reply(self, int shard, bytes reply not None):
        """Change what the keys of a shard that is down are answered."""
        _twin.check_reply(reply)
        if not self._link(shard).up:
            self._set_down(shard, reply)

    def backlog(self, int shard):
        """Return the bytes that wait for ``shard``."""
        return stream_size(&self._link(shard).out)

    def ask(self, int shard, bytes frame not None, token):
        """Send ``shard`` a request of the router's own; merge returns ``token`` with the reply."""
        cdef Link *link = self._link(shard)
        cdef size_t size = size_of(frame)
        if not link.up:
            raise ValueError(f"the link to shard {shard} is down")
        if size > 0xFFFFFFFF - REQUEST_HEADER:
            raise OverflowError("an envelope of 4 GiB")
        if not stream_reserve(&link.out, REQUEST_HEADER + size) or not link_reserve(link):
            raise MemoryError
        self._tokens[shard].append(token)
        put_header(link.out.held.data + link.out.held.size, size, link.ticket, 1, DIALECT)
        link.out.held.size += REQUEST_HEADER
        buffer_put(&link.out.held, PyBytes_AS_STRING(frame), size)
        link_push(link, NULL, 0, 1, REQUEST_HEADER + size)

    def unsent(self):
        """Return (shard, descriptor) of each link that has bytes to send."""
        cdef int shard
        return [
            (shard, self._links[shard].fd)
            for shard in range(self.shards)
            if stream_size(&self._links[shard].out)
        ]

    def flush_link(self, int shard, int fd):
        """Write what the shard's socket takes; return the bytes that are left. Raises OSError."""
        cdef Link *link = self._link(shard)
        link.sent += self._send(fd, &link.out, memory.KEEP)
        return stream_size(&link.out)

    def receive_link(self, int shard, int fd):
        """Read once from the shard's socket and merge it; return (bytes read, clients, answers)."""
        cdef Stream *rest = link_behind(self._link(shard))
        cdef Py_ssize_t size = self._receive(fd, rest, RECEIVE_LINK)
        cdef list clients = []
        cdef list answers = []
        self._merge(shard, self._inbox, in_inbox(rest, size), clients, answers)
        return size, clients, answers

    def merge(self, int shard, bytes data not None):
        """Take reply bytes of ``shard`` and put them into their places; return (clients, answers)."""
        cdef list clients = []
        cdef list answers = []
        self._merge(shard, data_of(data), size_of(data), clients, answers)
        return clients, answers

    cdef int _merge(self, int shard, const uint8_t *data, size_t size, list clients, list answers) except -1:
        cdef Link *link = self._link(shard)
        cdef bint rested = stream_size(&link.rest) > 0
        cdef size_t used
        if rested:
            if not stream_add(&link.rest, data, size):
                raise MemoryError
            data = stream_front(&link.rest)
            size = stream_size(&link.rest)
            if size < link.need:
                return 0
        self._mark += 1
        try:
            used = self._place(shard, link, data, size, clients, answers)
        except BaseException:
            self._touched[shard] = clients
            self._lost[shard] = [(token, True) for token, _ in answers if token is not NOTICE]
            raise
        if rested:
            stream_drop(&link.rest, used, memory.KEEP)
        elif used < size and not stream_add(&link.rest, data + used, size - used):
            raise MemoryError
        return 0

    cdef size_t _place(
        self, int shard, Link *link, const uint8_t *data, size_t size, list clients, list answers
    ) except? 0:
        """Put the replies of each whole envelope in ``data`` into their turns; return the bytes used."""
        cdef size_t position = 0
        cdef const uint8_t *at
        cdef uint64_t length
        cdef uint32_t ticket, count
        cdef size_t replies
        cdef Pending entry
        cdef bint right
        link.need = REPLY_HEADER
        while size - position >= REPLY_HEADER:
            at = data + position
            length = get_u32(at)
            ticket = get_u32(at + 4)
            count = get_u32(at + 8)
            if count == 0 and ticket == link.noticed and length >= LEAST_NOTICE:
                if LENGTH + length > size - position:
                    link.need = LENGTH + <size_t>length
                    return position
                replies = <size_t>length + LENGTH - REPLY_HEADER
                answers.append(
                    (NOTICE, PyBytes_FromStringAndSize(<const char *>at + REPLY_HEADER, <Py_ssize_t>replies))
                )
                link.noticed += 1
                position += LENGTH + <size_t>length
                continue
            memset(&entry, 0, sizeof(entry))
            if link.pending:
                entry = link_pending(link, 0)[0]
            right = ticket == link.due and count == entry.count and count > 0
            if right:
                if LENGTH + length > size - position:
                    link.need = LENGTH + <size_t>length
                    return position
                right = length >= REPLY_HEADER - LENGTH and holds_replies(
                    at + REPLY_HEADER, <size_t>length + LENGTH - REPLY_HEADER, count
                )
            if not right:
                raise LinkError(
                    f"shard {shard} answered ticket {ticket} by {count} replies in {length} bytes; "
                    f"expected were ticket {link.due} and {entry.count} replies"
                )
            position += LENGTH + <size_t>length
            replies = <size_t>length + LENGTH - REPLY_HEADER
            if entry.turn == NULL:
                answers.append(
                    (
                        self._tokens[shard][0],
                        PyBytes_FromStringAndSize(<const char *>at + REPLY_HEADER, <Py_ssize_t>replies),
                    )
                )
                self._tokens[shard].popleft()
            elif entry.turn.client != NULL:
                self._deliver(entry.turn, entry.group, at + REPLY_HEADER, replies, clients)
            link.due += 1
            link_pop(link)
            if entry.turn != NULL:
                turn_release(entry.turn)
        return position

    cdef inline int _deliver(
        self, Turn *turn, uint32_t group, const uint8_t *replies, size_t size, list clients
    ) except -1:
        """Give a turn the replies of one of its groups. The caller holds a reference."""
        cdef Client client = <Client>turn.client
        if client._first == turn and turn.groups == 1:  # nothing to sort
            client_put(client, replies, size)
            turn.emitted = turn.count
            client.inflight -= turn.count
            client_pop(client)
            if client._first != NULL:
                client_emit(client)
        else:
            if not group_fill(&groups_of(turn)[group], replies, size):
                raise MemoryError
            if client._first == turn:
                client_emit(client)
        return self._touch(client, clients)

    # -- a turn of the router's loop -------------------------------------------------------------------

    cdef int _round(
        self,
        int poll,
        int milliseconds,
        const Policy *policy,
        News news,
    ) except -1:
        """Wait, receive, send; see ``turn``, below. Returns whether there was anything to do."""
        cdef PollEvent[EVENTS] events
        cdef int count, index, fd, mask
        cdef int readable = 0
        cdef bint gathered = self.gathers > 0
        cdef object known
        cdef Client client
        cdef list answered = []
        cdef list held
        if PyList_GET_SIZE(self.held):
            index = <int>(policy.wait * 1000 + 0.999)
            milliseconds = index if milliseconds < 0 or index < milliseconds else milliseconds
        count = poll_gather(poll, events, EVENTS, 0 if gathered else milliseconds)
        for index in range(count):
            fd = poll_fd(&events[index])
            mask = poll_selected(&events[index])
            known = self.by_fd.get(fd)
            if type(known) is Client:
                client = <Client>known
                if client.plain:
                    self._receive_plain(client, policy.window, news.ended, news.changed, news.questions)
                    readable += 1
                    continue
            elif known is not None:
                if mask & READ:
                    self._receive_ready(<int>known, fd, news, answered)
                continue
            news.events.append((fd, mask))
        if readable > 1 and self._waiting() < policy.gather and self.gathers < GATHER_ROUNDS and not news.any():
            self.gathers += 1
        else:
            self.gathers = 0
            self._flush_links(news)
        if PyList_GET_SIZE(answered):
            held = [] if policy.hold else None
            self._flush_plain(answered, policy.hold, news.changed, held)
            if held:
                if not self.held:
                    self.held_until = poll_clock() + policy.wait
                self.held += held
        if PyList_GET_SIZE(self.held) and poll_clock() >= self.held_until:
            held, self.held = self.held, []
            self._flush_plain(held, 0, news.changed, None)
        return count > 0 or gathered

    cdef size_t _waiting(self) noexcept:
        """Return the bytes that wait for all shards."""
        cdef size_t size = 0
        cdef int shard
        for shard in range(self.shards):
            size += stream_size(&self._links[shard].out)
        return size

    cdef int _flush_links(self, News news) except -1:
        """Send each shard what waits for it."""
        cdef Link *link
        cdef int shard
        news.unsent, self.stuck = self.stuck, False
        for shard in range(self.shards):
            link = &self._links[shard]
            if stream_size(&link.out):
                try:
                    link.sent += self._send(link.fd, &link.out, memory.KEEP)
                except OSError:
                    news.broken.append((shard, None))
                    continue
                if stream_size(&link.out):
                    news.unsent = self.stuck = True
        return 0

    cdef int _receive_ready(self, int shard, int fd, News news, list answered) except -1:
        """Receive from a link that is readable, as ``receive_link`` does."""
        cdef Stream *rest = link_behind(&self._links[shard])
        cdef Py_ssize_t size = self._receive_once(fd, rest, RECEIVE_LINK)
        cdef list clients = []
        cdef list answers = []  # where merge raises LinkError, drop_link accounts for both
        if size > 0:
            try:
                self._merge(shard, self._inbox, in_inbox(rest, size), clients, answers)
                answered += clients
                if answers:
                    news.answers += [(shard, token, reply) for token, reply in answers]
            except LinkError as error:
                news.broken.append((shard, error))
        elif size == 0 or (errno != EAGAIN and errno != EINTR):
            news.broken.append((shard, None))
        return 0

    # -- checks ----------------------------------------------------------------------------------------

    def check(self):
        """Assert the invariants of every link and of what is under way; O(requests under way)."""
        cdef int shard
        cdef size_t index
        cdef Link *link
        cdef Pending *entry
        cdef uint64_t last_end
        cdef size_t questions
        clients = set()
        assert self._count == 0 and self._groups == 0 and self._local_group == -1
        for shard in range(self.shards):
            link = &self._links[shard]
            state = (shard, link.queued, link.sent, link.ticket, link.due, link.pending)
            assert link.group == -1, state
            assert link.queued - link.sent == stream_size(&link.out), (*state, stream_size(&link.out))
            assert <uint32_t>(link.ticket - link.due) == link.pending, state
            assert link.pending <= link.room and link.room & (link.room - 1) == 0, (*state, link.room)
            last_end = 0
            questions = 0
            for index in range(link.pending):
                entry = link_pending(link, index)
                assert last_end < entry.end <= link.queued, (*state, last_end, entry.end)
                last_end = entry.end
                if entry.turn == NULL:
                    questions += 1
                    continue
                assert entry.group < entry.turn.groups, (*state, entry.group)
                assert entry.count == groups_of(entry.turn)[entry.group].count, (*state, entry.count)
                assert not groups_of(entry.turn)[entry.group].arrived, (*state, entry.group)
                if entry.turn.client != NULL:
                    clients.add(<Client>entry.turn.client)
            assert <size_t>len(self._tokens[shard]) == questions, (*state, questions)
        for client in clients:
            check_client(client)


cdef int check_client(Client client) except -1:
    cdef Py_ssize_t waiting = 0
    cdef Turn *turn = client._first
    cdef uint32_t index
    cdef Group *group
    assert turn != NULL
    assert not groups_of(turn)[order_of(turn)[turn.emitted] >> 1].arrived, turn.emitted
    while turn != NULL:
        assert turn.client == <PyObject *>client
        assert turn.emitted < turn.count, (turn.emitted, turn.count)
        assert (turn.next == NULL) == (client._last == turn)
        counts = [0] * turn.groups
        for index in range(turn.count):
            counts[order_of(turn)[index] >> 1] += 1
        for index in range(turn.groups):
            group = &groups_of(turn)[index]
            assert counts[index] == group.count, (counts, index, group.count)
            assert group.read <= group.size, (index, group.read, group.size)
        waiting += turn.count - turn.emitted
        turn = turn.next
    assert client.inflight == waiting, (client.inflight, waiting)
    return 0


cdef class News:
    """What a turn leaves to the router; see the twin in ``imds/router/turns.py``."""

    cdef readonly list events, ended, changed, questions, answers, broken
    cdef readonly bint unsent

    def __cinit__(self):
        self.events, self.ended, self.changed = [], [], []
        self.questions, self.answers, self.broken = [], [], []

    cdef bint any(self) noexcept:
        return (
            self.unsent
            or PyList_GET_SIZE(self.events)
            or PyList_GET_SIZE(self.ended)
            or PyList_GET_SIZE(self.changed)
            or PyList_GET_SIZE(self.questions)
            or PyList_GET_SIZE(self.answers)
            or PyList_GET_SIZE(self.broken)
        )


def turn(Switch switch not None, selector, timeout, policy):
    """Take one turn of the router's loop; see the twin in ``imds/router/turns.py``."""
    cdef int poll
    cdef Rounds rounds
    cdef News news
    cdef Policy figures
    if not HAVE_EPOLL or type(selector) is not EPOLL:
        return _turns.turn(switch, selector, timeout, policy)
    figures.window, figures.gather, figures.hold, figures.wait = policy
    news = News.__new__(News)
    poll = selector.fileno()
    rounds = rounds_begin(poll_milliseconds(timeout), TURN)
    while switch._round(poll, rounds.milliseconds, &figures, news) and not news.any():
        if not rounds_go_on(&rounds):
            break
    return news if news.any() else None
