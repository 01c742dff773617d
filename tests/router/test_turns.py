"""A turn of the router's loop: what it does by itself, and what it leaves to the router, in each variant."""

from __future__ import annotations

import random
import selectors
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from switch_model import Wire, request, shard_replies, shard_reply, slot_map

from imds.envelope import REPLY, REQUEST
from imds.router import turns as twin
from imds.router.switch import LinkError

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
WINDOW = 100


class Loop:
    """A switch with two shards and any number of clients, all of them wires, and one selector over them."""

    def __init__(self, variant: Any, switch_class: Any, selector: selectors.BaseSelector) -> None:
        self.turn_ = variant.pick(twin.turn, "switch")
        self.stack = ExitStack()
        self.selector = self.stack.enter_context(selector)
        self.switch = switch_class(slot_map(2))
        self.shards = [self.wire() for _ in range(2)]
        self.keys = []
        for shard, wire in enumerate(self.shards):
            self.switch.raise_link(shard, wire.fd)
            numbers = (b"%d" % number for number in range(1000))
            self.keys.append(next(key for key in numbers if slot_map(2).shard_of(key) == shard))

    def wire(self) -> Wire:
        wire = Wire()
        self.stack.callback(wire.close)
        self.selector.register(wire.fd, READ)
        return wire

    def client(self) -> tuple[Any, Wire]:
        wire = self.wire()
        client = self.switch.attach(wire, wire.fd)
        client.plain = True
        return client, wire

    def turn(self, timeout: float | None = 0, gather: int = 0, hold: int = 0, wait: float = 0.001) -> Any:
        return self.turn_(self.switch, self.selector, timeout, twin.Policy(WINDOW, gather, hold, wait))

    def serve(self, shard: int) -> int:
        """Answer what the shard's socket has; return how many requests that were."""
        data, served = self.shards[shard].take(), 0
        for count, reply, _ in shard_replies(shard, data):
            self.shards[shard].give(reply)
            served += count
        return served


@pytest.fixture(params=["default", "select"])
def loop(request: Any, variant: Any, switch_class: Any) -> Iterator[Loop]:
    """With epoll, where the system has it, and without."""
    kind = selectors.DefaultSelector if request.param == "default" else selectors.SelectSelector
    made = Loop(variant, switch_class, kind())
    with made.stack:
        yield made
        made.switch.check()


def test_requests_go_to_their_shards_and_replies_to_their_clients(loop: Loop) -> None:
    clients = [loop.client() for _ in range(3)]
    gets = [request(b"get", key) for key in loop.keys]
    for number, (_, wire) in enumerate(clients):
        wire.give(gets[0] * number + gets[1])
    assert loop.turn() is None
    assert [loop.serve(0), loop.serve(1)] == [3, 3]
    while loop.turn() is not None:
        pass
    for number, (client, wire) in enumerate(clients):
        assert wire.take() == shard_reply(0, gets[0]) * number + shard_reply(1, gets[1])
        assert not client.inflight


def test_nothing_comes_before_the_timeout(loop: Loop) -> None:
    assert loop.turn(0) is None
    assert loop.turn(0.002) is None


def test_what_is_seldom_is_left_to_the_router(loop: Loop) -> None:
    other = loop.wire()
    other.give(b"?")
    (gone, gone_wire), (slow, slow_wire), (wrong, wrong_wire) = (loop.client() for _ in range(3))
    asking, asking_wire = loop.client()
    full, full_wire = loop.client()
    gone_wire.far.close()
    slow.plain = False
    slow_wire.give(request(b"get", loop.keys[0]))
    wrong_wire.give(request(b"nonsense"))
    asking_wire.give(request(b"stats"))
    full_wire.give(request(b"get", loop.keys[1]) * WINDOW)
    news = loop.turn()
    assert sorted(news.events) == sorted([(other.fd, READ), (slow.fd, READ)])
    assert news.ended == [gone]
    assert set(news.changed) == {wrong, full}
    assert [(question[1], question[2].name) for question in news.questions] == [(asking, "stats")]
    assert not news.broken
    assert not news.unsent
    assert not slow.inflight
    loop.selector.unregister(gone.fd)


