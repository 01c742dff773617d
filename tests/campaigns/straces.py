"""Campaign ``straces``: the system calls of the real processes fail, or kill them, by strace's injection.

While a shard serves: its tracer fails or delays a call, or kills at it; writers go on meanwhile. Afterwards
the shard has to be back without help, and to have every acknowledged write. While a server starts, or starts
with another number of shards: it says why it could not and ends, or it serves; the next start has everything.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from system.serving import Server, until

from campaigns.history import Violation
from campaigns.kills import check, serving
from campaigns.reporting import Note, in_run
from campaigns.traffic import Writer
from imds import Client

INJECTED = "(INJECTED)"


def why_not() -> str | None:
    """Return why nothing can be injected here, or None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = subprocess.run(
        ["strace", "-qq", "-e", "trace=none", "-e", "inject=fsync:error=EIO", "true"],
        stderr=subprocess.PIPE,
        text=True,
    )
    return None if probe.returncode == 0 else f"strace cannot inject: {probe.stderr.strip()}"


@dataclass(frozen=True)
class Running:
    """A fault of a shard that serves. ``log``: only of calls on its log; ``says``: what the server logs."""

    name: str
    policy: str
    inject: tuple[str, ...]
    log: bool = False
    refuses: bool = False  # writes are answered READONLY meanwhile
    says: str = ""


@dataclass(frozen=True)
class Starting:
    """A fault of a server that starts. ``fails``: it then ends with an exit code and a line like ``says``."""

    name: str
    inject: tuple[str, ...]
    shards: tuple[int, ...] = (2,)  # of the starts before, in order, and of this one
    path: str = ""  # only of calls on this path, in the data directory
    code: int | None = None  # of its end; None: it serves
    down: bool = False  # it serves, but one shard stays down
    says: str = ""


SCENARIOS: tuple[Running | Starting, ...] = (
    Running("a sync fails under always", "always", ("fdatasync:error=EIO:when=5",), says="sync failed"),
    Running("a sync fails under everysec", "everysec", ("fdatasync:error=EIO:when=1",), says="sync failed"),
    Running("a sync is out of space", "always", ("fdatasync:error=ENOSPC:when=3",), says="sync failed"),
    Running("slow syncs under always", "always", ("fdatasync:delay_enter=300000:when=1..6",)),
    Running("slow syncs under everysec", "everysec", ("fdatasync:delay_enter=3500000:when=1",)),
    Running("killed in a sync", "always", ("fdatasync:signal=SIGKILL:when=7",), says="SIGKILL"),
    Running(
        "killed in a sync under everysec", "everysec", ("fdatasync:signal=SIGKILL:when=1",), says="SIGKILL"
    ),
    Running("killed in a write", "everysec", ("pwrite64:signal=SIGKILL:when=9",), log=True, says="SIGKILL"),
    Running(
        "killed in a write under no", "no", ("pwrite64:signal=SIGKILL:when=3",), log=True, says="SIGKILL"
    ),
    Running(
        "no space", "everysec", ("pwrite64:error=ENOSPC:when=3..9",), log=True, refuses=True, says="read-only"
    ),
    # Once: the worker appends what the kernel of its links could not. More often: it cannot do so, either (it
    # first makes room, and that this fails is no error).
    Running("no space once", "always", ("pwrite64:error=ENOSPC:when=4",), log=True),
    Running(
        "no space for both",
        "always",
        ("pwrite64:error=ENOSPC:when=4..7",),
        log=True,
        refuses=True,
        says="read-only",
    ),
    Running(
        "a write fails", "no", ("pwrite64:error=EIO:when=2..5",), log=True, refuses=True, says="read-only"
    ),
    Running("a write is interrupted", "always", ("pwrite64:error=EINTR:when=2..4",), log=True),
    Running(
        "quota", "always", ("pwrite64:error=EDQUOT:when=2..5",), log=True, refuses=True, says="read-only"
    ),
    Running(
        "a write cannot be taken back",
        "everysec",
        ("pwrite64:error=ENOSPC:when=2..3", "ftruncate:error=EIO:when=1"),
        log=True,
        says="cannot take a failed append back",
    ),
    Starting("the manifest is not renamed", ("rename:error=EIO:when=1",), code=1, says="Input/output error"),
    Starting("no directory", ("mkdir:error=ENOSPC:when=2",), code=1, says="No space left"),
    Starting("a sync of a new log fails", ("fsync:error=EIO:when=1",), code=1, says="Input/output error"),
    Starting("a sync of a name fails", ("fsync:error=EIO:when=4",), code=1, says="Input/output error"),
    Starting("the lock fails", ("flock:error=ENOLCK:when=1",), code=1, says="No locks available"),
    Starting("killed at the rename", ("rename:signal=SIGKILL:when=1",), code=-9),
    Starting("killed at the third sync", ("fsync:signal=SIGKILL:when=3",), code=-9),
    Starting("killed as the log is made", ("mkdir:signal=SIGKILL:when=3",), code=-9),
    Starting(
        "a log cannot be read",
        ("pread64:error=EIO:when=1",),
        (2, 2),
        path="gen-000001/shard-000/00000001.aof",
        down=True,
        says="Input/output error(.|\n)*it stays down, the others serve",
    ),
    Starting(
        "a log cannot be opened",
        ("openat:error=EMFILE:when=1",),
        (2, 2),
        path="gen-000001/shard-001/00000001.aof",
        down=True,
        says="Too many open files(.|\n)*it stays down, the others serve",
    ),
    Starting("other shards: no space", ("mkdir:error=ENOSPC:when=3",), (2, 3), code=1, says="cannot move"),
    Starting("other shards: a sync fails", ("fsync:error=EIO:when=7",), (2, 4), code=1, says="cannot move"),
    Starting(
        "other shards: data not synced", ("fdatasync:error=EIO:when=2",), (3, 2), code=1, says="cannot move"
    ),
    Starting("other shards: killed at the rename", ("rename:signal=SIGKILL:when=1",), (2, 3), code=-9),
    Starting("other shards: killed when it is made", ("fdatasync:signal=SIGKILL:when=2",), (2, 3), code=-9),
    Starting("other shards: killed as the old go", ("unlink:signal=SIGKILL:when=1",), (2, 3), code=-9),
    Starting("other shards: the old stay", ("unlink:error=EIO:when=1..2",), (2, 3), says="left to the next"),
)


