"""The streams between a shard and its routers, in each variant."""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from imds.envelope import envelopes, seal
from imds.protocol import Buffer, encode_request
from imds.shard import links as twin
from imds.shard import record, store
from imds.shard.segment import FILL, ROOM

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Echo:
    """A store: answers each envelope by its frames and the number of the run, logs what begins with w."""

    def __init__(self) -> None:
        self.log = self
        self.records = b""
        self.runs = 0
        self.now = 0

    def pending(self) -> bytes:
        return self.records

    def commit(self) -> None:
        self.records = b""

    def execute(self, data: Buffer) -> tuple[int, bytes]:
        self.runs += 1
        used, out = 0, b""
        data = bytes(data)
        for _ticket, _count, _dialect, start, end in envelopes(data):
            if data[start:end].startswith(b"w"):
                self.records += data[start:end]
            out += b"<%d:" % self.runs + data[start:end] + b">"
            used = end
        return used, out


class Loop:
    def __init__(self, variant: Any, selector: selectors.BaseSelector) -> None:
        self.stack = ExitStack()
        self.selector = self.stack.enter_context(selector)
        self.links = variant.pick(twin.Links, "links")(lambda: 7000)
        self.store = Echo()

    def link(self, router: bytes = b"0") -> tuple[Any, socket.socket]:
        near, far = socket.socketpair()
        self.stack.enter_context(near)
        self.stack.enter_context(far)
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        far.settimeout(5)
        self.selector.register(near, READ)
        return self.links.add(near, router), far

    def turn(self, timeout: float | None = 0) -> Any:
        return self.links.turn(self.selector, timeout, self.store)


@pytest.fixture(params=["default", "select"])
def loop(request: Any, variant: Any) -> Iterator[Loop]:
    """With epoll, where the system has it, and without."""
    kind = selectors.DefaultSelector if request.param == "default" else selectors.SelectSelector
    made = Loop(variant, kind())
    with made.stack:
        yield made


def silent(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1)
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(5)


def test_a_turn_that_logs_nothing_answers_at_once(loop: Loop) -> None:
    (one, far_one), (_two, far_two) = loop.link(b"7"), loop.link()
    assert (one.router, one.notices, one.mask) == (b"7", 0, READ)
    far_one.send(seal(0, 1, b"abcd") + seal(1, 1, b"efgh"))
    far_two.send(seal(0, 1, b"ijkl"))
    assert loop.turn() is None
    assert (loop.links.executed, loop.links.waiting, loop.links.changed) == (2, False, [])
    assert loop.store.now == 7
    assert (far_one.recv(99), far_two.recv(99)) in (  # whichever the selector names first
        (b"<1:abcd><1:efgh>", b"<2:ijkl>"),
        (b"<2:abcd><2:efgh>", b"<1:ijkl>"),
    )
    assert loop.turn() is None
    assert loop.links.executed == 0


def test_whole_and_byte_by_byte_and_with_a_tail(loop: Loop) -> None:
    _link, far = loop.link()
    envelope = seal(3, 1, b"0123456789")
    for at in range(len(envelope)):
        far.send(envelope[at : at + 1])
        assert loop.turn() is None
        assert loop.links.executed == (at == len(envelope) - 1)
    far.send(envelope + envelope[:9])
    loop.turn()
    far.send(envelope[9:])
    loop.turn()
    assert far.recv(999) == b"<1:0123456789><2:0123456789><3:0123456789>"


def test_what_is_logged_waits_and_may_be_executed_again(loop: Loop) -> None:
    _link, far = loop.link()
    _other, far_other = loop.link()
    far.send(seal(0, 1, b"write") + seal(1, 1, b"read"))
    far_other.send(seal(0, 1, b"read"))
    loop.turn()
    assert loop.links.waiting
    assert loop.store.records == b"write"
    assert silent(far)
    assert silent(far_other)
    loop.store.records = b""
    loop.store.runs = 10
    loop.links.again(loop.store)
    assert loop.store.records == b"write"
    loop.store.records = b""
    loop.links.reply()
    assert not loop.links.waiting
    loop.links.again(loop.store)  # nothing: its replies are gone
    assert loop.store.runs == 12
    assert {far.recv(99), far_other.recv(99)} in (
        {b"<11:write><11:read>", b"<12:read>"},
        {b"<12:write><12:read>", b"<11:read>"},
    )
    far.send(seal(2, 1, b"more"))
    loop.turn()
    assert far.recv(99) == b"<13:more>"


