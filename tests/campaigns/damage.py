"""Campaign ``damage``: bytes of a log change, or are gone, after they were safe. No loss goes unsaid.

What a shard, or the directory, does then is one of two things: it refuses, naming the file, and changes
nothing; or it starts with the data as it was, or as it was at an earlier moment, having saved what it cut
off.
Damage to what a mark speaks for is always refused.

Two directories are damaged: one shard with a log of 64 KiB, closed in order, at every single byte; and three
shards with longer logs of several lives, some of which were killed, at random places and in every random way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from campaigns.history import Violation, stored
from campaigns.model import KEYS, Model, Record, State, agrees
from campaigns.reporting import Note, in_run
from campaigns.requests import Requests
from campaigns.sim import DIRECTORY, Simulation, Stopped, simulate
from campaigns.simdisk import SimDisk
from imds.config import Config
from imds.datadir import DataDir, DataDirError
from imds.shard.aof import POLICIES
from imds.shard.segment import FILL

LOG_SIZE = 64 << 10
MARK_SIZE = 20


@dataclass
class Made:
    """A directory, and what each shard of it has been through: one state after each effect."""

    disk: SimDisk
    states: list[list[State]]


@dataclass
class Tally:
    """What became of the damage."""

    cases: int = 0
    refused: int = 0
    cut: int = 0  # and said so, or cut by the damage itself, at the end of a record
    harmless: int = 0
    silent: int = 0  # a loss of which nothing was said

    def add(self, outcome: str, *, shortened: bool) -> None:
        """Count a case. Only a file that ends where a record ended looks like one that never grew further."""
        self.cases += 1
        if outcome == "ended":
            outcome = "cut" if shortened else "silent"
        setattr(self, outcome, getattr(self, outcome) + 1)


def make(rng: random.Random, shards: int, size: int, *, lives: int = 0) -> Made:
    """Return a directory with about ``size`` bytes of log for each shard, all of it closed in order.

    With ``lives`` as many lives of about that size, of which some are killed, and logs are rewritten.
    """
    disk = SimDisk()
    models = [Model() for _ in range(shards)]
    made = Made(disk, [[{}] for _ in range(shards)])
    requests = Requests(rng, KEYS)
    for _ in range(lives or 1):
        with simulate(disk, rng) as sim:
            policy = rng.choice(POLICIES) if lives else "always"
            datadir = open_all(sim, shards, size // 2 if lives else 0, policy)
            for index, shard in enumerate(sim.shards):
                shard.wait_ready()
                link, most = shard.link(), len(made.states[index]) + size // 150
                while len(made.states[index]) < most:
                    wanted = [requests.draw() for _ in range(5)]
                    for tokens, reply in zip(wanted, link.ask(wanted), strict=True):
                        expected, records = models[index].run(tokens, link.now)
                        assert agrees(expected, reply), (tokens, reply, expected)
                        replay(records, made.states[index])
            if not lives or rng.random() < 0.5:
                for shard in sim.shards:
                    assert shard.stop() == 0
            datadir.close()
        disk = made.disk = disk.killed()
    return made


def replay(records: list[Record], states: list[State]) -> None:
    """Append the state after each record."""
    for record in records:
        model = Model()
        model.data.update((k, dict(v) if isinstance(v, dict) else v) for k, (v, _) in states[-1].items())
        model.apply(record)
        states.append(model.state())


def open_all(sim: Simulation, shards: int, rewrite: int = 0, policy: str = "always") -> DataDir:
    """Open the directory and start every shard; whether they come up is for the caller to see.

    ``rewrite``: the size of log from which on it is rewritten, 0 for never.
    """
    datadir = DataDir.open(DIRECTORY, shards, sim.disk)
    config = Config(
        shards=shards,
        appendfsync=policy,
        aof_rewrite_percentage=100 if rewrite else 0,
        aof_rewrite_min_size=rewrite,
    )
    for index in range(shards):
        sim.start_shard(config, index, datadir)
    return datadir


def contents(disk: SimDisk) -> dict[Path, bytes]:
    """Return all files but the lock."""
    return {path: bytes(file.data) for path, file in disk.files() if path.name != "LOCK"}


def judge(made: Made, damaged: SimDisk, where: Path, rng: random.Random) -> str:
    """Start the shards on a damaged disk; return ``refused``, ``harmless`` or a loss. Raises Violation."""
    before = contents(damaged)
    outcomes = set()
    with simulate(damaged, rng) as sim:
        try:
            open_all(sim, len(made.states))
        except DataDirError as error:
            if str(where) not in str(error):
                raise Violation(f"refused, but for {error}") from error
            if contents(damaged) != before:
                raise Violation(f"refused, and changed something: {error}") from error
            return "refused"
        for index, shard in enumerate(sim.shards):
            here = f"shard-{index:03d}" in where.parts
            try:
                shard.wait_ready()
            except Stopped as stopped:
                if not here or str(where.parent) not in shard.refusal:
                    raise Violation(f"shard {index}: {stopped}, {shard.refusal!r}") from None
                after = contents(damaged)
                mine = [path for path in before if path.parent == where.parent]
                if any(before[path] != after.get(path) for path in mine):
                    raise Violation(f"refused, and changed something: {shard.refusal}") from None
                outcomes.add("refused")
                continue
            (state, _now), states = stored(shard), made.states[index]
            if state == states[-1]:
                continue
            if not here:
                raise Violation(f"shard {index} has lost something, and is not the damaged one")
            if state not in states:
                raise Violation(f"shard {index} has a state that never was")
            outcomes.add(_loss(before, contents(damaged), where))
    return outcomes.pop() if outcomes else "harmless"


def _loss(before: dict[Path, bytes], after: dict[Path, bytes], where: Path) -> str:
    """Return what became of the file: ``cut`` and what was cut saved, ``ended`` (nothing of it was cut, and
    no more is there), or ``silent``."""
    old, new = before[where], after.get(where, b"")
    if new.startswith(old):
        return "ended"
    saved = [data for path, data in after.items() if path not in before and ".torn-" in path.name]
    # What looks like room at the end of what was cut is not saved.
    if any(data and old.rstrip(FILL) == (new + data).rstrip(FILL) for data in saved):
        return "cut"
    return "silent"


Damage = Callable[[bytearray, random.Random], str]


def flip(data: bytearray, rng: random.Random) -> str:
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    return f"bit {bit} of byte {at} flipped"


def blank(data: bytearray, rng: random.Random) -> str:
    at, size = rng.randrange(len(data)), rng.choice((1, 8, 512, 4096))
    fill = rng.choice((b"\0", b"\xff"))
    data[at : at + size] = fill * len(data[at : at + size])
    return f"{size} bytes at {at} made {fill!r}"


def scramble(data: bytearray, rng: random.Random) -> str:
    at, size = rng.randrange(len(data)), rng.choice((2, 16, 512))
    data[at : at + size] = rng.randbytes(len(data[at : at + size]))
    return f"{size} bytes at {at} made garbage"


def shorten(data: bytearray, rng: random.Random) -> str:
    at = rng.randrange(len(data))
    del data[at:]
    return f"cut at {at}"


def leave_out(data: bytearray, rng: random.Random) -> str:
    at, size = rng.randrange(len(data)), rng.choice((1, 20, 512))
    del data[at : at + size]
    return f"{size} bytes at {at} left out"


def move(data: bytearray, rng: random.Random) -> str:
    """One sector's content stands in another's place, as a misdirected write leaves it."""
    sectors = len(data) // 512
    if sectors < 2:
        return flip(data, rng)
    source, target = rng.sample(range(sectors), 2)
    data[target * 512 : target * 512 + 512] = data[source * 512 : source * 512 + 512]
    return f"sector {target} made a copy of sector {source}"


WAYS: tuple[Damage, ...] = (flip, blank, scramble, shorten, leave_out, move)


def every_byte(made: Made, path: Path, stride: int) -> Iterator[tuple[str, int, Callable[[bytearray], None]]]:
    """Yield (what, place, how) for a cut and a flip at every ``stride``-th byte of a file."""
    size = len(made.disk.file(path).data)
    for at in range(0, size, stride):

        def cut(data: bytearray, at: int = at) -> None:
            del data[at:]

        def turn(data: bytearray, at: int = at) -> None:
            data[at] ^= 1 << (at * 7 % 8)

        yield "cut", at, cut
        yield "flipped", at, turn


def campaign(rounds: int, seed: int, note: Note, *, size: int = LOG_SIZE) -> str:
    """Damage every byte of one log (fewer if ``rounds`` < 10,000) and ``rounds`` places of others."""
    rng = random.Random(seed)
    one, many = Tally(), Tally()
    with in_run(seed):
        made = make(rng, 1, size)
        path = max((path for path in contents(made.disk)), key=lambda path: len(made.disk.file(path).data))
        whole = len(made.disk.file(path).data)
        for what, at, how in every_byte(made, path, max(1, 10_000 // rounds)):
            damaged = made.disk.killed()
            how(damaged.file(path).data)
            outcome = _judge(made, damaged, path, rng, f"{path} of {whole} bytes {what} at {at}")
            if what == "flipped" and at < whole - MARK_SIZE and outcome != "refused":
                raise Violation(f"{path}, flipped at {at} of {whole}: {outcome}, although it was safe")
            one.add(outcome, shortened=what == "cut")
            note(one.cases)
        while many.cases < rounds:
            made = make(rng, 3, size // 8, lives=5)
            files = [path for path in contents(made.disk) if made.disk.file(path).data]
            for _ in range(min(200, rounds - many.cases)):
                path, way = rng.choice(files), rng.choice(WAYS)
                damaged = made.disk.killed()
                data = damaged.file(path).data
                old = bytes(data)
                what = way(data, rng)
                cut = bytes(data)
                outcome = _judge(made, damaged, path, rng, f"{path} of {len(old)} bytes: {what}")
                many.add(outcome, shortened=old.startswith(cut))
                note(one.cases + many.cases)
    silent = one.silent + many.silent
    if silent or not (one.refused and one.cut and many.refused):
        raise Violation(f"{silent} silently wrong; no damage did anything: {one}, {many}")
    return f"{_told(one, 'a log at every byte')}; {_told(many, 'random damage')}; 0 silently wrong"


def _judge(made: Made, damaged: SimDisk, path: Path, rng: random.Random, what: str) -> str:
    try:
        return judge(made, damaged, path, rng)
    except Violation as violation:
        raise Violation(f"{what}: {violation}") from None


def _told(tally: Tally, what: str) -> str:
    return (
        f"{what}: {tally.cases} cases, {tally.refused} refused, {tally.cut} cut off and said, "
        f"{tally.harmless} harmless"
    )
