"""The processes of a benchmark: a parent, and children that each run a load loop.

One test runs like this; pipes carry the messages, so a process that dies cannot hang the others::

    parent   start --------------------------------- go ------------------------ merge
    child        preload, connect, encode, "ready"      warm up, measure, Tally

Signals go to the parent, which tells the children; they end their loop and answer with what they have.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from imds.load.loop import SECOND, TICK, Load, Tally
from imds.load.replies import exchange
from imds.load.workload import ENCODERS, Workload, fill, pool
from imds.protocol import ProtocolError

FILL_BATCH = 512  # requests in one write of the preload


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and how to talk to it."""

    host: str
    port: int
    unix: str | None
    protocol: str
    timeout: float

    def __str__(self) -> str:
        return self.unix or f"{self.host}:{self.port}"

    def dial(self) -> socket.socket:
        """Return a new blocking connection. Raises BenchmarkError."""
        try:
            if self.unix:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(self.timeout)
                sock.connect(self.unix)
            else:
                sock = socket.create_connection((self.host, self.port), self.timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise BenchmarkError(f"no server at {self}: {error.strerror or error}") from None
        return sock

    def probe(self) -> None:
        """Ask one question. Raises BenchmarkError unless a server of this protocol answers it."""
        with self.dial() as sock:
            try:
                replies = exchange(sock, self.protocol, ENCODERS[self.protocol]((b"get", b"key:probe")))
            except (OSError, ProtocolError) as error:
                other = "resp" if self.protocol == "imds" else "imds"
                raise BenchmarkError(
                    f"{self} does not answer like a server of the {self.protocol} protocol ({error}); "
                    f"perhaps --protocol {other}?"
                ) from None
        for _, text in replies.odd:
            if text is not None:
                raise BenchmarkError(f"{self} answers: {text}")


@dataclass(frozen=True, slots=True)
class Plan:
    """One test, as every load process gets it."""

    target: Target
    workload: Workload
    processes: int
    connections: int
    pipeline: int
    seconds: float | None
    requests: int | None
    rate: float | None  # requests per second, all processes together
    warmup: float
    preload: tuple[str, ...]  # kinds of data to make first
    pool: int


# --- a load process -------------------------------------------------------------------------------


def _share(amount: int, index: int, shares: int) -> int:
    """Return part ``index`` of ``amount`` cut into ``shares`` nearly equal parts."""
    return amount * (index + 1) // shares - amount * index // shares


def preload(
    target: Target, workload: Workload, kinds: Sequence[str], share: int = 0, shares: int = 1
) -> None:
    """Make part ``share`` of ``shares`` of the data. Raises BenchmarkError."""
    encode = ENCODERS[target.protocol]
    with target.dial() as sock:
        frames: list[bytes] = []
        size = 0

        def flush() -> None:
            replies = exchange(sock, target.protocol, b"".join(frames), len(frames))
            for _, text in replies.odd:
                if text is not None:
                    raise BenchmarkError(f"preload: the server answers: {text}")

        try:
            for tokens in fill(workload, kinds, share, shares):
                frames.append(encode(tokens))
                size += len(frames[-1])
                if len(frames) == FILL_BATCH or size > 1 << 20:
                    flush()
                    frames.clear()
                    size = 0
            if frames:
                flush()
        except (OSError, ProtocolError) as error:
            raise BenchmarkError(f"preload: {error}") from None


def _raise_limits() -> None:
    """Allow many connections and exact timers, where the system lets us."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with suppress(OSError):  # Linux would round every wait of the open loop up by 50 microseconds
        Path("/proc/self/timerslack_ns").write_text("1")


def _work(plan: Plan, index: int, pipe: Pipe, parents_end: Pipe) -> None:
    """Run load process ``index``: say ready (None), wait for go, send the Tally or an error text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us through the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until there is a loop that can be stopped
    parents_end.close()  # or we would never see that the parent is gone
    try:
        _raise_limits()
        if plan.preload:
            preload(plan.target, plan.workload, plan.preload, index, plan.processes)
        batches = pool(plan.workload, plan.target.protocol, plan.pipeline, index, plan.pool // plan.processes)
        load = Load(batches, plan.target.protocol, plan.target.timeout)
        signal.signal(signal.SIGTERM, lambda _signum, _frame: load.stop())
        for _ in range(_share(plan.connections, index, plan.processes)):
            load.add(plan.target.dial())
        pipe.send(None)
        pipe.recv()
        load.watch(pipe)
        gap = plan.pipeline * plan.processes * SECOND / plan.rate if plan.rate else 0.0
        first = gap * index / plan.processes
        if plan.warmup:
            load.run(plan.warmup, None, gap, first)
        total = None if plan.requests is None else -(-plan.requests // plan.pipeline)
        mine = None if total is None else _share(total, index, plan.processes)
        tally = load.run(plan.seconds, mine, gap, first)
        load.close()
        pipe.send(tally)
    except BenchmarkError as error:
        with suppress(OSError):
            pipe.send(str(error))
    except (OSError, EOFError):
        pass  # the parent is gone


# --- the parent -----------------------------------------------------------------------------------


class Interrupt:
    """While entered, notes SIGINT and SIGTERM, so that the run can end in order."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> Interrupt:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self.seen = True


class _Run:
    """The load processes of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.children: dict[Pipe, multiprocessing.Process] = {}
        for index in range(plan.processes):
            ours, theirs = multiprocessing.Pipe()
            child = multiprocessing.Process(target=_work, args=(plan, index, theirs, ours))
            child.start()
            theirs.close()
            self.children[ours] = child

    def gather(self, interrupt: Interrupt) -> list[Any]:
        """Return one message of each process. Raises BenchmarkError for an error text or a death."""
        messages: list[Any] = []
        open_pipes = set(self.children)
        while open_pipes:
            if interrupt.seen:  # again and again: a child may not have been listening yet
                for child in self.children.values():
                    child.terminate()
            for pipe in wait(open_pipes, TICK):
                assert isinstance(pipe, Pipe)
                open_pipes.discard(pipe)
                try:
                    message = pipe.recv()
                except EOFError:
                    if interrupt.seen:
                        continue
                    child = self.children[pipe]
                    child.join()
                    raise BenchmarkError(f"a load process died (exit code {child.exitcode})") from None
                if isinstance(message, str):
                    raise BenchmarkError(message)
                messages.append(message)
        return messages

    def go(self) -> None:
        """Let all processes begin."""
        for pipe in self.children:
            with suppress(OSError):
                pipe.send(None)

    def end(self) -> None:
        """Leave no process behind."""
        for pipe, child in self.children.items():
            pipe.close()
            child.join(TICK)
            if child.is_alive():
                child.kill()
                child.join()


def run(plan: Plan, interrupt: Interrupt) -> Tally:
    """Run one test and return the sum over its processes. Raises BenchmarkError."""
    processes = _Run(plan)
    try:
        processes.gather(interrupt)
        processes.go()
        total = Tally()
        for tally in processes.gather(interrupt):
            if tally is not None:
                total.merge(tally)
        return total
    finally:
        processes.end()
