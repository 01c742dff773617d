"""The append-only file of one shard: a base or none, and segments (imds/shard/segment.py), as the shard's
manifest names them (imds/shard/manifest.py). How they are rewritten: imds/shard/rewrite.py.

What always holds:

* Between two calls the last segment ends at the end of a record, but for its room. An append that fails takes
  back what it wrote; when even that fails, the log is broken and takes nothing more.
* Sequence numbers start at 1 and rise by one through all segments; a base stands for those before its own.
* A failed sync is final: the kernel may have dropped the pages, so trying again would lie. The file SUSPECT
  is left in the directory, never synced: it lives as long as the page cache that nobody can trust. The next
  load syncs and changes none of the old files, and :meth:`Aof.renew` writes all data to new ones.
* Segments are synced in their order: where one is on the disk, all before it are.
* Loading changes the files of the log in one case only, the torn tail: from some byte on the log holds no
  whole record, and no mark says that this byte was ever on the disk. A power cut does that to what was not
  synced, and leaves any part of it, so whole records may come after the hole, in the same segment or the
  next. The tail is saved, then cut. Anything else that is wrong is damage to what was once safe: nobody
  but a person should decide about that, so the shard does not start.

Long for one file: loading, appending and syncing are one object's life, and share what two threads may touch.
One thread appends. Under ``everysec`` a second one syncs; they share the fields named in ``_sync_now``. The
slow parts of a rewrite (prepare_switch, settle, adopt, and what is done with a new base's file) may run in a
third one, one at a time.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Condition, Lock, Thread
from time import monotonic, time
from typing import NamedTuple, NoReturn

from imds.protocol import Buffer
from imds.rounds import TURN
from imds.shard.kernel import UnifiedStore
from imds.shard.links import Grant
from imds.shard.manifest import (
    Base,
    Manifest,
    create_log,
    read_manifest,
    unnamed_files,
    write_manifest,
)
from imds.shard.record import HEADER
from imds.shard.rewrite import BaseFile, check_base, open_file, write_base
from imds.shard.segment import (
    CLOCK,
    CLOCK_EVERY,
    FORMAT,
    MAGIC,
    SEGMENT_HEADER,
    WINDOW,
    AofDamaged,
    AofError,
    Reader,
    base_name,
    create_segment,
    discard,
    encode_mark,
    later_marks,
    make_room,
    read_header,
    segment_name,
    without_room,
)
from imds.storage import Storage, write_all, write_all_at

log = logging.getLogger(__name__)

POLICIES = ("always", "everysec", "no")
SYNC_EVERY = 1.0  # seconds from the first unsynced append to the sync that covers it
MAX_LAG = 2.0  # seconds; older unsynced data holds appends back: this is the promise of everysec
MAX_STALL = 10.0  # seconds; older unsynced data is a disk that does not answer: the log gives up
GRANTED = 0.1  # seconds for which somebody else may append
assert TURN < GRANTED
MARK_EVERY = 4096  # synced bytes without a mark after which the next append writes one
SUSPECT = "suspect"

# (bytes read, bytes in all files, records applied)
LoadProgress = tuple[int, int, int]


class AofWriteError(AofError):
    """The disk did not take the records, and the log is as it was before. ``errno`` says why."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path}: cannot append: {os.strerror(number)}")
        self.errno = number


class AofBroken(AofError):
    """The log may end in part of a record that could not be taken back: it takes nothing more."""


class AofSyncFailed(AofError):
    """A sync failed: nobody knows what is on the disk since the one before. The log takes nothing more."""


class AofStalled(AofError):
    """No sync has come to its end for MAX_STALL seconds. The log takes nothing more."""


class _Closed(NamedTuple):
    """A segment that grows no more and is not synced to its end yet."""

    path: Path
    fd: int
    seed: int
    size: int


