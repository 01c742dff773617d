"""The router's inner loop: client bytes in, shard bytes out, and the replies back in order.

A request's way there and back::

    client --receive/feed--> Turn.replies [None, None, b"error", None]   a place for each request
                       |  one envelope for each shard concerned
                       v
               Link.out --flush_link--> shard --receive_link/merge--> Turn.replies
                                                                         |  as far as none is missing
    client <--flush-- Client.out <---------------------------------------+

A turn is what one read of a client's socket gave: requests in their order, each answered by one shard or by
the router itself. ``Link.pending`` knows for each envelope under way which places its replies will take.

What stays true:

* A client's replies leave in the order of its requests, and no further than to the first that is missing.
* Each envelope has a ticket; a shard's replies must name the tickets in the order in which they went, with
  the same counts, and be exactly as many. Anything else raises LinkError: the link is closed rather than
  a reply misdelivered.
* Nothing behind a request that the router answers is looked at before the router says :meth:`Switch.resume`:
  so it is executed after it, and the router may keep its client waiting. Of a ``captive`` client every
  request is the router's.
* Memory follows the bytes that have arrived, never an announced length.
* The switch knows no policy: it tells how much waits (``Client.inflight``, ``Client.out``, ``backlog``) and
  the router decides who is read.

Long for one file because both directions work on the same turns. No clock, no logging. Sockets appear only as
descriptors in receive and flush, because one call for "read and split" is what the compiled twin,
``_kernel/switch.pyx``, is fast by. The tests in ``tests/router/test_switch.py`` hold both to the same cases.
``turns.py`` makes a turn of the loop of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from struct import error as StructError
from typing import Any

from xxhash import xxh64_intdigest

from imds.commands import COMMANDS, UNKNOWN_COMMAND, WRONG_ARITY, Command, Spread, lookup
from imds.envelope import DIALECT_IMDS, LENGTH, REPLY, REQUEST, TICKETS
from imds.hashslots import SLOTS, SlotMap, tag
from imds.protocol import MAX_REQUEST, MAX_TOKENS, U32, U32U32, FrameScan, ProtocolError, encode_error

RECEIVE = 1 << 16  # bytes that one client may hand in per wake-up: nobody can starve the others by sending
RECEIVE_LINK = 1 << 18  # bytes taken from a shard per wake-up

NOTICE = object()  # the token of what a shard tells unasked

_UNKNOWN_COMMAND = encode_error(UNKNOWN_COMMAND)
_WRONG_ARITY = encode_error(WRONG_ARITY)
UNKNOWN_OUTCOME = encode_error("UNKNOWN the shard died: the write may or may not have been applied")
_NEVER_UP = encode_error("SHARDDOWN the shard has not been reached yet")
RETRY = encode_error("RETRY the shard died: the request was not applied")

_read_u32 = U32.unpack_from
_read_reply = REPLY.unpack_from
_REPLY_HEADER = REPLY.size
_pack_request = REQUEST.pack
_REQUEST_HEADER = REQUEST.size
_REQUEST_REST = REQUEST.size - LENGTH  # as far as the length counts it
_LEAST_NOTICE = 12  # its length: a request frame has four bytes at least
_BRACE = ord("{")  # a byte is found in bytes five times faster than bytes in bytes


class LinkError(Exception):
    """A shard sent what cannot be an answer to what it was asked."""


class Client:
    """One client's side of the switch. ``owner`` is the router's, for its own use.

    ``inflight`` counts requests without an emitted reply; ``out`` holds replies that the socket has
    not taken; ``closing`` is set once a malformed frame has been answered: nothing more is parsed.
    ``choked`` is a shard whose backlog was over the limit when this client last added to it, or -1.
    ``plain`` is the router's word that nothing but its output is to be thought of; see ``flush_all``.
    ``captive``, also the router's word, makes every whole request a question. ``paused`` is set by a question
    until :meth:`Switch.resume`; ``held`` is how many bytes wait for that, or for the end of their frame.

    Of these the compiled twin promises: ``out`` is true while it holds something.
    """

    __slots__ = (
        "captive",
        "choked",
        "closing",
        "fd",
        "inflight",
        "out",
        "owner",
        "paused",
        "plain",
        "rest",
        "scan",
        "turns",
    )

    def __init__(self, owner: Any, fd: int, scan: FrameScan) -> None:
        self.owner = owner
        self.fd = fd
        self.plain = False
        self.turns: deque[Turn] = deque()
        self.out = bytearray()
        self.inflight = 0
        self.closing = False
        self.captive = False
        self.paused = False
        self.choked = -1
        self.rest = bytearray()  # a frame of which the end has not arrived, or all that came while paused
        self.scan = scan  # how far that has been looked at

    @property
    def held(self) -> int:
        return len(self.rest)


class Turn:
    """Requests of one client, in order, and the replies that have come so far."""

    __slots__ = ("client", "emitted", "missing", "replies")

    def __init__(self, client: Client, replies: list[bytes | None], missing: int) -> None:
        self.client: Client | None = client  # None once the client is gone
        self.replies = replies
        self.missing = missing  # how many of them are None
        self.emitted = 0  # how many of them have been moved to the client's output


class Question:
    """A request of the router's own to one shard; ``token`` tells the router what to do with the answer."""

    __slots__ = ("token",)

    def __init__(self, token: Any) -> None:
        self.token = token


