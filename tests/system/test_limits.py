"""Limits on keys and memory, with and without eviction; limits on clients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from serving import Server, receive_all, receive_replies, replies, request, until

from imds.protocol import ERROR, MISSING, OK


@pytest.mark.parametrize("limit", [("--capacity", "100"), ("--maxmemory", "16kb")])
def test_without_eviction_writes_are_refused_and_reads_go_on(
    server: Callable[..., Server], limit: tuple[str, str]
) -> None:
    one = server().start("--shards", "2", *limit)
    client = one.client()
    kept, refused = [], 0
    for number in range(400):
        status, text = client.execute(b"set", b"key:%d" % number, b"%d" % number)
        if status == OK:
            kept.append(number)
        else:
            assert text.startswith(b"OOM ")
            refused += 1
    assert refused >= 100
    if limit[0] == "--capacity":
        assert len(kept) == 100, "both shards' shares together are the limit"
    for number in kept:
        assert client.get(b"key:%d" % number) == b"%d" % number
    assert client.set(b"key:%d" % kept[0], b"x"), "what takes no more room is accepted"
    added = [client.execute(b"zadd", b"set:%d" % number, b"1", b"member")[1] for number in range(50)]
    assert any(text.startswith(b"OOM ") for text in added), "one rule for both kinds"
    for number in kept:
        assert client.delete(b"key:%d" % number)
    assert client.set(b"new", b"room again")
    assert sum(row["evictions"] for row in one.stats()) == 0
    one.stop()
    one.start("--shards", "2", *limit)
    assert one.client().get(b"new") == b"room again"
    one.stop()


@pytest.mark.parametrize("limit", [("--capacity", "50"), ("--maxmemory", "10kb")])
def test_what_was_evicted_stays_gone_after_a_restart(
    server: Callable[..., Server], limit: tuple[str, str]
) -> None:
    one = server().start("--shards", "2", *limit, "--maxmemory-policy", "allkeys-lru")
    client = one.client()
    count = 300
    client.zadd(b"favourite", 1, b"member")
    for number in range(count):
        assert client.set(b"key:%d" % number, b"%d" % number)
        assert client.zrank(b"favourite", b"member") == 0, "what is used all the time is not evicted"
    present = {number for number in range(count) if client.get(b"key:%d" % number)}
    rows = one.stats()
    assert sum(row["keys"] for row in rows) == len(present) + 1 < count - 100
    assert sum(row["evictions"] for row in rows) == count - len(present)
    assert count - 1 in present, "the newest is there"
    assert 0 not in present
    one.kill()

    one.start("--shards", "2")  # without a limit that could evict them anew
    assert f" {len(present) + 1} keys loaded" in one.ready_line
    client = one.client()
    assert {number for number in range(count) if client.get(b"key:%d" % number)} == present
    assert client.zrange(b"favourite") == [(b"member", 1.0)]
    one.stop()

    one.start("--shards", "2", "--capacity", "10", "--maxmemory-policy", "allkeys-lru")
    assert sum(row["keys"] for row in one.stats()) <= 10, "a lower limit holds from the start"
    one.kill()
    one.start("--shards", "2")
    assert sum(row["keys"] for row in one.stats()) <= 10
    one.stop()


def test_a_client_too_many_is_told_so(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "1", "--max-clients", "3")
    admitted = [one.connect() for _ in range(3)]
    for sock in admitted:
        sock.sendall(request(b"get", b"x"))
        assert replies(sock.recv(100)) == [(MISSING, b"")]
    late = one.connect()
    late.sendall(request(b"get", b"x") * 3)
    assert replies(receive_all(late)) == [(ERROR, b"BUSY the limit is 3 clients")]
    admitted.pop().close()

    def served() -> bool:
        sock = one.connect()
        sock.sendall(request(b"set", b"x", b"y"))
        answered = receive_replies(sock, 1)
        sock.close()
        return answered == [(OK, b"OK")]

    until("a place is free again", served)
    one.stop()
