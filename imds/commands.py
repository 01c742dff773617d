"""THE table of commands: the one truth for arity, routing, help and documentation.

To add a command, add its row here and, if the shards run it, its method in ``shard/store.py`` (and its
compiled twin); nothing else needs to know its name. Commands that the router answers have a handler in
``router/``, those about a shard's process one in ``shard/worker.py``.
"""

from __future__ import annotations

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


def _key(name: str, arguments: str, summary: str, *, write: bool = False) -> Command:
    count = 1 + len(arguments.split())
    return Command(name, count, count, write, Spread.KEY, f"{name} {arguments}", summary)


MANY = MAX_TOKENS


def _router(
    name: str, arguments: str, summary: str, *, last: int = 0, first_key: int = 0, admin: bool = False
) -> Command:
    """``[...]`` are optional arguments, ``last`` the most tokens where these say nothing of it."""
    words = arguments.split()
    least = 1 + sum(1 for word in arguments.partition("[")[0].split())
    usage = f"{name} {arguments}".rstrip()
    most = last or 1 + len(words)
    return Command(
        *(name, least, most, False, Spread.ROUTER, usage, summary), first_key=first_key, admin=admin
    )


_ROWS = (
    _key("get", "key", "the string that key holds"),
    _key("set", "key value", "make key hold a string, whatever it held before", write=True),
    _key("del", "key", "remove key, a string or a sorted set", write=True),
    _key("zadd", "key score member", "add member to a sorted set, or move it to score", write=True),
    _key("zrange", "key start_score end_score", "score:member pairs in score order, ends included"),
    _key("zrank", "key member", "the 0-based rank of member, lowest score first"),
    _key("zrem", "key member", "remove member from a sorted set", write=True),
    _router("ping", "[message]", "PONG, or message"),
    _router("echo", "message", "message"),
    _router("hello", "[protocol [auth user password] [setname name]]", "who the server is"),
    _router("quit", "", "OK, then the connection is closed"),
    _router("select", "index", "OK for 0, the only database"),
    _router("auth", "[user] password", "name oneself; without users there is nothing to gain"),
    _router("client", "id|list|info|kill|setname|getname [...]", "connections of this router", last=MANY),
    _router("command", "[list|count|info|docs|getkeys] [...]", "the commands that there are", last=MANY),
    _router("info", "[section ...]", "the server in numbers", last=MANY),
    _router("config", "get|set pattern|name [value] [...]", "the server's options", last=MANY, admin=True),
    _router("memory", "stats", "what data and processes take, in bytes", last=3),
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
    _all("stats", Combine.ROWS, "one JSON object per shard", process=True),
    _all("sync", Combine.EVERY, "wait until all that this connection wrote is on the disk", process=True),
    _all("rewrite", Combine.EVERY, "have every shard's log rewritten, one after the other", process=True),
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
