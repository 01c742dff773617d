"""What is measured, one function for each group of rows. Each yields finished sections.

Throughput runs are interleaved: every round asks all servers for a row before the next row begins, so a
machine that is slow for a minute is slow for all of them.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from generator import Benchmark, Generator, Job
from peers import Imds, Redis, Server, Twemproxy
from table import Row, Section


@dataclass(frozen=True, slots=True)
class Setup:
    """How the command line wants it."""

    directory: Path  # for the servers' files; each group makes its own below
    generator: Generator
    tool: Benchmark  # for what only imds-benchmark can do
    rounds: int
    seconds: float
    scale: int  # sizes are divided by this: 1, or more for a smoke test
    python: bool

    def size(self, full: int) -> int:
        """Return ``full``, or less of it in a smoke test."""
        return max(100, full // self.scale)

    def imds(self, group: str, name: str, appendfsync: str, *, shards: int = 4, options: str = "") -> Imds:
        """Return our server, not yet started."""
        return Imds(
            name,
            self.directory / group / name.replace(" ", "-"),
            appendfsync,
            shards=shards,
            python=self.python,
            options=options,
        )

    def redis(self, group: str, name: str, appendfsync: str = "", options: str = "") -> Redis:
        """Return a redis, not yet started."""
        return Redis(name, self.directory / group / name.replace(" ", "-"), appendfsync, options=options)

    def twemproxy(self, group: str) -> Twemproxy:
        """Return twemproxy and four redis, not yet started."""
        return Twemproxy("twemproxy", self.directory / group / "twemproxy")


@dataclass(slots=True)
class Cell:
    """One job for one server. ``row`` gets its ``figure``; ``also`` has rows for further figures."""

    row: Row
    server: Server
    job: Job
    figure: str = "ops_per_s"
    also: dict[str, Row] = field(default_factory=dict)


def say(text: str) -> None:
    """Tell the person at the terminal how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def interleave(setup: Setup, cells: Sequence[Cell], generator: Generator | None = None) -> None:
    """Run every cell once a round: the servers of a row one after the other, each round in another order."""
    generator = generator or setup.generator
    rows = list({id(cell.row): cell.row for cell in cells}.values())
    for cell in cells:  # the columns stand in this order, not in the shuffled one
        cell.row.runs.setdefault(cell.server.name, [])
    shuffle = random.Random(1).shuffle
    for number in range(setup.rounds):
        for row in rows:
            mine = [cell for cell in cells if cell.row is row]
            shuffle(mine)
            for cell in mine:
                result = generator.run(cell.server, replace(cell.job, seconds=setup.seconds))
                for figure, other in {cell.figure: cell.row, **cell.also}.items():
                    other.add(cell.server.name, result[figure])
            shown = ", ".join(f"{name} {runs[-1]:,.0f}" for name, runs in row.runs.items() if runs)
            say(f"round {number + 1} of {setup.rounds}: {row.name}: {shown}")


def prepare(
    setup: Setup, servers: Sequence[Server], jobs: Sequence[Job], by: Generator | None = None
) -> None:
    """Make the data of ``jobs`` in all ``servers``."""
    for server in servers:
        for job in {job.kind: job for job in jobs}.values():
            (by or setup.generator).preload(server, job)


PEERS = ("redis", "twemproxy")

# --- the goals ------------------------------------------------------------------------------------

PLAIN_GOALS = {  # test and pipeline: goals beside redis and twemproxy
    ("get", 1): (1.0, 1.5),
    ("set", 1): (1.0, 1.5),
    ("get", 16): (2.0, 5.0),
    ("set", 16): (2.0, 5.0),
    ("get", 64): (3.5, 10.0),
    ("set", 64): (3.5, 10.0),
    ("zadd", 16): (1.5, 4.0),
    ("zrank", 16): (1.5, 4.0),
    ("zrange", 16): (2.0, 4.0),
}
TWIN_GOALS = {
    (test, pipeline): (0.45, beside)
    for pipeline, beside in ((1, 0.8), (16, 1.3), (64, 1.4))
    for test in ("get", "set")
}
AOF_GOALS = {("everysec", 1): 1.0, ("everysec", 16): 2.0, ("always", 1): 1.5, ("always", 16): 2.0}


