"""Logs are rewritten beside a server that goes on, and whatever is killed meanwhile, nothing is lost."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving import Server, until
from test_restarts import run_writers, wait_writes
from writers import Writer

from imds.protocol import ERROR, OK

SMALL = ("--aof-rewrite-min-size", "40kb")
NEVER = ("--aof-rewrite-percentage", "0")
FAILED = r"shard \d: its log was not rewritten"


def logs(server: Server, shard: int) -> list[str]:
    """Return the names in a shard's directory."""
    return sorted(path.name for path in server.segment(shard).parent.iterdir())


def rewrites(server: Server) -> list[int]:
    return [row["rewrites"] for row in server.stats()]


def fill(server: Server) -> list[bytes]:
    """Give shard 0 so much that saving it takes some time; return the keys."""
    with server.client() as client:
        keys = list(itertools.islice(server.keys_of(0), 50))
        for key in keys:
            client.set(key, key * (1_000_000 // len(key)))
    return keys


def check_filled(server: Server, keys: list[bytes]) -> None:
    with server.client() as client:
        assert all(client.get(key) == key * (1_000_000 // len(key)) for key in keys)


def wait_base(server: Server, shard: int) -> None:
    """Have the logs rewritten, and return when the shard has begun a new base."""
    with server.client() as client:
        before = logs(server, shard)
        assert client.execute(b"rewrite") == (OK, b"OK")
    until(
        "a base is begun",
        lambda: any(name.endswith(".base") for name in set(logs(server, shard)) - set(before)),
    )


@pytest.fixture
def writing(server: Callable[..., Server]) -> Iterator[tuple[Server, list[Writer]]]:
    """Return a server of 2 shards and writers at work; in the end check all that they were promised."""
    one = server().start("--shards", "2", *NEVER)
    writers = run_writers(one, 2)
    yield one, writers
    wait_writes(writers, 40)
    for writer in writers:
        writer.finish()
        writer.check()
    one.stop()
    one.start("--shards", "2")
    for shard in range(2):
        assert not [name for name in logs(one, shard) if name.endswith(".new")]
        assert len([name for name in logs(one, shard) if name.endswith(".base")]) <= 1
    for writer in writers:
        writer.check()
    one.stop()


def test_on_command(writing: tuple[Server, list[Writer]]) -> None:
    one, _ = writing
    for round_ in range(1, 3):
        assert one.client().execute(b"rewrite") == (OK, b"OK")
        until("all are rewritten", lambda count=round_: rewrites(one) == [count, count])
    for shard in range(2):
        assert logs(one, shard) == ["00000002.base", "00000003.aof", "manifest.json"]
    for row in one.stats():
        assert row["last_rewrite_error"] == ""
        assert row["rewrite_running"] is False
        assert 0 < row["aof_base_bytes"] < row["aof_bytes"]


def test_by_growth(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3", *SMALL)
    writers = run_writers(one, 2)
    until("each has been rewritten twice", lambda: min(rewrites(one)) >= 2)
    for writer in writers:
        writer.finish()
        writer.check()
    one.stop()


def test_a_rewrite_that_fails(writing: tuple[Server, list[Writer]]) -> None:
    one, writers = writing
    one.expect(FAILED)
    obstacle = one.segment(0).parent / "00000001.base"
    obstacle.mkdir()
    one.client().execute(b"rewrite")
    until("it is told", lambda: one.logged(rf"{FAILED}: .*; the next try in 5 s"))
    until("the other shard has its turn", lambda: rewrites(one) == [0, 1])
    wait_writes(writers, 40)
    assert "00000001.base" in one.stats()[0]["last_rewrite_error"]
    assert len(one.logged(FAILED)) == 1, "not again at once"
    obstacle.rmdir()
    one.client().execute(b"rewrite")  # but when it is asked for
    until("it is rewritten", lambda: rewrites(one)[0] == 1)
    assert one.stats()[0]["last_rewrite_error"] == ""


def test_a_shard_killed_while_its_log_is_rewritten(writing: tuple[Server, list[Writer]]) -> None:
    one, _ = writing
    one.expect(r"shard \d was killed by SIGKILL; restarting")
    keys = fill(one)
    wait_base(one, 0)
    one.shard(0).kill()
    until("the shard is back", lambda: one.logged("shard 0 is back"))
    check_filled(one, keys)
    one.client().execute(b"rewrite")
    until("it is rewritten", lambda: rewrites(one)[0] == 1)
    check_filled(one, keys)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_end_of_the_server_while_a_log_is_rewritten(server: Callable[..., Server], stopped: bool) -> None:
    one = server().start("--shards", "2", *NEVER)
    keys = fill(one)
    wait_base(one, 0)
    if stopped:
        one.stop()
    else:
        one.kill()
    one.start("--shards", "2", *NEVER)
    check_filled(one, keys)
    assert len([name for name in logs(one, 0) if name.endswith(".base")]) <= 1
    one.client().execute(b"rewrite")
    until("all are rewritten", lambda: rewrites(one) == [1, 1])
    check_filled(one, keys)
    one.stop()


def test_where_no_time_is_idle_logs_are_rewritten_all_the_same(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2", *SMALL)
    with ExitStack() as busy:
        for _ in range(4 * (os.cpu_count() or 1)):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            busy.callback(process.wait)
            busy.callback(process.kill)
        writers = run_writers(one, 2)
        until("each has been rewritten", lambda: all(rewrites(one)))
        sizes = [row["aof_bytes"] for row in one.stats()]
    assert max(sizes) < 400_000, "ten times what makes a rewrite due"
    for writer in writers:
        writer.finish()
        writer.check()
    one.stop()


def test_every_command_of_all_shards_names_a_shard_that_is_down(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2", *NEVER)
    assert one.client().execute(b"sync") == (OK, b"OK")
    one.client().set(next(one.keys_of(0)), b"value")
    manifest: Path = one.segment(1).parent / "manifest.json"
    one.stop()
    manifest.rename(manifest.with_name("elsewhere"))
    one.expect("shard 1 stays down", rf"{manifest} is missing", "refusing to start")
    one.start("--shards", "2", *NEVER)
    assert one.logged(rf"refusing to start: {manifest} is missing")
    client = one.client()
    down = (ERROR, b"SHARDDOWN shard 1: it was given up, see the log")
    assert client.execute(b"sync") == down
    assert client.execute(b"rewrite") == down
    assert client.get(next(one.keys_of(0))) == b"value"
    until("the living one is rewritten all the same", lambda: one.stats()[0]["rewrites"] == 1)
    one.stop()
