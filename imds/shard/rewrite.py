"""Rewriting: what a log amounts to becomes a new base, and the files that it was in are deleted.

::

    before      00000005.base   00000006.aof (grows)
    1 prepare   00000005.base   00000006.aof (grows)   00000007.aof
    2 save      00000005.base   00000006.aof (grows)   00000007.aof    +  00000006.base
    3 switch    00000005.base   00000006.aof           00000007.aof (grows)
    4 adopt     00000006.base                          00000007.aof (grows)

All of it is the shard's own doing, beside its requests: after a turn of its loop it saves a piece of its
data, and what it logs meanwhile it adds to the base, too (UnifiedStore.save in imds/shard/store.py says why
that makes a base). When all is saved, the base is what the log up to this moment amounts to, and from here on
the log is the next segment: the switch exchanges two descriptors. Files are written, synced and removed in a
thread beside the loop. Nothing forks, nothing waits, no data is held twice, and what a rewrite costs goes by
what the shard holds, not by how much was written.

Every place where a crash can stop it, and what the next start then finds:

====  ================================================  ===================================================
step  stopped after                                     the next start
====  ================================================  ===================================================
1     segment 7 was created, written, synced            removes it: empty, and the manifest does not name it
1     manifest.json.new was created, written, synced    removes both
1     manifest.json.new was renamed                     finds either manifest; 7 is on the disk and empty
1     the directory was synced                          reads 5.base, 6, and 7, which is empty
2     6.base was created, written in part, synced       removes it: the manifest does not name it
3     records went to 7, the end of 6 is not synced     a power cut may tear 6: then 7 was never synced
                                                        either, and both are cut, as one torn tail
3     6 was synced, and a mark at its end               reads all of them; damage in 6 is damage
4     6.base was written to its end, synced             removes it
4     manifest.json.new was created, written, synced    removes it, and 6.base
4     manifest.json.new was renamed                     finds either manifest; all files of both are there
4     the directory was synced                          reads 6.base and 7, removes 5.base and 6
4     one of 5.base and 6 was deleted                   removes the other
====  ================================================  ===================================================

A start syncs the directory before it removes a file or serves: the manifest that it read is there to stay.
An error instead of a crash leaves the same files: the log goes on as it is, and the next try begins anew.

A base has the keys in the order of their last use: reading it gives the LRU order of the moment when it was
begun, with what was written since in between; in the compiled store it gives that of its end.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

from imds.protocol import Buffer
from imds.shard.kernel import RecordEncoder, UnifiedStore
from imds.shard.manifest import Base, Manifest
from imds.shard.record import HEADER
from imds.shard.segment import (
    CLOCK,
    MAGIC,
    MAGIC_BASE,
    SEGMENT_HEADER,
    AofDamaged,
    AofError,
    Reader,
    base_name,
    discard,
    encode_mark,
    new_header,
    read_header,
)
from imds.storage import Storage, write_all, write_all_at

PIECE = 1 << 16  # bytes of data that are saved at a time: about a tenth of a millisecond
MOST_HELD = 64 << 20  # bytes of what is logged meanwhile that may wait for the disk to take the base
# Bytes between two syncs of a base that is being written: a single sync at its end would have the
# disk write it all at once, and the log's own syncs wait behind that.
_SYNC_STEP = 4 << 20


def open_file(
    storage: Storage, directory: Path, manifest: Manifest, name: str, sequence: int, flags: int
) -> tuple[int, Reader]:
    """Open a file that the manifest names and check its header; return its descriptor and a reader.

    ``sequence``: the number that is due, of a segment's first record. Raises AofDamaged, OSError.
    """
    path = directory / name
    fd = storage.open(path, flags)
    try:
        base = manifest.base if name.endswith(".base") else None
        header = read_header(storage, fd, path)
        if base:
            due = (MAGIC_BASE, manifest.generation, manifest.shard, base.number, base.sequence)
        else:
            due = (MAGIC, manifest.generation, manifest.shard, int(path.stem), sequence)
        header.check(path, *due)
        reader = Reader(storage, fd, path, header.seed, 1 if base else sequence)
        if base and reader.size != base.bytes:
            raise AofDamaged(path, None, f"has {reader.size} bytes, the manifest says {base.bytes}")
    except BaseException:
        storage.close(fd)
        raise
    return fd, reader


def check_base(base: Base, reader: Reader) -> None:
    """Raise AofDamaged unless a base that has been read was whole."""
    if reader.damage is not None:
        raise AofDamaged(reader.path, reader.pos, reader.damage)
    if reader.records != base.records:
        raise AofDamaged(
            reader.path, None, f"holds {reader.records} records, the manifest says {base.records}"
        )


class BaseFile:
    """A base that is being written. It is no part of a log before a manifest names it.

    ``log`` takes its effects. The loop fills it and takes what it holds; another thread may have the file.
    ``failed`` is None, or why it cannot become a base any more.
    """

    def __init__(
        self, storage: Storage, directory: Path, *, shard: int, generation: int, number: int
    ) -> None:
        self._header = new_header(shard, generation, number, 0, MAGIC_BASE)
        self.log = RecordEncoder(self._header.seed)
        self.failed: AofError | None = None
        self._held = 0  # bytes that were copied since what is held was taken last
        self._storage = storage
        self._path = directory / base_name(number)
        self._fd = -1
        self._size = self._synced = 0

    def copy(self, records: Buffer) -> None:
        """Add what is being logged."""
        if self._held > MOST_HELD:
            self.failed = AofError(f"{self._path}: {self._held} bytes wait for the disk to take them")
        if self.failed is None:
            try:
                self.log.copy(records)
            except MemoryError:
                self.failed = AofError(f"{self._path}: no memory for {len(records)} bytes more")
        self._held += len(records)

    def take(self) -> bytes:
        """Return the records that wait, for :meth:`write`, and forget them."""
        records = self.log.pending()
        self.log.commit()
        self._held = 0
        return records

    def write(self, records: Buffer) -> None:
        """Write records. May block. Raises OSError."""
        storage = self._storage
        if self._fd < 0:
            discard(storage, self._path)  # of a try before this one
            self._fd = storage.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            # The place of the header and of the clock, which are known at the end.
            write_all(storage, self._fd, bytes(SEGMENT_HEADER.size + HEADER.size))
            self._size = SEGMENT_HEADER.size + HEADER.size
        write_all(storage, self._fd, records)
        self._size += len(records)
        if self._size - self._synced >= _SYNC_STEP:
            storage.fdatasync(self._fd)
            self._synced = self._size

    def finish(self, sequence: int, clock: int) -> Base:
        """Make it a base for all effects below ``sequence``, synced, name and all. May block. Raises OSError.

        ``clock``: the last time that these have, 0 if they have none.
        """
        storage, header = self._storage, self._header._replace(sequence=sequence)
        start = header.encode() + encode_mark(header.seed, clock, CLOCK)
        write_all_at(storage, self._fd, start, 0)
        storage.fsync(self._fd)
        self.close()
        storage.fsync_dir(self._path.parent)
        return Base(header.number, sequence, self.log.sequence - 1, self._size)

    def close(self) -> None:
        """Close the file. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._storage.close(fd)

    def discard(self) -> None:
        """Remove what there is of it, if that can be done; otherwise the next start does."""
        with suppress(OSError):
            self.close()
        with suppress(OSError):
            discard(self._storage, self._path)


def write_base(
    storage: Storage,
    directory: Path,
    store: UnifiedStore,
    *,
    shard: int,
    generation: int,
    number: int,
    sequence: int,
    clock: int,
) -> Generator[None, None, Base]:
    """Write the data, which do not change, as base ``number``; for the rest see :meth:`BaseFile.finish`.

    Yields now and then; returns the base. After an OSError what there is of the file is removed, if that
    can be done.
    """
    base = BaseFile(storage, directory, shard=shard, generation=generation, number=number)
    try:
        for _ in store.save(base.log, PIECE):
            base.write(base.take())
            yield
        base.write(base.take())
        return base.finish(sequence, clock)
    except OSError:
        base.discard()
        raise
    finally:
        base.close()
