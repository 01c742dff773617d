"""The shard's loop over a disk that tells when it is written and synced, and refuses either."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FastStorage

from imds.config import Config
from imds.control import Channel
from imds.envelope import REPLY, seal
from imds.process import EXIT_DISK
from imds.protocol import ERROR, MISSING, OK, Buffer, decode_response, encode_request
from imds.shard.aof import SUSPECT, Aof, AofError, create_log
from imds.shard.links import Grant
from imds.shard.segment import FILL
from imds.shard.worker import Worker

DEADLINE = 20


class Disk(FastStorage):
    """Notes each write and sync, and whether a reply had left by then; fails those that ``fails`` names."""

    def __init__(self) -> None:
        self.router: socket.socket | None = None  # the other end of the worker's link
        self.events: list[str] = []
        self.early: list[str] = []  # events that came after a reply
        self.fails: set[str] = set()

    def _note(self, name: str) -> None:
        if self.router is None:
            return
        self.events.append(name)
        if select.select([self.router], [], [], 0)[0]:
            self.early.append(name)
        if name in self.fails:
            raise OSError(errno.ENOSPC, "no room")

    def write_at(self, fd: int, data: Buffer, offset: int) -> int:
        self._note("write" if bytes(data).strip(FILL) else "make room")
        return super().write_at(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self._note("sync")

    def truncate(self, fd: int, size: int) -> None:
        self._note("truncate")
        super().truncate(fd, size)


class Shard:
    """A worker in a thread, and the router's end of a link to it."""

    def __init__(self, directory: Path, policy: str, **options: Any) -> None:
        self.disk = Disk()
        if not any(directory.iterdir()):
            create_log(self.disk, directory, shard=0, generation=1)
        self.aof = Aof(directory, shard=0, generation=1, policy=policy, storage=self.disk)
        self.control, theirs = Channel.pair()
        self.exit_code: int | None = None
        self.worker = Worker(Config(appendfsync=policy, **options), 0, self.aof, Channel(theirs))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.router, shard_end = socket.socketpair()
        self.router.settimeout(DEADLINE)
        with shard_end:
            self.control.send("link", (shard_end.fileno(),), router=0)
        self.ticket = 0
        self.early_messages: list[Any] = []  # that came until it was ready
        while not any(message["kind"] == "ready" for message, _ in self.early_messages):
            assert select.select([self.control], [], [], DEADLINE)[0]
            self.early_messages += self.control.receive()
        self.disk.router = self.router

    def _run(self) -> None:
        self.exit_code = self.worker.run()

    def send(self, *requests: tuple[bytes, ...]) -> None:
        """Send one envelope."""
        frames = b"".join(encode_request(tokens) for tokens in requests)
        self.router.sendall(seal(self.ticket, len(requests), frames))
        self.ticket += 1

    def ask(self, *requests: tuple[bytes, ...]) -> list[tuple[int, bytes]]:
        """Send one envelope and return the replies to it."""
        self.send(*requests)
        length, ticket, count = REPLY.unpack(self._receive(REPLY.size))
        assert (ticket, count) == (self.ticket - 1, len(requests))
        body, position, found = self._receive(length - 8), 0, []
        while decoded := decode_response(body, position):
            status, payload, position = decoded
            found.append((status, payload))
        assert position == len(body)
        return found

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.router.recv(size - len(data))
            assert chunk, "the link has ended"
            data += chunk
        return data

    def ended(self) -> int | None:
        """Return the exit code of a worker that is about to end; nothing may have been replied since."""
        assert self.router.recv(1) == b"", "a reply although nobody knows what is on the disk"
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        return self.exit_code

    def stop(self) -> None:
        self.disk.fails.clear()
        if self.exit_code is None:
            self.control.send("stop")
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        with suppress(AofError):
            self.aof.close()  # a worker that fails leaves this to the end of its process
        self.router.close()
        self.control.close()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[dict[str, Shard]]:
    """Return a running shard for each fsync policy."""
    made = {}
    for policy in ("always", "everysec", "no"):
        (tmp_path / policy).mkdir()
        made[policy] = Shard(tmp_path / policy, policy)
    yield made
    for shard in made.values():
        shard.stop()


def test_a_write_is_in_the_file_before_its_reply_leaves(shards: dict[str, Shard]) -> None:
    for policy, shard in shards.items():
        for number in range(5):
            shard.disk.events.clear()
            assert shard.ask(
                (b"set", b"key", b"%d" % number), (b"get", b"key"), (b"zadd", b"z", b"1", b"m")
            ) == [
                (OK, b"OK"),
                (OK, b"%d" % number),
                (OK, b"OK"),
            ]
            events = [name for name in shard.disk.events if name != "make room"]
            assert events[0] == "write", policy
            assert events.count("write") == 1, "one write for the whole batch"
            if policy == "always":
                assert events == ["write", "sync"], "one sync, and the reply after it"
        assert "write" not in shard.disk.early
        assert policy != "always" or not shard.disk.early


