"""The table of commands: names, arity, help, and the texts that are frozen."""

from dataclasses import replace
from pathlib import Path

import pytest

from imds.commands import BAD_SCORE, COMMANDS, UNKNOWN_COMMAND, WRONG_ARITY, Spread, lookup
from imds.shard.store import HOT

FROZEN = {
    "get": ("get key", 2, False),
    "set": ("set key value", 3, True),
    "del": ("del key", 2, True),
    "zadd": ("zadd key score member", 4, True),
    "zrange": ("zrange key start_score end_score", 4, False),
    "zrank": ("zrank key member", 3, False),
    "zrem": ("zrem key member", 3, True),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_commands(name):
    """Each keeps its first form; its row may allow more."""
    usage, count, write = FROZEN[name]
    command = COMMANDS[name]
    words = command.usage.split()
    assert [word for word in usage.split() if word in words] == usage.split()
    assert command.write is write
    assert command.spread is (Spread.KEYS if name == "del" else Spread.KEY)
    assert command.first_key == 1
    assert command.min_tokens == count
    assert command.arity_ok(count)
    assert HOT[name] == count


def test_frozen_error_texts():
    assert UNKNOWN_COMMAND == "ERR unknown command"
    assert WRONG_ARITY == "ERR wrong number of arguments"
    assert BAD_SCORE == "ERR score must be a number"


@pytest.mark.parametrize("name", COMMANDS)
def test_lookup_in_any_case(name):
    mixed = "".join(c.upper() if i % 2 else c for i, c in enumerate(name))
    for spelling in (name, name.upper(), name.title(), mixed):
        assert lookup(spelling.encode()) is COMMANDS[name]


@pytest.mark.parametrize(
    "name", [b"", b"ge", b"gett", b"get ", b" get", b"get\0", b"\xff\xfe", b"x" * 10_000]
)
def test_lookup_of_what_is_no_command(name):
    assert lookup(name) is None


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_rows_are_whole(command):
    assert COMMANDS[command.name] is command
    assert command.name == command.name.lower()
    assert command.usage.split()[0] == command.name
    assert command.summary
    assert command.summary[-1] != "."
    assert 1 <= command.min_tokens <= command.max_tokens
    if command.spread in (Spread.KEY, Spread.KEYS):
        assert 1 <= command.first_key < command.min_tokens
    if command.spread is Spread.KEYS:
        assert command.last_key == -1
        assert command.min_tokens == command.first_key + command.key_step == command.single()
    assert (command.combine is not None) == (command.spread in (Spread.KEYS, Spread.ALL))
    assert not (command.in_store and command.spread is Spread.ROUTER)


def row(**fields):
    return replace(COMMANDS["get"], **{"min_tokens": 2, "max_tokens": 99, **fields})


@pytest.mark.parametrize(
    ("command", "tokens", "positions"),
    [
        (row(), "get k v", [1]),
        (row(first_key=0, last_key=0), "ping k", []),
        (row(last_key=-1), "mget a b c", [1, 2, 3]),
        (row(last_key=-1, key_step=2), "mset a 1 b 2", [1, 3]),
        (row(last_key=-2), "bzpopmin a b 0", [1, 2]),
        (row(last_key=2), "rename a b c", [1, 2]),
        (row(last_key=2), "rename a", [1]),
        (row(numkeys=2), "zunionstore d 2 a b weights 1 2", [1, 3, 4]),
        (row(numkeys=2), "zunionstore d 3 a b", [1]),
        (row(numkeys=2), "zunionstore d -1 a b", [1]),
        (row(numkeys=2), "zunionstore d 0 a b", [1]),
        (row(numkeys=2), "zunionstore d 99999999999999999999 a b", [1]),
        (row(first_key=0, last_key=0, numkeys=1), "zdiff 2 a b withscores", [2, 3]),
        (row(first_key=0, last_key=0, numkeys=1), "zdiff \xb2 a b", []),
    ],
)
def test_key_positions(command, tokens, positions):
    assert command.key_positions(tokens.encode("latin-1").split()) == positions


def test_arity_of_pairs():
    pairs = row(min_tokens=3, last_key=-1, key_step=2)
    assert [n for n in range(9) if pairs.arity_ok(n)] == [3, 5, 7]
    assert pairs.single() == 3
    assert row(last_key=-1).single() == 2


def test_the_readme_has_each_command_on_data():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for row in COMMANDS.values():
        if row.in_store:
            usage = row.usage.replace("|", "\\|")
            assert f"| `{usage}` | {row.summary} |" in readme