# A request for the router: its place in the replies, who asks, its command, its whole frame. The command is
# None where there is none of its name; of a captive client the number of tokens may be wrong, too.
Asked = tuple[Turn, Client, Command | None, bytes]

# Each request's place in its turn, doubled, and 1 more if it is a write.
Places = Sequence[int]
_FIRST, _FIRST_WRITE = (0,), (1,)


class Link:
    """The switch's side of the stream to one shard."""

    __slots__ = (
        "down",
        "due",
        "fd",
        "lost",
        "need",
        "noticed",
        "out",
        "pending",
        "queued",
        "rest",
        "sent",
        "ticket",
        "touched",
    )

    def __init__(self, down: bytes | None, ticket: int, fd: int) -> None:
        self.fd = fd
        self.down = down  # the reply for this shard's keys while it is down; None: it is up
        self.out = bytearray()
        self.queued = 0  # bytes ever put into ``out`` since the link came up
        self.sent = 0  # bytes of those that the socket has taken
        self.ticket = ticket  # of the next envelope
        self.due = ticket  # ticket of the first in ``pending``, which must be answered next
        self.rest = bytearray()  # a reply envelope of which the end has not arrived
        self.need = _REPLY_HEADER  # bytes of ``rest`` below which looking at it is in vain
        self.noticed = 0  # number of the next notice
        # (who asked, places of the replies, value of ``queued`` after the envelope)
        self.pending: deque[tuple[Turn | Question, Places, int]] = deque()
        # What a merge that failed had delivered until then.
        self.touched: dict[Client, None] = {}
        self.lost: list[tuple[Any, bool]] = []

    def send(self, receiver: Turn | Question, frames: bytes, places: Places) -> None:
        """Put an envelope into the output: a request for each place, back to back."""
        out, ticket, size = self.out, self.ticket, len(frames)
        out += _pack_request(_REQUEST_REST + size, ticket, len(places), DIALECT_IMDS)
        out += frames
        self.queued = end = self.queued + _REQUEST_HEADER + size
        self.pending.append((receiver, places, end))
        self.ticket = (ticket + 1) % TICKETS


