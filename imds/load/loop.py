"""The load loop of one benchmark process: connections, counting replies, timing.

The way of a batch (the requests that go out in one write)::

    pool -> idle connection -> send -> wait -> count replies -> record latency -> idle connection
                                                  `- until all have come

Closed loop (no rate): a connection sends its next batch as soon as it is idle; latency counts from the
send. Open loop (a rate): batches are due at fixed times, whatever the server does; one that finds no idle
connection waits for one, and latency counts from when it was due. So a server that stalls for a second
shows as the second that clients would have waited, and not as one slow request.

Every batch that became due is accounted for: those that could not even be sent until the grace time after
the end was over are recorded with the time they had waited by then, and are reported as unsent; a
connection that gets no reply at all is reported as broken.
"""

from __future__ import annotations

import select
import selectors
import socket
from collections import deque
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter_ns, process_time_ns
from typing import Protocol

from imds.histogram import Histogram
from imds.load.replies import COUNTERS, Replies
from imds.load.workload import Batch
from imds.protocol import ProtocolError

RECV = 1 << 16
CLEAN = 1 << 14  # replies up to this size are remembered as clean
SECOND = 1_000_000_000
TICK = 0.2  # seconds between two looks at the stop flag when nothing happens
SHOWN_ERRORS = 5  # how many different texts are kept


@dataclass(slots=True)
class CommandTally:
    """What one command has seen. ``latency`` holds nanoseconds, one entry for each reply."""

    latency: Histogram = field(default_factory=Histogram)
    errors: int = 0
    misses: int = 0

    def merge(self, other: CommandTally) -> None:
        """Add ``other``."""
        self.latency.merge(other.latency)
        self.errors += other.errors
        self.misses += other.misses


@dataclass(slots=True)
class Tally:
    """The result of a run, of one process or merged."""

    commands: dict[str, CommandTally] = field(default_factory=dict)
    delay: Histogram = field(default_factory=Histogram)  # open loop: from due to sent, each batch
    seconds: float = 0.0
    busy: float = 0.0  # share of the time that the load process itself computed
    unsent: int = 0  # requests that were due and never sent
    broken: int = 0  # connections that the server closed, or that got no reply
    texts: dict[str, int] = field(default_factory=dict)  # error text: how often

    def complain(self, text: str) -> None:
        """Count ``text``, while it is among the first few."""
        if text in self.texts or len(self.texts) < SHOWN_ERRORS:
            self.texts[text] = self.texts.get(text, 0) + 1

    def merge(self, other: Tally) -> None:
        """Add the result of a process that ran at the same time."""
        for name, theirs in other.commands.items():
            self.commands.setdefault(name, CommandTally()).merge(theirs)
        self.delay.merge(other.delay)
        self.seconds = max(self.seconds, other.seconds)
        self.busy = max(self.busy, other.busy)
        self.unsent += other.unsent
        self.broken += other.broken
        for text, times in other.texts.items():
            if text in self.texts or len(self.texts) < SHOWN_ERRORS:
                self.texts[text] = self.texts.get(text, 0) + times

    def all(self) -> CommandTally:
        """Return the sum over the commands."""
        total = CommandTally()
        for tally in self.commands.values():
            total.merge(tally)
        return total


class HasFileno(Protocol):
    """What a selector can wait for."""

    def fileno(self) -> int: ...


class Connection:
    """A client connection and the batch that it waits for."""

    __slots__ = ("batch", "replies", "rest", "since", "sock", "whole")

    batch: Batch

    def __init__(self, sock: socket.socket, replies: Replies) -> None:
        self.sock = sock
        self.replies = replies
        self.rest = memoryview(b"")  # what the socket has not taken yet
        self.since = 0  # when the batch was sent (closed loop) or due (open loop), ns
        self.whole = True  # nothing of the batch's reply has come so far


