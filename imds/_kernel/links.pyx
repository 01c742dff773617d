"""The streams between a shard and its routers: the compiled twin of ``imds/shard/links.py``, which has the rules.

Waiting, receiving and sending happen here, without a Python object for an event; the store is called with a view
of what has arrived, and its replies are copied once, to where the socket is sent from.
"""

import selectors

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t

from imds._kernel cimport memory
from imds._kernel.memory cimport get_u32
from imds._kernel.poll cimport (
    HAVE_EPOLL,
    READ,
    WRITE,
    PollEvent,
    poll_fd,
    poll_gather,
    poll_milliseconds,
    poll_selected,
)
from imds._kernel.socket cimport QUIETLY, recv, send
from imds._kernel.stream cimport (
    Stream,
    stream_add,
    stream_drop,
    stream_free,
    stream_front,
    stream_reserve,
    stream_size,
)

from imds.envelope import LENGTH as _LENGTH
from imds.shard import links as _twin

cdef enum:
    EVENTS = 64  # taken in one turn; the others come in the next
    LENGTH = 4
    KEEP = 1 << 20  # an empty buffer that is larger than this is given back

assert LENGTH == _LENGTH

cdef size_t RECEIVE = _twin.RECEIVE
cdef object EPOLL = getattr(selectors, "EpollSelector", None)
assert (READ, WRITE) == (selectors.EVENT_READ, selectors.EVENT_WRITE)


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
    cdef public bint hold
    cdef public list changed
    cdef list _turn
    cdef object _clock

    def __cinit__(self, clock):
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

    def turn(self, selector, timeout, store):
        """Wait, receive, execute, and send what may be sent; return the events of other descriptors, or None."""
        cdef list others = None
        cdef Link link
        if PyList_GET_SIZE(self._turn):
            self._turn = []
        self.waiting = self.hold = False
        if HAVE_EPOLL and type(selector) is EPOLL:
            others = self._wait(selector.fileno(), poll_milliseconds(timeout))
        else:
            others = []
            for key, mask in selector.select(timeout):
                self._on_event(key.fd, mask, others)
        self.executed = PyList_GET_SIZE(self._turn)
        if self.executed:
            store.now = self._clock()
            for link in self._turn:
                self._execute(link, store)
            if self.hold or store.log.pending():
                self.waiting = True
            else:
                self._reply()
        return others or None

    cdef list _wait(self, int poll, int milliseconds):
        cdef PollEvent[EVENTS] events
        cdef int index
        cdef list others = []
        for index in range(poll_gather(poll, events, EVENTS, milliseconds)):
            self._on_event(poll_fd(&events[index]), poll_selected(&events[index]), others)
        return others

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
        """Execute once more what was executed in this turn: its effects have been rolled back."""
        cdef Link link
        for link in self._turn:
            link._out.held.size = link._out.start + link._mark
            self._execute(link, store)

    def reply(self):
        """Send the replies of this turn, each as far as its socket takes it."""
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

    cdef int _execute(self, Link link, store) except -1:
        cdef bytes replies
        view = PyMemoryView_FromMemory(
            <char *>stream_front(&link._arrived), <Py_ssize_t>stream_size(&link._arrived), PyBUF_READ
        )
        used, replies = store.execute(view)
        view.release()  # what is behind it will move
        link._used = used
        link._mark = stream_size(&link._out)
        if not stream_add(&link._out, PyBytes_AS_STRING(replies), <size_t>PyBytes_GET_SIZE(replies)):
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
