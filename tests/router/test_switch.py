"""The rules of the router's switch, one by one, in each variant."""

from __future__ import annotations

import gc
import random
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from switch_model import (
    DOWN,
    FAULTS,
    RETRY,
    UNKNOWN_OUTCOME,
    Envelope,
    Wire,
    error,
    false_envelope,
    in_c_memory,
    request,
    response,
    shard_replies,
    shard_reply,
    slot_map,
)

from imds import protocol
from imds.commands import COMMANDS
from imds.envelope import envelopes, notice
from imds.protocol import split_request
from imds.router import switch as twin
from imds.router.switch import NOTICE


class Bench:
    """A switch with its shards up, each behind a wire that plays them."""

    def __init__(self, switch_class: type[twin.Switch], shards: int = 2, **limits: int) -> None:
        self.switch = switch_class(slot_map(shards), **limits)
        self.wires = [Wire() for _ in range(shards)]
        self.keys: list[bytes] = []  # one key for each shard
        for shard in range(shards):
            self.switch.raise_link(shard)
            self.keys.append(next(key for key in KEYS if slot_map(shards).shard_of(key) == shard))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.switch.check()
        for wire in self.wires:
            wire.close()

    def sent(self, shard: int) -> bytes:
        """Return what the switch has for a shard: all of it."""
        data, left = b"", 1
        while left:
            left = self.switch.flush_link(shard, self.wires[shard].fd)
            while piece := self.wires[shard].take():
                data += piece
        return data

    def replies(self, shard: int) -> bytes:
        """Return what a shard answers to all that the switch has for it."""
        return b"".join(reply for _, reply, _ in shard_replies(shard, self.sent(shard)))

    def serve(self, *shards: int) -> list[Any]:
        """Let shards answer all they have; return the clients that then have output."""
        return [client for shard in shards for client in self.switch.merge(shard, self.replies(shard))[0]]

    def output(self, client: Any) -> bytes:
        """Return all that the switch has for a client."""
        data = b""
        with Wire() as wire:
            left = 1
            while left:
                left = self.switch.flush(client, wire.fd)
                while piece := wire.take():
                    data += piece
        assert not client.out
        return data


KEYS = [b"key:%d" % number for number in range(100)]


@pytest.fixture
def bench(switch_class: type[twin.Switch]) -> Iterator[Bench]:
    with Bench(switch_class) as bench:
        yield bench


def unknown() -> bytes:
    return error("ERR unknown command")


def wrong_arity() -> bytes:
    return error("ERR wrong number of arguments")


def test_requests_at_any_byte(bench: Bench) -> None:
    """Whole, byte by byte, and cut in two anywhere: the same replies in the same order."""
    one, two = bench.keys
    right = [request(b"get", one), request(b"SET", two, b"v" * 300), request(b"zAdd", one, b"1", b"")]
    script = [
        *((frame, shard_reply(shard, frame)) for frame, shard in zip(right, (0, 1, 0), strict=True)),
        (request(b"GETT", one), unknown()),
        (request(b""), unknown()),
        (request(), unknown()),
        (request(b"get"), wrong_arity()),
        (request(b"get", one, two), wrong_arity()),
        (request(b"del", two), shard_reply(1, request(b"del", two))),
    ]
    stream = b"".join(frame for frame, _ in script)
    expected = b"".join(reply for _, reply in script)
    cut_in_two = [[stream[:cut], stream[cut:]] for cut in range(1, len(stream))]
    for pieces in ([stream], [stream[at : at + 1] for at in range(len(stream))], *cut_in_two):
        client = bench.switch.attach(None)
        for piece in pieces:
            assert bench.switch.feed(client, piece) == []
        assert client.inflight > 0
        bench.serve(0, 1)
        assert client.inflight == 0
        assert bench.output(client) == expected
        bench.switch.detach(client)


def test_replies_at_any_byte(bench: Bench) -> None:
    one, two = bench.keys
    frames = [request(b"get", one), request(b"get", two), request(b"set", one, b"1"), request(b"get", one)]
    expected = b"".join(shard_reply(frame == frames[1], frame) for frame in frames)
    for step in (1, 2, 3, 11, 12, 13, 50):
        clients = [bench.switch.attach(number) for number in range(3)]
        for client in clients:
            bench.switch.feed(client, b"".join(frames))
        for shard in (1, 0):
            replies = bench.replies(shard)
            for at in range(0, len(replies), step):
                bench.switch.merge(shard, replies[at : at + step])
                bench.switch.check()
        assert [bench.output(client) for client in clients] == [expected] * 3
        assert [client.inflight for client in clients] == [0] * 3


