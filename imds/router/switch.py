"""The router's inner loop: client bytes in, shard bytes out, and the replies back in order.

A request's way there and back::

    client --feed--> Turn (order: which shard answers which reply)
                       |  one envelope for each shard concerned
                       v
               Link.out --flush_link--> shard --receive_link/merge--> Turn.groups
                                                                         |  in the order of the requests
    client <--flush-- Client.out <---------------------------------------+

A turn is what one read of a client's socket gave: requests in their order, each answered by one shard or by
the router itself. The shard answers a turn's requests for it as one group. A client's turns are
emitted first to last, a turn's replies by its ``order``, so replies leave in the order of the requests,
and no further than to the first reply that is still missing.

What stays true:

* Each envelope has a ticket; a shard's replies must name the tickets in the order in which they went, with
  the same counts. Anything else raises LinkError: the link is closed rather than a reply misdelivered.
* Memory follows the bytes that have arrived, never an announced length.
* The switch knows no policy: it tells how much waits (``Client.inflight``, ``Client.out``, ``backlog``) and
  the router decides who is read.

No clock, no logging. Sockets appear only as descriptors in receive and flush, because one call for
"read and split" is what the compiled twin, ``_kernel/switch.pyx``, is fast by. The tests in
``tests/router/test_switch.py`` hold both to the same cases.
"""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from xxhash import xxh64_intdigest

from imds.commands import UNKNOWN_COMMAND, WRONG_ARITY, Command, Spread, lookup
from imds.envelope import DIALECT_IMDS, LENGTH, REPLY, REQUEST, TICKETS
from imds.hashslots import SLOTS, SlotMap, tag
from imds.protocol import MAX_REQUEST, MAX_TOKENS, U32, FrameScan, ProtocolError, encode_error

RECEIVE = 1 << 16  # bytes that one client may hand in per wake-up: nobody can starve the others by sending
RECEIVE_LINK = 1 << 18  # bytes taken from a shard per wake-up

_UNKNOWN_COMMAND = encode_error(UNKNOWN_COMMAND)
_WRONG_ARITY = encode_error(WRONG_ARITY)
_UNKNOWN_OUTCOME = encode_error("UNKNOWN the shard died: the write may or may not have been applied")
_RETRY = encode_error("RETRY the shard died: the request was not applied")


class LinkError(Exception):
    """A shard sent what cannot be an answer to what it was asked."""


class Client:
    """One client's side of the switch. ``owner`` is the router's, for its own use.

    ``inflight`` counts requests without an emitted reply; ``out`` holds replies that the socket has
    not taken; ``closing`` is set once a malformed frame has been answered: nothing more is parsed.
    ``choked`` is a shard whose backlog was over the limit when this client last added to it, or -1.
    """

    __slots__ = ("choked", "closing", "inflight", "out", "owner", "rest", "scan", "turns")

    def __init__(self, owner: Any, scan: FrameScan) -> None:
        self.owner = owner
        self.turns: deque[Turn] = deque()
        self.out = bytearray()
        self.inflight = 0
        self.closing = False
        self.choked = -1
        self.rest = bytearray()  # a frame of which the end has not arrived
        self.scan = scan


class Turn:
    """Requests of one client, in order, and the replies that have come so far.

    ``order`` has ``2 * shard + is_write`` for each request; shard number ``shards`` is the router itself.
    ``groups[shard]`` are that shard's replies back to back, None while they are awaited.
    """

    __slots__ = ("client", "groups", "order", "position", "read")

    def __init__(self, client: Client | None, order: list[int]) -> None:
        self.client = client  # None once the client is gone
        self.order = order
        self.position = 0  # replies emitted
        self.groups: dict[int, bytes | bytearray] = {}
        self.read: dict[int, int] = {}  # bytes emitted of each group

    def emit(self, out: bytearray) -> bool:
        """Append the replies that are next in order to ``out``; return whether that was all of them."""
        order, groups = self.order, self.groups
        count = len(order)
        if count == 1:
            if not groups:
                return False
            out += groups[order[0] >> 1]
            self.position = 1
            return True
        position, read = self.position, self.read
        while position < count:
            shard = order[position] >> 1
            group = groups.get(shard)
            if group is None:
                self.position = position
                return False
            start = read.get(shard, 0)
            (length,) = U32.unpack_from(group, start)
            end = start + 4 + length
            out += group[start:end]
            read[shard] = end
            position += 1
        self.position = position
        for shard, group in groups.items():
            if read.get(shard, 0) != len(group):
                raise RuntimeError(f"shard {shard} sent {len(group)} bytes of replies for {self.order}")
        return True


