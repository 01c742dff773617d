"""The parent of all: holds the data directory, starts the router and the shards, restarts what dies.

What stays true:

* The supervisor touches no client and no key: it can stop, start and watch whatever the load.
* The listening sockets are its own, so that a router that dies takes no port with it: clients that connect
  meanwhile wait in the backlog.
* A process that dies is started again after a pause that doubles; after more than ``MOST_DEATHS`` in
  ``DEATHS_WINDOW`` seconds a shard stays down, the log says so once and the others serve. A shard that
  refuses its damaged log stays down at once. A router that keeps dying ends the server: nobody could
  reach it.
* One shard rewrites its log at a time (imds/rewrites.py). Whatever fails, the shard serves on, and the next
  try waits.
* Stopping goes from the clients inwards: routers answer what is under way and exit, then the shards fsync
  and exit.
* No child outlives the supervisor, however it ends: the kernel kills them (Linux), and the end of the
  control channel stops them (everywhere). The children that write hold the directory's lock too, so a
  new server cannot open it before they are gone.

Signal handlers only enqueue; the loop acts. SIGTERM and SIGINT stop; the second one stops at once, unless
it is an echo: a wrapper or a service manager may pass on what the whole group has got already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imds import _kernel
from imds import config as configuration
from imds.config import Config, ConfigError
from imds.control import Channel, Message
from imds.datadir import DataDir, DataDirError
from imds.process import EXIT_REFUSED, Signals, ignore, start_logging
from imds.rewrites import Rewrites

MOST_DEATHS = 5
DEATHS_WINDOW = 60.0  # seconds
FIRST_PAUSE = 0.05  # seconds before a restart; doubles with each death in the window
LONGEST_PAUSE = 3.0
PATIENCE = 10.0  # seconds that each kind of process may take to stop before it is killed
ECHO = 1.0  # seconds after a stop signal in which another one is the same wish
LISTEN_BACKLOG = 1024
# Bytes of replies under way from a shard to a router, if the system allows. Not of requests: what is under
# way when a client ceases to read is answered all the same, and what that comes to the router has to hold.
REPLIES_BUFFER = 1 << 20

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}

READ = selectors.EVENT_READ

log = logging.getLogger("imds.supervisor")


class StartError(Exception):
    """The server cannot start; the text says why in one line."""


class Child:
    """One router or shard: the process, its channel, and what has become of its predecessors."""

    def __init__(self, role: str, index: int) -> None:
        self.role = role
        self.index = index
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.ready = False
        self.lost = False  # stays down
        self.restarts = -1
        self.start_at = 0.0  # when it is to be started, if it has no process
        self.deaths: deque[float] = deque()
        self.loaded: Message = {}  # a shard's last ready message

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    def start(self, init: dict[str, Any], keep: Sequence[int]) -> None:
        """Start the process with ``init`` as its standard input; it inherits the descriptors ``keep``."""
        self.channel, theirs = Channel.pair()
        script = str(Path(__file__).with_name("child.py"))
        command = [sys.executable, "-P", script, f"imds-{self.role}-{self.index}"]
        # Inherited by the child: a signal to the whole group waits until the child can tell what to do.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    pass_fds=[theirs.fileno(), *keep],
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(json.dumps({"role": self.role, **init}).encode())  # less than a pipe holds
        self.ready = False
        self.restarts += 1

    def pause(self, now: float) -> float | None:
        """Note a death; return the seconds to wait before the next start, or None to give up."""
        self.deaths.append(now)
        while now - self.deaths[0] > DEATHS_WINDOW:
            self.deaths.popleft()
        if len(self.deaths) > MOST_DEATHS:
            return None
        return float(min(FIRST_PAUSE * 2 ** (len(self.deaths) - 1), LONGEST_PAUSE))


class Supervisor:
    """One server. :meth:`run` returns its exit code."""

    def __init__(self, config: Config, directory: DataDir, listeners: list[list[socket.socket]]) -> None:
        self._config = config
        self._directory = directory
        self._listeners = listeners  # of each router
        self._shards = [Child("shard", index) for index in range(config.shards)]
        self._routers = [Child("router", index) for index in range(config.routers)]
        self._rewrites = Rewrites()
        self._selector = selectors.DefaultSelector()
        self._signals = Signals([*STOP_SIGNALS, signal.SIGCHLD])
        self._started = time.monotonic()
        self._announced = False
        self._stopping = False
        self._asked_to_stop: float | None = None  # when the first signal said so
        self._exit_code = 0

    def run(self) -> int:
        """Start everything, watch it until a signal or a failure ends it, stop everything."""
        self._selector.register(self._signals, READ)
        try:
            while not self._stopping:
                self._start_due()
                self._begin_rewrite()
                self._wait(self._until_next_start())
                self._announce()
            self._stop()
        finally:
            self._kill()
            self._selector.close()
            self._signals.close()
        return self._exit_code

    # -- starting ---------------------------------------------------------------------------------

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._shards + self._routers:
            if child.process is None and not child.lost and child.start_at <= now:
                (self._start_shard if child.role == "shard" else self._start_router)(child)

    def _until_next_start(self) -> float | None:
        now = time.monotonic()
        waits = [
            max(0.0, child.start_at - now)
            for child in self._shards + self._routers
            if child.process is None and not child.lost
        ]
        rewrite = self._rewrites.wait(now)
        if rewrite is not None:
            waits.append(rewrite)
        return min(waits, default=None)

    def _start_shard(self, child: Child) -> None:
        directory = self._directory
        init = {
            "config": configuration.to_json(self._config),
            "shard": child.index,
            "directory": str(directory.shard_dir(child.index)),
            "generation": directory.generation,
        }
        child.start(init, [directory.lock_fd])
        self._watch(child)
        for router in self._routers:
            self._connect(router, child)

    def _start_router(self, child: Child) -> None:
        slots = self._directory.slots
        listeners = self._listeners[child.index]
        init = {
            "config": configuration.to_json(self._config),
            "slots": slots.ranges(),
            "shards": slots.shards,
            "seed": slots.seed,
            "listeners": [listener.fileno() for listener in listeners],
            "number": child.index,
        }
        child.start(init, [listener.fileno() for listener in listeners])
        self._watch(child)
        for shard in self._shards:
            self._connect(child, shard)
            if shard.process is None:
                self._tell_down(child, shard, self._why_down(shard))

    def _watch(self, child: Child) -> None:
        self._selector.register(child.channel, READ, child)  # type: ignore[arg-type]

    @staticmethod
    def _connect(router: Child, shard: Child) -> None:
        """Give a router and a shard the two ends of a new stream, if both are there."""
        if router.channel is None or shard.channel is None:
            return
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with one, other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPLIES_BUFFER)
            shard.channel.send("link", (other.fileno(),), router=router.index)
            router.channel.send("link", (one.fileno(),), shard=shard.index, restarts=shard.restarts)

    @staticmethod
    def _why_down(shard: Child) -> str:
        return "it was given up, see the log" if shard.lost else "it is being restarted"

    @staticmethod
    def _tell_down(router: Child, shard: Child, reason: str) -> None:
        if router.channel is not None:
            router.channel.send("down", shard=shard.index, reason=reason, restarts=max(shard.restarts, 0))

    def _announce(self) -> None:
        """Print the ready line, once, when every shard has loaded or been given up."""
        if self._announced or self._stopping:
            return
        if not all(child.ready or child.lost for child in self._shards + self._routers):
            return
        self._announced = True
        serving = [shard for shard in self._shards if shard.ready]
        keys = sum(shard.loaded["keys"] for shard in serving)
        where = " and ".join(_name(listener) for listener in self._listeners[0])
        count = f"{len(serving)} of " if len(serving) < len(self._shards) else ""
        print(
            f"imds: ready on {where}, {count}{len(self._shards)} shards, {keys} keys loaded "
            f"in {time.monotonic() - self._started:.2f} s, pid {os.getpid()}",
            file=sys.stderr,
            flush=True,
        )

    # -- watching ---------------------------------------------------------------------------------

    def _wait(self, timeout: float | None) -> None:
        for key, _mask in self._selector.select(timeout):
            if isinstance(key.data, Child):
                self._on_control(key.data)
            else:
                self._on_signals(self._signals.take())

    def _on_control(self, child: Child) -> None:
        channel = child.channel
        if channel is None:
            return
        for message, fds in channel.receive():
            kind = message["kind"]
            if kind == "ready":
                child.ready = True
                child.loaded = message
                if child.role == "shard" and child.restarts:
                    log.info("%s is back: %d keys in %.2f s", child.name, message["keys"], message["seconds"])
            elif kind == "distrust":  # it has answered what nobody asked
                suspect = self._shards[message["shard"]]
                if suspect.process is not None:
                    suspect.process.kill()
            elif kind == "loading":
                part = 100 * message["done"] // max(message["total"], 1)
                log.info(
                    "%s: loading, %d %%, %d records, about %.0f s left",
                    *(child.name, part, message["records"], message["left"]),
                )
            elif kind == "configure":
                self._on_configure(child, message["changes"])
            elif kind == "ask":
                self._on_ask(child, message["number"], fds)
            elif kind == "answered":
                self._tell_answered(self._routers[message["router"]], message["number"], child, there=True)
            elif kind == "rewrite":
                self._rewrites.ask(child.index, time.monotonic(), at_once=message["at_once"])
            elif kind == "rewritten":
                self._on_rewritten(child, message["error"])
        if channel.closed:
            self._close_channel(child)

    def _on_configure(self, router: Child, changes: dict[str, Any]) -> None:
        """A router's client has changed options: for those who start later, and for all the others."""
        self._config = dataclasses.replace(self._config, **changes)
        for child in self._shards + self._routers:
            if child is not router and child.channel is not None:
                child.channel.send("configure", changes=changes)

    def _on_ask(self, router: Child, number: int, files: list[int]) -> None:
        """A router asks the others, by a file for each."""
        others = [other for other in self._routers if other is not router]
        for other, fd in zip(others, files, strict=True):
            there = other.channel is not None and other.channel.send(
                "ask", (fd,), router=router.index, number=number
            )
            if not there:
                self._tell_answered(router, number, other, there=False)
            os.close(fd)

    @staticmethod
    def _tell_answered(router: Child, number: int, other: Child, *, there: bool) -> None:
        if router.channel is not None:
            router.channel.send("answered", number=number, peer=other.index, there=there)

    def _close_channel(self, child: Child) -> None:
        if child.channel is not None:
            self._selector.unregister(child.channel)
            child.channel.close()
            child.channel = None
        if child.role == "shard":
            self._rewrites.forget(child.index)

    def _on_signals(self, signals: set[signal.Signals]) -> None:
        if signals & STOP_SIGNALS:
            now = time.monotonic()
            if self._asked_to_stop is None:
                self._asked_to_stop = now
                self._stopping = True
            elif now - self._asked_to_stop > ECHO:
                log.warning("second signal: stopping at once")
                self._exit_code = 1
                self._kill()
        self._reap()

    def _reap(self) -> None:
        for child in self._shards + self._routers:
            if child.process is not None and child.process.poll() is not None:
                self._on_death(child, child.process.returncode)

    def _on_death(self, child: Child, code: int) -> None:
        if child.channel is not None:
            self._on_control(child)  # its last words
        self._close_channel(child)
        child.process = None
        child.ready = False
        if self._stopping:
            if code:
                log.error("%s %s while stopping", child.name, _describe(code))
                self._exit_code = 1
            return
        now = time.monotonic()
        pause = child.pause(now)
        if child.role == "shard" and code == EXIT_REFUSED:
            child.lost = True
            log.error("%s stays down: it refused its log; the others serve", child.name)
        elif pause is not None:
            child.start_at = now + pause
            log.error("%s %s; restarting it in %.2f s", child.name, _describe(code), pause)
        elif child.role == "shard":
            child.lost = True
            log.error(
                "%s %s, the %dth time in %.0f s: it stays down, the others serve",
                *(child.name, _describe(code), len(child.deaths), DEATHS_WINDOW),
            )
        else:
            log.critical("%s %s, too often to go on: stopping", child.name, _describe(code))
            self._exit_code, self._stopping = 1, True
        if child.role == "shard":
            for router in self._routers:
                self._tell_down(router, child, self._why_down(child))
            if all(shard.lost for shard in self._shards):
                log.critical("no shard is left: stopping")
                self._exit_code, self._stopping = 1, True

    # -- rewriting logs ---------------------------------------------------------------------------

    def _begin_rewrite(self) -> None:
        """Have the next shard that waits begin, when it may."""
        able = {shard.index for shard in self._shards if shard.ready and shard.channel is not None}
        index = self._rewrites.start(time.monotonic(), able)
        if index is not None:
            shard = self._shards[index]
            if shard.channel is None or not shard.channel.send("rewrite"):
                self._on_rewritten(shard, "the shard does not listen")

    def _on_rewritten(self, shard: Child, error: str) -> None:
        if self._rewrites.running != shard.index:
            return
        if error:
            pause = self._rewrites.failed(time.monotonic())
            log.error("%s: its log was not rewritten: %s; the next try in %.0f s", shard.name, error, pause)
        else:
            self._rewrites.succeeded()
            log.info("%s: its log was rewritten", shard.name)

    # -- stopping ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        log.info("stopping")
        for children, word in ((self._routers, "drain"), (self._shards, "stop")):
            for child in children:
                if child.channel is not None:
                    child.channel.send(word)
            deadline = time.monotonic() + PATIENCE
            while any(child.process is not None for child in children):
                left = deadline - time.monotonic()
                if left <= 0:
                    log.error("some processes did not stop within %.0f s", PATIENCE)
                    self._exit_code = 1
                    self._kill()
                    return
                self._wait(left)
        log.info("stopped")

    def _kill(self) -> None:
        for child in self._shards + self._routers:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
                child.process = None
            if child.channel is not None:
                child.channel.close()
                child.channel = None


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _name(listener: socket.socket) -> str:
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if listener.family == socket.AF_INET6 else address[0]
    return f"{host}:{address[1]}"


