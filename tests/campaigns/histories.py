"""Campaign ``histories``: what clients see of a server that is killed meanwhile is linearizable, key by key.

Eight clients get, set and delete twenty keys that they share, one or two at a time, while a process of the
server is killed. Each call and return is noted with its time. A request that surely was not done is left out;
a write of which nobody knows may have happened at any time after its call, for ever.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from campaigns.history import Violation
from campaigns.kills import Victims, serving
from campaigns.reporting import Note, in_run
from campaigns.traffic import NOT_DONE
from campaigns.wgl import NEVER, Operation, check
from imds import Client, ImdsError
from imds.shard.aof import POLICIES

CLIENTS = 8
KEYS = 20
SECONDS = 0.5  # of traffic in one history, and what the server needs to come back


@dataclass
class Tally:
    """What was seen."""

    operations: int = 0
    reads: int = 0  # that were answered
    unknown: int = 0  # writes
    refused: int = 0


class Recorder(threading.Thread):
    """One client of a history; ``operations[key]`` is what it did and saw."""

    def __init__(self, number: int, port: int, prefix: bytes, seed: int, until: threading.Event) -> None:
        super().__init__(daemon=True)
        self.operations: list[tuple[bytes, Operation]] = []
        self.unknown = self.refused = 0
        self.failure: BaseException | None = None
        self._number = number
        self._prefix = prefix
        self._rng = random.Random(seed)
        self._until = until
        self._client = Client("127.0.0.1", port, timeout=10.0)

    def run(self) -> None:
        try:
            count = 0
            while not self._until.is_set():
                count += 1
                self._step(count)
                time.sleep(self._rng.uniform(0.0, 0.01))
        except BaseException as error:
            self.failure = error
        finally:
            self._client.close()

    def _key(self) -> bytes:
        return self._prefix + b"%d" % min(self._rng.randrange(KEYS), self._rng.randrange(KEYS))  # some more

    def _step(self, count: int) -> None:
        rng, keys = self._rng, [self._key()]
        kind = rng.random()
        write, value = kind < 0.55, None
        if kind < 0.38:
            value = b"%d.%d" % (self._number, count)
            tokens: tuple[bytes, ...] = (b"set", *keys, value)
        elif kind < 0.45 or kind > 0.9:  # of two keys, each for itself: it is not atomic
            keys = list({*keys, self._key()})
            value = b"%d.%d" % (self._number, count) if write else None
            tokens = (
                (b"mset", *(word for key in keys for word in (key, value or b"")))
                if write
                else (b"mget", *keys)
            )
        else:
            tokens = (b"del" if write else b"get", *keys)
        start = time.monotonic()
        try:
            reply = self._client.execute(*tokens)
        except ImdsError:
            code = "UNKNOWN"
            time.sleep(0.01)
        else:
            code = reply.payload.partition(b" ")[0].decode(errors="replace") if reply.status == 2 else ""
        end = time.monotonic()
        if code in NOT_DONE and (len(keys) == 1 or not write):
            self.refused += 1
        elif code == "UNKNOWN" or code in NOT_DONE:
            if write:
                self.unknown += 1
                for key in keys:
                    self._note(key, start, NEVER, value, write=True)
        elif code:
            raise Violation(f"{tokens} answered {reply}")
        elif tokens[0] == b"mget":
            for key, found in zip(keys, reply.items(), strict=True):
                self._note(key, start, end, found, write=False)
        else:
            if not write and reply.status == 0:
                value = reply.payload
            for key in keys:
                # That there was nothing to delete is a read of nothing, and says more than the write of it.
                self._note(key, start, end, value, write=write and reply.status == 0)

    def _note(self, key: bytes, start: float, end: float, value: bytes | None, *, write: bool) -> None:
        self.operations.append((key, Operation(self._number, start, end, write, value)))


def _finish(recorders: list[Recorder], until: threading.Event, seconds: float) -> list[Recorder]:
    time.sleep(seconds)
    until.set()
    for recorder in recorders:
        recorder.join(30)
        if recorder.failure:
            raise recorder.failure
        if recorder.is_alive():
            raise Violation("a client hangs")
    return recorders


def judge(recorders: list[Recorder], tally: Tally) -> None:
    """Check each key's history. Raises Violation, also where the checker gave up."""
    by_key: dict[bytes, list[Operation]] = {}
    for recorder in recorders:
        tally.unknown += recorder.unknown
        tally.refused += recorder.refused
        for key, operation in recorder.operations:
            by_key.setdefault(key, []).append(operation)
            tally.operations += 1
            tally.reads += not operation.write
    for key, operations in sorted(by_key.items()):
        verdict = check(operations)
        if verdict != "linearizable":
            told = "\n".join(map(str, sorted(operations, key=lambda one: one.start)))
            raise Violation(f"{key!r} is {verdict}:\n{told}")


def campaign(rounds: int, seed: int, note: Note, *, roles: tuple[str, ...] = ()) -> str:
    """Record and check ``rounds`` histories. Raises Violation."""
    rng = random.Random(seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as path, in_run(seed):
        options = ("--shards", "3", "--appendfsync", rng.choice(POLICIES))
        with serving(Path(path), rng, *options) as (server, again):
            victims = Victims(server, rng)
            for number in range(rounds):
                before = tally.operations
                until = threading.Event()
                prefix = b"h%d:" % number
                recorders = [
                    Recorder(i, server.port, prefix, rng.getrandbits(32), until) for i in range(CLIENTS)
                ]
                for recorder in recorders:
                    recorder.start()
                time.sleep(rng.uniform(0.1, SECONDS))
                name = victims.kill((roles[number],) if number < len(roles) else None)
                if name == "supervisor":
                    server.wait()
                    server.wait_gone()
                    again[again.index("--appendfsync") + 1] = rng.choice(POLICIES)
                    server.start(*again)
                else:
                    server.wait_up()
                _finish(recorders, until, rng.uniform(0.1, SECONDS))
                try:
                    judge(recorders, tally)
                except Violation as violation:
                    raise Violation(f"history {number}, {name} killed: {violation}") from None
                if tally.operations - before < 10 * CLIENTS:
                    raise Violation(f"history {number}: no traffic")
                note(number + 1)
            server.stop()
    if not (tally.unknown and tally.reads):
        raise Violation(f"no kill has hit a write, or nothing was read: {tally}")
    killed = ", ".join(f"{role} {count}" for role, count in sorted(victims.killed.items()))
    return (
        f"{rounds} histories of {CLIENTS} clients x {KEYS} keys, {tally.operations} operations, "
        f"{tally.reads} reads, {tally.unknown} writes of unknown outcome, {tally.refused} refused, "
        f"kills: {killed}; all linearizable, none undecided"
    )
