"""The logs under a running server: fsync policies, torn tails, damage, a full disk."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Server, receive_replies, request, until

from imds import Client
from imds.protocol import ERROR, OK
from imds.shard.segment import FILL


@pytest.mark.parametrize("policy", ["always", "everysec", "no"])
def test_each_fsync_policy_serves_and_keeps_what_was_acknowledged(
    server: Callable[..., Server], policy: str
) -> None:
    one = server().start("--shards", "2", "--appendfsync", policy)
    client = one.client()
    for number in range(100):
        client.set(b"key:%d" % number, b"%d" % number)
    rows = one.stats()
    assert [row["aof_policy"] for row in rows] == [policy] * 2
    if policy == "always":
        assert [row["aof_unsynced_bytes"] for row in rows] == [0, 0]
        assert sum(row["aof_fsyncs"] for row in rows) >= 100
    elif policy == "everysec":
        until("a sync", lambda: all(row["aof_unsynced_bytes"] == 0 for row in one.stats()))
        assert 0 < sum(row["aof_fsyncs"] for row in one.stats()) < 60
    else:
        assert [row["aof_fsyncs"] for row in rows] == [0, 0]
        assert all(row["aof_unsynced_bytes"] > 0 for row in rows)
    one.kill()
    one.start("--shards", "2", "--appendfsync", policy)
    assert " 100 keys loaded" in one.ready_line
    assert not one.logged("torn"), "the room behind the records is none"
    one.stop()


def test_a_torn_tail_is_cut_saved_and_reported(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3")
    client, keys = one.client(), one.keys_of(1)
    first, last = next(keys), next(keys)
    client.set(first, b"whole")
    client.set(last, b"torn")
    os.kill(one.shard(1).pid, signal.SIGSTOP)  # a clean end would put a mark behind the last record
    one.kill()
    log = one.segment(1)
    whole = log.read_bytes()
    torn = whole.rstrip(FILL)[:-3]
    assert len(torn) < len(whole) - 3, "behind the records is room"
    log.write_bytes(torn + whole[len(torn) + 3 :])
    one.start("--shards", "3")
    client = one.client()
    assert client.get(first) == b"whole"
    assert client.get(last) is None
    (line,) = one.logged("torn tail")
    assert "shard-1[" in line
    assert str(log) in line
    offset = log.stat().st_size
    assert f"at offset {offset}" in line
    saved = log.with_name(f"{log.name}.torn-{offset}")
    assert log.read_bytes() + saved.read_bytes() == torn
    assert client.set(last, b"again")
    assert one.stats()[1]["aof_torn_bytes"] == len(saved.read_bytes())
    one.stop()
    one.start("--shards", "3")
    assert one.client().get(last) == b"again"
    assert not one.logged("torn")
    one.stop()


def test_damage_in_the_middle_keeps_one_shard_down_and_says_where(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "4")
    client = one.client()
    keys = [next(one.keys_of(shard)) for shard in range(4)]
    for key in keys:
        client.set(key, b"first")
        client.set(key, b"second")
    one.stop()
    log = one.segment(2)
    good = log.read_bytes()
    at = good.index(b"first")
    log.write_bytes(good[:at] + b"F" + good[at + 1 :])

    one.expect(r"shard-2\[\d+\] CRITICAL refusing to start", "shard 2 stays down: it refused its log")
    one.start("--shards", "4")
    assert "3 of 4 shards, 3 keys loaded" in one.ready_line
    (line,) = one.logged("refusing to start")
    assert f"{log} is damaged at byte " in line
    assert 0 < at - int(line.split("damaged at byte ")[1].split(":")[0]) < 100
    client = one.client()
    for shard, key in enumerate(keys):
        if shard != 2:
            assert client.get(key) == b"second"
            assert client.set(key, b"third")
    status, text = client.execute(b"get", keys[2])
    assert status == ERROR
    assert text.startswith(b"SHARDDOWN shard 2 ")
    assert [row["state"] for row in one.stats()] == ["up", "up", "down", "up"]
    assert log.read_bytes()[:at] == good[:at], "a damaged log is not touched"
    assert len(log.read_bytes()) == len(good)
    one.stop()

    log.write_bytes(good)
    one.start("--shards", "4")
    assert one.client().get(keys[2]) == b"second"
    one.stop()


def test_a_server_whose_every_log_is_damaged_ends(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "1")
    one.client().set("key", "value")
    one.client().set("other", "value")
    one.stop()
    log = one.segment(0)
    log.write_bytes(log.read_bytes().replace(b"key", b"kez"))
    one.expect("CRITICAL refusing to start", "stays down", "CRITICAL no shard is left: stopping")
    one.start("--shards", "1", ready=False)
    one.ended(1)
    assert one.logged("no shard is left: stopping")


# -- a full disk ----------------------------------------------------------------------------------

FULL = b"READONLY the log takes no writes: "


class FullDisk:
    """Writes that tell what a disk without room did to them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.value = b"x" * 2000
        self.kept: dict[bytes, bytes] = {}
        self.refused: list[bytes] = []
        self.number = 0

    def write(self, client: Client[bytes], count: int) -> bytes | None:
        """Write new keys, and some old ones anew; return the last error, if there was one."""
        last = None
        for _ in range(count):
            self.number += 1
            key = b"key:%d" % (self.number if self.number % 3 else self.number // 2)
            value = b"%d:" % self.number + self.value
            status, text = client.execute(b"set", key, value)
            if status == OK:
                self.kept[key] = value
            else:
                assert text.startswith(FULL), text
                self.refused.append(key)
                last = text
        return last

    def check(self, client: Client[bytes]) -> None:
        """Demand what was acknowledged, and nothing of what was refused."""
        for key in {*self.kept, *self.refused}:
            assert client.get(key) == self.kept.get(key), key


def fill_and_recover(one: Server, make_room: Callable[[], None], code: str) -> None:
    """Write until nothing is taken, read on, make room, write again; kill, and look again."""
    disk, client = FullDisk(one), one.client()
    pids = [one.shard(0).pid, one.shard(1).pid]
    error = until("the disk is full", lambda: disk.write(client, 20))
    assert error.endswith(f"({code})".encode())
    # A pipeline in which reads stand between the refused writes.
    sock, key = one.connect(), next(iter(disk.kept))
    shard = one.slots.shard_of(key)
    until("this shard too", lambda: client.execute(b"set", b"{%b}more" % key, disk.value)[0] == ERROR)
    sock.sendall(
        (request(b"set", key, b"new") + request(b"get", key)) * 10
        + request(b"zadd", b"{%b}z" % key, b"1", b"m")
    )
    answered = receive_replies(sock, 21)
    assert all(status == ERROR and text.startswith(FULL) for status, text in answered[0:20:2])
    assert answered[1:20:2] == [(OK, disk.kept[key])] * 10
    disk.check(client)
    assert one.stats()[shard]["readonly"] is True
    assert [one.shard(0).pid, one.shard(1).pid] == pids, "no process has died of it"

    make_room()
    until("writes are taken again", lambda: not any(row["readonly"] for row in one.stats()))
    assert disk.write(client, 20) is None
    disk.check(client)
    assert len(one.logged(r"WARNING the log takes writes again")) >= 1
    one.kill()
    one.start("--shards", "2")
    client = one.client()
    client.delete(b"{%b}more" % key)
    disk.check(client)
    one.stop()


def test_a_log_at_its_largest_size(server: Callable[..., Server]) -> None:
    """RLIMIT_FSIZE stands in for a full disk: writes beyond it fail, and SIGXFSZ must kill nobody."""
    one = server().start("--shards", "2")
    one.expect("ERROR read-only: the log takes no writes: File too large")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for index in range(2):
        resource.prlimit(one.shard(index).pid, resource.RLIMIT_FSIZE, (50_001, limit[1]))

    def make_room() -> None:
        for index in range(2):
            resource.prlimit(one.shard(index).pid, resource.RLIMIT_FSIZE, limit)

    fill_and_recover(one, make_room, "EFBIG")


def test_a_full_file_system(server: Callable[..., Server], small_disk: Path) -> None:
    one = server()
    one.directory = small_disk / "data"
    filler = small_disk / "filler"
    one.start("--shards", "2")
    one.expect("ERROR read-only: the log takes no writes: No space left on device")
    filler.write_bytes(bytes(600 << 10))
    fill_and_recover(one, filler.unlink, "ENOSPC")


def test_a_server_starts_on_a_full_file_system(server: Callable[..., Server], small_disk: Path) -> None:
    """What is there is served; only writes have to wait."""
    one = server()
    one.directory = small_disk / "data"
    one.start("--shards", "2")
    one.expect("ERROR read-only: the log takes no writes: No space left on device")
    disk = FullDisk(one)
    disk.write(one.client(), 20)
    one.stop()
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    one.start("--shards", "2")
    client = one.client()
    until("a refused write", lambda: disk.write(client, 10))
    disk.check(client)
    one.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 1 MiB; skip the test by name where this user may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command; test_a_log_at_its_largest_size stands in")
    if done.returncode:
        pytest.skip(
            f"no tmpfs can be mounted ({done.stderr.strip()}); test_a_log_at_its_largest_size stands in"
        )
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