def test_a_turn_that_was_asked_to_hold_waits(loop: Loop) -> None:
    _link, far = loop.link()
    plain = loop.store.execute

    def execute(data: Buffer) -> tuple[int, bytes]:
        loop.links.hold = True
        return plain(data)

    loop.store.execute = execute  # type: ignore[method-assign]
    far.send(seal(0, 1, b"read"))
    loop.turn()
    assert loop.links.waiting
    assert loop.links.hold
    assert silent(far)
    loop.links.reply()
    assert far.recv(99) == b"<1:read>"
    loop.turn()
    assert not loop.links.hold


def test_a_turn_goes_on_while_nothing_is_left_to_the_worker(loop: Loop) -> None:
    _link, far = loop.link()
    answers = []

    def execute(data: Buffer) -> tuple[int, bytes]:
        if len(answers) < 5:  # the next request is there when this one has been answered
            far.send(seal(0, 1, b"again"))
        answers.append(bytes(data))
        return plain(data)

    plain = loop.store.execute
    loop.store.execute = execute  # type: ignore[method-assign]
    far.send(seal(0, 1, b"first"))
    assert loop.turn(5) is None  # and it ends long before
    assert (loop.links.executed, len(answers)) == (6, 6)
    assert far.recv(999) == b"<1:first>" + b"".join(b"<%d:again>" % n for n in range(2, 7))


def test_a_turn_ends_although_requests_keep_coming(loop: Loop) -> None:
    _link, far = loop.link()
    plain = loop.store.execute

    def execute(data: Buffer) -> tuple[int, bytes]:
        far.recv(99) if loop.store.runs else None
        far.send(seal(0, 1, b"again"))
        return plain(data)

    loop.store.execute = execute  # type: ignore[method-assign]
    far.send(seal(0, 1, b"first"))
    loop.turn(None)
    assert loop.links.executed > 1


def granted(
    fd: int, since: int = 0, until: int = 8000, sync: Any = None, end: int = 0, length: int = 1 << 20
) -> twin.Grant:
    """Return a leave to append; the clock stands at 7000. By default the file is said to have room enough."""
    return twin.Grant(fd, since, until, sync, end, length)