class Switch:
    """Splits clients' requests by shard and merges the shards' replies. See the top of the file.

    ``backlog_limit``: bytes waiting for one shard above which clients that add to it are marked choked.
    ``first_ticket``: of every stream; the shards only echo tickets.

    ``by_fd`` finds, by their descriptor, the clients and, by its number, a shard's link. ``held``,
    ``held_until`` (of ``time.monotonic()``), ``stuck`` and ``gathers`` belong to the turns: clients with part
    of a turn's replies, whether a link's socket did not take everything when it was last tried, and how
    many rounds have kept requests back since.
    """

    def __init__(
        self,
        slots: SlotMap,
        *,
        max_tokens: int = MAX_TOKENS,
        max_request: int = MAX_REQUEST,
        backlog_limit: int = 1 << 20,
        first_ticket: int = 0,
    ) -> None:
        check_limits(max_tokens, max_request)
        self.shards = slots.shards
        self._owners = slots.owners
        self._seed = slots.seed
        self._max_tokens = max_tokens
        self._max_request = max_request
        self._backlog_limit = backlog_limit
        self._first_ticket = first_ticket
        self._links = [Link(_NEVER_UP, first_ticket, -1) for _ in range(slots.shards)]
        self.by_fd: dict[int, Client | int] = {}
        self.held: list[Client] = []
        self.held_until = 0.0
        self.stuck = False
        self.gathers = 0
        self._heads = _heads(max_tokens)
        # Not fresh bytes for each read: so many are mapped, and unmapped when they are cut to what has come.
        self._inbox = memoryview(bytearray(RECEIVE_LINK))

    # -- clients ----------------------------------------------------------------------------------

    def attach(self, owner: Any, fd: int = -1) -> Client:
        """Return the switch's side of a new client, whose socket is ``fd``."""
        client = Client(owner, fd, FrameScan(self._max_tokens, self._max_request))
        if fd >= 0:
            self.by_fd[fd] = client
        return client

    def detach(self, client: Client) -> None:
        """Forget a client that is gone; the replies that are still under way to it will be dropped."""
        for turn in client.turns:
            turn.client = None
        client.turns.clear()
        client.out.clear()
        client.rest.clear()
        client.inflight = 0
        client.closing = True
        client.plain = False
        self.by_fd.pop(client.fd, None)
        client.fd = -1  # its number may soon be another client's

    def refuse(self, client: Client, reply: bytes) -> None:
        """Answer a client by ``reply``, whatever it sends from now on, and take nothing more from it."""
        check_reply(reply)
        self._dispatch(client, [reply], {})
        client.rest.clear()
        client.closing = True

    def receive(self, client: Client, fd: int) -> tuple[int, list[Asked]]:
        """Read once from the client's socket and :meth:`feed` it; return (bytes read, questions).

        0 bytes is the end of the stream. Raises BlockingIOError if nothing is there, or another OSError.
        """
        data = os.read(fd, RECEIVE)
        return len(data), self.feed(client, data) if data else []

    def receive_all(
        self, clients: list[Client], window: int
    ) -> tuple[list[Client], list[Client], list[Asked]]:
        """:meth:`receive` from each of these clients that is ``plain``, in one call; returns three lists.

        Clients whose stream is at its end, or broken: receiving once more tells. Clients that the router has
        to think about, because they have output, are choked or closing, or have ``window`` or more
        requests in flight. And the questions of all of them.
        """
        ended, changed, questions = [], [], []
        for client in clients:
            if not client.plain:
                continue
            try:
                data = os.read(client.fd, RECEIVE)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                ended.append(client)
                continue
            questions += self.feed(client, data)
            if client.out or client.inflight >= window or client.choked >= 0 or client.closing:
                changed.append(client)
        return ended, changed, questions

    def flush_all(self, clients: list[Client], hold: int = 0) -> tuple[list[Client], list[Client]]:
        """:meth:`flush` each of these clients that is ``plain``, in one call for all; returns two lists.

        The other clients, and those of which the socket did not take everything: for these the router has
        to do it, and to decide what comes next. And the clients that were held back, because what they
        have is under ``hold`` bytes and stops in the midst of a turn: one send for a turn's replies
        is much cheaper than one for each shard's, so the router waits a moment for the rest.
        """
        left, held = [], []
        for client in clients:
            if client.plain and not client.closing:
                size = len(client.out)
                if not size:
                    continue
                if size < hold and client.turns and client.turns[0].emitted:
                    held.append(client)
                    continue
                try:
                    if not _write(client.fd, client.out)[1]:
                        continue
                except OSError:
                    pass  # the router's own try will say so
            left.append(client)
        return left, held

    def feed(self, client: Client, data: bytes) -> list[Asked]:
        """Take bytes that the client sent: hand its whole requests to the shards that own their keys.

        Returns the first request that the router has to answer itself, by :meth:`answer`, if there is one;
        its place in the order of replies is kept, and what follows it waits for :meth:`resume`. Errors are
        answered in their place too; a malformed frame is the last thing that is answered and sets
        ``client.closing``. Cost: O(bytes), one loop turn for each request.
        """
        if client.closing:
            return []
        scan, rest = client.scan, client.rest
        if client.paused:
            rest += data
            return []
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
        elif not client.captive and self._feed_one(client, data):
            return []
        questions: list[Asked] = []
        replies: list[bytes | None] = []
        envelopes: dict[int, tuple[list[bytes], list[int]]] = {}
        links, owners, seed, heads, max_request = (
            self._links,
            self._owners,
            self._seed,
            {} if client.captive else self._heads,
            self._max_request,
        )
        position, size = 0, len(data)
        while position < size:
            start = position
            try:  # the usual: a head that the table knows, and a frame that is whole
                key_at = start + 8 + data[start + 7]
                command, others = heads[data[start:key_at]]
                key_at += 4
                position = key_end = key_at + _read_u32(data, key_at - 4)[0]
                while others:
                    position += 4 + _read_u32(data, position)[0]
                    others -= 1
                usual = position <= size and position - start <= max_request
            except (KeyError, IndexError, StructError):
                usual = False
            if not usual:
                try:
                    length = scan.advance(data, start, size)
                except ProtocolError as error:
                    replies.append(encode_error(str(error)))
                    client.closing = True
                    break
                if length is None:
                    rest += data[start:]
                    break
                position = start + length
                found = _find_command(data, start)
                refusal = _refusal(found, data, start)
                if refusal is not None and not client.captive:
                    replies.append(refusal)
                    continue
                if found is None or client.captive or not _is_forwarded(found, data, start):
                    if replies:
                        self._dispatch(client, replies, envelopes)
                        replies = []
                    turn = self._dispatch(client, [None], {})
                    questions.append((turn, client, found, data[start:position]))
                    client.paused = True
                    rest += data[position:]
                    break
                command = found
                key_at, key_end = _find_key(data, start, command.first_key)
            key = data[key_at:key_end]
            shard = owners[xxh64_intdigest(tag(key) if _BRACE in key else key, seed) % SLOTS]
            down = links[shard].down
            if down is not None:
                replies.append(down)
                continue
            envelope = envelopes.get(shard)
            if envelope is None:
                envelope = envelopes[shard] = ([], [])
            envelope[0].append(data[start:position])
            envelope[1].append(2 * len(replies) + command.write)
            replies.append(None)
        if replies:
            self._dispatch(client, replies, envelopes)
        return questions

    def _feed_one(self, client: Client, data: bytes) -> bool:
        """Hand on what is one whole request of a usual form and nothing else; return whether it is.

        A client that waits for each reply sends no more at a time; lists of one would be most of the work.
        """
        try:
            key_at = 8 + data[7]
            command, others = self._heads[data[:key_at]]
            key_at += 4
            end = key_end = key_at + _read_u32(data, key_at - 4)[0]
            while others:
                end += 4 + _read_u32(data, end)[0]
                others -= 1
        except (KeyError, IndexError, StructError):
            return False
        if end != len(data) or end > self._max_request:
            return False
        key = data[key_at:key_end]
        shard = self._owners[xxh64_intdigest(tag(key) if _BRACE in key else key, self._seed) % SLOTS]
        link = self._links[shard]
        if link.down is not None:
            return False
        turn = Turn(client, [None], 1)
        client.turns.append(turn)
        client.inflight += 1
        link.send(turn, data, _FIRST_WRITE if command.write else _FIRST)
        if len(link.out) > self._backlog_limit:
            client.choked = shard
        return True

    def resume(self, client: Client) -> list[Asked]:
        """Look on behind a question of a client, answered or not, as :meth:`feed` does."""
        client.paused = False
        return self.feed(client, b"")

    def _dispatch(
        self,
        client: Client,
        replies: list[bytes | None],
        envelopes: dict[int, tuple[list[bytes], list[int]]],
    ) -> Turn:
        """Make a turn of these requests: one envelope for each shard that it concerns."""
        missing = replies.count(None)
        turn = Turn(client, replies, missing)
        client.turns.append(turn)
        client.inflight += len(replies)
        for shard, (frames, places) in envelopes.items():
            link = self._links[shard]
            link.send(turn, b"".join(frames), places)
            if len(link.out) > self._backlog_limit:
                client.choked = shard
        if missing < len(replies):
            self._emit(client)
        return turn

    def answer(self, turn: Turn, reply: bytes) -> Client | None:
        """Give the reply to a request that :meth:`feed` returned; return the client if it has output now."""
        check_reply(reply)
        turn.replies[0] = reply
        turn.missing = 0
        client = turn.client
        if client is not None:
            self._emit(client)
            if client.out:
                return client
        return None

    def _emit(self, client: Client) -> None:
        """Move every reply whose turn has come to ``client.out``."""
        turns, out = client.turns, client.out
        while turns:
            turn = turns[0]
            replies, emitted = turn.replies, turn.emitted
            if turn.missing:
                end = replies.index(None, emitted)
                if end > emitted:
                    out += b"".join(replies[emitted:end])  # type: ignore[arg-type]
                    replies[emitted:end] = [b""] * (end - emitted)  # not kept until the turn's last reply
                    turn.emitted = end
                    client.inflight -= end - emitted
                return
            out += b"".join(replies)  # type: ignore[arg-type]
            client.inflight -= len(replies) - emitted
            turns.popleft()

    def flush(self, client: Client, fd: int) -> int:
        """Write what the socket takes of the client's replies; return the bytes that are left.

        Raises OSError when the client is gone.
        """
        return _write(fd, client.out)[1]

    # -- shards -----------------------------------------------------------------------------------

    def raise_link(self, shard: int, fd: int = -1) -> None:
        """The stream to ``shard`` is there, new and empty, at ``fd``: its keys are served from now on.

        Raises ValueError if it was there already: :meth:`drop_link` must answer what is under way first.
        """
        if self._links[shard].down is None:
            raise ValueError(f"the link to shard {shard} is up")
        self._links[shard] = Link(None, self._first_ticket, fd)
        if fd >= 0:
            self.by_fd[fd] = shard

    def drop_link(self, shard: int, reply: bytes) -> tuple[list[Client], list[tuple[Any, bool]]]:
        """The stream to ``shard`` is gone: answer its keys by ``reply`` until :meth:`raise_link`.

        What was under way is answered now. A write of which every byte was handed to the socket may have
        been applied: UNKNOWN. Everything else surely was not, or changes nothing: RETRY. Returns the
        clients that have output, and the questions that will not be answered: each one's token, and whether
        every byte of it was handed to the socket.
        """
        check_reply(reply)
        link = self._links[shard]
        self._links[shard] = Link(reply, self._first_ticket, -1)
        self.by_fd.pop(link.fd, None)
        touched, lost = link.touched, link.lost
        for receiver, places, end in link.pending:
            if isinstance(receiver, Question):
                lost.append((receiver.token, end <= link.sent))
            elif receiver.client is not None:
                write = UNKNOWN_OUTCOME if end <= link.sent else RETRY
                for place in places:
                    receiver.replies[place >> 1] = write if place & 1 else RETRY
                receiver.missing -= len(places)
                touched[receiver.client] = None
        return self._emit_all(touched), lost

    def is_up(self, shard: int) -> bool:
        """Whether there is a stream to ``shard``."""
        return self._links[shard].down is None

    def set_down_reply(self, shard: int, reply: bytes) -> None:
        """Change what the keys of a shard that is down are answered."""
        check_reply(reply)
        if self._links[shard].down is not None:
            self._links[shard].down = reply

    def backlog(self, shard: int) -> int:
        """Return the bytes that wait for ``shard``."""
        return len(self._links[shard].out)

    def ask(self, shard: int, frame: bytes, token: Any) -> None:
        """Send ``shard`` a request of the router's own; :meth:`merge` returns ``token`` with the reply.

        Raises ValueError if the shard is down.
        """
        if self._links[shard].down is not None:
            raise ValueError(f"the link to shard {shard} is down")
        self._links[shard].send(Question(token), frame, _FIRST)

    def unsent(self) -> list[tuple[int, int]]:
        """Return (shard, descriptor) of each link that has bytes to send."""
        return [(shard, link.fd) for shard, link in enumerate(self._links) if link.out]

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
        size = os.readv(fd, [self._inbox])
        return size, *self.merge(shard, bytes(self._inbox[:size]))

    def merge(self, shard: int, data: bytes) -> tuple[list[Client], list[tuple[Any, bytes]]]:
        """Take reply bytes of ``shard`` and put them into their places.

        Returns the clients that have output now, and (token, reply) for each question answered; a notice's
        request frame has the token NOTICE. Raises
        LinkError where the bytes are no answer to what the shard was asked; :meth:`drop_link`, which must
        follow, accounts for what came before them. Cost: O(bytes).
        """
        link = self._links[shard]
        rest, pending, due = link.rest, link.pending, link.due
        if rest:
            rest += data
            if len(rest) < link.need:
                return [], []
            data = bytes(rest)
            rest.clear()
        touched: dict[Client, None] = {}
        answers: list[tuple[Any, bytes]] = []
        position, size = 0, len(data)
        link.need = _REPLY_HEADER
        while size - position >= _REPLY_HEADER:
            length, ticket, count = _read_reply(data, position)
            start = position + _REPLY_HEADER
            end = position + LENGTH + length
            receiver, places, _ = pending[0] if pending else _NOBODY
            replies: list[bytes | None] | None = None
            if not count and ticket == link.noticed and length >= _LEAST_NOTICE:
                if end > size:
                    link.need = end - position
                    break
                answers.append((NOTICE, data[start:end]))
                link.noticed = (ticket + 1) % TICKETS
                position = end
                continue
            if ticket == due and count == len(places) > 0:
                if end > size:
                    link.need = end - position
                    break
                if count == 1 and end - start >= 4 and _read_u32(data, start)[0] == end - start - 4:
                    replies = [data[start:end]]  # most are: a call saved
                else:
                    replies = _split_replies(data, start, end, count)
            if replies is None:
                link.touched = touched
                link.lost = [(token, True) for token, _ in answers if token is not NOTICE]
                raise LinkError(
                    f"shard {shard} answered ticket {ticket} by {count} replies in {length} bytes; "
                    f"expected were ticket {due} and {len(places)} replies"
                )
            position = end
            pending.popleft()
            link.due = due = (due + 1) % TICKETS
            if isinstance(receiver, Question):
                answers.append((receiver.token, data[start:end]))
                continue
            client = receiver.client
            if client is None:
                continue
            if count == len(receiver.replies):
                receiver.replies = replies
                receiver.missing = 0
            else:
                found = receiver.replies
                for place, reply in zip(places, replies, strict=True):
                    found[place >> 1] = reply
                receiver.missing -= count
            touched[client] = None
        if position < size:
            rest += data[position:]
        return self._emit_all(touched), answers

    def _emit_all(self, touched: dict[Client, None]) -> list[Client]:
        """Emit what can be for these clients; return those that have output."""
        for client in touched:
            self._emit(client)
        return [client for client in touched if client.out]

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants of every link and of what is under way; O(requests under way)."""
        clients: set[Client] = set()
        for shard, link in enumerate(self._links):
            state = (shard, link.queued, link.sent, link.ticket, link.due)
            assert link.queued - link.sent == len(link.out), (*state, len(link.out))
            assert (link.ticket - link.due) % TICKETS == len(link.pending), (*state, len(link.pending))
            last_end = 0
            for receiver, places, end in link.pending:
                assert last_end < end <= link.queued, (*state, last_end, end)
                last_end = end
                if isinstance(receiver, Turn) and receiver.client is not None:
                    assert all(receiver.replies[place >> 1] is None for place in places), (*state, places)
                    clients.add(receiver.client)
        for client in clients:
            waiting = 0
            for turn in client.turns:
                assert turn.client is client
                assert turn.missing == turn.replies.count(None), (turn.missing, turn.replies)
                assert turn.emitted < len(turn.replies), (turn.emitted, turn.replies)
                waiting += len(turn.replies) - turn.emitted
            assert client.inflight == waiting, (client.inflight, waiting)
            assert client.turns[0].replies[client.turns[0].emitted] is None, client.turns[0].replies


_NOBODY: tuple[Question, Places, int] = (Question(None), (), 0)


def check_limits(max_tokens: int, max_request: int) -> None:
    """Raise ValueError for limits under which a turn's envelopes might not fit their length field."""
    if not 0 <= max_tokens < 1 << 32 or not 0 <= max_request <= 1 << 31:
        raise ValueError(f"limits of {max_tokens} tokens and {max_request} bytes")


