"""THE table of commands: the one truth for arity, routing, help and documentation.

To add a command, add its row here and, if the shards run it, its function in ``shard/`` (see
``shard/keyspace.py``); nothing else needs to know its name. Commands that the router answers have a handler
in ``router/``, those about a shard's process one in ``shard/worker.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from imds.protocol import MAX_TOKENS


class Combine(Enum):
    """What the router makes of the shards' replies to one request."""

    ROWS = "a list with one JSON object for each shard, dead or alive"
    EVERY = "OK if every shard says OK, otherwise an error that names the shards, or keys, that do not"
    SUM = "the sum of what the shards say; OK counts as one, missing as none"
    LIST = "one list: of a request's keys in their order, of every shard's elements one shard after the other"


class Spread(Enum):
    """To whom the router gives a request."""

    KEY = "the shard that owns its key"
    KEYS = "each of its keys to the shard that owns it, in parallel; the router combines the replies"
    SLOT = "the shard that owns the slot of all its keys; keys of several slots are refused"
    ALL = "every shard; the router combines the replies"
    SOME = "a shard that the router chooses"
    ROUTER = "the router itself"


@dataclass(frozen=True, slots=True)
class Command:
    """One command. Token counts include the name itself.

    Its keys are the tokens ``first_key``, ``first_key + key_step`` ... ``last_key``, which counts from the
    end where it is negative; without a key ``first_key`` is 0. Where ``numkeys`` is not 0, that token says
    how many keys follow it, beside those.
    In ``usage`` a word in capitals stands for itself, in any case, another for an argument; ``[...]`` may be
    left out, ``a|b`` is one of both, and what is before ``...`` may come again.
    """

    name: str
    min_tokens: int
    max_tokens: int  # MAX_TOKENS: as many as fit into a request
    write: bool
    spread: Spread
    usage: str
    summary: str
    first_key: int = 1
    last_key: int = 1
    key_step: int = 1
    numkeys: int = 0
    combine: Combine | None = None  # of those that go to every shard, or to the shards of many keys
    process: bool = False  # about a shard's process and not its data: the worker answers it
    admin: bool = False  # for who runs the server

    @property
    def in_store(self) -> bool:
        """Whether the store of a shard has a method for it."""
        return self.spread is not Spread.ROUTER and not self.process

    def arity_ok(self, ntokens: int) -> bool:
        """Whether a request of ``ntokens`` tokens, name included, may be this command."""
        return self.min_tokens <= ntokens <= self.max_tokens and (
            self.key_step == 1 or (ntokens - self.first_key) % self.key_step == 0
        )

    def key_positions(self, tokens: Sequence[bytes]) -> list[int]:
        """Return which of a request's tokens are keys, in order.

        Where the number of keys is no number, or more than there are, those that are sure.
        """
        positions: list[int] = []
        if self.first_key:
            last = self.last_key if self.last_key > 0 else len(tokens) + self.last_key
            positions += range(self.first_key, min(last + 1, len(tokens)), self.key_step)
        if self.numkeys:
            count, start = tokens[self.numkeys], self.numkeys + 1
            if count.isdigit() and len(count) < 8 and start + int(count) <= len(tokens):
                positions += range(start, start + int(count))
        return positions

    def single(self) -> int:
        """Return the number of tokens, name included, of a request with one key, of those with many."""
        return self.first_key + self.key_step


def _all(name: str, combine: Combine, summary: str, *, process: bool = False) -> Command:
    return Command(
        name,
        1,
        1,
        False,
        Spread.ALL,
        name,
        summary,
        first_key=0,
        combine=combine,
        process=process,
        admin=process,
    )


def _data(
    usage: str,
    summary: str,
    least: int,
    most: int = 0,
    *,
    write: bool = False,
    spread: Spread = Spread.KEY,
    keys: tuple[int, int, int] = (1, 1, 1),
    numkeys: int = 0,
    combine: Combine | None = None,
) -> Command:
    """Return the row of a command on data; ``most`` is 0 for no more tokens than ``least``."""
    return Command(
        *(usage.split()[0], least, most or least, write, spread, usage, summary, *keys),
        numkeys=numkeys,
        combine=combine,
    )


def _read(usage: str, summary: str, least: int, most: int = 0) -> Command:
    return _data(usage, summary, least, most)


def _write(usage: str, summary: str, least: int, most: int = 0) -> Command:
    return _data(usage, summary, least, most, write=True)