def goals(setup: Setup) -> Iterator[Section]:
    """Throughput, latency, memory and start-up beside redis and twemproxy."""
    with ExitStack() as stack:
        enter = stack.enter_context
        ours = enter(setup.imds("goals", "imds", "no"))
        everysec = enter(setup.imds("goals", "imds everysec", "everysec"))
        redis = enter(setup.redis("goals", "redis"))
        proxy = enter(setup.twemproxy("goals"))
        yield _plain(setup, [ours, everysec, redis, proxy], TWIN_GOALS if setup.python else PLAIN_GOALS)
        yield _latency(setup, ours, [redis, proxy])
    for policy in ("everysec", "always"):
        with (
            setup.imds("goals", f"imds {policy}", policy) as ours,
            setup.redis("goals", f"redis {policy}", policy) as redis,
        ):
            yield _aof(setup, policy, ours, redis)
    yield _memory(setup)
    yield _replay(setup)


def _plain(
    setup: Setup, servers: Sequence[Server], aims: dict[tuple[str, int], tuple[float, float]]
) -> Section:
    section = Section(
        "Throughput without waiting for a disk",
        "50 connections, 64-byte values, 100,000 keys; sorted sets: 64 of 1,000 members, a range finds about "
        "ten. redis and twemproxy keep no log. imds always does: its first column runs with "
        '`--appendfsync no` (written before each reply, synced when the system likes), "imds everysec" '
        "with its default.",
        "imds",
        PEERS,
    )
    cells = []
    jobs = []
    for test, pipeline in PLAIN_GOALS:
        aim = aims.get((test, pipeline), ())
        row = Row(f"{test}, pipeline {pipeline}", "requests/s", goals=dict(zip(PEERS, aim, strict=False)))
        job = Job(test, pipeline, keys=setup.size(100_000))
        jobs.append(job)
        for server in servers:
            if server.name != "imds everysec" or test in ("set", "zadd"):  # a read waits for no log
                cells.append(Cell(row, server, job))
        section.rows.append(row)
    prepare(setup, servers, jobs)
    interleave(setup, cells)
    return section


def _latency(setup: Setup, ours: Server, peers: Sequence[Server]) -> Section:
    section = Section(
        "Latency at half the peak rate",
        "get, pipeline 1, 50 connections, open loop by imds-benchmark: each request is timed from when it "
        "was due. Both of a pair get the same rate: half of what the slower of the two reached at its peak, "
        "by the same load tool.",
        "imds",
        [peer.name for peer in peers],
    )
    tool = setup.tool
    job = Job("get", keys=setup.size(100_000), seconds=setup.seconds)
    prepare(setup, [ours, *peers], [job], tool)
    peaks = {server.name: tool.run(server, job)["ops_per_s"] for server in (ours, *peers)}
    cells = []
    for peer, goal in zip(peers, (1.2, 1.0), strict=True):
        rate = min(peaks[ours.name], peaks[peer.name]) // 2
        paced = replace(job, rate=rate)
        rows = {
            figure: Row(f"{name} at {rate:,.0f} requests/s beside {peer.name}", "µs", "less")
            for figure, name in {"p99_us": "p99", "p50_us": "p50", "p999_us": "p99.9"}.items()
        }
        section.rows += rows.values()
        row = rows.pop("p99_us")
        row.goals = {peer.name: goal}
        cells += [Cell(row, server, paced, "p99_us", rows) for server in (ours, peer)]
    interleave(setup, cells, tool)
    return section


