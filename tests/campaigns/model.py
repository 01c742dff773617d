"""What the commands mean, in plain dicts and sorted lists: the oracle that servers are held to.

Written from the protocol's description, and independent of the package's own store. This file is the
keyspace: keys, their order of use, deadlines, limits. The commands are in ``model_strings.py`` and
``model_sets.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from imds.commands import COMMANDS as TABLE
from imds.commands import Spread
from imds.protocol import LIST, decode_list, encode_list, encode_request, split_request

Tokens = tuple[bytes, ...]
Value = bytes | dict[bytes, float]
Reply = tuple[int, bytes]
# What a reply has to be. An error is right if it begins as this one does: texts are compared with redis'.
Expected = Reply | Callable[[Reply], bool]
State = dict[bytes, tuple[Value, int]]  # each key's value and deadline, 0 for none
# What one command changed, which a crash takes or leaves as a whole. An effect is one of
# (set, key, string, deadline), (del, key), (zadd, key, score, member), (zrem, key, member),
# (expire, key, deadline), (rename, key, to).
Record = tuple[Tokens, ...]
Answer = bytes | int | float | None | list["bytes | int | float | None"] | Callable[[Reply], bool]

DONE: Reply = (0, b"OK")
NONE: Reply = (1, b"")
WRONG_TYPE: Reply = (2, b"WRONGTYPE Operation against a key holding the wrong kind of value")
BAD_SCORE: Reply = (2, b"ERR score must be a number")
FULL: Reply = (2, b"OOM command not allowed: the shard is at its limit and the policy is noeviction")

KEYS = [b"key%d" % number for number in range(7)]  # few, so that requests meet
FIRST_FORMS = {b"get": 2, b"set": 3, b"del": 2, b"zadd": 4, b"zrange": 4, b"zrank": 3, b"zrem": 3}

Command = Callable[..., Answer]
COMMANDS: dict[str, Command] = {}  # those on keys, by name; a test compares them with the table


def command(function: Command) -> Command:
    """Register the model of a command under the function's name, without an underscore at its end."""
    COMMANDS[function.__name__.rstrip("_")] = function
    return function


def unknown() -> set[str]:
    """Return the table's commands on keys that have no model."""
    on_keys = (Spread.KEY, Spread.KEYS, Spread.SLOT)
    return {name for name, row in TABLE.items() if row.spread in on_keys} - set(COMMANDS)


class Wrong(Exception):
    """The command answers an error that begins with this."""


def wrong_type() -> Wrong:
    return Wrong("WRONGTYPE ")


def number(text: bytes) -> float | None:
    """Return the score that a token is, or None."""
    try:
        score = float(text)
    except ValueError:
        return None
    if score != score or b"_" in text or text != text.strip():
        return None
    return score + 0.0


def integer(text: bytes) -> int:
    """Return the integer that a token is: as it would be printed, of 64 bits. Raises Wrong."""
    try:
        value = int(text)
    except ValueError:
        raise Wrong("ERR ") from None
    if b"%d" % value != text or not -(1 << 63) <= value < 1 << 63:
        raise Wrong("ERR ")
    return value


def agrees(expected: Expected, reply: Reply) -> bool:
    """Whether a reply is what it has to be."""
    if not isinstance(expected, tuple):
        return expected(reply)
    if expected[0] == 2 == reply[0]:
        return reply[1].startswith(expected[1])
    return reply == expected


