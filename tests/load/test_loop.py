"""The load loop against a server that stalls, errs, sends too much or hangs up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from answering import Answer, Server, imds_store, resp_store

from imds.load.loop import SECOND, CommandTally, Load, Tally
from imds.load.workload import Batch, Workload, pool
from imds.protocol import OK, encode_error, encode_response

GET = (("get", 1),)
MIXED = (("get", 1), ("set", 1))


@contextmanager
def loading(
    server: Server,
    workload: Workload,
    *,
    connections: int = 3,
    pipeline: int = 1,
    protocol: str = "imds",
    timeout: float = 10,
    requests: int = 500,
) -> Iterator[Load]:
    load = Load(pool(workload, protocol, pipeline, 0, requests), protocol, timeout)
    try:
        for _ in range(connections):
            load.add(server.dial())
        yield load
    finally:
        load.close()


def stalled_at(number: int, gate: threading.Event) -> Answer:
    """Return an answer that waits for ``gate`` at request ``number``, counted from 0."""
    count = Counter[str]()

    def answer(_tokens: list[bytes]) -> bytes:
        count["all"] += 1
        if count["all"] == number + 1:
            gate.wait(10)
        return encode_response(OK, b"x")

    return answer


@pytest.mark.parametrize(("protocol", "store"), [("imds", imds_store), ("resp", resp_store)])
@pytest.mark.parametrize("pipeline", [1, 7])
def test_every_request_is_counted_once(protocol: str, store: type[Answer], pipeline: int) -> None:
    workload = Workload(MIXED, keys=20)
    with (
        Server(store(), protocol) as server,
        loading(server, workload, pipeline=pipeline, protocol=protocol) as load,
    ):
        tally = load.run(None, 60)
    asked = Counter(tokens[0].decode() for tokens in server.seen)
    assert asked.total() == 60 * pipeline
    assert {name: part.latency.number for name, part in tally.commands.items()} == asked
    # at first there is no key, so there are misses; a miss is told from an answer
    assert 0 < tally.commands["get"].misses < asked["get"]
    assert tally.commands["set"].misses == 0
    assert (tally.all().errors, tally.broken, tally.unsent, tally.texts) == (0, 0, 0, {})
    for part in tally.commands.values():
        part.latency.check()
    assert tally.all().latency.high <= tally.seconds * SECOND


def test_zranges_over_resp() -> None:
    workload = Workload((("zrange", 1),))
    with Server(resp_store(), "resp") as server, loading(server, workload, protocol="resp") as load:
        tally = load.run(None, 20)
    assert server.seen[0][0] == b"ZRANGEBYSCORE"
    assert tally.commands["zrange"].latency.number == 20


def test_errors_and_misses_belong_to_their_command() -> None:
    def answer(tokens: list[bytes]) -> bytes:
        return encode_response(1) if tokens[0] == b"get" else encode_error("OOM full")

    with Server(answer) as server, loading(server, Workload(MIXED), pipeline=5) as load:
        tally = load.run(None, 40)
    asked = Counter(tokens[0].decode() for tokens in server.seen)
    gets, sets = tally.commands["get"], tally.commands["set"]
    assert (gets.misses, gets.errors, sets.misses, sets.errors) == (asked["get"], 0, 0, asked["set"])
    assert tally.texts == {"OOM full": asked["set"]}


def test_a_clean_reply_that_turns_into_an_error_is_seen() -> None:
    turned = threading.Event()

    def answer(_tokens: list[bytes]) -> bytes:
        return encode_error("ERR now") if turned.is_set() else encode_response(OK, b"x")

    with Server(answer) as server, loading(server, Workload(GET), connections=1, requests=2) as load:
        assert load.run(None, 10).all().errors == 0
        turned.set()
        assert load.run(None, 10).all().errors == 10


def test_large_values_both_ways() -> None:
    """Megabytes in one batch: the socket takes a part at a time, and so do we."""
    workload = Workload(MIXED, keys=4, value_size=1 << 20)
    with Server(imds_store()) as server, loading(server, workload, pipeline=6, requests=12) as load:
        tally = load.run(None, 6)
    assert tally.all().latency.number == 36
    assert all(len(tokens[2]) == 1 << 20 for tokens in server.seen if tokens[0] == b"set")


def test_time_ends_a_closed_loop() -> None:
    with Server(imds_store()) as server, loading(server, Workload(GET)) as load:
        tally = load.run(0.05)
    assert tally.seconds >= 0.05
    assert tally.all().latency.number == len(server.seen) >= 3


def sleeping_at_first(seconds: float) -> Answer:
    """Return an answer that takes ``seconds`` for the first request."""
    count = Counter[str]()

    def answer(_tokens: list[bytes]) -> bytes:
        count["all"] += 1
        if count["all"] == 1:
            time.sleep(seconds)
        return encode_response(OK, b"x")

    return answer


def test_closed_loop_times_from_the_send() -> None:
    with Server(sleeping_at_first(0.2)) as server, loading(server, Workload(GET), connections=1) as load:
        tally = load.run(None, 10)
    assert tally.all().latency.high >= 0.2 * SECOND
    assert tally.all().latency.total <= tally.seconds * SECOND  # they ran one after the other


def test_open_loop_shows_a_stall_in_every_request_that_was_due() -> None:
    """Request n is due n x 10 ms after the start; the server answers nothing in the first 0.3 s."""
    with Server(sleeping_at_first(0.3)) as server, loading(server, Workload(GET), connections=1) as load:
        tally = load.run(None, 10, gap=0.01 * SECOND)
    latency = tally.all().latency
    assert latency.number == len(server.seen) == 10
    assert latency.low >= (0.3 - 9 * 0.01) * SECOND
    assert latency.high >= 0.3 * SECOND
    assert tally.delay.high >= (0.3 - 0.01) * SECOND  # the second one waited for its connection


def test_open_loop_counts_what_it_could_not_send() -> None:
    gate = threading.Event()
    workload = Workload(GET)
    with Server(stalled_at(3, gate)) as server:
        with loading(server, workload, connections=1, pipeline=2, timeout=0.2) as load:
            tally = load.run(None, 20, gap=0.001 * SECOND)
        gate.set()
    answered = 3 // 2
    assert tally.broken == 1
    assert tally.unsent == (20 - answered - 1) * 2
    assert tally.all().latency.number == answered * 2 + tally.unsent
    assert tally.all().latency.high >= 0.15 * SECOND
    assert "no reply for 0.2 s" in tally.texts


def test_open_loop_keeps_the_rate() -> None:
    """Never faster than asked: the last of 20 requests is due 19 gaps after the start."""
    with Server(imds_store()) as server, loading(server, Workload(GET)) as load:
        tally = load.run(None, 20, gap=0.005 * SECOND)
    assert len(server.seen) == 20
    assert tally.seconds >= 0.095


def test_connections_take_turns() -> None:
    with Server(imds_store()) as server, loading(server, Workload(GET), connections=4) as load:
        for _ in range(4):
            load.run(None, 1)
        assert all(connection.since for connection in load._idle)


def test_a_server_that_never_answers() -> None:
    gate = threading.Event()
    with Server(stalled_at(0, gate)) as server:
        with loading(server, Workload(GET), connections=1, timeout=0.1) as load:
            tally = load.run(30)
        gate.set()
    assert (tally.broken, tally.all().latency.number) == (1, 0)
    assert "no reply for 0.1 s" in tally.texts


def test_a_server_that_hangs_up() -> None:
    with Server(lambda _tokens: None) as server, loading(server, Workload(GET)) as load:
        tally = load.run(30)
    assert (tally.broken, tally.all().latency.number) == (3, 0)
    assert list(tally.texts) == ["connection closed by the server"] or "reset" in " ".join(tally.texts)


def test_one_lost_connection_does_not_stop_the_others() -> None:
    count = Counter[str]()
    store = imds_store()

    def answer(tokens: list[bytes]) -> bytes | None:
        count["all"] += 1
        return None if count["all"] == 5 else store(tokens)

    with Server(answer) as server, loading(server, Workload(GET)) as load:
        tally = load.run(None, 30)
    assert (tally.broken, tally.all().latency.number) == (1, 29)


def test_more_replies_than_requests_are_noticed() -> None:
    with (
        Server(lambda _tokens: encode_response(OK, b"x") * 2) as server,
        loading(server, Workload(GET), connections=1) as load,
    ):
        tally = load.run(None, 10)
    assert tally.broken == 1
    assert tally.texts == {"more replies than requests": 1}


def test_garbage_is_noticed() -> None:
    with Server(lambda _tokens: b"-ERR what?\r\n") as server, loading(server, Workload(GET)) as load:
        tally = load.run(None, 10)
    assert tally.broken == 3
    assert "no imds reply" in next(iter(tally.texts))


def test_stop_before_and_while_running() -> None:
    with Server(imds_store()) as server, loading(server, Workload(GET)) as load:
        timer = threading.Timer(0.05, load.stop)
        timer.start()
        tally = load.run(60)
        timer.join()
        assert 0 < tally.all().latency.number <= len(server.seen)
        assert load.run(60).all().latency.number == 0


def test_tallies_add_up() -> None:
    left, right = Tally(seconds=2, busy=0.5, broken=1), Tally(seconds=3, busy=0.25, unsent=4)
    left.commands["get"] = CommandTally(errors=1)
    right.commands["get"] = CommandTally(errors=2, misses=3)
    right.commands["set"] = CommandTally()
    right.commands["set"].latency.record(5)
    for text in "abcdefg":
        left.complain(text)
        right.complain(text)
    left.merge(right)
    assert (left.seconds, left.busy, left.broken, left.unsent) == (3, 0.5, 1, 4)
    assert (left.commands["get"].errors, left.commands["get"].misses) == (3, 3)
    assert left.all().latency.number == 1
    assert left.texts == dict.fromkeys("abcde", 2)


def test_batches_know_their_commands() -> None:
    batch = Batch(b"", ("get", "set", "get"))
    assert batch.counts == (("get", 2), ("set", 1))
