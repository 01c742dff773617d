"""SIGTERM and SIGINT, under load, twice, to the whole group: exit 0, and no acknowledged write is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from serving import Server, receive, receive_all, replies, request, until
from writers import Writer

from imds.protocol import OK


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_loses_no_acknowledged_write(
    server: Callable[..., Server], number: signal.Signals
) -> None:
    one = server().start("--shards", "3", "--routers", "2")
    writers = [Writer(one, f"writer-{index}", depth=200) for index in range(4)]
    for writer in writers:
        writer.start()
    until("every writer has written", lambda: all(len(writer.sure) == 50 for writer in writers))
    one.stop(number)
    for writer in writers:
        writer.finish()
        assert set(writer.answers) == {b"OK"}, "what a stopping server has taken, it carries out"
    one.start("--shards", "3")
    for writer in writers:
        writer.check()
    one.stop()


def test_what_has_arrived_is_answered_before_the_end(server: Callable[..., Server]) -> None:
    """The answers are whole, in order, and followed by a clean end of the stream."""
    one = server().start("--shards", "2")
    sock = one.connect()
    count = 1000
    sock.sendall(b"".join(request(b"set", b"end:%d" % number, b"%d" % number) for number in range(count)))
    one.stop()
    answered = receive_all(sock)
    assert replies(answered) == [(OK, b"OK")] * count
    assert one.start("--shards", "2").client().get(b"end:%d" % (count - 1)) == b"%d" % (count - 1)
    one.stop()


def test_idle_clients_and_half_requests_hold_up_no_stop(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    idle, half = one.connect(), one.connect()
    half.sendall(request(b"set", b"half", b"value")[:-2])
    idle.sendall(request(b"get", b"x"))
    assert receive(idle, 8) == b"\0\0\0\4\0\0\0\1"
    one.stop()
    assert not one.logged("did not take their replies in time")
    assert receive(idle, 1) == b""
    assert one.start("--shards", "2").client().get(b"half") is None
    one.stop()


def test_one_wish_may_arrive_twice(server: Callable[..., Server]) -> None:
    """A wrapper passes on the signal that its whole group has got: still a clean stop."""
    one = server().start("--shards", "2")
    writer = Writer(one, "writer", depth=200)
    writer.start()
    until("it has written", lambda: len(writer.sure) == 50)
    os.kill(one.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(one.pid, signal.SIGTERM)
    os.kill(one.pid, signal.SIGINT)
    one.ended(0)
    writer.finish()
    assert not one.logged("stopping at once")


def test_a_second_signal_stops_at_once(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    os.kill(one.shard(0).pid, signal.SIGSTOP)  # it would be waited for, for long
    os.kill(one.pid, signal.SIGTERM)
    until("it is stopping", lambda: one.logged("INFO stopping"))
    time.sleep(1.2)  # a person's second Ctrl-C, not an echo of the first
    os.kill(one.pid, signal.SIGINT)
    one.ended(1)  # and no process was waited for until patience ended, which would be an error in the log
    assert one.logged("second signal: stopping at once")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_is_a_clean_stop(
    server: Callable[..., Server], number: signal.Signals
) -> None:
    """Ctrl-C in a terminal, or a service manager's stop, reaches every process of the server."""
    one = server().start("--shards", "3", group=True)
    writer = Writer(one, "writer", depth=50)
    writer.start()
    until("it has written", lambda: len(writer.sure) == 50)
    os.killpg(one.pid, number)
    one.ended(0)
    writer.finish()
    assert set(writer.answers) == {b"OK"}, "the shards do not stop before the router"
    one.start("--shards", "3")
    writer.check()
    one.stop()


def test_a_stop_while_starting(server: Callable[..., Server]) -> None:
    """At whatever moment it comes: exit 0, nothing left behind, nothing lost."""
    one = server().start("--shards", "2")
    one.client().set("kept", "here")
    one.stop()
    socket_file = one.directory.parent / "sock"
    for step in range(6):
        one.start("--shards", "2", "--unix", str(socket_file), ready=False, group=True)
        until("it has begun", socket_file.exists)
        time.sleep(0.07 * step)
        os.killpg(one.pid, signal.SIGINT if step % 2 else signal.SIGTERM)
        one.ended(0)
    one.start("--shards", "2")
    assert one.client().get("kept") == b"here"
    one.stop()


def test_a_shard_that_does_not_stop_is_killed_in_the_end(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.expect("some processes did not stop within")
    shard = one.shard(1)
    os.kill(shard.pid, signal.SIGSTOP)
    one.stop(code=1)
    assert not shard.is_running()


def test_who_connects_while_it_stops_holds_up_nothing(server: Callable[..., Server]) -> None:
    """A connection and the word to stop, seen by the router in the same moment."""
    one = server().start("--shards", "1")
    for before in (0, 3):
        router = one.router()
        os.kill(router.pid, signal.SIGSTOP)
        socks = [one.connect() for _ in range(before)]
        os.kill(one.pid, signal.SIGTERM)
        until("it is stopping", lambda: one.logged("INFO stopping"))
        time.sleep(0.1)  # the router has been told by now
        socks += [one.connect() for _ in range(3)]
        os.kill(router.pid, signal.SIGCONT)
        one.ended()
        assert not one.logged("did not take their replies in time")
        for sock in socks:
            sock.close()
        one.start("--shards", "1")
    one.stop()
