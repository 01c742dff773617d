"""Routers that ask each other, by a supervisor that hands on what they say."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imds.router import peers
from imds.router.peers import Peers


class Supervisor:
    """Routers, of which some may be down; what they say is handed on by :meth:`act`."""

    def __init__(self, routers: int) -> None:
        self.said: list[tuple[int, str, tuple[int, ...], dict[str, Any]]] = []
        self.down: set[int] = set()
        self.routers = [Peers(self.host(number, routers), number) for number in range(routers)]
        for number, router in enumerate(self.routers):
            router.handlers[b"who"] = lambda words, number=number: b"%d:%b" % (number, b",".join(words))

    def host(self, router: int, routers: int) -> Any:
        def send(kind: str, fds: tuple[int, ...] = (), **fields: Any) -> bool:
            self.said.append((router, kind, tuple(map(os.dup, fds)), fields))
            return True

        return SimpleNamespace(config=SimpleNamespace(routers=routers), channel=SimpleNamespace(send=send))

    def act(self) -> None:
        said, self.said = self.said, []
        for router, kind, fds, fields in said:
            if kind == "answered":
                self.routers[fields["router"]].on_answered(fields["number"], router, there=True)
                continue
            others = [number for number in range(len(self.routers)) if number != router]
            for other, fd in zip(others, fds, strict=True):
                if other in self.down:
                    self.routers[router].on_answered(fields["number"], other, there=False)
                    os.close(fd)
                else:
                    self.routers[other].on_ask(router, fields["number"], fd)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Any:
    def count() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before = count()
    yield
    assert count() == before


def test_every_router_answers() -> None:
    supervisor = Supervisor(3)
    found: list[list[bytes]] = []
    supervisor.routers[1].ask([b"who", b"a", b"b" * 300_000], found.append)
    assert found == []
    assert supervisor.routers[1]
    supervisor.act()
    supervisor.act()
    assert [sorted(answers) for answers in found] == [
        [b"%d:a,%b" % (number, b"b" * 300_000) for number in range(3)]
    ]
    assert not supervisor.routers[1]


def test_one_router_alone_answers_at_once() -> None:
    found: list[list[bytes]] = []
    Supervisor(1).routers[0].ask([b"who"], found.append)
    assert found == [[b"0:"]]


def test_who_is_not_there_is_left_out() -> None:
    supervisor = Supervisor(3)
    found: list[list[bytes]] = []
    supervisor.down = {2}
    supervisor.routers[0].ask([b"who"], found.append)
    supervisor.act()
    supervisor.act()
    assert found == [[b"0:", b"1:"]]


def test_who_is_silent_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor(2)
    found: list[list[bytes]] = []
    router = supervisor.routers[0]
    router.ask([b"who", b"1"], found.append)
    router.on_time()
    assert found == []
    monkeypatch.setattr(peers, "PATIENCE", 0)
    router.ask([b"who", b"2"], found.append)
    router.on_time()
    assert found == [[b"0:2"]]
    supervisor.act()
    supervisor.act()
    assert found == [[b"0:2"], [b"0:1", b"1:1"]], "what comes too late is not heard"


def test_without_room_for_files_there_is_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([peers.tempfile.TemporaryFile()])

    def no_more() -> Any:
        for file in made:
            return file
        raise OSError(28, "no room")

    monkeypatch.setattr(peers.tempfile, "TemporaryFile", no_more)
    found: list[list[bytes]] = []
    Supervisor(3).routers[2].ask([b"who"], found.append)
    assert found == [[b"2:"]]
