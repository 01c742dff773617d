"""Requests at random for every command on data, seldom wrong: what differential tests run on both sides."""

from __future__ import annotations

import random

INTEGERS = [b"0", b"1", b"-1", b"2", b"-2", b"5", b"10", b"-10", b"100"]
EDGES = [
    *(
        b"%d" % (sign * (1 << bits) + off)
        for bits in (31, 32, 53, 63)
        for sign in (1, -1)
        for off in (-1, 0, 1)
    ),
    *[b"", b"x", b"1.5", b"01", b"+1", b"-0", b" 1", b"1 "],
]
SCORES = [b"0", b"1", b"1.5", b"-2.25", b"3", b"inf", b"-inf", b"1e5", b"0.1", b"-1", b"2"]
BAD_SCORES = [b"nan", b"x", b"", b" 1", b"1 ", b"1e", b"--1"]
PATTERNS = [
    b"*",
    b"k*",
    b"*1",
    b"key?",
    b"key[0-3]",
    b"key[^1]",
    b"m\\*",
    b"[",
    b"*e*y*",
    b"key1",
    b"[z-a]ey1",
    b"\\",
]
FAR = 10_000_000  # seconds: no deadline of these is met while a test runs


class Requests:
    """A source of requests; ``now`` is seconds since 1970."""

    def __init__(self, seed: int, now: int, keys: int = 12, members: int = 8) -> None:
        self.dice = random.Random(seed)
        self.now = now
        self.keys = keys
        self.members = members

    def key(self) -> bytes:
        """Mostly strings have low numbers and sorted sets high ones."""
        return b"key%d" % self.dice.randrange(self.keys)

    def string(self) -> bytes:
        return b"key%d" % self.dice.randrange((self.keys + 1) // 2 + self.rarely())

    def zset(self) -> bytes:
        return b"key%d" % (self.keys - 1 - self.dice.randrange((self.keys + 1) // 2 + self.rarely()))

    def rarely(self) -> bool:
        return self.dice.random() < 0.05

    def member(self) -> bytes:
        return b"m%d" % self.dice.randrange(self.members)

    def value(self) -> bytes:
        kind = self.dice.random()
        if kind < 0.4:
            return b"%d" % self.dice.randrange(-50, 50)
        if kind < 0.5:
            return self.dice.choice([b"%.2f" % self.dice.uniform(-9, 9), *EDGES])
        return self.dice.randbytes(self.dice.choice([0, 1, 5, 20, 100]))

    def integer(self) -> bytes:
        return self.dice.choice(EDGES if self.rarely() else INTEGERS)

    def score(self) -> bytes:
        if self.rarely():
            return self.dice.choice(BAD_SCORES)
        return self.dice.choice([*SCORES, b"%d" % self.dice.randrange(-20, 20)])

    def bound(self) -> bytes:
        return (b"(" if self.dice.random() < 0.3 else b"") + self.score()

    def lex(self) -> bytes:
        if self.rarely():
            return self.member()
        return self.dice.choice([b"-", b"+", b"[" + self.member(), b"(" + self.member(), b"[", b"[m"])

    def seconds(self) -> bytes:
        kind = self.dice.random()
        if kind < 0.1:
            return self.dice.choice(EDGES)
        return b"%d" % (-1 if kind < 0.2 else FAR + self.dice.randrange(1000) * 1000)

    def moment(self) -> bytes:
        kind = self.dice.random()
        if kind < 0.1:
            return self.dice.choice([*EDGES, b"0"])
        return b"%d" % (self.now - 100 if kind < 0.2 else self.now + FAR + self.dice.randrange(1000) * 1000)

    def expiry(self, keep: bytes) -> list[bytes]:
        name = self.dice.choice([b"EX", b"px", b"EXAT", b"pxat", keep, keep])
        if name == keep:
            return [keep]
        if name.upper() == b"EX":
            return [name, self.seconds()]
        if name.upper() == b"PX":
            return [name, self.seconds() + b"000"]
        return [name, self.moment() if name == b"EXAT" else self.moment() + b"000"]

    def some(self, *choices: list[bytes], chance: float = 0.3) -> list[bytes]:
        """Some of these options, in any order."""
        chosen = [choice for choice in choices if self.dice.random() < chance]
        self.dice.shuffle(chosen)
        return [word for choice in chosen for word in choice]

    def many(self, make: object, most: int = 4) -> list[bytes]:
        return [make() for _ in range(self.dice.randrange(1, most + 1))]  # type: ignore[operator]

    def __call__(self) -> list[bytes]:
        """Return the tokens of one request."""
        name = self.dice.choice(NAMES)
        tokens = [name.encode(), *getattr(self, f"of_{name}", lambda: [self.key()])()]
        if self.dice.random() < 0.01:
            tokens = tokens[:-1] if self.dice.random() < 0.5 and tokens[1:] else [*tokens, b"more"]
        if self.dice.random() < 0.1:
            tokens[0] = tokens[0].upper()
        return tokens

    # ---- the arguments of each command that takes more than a key ----------------------------------------

    def of_get(self) -> list[bytes]:
        return [self.string()]

    of_getdel = of_strlen = of_incr = of_decr = of_get

    def of_set(self) -> list[bytes]:
        extra = self.some([b"NX"], [b"XX"], [b"GET"], self.expiry(b"KEEPTTL"), chance=0.15)
        return [self.string(), self.value(), *extra]

    def of_setnx(self) -> list[bytes]:
        return [self.string(), self.value()]

    of_getset = of_append = of_setnx

    def of_setex(self) -> list[bytes]:
        return [self.string(), self.seconds(), self.value()]

    def of_psetex(self) -> list[bytes]:
        return [self.string(), self.seconds() + b"000", self.value()]

    def of_getex(self) -> list[bytes]:
        return [self.string(), *self.some(self.expiry(b"PERSIST"), chance=0.7)]

    def of_getrange(self) -> list[bytes]:
        return [self.string(), self.integer(), self.integer()]

    def of_setrange(self) -> list[bytes]:
        return [
            self.string(),
            self.dice.choice([b"0", b"1", b"5", b"30", b"-1", b"x", b"4294967296"]),
            self.value(),
        ]

    def of_incrby(self) -> list[bytes]:
        return [self.string(), self.integer()]

    of_decrby = of_incrby

    def of_incrbyfloat(self) -> list[bytes]:
        return [
            self.string(),
            self.dice.choice([b"0.1", b"-1.25", b"3", b"1e3", b"x", b"-2e-2", b"inf", b"0.10"]),
        ]

    def of_mget(self) -> list[bytes]:
        return self.many(self.key)

    of_del = of_unlink = of_exists = of_touch = of_mget

    def of_mset(self) -> list[bytes]:
        return [word for _ in self.many(self.key) for word in (self.string(), self.value())]

    of_msetnx = of_mset

    def of_expire(self) -> list[bytes]:
        return [self.key(), self.seconds(), *self.some([b"NX"], [b"xx"], [b"GT"], [b"LT"], chance=0.15)]

    def of_pexpire(self) -> list[bytes]:
        return [
            self.key(),
            self.seconds() + b"000",
            *self.some([b"NX"], [b"xx"], [b"GT"], [b"lt"], chance=0.1),
        ]

    def of_expireat(self) -> list[bytes]:
        return [
            self.key(),
            self.moment(),
            *self.some([b"NX"], [b"XX"], [b"GT"], [b"LT"], [b"bad"], chance=0.1),
        ]

    def of_pexpireat(self) -> list[bytes]:
        return [
            self.key(),
            self.moment() + b"000",
            *self.some([b"NX"], [b"XX"], [b"GT"], [b"LT"], chance=0.1),
        ]

    def of_rename(self) -> list[bytes]:
        return [self.key(), self.key()]

    of_renamenx = of_rename

    def of_copy(self) -> list[bytes]:
        return [self.key(), self.key(), *self.some([b"REPLACE"])]

    def of_object(self) -> list[bytes]:
        return [self.dice.choice([b"refcount", b"idletime", b"IDLETIME", b"freq"]), self.key()]

    def of_dbsize(self) -> list[bytes]:
        return []

    def of_recent(self) -> list[bytes]:
        return self.dice.choice([[], [b"1"], [b"4"], [b"0"], [b"x"]])

    def of_keys(self) -> list[bytes]:
        return [self.dice.choice(PATTERNS)]

    def of_zadd(self) -> list[bytes]:
        pairs = [
            word for _ in range(self.dice.choice([1, 1, 2, 4])) for word in (self.score(), self.member())
        ]
        return [
            self.zset(),
            *self.some([b"NX"], [b"XX"], [b"GT"], [b"lt"], [b"CH"], [b"INCR"], chance=0.12),
            *pairs,
        ]

    def of_zincrby(self) -> list[bytes]:
        return [self.zset(), self.score(), self.member()]

    def of_zscore(self) -> list[bytes]:
        return [self.zset(), self.member()]

    of_zrank = of_zrevrank = of_zscore

    def of_zmscore(self) -> list[bytes]:
        return [self.zset(), *self.many(self.member)]

    of_zrem = of_zmscore

    def of_zcard(self) -> list[bytes]:
        return [self.zset()]

    def of_zcount(self) -> list[bytes]:
        return [self.zset(), self.bound(), self.bound()]

    of_zremrangebyscore = of_zcount

    def limit(self) -> list[bytes]:
        return [b"LIMIT", self.integer(), self.integer()]

    def of_zrangebyscore(self) -> list[bytes]:
        return [*self.of_zcount(), *self.some([b"WITHSCORES"], self.limit())]

    of_zrevrangebyscore = of_zrangebyscore

    def of_zrevrange(self) -> list[bytes]:
        return [self.zset(), self.integer(), self.integer(), *self.some([b"withscores"])]

    of_zrangebyrank = of_zrevrange

    def of_zscan(self) -> list[bytes]:
        """So many at once that the first reply is the whole, of any set."""
        match = [b"MATCH", self.dice.choice([b"m*", b"m[0-3]", b"*", b"x"])]
        return [self.zset(), b"0", *self.some(match, [b"COUNT", b"1000"])]

    def of_zrange(self) -> list[bytes]:
        form = self.dice.random()
        if form < 0.2:
            return [self.zset(), self.score(), self.score()]
        if form < 0.5:
            return [*self.of_zcount(), b"BYSCORE", *self.some([b"REV"], [b"WITHSCORES"], self.limit())]
        ranks = [self.zset(), self.integer(), self.integer()]
        return [*ranks, *self.some([b"REV"], [b"WITHSCORES"], self.limit(), [b"BYSCORE"], chance=0.4)]

    def of_zremrangebyrank(self) -> list[bytes]:
        return [self.zset(), self.integer(), self.integer()]

    # Ranges of members are of a set whose scores are all the same: others have no order that is promised.

    def of_zlexcount(self) -> list[bytes]:
        return [b"lex", self.lex(), self.lex()]

    of_zremrangebylex = of_zlexcount

    def of_zrangebylex(self) -> list[bytes]:
        return [*self.of_zlexcount(), *self.some(self.limit())]

    of_zrevrangebylex = of_zrangebylex

    def of_zpopmin(self) -> list[bytes]:
        return [self.zset(), *self.some([self.integer()])]

    of_zpopmax = of_zpopmin

    def of_zrandmember(self) -> list[bytes]:
        return [self.zset()]

    def sets(self) -> list[bytes]:
        keys = self.many(self.zset, 3)
        return [b"%d" % len(keys) if not self.rarely() else self.integer(), *keys]

    def of_zdiff(self) -> list[bytes]:
        return [*self.sets(), *self.some([b"WITHSCORES"])]

    def options(self) -> list[bytes]:
        return self.some(
            [b"AGGREGATE", self.dice.choice([b"sum", b"MIN", b"max", b"x"])],
            [b"WEIGHTS", self.score(), b"2"],
            chance=0.2,
        )

    def of_zunion(self) -> list[bytes]:
        return [*self.sets(), *self.options(), *self.some([b"WITHSCORES"])]

    of_zinter = of_zunion

    def of_zdiffstore(self) -> list[bytes]:
        return [self.zset(), *self.sets()]

    def of_zunionstore(self) -> list[bytes]:
        return [self.zset(), *self.sets(), *self.options()]

    of_zinterstore = of_zunionstore

    def of_zintercard(self) -> list[bytes]:
        return [*self.sets(), *self.some([b"LIMIT", self.integer()])]


# Those that are not wanted too often, and those by which there is something.
_OFTEN = ["set", "zadd", "zadd", "zadd", "zincrby", "mset", "append", "zunionstore", "lex"]
_ALL = [
    *[
        "get",
        "set",
        "setnx",
        "setex",
        "psetex",
        "getset",
        "getdel",
        "getex",
        "append",
        "strlen",
        "getrange",
        "setrange",
        "incr",
        "decr",
        "incrby",
        "decrby",
    ],
    *[
        "incrbyfloat",
        "mget",
        "mset",
        "msetnx",
        "del",
        "unlink",
        "exists",
        "touch",
        "expire",
        "pexpire",
        "expireat",
        "pexpireat",
        "persist",
        "ttl",
        "pttl",
    ],
    *[
        "expiretime",
        "pexpiretime",
        "type",
        "rename",
        "renamenx",
        "copy",
        "object",
        "dbsize",
        "keys",
        "recent",
        "zadd",
        "zincrby",
        "zscore",
        "zrank",
        "zrevrank",
    ],
    *[
        "zmscore",
        "zrem",
        "zcard",
        "zcount",
        "zremrangebyscore",
        "zrangebyscore",
        "zrevrangebyscore",
        "zrevrange",
        "zrangebyrank",
        "zscan",
        "zrange",
    ],
    *[
        "zremrangebyrank",
        "zlexcount",
        "zremrangebylex",
        "zrangebylex",
        "zrevrangebylex",
        "zpopmin",
        "zpopmax",
        "zrandmember",
    ],
    *["zdiff", "zunion", "zinter", "zdiffstore", "zunionstore", "zinterstore", "zintercard"],
]
NAMES = [*_ALL, *(name for name in _OFTEN if name != "lex")]
