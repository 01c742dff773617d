"""Connections, transactions, waiting and options of a real server, in its own processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from serving import Server, receive_replies, request, until

from imds.config import MAX_ROUTERS
from imds.protocol import ERROR, LIST, MISSING, OK, decode_list

KILLED = "was killed by SIGKILL"


class Talk:
    """A plain connection, asked word by word."""

    def __init__(self, server: Server) -> None:
        self.sock: socket.socket = server.connect()

    def __call__(self, *requests: str) -> Any:
        """Ask each; return the last reply: bytes, None, a list, or an error's text as str."""
        self.send(*requests)
        return self.replies(len(requests))[-1]

    def send(self, *requests: str) -> None:
        """Ask each, and wait for nothing."""
        self.sock.sendall(b"".join(request(*line.encode().split()) for line in requests))

    def replies(self, count: int) -> list[Any]:
        """Return the next replies, of which there must be so many."""
        found = [self._value(*reply) for reply in receive_replies(self.sock, count)]
        assert len(found) == count, found
        return found

    @staticmethod
    def _value(status: int, payload: bytes) -> Any:
        if status == LIST:
            return decode_list(payload)
        return {OK: payload, MISSING: None, ERROR: payload.decode(errors="replace")}[status]

    def fields(self, line: str) -> dict[bytes, bytes]:
        """Ask for a list of names and values."""
        found = self(line)
        return dict(zip(found[::2], found[1::2], strict=True))

    def wait_blocked(self, clients: int) -> None:
        """Wait until so many clients of this router wait."""
        until(f"{clients} wait", lambda: self("client list").count(b" flags=b ") == clients)


def test_small_talk(shared: Server) -> None:
    talk = Talk(shared)
    assert talk("ping") == b"PONG"
    assert talk.fields("hello")[b"shards"] == b"4"
    number = int(talk("client id"))
    assert f"id={number} " in talk("client list").decode()
    assert talk("select 1") == "ERR DB index is out of range"
    info = talk("info server memory").decode()
    assert "shards:4\r\n" in info
    assert "# Memory\r\n" in info
    assert "# Stats" not in info
    assert talk.fields("where some-key")[b"state"] == b"up"
    assert len(talk("slots")) == 4
    assert int(talk.fields("memory stats")[b"shards.rss"]) > 1 << 20
    assert talk("set some-key value", "memory usage some-key") == talk("memory usage some-key samples 5")
    assert int(talk("memory usage some-key")) > len("some-keyvalue")
    assert talk("memory usage no-key") is None
    assert f"tcp_port:{shared.port}\r\n" in info
    other = Talk(shared)
    assert other(f"client kill id {number}") == b"1"
    assert talk.sock.recv(1) == b""
    assert other("quit") == b"OK"
    assert other.sock.recv(1) == b""