def _aof(setup: Setup, policy: str, ours: Server, redis: Server) -> Section:
    section = Section(
        f"set with --appendfsync {policy}",
        f"imds beside redis with `--appendonly yes --appendfsync {policy}`, 50 connections, 64-byte values. "
        "redis does not rewrite its log meanwhile.",
        ours.name,
        (redis.name,),
    )
    cells = []
    for pipeline in (1, 16):
        row = Row(f"set, pipeline {pipeline}", "requests/s", goals={redis.name: AOF_GOALS[policy, pipeline]})
        job = Job("set", pipeline, keys=setup.size(100_000))
        cells += [Cell(row, server, job) for server in (ours, redis)]
        section.rows.append(row)
    interleave(setup, cells)
    return section


def _memory(setup: Setup) -> Section:
    count = setup.size(1_000_000)
    section = Section(
        "Memory",
        f"Growth of the resident memory of all processes of a server while {count:,} items are added, by "
        "item. Both run with an LRU limit that is not reached.",
        "imds",
        ("redis",),
    )
    limit = "--maxmemory 8gb --maxmemory-policy allkeys-lru"
    tool = setup.tool
    cases = {
        "key (16-byte key, 64-byte value)": Job("set", keys=count),
        "sorted-set member (8 bytes, one set)": Job("zadd", sets=1, members=count),
    }
    for name, job in cases.items():
        row = Row(name, "bytes", "less", {"redis": 0.8})
        for server in (
            setup.imds(f"memory-{job.kind}", "imds", "no", options=limit),
            setup.redis(f"memory-{job.kind}", "redis", options=limit),
        ):
            with server:
                tool.preload(server, replace(job, keys=100, members=100))  # what the first use of all costs
                before = server.rss()
                tool.preload(server, job)
                time.sleep(1)
                row.add(server.name, (server.rss() - before) / count)
        say(f"memory: {name}: {row.runs}")
        section.rows.append(row)
    return section


def _replay(setup: Setup) -> Section:
    count = setup.size(1_000_000)
    section = Section(
        "Start-up",
        f"A restart with a log of {count:,} sets as they were written (64-byte values, no rewrite, four "
        "shards). From the start of the process to its first answer, and by the server's own account.",
        "imds",
        ("redis",),
    )
    answer = Row("start to first answer", "s", "less", {"redis": 0.5})
    own = Row("loading, as the server reports it", "s", "less")
    section.rows += [answer, own]
    servers = [setup.imds("replay", "imds", "everysec"), setup.redis("replay", "redis", "everysec")]
    for server in servers:
        with server:
            setup.tool.preload(server, Job("set", keys=count))
    for _ in range(setup.rounds):
        for server in servers:
            started = time.monotonic()
            with server:
                answer.add(server.name, time.monotonic() - started)
                own.add(server.name, server.own_load_seconds())
    say(f"replay: {answer.runs} {own.runs}")
    return section


# --- the other groups -----------------------------------------------------------------------------


def _compare(
    setup: Setup,
    section: Section,
    servers: Sequence[Server],
    jobs: Sequence[tuple[str, Job]],
) -> Section:
    """Fill ``section`` with one row of throughput for each (name, job), for all of ``servers``."""
    cells = []
    for name, job in jobs:
        row = Row(name, "requests/s")
        cells += [Cell(row, server, job) for server in servers]
        section.rows.append(row)
    interleave(setup, cells)
    return section


def scaling(setup: Setup) -> Iterator[Section]:
    """Throughput with 1, 2, 4 and 8 shards."""
    section = Section(
        "Shards",
        "imds with `--appendfsync no` and 1 to 8 shards; 50 connections. More shards than cores share them.",
        "4 shards",
        ("redis", "1 shard"),
    )
    with ExitStack() as stack:
        servers: list[Server] = [stack.enter_context(setup.redis("scaling", "redis"))]
        for count in (1, 2, 4, 8):
            name = f"{count} shard{'s' if count > 1 else ''}"
            servers.append(stack.enter_context(setup.imds("scaling", name, "no", shards=count)))
        jobs = [
            (f"{test}, pipeline {pipeline}", Job(test, pipeline, keys=setup.size(100_000)))
            for pipeline in (1, 16)
            for test in ("get", "set")
        ]
        prepare(setup, servers, [job for _, job in jobs])
        yield _compare(setup, section, servers, jobs)


