"""What a shard was asked, what it answered, and what may therefore be found after a crash."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from campaigns.model import (
    DONE,
    KEYS,
    Model,
    Record,
    Reply,
    State,
    Tokens,
    agrees,
    inner,
    read_state,
    reader,
    results,
)
from campaigns.sim import DIRECTORY, Link, Shard, Simulation, Stopped
from campaigns.simdisk import SimDisk
from imds.config import Config
from imds.datadir import DataDir, DataDirError
from imds.shard.aof import MAX_LAG

# Errors that promise that nothing was done. UNKNOWN is none of them.
REFUSALS = (b"READONLY ", b"LOADING ", b"RETRY ", b"SHARDDOWN ", b"BUSY ")


# Requests that a shard has carried out, with the time of its clock in ms.
Pending = tuple[tuple[Tokens, int], ...]


class Violation(AssertionError):
    """A promise was broken."""


class NotStarted(Violation):
    """A server or a shard did not start from what it found. After a mere crash that breaks a promise."""


@dataclass
class Moment:
    """All that may be known from outside about the data at one moment."""

    model: Model  # after the last answered request
    effects: int  # records of the history that were answered
    floor: int  # of these, which a power cut may not lose
    least: int  # of these, which the moment's kind of crash may not lose
    pending: Pending  # requests without an answer, in their order


@dataclass
class History:
    """The effects of one shard's answered requests, in order: one entry for each record that the log has.

    All times are of the simulated clock.
    """

    model: Model
    policy: str
    effects: list[Record] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each was answered
    floor: int = 0  # effects that a power cut cannot take away any more
    begun: int = 0  # effects answered when the sync that is running began
    refused: int = 0  # requests, of this process
    index: dict[tuple[bytes, bytes], int] = field(default_factory=dict)  # (key, string): its effect

    def answered(self, tokens: Tokens, reply: Reply, turn: int, now: float) -> None:
        """Note a reply at time ``now`` to what the shard has carried out at its time ``turn``.

        Raises Violation if it is not the right one.
        """
        if reply[0] == 2 and reply[1].startswith(REFUSALS):
            self.refused += 1
            return
        if tokens[0] in (b"sync", b"rewrite"):
            if reply != DONE:
                raise Violation(f"{tokens} answered {reply}")
            if tokens[0] == b"sync":
                self.floor = len(self.effects)
            return
        if tokens[0] == b"_exec" and any(one[1].startswith(REFUSALS) for one in results(reply)):
            for request, one in zip(inner(tokens), results(reply), strict=True):
                self.answered(request, one, turn, now)
            return
        expected, records = self.model.run(tokens, turn)
        if not agrees(expected, reply):
            raise Violation(f"{tokens} answered {reply}, not {expected}")
        for record in records:
            for effect in record:
                if effect[0] == b"set":
                    self.index[effect[1], effect[2]] = len(self.effects)
            self.effects.append(record)
            self.times.append(now)
        if self.policy == "always":
            self.floor = len(self.effects)

    def follow(self, disk: SimDisk) -> None:
        """Learn from the disk's syncs of logs what no power cut can take away any more."""
        after, done = disk.after, disk.done

        def began(name: str, path: Path) -> None:
            after(name, path)
            if name == "fdatasync" and self._is_last(disk, path):
                self.begun = len(self.effects)

        def finished(name: str, path: Path) -> None:
            done(name, path)
            if name == "fdatasync" and self._is_last(disk, path):
                self.floor = max(self.floor, self.begun)

        disk.after, disk.done = began, finished

    @staticmethod
    def _is_last(disk: SimDisk, path: Path) -> bool:
        """Whether a file is the newest segment: of segments, the older are always synced first."""
        return path.suffix == ".aof" and path.name == max(
            other.name for other, _ in disk.files() if other.parent == path.parent and other.suffix == ".aof"
        )

    def moment(self, pending: Pending, *, power_cut: bool) -> Moment:
        """Return what is known now, for a power cut or for the death of the process."""
        least = self.floor if power_cut else len(self.effects)
        return Moment(self.model.copy(), len(self.effects), self.floor, least, pending)

    def check(self, moment: Moment, found: State, now: int) -> int:
        """Raise Violation unless ``found`` may be found, at time ``now``, after a crash at ``moment``.

        Returns how many effects, of the answered and the pending ones, are in it: the most that fit.
        """
        effects = self._all(moment)
        state = Model()
        fits = 0 if not found else -1
        for count, record in enumerate(effects, 1):
            state.apply(record)
            if len(state.data) >= len(found) and state.state(now) == found:
                fits = count
        if fits < 0:
            raise Violation(f"not a prefix of {len(effects)} effects: {_difference(state.state(now), found)}")
        if fits < moment.least:
            raise Violation(
                f"{fits} effects of the {moment.least} that had to survive, {moment.effects} were answered"
            )
        if self.policy == "everysec" and fits < moment.effects:
            span = self.times[moment.effects - 1] - self.times[fits]
            if span > MAX_LAG + 0.01:
                raise Violation(f"everysec lost {moment.effects - fits} writes of {span:.2f} s")
        return fits

    def _all(self, moment: Moment) -> list[Record]:
        """Return the effects that were answered by then, and those that were under way."""
        effects = self.effects[: moment.effects]
        after = moment.model.copy()
        for tokens, turn in moment.pending:
            effects += after.run(tokens, turn)[1] if len(tokens) > 1 else []
        return effects

    def resumed(self, moment: Moment, count: int, policy: str, floor: int) -> History:
        """Return the history of the process that starts with ``count`` effects, as :meth:`check` found."""
        effects = self._all(moment)[:count]
        model = Model(moment.model.capacity, moment.model.evict)
        for effect in effects:
            model.apply(effect)
        old = [-1e9] * count  # lost now, they would have been lost long ago
        return History(model, policy, effects, old, floor, floor)


