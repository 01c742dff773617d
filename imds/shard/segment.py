"""One file of a shard's log: a segment, which grows, or a base, which was written at one go.

::

    file     +--------+--------+-------+------------+------+----------+--------+----------+----------+
             | magic  | format | shard | generation | seed | sequence | number | reserved | checksum |
             +--------+--------+-------+------------+------+----------+--------+----------+----------+
              8 bytes    u32      u32       u64        u64      u64       u64       u64        u64
             followed by records (imds/shard/record.py) back to back, to the end of the file or, in a
             segment, to the room: at most 2 x ROOM bytes FILL; and between them now and then

    mark     +----------+------------+----------+
             | checksum | 0xFFFFFFFF | position |    all of the segment before ``position`` is on the disk,
             +----------+------------+----------+    and all of the segments before it

    clock    +----------+------------+----------+
             | checksum | 0xFFFFFFFE |   time   |    microseconds since 1970: what comes before was appended
             +----------+------------+----------+    before, what comes after not before
                 u64         u32         u64         where a record has its length and its number

All integers are big-endian and unsigned. ``seed`` is random and seeds the checksums of the file's records,
marks and clocks; the header's ``checksum`` is xxh64 of the bytes before it, a mark's is made as a record's.

::

              magic      ``sequence``                                       its records are numbered
    segment   imds-aof   of its first record, 0 where that was not known    on from the file before it
    base      imds-bas   of the first record of the segment after it        from 1

What always holds:

* A file's header, and its name, are on the disk before anything says that the file is part of the log.
* A mark tells the truth: it is written after the sync that it speaks of has returned.
* Room is written before the records that will take its place. It makes appending cheaper by half: a file
  system finds, counts and joins the pages of one large write at once, those of many small ones each for
  itself; and a sync need not write down a new length. No record looks like room: its length would be over the
  limit. Nor do zeros: what a disk has lost is not taken for what was never there.
* Between a clock and a record after it lie no other clock and less than CLOCK_EVERY. A base has one clock, at
  its start, which is the last one of what it was made of: no effect in it is CLOCK_EVERY later than that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from xxhash import xxh64_digest, xxh64_intdigest

from imds._kernel import pick
from imds.protocol import Buffer
from imds.shard import record
from imds.shard.record import HEADER
from imds.storage import Storage, random_seed, write_all

# Not the one of imds.shard.kernel, with which the store comes: the supervisor needs segments and no store.
verify_records = pick(record.verify_records, "record", "verify_records")

SEGMENT_HEADER = Struct(">8sIIQQQQQQ")
MAGIC = b"imds-aof"
MAGIC_BASE = b"imds-bas"
FORMAT = 1
SEGMENT_NAME = re.compile(r"(\d{8,})\.aof")
BASE_NAME = re.compile(r"(\d{8,})\.base")

MARK = 0xFFFF_FFFF  # what a mark has instead of a record's length
CLOCK = 0xFFFF_FFFE  # and a clock
CLOCK_EVERY = 1_000_000  # microseconds after which the next append writes a clock
_MARKED = Struct(">IQ")  # the part of a mark that its checksum covers
# How a mark goes on after its checksum, as its position is far below 2^40.
_MARK_START = re.compile(rb"\xff{4}\0{3}")
WINDOW = 1 << 20  # bytes that are read, or searched for marks, in one go
ROOM = 1 << 17  # about as much as file systems take at a time
FILL = b"\xa5"


def make_room(write_at: Callable[[int, Buffer, int], int], fd: int, end: int, size: int, length: int) -> int:
    """Have a segment of this length, room behind ``end``, grow for ``size`` bytes; return its new length.

    That is the same where they fit, are too many to gain from it, or the disk does not take more room: the
    records themselves will then meet the error, if it is one for them.
    """
    if size <= length - end or size > ROOM:
        return length
    room = FILL * (-(end + size) % ROOM + end + size - length)
    try:
        return length + write_at(fd, room, length)
    except OSError:
        return length


def is_room(end: Buffer) -> bool:
    """Return whether this, the end of a segment, is nothing but its room."""
    return len(end) <= 2 * ROOM and not bytes(end).strip(FILL)


def without_room(storage: Storage, fd: int, start: int, size: int) -> int:
    """Return where a segment's room begins, ``start`` at the lowest; its length if it has none."""
    at = max(start, size - 2 * ROOM)
    return at + len(storage.read(fd, size - at, at).rstrip(FILL))


