"""What the commands mean, in plain dicts: the oracle that servers are held to.

Written from the protocol's description, and independent of the package's own store.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from copy import deepcopy

from imds.commands import COMMANDS as TABLE
from imds.commands import Spread

Tokens = tuple[bytes, ...]
Value = bytes | dict[bytes, float]
Reply = tuple[int, bytes]
State = dict[bytes, Value]

DONE: Reply = (0, b"OK")
NONE: Reply = (1, b"")
WRONG_TYPE: Reply = (2, b"WRONGTYPE Operation against a key holding the wrong kind of value")
BAD_SCORE: Reply = (2, b"ERR score must be a number")
FULL: Reply = (2, b"OOM command not allowed: the shard is at its limit and the policy is noeviction")

KEYS = [b"key%d" % number for number in range(7)]  # few, so that requests meet

# The commands on keys that the oracle knows, and those that it does not; a test compares both with the table.
# What the others do is compared with redis and between the stores (tests/shard); no campaign sends them.
COMMANDS = ("get", "set", "del", "zadd", "zrange", "zrank", "zrem")
NOT_MODELLED = frozenset(
    [
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
        "incrbyfloat",
        "mget",
        "mset",
        "msetnx",
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
        "expiretime",
        "pexpiretime",
        "type",
        "rename",
        "renamenx",
        "copy",
        "object",
        "zrevrank",
        "zscore",
        "zmscore",
        "zincrby",
        "zcard",
        "zcount",
        "zlexcount",
        "zrevrange",
        "zrangebyscore",
        "zrevrangebyscore",
        "zrangebylex",
        "zrevrangebylex",
        "zpopmin",
        "zpopmax",
        "zremrangebyscore",
        "zremrangebyrank",
        "zremrangebylex",
        "zrandmember",
        "zscan",
        "zunion",
        "zunionstore",
        "zinter",
        "zinterstore",
        "zdiff",
        "zdiffstore",
        "zintercard",
    ]
)


def unknown() -> set[str]:
    """Return the table's commands on keys that are in neither list."""
    on_keys = (Spread.KEY, Spread.KEYS, Spread.SLOT)
    return {name for name, row in TABLE.items() if row.spread in on_keys} - set(COMMANDS) - NOT_MODELLED


def number(text: bytes) -> float | None:
    """Return the score that a token is, or None."""
    try:
        score = float(text)
    except ValueError:
        return None
    if score != score or b"_" in text or text != text.strip():
        return None
    return score + 0.0


class Model:
    """One keyspace. ``capacity``: most keys, 0 for no limit; with ``evict`` the least recently used goes."""

    def __init__(self, capacity: int = 0, evict: bool = True) -> None:
        self.capacity = capacity
        self.evict = evict
        self.data: OrderedDict[bytes, Value] = OrderedDict()  # in the order of use

    def copy(self) -> Model:
        return deepcopy(self)

    def state(self) -> State:
        """Return the data, without the order of use."""
        return dict(self.data)

    def run(self, tokens: Tokens) -> tuple[Reply, list[Tokens]]:
        """Carry out a request; return the reply that it has to get, and what it changed."""
        name, key, *rest = tokens
        name = name.lower()
        value = self.data.get(key)
        if name == b"del":
            if value is None:
                return NONE, []
            return DONE, self._change((b"del", key))
        if name in (b"zadd", b"zrange"):
            scores = [number(text) for text in (rest[:1] if name == b"zadd" else rest)]
            if None in scores:
                return BAD_SCORE, []
        if value is not None:
            self.data.move_to_end(key)
        if name == b"set":
            return self._make((name, key, *rest), value)
        if name == b"get":
            return (NONE if value is None else (0, value) if isinstance(value, bytes) else WRONG_TYPE), []
        if isinstance(value, bytes):
            return WRONG_TYPE, []
        if name == b"zadd":
            if value is not None and value.get(rest[1]) == scores[0]:
                return DONE, []
            return self._make((name, key, *rest), value)
        if value is None:
            return NONE, []
        if name == b"zrem":
            return (DONE, self._change((name, key, *rest))) if rest[0] in value else (NONE, [])
        members = sorted((score, member) for member, score in value.items())
        if name == b"zrank":
            ranks = [rank for rank, (_, member) in enumerate(members) if member == rest[0]]
            return ((0, b"%d" % ranks[0]) if ranks else NONE), []
        assert name == b"zrange", name
        low, high = scores
        assert low is not None
        assert high is not None
        found = [b"%a:%b" % (score, member) for score, member in members if low <= score <= high]
        return ((0, b",".join(found)) if found else NONE), []

    def _make(self, effect: Tokens, value: Value | None) -> tuple[Reply, list[Tokens]]:
        effects: list[Tokens] = []
        while value is None and self.capacity and len(self.data) >= self.capacity:
            if not self.evict:
                return FULL, []
            effects += self._change((b"del", next(iter(self.data))))
        return DONE, effects + self._change(effect)

    def _change(self, effect: Tokens) -> list[Tokens]:
        self.apply(effect)
        return [effect]

    def apply(self, effect: Tokens) -> None:
        """Carry out what is known to have happened."""
        name, key, *rest = effect
        if name == b"del":
            del self.data[key]
            return
        if name == b"set":
            self.data[key] = rest[0]
        else:
            members = self.data.get(key, {})
            assert isinstance(members, dict)
            if name == b"zadd":
                members[rest[1]] = float(rest[0]) + 0.0  # which makes -0.0 the other zero
                self.data[key] = members
            else:
                assert name == b"zrem", name
                del members[rest[0]]
                if not members:
                    del self.data[key]
                    return
        self.data.move_to_end(key)


def reader(keys: Iterable[bytes]) -> list[Tokens]:
    """Return the requests by which :func:`read_state` learns all of some keys."""
    return [request for key in keys for request in ((b"get", key), (b"zrange", key, b"-inf", b"inf"))]


def read_state(keys: Sequence[bytes], replies: Sequence[Reply]) -> State:
    """Return the state that the replies to :func:`reader` show. Members must hold no comma."""
    state: State = {}
    for key, string, members in zip(keys, replies[::2], replies[1::2], strict=True):
        if string[0] == 0:
            assert members == WRONG_TYPE, (key, members)
            state[key] = string[1]
        elif members[0] == 0:
            assert string == WRONG_TYPE, (key, string)
            pairs = [pair.partition(b":") for pair in members[1].split(b",")]
            state[key] = {member: float(score) for score, _, member in pairs}
        else:
            assert string == NONE, (key, string)
            assert members == NONE, (key, members)
    return state


class Requests:
    """Random requests on a few keys, each value written once only."""

    def __init__(self, rng: random.Random, keys: Sequence[bytes]) -> None:
        self.rng = rng
        self.keys = keys
        self.written = 0

    def draw(self) -> Tokens:
        """Return one request; three in four write."""
        rng = self.rng
        key = rng.choice(self.keys)
        self.written += 1
        kind = rng.random()
        if kind < 0.4:
            size = rng.choice((0, 10, 10, 60, 300, 700)) if rng.random() < 0.97 else 3000
            return b"set", key, b"%d." % self.written + b"x" * size
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