def test_a_client_of_many_turns(bench: Bench) -> None:
    """Thousands of requests, a turn for each, then turns of thousands: nothing is lost or exchanged."""
    client = bench.switch.attach(None)
    frames = [request(b"get", KEYS[number % 100] + b"/%d" % number) for number in range(3000)]
    owners = slot_map(2).shard_of
    expected = b"".join(shard_reply(owners(key), request(b"get", key)) for key in _keys_of(frames))
    for pieces in (frames, [b"".join(frames)], [b"".join(frames[:1500]), b"".join(frames[1500:])]):
        for piece in pieces:
            bench.switch.feed(client, piece)
        assert client.inflight == 3000
        assert set(bench.serve(1, 0)) == {client}
        assert bench.output(client) == expected
        assert client.inflight == 0


def _keys_of(frames: list[bytes]) -> list[bytes]:
    return [split_request(frame)[0][1] for frame in frames]


def test_a_stalled_shard_delays_only_what_is_behind_it(bench: Bench) -> None:
    one, two = bench.keys
    client, other = bench.switch.attach("client"), bench.switch.attach("other")
    bench.switch.feed(client, request(b"get", one) + request(b"get", two) + request(b"del", one))
    bench.switch.feed(other, request(b"get", one))
    assert set(bench.serve(0)) == {client, other}
    assert bench.output(other) == shard_reply(0, request(b"get", one))
    assert bench.output(client) == shard_reply(0, request(b"get", one))
    assert (client.inflight, other.inflight) == (2, 0)
    bench.switch.feed(client, request(b"nonsense"))
    assert not client.out
    assert bench.serve(1) == [client]
    assert bench.output(client) == (
        shard_reply(1, request(b"get", two)) + shard_reply(0, request(b"del", one)) + unknown()
    )


def test_tags_decide_the_shard(switch_class: type[twin.Switch]) -> None:
    """Every key goes where the slot map says, in each length that the hash treats differently."""
    with Bench(switch_class, shards=4) as bench:
        client = bench.switch.attach(None)
        keys = [b"k" * size for size in range(100)] + [bytes(range(256)) * 3]
        keys += [b"{tag}%d" % number for number in range(5)] + [
            b"a{tag}",
            b"{}tag",
            b"{tag",
            b"tag}",
            b"{{t}}",
        ]
        keys += [b"x{}{tag}", b"}{tag}", b"{" + b"t" * 70 + b"}"]
        for key in keys:
            bench.switch.feed(client, request(b"get", key))
            found = [shard for shard in range(4) if bench.switch.backlog(shard)]
            assert found == [slot_map(4).shard_of(key)], key
            bench.serve(*found)


@pytest.mark.parametrize("limits", [(3, 100), (1 << 20, 64 << 20)])
def test_a_malformed_frame_is_the_last_thing_answered(
    switch_class: type[twin.Switch], limits: tuple[int, int]
) -> None:
    tokens, size = limits
    with Bench(switch_class, max_tokens=tokens, max_request=size) as bench:
        one, good = bench.keys[0], request(b"get", bench.keys[0])
        many = f"ERR protocol error: {tokens + 1} tokens announced, the limit is {tokens}"
        most = f"ERR protocol error: {(1 << 32) - 1} tokens announced, the limit is {tokens}"
        long = f"ERR protocol error: request of {size + 1} bytes or more announced, the limit is {size}"
        huge = f"ERR protocol error: request of {(1 << 32) + 14} bytes or more announced, the limit is {size}"
        cases = [
            (struct.pack(">I", tokens + 1), many),
            (b"\xff" * 4, most),
            (struct.pack(">II", 1, size - 7), long),
            (struct.pack(">II3sI", 2, 3, b"get", 0xFFFFFFFF), huge),
            (struct.pack(">II3sI", 2, 3, b"get", size - 14), long),
        ]
        for bad, text in cases:
            for pieces in ([good + bad + good], [good, bad, good], [bytes([byte]) for byte in good + bad]):
                client = bench.switch.attach(None)
                for piece in pieces:
                    bench.switch.feed(client, piece)
                assert client.closing
                assert client.inflight == 2
                bench.serve(0)
                assert bench.output(client) == shard_reply(0, good) + error(text)
                assert bench.switch.feed(client, good) == []
                assert client.inflight == 0
        if tokens == 3:  # whole frames over a limit, of commands that are known
            for bad, text in ((request(b"zadd", one, b"1", b"m"), many), (request(b"get", b"k" * 86), long)):
                client = bench.switch.attach(None)
                bench.switch.feed(client, good + bad + good)
                bench.serve(0)
                assert bench.output(client) == shard_reply(0, good) + error(text)
        fits = (
            request(b"set", one, b"v" * (size - 22 - len(one))) if size < 1000 else request(*[b""] * tokens)
        )
        client = bench.switch.attach(None)
        bench.switch.feed(client, fits)
        assert not client.closing
        bench.serve(0)
        assert bench.output(client) == (shard_reply(0, fits) if size < 1000 else unknown())