def check_reply(reply: bytes) -> None:
    """Raise ValueError unless ``reply`` is one whole response frame."""
    if len(reply) < 4 or len(reply) != 4 + _read_u32(reply)[0]:
        raise ValueError(f"not a response frame: {reply[:64]!r}")


def _heads(max_tokens: int) -> dict[bytes, tuple[Command, int]]:
    """Return what the usual requests begin with: token count, length of the name, name.

    Each leads to its command and the number of tokens after the key.
    """
    heads = {}
    for command in COMMANDS.values():
        if command.spread is Spread.KEY and command.first_key == 1:
            counts = range(command.min_tokens, min(command.max_tokens, max_tokens, 8) + 1)
        elif command.spread is Spread.KEYS and command.first_key == 1 and command.single() <= max_tokens:
            counts = range(command.single(), command.single() + 1)
        else:
            continue
        for count in counts:
            if command.arity_ok(count):
                for name in (command.name.encode(), command.name.upper().encode()):
                    heads[U32U32.pack(count, len(name)) + name] = (command, count - 2)
    return heads


def _find_command(data: bytes, start: int) -> Command | None:
    """Return the command of the whole frame at ``start``, or None if there is none of its name."""
    if not _read_u32(data, start)[0]:
        return None
    return lookup(data[start + 8 : start + 8 + _read_u32(data, start + 4)[0]])


