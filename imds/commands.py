"""THE table of commands: the one truth for arity, routing, help and documentation.

To add a command, add its row here and its method in ``shard/store.py`` (and its compiled twin);
nothing else needs to know its name. The router reads ``first_key``, ``write``, ``spread``, ``combine`` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Combine(Enum):
    """What the router makes of the shards' replies to one request."""

    ROWS = "a list with one JSON object for each shard, dead or alive"
    EVERY = "OK if every shard says OK, otherwise an error that names the shards that do not"


class Spread(Enum):
    """To whom the router gives a request."""

    KEY = "the shard that owns its key"
    ALL = "every shard; the router gathers the replies"


@dataclass(frozen=True, slots=True)
class Command:
    """One command. Token counts include the name itself."""

    name: str
    min_tokens: int
    max_tokens: int
    write: bool
    spread: Spread
    usage: str
    summary: str
    first_key: int = 1
    combine: Combine | None = None  # of those that go to every shard

    def arity_ok(self, ntokens: int) -> bool:
        """Whether a request of ``ntokens`` tokens, name included, may be this command."""
        return self.min_tokens <= ntokens <= self.max_tokens


def _all(name: str, combine: Combine, summary: str) -> Command:
    return Command(name, 1, 1, False, Spread.ALL, name, summary, combine=combine)


def _key(name: str, arguments: str, summary: str, *, write: bool = False) -> Command:
    count = 1 + len(arguments.split())
    return Command(name, count, count, write, Spread.KEY, f"{name} {arguments}", summary)


_ROWS = (
    _key("get", "key", "the string that key holds"),
    _key("set", "key value", "make key hold a string, whatever it held before", write=True),
    _key("del", "key", "remove key, a string or a sorted set", write=True),
    _key("zadd", "key score member", "add member to a sorted set, or move it to score", write=True),
    _key("zrange", "key start_score end_score", "score:member pairs in score order, ends included"),
    _key("zrank", "key member", "the 0-based rank of member, lowest score first"),
    _key("zrem", "key member", "remove member from a sorted set", write=True),
    _all("stats", Combine.ROWS, "one JSON object per shard"),
    _all("sync", Combine.EVERY, "wait until all that this connection wrote is on the disk"),
    _all("rewrite", Combine.EVERY, "have every shard's log rewritten, one after the other"),
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
