"""imds-benchmark: how fast a server answers, asked by many connections from several processes.

This file is the command line and the table; ``imds/load/`` is the load generator.

Exit codes: 0, 1 where the server was not there, broke off or answered errors, 2 for a wrong option,
130 after Ctrl-C (what was measured until then is printed).
"""

# ruff: noqa: T201 (printing is this file's work)
from __future__ import annotations

import argparse
import importlib
import json
import platform
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from imds import __version__
from imds.histogram import Histogram
from imds.load.loop import Tally
from imds.load.processes import BenchmarkError, Interrupt, Plan, Target, run
from imds.load.workload import (
    COMMANDS,
    DISTRIBUTIONS,
    ENCODERS,
    MIXES,
    POOL_REQUESTS,
    Workload,
    kinds_of,
    parse_mix,
)
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT

REDIS_PORT = 6379

# --- results --------------------------------------------------------------------------------------

QUANTILES = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999, "max_us": 1.0}


def row(test: str, latency: Histogram, seconds: float, errors: int, misses: int) -> dict[str, Any]:
    """Return the figures of one line of the table; times in microseconds."""
    figures: dict[str, Any] = {
        "test": test,
        "ops": latency.number,
        "seconds": round(seconds, 6),
        "ops_per_s": round(latency.number / seconds) if seconds else 0,
        "mean_us": round(latency.mean() / 1000, 3),
    }
    for name, q in QUANTILES.items():
        figures[name] = round(latency.quantile(q) / 1000, 3)
    return figures | {"errors": errors, "misses": misses}


def figures(test: str, plan: Plan, tally: Tally) -> dict[str, Any]:
    """Return what is known about one test, its commands one by one where it mixes them."""
    total = tally.all()
    result = row(test, total.latency, tally.seconds, total.errors, total.misses)
    if len(plan.workload.mix) > 1:
        result["commands"] = [
            row(name, part.latency, tally.seconds, part.errors, part.misses)
            for name, part in sorted(tally.commands.items())
        ]
    if plan.rate:
        result["rate"] = plan.rate
        result["unsent"] = tally.unsent
        result["send_delay_p99_us"] = round(tally.delay.quantile(0.99) / 1000, 3)
    return result | {
        "broken_connections": tally.broken,
        "generator_busy": round(tally.busy, 3),
        "error_texts": tally.texts,
    }