class Load:
    """Runs batches of ``pool`` over its connections. :meth:`stop` may be called from a signal handler."""

    def __init__(self, pool: list[Batch], protocol: str, timeout: float = 5.0) -> None:
        self._batches = cycle(pool)
        self._pipeline = len(pool[0].names)
        self._protocol = protocol
        self._timeout = int(timeout * SECOND)
        self._selector = selectors.DefaultSelector()
        self._idle: deque[Connection] = deque()
        self._waiting: set[Connection] = set()
        self._stopped = False
        self._tally = Tally()
        self._last_clean = b""

    def add(self, sock: socket.socket) -> None:
        """Take over ``sock``, which is connected."""
        sock.setblocking(False)
        connection = Connection(sock, COUNTERS[self._protocol]())
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._idle.append(connection)

    def watch(self, pipe: HasFileno) -> None:
        """Stop as soon as ``pipe`` can be read: whoever holds its other end has let go of it."""
        self._selector.register(pipe, selectors.EVENT_READ, None)

    def stop(self) -> None:
        """Make :meth:`run` return what it has so far."""
        self._stopped = True

    def close(self) -> None:
        """Close every connection."""
        for key in self._selector.get_map().values():
            if key.data is not None:
                key.data.sock.close()
        self._selector.close()

    def run(
        self, seconds: float | None, batches: int | None = None, gap: float = 0.0, first: float = 0.0
    ) -> Tally:
        """Run for ``seconds`` or ``batches``, whichever ends first, and return the result.

        ``gap`` > 0 makes it an open loop: a batch is due every ``gap`` nanoseconds, the first one
        after ``first``. Ends ``timeout`` after the last reply at the latest.
        """
        tally = self._tally = Tally()
        idle, waiting = self._idle, self._waiting
        start = heard = perf_counter_ns()
        cpu = process_time_ns()
        end = start + int(seconds * SECOND) if seconds is not None else 1 << 62
        left = batches if batches is not None else 1 << 62
        due = start + first
        while not self._stopped:
            now = perf_counter_ns()
            if gap:
                while idle and left and due <= now and due < end:
                    self._send(idle.popleft(), int(due))
                    tally.delay.record(now - int(due))
                    due += gap
                    left -= 1
                over = not left or due >= end or now - end > self._timeout
            else:
                while idle and left and now < end:
                    self._send(idle.popleft(), now)
                    left -= 1
                    now = perf_counter_ns()
                over = not left or now >= end
            if not waiting and (over or not idle):
                break
            if not waiting or now - heard <= self._timeout:
                pause = TICK if over or not idle else min(TICK, (due - now) / SECOND)
            else:
                tally.complain(f"no reply for {self._timeout / SECOND:g} s")
                self._abandon()
                break
            if self._step(pause):
                heard = perf_counter_ns()
            elif not waiting:
                heard = now  # nothing to hear: the next batch is not due yet
        now = perf_counter_ns()
        if gap and not self._stopped:
            self._count_unsent(due, gap, left, min(end, now), now)
        tally.seconds = (now - start) / SECOND
        tally.busy = (process_time_ns() - cpu) / max(1, now - start)
        return tally

    def _send(self, connection: Connection, since: int) -> None:
        """Give ``connection`` the next batch."""
        batch = connection.batch = next(self._batches)
        connection.since = since
        connection.whole = True
        self._waiting.add(connection)
        frame = batch.frame
        try:
            sent = connection.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._drop(connection, str(error))
            return
        if sent < len(frame):
            connection.rest = memoryview(frame)[sent:]
            self._selector.modify(connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _step(self, pause: float) -> bool:
        """Wait at most ``pause`` seconds for the sockets and serve them; return whether one had news."""
        ready = self._select(pause)
        for key, events in ready:
            connection: Connection | None = key.data
            if connection is None:
                self._stopped = True
                break
            if events & selectors.EVENT_WRITE:
                self._send_rest(connection)
            if events & selectors.EVENT_READ and connection.sock.fileno() >= 0:
                self._receive(connection)
        return bool(ready)

    def _select(self, pause: float) -> list[tuple[selectors.SelectorKey, int]]:
        # epoll counts in whole milliseconds, which is an age for an open loop. Waiting for the epoll
        # descriptor itself by select() is exact to the system's timer. (Its number is small enough for
        # select(): it was opened before the connections.)
        if 0 < pause < TICK and hasattr(self._selector, "fileno"):
            if not select.select([self._selector.fileno()], [], [], pause)[0]:
                return []
            pause = 0
        return self._selector.select(max(0, pause))

    def _send_rest(self, connection: Connection) -> None:
        try:
            sent = connection.sock.send(connection.rest)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, str(error))
            return
        connection.rest = connection.rest[sent:]
        if not connection.rest:
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(RECV)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, str(error))
            return
        now = perf_counter_ns()
        if not data:
            self._drop(connection, "connection closed by the server")
            return
        batch = connection.batch
        if connection.whole and data == batch.clean and connection in self._waiting:
            self._finish(connection, now)
            return
        replies = connection.replies
        try:
            replies.feed(data)
            if replies.count < self._pipeline:
                connection.whole = False
                return
            if replies.count > self._pipeline or not replies.at_rest or connection not in self._waiting:
                raise ProtocolError("more replies than requests")
        except ProtocolError as error:
            self._drop(connection, str(error))
            return
        if replies.odd:
            self._count_odd(batch, replies.odd)
        elif connection.whole and len(data) <= CLEAN:
            if data != self._last_clean:
                self._last_clean = data
            batch.clean = self._last_clean  # equal replies share one object
        replies.reset()
        self._finish(connection, now)

    def _finish(self, connection: Connection, now: int) -> None:
        """The batch has been answered: record it, and make the connection idle."""
        commands = self._tally.commands
        latency = now - connection.since
        for name, count in connection.batch.counts:
            if name not in commands:
                commands[name] = CommandTally()
            commands[name].latency.record(latency, count)
        self._waiting.discard(connection)
        self._idle.append(connection)

    def _count_odd(self, batch: Batch, odd: list[tuple[int, str | None]]) -> None:
        """Attribute errors and misses to the commands that got them."""
        for position, text in odd:
            tally = self._tally.commands.setdefault(batch.names[position], CommandTally())
            if text is None:
                tally.misses += 1
            else:
                tally.errors += 1
                self._tally.complain(text)

    def _drop(self, connection: Connection, reason: str) -> None:
        """Go on without ``connection``."""
        self._tally.broken += 1
        self._tally.complain(reason)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._waiting.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _abandon(self) -> None:
        """Drop the connections that wait: their replies would be taken for those of later batches."""
        for connection in list(self._waiting):
            self._drop(connection, "connection given up: no reply")

    def _count_unsent(self, due: float, gap: float, left: int, end: float, now: int) -> None:
        """Record the batches due before ``end`` and not sent by ``now``: they take at least that long."""
        commands = self._tally.commands
        while due < end and left:
            batch = next(self._batches)
            for name, count in batch.counts:
                commands.setdefault(name, CommandTally()).latency.record(now - int(due), count)
            self._tally.unsent += self._pipeline
            due += gap
            left -= 1
