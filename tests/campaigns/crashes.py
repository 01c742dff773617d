"""Campaign ``crashes``: a shard's machine stops at every operation, with every kind of half-kept disk.

A run is a few lives of one shard, one after the other: open the directory, load, serve random requests
through the worker's own loop, crash. At each change of the disk the disks that a crash right there may leave
are set aside; each is then opened by the same code, and what it serves has to keep the policy's promise:

* always: every answered write, and whatever a reader was shown.
* everysec: all that was answered before the last finished sync began; what is lost was written within 2 s.
* any: a prefix of what was asked for, in its order. After the death of the process alone, every answered
  write.

A shard that refuses to start after a mere crash breaks the promise too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from campaigns.history import History, Moment, Session, Violation, start, stored
from campaigns.model import KEYS, Model
from campaigns.reporting import Note, in_run
from campaigns.requests import Requests
from campaigns.sim import simulate
from campaigns.simdisk import SimDisk
from imds.shard.aof import POLICIES


@dataclass
class Found:
    """One disk that a crash has left, and what must be on it."""

    disk: SimDisk
    moment: Moment
    where: str
    power_cut: bool


@dataclass
class Tally:
    """What a campaign did."""

    states: int = 0
    lives: int = 0
    answered: int = 0  # writes
    granted: int = 0  # appends that the kernel of the links made
    rewritten: int = 0  # times that a log was
    lost: int = 0  # effects that a crash took, as it might
    points: dict[str, int] = field(default_factory=dict)  # operation: crash states at it


def campaign(rounds: int, seed: int, note: Note) -> str:
    """Check ``rounds`` crash states; return what was done. Raises Violation."""
    tally = Tally()
    number = 0
    while tally.states < rounds:
        run = seed * 1_000_000 + number
        with in_run(run):
            Run(run, tally).go(rounds)
        number += 1
        note(tally.states)
    if not (tally.answered and tally.granted and tally.lost and tally.rewritten):
        raise Violation(f"no traffic, or no crash lost anything: {tally}")
    points = ", ".join(f"{name} {count}" for name, count in sorted(tally.points.items()))
    return (
        f"{tally.states} crash states of {number} runs and {tally.lives} lives, "
        f"{tally.rewritten} rewrites, {tally.answered} acknowledged writes, {tally.granted} appends by the "
        f"links' kernel, {tally.lost} unsynced writes lost as they may be; 0 durable lost, 0 invented; "
        f"crash points: {points}"
    )


class Run:
    """One shard from its first start to the end of its last life."""

    def __init__(self, seed: int, tally: Tally, *, policy: str | None = None, lives: int = 3) -> None:
        self.rng = random.Random(seed)
        self.tally = tally
        self.policy = policy
        self.lives = lives
        self.density = self.rng.choice((0.15, 0.4, 1.0))  # of crash points
        self.capacity = self.rng.choice((0, 0, 4))
        # A base has the order of use, the rest of a log that of writing: after a start, the model could not
        # tell which key is evicted first.
        self.rewrite = 0 if self.capacity else self.rng.choice((0, 300, 3000))
        # A key whose time is over takes room until it is removed, some time later: not beside a limit.
        self.requests = Requests(self.rng, KEYS, expiry=not self.capacity)

    def go(self, most: int = 1 << 60) -> None:
        """Live, and check every crash of it, until the tally has ``most`` states. Raises Violation."""
        disk, history = SimDisk(), History(Model(self.capacity), self._draw_policy())
        for life in range(self.lives):
            left = []
            for found in self._live(disk, history, life):
                if self.tally.states >= most:
                    return
                left.append((found.disk, self._check(found, history)))
            if not left:
                return
            disk, history = self.rng.choice(left)

    def _draw_policy(self) -> str:
        return self.policy or self.rng.choice(POLICIES)

    def _live(self, disk: SimDisk, history: History, life: int) -> list[Found]:
        """Start, serve, and perhaps stop; return what crashes in the meantime have left."""
        rng = self.rng
        found: list[Found] = []
        session: Session | None = None
        self.tally.lives += 1
        before = len(history.effects)

        def changed(name: str, path: Path) -> None:
            if session:
                session.note()
            if rng.random() >= self.density:
                return
            self.tally.points[name] = self.tally.points.get(name, 0) + 1
            where = f"life {life}, mutation {disk.mutations}, {name} {path}"
            pending = session.pending if session else ()
            for power_cut in (True, True, False):
                moment = history.moment(pending, power_cut=power_cut)
                found.append(Found(disk.crash(rng) if power_cut else disk.killed(), moment, where, power_cut))

        def slow(name: str, path: Path) -> None:
            if name == "fdatasync" and history.policy == "everysec":
                sim.schedule.sleep(rng.choice((0.0, 0.0, 0.3, 2.5)))

        disk.after, disk.during = changed, slow
        history.follow(disk)
        with simulate(disk, rng) as sim:
            datadir, shard = start(sim, history.policy, self.capacity, self.rewrite)
            session = Session(sim, shard, history)
            for _ in range(rng.randrange(2, 30)):
                for _ in range(rng.choice((1, 1, 2, 4))):
                    session.writer.send([self.requests.draw() for _ in range(rng.choice((1, 2, 3, 8)))])
                if not self.capacity and rng.random() < 0.5:
                    session.spy.send([(b"get", rng.choice(KEYS)) for _ in range(3)])
                if rng.random() < 0.2:
                    sim.schedule.sleep(rng.choice((0.05, 0.6, 1.0, 1.7, 3.0)))
                if rng.random() < 0.1:
                    session.writer.send([self.requests.transaction()])
                if rng.random() < 0.1:
                    session.writer.send([(rng.choice((b"sync", b"sync" if self.capacity else b"rewrite")),)])
                session.wait()
            if rng.random() < 0.5:
                if code := shard.stop():
                    raise Violation(f"stopping ended with exit code {code}")
                history.floor = len(history.effects)
            datadir.close()
        self.tally.answered += len(history.effects) - before
        self.tally.granted += sim.granted
        self.tally.rewritten += shard.rewritten
        return found

    def _check(self, found: Found, history: History) -> History:
        """Start a shard from what a crash left and compare; return the history that goes on from there."""
        self.tally.states += 1
        moment, policy = found.moment, self._draw_policy()
        try:
            with simulate(found.disk.killed(), self.rng) as sim:
                sim.schedule.now += self.rng.choice((0.0, 0.0, 0.5, 5.0))  # that it was down
                datadir, shard = start(sim, policy, self.capacity)
                count = history.check(moment, *stored(shard))
                datadir.close()
        except Violation as violation:
            kind = "power cut" if found.power_cut else "kill"
            raise Violation(f"{history.policy}, {kind} at {found.where}: {violation}") from None
        self.tally.lost += max(0, moment.effects - count)
        return history.resumed(moment, count, policy, count if found.power_cut else moment.floor)
