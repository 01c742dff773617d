"""The load generators: imds-benchmark of this checkout, or kvload, a C program, where its path is given.

Both take the same job and return the same figures: ``ops_per_s``, ``p50_us``, ``p99_us``, ``p999_us``,
``max_us``, ``errors`` and ``misses``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers import ROOT, PeerError, Server


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask of a server, and how."""

    test: str
    pipeline: int = 1
    connections: int = 50
    seconds: float = 5.0
    keys: int = 100_000
    value_size: int = 64
    distribution: str = "uniform"
    sets: int = 64
    members: int = 1000
    rate: float = 0.0  # requests per second; 0 is a closed loop
    pool: int = 65_536

    @property
    def kind(self) -> str:
        """Which data the job works on."""
        return "sets" if self.test.startswith("z") else "strings"


class Benchmark:
    """imds-benchmark."""

    name = "imds-benchmark, the load tool of this repository (one process)"

    def __init__(self, pool: int = 1 << 20) -> None:
        self._pool = pool  # most different requests; few of them make a smoke test quick

    def command(self, server: Server, job: Job, *more: str) -> list[str]:
        """Return the command line that runs ``job``."""
        words = [sys.executable, "-m", "imds.benchmark", "--json", "--protocol", server.protocol]
        words += ["--port", str(server.port), "--tests", job.test, "--pipeline", str(job.pipeline)]
        words += ["--connections", str(job.connections), "--seconds", str(job.seconds)]
        words += ["--keys", str(job.keys), "--value-size", str(job.value_size)]
        words += ["--distribution", job.distribution, "--sets", str(job.sets)]
        words += ["--members", str(job.members), "--pool", str(min(self._pool, job.pool)), "--timeout", "60"]
        if job.rate:
            words += ["--rate", str(job.rate)]
        return [*words, *more]

    def preload(self, server: Server, job: Job) -> None:
        """Make the data that ``job`` works on."""
        _run(self.command(server, job, "--preload-only"), server, job)

    def run(self, server: Server, job: Job) -> dict[str, Any]:
        """Run ``job`` and return its figures. Raises PeerError where the server answered errors."""
        return _first(json.loads(_run(self.command(server, job), server, job)))

    def start(self, server: Server, job: Job, *more: str) -> subprocess.Popen[bytes]:
        """Start ``job`` and return without waiting for it."""
        return subprocess.Popen(
            self.command(server, job, *more),
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


class Kvload:
    """The C load generator at ``path``; it has no open loop, 64 sorted sets, and 14-byte keys."""

    def __init__(self, path: str) -> None:
        self.path = str(Path(path).resolve())
        if not os.access(self.path, os.X_OK):
            raise PeerError(f"--kvload: {self.path} is no program: cc -O2 -o kvload kvload.c -lm")
        self.name = f"{Path(path).name}, a load generator in C (one thread, epoll)"

    def command(self, server: Server, job: Job, *more: str) -> list[str]:
        """Return the command line that runs ``job``."""
        assert not job.rate
        assert job.sets == 64
        words = [self.path, "--proto", server.protocol, "-p", str(server.port), "-t", job.test]
        words += ["-P", str(job.pipeline), "-c", str(job.connections), "-s", str(job.seconds)]
        words += ["-r", str(job.keys), "-d", str(job.value_size), "-m", str(job.members)]
        return [*words, *(["--zipf"] if job.distribution == "zipf" else []), *more]

    def preload(self, server: Server, job: Job) -> None:
        """Make the data that ``job`` works on."""
        _run(self.command(server, replace(job, seconds=0.01), "--preload"), server, job)

    def run(self, server: Server, job: Job) -> dict[str, Any]:
        """Run ``job`` and return its figures. Raises PeerError where the server answered errors."""
        result: dict[str, Any] = json.loads(_run(self.command(server, job), server, job))
        return result


Generator = Benchmark | Kvload


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _run(command: list[str], server: Server, job: Job) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{server.name}, {job.test}: the load generator says: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _first(document: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = document["results"][0]
    return result
