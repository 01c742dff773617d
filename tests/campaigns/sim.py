"""A shard's own main function, unchanged, on a simulated disk and clock.

    test (main thread) ── control channel, link: real sockets ──▶ imds.shard.worker.main (a thread)
                                                                    │ and the threads that it starts
                                                                    ▼
                                                                 SimDisk

Nothing of the worker is repeated here. Whatever of its surroundings would make a run differ from the next
is replaced in every module of the package: threads and locks, clock, selectors, random seeds, signals, and
the class Storage. What a new module imports under any of these names is replaced in the same way.

The kernel of a shard's links may append to the log itself, by pwrite(2). In one half of the simulations the
links are the Python twin's, and its pwrite(2) is the simulated disk's. In the other they are those that the
server would use, and the worker does every append.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import select
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import imds.process
import imds.reshard
import imds.shard.links as links
import imds.shard.segment as segment
import imds.shard.worker as worker
import imds.storage
from campaigns import schedule as sim_threads
from campaigns.model import Reply, Tokens
from campaigns.schedule import FOREVER, Schedule, Task
from campaigns.simdisk import SimCrash, SimDisk
from imds.config import Config
from imds.control import Channel, Message
from imds.datadir import DataDir
from imds.envelope import REPLY, seal
from imds.protocol import OK, Buffer, decode_response, encode_request, encode_response
from imds.rewrites import Rewrites
from imds.shard.segment import FILL

DIRECTORY = Path("/data")


class Stopped(Exception):
    """The shard's process has ended; ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the shard ended with exit code {code}")
        self.code = code


class _NoSignals:
    """imds.process.Signals, with no signal ever."""

    def __init__(self, *_: object, **_names: object) -> None:
        self._pair = socket.socketpair()

    def fileno(self) -> int:
        return self._pair[0].fileno()

    def take(self) -> set[object]:
        return set()

    def close(self) -> None:
        for sock in self._pair:
            sock.close()


