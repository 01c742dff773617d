"""Every operation on files that must survive a crash, in one place.

The log, the data directory and its rebuilding call the operating system only through this class, so that
a test can stand in for the disk: fail one operation, stop at it, or forget what was never synced.
Methods are thin: they raise OSError as the system call does, and EINTR is Python's to retry.
"""

# One method is one system call; pathlib would hide which.
# ruff: noqa: PTH101, PTH102, PTH105, PTH106, PTH108, PTH116, PTH208

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imds.protocol import Buffer

Mapped = mmap.mmap | bytes  # what is to be searched and looked into

_PART = 1 << 20  # bytes copied in one go

# Linux writes the data and what is needed to find it; elsewhere there is only the larger call.
_fdatasync = getattr(os, "fdatasync", os.fsync)
# On macOS fsync stops at the drive's cache, and only this reaches the platter.
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def random_seed() -> int:
    """Return 64 bits that nobody can guess; as ``secrets.randbits(64)``, which loads OpenSSL first."""
    return int.from_bytes(os.urandom(8))


class Storage:
    """The real disk."""

    @property
    def direct(self) -> bool:
        """Whether pwrite(2) does what :meth:`write_at` does: nobody stands in for the disk."""
        return type(self) is Storage

    def open(self, path: Path, flags: int) -> int:
        """Return a descriptor of ``path``; a file made by it is its owner's alone."""
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        """Close ``fd``."""
        os.close(fd)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Return at most ``size`` bytes at ``offset``; none means the end of the file."""
        return os.pread(fd, size, offset)

    @contextmanager
    def mapped(self, path: Path) -> Iterator[Mapped]:
        """Yield the bytes of a file, to be read in place; with ``with``."""
        fd = os.open(path, os.O_RDONLY)
        try:
            if not os.fstat(fd).st_size:  # cannot be mapped
                yield b""
                return
            with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as found:
                yield found
        finally:
            os.close(fd)

    def write(self, fd: int, data: Buffer) -> int:
        """Write the start of ``data`` and return how many bytes were taken."""
        return os.write(fd, data)

    def write_at(self, fd: int, data: Buffer, offset: int) -> int:
        """The same at ``offset``, for a file that was not opened to append."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Make the file ``size`` bytes long."""
        os.ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        """Return when the file's bytes and length are on the disk."""
        if _FULL_SYNC is None:
            _fdatasync(fd)
        else:
            fcntl.fcntl(fd, _FULL_SYNC)

    def fsync(self, fd: int) -> None:
        """Return when all of the file is on the disk."""
        if _FULL_SYNC is None:
            os.fsync(fd)
        else:
            fcntl.fcntl(fd, _FULL_SYNC)

    def fsync_dir(self, path: Path) -> None:
        """Return when the names in the directory ``path`` are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, fd: int) -> bool:
        """Try to take the exclusive lock of an open file, without waiting; return whether that worked.

        The lock belongs to the open file: children that inherit the descriptor hold it too, until the
        last of them has closed it or is gone.
        """
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.set_inheritable(fd, True)
        return True

    def size(self, file: int | Path) -> int:
        """Return the length in bytes of an open file or of a path."""
        return os.stat(file).st_size

    def mode(self, path: Path) -> int:
        """Return the permission bits of ``path``."""
        return os.stat(path).st_mode & 0o7777

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits of ``path``."""
        os.chmod(path, mode)

    def listdir(self, path: Path) -> list[str]:
        """Return the names in a directory, sorted."""
        return sorted(os.listdir(path))

    def mkdir(self, path: Path) -> None:
        """Make a directory that only its owner may enter."""
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def rename(self, old: Path, new: Path) -> None:
        """Give ``old`` the name ``new``, in place of whatever file had it."""
        os.replace(old, new)