HEADINGS = ("test", "ops/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "requests", "errors", "misses")


def _cells(figures: dict[str, Any], indent: str = "") -> tuple[str, ...]:
    times = (f"{figures[name] / 1000:.3f}" for name in QUANTILES)
    counts = (f"{figures[name]:,}" for name in ("ops", "errors", "misses"))
    return (indent + figures["test"], f"{figures['ops_per_s']:,}", *times, *counts)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as aligned text."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    for result in results:
        lines.append(_cells(result))
        lines.extend(_cells(part, "  ") for part in result.get("commands", ()))
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a reader of the result must know besides the table."""
    name = result["test"]
    lines = [f"{name}: {text} (x {times:,})" for text, times in result["error_texts"].items()]
    if result["broken_connections"]:
        lines.append(f"{name}: {result['broken_connections']} connections broke off")
    if result.get("unsent"):
        lines.append(
            f"{name}: {result['unsent']:,} requests were due but could not be sent; "
            "the latencies hold how long they had waited"
        )
    if result["generator_busy"] > 0.9 and result["seconds"] >= 1:  # a shorter run says nothing of either
        lines.append(
            f"{name}: a load process computed {result['generator_busy']:.0%} of the time: "
            "the server may be faster than this; try more --processes"
        )
    return lines


def plot(curves: dict[str, Histogram], path: str, title: str) -> None:
    """Write a picture of latency over quantile, one line for each command. Needs matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    nines = [0.1 * i for i in range(51)]  # from 0 to 5 nines: the axis shows 1 / (1 - quantile)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, latency in curves.items():
        axes.plot(nines, [latency.quantile(1 - 10**-n) / 1e6 for n in nines], label=name)
    axes.set_xticks(range(6), ["0", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %"])
    axes.set_yscale("log")
    axes.set_xlabel("share of the requests")
    axes.set_ylabel("answered within, ms")
    axes.set_title(title, fontsize="small", wrap=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- the command line -----------------------------------------------------------------------------


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to a million")
    return value


def _above_zero(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _tests(text: str) -> dict[str, tuple[tuple[str, int], ...]]:
    tests = {}
    for name in (part.strip().lower() for part in text.split(",")):
        if name not in COMMANDS and name not in MIXES:
            known = ", ".join((*COMMANDS, *MIXES))
            raise argparse.ArgumentTypeError(f"no test {name!r}, there are: {known}")
        tests[name] = MIXES.get(name, ((name, 1),))
    return tests


def _mix(text: str) -> dict[str, tuple[tuple[str, int], ...]]:
    try:
        return {"mix": parse_mix(text)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="imds-benchmark", description="Measure how fast a server answers.", allow_abbrev=False
    )
    add = result.add_argument_group("server").add_argument
    add("--host", default=DEFAULT_HOST, help="default %(default)s")
    add("--port", type=_positive, help=f"default {DEFAULT_PORT}, or {REDIS_PORT} for resp")
    add("--unix", metavar="PATH", help="a Unix socket instead of host and port")
    add("--protocol", choices=sorted(ENCODERS), default="imds", help="resp asks redis for the same work")
    add("--timeout", type=_above_zero, default=5.0, metavar="S", help="give up without a reply, default 5")
    add = result.add_argument_group("what to ask").add_argument
    add("--tests", type=_tests, default=None, metavar="NAMES", help=f"{', '.join((*COMMANDS, *MIXES))}")
    add("--mix", type=_mix, default=None, metavar="MIX", help='one test of several commands: "get:90,set:10"')
    add("--keys", type=_positive, default=100_000, metavar="N", help="strings, default 100,000")
    add("--value-size", type=_positive, default=64, metavar="BYTES", help="default 64")
    add("--sets", type=_positive, default=64, metavar="N", help="sorted sets, default 64")
    add("--members", type=_positive, default=1000, metavar="N", help="members of each, default 1000")
    add("--distribution", choices=sorted(DISTRIBUTIONS), default="uniform", help="which keys come up")
    add("--seed", type=int, default=1, metavar="N", help="the same seed asks the same, default 1")
    add(
        "--pool",
        type=_positive,
        default=POOL_REQUESTS,
        metavar="N",
        help="different requests, default 65,536",
    )
    add("--preload", action="store_true", help="make the data that the tests work on first")
    add("--preload-only", action="store_true", help="make the data and stop")
    add = result.add_argument_group("how to ask").add_argument
    add("--processes", type=_positive, default=1, metavar="N", help="load processes, default 1")
    add("--connections", type=_positive, default=50, metavar="N", help="in all, default 50")
    add(
        "--pipeline",
        type=_positive,
        default=1,
        metavar="N",
        help="requests in flight per connection, default 1",
    )
    add("--rate", type=_above_zero, metavar="R", help="open loop: R requests per second, timed from when due")
    add("--seconds", type=_above_zero, default=None, metavar="S", help="length of each test, default 5")
    add("--requests", type=_positive, default=None, metavar="N", help="length of each test in requests")
    add("--warmup", type=_seconds, default=0.0, metavar="S", help="run this long before, unmeasured")
    add = result.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--plot", metavar="FILE.png", help="draw the latencies (needs matplotlib)")
    add("--version", action="version", version=f"imds-benchmark {__version__}")
    return result


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """Return the tests that the options ask for, by name. Raises ValueError where they contradict."""
    if options.tests and options.mix:
        raise ValueError("--tests and --mix exclude each other")
    if options.processes > options.connections:
        raise ValueError("--processes must not exceed --connections: each needs one at least")
    if options.unix and not hasattr(socket, "AF_UNIX"):
        raise ValueError("--unix: this system has no Unix sockets")
    port = options.port or (DEFAULT_PORT if options.protocol == "imds" else REDIS_PORT)
    target = Target(options.host, port, options.unix, options.protocol, options.timeout)
    seconds = options.seconds
    if seconds is None and options.requests is None:
        seconds = 5.0
    tests = options.mix or options.tests or _tests("get,set")
    ready: set[str] = set()
    result = {}
    for name, mix in tests.items():
        workload = Workload(
            mix,
            options.keys,
            options.value_size,
            options.sets,
            options.members,
            options.distribution,
            options.seed,
        )
        kinds = tuple(kind for kind in kinds_of(mix) if kind not in ready) if options.preload else ()
        ready.update(kinds)
        result[name] = Plan(
            target,
            workload,
            options.processes,
            options.connections,
            options.pipeline,
            seconds,
            options.requests,
            options.rate,
            options.warmup,
            kinds,
            options.pool,
        )
    return result


def describe(plan: Plan) -> str:
    """Return one line that says how a test was run."""
    load, work = plan, plan.workload
    pace = f"open loop, {load.rate:,.0f} requests/s" if load.rate else "closed loop"
    return (
        f"{load.target}, {load.target.protocol} protocol, {pace}: "
        f"{load.connections} connections of {load.processes} processes, pipeline {load.pipeline}, "
        f"{work.keys:,} keys {work.distribution}, {work.value_size}-byte values"
    )


def _document(plan: Plan, results: list[dict[str, Any]]) -> str:
    """Return the run as JSON. ``plan`` is the first one; the others differ in their mix only."""
    settings = asdict(plan)
    del settings["workload"]["mix"], settings["preload"]
    machine = {"python": platform.python_version(), "system": platform.platform(), "imds": __version__}
    return json.dumps({"settings": settings, "machine": machine, "results": results}, indent=2)


def _preload_only(tests: dict[str, Plan], interrupt: Interrupt) -> None:
    """Make the data of all tests, by all processes."""
    first = next(iter(tests.values()))
    kinds = tuple(sorted({kind for plan in tests.values() for kind in kinds_of(plan.workload.mix)}))
    started = time.monotonic()
    run(replace(first, preload=kinds, requests=0, warmup=0.0, pool=1), interrupt)
    if not interrupt.seen:
        print(f"loaded {' and '.join(kinds)} in {time.monotonic() - started:.1f} s", file=sys.stderr)


def _measure(tests: dict[str, Plan], interrupt: Interrupt, tallies: dict[str, Tally]) -> None:
    """Run the tests into ``tallies``, which keeps what was measured before a BenchmarkError."""
    for name, plan in tests.items():
        tallies[name] = run(plan, interrupt)
        if interrupt.seen:
            return


def _report(tests: dict[str, Plan], tallies: dict[str, Tally], options: argparse.Namespace) -> bool:
    """Print and draw the results; return whether no test had errors."""
    first = next(iter(tests.values()))
    results = [figures(name, tests[name], tally) for name, tally in tallies.items()]
    if options.json:
        print(_document(first, results))
    else:
        print(describe(first), table(results), sep="\n", flush=True)
    for result in results:
        for line in notes(result):
            print(f"imds-benchmark: {line}", file=sys.stderr)
    if options.plot:
        curves = {
            command if command == name else f"{name}: {command}": part.latency
            for name, tally in tallies.items()
            for command, part in tally.commands.items()
        }
        plot(curves, options.plot, describe(first))
    return not any(result["errors"] or result["broken_connections"] for result in results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests that the command line asks for; return the exit code."""
    options_parser = parser()
    options = options_parser.parse_args(argv)
    try:
        tests = plans(options)
        if options.plot:
            importlib.import_module("matplotlib")
    except ValueError as error:
        options_parser.error(str(error))
    except ImportError:
        options_parser.error("--plot needs matplotlib: pip install matplotlib")
    tallies: dict[str, Tally] = {}
    failed = False
    with Interrupt() as interrupt:
        try:
            next(iter(tests.values())).target.probe()
            if options.preload_only:
                _preload_only(tests, interrupt)
            else:
                _measure(tests, interrupt, tallies)
        except BenchmarkError as error:
            print(f"imds-benchmark: {error}", file=sys.stderr)
            failed = True
    if tallies:
        failed = not _report(tests, tallies, options) or failed
    if interrupt.seen:
        print("imds-benchmark: interrupted", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
