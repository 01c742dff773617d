"""A real server in its own processes, and what a test asks and demands of it.

A server is started from the package that this Python imports, by ``python -m imds``, on a free port of
127.0.0.1. Every process of it carries a random word in its environment, so that an orphan is found
whatever became of its parents.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from imds import Client
from imds.hashslots import SlotMap
from imds.protocol import decode_response, encode_request

DEADLINE = 30.0  # seconds that anything may take on a slow and busy machine
MARK = "SYSTEM_TEST_SERVER"
KERNEL_SWITCHES = (
    "IMDS_REQUIRE_KERNEL",
    "IMDS_DISABLE_KERNEL",
)  # which kernels to test is the caller's choice

READY = re.compile(
    r"^imds: ready on (.+), (?:(\d+) of )?(\d+) shards?, (\d+) keys loaded in .* s, pid (\d+)$", re.M
)
# What no server should have to say, unless the test has asked for it.
WORRY = re.compile(r"^(?:Traceback .*|.* (?:ERROR|CRITICAL) .*|Exception .*|--- Logging error ---)$", re.M)


def until(what: str, condition: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """Return what ``condition`` returns as soon as that is true; fail where it takes too long."""
    end = time.monotonic() + deadline
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.01)


def environment(mark: str, **more: str) -> dict[str, str]:
    """Return this process's environment without what would configure a server, and with ``more``."""
    kept = {"IMDS_REQUIRE_KERNEL", "IMDS_DISABLE_KERNEL"}
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith("IMDS_") or name in kept
    }
    return {**plain, MARK: mark, **more}


class Server:
    """One server on one data directory: start it, stop or kill it, as often as you like.

    ``expected`` are patterns of log lines that would otherwise fail :meth:`stop`.
    """

    def __init__(self, directory: Path, log_path: Path) -> None:
        self.directory = directory
        self.log_path = log_path
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self.expected: list[str] = []
        self.ready_line = ""
        self._log_start = 0  # of the present run
        self._unix: str | None = None
        self._port = 0  # 0: not known yet
        self._open: list[Client[bytes] | socket.socket] = []

    # -- starting and ending ----------------------------------------------------------------------

    def start(
        self,
        *options: str,
        ready: bool = True,
        env: dict[str, str] | None = None,
        prefix: Iterable[str] = (),
        group: bool = False,
    ) -> Server:
        """Start the server; by default wait for its ready line. ``group``: in a process group of its own."""
        assert self.process is None, "it runs"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._port = 0
        self._unix = options[options.index("--unix") + 1] if "--unix" in options else None
        command = [*prefix, sys.executable, "-m", "imds", "--dir", str(self.directory)]
        if "--port" not in options:
            command += ["--port", "0"]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self.mark, **(env or {})),
                process_group=0 if group else None,
            )
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait for the ready line."""
        assert self.process is not None

        def found() -> re.Match[str] | None:
            line = READY.search(self.log())
            assert line or self.process is None or self.process.poll() is None, f"it ended:\n{self.log()}"
            return line

        try:
            self.ready_line = until("the ready line", found)[0]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def wait(self) -> int:
        """Wait for the end of the server; return its exit code. None of its processes may be left."""
        assert self.process is not None
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.log()}") from None
        self.process = None
        self.ready_line = ""
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, code: int = 0) -> None:
        """Stop the server by a signal and hold it to a clean end."""
        assert self.process is not None
        self.process.send_signal(number)
        self.ended(code)

    def ended(self, code: int = 0) -> None:
        """Wait for the end that something else has caused, and hold the server to a clean one."""
        assert self.wait() == code, self.log()
        assert not self.processes(), f"left behind: {self.processes()}\n{self.log()}"
        if self._unix is not None:
            assert not Path(self._unix).exists(), "the socket file was left behind"
        assert len(READY.findall(self.log())) <= 1, "the ready line stands there twice"
        worries = [line for line in WORRY.findall(self.log()) if not self._is_expected(line)]
        assert not worries, f"{worries}\n{self.log()}"

    def expect(self, *patterns: str) -> None:
        """Let the log have lines at ERROR that match one of these, in this run and later ones."""
        self.expected += patterns

    def _is_expected(self, line: str) -> bool:
        return any(re.search(pattern, line) for pattern in self.expected)

    def kill(self) -> None:
        """Kill the supervisor by SIGKILL; its children must be gone within seconds."""
        assert self.process is not None
        self.process.kill()
        self.wait()
        self.wait_gone()

    def wait_gone(self) -> None:
        """Wait until no process of the server is left."""
        until("the end of the last process", lambda: not self.processes())

    def end(self) -> list[psutil.Process]:
        """End whatever runs and close whatever was opened; return the orphans that had to be killed."""
        for one in self._open:
            one.close()
        self._open.clear()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            with contextlib.suppress(AssertionError):
                self.wait_gone()
        orphans = self.processes()
        for process in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return orphans

    # -- its processes ----------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Return every living process of the server, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def child(self, name: str) -> psutil.Process | None:
        """Return the process that runs as ``imds-`` and ``name``, such as ``shard-0``, if there is one."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if f"imds-{name}" in process.cmdline():
                    return process
        return None

    def shard(self, index: int) -> psutil.Process:
        """Return the process of a shard, once there is one."""
        process: psutil.Process = until(f"shard {index}", lambda: self.child(f"shard-{index}"))
        return process

    def router(self, index: int = 0) -> psutil.Process:
        """Return the process of a router, once there is one."""
        process: psutil.Process = until(f"router {index}", lambda: self.child(f"router-{index}"))
        return process

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        assert self.process is not None
        return self.process.pid

    @property
    def port(self) -> int:
        """The TCP port that the server listens on; known before the ready line is."""
        if self._port:
            return self._port
        process = psutil.Process(self.pid)

        def listening() -> int:
            assert process.is_running(), self.log()
            sockets = process.net_connections("tcp")
            ports = [one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN]
            return ports[0] if ports else 0

        self._port = until("a listening socket", listening)
        return self._port

    def log(self) -> str:
        """Return what the server has logged since its last start."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace")

    def logged(self, pattern: str) -> list[str]:
        """Return the lines of the log that match."""
        return [line for line in self.log().splitlines() if re.search(pattern, line)]

    # -- talking to it ----------------------------------------------------------------------------

    def client(self, timeout: float = DEADLINE) -> Client[bytes]:
        """Return a client that tries once, closed at the end of the test."""
        client = Client("127.0.0.1", self.port, timeout=timeout, retries=0)
        self._open.append(client)
        return client

    def connect(self) -> socket.socket:
        """Return a plain connection, closed at the end of the test."""
        sock = socket.socket()
        self._open.append(sock)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def stats(self) -> list[dict[str, Any]]:
        """Return the statistics of each shard."""
        with Client("127.0.0.1", self.port, timeout=DEADLINE) as client:
            return client.stats()

    def wait_up(self) -> None:
        """Wait until every shard serves."""
        until("every shard is up", lambda: all(row["state"] == "up" for row in self.stats()))

    # -- its data ---------------------------------------------------------------------------------

    @property
    def slots(self) -> SlotMap:
        """The slot map, as the directory has it."""
        manifest = json.loads((self.directory / "manifest.json").read_text())
        return SlotMap.from_ranges(manifest["slots"], manifest["shards"], manifest["seed"])

    def keys_of(self, shard: int, prefix: str = "key") -> Iterator[bytes]:
        """Yield one key after the other that lives in ``shard``."""
        slots, number = self.slots, 0
        while True:
            key = b"%s-%d" % (prefix.encode(), number)
            if slots.shard_of(key) == shard:
                yield key
            number += 1

    def segment(self, shard: int) -> Path:
        """Return the path of the newest segment of a shard's log."""
        generation = json.loads((self.directory / "manifest.json").read_text())["generation"]
        return max((self.directory / f"gen-{generation:06d}" / f"shard-{shard:03d}").glob("*.aof"))