class AofError(Exception):
    """The log cannot do what was asked for."""


class AofDamaged(AofError):
    """The log is not what it should be, in a way that no crash explains. Nothing was changed on disk.

    ``offset`` is where in the file it begins, None where it is about the file as a whole.
    """

    def __init__(self, path: Path, offset: int | None, reason: str) -> None:
        where = f" is damaged at byte {offset}: " if offset is not None else " "
        super().__init__(f"{path}{where}{reason}")
        self.path = path
        self.offset = offset


def segment_name(number: int) -> str:
    """Return the file name of segment ``number``."""
    return f"{number:08d}.aof"


def base_name(number: int) -> str:
    """Return the file name of the base that replaces the segments up to ``number``."""
    return f"{number:08d}.base"


def encode_mark(seed: int, value: int, kind: int = MARK) -> bytes:
    """Return the mark that says that the segment is on the disk up to ``value``, or the CLOCK of a time."""
    fields = _MARKED.pack(kind, value)
    return xxh64_digest(fields, seed) + fields


def read_mark(data: Buffer, seed: int, kind: int = MARK) -> int | None:
    """Return the position of the mark at the start of ``data``, None if there is no whole one.

    Or the time of the CLOCK there.
    """
    if len(data) < HEADER.size:
        return None
    checksum, length, value = HEADER.unpack_from(data)
    if length != kind or xxh64_intdigest(data[8 : HEADER.size], seed) != checksum:
        return None
    return int(value)


def later_marks(
    storage: Storage, fd: int, seed: int, start: int, size: int
) -> Iterator[tuple[int, int] | None]:
    """Search a segment from ``start`` on; yield (offset, position) for a mark, None now and then."""
    for offset in range(start, size, WINDOW):
        # A mark begins in this window, and ends in it or right behind it.
        window = memoryview(storage.read(fd, WINDOW + HEADER.size, offset))
        for hit in _MARK_START.finditer(window):
            at = hit.start() - 8
            if 0 <= at < WINDOW and (position := read_mark(window[at:], seed)) is not None:
                yield offset + at, position
        yield None


class Header(NamedTuple):
    """What the header of a file says."""

    magic: bytes
    generation: int
    shard: int
    number: int
    sequence: int
    seed: int

    def encode(self) -> bytes:
        """Return the header's bytes."""
        fields = SEGMENT_HEADER.pack(
            self.magic, FORMAT, self.shard, self.generation, self.seed, self.sequence, self.number, 0, 0
        )[:-8]
        return fields + xxh64_digest(fields)

    def check(
        self, path: Path, magic: bytes, generation: int, shard: int, number: int, sequence: int
    ) -> None:
        """Raise AofDamaged unless this is the header of the file that is expected there."""
        found = (self.generation, self.shard, self.number, self.sequence or sequence)
        expected = (generation, shard, number, sequence)
        if self.magic != magic or found != expected:
            raise AofDamaged(
                path,
                0,
                f"(generation, shard, number, sequence number) are {found}, expected {expected}: "
                "it belongs elsewhere",
            )


def new_header(shard: int, generation: int, number: int, sequence: int = 0, magic: bytes = MAGIC) -> Header:
    """Return a header with a seed of its own."""
    return Header(magic, generation, shard, number, sequence, random_seed())


def read_header(storage: Storage, fd: int, path: Path) -> Header:
    """Return the header of an open file. Raises AofDamaged if it has none."""
    head = storage.read(fd, SEGMENT_HEADER.size, 0)
    if len(head) < SEGMENT_HEADER.size:
        raise AofDamaged(path, 0, "its header is cut short")
    magic, form, shard, generation, seed, sequence, number, _, checksum = SEGMENT_HEADER.unpack(head)
    if magic not in (MAGIC, MAGIC_BASE):
        raise AofDamaged(path, 0, "it does not begin as a segment")
    if form > FORMAT:
        raise AofDamaged(path, 8, f"it has format {form}, this imds reads up to {FORMAT}")
    if xxh64_intdigest(head[:-8]) != checksum:
        raise AofDamaged(path, 0, "segment header does not match its checksum")
    return Header(magic, generation, shard, number, sequence, seed)


