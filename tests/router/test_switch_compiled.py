"""The compiled switch: the same bytes as its twin, whatever the traffic, and no harm without memory.

Collected only where the compiled kernels were built, or are required.
"""

from __future__ import annotations

import gc
import random
import struct
import weakref
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

import pytest
from switch_model import (
    DOWN,
    FAULTS,
    Envelope,
    Wire,
    error,
    false_envelope,
    in_c_memory,
    request,
    response,
    shard_replies,
    slot_map,
)

from imds.commands import COMMANDS, Spread, lookup
from imds.router import switch as twin


@pytest.fixture(scope="module")
def kernel() -> Any:
    module = import_module("imds._kernel.switch")
    assert str(module.__file__).endswith(tuple(EXTENSION_SUFFIXES)), module.__file__
    return module


ROWS = list(COMMANDS.values())
KEY_ROWS = [row for row in ROWS if row.spread is Spread.KEY]  # most requests are forwarded


def random_request(dice: random.Random) -> bytes:
    """Return a request, mostly a right one, seldom a broken one."""
    kind = dice.random()
    if kind < 0.002:
        return struct.pack(">I", dice.choice([65, 0xFFFFFFFF])) + dice.randbytes(8)
    if kind < 0.004:
        return struct.pack(">II", 2, dice.choice([200_000, 0xFFFFFFFF]))
    command = dice.choice(ROWS if dice.random() < 0.1 else KEY_ROWS)
    name = dice.choice([command.name, command.name.upper(), command.name.title(), "no" + command.name])
    count = command.min_tokens if kind < 0.95 else dice.randint(1, 6)
    key = dice.choice([b"%d", b"{tag%d}x", b"{}%d", b"longer key of some kind %d"]) % dice.randint(0, 500)
    size = dice.choice([0, 1, 8, 64, 64, 64, 1000, 30_000])
    return request(*[name.encode(), key, dice.randbytes(size), b"4", b"5", b"6"][:count])


def drain(flush: Callable[[int], int]) -> bytes:
    """Return all that ``flush`` writes."""
    data, left = b"", 1
    with Wire() as wire:
        while left:
            left = flush(wire.fd)
            while piece := wire.take():
                data += piece
    return data