def _trio(setup: Setup, group: str, stack: ExitStack) -> list[Server]:
    """Return imds, redis and twemproxy, started."""
    return [
        stack.enter_context(setup.imds(group, "imds", "no")),
        stack.enter_context(setup.redis(group, "redis")),
        stack.enter_context(setup.twemproxy(group)),
    ]


def connections(setup: Setup) -> Iterator[Section]:
    """Throughput with 1, 50 and 1,000 connections."""
    with ExitStack() as stack:
        servers = _trio(setup, "connections", stack)
        jobs = [
            (
                f"get, {count:,} connections, pipeline {pipeline}",
                Job("get", pipeline, count, keys=setup.size(100_000)),
            )
            for pipeline in (1, 16)
            for count in (1, 50, 1000)
        ]
        prepare(setup, servers, [job for _, job in jobs])
        text = "get of 64-byte values, 100,000 keys."
        yield _compare(setup, Section("Connections", text, "imds", PEERS), servers, jobs)


def values(setup: Setup) -> Iterator[Section]:
    """Throughput with values of 16 bytes, 1 KiB and 64 KiB."""
    for size, pipelines in ((16, (1, 16)), (1024, (1, 16)), (65536, (1, 16))):
        with ExitStack() as stack:
            servers = _trio(setup, f"values-{size}", stack)
            keys = setup.size(min(100_000, (256 << 20) // size))
            jobs = [
                (f"{test}, pipeline {pipeline}", Job(test, pipeline, keys=keys, value_size=size))
                for pipeline in pipelines
                for test in ("get", "set")
            ]
            prepare(setup, servers, [job for _, job in jobs])
            section = Section(f"Values of {size:,} bytes", f"{keys:,} keys, 50 connections.", "imds", PEERS)
            yield _compare(setup, section, servers, jobs)


def zipf(setup: Setup) -> Iterator[Section]:
    """Throughput where few keys get most requests, and of a mix."""
    with ExitStack() as stack:
        servers = _trio(setup, "zipf", stack)
        keys = setup.size(100_000)
        jobs = [
            (f"{test}, {spread}", Job(test, 16, keys=keys, distribution=spread))
            for spread in ("uniform", "zipf")
            for test in ("get", "set", "mixed")
        ]
        prepare(setup, servers, [job for _, job in jobs])
        text = "Zipf (0.99) beside uniform keys; mixed is nine gets to one set. Pipeline 16, 50 connections."
        yield _compare(setup, Section("Hot keys and mixes", text, "imds", PEERS), servers, jobs)


def growth(setup: Setup) -> Iterator[Section]:
    """Cost of a request as the data grows, and the longest wait while it does."""
    tool = setup.tool
    with setup.imds("growth", "imds", "no") as ours, setup.redis("growth", "redis") as redis:
        servers = [ours, redis]
        text = (
            "Time per request at pipeline 64 as the number of keys grows, by imds-benchmark with 500,000 "
            "different requests; and the longest that a client with 200 gets a second (open loop) waited "
            "while the keys were being added: incremental growth of a table shows here."
        )
        section = Section("Growth: keys", text, "imds", ("redis",))
        for count in (setup.size(10**power) for power in (4, 5, 6, 7)):
            pause = Row(f"longest wait while growing to {count:,} keys", "ms", "less")
            job = Job("get", 64, keys=count, pool=setup.size(500_000))
            for server in servers:
                pause.add(server.name, _longest_wait(tool, server, job) / 1000)
            section.rows += [*_costs(setup, tool, servers, job, ("get", "set"), f"{count:,} keys"), pause]
        yield section
    with setup.imds("growth-sets", "imds", "no") as ours, setup.redis("growth-sets", "redis") as redis:
        servers = [ours, redis]
        text = (
            "Time per request on one sorted set at pipeline 64 as it grows; a range finds about ten members."
        )
        section = Section("Growth: members", text, "imds", ("redis",))
        for count in (setup.size(10**power) for power in (3, 4, 5, 6)):
            job = Job("zrank", 64, sets=1, members=count, pool=setup.size(500_000))
            prepare(setup, servers, [job], tool)
            section.rows += _costs(
                setup, tool, servers, job, ("zrank", "zrange", "zadd"), f"{count:,} members"
            )
        yield section


def _costs(
    setup: Setup, tool: Benchmark, servers: Sequence[Server], job: Job, tests: Sequence[str], size: str
) -> list[Row]:
    """Return rows of microseconds per request."""
    rows = []
    for test in tests:
        rates = Row(f"{test}, {size}", "requests/s")
        interleave(setup, [Cell(rates, server, replace(job, test=test)) for server in servers], tool)
        row = Row(rates.name, "µs", "less")
        for name, runs in rates.runs.items():
            row.runs[name] = [1e6 / rate for rate in runs]
        rows.append(row)
    return rows


def _longest_wait(tool: Benchmark, server: Server, job: Job) -> float:
    """Return the longest latency of a light client while the data of ``job`` is made, in microseconds."""
    light = Job("get", connections=1, rate=200, seconds=0.5, keys=100, pool=1000)
    worst = 0.0
    heavy = tool.start(server, job, "--preload-only")
    try:
        while heavy.poll() is None:
            worst = max(worst, tool.run(server, light)["max_us"])
    finally:
        heavy.kill()
        heavy.wait()
    return worst


def fairness(setup: Setup) -> Iterator[Section]:
    """Latency of a light client, alone and beside one that pipelines a thousand requests."""
    text = (
        "A client with 200 gets a second (open loop, imds-benchmark), alone and beside another connection "
        "that keeps 1,000 gets in flight."
    )
    section = Section("Fairness", text, "imds", PEERS)
    tool = setup.tool
    light = Job("get", connections=1, rate=200, seconds=setup.seconds, keys=setup.size(100_000), pool=10_000)
    heavy = replace(light, pipeline=1000, rate=0.0, seconds=setup.seconds + 60, pool=65_536)
    names = {"p50_us": "p50", "p99_us": "p99", "max_us": "longest"}
    rows = {
        (beside, figure): Row(f"{name} {'beside the heavy client' if beside else 'alone'}", "µs", "less")
        for beside in (False, True)
        for figure, name in names.items()
    }
    with ExitStack() as stack:
        servers = _trio(setup, "fairness", stack)
        prepare(setup, servers, [light], tool)
        for _ in range(setup.rounds):
            for server in servers:
                for beside in (False, True):
                    other = tool.start(server, heavy) if beside else None
                    try:
                        if other:
                            time.sleep(1.5)  # until it has started and encoded its requests
                        result = tool.run(server, light)
                    finally:
                        if other:
                            other.terminate()
                            other.wait()
                    for figure in names:
                        rows[beside, figure].add(server.name, result[figure])
                    say(
                        f"fairness: {server.name}, beside a heavy client: {beside}: p99 {result['p99_us']} µs"
                    )
    section.rows += rows.values()
    yield section


def python(setup: Setup) -> Iterator[Section]:
    """Throughput of the Python twins."""
    twins = replace(setup, python=True)
    with ExitStack() as stack:
        servers = _trio(twins, "python", stack)
        section = _plain(twins, servers, TWIN_GOALS)
        section.title = "Throughput of the Python twins"
        section.text = "No compiled kernel (`IMDS_DISABLE_KERNEL=1`), `--appendfsync no`; otherwise as above."
        yield section


GROUPS: dict[str, Callable[[Setup], Iterator[Section]]] = {
    "goals": goals,
    "scaling": scaling,
    "connections": connections,
    "values": values,
    "zipf": zipf,
    "growth": growth,
    "fairness": fairness,
    "python": python,
}
