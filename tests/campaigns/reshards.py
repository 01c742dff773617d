"""Campaign ``reshards``: the number of shards changes, and the change is crashed at every operation.

Any crash leaves the data of before, whole, in the old number of shards or in the new one; each key is in the
shard that owns it and nowhere else; and the change can be made again, or another one. The same where the
change fails by an error of the disk.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from campaigns.damage import open_all
from campaigns.history import Violation
from campaigns.model import Model, State, agrees, read_state, reader
from campaigns.reporting import Note, in_run
from campaigns.requests import Requests
from campaigns.sim import DIRECTORY, Simulation, Stopped, simulate
from campaigns.simdisk import Fault, SimDisk
from imds.datadir import DataDir, DataDirError
from imds.reshard import reshard

COUNTS = (1, 2, 3, 4, 8)
KEYS = [b"{%d}:%d" % (number % 11, number) for number in range(24)]


@dataclass
class Tally:
    """What a campaign did."""

    changes: int = 0
    states: int = 0
    old: int = 0  # states in which the old number was found
    new: int = 0
    failed: int = 0  # changes that an error stopped


def make(rng: random.Random, shards: int) -> tuple[SimDisk, State]:
    """Return a directory with some data in that many shards, and the data. Some were killed, all is safe."""
    disk, model, requests = SimDisk(), Model(), Requests(rng, KEYS)
    for _ in range(rng.choice((1, 2))):
        with simulate(disk, rng) as sim:
            datadir = open_all(sim, shards, rng.choice((0, 200)))
            for shard in sim.shards:
                shard.wait_ready()
            links = [shard.link() for shard in sim.shards]
            for _ in range(30):
                tokens = requests.draw()
                link = links[datadir.slots.shard_of(tokens[1])]
                (reply,) = link.ask([tokens])
                expected, _ = model.run(tokens, link.now)
                assert agrees(expected, reply), (tokens, reply, expected)
            if rng.random() < 0.7:
                for shard in sim.shards:
                    shard.stop()
            datadir.close()
        disk = disk.killed()
    return disk, model.state()


def read_all(sim: Simulation, shards: int) -> State:
    """Start every shard and return what all of them hold. Raises Violation for a key in two places."""
    found: State = {}
    datadir = open_all(sim, shards)
    for index, shard in enumerate(sim.shards):
        try:
            shard.wait_ready()
        except Stopped as stopped:
            raise Violation(f"shard {index} of {shards} did not start ({stopped}): {shard.refusal}") from None
        state = read_state(KEYS, shard.link().ask(reader(KEYS)))
        for key in state:
            if datadir.slots.shard_of(key) != index:
                raise Violation(f"{key!r} is in shard {index}, and belongs to {datadir.slots.shard_of(key)}")
        found |= state
    datadir.close()
    return found


def check(disk: SimDisk, rng: random.Random, state: State, counts: tuple[int, ...]) -> int:
    """Open what a crash left; return the number of shards that was found. Raises Violation."""
    with simulate(disk.killed(), rng) as sim:
        try:
            with DataDir.open(DIRECTORY, counts[0], sim.disk) as datadir:
                shards = datadir.shards
        except DataDirError as error:
            raise Violation(f"the directory was refused: {error}") from error
    if shards not in counts:
        raise Violation(f"{shards} shards, which nobody asked for")
    with simulate(disk.killed(), rng) as sim:
        found = read_all(sim, shards)
    if found != state:
        wrong = sorted(key for key in found.keys() | state.keys() if found.get(key) != state.get(key))
        raise Violation(f"other data in {shards} shards: {wrong[:5]}")
    return shards


def change(disk: SimDisk, rng: random.Random, shards: int) -> None:
    """Do what a start with another number of shards does. Raises DataDirError."""
    with simulate(disk, rng) as sim, DataDir.open(DIRECTORY, shards, sim.disk) as datadir:
        if datadir.shards != shards:
            reshard(datadir, shards)


def changing(disk: SimDisk, rng: random.Random, shards: int) -> list[SimDisk]:
    """Change the number of shards; return a disk that a power cut leaves, for each operation of that."""
    found: list[SimDisk] = []
    disk.after = lambda name, path: found.append(disk.crash(rng))
    change(disk, rng, shards)
    return found


def crashes(
    rng: random.Random, old: int, new: int, tally: Tally, density: float
) -> Iterator[tuple[SimDisk, str]]:
    """Change the number once; yield the disks that crashes at its operations leave."""
    disk, state = make(rng, old)
    found: list[tuple[SimDisk, str]] = []

    def changed(name: str, path: Path) -> None:
        if rng.random() < density:
            where = f"{old} to {new} shards, mutation {disk.mutations}, {name} {path}"
            found.append((disk.crash(rng), f"power cut at {where}"))
            found.append((disk.killed(), f"kill at {where}"))

    disk.after = changed
    change(disk, rng, new)
    tally.changes += 1
    found.append((disk.crash(rng), f"power cut after {old} to {new} shards"))
    for left, where in found:
        tally.states += 1
        try:
            shards = check(left, rng, state, (old, new))
            if rng.random() < 0.1:  # and on from there, crashed again
                again = rng.choice(COUNTS)
                some = changing(left, rng, again)
                for later in rng.sample(some, min(4, len(some))):
                    tally.states += 1
                    check(later, rng, state, (old, new, again))
                check(left.crash(rng), rng, state, (again,))
        except Violation as violation:
            raise Violation(f"{where}: {violation}") from None
        tally.old += shards == old
        tally.new += shards == new
        yield left, where


def faults(rng: random.Random, old: int, new: int, tally: Tally) -> None:
    """Let one operation of the change fail. What is there afterwards is the old data or the new."""
    disk, state = make(rng, old)
    trial = disk.killed()
    before = trial.operations
    change(trial, rng, new)
    at = rng.randrange(1, trial.operations - before + 1)
    kind, late = rng.choice(("EIO", "ENOSPC", "short")), rng.random() < 0.3
    fault = Fault(at, kind, forever=rng.random() < 0.5, late=late)
    fault.attach(disk)
    try:
        change(disk, rng, new)
    except DataDirError:
        tally.failed += 1
    fault.off = True
    tally.states += 1
    for left in (disk.killed(), disk.crash(rng)):
        try:
            check(left, rng, state, (old, new))
        except Violation as violation:
            what = f"{old} to {new} shards, {kind} at {at}, {fault.hit} {fault.where}, {late=}"
            raise Violation(f"{what}: {violation}") from None


def campaign(rounds: int, seed: int, note: Note, *, density: float = 1.0) -> str:
    """Make every change between two of COUNTS ``rounds`` times. Raises Violation."""
    tally = Tally()
    for number in range(rounds):
        for index, (old, new) in enumerate(permutations(COUNTS, 2)):
            run = (seed * 1_000_000 + number) * 100 + index
            rng = random.Random(run)
            with in_run(run):
                for _ in crashes(rng, old, new, tally, density):
                    note(tally.states)
                for _ in range(5 if density == 1.0 else 1):
                    faults(rng, old, new, tally)
    if not (tally.old and tally.new and tally.failed):
        raise Violation(f"no crash before, or none after the change: {tally}")
    return (
        f"{tally.changes} changes among {COUNTS}, {tally.states} crashes and faults: the old number "
        f"of shards {tally.old} times, the new one {tally.new} times, {tally.failed} changes "
        f"failed; all data equal"
    )
