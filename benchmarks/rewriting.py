"""What a rewrite of the logs costs those who are served meanwhile, and in memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
from generator import Job
from measure import Setup, say
from peers import Imds
from table import Row, Section

from imds import Client

IDLE, BUSY = "no rewrite", "rewriting"
# Seconds between two looks at who rewrites: each takes milliseconds from those who are measured.
LOOK_EVERY = 0.5
_SHARD = re.compile(r"imds-shard-\d+")


class Rewriting(threading.Thread):
    """Has the logs rewritten again and again."""

    def __init__(self, server: Imds) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()

    def run(self) -> None:
        with Client(port=self._server.port) as client:
            while not self._over.wait(LOOK_EVERY):
                client.execute("rewrite")

    def end(self) -> None:
        """Ask for no more."""
        self._over.set()
        self.join()


def _peaks(server: Imds) -> list[int]:
    """Return the peak of the resident memory of each shard, in bytes."""
    found = []
    for child in psutil.Process(server.pid).children():
        with suppress(psutil.Error, OSError):
            if any(_SHARD.fullmatch(word) for word in child.cmdline()):
                status = Path(f"/proc/{child.pid}/status").read_text()
                found += [int(size) << 10 for size in re.findall(r"VmHWM:\s+(\d+) kB", status)]
    return found


def rewriting(setup: Setup) -> Iterator[Section]:
    """Latency while logs are rewritten, beside the same without; memory that it takes."""
    keys = setup.size(1_000_000)
    text = (
        f"imds with four shards and {keys:,} keys of 64 bytes, whose logs are rewritten all the time, one "
        "after the other; 50 connections, open loop by imds-benchmark at half the rate that it reaches "
        "without. Memory: by how much the largest resident size of a shard has grown in the end, beside that "
        "size before the first rewrite."
    )
    section = Section("Rewriting", text, BUSY, (IDLE,))
    with setup.imds("imds", "everysec", options="--aof-rewrite-percentage 0") as server:
        assert isinstance(server, Imds)
        job = Job("set", keys=keys, seconds=setup.seconds)
        setup.tool.preload(server, job)
        memory = Row("memory of a rewrite, beside a shard's", "MB", "less", {IDLE: 1.0})
        before = _peaks(server)
        for test in ("get", "set"):
            peak = setup.tool.run(server, replace(job, test=test))["ops_per_s"]
            paced = replace(job, test=test, rate=peak // 2)
            rows = {
                figure: Row(f"{name} of {test} at {paced.rate:,.0f} requests/s", "µs", "less")
                for figure, name in {"p99_us": "p99", "p50_us": "p50", "max_us": "longest"}.items()
            }
            rows["p99_us"].goals = {IDLE: 2.0}
            section.rows += rows.values()
            for number in range(setup.rounds):
                for how in (IDLE, BUSY):
                    busy = Rewriting(server) if how == BUSY else None
                    if busy:
                        busy.start()
                        time.sleep(0.5)
                    result = setup.tool.run(server, paced)
                    if busy:
                        busy.end()
                        now = _peaks(server)
                        memory.add(BUSY, max(b - a for a, b in zip(before, now, strict=True)) / 1e6)
                        memory.add(IDLE, max(before) / 1e6)
                    for figure, row in rows.items():
                        row.add(how, result[figure])
                say(f"round {number + 1} of {setup.rounds}: {test}: p99 {rows['p99_us'].runs}")
        section.rows.append(memory)
        with Client(port=server.port) as client:
            done = [row["rewrites"] for row in client.stats()]
    say(f"rewrites of each shard: {done}")
    yield section
