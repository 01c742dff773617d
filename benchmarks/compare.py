#!/usr/bin/env python3
"""Compare checkouts of imds, before and after a change, in interleaved rounds; nothing is written.

Build the kernels of each checkout (``scripts/setup``), then::

    .venv/bin/python benchmarks/compare.py before=../before after=.
    .venv/bin/python benchmarks/compare.py --kvload ./kvload --tests set -P 16 64 before=../before after=.
    .venv/bin/python benchmarks/compare.py one=. two=.,MALLOC_ARENA_MAX=1    one code, two environments

A line for each test and pipeline: the median of the first checkout, for the others the ratio of medians to it
and, in brackets, the least and the largest ratio of a round; then the processor time of each server for a
request, which a busy machine disturbs less than it disturbs what a second gives.
"""

from __future__ import annotations

import argparse
import compileall
import random
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from generator import Benchmark, Job, Kvload
from measure import prepare, say
from peers import Imds, PeerError, Redis, Server, end_on_sigterm
from table import figure


@dataclass(slots=True)
class Runs:
    """What one server gave in the rounds of one job: requests a second, microseconds each."""

    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)


def _tree(text: str) -> tuple[str, Path, dict[str, str]]:
    """Split NAME=DIRECTORY[,VARIABLE=VALUE...]."""
    name, equals, rest = text.partition("=")
    directory, *variables = rest.split(",")
    root = Path(directory).resolve()
    if not (name and equals and (root / "imds" / "__init__.py").is_file()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=CHECKOUT[,VARIABLE=VALUE...]")
    if not all("=" in variable for variable in variables):
        raise argparse.ArgumentTypeError(f"{text!r}: a variable has no value")
    return name, root, {key: value for key, _, value in (item.partition("=") for item in variables)}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Compare checkouts of imds in interleaved rounds.", allow_abbrev=False
    )
    add = result.add_argument
    add("trees", nargs="+", type=_tree, metavar="NAME=CHECKOUT[,VARIABLE=VALUE...]")
    add("--tests", nargs="+", default=["get", "set"], help="default get set")
    add("-P", "--pipelines", nargs="+", type=int, default=[1, 16, 64], help="default 1 16 64")
    add("--rounds", type=int, default=7, metavar="N", help="default 7")
    add("--seconds", type=float, default=1.0, metavar="S", help="length of a run, default 1")
    add("--appendfsync", default="no", choices=["no", "everysec", "always"], help="default no")
    add("--redis", action="store_true", help="beside redis, with the same policy (no: without a log)")
    add("--python", action="store_true", help="the Python twins, not the kernels")
    add("--shards", type=int, default=4, metavar="N", help="default 4")
    add("--kvload", metavar="PATH", help="use this C load generator, not imds-benchmark")
    add("--dir", type=Path, default=None, help="where the servers' files go, default a temporary directory")
    return result


def compare(options: argparse.Namespace, directory: Path) -> None:
    """Start all servers, let them take turns, print the lines."""
    generator = Kvload(options.kvload) if options.kvload else Benchmark()
    with ExitStack() as stack:
        servers: list[Server] = [
            Imds(
                name,
                directory / name,
                options.appendfsync,
                shards=options.shards,
                python=options.python,
                root=root,
                variables=variables,
            )
            for name, root, variables in options.trees
        ]
        if options.redis:
            policy = "" if options.appendfsync == "no" else options.appendfsync
            servers.append(Redis("redis", directory / "redis", policy))
        jobs = [Job(test, pipeline) for pipeline in options.pipelines for test in options.tests]
        for server in servers:
            stack.enter_context(server)
        prepare(generator, servers, jobs)
        runs: defaultdict[tuple[Job, Server], Runs] = defaultdict(Runs)
        shuffle = random.Random(1).shuffle
        order = list(servers)
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            for job in jobs:
                shuffle(order)
                for server in order:
                    before = server.processor_seconds()
                    rate = generator.run(server, replace(job, seconds=options.seconds))["ops_per_s"]
                    used = server.processor_seconds() - before
                    runs[job, server].rates.append(rate)
                    runs[job, server].costs.append(used / (rate * options.seconds) * 1e6)
        for job in jobs:
            _line(job, {server.name: runs[job, server] for server in servers})


def _line(job: Job, runs: dict[str, Runs]) -> None:
    (first, base), *others = runs.items()
    words = [f"{job.test} at {job.pipeline}: {first} {figure(median(base.rates))}/s"]
    for name, run in others:
        ratios = [one / other for one, other in zip(run.rates, base.rates, strict=True)]
        ratio = median(run.rates) / median(base.rates)
        words.append(f"{name} {ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
    costs = ", ".join(f"{name} {median(run.costs):.2f}" for name, run in runs.items())
    print("; ".join(words) + f" | {costs} µs", flush=True)


def main() -> int:
    """Run from the command line; return the exit code."""
    options = parser().parse_args()
    end_on_sigterm()
    for _, root, _ in options.trees:
        compileall.compile_dir(root / "imds", quiet=1)  # as an installed package is
    try:
        with tempfile.TemporaryDirectory(prefix="imds-", dir=options.dir) as directory:
            compare(options, Path(directory))
    except PeerError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
