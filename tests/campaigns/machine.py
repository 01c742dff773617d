"""Campaign ``machine``: hypothesis drives a whole server against a dict, through restarts and reshards.

Every shard runs as it does in its process, on a simulated disk; this file stands in for the router. Requests
come one by one and in pipelines, with eviction or without it, and each reply is compared. In between the
server stops, is killed, loses its power or gets another number of shards.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from campaigns.history import Violation
from campaigns.model import (
    COMMANDS,
    DONE,
    NONE,
    Model,
    Record,
    Reply,
    Tokens,
    agrees,
    reader,
    transaction,
    unknown,
)
from campaigns.reporting import Note
from campaigns.requests import LEX, SPREAD, TAGGED, Anything
from campaigns.sim import DIRECTORY, Link, simulate
from campaigns.simdisk import SimDisk
from imds.commands import COMMANDS as TABLE
from imds.config import Config
from imds.datadir import DataDir
from imds.hashslots import SlotMap
from imds.protocol import decode_list
from imds.reshard import reshard
from imds.shard.aof import POLICIES

KEYS = [*SPREAD, LEX]
STEPS = 100
POLICY = st.sampled_from(POLICIES)
SHARDS = st.sampled_from([1, 2, 3, 4, 8])

key = st.sampled_from(SPREAD)
dice = st.integers(0, (1 << 32) - 1)  # which of Anything's requests
member = st.sampled_from([b"m", b"n", b"o", b"", b"\xff"])
value = st.binary(max_size=40) | st.integers(500, 3000).map(lambda size: b"v" * size)
score = st.integers(-5, 5).map(lambda n: b"%d" % n) | st.sampled_from(
    [b"0.5", b"-0.0", b"1e300", b"inf", b"-inf", b"nan", b"1_0", b" 1", b"", b"x", b"+2", b"0x1"]
)


def spelled(*kinds: st.SearchStrategy[Tokens]) -> st.SearchStrategy[Tokens]:
    """Return requests of these kinds, with names in any case."""
    cases = st.sampled_from([bytes.lower, bytes.upper, bytes.title])
    return st.tuples(st.one_of(*kinds), cases).map(lambda pair: (pair[1](pair[0][0]), *pair[0][1:]))


writes = spelled(
    st.tuples(st.just(b"set"), key, value),
    st.tuples(st.just(b"zadd"), key, score, member),
    st.tuples(st.just(b"zadd"), key, score, member),
    st.tuples(st.just(b"zrem"), key, member),
    st.tuples(st.just(b"del"), key),
)
reads = spelled(
    st.tuples(st.just(b"get"), key),
    st.tuples(st.just(b"zrank"), key, member),
    st.tuples(st.just(b"zrange"), key, score, score),
)


def _items(reply: Reply) -> list[bytes]:
    return [item for item in decode_list(reply[1]) if item is not None]


class Machine(RuleBasedStateMachine):
    """A server, and what it should hold: one model for each shard."""

    steps = 0  # of all machines
    restarts = 0
    rewrites = 0

    @initialize(
        shards=st.integers(1, 4),
        capacity=st.sampled_from([0, 0, 8, 10]),
        evict=st.booleans(),
        policy=POLICY,
        rewrite=st.sampled_from([0, 100, 2000]),
        seed=st.integers(0, 1 << 32),
    )
    def make(self, shards: int, capacity: int, evict: bool, policy: str, rewrite: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rewrite_from = rewrite
        self.disk = SimDisk()
        self.capacity, self.evict = capacity, evict
        self.effects: list[list[Record]] = [[] for _ in range(shards)]
        self.open(shards, policy)

    def open(self, shards: int, policy: str) -> None:
        """Start the server on the disk as it is, and compare all that it holds."""
        Machine.restarts += 1
        self.quiet = 0  # steps since
        self.policy = policy
        self.stack = ExitStack()
        self.sim = self.stack.enter_context(simulate(self.disk, self.rng))
        config = Config(
            shards=shards,
            appendfsync=policy,
            capacity=self.capacity,
            maxmemory_policy="allkeys-lru" if self.evict else "noeviction",
            aof_rewrite_percentage=100 if self.rewrite_from else 0,
            aof_rewrite_min_size=self.rewrite_from,
        )
        datadir = DataDir.open(DIRECTORY, shards, self.disk)
        if datadir.shards != shards:
            self.spread(datadir, shards)
            reshard(datadir, shards)
        self.slots: SlotMap = datadir.slots
        self.models, self.links = [], []
        for index in range(shards):
            shard = self.sim.start_shard(config, index, datadir)
            shard.wait_ready()
            self.links.append(shard.link())
            model = Model(config.share(self.capacity, index), self.evict)
            for record in self.effects[index]:
                model.apply(record)
            model.now = self.sim.clock()
            self.effects[index] += model.expire() + model.shrink()
            self.models.append(model)
        self.compare_all()

    def spread(self, datadir: DataDir, shards: int) -> None:
        """Give every effect to its new shard, as the log is copied."""
        slots = SlotMap.even(shards, datadir.slots.seed)
        old, self.effects = self.effects, [[] for _ in range(shards)]
        for effect in (effect for records in old for record in records for effect in record):
            self.effects[slots.shard_of(effect[1])].append((effect,))

    def leave(self) -> None:
        """Have every process gone."""
        Machine.rewrites += sum(shard.rewritten for shard in self.sim.shards)
        self.stack.close()

    def ask(self, requests: list[Tokens]) -> None:
        """Send requests to the shards that they belong to, and compare the replies."""
        by_shard: dict[int, list[Tokens]] = {}
        for tokens in requests:
            by_shard.setdefault(self.owner(tokens), []).append(tokens)
        for index, mine in by_shard.items():
            self.settle()
            link: Link = self.links[index]
            for tokens, reply in zip(mine, link.ask(mine), strict=True):
                expected, records = self.models[index].run(tokens, link.now)
                if not agrees(expected, reply):
                    raise Violation(f"{tokens} answered {reply}, not {expected}")
                self.effects[index] += records

    def owner(self, tokens: Tokens) -> int:
        """Return the shard of a request: that of its first key."""
        row = TABLE.get(tokens[0].lower().decode())
        if row is None:  # a transaction
            return self.slots.shard_of(TAGGED[0])
        positions = row.key_positions(tokens) if row.arity_ok(len(tokens)) else []
        return self.slots.shard_of(tokens[positions[0]]) if positions else 0

    def settle(self) -> None:
        """Where there is a limit, wait until keys are removed whose time is over: they still take room."""
        while self.capacity and any(
            when <= self.sim.clock() for model in self.models for when in model.deadlines.values()
        ):
            self.sim.schedule.sleep(0.11)
            for index, model in enumerate(self.models):
                model.now = self.sim.clock()
                self.effects[index] += model.expire()

    def draw(self, seeds: list[int], *, one_slot: bool = False) -> list[Tokens]:
        """Return a request of any kind for each of these numbers."""
        now = self.sim.clock() // 1000
        return [
            tuple(Anything(seed, now, one_slot=one_slot, lasting=bool(self.capacity))()) for seed in seeds
        ]

    def compare_all(self) -> None:
        """Read every key, and count them."""
        self.ask(reader(KEYS))
        for shard, model in zip(self.sim.shards, self.models, strict=True):
            if shard.keys() != len(model.data):
                raise Violation(f"a shard counts {shard.keys()} keys, not {len(model.data)}")

    @rule(tokens=writes)
    def write(self, tokens: Tokens) -> None:
        self.step()
        self.ask([tokens])

    @rule(tokens=reads)
    def read(self, tokens: Tokens) -> None:
        self.step()
        self.ask([tokens])

    @rule(requests=st.lists(writes | reads, min_size=1, max_size=12))
    def pipeline(self, requests: list[Tokens]) -> None:
        self.step()
        self.ask(requests)

    @rule(requests=st.lists(writes, min_size=5, max_size=12))
    def pipeline_of_writes(self, requests: list[Tokens]) -> None:
        self.step()
        self.ask(requests)

    @rule(seeds=st.lists(dice, min_size=1, max_size=10))
    def anything(self, seeds: list[int]) -> None:
        self.step()
        self.ask(self.draw(seeds))

    @rule(seeds=st.lists(dice, min_size=1, max_size=5))
    def transact(self, seeds: list[int]) -> None:
        self.step()
        self.ask([transaction(self.draw(seeds, one_slot=True))])

    @rule(before=st.lists(dice, max_size=2), seeds=st.lists(dice, min_size=1, max_size=3))
    def watch(self, before: list[int], seeds: list[int]) -> None:
        """A transaction is carried out only if nothing has changed a key since it was watched."""
        self.step()
        index = self.slots.shard_of(TAGGED[0])
        link = self.links[index]
        self.ask([(b"get", TAGGED[0])])
        ((_, version),) = link.ask([(b"_watch", b"0", b"1", TAGGED[0])])
        records = len(self.effects[index])
        self.ask(self.draw(before, one_slot=True))
        self.ask([(b"type", TAGGED[0])])  # its time may have come
        changed = any(TAGGED[0] in effect for record in self.effects[index][records:] for effect in record)
        tokens = transaction(self.draw(seeds, one_slot=True), {TAGGED[0]: version})
        if not changed:
            self.ask([tokens])
        elif link.ask([tokens]) != [NONE]:
            raise Violation(f"{tokens} was carried out although {TAGGED[0]!r} had changed")

    @rule()
    def look(self) -> None:
        """The commands on all of a shard's keys."""
        self.step()
        for index, link in enumerate(self.links):
            model = self.models[index]
            asked: list[Tokens] = [
                (b"dbsize",),
                (b"keys", b"*"),
                (b"scan", b"0", b"count", b"1000"),
                (b"randomkey",),
                (b"recent", b"1000"),
            ]
            self.ask(reader(KEYS))  # what has met its deadline is removed by it
            count, keys, (_, scanned), drawn, recent = link.ask(asked)
            model.now = link.now
            self.effects[index] += model.expire()
            wanted = sorted(model.data)
            if (
                count != (0, b"%d" % len(wanted))
                or sorted(_items(keys)) != wanted
                or sorted(decode_list(scanned)[1:]) != wanted  # type: ignore[type-var]
                or (drawn[1] not in wanted if wanted else drawn != NONE)
                or sorted(_items(recent)) != wanted
            ):
                raise Violation(f"{wanted} are there, not {count}, {keys}, {scanned!r}, {drawn}, {recent}")

    @precondition(lambda self: self.quiet >= 5)
    @rule(shard=st.integers(0, 20))
    def flush(self, shard: int) -> None:
        self.step()
        index = shard % len(self.links)
        self.settle()
        if self.links[index].ask([(b"flushall",)]) != [DONE]:
            raise Violation("flushall was refused")
        model = self.models[index]
        if model.data:
            record = tuple((b"del", key) for key in model.data)
            model.apply(record)
            self.effects[index].append(record)

    @rule(command=st.sampled_from([b"sync", b"rewrite"]))
    def ask_all(self, command: bytes) -> None:
        self.step()
        for link in self.links:
            if link.ask([(command,)]) != [DONE]:
                raise Violation(f"{command!r} was refused")

    @rule(seconds=st.sampled_from([0.01, 0.7, 1.2, 5.0]))
    def wait(self, seconds: float) -> None:
        self.step()
        self.sim.schedule.sleep(seconds)

    @precondition(lambda self: self.quiet >= 3)
    @rule(how=st.sampled_from(["stop", "kill", "power cut", "other shards"]), policy=POLICY, shards=SHARDS)
    def restart(self, how: str, policy: str, shards: int) -> None:
        self.step()
        if how == "stop":
            for shard in self.sim.shards:
                if code := shard.stop():
                    raise Violation(f"stopping ended with exit code {code}")
        # Where all is safe, the power may go as well.
        safe = how == "stop" or (how == "power cut" and self.policy == "always")
        self.disk = self.disk.crash(self.rng) if safe else self.disk.killed()
        self.leave()
        self.open(shards if how == "other shards" else len(self.models), policy)

    def step(self) -> None:
        Machine.steps += 1
        self.quiet += 1

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.leave()


def run(examples: int, seed: int | None = None, steps: int = STEPS, *, shrink: bool = True) -> None:
    """Run the machine; print the steps to a failure, if there is one, and the fewest if ``shrink``."""
    how: dict[str, Any] = {"derandomize": True} if seed is None else {"derandomize": False}
    if seed is not None:
        hypothesis.seed(seed)(Machine)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)],
            **how,
        ),
    )


def campaign(rounds: int, seed: int, note: Note) -> str:
    """Run ``rounds`` examples of STEPS steps. Raises Violation, or what hypothesis found."""
    if unknown():
        raise Violation(f"no model has the commands {sorted(unknown())}")
    Machine.steps = Machine.restarts = Machine.rewrites = 0
    part, done = 250, 0
    while done < rounds:
        run(min(part, rounds - done), seed + done)
        done += part
        note(Machine.steps)
    if Machine.steps < rounds:
        raise Violation(f"only {Machine.steps} steps")
    return (
        f"{rounds} examples, {Machine.steps} steps, {Machine.restarts} starts, "
        f"{Machine.rewrites} rewrites; {len(COMMANDS)} commands on keys; every reply as the dict says"
    )
