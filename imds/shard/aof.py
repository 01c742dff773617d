"""The append-only file of one shard.

::

    shard-000/00000001.aof     segment 1: closed segments, then the one that grows
              00000002.aof     segment 2, whose first record follows the last of segment 1
              00000002.aof.torn-4711     what a crash left half-written at byte 4711, kept for a look

    segment  +--------+--------+-------+------------+------+----------+--------+----------+----------+
             | magic  | format | shard | generation | seed | sequence | number | reserved | checksum |
             +--------+--------+-------+------------+------+----------+--------+----------+----------+
              8 bytes    u32      u32       u64        u64      u64       u64       u64        u64
             followed by records (imds/shard/record.py) back to back, to the end of the file,
             and between them now and then

    mark     +----------+------------+----------+
             | checksum | 0xFFFFFFFF | position |    all of the segment before ``position`` is on the disk
             +----------+------------+----------+
                 u64         u32         u64         where a record has its length and its number

All integers are big-endian and unsigned. ``seed`` is random and seeds the checksums of the segment's
records and marks; ``sequence`` is the number of its first record; the header's ``checksum`` is xxh64 of the
bytes before it, a mark's is made as a record's.

What always holds:

* A segment's name is on the disk, and so is its header, before its first record is written.
* Between two calls the last segment ends at the end of a record. An append that fails takes back what it
  wrote; when even that fails, the log is broken and takes nothing more.
* Sequence numbers start at 1 and rise by one through all segments.
* A failed sync is final: the kernel may have dropped the pages, so trying again would lie.
* A mark tells the truth: it is written after the sync that it speaks of has returned.
* Loading changes the disk in one case only, the torn tail: from some byte on the last segment holds no whole
  record, and no mark says that this byte was ever on the disk. A power cut does that to what was not
  synced, and leaves any part of it, so whole records may come after the hole. The tail is saved, then cut.
  Anything else that is wrong is damage to what was once safe: nobody but a person should decide about
  that, so the shard does not start.

One thread appends. Under ``everysec`` a second one syncs; they share the fields named in ``_sync_now``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from secrets import randbits
from struct import Struct
from threading import Condition, Lock, Thread
from time import monotonic
from typing import NoReturn

from xxhash import xxh64_digest, xxh64_intdigest

from imds.protocol import Buffer
from imds.shard.record import HEADER, verify_records
from imds.storage import Storage, write_all

log = logging.getLogger(__name__)

SEGMENT_HEADER = Struct(">8sIIQQQQQQ")
MAGIC = b"imds-aof"
FORMAT = 1
SEGMENT_NAME = re.compile(r"\d{8}\.aof")

POLICIES = ("always", "everysec", "no")
SYNC_EVERY = 1.0  # seconds from the first unsynced append to the sync that covers it
MAX_LAG = 2.0  # seconds; older unsynced data holds appends back: this is the promise of everysec

MARK = 0xFFFF_FFFF  # what a mark has instead of a record's length
MARK_EVERY = 4096  # synced bytes without a mark after which the next append writes one
_MARKED = Struct(">IQ")  # the part of a mark that its checksum covers
# How a mark goes on after its checksum, as its position is far below 2^40.
_MARK_START = re.compile(rb"\xff{4}\0{3}")
_WINDOW = 1 << 20  # bytes that the search for marks looks at in one go

# (bytes read, bytes in all segments, records applied)
LoadProgress = tuple[int, int, int]


class AofError(Exception):
    """The log cannot do what was asked for."""


class AofDamaged(AofError):
    """The log is damaged where no crash damages it. Nothing was changed on disk."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path} is damaged at byte {offset}: {reason}")
        self.path = path
        self.offset = offset


