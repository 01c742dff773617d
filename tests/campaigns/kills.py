"""Campaign ``kills``: SIGKILL hits a process of a real server, at a random time, under traffic.

Whichever process it was (a shard, perhaps in the middle of a rewrite, a router, or the supervisor), and
under every fsync policy: all acknowledged writes are there afterwards, and nothing that nobody wrote. Logs
are rewritten all the time: whenever one has doubled, from 20 kB on.
"""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from system.serving import Server, until

from campaigns.history import Violation
from campaigns.reporting import Note, in_run
from campaigns.traffic import Writer
from imds import Client, ImdsError
from imds.shard.aof import POLICIES
from imds.supervisor import DEATHS_WINDOW, MOST_DEATHS

ROLE = re.compile(r"imds-(router|shard)-\d+")
LEAST_RATE = 100.0  # acknowledged writes a second, while there is traffic


class Victims:
    """The processes of a server, by role, and who may die without being given up."""

    def __init__(self, server: Server, rng: random.Random) -> None:
        self._server = server
        self._rng = rng
        self._deaths: dict[str, list[float]] = {}
        self.killed: Counter[str] = Counter()  # by role

    def kill(self, roles: tuple[str, ...] | None = None) -> str:
        """Kill a process of one of these roles, or of any; return its name, such as ``shard-2``.

        The role ``rewriting`` is a shard that writes a base.
        """
        wanted = roles == ("rewriting",) or (roles is None and self._rng.random() < 0.2)
        rewriting = self._rewriting() if wanted else None
        if rewriting is not None:
            roles = (rewriting,)
        elif roles == ("rewriting",):
            roles = ("shard",)
        names = {
            name: process
            for name, process in self._processes().items()
            if len(self._recent(name)) < MOST_DEATHS - 1
            and (roles is None or name in roles or name.split("-")[0] in roles)
        }
        by_role: dict[str, list[str]] = {}
        for name in sorted(names):
            by_role.setdefault(name.split("-")[0], []).append(name)
        if not by_role:  # they have died too often: start afresh
            names = self._processes()
            by_role = {"supervisor": ["supervisor"]}
        role = self._rng.choice(sorted(by_role))
        name = self._rng.choice(by_role[role])
        with contextlib.suppress(psutil.NoSuchProcess):
            names[name].kill()
        self.killed[role] += 1
        self.killed["shard with a base begun"] += name == rewriting
        self._deaths.setdefault(name, []).append(time.monotonic())
        if name == "supervisor":
            self._deaths.clear()
        return name

    def _rewriting(self) -> str | None:
        """Have the logs rewritten; return the name of a shard that has just begun a base."""
        before = self._bases()
        with contextlib.suppress(ImdsError), self._server.client() as client:
            client.execute("rewrite")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            if begun := self._bases() - before:
                time.sleep(self._rng.uniform(0.0, 0.1) ** 2)
                return f"shard-{int(begun.pop().parent.name.removeprefix('shard-'))}"
            time.sleep(0.0005)
        return None

    def _bases(self) -> set[Path]:
        return set(self._server.directory.glob("gen-*/shard-*/*.base"))

    def _recent(self, name: str) -> list[float]:
        return [at for at in self._deaths.get(name, []) if time.monotonic() - at < DEATHS_WINDOW + 5]

    def _processes(self) -> dict[str, psutil.Process]:
        supervisor = psutil.Process(self._server.pid)
        found = {"supervisor": supervisor}
        with contextlib.suppress(psutil.Error):
            for child in supervisor.children():
                for word in child.cmdline():
                    if ROLE.fullmatch(word):
                        found[word.removeprefix("imds-")] = child
        return found


@contextlib.contextmanager
def serving(path: Path, rng: random.Random, *options: str) -> Iterator[tuple[Server, list[str]]]:
    """Yield a running server and the options that start it again, on the same port; end it afterwards."""
    server = Server(path / "data", path / "log")
    server.expect("was killed by SIGKILL")
    options = (*options, "--aof-rewrite-min-size", "20kb")
    server.start(*options)
    again = [*options, "--port", str(server.port)]
    try:
        yield server, again
    finally:
        server.end()


def campaign(
    rounds: int, seed: int, note: Note, *, shards: int = 3, clients: int = 4, roles: tuple[str, ...] = ()
) -> str:
    """Kill ``rounds`` times; ``roles``: the first ones to be killed. Raises Violation."""
    rng = random.Random(seed)
    traffic = 0.0
    acknowledged = unknown = 0
    with tempfile.TemporaryDirectory() as path, in_run(seed):
        options = ("--shards", str(shards), "--appendfsync", rng.choice(POLICIES))
        with serving(Path(path), rng, *options) as (server, again):
            victims = Victims(server, rng)
            port = server.port
            writers = [
                Writer(f"w{index}", lambda: Client("127.0.0.1", port, timeout=10.0), rng.getrandbits(32))
                for index in range(clients)
            ]
            for writer in writers:
                writer.start()
            for number in range(rounds):
                before = _acknowledged(writers)
                started = time.monotonic()
                time.sleep(rng.uniform(0.1, 0.6))
                # A busy machine may have left them no time until now: then it would be no trial.
                until("traffic", lambda before=before: _acknowledged(writers) > before)  # type: ignore[misc]
                traffic += time.monotonic() - started
                acknowledged += _acknowledged(writers) - before
                name = victims.kill((roles[number],) if number < len(roles) else None)
                if name == "supervisor":
                    server.wait()
                    server.wait_gone()
                    again[again.index("--appendfsync") + 1] = rng.choice(POLICIES)
                    server.start(*again)
                try:
                    check(server, writers)
                except Violation as violation:
                    raise Violation(
                        f"round {number}, {name} killed: {violation}\n{server.log()[-3000:]}"
                    ) from None
                note(number + 1)
            for writer in writers:
                writer.finish()
            unknown = sum(writer.unknown for writer in writers)
            server.stop()
    rate = acknowledged / traffic
    if rate < LEAST_RATE:
        raise Violation(f"only {rate:.0f} acknowledged writes a second")
    if not unknown:
        raise Violation("no kill has hit a write: no round was a trial")
    killed = ", ".join(f"{role} {count}" for role, count in sorted(victims.killed.items()))
    return (
        f"{rounds} kills ({killed}) under {rate:.0f} acknowledged writes/s of {clients} clients, {unknown} "
        f"of unknown outcome; 0 acknowledged lost, 0 invented"
    )


def _acknowledged(writers: list[Writer]) -> int:
    return sum(writer.acknowledged for writer in writers)


def check(server: Server, writers: list[Writer]) -> None:
    """Have every writer read all of its keys, and count those of the server. Raises Violation."""
    for writer in writers:
        writer.ask_sweep()
    keys = sum(writer.await_sweep() for writer in writers)
    server.wait_up()
    found = sum(row["keys"] for row in server.stats())
    if found != keys:
        raise Violation(f"the server has {found} keys, the writers know of {keys}")
    for writer in writers:
        writer.resume()