@pytest.fixture
def file(loop: Loop, tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_by_a_grant_effects_are_appended_and_committed_before_the_reply(loop: Loop, file: int) -> None:
    _link, far = loop.link()
    plain = loop.store.execute

    def execute(data: Buffer) -> tuple[int, bytes]:
        seen.append((os.pread(file, 99, 0), loop.store.records))
        if len(seen) == 1:
            far.send(seal(0, 1, b"w2"))
        return plain(data)

    seen: list[tuple[bytes, bytes]] = []
    loop.store.execute = execute  # type: ignore[method-assign]
    loop.links.grant = granted(file)
    far.send(seal(0, 1, b"w1"))
    loop.turn(5)
    assert seen == [(b"", b""), (b"w1", b"")]  # by the time of the second, the first is in the file
    assert (loop.links.appended, loop.links.waiting, loop.links.torn) == (4, False, False)
    assert os.pread(file, 99, 0) == b"w1w2"
    assert far.recv(99) == b"<1:w1><2:w2>"
    loop.links.appended = 0  # as the worker does, who counts
    loop.turn()
    assert loop.links.appended == 0


def test_what_a_store_logs_is_appended_whole(loop: Loop, file: int, variant: Any) -> None:
    log = variant.pick(record.RecordEncoder, "record")(5)
    loop.store = variant.pick(store.UnifiedStore, "store")(log)
    _link, far = loop.link()
    loop.links.grant = granted(file)
    for ticket in range(2):
        frames = [encode_request([b"set", b"key", b"%d" % number]) for number in range(3)]
        far.send(seal(ticket, 3, b"".join(frames)))
        loop.turn()
        loop.links.grant = granted(file, end=os.stat(file).st_size)
    records = os.pread(file, 9999, 0)
    assert record.verify_records(records, 5, 1) == (6, len(records), None)
    assert loop.links.appended == len(records) // 2  # by the last turn


def test_what_was_appended_is_synced_before_the_reply_if_it_has_to_be(loop: Loop, file: int) -> None:
    _link, far = loop.link()
    seen: list[tuple[int, bytes, bool]] = []

    def sync(fd: int) -> None:
        seen.append((fd, os.pread(fd, 99, 0), silent(far)))
        if len(seen) == 2:
            raise OSError(errno.EIO, "")

    loop.links.grant = granted(file, sync=sync)
    far.send(seal(0, 1, b"read"))
    loop.turn()
    assert far.recv(99) == b"<1:read>"
    assert not seen
    far.send(seal(1, 1, b"w1"))
    loop.turn()
    assert far.recv(99) == b"<2:w1>"
    assert loop.links.unsynced is None
    loop.links.grant = granted(file, sync=sync, end=2)
    far.send(seal(2, 1, b"w2"))
    loop.turn()
    assert (type(loop.links.unsynced), loop.links.waiting) == (OSError, True)
    assert silent(far)
    assert seen == [(file, b"w1", True), (file, b"w1w2", True)]
    loop.turn()
    assert loop.links.unsynced is None


@pytest.mark.parametrize("grant", [None, (0, 7000), (7001, 9000)], ids=["none", "over", "not yet"])
def test_without_a_grant_that_holds_nothing_is_appended(loop: Loop, file: int, grant: Any) -> None:
    _link, far = loop.link()
    loop.links.grant = grant and granted(file, *grant)
    far.send(seal(0, 1, b"write"))
    loop.turn()
    assert (loop.links.appended, loop.links.waiting, loop.store.records) == (0, True, b"write")
    assert os.pread(file, 99, 0) == b""
    assert silent(far)


@pytest.mark.parametrize("by", ["end", "hold"])
def test_what_asks_for_the_worker_gets_it(loop: Loop, file: int, by: str) -> None:
    _link, far = loop.link()
    plain = loop.store.execute

    def execute(data: Buffer) -> tuple[int, bytes]:
        if by == "end":
            loop.links.end()
        else:
            loop.links.hold = True
        far.send(seal(0, 1, b"next"))
        return plain(data)

    loop.store.execute = execute  # type: ignore[method-assign]
    loop.links.grant = granted(file)
    far.send(seal(0, 1, b"write"))
    loop.turn(5)
    assert (loop.links.executed, loop.links.waiting, loop.links.appended) == (1, True, 0)
    assert loop.store.records == b"write"


@contextmanager
def limited(size: int) -> Iterator[None]:
    """The system lets no file become longer than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "sizes", [(5,), (ROOM,), (ROOM + 1,), (ROOM - 1, 1, 1), (70_000, 7, ROOM, 50_000, 999_999, 3)]
)
def test_room_is_made_for_what_is_appended(loop: Loop, file: int, sizes: tuple[int, ...]) -> None:
    """The file is what was appended, and room up to a multiple of ROOM where that is worth it."""
    _link, far = loop.link()
    length = 0
    expected = b""
    for number, size in enumerate(sizes, 1):
        loop.store.records = bytes([number]) * (size - 1)
        loop.links.grant = granted(file, end=len(expected), length=length)
        far.send(seal(number, 1, b"w"))
        loop.turn()
        expected += bytes([number]) * (size - 1) + b"w"
        if len(expected) > length:
            length = -(-len(expected) // ROOM) * ROOM if size <= ROOM else len(expected)
        assert (loop.links.appended, loop.links.length, loop.links.torn) == (size, length, False)
        assert os.pread(file, 1 << 22, 0) == expected.ljust(length, FILL)


def test_rounds_of_a_turn_share_the_room(loop: Loop, file: int) -> None:
    _link, far = loop.link()
    plain, left = loop.store.execute, [b"w2", b"w3"]

    def execute(data: Buffer) -> tuple[int, bytes]:
        if left:
            far.send(seal(0, 1, left.pop(0)))
        return plain(data)

    loop.store.execute = execute  # type: ignore[method-assign]
    os.pwrite(file, b"old", 0)
    loop.links.grant = granted(file, end=3, length=3)
    far.send(seal(0, 1, b"w1"))
    loop.turn(5)
    assert (loop.links.appended, loop.links.length) == (6, ROOM)
    assert os.pread(file, 2 * ROOM, 0) == b"oldw1w2w3".ljust(ROOM, FILL)


@pytest.mark.parametrize("limit", [5, 6, 4999])
def test_a_disk_that_has_no_room_takes_the_records_all_the_same(loop: Loop, file: int, limit: int) -> None:
    _link, far = loop.link()
    loop.links.grant = granted(file, length=0)
    far.send(seal(0, 1, b"write"))
    with limited(limit):
        loop.turn()
    assert (loop.links.appended, loop.links.length, loop.links.torn) == (5, limit, False)
    assert os.pread(file, 9999, 0) == b"write".ljust(limit, FILL)


def test_a_disk_that_takes_nothing_or_a_part(loop: Loop, file: int, tmp_path: Path) -> None:
    _link, far = loop.link()
    far.send(seal(0, 1, b"write"))
    loop.links.grant = granted(os.open(tmp_path, os.O_RDONLY))
    loop.turn()
    assert (loop.links.appended, loop.links.torn, loop.links.waiting) == (0, True, True)  # it may have some
    os.close(loop.links.grant[0])
    loop.store.records = b"w" * 200
    loop.links.reply()
    loop.links.grant = granted(file, length=0)
    far.send(seal(1, 1, b"write"))
    with limited(100):
        loop.turn()
    assert (loop.links.appended, loop.links.torn, loop.links.waiting) == (0, True, True)
    assert len(loop.store.records) == 205  # nothing was committed
    assert os.stat(file).st_size == 100


def test_events_of_others_are_left_to_the_worker(loop: Loop) -> None:
    near, far = socket.socketpair()
    with near, far:
        loop.selector.register(near, READ | WRITE)
        far.send(b"?")
        assert loop.turn() == [(near.fileno(), READ | WRITE)]


def test_a_link_that_does_not_take_everything(loop: Loop) -> None:
    link, far = loop.link()
    sent = b""
    while not loop.links.changed:
        frames = b"%05d" % len(sent) * 2000
        far.send(seal(0, 1, frames))
        sent += b"<%d:" % (loop.store.runs + 1) + frames + b">"
        loop.turn()
    assert set(loop.links.changed) == {link}
    assert link.out
    assert 0 < link.unsent < len(sent)
    loop.links.push(link, b"!")  # behind what waits
    sent += b"!"
    loop.links.changed.clear()
    loop.selector.modify(link.sock, READ | WRITE)
    received = b""
    while len(received) < len(sent):
        received += far.recv(1 << 20)
        loop.turn()
    assert received == sent
    assert set(loop.links.changed) == {link}
    assert not link.out


def test_pushed_bytes_go_at_once(loop: Loop) -> None:
    link, far = loop.link()
    loop.links.push(link, b"notice")
    assert far.recv(99) == b"notice"
    assert not loop.links.changed


@pytest.mark.parametrize("when", ["before", "waiting"])
def test_the_end_of_a_link(loop: Loop, when: str) -> None:
    link, far = loop.link()
    _other, far_other = loop.link()
    if when == "waiting":
        far.send(seal(0, 1, b"write"))
        far_other.send(seal(0, 1, b"read"))
        loop.turn()
    far.close()
    if when == "waiting":
        loop.links.reply()  # the other one's still comes
        assert far_other.recv(99)[-6:] == b":read>"
        loop.store.records = b""
    loop.turn()
    assert link.ended
    assert link in loop.links.changed
    loop.selector.unregister(link.sock)
    loop.links.drop(link)
    assert link.fd not in loop.links.by_fd
    loop.links.changed.clear()
    assert loop.turn() is None
    assert not loop.links.changed


def test_what_no_router_sends_is_raised(loop: Loop) -> None:
    _link, far = loop.link()

    def execute(data: Buffer) -> tuple[int, bytes]:
        raise ValueError("no router sends this")

    loop.store.execute = execute  # type: ignore[method-assign]
    far.send(seal(0, 1, b"read"))
    with pytest.raises(ValueError, match="no router"):
        loop.turn()