class UntouchedStorage(Storage):
    """The real disk, of which nothing is changed: what works on it believes that it has done so.

    ``changes`` says what would have been removed or cut. What would have been written can not be read.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[str, Path]] = []
        self._paths: dict[int, Path] = {}

    def open(self, path: Path, flags: int) -> int:
        """Open what is there to read; what is to be made is nowhere."""
        try:
            if flags & os.O_EXCL:
                raise FileNotFoundError
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            fd = os.open(os.devnull, os.O_RDWR)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: Buffer) -> int:
        """Take it all."""
        return len(data)

    def write_at(self, fd: int, data: Buffer, offset: int) -> int:
        """Take it all."""
        return len(data)

    def lock(self, fd: int) -> bool:
        """Take the lock of what is there."""
        return os.fstat(fd).st_rdev != 0 or super().lock(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Note what would be cut."""
        self.changes.append(("cut", self._paths[fd]))

    def fdatasync(self, fd: int) -> None:
        """There is nothing to sync."""

    def fsync(self, fd: int) -> None:
        """There is nothing to sync."""

    def fsync_dir(self, path: Path) -> None:
        """There is nothing to sync."""

    def chmod(self, path: Path, mode: int) -> None:
        """Leave it."""

    def mkdir(self, path: Path) -> None:
        """Leave it."""

    def rmdir(self, path: Path) -> None:
        """Leave it."""

    def unlink(self, path: Path) -> None:
        """Note what would be removed."""
        self.changes.append(("removed", path))

    def rename(self, old: Path, new: Path) -> None:
        """Leave it."""


def exists(storage: Storage, path: Path) -> bool:
    """Return whether there is a file or a directory ``path``."""
    try:
        storage.mode(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_file(storage: Storage, path: Path) -> bytes:
    """Return all that is in a file, which is small."""
    fd = storage.open(path, os.O_RDONLY)
    try:
        return storage.read(fd, storage.size(fd), 0)
    finally:
        storage.close(fd)


def remove_tree(storage: Storage, path: Path) -> None:
    """Remove a directory with all that is in it."""
    for name in storage.listdir(path):
        try:
            remove_tree(storage, path / name)
        except NotADirectoryError:
            storage.unlink(path / name)
    storage.rmdir(path)


def write_all(storage: Storage, fd: int, data: Buffer) -> None:
    """Write all of ``data``, however many calls that takes. Raises OSError; some of it may be written."""
    _write_all(lambda rest, _done: storage.write(fd, rest), data)


def write_all_at(storage: Storage, fd: int, data: Buffer, offset: int) -> None:
    """The same at ``offset``."""
    _write_all(lambda rest, done: storage.write_at(fd, rest, offset + done), data)


def _write_all(write: Callable[[Buffer, int], int], data: Buffer) -> None:
    done = write(data, 0)
    if done == len(data):
        return
    view = memoryview(data)
    while done < len(view):
        took = write(view[done:], done)
        if not took:
            raise OSError(errno.EIO, "write took nothing")
        done += took


def replace_file(storage: Storage, path: Path, data: Buffer, create: int = os.O_EXCL) -> None:
    """Make ``data`` the content of ``path`` at one go, by way of a file ``.new``, made with flag ``create``.

    Raises OSError; then the old content or the new one is in force. After it the new one is on the disk, name
    and all.
    """
    new = path.with_name(f"{path.name}.new")
    fd = storage.open(new, os.O_WRONLY | os.O_CREAT | create)
    try:
        write_all(storage, fd, data)
        storage.fsync(fd)
    finally:
        storage.close(fd)
    storage.rename(new, path)
    storage.fsync_dir(path.parent)


def copy_file(storage: Storage, source: Path, target: Path, size: int, step: Callable[[int], object]) -> None:
    """Copy the first ``size`` bytes of a file to a new one, synced; give ``step`` the bytes of each part.

    Raises OSError, also where the source is shorter. The new name is safe when its directory is synced.
    """
    fd = storage.open(source, os.O_RDONLY)
    try:
        copy_open(storage, fd, target, size, step)
    finally:
        storage.close(fd)


def copy_open(storage: Storage, fd: int, target: Path, size: int, step: Callable[[int], object]) -> None:
    """The same from an open file."""
    out = storage.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        done = 0
        while done < size:
            data = storage.read(fd, min(_PART, size - done), done)
            if not data:
                raise OSError(errno.EIO, f"ends at byte {done}, expected {size}")
            write_all(storage, out, data)
            done += len(data)
            step(len(data))
        storage.fsync(out)
    finally:
        storage.close(out)