def create_segment(
    storage: Storage, directory: Path, *, shard: int, generation: int, number: int = 1, sequence: int = 1
) -> None:
    """Make an empty segment and sync it, name and all. Raises OSError, FileExistsError if there is one.

    It is part of the log when the manifest names it.
    """
    fd = storage.open(directory / segment_name(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(storage, fd, new_header(shard, generation, number, sequence).encode())
        storage.fsync(fd)
    finally:
        storage.close(fd)
    storage.fsync_dir(directory)


def discard(storage: Storage, path: Path) -> None:
    """Remove a file that is nothing yet, if there is one. Raises OSError."""
    if path.name in storage.listdir(path.parent):
        storage.unlink(path)


class Reader:
    """Reads the records of one open file, verified, about ``chunk`` bytes at a time.

    ``pos`` is the end of what has been read and ``sequence`` the number of the record that should come
    there, ``records`` how many there were; ``marked`` is the position up to which marks have spoken,
    ``clock`` the time of the last clock, 0 before the first.
    After the end ``damage`` is None, or what is wrong at ``pos``; behind ``pos`` there may be room.
    """

    def __init__(self, storage: Storage, fd: int, path: Path, seed: int, sequence: int) -> None:
        self.path = path
        self.seed = seed
        self.sequence = sequence
        self.records = 0
        self.size = storage.size(fd)
        self.pos = SEGMENT_HEADER.size
        self.marked = SEGMENT_HEADER.size
        self.clock = 0
        self.damage: str | None = None
        self._storage = storage
        self._fd = fd

    def read(self, apply: Callable[[memoryview], object], chunk: int = WINDOW) -> Iterator[None]:
        """Give all records to ``apply``; yield after each chunk.

        ``apply`` raises ValueError for records that it cannot follow. Raises AofDamaged for that, OSError.
        """
        rest = memoryview(b"")
        need = 0
        self.damage = None
        while True:
            data = self._storage.read(self._fd, max(chunk, need - len(rest)), self.pos + len(rest))
            rest = memoryview(b"".join((rest, data)) if rest else data)
            while True:
                found, used, damage = verify_records(rest, self.seed, self.sequence)
                if found:
                    try:
                        apply(rest[:used])
                    except ValueError as error:
                        raise AofDamaged(
                            self.path, self.pos, f"in the records from here on: {error}"
                        ) from error
                    self.sequence += found
                    self.records += found
                    self.pos += used
                    rest = rest[used:]
                if not damage:
                    break
                position = read_mark(rest, self.seed)
                clock = read_mark(rest, self.seed, CLOCK) if position is None else None
                if position is not None:
                    # A mark that speaks for all that is before it needs no mark itself.
                    self.marked = self.pos + HEADER.size if position == self.pos else position
                elif clock is not None:
                    self.clock = clock
                else:
                    break
                self.pos += HEADER.size
                rest = rest[HEADER.size :]
            yield
            if damage or not data:
                break
            # The next record may be larger than a chunk: read all of it then, not chunk by chunk.
            need = HEADER.size + HEADER.unpack_from(rest)[1] if len(rest) >= HEADER.size else 0
        if self.pos < self.size and without_room(self._storage, self._fd, self.pos, self.size) > self.pos:
            self.damage = damage or "record is cut short"


def end_of_records(storage: Storage, fd: int, path: Path) -> int:
    """Return where the records end of a segment that somebody appends to meanwhile.

    All that were in it before are before that. Its length where it is not records up to its room, and stays
    like that.
    """
    first = SEGMENT_HEADER.size
    seed = read_header(storage, fd, path).seed
    while (head := storage.read(fd, HEADER.size, first)) and (
        read_mark(head, seed) is not None or read_mark(head, seed, CLOCK) is not None
    ):
        first += HEADER.size
    number = HEADER.unpack(head)[2] if len(head) == HEADER.size else 1
    reader = Reader(storage, fd, path, seed, number)
    for _ in reader.read(_ignore):
        pass
    end = reader.pos
    for _ in reader.read(_ignore):  # what was half-written, or was not there when what is behind it was read
        pass
    return end if reader.pos > end or reader.damage is None else reader.size


def _ignore(records: memoryview) -> None:
    pass
