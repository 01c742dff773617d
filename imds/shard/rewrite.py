"""Rewriting: what closed segments amount to becomes a new base, and they are deleted.

::

    before     00000005.base   00000006.aof   00000007.aof (grows)
    1 switch   00000005.base   00000006.aof   00000007.aof   00000008.aof (grows)
    2 fold     \\_________________ read ________________/     ->  00000007.base
    3 adopt                                                      00000007.base   00000008.aof (grows)

The shard's process does 1 and 3, in a thread beside its loop; the loop itself does one thing, which is to
exchange two descriptors. 2 is done by a process of the lowest priority, which only makes a file that no
manifest names yet. Nothing forks, nothing waits, and only the shard's process ever writes its manifest.

Every place where a crash can stop it, and what the next start then finds:

====  ================================================  ===================================================
step  stopped after                                     the next start
====  ================================================  ===================================================
1     segment 8 was created, written, synced            removes it: empty, and the manifest does not name it
1     manifest.json.new was created, written, synced    removes both
1     manifest.json.new was renamed                     finds either manifest; 8 is on the disk and empty
1     the directory was synced                          reads 5.base, 6, 7, and 8, which is empty
1     records went to 8, the end of 7 is not synced     a power cut may tear 7: then 8 was never synced
                                                        either, and both are cut, as one torn tail
1     7 was synced, and a mark at its end               reads all of them; damage in 7 is damage
2     7.base was created, written in part, synced       removes it: the manifest does not name it
3     manifest.json.new was created, written, synced    removes it, and 7.base
3     manifest.json.new was renamed                     finds either manifest; all files of both are there
3     the directory was synced                          reads 7.base and 8, removes 5.base, 6 and 7
3     some of 5.base, 6 and 7 were deleted              removes the others
====  ================================================  ===================================================

A start syncs the directory before it removes a file or serves: the manifest that it read is there to stay.
An error instead of a crash leaves the same files: the log goes on as it is, and the next try begins anew.

A base keeps the order in which keys were last written, oldest first: reading it gives the same LRU order as
reading what it replaces. Memory: one shard's data, in the process that folds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path

from imds.shard.kernel import RecordEncoder, UnifiedStore
from imds.shard.manifest import Base, Manifest, read_manifest
from imds.shard.record import HEADER
from imds.shard.segment import (
    BASE_NAME,
    CLOCK,
    MAGIC,
    MAGIC_BASE,
    SEGMENT_HEADER,
    AofDamaged,
    Reader,
    base_name,
    discard,
    encode_mark,
    new_header,
    read_header,
)
from imds.storage import Storage, write_all

_FLUSH = 1 << 16  # bytes of records that wait for one write, held twice beside the data
_READ = 1 << 16  # bytes of a log that are folded at a time: they are held beside the data
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
    """Write the data as base ``number``, for all effects below ``sequence``; sync it, name and all.

    ``clock``: the last time that these have, 0 if they have none.

    Yields now and then; returns the base. After an OSError what there is of the file is removed, if that
    can be done.
    """
    path = directory / base_name(number)
    discard(storage, path)  # of a try before this one
    fd = storage.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            header = new_header(shard, generation, number, sequence, MAGIC_BASE)
            write_all(storage, fd, header.encode())
            encoder = RecordEncoder(header.seed)
            size = synced = SEGMENT_HEADER.size
            if clock:
                write_all(storage, fd, encode_mark(header.seed, clock, CLOCK))
                size += HEADER.size
            for _ in store.save(encoder, _FLUSH):
                size += _write_records(storage, fd, encoder)
                if size - synced >= _SYNC_STEP:
                    storage.fdatasync(fd)
                    synced = size
                yield
            size += _write_records(storage, fd, encoder)
            storage.fsync(fd)
        finally:
            storage.close(fd)
        storage.fsync_dir(directory)
    except OSError:
        with suppress(OSError):
            storage.unlink(path)
        raise
    return Base(number, sequence, encoder.sequence - 1, size)


def _write_records(storage: Storage, fd: int, encoder: RecordEncoder) -> int:
    """Write the records that wait, and forget them; return their bytes."""
    records = encoder.pending()
    write_all(storage, fd, records)
    encoder.commit()
    return len(records)


def fold(
    storage: Storage,
    directory: Path,
    store: UnifiedStore,
    *,
    shard: int,
    generation: int,
    step: Callable[[], object] = lambda: None,
) -> Base | None:
    """Fold the base and the closed segments of a log into a new base; return it, None if none is closed.

    The log's owner may append to its last segment meanwhile, and to nothing else. ``store`` is an empty one
    without limits; ``step`` is called now and then. The new base is no part of the log until it is adopted.
    Raises AofDamaged, OSError, and what ``step`` raises.
    """
    manifest = read_manifest(storage, directory, shard=shard, generation=generation)
    _remove_unfinished(storage, directory, manifest)
    *closed, _growing = manifest.segments
    if not closed:
        return None
    sequence, clock = 1, 0
    for name in manifest.names()[:-1]:
        fd, reader = open_file(storage, directory, manifest, name, sequence, os.O_RDONLY)
        try:
            for _ in reader.read(store.replay, _READ):
                step()
        finally:
            storage.close(fd)
        clock = reader.clock or clock
        if manifest.base and name.endswith(".base"):
            check_base(manifest.base, reader)
            sequence = manifest.base.sequence
        elif reader.damage is not None:
            raise AofDamaged(reader.path, reader.pos, reader.damage)
        else:
            sequence = reader.sequence
    writing = write_base(
        *(storage, directory, store),
        shard=shard,
        generation=generation,
        number=closed[-1],
        sequence=sequence,
        clock=clock,
    )
    while True:
        try:
            next(writing)
            step()
        except StopIteration as end:
            base: Base = end.value
            return base


def _remove_unfinished(storage: Storage, directory: Path, manifest: Manifest) -> None:
    """Remove bases newer than the log's own: their writers were killed, and no manifest ever named them."""
    present = manifest.base.number if manifest.base else 0
    for name in storage.listdir(directory):
        found = BASE_NAME.fullmatch(name)
        if found and int(found[1]) > present:
            storage.unlink(directory / name)
