#!/usr/bin/env python3
"""Measure imds beside redis and twemproxy, and write RESULTS.md and results.json.

Run by hand, on a machine that does nothing else::

    .venv/bin/python benchmarks/run.py                     all groups, about an hour
    .venv/bin/python benchmarks/run.py strings memory      these groups; the results of the others stay
    .venv/bin/python benchmarks/run.py --quick             every line of this code, in a few minutes
"""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from generator import Benchmark, Kvload
from groups import GROUPS
from measure import Setup, say
from peers import ROOT, PeerError, end_on_sigterm, program
from plots import draw
from results import Group, Results


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


def _command(group: str) -> list[str]:
    """Return the command line that measures ``group`` alone in the same way."""
    options = [word for word in sys.argv[1:] if word not in GROUPS]
    return ["benchmarks/run.py", group, *options]


def facts(setup: Setup) -> dict[str, str]:
    """Return what a reader must know to judge the figures, and to repeat them."""
    variant = {
        "IMDS_DISABLE_KERNEL": "1" if setup.python else "",
        "IMDS_REQUIRE_KERNEL": "" if setup.python else "1",
    }
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
        "command": f"`{shlex.join([Path(sys.executable).name, *_command(setup.group)])}`",
    }


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Measure imds beside redis and twemproxy.", allow_abbrev=False
    )
    add = result.add_argument
    add("groups", nargs="*", metavar="GROUP", help=f"default all; there are: {', '.join(GROUPS)}")
    add("--rounds", type=int, default=5, metavar="N", help="interleaved runs of each row, default 5")
    add("--seconds", type=_positive, default=3.0, metavar="S", help="length of a run, default 3")
    add("--kvload", metavar="PATH", help="use this C load generator where it can do the job")
    add("--python", action="store_true", help="measure the Python twins in these groups")
    add("--quick", action="store_true", help="once, and tiny: does it work at all? The figures say nothing")
    add("--dir", type=Path, default=None, help="where the servers' files go, default a temporary directory")
    add(
        "--out",
        type=Path,
        default=None,
        help="where the results go, default benchmarks/ (--quick: only printed)",
    )
    return result


def measure(options: argparse.Namespace, directory: Path) -> int:
    """Run the groups and write the results after each of them."""
    tool = Benchmark(500) if options.quick else Benchmark()
    results = Results(options.out or (directory if options.quick else Path(__file__).parent), list(GROUPS))
    for name in options.groups or GROUPS:
        setup = Setup(
            name,
            directory / name,
            Kvload(options.kvload) if options.kvload else tool,
            tool,
            1 if options.quick else options.rounds,
            0.2 if options.quick else options.seconds,
            1000 if options.quick else 1,
            options.python or name == "python",
        )
        say(f"group {name}")
        setup.directory.mkdir()
        known = facts(setup)
        results.put(name, Group(known, list(GROUPS[name](setup))))
        results.write(draw)
        shutil.rmtree(setup.directory)  # a group's logs are large
    if options.quick:
        print((results.directory / "RESULTS.md").read_text())
    return 0


def main() -> int:
    """Run from the command line; return the exit code."""
    options_parser = parser()
    options = options_parser.parse_args()
    if unknown := [name for name in options.groups if name not in GROUPS]:
        options_parser.error(f"no group {unknown[0]!r}, there are: {', '.join(GROUPS)}")
    end_on_sigterm()
    compileall.compile_dir(ROOT / "imds", quiet=1)  # as an installed package is
    try:
        with tempfile.TemporaryDirectory(prefix="imds-", dir=options.dir) as directory:
            return measure(options, Path(directory))
    except (PeerError, ValueError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: interrupted; finished groups have been written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