def test_questions_keep_their_place(bench: Bench) -> None:
    client = bench.switch.attach(None)
    get, stats = request(b"get", bench.keys[0]), request(b"STATS")
    questions = bench.switch.feed(client, stats + get + stats)
    assert client.paused
    assert (client.inflight, client.held) == (1, len(get + stats))
    assert bench.switch.feed(client, request(b"x") + stats[:5]) == []
    assert bench.switch.backlog(0) == 0, "a request was looked at before its turn"
    questions += bench.switch.resume(client)
    assert bench.switch.feed(client, stats[5:]) == []
    questions += bench.switch.resume(client)
    assert bench.switch.resume(client) == []
    assert not client.paused
    assert [asked[1:] for asked in questions] == [(client, COMMANDS["stats"], stats)] * 3
    assert (client.inflight, client.held) == (5, 0)
    turns = [asked[0] for asked in questions]
    assert bench.switch.answer(turns[1], response(3, b"second")) is None
    bench.serve(0)
    assert not client.out
    assert bench.switch.answer(turns[0], response(3, b"first")) is client
    assert client.inflight == 1
    first = response(3, b"first") + shard_reply(0, get) + response(3, b"second") + unknown()
    assert bench.output(client) == first
    bench.switch.detach(client)
    assert bench.switch.answer(turns[2], response(3, b"third")) is None
    assert not client.out


def test_every_request_of_a_captive_client_is_a_question(bench: Bench) -> None:
    client = bench.switch.attach(None)
    client.captive = True
    asked = [request(b"GET", bench.keys[0]), request(b"nonsense"), request(b"get"), request()]
    commands = [COMMANDS["get"], None, COMMANDS["get"], None]
    questions = bench.switch.feed(client, b"".join(asked))
    for frame, command in zip(asked, commands, strict=True):
        assert [question[1:] for question in questions] == [(client, command, frame)]
        bench.switch.answer(questions[0][0], response(0, b"QUEUED"))
        questions = bench.switch.resume(client)
    client.captive = False
    assert bench.switch.feed(client, asked[0]) == []
    bench.serve(0)
    assert bench.output(client) == response(0, b"QUEUED") * 4 + shard_reply(0, asked[0])
    client.captive = True
    bench.switch.feed(client, asked[0])
    bench.switch.feed(client, b"\xff" * 8)
    assert not client.closing, "a malformed frame has its turn, too"
    assert bench.switch.resume(client) == []
    assert client.closing


def test_notices(bench: Bench) -> None:
    """What a shard tells unasked, between replies, whole and byte by byte; out of order it is refused."""
    client, get = bench.switch.attach(None), request(b"get", bench.keys[0])
    bench.switch.feed(client, get)
    told = [notice(number, request(b"touched", b"%d" % number)) for number in range(3)]
    stream = told[0] + bench.replies(0) + told[1] + told[2]
    found = []
    for at in range(len(stream)):
        found += bench.switch.merge(0, stream[at : at + 1])[1]
    assert found == [(NOTICE, one[12:]) for one in told]
    assert bench.output(client) == shard_reply(0, get)
    with pytest.raises(twin.LinkError):
        bench.switch.merge(0, told[2])
    assert bench.switch.drop_link(0, DOWN) == ([], [])
    bench.switch.raise_link(0)
    assert bench.switch.merge(0, told[0]) == ([], [(NOTICE, told[0][12:])])


