"""Whatever process is killed, whenever: acknowledged writes stay, and the rest of the server goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from serving import DEADLINE, Server, receive_replies, request, until
from writers import Writer

from imds.protocol import ERROR, OK

KILLED = r"was killed by SIGKILL"


def wait_writes(writers: list[Writer], more: int = 1) -> None:
    """Wait until each writer has got that many more writes acknowledged."""
    before = [writer.answers[b"OK"] for writer in writers]
    until(
        "all write again",
        lambda: all(writer.answers[b"OK"] >= had + more for writer, had in zip(writers, before, strict=True)),
    )


def wait_logged(server: Server, pattern: str, times: int) -> None:
    """Wait until the log has so many lines that match."""
    until(f"{times} times {pattern}", lambda: len(server.logged(pattern)) == times)


def run_writers(server: Server, count: int = 3) -> list[Writer]:
    writers = [Writer(server, f"writer-{number}") for number in range(count)]
    for writer in writers:
        writer.start()
    until("every writer has written", lambda: all(len(writer.sure) == 50 for writer in writers))
    return writers


def code_of(reply: tuple[int, bytes]) -> str:
    status, payload = reply
    return payload.decode().split(" ")[0] if status == ERROR else "OK"


def test_a_killed_shard_comes_back_with_every_acknowledged_write(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3")
    one.expect(rf"shard 1 {KILLED}; restarting")
    writers = run_writers(one)
    for round_ in range(3):
        one.shard(1).kill()
        wait_logged(one, "shard 1 is back", round_ + 1)
        wait_writes(writers, 100)
    for writer in writers:
        writer.finish()
        writer.check()
        assert writer.connects == 1, "clients lose no connection by it"
    one.wait_up()
    assert [row["restarts"] for row in one.stats()] == [0, 3, 0]
    one.stop()
    one.start("--shards", "3")
    for writer in writers:
        writer.check()
    one.stop()


def test_what_is_in_flight_on_a_killed_shard_is_unknown_or_to_retry(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.expect(rf"shard 0 {KILLED}; restarting")
    shard, mine, other = one.shard(0), one.keys_of(0), next(one.keys_of(1))
    read, written = next(mine), next(mine)
    one.client().set(read, b"before")
    os.kill(shard.pid, signal.SIGSTOP)  # so that nothing of the following is carried out
    sock, lively = one.connect(), one.client()
    size = 8 << 20  # more than the socket to the shard takes
    keys = [next(mine) for _ in range(64)]
    sock.sendall(request(b"set", written, b"1") + request(b"get", read) + request(b"set", other, b"2"))
    lively.set(other, b"1")  # by its answer, the router has handed on what came before
    sock.setblocking(False)
    unsent = b"".join(request(b"set", key, b"x" * (size // len(keys))) for key in keys)
    end = time.monotonic() + 1
    while unsent and time.monotonic() < end:
        try:
            unsent = unsent[sock.send(unsent) :]
        except BlockingIOError:
            time.sleep(0.01)
    whole = (size - len(unsent)) // (size // len(keys) + 64)
    shard.kill()

    sock.settimeout(DEADLINE)
    codes = [code_of(reply) for reply in receive_replies(sock, 3 + whole)]
    assert codes[:3] == ["UNKNOWN", "RETRY", "OK"], "a write, a read, and a write elsewhere"
    order = ["UNKNOWN", "RETRY", "SHARDDOWN", "LOADING", "OK"]
    flood = codes[3:]
    assert flood[0] == "UNKNOWN", "the router had sent it"
    assert "RETRY" in flood, "the router had it, and could not send it"
    assert flood == sorted(flood, key=order.index), (
        "what came later was answered by what the shard was by then"
    )
    one.wait_up()
    assert lively.get(read) == b"before"
    one.stop()


def test_a_dead_shard_answers_at_once_and_the_others_serve(server: Callable[..., Server]) -> None:
    """More than 5 deaths within a minute: it stays down, which is said once, and stops nobody."""
    one = server().start("--shards", "3")
    one.expect(rf"shard 2 {KILLED}")
    client = one.client()
    keys = [next(one.keys_of(shard)) for shard in range(3)]
    for key in keys:
        client.set(key, key)
    for death in range(6):
        shard = one.shard(2)
        shard.kill()
        wait_logged(one, KILLED, death + 1)
        reply = client.execute(b"get", keys[2])
        assert code_of(reply) in {"SHARDDOWN", "LOADING", "RETRY"}, reply
        assert client.get(keys[0]) == keys[0]
    until("the last word", lambda: one.logged("it stays down"))
    assert len(one.logged("stays down")) == 1
    status, text = client.execute(b"set", keys[2], b"new")
    assert (status, text) == (ERROR, b"SHARDDOWN shard 2 cannot be reached: it was given up, see the log")
    assert client.get(keys[0]) == keys[0]
    assert client.set(keys[1], b"still")
    rows = one.stats()
    assert [row["state"] for row in rows] == ["up", "up", "down"]
    assert rows[2]["reason"] == "it was given up, see the log"
    assert rows[2]["restarts"] == 5
    time.sleep(0.5)
    assert one.child("shard-2") is None
    one.stop()
    one.start("--shards", "3")  # a new start is a new chance
    assert one.client().get(keys[2]) == keys[2]
    one.stop()


def test_a_killed_router_disconnects_its_clients_and_loses_nothing(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "2")
    one.expect(rf"router 0 {KILLED}; restarting")
    port, writers = one.port, run_writers(one, 2)
    idle = one.connect()
    for _ in range(3):
        one.router().kill()
        wait_writes(writers, 100)
        assert one.port == port
    assert receive_replies(idle, 1) == []
    for writer in writers:
        writer.finish()
        writer.check()
        assert writer.connects >= 4
    one.wait_up()
    assert [row["links"] for row in one.stats()] == [1, 1]
    assert [row["restarts"] for row in one.stats()] == [0, 0]
    one.stop()


def test_a_killed_supervisor_takes_its_children_along(server: Callable[..., Server]) -> None:
    one = server().start("--shards", "3")
    for stuck in (False, True):
        writers = run_writers(one)
        children = psutil.Process(one.pid).children()
        assert len(children) == 4
        if stuck:
            os.kill(one.shard(1).pid, signal.SIGSTOP)  # it cannot even notice that it is alone
        os.kill(one.pid, signal.SIGKILL)
        for writer in writers:
            writer.finish()
        one.wait()
        one.start("--shards", "3")  # at once: the lock is waited for
        assert not any(child.is_running() and child.status() != "zombie" for child in children)
        for writer in writers:
            writer.check()
    one.stop()


def test_all_at_once(server: Callable[..., Server]) -> None:
    """Shards and router killed in the same moment, again and again, come back together."""
    one = server().start("--shards", "2", "--routers", "2")
    one.expect(rf"{KILLED}; restarting")
    writers = run_writers(one, 2)
    for round_ in range(1, 4):
        for process in [one.router(0), one.router(1), one.shard(0), one.shard(1)]:
            process.kill()
        wait_logged(one, r"shard \d is back", 2 * round_)
        wait_writes(writers, 100)
    for writer in writers:
        writer.finish()
        writer.check()
    assert all(status == OK for status, _ in [one.client().execute(b"set", b"last", b"word")])
    one.wait_up()
    one.stop()


# -- with the package changed in one place, by what Python imports before all else ----------------------

ALONE = """
import imds.process

