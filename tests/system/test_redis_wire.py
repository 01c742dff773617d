"""Requests at random over the wire, to a router with its shards, beside a real redis-server 7.

Each client of the one has its twin at the other. What the store answers by itself is compared in
tests/shard/test_redis.py; here it is what routers make of it: many keys, transactions, waiting, scans.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from beside_redis import ROUNDS, Redis, Reply, Tokens, in_redis, plain, running, same, settled
from requests_at_random import Requests
from serving import Server, receive_replies, request

from imds.commands import COMMANDS, Spread, lookup
from imds.protocol import decode_response

TAGS = [b"{a}", b"{b}", b"{c}", b"{d}"]  # of two shards
QUEUED = (Spread.KEY, Spread.KEYS, Spread.SLOT)

# What is about the connection, or wrong: replies and error texts.
LINES = """
    ping, ping x, ping x y, echo x, echo, select 0, select 99, select x, auth x, auth x y,
    client setname a, client getname, client setname, client nothing, client kill 1:1,
    client kill id x, client list id x, client list nothing, client id x, unwatch, discard, exec,
    config set nothing 1, config get nothing, config nothing, command nothing,
    command getkeys set a b, command getkeys mset a b c d,
    memory usage nothing, memory nothing, memory usage, object nothing k, hello 9, hello x, nothing,
    bzpopmin k, bzpopmin k x, bzpopmin k -1, scan x, scan 0 count x, scan 0 match, flushall x, time x,
    dbsize x, randomkey x, multi x, watch, zunion 0 k, zunion x k, zunion 2 k
