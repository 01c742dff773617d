"""What a switch has to do, said a second time and simply: one list of replies for each client.

The model reads the clients' bytes with a parser of its own, knows every byte that a shard must be sent, and
answers as the shards do. It is not clever: everything ever sent is kept, and searched again.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import psutil
from xxhash import xxh64_intdigest

from imds.commands import COMMANDS, UNKNOWN_COMMAND, WRONG_ARITY, Command, Spread
from imds.envelope import envelopes
from imds.hashslots import SlotMap
from imds.protocol import split_request
from imds.router.switch import NOTICE

SEED = 0x5EED_0F_C0FFEE


def response(status: int, payload: bytes) -> bytes:
    """Return a response frame."""
    return struct.pack(">II", 4 + len(payload), status) + payload


def error(text: str) -> bytes:
    """Return an error's response frame."""
    return response(2, text.encode())


def request(*tokens: bytes) -> bytes:
    """Return a request frame."""
    return struct.pack(">I", len(tokens)) + b"".join(struct.pack(">I", len(one)) + one for one in tokens)


DOWN = error("SHARDDOWN shard cannot be reached: a test")
UNKNOWN_OUTCOME = error("UNKNOWN the shard died: the write may or may not have been applied")
RETRY = error("RETRY the shard died: the request was not applied")


def shard_reply(shard: int, frame: bytes) -> bytes:
    """Return what the model's shards answer: no two frames and no two shards are answered alike."""
    return response(len(frame) % 4, b"%d says " % shard + frame)


