"""What every process of the server does the same way: logging, signals, scheduling, limits."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable

# Exit codes of a shard that the supervisor knows.
EXIT_REFUSED = 3  # the log is damaged: starting again would not help
EXIT_DISK = 4  # the disk failed in a way that only a fresh start can repair

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Formatter(logging.Formatter):
    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = "%s.%03d"


def start_logging(name: str, level: str) -> None:
    """Log to stderr as this process's ``name``, from ``level`` upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"%(asctime)s {name}[{os.getpid()}] %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def ignore(signals: Iterable[signal.Signals]) -> None:
    """Do nothing when one of ``signals`` comes."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


def resident_bytes() -> int:
    """Return how much memory this process has."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        import psutil  # here, as it would take 30 ms of every start

        return psutil.Process().memory_info().rss


class Signals:
    """Signals as something to select on: the handler only enqueues, the loop acts.

    ``fileno()`` becomes readable when one of ``watched`` has come; :meth:`take` returns which.
    """

    def __init__(self, watched: Iterable[signal.Signals], ignored: Iterable[signal.Signals] = ()) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._watched = set(watched)
        # In this order no signal is lost: not one that comes meanwhile, nor one that waits, blocked.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._watched:
            signal.signal(number, lambda *_: None)
        ignore(ignored)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._watched)

    def fileno(self) -> int:
        return self._read.fileno()

    def take(self) -> set[signal.Signals]:
        """Return the watched signals that have come since the last call."""
        try:
            numbers = self._read.recv(4096)
        except BlockingIOError:
            return set()
        return {signal.Signals(number) for number in numbers} & self._watched

    def close(self) -> None:
        """Give the descriptors back; signals that come later are lost."""
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent process ends, however stuck it then is.

    Linux only; elsewhere the end of the control channel is what stops a child.
    """
    if sys.platform == "linux":
        import ctypes  # which takes its time, and the supervisor has no use for it

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)


def set_schedule(policy: str) -> None:
    """Run under SCHED_BATCH where ``policy`` is ``batch`` and the system has it.

    A batch process does not preempt whoever woke it, so more requests gather for each of its wake-ups.
    """
    if policy == "batch" and hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def raise_descriptor_limit(wanted: int) -> int:
    """Raise this process's limit of open files towards ``wanted``; return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