MANY = MAX_TOKENS
_ALL_KEYS = (1, -1, 1)
_NO_KEY = (0, 0, 1)
_EXPIRY = "[EX seconds|PX milliseconds|EXAT time|PXAT time|%s]"
_IF = "[NX|XX|GT|LT]"
_ALGEBRA = "[WEIGHTS number ...] [AGGREGATE SUM|MIN|MAX]"


def _keys(usage: str, summary: str, combine: Combine, *, write: bool = False) -> Command:
    return _data(usage, summary, 2, MANY, write=write, spread=Spread.KEYS, keys=_ALL_KEYS, combine=combine)


def _algebra(name: str, summary: str, options: str = "") -> list[Command]:
    """Return the rows of an operation on several sets: its result as a list, and stored."""
    usage = "numkeys key [key ...]"
    return [
        _data(
            f"{name} {usage}{options} [WITHSCORES]",
            summary,
            3,
            MANY,
            spread=Spread.SLOT,
            keys=_NO_KEY,
            numkeys=1,
        ),
        _data(
            f"{name}store destination {usage}{options}",
            f"make destination hold {summary}",
            4,
            MANY,
            write=True,
            spread=Spread.SLOT,
            numkeys=2,
        ),
    ]


_STRINGS = (
    _read("get key", "the string that key holds", 2),
    _write(
        f"set key value [NX|XX] [GET] {_EXPIRY % 'KEEPTTL'}",
        "make key hold a string, whatever it held before",
        3,
        MANY,
    ),
    _write("setnx key value", "set it if there is no key", 3),
    _write("setex key seconds value", "set it and its time to live", 4),
    _write("psetex key milliseconds value", "set it and its time to live", 4),
    _write("getset key value", "set the string, answer what it was", 3),
    _write("getdel key", "remove the string, answer it", 2),
    _write(f"getex key {_EXPIRY % 'PERSIST'}", "the string, and change when it expires", 2, 4),
    _write("append key value", "append to the string, answer its length", 3),
    _read("strlen key", "the length of the string", 2),
    _read("getrange key start end", "a part of the string, ends included; -1 is its last byte", 4),
    _write("setrange key offset value", "overwrite a part of the string, answer its length", 4),
    _write("incr key", "add 1 to the integer that the string is", 2),
    _write("decr key", "subtract 1", 2),
    _write("incrby key increment", "add an integer", 3),
    _write("decrby key decrement", "subtract an integer", 3),
    _write("incrbyfloat key increment", "add a number", 3),
    _keys("mget key [key ...]", "the strings, missing where there is none", Combine.LIST),
    _data(
        "mset key value [key value ...]",
        "set several strings; not atomic over several shards",
        3,
        MANY,
        write=True,
        spread=Spread.KEYS,
        keys=(1, -1, 2),
        combine=Combine.EVERY,
    ),
    _data(
        "msetnx key value [key value ...]",
        "set several strings of one slot if none of the keys is there",
        3,
        MANY,
        write=True,
        spread=Spread.SLOT,
        keys=(1, -1, 2),
    ),
)