class Model:
    """One keyspace. ``capacity``: most keys, 0 for no limit; with ``evict`` the least recently used goes."""

    def __init__(self, capacity: int = 0, evict: bool = True) -> None:
        self.capacity = capacity
        self.evict = evict
        self.data: OrderedDict[bytes, Value] = OrderedDict()  # in the order of use
        self.deadlines: dict[bytes, int] = {}  # milliseconds since 1970
        self.used: dict[bytes, int] = {}  # when keys were used last, in milliseconds since 1970
        self.now = 0
        self._effects: list[Tokens] = []  # of the command that is being run

    def copy(self) -> Model:
        twin = Model(self.capacity, self.evict)
        twin.data.update((key, dict(v) if isinstance(v, dict) else v) for key, v in self.data.items())
        twin.deadlines.update(self.deadlines)
        twin.used.update(self.used)
        twin.now = self.now
        return twin

    def state(self, now: int = 0) -> State:
        """Return the data that there is at that time, without the order of use."""
        when = self.deadlines.get
        return {key: (v, when(key, 0)) for key, v in self.data.items() if not 0 < when(key, 0) <= now}

    # -- requests ---------------------------------------------------------------------------------

    def run(self, tokens: Tokens, now: int) -> tuple[Expected, list[Record]]:
        """Carry out a request at that time; return the reply that it has to get, and what it changed."""
        self.now = now
        name = tokens[0].lower()
        records = self.expire()
        if name == b"_exec":
            return self._transaction(inner(tokens), records)
        first = FIRST_FORMS.get(name) == len(tokens)
        if not first and not TABLE[name.decode()].arity_ok(len(tokens)):
            return (2, b"ERR wrong number of arguments"), records
        function = getattr(self, f"_{name.decode()}") if first else COMMANDS[name.decode()]
        before, self._effects = self.copy(), []
        try:
            answer = function(*tokens[1:]) if first else function(self, *tokens[1:])
        except Wrong as wrong:
            if self._effects:  # all or nothing
                self.data, self.deadlines = before.data, before.deadlines
            return (2, str(wrong).encode()), records
        if self._effects:
            # In the first forms what was evicted has records of its own.
            records += [(effect,) for effect in self._effects] if first else [tuple(self._effects)]
        return _reply(answer), records

    def _transaction(self, requests: list[Tokens], records: list[Record]) -> tuple[Expected, list[Record]]:
        wanted = []
        for tokens in requests:
            expected, more = self.run(tokens, self.now)
            wanted.append(expected)
            records += more

        def right(reply: Reply) -> bool:
            got = results(reply)
            return len(got) == len(wanted) and all(map(agrees, wanted, got))

        return right, records

    # The first seven commands in their first forms; None is missing, which these answer for "nothing done".

    def _get(self, key: bytes) -> Answer:
        return self.string(key)

    def _set(self, key: bytes, value: bytes) -> Answer:
        self.put(key, value)
        return b"OK"

    def _del(self, key: bytes) -> Answer:
        return b"OK" if self.drop(key) else None

    def _zadd(self, key: bytes, text: bytes, member: bytes) -> Answer:
        score = number(text)
        if score is None:
            raise Wrong(BAD_SCORE[1].decode())
        self.zset(key)
        self.zput(key, score, member)
        return b"OK"

    def _zrem(self, key: bytes, member: bytes) -> Answer:
        self.zset(key)
        return b"OK" if self.ztake(key, member) else None

    def _zrange(self, key: bytes, *bounds: bytes) -> Answer:
        low, high = map(number, bounds)
        if low is None or high is None:
            raise Wrong(BAD_SCORE[1].decode())
        found = [b"%a:%b" % pair for pair in self.ordered(key) if low <= pair[0] <= high]
        return b",".join(found) if found else None

    def _zrank(self, key: bytes, member: bytes) -> Answer:
        ranks = [rank for rank, (_, one) in enumerate(self.ordered(key)) if one == member]
        return ranks[0] if ranks else None

    # -- what commands are made of ----------------------------------------------------------------

    def kind(self, key: bytes) -> type | None:
        """Return bytes, dict or None, without using the key."""
        return type(self.data[key]) if key in self.data else None

    def find(self, key: bytes) -> Value | None:
        """Return what the key holds, and make it the most recently used."""
        if key in self.data:
            self._use(key)
        return self.data.get(key)

    def idle(self, key: bytes) -> Callable[[Reply], bool]:
        """Return what tells whether these are the seconds since the key's last use.

        They may be too few: a shard that takes a batch back counts that as use. A key that has not been used
        here was loaded at a time that is not known here.
        """
        seconds = (self.now - self.used.get(key, 0)) // 1000
        most = 1 + seconds + seconds // 256
        return lambda reply: reply[0] == 0 and reply[1].isdigit() and int(reply[1]) <= most

    def string(self, key: bytes) -> bytes | None:
        value = self.find(key)
        if isinstance(value, dict):
            raise wrong_type()
        return value

    def zset(self, key: bytes) -> dict[bytes, float]:
        value = self.find(key)
        if isinstance(value, bytes):
            raise wrong_type()
        return value or {}

    def ordered(self, key: bytes) -> list[tuple[float, bytes]]:
        """Return the sorted set's (score, member) pairs in order."""
        return sorted((score, member) for member, score in self.zset(key).items())

    def put(self, key: bytes, value: bytes, when: int = 0) -> None:
        self._make_room(key)
        self._change((b"set", key, value, b"%d" % when))

    def drop(self, key: bytes) -> bool:
        if key not in self.data:
            return False
        self._change((b"del", key))
        return True

    def zput(self, key: bytes, score: float, member: bytes) -> None:
        if self.zset(key).get(member) != score:
            self._make_room(key)
            self._change((b"zadd", key, repr(score).encode(), member))

    def ztake(self, key: bytes, member: bytes) -> bool:
        if member not in self.zset(key):
            return False
        self._change((b"zrem", key, member))
        return True

    def set_deadline(self, key: bytes, when: int) -> None:
        """Give the key a deadline, or none by 0; it goes if that is past."""
        if when and when <= self.now:
            self.drop(key)
            return
        self.find(key)
        if self.deadlines.get(key, 0) != when:
            self._change((b"expire", key, b"%d" % when))

    def move(self, key: bytes, to: bytes) -> None:
        self._change((b"rename", key, to))

    def expire(self) -> list[Record]:
        """Remove what has met its deadline."""
        due = sorted((when, key) for key, when in self.deadlines.items() if when <= self.now)
        records: list[Record] = [((b"del", key),) for _, key in due]
        for record in records:
            self.apply(record)
        return records

    def shrink(self) -> list[Record]:
        """Evict down to the limit, as a start does."""
        records: list[Record] = []
        while self.evict and self.capacity and len(self.data) > self.capacity:
            records.append(((b"del", next(iter(self.data))),))
            self.apply(records[-1])
        return records

    def _make_room(self, key: bytes) -> None:
        self.find(key)
        while key not in self.data and self.capacity and len(self.data) >= self.capacity:
            if not self.evict:
                raise Wrong(FULL[1].decode())
            self._change((b"del", next(iter(self.data))))

    def _change(self, effect: Tokens) -> None:
        self._effects.append(effect)
        self.apply((effect,))

    def apply(self, record: Record) -> None:
        """Carry out what is known to have happened."""
        for name, key, *rest in record:
            if name == b"del":
                del self.data[key]
                self.deadlines.pop(key, None)
                continue
            if name == b"set":
                self.data[key] = rest[0]
                self._time(key, int(rest[1]))
            elif name == b"expire":
                self._time(key, int(rest[0]))
            elif name == b"rename":
                self.data.pop(rest[0], None)
                self.data[rest[0]] = self.data.pop(key)
                self._time(rest[0], self.deadlines.pop(key, 0))
                self._use(rest[0])
                continue
            else:
                members = self.data.setdefault(key, {})
                assert isinstance(members, dict)
                if name == b"zadd":
                    members[rest[1]] = float(rest[0])
                else:
                    assert name == b"zrem", name
                    del members[rest[0]]
                    if not members:
                        del self.data[key]
                        self.deadlines.pop(key, None)
                        continue
            self._use(key)

    def _use(self, key: bytes) -> None:
        self.data.move_to_end(key)
        self.used[key] = self.now

    def _time(self, key: bytes, when: int) -> None:
        self.deadlines.pop(key, None)
        if when:
            self.deadlines[key] = when


