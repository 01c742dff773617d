"""Clients that wait for something to take, over shards that are dicts."""

from __future__ import annotations

import time

import pytest
from fleet import Fleet

from imds.protocol import encode_request

OK = b"OK"
ARITY = "ERR wrong number of arguments"
CROSS_SLOT = "CROSSSLOT Keys in request don't hash to the same slot"


def test_at_once(fleet: Fleet) -> None:
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"zadd", key, b"2", b"b"], [b"zadd", key, b"1", b"a"], [b"zadd", key, b"3", b"c"])
    assert client.ask([b"bzpopmin", key, b"0"], [b"bzpopmax", key, b"1.5"], "ping") == [
        *([key, b"a", b"1.0"], [key, b"c", b"3.0"], b"PONG")
    ]


def test_wrong_ones(fleet: Fleet) -> None:
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"set", key, b"1"])
    assert client.ask("bzpopmin k", "bzpopmin k x", "bzpopmin k nan", "bzpopmin k inf", "bzpopmin k -1") == [
        ARITY,
        *("ERR timeout is not a float or out of range",) * 3,
        "ERR timeout is negative",
    ]
    assert client.ask("bzpopmin a b 0", [b"bzpopmin", key, b"0"], "ping") == [
        *(CROSS_SLOT, "WRONGTYPE Operation against a key holding the wrong kind of value", b"PONG")
    ]


def test_later(fleet: Fleet) -> None:
    """What is behind it waits; other clients, and the link, go on."""
    client, other, key = fleet.connect(), fleet.connect(), fleet.key(1)
    assert client.ask("ping", [b"bzpopmin", key, b"0"], [b"set", key, b"behind"], "ping") == [b"PONG"]
    assert client.client.held > 0
    assert other.ask([b"get", key], "ping", [b"zadd", key, b"1", b"m"]) == [None, b"PONG", OK]
    assert client.replies() == [[key, b"m", b"1.0"], OK, b"PONG"]
    assert other.ask([b"get", key]) == [b"behind"]


def test_first_come_first_served(fleet: Fleet) -> None:
    key, other = fleet.key(1), fleet.connect()
    clients = [fleet.connect() for _ in range(5)]
    for client in clients:
        assert client.ask([b"bzpopmax", key, b"0"]) == []
    other.ask(*[[b"zadd", key, b"%d" % number, b"m%d" % number] for number in range(3)])
    assert [client.replies() for client in clients] == [
        *([[key, b"m2", b"2.0"]], [[key, b"m1", b"1.0"]], [[key, b"m0", b"0.0"]], [], [])
    ]
    assert other.ask([b"bzpopmin", key, b"0"]) == []
    for number, client in enumerate([*clients[3:], other]):
        fleet.connect().ask([b"zadd", key, b"1", b"x%d" % number])
        assert client.replies() == [[key, b"x%d" % number, b"1.0"]]


def test_time_is_over(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"bzpopmin", key, b"5"], "ping")
    assert fleet.requests.busy
    for seconds, expected in ((4.9, []), (5.1, [None, b"PONG"])):
        monkeypatch.setattr("time.monotonic", lambda seconds=seconds: now + seconds)
        fleet.requests.on_time()
        fleet.serve()
        assert client.replies() == expected
    assert not fleet.shards[1].waiting
    assert not fleet.requests.busy


def test_what_was_given_when_time_was_over_arrives(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"bzpopmin", key, b"5"])
    fleet.connect().send([b"zadd", key, b"1", b"m"])
    there = fleet.shards[1].serve(fleet.sent(1))
    later = time.monotonic() + 6
    monkeypatch.setattr("time.monotonic", lambda: later)
    fleet.requests.on_time()
    fleet.merge(1, there)
    assert client.replies() == [[key, b"m", b"1.0"]]
    fleet.serve()
    assert client.ask("ping") == [b"PONG"]