@contextmanager
def attached(pid: int, inject: Sequence[str], path: Path | None, trace: Path) -> Iterator[None]:
    """Have strace fail the calls of a running process; see that it did, and let go."""
    calls = ",".join(expression.partition(":")[0] for expression in inject)
    command = ["strace", "-f", "-qq", "-o", str(trace), "-p", str(pid), "-e", f"trace={calls}"]
    for expression in inject:
        command += ["-e", f"inject={expression}"]
    if path:
        command += ["-P", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:

        def attached() -> bool:
            if injected(trace):
                return True  # and perhaps it is over already: the first call was the last
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                raise Violation(f"strace ended: {tracer.stderr.read()}")
            tasks = Path(f"/proc/{pid}/task")
            with suppress(OSError):  # a thread has ended, or all are killed by now: then the trace says so
                return all("TracerPid:\t0" not in (task / "status").read_text() for task in tasks.iterdir())
            return False

        try:
            until("strace is attached", attached)
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()


def injected(trace: Path) -> int:
    """Return how many calls were interfered with."""
    text = trace.read_text(errors="replace") if trace.exists() else ""
    return text.count("INJECTED") + text.count("DELAYED") + text.count("killed by SIGKILL")


def run_running(scenario: Running, directory: Path, rng: random.Random) -> int:
    """Serve, interfere, and check; return the acknowledged writes."""
    options = ["--shards", "2", "--appendfsync", scenario.policy]
    if scenario.log:  # strace knows it by its name
        options += ["--aof-rewrite-percentage", "0"]
    with serving(directory, rng, *options) as (server, _):
        server.expect(r"\[\d+\] (ERROR|CRITICAL)")
        port = server.port
        writers = [
            Writer(f"w{i}", lambda: Client("127.0.0.1", port, timeout=20.0), rng.getrandbits(32), 0.002)
            for i in range(3)
        ]
        for writer in writers:
            writer.start()
        trace = directory / "trace"
        shard, log = server.shard(0), server.segment(0) if scenario.log else None
        with attached(shard.pid, scenario.inject, log, trace):
            until("the injection", lambda: injected(trace))
            if scenario.says:
                until(scenario.says, lambda: server.logged(scenario.says))
            time.sleep(0.3)
        check(server, writers)
        wrote = [writer.acknowledged for writer in writers]
        until("writes", lambda: all(w.acknowledged > n for w, n in zip(writers, wrote, strict=True)))
        check(server, writers)
        for writer in writers:
            writer.finish()
        refused = sum(writer.refused for writer in writers)
        if scenario.refuses and not refused:
            raise Violation("no write was refused")
        server.stop()
        server.start("--shards", "2")
        return sum(writer.acknowledged for writer in writers)


def run_starting(scenario: Starting, directory: Path, rng: random.Random) -> int:
    """Start under the fault, then without it; return how many values were there all the time."""
    server = Server(directory / "data", directory / "log")
    server.expect(r"\[\d+\] (ERROR|CRITICAL)")
    trace = directory / "trace"
    *before, last = scenario.shards
    values: dict[bytes, bytes] = {}
    try:
        for shards in before:
            server.start("--shards", str(shards))
            with Client("127.0.0.1", server.port) as client:
                for number in range(200):
                    key, value = b"k%d" % rng.randrange(150), b"%d" % number
                    client.set(key, value)
                    values[key] = value
            server.stop()
        calls = ",".join(expression.partition(":")[0] for expression in scenario.inject)
        prefix = ["strace", "-D", "-f", "-qq", "-o", str(trace), "-e", f"trace={calls}"]
        for expression in scenario.inject:
            prefix += ["-e", f"inject={expression}"]
        if scenario.path:
            prefix += ["-P", str(directory / "data" / scenario.path)]
        server.start("--shards", str(last), prefix=prefix, ready=scenario.code is None)
        if scenario.code is not None:
            code = server.wait()
            server.wait_gone()
            if code != scenario.code:
                raise Violation(f"it ended with {code}, expected {scenario.code}:\n{server.log()}")
        until("the injection", lambda: injected(trace))
        if not re.search(scenario.says, server.log()):
            raise Violation(f"it does not say {scenario.says!r}:\n{server.log()}")
        if "Traceback" in server.log():
            raise Violation(f"it ends in a traceback:\n{server.log()}")
        if scenario.code is None:
            if not scenario.down:
                compare(server, values)
            server.stop()
        for shards in (last, *before[-1:]):
            server.start("--shards", str(shards))
            compare(server, values)
            server.stop()
    finally:
        server.end()
    return len(values) or 1


def compare(server: Server, values: dict[bytes, bytes]) -> None:
    """Raise Violation unless the server holds these values, and no others."""
    server.wait_up()
    with Client("127.0.0.1", server.port) as client:
        found = {key: client.get(key) for key in values}
        keys = sum(row["keys"] for row in client.stats())
    if found != values or keys != len(values):
        wrong = [key for key in values if found[key] != values[key]]
        raise Violation(f"{keys} keys, {len(values)} were written; wrong: {wrong[:5]}\n{server.log()}")


def run(scenario: Running | Starting, seed: int) -> int:
    """Run one scenario; return how much was written. Raises Violation."""
    with tempfile.TemporaryDirectory() as path:
        try:
            rng = random.Random(seed)
            if isinstance(scenario, Running):
                return run_running(scenario, Path(path), rng)
            return run_starting(scenario, Path(path), rng)
        except AssertionError as error:
            log = Path(path) / "log"
            text = log.read_text()[-3000:] if log.exists() else ""
            raise Violation(f"{scenario.name}: {error}\n{text}") from error


def campaign(rounds: int, seed: int, note: Note) -> str:
    """Run every scenario ``rounds`` times. Raises Violation."""
    if reason := why_not():
        raise Violation(reason)
    written = 0
    for number in range(rounds):
        for index, scenario in enumerate(SCENARIOS):
            with in_run(seed):
                wrote = run(scenario, seed + number)
                if not wrote:
                    raise Violation(f"{scenario.name}: no traffic")
                written += wrote
                note(number * len(SCENARIOS) + index + 1)
    return f"{len(SCENARIOS)} scenarios, {rounds} times each, {written} writes; 0 acknowledged lost"