def test_answers_to_the_routers_own_questions(loop: Loop) -> None:
    ping = request(b"stats")
    loop.switch.ask(1, ping, "token")
    assert loop.turn() is None
    assert loop.serve(1) == 1
    news = loop.turn()
    assert news.answers == [(1, "token", shard_reply(1, ping))]


@pytest.mark.parametrize("how", ["ends", "lies"])
def test_a_link_that_breaks(loop: Loop, how: str) -> None:
    client, wire = loop.client()
    wire.give(request(b"get", loop.keys[0]) + request(b"get", loop.keys[1]))
    assert loop.turn() is None
    loop.serve(1)
    if how == "ends":
        loop.shards[0].far.close()
    else:
        loop.shards[0].give(REPLY.pack(8, 77, 1))
    news = loop.turn()
    ((shard, error),) = news.broken
    assert shard == 0
    assert (error is None) == (how == "ends")
    assert error is None or isinstance(error, LinkError)
    clients, lost = loop.switch.drop_link(0, request(b"no reply but a frame")[:0] or b"\0\0\0\4\0\0\0\2")
    assert (clients, lost) == ([client], [])
    loop.selector.unregister(loop.shards[0].fd)
    assert loop.switch.flush_all([client]) == ([], [])
    assert wire.take().endswith(shard_reply(1, request(b"get", loop.keys[1])))


def test_a_link_that_does_not_take_everything(loop: Loop) -> None:
    client, wire = loop.client()
    big = request(b"set", loop.keys[0], b"x" * 30_000)
    news = None
    for _ in range(100):
        wire.far.setblocking(True)
        wire.give(big)
        news = loop.turn()
        if news is not None and news.unsent:
            break
    assert news is not None
    assert news.unsent
    assert loop.switch.stuck
    while loop.switch.backlog(0):
        loop.shards[0].take()
        assert loop.turn().unsent  # the last time, too: the router watches for something else from now on
    assert not loop.switch.stuck
    assert loop.turn() is None
    assert client.inflight


def test_requests_of_several_clients_are_gathered(loop: Loop) -> None:
    clients = [loop.client() for _ in range(4)]
    get = request(b"get", loop.keys[0])
    for _, wire in clients[:2]:
        wire.give(get)
    assert loop.turn(gather=1000) is None
    assert loop.switch.gathers
    assert not loop.shards[0].take()
    for _, wire in clients[2:]:
        wire.give(get)
    assert loop.turn(gather=1000) is None
    assert loop.turn(None, gather=1000) is None  # with nobody else to come, it does not wait, and sends
    assert not loop.switch.gathers
    assert loop.serve(0) == 4
    assert loop.turn() is None
    assert [wire.take() for _, wire in clients] == [shard_reply(0, get)] * 4


@pytest.mark.parametrize("why", ["one client", "enough", "news", "no gathering"])
def test_requests_that_are_sent_at_once(loop: Loop, why: str) -> None:
    get = request(b"get", loop.keys[0])
    clients = [loop.client() for _ in range(3)]
    for _, wire in clients[: 1 if why == "one client" else 2]:
        wire.give(get)
    if why == "news":
        clients[2][1].give(request(b"stats"))
    size = 2 * (len(get) + REQUEST.size)
    news = loop.turn(gather={"enough": size, "no gathering": 0}.get(why, size + 1))
    assert (news is not None) == (why == "news")
    assert not loop.switch.gathers
    assert loop.serve(0) == (1 if why == "one client" else 2)


def test_who_never_ends_a_request_delays_nobody(loop: Loop) -> None:
    asking, *slow = (loop.client() for _ in range(3))
    get = request(b"get", loop.keys[0])
    asking[1].give(get)
    for turns in range(100):
        for _, wire in slow:
            wire.give(request(b"set", loop.keys[0], b"x" * 1000)[turns : turns + 1])
        assert loop.turn(gather=1000) is None
        if not loop.switch.gathers:
            break
    assert turns == twin.GATHER_ROUNDS
    assert loop.serve(0) == 1