@pytest.mark.parametrize("ends", ["leave", "end"])
def test_a_client_that_goes_takes_nothing_along(fleet: Fleet, ends: str) -> None:
    """Gone before the shard has given, and after: what it was given is there again."""
    key, other = fleet.key(1), fleet.connect()
    for given in (False, True):
        client = fleet.connect()
        client.ask([b"bzpopmin", key, b"0"], "ping")
        there = b""
        if given:
            other.send([b"zadd", key, b"1", b"m"])
            there = fleet.shards[1].serve(fleet.sent(1))
        getattr(client, ends)()
        fleet.merge(1, there)
        fleet.serve()
        assert not fleet.shards[1].waiting
        assert other.replies() == [OK] * given
        if ends == "end":
            assert client.replies() == [None, b"PONG"]
    assert other.ask([b"bzpopmin", key, b"0"]) == [[key, b"m", b"1.0"]]


def test_a_shard_that_dies_while_clients_wait(fleet: Fleet) -> None:
    key, clients = fleet.key(1), [fleet.connect() for _ in range(3)]
    for client in clients:
        assert client.ask([b"bzpopmin", key, b"0"]) == []
    fleet.kill(1)
    fleet.connect().ask("ping")
    assert [client.replies() for client in clients] == [[], [], []]
    fleet.revive(1)
    fleet.serve()
    other = fleet.connect()
    other.ask([b"zadd", key, b"1", b"a"], [b"zadd", key, b"2", b"b"])
    assert [client.replies() for client in clients] == [[[key, b"a", b"1.0"]], [[key, b"b", b"2.0"]], []]


def test_a_shard_that_dies_before_it_answers(fleet: Fleet) -> None:
    client, key = fleet.connect(), fleet.key(1)
    for sent, code in ((True, "UNKNOWN"), (False, "RETRY")):
        client.send([b"bzpopmin", key, b"0"], "ping")
        fleet.kill(1, sent=sent)
        found = client.replies()
        assert (found[0].split()[0], found[1]) == (code, b"PONG")
        assert client.ask([b"bzpopmin", key, b"0"])[0].split()[0] == "SHARDDOWN"
        fleet.revive(1)


def test_many_on_a_dead_shard_in_one_piece(fleet: Fleet) -> None:
    client, key = fleet.connect(), fleet.key(1)
    fleet.kill(1)
    found = client.ask(*[[b"bzpopmin", key, b"0"]] * 2000)
    assert found == ["SHARDDOWN shard 1 cannot be reached: a test"] * 2000
    fleet.revive(1)


def test_a_shard_that_is_still_loading_is_asked_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"bzpopmin", key, b"0"])
    fleet.kill(1)
    fleet.revive(1)
    fleet.kill(1)  # before it has answered
    assert client.replies() == [], "it was told to wait once, and is not bothered"
    fleet.revive(1)
    later = time.monotonic() + 1
    monkeypatch.setattr("time.monotonic", lambda: later)
    fleet.requests.on_time()
    fleet.serve()
    assert fleet.shards[1].waiting
    assert fleet.connect().ask([b"zadd", key, b"1", b"m"]) == [OK]
    assert client.replies() == [[key, b"m", b"1.0"]]


def test_nobody_waits_when_the_router_stops(fleet: Fleet) -> None:
    client, key = fleet.connect(), fleet.key(1)
    client.ask([b"bzpopmin", key, b"0"], [b"bzpopmin", key, b"0"], "ping")
    fleet.requests.drain()
    fleet.serve()
    assert client.replies() == [None, None, b"PONG"]


def test_what_a_shard_may_not_tell(fleet: Fleet) -> None:
    for words in ([b"popped"], [b"popped", b"x", b"k", b"m", b"1"], [b"other", b"1", b"k", b"m", b"1"]):
        assert not fleet.requests.on_notice(1, encode_request(words))
    assert not fleet.requests.on_notice(1, encode_request([b"popped", b"1", b"k", b"m", b"1"]) + b"x")
    assert not fleet.requests.on_notice(1, b"\0\0\0\5\0\0\0\1")
    key = fleet.key(1)
    assert fleet.requests.on_notice(1, encode_request([b"popped", b"99", key, b"m", b"1.0"]))
    fleet.serve()
    assert fleet.shards[1].data == {key: {b"m": 1.0}}, "given to nobody: it is put back"
