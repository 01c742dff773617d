"""Requests of many keys, of one slot, of any shard: over shards that are dicts, and shards that die."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fleet import Connection, Fleet

from imds.commands import COMMANDS, Combine, Command, Spread
from imds.protocol import encode_request

DOWN = "SHARDDOWN shard 1 cannot be reached: a test"


def row(name: str, spread: Spread, **fields: Any) -> Command:
    return replace(COMMANDS["get"], name=name, max_tokens=1000, spread=spread, **fields)


MGET = row("mget", Spread.KEYS, last_key=-1, combine=Combine.LIST)
DEL = row("del", Spread.KEYS, last_key=-1, combine=Combine.SUM, write=True)
EXISTS = row("exists", Spread.SLOT, last_key=-1)
SCAN = row("scan", Spread.SOME, first_key=0, last_key=0)
RANDOM = row("randomkey", Spread.SOME, first_key=0, last_key=0, min_tokens=1)


def give(client: Connection, command: Command, *words: bytes) -> None:
    """Have a client send a request of a command, whatever the table says of it."""
    fleet = client.fleet
    client.client.captive = True
    frame = encode_request([command.name.encode(), *words])
    ((turn, switched, _found, whole),) = fleet.switch.feed(client.client, frame)
    assert whole == frame
    client.client.captive = False
    fleet.requests.take(turn, switched, command, frame)


def ask(client: Connection, command: Command, *words: bytes) -> Any:
    give(client, command, *words)
    client.fleet.serve()
    (reply,) = client.replies()
    return reply


def fill(fleet: Fleet, client: Connection) -> list[bytes]:
    """Set two keys in each shard; return them, shard after shard by turns."""
    keys = [fleet.key(shard, number) for number in range(2) for shard in range(3)]
    client.ask(*[[b"set", key, b"v" + key] for key in keys])
    return keys


def test_keys_of_every_shard(fleet: Fleet) -> None:
    client = fleet.connect()
    keys = fill(fleet, client)
    assert ask(client, MGET, *keys, b"none", keys[0]) == [*(b"v" + key for key in keys), None, b"v" + keys[0]]
    assert ask(client, MGET, keys[0], keys[3]) == [b"v" + keys[0], b"v" + keys[3]], "one shard's: as it is"
    assert ask(client, DEL, keys[0], keys[1], b"none", keys[4]) == b"3"
    assert ask(client, MGET, *keys) == [
        None if key in (keys[0], keys[1], keys[4]) else b"v" + key for key in keys
    ]


def test_what_comes_behind_is_carried_out_behind(fleet: Fleet) -> None:
    client = fleet.connect()
    keys = fill(fleet, client)
    give(client, MGET, *keys)
    client.send([b"set", keys[2], b"new"])
    give(client, MGET, *keys)
    fleet.serve(2, 1, 0)
    before, done, after = client.replies()
    assert before == [b"v" + key for key in keys]
    assert done == b"OK"
    assert after[2] == b"new"


@pytest.mark.parametrize("sent", [False, True])
def test_a_dead_shard_names_its_keys(fleet: Fleet, sent: bool) -> None:
    client = fleet.connect()
    keys = fill(fleet, client)
    theirs = f"(keys {keys[1].decode()}, {keys[4].decode()})"
    for command in (MGET, DEL):
        give(client, command, *keys)
    fleet.kill(1, sent=sent)
    fleet.serve()
    read, written = client.replies()
    assert read.startswith("RETRY ")
    assert written.startswith("UNKNOWN " if sent else "RETRY ")
    assert read.endswith(theirs)
    assert written.endswith(theirs)
    assert ask(client, MGET, *keys) == f"{DOWN} {theirs}"
    assert ask(client, MGET, keys[1], keys[4]) == DOWN, "one shard's: as of a single key"
    assert ask(client, MGET, keys[0], keys[2]) == [None, None], "what lives was deleted"
    fleet.revive(1)
    assert ask(client, MGET, *keys) == [None, b"v" + keys[1], None, None, b"v" + keys[4], None]


def test_keys_of_one_slot(fleet: Fleet) -> None:
    client = fleet.connect()
    client.ask("set {t}1 x", "set {t}2 x")
    assert ask(client, EXISTS, b"{t}1", b"{t}2", b"{t}3") == b"2"
    assert ask(client, EXISTS, b"{t}1", b"{u}2").startswith("CROSSSLOT Keys in request")


def test_a_scan_goes_through_all_shards(fleet: Fleet) -> None:
    client = fleet.connect()
    keys = [*fill(fleet, client), fleet.key(1, 5), fleet.key(1, 6)]
    client.ask(*[[b"set", key, b"x"] for key in keys[-2:]])
    found, cursor = [], b"0"
    for _ in range(20):
        cursor, *more = ask(client, SCAN, cursor)
        found += more
        if cursor == b"0":
            break
    assert cursor == b"0"
    assert sorted(found) == sorted(keys)


@pytest.mark.parametrize(
    "cursor", [b"", b"1", b"x", b":", b"1:", b":0", b"3:0", b"999999999:0", b"-1:0", b"\xb2:0"]
)
def test_cursors_that_no_scan_gave(fleet: Fleet, cursor: bytes) -> None:
    client = fleet.connect()
    assert ask(client, SCAN, cursor) == "ERR invalid cursor"


def test_a_scan_over_a_dead_shard_says_so(fleet: Fleet) -> None:
    client = fleet.connect()
    fleet.kill(1)
    assert ask(client, SCAN, b"0") == [b"1:0"]
    assert ask(client, SCAN, b"1:0") == DOWN


def test_a_random_key_is_one_of_those_there_are(fleet: Fleet) -> None:
    client = fleet.connect()
    assert ask(client, RANDOM) is None
    key = fleet.key(2)
    client.ask([b"set", key, b"x"])
    assert {ask(client, RANDOM) for _ in range(9)} == {key}
    fleet.kill(2)
    assert ask(client, RANDOM) is None