def _bind_tcp(config: Config) -> list[socket.socket]:
    """Return one listening socket for each router. Raises StartError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"cannot listen on {config.host}: {error.strerror or error}") from None
    family, kind, proto, _canonical, address = found[0]
    bound: list[socket.socket] = []
    try:
        # Sockets that share a port would also share it with another server of the same user: a first
        # one that does not share makes sure that the port is free.
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            address = probe.getsockname()
            if config.routers == 1:
                bound.append(probe.dup())
        while len(bound) < config.routers:
            sock = socket.socket(family, kind, proto)
            bound.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(address)
        for sock in bound:
            sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        for sock in bound:
            sock.close()
        raise StartError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    return bound


def _bind_unix(path: str) -> socket.socket:
    """Return a listening socket at ``path``, in place of one that a killed server left. Raises StartError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.connect(path)
            except ConnectionRefusedError:
                Path(path).unlink()
    except OSError:
        pass  # nothing there; anything else, bind will name
    old = os.umask(0o177)  # the data directory is for this user only, and so is its socket
    try:
        sock.bind(path)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot listen on unix:{path}: {error.strerror}") from None
    finally:
        os.umask(old)
    return sock


def listen(config: Config) -> list[list[socket.socket]]:
    """Return the listening sockets of each router, all non-blocking. Raises StartError.

    They listen at once, though nobody accepts before the data is ready: a socket that is only bound keeps
    neither a port nor a path from another server. Who connects early waits in the backlog.
    """
    listeners = [[sock] for sock in _bind_tcp(config)]
    if config.unix:
        unix = _bind_unix(config.unix)
        for own in listeners:
            own.append(unix if own is listeners[0] else unix.dup())
    for own in listeners:
        for sock in own:
            sock.setblocking(False)
    return listeners