def _reply(answer: Answer) -> Expected:
    if callable(answer):
        return answer
    if isinstance(answer, list):
        return LIST, encode_list(map(_text, answer))
    text = _text(answer)
    return NONE if text is None else (0, text)


def _text(item: bytes | int | float | None) -> bytes | None:
    if item is None or isinstance(item, bytes):
        return item
    return b"%d" % item if isinstance(item, int) else repr(item).encode()


# -- transactions -----------------------------------------------------------------------------------


def transaction(requests: Sequence[Tokens], watched: Mapping[bytes, bytes] = {}) -> Tokens:
    """Return the request by which a router has these carried out in one go; ``watched``: keys' versions."""
    words = [word for pair in watched.items() for word in pair]
    return (b"_exec", b"0", b"1", b"%d" % len(watched), *words, *map(encode_request, requests))


def inner(tokens: Tokens) -> list[Tokens]:
    """Return the requests in such a one."""
    return [tuple(split_request(frame)[0]) for frame in tokens[4 + 2 * int(tokens[3]) :]]


def results(reply: Reply) -> list[Reply]:
    """Return the replies in the reply to it."""
    items = decode_list(reply[1]) if reply[0] == LIST else []
    return [(int.from_bytes(item[:4]), item[4:]) for item in items if item is not None]


# -- reading all ------------------------------------------------------------------------------------


def reader(keys: Iterable[bytes]) -> list[Tokens]:
    """Return the requests by which :func:`read_state` learns all of some keys."""
    return [
        request
        for key in keys
        for request in ((b"get", key), (b"zrange", key, b"-inf", b"inf"), (b"pexpiretime", key))
    ]


def read_state(keys: Sequence[bytes], replies: Sequence[Reply]) -> State:
    """Return the state that the replies to :func:`reader` show. Members must hold no comma."""
    state: State = {}
    for key, string, members, when in zip(keys, replies[::3], replies[1::3], replies[2::3], strict=True):
        deadline = max(0, int(when[1]))
        if string[0] == 0:
            assert members == WRONG_TYPE, (key, members)
            state[key] = string[1], deadline
        elif members[0] == 0:
            assert string == WRONG_TYPE, (key, string)
            pairs = [pair.partition(b":") for pair in members[1].split(b",")]
            state[key] = {member: float(score) for score, _, member in pairs}, deadline
        else:
            assert string == NONE, (key, string)
            assert members == NONE, (key, members)
            assert when == (0, b"-2"), (key, when)
    return state


from campaigns import model_sets, model_strings  # noqa: E402, F401  (they register their commands)