def _difference(expected: State, found: State) -> str:
    wrong = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    shown = [
        f"{key!r}: {_short(expected.get(key))} or older, found {_short(found.get(key))}" for key in wrong
    ]
    return "; ".join(sorted(shown)[:5])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def start(sim: Simulation, policy: str, capacity: int = 0, rewrite: int = 0) -> tuple[DataDir, Shard]:
    """Open the directory and start its only shard; return when it serves. Raises NotStarted.

    ``rewrite``: the log's size in bytes from which on it is rewritten when it has doubled, 0 for never.
    """
    config = Config(
        shards=1,
        appendfsync=policy,
        capacity=capacity,
        maxmemory_policy="allkeys-lru",
        aof_rewrite_percentage=100 if rewrite else 0,
        aof_rewrite_min_size=rewrite,
    )
    try:
        datadir = DataDir.open(DIRECTORY, 1, sim.disk)
    except DataDirError as error:
        raise NotStarted(f"the directory was refused: {error}") from error
    shard = sim.start_shard(config, 0, datadir)
    try:
        shard.wait_ready()
    except Stopped as stopped:
        raise NotStarted(f"the shard did not start ({stopped}): {shard.refusal}") from None
    return datadir, shard


def stored(shard: Shard) -> tuple[State, int]:
    """Return all that a shard of these few keys holds, and when. Raises Violation if it has others too."""
    link = shard.link()
    state = read_state(KEYS, link.ask(reader(KEYS)))
    if shard.keys() != len(state):
        raise Violation(f"{shard.keys()} keys, of which {len(state)} were ever written")
    return state, link.now


class Session:
    """A shard that serves: requests go out, and each answer is noted in the history when it comes.

    One link writes and reads, in one order; a second one, the spy, only reads, whatever is under way.
    """

    def __init__(self, sim: Simulation, shard: Shard, history: History) -> None:
        self._sim = sim
        self._shard = shard
        self._history = history
        self.writer: Link = shard.link()
        self.spy: Link = shard.link()
        sim.schedule.tick = self.note  # so that an answer is noted at the time when it came

    def note(self) -> None:
        """Take what has been answered."""
        history = self._history
        for tokens, reply, turn in self.writer.receive():
            history.answered(tokens, reply, turn, self._sim.schedule.now)
        for tokens, reply, _turn in self.spy.receive():
            seen = history.index.get((tokens[1], reply[1]))
            if seen is not None and history.policy == "always":
                history.floor = max(history.floor, seen + 1)  # what was seen has to stay

    @property
    def pending(self) -> Pending:
        """The requests of the writer that have been carried out and have no answer."""
        return self.writer.pending()

    def wait(self) -> None:
        """Return when everything has been answered. Raises Stopped."""

        def quiet() -> bool:
            self.note()
            return not self.writer.sent and not self.spy.sent

        self._shard.wait(quiet)