def _interrupt(*_: object) -> None:
    ignore(STOP_SIGNALS)  # an echo may not disturb the cleaning up
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``imds-router``; return its exit code."""
    try:
        config = configuration.load(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        print(f"imds-router: {error}", file=sys.stderr)
        return 2
    start_logging("supervisor", config.log_level)
    if _kernel.MISSING:
        log.warning("the compiled kernels were not built: the Python ones run, at a fraction of the speed")
    for number in STOP_SIGNALS:  # until the supervisor's loop takes them
        signal.signal(number, _interrupt)
    listeners: list[list[socket.socket]] = []
    directory: DataDir | None = None
    bound_unix = False
    try:
        listeners = listen(config)
        config = dataclasses.replace(config, port=listeners[0][0].getsockname()[1])  # what it is, if it was 0
        bound_unix = bool(config.unix)
        directory = DataDir.open(Path(config.dir), config.shards)
        if directory.shards != config.shards:
            from imds.reshard import reshard  # and with it the shards' code, which nothing else here needs

            reshard(directory, config.shards)
        return Supervisor(config, directory, listeners).run()
    except (StartError, DataDirError) as error:
        print(f"imds-router: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("imds-router: stopped while starting", file=sys.stderr)
        return 0
    finally:
        for own in listeners:
            for sock in own:
                sock.close()
        if bound_unix:
            Path(config.unix).unlink(missing_ok=True)
        if directory is not None:
            directory.close()
        ignore(STOP_SIGNALS)  # at its end Python would let an echo kill the process


if __name__ == "__main__":
    sys.exit(main())
