"""Random traffic through the switch, each variant, against :mod:`switch_model`."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from switch_model import (
    DOWN,
    FAULTS,
    Model,
    ModelClient,
    Slot,
    Wire,
    error,
    false_envelope,
    request,
    response,
    slot_map,
)

from imds.commands import COMMANDS, Spread
from imds.router import switch as twin
from imds.router.switch import NOTICE

Touched = AbstractSet[ModelClient]
Lost = Iterable[Any]


# -- strategies ------------------------------------------------------------------------------------

KEY_COMMANDS = [row for row in COMMANDS.values() if row.spread is Spread.KEY]

keys = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"{a}1", b"{a}2", b"{}x", b"{", b"}{b}", b"{{c}}", b"{d", b"k" * 40]),
    st.integers(0, 999).map(b"key:%d".__mod__),
)
values = st.one_of(st.binary(max_size=12), st.integers(0, 3000).map(lambda size: b"v" * size))


@st.composite
def cased(draw: st.DrawFn, name: str) -> bytes:
    """Return ``name`` in some mixture of cases."""
    upper = draw(st.integers(0, (1 << len(name)) - 1))
    return "".join(char.upper() if upper >> index & 1 else char for index, char in enumerate(name)).encode()


@st.composite
def right_requests(draw: st.DrawFn) -> bytes:
    command = draw(st.sampled_from(KEY_COMMANDS))
    arguments = [draw(keys), *(draw(values) for _ in range(command.min_tokens - 2))]
    return request(draw(cased(command.name)), *arguments)


@st.composite
def wrong_requests(draw: st.DrawFn) -> bytes:
    """Return a whole frame that the router answers itself, or one that is right by chance."""
    name = draw(
        st.one_of(
            st.sampled_from(list(COMMANDS)).flatmap(cased),
            st.sampled_from([b"", b"ge", b"gett", b"get\0", b"\xc7et", b"zrangebyscore", b"x" * 99]),
        )
    )
    return request(*[name, *draw(st.lists(st.binary(max_size=3), max_size=5))])


malformed = st.sampled_from(
    [
        struct.pack(">I", 9),
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">II", 2, 0xFFFFFFFF),
        struct.pack(">II", 1, 3993),
        request(b"set", b"key") + struct.pack(">II", 2, 3) + b"get" + struct.pack(">I", 0x7FFFFFFF),
    ]
)
frames = st.one_of(
    right_requests(),
    right_requests(),
    right_requests(),
    wrong_requests(),
    st.just(request(b"stats")),
    st.just(struct.pack(">I", 0)),
)
streams = st.lists(frames, min_size=1, max_size=8).map(b"".join)


@st.composite
def bursts(draw: st.DrawFn) -> bytes:
    """Return many requests, mostly right ones, at the price of one draw."""
    dice = random.Random(draw(st.integers(0, 1 << 32)))
    stream = b""
    for _ in range(dice.randint(1, 40)):
        command = dice.choice(list(COMMANDS.values()) if dice.random() < 0.1 else KEY_COMMANDS)
        arguments = [dice.randbytes(dice.choice([0, 1, 8, 300])) for _ in range(command.min_tokens - 1)]
        stream += request(command.name.encode(), *arguments)
    return stream


cuts = st.one_of(st.integers(1, 40), st.just(30_000))  # bytes moved by one action


@dataclass(eq=False, repr=False)
class Pair:
    """A client, in the switch and in the model, and its socket."""

    model: ModelClient
    switched: Any
    wire: Wire = field(default_factory=Wire)
    unsent: bytes = b""  # what the client will still send
    flushed: int = 0  # reply bytes that its socket has
    taken: int = 0  # and those that it has read

    def has_output(self) -> bool:
        """Whether the switch must hold replies for this client."""
        return len(self.model.replies()) > self.flushed


@dataclass(eq=False, repr=False)
class Shard:
    """A shard as the test plays it; ``wire`` is None while it is down."""

    number: int
    wire: Wire | None = None
    told: int = 0  # notices
    received: bytes = b""
    replies: bytes = b""  # what it will still send


some_client = precondition(lambda self: self.clients)
some_question = precondition(lambda self: self.questions)
some_up = precondition(lambda self: any(link.wire for link in self.links))
some_reply = precondition(lambda self: any(link.replies for link in self.links))


class Traffic(RuleBasedStateMachine):
    """Clients, shards and the failures of both, in any order, cut at any byte.

    Every action is done to the switch and to the model; what each returns, each client's replies, each
    byte to a shard and every counter must then agree.
    """

    switch_class: type[twin.Switch]

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Pair] = []  # those that are attached
        self.links: list[Shard] = []
        self.questions: list[tuple[Any, Pair, Slot]] = []  # not yet answered
        self.asked = 0

    @initialize(shards=st.integers(1, 4), limit=st.sampled_from([0, 100, 6000, 1 << 20]))
    def start(self, shards: int, limit: int) -> None:
        limits = {"max_tokens": 8, "max_request": 4000, "backlog_limit": limit}
        self.switch = self.switch_class(slot_map(shards), **limits)
        self.model = Model(slot_map(shards), **limits)
        for number in range(shards):
            assert not self.switch.is_up(number)
            assert self.switch.drop_link(number, DOWN) == ([], [])
            self.model.drop_link(number, DOWN)
            self.links.append(Shard(number))
            self.raise_link(self.links[number])
        self.attach()

    # -- clients

    def attach(self, _: Any = None) -> None:
        pair = Pair(ModelClient(), None)
        pair.switched = self.switch.attach(pair)
        assert pair.switched.owner is pair
        self.clients.append(pair)

    def client(self, data: st.DataObject) -> Pair:
        return data.draw(st.sampled_from(self.clients))

    @some_client
    @rule(data=st.data(), stream=st.one_of(streams, bursts()), cut=cuts, by_socket=st.booleans())
    def write(self, data: st.DataObject, stream: bytes, cut: int, by_socket: bool) -> None:
        pair = self.client(data)
        pair.unsent += stream
        self.feed(pair, cut, by_socket)

    @some_client
    @rule(data=st.data(), cut=cuts, by_socket=st.booleans())
    def write_on(self, data: st.DataObject, cut: int, by_socket: bool) -> None:
        self.feed(self.client(data), cut, by_socket)

    def write_malformed(self, data: st.DataObject) -> None:
        self.client(data).unsent += data.draw(malformed)

    def feed(self, pair: Pair, cut: int, by_socket: bool) -> None:
        piece, pair.unsent = pair.unsent[:cut], pair.unsent[cut:]
        if by_socket and piece:
            pair.wire.give(piece)
            size, questions = self.switch.receive(pair.switched, pair.wire.fd)
            assert size == len(piece)
        else:
            questions = self.switch.feed(pair.switched, piece)
        self.note(pair, questions, self.model.feed(pair.model, piece))

    def note(self, pair: Pair, questions: list[Any], expected: list[Slot]) -> None:
        assert [(client, command and command.name, frame) for _, client, command, frame in questions] == [
            (pair.switched, slot.command, slot.frame) for slot in expected
        ]
        assert pair.switched.paused == pair.model.paused
        assert pair.switched.held == len(pair.model.rest)
        self.questions += [(asked[0], pair, slot) for asked, slot in zip(questions, expected, strict=True)]

    @some_client
    @rule(captive=st.sampled_from([False, False, False, True]))
    def resume(self, captive: bool) -> None:
        self.resume_all(captive)

    def resume_all(self, captive: bool) -> None:
        """The router has every client go on that waits for it; some it keeps captive."""
        for pair in self.clients:
            if pair.model.paused:
                pair.model.captive = pair.switched.captive = captive
                pair.model.paused = False
                self.note(pair, self.switch.resume(pair.switched), self.model.feed(pair.model, b""))

    @some_question
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.answer_one(data.draw(st.integers(0, len(self.questions) - 1)))

    def answer_one(self, index: int) -> None:
        turn, pair, slot = self.questions.pop(index)
        slot.reply = response(3, b"answer %d" % index)
        client = self.switch.answer(turn, slot.reply)
        assert client is (pair.switched if not pair.model.gone and pair.has_output() else None)

    def detach(self, data: st.DataObject) -> None:
        pair = self.client(data)
        self.switch.detach(pair.switched)
        pair.model.gone = True
        self.clients.remove(pair)
        assert pair.switched.inflight == 0
        assert not pair.switched.out
        pair.wire.close()

    def refuse(self, data: st.DataObject) -> None:
        pair = self.client(data)
        self.switch.refuse(pair.switched, error("BUSY"))
        self.model.refuse(pair.model, error("BUSY"))

    def unchoke(self, data: st.DataObject) -> None:
        pair = self.client(data)
        pair.switched.choked = pair.model.choked = -1

    @some_client
    @rule(data=st.data(), size=cuts)
    def flush(self, data: st.DataObject, size: int) -> None:
        self.flush_client(self.client(data), size)

    def flush_client(self, pair: Pair, size: int) -> int:
        """Let the client's socket take output, and the client ``size`` bytes of it; return these."""
        left = self.switch.flush(pair.switched, pair.wire.fd)
        pair.flushed = len(pair.model.replies()) - left
        got = pair.wire.take(size)
        assert got == pair.model.replies()[pair.taken : pair.taken + len(got)]
        pair.taken += len(got)
        assert pair.taken <= pair.flushed
        return len(got)

    # -- shards

    def up(self, data: st.DataObject) -> Shard:
        return data.draw(st.sampled_from([link for link in self.links if link.wire is not None]))

    @some_up
    @rule(data=st.data(), frame=right_requests())
    def ask(self, data: st.DataObject, frame: bytes) -> None:
        link = self.up(data)
        self.asked += 1
        self.switch.ask(link.number, frame, self.asked)
        self.model.ask(link.number, frame, self.asked)

    @some_up
    @rule(data=st.data(), size=cuts)
    def flush_link(self, data: st.DataObject, size: int) -> None:
        self.flush_one(self.up(data), size)

    def flush_one(self, link: Shard, size: int) -> int:
        """Let the shard's socket take requests, and the shard ``size`` bytes of them; return these."""
        model = self.model.links[link.number]
        model.sent = len(model.stream) - self.switch.flush_link(link.number, link.wire.fd)
        got = link.wire.take(size)
        before = len(link.received)
        link.received += got
        assert model.stream.startswith(link.received)
        assert len(link.received) <= model.sent
        for envelope in model.pending:
            if before < envelope.end <= len(link.received):
                link.replies += envelope.reply(link.number)
        return len(got)

    @some_reply
    @rule(data=st.data(), cut=cuts, by_socket=st.booleans())
    def merge(self, data: st.DataObject, cut: int, by_socket: bool) -> None:
        ready = [link for link in self.links if link.replies]
        self.merge_some(data.draw(st.sampled_from(ready)), cut, by_socket)

    def merge_some(self, link: Shard, cut: int, by_socket: bool = False) -> None:
        piece, link.replies = link.replies[:cut], link.replies[cut:]
        if by_socket:
            link.wire.give(piece)
            size, clients, answers = self.switch.receive_link(link.number, link.wire.fd)
            assert size == len(piece)
        else:
            clients, answers = self.switch.merge(link.number, piece)
        touched, expected = self.model.merge(link.number, piece)
        assert answers == expected
        self.compare_touched(clients, touched)

    def compare_touched(self, clients: list[Any], touched: set[ModelClient]) -> None:
        found = [client.owner.model for client in clients]
        assert len(set(found)) == len(found)
        assert set(found) == {
            pair.model for pair in self.clients if pair.model in touched and pair.has_output()
        }

    @rule(data=st.data())
    def pump(self, data: st.DataObject) -> None:
        """Every shard takes all it can get and answers some of it, in any order between the shards."""
        for link in data.draw(st.permutations(self.links)):
            if link.wire is not None:
                self.flush_one(link, 1 << 20)
                self.merge_some(link, data.draw(cuts))

    def drop_link(self, data: st.DataObject) -> None:
        self.drop(self.up(data), data.draw(st.sampled_from([DOWN, error("SHARDDOWN again")])))

    def drop(
        self, link: Shard, note: bytes, touched_before: Touched = frozenset(), lost_before: Lost = ()
    ) -> None:
        clients, lost = self.switch.drop_link(link.number, note)
        touched, expected = self.model.drop_link(link.number, note)
        assert lost == [*lost_before, *expected]
        self.compare_touched(clients, touched | touched_before)
        link.wire.close()
        link.wire = None
        link.told = 0
        link.replies = link.received = b""

    def raise_again(self, data: st.DataObject) -> None:
        down = [link for link in self.links if link.wire is None]
        self.raise_link(data.draw(st.sampled_from(down)))

    def raise_link(self, link: Shard) -> None:
        self.switch.raise_link(link.number)
        self.model.raise_link(link.number)
        link.wire = Wire()

    def set_down_reply(self, data: st.DataObject) -> None:
        link, note = data.draw(st.sampled_from(self.links)), error("SHARDDOWN for another reason")
        self.switch.set_down_reply(link.number, note)
        if link.wire is None:
            self.model.links[link.number].down = note

    def tell(self, data: st.DataObject) -> None:
        """A shard tells what nobody asked."""
        link = self.up(data)
        link.replies += self.model.notice(link.told)
        link.told += 1

    def lie(self, data: st.DataObject) -> None:
        """A shard sends what it must not: the link fails, and what came right before it is delivered."""
        link, fault = self.up(data), data.draw(st.sampled_from(FAULTS))
        touched, answers = self.model.merge(link.number, link.replies)
        pending = self.model.links[link.number].pending
        bad = false_envelope(fault, link.number, pending[0] if pending else None)
        with pytest.raises(twin.LinkError):
            self.switch.merge(link.number, link.replies + bad)
        self.drop(link, DOWN, touched, [(token, True) for token, _ in answers if token is not NOTICE])

    # -- what is rare

    @rule(data=st.data())
    def client_event(self, data: st.DataObject) -> None:
        events = [self.attach]
        if self.clients:
            events += [self.attach, self.detach, self.unchoke, self.write_malformed, self.refuse]
        data.draw(st.sampled_from(events))(data)

    @rule(data=st.data())
    def shard_event(self, data: st.DataObject) -> None:
        events = [self.set_down_reply]
        if any(link.wire for link in self.links):
            events += [self.lie, self.drop_link, self.tell, self.tell]
        if any(link.wire is None for link in self.links):
            events += [self.raise_again] * 3
        data.draw(st.sampled_from(events))(data)

    # -- what must hold after each action, and in the end

    @invariant()
    def agrees(self) -> None:
        if not self.links:
            return
        self.switch.check()
        for pair in self.clients:
            client, model = pair.switched, pair.model
            assert client.inflight == model.inflight()
            assert client.closing == model.closing
            assert client.choked == model.choked
            assert bool(client.out) == pair.has_output()
        for link in self.links:
            assert self.switch.is_up(link.number) == (link.wire is not None)
            assert self.switch.backlog(link.number) == self.model.backlog(link.number)

    def teardown(self) -> None:
        """Let everybody finish: then every request has its reply, and nothing is left anywhere."""
        try:
            for pair in self.clients:
                self.feed(pair, 1 << 20, False)
            while self.questions:
                self.answer_one(-1)
                self.resume_all(captive=False)
            moved = 1
            while moved:
                moved = sum(self.flush_client(pair, 1 << 20) for pair in self.clients)
                for link in self.links:
                    if link.wire is not None:
                        moved += self.flush_one(link, 1 << 20) + len(link.replies)
                        self.merge_some(link, 1 << 20)
            for pair in self.clients:
                assert not pair.switched.inflight
                assert not pair.switched.out
                assert pair.taken == sum(len(slot.reply) for slot in pair.model.slots)
            self.agrees()
        finally:
            for one in [*self.clients, *self.links]:
                if one.wire is not None:
                    one.wire.close()


def test_any_traffic(switch_class: type[twin.Switch]) -> None:
    machine = type("Machine", (Traffic,), {"switch_class": switch_class})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