def test_counters_lose_no_update(shared: Server) -> None:
    """Clients that watch, read, and write what they read plus one: every one that is carried out counts."""

    def count(times: int) -> None:
        talk = Talk(shared)
        for _ in range(times):
            done = None
            while done is None:
                value = int(talk("watch {counter}a", "get {counter}a") or 0) + 1
                done = talk("multi", f"set {{counter}}a {value}", f"set {{counter}}b {value}", "exec")

    threads = [threading.Thread(target=count, args=(60,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Talk(shared)("get {counter}a") == Talk(shared)("get {counter}b") == b"240"


def test_a_shard_killed_again_and_again_carries_out_transactions_whole_or_not(
    server: Callable[..., Server],
) -> None:
    one = server().start("--shards", "2")
    one.expect(rf"shard 0 {KILLED}; restarting")
    key = next(one.keys_of(0)).decode()
    talk, dice = Talk(one), random.Random(1)
    for round_ in range(3):
        shard, last = one.shard(0), dice.randrange(20, 200)
        for number in range(last + 1):
            value = f"{round_}-{number}"
            answer = talk("multi", *[f"set {{{key}}}{part} {value}" for part in "abc"], "exec")
            assert answer == [b"\0\0\0\0OK"] * 3
        talk.send("multi", *[f"set {{{key}}}{part} under-way" for part in "abc"], "exec")
        shard.kill()
        answer = talk.replies(5)[-1]
        code = answer.split()[0] if isinstance(answer, str) else "OK"
        one.wait_up()
        found = {talk(f"get {{{key}}}{part}") for part in "abc"}
        assert found in ({value.encode()}, {b"under-way"}), found
        if code in ("RETRY", "SHARDDOWN"):
            assert found == {value.encode()}
        assert talk(f"watch {{{key}}}a") == b"OK"
        assert talk("multi", f"get {{{key}}}a", "exec") is not None
    one.stop()


def test_who_waits_on_a_killed_shard_waits_on_in_order(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.expect(rf"shard 0 {KILLED}; restarting")
    key, other = next(one.keys_of(0)).decode(), next(one.keys_of(1)).decode()
    first, second, late, talk = (Talk(one) for _ in range(4))
    first.send(f"bzpopmin {key} 0")
    talk.wait_blocked(1)
    second.send(f"bzpopmin {key} 0")
    talk.wait_blocked(2)
    assert talk(f"get {key}") is None  # the shard has got what was sent before: its stream is ordered
    shard = one.shard(0)
    os.kill(shard.pid, signal.SIGSTOP)  # so that it does nothing of what follows
    late.send(f"zadd {key} 1 never", f"bzpopmin {key} 0", f"get {other}")
    talk.wait_blocked(3)
    shard.kill()
    assert [text.split()[0] for text in late.replies(2)] == ["UNKNOWN", "UNKNOWN"]
    assert late.replies(1) == [None], "what is behind an error is answered"
    one.wait_up()
    assert late(f"zadd {key} 1 a", f"zadd {key} 2 b", f"zadd {key} 3 c") == b"OK"
    assert first.replies(1) == [[key.encode(), b"a", b"1.0"]]
    assert second.replies(1) == [[key.encode(), b"b", b"2.0"]]
    assert late(f"bzpopmin {key} 0") == [key.encode(), b"c", b"3.0"]
    one.stop()


def test_a_queue_on_a_shard_killed_again_and_again(server: Callable[..., Server]) -> None:
    """No member reaches two clients, and none is lost but, at a death, one for each client that waits."""
    one = server().start("--shards", "2", "--routers", "2")
    one.expect(rf"shard 0 {KILLED}; restarting")
    key = next(one.keys_of(0)).decode()
    over, kills, takers = threading.Event(), 4, 3
    sure: set[bytes] = set()
    unsure: set[bytes] = set()
    taken: Counter[bytes] = Counter()

    def give(name: str) -> None:
        talk, number = Talk(one), 0
        while not over.is_set():
            number += 1
            member = f"{name}-{number}"
            answer = talk(f"zadd {key} {number} {member}")
            if answer == b"OK":
                sure.add(member.encode())
            elif answer.startswith("UNKNOWN"):
                unsure.add(member.encode())
            else:
                time.sleep(0.005)

    def take() -> None:
        talk = Talk(one)
        while True:
            last = over.is_set()
            answer = talk(f"bzpopmin {key} 0.3")
            if isinstance(answer, list):
                taken[answer[1]] += 1
            elif isinstance(answer, str):
                time.sleep(0.005)
            elif last:
                break

    givers = [threading.Thread(target=give, args=(f"giver{number}",)) for number in range(2)]
    threads = givers + [threading.Thread(target=take) for _ in range(takers)]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        before = sum(taken.values())
        until("members are taken", lambda before=before: sum(taken.values()) > before + 200)
        one.shard(0).kill()
        one.wait_up()
    over.set()
    for thread in threads:
        thread.join()
    assert max(taken.values()) == 1
    assert taken.keys() <= sure | unsure
    assert len(sure - taken.keys()) <= kills * takers
    assert Talk(one)(f"zcard {key}") == b"0"
    one.stop()


def test_options_change_in_every_process_and_for_those_who_start_later(
    server: Callable[..., Server],
) -> None:
    one = server().start("--shards", "2", "--routers", "2")
    one.expect(rf"shard 1 {KILLED}; restarting", rf"router 0 {KILLED}; restarting")
    assert Talk(one)("config set capacity 10 log-level warning appendfsync always") == b"OK"
    assert {row["aof_policy"] for row in one.stats()} == {"always"}

    def both_know() -> bool:
        talks = [Talk(one) for _ in range(8)]
        found = {talk("info server").decode().split("router:")[1][0]: talk for talk in talks}
        return len(found) == 2 and all(
            talk.fields("config get capacity")[b"capacity"] == b"10" for talk in found.values()
        )

    def full(shard: int) -> bool:
        keys = one.keys_of(shard, "full")
        codes = [Talk(one)(f"set {next(keys).decode()} x") for _ in range(6)]
        return codes[:5] == [b"OK"] * 5 and codes[5].startswith("OOM ")

    until("both routers know", both_know)
    assert full(0)
    one.shard(1).kill()
    one.router(0).kill()
    one.wait_up()
    until("both routers know", both_know)
    assert full(1)
    assert {row["aof_policy"] for row in one.stats()} == {"always"}
    one.stop()


def test_every_router_shows_and_closes_the_connections_of_all(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "1", "--routers", "2")
    talks: dict[int, Talk] = {}

    def of_both() -> bool:
        talk = Talk(one)
        talks[int(talk("client id"))] = talk
        return len({number % MAX_ROUTERS for number in talks}) == 2

    until("both routers have connections", of_both)
    own, *others = talks
    asker = talks[own]

    def shown() -> list[int]:
        return [int(line.split()[0][3:]) for line in asker("client list").decode().splitlines()]

    assert shown() == sorted(talks)
    assert f"connected_clients:{len(talks)}\r\n" in asker("info clients").decode()
    for number in others:
        assert asker(f"client list id {number}").decode().count(f"id={number} ") == 1
        assert asker(f"client kill id {number}") == b"1"
        assert talks[number].sock.recv(1) == b""
    assert asker("client kill 127.0.0.1:1") == "ERR No such client"
    assert shown() == [own]
    one.stop()
