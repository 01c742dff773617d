"""The groups that have goals: throughput, latency, both log policies, memory, start-up, the Python twins."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from generator import Job
from measure import PEERS, Cell, Setup, fill, interleave, prepare, say
from peers import Server
from table import Row, Section

import imds

Goals = Mapping[tuple[str, int], tuple[float, float]]  # test and pipeline: beside redis and twemproxy

STRINGS: Goals = {
    ("get", 1): (1.0, 1.5),
    ("set", 1): (1.0, 1.5),
    ("get", 16): (2.0, 5.0),
    ("set", 16): (2.0, 5.0),
    ("get", 64): (3.5, 10.0),
    ("set", 64): (3.5, 10.0),
}
SORTED_SETS: Goals = {("zadd", 16): (1.5, 4.0), ("zrank", 16): (1.5, 4.0), ("zrange", 16): (2.0, 4.0)}
TWINS: Goals = {
    **{(test, 1): (0.45, 0.8) for test in ("get", "set")},
    **{(test, 16): (0.45, 1.3) for test in ("get", "set", "zadd", "zrank", "zrange")},
    **{(test, 64): (0.45, 1.4) for test in ("get", "set")},
}
AOF = {("everysec", 1): 1.0, ("everysec", 16): 2.0, ("always", 1): 1.5, ("always", 16): 2.0}

PLAIN = (
    "redis and twemproxy keep no log. imds always does: its first column runs with `--appendfsync no` "
    '(written before each reply, synced when the system likes), "imds everysec" with its default.'
)


def _throughput(setup: Setup, section: Section, aims: Goals, *, everysec: bool = True) -> Section:
    """Fill ``section`` with requests per second, beside both peers."""
    with ExitStack() as stack:
        servers = setup.trio(stack)
        late = stack.enter_context(setup.imds("imds everysec", "everysec")) if everysec else None
        cells = []
        jobs = []
        for (test, pipeline), aim in aims.items():
            row = Row(f"{test}, pipeline {pipeline}", "requests/s", goals=dict(zip(PEERS, aim, strict=True)))
            job = Job(test, pipeline, keys=setup.size(100_000))
            jobs.append(job)
            cells += [Cell(row, server, job) for server in servers]
            if late and test in ("set", "zadd"):  # a read waits for no log
                cells.append(Cell(row, late, job))
            section.rows.append(row)
        prepare(setup.generator, [*servers, *([late] if late else [])], jobs)
        interleave(setup, cells)
    return section


def strings(setup: Setup) -> Iterator[Section]:
    """get and set without waiting for a disk."""
    text = f"50 connections, 64-byte values, 100,000 keys. {PLAIN}"
    yield _throughput(setup, Section("get and set", text, "imds", PEERS), STRINGS)


def sorted_sets(setup: Setup) -> Iterator[Section]:
    """zadd, zrank and zrange without waiting for a disk."""
    text = f"50 connections, 64 sets of 1,000 members, a range finds about ten of them. {PLAIN}"
    yield _throughput(setup, Section("Sorted sets", text, "imds", PEERS), SORTED_SETS)


def python(setup: Setup) -> Iterator[Section]:
    """Throughput of the Python twins."""
    text = "No compiled kernel (`IMDS_DISABLE_KERNEL=1`), `--appendfsync no`; otherwise as above."
    twins = replace(setup, python=True)
    section = Section("Throughput of the Python twins", text, "imds", PEERS)
    yield _throughput(twins, section, TWINS, everysec=False)


def latency(setup: Setup) -> Iterator[Section]:
    """Latency at half the peak rate, open loop."""
    section = Section(
        "Latency at half the peak rate",
        "get, pipeline 1, 50 connections, open loop by imds-benchmark: each request is timed from when it "
        "was due. Both of a pair get the same rate: half of what the slower of the two reached at its peak, "
        "by the same load tool.",
        "imds",
        PEERS,
    )
    tool = setup.tool
    job = Job("get", keys=setup.size(100_000), seconds=setup.seconds)
    with ExitStack() as stack:
        servers = setup.trio(stack)
        prepare(tool, servers, [job])
        peaks = {server.name: tool.run(server, job)["ops_per_s"] for server in servers}
        ours, *peers = servers
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
    yield section


def everysec(setup: Setup) -> Iterator[Section]:
    """set with a sync every second."""
    yield _aof(setup, "everysec")


def always(setup: Setup) -> Iterator[Section]:
    """set with a sync before each reply."""
    yield _aof(setup, "always")


def _aof(setup: Setup, policy: str) -> Section:
    section = Section(
        f"set with --appendfsync {policy}",
        f"imds beside redis with `--appendonly yes --appendfsync {policy}`, 50 connections, 64-byte values. "
        "redis does not rewrite its log meanwhile.",
        "imds",
        ("redis",),
    )
    jobs = [
        (
            Row(f"set, pipeline {pipeline}", "requests/s", goals={"redis": AOF[policy, pipeline]}),
            Job("set", pipeline, keys=setup.size(100_000)),
        )
        for pipeline in (1, 16)
    ]
    with setup.imds("imds", policy) as ours, setup.redis("redis", policy) as redis:
        return fill(setup, section, (ours, redis), jobs)


def memory(setup: Setup) -> Iterator[Section]:
    """Resident memory for each key and each member."""
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
        here = replace(setup, directory=setup.directory / job.kind)
        for server in (here.imds(options=limit), here.redis(options=limit)):
            with server:
                tool.preload(server, replace(job, keys=100, members=100))  # what the first use of all costs
                before = server.rss()
                tool.preload(server, job)
                time.sleep(1)
                row.add(server.name, (server.rss() - before) / count)
        say(f"memory: {name}: {row.runs}")
        section.rows.append(row)
    yield section


def replay(setup: Setup) -> Iterator[Section]:
    """How long a start with a log of a million sets takes."""
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
    private = Row("`imds.serve(shards=2)`, without data", "s", "less")
    section.rows += [answer, own, private]
    servers: Sequence[Server] = [setup.imds("imds", "everysec"), setup.redis("redis", "everysec")]
    for server in servers:
        with server:
            setup.tool.preload(server, Job("set", keys=count))
    for _ in range(setup.rounds):
        for server in servers:
            started = time.monotonic()
            with server:
                answer.add(server.name, time.monotonic() - started)
                own.add(server.name, server.own_load_seconds())
        started = time.monotonic()
        with imds.serve(shards=2):
            private.add("imds", time.monotonic() - started)
    say(f"replay: {answer.runs} {own.runs} {private.runs}")
    yield section
