"""A long log: who calls before it is read is told so at once, and is served as soon as it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from serving import Server, receive_replies, request, until

from imds.datadir import DataDir
from imds.protocol import ERROR, OK, encode_request
from imds.reshard import ShardLogs


def make(directory: Path, records: int) -> None:
    """Make a directory with two shards and all the records in one of them."""
    with (
        DataDir.open(directory, 2) as datadir,
        ShardLogs(datadir, datadir.generation, datadir.slots) as logs,
    ):
        logs.load(lambda records: None, lambda done: None)
        for number in range(records):
            logs.add(b"{long}", encode_request((b"set", b"{long}%d" % (number % 100_000), b"%d" % number)))


def test_a_shard_that_loads_says_so_and_then_serves(server: Callable[..., Server]) -> None:
    one = server()
    records = 200_000
    make(one.directory, records)
    long = one.slots.shard_of(b"{long}")
    short = next(one.keys_of(1 - long))
    one.start("--shards", "2", ready=False)
    shard = one.shard(long)
    os.kill(shard.pid, signal.SIGSTOP)  # before it has read much: a process needs a while to start
    sock, other = one.connect(), one.client()
    until("the other shard serves", lambda: other.execute(b"set", short, b"1")[0] == OK)
    assert one.stats()[long]["state"] == "silent"
    sock.sendall(request(b"get", b"{long}7") + request(b"set", b"{long}7", b"no") + request(b"get", short))
    assert other.execute(b"get", short) == (OK, b"1")  # by now the router has handed on what came before
    assert not one.ready_line
    os.kill(shard.pid, signal.SIGCONT)
    loading = (ERROR, b"LOADING the shard is reading its log")
    assert receive_replies(sock, 3) == [loading, loading, (OK, b"1")]

    def answer() -> bytes:
        sock.sendall(request(b"get", b"{long}7"))
        ((status, text),) = receive_replies(sock, 1)
        assert status == OK or (status, text) == loading
        return text if status == OK else b""

    assert until("the value", answer) == b"%d" % (records - 100_000 + 7), "the last of its writes"
    one.wait_ready()
    assert " 100001 keys loaded" in one.ready_line or " 100000 keys loaded" in one.ready_line
    one.stop()


def test_a_stop_while_loading(server: Callable[..., Server]) -> None:
    one = server()
    make(one.directory, 200_000)
    for _ in range(2):
        one.start("--shards", "2", ready=False)
        one.connect()  # who waits to be accepted holds up nothing
        one.stop()
        assert not one.logged("did not take their replies in time")
    one.start("--shards", "2")
    assert " 100000 keys loaded" in one.ready_line
    one.stop()