# -- bytes on a plain connection ------------------------------------------------------------------


def request(*tokens: bytes) -> bytes:
    """Return a request frame."""
    return encode_request(tokens)


def receive(sock: socket.socket, size: int) -> bytes:
    """Return exactly ``size`` bytes, or what came before the end of the stream."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 16))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def receive_all(sock: socket.socket) -> bytes:
    """Return everything up to the end of the stream."""
    data = bytearray()
    while chunk := sock.recv(1 << 16):
        data += chunk
    return bytes(data)


def replies(data: bytes) -> list[tuple[int, bytes]]:
    """Return (status, payload) of each whole reply in ``data``, the last of which may be cut short."""
    found, position = [], 0
    while decoded := decode_response(data, position):
        status, payload, position = decoded
        found.append((status, payload))
    return found


def receive_replies(sock: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Return the next ``count`` replies; fewer where the stream ends before."""
    found = []
    for _ in range(count):
        head = receive(sock, 4)
        if len(head) < 4:
            break
        found += replies(head + receive(sock, int.from_bytes(head)))
    return found


def converse(sock: socket.socket, pieces: Iterable[bytes], size: int) -> bytes:
    """Send the pieces one by one and receive meanwhile, until ``size`` bytes have come or the stream ends.

    A piece goes out as soon as the socket takes it, whatever has been answered by then.
    """
    sock.setblocking(False)
    waiting = iter(pieces)
    unsent = memoryview(next(waiting, b""))
    data = bytearray()
    end = time.monotonic() + DEADLINE
    while len(data) < size:
        readable, writable, _ = select.select([sock], [sock] if unsent else [], [], DEADLINE)
        assert readable or writable, f"only {len(data)} of {size} bytes came"
        assert time.monotonic() < end, f"only {len(data)} of {size} bytes came in time"
        if writable:
            unsent = unsent[sock.send(unsent) :]
            while not unsent:
                piece = next(waiting, None)
                if piece is None:
                    break
                unsent = memoryview(piece)
        if readable:
            chunk = sock.recv(1 << 16)
            if not chunk:
                break
            data += chunk
    sock.settimeout(DEADLINE)
    return bytes(data)
