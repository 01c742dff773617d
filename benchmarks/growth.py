"""How cost grows with the data, and how long anybody waits meanwhile.

Twice each: through the whole server, where a request has a price that does not depend on the data, and in the
store alone (``alone.py``), where growth like log n and growth like n cannot be taken for each other.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from generator import Benchmark, Job
from measure import Cell, Setup, interleave, prepare, say
from peers import ROOT, PeerError, Server
from table import Row, Section

KEYS = [10**power for power in (4, 5, 6, 7)]
MEMBERS = [10**power for power in (3, 4, 5, 6)]
# The slope of log(cost) over log(n): 1 where cost grows like n, 0.1 like log n from 10^3 to 10^6. What is
# above that is memory: at the smallest size all of it is in the processor's caches, at the largest nothing.
SLOPE = 0.35
STALL = 5.0  # ms


def _alone(setup: Setup, what: str, sizes: Sequence[int]) -> dict[str, list[float]]:
    """Return the curves of ``alone.py``, measured in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("alone.py")), what]
    command += ["--sizes", ",".join(map(str, sizes))]
    if what != "pause":
        command += ["--requests", str(setup.size(200_000))]
    switches = {"IMDS_DISABLE_KERNEL": setup.python, "IMDS_REQUIRE_KERNEL": not setup.python}
    environment = os.environ | {name: "1" if on else "" for name, on in switches.items()}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"alone.py {what}: {done.stderr[-2000:]}")
    say(f"alone: {what}: {done.stdout.strip()}")
    curves: dict[str, list[float]] = json.loads(done.stdout)
    return curves


def _curves(setup: Setup, what: str, sizes: Sequence[int], axis: str, text: str) -> Section:
    """Return the curves of the store alone, with a row for the slope of each."""
    section = Section(f"Growth in the store alone: {axis}", text, "imds", axis=axis)
    slopes = []
    for name, curve in _alone(setup, what, sizes).items():
        for size, cost in zip(sizes, curve, strict=True):
            section.rows.append(
                Row(f"{name}, {size:,} {axis}", "µs", "less", {}, {"imds": [cost]}, None, name, size)
            )
        slope = Row(f"{name}: slope of log cost over log {axis}", "", "less", limit=SLOPE)
        slope.add("imds", math.log(curve[-1] / curve[0]) / math.log(sizes[-1] / sizes[0]))
        slopes.append(slope)
    section.rows += slopes
    return section


def growth(setup: Setup) -> Iterator[Section]:
    """Cost of a request in the store alone, from 10^4 to 10^7 keys and from 10^3 to 10^6 members."""
    text = "Processor time of one request, in batches of 64. A table has no depth: only memory gets slower."
    yield _curves(setup, "keys", [setup.size(size) for size in KEYS], "keys", text)
    text = (
        "Processor time of one request on one sorted set, in batches of 64. Ranks and the start of a range "
        "are found in log n steps, and a range then takes a step for each member found."
    )
    yield _curves(setup, "members", [setup.size(size) for size in MEMBERS], "members", text)


def growth_keys(setup: Setup) -> Iterator[Section]:
    """Cost of get and set through the whole server, from 10^4 to 10^7 keys."""
    text = "Time per request at pipeline 64, by imds-benchmark with 500,000 different requests."
    section = Section("Growth: keys", text, "imds", ("redis",), axis="keys")
    with setup.imds() as ours, setup.redis() as redis:
        for count in map(setup.size, KEYS):
            job = Job("get", 64, keys=count, pool=setup.size(500_000))
            prepare(setup.tool, [ours, redis], [job])
            section.rows += _costs(setup, [ours, redis], job, ("get", "set"), count, "keys")
    yield section


def growth_members(setup: Setup) -> Iterator[Section]:
    """Cost of sorted-set commands through the whole server, from 10^3 to 10^6 members."""
    text = "Time per request on one sorted set at pipeline 64; a range finds about ten members."
    section = Section("Growth: members", text, "imds", ("redis",), axis="members")
    with setup.imds() as ours, setup.redis() as redis:
        for count in map(setup.size, MEMBERS):
            job = Job("zrank", 64, sets=1, members=count, pool=setup.size(500_000))
            prepare(setup.tool, [ours, redis], [job])
            section.rows += _costs(setup, [ours, redis], job, ("zrank", "zrange", "zadd"), count, "members")
    yield section


def _costs(
    setup: Setup, servers: Sequence[Server], job: Job, tests: Sequence[str], count: int, unit: str
) -> list[Row]:
    """Return rows of microseconds per request."""
    rows = []
    for test in tests:
        rates = Row(f"{test}, {count:,} {unit}", "requests/s")
        interleave(setup, [Cell(rates, server, replace(job, test=test)) for server in servers], setup.tool)
        costs = {name: [1e6 / rate for rate in runs] for name, runs in rates.runs.items()}
        rows.append(Row(rates.name, "µs", "less", {}, costs, None, test, count))
    return rows


def pause(setup: Setup) -> Iterator[Section]:
    """The longest pause while the data grows to 10^7 keys."""
    sizes = [setup.size(size) for size in KEYS]
    text = (
        "The longest that any single set took in the store alone while it grew: a table that is made larger "
        "at one go would show here. The processor time of the thread, which has the limit, does not count "
        "what the machine does meanwhile; the clock on the wall does."
    )
    section = Section("The longest pause of a shard", text, "imds")
    for name, curve in _alone(setup, "pause", sizes).items():
        for size, longest in zip(sizes, curve, strict=True):
            limit = STALL if name == "processor time" else None
            row = Row(f"up to {size:,} keys, {name}", "ms", "less", limit=limit)
            row.add("imds", longest)
            section.rows.append(row)
    yield section
    text = (
        "The longest that a client with 200 gets a second (open loop) waited while another process added the "
        "keys, 512 sets at a time. Most of it is waiting for a processor."
    )
    section = Section("The longest wait beside a load of keys", text, "imds", ("redis",))
    with setup.imds() as ours, setup.redis() as redis:
        for count in sizes:
            row = Row(f"while growing to {count:,} keys", "ms", "less")
            for server in (ours, redis):
                row.add(server.name, _longest_wait(setup.tool, server, Job("get", keys=count)) / 1000)
            section.rows.append(row)
    yield section


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