def _refusal(command: Command | None, data: bytes, start: int) -> bytes | None:
    """Return the error that the whole frame at ``start`` is, or None if it is a request."""
    if command is None:
        return _UNKNOWN_COMMAND
    return None if command.arity_ok(_read_u32(data, start)[0]) else _WRONG_ARITY


def _is_forwarded(command: Command, data: bytes, start: int) -> bool:
    """Return whether the whole frame at ``start`` goes to the shard of its key, as it is."""
    if command.spread is Spread.KEYS:
        return bool(_read_u32(data, start)[0] == command.single())
    return command.spread is Spread.KEY


def _find_key(data: bytes, start: int, first_key: int) -> tuple[int, int]:
    """Return start and end of token number ``first_key`` of the whole frame at ``start``."""
    position = start + 4
    for _ in range(first_key):
        position += 4 + _read_u32(data, position)[0]
    return position + 4, position + 4 + _read_u32(data, position)[0]


def _split_replies(data: bytes, start: int, end: int, count: int) -> list[bytes | None] | None:
    """Return the replies in ``data[start:end]``, or None if that is not exactly ``count`` replies."""
    replies: list[bytes | None] = []
    try:
        for _ in range(count):
            stop = start + 4 + _read_u32(data, start)[0]
            replies.append(data[start:stop])
            start = stop
    except StructError:
        return None
    return replies if start == end else None


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