class Question:
    """A request of the router's own to one shard; ``token`` tells the router what to do with the answer."""

    __slots__ = ("token",)

    def __init__(self, token: Any) -> None:
        self.token = token


class Link:
    """The switch's side of the stream to one shard."""

    __slots__ = ("down", "out", "pending", "queued", "rest", "sent", "ticket")

    def __init__(self) -> None:
        self.down: bytes | None = b""  # the reply for this shard's keys while it is down; None: it is up
        self.out = bytearray()
        self.queued = 0  # bytes ever put into ``out`` since the link came up
        self.sent = 0  # bytes of those that the socket has taken
        self.ticket = 0
        self.rest = bytearray()  # a reply envelope of which the end has not arrived
        # (receiver, ticket, count, value of ``queued`` after its envelope)
        self.pending: deque[tuple[Turn | Question, int, int, int]] = deque()


class Switch:
    """Splits clients' requests by shard and merges the shards' replies. See the top of the file.

    ``backlog_limit``: bytes waiting for one shard above which clients that add to it are marked choked.
    """

    def __init__(
        self,
        slots: SlotMap,
        *,
        max_tokens: int = MAX_TOKENS,
        max_request: int = MAX_REQUEST,
        backlog_limit: int = 1 << 20,
    ) -> None:
        self.shards = slots.shards
        self._owners = slots.owners
        self._seed = slots.seed
        self._max_tokens = max_tokens
        self._max_request = max_request
        self._backlog_limit = backlog_limit
        self._links = [Link() for _ in range(slots.shards)]

    # -- clients ----------------------------------------------------------------------------------

    def attach(self, owner: Any) -> Client:
        """Return the switch's side of a new client."""
        return Client(owner, FrameScan(self._max_tokens, self._max_request))

    def detach(self, client: Client) -> None:
        """Forget a client that is gone; the replies that are still under way to it will be dropped."""
        for turn in client.turns:
            turn.client = None
        client.turns.clear()
        client.out.clear()
        client.rest.clear()
        client.inflight = 0

    def refuse(self, client: Client, reply: bytes) -> None:
        """Answer a client by ``reply``, whatever it sends, and take nothing more from it."""
        client.out += reply
        client.closing = True

    def receive(self, client: Client, fd: int) -> tuple[int, list[tuple[Turn, Command]]]:
        """Read once from the client's socket and :meth:`feed` it; return (bytes read, questions).

        0 bytes is the end of the stream. Raises BlockingIOError if nothing is there, or another OSError.
        """
        data = os.read(fd, RECEIVE)
        return len(data), self.feed(client, data) if data else []

    def feed(self, client: Client, data: bytes) -> list[tuple[Turn, Command]]:
        """Take bytes that the client sent: hand its whole requests to the shards that own their keys.

        Returns the requests that the router has to answer itself, by :meth:`answer`; their place in the
        order of replies is kept. Errors are answered in their place too; a malformed frame is the last
        thing that is answered and sets ``client.closing``. Cost: O(bytes), one loop turn for each request.
        """
        if client.closing:
            return []
        scan, rest = client.scan, client.rest
        if rest:
            rest += data
            if len(rest) < scan.need:
                return []
            try:
                if scan.advance(rest, 0, len(rest)) is None:
                    return []
            except ProtocolError:
                pass  # met again, and answered, below
            data = bytes(rest)
            rest.clear()
        questions: list[tuple[Turn, Command]] = []
        order: list[int] = []
        frames: dict[int, list[bytes]] = {}
        local: list[bytes] = []
        links, owners, seed, router = self._links, self._owners, self._seed, 2 * self.shards
        position, size = 0, len(data)
        while position < size:
            try:
                length = scan.advance(data, position, size)
            except ProtocolError as error:
                order.append(router)
                local.append(encode_error(str(error)))
                client.closing = True
                break
            if length is None:
                rest += data[position:]
                break
            start = position
            position += length
            count = U32.unpack_from(data, start)[0]
            name_length = U32.unpack_from(data, start + 4)[0] if count else 0
            key_at = start + 8 + name_length
            command = lookup(data[start + 8 : key_at])
            if command is None:
                order.append(router)
                local.append(_UNKNOWN_COMMAND)
            elif not command.min_tokens <= count <= command.max_tokens:
                order.append(router)
                local.append(_WRONG_ARITY)
            elif command.spread is Spread.KEY:
                key = data[key_at + 4 : key_at + 4 + U32.unpack_from(data, key_at)[0]]
                shard = owners[xxh64_intdigest(tag(key) if b"{" in key else key, seed) % SLOTS]
                down = links[shard].down
                if down is not None:
                    order.append(router)
                    local.append(down)
                    continue
                order.append(2 * shard + command.write)
                frame = data[start:position]
                if shard in frames:
                    frames[shard].append(frame)
                else:
                    frames[shard] = [frame]
            else:
                self._dispatch(client, order, frames, local)
                order, frames, local = [], {}, []
                turn = Turn(client, [router])
                client.turns.append(turn)
                client.inflight += 1
                questions.append((turn, command))
        self._dispatch(client, order, frames, local)
        return questions

    def _dispatch(
        self, client: Client, order: list[int], frames: dict[int, list[bytes]], local: list[bytes]
    ) -> None:
        """Make a turn of these requests: one envelope for each shard that it concerns."""
        if not order:
            return
        turn = Turn(client, order)
        client.turns.append(turn)
        client.inflight += len(order)
        for shard, parts in frames.items():
            self._send(shard, turn, parts)
            if len(self._links[shard].out) > self._backlog_limit:
                client.choked = shard
        if local:
            turn.groups[self.shards] = b"".join(local)
            self._emit(client)

    def answer(self, turn: Turn, reply: bytes) -> Client | None:
        """Give the reply to a request that :meth:`feed` returned; return the client if it has output now."""
        turn.groups[self.shards] = reply
        if turn.client is not None:
            self._emit(turn.client)
            if turn.client.out:
                return turn.client
        return None

    def _emit(self, client: Client) -> None:
        """Move every reply whose turn has come to ``client.out``."""
        turns = client.turns
        while turns:
            turn = turns[0]
            before = turn.position
            whole = turn.emit(client.out)
            client.inflight -= turn.position - before
            if not whole:
                return
            turns.popleft()

    def flush(self, client: Client, fd: int) -> int:
        """Write what the socket takes of the client's replies; return the bytes that are left.

        Raises OSError when the client is gone.
        """
        return _write(fd, client.out)[1]

    # -- shards -----------------------------------------------------------------------------------

    def raise_link(self, shard: int) -> None:
        """The stream to ``shard`` is there, new and empty: its keys are served from now on."""
        self._links[shard] = link = Link()
        link.down = None

    def drop_link(self, shard: int, reply: bytes) -> tuple[list[Client], list[Any]]:
        """The stream to ``shard`` is gone: answer its keys by ``reply`` until :meth:`raise_link`.

        What was under way is answered now. A write of which every byte was handed to the socket may have
        been applied: UNKNOWN. Everything else surely was not, or changes nothing: RETRY. Returns the
        clients that have output, and the tokens of the questions that will not be answered.
        """
        link = self._links[shard]
        self._links[shard] = Link()
        self._links[shard].down = reply
        lost = []
        touched: dict[Client, None] = {}
        for receiver, _ticket, _count, end in link.pending:
            if isinstance(receiver, Question):
                lost.append(receiver.token)
                continue
            write = _UNKNOWN_OUTCOME if end <= link.sent else _RETRY
            receiver.groups[shard] = b"".join(
                write if entry & 1 else _RETRY for entry in receiver.order if entry >> 1 == shard
            )
            if receiver.client is not None:
                touched[receiver.client] = None
        for client in touched:
            self._emit(client)
        return [client for client in touched if client.out], lost

    def is_up(self, shard: int) -> bool:
        """Whether there is a stream to ``shard``."""
        return self._links[shard].down is None

    def set_down_reply(self, shard: int, reply: bytes) -> None:
        """Change what the keys of a shard that is down are answered."""
        if self._links[shard].down is not None:
            self._links[shard].down = reply

    def backlog(self, shard: int) -> int:
        """Return the bytes that wait for ``shard``."""
        return len(self._links[shard].out)

    def ask(self, shard: int, frame: bytes, token: Any) -> None:
        """Send ``shard`` a request of the router's own; :meth:`merge` returns ``token`` with the reply."""
        self._send(shard, Question(token), [frame])

    def _send(self, shard: int, receiver: Turn | Question, frames: list[bytes]) -> None:
        link = self._links[shard]
        body = b"".join(frames)
        link.out += REQUEST.pack(REQUEST.size - LENGTH + len(body), link.ticket, len(frames), DIALECT_IMDS)
        link.out += body
        link.queued += REQUEST.size + len(body)
        link.pending.append((receiver, link.ticket, len(frames), link.queued))
        link.ticket = (link.ticket + 1) % TICKETS

    def flush_link(self, shard: int, fd: int) -> int:
        """Write what the shard's socket takes; return the bytes that are left. Raises OSError."""
        link = self._links[shard]
        sent, left = _write(fd, link.out)
        link.sent += sent
        return left

    def receive_link(self, shard: int, fd: int) -> tuple[int, list[Client], list[tuple[Any, bytes]]]:
        """Read once from the shard's socket and :meth:`merge` it; return (bytes read, ...).

        0 bytes is the end of the stream. Raises BlockingIOError if nothing is there, or another OSError.
        """
        data = os.read(fd, RECEIVE_LINK)
        return len(data), *self.merge(shard, data)

    def merge(self, shard: int, data: bytes) -> tuple[list[Client], list[tuple[Any, bytes]]]:
        """Take reply bytes of ``shard`` and put them into their places.

        Returns the clients that have output now, and (token, reply) for each question answered. Raises
        LinkError where the bytes are no answer to what the shard was asked. Cost: O(bytes).
        """
        link = self._links[shard]
        if link.rest:
            link.rest += data
            if len(link.rest) < REPLY.size or len(link.rest) < LENGTH + U32.unpack_from(link.rest)[0]:
                return [], []
            data = bytes(link.rest)
            link.rest.clear()
        touched: dict[Client, None] = {}
        answers = []
        position, size = 0, len(data)
        while size - position >= REPLY.size:
            length, ticket, count = REPLY.unpack_from(data, position)
            end = position + LENGTH + length
            if end > size:
                break
            if not link.pending or link.pending[0][1:3] != (ticket, count):
                expected = link.pending[0][1:3] if link.pending else "nothing"
                raise LinkError(f"shard {shard} answered {(ticket, count)}, expected {expected}")
            receiver = link.pending.popleft()[0]
            group = data[position + REPLY.size : end]
            position = end
            if isinstance(receiver, Question):
                answers.append((receiver.token, group))
            elif receiver.client is not None:
                receiver.groups[shard] = group
                touched[receiver.client] = None
        if position < size:
            link.rest += data[position:]
        for client in touched:
            self._emit(client)
        return [client for client in touched if client.out], answers

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants of every link; O(requests under way)."""
        for shard, link in enumerate(self._links):
            assert link.queued - link.sent == len(link.out), (shard, link.queued, link.sent, len(link.out))
            first = (link.ticket - len(link.pending)) % TICKETS
            last_end = 0
            for index, (receiver, ticket, count, end) in enumerate(link.pending):
                assert ticket == (first + index) % TICKETS, (shard, index, ticket, first)
                assert last_end < end <= link.queued, (shard, index, last_end, end, link.queued)
                last_end = end
                if isinstance(receiver, Turn):
                    assert shard not in receiver.groups, (shard, index)
                    assert count == sum(entry >> 1 == shard for entry in receiver.order), (shard, index)


def _write(fd: int, out: bytearray) -> tuple[int, int]:
    """Write once from the front of ``out``; return (bytes taken, bytes left)."""
    if not out:
        return 0, 0
    try:
        sent = os.write(fd, out)
    except BlockingIOError:
        return 0, len(out)
    del out[:sent]
    return sent, len(out)