imds.process.die_with_parent = lambda parent: None
"""

LIAR = """
import os, sys
from pathlib import Path

if "imds-shard-0" in sys.orig_argv:
    from imds.shard import worker

    class Liar(worker.UnifiedStore):
        def execute(self, data):
            used, replies = super().execute(data)
            if replies and Path(os.environ["LIE"]).exists():
                Path(os.environ["LIE"]).unlink()
                replies = replies[:4] + b"\\xff\\xff\\xff\\xff" + replies[8:]  # the ticket
            return used, replies

    worker.UnifiedStore = Liar
"""


def changed(directory: Path, code: str) -> dict[str, str]:
    """Return the environment in which every Python runs ``code`` first."""
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_without_the_systems_help_children_end_when_their_supervisor_does(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    one = server().start("--shards", "2", env=changed(tmp_path, ALONE))
    one.client().set("key", "value")
    one.kill()
    assert one.start("--shards", "2").client().get("key") == b"value"
    one.stop()


def test_a_shard_that_answers_what_nobody_asked_starts_anew(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    """A ticket that does not fit: the replies reach nobody, and the shard is not left cut off."""
    lie = tmp_path / "lie"
    one = server().start("--shards", "2", env={**changed(tmp_path, LIAR), "LIE": str(lie)})
    one.expect(r"shard 0 answered .*; it has to start anew", f"shard 0 {KILLED}; restarting")
    client, key = one.client(), next(one.keys_of(0))
    client.set(key, b"before")
    lie.touch()
    assert code_of(client.execute(b"set", key, b"after")) == "UNKNOWN"
    until("it is back", lambda: one.logged("shard 0 is back"))
    one.wait_up()
    assert client.get(key) in {b"before", b"after"}
    assert client.set(key, b"again")
    assert client.get(key) == b"again"
    one.stop()