_ANY_KEYS = (
    _keys("del key [key ...]", "remove keys, strings or sorted sets", Combine.SUM, write=True),
    _keys("unlink key [key ...]", "the same; answers a number for one key, too", Combine.SUM, write=True),
    _keys("exists key [key ...]", "how many of the keys there are", Combine.SUM),
    _keys("touch key [key ...]", "make keys the most recently used", Combine.SUM),
    _write(f"expire key seconds {_IF}", "remove key when the time is over", 3, MANY),
    _write(f"pexpire key milliseconds {_IF}", "remove key when the time is over", 3, MANY),
    _write(f"expireat key time {_IF}", "remove key at this second since 1970", 3, MANY),
    _write(f"pexpireat key time {_IF}", "remove key at this millisecond since 1970", 3, MANY),
    _write("persist key", "let key stay", 2),
    _read("ttl key", "seconds that key has to live; -1: for ever, -2: no key", 2),
    _read("pttl key", "milliseconds that key has to live", 2),
    _read("expiretime key", "the second since 1970 at which key goes", 2),
    _read("pexpiretime key", "the millisecond since 1970 at which key goes", 2),
    _read("type key", "string, zset or none", 2),
    _data(
        "rename key newkey",
        "give the value another key of the same slot",
        3,
        write=True,
        spread=Spread.SLOT,
        keys=(1, 2, 1),
    ),
    _data(
        "renamenx key newkey",
        "the same, if newkey is not there",
        3,
        write=True,
        spread=Spread.SLOT,
        keys=(1, 2, 1),
    ),
    _data(
        "copy key newkey [REPLACE]",
        "copy the value to another key of the same slot",
        3,
        4,
        write=True,
        spread=Spread.SLOT,
        keys=(1, 2, 1),
    ),
    _data(
        "object ENCODING|REFCOUNT|IDLETIME key",
        "how key is kept; the seconds since its last use",
        3,
        keys=(2, 2, 1),
    ),
    _data(
        "dbsize",
        "how many keys there are; some of them may have expired just now",
        1,
        spread=Spread.ALL,
        keys=_NO_KEY,
        combine=Combine.SUM,
    ),
    _data(
        "flushall [SYNC|ASYNC]",
        "remove every key; takes a second for a million of them",
        1,
        2,
        write=True,
        spread=Spread.ALL,
        keys=_NO_KEY,
        combine=Combine.EVERY,
    ),
    _data(
        "keys pattern",
        "all keys that match; nothing else runs meanwhile: scan is for use beside others",
        2,
        spread=Spread.ALL,
        keys=_NO_KEY,
        combine=Combine.LIST,
    ),
    _data(
        "recent [count]",
        "of each shard the keys that were used last, latest first; which does not count as use",
        1,
        2,
        spread=Spread.ALL,
        keys=_NO_KEY,
        combine=Combine.LIST,
    ),
    _data("randomkey", "a key by chance", 1, spread=Spread.SOME, keys=_NO_KEY),
    _data(
        "scan cursor [MATCH pattern] [COUNT number] [TYPE STRING|ZSET]",
        "the next cursor, then keys; begin with 0, end at 0",
        2,
        8,
        spread=Spread.SOME,
        keys=_NO_KEY,
    ),
)

_SORTED_SETS = (
    _write(
        f"zadd key {_IF} [CH] [INCR] score member [score member ...]",
        "add members to a sorted set, or move them to their score",
        4,
        MANY,
    ),
    _read(
        "zrange key start_score end_score [BYSCORE|BYLEX] [REV] [LIMIT offset count] [WITHSCORES]",
        "score:member pairs in score order, ends included; with any option a list, by rank without byscore",
        4,
        10,
    ),
    _read("zrank key member", "the 0-based rank of member, lowest score first", 3),
    _read("zrevrank key member", "the 0-based rank of member, highest score first", 3),
    _write("zrem key member [member ...]", "remove members from a sorted set", 3, MANY),
    _read("zscore key member", "the score of member", 3),
    _read("zmscore key member [member ...]", "the scores of members", 3, MANY),
    _write("zincrby key increment member", "add to the score of member", 4),
    _read("zcard key", "how many members there are", 2),
    _read("zcount key min max", "how many scores are between; ( in front excludes a bound", 4),
    _read("zlexcount key min max", "how many members are between; [a, (a, - and + are bounds", 4),
    _read("zrangebyrank key start stop [WITHSCORES]", "members by rank, lowest first; -1 is the last", 4, 5),
    _read("zrevrange key start stop [WITHSCORES]", "members by rank, highest first", 4, 5),
    _read(
        "zrangebyscore key min max [WITHSCORES] [LIMIT offset count]",
        "members by score; ( in front excludes a bound",
        4,
        8,
    ),
    _read(
        "zrevrangebyscore key max min [WITHSCORES] [LIMIT offset count]",
        "members by score, highest first",
        4,
        8,
    ),
    _read(
        "zrangebylex key min max [LIMIT offset count]",
        "members in their own order, where all have one score",
        4,
        7,
    ),
    _read(
        "zrevrangebylex key max min [LIMIT offset count]",
        "the same from the last",
        4,
        7,
    ),
    _write("zpopmin key [count]", "remove the lowest members, answer them with scores", 2, 3),
    _write("zpopmax key [count]", "remove the highest members, answer them with scores", 2, 3),
    _write("zremrangebyscore key min max", "remove members by score", 4),
    _write("zremrangebyrank key start stop", "remove members by rank", 4),
    _write("zremrangebylex key min max", "remove members by their own order", 4),
    _read(
        "zrandmember key [count [WITHSCORES]]",
        "members by chance, the same one again if count is negative",
        2,
        4,
    ),
    _read(
        "zscan key cursor [MATCH pattern] [COUNT number]",
        "the next cursor, then members and scores; begin with 0, end at 0",
        3,
        7,
    ),
    *_algebra("zunion", "the members of any of the sets", f" {_ALGEBRA}"),
    *_algebra("zinter", "the members of all of the sets", f" {_ALGEBRA}"),
    *_algebra("zdiff", "the members of the first set that are in no other"),
    _data(
        "zintercard numkeys key [key ...] [LIMIT number]",
        "how many members are in all of the sets",
        3,
        MANY,
        spread=Spread.SLOT,
        keys=_NO_KEY,
        numkeys=1,
    ),
)