def test_the_routers_own_questions(bench: Bench) -> None:
    client, get = bench.switch.attach(None), request(b"get", bench.keys[0])
    tokens = [object(), None]
    bench.switch.ask(0, request(b"stats"), tokens[0])
    bench.switch.feed(client, get)
    bench.switch.ask(0, request(b"stats"), tokens[1])
    clients, answers = bench.switch.merge(0, bench.replies(0))
    assert clients == [client]
    assert answers == [(token, shard_reply(0, request(b"stats"))) for token in tokens]
    assert answers[0][0] is tokens[0]
    bench.switch.ask(1, request(b"stats"), tokens[0])
    assert bench.switch.drop_link(1, DOWN) == ([], [(tokens[0], False)])
    with pytest.raises(ValueError, match="down"):
        bench.switch.ask(1, request(b"stats"), tokens[0])


def test_what_the_keys_of_a_dead_shard_are_answered(bench: Bench) -> None:
    """Writes that the shard may have seen: UNKNOWN. All else: RETRY. Then SHARDDOWN, until it is back."""
    client, (one, two) = bench.switch.attach(None), bench.keys
    large = request(b"set", one, b"v" * 100_000)
    bench.switch.feed(client, request(b"get", one) + request(b"set", one, b"1"))
    assert bench.switch.flush_link(0, bench.wires[0].fd) == 0
    bench.switch.feed(client, large)
    left = bench.switch.flush_link(0, bench.wires[0].fd)
    assert 0 < left == bench.switch.backlog(0) < len(large)
    bench.switch.feed(client, request(b"del", one) + request(b"del", two))
    assert bench.switch.is_up(0)
    clients, lost = bench.switch.drop_link(0, DOWN)
    assert (clients, lost) == ([client], [])
    assert not bench.switch.is_up(0)
    assert bench.switch.backlog(0) == 0
    assert bench.output(client) == RETRY + UNKNOWN_OUTCOME + RETRY + RETRY
    assert client.inflight == 1
    bench.serve(1)
    assert bench.output(client) == shard_reply(1, request(b"del", two))
    bench.switch.feed(client, request(b"get", one) + request(b"set", one, b"1"))
    assert bench.output(client) == DOWN * 2
    bench.switch.set_down_reply(0, error("SHARDDOWN still"))
    bench.switch.feed(client, request(b"get", one))
    assert bench.output(client) == error("SHARDDOWN still")
    bench.switch.raise_link(0)
    bench.switch.set_down_reply(0, DOWN)
    with pytest.raises(ValueError, match="up"):
        bench.switch.raise_link(0)
    bench.wires[0].close()
    bench.wires[0] = Wire()
    bench.switch.feed(client, request(b"get", one))
    bench.serve(0)
    assert bench.output(client) == shard_reply(0, request(b"get", one))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_false_reply_is_never_delivered(bench: Bench, fault: str, count: int) -> None:
    one = bench.keys[0]
    clients = [bench.switch.attach(number) for number in range(3)]
    sets = [request(b"set", one, b"%d" % number) for number in range(count)]
    bench.switch.feed(clients[0], sets[0])
    bench.switch.feed(clients[1], b"".join(sets))
    bench.switch.feed(clients[2], sets[0])
    right = bench.replies(0)
    first = right[: 4 + int.from_bytes(right[:4], "big")]
    bad = false_envelope(fault, 0, Envelope(1, sets, [], None, 0))
    with pytest.raises(twin.LinkError):
        bench.switch.merge(0, first + bad)
    touched, lost = bench.switch.drop_link(0, DOWN)
    assert (set(touched), lost) == (set(clients), [])
    assert bench.output(clients[0]) == shard_reply(0, sets[0])
    assert bench.output(clients[1]) == UNKNOWN_OUTCOME * count
    assert bench.output(clients[2]) == UNKNOWN_OUTCOME


def test_a_reply_that_nobody_asked_for(bench: Bench) -> None:
    for count in (0, 1):
        with pytest.raises(twin.LinkError):
            bench.switch.merge(0, struct.pack(">III", 8, 0, count))
        bench.switch.drop_link(0, DOWN)
        with pytest.raises(twin.LinkError):  # the tail of a stream that is gone
            bench.switch.merge(0, struct.pack(">III", 8, 0, count))
        bench.switch.raise_link(0)


def test_a_false_header_is_not_waited_for(bench: Bench) -> None:
    """The rest of a reply with a wrong ticket may never come, and could be 4 GiB."""
    bench.switch.feed(bench.switch.attach(None), request(b"get", bench.keys[0]))
    header = struct.pack(">III", 0xFFFFFFFF, 7, 1)
    for byte in header[:-1]:
        assert bench.switch.merge(0, bytes([byte])) == ([], [])
    with pytest.raises(twin.LinkError):
        bench.switch.merge(0, header[-1:])


