"""A disk in memory that forgets whatever it has not promised to keep.

The disk knows two things of each file: what a process reads now, and what may be found after a power cut::

    file        now   [ sector | sector | sector ]        each sector, and the length, with a list of the
                cut     v0 v1    v0       v0 v1 v2         versions that may be on the platter, oldest first

    directory   now   {name: file}
                cut   {name: file} as of the last fsync_dir, then the operations since, each kept or not

What is promised, and nothing beyond it:

* ``fdatasync`` and ``fsync``: the sectors and the length at the *beginning* of the call. Not the file's name.
* ``fsync_dir``: the names of that one directory. Not what the files hold.
* A sector of 512 bytes is written whole or not at all; sectors, lengths and names in any order whatever.
  Where the length was kept and the sector was not, zeros are found, or what some other file left there.
* A rename never loses the file: at worst it is found under neither new name, or under both.
* After a failed sync the data may never reach the disk, although it is still read and later syncs succeed.

A death of the process (:meth:`SimDisk.killed`) is not a power cut: all that was written stays.

Each operation calls ``before`` first and, when it changed something, ``after``: that is where a test crashes,
fails or looks. For a sync ``after`` is called when it has begun and nothing is promised yet, ``during`` while
it takes its time, and ``done`` when all of it is promised.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imds.protocol import Buffer
from imds.storage import Storage

SECTOR = 512
ROOT = Path("/")


class SimCrash(BaseException):
    """The machine stopped here. No error that the code under test may handle."""


class File:
    """One file's bytes now, and what else may be found of them."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lengths: list[int] = []  # that may be found instead of the present one, oldest first
        self.older: dict[int, list[bytes]] = {}  # sector: contents that may be found instead, oldest first
        self.failed: set[int] = set()  # sectors that a failed sync has made the system forget to write
        self.lock: int | None = None  # the descriptor that holds it

    def sector(self, number: int) -> bytes:
        """Return what a sector holds now, padded by zeros."""
        return bytes(self.data[number * SECTOR : (number + 1) * SECTOR]).ljust(SECTOR, b"\0")

    def _touch(self, start: int, end: int) -> None:
        for number in range(start // SECTOR, -(-end // SECTOR)):
            self.older.setdefault(number, []).append(self.sector(number))
            self.failed.discard(number)

    def write(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        self._touch(min(offset, len(self.data)), end)
        if end > len(self.data):
            self.lengths.append(len(self.data))
            self.data.extend(bytes(end - len(self.data)))
        self.data[offset:end] = data

    def truncate(self, size: int) -> None:
        old = len(self.data)
        if size == old:
            return
        self._touch(min(size, old), max(size, old))
        self.lengths.append(old)
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def begin_sync(self) -> tuple[int, dict[int, int]]:
        """Return what a sync that begins now will have promised: see :meth:`end_sync`."""
        covered = {n: len(older) for n, older in self.older.items() if n not in self.failed}
        return len(self.lengths), covered

    def end_sync(self, begun: tuple[int, dict[int, int]]) -> None:
        """Promise what was there when the sync began; what came meanwhile may be found or not."""
        lengths, sectors = begun
        del self.lengths[:lengths]
        for number, count in sectors.items():
            del self.older[number][:count]
            if not self.older[number]:
                del self.older[number]

    def fail_sync(self) -> None:
        """The sync failed: what it should have covered may be lost, and no later sync covers it."""
        self.failed.update(self.older)

    def promised(self) -> bytes:
        """Return the bytes that any crash leaves; meaningful where nothing is unsynced."""
        assert not self.older
        assert not self.lengths
        return bytes(self.data)

    def after_crash(self, rng: random.Random, keep: float, litter: list[bytes]) -> File:
        """Return one of the files that may be found."""
        found = File()
        length = len(self.data)
        if self.lengths and rng.random() >= keep:
            length = rng.choice(self.lengths)
            low, high = min(length, len(self.data)), max(length, len(self.data))
            if high - low > SECTOR and rng.random() < 0.5:  # a part of it was written
                length = min(high, (rng.randrange(low, high) // SECTOR + 1) * SECTOR)
        kept = bytearray(self.data)
        for number, older in self.older.items():
            if rng.random() >= keep:
                content = rng.choice(older)
                if litter and not any(content) and rng.random() < 0.25:
                    content = rng.choice(litter)
                end = (number + 1) * SECTOR
                kept.extend(bytes(max(0, end - len(kept))))
                kept[end - SECTOR : end] = content
        kept.extend(bytes(max(0, length - len(kept))))
        found.data = kept[:length]
        return found


class Directory:
    """One directory's names now, and as they were last promised."""

    def __init__(self) -> None:
        self.now: dict[str, File | Directory] = {}
        self.kept: dict[str, File | Directory] = {}


class Change:
    """One change of one name: to a file or directory, or to nothing. ``after``: kept only if that is, too."""

    def __init__(
        self, directory: Directory, name: str, node: File | Directory | None, after: Change | None = None
    ) -> None:
        self.directory = directory
        self.name = name
        self.node = node
        self.after = after

    def keep(self) -> None:
        names = self.directory.kept
        if self.node is None:
            names.pop(self.name, None)
        else:
            names[self.name] = self.node


class _Open:
    def __init__(self, path: Path, file: File, flags: int) -> None:
        self.path = path
        self.file = file
        self.flags = flags
        self.position = 0


# What the code under test calls, by what it does.
READS = ("close", "lock", "size", "mode", "listdir", "read", "mapped")


class SimDisk(Storage):
    """A whole file system; ``/`` is there and empty."""

    direct = False  # unless a simulation takes pwrite(2) over

    def __init__(self) -> None:
        self.root = Directory()
        self.changes: list[Change] = []  # of names, since they were last promised; oldest first
        self.litter: list[bytes] = []  # sectors that files have given back
        self.operations = 0
        self.mutations = 0
        self.crash_at: int | None = None  # the number of the mutation that SimCrash stops at
        self.crashed = False
        self.before: Callable[[str, Path], None] = lambda name, path: None
        self.after: Callable[[str, Path], None] = lambda name, path: None
        self.during: Callable[[str, Path], None] = lambda name, path: None
        self.done: Callable[[str, Path], None] = lambda name, path: None
        self.short: int | None = None  # bytes that the next write takes at most
        self.clock: Callable[[], float] = lambda: 1000.0  # what time it is: copies begin at this time
        self._open: dict[int, _Open] = {}
        self._next = 1 << 20  # no descriptor of the system's is that large

    # -- crashes ----------------------------------------------------------------------------------

    def crash(self, rng: random.Random) -> SimDisk:
        """Return a disk that may be found after a power cut now. This one is not changed."""
        keep = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0, rng.random()))
        names = rng.choice((0.0, 0.5, 1.0, keep))
        wanted: set[Change] = set()
        for change in self.changes:
            if rng.random() < names and (change.after is None or change.after in wanted):
                wanted.add(change)
        return self._copy(lambda file: file.after_crash(rng, keep, self.litter), wanted)

    def killed(self) -> SimDisk:
        """Return the disk that a new process finds when all that ran now are dead. This one is not changed.

        What had not been synced still is not.
        """

        def same(file: File) -> File:
            copy = File()
            copy.data = bytearray(file.data)
            copy.lengths = list(file.lengths)
            copy.older = {number: list(older) for number, older in file.older.items()}
            copy.failed = set(file.failed)
            return copy

        return self._copy(same, None)

    def _copy(self, copy_file: Callable[[File], File], wanted: set[Change] | None) -> SimDisk:
        """Return a copy; with ``wanted`` the names as promised and these changes, else all as it is now."""
        found = SimDisk()
        found.litter = self.litter[-64:]
        time = self.clock()
        found.clock = lambda: time
        copies: dict[File | Directory, File | Directory] = {}

        def copied(node: File | Directory) -> File | Directory:
            if node not in copies:
                if isinstance(node, File):
                    copies[node] = copy_file(node)
                else:
                    copies[node] = twin = Directory()
                    kept = dict(node.kept)
                    for change in self.changes:
                        if wanted is not None and change.directory is node and change in wanted:
                            kept.pop(change.name, None)
                            if change.node is not None:
                                kept[change.name] = change.node
                    twin.kept = {name: copied(child) for name, child in kept.items()}
                    twin.now = (
                        dict(twin.kept)
                        if wanted is not None
                        else {name: copied(child) for name, child in node.now.items()}
                    )
            return copies[node]

        root = copied(self.root)
        assert isinstance(root, Directory)
        found.root = root
        if wanted is None:
            twins: dict[Change, Change] = {}
            for change in self.changes:
                directory = copied(change.directory)
                assert isinstance(directory, Directory)
                node = None if change.node is None else copied(change.node)
                after = None if change.after is None else twins.get(change.after)
                twins[change] = Change(directory, change.name, node, after)
            found.changes = list(twins.values())
        return found

    def files(self) -> Iterator[tuple[Path, File]]:
        """Yield every file with its path, as names are now."""

        def walk(path: Path, directory: Directory) -> Iterator[tuple[Path, File]]:
            for name, node in sorted(directory.now.items()):
                if isinstance(node, File):
                    yield path / name, node
                else:
                    yield from walk(path / name, node)

        return walk(ROOT, self.root)

    def file(self, path: Path) -> File:
        """Return the file of that path."""
        node = self._find(path)
        assert isinstance(node, File), path
        return node

    # -- what each operation begins and ends with -------------------------------------------------

    def _begin(self, name: str, path: Path) -> None:
        if self.crashed:
            raise SimCrash("the machine has stopped")
        self.operations += 1
        self.before(name, path)
        if self.crashed:  # while we waited
            raise SimCrash("the machine has stopped")

    def _changed(self, name: str, path: Path) -> None:
        self.mutations += 1
        self.after(name, path)
        if self.mutations == self.crash_at:
            self.crashed = True
        if self.crashed:
            raise SimCrash(f"stopped at mutation {self.mutations}, {name} {path}")

    def _find(self, path: Path) -> File | Directory:
        node: File | Directory = self.root
        for part in path.absolute().parts[1:]:
            if not isinstance(node, Directory):
                raise _error(errno.ENOTDIR, path)
            if part not in node.now:
                raise _error(errno.ENOENT, path)
            node = node.now[part]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._find(path)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return node

    def _set(self, path: Path, node: File | Directory | None, after: Change | None = None) -> Change:
        directory = self._directory(path.parent)
        old = directory.now.pop(path.name, None)
        if isinstance(old, File) and old is not node:
            self._give_back(old)
        if node is not None:
            directory.now[path.name] = node
        change = Change(directory, path.name, node, after)
        self.changes.append(change)
        return change

    def _give_back(self, file: File) -> None:
        for number in range(0, -(-len(file.data) // SECTOR), 3):
            self.litter.append(file.sector(number))
        del self.litter[:-64]

    # -- Storage ----------------------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> int:
        self._begin("open", path)
        directory = self._directory(path.parent)
        node = directory.now.get(path.name)
        changed = False
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            node = File()
            self._set(path, node)
            changed = True
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        elif isinstance(node, Directory):
            raise _error(errno.EISDIR, path)
        if flags & os.O_TRUNC and node.data:
            self._give_back(node)
            node.truncate(0)
            changed = True
        if changed:
            self._changed("open", path)
        self._next += 1
        self._open[self._next] = _Open(path, node, flags)
        return self._next

    def close(self, fd: int) -> None:
        one = self._of(fd)
        try:
            if not self.crashed:  # what unwinds may close, and only that
                self._begin("close", one.path)
        finally:  # a close that fails has closed
            del self._open[fd]
            if one.file.lock == fd:
                one.file.lock = None

    def holds(self, fd: int) -> bool:
        """Whether a descriptor is one of this disk."""
        return fd in self._open

    def _of(self, fd: int) -> _Open:
        if fd not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open[fd]

    def read(self, fd: int, size: int, offset: int) -> bytes:
        one = self._of(fd)
        self._begin("read", one.path)
        return bytes(one.file.data[offset : offset + size])

    @contextmanager
    def mapped(self, path: Path) -> Iterator[bytes]:
        self._begin("mapped", path)
        yield bytes(self.file(path).data)

    def write(self, fd: int, data: Buffer) -> int:
        one = self._of(fd)
        if one.flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._begin("write", one.path)
        took, self.short = len(data) if self.short is None else min(self.short, len(data)), None
        if one.flags & os.O_APPEND:
            one.position = len(one.file.data)
        one.file.write(one.position, memoryview(data)[:took])
        one.position += took
        self._changed("write", one.path)
        return took

    def write_at(self, fd: int, data: Buffer, offset: int) -> int:
        one = self._of(fd)
        assert not one.flags & os.O_APPEND, "Linux would append it"
        self._begin("write_at", one.path)
        took, self.short = len(data) if self.short is None else min(self.short, len(data)), None
        one.file.write(offset, memoryview(data)[:took])
        self._changed("write_at", one.path)
        return took

    def truncate(self, fd: int, size: int) -> None:
        one = self._of(fd)
        self._begin("truncate", one.path)
        one.file.truncate(size)
        self._changed("truncate", one.path)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def _sync(self, name: str, fd: int) -> None:
        one = self._of(fd)
        try:
            self._begin(name, one.path)
            begun = one.file.begin_sync()
            self._changed(name, one.path)
        except OSError:
            one.file.fail_sync()
            raise
        self.during(name, one.path)
        if self.crashed:
            raise SimCrash("the machine has stopped")
        one.file.end_sync(begun)
        self.done(name, one.path)

    def fsync_dir(self, path: Path) -> None:
        self._begin("fsync_dir", path)
        directory = self._directory(path)
        self._changed("fsync_dir", path)
        due: set[Change] = set()
        for change in self.changes:
            if change.directory is directory:
                due.add(change)
                if change.after is not None:
                    due.add(change.after)
        for change in self.changes:
            if change in due:
                change.keep()
        self.changes = [change for change in self.changes if change not in due]

    def lock(self, fd: int) -> bool:
        one = self._of(fd)
        self._begin("lock", one.path)
        if one.file.lock not in (None, fd):
            return False
        one.file.lock = fd
        return True

    def size(self, file: int | Path) -> int:
        if isinstance(file, int):
            one = self._of(file)
            self._begin("size", one.path)
            return len(one.file.data)
        self._begin("size", file)
        node = self._find(file)
        return len(node.data) if isinstance(node, File) else 0

    def mode(self, path: Path) -> int:
        self._begin("mode", path)
        self._find(path)
        return 0o700

    def chmod(self, path: Path, mode: int) -> None:
        self._begin("chmod", path)
        self._find(path)

    def listdir(self, path: Path) -> list[str]:
        self._begin("listdir", path)
        return sorted(self._directory(path).now)

    def mkdir(self, path: Path) -> None:
        self._begin("mkdir", path)
        if path.name in self._directory(path.parent).now or path.absolute() == ROOT:
            raise _error(errno.EEXIST, path)
        self._set(path, Directory())
        self._changed("mkdir", path)

    def rmdir(self, path: Path) -> None:
        self._begin("rmdir", path)
        if self._directory(path).now:
            raise _error(errno.ENOTEMPTY, path)
        self._set(path, None)
        self._changed("rmdir", path)

    def unlink(self, path: Path) -> None:
        self._begin("unlink", path)
        if isinstance(self._find(path), Directory):
            raise _error(errno.EISDIR, path)
        self._set(path, None)
        self._changed("unlink", path)

    def rename(self, old: Path, new: Path) -> None:
        self._begin("rename", old)
        node = self._find(old)
        if isinstance(self._directory(new.parent).now.get(new.name), Directory):
            raise _error(errno.EISDIR, new)
        if old.absolute() != new.absolute():
            self._set(old, None, self._set(new, node))
        self._changed("rename", new)


def _error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


# -- faults ---------------------------------------------------------------------------------------


class Fault:
    """Make an operation of a disk fail. :meth:`attach` it to the disk, and to the same one after a restart.

    ``at``: which operation, counted from 1 on. ``kind``: an errno's name, or ``short`` (a write takes less
    than it was given, but something; other operations are left alone). ``forever``: later operations of the
    same name fail too. ``late``: the operation takes place, and the error is returned all the same.
    """

    def __init__(self, at: int, kind: str, *, forever: bool = False, late: bool = False) -> None:
        self.at = at
        self.kind = kind
        self.forever = forever
        self.late = late
        self.hit: str | None = None  # the name of the operation that it befell
        self.where: Path | None = None
        self.hits = 0
        self.off = False
        self._seen = 0
        self._due = False

    def attach(self, disk: SimDisk) -> None:
        """Be in force on ``disk``, after whatever its hooks do already."""
        before, after = disk.before, disk.after

        def befall(name: str, path: Path) -> None:
            before(name, path)
            self._befall(disk, name, path)

        def report(name: str, path: Path) -> None:
            after(name, path)
            if self._due:
                self._due = False
                self._fail(path)

        disk.before, disk.after = befall, report

    def _befall(self, disk: SimDisk, name: str, path: Path) -> None:
        if self.off:
            return
        self._seen += 1
        if self._seen == self.at:
            self.hit, self.where = name, path
        elif self.hit is None or not self.forever or name != self.hit:
            return
        self.hits += 1
        if self.kind == "short":
            if name in ("write", "write_at"):
                disk.short = 1 + (self._seen * 7) % 40
        elif self.late and name not in READS:
            self._due = True
        else:
            self._fail(path)

    def _fail(self, path: Path) -> None:
        raise _error(getattr(errno, self.kind), path)
