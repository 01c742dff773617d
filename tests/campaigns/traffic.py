"""Clients that write to a real server, know what they were promised, and notice a lie when they read it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from campaigns.history import Violation
from imds import Client, ImdsError, Response

# What an error code says of its write: surely not done. Whatever else is not OK leaves that open.
NOT_DONE = ("RETRY", "SHARDDOWN", "LOADING", "READONLY", "BUSY", "OOM")
PATIENCE = 60.0  # seconds in which a server has to be back

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
        held = {key for key, register in self.strings.items() if register.sure is not None}
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

    def _draw(self) -> tuple[Register, Seen, tuple[bytes, ...]]:
        rng = self._rng
        self._number += 1
        if rng.random() < 0.6:
            key = rng.choice(list(self.strings))
            register = self.strings[key]
            if rng.random() < 0.1:
                return register, None, (b"del", key)
            value = b"%d." % self._number + b"v" * rng.choice((0, 10, 500))
            return register, value, (b"set", key, value)
        key, member = rng.choice(list(self.members))
        register = self.members[key, member]
        if rng.random() < 0.2:
            return register, None, (b"zrem", key, member)
        return register, float(self._number), (b"zadd", key, b"%d" % self._number, member)

    def _write(self) -> None:
        batch = [self._draw() for _ in range(self._rng.choice((1, 1, 1, 4)))]
        for register, value, _ in batch:
            register.open.append(value)
        with self._client.pipeline() as pipe:
            for _, _, tokens in batch:
                pipe.command(*tokens)
            try:
                replies: list[Response] = pipe.execute()
            except ImdsError:
                self.unknown += len(batch)
                time.sleep(0.02)
                return
        for index, ((register, value, tokens), reply) in enumerate(zip(batch, replies, strict=True)):
            if reply.status in (0, 1):  # missing: del and zrem leave what they are asked to leave
                self.acknowledged += 1
                later = [other[1] for other in batch[index + 1 :] if other[0] is register]
                register.sure, register.open = value, [v for v in register.open if v in later]
                continue
            code = reply.payload.partition(b" ")[0].decode()
            if code in NOT_DONE:
                self.refused += 1
                register.open.remove(value)
            elif code == "UNKNOWN":
                self.unknown += 1
            else:
                raise Violation(f"{tokens[:2]} answered {reply}")

    def _read_all(self) -> None:
        """Compare everything with what may be. Raises Violation."""
        for key, register in self.strings.items():
            reply = self._read(b"get", key)
            self._compare(key, register, None if reply.status == 1 else reply.payload)
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
