"""The streams between a shard and its routers: requests in, replies out, a turn of the loop at a time.

::

    turn:   wait -> receive from every readable link -> execute what is whole
                 -> nothing to log, or a grant to append it: append, and sync if that is in it,
                    send the replies, and once more
                    otherwise they wait:  reply, when what they rest on is in the log
                                          again, when the log has refused it

What stays true:

* A link's replies leave in the order in which its requests came, and none before ``turn`` found nothing to
  log, or has appended it, or ``reply`` was called.
* A turn ends with the first round that leaves something to the worker: effects that it may not append, other
  descriptors' events, a link to think about, a call of ``end``. At the latest it ends rounds.TURN after its
  first request, so nothing that the worker looks at once in a turn is looked at much later than it should.
* What a turn has appended is in the file and not in the worker's books: ``appended`` says how much,
  ``length`` how long the file is now. The worker counts it before it does anything else with the log.
* What was executed in a turn is kept until its replies may go, so that ``again`` can execute it once more;
  after ``reply`` there is nothing to execute again.
* A link is read only by ``turn``, at most ``RECEIVE`` bytes at a time, and only while the worker has it
  watched for reading; what an envelope announces allocates nothing.

No logging, no policy: who is watched for what is the worker's to decide. The compiled twin is
``_kernel/links.pyx``; ``tests/shard/test_links.py`` holds both to the same cases.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import NamedTuple, Protocol

from imds.envelope import LENGTH
from imds.protocol import U32, Buffer
from imds.rounds import Rounds
from imds.shard.segment import make_room

RECEIVE = 1 << 18  # bytes taken from one link per round


class Grant(NamedTuple):
    """A leave to append to the file ``fd``, at ``end``; it is ``length`` long, room behind ``end``.

    It holds at the times ``since`` <= t < ``until``, in microseconds since 1970. ``sync`` is what syncs the
    file before a reply goes, if anything has to: it raises OSError.
    """

    fd: int
    since: int
    until: int
    sync: Callable[[int], object] | None
    end: int
    length: int


class Log(Protocol):
    """The effects that have been executed and are not in the file."""

    def pending(self) -> Buffer: ...


class Executor(Protocol):
    """A store, or what answers in its place. See ``UnifiedStore.execute``."""

    now: int

    @property
    def log(self) -> Log: ...

    def execute(self, data: Buffer, /) -> tuple[int, bytes]: ...

    def commit(self) -> None: ...


class Link:
    """The stream to one router.

    Three are the worker's: ``router``, who it is; ``notices``, how many it was sent; ``mask``, what the
    selector watches. ``out`` is true while replies wait for the socket, ``unsent`` says how many bytes.
    ``ended``: no more comes.
    """

    __slots__ = ("arrived", "ended", "fd", "mark", "mask", "notices", "out", "router", "sock", "used")

    def __init__(self, sock: socket.socket, router: bytes) -> None:
        self.sock = sock
        self.router = router
        self.notices = 0
        self.fd = sock.fileno()
        self.mask = EVENT_READ
        self.arrived = bytearray()  # requests that have not been answered, or not wholly arrived
        self.used = 0  # bytes of these that were executed in this round
        self.out = bytearray()
        self.mark = 0  # bytes of ``out`` that are older than this round
        self.ended = False

    @property
    def unsent(self) -> int:
        return len(self.out)


class Links:
    """All links of a shard. ``clock`` tells the time in microseconds since 1970, once for each round that
    executes something: the store's ``now``, in milliseconds.

    Before :meth:`turn` the worker may give a ``grant``: the turn then appends what a round has to log itself,
    and commits it. After it, ``waiting`` says whether replies wait for :meth:`reply`; ``executed`` how often
    a link had something to execute; ``appended`` how many bytes are in the file by the grant, ``length`` how
    long that is, and ``torn`` whether some more may be in it, which are to be taken back; ``unsynced`` is
    the error by which the grant's sync of what was appended has failed, or None. ``changed`` collects the
    links that the worker has to think about: ended ones, and those of which the socket has not, or now has,
    taken everything. The worker empties it.
    """

    def __init__(self, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock or _microseconds
        self.by_fd: dict[int, Link] = {}
        self.grant: Grant | None = None
        self.appended = 0
        self.length = 0
        self.torn = False
        self.unsynced: OSError | None = None
        self.waiting = False
        self.executed = 0
        # Set while executing: the replies of this round wait, whether it logs something or not.
        self.hold = False
        self.changed: list[Link] = []
        self._turn: list[Link] = []  # what was executed in the last round
        self._last = False  # whether it is the turn's last one
        self._end = 0  # where the next record goes
        self._inbox = memoryview(bytearray(RECEIVE))

    def add(self, sock: socket.socket, router: bytes = b"") -> Link:
        """Return a new link on a non-blocking socket. The worker has the selector watch it."""
        link = Link(sock, router)
        self.by_fd[link.fd] = link
        return link

    def drop(self, link: Link) -> None:
        """Forget a link; its replies go nowhere. The socket is the worker's to close."""
        del self.by_fd[link.fd]
        link.ended = True
        link.arrived.clear()
        link.out.clear()
        link.used = 0

    def end(self) -> None:
        """Have the turn end with this round, and the worker append what it logs; for who is called by it."""
        self._last = True

    def turn(
        self, selector: BaseSelector, timeout: float | None, store: Executor
    ) -> list[tuple[int, int]] | None:
        """Wait for ``timeout`` seconds at most (None: for ever), receive, execute, send what may be sent.

        Returns the events of other descriptors, as (descriptor, the selector's mask). Raises what ``execute``
        raises for an envelope that no router makes.
        """
        self.waiting = self.hold = self.torn = self._last = False
        self.executed = self.appended = 0
        self.unsynced = None
        if self.grant is not None:
            self._end, self.length = self.grant.end, self.grant.length
        others: list[tuple[int, int]] = []
        rounds = Rounds(timeout)
        while self._round(selector, timeout, store, others):
            timeout = rounds.left()
            if timeout <= 0:
                break
        return others or None

    def _round(
        self,
        selector: BaseSelector,
        timeout: float | None,
        store: Executor,
        others: list[tuple[int, int]],
    ) -> bool:
        """Wait, receive, execute, append, reply; return whether it did and has left nothing to the worker."""
        self._turn.clear()
        for key, mask in selector.select(timeout):
            link = self.by_fd.get(key.fd)
            if link is None:
                others.append((key.fd, mask))
                continue
            if mask & EVENT_WRITE:
                self._send(link)
                self.changed.append(link)
            if mask & EVENT_READ and self._receive(link):
                self._turn.append(link)
        if not self._turn:
            return False
        self.executed += len(self._turn)
        now = self._clock()
        store.now = now // 1000
        for link in self._turn:
            self._execute(link, store)
        if self.hold or not self._append(store, now):
            self.waiting = True
            return False
        self.reply()
        return not (self._last or others or self.changed)

    def _append(self, store: Executor, now: int) -> bool:
        """Append what the round has to log; return whether nothing is left to append."""
        records = store.log.pending()
        if not records:
            return True
        if self.grant is None or self._last:
            return False
        grant = self.grant
        if not grant.since <= now < grant.until:
            return False
        self.length = make_room(os.pwrite, grant.fd, self._end, len(records), self.length)
        try:
            size = os.pwrite(grant.fd, records, self._end)
        except OSError:  # which does not say that nothing was written
            size = 0
        if size < len(records):  # whatever the reason is, the worker will meet it, too
            self.torn = True
            return False
        self.appended += size
        self._end += size
        self.length = max(self.length, self._end)
        store.commit()
        if grant.sync is not None:
            try:
                grant.sync(grant.fd)
            except OSError as error:
                self.unsynced = error
                return False
        return True

    def again(self, store: Executor) -> None:
        """Execute once more what was executed in the last round: its effects have been rolled back."""
        for link in self._turn:
            del link.out[link.mark :]
            self._execute(link, store)

    def reply(self) -> None:
        """Send the replies of this round, each as far as its socket takes it."""
        self.waiting = False
        for link in self._turn:
            if link.ended:
                continue
            del link.arrived[: link.used]
            link.used = 0
            self._send_on(link)
        self._turn.clear()  # not to be executed again

    def push(self, link: Link, data: Buffer) -> None:
        """Send what no request asked for, behind the replies that wait for the socket."""
        link.out += data
        self._send_on(link)

    def _receive(self, link: Link) -> bool:
        """Read once; whether there is an envelope to execute."""
        try:
            size = os.readv(link.fd, [self._inbox])
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            link.ended = True
            self.changed.append(link)
            return False
        arrived = link.arrived
        arrived += self._inbox[:size]
        return len(arrived) >= LENGTH and len(arrived) >= LENGTH + U32.unpack_from(arrived)[0]

    def _execute(self, link: Link, store: Executor) -> None:
        link.mark = len(link.out)
        link.used, replies = store.execute(bytes(link.arrived))
        link.out += replies

    def _send_on(self, link: Link) -> None:
        self._send(link)
        if link.out:
            self.changed.append(link)

    def _send(self, link: Link) -> None:
        if link.out:
            try:
                del link.out[: os.write(link.fd, link.out)]
            except BlockingIOError:
                pass
            except OSError:
                link.ended = True
                self.changed.append(link)


def _microseconds() -> int:
    return time.time_ns() // 1000