class AofWriteError(AofError):
    """The disk did not take the records, and the log is as it was before. ``errno`` says why."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path}: cannot append: {os.strerror(number)}")
        self.errno = number


class AofBroken(AofError):
    """The log may end in part of a record that could not be taken back: it takes nothing more."""


class AofSyncFailed(AofError):
    """A sync failed: nobody knows what is on the disk since the one before. The log takes nothing more."""


def segment_name(number: int) -> str:
    """Return the file name of segment ``number``."""
    return f"{number:08d}.aof"


def encode_mark(seed: int, position: int) -> bytes:
    """Return the mark that says that the segment is on the disk up to ``position``."""
    fields = _MARKED.pack(MARK, position)
    return xxh64_digest(fields, seed) + fields


def read_mark(data: Buffer, seed: int) -> int | None:
    """Return the position of the mark at the start of ``data``, None if there is no whole one."""
    if len(data) < HEADER.size:
        return None
    checksum, length, position = HEADER.unpack_from(data)
    if length != MARK or xxh64_intdigest(data[8 : HEADER.size], seed) != checksum:
        return None
    return int(position)


def _segment_header(shard: int, generation: int, sequence: int, number: int) -> bytes:
    seed = randbits(64)
    fields = SEGMENT_HEADER.pack(MAGIC, FORMAT, shard, generation, seed, sequence, number, 0, 0)[:-8]
    return fields + xxh64_digest(fields)


def create_segment(
    storage: Storage, directory: Path, *, shard: int, generation: int, number: int = 1, sequence: int = 1
) -> None:
    """Make an empty segment and sync it, name and all. Raises OSError, FileExistsError if there is one."""
    fd = storage.open(directory / segment_name(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(storage, fd, _segment_header(shard, generation, sequence, number))
        storage.fsync(fd)
    finally:
        storage.close(fd)
    storage.fsync_dir(directory)


class Aof:
    """One shard's log: :meth:`load` it to the end once, then append and sync, then close.

    ``seed`` and ``sequence`` are known after loading: what the RecordEncoder of the next append needs.
    ``failed`` is None, or the error that every later append and sync raises.
    """

    def __init__(
        self,
        directory: Path,
        *,
        shard: int,
        generation: int,
        policy: str = "everysec",
        storage: Storage | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"fsync policy {policy!r}, the rule is one of {', '.join(POLICIES)}")
        self.directory = directory
        self.shard = shard
        self.generation = generation
        self.policy = policy
        self.seed = 0
        self.sequence = 1  # after load: of the first record to append. Appending does not count it on.
        self.failed: AofError | None = None
        self.torn_bytes = 0  # cut off by load
        self.fsyncs = 0
        self._storage = storage or Storage()
        self._path = directory
        self._fd = -1  # the last segment, once it is loaded
        self._size = 0  # bytes of the last segment
        self._closed_size = 0  # bytes of the segments before it
        self._synced = 0  # how much of _size is on the disk for sure
        self._marked = 0  # how much of that the next load will know
        self._appended = False
        self._dirty_since: float | None = None  # when the first append came that no sync covers
        self._syncing_since: float | None = None  # the same of the sync that is running now
        self._closing = False
        self._changed = Condition()
        self._syncing = Lock()  # held during a sync: one at a time
        self._thread: Thread | None = None

    def segments(self) -> list[Path]:
        """Return the paths of the segments, oldest first."""
        names = self._storage.listdir(self.directory)
        return [self.directory / name for name in names if SEGMENT_NAME.fullmatch(name)]

    def disk_bytes(self) -> int:
        """Return the length of all segments, as the disk has it."""
        return sum(self._storage.size(path) for path in self.segments())

    # -- loading ---------------------------------------------------------------------------------------

    def load(self, apply: Callable[[memoryview], object], chunk: int = _WINDOW) -> Iterator[LoadProgress]:
        """Give all records to ``apply``, whole and verified ones, about ``chunk`` bytes at a time.

        Yields after each chunk, so that the caller can do something else; the log is ready when the
        iterator is exhausted. Cuts a torn tail. ``apply`` raises ValueError for records that it cannot
        follow. Raises AofDamaged, also for that, and OSError.
        """
        storage = self._storage
        paths = self.segments()
        if not paths:
            raise AofDamaged(self.directory, 0, "it holds no segment")
        total = self.disk_bytes()
        records = 0
        for index, path in enumerate(paths):
            self._path = path
            number = int(path.stem)
            last = path == paths[-1]
            if number != int(paths[0].stem) + index:
                raise AofDamaged(path, 0, "the segment before it is missing")
            fd = storage.open(path, os.O_RDWR | os.O_APPEND if last else os.O_RDONLY)
            try:
                for used, count in self._load_segment(fd, number, last, apply, chunk):
                    yield min(self._closed_size + used, total), total, records + count
                records += count
                if last:
                    self._fd, fd = fd, -1
                else:
                    self._closed_size += used
            finally:
                if fd >= 0:
                    storage.close(fd)
        self._write_again(self._marked)
        self._synced = self._marked
        if self.policy != "no":
            storage.fdatasync(self._fd)
            self._synced = self._size
        if self.policy == "everysec":
            self._thread = Thread(target=self._sync_every_second, name="aof-sync", daemon=True)
            self._thread.start()

    def _load_segment(
        self, fd: int, number: int, last: bool, apply: Callable[[memoryview], object], chunk: int
    ) -> Iterator[tuple[int, int]]:
        """Load one segment; yield (bytes read of it, records applied of it), at least once."""
        storage = self._storage
        size = storage.size(fd)
        head = storage.read(fd, SEGMENT_HEADER.size, 0)
        if last and (len(head) < SEGMENT_HEADER.size or (size == SEGMENT_HEADER.size and not any(head))):
            self._cut(fd, 0, size)
            head = _segment_header(self.shard, self.generation, self.sequence, number)
            write_all(storage, fd, head)
            storage.fsync(fd)
            size = len(head)
        self._read_header(head, number)
        pos, count = SEGMENT_HEADER.size, 0
        self._marked = pos
        rest = memoryview(b"")
        need = 0
        while True:
            data = storage.read(fd, max(chunk, need - len(rest)), pos + len(rest))
            rest = memoryview(b"".join((rest, data)) if rest else data)
            while True:
                found, used, damage = verify_records(rest, self.seed, self.sequence)
                if found:
                    try:
                        apply(rest[:used])
                    except ValueError as error:
                        raise AofDamaged(self._path, pos, f"in the records from here on: {error}") from error
                    self.sequence += found
                    count += found
                    pos += used
                    rest = rest[used:]
                position = read_mark(rest, self.seed) if damage else None
                if position is None:
                    break
                self._note_mark(pos, position)
                pos += HEADER.size
                rest = rest[HEADER.size :]
            yield pos, count
            if damage or not data:
                break
            # The next record may be larger than a chunk: read all of it then, not chunk by chunk.
            need = HEADER.size + HEADER.unpack_from(rest)[1] if len(rest) >= HEADER.size else 0
        if pos < size:
            damage = damage or "record is cut short"
            if not last:
                raise AofDamaged(self._path, pos, f"{damage}, and there is a later segment")
            for mark in self._later_marks(fd, pos, size):
                if mark is not None and mark[1] > pos:
                    at, position = mark
                    raise AofDamaged(
                        self._path, pos, f"{damage}, and all up to byte {position} was safe, says byte {at}"
                    )
                yield pos, count
            self._cut(fd, pos, size)
        self._size = pos

    def _write_again(self, offset: int) -> None:
        """Write what no mark speaks for once more, as it is: it may be in the page cache only.

        If an earlier process died of a failed sync, the system no longer means to write these pages, and a
        mere sync would succeed and do nothing.
        """
        storage = self._storage
        if offset == self._size:
            return
        fd = storage.open(self._path, os.O_WRONLY)
        try:
            while offset < self._size:
                data = storage.read(self._fd, min(_WINDOW, self._size - offset), offset)
                offset += storage.write_at(fd, data, offset)
        finally:
            storage.close(fd)

    def _note_mark(self, at: int, position: int) -> None:
        """Remember that a mark at ``at`` speaks for all before ``position``. It needs no mark itself."""
        self._marked = at + HEADER.size if position == at else position

    def _read_header(self, head: bytes, number: int) -> None:
        """Take the segment's seed from its header. Raises AofDamaged unless it is the expected segment."""
        if len(head) < SEGMENT_HEADER.size:
            raise AofDamaged(self._path, 0, "segment header is cut short, and there is a later segment")
        magic, form, shard, generation, seed, sequence, own_number, _, checksum = SEGMENT_HEADER.unpack(head)
        if magic != MAGIC:
            raise AofDamaged(self._path, 0, "it does not begin as a segment")
        if form > FORMAT:
            raise AofDamaged(self._path, 8, f"it has format {form}, this imds reads up to {FORMAT}")
        if xxh64_intdigest(head[:-8]) != checksum:
            raise AofDamaged(self._path, 0, "segment header does not match its checksum")
        found = (generation, shard, own_number, sequence)
        expected = (self.generation, self.shard, number, self.sequence)
        if found != expected:
            raise AofDamaged(
                self._path,
                0,
                "(generation, shard, segment, first sequence number) "
                f"are {found}, expected {expected}: it belongs elsewhere",
            )
        self.seed = seed

    def _later_marks(self, fd: int, start: int, size: int) -> Iterator[tuple[int, int] | None]:
        """Search the file from ``start`` on; yield (offset, position) for a mark, None now and then."""
        for offset in range(start, size, _WINDOW):
            # A mark begins in this window, and ends in it or right behind it.
            window = memoryview(self._storage.read(fd, _WINDOW + HEADER.size, offset))
            for hit in _MARK_START.finditer(window):
                at = hit.start() - 8
                if 0 <= at < _WINDOW and (position := read_mark(window[at:], self.seed)) is not None:
                    yield offset + at, position
            yield None

    def _cut(self, fd: int, offset: int, size: int) -> None:
        """Save the bytes from ``offset`` on in a file of their own, then cut them off."""
        storage = self._storage
        if size > offset:
            saved = self._save_tail(fd, offset, size)
            log.warning(
                "%s: torn tail: %d bytes at offset %d are no whole record; saved as %s and cut off",
                self._path,
                size - offset,
                offset,
                saved.name,
            )
            self.torn_bytes += size - offset
        storage.truncate(fd, offset)
        storage.fsync(fd)

    def _save_tail(self, fd: int, offset: int, size: int) -> Path:
        storage = self._storage
        taken = set(storage.listdir(self.directory))
        name = first = f"{self._path.name}.torn-{offset}"
        again = 1
        while name in taken:  # torn at the same place before
            again += 1
            name = f"{first}.{again}"
        path = self.directory / name
        out = storage.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            while offset < size:
                data = storage.read(fd, min(_WINDOW, size - offset), offset)
                write_all(storage, out, data)
                offset += len(data)
            storage.fsync(out)
        finally:
            storage.close(out)
        storage.fsync_dir(self.directory)
        return path

    # -- appending -------------------------------------------------------------------------------------

    def append(self, records: Buffer) -> None:
        """Append whole records. Under everysec, waits while the oldest unsynced data is over MAX_LAG old.

        Raises AofWriteError if the disk did not take them: the log is unchanged and may be tried again;
        AofBroken or AofSyncFailed if the log takes nothing more.
        """
        if self._thread is not None and self.unsynced_seconds > MAX_LAG:
            self._wait_for_sync()
        if self.failed is not None:
            self._raise_failed()
        synced = self._synced
        due = synced - self._marked >= MARK_EVERY
        if due:
            records = b"".join((encode_mark(self.seed, synced), records))
        try:
            write_all(self._storage, self._fd, records)
        except OSError as error:
            self._take_back()
            raise AofWriteError(self._path, error.errno or errno.EIO) from error
        if due:
            self._note_mark(self._size, synced)
        self._appended = True
        self._size += len(records)
        if self._dirty_since is None:
            with self._changed:
                self._dirty_since = monotonic()
                self._changed.notify_all()

    def probe(self, size: int) -> bool:
        """Return whether the disk would take ``size`` bytes now, by writing as many and taking them back."""
        if self.failed is not None:
            self._raise_failed()
        try:
            write_all(self._storage, self._fd, bytes(size))
            took = True
        except OSError:
            took = False
        self._take_back()
        return took

    def _take_back(self) -> None:
        """Cut the file back to its last whole record."""
        try:
            self._storage.truncate(self._fd, self._size)
        except OSError as error:
            self.failed = AofBroken(f"{self._path}: cannot take a failed append back: {error.strerror}")
            self._raise_failed()

    def _raise_failed(self) -> NoReturn:
        assert self.failed is not None
        raise type(self.failed)(*self.failed.args) from self.failed

    # -- syncing ---------------------------------------------------------------------------------------

    def sync(self) -> None:
        """End a batch: under ``always`` make it durable, otherwise only say if a sync has failed.

        Raises AofSyncFailed or AofBroken.
        """
        if self.policy == "always":
            self.flush()
        elif self.failed is not None:
            self._raise_failed()

    def flush(self) -> None:
        """Make all that was appended durable now, whatever the policy. Raises as :meth:`sync` does."""
        if self._synced < self._size:
            self._sync_now()
        if self.failed is not None:
            self._raise_failed()

    def _sync_now(self) -> bool:
        """Sync once, in either thread, and return whether that worked. A failure stays one for ever.

        Shared between the threads: ``_size`` (written by append), ``_dirty_since``, ``_syncing_since``,
        ``_synced``, ``failed`` and ``fsyncs``. An append first writes, then counts, then marks the log
        dirty; here the mark is taken away first. So an append is either covered or marks anew.
        """
        with self._syncing:
            if isinstance(self.failed, AofSyncFailed):
                return False
            with self._changed:
                self._syncing_since = self._dirty_since
                self._dirty_since = None
                size = self._size
            try:
                self._storage.fdatasync(self._fd)
            except OSError as error:
                self.failed = AofSyncFailed(f"{self._path}: sync failed: {error.strerror}")
                log.error("%s", self.failed)
                with self._changed:
                    self._changed.notify_all()
                return False
            with self._changed:
                self._syncing_since = None
                self._synced = size
                self.fsyncs += 1
                self._changed.notify_all()
            return True

    def _sync_every_second(self) -> None:
        """The second thread of ``everysec``. Sleeps while there is nothing to sync."""
        while True:
            with self._changed:
                while not self._closing:
                    wait = None
                    if self._dirty_since is not None:
                        wait = self._dirty_since + SYNC_EVERY - monotonic()
                        if wait <= 0:
                            break
                    self._changed.wait(wait)
                else:
                    return
            if not self._sync_now():
                return

    def _wait_for_sync(self) -> None:
        with self._changed:
            while self.failed is None and self.unsynced_seconds > MAX_LAG:
                self._changed.wait(SYNC_EVERY)

    def close(self) -> None:
        """Sync what is not synced, and close. May be called again.

        Raises AofSyncFailed or AofBroken as :meth:`flush` does, with the file closed all the same.
        """
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            self._thread = None
        if self._fd < 0:
            return
        try:
            self.flush()
            if self._appended and self._marked < self._synced:
                self._seal()
        finally:
            with suppress(OSError):  # whatever close says, flush has had the last word
                self._storage.close(self._fd)
            self._fd = -1

    # -- statistics ------------------------------------------------------------------------------------

    @property
    def unsynced_seconds(self) -> float:
        """How old the oldest data is that no finished sync covers; 0 if there is none."""
        since = self._syncing_since
        if since is None:
            since = self._dirty_since
        return 0.0 if since is None else monotonic() - since

    def stats(self) -> dict[str, int | float | str]:
        """Return what an operator wants to know, under names that begin with ``aof_``."""
        return {
            "aof_policy": self.policy,
            "aof_bytes": self._closed_size + self._size,
            "aof_unsynced_bytes": self._size - self._synced,
            "aof_unsynced_seconds": round(self.unsynced_seconds, 3),
            "aof_fsyncs": self.fsyncs,
            "aof_torn_bytes": self.torn_bytes,
        }

    def _seal(self) -> None:
        """Say in the log that all of it is safe. An error here costs only this knowledge."""
        with suppress(OSError):
            write_all(self._storage, self._fd, encode_mark(self.seed, self._synced))
            self._storage.fdatasync(self._fd)
