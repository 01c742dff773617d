#!/usr/bin/env python3
"""Measure imds beside redis and twemproxy, and write RESULTS.md and results.json.

Run by hand, on a machine that does nothing else::

    .venv/bin/python benchmarks/run.py                         the goals, about 40 minutes
    .venv/bin/python benchmarks/run.py --groups goals,growth   these groups
    .venv/bin/python benchmarks/run.py --quick                 every line of this code, in a few minutes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import psutil
from generator import Benchmark, Kvload
from groups import GROUPS, Setup, say
from peers import ROOT, PeerError, program
from table import Section, document, markdown

TEXT = (
    "Written by `benchmarks/run.py`; the figure of every round is in `results.json`. Each figure is the "
    "median over the rounds, each ratio that of two medians. The load generator, all servers and all their "
    "processes share this one machine."
)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return (done.stdout or done.stderr).strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def _filesystem(directory: Path) -> str:
    """Return the type of the filesystem that holds ``directory``: what a sync costs depends on it."""
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def facts(options: argparse.Namespace, setup: Setup) -> dict[str, str]:
    """Return what a reader must know to judge the figures, and to repeat them."""
    variant = {"IMDS_DISABLE_KERNEL": "1"} if setup.python else {"IMDS_REQUIRE_KERNEL": "1"}
    version = subprocess.run(
        [sys.executable, "-m", "imds", "--version"],
        env=os.environ | variant | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if version.returncode:
        raise PeerError(
            f"imds does not start; compiled kernels are required without --python:\n{version.stderr}"
        )
    memory = psutil.virtual_memory().total >> 20
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{_processor()}, {psutil.cpu_count()} cores, {memory:,} MiB, {platform.platform()}",
        "files on": _filesystem(setup.directory),
        "imds": f"{version.stdout.strip()}, commit {_output('git', 'rev-parse', '--short', 'HEAD')}",
        "Python": platform.python_version(),
        "redis": _output(program("redis-server"), "--version"),
        "twemproxy": f"{_output(program('nutcracker'), '--version').splitlines()[0]}, with four redis",
        "load generator": setup.generator.name,
        "rounds": f"{setup.rounds}, interleaved, {setup.seconds:g} s each",
        "command": f"`{shlex.join([Path(sys.executable).name, *sys.argv])}`",
    }


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _groups(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in GROUPS:
            raise argparse.ArgumentTypeError(f"no group {name!r}, there are: {', '.join(GROUPS)}")
    return names


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Measure imds beside redis and twemproxy.", allow_abbrev=False
    )
    add = result.add_argument
    add("--groups", type=_groups, default=None, help=f"default goals; there are: {', '.join(GROUPS)}")
    add("--rounds", type=int, default=5, metavar="N", help="interleaved runs of each row, default 5")
    add("--seconds", type=_positive, default=5.0, metavar="S", help="length of a run, default 5")
    add("--kvload", metavar="PATH", help="use this C load generator where it can do the job")
    add("--python", action="store_true", help="measure the Python twins in all groups")
    add(
        "--quick",
        action="store_true",
        help="all groups, once, tiny: does it work at all? The figures say nothing",
    )
    add("--dir", type=Path, default=None, help="where the servers' files go, default a temporary directory")
    add(
        "--out",
        type=Path,
        default=None,
        help="where the results go, default benchmarks/ (--quick: only printed)",
    )
    return result


def measure(options: argparse.Namespace, directory: Path) -> int:
    """Run the groups and write the results after each of their sections."""
    tool = Benchmark(500) if options.quick else Benchmark()
    setup = Setup(
        directory,
        Kvload(options.kvload) if options.kvload else tool,
        tool,
        1 if options.quick else options.rounds,
        0.2 if options.quick else options.seconds,
        1000 if options.quick else 1,
        options.python or options.groups == ["python"],
    )
    known = facts(options, setup)
    out = options.out or (directory if options.quick else Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    for group in options.groups or (list(GROUPS) if options.quick else ["goals"]):
        say(f"group {group}")
        for section in GROUPS[group](setup):
            sections.append(section)
            (out / "RESULTS.md").write_text(markdown(known, TEXT, sections))
            (out / "results.json").write_text(json.dumps(document(known, sections), indent=1) + "\n")
    if options.quick:
        print((out / "RESULTS.md").read_text())
    return 0


def _end(signum: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # so that every server is stopped on the way out


def main() -> int:
    """Run from the command line; return the exit code."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, _end)
    try:
        with tempfile.TemporaryDirectory(prefix="imds-", dir=options.dir) as directory:
            return measure(options, Path(directory))
    except PeerError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: interrupted; finished sections have been written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
