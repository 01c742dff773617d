"""A whole server in one process, without sockets: the switch and its requests, and shards that are dicts.

The shards answer through what a worker has for routers (watches, transactions, waiting), in batches. Nothing
moves by itself: ``Fleet.serve`` lets shards act, ``kill`` and ``revive`` end and begin them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from switch_model import SEED

from imds.commands import WRONG_TYPE
from imds.config import Config
from imds.envelope import REPLY, envelopes, notice
from imds.hashslots import SlotMap
from imds.protocol import (
    LIST,
    MISSING,
    OK,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
    split_request,
)
from imds.router.gather import ShardStatus
from imds.router.kernel import NOTICE
from imds.router.requests import Requests
from imds.router.session import Session
from imds.shard.record import RecordEncoder
from imds.shard.transactions import Transactions
from imds.shard.waiting import Waiting
from imds.shard.watches import Watches

DONE = encode_response(OK, b"OK")
NONE = encode_response(MISSING)
WRITES = (b"set", b"del", b"zadd", b"zpopmin", b"zpopmax")
WRONG = encode_error(WRONG_TYPE)


class Shard:
    """One shard's data, and what it has for routers. Data outlive the process, as by a log."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes | dict[bytes, float]] = {}
        self.configured: list[bytes] = []
        self.start()

    def start(self) -> None:
        """Begin a process with these data."""
        self.log = RecordEncoder(1)
        self.watches = Watches(self.log.pending)
        self.waiting = Waiting(self.run)
        transactions = Transactions(lambda: self, self.watches)
        self.hooks = {
            b"_watch": transactions.on_watch,
            b"_unwatch": transactions.on_unwatch,
            b"_exec": transactions.on_exec,
            b"_block": self.waiting.on_block,
            b"_cancel": self.waiting.on_cancel,
            b"_configure": self.on_configure,
        }
        self.notices = 0

    def on_configure(self, arguments: list[bytes]) -> bytes:
        self.configured += arguments
        return DONE

    def serve(self, data: bytes) -> bytes:
        """Run the envelopes in ``data`` as one batch; return what goes back."""
        out = b""
        for ticket, count, _dialect, start, end in envelopes(data):
            replies = b""
            while start < end:
                _, stop = split_request(data, start)
                replies += self.run(data[start:stop])
                start = stop
            out += REPLY.pack(8 + len(replies), ticket, count) + replies
        self.waiting.serve(self.log.pending())
        self.watches.end_batch(self.log.pending())
        self.log.commit()
        for router, frame in self.waiting.end_batch():
            assert router == b"0"
            out += notice(self.notices, frame)
            self.notices += 1
        self.waiting.check()
        self.watches.check()
        return out

    def run(self, frame: bytes) -> bytes:
        name, *words = split_request(frame)[0]
        if name in self.hooks:
            return self.hooks[name](words)
        name = name.lower()
        if name == b"stats":
            return encode_response(OK, b'{"state": "up", "keys": %d}' % len(self.data))
        reply = self.answer(name, words)
        if name in WRITES and reply[4:8] != b"\0\0\0\2" and reply != NONE:
            self.log.add(frame)
        return reply

    @staticmethod
    def together(act: Callable[[], bytes]) -> bytes:
        return act()

    def answer(self, name: bytes, words: list[bytes]) -> bytes:
        data, key = self.data, words[0] if words else b""
        value = data.get(key)
        match name:
            case b"get":
                if isinstance(value, dict):
                    return WRONG
                return NONE if value is None else encode_response(OK, value)
            case b"set":
                data[key] = words[1]
                return DONE
            case b"del":
                gone = [data.pop(word) for word in words if word in data]
                if len(words) > 1:
                    return encode_response(OK, b"%d" % len(gone))
                return DONE if gone else NONE
            case b"exists":
                return encode_response(OK, b"%d" % sum(word in data for word in words))
            case b"mget":
                found = (data.get(word) for word in words)
                return encode_response(LIST, encode_list(x if isinstance(x, bytes) else None for x in found))
            case b"zadd":
                score, member = words[-2:]
                if isinstance(value, bytes):
                    return WRONG
                members = data.setdefault(key, {})
                assert isinstance(members, dict)
                members[member] = float(score)
                return DONE
            case b"zpopmin" | b"zpopmax":
                if isinstance(value, bytes):
                    return WRONG
                if value is None:
                    return encode_response(LIST, encode_list([]))
                pick = min if name == b"zpopmin" else max
                score, member = pick((score, member) for member, score in value.items())
                del value[member]
                if not value:
                    del data[key]
                return encode_response(LIST, encode_list([member, b"%a" % score]))
            case b"scan":
                keys = sorted(data)
                at = int(key)
                following = b"%d" % (at + 2) if at + 2 < len(keys) else b"0"
                return encode_response(LIST, encode_list([following, *keys[at : at + 2]]))
            case b"randomkey":
                return encode_response(OK, next(iter(data))) if data else NONE
        raise AssertionError(f"the tests' shards do not know {name!r}")