def test_another_policy_begins_with_all_on_the_disk(shards: dict[str, Shard]) -> None:
    def change(shard: Shard, policy: str) -> list[str]:
        shard.disk.events.clear()
        changes = json.dumps({"appendfsync": policy}).encode()
        assert shard.ask((b"set", b"before", b"1"), (b"_configure", changes)) == [(OK, b"OK")] * 2
        assert shard.aof.policy == policy
        return shard.disk.events.copy()

    def events_of_a_write(shard: Shard) -> list[str]:
        shard.disk.events.clear()
        assert shard.ask((b"set", b"k", b"v")) == [(OK, b"OK")]
        return [name for name in shard.disk.events if name not in ("truncate", "make room")]

    shard = shards["everysec"]
    shard.ask((b"set", b"k", b"v"))
    assert change(shard, "always")[-2:] == ["write", "sync"]
    assert events_of_a_write(shard) == ["write", "sync"]
    assert change(shard, "no")[-2:] == ["write", "sync"]
    assert events_of_a_write(shard) == ["write"]
    assert change(shard, "everysec")[-2:] == ["write", "sync"]
    assert shard.aof.stats()["aof_unsynced_bytes"] == 0
    assert events_of_a_write(shard) == ["write"]
    until = time.monotonic() + DEADLINE
    while "sync" not in shard.disk.events:
        assert time.monotonic() < until, "nobody syncs"
        time.sleep(0.01)
    assert not shard.disk.early, "a reply left before the disk had what it rests on"
    shard = shards["no"]
    shard.control.send("configure", changes={"appendfsync": "always"})
    until = time.monotonic() + DEADLINE
    while shard.aof.policy != "always":
        assert time.monotonic() < until, "the supervisor is not heard"
        time.sleep(0.01)
    assert events_of_a_write(shard) == ["write", "sync"]


def test_reads_touch_no_disk(shards: dict[str, Shard]) -> None:
    for shard in shards.values():
        assert shard.ask((b"get", b"key"), (b"del", b"key"), (b"zrank", b"z", b"m")) == [(MISSING, b"")] * 3
        assert shard.disk.events == []


def test_after_a_failed_sync_there_is_no_reply(shards: dict[str, Shard]) -> None:
    shard = shards["always"]
    assert shard.ask((b"set", b"key", b"1")) == [(OK, b"OK")]
    shard.disk.fails = {"sync"}
    shard.send((b"set", b"key", b"2"), (b"get", b"other"))
    assert shard.ended() == EXIT_DISK


def test_after_a_failed_sync_by_a_grant_there_is_no_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "direct", True)
    shard = Shard(tmp_path, "always")
    for number in range(3):
        assert shard.ask((b"set", b"key", b"%d" % number)) == [(OK, b"OK")]
    assert "write" not in shard.disk.events[-2:], "the links' kernel writes by itself"
    shard.disk.fails = {"sync"}
    shard.send((b"set", b"key", b"3"), (b"get", b"other"))
    assert shard.ended() == EXIT_DISK
    assert (tmp_path / SUSPECT).exists()
    shard.stop()


def test_a_sync_that_failed_in_the_background_ends_the_next_write(shards: dict[str, Shard]) -> None:
    shard = shards["everysec"]
    shard.disk.fails = {"sync"}
    assert shard.ask((b"set", b"key", b"1")) == [(OK, b"OK")]
    end = threading.Event()
    for _ in range(100 * DEADLINE):
        if shard.aof.failed is not None:
            break
        end.wait(0.01)
    with suppress(BrokenPipeError):  # it has ended already: it looks now and then
        shard.send((b"set", b"key", b"2"))
    assert shard.ended() == EXIT_DISK


def test_what_the_disk_has_taken_of_a_granted_append_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard(tmp_path, "no")
    assert shard.ask((b"set", b"key", b"old")) == [(OK, b"OK")]
    unwritable = os.open(tmp_path, os.O_RDONLY)
    parts = [b"part"]

    def grant() -> Grant:
        while parts:
            os.pwrite(shard.aof._fd, parts.pop(), shard.aof._size)  # where it would be
        return Grant(unwritable, 0, 1 << 62, None, shard.aof._size, shard.aof._length)

    monkeypatch.setattr(shard.aof, "grant", grant)
    assert shard.ask((b"get", b"key")) == [(OK, b"old")]
    while parts:  # until the turn of this request has ended
        select.select([], [], [], 0.01)
    assert shard.ask((b"set", b"key", b"v" * 5000)) == [(OK, b"OK")]
    shard.stop()
    os.close(unwritable)
    again = Shard(tmp_path, "no")
    assert again.aof.torn_bytes == 0
    assert again.ask((b"get", b"key")) == [(OK, b"v" * 5000)]
    again.stop()


def test_a_refused_write_is_undone_and_said_so(shards: dict[str, Shard]) -> None:
    for shard in shards.values():
        assert shard.ask((b"set", b"key", b"old"), (b"zadd", b"z", b"1", b"m")) == [(OK, b"OK")] * 2
        shard.disk.fails = {"write"}
        replies = shard.ask(
            (b"get", b"key"),
            (b"set", b"key", b"new"),
            (b"get", b"key"),
            (b"zrem", b"z", b"m"),
            (b"zrank", b"z", b"m"),
            (b"set", b"other", b"new"),
            (b"get", b"other"),
        )
        refused = (ERROR, b"READONLY the log takes no writes: No space left on device (ENOSPC)")
        assert replies == [
            (OK, b"old"),
            refused,
            (OK, b"old"),
            refused,
            (OK, b"0"),
            refused,
            (MISSING, b""),
        ]
        size = shard.aof.disk_bytes()
        assert shard.ask((b"set", b"key", b"new")) == [refused]
        assert shard.aof.disk_bytes() == size
        shard.disk.fails.clear()
        for _ in range(100 * DEADLINE):  # until the probe has found that the disk takes writes
            if shard.ask((b"set", b"key", b"new")) == [(OK, b"OK")]:
                break
            threading.Event().wait(0.01)
        assert shard.ask((b"get", b"key"), (b"get", b"other")) == [(OK, b"new"), (MISSING, b"")]


def test_a_refused_write_that_cannot_be_taken_back_ends_the_shard(shards: dict[str, Shard]) -> None:
    for shard in shards.values():
        shard.disk.fails = {"write", "truncate"}
        shard.send((b"set", b"key", b"value"))
        assert shard.ended() == EXIT_DISK
