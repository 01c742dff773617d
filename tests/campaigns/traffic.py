"""Clients that write to a real server, know what they were promised, and notice a lie when they read it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from campaigns.history import Violation
from campaigns.model import results
from imds import Client, ImdsError, Response

# What an error code says of its write: surely not done. Whatever else is not OK leaves that open.
NOT_DONE = ("RETRY", "SHARDDOWN", "LOADING", "READONLY", "BUSY", "OOM", "EXECABORT")
PATIENCE = 60.0  # seconds in which a server has to be back
FAR = 4_000_000_000_000  # milliseconds since 1970: when a key goes that has a deadline

Seen = bytes | float | None


@dataclass
class Register:
    """What one key, or one member of a sorted set, may hold: the last sure value, or an open later one."""

    sure: Seen = None
    open: list[Seen] = field(default_factory=list)

    def check(self, found: Seen) -> str | None:
        """Return what is wrong with a value that was read, None if it may be; it is sure from now on."""
        if found != self.sure and found not in self.open:
            return f"holds {found!r}; acknowledged was {self.sure!r}, open are {self.open}"
        self.sure, self.open = found, []
        return None

    def count(self) -> list[Seen]:
        """Return what it may hold after one more ``incr``."""
        held = (one for one in (self.sure, *self.open) if not isinstance(one, float))
        return [b"%d" % (int(one or b"0") + 1) for one in held]


@dataclass(frozen=True)
class Write:
    """One request, and what it makes of registers; with ``counts`` it is an ``incr`` of its one register."""

    tokens: tuple[bytes, ...]
    makes: tuple[tuple[Register, Seen], ...]
    counts: bool = False

    def begin(self) -> None:
        """It is being sent."""
        for register, value in self.makes:
            if not self.counts:
                register.open.append(value)

    def done(self, later: list[Register], reply: Response) -> None:
        """It is acknowledged; ``later`` writes of the same batch have begun. Raises Violation."""
        for register, value in self.makes:
            if self.counts:
                if reply.payload not in register.count():
                    raise Violation(f"{self.tokens} answered {reply}, of {register}")
                register.sure, register.open = reply.payload, []
                continue
            keep = sum(other is register for other in later)
            register.sure = value
            register.open = register.open[len(register.open) - keep :] if keep else []

    def refused(self) -> None:
        """It was surely not done."""
        for register, value in self.makes:
            if not self.counts:
                register.open.remove(value)

    def unknown(self) -> None:
        """Nobody knows."""
        if self.counts:
            ((register, _),) = self.makes
            register.open += register.count()


class Writer(threading.Thread):
    """One client on keys of its own, until :meth:`finish`. It reads what it wrote, too, now and then.

    ``acknowledged`` and ``unknown`` count writes. ``failure`` is the first lie, or what went wrong.
    """

    def __init__(
        self, name: str, client: Callable[[], Client[bytes]], seed: int, pause: float = 0.004
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.acknowledged = self.unknown = self.refused = 0
        self.failure: BaseException | None = None
        self.strings = {b"%b:s%d" % (name.encode(), i): Register() for i in range(24)}
        self.members = {
            (b"%b:z%d" % (name.encode(), i // 6), b"m%d" % (i % 6)): Register() for i in range(18)
        }
        name_ = name.encode()
        self.counters = {b"%b:c%d" % (name_, i): Register() for i in range(3)}
        # Keys of one slot: those of a pair are written by one command, all or none of it, the others by
        # transactions.
        self.pairs = [[(b"{%b:p%d}%b" % (name_, i, k), Register()) for k in (b"a", b"b")] for i in range(4)]
        self.grouped = [[(b"{%b:g%d}%b" % (name_, i, k), Register()) for k in (b"a", b"b")] for i in range(4)]
        self._client = client()
        self._rng = random.Random(seed)
        self._pause = pause
        self._over = threading.Event()
        self._resume = threading.Event()
        self._sweep = threading.Event()
        self._swept = threading.Event()
        self._number = 0

    def run(self) -> None:
        try:
            while not self._over.is_set():
                if self._sweep.is_set():
                    self._read_all()
                    self._sweep.clear()
                    self._swept.set()
                    self._resume.wait(PATIENCE)
                self._write()
                time.sleep(self._pause)
        except BaseException as error:
            self.failure = error
            self._swept.set()
        finally:
            self._client.close()

    def ask_sweep(self) -> None:
        """Have it read all that it ever wrote, and then wait."""
        self._resume.clear()
        self._swept.clear()
        self._sweep.set()

    def await_sweep(self) -> int:
        """Return how many keys it has found. Raises what went wrong, Violation if it read a lie."""
        if not self._swept.wait(PATIENCE):
            raise Violation(f"{self.name} could not read its keys for {PATIENCE:g} s")
        if self.failure:
            raise self.failure
        held = {key for key, register in self._registers() if register.sure is not None}
        held |= {key for (key, _), register in self.members.items() if register.sure is not None}
        return len(held)

    def resume(self) -> None:
        """Have it go on after a sweep."""
        self._resume.set()

    def finish(self) -> None:
        """End it."""
        self._over.set()
        self._resume.set()
        self.join(PATIENCE)
        if self.failure:
            raise self.failure

    # -- what it does -----------------------------------------------------------------------------

    def _registers(self) -> list[tuple[bytes, Register]]:
        """Return the keys that hold strings."""
        return [
            *self.strings.items(),
            *self.counters.items(),
            *(one for pair in (*self.pairs, *self.grouped) for one in pair),
        ]

    def _draw(self) -> Write:
        rng = self._rng
        self._number += 1
        kind = rng.random()
        if kind < 0.45:
            key = rng.choice(list(self.strings))
            register = self.strings[key]
            if rng.random() < 0.1:
                return Write((b"del", key), ((register, None),))
            value = b"%d." % self._number + b"v" * rng.choice((0, 10, 500))
            if rng.random() < 0.2:  # what has a deadline says so
                value = b"t" + value
                return Write(
                    (b"set", key, value, b"pxat", b"%d" % (FAR + self._number)), ((register, value),)
                )
            return Write((b"set", key, value), ((register, value),))
        if kind < 0.6:  # of several shards
            several = rng.sample(list(self.strings), 3)
            if rng.random() < 0.3:
                return Write((b"del", *several), tuple((self.strings[key], None) for key in several))
            value = b"%d.m" % self._number
            words = [word for key in several for word in (key, value)]
            return Write((b"mset", *words), tuple((self.strings[key], value) for key in several))
        if kind < 0.7:
            pair = rng.choice(self.pairs)
            if rng.random() < 0.2:
                return Write((b"del", *(key for key, _ in pair)), tuple((one, None) for _, one in pair))
            value = b"%d.p" % self._number
            words = [word for key, _ in pair for word in (key, value)]
            return Write((b"mset", *words), tuple((register, value) for _, register in pair))
        if kind < 0.75:
            key = rng.choice(list(self.counters))
            return Write((b"incr", key), ((self.counters[key], None),), counts=True)
        key, member = rng.choice(list(self.members))
        register = self.members[key, member]
        if rng.random() < 0.2:
            return Write((b"zrem", key, member), ((register, None),))
        return Write((b"zadd", key, b"%d" % self._number, member), ((register, float(self._number)),))

    def _write(self) -> None:
        if self._rng.random() < 0.1:
            self._transact()
            return
        batch = [self._draw() for _ in range(self._rng.choice((1, 1, 1, 4)))]
        for write in batch:
            write.begin()
        replies = self._send([write.tokens for write in batch])
        for index, write in enumerate(batch):
            reply = replies[index] if replies else None
            later = [one for other in batch[index + 1 :] if not other.counts for one, _ in other.makes]
            self._settle(write, reply, later, whole=len(write.makes) == 1)

    def _transact(self) -> None:
        """Write two keys by a transaction."""
        self._number += 1
        value = b"%d.g" % self._number
        pair = self._rng.choice(self.grouped)
        write = Write((b"exec",), tuple((register, value) for _, register in pair))
        write.begin()
        replies = self._send([(b"multi",), *((b"set", key, value) for key, _ in pair), (b"exec",)])
        self._settle(write, replies[-1] if replies else None, [], whole=True)

    def _send(self, requests: list[tuple[bytes, ...]]) -> list[Response] | None:
        with self._client.pipeline() as pipe:
            for tokens in requests:
                pipe.command(*tokens)
            try:
                return pipe.execute()
            except ImdsError:
                time.sleep(0.02)
                return None

    def _settle(self, write: Write, reply: Response | None, later: list[Register], *, whole: bool) -> None:
        """Note what became of a write. ``whole``: an error that says that it was not done means all of it."""
        code = "UNKNOWN" if reply is None else ""
        if reply is not None:
            errors = [payload for status, payload in results((reply.status, reply.payload)) if status == 2]
            if reply.status == 2 or errors:
                code = (errors or [reply.payload])[0].partition(b" ")[0].decode()
        if reply is not None and not code:  # missing: del and zrem leave what they are asked to leave
            self.acknowledged += 1
            write.done(later, reply)
        elif code in NOT_DONE and whole:
            self.refused += 1
            write.refused()
        elif code == "UNKNOWN" or code in NOT_DONE:
            self.unknown += 1
            write.unknown()
        else:
            raise Violation(f"{write.tokens[:2]} answered {reply}")

    def _read_all(self) -> None:
        """Compare everything with what may be. Raises Violation."""
        for key, register in self._registers():
            reply = self._read(b"get", key)
            value = None if reply.status == 1 else reply.payload
            self._compare(key, register, value)
            if key in self.strings and value is not None:
                number = value[1:].partition(b".")[0]
                wanted = b"%d" % (FAR + int(number)) if value.startswith(b"t") else b"-1"
                if (found := self._read(b"pexpiretime", key).payload) != wanted:
                    raise Violation(f"{self.name}: {key!r} holds {value[:20]!r} with deadline {found!r}")
        for pair in self.pairs:
            if len({register.sure for _, register in pair}) > 1:
                raise Violation(f"{self.name}: a part of a command was done: {pair}")
        for key in sorted({key for key, _ in self.members}):
            reply = self._read(b"zrange", key, b"-inf", b"inf")
            pairs = [pair.partition(b":") for pair in reply.payload.split(b",")] if reply.payload else []
            found = {member: float(score) for score, _, member in pairs}
            for member in [member for other, member in self.members if other == key]:
                self._compare((key, member), self.members[key, member], found.pop(member, None))
            if found:
                raise Violation(f"{key!r} has members that nobody wrote: {found}")

    def _compare(self, what: object, register: Register, found: Seen) -> None:
        if wrong := register.check(found):
            raise Violation(f"{self.name}: {what!r} {wrong}")

    def _read(self, *tokens: bytes) -> Response:
        """Ask until there is an answer."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                reply = self._client.execute(*tokens)
            except ImdsError as error:
                wrong: object = error
            else:
                if reply.status != 2:
                    return reply
                if reply.payload.startswith(b"WRONGTYPE"):
                    raise Violation(f"{tokens} answered {reply}")
                wrong = reply
            if time.monotonic() > end:
                raise Violation(f"{tokens} has no answer for {PATIENCE:g} s: {wrong}")
            time.sleep(0.02)
