"""How a group measures: its setup, its servers, and rounds in which all of them take turns.

Runs are interleaved: every round asks all servers for a row before the next row begins, so a machine that
is slow for a minute is slow for all of them.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from generator import Benchmark, Generator, Job
from peers import Imds, Redis, Server, Twemproxy
from table import Row, Section

PEERS = ("redis", "twemproxy")


@dataclass(frozen=True, slots=True)
class Setup:
    """How the command line wants it, for one group."""

    group: str
    directory: Path  # for the servers' files
    generator: Generator
    tool: Benchmark  # for what only imds-benchmark can do
    rounds: int
    seconds: float
    scale: int  # sizes are divided by this: 1, or more for a smoke test
    python: bool

    def size(self, full: int) -> int:
        """Return ``full``, or less of it in a smoke test."""
        return max(100, full // self.scale)

    def imds(
        self, name: str = "imds", appendfsync: str = "no", *, shards: int = 4, options: str = ""
    ) -> Imds:
        """Return our server, not yet started."""
        return Imds(
            name,
            self._place(name),
            appendfsync,
            shards=shards,
            python=self.python,
            options=options,
        )

    def redis(self, name: str = "redis", appendfsync: str = "", options: str = "") -> Redis:
        """Return a redis, not yet started."""
        return Redis(name, self._place(name), appendfsync, options=options)

    def twemproxy(self) -> Twemproxy:
        """Return twemproxy and four redis, not yet started."""
        return Twemproxy("twemproxy", self._place("twemproxy"))

    def trio(self, stack: ExitStack) -> list[Server]:
        """Return imds, redis and twemproxy, started."""
        return [stack.enter_context(server) for server in (self.imds(), self.redis(), self.twemproxy())]

    def _place(self, name: str) -> Path:
        return self.directory / name.replace(" ", "-")


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


def prepare(generator: Generator, servers: Sequence[Server], jobs: Sequence[Job]) -> None:
    """Make the data of ``jobs`` in all ``servers``."""
    for server in servers:
        for job in {job.kind: job for job in jobs}.values():
            generator.preload(server, job)


def compare(
    setup: Setup, section: Section, servers: Sequence[Server], jobs: Sequence[tuple[Row, Job]]
) -> Section:
    """Make the data, then :func:`fill`."""
    prepare(setup.generator, servers, [job for _, job in jobs])
    return fill(setup, section, servers, jobs)


def fill(
    setup: Setup, section: Section, servers: Sequence[Server], jobs: Sequence[tuple[Row, Job]]
) -> Section:
    """Fill ``section`` with these rows of throughput, for all of ``servers``."""
    section.rows += [row for row, _ in jobs]
    interleave(setup, [Cell(row, server, job) for row, job in jobs for server in servers])
    return section
