"""Logs are rewritten beside a server that goes on, and whatever is killed meanwhile, nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
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


def rewriter(server: Server) -> psutil.Process:
    process: psutil.Process = until("a rewriter", lambda: server.child("rewriter"))
    return process


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
    processes = set()
    for round_ in range(1, 3):
        assert one.client().execute(b"rewrite") == (OK, b"OK")
        until("all are rewritten", lambda count=round_: rewrites(one) == [count, count])
        processes.add(rewriter(one).pid)
    assert len(processes) == 1, "it stays for a while, and then takes what is next"
    for shard in range(2):
        assert logs(one, shard) == ["00000002.base", "00000003.aof", "manifest.json"]
    for row in one.stats():
        assert row["last_rewrite_error"] == ""
        assert row["rewrite_running"] is False
        assert 0 < row["aof_base_bytes"] < row["aof_bytes"]
    until("the last rewriter has ended", lambda: one.child("rewriter") is None)


def test_by_growth_one_shard_at_a_time(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3", *SMALL)
    writers = run_writers(one, 2)
    most = 0

    def grown() -> bool:
        nonlocal most
        rows = one.stats()
        most = max(most, sum(row["rewrite_running"] for row in rows))
        return all(row["rewrites"] >= 2 for row in rows)

    until("each has been rewritten twice", grown)
    assert most == 1
    for writer in writers:
        writer.finish()
        writer.check()
    one.stop()


def test_a_killed_rewriter(writing: tuple[Server, list[Writer]]) -> None:
    one, writers = writing
    one.expect(FAILED)
    one.client().execute(b"rewrite")
    rewriter(one).kill()
    until(
        "it is told", lambda: one.logged(rf"{FAILED}: its process was killed by SIGKILL; the next try in 5 s")
    )
    until("the other shard has its turn", lambda: sorted(rewrites(one)) == [0, 1])
    shard = rewrites(one).index(0)  # that was the first
    wait_writes(writers, 40)
    assert one.stats()[shard]["last_rewrite_error"] == "its process was killed by SIGKILL"
    assert len(one.logged(FAILED)) == 1, "not again at once"
    one.client().execute(b"rewrite")  # but when it is asked for
    until("it is rewritten", lambda: rewrites(one)[shard] == 1)
    assert one.stats()[shard]["last_rewrite_error"] == ""


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_shard_killed_while_its_log_is_rewritten(writing: tuple[Server, list[Writer]]) -> None:
    one, _ = writing
    one.expect(r"shard \d was killed by SIGKILL; restarting")
    one.client().execute(b"rewrite")
    process = rewriter(one)
    process.suspend()  # it has not finished, surely
    (shard,) = [number for number, row in enumerate(one.stats()) if row["rewrite_running"]]
    one.shard(shard).kill()
    until("its rewriter ends", lambda: has_ended(process))
    until("the shard is back", lambda: one.logged(f"shard {shard} is back"))
    until("the other shard has its turn", lambda: rewrites(one)[1 - shard] == 1)
    one.client().execute(b"rewrite")
    until("it is rewritten", lambda: rewrites(one)[shard] == 1)


@pytest.mark.parametrize("stopped", [False, True])
def test_an_end_of_the_server_while_a_log_is_rewritten(server: Callable[..., Server], stopped: bool) -> None:
    one = server().start("--shards", "2", *NEVER)
    client = one.client()
    for number in range(200):
        client.set(b"key-%d" % number, b"value")
    client.execute(b"rewrite")
    process = rewriter(one)
    if stopped:
        process.send_signal(signal.SIGSTOP)  # it has not finished by itself, surely
        one.stop()
    else:
        one.kill()
    one.start("--shards", "2", *NEVER)
    with one.client() as client:
        assert all(client.get(b"key-%d" % number) == b"value" for number in range(200))
        client.execute(b"rewrite")
    until("all are rewritten", lambda: rewrites(one) == [1, 1])
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
