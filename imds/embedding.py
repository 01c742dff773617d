"""A private server for the program that starts it.

::

    with imds.serve(shards=2) as server:
        client = server.client()
        client.set("greeting", "hello")

What stays true:

* The server ends with its parent, however that ends: by ``stop``, by the end of the ``with`` block, by the
  interpreter's exit, by ``kill -9``. See imds/embedded.py.
* It listens on a port or a socket that nobody else has, and keeps its data in a directory that is removed
  with it, unless one is given.
* Ctrl-C at the parent's terminal is the parent's: the server is in a process group of its own.
* A process that was forked from the parent may use the server and cannot stop it.
* The environment's ``IMDS_...`` variables, which configure a server of the machine's, do not reach it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, overload

from imds.client import Client
from imds.replies import ImdsError

_READY = re.compile(rb"^imds: ready on \S+:(\d+)[, ]", re.M)
_LOOK = 0.003  # seconds between two looks for the ready line
_PATIENCE = 15.0  # seconds that a server may take to stop; more than its supervisor gives its children
_LAST_LINES = 20  # of the log, in an error

# Which kernels to run is a property of the machine and not of one server.
_KERNEL_SWITCHES = ("IMDS_REQUIRE_KERNEL", "IMDS_DISABLE_KERNEL")


class ServeError(ImdsError):
    """An embedded server did not start, or did not end as it should; the text has the end of its log."""


class Server:
    """A running server of this process; made by :func:`serve`.

    ``directory`` holds its data; ``port`` is its TCP port on ``127.0.0.1``; ``unix`` is the path of its Unix
    socket, or None; ``url`` is what ``from_url`` takes.
    """

    def __init__(
        self,
        *,
        directory: str | os.PathLike[str] | None,
        unix: str | os.PathLike[str] | bool,
        timeout: float,
        options: dict[str, Any],
    ) -> None:
        self._owner = os.getpid()
        temporary = tempfile.mkdtemp(prefix="imds-") if directory is None or unix is True else ""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _end)
        self.directory = Path(directory) if directory is not None else Path(temporary, "data")
        self.unix = (str(Path(temporary, "socket")) if unix is True else os.fspath(unix)) if unix else None
        words = {"port": 0, "appendfsync": "everysec", **options, "dir": self.directory}
        if self.unix is not None:
            words["unix"] = self.unix
        flags = [
            word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        command = [sys.executable, "-P", str(Path(__file__).with_name("embedded.py")), str(self._owner)]
        try:
            self._process = subprocess.Popen(
                [*command, temporary, *flags],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(),
                process_group=0,
            )
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            self._log.close()
            raise
        self._end = weakref.finalize(self, _end, self._process, self._log, temporary, self._owner)
        try:
            self.port = self._wait_ready(time.monotonic() + timeout, timeout)
        except BaseException:
            self._end()
            raise

    def _wait_ready(self, deadline: float, timeout: float) -> int:
        while True:
            ended = self._process.poll()
            log = self._read_log()
            if found := _READY.search(log):
                return int(found[1])
            if ended is not None:
                raise ServeError(f"the server ended with exit code {ended} while starting{_shown(log)}")
            if time.monotonic() >= deadline:
                raise ServeError(f"the server was not ready in {timeout:g} s{_shown(log)}")
            time.sleep(_LOOK)

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where the server is, for ``from_url``."""
        if self.unix is not None:
            from urllib.parse import quote

            return f"imds+unix://{quote(str(Path(self.unix).absolute()))}"
        return f"imds://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the server's supervisor runs. Only its own parent can tell."""
        return self._end.alive and os.getpid() == self._owner and self._process.poll() is None

    def log(self) -> str:
        """Return what the server has logged. Raises ValueError after the end."""
        return self._read_log().decode(errors="replace")

    def _read_log(self) -> bytes:
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    @overload
    def client(self, *, encoding: None = ..., **options: Any) -> Client[bytes]: ...
    @overload
    def client(self, *, encoding: str, **options: Any) -> Client[str]: ...
    def client(self, *, encoding: str | None = None, **options: Any) -> Any:
        """Return a client of this server; ``options`` are :class:`imds.Client`'s own."""
        return Client("127.0.0.1", self.port, unix=self.unix, encoding=encoding, **options)

    def stop(self) -> None:
        """Stop the server as SIGTERM does, with all its data on the disk. The second time does nothing.

        Raises ServeError where it did not end cleanly. In a forked process it does nothing.
        """
        if not self._end.alive or os.getpid() != self._owner:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        log = self._read_log()
        self._end()
        if code := self._process.returncode:
            raise ServeError(f"the server ended with exit code {code}{_shown(log)}")

    def kill(self) -> None:
        """End the server's processes at once, as a crash would."""
        if self._end.alive and os.getpid() == self._owner:
            self._process.kill()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except ServeError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def __repr__(self) -> str:
        return f"<imds.Server {self.url}>"


def serve(
    *,
    shards: int = 1,
    directory: str | os.PathLike[str] | None = None,
    unix: str | os.PathLike[str] | bool = False,
    timeout: float = 30.0,
    **options: Any,
) -> Server:
    """Start a private server and return it when every shard has loaded.

    ``directory`` keeps the data beyond the server's end; without one they are temporary. ``unix`` is True
    for a Unix socket of its own, or a path: then clients use it instead of the port. ``timeout`` in seconds
    bounds the start. ``options`` are those of ``imds-router`` with underscores: ``maxmemory="64mb"``,
    ``appendfsync="always"``, ``port=7000``. The server ends when nothing refers to it any more. Raises
    ServeError, with the server's log, where it does not start.
    """
    return Server(directory=directory, unix=unix, timeout=timeout, options={"shards": shards, **options})


def _environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("IMDS_") or name in _KERNEL_SWITCHES
    }


def _shown(log: bytes) -> str:
    lines = log.decode(errors="replace").splitlines()[-_LAST_LINES:]
    return ":\n" + "\n".join(f"  {line}" for line in lines) if lines else ", and logged nothing"


def _end(process: subprocess.Popen[bytes], log: IO[bytes], temporary: str, owner: int) -> None:
    """Have nothing left of a server, running or not. In a forked process only the log is closed."""
    if os.getpid() == owner:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    log.close()