class Both:
    """The twin and the compiled switch side by side; every result of one must be the other's."""

    def __init__(self, kernel: Any, shards: int, dice: random.Random) -> None:
        limits = {"max_tokens": 64, "max_request": 100_000, "backlog_limit": 50_000}
        self.pair = [module.Switch(slot_map(shards), **limits) for module in (twin, kernel)]
        self.dice = dice
        self.shards = shards
        self.clients: list[tuple[Any, Any]] = []
        self.unsent: list[bytes] = []
        self.questions: list[tuple[Any, Any]] = []
        self.received: dict[int, bytes] = {}  # by shard: an envelope of which the end has not arrived
        self.replies = [b""] * shards
        self.bytes = 0
        for shard in range(shards):
            self.raise_link(shard)

    def same(self, name: str, *arguments: Any) -> Any:
        """Call a method of both, with arguments that may come in pairs; return both results."""
        results = []
        for index, switch in enumerate(self.pair):
            own = [argument[index] if isinstance(argument, tuple) else argument for argument in arguments]
            try:
                results.append(getattr(switch, name)(*own))
            except twin.LinkError as broken:
                results.append(str(broken))
        return results

    def raise_link(self, shard: int) -> None:
        self.same("raise_link", shard)
        self.replies[shard] = b""

    def attach(self) -> None:
        number = len(self.clients)
        self.clients.append(tuple(self.same("attach", number)))
        self.unsent.append(b"")

    def feed(self) -> None:
        number = self.dice.randrange(len(self.clients))
        for _ in range(self.dice.choice([0, 1, 1, 5, 50])):
            self.unsent[number] += random_request(self.dice)
        cut = self.dice.choice([1, 7, 100, 10_000, 65_536])
        piece, self.unsent[number] = self.unsent[number][:cut], self.unsent[number][cut:]
        one, two = self.same("feed", self.clients[number], piece)
        self.note(one, two)

    def note(self, one: list[Any], two: list[Any]) -> None:
        assert [asked[2:] for asked in one] == [asked[2:] for asked in two]
        self.questions += [(first[0], second[0]) for first, second in zip(one, two, strict=True)]

    def resume(self) -> None:
        for clients in self.clients:
            if clients[0].paused and self.dice.random() < 0.7:
                captive = self.dice.random() < 0.1
                for client in clients:
                    client.captive = captive
                self.note(*self.same("resume", clients))

    def answer(self) -> None:
        if self.questions:
            turns = self.questions.pop(self.dice.randrange(len(self.questions)))
            self.same_clients(*[[one] if one else [] for one in self.same("answer", turns, error("ANSWER"))])

    def same_clients(self, one: list[Any], two: list[Any]) -> None:
        assert sorted(client.owner for client in one) == sorted(client.owner for client in two)

    def serve(self) -> None:
        busy = [shard for shard in range(self.shards) if self.pair[0].backlog(shard) or self.replies[shard]]
        for shard in self.dice.sample(busy, min(len(busy), self.dice.choice([1, 2, 128]))):
            one, two = (drain(lambda fd, s=switch: s.flush_link(shard, fd)) for switch in self.pair)  # noqa: B023
            assert one == two
            self.at_shard(shard, one)
            self.merge(shard, self.dice.choice([1, 11, 100, 100_000, 100_000]))

    def at_shard(self, shard: int, data: bytes) -> None:
        """Let a shard take bytes, and answer the envelopes that are whole."""
        data = self.received.get(shard, b"") + data
        self.received[shard] = data
        for _, reply, end in shard_replies(shard, data):
            self.replies[shard] += reply
            self.received[shard] = data[end:]

    def merge(self, shard: int, cut: int) -> None:
        piece, self.replies[shard] = self.replies[shard][:cut], self.replies[shard][cut:]
        one, two = self.same("merge", shard, piece)
        self.same_clients(one[0], two[0])
        assert one[1] == two[1]

    def drop(self) -> None:
        shard = self.dice.randrange(self.shards)
        if self.dice.random() < 0.5:
            bad = false_envelope(
                self.dice.choice(FAULTS), shard, Envelope(1 << 30, [b"x" * 8] * 2, [], None, 0)
            )
            one, two = self.same("merge", shard, self.replies[shard] + bad)
            assert one == two
            assert isinstance(one, str)
        one, two = self.same("drop_link", shard, DOWN)
        self.same_clients(one[0], two[0])
        assert one[1] == two[1]
        self.received.pop(shard, None)
        self.agree()
        self.feed()
        self.raise_link(shard)

    def ask(self) -> None:
        self.same("ask", self.dice.randrange(self.shards), request(b"stats"), self.dice.random())

    def detach(self) -> None:
        self.replace(self.dice.randrange(len(self.clients)))

    def replace(self, number: int) -> None:
        self.same("detach", self.clients[number])
        self.clients[number] = tuple(self.same("attach", number))
        self.unsent[number] = b""

    def agree(self) -> None:
        """Compare all that can be seen."""
        for one, two in self.clients:
            states = [
                (c.owner, c.inflight, c.closing, c.paused, c.held, c.choked, bool(c.out)) for c in (one, two)
            ]
            assert states[0] == states[1]
        for shard in range(self.shards):
            one, two = self.same("backlog", shard)
            assert one == two
            one, two = self.same("is_up", shard)
            assert one == two
        self.same("check")

    def flush(self) -> None:
        number = self.dice.randrange(len(self.clients))
        one, two = (
            drain(lambda fd, s=switch, c=client: s.flush(c, fd))
            for switch, client in zip(self.pair, self.clients[number], strict=True)
        )
        assert one == two
        self.bytes += len(one)
        for client in self.clients[number]:
            client.choked = -1
        if client.closing and not client.inflight:
            self.replace(number)


@pytest.mark.parametrize("seed", range(12))
def test_the_same_bytes_as_the_twin(kernel: Any, seed: int) -> None:
    dice = random.Random(seed)
    both = Both(kernel, dice.choice([1, 2, 4, 7, 128]), dice)
    for _ in range(6):
        both.attach()
    actions = [both.feed] * 10 + [both.serve] * 10 + [both.flush] * 8
    actions += [both.answer, both.resume] * 6 + [both.ask, both.ask, both.detach, both.drop]
    for _ in range(500):
        dice.choice(actions)()
        both.agree()
    assert both.bytes > 5_000


def test_names_are_found_as_the_table_has_them(kernel: Any) -> None:
    """Every spelling of every command, and every name that differs from one by a bit."""
    switch = kernel.Switch(slot_map(1))
    names: set[bytes] = {b"", b"\0", b"x" * 40, b"g" * 32, b"[ET", b"@et", b"{et", b"\xe7et"}
    for command in COMMANDS.values():
        name = command.name.encode()
        names |= {name, name.upper(), name.title(), name.swapcase(), name + b"\0", name[:-1], b" " + name}
        for at in range(len(name)):
            names |= {name[:at] + bytes([name[at] ^ 1 << bit]) + name[at + 1 :] for bit in range(8)}
    with Wire() as wire:
        for name in names:
            command = lookup(name)
            for count in range(1, 6) if command else (1,):
                client = switch.attach(None)
                switch.feed(client, request(name, *[b"x"] * (count - 1)))
                switch.flush(client, wire.fd)
                said = wire.take()[8:]
                if command is None:
                    assert said == b"ERR unknown command", name
                elif not command.arity_ok(count):
                    assert said == b"ERR wrong number of arguments", name
                else:
                    assert said.startswith(b"SHARDDOWN ") or (said == b"" and client.inflight == 1), name


