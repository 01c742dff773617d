"""Many clients with many requests under way: every reply in its place, nobody held up who need not be."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from serving import DEADLINE, Server, converse, receive_replies, replies, request, until

from imds.protocol import ERROR, LIST, MISSING, OK, encode_error, encode_response

WRONG_TYPE = encode_error("WRONGTYPE Operation against a key holding the wrong kind of value")


class Model:
    """What a server with one client answers, for keys that only this client has."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes | dict[bytes, float]] = {}

    def reply(self, name: bytes, key: bytes, *rest: bytes) -> bytes:
        """Carry out one command and return its reply frame."""
        held = self.data.get(key)
        if name == b"set":
            self.data[key] = rest[0]
        elif name == b"del":
            if self.data.pop(key, None) is None:
                return encode_response(MISSING)
        elif name == b"get":
            if isinstance(held, dict):
                return WRONG_TYPE
            return encode_response(MISSING) if held is None else encode_response(OK, held)
        elif isinstance(held, bytes):
            return WRONG_TYPE
        else:
            return self._sorted_set(name, key, held or {}, *rest)
        return encode_response(OK, b"OK")

    def _sorted_set(self, name: bytes, key: bytes, members: dict[bytes, float], *rest: bytes) -> bytes:
        order = sorted((score, member) for member, score in members.items())
        if name == b"zrange":
            found = [b"%a:%b" % pair for pair in order if float(rest[0]) <= pair[0] <= float(rest[1])]
            return encode_response(OK, b",".join(found)) if found else encode_response(MISSING)
        if name == b"zadd":
            self.data[key] = {**members, rest[1]: float(rest[0])}
            return encode_response(OK, b"OK")
        if rest[0] not in members:
            return encode_response(MISSING)
        if name == b"zrank":
            return encode_response(OK, b"%d" % order.index((members[rest[0]], rest[0])))
        del members[rest[0]]
        if not members:
            del self.data[key]
        return encode_response(OK, b"OK")


def conversation(rng: random.Random, prefix: bytes, count: int) -> tuple[bytes, bytes]:
    """Return ``count`` random requests and the replies that they must get."""
    model, asked, answered = Model(), [], []
    keys = [b"%b:%d" % (prefix, number) for number in range(40)]
    for number in range(count):
        key, member, score = rng.choice(keys), b"m%d" % rng.randrange(12), b"%d" % rng.randrange(20)
        tokens = rng.choices(
            [
                (b"set", key, b"value-%d-" % number + rng.randbytes(rng.choice((0, 3, 3, 60, 5000)))),
                (b"get", key),
                (b"del", key),
                (b"zadd", key, score, member),
                (b"zrange", key, score, b"15"),
                (b"zrank", key, member),
                (b"zrem", key, member),
                (b"nonsense", key),
                (b"get",),
            ],
            weights=[6, 12, 3, 8, 3, 4, 2, 1, 1],
        )[0]
        asked.append(request(*tokens))
        if tokens[0] == b"nonsense":
            answered.append(encode_error("ERR unknown command"))
        elif len(tokens) == 1:
            answered.append(encode_error("ERR wrong number of arguments"))
        else:
            answered.append(model.reply(*tokens))
    return b"".join(asked), b"".join(answered)


