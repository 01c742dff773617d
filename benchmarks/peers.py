"""The servers that are measured: how each is started, found ready, weighed and stopped.

All of them listen on 127.0.0.1 or Unix sockets with free ports, keep their files under the directory that
they are given, and are stopped by the process ids that were started here. Where the system can, they also
get SIGTERM when this process dies.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a server that has not said ready is given up: replays take their time
INSTALL = {"redis-server": "apt-get install redis-server", "nutcracker": "apt-get install nutcracker"}


class PeerError(Exception):
    """A server is missing, or did not start; the text says which and what to do."""


def program(name: str) -> str:
    """Return the path of ``name``. Raises PeerError with the way to install it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise PeerError(f"{name} is not installed: {INSTALL[name]}, and stop the service it starts")
    return path


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def end_on_sigterm() -> None:
    """Have SIGTERM end this program as an exception does, so that every server is stopped on the way out."""

    def end(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)


def _die_with_parent() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server:
    """A started server. Use as a context manager; ``port`` is where its clients connect."""

    protocol = "resp"

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.port = 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the server and wait until it answers. Raises PeerError."""
        raise NotImplementedError

    def own_load_seconds(self) -> float:
        """Return how long the last start took to load its data, by the server's own account."""
        raise NotImplementedError

    def _spawn(self, command: list[str], environment: dict[str, str] | None = None) -> Path:
        """Start ``command``; return the file that takes its output."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / f"{self.name.replace(' ', '-')}-{len(self._processes)}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.directory,
                env=os.environ | (environment or {}),
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._processes.append(process)
        return log

    def _fail(self, reason: str, log: Path) -> PeerError:
        tail = log.read_text(errors="replace")[-2000:]
        return PeerError(f"{self.name}: {reason}; the end of its output:\n{tail}")

    def _await_pong(self, address: str | tuple[str, int], log: Path) -> None:
        """Wait until a RESP server answers ping by other than LOADING."""
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            if self._processes[-1].poll() is not None:
                raise self._fail(f"exited with code {self._processes[-1].returncode}", log)
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            with suppress(OSError), socket.socket(family) as sock:
                sock.settimeout(1)
                sock.connect(address)
                sock.sendall(b"*2\r\n$3\r\nget\r\n$5\r\nprobe\r\n")
                if sock.recv(100).startswith(b"$"):
                    return
            time.sleep(0.005)
        raise self._fail(f"not ready after {PATIENCE} s", log)

    def stop(self) -> None:
        """Ask every process to end, newest first, and make sure that it has."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    @property
    def pid(self) -> int:
        """The process that was started last."""
        return self._processes[-1].pid

    def family(self) -> list[psutil.Process]:
        """Return all processes of the server."""
        roots = [psutil.Process(process.pid) for process in self._processes]
        return [member for root in roots for member in (root, *root.children(recursive=True))]

    def rss(self) -> int:
        """Return the resident memory of all its processes, in bytes."""
        total = 0
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def processor_seconds(self) -> float:
        """Return the processor time that all its processes have taken so far, the system's included."""
        total = 0.0
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Redis(Server):
    """One redis-server. ``appendfsync`` "" switches persistence off; ``unix`` listens on a socket only."""

    def __init__(
        self, name: str, directory: Path, appendfsync: str = "", *, unix: bool = False, options: str = ""
    ) -> None:
        super().__init__(name, directory)
        self.socket = str(directory / "redis.sock") if unix else ""
        self._log = Path()
        self._options = options.split()
        if appendfsync:  # no rewrite by itself: a fork in the middle of a run would be noise
            aof = f"--appendonly yes --appendfsync {appendfsync} --auto-aof-rewrite-percentage 0"
            self._options += aof.split()
        else:
            self._options += ["--appendonly", "no"]

    def start(self) -> None:
        self.port = 0 if self.socket else free_port()
        command = [program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--daemonize", "no", "--dir", str(self.directory), *self._options]
        if self.socket:
            command += ["--unixsocket", self.socket]
        self._log = self._spawn(command)
        self._await_pong(self.socket or ("127.0.0.1", self.port), self._log)

    def own_load_seconds(self) -> float:
        found = re.findall(r"DB loaded from append only file: ([\d.]+) seconds", self._log.read_text())
        if not found:
            raise self._fail("says nothing of an append only file", self._log)
        return float(found[-1])


class Twemproxy(Server):
    """nutcracker before several redis-servers without persistence, joined by Unix sockets."""

    def __init__(self, name: str, directory: Path, servers: int = 4) -> None:
        super().__init__(name, directory)
        self._backends = [Redis(f"{name} {n}", directory / f"redis-{n}", unix=True) for n in range(servers)]

    def start(self) -> None:
        for backend in self._backends:
            backend.start()
        self.port = free_port()
        self.directory.mkdir(parents=True, exist_ok=True)
        pool = ["imds:", f"  listen: 127.0.0.1:{self.port}", "  hash: fnv1a_64", "  distribution: ketama"]
        pool += ["  redis: true", "  preconnect: true", "  auto_eject_hosts: false", "  servers:"]
        pool += [f"    - {backend.socket}:1 {n}" for n, backend in enumerate(self._backends)]
        config = self.directory / "nutcracker.yml"
        config.write_text("\n".join(pool) + "\n")
        stats = ["-a", "127.0.0.1", "-s", str(free_port()), "-p", str(self.directory / "nutcracker.pid")]
        log = self._spawn([program("nutcracker"), "-c", str(config), *stats])
        self._await_pong(("127.0.0.1", self.port), log)

    def stop(self) -> None:
        super().stop()
        for backend in self._backends:
            backend.stop()

    def family(self) -> list[psutil.Process]:
        return [*super().family(), *(member for backend in self._backends for member in backend.family())]


class Imds(Server):
    """Our server, of the checkout ``root``, with ``variables`` in its environment.

    ``python`` runs the Python twins, otherwise the kernels must be there.
    """

    protocol = "imds"

    def __init__(
        self,
        name: str,
        directory: Path,
        appendfsync: str,
        *,
        shards: int = 4,
        python: bool = False,
        options: str = "",
        root: Path = ROOT,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(name, directory)
        self._arguments = ["--shards", str(shards), "--appendfsync", appendfsync, *options.split()]
        self._environment = {
            "IMDS_REQUIRE_KERNEL": "" if python else "1",
            "IMDS_DISABLE_KERNEL": "1" if python else "",
            # found by PYTHONPATH and not by the working directory, which holds the server's files
            "PYTHONPATH": str(root),
            **variables,
        }
        self._log = Path()

    def start(self) -> None:
        command = [sys.executable, "-m", "imds", "--port", "0", "--dir", str(self.directory / "data")]
        self._log = self._spawn(command + self._arguments, self._environment)
        limit = time.monotonic() + PATIENCE
        while not (ready := self._ready()):
            if self._processes[-1].poll() is not None:
                raise self._fail(f"exited with code {self._processes[-1].returncode}", self._log)
            if time.monotonic() > limit:
                raise self._fail(f"not ready after {PATIENCE} s", self._log)
            time.sleep(0.005)
        self.port = int(ready[1])

    def _ready(self) -> re.Match[str] | None:
        return re.search(r"ready on \S+?:(\d+)\b.* in ([\d.]+) s", self._log.read_text(errors="replace"))

    def own_load_seconds(self) -> float:
        ready = self._ready()
        if ready is None:
            raise self._fail("has not said ready", self._log)
        return float(ready[2])
