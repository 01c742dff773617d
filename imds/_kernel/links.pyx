"""The streams between a shard and its routers: the compiled twin of ``imds/shard/links.py``, which has the rules.

Waiting, receiving, appending and sending happen here, without a Python object for an event, a round after the
other; the compiled store runs what has arrived where it is, and its replies are sent from where it wrote them,
unless others still wait for the socket.
"""

import selectors

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from posix.types cimport off_t
from posix.unistd cimport pwrite

from imds._kernel cimport memory
from imds._kernel.executor cimport Executor
from imds._kernel.memory cimport KEEP, buffer_empty, get_u32
from imds._kernel.poll cimport (
    HAVE_EPOLL,
    READ,
    WRITE,
    PollEvent,
    Rounds,
    poll_fd,
    poll_gather,
    poll_microseconds,
    poll_milliseconds,
    poll_selected,
    rounds_begin,
    rounds_go_on,
)
from imds._kernel.record cimport RecordEncoder
from imds._kernel.socket cimport QUIETLY, recv, send
from imds._kernel.stream cimport (
    Stream,
    stream_add,
    stream_drop,
    stream_free,
    stream_front,
    stream_reserve,
    stream_size,
    stream_take,
)

from imds.envelope import LENGTH as _LENGTH
from imds import rounds as _rounds
from imds.shard import links as _twin
from imds.shard.segment import FILL, ROOM as _ROOM

cdef enum:
    EVENTS = 64  # taken in one turn; the others come in the next
    LENGTH = 4
    ROOM = 1 << 17

assert (LENGTH, ROOM) == (_LENGTH, _ROOM)

cdef uint8_t[2 * ROOM] FILLED
memory.memset(FILLED, FILL[0], sizeof(FILLED))

cdef size_t RECEIVE = _twin.RECEIVE
cdef double TURN = _rounds.TURN
cdef object EPOLL = getattr(selectors, "EpollSelector", None)
assert (READ, WRITE) == (selectors.EVENT_READ, selectors.EVENT_WRITE)
cdef object EXECUTE = Executor.execute


cdef inline Executor executor_of(store):
    """Return a store that may be called in C, or None: it is one, and no subclass has another ``execute``."""
    return <Executor>store if isinstance(store, Executor) and type(store).execute is EXECUTE else None


cdef class Link:
    """The stream to one router; see the twin."""

    cdef readonly object sock
    cdef readonly bytes router
    cdef readonly int fd
    cdef public int mask
    cdef public uint64_t notices
    cdef readonly bint ended
    cdef Stream _arrived
    cdef Stream _out
    cdef size_t _used
    cdef size_t _mark

    def __dealloc__(self):
        stream_free(&self._arrived)
        stream_free(&self._out)

    @property
    def out(self):
        return stream_size(&self._out) > 0

    @property
    def unsent(self):
        return stream_size(&self._out)