def split(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Yield ``data`` in random pieces, most of them small, some of them of many requests."""
    position = 0
    while position < len(data):
        size = rng.choice((1, 2, 7, 40, 300, 5000, 100_000))
        yield data[position : position + size]
        position += size


def talk(server: Server, seed: int, count: int = 2500) -> None:
    rng = random.Random(seed)
    asked, answered = conversation(rng, b"client-%d" % seed, count)
    got = converse(server.connect(), split(rng, asked), len(answered))
    assert got == answered or replies(got) == replies(answered)


def test_eight_clients_get_each_reply_in_its_place(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "4")
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(talk, one, seed) for seed in range(8)]:
            done.result()
    assert all(row["keys"] for row in one.stats()), "the keys were to be over all shards"
    one.stop()


def test_two_routers_keep_each_clients_order(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3", "--routers", "2")
    routers = {index: one.router(index) for index in range(2)}
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(talk, one, seed, 500) for seed in range(24)]:
            done.result()
    links = [row["links"] for row in one.stats()]
    assert links == [2, 2, 2]
    # The system spreads connections by their ports: of so many, each router has had some.
    assert all(process.cpu_times().user > 0 for process in routers.values())
    one.stop()


def pour(sock: socket.socket, frame: bytes, most: int = 64 << 20) -> int:
    """Send ``frame`` again and again until nobody takes it any more; return how many bytes were taken."""
    sock.settimeout(0.5)
    sent = 0
    try:
        while sent < most:
            sent += sock.send(frame * 16)
    except TimeoutError:
        pass
    sock.settimeout(DEADLINE)
    assert sent < most, "requests were taken without end"
    return sent


def test_a_client_that_does_not_read_holds_up_nobody(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    router = one.router()
    key, value = b"slow:" + bytes(1000), bytes(range(256)) * 64
    one.client().set(key, value)
    slow, frame = one.connect(), request(b"get", key)
    before = router.memory_info().rss
    asked = pour(slow, frame)
    talk(one, 1, 500)
    grown = router.memory_info().rss - before
    assert grown < 32 << 20, f"the router grew by {grown} bytes"
    count = asked // len(frame)
    assert count > 1000
    for _ in range(count):
        assert receive_replies(slow, 1) == [(OK, value)]
    one.stop()


def test_a_client_that_asks_for_too_much_unread_is_dropped_by_name(server: Callable[..., Server]) -> None:
    """One read of its requests can ask for more than memory holds: that client pays, and the log says so."""
    one = server().start("--shards", "2")
    one.client().set("much:value", bytes(1 << 20))
    greedy = one.connect()
    greedy.sendall(request(b"get", b"much:value") * 280)
    until("it is dropped", lambda: one.logged("WARNING dropped a client that does not read: [0-9]+ bytes"))
    talk(one, 1, 500)
    one.stop()


def test_clients_that_vanish_disturb_nobody(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    reset = struct.pack("ii", 1, 0)  # close sends a reset instead of an end
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(talk, one, 1, 3000)
        asked, _ = conversation(random.Random(9), b"gone", 300)
        for number in range(60):
            sock = one.connect()
            sock.sendall(asked[: len(asked) - number])
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            sock.close()
        others.result()
    talk(one, 2, 500)
    one.stop()


def test_a_stalled_shard_delays_only_its_keys(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3")
    shard, router = one.shard(1), one.router()
    stalled, other = one.keys_of(1), next(one.keys_of(2))
    waiting, lively = one.connect(), one.client()
    lively.set(other, "fine")
    os.kill(shard.pid, signal.SIGSTOP)
    # In one pipeline: the second reply may not overtake the first.
    key = next(stalled)
    waiting.sendall(request(b"set", key, b"1") + request(b"get", other) + request(b"get", key))

    started = time.monotonic()
    rows = one.stats()
    assert time.monotonic() - started < 10
    assert [row["state"] for row in rows] == ["up", "silent", "up"]
    assert lively.get(other) == b"fine"

    # One client after the other pours into the stalled shard, until nobody reads it.
    before = router.memory_info().rss
    frame = request(b"set", next(stalled), b"x" * 16384)
    floods = [one.connect() for _ in range(6)]
    poured = [pour(flood, frame) for flood in floods]
    assert lively.get(other) == b"fine"
    grown = router.memory_info().rss - before
    assert grown < 64 << 20, f"the router grew by {grown} bytes"

    os.kill(shard.pid, signal.SIGCONT)
    assert receive_replies(waiting, 3) == [(OK, b"OK"), (OK, b"fine"), (OK, b"1")]
    for flood, sent in zip(floods, poured, strict=True):
        whole = sent // len(frame)
        assert receive_replies(flood, whole) == [(OK, b"OK")] * whole
    assert one.stats()[1]["state"] == "up"
    one.stop()


def test_a_client_may_ask_for_more_than_fits_any_buffer(server: Callable[..., Server]) -> None:
    """It sends on while replies come back, far more in both directions than sockets and limits hold."""
    one = server().start("--shards", "2")
    value = b"v" * 10_000
    asked = b"".join(request(b"set", b"big:%d" % (n % 50), value) for n in range(1500))
    asked += b"".join(request(b"get", b"big:%d" % (n % 50)) for n in range(1500))
    answered = encode_response(OK, b"OK") * 1500 + encode_response(OK, value) * 1500
    assert converse(one.connect(), [asked], len(answered)) == answered
    one.stop()


def test_an_answer_of_the_router_waits_for_its_turn(server: Callable[..., Server]) -> None:
    """Errors and statistics come from the router, and may not overtake the shards' replies."""
    one = server().start("--shards", "2")
    sock = one.connect()
    sock.sendall(
        request(b"set", b"turn", b"1")
        + request(b"oops")
        + request(b"stats")
        + request(b"get", b"turn")
        + request(b"set")
        + request(b"get", b"turn")
    )
    got = receive_replies(sock, 6)
    assert [status for status, _ in got] == [OK, ERROR, LIST, OK, ERROR, OK]
    assert [got[0][1], got[3][1], got[5][1]] == [b"OK", b"1", b"1"]
    until("statistics count it", lambda: sum(row["ops"] for row in one.stats()) >= 3)
    one.stop()


def test_a_stalled_shard_is_not_asked_again_and_again(server: Callable[..., Server]) -> None:
    """A monitor that asks for hours, or a client that asks often, must not fill the router's memory."""
    one = server().start("--shards", "2")
    shard = one.shard(0)
    before = one.stats()[0]["ops"]
    os.kill(shard.pid, signal.SIGSTOP)
    sock = one.connect()
    for _ in range(3):
        sock.sendall(request(b"stats") * 100)
        assert [status for status, _ in receive_replies(sock, 100)] == [LIST] * 100
    os.kill(shard.pid, signal.SIGCONT)
    one.wait_up()
    assert one.stats()[0]["ops"] - before < 200, "each of the 300 was passed on"
    one.stop()