class Aof:
    """One shard's log: :meth:`load` it to the end once, then append and sync, then close.

    ``seed`` and ``sequence`` are known after loading: what the RecordEncoder of the next append needs.
    ``failed`` is None, or the error that every later append and sync raises. ``suspect`` after loading:
    the log takes nothing before :meth:`renew`.
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
        self.suspect = False
        self.torn_bytes = 0  # cut off by load
        self.fsyncs = 0
        self._storage = storage or Storage()
        self._direct = self._storage.direct
        self._manifest = Manifest(shard, generation, None, (1,))  # in force, once it has been read
        self._path = directory
        self._fd = -1  # the last segment, once it is loaded
        self._size = 0  # bytes of the last segment, without its room
        self._length = 0  # with it
        self._closed_sizes: dict[int, int] = {}  # bytes of the segments before it
        self._synced = 0  # how much of _size is on the disk for sure
        self._marked = 0  # how much of that the next load will know
        self.clock = 0  # microseconds since 1970: the last time that the log has
        self._ended = False  # loading has come to a torn tail
        self._appended = False
        self._behind: list[_Closed] = []  # segments before it that are not synced, oldest first
        self._next: tuple[int, int, int] | None = (
            None  # number, descriptor, seed of a segment made in advance
        )
        self._dirty_since: float | None = None  # when the first append came that no sync covers
        self._syncing_since: float | None = None  # the same of the sync that is running now
        self._closing = False
        self._changed = Condition()
        self._syncing = Lock()  # held during a sync: one at a time
        self._thread: Thread | None = None

    def segments(self) -> list[Path]:
        """Return the paths of the files of the log, base and oldest first. Raises AofDamaged, OSError."""
        manifest = read_manifest(self._storage, self.directory, shard=self.shard, generation=self.generation)
        return [self.directory / name for name in manifest.names()]

    def disk_bytes(self) -> int:
        """Return the length of these files, as the disk has it."""
        return sum(self._storage.size(path) for path in self.segments())

    # -- loading ---------------------------------------------------------------------------------------

    def load(self, apply: Callable[[memoryview], object], chunk: int = WINDOW) -> Iterator[LoadProgress]:
        """Give all records to ``apply``, whole and verified ones, about ``chunk`` bytes at a time.

        Yields after each chunk, so that the caller can do something else; the log is ready when the
        iterator is exhausted. Cuts a torn tail. ``apply`` raises ValueError for records that it cannot
        follow. Raises AofDamaged, also for that, AofSyncFailed and OSError.
        """
        storage = self._storage
        manifest = self._manifest = read_manifest(
            storage, self.directory, shard=self.shard, generation=self.generation
        )
        unnamed = unnamed_files(storage, self.directory, manifest)
        self.suspect = SUSPECT in storage.listdir(self.directory)
        total = self.disk_bytes()
        done = records = 0
        for name in manifest.names():
            growing = name == segment_name(manifest.last)
            flags = os.O_RDONLY if self.suspect or name.endswith(".base") else os.O_RDWR
            fd, reader = open_file(storage, self.directory, manifest, name, self.sequence, flags)
            try:
                for _ in reader.read(apply, chunk):
                    yield min(done + reader.pos, total), total, records + reader.records
                records += reader.records
                self.clock = reader.clock or self.clock
                if manifest.base and name == base_name(manifest.base.number):
                    check_base(manifest.base, reader)
                    self.sequence = manifest.base.sequence
                else:
                    self.sequence = reader.sequence
                    for _ in self._cut_torn_tail(fd, reader):
                        yield min(done + reader.pos, total), total, records
                    self._closed_sizes[int(reader.path.stem)] = reader.pos
                    if not self.suspect:
                        self._write_again(fd, reader)
                        if not growing or self.policy != "no":
                            self._sync_loaded(fd, reader.path)
                done += reader.pos
                if growing and not self.suspect:
                    self._take(fd, reader)
                    fd = -1
                elif self._ended and self.suspect:
                    break  # the later segments could not be emptied
            finally:
                if fd >= 0:
                    storage.close(fd)
        if self.suspect:
            return
        self._synced = self._marked if self.policy == "no" else self._size
        # The manifest may have been renamed by a process that was killed right then: it has to be on the
        # disk before anything that an older one names is removed, or that it does not name is written to.
        storage.fsync_dir(self.directory)
        self._remove(unnamed, logging.WARNING)
        self._start_thread()

    def _take(self, fd: int, reader: Reader) -> None:
        """Append to this segment from now on."""
        self._path, self._fd, self.seed = reader.path, fd, reader.seed
        self._size = self._length = reader.pos  # what room there is, is made again
        self._marked = self._synced = reader.marked
        self._closed_sizes.pop(int(reader.path.stem), None)

    def _write_again(self, fd: int, reader: Reader) -> None:
        """Write what no mark speaks for once more, as it is: it may be in the page cache only.

        If an earlier process died of a failed sync, and could not even leave SUSPECT, the system no longer
        means to write these pages, and a mere sync would succeed and do nothing.
        """
        storage, offset = self._storage, reader.marked
        while offset < reader.pos:
            data = storage.read(fd, min(WINDOW, reader.pos - offset), offset)
            write_all_at(storage, fd, data, offset)
            offset += len(data)

    def _sync_loaded(self, fd: int, path: Path) -> None:
        try:
            self._storage.fdatasync(fd)
        except OSError as error:
            self._fail_sync(path, error)
            self._raise_failed()

    def _start_thread(self) -> None:
        if self.policy == "everysec":
            self._thread = Thread(target=self._sync_every_second, name="aof-sync", daemon=True)
            self._thread.start()

    def _end_thread(self) -> None:
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            self._thread = None
            self._closing = False

    def _cut_torn_tail(self, fd: int, reader: Reader) -> Iterator[None]:
        """Where a segment is damaged: cut the log there, or raise AofDamaged; yield now and then.

        What is damaged may be no more than a mark, at the end of a segment that was just closed: then the
        next segment goes on with the number that is due. Otherwise the log ends here, and the later segments
        are emptied, before this one is cut: stopped in between, the next load finds the same damage.
        """
        if reader.damage is None:
            return
        storage = self._storage
        for mark in later_marks(storage, fd, reader.seed, reader.pos, reader.size):
            if mark is not None and mark[1] > reader.pos:
                at, position = mark
                self._refuse(reader, f"all up to byte {position} was safe, says byte {at}")
            yield
        tails = [(reader.path, reader.pos)]
        for number in self._manifest.segments:
            if number <= int(reader.path.stem):
                continue
            name = segment_name(number)
            other, later = open_file(
                storage, self.directory, self._manifest, name, reader.sequence, os.O_RDONLY
            )
            try:
                for _ in later.read(lambda records: None):
                    if later.records:
                        break
                    yield
                if later.records:
                    break
                for mark in later_marks(storage, other, later.seed, later.pos, later.size):
                    if mark is not None:
                        self._refuse(reader, f"all of it was safe, says {later.path} at byte {mark[0]}")
                    yield
            finally:
                storage.close(other)
            tails.append((later.path, SEGMENT_HEADER.size))
        else:
            self._ended = True
        for path, pos in reversed(tails):
            self._cut(path, pos)

    @staticmethod
    def _refuse(reader: Reader, said: str) -> NoReturn:
        raise AofDamaged(reader.path, reader.pos, f"{reader.damage}, and {said}")

    def _cut(self, path: Path, offset: int) -> None:
        """Save the bytes of a segment from ``offset`` on in a file of their own, then cut them off."""
        storage = self._storage
        fd = storage.open(path, os.O_RDONLY if self.suspect else os.O_RDWR)
        try:
            size = storage.size(fd)
            if size == offset:
                return
            end = without_room(storage, fd, offset, size)
            if end > offset:
                saved = self._save_tail(path, fd, offset, end)
                log.warning(
                    "%s: torn tail: %d bytes at offset %d are no whole record; saved as %s and cut off",
                    *(path, end - offset, offset, saved.name),
                )
                self.torn_bytes += end - offset
            if not self.suspect:
                storage.truncate(fd, offset)
                storage.fsync(fd)
        finally:
            storage.close(fd)

    def _save_tail(self, path: Path, fd: int, offset: int, size: int) -> Path:
        storage = self._storage
        taken = set(storage.listdir(self.directory))
        name = first = f"{path.name}.torn-{offset}"
        again = 1
        while name in taken:  # torn at the same place before
            again += 1
            name = f"{first}.{again}"
        out_path = self.directory / name
        out = storage.open(out_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            while offset < size:
                data = storage.read(fd, min(WINDOW, size - offset), offset)
                write_all(storage, out, data)
                offset += len(data)
            storage.fsync(out)
        finally:
            storage.close(out)
        storage.fsync_dir(self.directory)
        return out_path

    def _remove(self, names: list[str], level: int) -> None:
        """Remove files that the manifest does not name. What cannot be removed is left to the next start."""
        try:
            for name in names:
                log.log(level, "%s: removing %s, which the manifest does not name", self.directory, name)
                self._storage.unlink(self.directory / name)
        except OSError as error:
            log.warning("%s: %s is left to the next start: %s", self.directory, names, error.strerror)

    def renew(self, store: UnifiedStore) -> Iterator[None]:
        """Make a suspect log good: write the data that was loaded from it to new files; yield now and then.

        Afterwards the log is ready, and the old files are gone. Raises OSError: then it is suspect still.
        """
        storage, old = self._storage, self._manifest
        base = yield from write_base(
            *(storage, self.directory, store),
            shard=self.shard,
            generation=self.generation,
            number=old.last,
            sequence=self.sequence,
            clock=self.clock,
        )
        number = old.last + 1
        self._create(number)
        self._commit(Manifest(self.shard, self.generation, base, (number,)))
        fd, reader = open_file(
            *(storage, self.directory, self._manifest, segment_name(number), self.sequence), os.O_RDWR
        )
        self._take(fd, reader)
        self._closed_sizes.clear()
        self.suspect = False
        log.warning("%s: all data was written to new files, as a sync had failed", self.directory)
        present = storage.listdir(self.directory)
        unnamed = unnamed_files(storage, self.directory, self._manifest)
        self._remove([*unnamed, *({SUSPECT} & set(present))], logging.INFO)
        self._start_thread()

    # -- appending -------------------------------------------------------------------------------------

    def append(self, records: Buffer) -> None:
        """Append whole records. Under everysec, waits while the oldest unsynced data is over MAX_LAG old.

        Raises AofWriteError if the disk did not take them: the log is unchanged and may be tried again;
        AofBroken, AofSyncFailed or AofStalled if the log takes nothing more.
        """
        if self._thread is not None and self.unsynced_seconds > MAX_LAG:
            self._wait_for_sync()
        if self.failed is not None:
            self._raise_failed()
        if self.suspect:
            raise AofError(
                f"{self.directory}: a sync of the log has failed, and it was not written anew since"
            )
        synced = self._synced
        mark_due = synced - self._marked >= MARK_EVERY
        now = int(time() * 1e6)
        clock_due = abs(now - self.clock) >= CLOCK_EVERY  # also where somebody has set the clock back
        if clock_due:
            records = b"".join((encode_mark(self.seed, now, CLOCK), records))
        if mark_due:
            records = b"".join((encode_mark(self.seed, synced), records))
        length = make_room(self._storage.write_at, self._fd, self._size, len(records), self._length)
        try:
            write_all_at(self._storage, self._fd, records, self._size)
        except OSError as error:
            self.take_back()
            raise AofWriteError(self._path, error.errno or errno.EIO) from error
        if clock_due:
            self.clock = now
        if mark_due:
            # A mark that speaks for all that is before it needs no mark itself.
            self._marked = self._size + HEADER.size if synced == self._size else synced
        self.count(len(records), max(length, self._size + len(records)))

    def grant(self) -> Grant | None:
        """Leave to append whole records to the file by pwrite(2) at once, or None: :meth:`append` has to.

        It holds until another method is called, for less than GRANTED seconds, and within its times. What was
        written is then to be counted; what was written in part, taken back. Under ``always`` the grant has
        what syncs each write; where that fails, :meth:`fail_sync` has to be told.
        """
        always = self.policy == "always"
        if (
            self.failed is not None
            or self.suspect
            or not self._direct
            or self._synced - self._marked >= MARK_EVERY
            or (self._thread is not None and self.unsynced_seconds > MAX_LAG - GRANTED)
            or (always and (self._synced < self._size or self._behind))
        ):
            return None
        sync = self._sync_granted if always else None
        return Grant(self._fd, self.clock, self.clock + CLOCK_EVERY, sync, self._size, self._length)

    def _sync_granted(self, fd: int) -> None:
        self._storage.fdatasync(fd)
        with self._changed:
            self.fsyncs += 1

    def count(self, size: int, length: int, *, synced: bool = False) -> None:
        """Take note of ``size`` bytes of records that are in the file now, synced where the grant said so.

        ``length`` is that of the file, with its room.
        """
        self._appended = True
        self._size += size
        self._length = length
        if synced:
            with self._changed:
                self._synced = self._size
        elif self._dirty_since is None:
            with self._changed:
                self._dirty_since = monotonic()
                self._changed.notify_all()

    def probe(self, size: int) -> bool:
        """Return whether the disk would take ``size`` bytes now, by writing as many and taking them back."""
        if self.failed is not None:
            self._raise_failed()
        try:
            write_all_at(self._storage, self._fd, bytes(size), self._size)
            took = True
        except OSError:
            took = False
        self.take_back()
        return took

    def take_back(self) -> None:
        """Cut the file back to its last whole record that is counted. Raises AofBroken."""
        try:
            self._storage.truncate(self._fd, self._size)
            self._length = self._size
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
        if self._synced < self._size or self._behind:
            self._sync_now()
        if self.failed is not None:
            self._raise_failed()

    def set_policy(self, policy: str) -> None:
        """Keep to another policy from now on; all that was appended is durable. Raises as :meth:`sync` does.

        A sync that is under way is waited for.
        """
        self.flush()
        self._end_thread()
        self.policy = policy
        self._start_thread()

    def check(self) -> None:
        """Raise AofStalled if no sync of ``everysec`` has ended for MAX_STALL seconds, or what has failed."""
        since = self._syncing_since
        stalled = since is not None and self._thread is not None and monotonic() - since > MAX_STALL
        if stalled and self.failed is None:
            self.failed = AofStalled(f"{self._path}: no sync has ended for {MAX_STALL:g} s")
        if self.failed is not None:
            self._raise_failed()

    def _sync_now(self) -> bool:
        """Sync once, in whatever thread, and return whether that worked. A failure stays one for ever.

        Shared between the threads: ``_fd`` and ``_behind`` (changed by switch), ``_size`` (by append),
        ``_dirty_since``, ``_syncing_since``, ``_synced``, ``failed`` and ``fsyncs``. An append first writes,
        then counts, then marks the log dirty; here the mark is taken away first. So an append is either
        covered or marks anew.
        """
        with self._syncing:
            if isinstance(self.failed, AofSyncFailed):
                return False
            with self._changed:
                self._syncing_since = self._dirty_since
                self._dirty_since = None
                behind, last, fd, size = list(self._behind), self._path, self._fd, self._size
            path = last
            try:
                for closed in behind:
                    path = closed.path
                    self._storage.fdatasync(closed.fd)
                path = last
                self._storage.fdatasync(fd)
            except OSError as error:
                self._fail_sync(path, error)
                return False
            with self._changed:
                self._syncing_since = None
                if fd == self._fd:
                    self._synced = max(self._synced, size)
                del self._behind[: len(behind)]
                self.fsyncs += 1
                self._changed.notify_all()
        for closed in behind:
            self._seal(closed.fd, closed.seed, closed.size)
            with suppress(OSError):
                self._storage.close(closed.fd)
        return True

    def fail_sync(self, error: OSError) -> NoReturn:
        """A sync by a grant has failed: nothing is appended any more. Raises AofSyncFailed."""
        self._fail_sync(self._path, error)
        self._raise_failed()

    def _fail_sync(self, path: Path, error: OSError) -> None:
        self.failed = AofSyncFailed(f"{path}: sync failed: {error.strerror}")
        log.error("%s", self.failed)
        with suppress(OSError):
            self._storage.close(self._storage.open(self.directory / SUSPECT, os.O_WRONLY | os.O_CREAT))
        with self._changed:
            self._changed.notify_all()

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
                if self.unsynced_seconds > MAX_STALL:
                    self.check()
                self._changed.wait(SYNC_EVERY)

    def close(self) -> None:
        """Sync what is not synced, and close. May be called again.

        Raises AofSyncFailed or AofBroken as :meth:`flush` does, with the file closed all the same.
        """
        self._end_thread()
        if self._next is not None:
            with suppress(OSError):
                self._storage.close(self._next[1])
            self._next = None
        if self._fd < 0:
            return
        try:
            self.flush()
            if self._appended and self._marked < self._synced:
                self._seal(self._fd, self.seed, self._synced)
        finally:
            with suppress(OSError):  # whatever close says, flush has had the last word
                self._storage.close(self._fd)
            for closed in self._behind:
                with suppress(OSError):
                    self._storage.close(closed.fd)
            self._behind.clear()
            self._fd = -1

    def _seal(self, fd: int, seed: int, size: int) -> None:
        """Say at the end of a segment that all of it is safe, and end it there, without room.

        An error here costs only this knowledge.
        """
        with suppress(OSError):
            self._storage.truncate(fd, size)
            try:
                write_all_at(self._storage, fd, encode_mark(seed, size), size)
            except OSError:
                self._storage.truncate(fd, size)  # a part of a mark would be damage
                raise
            self._storage.fdatasync(fd)

    # -- rewriting: see imds/shard/rewrite.py ------------------------------------------------------------

    def prepare_switch(self) -> None:
        """Make the next segment, and have the manifest name it. May block; may run beside the loop.

        Raises OSError: then nothing has changed, and it may be tried again.
        """
        if self._next is not None:
            return
        storage, old = self._storage, self._manifest
        number = int(self._path.stem) + 1
        if number not in old.segments:
            self._create(number)
        segments = tuple(n for n in old.segments if n < number)
        self._commit(Manifest(self.shard, self.generation, old.base, (*segments, number)))
        path = self.directory / segment_name(number)
        fd = storage.open(path, os.O_RDWR)
        try:
            self._next = number, fd, read_header(storage, fd, path).seed
        except BaseException:
            storage.close(fd)
            raise

    def new_base(self) -> BaseFile:
        """Return what may become the base for all that is logged before :meth:`switch`. No system call."""
        return BaseFile(
            *(self._storage, self.directory),
            shard=self.shard,
            generation=self.generation,
            number=int(self._path.stem),
        )

    def switch(self) -> None:
        """Append to the segment that was prepared from now on, under a new ``seed``. O(1), no system call."""
        assert self._next is not None
        number, fd, seed = self._next
        with self._changed:
            self._behind.append(_Closed(self._path, self._fd, self.seed, self._size))
            self._closed_sizes[number - 1] = self._size
            self._path, self._fd, self.seed = self.directory / segment_name(number), fd, seed
            self._size = self._length = self._synced = self._marked = SEGMENT_HEADER.size
            self._next = None

    def settle(self) -> None:
        """Sync the segments that were closed, whatever the policy. May block; may run beside the loop.

        Raises AofSyncFailed.
        """
        if self._behind:
            self._sync_now()
        if self.failed is not None:
            self._raise_failed()

    def adopt(self, base: Base) -> None:
        """Have a base take the place of the segments that it stands for, and remove them.

        May block; may run beside the loop. Raises OSError, and AofDamaged for a base that is not there as
        described; then the log is as it was.
        """
        storage, old = self._storage, self._manifest
        later = tuple(number for number in old.segments if number > base.number)
        if base.number not in old.segments or not later:
            raise AofDamaged(self.directory / base_name(base.number), None, "is not of closed segments")
        new = Manifest(self.shard, self.generation, base, later)
        fd, _reader = open_file(
            storage, self.directory, new, base_name(base.number), base.sequence, os.O_RDONLY
        )
        storage.close(fd)
        self._commit(new)
        self._closed_sizes = {n: size for n, size in self._closed_sizes.items() if n in later}
        self._remove(unnamed_files(storage, self.directory, new), logging.DEBUG)

    def _create(self, number: int) -> None:
        """Make a segment, which no manifest names. Nobody knows yet with which record it will begin."""
        discard(self._storage, self.directory / segment_name(number))  # of a try that failed
        try:
            create_segment(
                *(self._storage, self.directory),
                shard=self.shard,
                generation=self.generation,
                number=number,
                sequence=0,
            )
        except OSError:
            with suppress(OSError):
                self._storage.unlink(self.directory / segment_name(number))
            raise

    def _commit(self, manifest: Manifest) -> None:
        try:
            write_manifest(self._storage, self.directory, manifest)
        except OSError:
            with suppress(OSError, AofError):  # either is in force now: go on from what can be read
                self._manifest = read_manifest(
                    self._storage, self.directory, shard=self.shard, generation=self.generation
                )
            raise
        self._manifest = manifest

    def is_grown(self, percentage: int, least: int) -> bool:
        """Whether the log has ``least`` bytes and has grown by that part of its base; 0 %: never. O(1)."""
        base, size = self.base_bytes, self._closed_bytes + self._size
        # Headers are no growth: a log that is small beside them would be rewritten without end.
        grown = size - SEGMENT_HEADER.size * (len(self._closed_sizes) + 1)
        return percentage > 0 and base + size >= least and grown * 100 >= base * percentage

    # -- statistics ------------------------------------------------------------------------------------

    @property
    def base_bytes(self) -> int:
        """The length of the base, 0 if there is none."""
        base = self._manifest.base
        return base.bytes if base else 0

    @property
    def _closed_bytes(self) -> int:
        return sum(self._closed_sizes.values())

    @property
    def watched(self) -> bool:
        """Whether :meth:`check` should be called again before long: something waits for the second thread."""
        waits = self._dirty_since is not None or self._syncing_since is not None
        return waits and self._thread is not None

    @property
    def unsynced_seconds(self) -> float:
        """How old the oldest data is that no finished sync covers; 0 if there is none."""
        since = self._syncing_since
        if since is None:
            since = self._dirty_since
        return 0.0 if since is None else monotonic() - since

    def stats(self) -> dict[str, int | float | str]:
        """Return what an operator wants to know, under names that begin with ``aof_``."""
        behind = sum(closed.size for closed in self._behind)
        return {
            "aof_policy": self.policy,
            "aof_bytes": self.base_bytes + self._closed_bytes + self._size,
            "aof_base_bytes": self.base_bytes,
            "aof_unsynced_bytes": self._size - self._synced + behind,
            "aof_unsynced_seconds": round(self.unsynced_seconds, 3),
            "aof_fsyncs": self.fsyncs,
            "aof_torn_bytes": self.torn_bytes,
        }


__all__ = [
    "FORMAT",
    "MAGIC",
    "MARK_EVERY",
    "MAX_LAG",
    "POLICIES",
    "SEGMENT_HEADER",
    "SUSPECT",
    "SYNC_EVERY",
    "Aof",
    "AofBroken",
    "AofDamaged",
    "AofError",
    "AofStalled",
    "AofSyncFailed",
    "AofWriteError",
    "Base",
    "create_log",
    "create_segment",
    "segment_name",
]