class _Module:
    """A module of which some names are replaced."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _replacements(sim: Simulation) -> dict[int, Any]:
    """Return what stands in for each object, by the object's id."""
    schedule = sim.schedule

    def of(kind: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **names: kind(schedule, *args, **names)

    threads = {name: of(getattr(sim_threads, name)) for name in ("Thread", "Lock", "Condition", "Event")}
    clock = {
        "monotonic": lambda: schedule.now,
        "perf_counter": lambda: schedule.now,
        "process_time": lambda: schedule.now,
        "time": lambda: 1e9 + schedule.now,
        "time_ns": lambda: 1_000 * sim.microseconds(),
        "sleep": schedule.sleep,
    }
    by_id: dict[int, Any] = {
        id(threading): _Module(threading, **threads),
        id(time): _Module(time, **clock),
        id(selectors): _Module(selectors, DefaultSelector=of(sim_threads.Selector)),
        id(imds.storage.random_seed): lambda: sim.rng.getrandbits(64),
        id(imds.process.Signals): _NoSignals,
        id(imds.storage.Storage): lambda: sim.disk,
    }
    # Logging, signal handlers, scheduling, limits: the process is this test's.
    by_id |= {id(one): _nothing for one in vars(imds.process).values() if inspect.isfunction(one)}
    by_id |= {id(getattr(threading, name)): twin for name, twin in threads.items()}
    by_id |= {id(getattr(time, name)): twin for name, twin in clock.items()}
    return by_id


def _nothing(*_: object, **_names: object) -> None:
    pass


# Every global name of the package that has to be replaced: (the module's names, name, what it really is).
_Sites = list[tuple[dict[str, Any], str, Any]]


def _sites(by_id: dict[int, Any]) -> _Sites:
    return [
        (vars(module), name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] == "imds" and module_name not in ("imds.process", "imds.storage")
        for name, value in list(vars(module).items())
        if id(value) in by_id
    ]


_found: tuple[int, _Sites] = (0, [])  # how many modules there were, and what was found in them


class Simulation:
    """One machine from its start to its crash or end: a disk, a clock, threads. Use :func:`simulate`."""

    def __init__(self, disk: SimDisk, rng: random.Random) -> None:
        self.disk = disk
        self.rng = rng
        self.schedule = Schedule(rng, disk.clock())
        self.shards: list[Shard] = []
        self.turns: dict[bytes, int] = {}  # envelope: the shard's clock when it was carried out, in ms
        self.granted = 0  # appends by the kernel of the links

    def start_shard(self, config: Config, index: int, datadir: DataDir) -> Shard:
        """Start the process of a shard; it has not loaded yet."""
        self.shards.append(Shard(self, config, index, datadir))
        return self.shards[-1]

    def microseconds(self) -> int:
        """Return the time since 1970."""
        return round(1e6 * (1e9 + self.schedule.now))

    def clock(self) -> int:
        """Return the time that deadlines are told by, in milliseconds since 1970."""
        return self.microseconds() // 1000

    def close(self) -> None:
        """End every thread where it is."""
        self.schedule.stop()
        for shard in self.shards:
            shard.close()


@contextmanager
def simulate(disk: SimDisk, rng: random.Random) -> Iterator[Simulation]:
    """Put the package on ``disk`` and on a clock of its own; with ``with``."""
    global _found
    sim = Simulation(disk, rng)
    by_id = _replacements(sim)
    if _found[0] != len(sys.modules):
        _found = len(sys.modules), _sites(by_id)
    sites = _found[1]

    def pause(name: str, path: Path) -> None:
        if name == "close" and sim.schedule.stopped:
            return  # of a thread that unwinds: it has no effect
        sim.schedule.pause()

    before, during, disk.clock = disk.before, disk.during, lambda: sim.schedule.now
    plain, plain_links = worker.UnifiedStore, worker.Links
    disk.before, disk.during = _then(before, pause), _then(during, pause)
    disk.direct = rng.random() < 0.5
    # The data are few: what is saved at a time has to be less, if anything is to come in between.
    piece, worker.PIECE = worker.PIECE, rng.choice((1, 200, worker.PIECE))
    room, segment.ROOM = segment.ROOM, 1000
    try:
        for names, name, value in sites:
            names[name] = by_id[id(value)]
        worker.UnifiedStore = _with_clock(plain, sim.turns)  # type: ignore[misc, assignment]
        kind = links.Links if disk.direct else plain_links
        worker.Links = lambda: kind(sim.microseconds)  # type: ignore[misc, assignment]
        links.os = _Module(os, pwrite=_pwrite_for(sim))  # type: ignore[attr-defined, assignment]
        yield sim
    finally:
        try:
            sim.close()
        finally:
            disk.before, disk.during = before, during
            worker.UnifiedStore, worker.Links = plain, plain_links  # type: ignore[misc]
            worker.PIECE = piece
            segment.ROOM = room
            links.os = os  # type: ignore[attr-defined]
            for names, name, value in sites:
                names[name] = value


def _with_clock(store_class: Callable[..., Any], turns: dict[bytes, int]) -> Callable[..., Any]:
    """Return what makes such a store, with one hook more: it notes the time that the store goes by."""

    def make(log: Any, *, hooks: dict[str, Callable[[list[bytes]], bytes]], **options: Any) -> Any:
        def note(arguments: list[bytes]) -> bytes:
            turns[arguments[0]] = store.now
            return encode_response(OK, b"")

        store = store_class(log, hooks={**hooks, "_clock": note}, **options)
        return store

    return make


def _pwrite_for(sim: Simulation) -> Callable[[int, Buffer, int], int]:
    """Return pwrite(2) for the links, by which they append to the log."""

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        sim.granted += bool(bytes(data).strip(FILL))  # making room is no append
        return sim.disk.write_at(fd, data, offset)

    return pwrite


def _then(
    first: Callable[[str, Path], None], second: Callable[[str, Path], None]
) -> Callable[[str, Path], None]:
    def both(name: str, path: Path) -> None:
        first(name, path)
        second(name, path)

    return both


class Link:
    """A router's end of the stream to a shard: requests go out in envelopes, replies come back in order.

    The first request of each envelope has the time noted at which the shard carries it out.
    """

    def __init__(self, shard: Shard) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        with theirs:
            shard.channel.send("link", (theirs.fileno(),), router=len(shard._links))
        self.sock = ours
        self.sent: deque[tuple[Tokens, bytes]] = deque()  # what has no reply yet, and its envelope
        self.now = 0  # the shard's clock when it carried out what was asked last, in ms
        self._shard = shard
        self._name = b"%d/%d:" % (len(shard._sim.shards), len(shard._links))
        self._tickets: deque[tuple[int, int]] = deque()
        self._ticket = 0
        self._inbox = bytearray()

    def send(self, requests: Sequence[Tokens]) -> None:
        """Send one envelope. Raises Stopped where the shard has ended: then nothing was sent."""
        name = self._name + b"%d" % self._ticket
        frames = b"".join(encode_request(tokens) for tokens in [(b"_clock", name), *requests])
        data = seal(self._ticket, len(requests) + 1, frames)
        try:
            took = self.sock.send(data)
        except (BrokenPipeError, ConnectionResetError):
            self._shard.wait(lambda: False)
        assert took == len(data), "the simulated link is full"
        self._tickets.append((self._ticket, len(requests) + 1))
        self._ticket += 1
        self.sent.extend((tokens, name) for tokens in requests)

    def receive(self) -> list[tuple[Tokens, Reply, int]]:
        """Return the requests that have been answered since the last call, with replies and times."""
        try:
            while data := self.sock.recv(1 << 18):
                self._inbox += data
        except OSError:
            pass
        found = []
        while len(self._inbox) >= REPLY.size:
            length, ticket, count = REPLY.unpack_from(self._inbox)
            if len(self._inbox) < 4 + length:
                break
            assert (ticket, count) == self._tickets.popleft(), "the reply belongs to another envelope"
            position = REPLY.size
            for number in range(count):
                decoded = decode_response(self._inbox, position)
                assert decoded is not None
                status, payload, position = decoded
                if number:
                    tokens, name = self.sent.popleft()
                    self.now = self._shard._sim.turns.get(name, 0)
                    found.append((tokens, (status, bytes(payload)), self.now))
            assert position == 4 + length
            del self._inbox[:position]
        return found

    def ask(self, requests: Sequence[Tokens]) -> list[Reply]:
        """Send the requests and return the replies. Raises Stopped."""
        assert not self.sent
        replies: list[Reply] = []
        for start in range(0, len(requests), 500):
            part = requests[start : start + 500]
            self.send(part)
            got: list[Reply] = []
            while len(got) < len(part):
                self._shard.wait(lambda: self._readable())
                got += [reply for _, reply, _ in self.receive()]
            replies += got
        return replies

    def pending(self) -> tuple[tuple[Tokens, int], ...]:
        """Return what has been carried out, or is being, and has no reply yet; with the shard's time."""
        turns = self._shard._sim.turns
        return tuple((tokens, turns[name]) for tokens, name in self.sent if name in turns)

    def _readable(self) -> bool:
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


class Shard:
    """One process of the shard, with the supervisor that it needs."""

    def __init__(self, sim: Simulation, config: Config, index: int, datadir: DataDir) -> None:
        self._sim = sim
        arguments = config, index, datadir.shard_dir(index), datadir.generation
        self.channel, theirs = Channel.pair()
        self._sockets = [theirs]
        self._links: list[Link] = []
        self._heard: list[str] = []  # kinds of messages
        self._rewrites = Rewrites()
        self.refusal = ""
        self.rewritten = 0
        self.task: Task = sim.schedule.spawn(
            lambda: worker.main(*arguments, Channel(theirs)), f"shard-{index}"
        )
        self._supervisor = sim.schedule.spawn(self._supervise, f"supervisor-{index}")

    def link(self) -> Link:
        """Return a new stream to the shard."""
        self._links.append(Link(self))
        return self._links[-1]

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until that is true. Raises Stopped if the shard ends before, or what ended it otherwise."""
        self._sim.schedule.wait(lambda: self._supervisor.done or ready())
        if not ready():
            error = self.task.error or self._supervisor.error
            raise error or Stopped(self.task.result)

    def wait_ready(self) -> None:
        """Wait until the log is loaded. Raises Stopped, with ``refusal`` set if it refused the log."""
        self.wait(lambda: "ready" in self._heard)

    def stop(self) -> int:
        """Have it stop as the supervisor does; return the exit code."""
        self.channel.send("stop")
        self._sim.schedule.wait(lambda: self.task.done)
        if self.task.error is not None:
            raise self.task.error
        code: int = self.task.result
        return code

    def _supervise(self) -> None:
        """Do what imds/supervisor.py does about the shard's log, until the shard has ended."""
        while not self.task.done or self._readable(self.channel):
            schedule, pause = self._sim.schedule, self._rewrites.wait(self._sim.schedule.now)
            schedule.wait(
                lambda: self.task.done or self._readable(self.channel),
                FOREVER if pause is None else schedule.now + pause,
            )
            for message, _fds in self.channel.receive():
                self._on_shard(message)
            if self._rewrites.start(schedule.now, {0}) is not None:
                self.channel.send("rewrite")

    @staticmethod
    def _readable(channel: Channel) -> bool:
        return not channel.closed and bool(select.select([channel], [], [], 0)[0])

    def _on_shard(self, message: Message) -> None:
        kind = message["kind"]
        self._heard.append(kind)
        if kind == "refused":
            self.refusal = message["reason"]
        elif kind == "rewrite":
            self._rewrites.ask(0, self._sim.schedule.now, at_once=message["at_once"])
        elif kind == "rewritten":
            if message["error"]:
                self._rewrites.failed(self._sim.schedule.now)
            else:
                self.rewritten += 1
                self._rewrites.succeeded()

    def keys(self) -> int:
        """Return how many keys it says that it holds."""
        ((status, payload),) = self.link().ask([(b"stats",)])
        assert status == 0, payload
        count: int = json.loads(payload)["keys"]
        return count

    def close(self) -> None:
        """Give back the sockets; its thread has ended."""
        self.channel.close()
        for sock in self._sockets:
            sock.close()
        for link in self._links:
            link.sock.close()


__all__ = ["DIRECTORY", "Link", "Shard", "SimCrash", "Simulation", "Stopped", "simulate"]
