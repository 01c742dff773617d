"""The router process: accepts clients, moves bytes between them and the shards, keeps everything bounded.

``turns.py`` makes a turn of the loop: it receives from and sends to everyone. Here is what it leaves: who is
read, who is dropped, and everything seldom.

What stays true:

* Nothing is unbounded. A client is read only while fewer than ``WINDOW`` of its requests are unanswered,
  less than ``OUT_LIMIT`` of its replies are unread and the shard that it last wrote to has room. A client
  that asks for so much at once that ``OUT_HARD_LIMIT`` of replies pile up is dropped, and the log says so.
* A stalled shard delays only the clients that need it.
* A socket that we close with bytes unread would reset the connection and could take our last reply with
  it, so a connection that ends on our side lingers: write side shut, input thrown away, for ``LINGER``
  seconds at most.
* When draining: no accept, no further read of a client, answer what is under way, then exit 0.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable
from typing import Any

from imds.config import MAX_ROUTERS, Config
from imds.control import Channel
from imds.hashslots import SlotMap
from imds.process import Signals, raise_descriptor_limit, set_schedule, start_logging
from imds.protocol import encode_error
from imds.router.gather import ShardStatus
from imds.router.kernel import NOTICE, Client, LinkError, News, Policy, Switch, turn
from imds.router.requests import Requests
from imds.router.session import Session

WINDOW = 4096  # unanswered requests of one client above which it is not read
HELD_LIMIT = 1 << 16  # bytes behind a request that waits above which its client is not read
OUT_LIMIT = 1 << 20  # bytes of unread replies above which a client is not read
OUT_HARD_LIMIT = 256 << 20  # and above which it is dropped
BACKLOG_LIMIT = 1 << 20  # bytes waiting for a shard above which clients that add to it are not read
# Replies that stop in the midst of a turn, because another shard has not answered yet, wait for it as long as
# this, unless they are as much as this: one send for the whole turn is much cheaper than one for each shard.
HOLD = 0.001  # seconds
HOLD_BYTES = 16 << 10
# Requests of several clients wait for those of others that have arrived meanwhile, until they are as much as
# this or there are none: a shard then wakes up for more of them.
GATHER = 4 << 10
POLICY = Policy(WINDOW, GATHER, HOLD_BYTES, HOLD)
ACCEPTS = 64  # connections accepted per wake-up
LINGER = 2.0  # seconds
LINGER_DRAINING = 0.2  # seconds: an idle client must not hold up a stop
WARN_EVERY = 10.0  # seconds between two warnings of the same kind
DRAIN = 8.0  # seconds that draining may take; the supervisor's own patience is longer
SPARE_DESCRIPTORS = 64  # beside those of clients: links, listeners, the control channel, the log

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

log = logging.getLogger("imds.router")


class Connection:
    """One client's socket. ``client`` is the switch's side of it."""

    __slots__ = ("client", "eof", "fd", "lingers_until", "mask", "session", "sock")

    def __init__(self, sock: socket.socket, switch: Switch, session: Session) -> None:
        self.sock = sock
        self.session = session
        self.fd = sock.fileno()
        self.client = switch.attach(self, self.fd)
        self.client.plain = True
        self.mask = READ
        self.eof = False
        self.lingers_until = 0.0  # 0: it does not


class ShardLink:
    """The stream to one shard."""

    __slots__ = ("fd", "mask", "shard", "sock")

    def __init__(self, shard: int, sock: socket.socket) -> None:
        self.shard = shard
        self.sock = sock
        self.fd = sock.fileno()
        self.mask = READ


class Router:
    """One router process. :meth:`run` returns its exit code."""

    def __init__(
        self, config: Config, slots: SlotMap, listeners: list[socket.socket], channel: Channel, number: int
    ) -> None:
        self.config = config
        self.channel = channel
        self._listeners = listeners
        self._switch = Switch(slots, backlog_limit=BACKLOG_LIMIT)
        self._links: list[ShardLink | None] = [None] * slots.shards
        self._statuses = [ShardStatus() for _ in range(slots.shards)]
        self._requests = Requests(
            self._switch, slots, self._statuses, self, number=number, backlog_limit=BACKLOG_LIMIT
        )
        self._selector = selectors.DefaultSelector()
        self._signals = Signals([signal.SIGTERM], ignored=[signal.SIGINT])
        self.connections: set[Connection] = set()
        self._lingering: set[Connection] = set()
        self._choked: dict[int, set[Connection]] = {}  # by shard: who waits until its backlog is gone
        self._dirty: dict[Connection, None] = {}  # has news; looked at once, at the end of a turn
        self._accepting = False
        self._accepted = 0
        self._number = number
        self._next_warning = 0.0
        self._drains_until = 0.0  # 0: not draining
        self._most_clients = self._raise_limit()
        for shard in range(slots.shards):
            self._switch.drop_link(shard, self._requests.down_reply(shard))

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        selector = self._selector
        selector.register(self.channel, READ, self._on_control)
        selector.register(self._signals, READ, self._on_signal)
        self._accept(True)
        self.channel.send("ready")
        while True:
            news = turn(self._switch, selector, self._timeout(), POLICY)
            if news is not None:
                self._act_on(news)
            if self._dirty:
                self._flush_clients()
            if self._lingering or self._requests.busy or not self._accepting:
                self._on_time()
            if self._drains_until and self._drained():
                return self._close()

    def _act_on(self, news: News) -> None:
        """Decide about what a turn has left."""
        for shard, error in news.broken:
            self._on_broken(shard, error)
        for shard, answered, reply in news.answers:
            if answered is not NOTICE:
                answered(reply)
            elif not self._requests.on_notice(shard, reply):
                self._on_broken(shard, LinkError(f"shard {shard} told what cannot be"))
        for question in news.questions:
            self._requests.take(*question)
        for client in news.changed:
            self.touch(client)
        for client in news.ended:
            if client.owner in self.connections:
                self._receive(client.owner)
        registered = self._selector.get_map()
        for fd, mask in news.events:
            key = registered.get(fd)
            if key is None:
                continue  # dropped earlier in this turn
            owner = key.data
            if type(owner) is not Connection:
                owner(key.fileobj)
            elif mask & READ:
                self._receive(owner)
            else:
                self._dirty[owner] = None
        self._flush_links()

    def _timeout(self) -> float | None:
        if self._drains_until:
            return 0.05
        return 0.1 if self._lingering or self._requests.busy or not self._accepting else None

    def _on_time(self) -> None:
        now = time.monotonic()
        for connection in [one for one in self._lingering if now >= one.lingers_until]:
            self.drop(connection)
        self._requests.on_time()
        self._flush_links()
        self._flush_clients()
        if not self._accepting and not self._drains_until:
            self._accept(True)

    # -- clients ----------------------------------------------------------------------------------

    def _accept(self, on: bool) -> None:
        if on != self._accepting:
            self._accepting = on
            for listener in self._listeners:
                if on:
                    self._selector.register(listener, READ, self._on_accept)
                else:
                    self._selector.unregister(listener)

    def _on_accept(self, listener: socket.socket) -> None:
        if not self._accepting:
            return  # draining began earlier in this turn
        for _ in range(ACCEPTS):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                if time.monotonic() >= self._next_warning:
                    self._next_warning = time.monotonic() + WARN_EVERY
                    log.warning("cannot accept clients for now: %s", error.strerror)
                self._accept(False)
                return
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._accepted += 1
            session = Session(self._accepted * MAX_ROUTERS + self._number)
            connection = Connection(sock, self._switch, session)
            self.connections.add(connection)
            self._selector.register(connection.fd, READ, connection)
            if len(self.connections) > self._most_clients:
                busy = encode_error(f"BUSY the limit is {self._most_clients} clients")
                self._switch.refuse(connection.client, busy)
                self._dirty[connection] = None

    def _receive(self, connection: Connection) -> None:
        client = connection.client
        if connection.lingers_until:
            self._discard(connection)
            return
        try:
            size, questions = self._switch.receive(client, connection.fd)
        except BlockingIOError:
            return
        except OSError:
            self.drop(connection)
            return
        if size == 0:
            connection.eof = True
            self._requests.on_end(client)
            self._dirty[connection] = None
            return
        for question in questions:
            self._requests.take(*question)
        if client.choked >= 0 or client.out or client.inflight >= WINDOW or client.closing:
            self.touch(client)

    def touch(self, client: Client) -> None:
        """Look at a client at the end of this turn."""
        connection = client.owner
        if connection in self.connections:
            if client.choked >= 0:
                self._choked.setdefault(client.choked, set()).add(connection)
            self._dirty[connection] = None

    def _flush_clients(self) -> None:
        """Send every client what its socket takes; for dirty ones decide what to wait for next."""
        dirty, self._dirty = self._dirty, {}
        for connection in dirty:
            if connection not in self.connections or connection.lingers_until:
                continue
            client = connection.client
            left = 0
            try:
                if client.out:
                    left = self._switch.flush(client, connection.fd)
            except OSError:
                self.drop(connection)
                continue
            if left > OUT_HARD_LIMIT:
                log.warning("dropped a client that does not read: %d bytes of replies waited for it", left)
                self.drop(connection)
                continue
            if (connection.eof or client.closing) and not left and not client.inflight:
                self._finish_connection(connection)
                continue
            mask = WRITE if left else 0
            if not (
                connection.eof
                or client.closing
                or client.choked >= 0
                or client.inflight >= WINDOW
                or (client.paused and client.held >= HELD_LIMIT)
                or left >= OUT_LIMIT
                or self._drains_until
            ):
                mask |= READ
            self._watch(connection, mask)

    def _watch(self, connection: Connection, mask: int) -> None:
        if mask != connection.mask:
            if not connection.mask:
                self._selector.register(connection.fd, mask, connection)
            elif mask:
                self._selector.modify(connection.fd, mask, connection)
            else:
                self._selector.unregister(connection.fd)
            connection.mask = mask
        connection.client.plain = mask == READ

    def _finish_connection(self, connection: Connection) -> None:
        """All has been answered and no more will be: close, but let the last reply arrive."""
        if connection.eof:
            self.drop(connection)
            return
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop(connection)
            return
        connection.lingers_until = time.monotonic() + (LINGER_DRAINING if self._drains_until else LINGER)
        self._lingering.add(connection)
        self._watch(connection, READ)
        connection.client.plain = False

    def _discard(self, connection: Connection) -> None:
        try:
            if os.read(connection.fd, 1 << 16):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection at once, whatever it has under way."""
        self._watch(connection, 0)
        self._switch.detach(connection.client)
        self._requests.leave(connection.client)
        connection.sock.close()
        self.connections.discard(connection)
        self._lingering.discard(connection)
        for waiting in self._choked.values():
            waiting.discard(connection)

    # -- shards -----------------------------------------------------------------------------------

    def _on_broken(self, shard: int, error: LinkError | None) -> None:
        """The stream to a shard has ended, or cannot be trusted any more."""
        link = self._links[shard]
        if link is None:
            return
        self._lose(link)
        if error is not None:
            log.error("%s; it has to start anew", error)
            self.channel.send("distrust", shard=shard)

    def _flush_links(self) -> None:
        for shard, link in enumerate(self._links):
            if link is None:
                continue
            try:
                left = self._switch.flush_link(shard, link.fd)
            except OSError:
                self._lose(link)
                continue
            mask = READ | WRITE if left else READ
            if mask != link.mask:
                self._selector.modify(link.fd, mask, link)
                link.mask = mask
            if left <= BACKLOG_LIMIT // 2 and self._choked.get(shard):
                self._unchoke(shard)

    def _unchoke(self, shard: int) -> None:
        for connection in self._choked.pop(shard, ()):
            connection.client.choked = -1
            self._dirty[connection] = None

    def _lose(self, link: ShardLink) -> None:
        """The stream to a shard is gone: say so to everyone who waits for it."""
        shard = link.shard
        self._selector.unregister(link.fd)
        link.sock.close()
        self._links[shard] = None
        clients, lost = self._switch.drop_link(shard, self._requests.down_reply(shard))
        for client in clients:
            self._dirty[client.owner] = None
        for answered, sent in lost:
            answered(None, sent)
        self._unchoke(shard)

    # -- the supervisor ---------------------------------------------------------------------------

    def _on_control(self, channel: Channel) -> None:
        for message, fds in channel.receive():
            kind = message["kind"]
            if kind == "link":
                self._statuses[message["shard"]].restarts = message["restarts"]
                self._on_link(message["shard"], fds[0])
            elif kind == "down":
                status = self._statuses[message["shard"]]
                status.note, status.restarts = message["reason"], message["restarts"]
                down = self._requests.down_reply(message["shard"])
                self._switch.set_down_reply(message["shard"], down)
            elif kind == "configure":
                for field, value in message["changes"].items():
                    self.configure(field, value)
            elif kind == "ask":
                self._requests.peers.on_ask(message["router"], message["number"], fds[0])
            elif kind == "answered":
                self._requests.peers.on_answered(message["number"], message["peer"], there=message["there"])
            elif kind == "drain":
                self._drain()
        if channel.closed and not self._drains_until:
            self._selector.unregister(channel)
            log.error("the supervisor is gone: stopping")
            self._drain()

    def _on_link(self, shard: int, fd: int) -> None:
        old = self._links[shard]
        if old is not None:
            self._lose(old)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        link = ShardLink(shard, sock)
        self._links[shard] = link
        # What is said when it ends. The supervisor knows better, and its word may come before the end does.
        self._statuses[shard].note = "its process has ended"
        self._switch.raise_link(shard, link.fd)
        self._selector.register(link.fd, READ, link)
        self._requests.on_raised(shard)

    def _on_signal(self, signals: Signals) -> None:
        if signals.take():
            self._drain()

    def configure(self, field: str, value: Any) -> None:
        """Change an option, as far as it is about routers."""
        self.config = dataclasses.replace(self.config, **{field: value})
        if field == "max_clients":
            self._most_clients = self._raise_limit()
        elif field == "log_level":
            logging.getLogger().setLevel(value.upper())

    def _raise_limit(self) -> int:
        """Have as many descriptors as the clients need, or return how many clients there may be."""
        limit = raise_descriptor_limit(self.config.max_clients + SPARE_DESCRIPTORS)
        most = min(self.config.max_clients, limit - SPARE_DESCRIPTORS)
        if most < self.config.max_clients:
            log.warning("the limit of open files allows %d clients at most", most)
        return most

    # -- the end ----------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Stop accepting and reading; what has arrived by now is still taken and answered."""
        if self._drains_until:
            return
        self._accept(False)
        for connection in list(self.connections):
            if connection.mask & READ:
                self._receive(connection)
        self._drains_until = time.monotonic() + DRAIN
        self._requests.drain()
        for connection in self.connections:
            connection.client.closing = True
            self._dirty[connection] = None

    def _drained(self) -> bool:
        if time.monotonic() >= self._drains_until:
            log.warning("%d clients did not take their replies in time", len(self.connections))
            return True
        return not self.connections

    def _close(self) -> int:
        for connection in list(self.connections):
            self.drop(connection)
        for link in self._links:
            if link is not None:
                link.sock.close()
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        self._signals.close()
        self.channel.close()
        return 0


def main(
    config: Config, slots: SlotMap, listeners: Iterable[socket.socket], channel: Channel, number: int
) -> int:
    """Run router process ``number`` to its end; return its exit code."""
    start_logging("router", config.log_level)
    set_schedule(config.sched)
    return Router(config, slots, list(listeners), channel, number).run()