def test_part_of_a_turns_replies_waits_for_the_rest_but_not_for_long(loop: Loop) -> None:
    client, wire = loop.client()
    first, second = (request(b"get", key) for key in loop.keys)
    wire.give(first + second)
    assert loop.turn() is None
    loop.serve(0)
    assert loop.turn(0, 1000, 60.0) is None
    assert loop.switch.held == [client]
    assert not wire.take()
    loop.serve(1)
    assert loop.turn(0, 1000, 60.0) is None
    assert wire.take() == shard_reply(0, first) + shard_reply(1, second)

    loop.switch.held = []
    wire.give(first + second)
    assert loop.turn() is None
    loop.serve(0)
    assert loop.turn(0, 1000, 0.001) is None
    while loop.switch.held:
        assert loop.turn(None, 1000, 0.001) is None
    assert wire.take() == shard_reply(0, first)


class LongTraffic:
    """Clients and shards that send and receive what the sockets take, requests and replies of any length."""

    def __init__(self, loop: Loop, dice: random.Random) -> None:
        self.loop, self.dice = loop, dice
        self.clients = [loop.client() for _ in range(4)]
        self.to_send = {client: b"" for client, _ in self.clients}
        self.due = {client: b"" for client, _ in self.clients}
        self.got = {client: b"" for client, _ in self.clients}
        self.asked, self.answers = [b"", b""], [b"", b""]
        self.long = 0

    def ask(self) -> None:
        client, _ = self.dice.choice(self.clients)
        for _ in range(self.dice.choice([1, 1, 5])):
            shard = self.dice.randrange(2)
            size = self.dice.choice([0, 100, 15_000, 40_000, 66_000, 200_000])
            self.long += size >= 15_000
            frame = request(b"set", self.loop.keys[shard], self.dice.randbytes(10) * (size // 10))
            self.to_send[client] += frame
            self.due[client] += shard_reply(shard, frame)

    def send(self) -> None:
        client, wire = self.dice.choice(self.clients)
        self.to_send[client] = self.give(wire, self.to_send[client])

    def give(self, wire: Wire, data: bytes) -> bytes:
        """Send some of ``data``; return the rest."""
        try:
            return data[wire.far.send(data[: self.dice.choice([7, 20_000, 100_000, 1 << 20])]) :]
        except BlockingIOError:
            return data

    def read(self) -> None:
        client, wire = self.dice.choice(self.clients)
        self.got[client] += wire.take(self.dice.choice([9, 10_000, 100_000, 1 << 20]))

    def serve(self) -> None:
        shard = self.dice.randrange(2)
        wire = self.loop.shards[shard]
        self.asked[shard] += wire.take(self.dice.choice([50_000, 1 << 20]))
        asked = self.asked[shard]
        for _, reply, end in shard_replies(shard, asked):
            self.answers[shard] += reply
            self.asked[shard] = asked[end:]
        self.answers[shard] = self.give(wire, self.answers[shard])

    def turn(self) -> None:
        news = self.loop.turn(0, 1000, 1000, 0.0)
        assert news is None or not (news.ended or news.questions or news.answers or news.broken)
        for client, wire in self.clients:
            client.plain = not self.loop.switch.flush(client, wire.fd) and self.dice.random() < 0.9
            if not client.plain:
                self.loop.switch.receive_all([client], WINDOW)


@pytest.mark.parametrize("seed", range(5))
def test_long_requests_and_replies_through_sockets_that_take_little(loop: Loop, seed: int) -> None:
    dice = random.Random(seed)
    traffic = LongTraffic(loop, dice)
    acts = [traffic.ask] + [traffic.send, traffic.turn, traffic.serve, traffic.read] * 4
    for _ in range(1000):
        dice.choice(acts)()
        for client, _ in traffic.clients:
            assert traffic.due[client].startswith(traffic.got[client])
    loop.switch.check()
    for _ in range(100_000):
        if traffic.got == traffic.due:
            break
        dice.choice(acts[1:])()
    assert traffic.got == traffic.due
    assert traffic.long > 50
    assert not any(client.inflight or client.held for client, _ in traffic.clients)


def test_a_number_that_is_used_again_is_another_client(loop: Loop) -> None:
    client, wire = loop.client()
    loop.switch.detach(client)
    assert wire.fd not in loop.switch.by_fd
    wire.give(request(b"get", loop.keys[0]))
    assert loop.turn().events == [(wire.fd, READ)]
    again = loop.switch.attach(wire, wire.fd)
    again.plain = True
    assert loop.turn() is None
    assert (again.inflight, client.inflight) == (1, 0)
    assert loop.serve(0) == 1