def test_answers_before_a_false_reply_are_lost_with_the_link(bench: Bench) -> None:
    bench.switch.ask(0, request(b"stats"), "token")
    bench.switch.ask(0, request(b"stats"), "other")
    replies = bench.replies(0)
    with pytest.raises(twin.LinkError):
        bench.switch.merge(0, replies[:-1] + replies[:20])
    assert bench.switch.drop_link(0, DOWN) == ([], [("token", True), ("other", True)])


def test_a_client_that_is_gone_gets_nothing(bench: Bench) -> None:
    gone, here, (one, two) = bench.switch.attach(None), bench.switch.attach(None), bench.keys
    for client in (gone, here, gone, here):
        bench.switch.feed(client, request(b"get", one) + request(b"get", two) + request(b"x"))
    bench.switch.feed(gone, b"\0\0")
    first = bench.replies(1)
    bench.switch.merge(1, first[: len(first) // 4])
    bench.switch.detach(gone)
    assert bench.switch.feed(gone, request(b"get", one)) == []
    bench.switch.merge(1, first[len(first) // 4 :])
    bench.serve(0)
    expected = shard_reply(0, request(b"get", one)) + shard_reply(1, request(b"get", two)) + unknown()
    assert bench.output(here) == expected * 2
    assert not gone.out
    assert gone.inflight == 0


def test_what_is_not_one_reply_is_not_taken(bench: Bench) -> None:
    client = bench.switch.attach(None)
    ((turn, *_),) = bench.switch.feed(client, request(b"stats"))
    bench.switch.drop_link(1, DOWN)
    for bad in (b"", b"\0\0\0", DOWN[:-1], DOWN + b"x", DOWN + DOWN):
        with pytest.raises(ValueError, match="frame"):
            bench.switch.answer(turn, bad)
        with pytest.raises(ValueError, match="frame"):
            bench.switch.refuse(client, bad)
        with pytest.raises(ValueError, match="frame"):
            bench.switch.drop_link(0, bad)
        with pytest.raises(ValueError, match="frame"):
            bench.switch.set_down_reply(1, bad)
    assert bench.switch.is_up(0)
    assert not client.closing
    assert bench.switch.answer(turn, DOWN) is client
    assert bench.output(client) == DOWN


def test_before_a_shard_is_up(switch_class: type[twin.Switch]) -> None:
    switch = switch_class(slot_map(1))
    client = switch.attach(None)
    switch.feed(client, request(b"get", b"key"))
    with Wire() as wire:
        assert switch.flush(client, wire.fd) == 0
        assert wire.take()[8:].startswith(b"SHARDDOWN ")


@pytest.mark.parametrize("more", [0, 1])
def test_a_whole_request_by_itself_has_the_same_limit(switch_class: type[twin.Switch], more: int) -> None:
    with Bench(switch_class, max_request=100) as bench:
        client = bench.switch.attach(None)
        bench.switch.feed(client, request(b"get", b"k" * (85 + more)))
        assert client.closing == bool(more)


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 1 << 32}, {"max_request": (1 << 31) + 1}, {"max_tokens": -1}]
)
def test_limits_that_the_envelope_could_not_carry(
    switch_class: type[twin.Switch], limits: dict[str, int]
) -> None:
    with pytest.raises((ValueError, OverflowError)):
        switch_class(slot_map(1), **limits)


def test_refuse(bench: Bench) -> None:
    client, get = bench.switch.attach(None), request(b"get", bench.keys[0])
    bench.switch.feed(client, get + b"\0")
    bench.switch.refuse(client, error("BUSY"))
    bench.switch.feed(client, b"\0\0\0" + get)
    assert client.closing
    assert client.inflight == 2
    bench.serve(0)
    assert bench.output(client) == shard_reply(0, get) + error("BUSY")


def test_choked(switch_class: type[twin.Switch]) -> None:
    """More than the limit chokes who adds to it, exactly the limit does not."""
    with Bench(switch_class, backlog_limit=1000) as bench:
        client, other, (one, two) = bench.switch.attach(None), bench.switch.attach(None), bench.keys
        small, headers = request(b"get", one), 16 + len(request(b"set", one, b""))
        bench.switch.feed(client, request(b"set", one, b"v" * (1000 - headers)))
        assert bench.switch.backlog(0) == 1000
        assert client.choked == -1
        bench.switch.feed(client, small + request(b"get", two))
        assert client.choked == 0
        bench.switch.feed(other, request(b"get", two))
        assert other.choked == -1
        bench.switch.feed(other, small)
        assert other.choked == 0
        client.choked = -1
        bench.serve(0)
        bench.switch.feed(client, small)
        assert client.choked == -1


def test_tickets_return_to_zero(switch_class: type[twin.Switch]) -> None:
    with Bench(switch_class, first_ticket=0xFFFFFFFE) as bench:
        client, get = bench.switch.attach(None), request(b"get", bench.keys[0])
        for _ in range(4):
            bench.switch.feed(client, get)
        data = bench.sent(0)
        assert [ticket for ticket, *_ in envelopes(data)] == [0xFFFFFFFE, 0xFFFFFFFF, 0, 1]
        for ticket in (0xFFFFFFFE, 0xFFFFFFFF, 0, 1):
            reply = shard_reply(0, get)
            bench.switch.merge(0, struct.pack(">III", 8 + len(reply), ticket, 1) + reply)
        assert bench.output(client) == shard_reply(0, get) * 4


# -- sockets ---------------------------------------------------------------------------------------


def test_there_and_back_by_sockets(bench: Bench) -> None:
    client, get = bench.switch.attach(None), request(b"get", bench.keys[0])
    with Wire() as wire:
        with pytest.raises(BlockingIOError):
            bench.switch.receive(client, wire.fd)
        with pytest.raises(BlockingIOError):
            bench.switch.receive_link(0, bench.wires[0].fd)
        wire.give(get + request(b"stats"))
        size, questions = bench.switch.receive(client, wire.fd)
        assert size == len(get + request(b"stats"))
        assert [command.name for _, _, command, _ in questions] == ["stats"]
        bench.switch.ask(0, request(b"stats"), "token")
        replies = bench.replies(0)
        bench.wires[0].give(replies)
        assert bench.switch.receive_link(0, bench.wires[0].fd) == (
            len(replies),
            [client],
            [("token", shard_reply(0, request(b"stats")))],
        )
        assert bench.switch.flush(client, wire.fd) == 0
        assert wire.take() == shard_reply(0, get)
        assert bench.switch.flush(client, wire.fd) == 0
        bench.switch.answer(questions[0][0], response(3, b""))
        assert bench.switch.resume(client) == []
        wire.far.close()
        assert bench.switch.receive(client, wire.fd) == (0, [])
        with pytest.raises(BrokenPipeError):
            bench.switch.flush(client, wire.fd)
    bench.wires[1].far.close()
    assert bench.switch.receive_link(1, bench.wires[1].fd) == (0, [], [])
    bench.switch.feed(client, request(b"get", bench.keys[1]))
    with pytest.raises(BrokenPipeError):
        bench.switch.flush_link(1, bench.wires[1].fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        bench.switch.receive(client, 999_999)


def test_many_clients_in_one_call(bench: Bench) -> None:
    """Each kind of client once: what ``receive_all`` and ``flush_all`` do with it, and what they leave."""
    get = request(b"get", bench.keys[0])
    kinds = ("asks", "silent", "ends", "broken", "wrong", "stats", "many", "malformed", "not plain")
    with ExitStack() as stack:
        wires = {kind: stack.enter_context(Wire()) for kind in kinds}
        clients = {kind: bench.switch.attach(kind, wire.fd) for kind, wire in wires.items()}
        for kind, client in clients.items():
            assert client.fd == wires[kind].fd
            client.plain = kind != "not plain"
        for kind in ("asks", "not plain"):
            wires[kind].give(get)
        wires["ends"].far.close()
        broken = bench.switch.attach("broken", 999_999)
        broken.plain = True
        wires["wrong"].give(request(b"nonsense"))
        wires["stats"].give(request(b"stats"))
        wires["many"].give(get * 3)
        wires["malformed"].give(b"\xff" * 8)
        everyone = [broken if kind == "broken" else client for kind, client in clients.items()]
        ended, changed, questions = bench.switch.receive_all(everyone, 3)
        assert [client.owner for client in ended] == ["ends", "broken"]
        assert [client.owner for client in changed] == ["wrong", "many", "malformed"]
        assert [command.name for _, _, command, _ in questions] == ["stats"]
        assert [clients[kind].inflight for kind in kinds] == [1, 0, 0, 0, 0, 1, 3, 0, 0]
        assert clients["malformed"].closing

        assert [client.owner for client in bench.serve(0)] == ["asks", "many"]
        left, held = bench.switch.flush_all(everyone)
        assert held == []
        assert [client.owner for client in left] == ["malformed", "not plain"]
        assert wires["asks"].take() == shard_reply(0, get)
        assert wires["many"].take() == shard_reply(0, get) * 3
        assert wires["wrong"].take() == unknown()
        assert not wires["malformed"].take()
        assert clients["malformed"].out


def test_the_socket_of_a_client_that_is_gone_is_left_alone(bench: Bench) -> None:
    with Wire() as wire:
        client = bench.switch.attach(None, wire.fd)
        client.plain = True
        bench.switch.detach(client)
        wire.give(b"for the next one with this number")
        assert bench.switch.receive_all([client], 1) == ([], [], [])
        client.plain = True
        assert bench.switch.receive_all([client], 1) == ([client], [], [])
        assert wire.near.recv(100) == b"for the next one with this number"


def test_flush_all_leaves_what_the_socket_does_not_take(bench: Bench) -> None:
    get = request(b"get", bench.keys[0])
    with Wire() as full, Wire() as gone:
        clients = [bench.switch.attach(wire, wire.fd) for wire in (full, gone)]
        for client in clients:
            client.plain = True
        gone.far.close()
        bench.switch.feed(clients[1], get)
        expected = b""
        while not bench.switch.flush_all(clients[:1])[0]:
            bench.switch.feed(clients[0], get * 1000)
            expected += shard_reply(0, get) * 1000
            bench.serve(0)
        assert bench.switch.flush_all(clients) == (clients, [])
        received = b""
        while len(received) < len(expected):
            received += full.take()
            bench.switch.flush_all(clients[:1])
        assert received == expected
        with pytest.raises(BrokenPipeError):
            bench.switch.flush(clients[1], gone.fd)


def test_flush_all_holds_back_part_of_a_turn(bench: Bench) -> None:
    """Until the turn is whole, or there is much of it, or the router is through with waiting."""
    first, second = (request(b"get", key) for key in bench.keys)
    with Wire() as wire:
        client = bench.switch.attach(None, wire.fd)
        client.plain = True
        bench.switch.feed(client, first + second)
        assert bench.serve(0) == [client]
        assert bench.switch.flush_all([client], 1000) == ([], [client])
        assert not wire.take()
        assert bench.switch.flush_all([client], len(shard_reply(0, first))) == ([], [])
        assert wire.take() == shard_reply(0, first)
        assert bench.serve(1) == [client]
        assert bench.switch.flush_all([client], 1000) == ([], [])
        assert wire.take() == shard_reply(1, second)
        bench.switch.feed(client, first + second)
        bench.switch.feed(client, first)
        bench.serve(1, 0)
        assert bench.switch.flush_all([client], 1000) == ([], [])
        assert wire.take() == shard_reply(0, first) + shard_reply(1, second) + shard_reply(0, first)
        bench.switch.feed(client, second)
        bench.switch.feed(client, first + second)
        bench.serve(0)
        assert bench.switch.flush_all([client], 1000) == ([], [])  # nothing is there to send
        bench.serve(1)
        bench.switch.feed(client, first + second)
        bench.serve(0)
        assert bench.switch.flush_all([client], 1000) == ([], [client])
        assert bench.switch.flush_all([client]) == ([], [])
        bench.serve(1)


def test_one_wake_up_takes_a_bounded_piece(bench: Bench) -> None:
    """However much a client has sent, the others get their turn after RECEIVE bytes."""
    frame = request(b"get", bench.keys[0])
    client = bench.switch.attach(None)
    with Wire() as wire:
        wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        stream = frame * (2 * twin.RECEIVE // len(frame))
        given = wire.far.send(stream)
        assert given > twin.RECEIVE
        taken = 0
        while taken < given:
            size, _ = bench.switch.receive(client, wire.fd)
            assert 0 < size <= twin.RECEIVE
            taken += size
            assert client.inflight == taken // len(frame)
    bench.serve(0)


def test_large_values_by_small_pieces(bench: Bench) -> None:
    """Values far over every buffer's size come through both ways."""
    client = bench.switch.attach(None)
    stream = b""
    expected = b""
    for shard, key in enumerate(bench.keys):
        frame = request(b"set", key, random.Random(shard).randbytes(700_000))
        stream += frame
        expected += shard_reply(shard, frame)
    with Wire() as wire:
        sent = 0
        while sent < len(stream):
            sent += wire.far.send(stream[sent : sent + 50_000])
            bench.switch.receive(client, wire.fd)
    for shard in (1, 0):
        replies, done = bench.replies(shard), 0
        wire = bench.wires[shard]
        while done < len(replies):
            done += wire.far.send(replies[done : done + 70_000])
            bench.switch.receive_link(shard, wire.fd)
    assert bench.output(client) == expected


# -- bounds ----------------------------------------------------------------------------------------


@pytest.fixture
def traced(variant: Any) -> Iterator[Callable[[], int]]:
    """Return a function that gives the bytes allocated since the test began."""
    if variant.name == "compiled":
        gc.collect()  # what earlier tests have left would be given back in the midst of this one
        before = in_c_memory()
        yield lambda: in_c_memory() - before
        return
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()


def test_memory_follows_the_bytes_that_arrived(bench: Bench, traced: Callable[[], int]) -> None:
    clients = [bench.switch.attach(None) for _ in range(100)]
    for client in clients:
        bench.switch.feed(client, struct.pack(">II3sI", 2, 3, b"get", (64 << 20) - 15))
        bench.switch.feed(client, b"k")
    bench.switch.feed(clients[0], request(b"x"))
    tokens = bench.switch.attach(None)
    bench.switch.feed(tokens, struct.pack(">I", 1 << 20))
    bench.switch.feed(tokens, b"\0" * 4)
    assert traced() < 100 * 2000
    get = request(b"get", bench.keys[1])
    bench.switch.feed(tokens, b"")
    other = bench.switch.attach(None)
    bench.switch.feed(other, get)
    bench.switch.merge(1, struct.pack(">III", 0xFFFFFFFF, 0, 1) + b"start")
    assert traced() < 100 * 2000
    piece = b"k" * 1000
    for number in range(1, 1001):
        bench.switch.feed(clients[1], piece)
        if number % 100 == 0:
            assert number * 1000 < traced() < number * 1000 * 2 + 300_000
    bench.switch.detach(clients[1])
    assert traced() < 300_000


def test_memory_is_given_back(bench: Bench, traced: Callable[[], int]) -> None:
    """After a large request and its large reply have gone through, little is kept."""
    client = bench.switch.attach(None)
    frame = request(b"set", bench.keys[0], b"v" * 4_000_000)
    for at in range(0, len(frame), 60_000):
        bench.switch.feed(client, frame[at : at + 60_000])
    del frame
    assert bench.serve(0) == [client]
    assert traced() > 4_000_000
    bench.output(client)
    assert traced() < 1_000_000


def test_a_frame_of_a_million_tokens_in_small_pieces(bench: Bench) -> None:
    """Looking at all that is there for each piece would take hours, not a second."""
    client = bench.switch.attach(None)
    frame = request(*[b""] * (1 << 20))
    for at in range(0, len(frame), 100):
        bench.switch.feed(client, frame[at : at + 100])
    assert bench.output(client) == unknown()


def test_each_header_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin's cost of a frame that comes byte by byte, counted."""
    reads = 0

    class Counting:
        size = protocol.U32.size

        def unpack_from(self, *arguments: Any) -> Any:
            nonlocal reads
            reads += 1
            return struct.unpack_from(">I", *arguments)

    counting = Counting()
    monkeypatch.setattr(protocol, "U32", counting)
    monkeypatch.setattr(twin, "_read_u32", counting.unpack_from)
    with Bench(twin.Switch) as bench:
        client = bench.switch.attach(None)
        for byte in request(b"get", *[b"token"] * 1000):
            bench.switch.feed(client, bytes([byte]))
        assert bench.output(client) == wrong_arity()
    assert reads < 5 * 1000


def test_a_reply_in_many_pieces(bench: Bench) -> None:
    client = bench.switch.attach(None)
    bench.switch.feed(client, request(b"get", bench.keys[0]))
    body = response(0, b"v" * 3_000_000)
    whole = struct.pack(">III", 8 + len(body), 0, 1) + body
    for at in range(0, len(whole), 1000):
        bench.switch.merge(0, whole[at : at + 1000])
    assert client.out
    assert bench.output(client) == body
