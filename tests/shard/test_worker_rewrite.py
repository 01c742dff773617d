"""The shard's loop while its log is rewritten, asked to sync, and over a disk that does not answer."""

from __future__ import annotations

import json
import math
import select
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from failing_storage import FastStorage
from rewriting import read
from test_worker import DEADLINE, Disk, Shard

from imds.process import EXIT_DISK
from imds.protocol import OK, encode_request
from imds.shard import aof as aof_module
from imds.shard import rewrite as rewrite_module
from imds.shard import worker as worker_module
from imds.shard.aof import SUSPECT, Aof
from imds.shard.manifest import MANIFEST
from imds.shard.record import each_effect

FAST = FastStorage()
DONE = (OK, b"OK")


@pytest.fixture
def shard(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    made = Shard(tmp_path, getattr(request, "param", "everysec"))
    yield made
    made.stop()


def heard(shard: Shard, kind: str) -> dict[str, Any]:
    """Return the next message of that kind to the supervisor."""
    while True:
        for message, _ in shard.control.receive():
            if message["kind"] == kind:
                return message
        assert select.select([shard.control], [], [], DEADLINE)[0], f"no {kind}"


def stats(shard: Shard) -> dict[str, Any]:
    ((status, payload),) = shard.ask((b"stats",))
    assert status == OK
    found: dict[str, Any] = json.loads(payload)
    return found


def files(shard: Shard) -> list[str]:
    return sorted(path.name for path in shard.aof.directory.iterdir())


def effects(directory: Path) -> list[bytes]:
    """Return what a log holds."""
    found: list[bytes] = []
    aof = Aof(directory, shard=0, generation=1, policy="no", storage=FAST)
    for _ in aof.load(lambda records: found.extend(bytes(records[a:b]) for _, a, b in each_effect(records))):
        pass
    aof.close()
    return found


# -- sync --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["everysec", "no", "always"], indirect=True)
def test_sync_is_answered_when_all_is_on_the_disk(shard: Shard) -> None:
    for number in range(3):
        shard.ask((b"set", b"before", b"%d" % number))
        shard.disk.events.clear()
        replies = shard.ask((b"set", b"key", b"%d" % number), (b"SYNC",), (b"get", b"key"), (b"sync",))
        assert replies == [DONE, DONE, (OK, b"%d" % number), DONE]
        assert shard.disk.events == ["write", "sync"], "once for all of the turn, before any reply"
        assert stats(shard)["aof_unsynced_bytes"] == 0
        shard.disk.events.clear()
        assert shard.ask((b"sync",)) == [DONE]
        assert shard.disk.events == [], "there was nothing to sync"
    assert not shard.disk.early


@pytest.mark.parametrize("shard", ["everysec", "no"], indirect=True)
def test_a_sync_that_fails_is_never_answered(shard: Shard) -> None:
    assert shard.ask((b"set", b"key", b"1")) == [DONE]
    shard.disk.fails = {"sync"}
    shard.send((b"sync",))
    assert shard.ended() == EXIT_DISK
    assert SUSPECT in files(shard)


# -- rewriting ---------------------------------------------------------------------------------------------


def test_a_rewrite_from_the_request_to_its_end(shard: Shard) -> None:
    for number in range(50):
        shard.ask((b"set", b"key", b"%d" % number), (b"zadd", b"z", b"%d" % number, b"m"))
    assert shard.ask((b"rewrite",)) == [DONE]
    assert heard(shard, "rewrite")["at_once"] is True
    assert stats(shard)["rewrite_running"] is False, "it is not this shard's turn yet"
    shard.control.send("rewrite")
    assert heard(shard, "rewritten")["error"] == ""
    assert files(shard) == ["00000001.base", "00000002.aof", MANIFEST]
    row = stats(shard)
    assert (row["rewrites"], row["rewrite_running"], row["last_rewrite_error"]) == (1, False, "")
    assert row["aof_base_bytes"] == (shard.aof.directory / "00000001.base").stat().st_size
    assert shard.ask((b"set", b"other", b"afterwards")) == [DONE]
    shard.stop()
    assert effects(shard.aof.directory) == [
        encode_request([b"set", b"key", b"49"]),
        encode_request([b"zadd", b"z", b"49.0", b"m"]),
        encode_request([b"set", b"other", b"afterwards"]),
    ]


class Gate(Disk):
    """A disk where what a rewrite does, but for syncs of the log, stands still until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.steps: list[str] = []

    def _note(self, name: str) -> None:
        pass

    def step(self, name: str) -> None:
        if threading.current_thread().name == "background":
            self.steps.append(name)
            self.reached.release()
            assert self.go.acquire(timeout=DEADLINE)

    def write(self, fd: int, data: Any) -> int:
        self.step("write")
        return super().write(fd, data)

    def write_at(self, fd: int, data: Any, offset: int) -> int:
        self.step("write_at")
        return super().write_at(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self.step("fsync")

    def fsync_dir(self, path: Path) -> None:
        self.step("fsync_dir")

    def fdatasync(self, fd: int) -> None:
        pass

    def unlink(self, path: Path) -> None:
        self.step("unlink")
        super().unlink(path)


@pytest.mark.parametrize("shard", ["everysec", "always", "no"], indirect=True)
def test_the_loop_goes_on_while_files_are_made_and_removed(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps the shard answers, and what it writes then is in the log that comes of it."""
    monkeypatch.setattr(worker_module, "PIECE", 100)
    shard.ask(*((b"set", b"key-%d" % number, b"x" * 30) for number in range(30)))
    disk = shard.aof._storage = Gate()
    shard.control.send("rewrite")
    turns = 0
    while True:
        if not disk.reached.acquire(timeout=0.01):
            if not stats(shard)["rewrite_running"]:
                break
            continue
        turns += 1
        replies = shard.ask(
            (b"set", b"step", b"%d" % turns),
            (b"get", b"step"),
            (b"append", b"key-%d" % (turns % 30), b"!"),
            (b"rename", b"key-%d" % (-turns % 30), b"key-7"),
            (b"zadd", b"steps", b"1", b"%d" % turns),
        )
        assert replies[1] == (OK, b"%d" % turns)
        disk.go.release()
    assert heard(shard, "rewritten")["error"] == ""
    assert {"write", "fsync", "fsync_dir", "unlink"} <= set(disk.steps)
    assert turns >= 20
    assert stats(shard)["rewrites"] == 1
    assert files(shard) == ["00000001.base", "00000002.aof", MANIFEST]
    digest = shard.worker._store.digest()
    shard.stop()
    copy, _ = read(shard.aof)
    assert copy.digest() == digest


def test_a_save_rests_after_each_piece(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a multiple of the time that the piece took; requests and deadlines are not kept waiting by that."""
    monkeypatch.setattr(worker_module, "PIECE", 1)
    shard.ask(
        *((b"set", b"%d" % number, b"1") for number in range(100)), (b"set", b"timed", b"1", b"px", b"300")
    )
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "SAVE_REST", 1e9)
        shard.control.send("rewrite")
        while shard.worker._save_at == math.inf:
            assert shard.ask((b"get", b"1")) == [(OK, b"1")]
        due = shard.worker._save_at
        used = time.process_time()
        end = time.monotonic() + DEADLINE
        while shard.worker._store.timed:
            time.sleep(0.01)
            assert time.monotonic() < end, "the deadline has come"
        assert time.process_time() - used < 0.2, "it sleeps"
        assert stats(shard)["rewrite_running"] is True
        assert shard.worker._save_at == due
    shard.worker._save_at = 0.0
    shard.ask((b"get", b"1"))
    assert heard(shard, "rewritten")["error"] == ""


def test_what_fails_is_told_and_changes_nothing(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker_module, "PIECE", 1)
    shard.ask(*((b"set", b"%d" % number, b"1") for number in range(100)))
    plain = Disk.write

    def full_for_others(self: Disk, fd: int, data: Any) -> int:
        if fd != shard.aof._fd:
            full()
        return plain(self, fd, data)

    for place, name, wrong, error in (
        (Disk, "fsync", full, "No space left on device"),
        (Disk, "rename", full, "No space left on device"),
        (Disk, "write", full_for_others, "No space left on device"),
        (Disk, "write_at", full, "No space left on device"),
        (worker_module, "next", no_memory, "MemoryError"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, wrong, raising=False)
            shard.control.send("rewrite")
            assert error in heard(shard, "rewritten")["error"]
        row = stats(shard)
        assert (row["rewrites"], row["rewrite_running"]) == (0, False)
        assert error in row["last_rewrite_error"]
        assert not [one for one in files(shard) if one.endswith(".base")]
        assert shard.ask((b"set", b"key", name.encode())) == [DONE]

    def full_at_the_end(self: Disk, old: Path, new: Path) -> None:
        if any(one.endswith(".base") for one in files(shard)):
            full()
        plain_rename(self, old, new)

    plain_rename = Disk.rename
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rename", full_at_the_end)
        shard.control.send("rewrite")
        assert "No space left on device" in heard(shard, "rewritten")["error"]
    assert [one for one in files(shard) if one.endswith(".base")], "a manifest may name it: nobody knows"
    assert shard.ask((b"set", b"key", b"1")) == [DONE]
    shard.control.send("rewrite")
    assert heard(shard, "rewritten")["error"] == ""
    assert shard.ask((b"set", b"key", b"2")) == [DONE]
    assert len(files(shard)) == 3
    shard.stop()
    assert effects(shard.aof.directory)[-1] == encode_request([b"set", b"key", b"2"])


def test_a_base_that_the_disk_does_not_take_is_given_up(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "PIECE", 1)
    monkeypatch.setattr(rewrite_module, "MOST_HELD", 100_000)
    shard.ask(*((b"set", b"%d" % number, b"1") for number in range(100)))
    disk = shard.aof._storage = Gate()
    shard.control.send("rewrite")
    while shard.worker._base is None:
        if disk.reached.acquire(timeout=0.01):
            disk.go.release()
    base = shard.worker._base  # whose file is held up now
    while base.failed is None:
        assert shard.ask((b"set", b"key", b"x" * 10_000)) == [DONE]
    for _ in range(100):
        disk.go.release()
    assert "bytes wait for the disk" in heard(shard, "rewritten")["error"]
    assert not [one for one in files(shard) if one.endswith(".base")]
    assert shard.ask((b"get", b"key")) == [(OK, b"x" * 10_000)]


@pytest.mark.parametrize("percentage", [0, 100])
def test_it_asks_by_itself_when_the_log_has_grown(tmp_path: Path, percentage: int) -> None:
    shard = Shard(tmp_path, "no", aof_rewrite_percentage=percentage, aof_rewrite_min_size=2000)
    asked = 0
    for number in range(60):
        shard.ask((b"set", b"key", b"x" * 50))
        messages = [message for message, _ in shard.control.receive()]
        assert all(message == {"kind": "rewrite", "fds": 0, "at_once": False} for message in messages)
        asked += len(messages)
        if number == 10:
            assert not asked, "it is small"
    assert asked == (1 if percentage else 0), "once is enough"
    shard.stop()
    again = Shard(tmp_path, "no", aof_rewrite_percentage=percentage, aof_rewrite_min_size=2000)
    again.ask((b"get", b"key"))
    messages = [*again.early_messages, *again.control.receive()]
    assert len([message for message, _ in messages if message["kind"] == "rewrite"]) == asked, "after a start"
    again.stop()


# -- a disk that does not answer -----------------------------------------------------------------------------


def test_a_disk_that_does_not_answer_ends_the_shard(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even asked for anything: the loop looks by itself."""
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    monkeypatch.setattr(aof_module, "MAX_STALL", 0.3)
    go = threading.Event()
    monkeypatch.setattr(Disk, "fdatasync", lambda self, fd: go.wait(DEADLINE) and None)
    assert shard.ask((b"set", b"key", b"1")) == [DONE]
    assert shard.ended() == EXIT_DISK
    go.set()
    assert "no sync has ended for 0.3 s" in str(shard.aof.failed)
    assert SUSPECT not in files(shard), "nothing has failed: it is only late"


def test_a_writer_that_waits_for_it_is_not_answered(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aof_module, "SYNC_EVERY", 0.0)
    monkeypatch.setattr(aof_module, "MAX_LAG", 0.1)
    monkeypatch.setattr(aof_module, "MAX_STALL", 1.0)
    go = threading.Event()
    monkeypatch.setattr(Disk, "fdatasync", lambda self, fd: go.wait(DEADLINE) and None)
    assert shard.ask((b"set", b"key", b"1")) == [DONE]
    while shard.aof.unsynced_seconds < 0.2:
        assert shard.ask((b"get", b"key")) == [(OK, b"1")], "reads go on as long as nobody writes"
    lag = stats(shard)
    assert lag["aof_unsynced_seconds"] >= 0.2
    assert lag["aof_unsynced_bytes"] > 0
    shard.send((b"set", b"key", b"2"))
    assert shard.ended() == EXIT_DISK
    go.set()


# -- after a failed sync -------------------------------------------------------------------------------------


def test_a_log_that_could_not_be_synced_is_written_anew_before_it_is_served(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "always")
    shard.ask((b"set", b"key", b"1"), (b"zadd", b"z", b"1", b"m"))
    shard.disk.fails = {"sync"}
    shard.send((b"set", b"key", b"2"))
    assert shard.ended() == EXIT_DISK
    shard.router.close()
    shard.control.close()
    again = Shard(tmp_path, "always")
    assert files(again) == ["00000001.base", "00000002.aof", MANIFEST]
    assert again.ask((b"get", b"key"), (b"zrank", b"z", b"m"), (b"set", b"key", b"3"))[1:] == [
        (OK, b"0"),
        DONE,
    ]
    again.stop()
    assert effects(tmp_path)[-1] == encode_request([b"set", b"key", b"3"])


def test_loading_is_reported_with_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard(tmp_path, "no")
    shard.ask(*[(b"set", b"key%d" % number, b"x" * 1000) for number in range(3000)])
    shard.stop()
    monkeypatch.setattr(worker_module, "REPORT_EVERY", 0.0)
    again = Shard(tmp_path, "no")
    told = [message for message, _ in again.early_messages if message["kind"] == "loading"]
    again.stop()
    assert len(told) >= 3
    assert [message["done"] for message in told] == sorted(message["done"] for message in told)
    assert 0 < told[0]["done"] < told[0]["total"] == told[-1]["done"]
    assert told[0]["left"] > 0 == told[-1]["left"]
    assert told[-1]["records"] == 3000
