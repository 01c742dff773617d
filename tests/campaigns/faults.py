"""Campaign ``faults``: every operation on the disk fails once, or from then on, in every way.

A run is the first start of a shard, some requests, the stop. Operation number ``at`` of it fails. A process
that ends is started again, as the supervisor would, up to a limit; then the fault is lifted. At each end the
machine crashes, with and without its power. No answer may have been a lie: what was acknowledged is there, as
far as the policy promises, what was refused is not, and once the fault is gone the shard takes writes again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from campaigns.history import History, NotStarted, Pending, Session, Violation, start, stored
from campaigns.model import KEYS, Model
from campaigns.reporting import Note, in_run
from campaigns.requests import Requests
from campaigns.sim import Stopped, simulate
from campaigns.simdisk import Fault, SimDisk
from imds.process import EXIT_DISK
from imds.shard.aof import POLICIES

KINDS = ("EIO", "ENOSPC", "EINTR", "short")
MODES = ("once", "late", "forever")
LIVES = 3  # starts with the fault in force


@dataclass(frozen=True)
class Case:
    """One fault in one run."""

    policy: str
    kind: str
    mode: str
    at: int


@dataclass
class Tally:
    """What a campaign did."""

    cases: int = 0
    struck: int = 0  # in which the fault befell an operation
    answered: int = 0  # writes
    refused: int = 0  # requests
    ends: int = 0  # of the process, by the fault


def cases(most_operations: int) -> Iterator[Case]:
    """Yield every case up to that operation."""
    for at, policy, kind, mode in product(range(1, most_operations + 1), POLICIES, KINDS, MODES):
        if not (kind == "short" and mode == "late"):
            yield Case(policy, kind, mode, at)


def campaign(rounds: int, seed: int, note: Note, *, step: int = 1) -> str:
    """Run every case, or every ``step``-th, on each of ``rounds`` workloads. Raises Violation."""
    tally = Tally()
    for number in range(rounds):
        run = seed * 1_000_000 + number
        with in_run(run):
            operations = _operations(run)
            for index, case in enumerate(cases(operations)):
                if index % step == number % step:
                    Run(case, run, tally).go()
                    note(number * operations * 33 + index)
    if not (tally.struck and tally.answered and tally.refused and tally.ends):
        raise Violation(f"no traffic, or no fault did anything: {tally}")
    return (
        f"{tally.cases} cases on {rounds} workloads, {tally.struck} struck: "
        f"{tally.answered} acknowledged writes, {tally.refused} requests refused, {tally.ends} ends "
        f"of the process; 0 false acknowledgements"
    )


def _operations(seed: int) -> int:
    """Return how many operations the longest workload of that seed has without a fault."""
    most = 0
    for policy in POLICIES:
        run = Run(Case(policy, "EIO", "once", 1 << 30), seed, Tally())
        disk = SimDisk()
        run._live(disk, History(Model(), policy))
        most = max(most, disk.operations)
    return most


class Run:
    """One case. The same seed gives the same run up to the fault."""

    def __init__(self, case: Case, seed: int, tally: Tally) -> None:
        self.rng = random.Random(seed)
        self.case = case
        self.tally = tally
        self.requests = Requests(self.rng, KEYS, expiry=True)
        self.fault = Fault(case.at, case.kind, forever=case.mode == "forever", late=case.mode == "late")
        self.pending: Pending = ()

    def go(self) -> None:
        """Run the case. Raises Violation."""
        self.tally.cases += 1
        disk, history = SimDisk(), History(Model(), self.case.policy)
        try:
            for life in range(LIVES + 1):
                if life == LIVES:
                    self.fault.off = True
                ended = self._live(disk, history)
                history = self._crash(disk, history)
                if not ended:
                    break
                self.tally.ends += 1
                disk = disk.killed()
            else:
                raise Violation("it does not go on although the fault is gone")
        except Violation as violation:
            what = f"{self.case}, {self.fault.hit} {self.fault.where}"
            raise Violation(f"{what}: {violation}") from None
        self.tally.struck += self.fault.hits > 0

    def _live(self, disk: SimDisk, history: History) -> bool:
        """Start, serve, stop; return whether the fault ended it before."""
        self.pending = ()
        self.fault.attach(disk)
        history.follow(disk)
        with simulate(disk, self.rng) as sim:
            try:
                datadir, shard = start(sim, history.policy)
            except NotStarted:
                return True
            session = Session(sim, shard, history)
            before = len(history.effects)
            try:
                for number in range(6):
                    batch = [self.requests.draw() for _ in range(self.rng.choice((1, 2, 5)))]
                    session.writer.send([self.requests.transaction(), *batch] if number == 2 else batch)
                    session.wait()
                    sim.schedule.sleep(self.rng.choice((0.0, 0.5, 1.5)))
                self.fault.off = True
                sim.schedule.sleep(2.5)
                refused = history.refused
                session.writer.send([(b"set", KEYS[0], b"after the fault")])
                session.wait()
                if history.refused > refused:
                    raise Violation("writes are refused although the fault is gone")
                self.fault.off = self.fault.hits > 0  # what has not struck may strike the stopping
                code = shard.stop()
            except Stopped as stopped:
                session.note()
                self.pending, code = session.pending, stopped.code
            self.tally.answered += len(history.effects) - before
            self.tally.refused += history.refused
            if code not in (0, EXIT_DISK):
                raise Violation(f"the shard ended with exit code {code}")
            if code:
                return True
            datadir.close()
        return False

    def _crash(self, disk: SimDisk, history: History) -> History:
        """Crash here in several ways and compare; return the history that a restart goes on from."""
        for power_cut in (True, True, True, False):
            moment = history.moment(self.pending, power_cut=power_cut)
            found = disk.crash(self.rng) if power_cut else disk.killed()
            with simulate(found, self.rng) as sim:
                _datadir, shard = start(sim, history.policy)
                count = history.check(moment, *stored(shard))
        return history.resumed(moment, count, history.policy, min(history.floor, count))