def scenario(switch: Any, clients: list[Any]) -> Iterator[str]:
    """Do everything once; yield before each step what to do if memory runs out in it."""
    keys = [
        next(b"%d" % n for n in range(99) if slot_map(2).shard_of(b"%d" % n) == shard) for shard in (0, 1)
    ]
    frames = [request(b"get", keys[0]), request(b"set", keys[1], b"v" * 3000), request(b"nonsense")]
    for shard in (0, 1):
        yield "raise"
        switch.raise_link(shard)
    for client in clients:
        yield "feed"
        switch.feed(client, b"".join(frames) * 30)
        yield "feed"
        switch.feed(client, frames[1][:2000])
        yield "feed"
        switch.feed(client, frames[1][2000:] + request(b"stats"))
    for _ in range(20):
        yield "ask"
        switch.ask(1, request(b"stats"), "token")
    for shard in (1, 0):
        data = drain(lambda fd, shard=shard: switch.flush_link(shard, fd))
        for _, reply, _ in shard_replies(shard, data):
            for piece in (reply[:50], reply[50:]):
                yield f"merge {shard}"
                if switch.is_up(shard):
                    switch.merge(shard, piece)
    yield "refuse"
    switch.refuse(clients[0], DOWN)
    for client in clients:
        yield "feed"
        switch.feed(client, b"".join(frames))
    for shard in (0, 1):
        yield f"drop {shard}"
        switch.drop_link(shard, DOWN)


def run(kernel: Any, failing: int) -> bool:
    """Do the scenario while allocation number ``failing`` fails; return whether there was one."""
    switch = kernel.Switch(slot_map(2))
    steps = scenario(switch, [switch.attach(None) for _ in range(3)])
    failed, step = False, "before the first"
    kernel.fail_allocation(failing)
    try:
        while step:
            step = next(steps, "")
    except MemoryError:
        failed = True
        for shard in (0, 1):  # as the router has to do
            if step in (f"merge {shard}", f"drop {shard}"):
                switch.drop_link(shard, DOWN)
    finally:
        kernel.fail_allocation(0)
    switch.check()
    for shard in (0, 1):
        switch.drop_link(shard, DOWN)
        switch.raise_link(shard)
    other = switch.attach(None)
    switch.feed(other, request(b"get", b"key"))
    assert other.inflight == 1
    switch.check()
    return failed


def test_without_memory(kernel: Any) -> None:
    """Each allocation fails once, in turn: MemoryError, counters that agree, and others are still served."""
    number = 1
    while run(kernel, number):
        number += 1
    assert number > 30


def test_a_long_reply_of_which_the_rest_finds_no_memory(kernel: Any) -> None:
    """A client that has got part of it never gets anything else for the rest; nobody else is harmed."""
    switch = kernel.Switch(slot_map(1))
    switch.raise_link(0)
    body = b"".join(response(0, name * 300_000) for name in (b"a", b"b"))
    with Wire() as wire, Wire() as other_wire:
        client, other = switch.attach(None, wire.fd), switch.attach(None, other_wire.fd)
        client.plain = True
        for one in (client, other):
            switch.feed(one, request(b"get", b"a") + request(b"get", b"b"))
        drain(lambda fd: switch.flush_link(0, fd))
        kernel.fail_allocation(1)
        assert switch.merge(0, struct.pack(">III", 8 + len(body), 0, 2) + body) == ([], [])
        kernel.fail_allocation(0)
        got = wire.far.recv(1 << 20)
        assert 0 < len(got) < len(body)
        assert body.startswith(got)
        assert wire.far.recv(1) == b""
        switch.feed(client, request(b"nonsense"))
        with pytest.raises(BrokenPipeError):
            switch.flush(client, wire.fd)
        switch.check()
        assert switch.merge(0, struct.pack(">III", 8 + len(body), 1, 2) + body) == ([other], [])


def test_nothing_leaks(kernel: Any) -> None:
    """With and without failures, what a switch has taken is given back with it."""

    def runs() -> None:
        for number in range(60):
            run(kernel, number)
        gc.collect()

    runs()
    before = in_c_memory()
    for _ in range(5):
        runs()
    assert in_c_memory() - before < 100_000


def test_objects_are_let_go(kernel: Any) -> None:
    """Switch, clients, questions and tokens in every order of dying, with requests under way."""

    class Token:
        pass

    for order in ("cqs", "sqc", "qcs", "csq"):
        switch = kernel.Switch(slot_map(1))
        switch.raise_link(0)
        token, owner = Token(), Token()
        seen = [weakref.ref(token), weakref.ref(owner)]
        client = switch.attach(owner)
        owner.client = client  # type: ignore[attr-defined]
        switch.ask(0, request(b"stats"), token)
        questions = switch.feed(client, request(b"get", b"key") + request(b"stats") + request(b"get", b"key"))
        del token, owner
        for which in order:
            if which == "c":
                del client
            elif which == "q":
                del questions
            else:
                del switch
            gc.collect()
        assert [one() for one in seen] == [None, None]