def _router(
    name: str, arguments: str, summary: str, *, last: int = 0, first_key: int = 0, admin: bool = False
) -> Command:
    """``[...]`` are optional arguments, ``last`` the most tokens where these say nothing of it."""
    words = arguments.split()
    least = 1 + len(re.sub(r"\[.*\]", "", arguments).split())
    usage = f"{name} {arguments}".rstrip()
    most = last or 1 + len(words)
    return Command(
        *(name, least, most, False, Spread.ROUTER, usage, summary), first_key=first_key, admin=admin
    )


_ROWS = (
    *_STRINGS,
    *_ANY_KEYS,
    *_SORTED_SETS,
    _router("ping", "[message]", "PONG, or message"),
    _router("echo", "message", "message"),
    _router("hello", "[protocol [AUTH user password] [SETNAME name]]", "who the server is"),
    _router("quit", "", "OK, then the connection is closed"),
    _router("select", "index", "OK for 0, the only database"),
    _router("auth", "[user] password", "name oneself; without users there is nothing to gain"),
    _router("client", "ID|LIST|INFO|KILL|SETNAME|GETNAME [...]", "connections of all routers", last=MANY),
    _router("command", "[LIST|COUNT|INFO|DOCS|GETKEYS] [...]", "the commands that there are", last=MANY),
    _router("info", "[section ...]", "the server in numbers", last=MANY),
    _router("config", "GET|SET pattern|name [value] [...]", "the server's options", last=MANY, admin=True),
    _router(
        "memory",
        "STATS|USAGE [key] [SAMPLES number]",
        "what data and processes take, or one key, in bytes",
        last=5,
    ),
    _router("time", "", "seconds since 1970, and microseconds"),
    _router("where", "key", "the slot and the shard of key, and whether it is up", first_key=1),
    _router("slots", "", "which shard owns which slots"),
    _router("multi", "", "queue the requests that follow, for exec"),
    _router("exec", "", "run what was queued, all at once, if no watched key has changed"),
    _router("discard", "", "forget what was queued"),
    Command(
        *("watch", 2, MAX_TOKENS, False, Spread.ROUTER, "watch key [key ...]"),
        "have exec do nothing if one of these keys changes; they must have one slot",
        last_key=-1,
    ),
    _router("unwatch", "", "watch no key any longer"),
    *(
        Command(
            *(f"bzpop{end}", 3, MANY, True, Spread.ROUTER, f"bzpop{end} key [key ...] seconds"),
            f"wait until one of these keys, of one slot, has a member, take the {most}; 0 seconds: for ever",
            last_key=-2,
        )
        for end, most in (("min", "lowest"), ("max", "highest"))
    ),
    _all("stats", Combine.ROWS, "one JSON object per shard", process=True),
    _all("sync", Combine.EVERY, "wait until all that this connection wrote is on the disk", process=True),
    _all("rewrite", Combine.EVERY, "have every shard's log rewritten, one after the other", process=True),
    _all("digest", Combine.ROWS, "one JSON object per shard: keys, and a digest of all data", process=True),
)

COMMANDS: dict[str, Command] = {row.name: row for row in _ROWS}

# What a parser looks up first: the two spellings that clients use need no case folding.
_SPELLINGS: dict[bytes, Command] = {
    spelling: row for row in _ROWS for spelling in (row.name.encode(), row.name.upper().encode())
}
_LONGEST = max(len(row.name) for row in _ROWS)


def lookup(name: bytes) -> Command | None:
    """Return the command called ``name`` in any mixture of cases, or None."""
    command = _SPELLINGS.get(name)
    if command is None and len(name) <= _LONGEST:
        command = _SPELLINGS.get(name.lower())
    return command


# The error texts that router and shard share. The first three are frozen, byte for byte.
UNKNOWN_COMMAND = "ERR unknown command"
WRONG_ARITY = "ERR wrong number of arguments"
BAD_SCORE = "ERR score must be a number"
WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
OUT_OF_MEMORY = "OOM command not allowed: the shard is at its limit and the policy is noeviction"
TOO_LARGE = "OOM the value alone is larger than the shard's memory limit"
LOADING = "LOADING the shard is reading its log"
