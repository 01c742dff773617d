"""Disks that fail: at one operation, or from one operation on as in a crash; and one that never syncs."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

from imds.storage import Storage


class Crash(Exception):
    """The machine stopped here."""


class FastStorage(Storage):
    """The real files without the waiting: for tests that look at bytes, not at durability."""

    def fsync(self, fd):
        pass

    def fdatasync(self, fd):
        pass

    def fsync_dir(self, path):
        pass


class TracedStorage(FastStorage):
    """Notes every operation as (name, path) and calls :meth:`before` with its number first."""

    def __init__(self):
        self.calls = []
        self.paths = {}  # of open descriptors

    def before(self, number, name, args):
        pass

    def release(self):
        """Close what a crash left open, as the end of the process would."""
        for fd in self.paths:
            os.close(fd)
        self.paths.clear()


def _traced(name, plain):
    def call(self, *args):
        where = args[0] if isinstance(args[0], Path) else self.paths[args[0]]
        self.calls.append((name, where))
        self.before(len(self.calls), name, args)
        result = plain(self, *args)
        if name == "open":
            self.paths[result] = args[0]
        elif name == "close":
            del self.paths[args[0]]
        return result

    return call


OPERATIONS = [name for name, member in inspect.getmembers(Storage, inspect.isfunction) if name[0] != "_"]
for _name in OPERATIONS:
    setattr(TracedStorage, _name, _traced(_name, getattr(FastStorage, _name)))


class FailingStorage(TracedStorage):
    """Raises ``error`` at operation number ``at``; a Crash at that and every later one.

    A write that is hit has half of its bytes in the file.
    """

    def __init__(self, at, error=None):
        super().__init__()
        self.at = at
        self.error = error

    def before(self, number, name, args):
        if number == self.at if self.error else number >= self.at:
            if name in ("write", "write_at") and number == self.at:
                getattr(FastStorage, name)(self, args[0], args[1][: len(args[1]) // 2], *args[2:])
            if name == "close":
                os.close(args[0])
                del self.paths[args[0]]
            raise self.error or Crash(f"operation {number}, {name}")