def shard_replies(shard: int, data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (requests, reply envelope, end) for each whole envelope in ``data``, which a shard answers."""
    for ticket, count, dialect, start, end in envelopes(data):
        assert dialect == 0
        assert count > 0
        parts = []
        while start < end:
            _, stop = split_request(data, start)
            parts.append(shard_reply(shard, data[start:stop]))
            start = stop
        assert len(parts) == count
        body = b"".join(parts)
        yield count, struct.pack(">III", 8 + len(body), ticket, count) + body, end


def slot_map(shards: int) -> SlotMap:
    return SlotMap.even(shards, SEED)


@dataclass(eq=False, repr=False)
class Slot:
    """One request's place in its client's replies; ``shard`` is -1 where the router answers."""

    frame: bytes
    command: str | None = None
    shard: int = -1
    write: bool = False
    reply: bytes | None = None


@dataclass(eq=False, repr=False)
class Envelope:
    """What one client's turn had for one shard, or a question (with no slots)."""

    ticket: int
    frames: list[bytes]
    slots: list[Slot]
    client: ModelClient | None
    end: int  # bytes of the link up to its end
    token: Any = None

    def reply(self, shard: int) -> bytes:
        """Return the envelope that answers this one."""
        body = b"".join(shard_reply(shard, frame) for frame in self.frames)
        return struct.pack(">III", 8 + len(body), self.ticket, len(self.frames)) + body


@dataclass(eq=False, repr=False)
class ModelClient:
    """One client: what it sent and every reply that it must get, in order."""

    rest: bytes = b""
    slots: list[Slot] = field(default_factory=list)
    closing: bool = False
    captive: bool = False
    paused: bool = False
    gone: bool = False
    choked: int = -1

    def replies(self) -> bytes:
        """Return all replies up to the first that is missing."""
        found = []
        for slot in self.slots:
            if slot.reply is None:
                break
            found.append(slot.reply)
        return b"".join(found)

    def inflight(self) -> int:
        """Return how many requests stand at or behind the first missing reply."""
        for index, slot in enumerate(self.slots):
            if slot.reply is None:
                return len(self.slots) - index
        return 0


@dataclass(eq=False, repr=False)
class ModelLink:
    """One shard's stream: ``stream`` is all that the switch must have sent or hold."""

    down: bytes | None = b""
    stream: bytes = b""
    sent: int = 0
    ticket: int = 0
    pending: deque[Envelope] = field(default_factory=deque)
    notices: int = 0
    arrived: bytes = b""  # reply bytes handed to merge that are no whole envelope yet


class Model:
    """The switch as it should be. Its methods mirror the switch's and return what those must return."""

    def __init__(self, slots: SlotMap, *, max_tokens: int, max_request: int, backlog_limit: int) -> None:
        self.slots = slots
        self.max_tokens = max_tokens
        self.max_request = max_request
        self.backlog_limit = backlog_limit
        self.links = [ModelLink() for _ in range(slots.shards)]

    # -- clients

    def requests(self, client: ModelClient) -> Iterator[list[bytes] | str]:
        """Yield the tokens of each whole request, or the text of the error that ends the stream."""
        while not client.closing:
            data, pos, tokens = client.rest, 4, []
            if len(data) < 4:
                return
            count = int.from_bytes(data[:4], "big")
            if count > self.max_tokens:
                yield f"ERR protocol error: {count} tokens announced, the limit is {self.max_tokens}"
                return
            for _ in range(count):
                if len(data) < pos + 4:
                    return
                length = int.from_bytes(data[pos : pos + 4], "big")
                tokens.append(data[pos + 4 : pos + 4 + length])
                pos += 4 + length
                if pos > self.max_request:
                    yield (
                        f"ERR protocol error: request of {pos} bytes or more announced, "
                        f"the limit is {self.max_request}"
                    )
                    return
            if len(data) < pos:
                return
            client.rest = data[pos:]
            yield tokens

    def shard_of(self, key: bytes) -> int:
        """Return a key's shard, by the rule of hash slots, written out again."""
        left = key.find(b"{")
        if left >= 0 and key.find(b"}", left) > left + 1:
            key = key[left + 1 : key.index(b"}", left)]
        return self.slots.owners[xxh64_intdigest(key, self.slots.seed) % 16384]

    def feed(self, client: ModelClient, data: bytes) -> list[Slot]:
        """Take a client's bytes; return the first question, if there is one."""
        if client.closing:
            return []
        client.rest += data
        if client.paused:
            return []
        questions: list[Slot] = []
        turn: dict[int, list[Slot]] = {}
        for tokens in self.requests(client):
            if isinstance(tokens, str):
                client.slots.append(Slot(b"", reply=error(tokens)))
                client.closing = True
                client.rest = b""
                break
            slot = Slot(request(*tokens), tokens[0].decode("ascii", "replace").lower() if tokens else "")
            client.slots.append(slot)
            command = COMMANDS.get(slot.command or "")
            if command is None:
                slot.command = None
            if client.captive or (command and self.is_for_router(command, len(tokens))):
                questions.append(slot)
                client.paused = True
                break
            if command is None:
                slot.reply = error(UNKNOWN_COMMAND)
            elif not command.arity_ok(len(tokens)):
                slot.reply = error(WRONG_ARITY)
            else:
                slot.shard, slot.write = self.shard_of(tokens[command.first_key]), command.write
                slot.reply = self.links[slot.shard].down
                if slot.reply is None:
                    turn.setdefault(slot.shard, []).append(slot)
        self._send(client, turn)
        return questions

    @staticmethod
    def is_for_router(command: Command, count: int) -> bool:
        """Whether a right request of ``count`` tokens is a question: all but those of a single key."""
        if not command.arity_ok(count):
            return False
        if command.spread is Spread.KEYS:
            return count != command.min_tokens
        return command.spread is not Spread.KEY

    def _send(self, client: ModelClient, turn: dict[int, list[Slot]]) -> None:
        for shard, slots in turn.items():
            self._seal(shard, [slot.frame for slot in slots], slots, client)
            if self.backlog(shard) > self.backlog_limit:
                client.choked = shard

    def _seal(
        self,
        shard: int,
        frames: list[bytes],
        slots: list[Slot],
        client: ModelClient | None,
        token: Any = None,
    ) -> None:
        link = self.links[shard]
        body = b"".join(frames)
        link.stream += struct.pack(">IIII", 12 + len(body), link.ticket, len(frames), 0) + body
        link.pending.append(Envelope(link.ticket, frames, slots, client, len(link.stream), token))
        link.ticket += 1

    def refuse(self, client: ModelClient, reply: bytes) -> None:
        client.slots.append(Slot(b"", reply=reply))
        client.closing = True
        client.rest = b""

    # -- shards

    def ask(self, shard: int, frame: bytes, token: Any) -> None:
        self._seal(shard, [frame], [], None, token)

    def backlog(self, shard: int) -> int:
        return len(self.links[shard].stream) - self.links[shard].sent

    def merge(self, shard: int, data: bytes) -> tuple[set[ModelClient], list[tuple[Any, bytes]]]:
        """Take right reply bytes; return the clients that got a reply and the answers to questions."""
        link = self.links[shard]
        link.arrived += data
        touched, answers = set(), []
        while True:
            notice = self.notice(link.notices)
            if link.arrived.startswith(notice):
                answers.append((NOTICE, notice[12:]))
                link.arrived = link.arrived[len(notice) :]
                link.notices += 1
                continue
            if not link.pending or not link.arrived.startswith(reply := link.pending[0].reply(shard)):
                break
            envelope = link.pending.popleft()
            link.arrived = link.arrived[len(reply) :]
            if envelope.client is None:
                answers.append((envelope.token, reply[12:]))
                continue
            for slot in envelope.slots:
                slot.reply = shard_reply(shard, slot.frame)
            if not envelope.client.gone:
                touched.add(envelope.client)
        return touched, answers

    @staticmethod
    def notice(number: int) -> bytes:
        """Return the notice of that number: no two are alike."""
        body = request(b"notice", b"x" * (number % 40), b"%d" % number)
        return struct.pack(">III", 8 + len(body), number, 0) + body

    def drop_link(self, shard: int, reply: bytes) -> tuple[set[ModelClient], list[tuple[Any, bool]]]:
        """Answer what is under way; return the clients that got a reply and the lost questions."""
        link = self.links[shard]
        self.links[shard] = ModelLink(down=reply)
        touched, lost = set(), []
        for envelope in link.pending:
            if envelope.client is None:
                lost.append((envelope.token, envelope.end <= link.sent))
                continue
            for slot in envelope.slots:
                slot.reply = UNKNOWN_OUTCOME if slot.write and envelope.end <= link.sent else RETRY
            if not envelope.client.gone:
                touched.add(envelope.client)
        return touched, lost

    def raise_link(self, shard: int) -> None:
        self.links[shard] = ModelLink(down=None)


FAULTS = ["notice", "ticket", "count", "fewer", "more", "extra", "short", "cut", "length", "reply"]


def false_envelope(fault: str, shard: int, expected: Envelope | None) -> bytes:
    """Return what a shard must not send where it should answer ``expected`` (None: nothing)."""
    if expected is None:
        return struct.pack(">III", 8, 0, 0)
    replies = [shard_reply(shard, frame) for frame in expected.frames]
    ticket, count, body = expected.ticket, len(replies), b"".join(replies)
    match fault:
        case "notice":
            ticket, count = 1 << 31, 0
        case "ticket":
            ticket ^= 0x80000000
        case "count":
            count += 1 << 31
        case "fewer":
            count, body = count - 1, b"".join(replies[:-1])
        case "more":
            count, body = count + 1, body + response(0, b"")
        case "extra":
            body += response(0, b"")
        case "short":
            body = b"".join(replies[:-1])
        case "cut":
            body = body[:-1]
        case "length":
            return struct.pack(">III", 7, ticket, count) + body
        case "reply":
            body = b"".join(replies[:-1]) + struct.pack(">I", 0xFFFFFFFF)
    return struct.pack(">III", 8 + len(body), ticket, count) + body


class Wire:
    """A non-blocking pair of connected sockets: the switch has ``fd``, the test the other end.

    The switch's end has the smallest send buffer that the system allows, so that it often sends in part.
    """

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.setblocking(False)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.fd = self.near.fileno()

    def give(self, data: bytes) -> None:
        """Send ``data``, which fits, from the far end."""
        assert self.far.send(data) == len(data)

    def take(self, size: int = 1 << 20) -> bytes:
        """Return what has arrived at the far end, ``size`` bytes at most."""
        try:
            return self.far.recv(size)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Mallinfo2(ctypes.Structure):
    # glibc's struct mallinfo2
    _names: ClassVar = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


def in_c_memory() -> int:
    """Return the bytes that malloc has given out, or what comes nearest to it."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return psutil.Process().memory_info().rss
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd  # type: ignore[no-any-return]
