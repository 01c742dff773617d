"""Random requests for the campaigns in which it matters what survives, and not only what is answered."""

from __future__ import annotations

import random
from collections.abc import Sequence

from requests_at_random import Requests as AtRandom

from campaigns.model import COMMANDS, Tokens, transaction
from imds.commands import COMMANDS as TABLE
from imds.commands import Spread

# Keys that belong to several shards, those of them that share a slot, and a sorted set whose scores are all
# the same: of others, ranges of members have no order that is promised.
TAGGED = (b"{t}1", b"{t}2", b"{t}3")
SPREAD = (b"a", b"b", b"c", *TAGGED, b"", b"\0\xff", b"key:9", b"key:10", b"key:11", b"key:12")
LEX = b"{t}lex"


class Requests:
    """Random requests on a few keys; each string that ``set`` writes is written once only.

    With ``expiry`` some keys get a time to live, of seconds at most.
    """

    def __init__(self, rng: random.Random, keys: Sequence[bytes], *, expiry: bool = False) -> None:
        self.rng = rng
        self.keys = keys
        self.expiry = expiry
        self.written = 0

    def draw(self) -> Tokens:
        """Return one request; three in four write."""
        return self._plain() if self.rng.random() < 0.7 else self._other()

    def transaction(self) -> Tokens:
        """Return a transaction of a few."""
        return transaction([self.draw() for _ in range(self.rng.choice((1, 2, 4)))])

    def _value(self) -> bytes:
        """Return a string of which no part is in another: a lost sector is not made up for by another's."""
        self.written += 1
        size = self.rng.choice((0, 10, 10, 60, 300, 700)) if self.rng.random() < 0.97 else 3000
        mark = b"%d." % self.written
        return (mark * (size // len(mark) + 2))[: len(mark) + size]

    def _plain(self) -> Tokens:
        """Return one of the first seven commands."""
        rng, key = self.rng, self.rng.choice(self.keys)
        kind = rng.random()
        if kind < 0.4:
            return b"set", key, self._value()
        self.written += 1
        member = b"m%d" % rng.randrange(4)
        if kind < 0.6:
            score = (
                b"%d" % self.written if rng.random() < 0.9 else rng.choice((b"2.5", b"-inf", b"nan", b"x"))
            )
            return b"zadd", key, score, member
        if kind < 0.7:
            return b"del", key
        if kind < 0.77:
            return b"zrem", key, member
        if kind < 0.88:
            return b"get", key
        if kind < 0.94:
            return b"zrank", key, member
        return b"zrange", key, b"-inf", b"%d" % (self.written // 2) if rng.random() < 0.5 else b"inf"

    def _other(self) -> Tokens:
        """Return one of the others: those of several effects, of results, of deadlines."""
        rng = self.rng
        key, other = rng.choice(self.keys), self._neighbour()
        number, member = b"%d" % rng.randrange(-3, 9), b"m%d" % rng.randrange(4)
        choices: list[Tokens] = [
            (b"del", *self._several()),
            (b"append", key, b"+%d" % self.written),
            (b"setrange", key, b"%d" % rng.randrange(40), b"<%d>" % self.written),
            (b"incrby", key, number),
            (b"getdel", key),
            (b"rename", *other),
            (b"copy", *other, b"replace"),
            (b"zadd", key, *(word for i in range(3) for word in (b"%d" % (self.written + i), b"m%d" % i))),
            (b"zincrby", key, number, member),
            (b"zpopmin", key, b"2"),
            (b"zremrangebyrank", key, b"0", b"1"),
            (b"zunionstore", other[0], b"2", *other),
        ]
        if rng.random() < 0.3:
            pairs = [word for one in self._several() for word in (one, self._value())]
            return b"mset", *pairs
        if rng.random() < 0.15:
            return b"set", key, b"%d" % rng.randrange(100)
        if self.expiry and rng.random() < 0.5:
            time = b"%d" % rng.choice((1, 40, 300, 900, 2500, 9000))
            choices = [
                (b"pexpire", key, time),
                (b"pexpire", key, time, b"gt"),
                (b"set", key, self._value(), b"px", time),
                (b"getex", key, b"px", time),
                (b"persist", key),
                (b"pttl", key),
            ]
        return rng.choice(choices)

    def _several(self) -> list[bytes]:
        """Return keys that share a slot's tag where they have any: what goes to one shard."""
        first, second = self._neighbour()
        return [first, second, *([self.rng.choice((first, second))] if self.rng.random() < 0.3 else [])]

    def _neighbour(self) -> tuple[bytes, bytes]:
        """Return two keys of one slot, or of one shard where keys have no tags: then there is one shard."""
        first = self.rng.choice(self.keys)
        tag = first.partition(b"}")[0] + b"}" if first.startswith(b"{") else b""
        return first, self.rng.choice([key for key in self.keys if key.startswith(tag)])


class Anything(AtRandom):
    """Requests for every command on keys, seldom wrong; those of several keys name keys of one slot.

    Times to live are short ones, too. ``one_slot``: of all requests. ``lasting``: nothing is set that has met
    its deadline already.
    """

    NAMES = (*sorted(COMMANDS) * 2, *["lex", "set", "zadd", "zadd", "zunionstore", "mset"] * 4)

    def __init__(self, seed: int, now: int, *, one_slot: bool = False, lasting: bool = False) -> None:
        super().__init__(seed, now)
        self.one_slot = one_slot
        self.lasting = lasting
        self.slot = SPREAD

    def __call__(self) -> list[bytes]:
        name = self.dice.choice(self.NAMES)
        if name == "lex":
            return [b"zadd", LEX, b"0", self.member()]
        row = TABLE[name]
        several = row.spread is not Spread.KEY or row.numkeys
        self.slot = TAGGED if self.one_slot or several else SPREAD
        words = getattr(self, f"of_{name}", lambda: [self.key()])()
        tokens = [name.encode(), *(LEX if word == b"lex" else word for word in words)]
        if self.dice.random() < 0.01:
            tokens = tokens[:-1] if self.dice.random() < 0.5 and tokens[2:] else [*tokens, b"more"]
        if self.dice.random() < 0.1:
            tokens[0] = tokens[0].upper()
        return tokens

    def key(self) -> bytes:
        return self.dice.choice(self.slot)

    string = zset = key

    def seconds(self) -> bytes:
        return self.dice.choice((b"1", b"2", b"6", b"30")) if self.dice.random() < 0.6 else super().seconds()

    def moment(self) -> bytes:
        if self.dice.random() < 0.5:
            return b"%d" % (self.now + self.dice.choice((1, 3, 7, 40)))
        when = self.dice.choice((super().moment(), b"0"))
        return b"%d" % (self.now + 5) if self.lasting and when == b"%d" % (self.now - 100) else when

    def of_object(self) -> list[bytes]:
        return [self.dice.choice((b"refcount", b"encoding", b"idletime", b"x")), self.key()]

    def of_zrandmember(self) -> list[bytes]:
        return [self.key(), *self.dice.choice(([], [self.integer()], [b"-3", b"withscores"]))]

    def of_zscan(self) -> list[bytes]:
        return [self.key(), b"0", b"count", b"1000"]
