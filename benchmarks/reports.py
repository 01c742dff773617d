"""The groups without goals: what shards, routers, connections, values and keys make of the throughput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from generator import Job
from measure import PEERS, Cell, Setup, compare, fill, interleave, prepare, say
from peers import Server
from table import Row, Section

VALUE_SIZES = (16, 1024, 16384, 65536)


def _row(name: str, curve: str = "", x: float = 0) -> Row:
    return Row(name, "requests/s", curve=curve, x=x)


def shards(setup: Setup) -> Iterator[Section]:
    """Throughput with 1, 2, 4 and 8 shards."""
    section = Section(
        "Shards",
        "imds with `--appendfsync no` and 1 to 8 shards; 50 connections. More shards than cores share them.",
        "4 shards",
        ("redis", "1 shard"),
    )
    with ExitStack() as stack:
        servers: list[Server] = [stack.enter_context(setup.redis())]
        for count in (1, 2, 4, 8):
            name = f"{count} shard{'s' if count > 1 else ''}"
            servers.append(stack.enter_context(setup.imds(name, shards=count)))
        jobs = [
            (_row(f"{test}, pipeline {pipeline}"), Job(test, pipeline, keys=setup.size(100_000)))
            for pipeline in (1, 16)
            for test in ("get", "set")
        ]
        yield compare(setup, section, servers, jobs)


def routers(setup: Setup) -> Iterator[Section]:
    """Throughput and latency with 1, 2 and 4 routers."""
    section = Section(
        "Routers",
        "imds with four shards and `--routers` 1 to 4, which share the port; the system gives each new "
        "connection to one of them. get, 50 connections, p99 in the same closed loop. They need cores that "
        "nobody else uses.",
        "2 routers",
        ("1 router",),
    )
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                setup.imds(f"{count} router{'s' if count > 1 else ''}", options=f"--routers {count}")
            )
            for count in (1, 2, 4)
        ]
        cells = []
        for pipeline in (1, 16, 64):
            job = Job("get", pipeline, keys=setup.size(100_000))
            row, p99 = _row(f"get, pipeline {pipeline}"), Row(f"p99, pipeline {pipeline}", "µs", "less")
            section.rows += [row, p99]
            cells += [Cell(row, server, job, also={"p99_us": p99}) for server in servers]
        prepare(setup.generator, servers, [job])
        interleave(setup, cells)
    yield section


def connections(setup: Setup) -> Iterator[Section]:
    """Throughput with 1, 50 and 1,000 connections."""
    with ExitStack() as stack:
        jobs = [
            (
                _row(f"get, {count:,} connections, pipeline {pipeline}", f"get, pipeline {pipeline}", count),
                Job("get", pipeline, count, keys=setup.size(100_000)),
            )
            for pipeline in (1, 16)
            for count in (1, 50, 1000)
        ]
        section = Section(
            "Connections", "get of 64-byte values, 100,000 keys.", "imds", PEERS, axis="connections"
        )
        yield compare(setup, section, setup.trio(stack), jobs)


def values(setup: Setup) -> Iterator[Section]:
    """Throughput with values of 16 bytes to 64 KiB, and that of sets beside a redis that logs them, too."""
    for size in VALUE_SIZES:
        with ExitStack() as stack:
            here = replace(setup, directory=setup.directory / str(size))
            keys = _keys_of(setup, size)
            jobs = [
                (_row(f"{test}, pipeline {pipeline}"), Job(test, pipeline, keys=keys, value_size=size))
                for pipeline in (1, 16)
                for test in ("get", "set")
            ]
            section = Section(f"Values of {size:,} bytes", f"{keys:,} keys, 50 connections.", "imds", PEERS)
            yield compare(setup, section, here.trio(stack), jobs)
    yield _logged_values(setup)


def _keys_of(setup: Setup, size: int) -> int:
    return setup.size(min(100_000, (256 << 20) // size))


def _logged_values(setup: Setup) -> Section:
    text = (
        "imds beside redis with `--appendonly yes`, both with `--appendfsync everysec`, 50 connections. "
        "redis does not rewrite its log meanwhile; imds does, without end where values are long."
    )
    section = Section("Values that are logged", text, "imds", ("redis",))
    jobs = [
        (
            _row(f"set of {size:,} bytes, pipeline {pipeline}"),
            Job("set", pipeline, keys=_keys_of(setup, size), value_size=size),
        )
        for size in VALUE_SIZES
        for pipeline in (1, 16)
    ]
    with setup.imds("imds", "everysec") as ours, setup.redis("redis", "everysec") as redis:
        return fill(setup, section, (ours, redis), jobs)


def keys(setup: Setup) -> Iterator[Section]:
    """Throughput where few keys get most requests, and of a mix of nine gets to one set."""
    with ExitStack() as stack:
        count = setup.size(100_000)
        jobs = [
            (_row(f"{test}, {spread}"), Job(test, 16, keys=count, distribution=spread))
            for spread in ("uniform", "zipf")
            for test in ("get", "set", "mixed")
        ]
        text = "Zipf (0.99) beside uniform keys; mixed is nine gets to one set. Pipeline 16, 50 connections."
        section = Section("Hot keys and mixes", text, "imds", PEERS)
        yield compare(setup, section, setup.trio(stack), jobs)


def fairness(setup: Setup) -> Iterator[Section]:
    """Latency of a light client, alone and beside one that pipelines a thousand requests."""
    text = (
        "A client with 500 gets a second (open loop, imds-benchmark), alone and beside another connection "
        "that keeps 1,000 gets in flight."
    )
    section = Section("Fairness", text, "imds", PEERS)
    tool = setup.tool
    light = Job("get", connections=1, rate=500, seconds=setup.seconds, keys=setup.size(100_000), pool=10_000)
    heavy = replace(light, pipeline=1000, rate=0.0, seconds=setup.seconds + 60, pool=65_536)
    names = {"p50_us": "p50", "p99_us": "p99", "max_us": "longest"}
    rows = {
        (beside, figure): Row(f"{name} {'beside the heavy client' if beside else 'alone'}", "µs", "less")
        for beside in (False, True)
        for figure, name in names.items()
    }
    with ExitStack() as stack:
        servers = setup.trio(stack)
        prepare(tool, servers, [light])
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