cdef class Links:
    """All links of a shard; see the twin."""

    cdef readonly dict by_fd
    cdef readonly bint waiting
    cdef readonly Py_ssize_t executed
    cdef public Py_ssize_t appended
    cdef readonly uint64_t length
    cdef public bint torn
    cdef public object unsynced
    cdef public bint hold
    cdef public object grant
    cdef public list changed
    cdef list _turn
    cdef object _clock
    cdef bint _last
    cdef uint64_t _end

    def __cinit__(self, clock=None):
        self._clock = clock
        self.by_fd = {}
        self.changed = []
        self._turn = []

    def add(self, sock, bytes router not None=b""):
        """Return a new link on a non-blocking socket."""
        cdef Link link = Link.__new__(Link)
        link.sock = sock
        link.router = router
        link.fd = sock.fileno()
        link.mask = READ
        self.by_fd[link.fd] = link
        return link

    def drop(self, Link link not None):
        """Forget a link; its replies go nowhere."""
        del self.by_fd[link.fd]
        link.ended = True
        stream_free(&link._arrived)
        stream_free(&link._out)
        link._used = link._mark = 0

    def end(self):
        """Have the turn end with this round, and the worker append what it logs; for who is called by it."""
        self._last = True

    def turn(self, selector, timeout, store):
        """Wait, receive, execute, and send what may be sent; return the events of other descriptors, or None."""
        cdef Rounds rounds = rounds_begin(poll_milliseconds(timeout), TURN)
        cdef list others = []
        cdef int poll = selector.fileno() if HAVE_EPOLL and type(selector) is EPOLL else -1
        cdef Executor executor = executor_of(store)
        self.waiting = self.hold = self.torn = self._last = False
        self.executed = self.appended = 0
        self.unsynced = None
        if self.grant is not None:
            self._end, self.length = self.grant[4:]
        if poll < 0:  # a selector with a clock of its own, it may be: Python's is the one to replace
            clock = _rounds.Rounds(timeout)
            while self._round(selector, poll, poll_milliseconds(timeout), store, executor, others):
                timeout = clock.left()
                if timeout <= 0:
                    break
            return others or None
        while self._round(selector, poll, rounds.milliseconds, store, executor, others):
            if not rounds_go_on(&rounds):
                break
        return others or None

    cdef bint _round(
        self, selector, int poll, int milliseconds, store, Executor executor, list others
    ) except -1:
        """Wait, receive, execute, append, reply; return whether it did and has left nothing to the worker."""
        cdef Link link
        cdef uint64_t now
        if PyList_GET_SIZE(self._turn):
            self._turn = []
        if poll >= 0:
            self._wait(poll, milliseconds, others)
        else:
            for key, mask in selector.select(None if milliseconds < 0 else milliseconds * 1e-3):
                self._on_event(key.fd, mask, others)
        if not PyList_GET_SIZE(self._turn):
            return False
        self.executed += PyList_GET_SIZE(self._turn)
        now = poll_microseconds() if self._clock is None else self._clock()
        if executor is not None:
            executor.now = now // 1000
        else:
            store.now = now // 1000
        for link in self._turn:
            self._execute(link, store, executor)
        if self.hold or not self._append(store, executor, now):
            self.waiting = True
            return False
        self._reply()
        return not (self._last or PyList_GET_SIZE(others) or PyList_GET_SIZE(self.changed))

    cdef bint _append(self, store, Executor executor, uint64_t now) except -1:
        """Append what the round has to log; return whether nothing is left to append."""
        cdef object log = executor.log if executor is not None else store.log
        cdef bytes records
        cdef const uint8_t *data
        cdef size_t size
        cdef Py_ssize_t written
        cdef uint64_t since, until, end, room
        cdef int fd
        if type(log) is RecordEncoder:
            (<RecordEncoder>log).seal()
            data = (<RecordEncoder>log)._pending.data
            size = (<RecordEncoder>log)._pending.size
        else:
            records = log.pending()
            data = <const uint8_t *>PyBytes_AS_STRING(records)
            size = <size_t>PyBytes_GET_SIZE(records)
        if not size:
            return True
        if self.grant is None or self._last:
            return False
        fd, since, until, sync, _, _ = self.grant
        if not since <= now < until:
            return False
        end = self._end + size
        if end > self.length and size <= ROOM:
            room = (end + ROOM - 1) // ROOM * ROOM - self.length
            written = pwrite(fd, FILLED, room, <off_t>self.length)
            if written > 0:
                self.length += <uint64_t>written
        written = pwrite(fd, data, size, <off_t>self._end)
        if written < <Py_ssize_t>size:  # whatever the reason is, the worker will meet it, too
            self.torn = True
            return False
        self.appended += written
        self._end = end
        self.length = max(self.length, end)
        if executor is not None:
            executor.commit()
        else:
            store.commit()
        if sync is not None:
            try:
                sync(fd)
            except OSError as error:
                self.unsynced = error
                return False
        return True

    cdef int _wait(self, int poll, int milliseconds, list others) except -1:
        cdef PollEvent[EVENTS] events
        cdef int index
        for index in range(poll_gather(poll, events, EVENTS, milliseconds)):
            self._on_event(poll_fd(&events[index]), poll_selected(&events[index]), others)
        return 0

    cdef int _on_event(self, int fd, int mask, list others) except -1:
        cdef object found = self.by_fd.get(fd)
        cdef Link link
        if found is None:
            others.append((fd, mask))
            return 0
        link = <Link>found
        if mask & WRITE and stream_size(&link._out):
            self._send(link)
            self.changed.append(link)
        if mask & READ and self._receive(link):
            self._turn.append(link)
        return 0

    def again(self, store):
        """Execute once more what was executed in the last round: its effects have been rolled back."""
        cdef Link link
        cdef Executor executor = executor_of(store)
        for link in self._turn:
            link._out.held.size = link._out.start + link._mark
            self._execute(link, store, executor)

    def reply(self):
        """Send the replies of this round, each as far as its socket takes it."""
        self._reply()

    cdef int _reply(self) except -1:
        cdef Link link
        self.waiting = False
        for link in self._turn:
            if link.ended:
                continue
            stream_drop(&link._arrived, link._used, KEEP)
            link._used = 0
            self._send_on(link)
        self._turn = []  # not to be executed again
        return 0

    def push(self, Link link not None, data):
        """Send what no request asked for, behind the replies that wait for the socket."""
        cdef bytes sent = bytes(data)
        if not stream_add(&link._out, PyBytes_AS_STRING(sent), <size_t>PyBytes_GET_SIZE(sent)):
            raise MemoryError
        self._send_on(link)

    cdef bint _receive(self, Link link) except -1:
        """Read once; whether there is an envelope to execute."""
        cdef Py_ssize_t size
        cdef size_t arrived
        if not stream_reserve(&link._arrived, RECEIVE):
            raise MemoryError
        size = recv(link.fd, link._arrived.held.data + link._arrived.held.size, RECEIVE, 0)
        if size <= 0:
            if size == 0 or (errno != EAGAIN and errno != EINTR):
                link.ended = True
                self.changed.append(link)
            return False
        link._arrived.held.size += <size_t>size
        arrived = stream_size(&link._arrived)
        return arrived >= LENGTH and arrived - LENGTH >= get_u32(stream_front(&link._arrived))

    cdef int _execute(self, Link link, store, Executor executor) except -1:
        cdef bytes replies
        cdef bint fits
        link._mark = stream_size(&link._out)
        if executor is not None:
            try:
                link._used = executor.run_batch(stream_front(&link._arrived), stream_size(&link._arrived))
                fits = stream_take(&link._out, &executor._out)
            finally:
                buffer_empty(&executor._out)
        else:
            view = PyMemoryView_FromMemory(
                <char *>stream_front(&link._arrived), <Py_ssize_t>stream_size(&link._arrived), PyBUF_READ
            )
            link._used, replies = store.execute(view)
            view.release()  # what is behind it will move
            fits = stream_add(&link._out, PyBytes_AS_STRING(replies), <size_t>PyBytes_GET_SIZE(replies))
        if not fits:
            raise MemoryError
        return 0

    cdef int _send_on(self, Link link) except -1:
        self._send(link)
        if stream_size(&link._out):
            self.changed.append(link)
        return 0

    cdef int _send(self, Link link) except -1:
        cdef Py_ssize_t sent
        if stream_size(&link._out):
            sent = send(link.fd, stream_front(&link._out), stream_size(&link._out), QUIETLY)
            if sent > 0:
                stream_drop(&link._out, <size_t>sent, KEEP)
            elif sent < 0 and errno != EAGAIN and errno != EINTR:
                link.ended = True
                self.changed.append(link)
        return 0


def alloc_fails_at(size_t n):
    """For tests: make the n-th allocation of this module fail, once; 0 ends it. Return what was left to count."""
    left = memory.alloc_fails_at
    memory.alloc_fails_at = n
    return left