"""
PLAIN = [line.split() for line in LINES.encode().split(b",")]


class Twins:
    """A client of each."""

    def __init__(self, server: Server, path: str) -> None:
        self.sock = server.connect()
        self.redis = Redis(path)

    def close(self) -> None:
        self.sock.close()
        self.redis.close()

    def ours(self, tokens: Tokens) -> Reply:
        self.sock.sendall(request(*tokens))
        return plain(receive_replies(self.sock, 1)[0])

    def __call__(self, tokens: Tokens) -> tuple[Reply, Reply]:
        """Ask both, and hold them to the same reply."""
        ours, theirs = self.ours(tokens), self.redis(in_redis(tokens))
        for _ in range(100 if tokens[0].lower() == b"dbsize" else 0):  # keys that are over are counted until
            if same(tokens, ours, theirs):  # each of both has come to remove them
                break
            time.sleep(0.02)
            ours, theirs = self.ours(tokens), self.redis(tokens)
        assert same(tokens, ours, theirs), (tokens, ours, theirs)
        if tokens[0].lower() == b"incrbyfloat" and isinstance(theirs, bytes) and theirs != b"QUEUED":
            self.redis([b"set", tokens[1], ours, b"KEEPTTL"])
        return ours, theirs


class Talk:
    """What clients ask one after the other."""

    def __init__(self, server: Server, path: str, seed: int) -> None:
        self.requests = Requests(seed, int(time.time()), keys=6)
        self.dice = random.Random(seed)
        self.one, self.other = Twins(server, path), Twins(server, path)
        self.done: Counter[str] = Counter()

    def draw(self, tag: bytes | None = None) -> Tokens:
        """Return a request whose keys have tags; one tag where they have to have one slot."""
        tokens = settled(self.requests())
        if self.dice.random() < 0.1:
            tokens = [b"zadd", b"lex", b"0", self.requests.member()]
        command = lookup(tokens[0])
        assert command is not None
        if not command.arity_ok(len(tokens)):
            return tokens
        if command.spread is not Spread.KEYS:
            tag = tag or self.dice.choice(TAGS)
        for position in command.key_positions(tokens):
            tokens[position] = (tag or self.dice.choice(TAGS)) + tokens[position]
        return tokens

    def step(self) -> None:
        kind = self.dice.choices(["plain", "transaction", "wait", "scan", "data"], [4, 4, 0.5, 1, 60])[0]
        self.done[kind] += 1
        getattr(self, kind)()

    def data(self) -> None:
        tokens = self.draw()
        ours, _theirs = self.one(tokens)
        self.done[tokens[0].decode().lower()] += not isinstance(ours, Exception)

    def plain(self) -> None:
        self.one(self.dice.choice(PLAIN))

    def transaction(self) -> None:
        tag = self.dice.choice(TAGS)
        watched = self.dice.random() < 0.5
        if watched:
            self.one([b"watch", tag + b"key0", tag + b"key5"])
            if self.dice.random() < 0.3:
                self.other(self.draw(tag))
        self.one([b"multi"])
        queued = []
        for _ in range(self.dice.randrange(5)):
            tokens = self.draw(tag)
            command = lookup(tokens[0])
            if command is None or not command.arity_ok(len(tokens)):
                continue  # what Redis finds only when it runs it
            if command.spread in QUEUED:
                queued.append(tokens)
                self.one(tokens)
        if self.dice.random() < 0.1:
            self.one([b"discard"])
            return
        ours, theirs = self.one([b"exec"])
        if theirs is None and ours is not None:
            theirs = [self.one.redis(in_redis(tokens)) for tokens in queued]
        if isinstance(theirs, list):
            for tokens, mine, other in zip(queued, ours, theirs, strict=True):
                self.result(tokens, mine, other)

    def result(self, tokens: Tokens, mine: bytes, other: Reply) -> None:
        """Compare an element of exec's reply: ours is a whole reply without its length."""
        decoded = decode_response(len(mine).to_bytes(4) + mine)
        assert decoded is not None
        reply = plain(decoded[:2])
        assert same(tokens, reply, other), (tokens, reply, other)
        if tokens[0].lower() == b"incrbyfloat" and isinstance(other, bytes):
            now = self.one.ours([b"get", tokens[1]])  # a later request may have changed or removed it
            if isinstance(now, bytes):
                self.one.redis([b"set", tokens[1], now, b"KEEPTTL"])

    def wait(self) -> None:
        """For members that are there, or are not; or that another client brings."""
        tag, name = self.dice.choice(TAGS), self.dice.choice([b"bzpopmin", b"BZPOPMAX"])
        keys = [tag + self.requests.zset() for _ in range(self.dice.randrange(1, 3))]
        self.one([name, *keys, self.dice.choice([b"0.01", b"0.001"])])

    def scan(self) -> None:
        options = self.requests.some(
            [b"MATCH", self.dice.choice([b"{[ab]}*", b"*1", b"*"])],
            [b"COUNT", b"%d" % self.dice.randrange(1, 20)],
            [b"TYPE", self.dice.choice([b"string", b"zset"])],
        )
        found = []
        for ask in (self.one.ours, self.one.redis):
            keys, cursor = set(), b"0"
            while True:
                reply = ask([b"scan", cursor, *options])
                cursor, some = reply[0], reply[1:] if ask == self.one.ours else reply[1]
                keys.update(some)
                if cursor == b"0":
                    break
            found.append(keys)
        assert found[0] == found[1], options


@pytest.fixture
def talk(shared: Server, tmp_path: Path) -> Iterator[Talk]:
    with running(tmp_path) as redis:
        talk = Talk(shared, redis.path, ROUNDS)
        yield talk
        talk.one.close()
        talk.other.close()


@pytest.mark.timeout(0)
def test_the_same_as_redis_over_the_wire(talk: Talk) -> None:
    talk.one([b"flushall"])
    for step in range(ROUNDS // 2):
        talk.step()
        if step % 5000 == 4999:
            talk.one([b"flushall"])
    assert {"plain", "transaction", "wait", "scan"} <= talk.done.keys()
    assert len(talk.done.keys() & set(COMMANDS)) > 60 or ROUNDS < 3000