class Connection:
    """One client."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.session = Session(number)
        self.sock, self.far = socket.socketpair()
        self.far.setblocking(False)
        self.fd = self.sock.fileno()
        self.client = fleet.switch.attach(self, self.fd)
        self.inbox = b""
        self.dropped = False

    def send(self, *requests: list[bytes] | str) -> None:
        """Send requests, each a list of tokens or words; the shards do nothing yet."""
        words = [one.encode().split() if isinstance(one, str) else one for one in requests]
        self.feed(b"".join(encode_request(tokens) for tokens in words))

    def feed(self, data: bytes) -> None:
        for question in self.fleet.switch.feed(self.client, data):
            self.fleet.requests.take(*question)

    def replies(self) -> list[Any]:
        """Return what has been answered since the last time: bytes, None, lists; an error's text as str."""
        left = 1
        while left:
            left = self.fleet.switch.flush(self.client, self.fd)
            while True:
                try:
                    piece = self.far.recv(1 << 16)
                except BlockingIOError:
                    break
                self.inbox += piece
        found: list[Any] = []
        while (decoded := decode_response(self.inbox)) is not None:
            status, payload, end = decoded
            self.inbox = self.inbox[end:]
            if status == LIST:
                found.append(decode_list(payload))
            else:
                found.append((payload, None, payload.decode(errors="replace"))[status])
        return found

    def ask(self, *requests: list[bytes] | str) -> list[Any]:
        """Send requests, let the shards act, return the replies."""
        self.send(*requests)
        self.fleet.serve()
        return self.replies()

    def end(self) -> None:
        """The client sends nothing more."""
        self.fleet.requests.on_end(self.client)

    def leave(self) -> None:
        """The client is gone."""
        self.fleet.drop(self)


class Fleet:
    """A router (number 0) and its shards. It is the host of its requests."""

    def __init__(self, switch_class: Any, shards: int = 3, **limits: int) -> None:
        self.slots = SlotMap.even(shards, SEED)
        self.switch = switch_class(self.slots, **limits)
        self.config = Config(shards=shards)
        self.connections: set[Any] = set()
        self.touched: list[Any] = []
        self.told: list[tuple[str, Any]] = []
        self.channel: Any = self
        self.statuses = [ShardStatus("a test") for _ in range(shards)]
        self.requests = Requests(
            *(self.switch, self.slots, self.statuses, self), number=0, backlog_limit=1 << 20
        )
        self.shards = [Shard() for _ in range(shards)]
        self.accepted = 0
        for number in range(shards):
            self.switch.drop_link(number, self.requests.down_reply(number))
            self.revive(number)

    # the host's side

    def touch(self, client: Any) -> None:
        self.touched.append(client)

    def drop(self, connection: Connection) -> None:
        self.switch.detach(connection.client)
        self.connections.discard(connection)
        connection.dropped = True
        self.requests.leave(connection.client)
        connection.sock.close()
        connection.far.close()

    def configure(self, field: str, value: Any) -> None:
        self.told.append((field, value))

    def send(self, kind: str, **fields: Any) -> bool:
        """The control channel's."""
        self.told.append((kind, fields))
        return True

    # the test's

    def connect(self) -> Connection:
        self.accepted += 1
        connection = Connection(self, self.accepted)
        self.connections.add(connection)
        return connection

    def key(self, shard: int, number: int = 0) -> bytes:
        """Return a key of a shard."""
        keys = (b"k%d" % each for each in range(10_000))
        return [next(key for key in keys if self.slots.shard_of(key) == shard) for _ in range(number + 1)][-1]

    def sent(self, shard: int) -> bytes:
        """Return what the switch has for a shard: all of it."""
        data = b""
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            far.setblocking(False)
            left = 1
            while left:
                left = self.switch.flush_link(shard, near.fileno())
                try:
                    while piece := far.recv(1 << 16):
                        data += piece
                except BlockingIOError:
                    pass
        return data

    def serve(self, *shards: int) -> None:
        """Let these shards, or all, act until nothing is left to do."""
        busy = True
        while busy:
            busy = False
            for number in shards or range(len(self.shards)):
                if self.switch.is_up(number) and (data := self.sent(number)):
                    busy = True
                    self.merge(number, self.shards[number].serve(data))

    def merge(self, number: int, data: bytes) -> None:
        _clients, answers = self.switch.merge(number, data)
        for token, reply in answers:
            if token is NOTICE:
                assert self.requests.on_notice(number, reply)
            else:
                token(reply)

    def kill(self, number: int, *, sent: bool = False) -> None:
        """End a shard's process; ``sent``: with all that the switch has for it in its socket, unread."""
        if sent:
            self.sent(number)
        _clients, lost = self.switch.drop_link(number, self.requests.down_reply(number))
        for token, was_sent in lost:
            token(None, was_sent)

    def revive(self, number: int) -> None:
        self.shards[number].start()
        self.switch.raise_link(number)
        self.requests.on_raised(number)

    def check(self) -> None:
        self.switch.check()
        for connection in list(self.connections):
            connection.leave()
        self.serve()
        assert not self.requests.blocking
        for shard in self.shards:
            assert not shard.watches
            assert not shard.waiting
