"""The table of commands: names, arity, help, and the texts that are frozen."""

import pytest

from imds.commands import BAD_SCORE, COMMANDS, UNKNOWN_COMMAND, WRONG_ARITY, Spread, lookup

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
    usage, count, write = FROZEN[name]
    command = COMMANDS[name]
    assert command.usage == usage
    assert command.write is write
    assert command.spread is Spread.KEY
    assert command.first_key == 1
    assert [n for n in range(9) if command.arity_ok(n)] == [count]


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
    if command.spread is Spread.KEY:
        assert 1 <= command.first_key < command.min_tokens
