"""What a log holds, damaged or not: every file is read to its end, and nothing is changed.

Loading (imds/shard/aof.py) stops at damage, because nobody but a person should decide about it. This is what
the person decides by, and with: damage is stepped over, to the next place where a record, a mark or a clock
begins whose checksum is right. A checksum is 64 bits, seeded by a random number of the file: what passes for
a record there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imds.shard.kernel import RecordEncoder, UnifiedStore, verify_records
from imds.shard.manifest import Base, Manifest, read_manifest, unnamed_files
from imds.shard.record import HEADER, MAX_EFFECT, each_effect
from imds.shard.segment import (
    BASE_NAME,
    CLOCK,
    MAGIC,
    MAGIC_BASE,
    MARK,
    SEGMENT_HEADER,
    SEGMENT_NAME,
    WINDOW,
    AofDamaged,
    Header,
    is_room,
    read_header,
    read_mark,
    segment_name,
)
from imds.storage import Mapped, Storage


class Piece(NamedTuple):
    """A stretch of a file. ``kind``: records, mark, clock or damage.

    ``value``: of records the number of the first, of a mark its position, of a clock its time; of damage 0.
    """

    kind: str
    start: int
    end: int
    value: int
    records: memoryview
    reason: str


_NONE = memoryview(b"")


def pieces(storage: Storage, path: Path, header: Header, sequence: int) -> Iterator[Piece]:
    """Yield all of a file behind its header; ``sequence`` is the number that its first record should have.

    The records of a piece must not be used after the next one is asked for. Raises OSError.
    """
    with storage.mapped(path) as mapped, memoryview(mapped) as view:
        yield from _pieces(view, mapped, header.seed, sequence)


def _pieces(view: memoryview, mapped: Mapped, seed: int, sequence: int) -> Iterator[Piece]:
    at, size = SEGMENT_HEADER.size, len(view)
    while at < size:
        window = min(size, at + WINDOW)
        if size - at >= HEADER.size:
            window = max(window, min(size, at + HEADER.size + min(_length(view, at), MAX_EFFECT)))
        with view[at:window] as part:
            found, used, damage = verify_records(part, seed, sequence)
        if found:
            with view[at : at + used] as records:
                yield Piece("records", at, at + used, sequence, records, "")
            at += used
            sequence += found
            continue
        with view[at : at + HEADER.size] as head:
            position, clock = read_mark(head, seed), read_mark(head, seed, CLOCK)
        if position is not None or clock is not None:
            kind, value = ("mark", position) if position is not None else ("clock", clock)
            yield Piece(kind, at, at + HEADER.size, value or 0, _NONE, "")
            at += HEADER.size
            continue
        if is_room(view[at:]):
            return
        # A whole record right here has a number that is not due: those between are in no file.
        following, number = _resume(view, mapped, at, seed, sequence)
        if following > at:
            yield Piece("damage", at, following, 0, _NONE, damage or "record is cut short")
        at, sequence = following, number


def _length(view: memoryview, at: int) -> int:
    length: int = HEADER.unpack_from(view, at)[1]
    return length if length < CLOCK else 0


def _resume(view: memoryview, mapped: Mapped, start: int, seed: int, due: int) -> tuple[int, int]:
    """Return where the next whole thing begins at or after ``start``, and the record number due there.

    O(bytes), and one checksum for each place that looks like a beginning.
    """
    size = len(view)
    # Numbers go on from the one that is due, at one for every 20 bytes at most: their first five bytes are
    # those of this one, or of the one after it.
    tops = {number.to_bytes(8)[:5] for number in (due, due + size)}
    numbers = b"|".join(map(re.escape, sorted(tops)))
    pattern = re.compile(b"(?=\xff\xff\xff[\xff\xfe]|.{4}(?:%b))" % numbers, re.DOTALL)
    for hit in pattern.finditer(mapped, start + 8):
        at = hit.start() - 8
        if size - at < HEADER.size:
            break
        _, length, number = HEADER.unpack_from(view, at)
        if length in (MARK, CLOCK):
            with view[at : at + HEADER.size] as head:
                if read_mark(head, seed, length) is not None:
                    return at, due
        elif length <= MAX_EFFECT and at + HEADER.size + length <= size and due <= number:
            with view[at : at + HEADER.size + length] as one:
                if verify_records(one, seed, number)[0]:
                    return at, number
    return size, due


@dataclass
class FileReport:
    """One file of a log. ``first`` and ``last``: record numbers, 0 if there is none."""

    path: Path
    size: int
    records: int = 0
    first: int = 0
    last: int = 0
    marked: int = 0
    times: list[int] = field(default_factory=list)  # the first clock and the last, microseconds since 1970
    damage: list[Piece] = field(default_factory=list)
    header: str = ""  # what is wrong with it
    missing: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.damage or self.header or self.missing)


@dataclass
class LogReport:
    """One shard's log, file by file; ``manifest`` is None where it had to be guessed from the files."""

    directory: Path
    files: list[FileReport] = field(default_factory=list)
    manifest: Manifest | None = None
    problem: str = ""  # with the manifest
    unnamed: list[str] = field(default_factory=list)
    records: int = 0  # read
    lost: int = 0  # numbers that are missing between those read
    last: int = 0  # the highest number read, or that the base stands for
    unfit: int = 0  # read, but they do not follow from what is before them without what was lost
    clock: int = 0


def examine(
    storage: Storage,
    report: LogReport,
    shard: int,
    generation: int,
    store: UnifiedStore | None = None,
    stop_at_damage: bool = False,
) -> Iterator[Piece]:
    """Read the whole log in ``report.directory``; yield each piece, and at the end of each file an empty one.

    ``report`` is filled meanwhile, its last file is the one that the piece is of. ``store`` has everything
    applied that can be read, up to the first damage with ``stop_at_damage``. Raises OSError.
    """
    directory = report.directory
    names, base = _names(storage, report, shard, generation)
    due, ended = 1, False
    for name in names:
        path = directory / name
        one = FileReport(path, 0)
        report.files.append(one)
        is_base = name.endswith(".base")
        if name not in storage.listdir(directory):
            one.missing = True
            ended = ended or stop_at_damage
            if is_base and base is not None:
                due = base.sequence
                report.lost += base.records
            yield Piece("end", 0, 0, 0, _NONE, "")
            continue
        one.size = storage.size(path)
        header = _header(storage, one, is_base)
        if header is not None:
            number = 1 if is_base else due
            for piece in pieces(storage, path, header, number):
                if piece.kind == "records":
                    count = sum(1 for _ in each_effect(piece.records))
                    one.first = one.first or piece.value
                    if piece.value > number:
                        report.lost += piece.value - number
                        ended = ended or stop_at_damage
                    number = one.last = piece.value + count
                    one.last -= 1
                    one.records += count
                    report.records += count
                    if store is not None and not ended:
                        report.unfit += _apply(store, piece, strict=not _broken(report))
                elif piece.kind == "damage":
                    one.damage.append(piece)
                    ended = ended or stop_at_damage
                elif piece.kind == "clock":
                    one.times[1:] = [piece.value]
                    report.clock = piece.value
                else:
                    one.marked = max(one.marked, piece.value)
                yield piece
            if is_base and base is not None:
                report.lost += max(0, base.records - (number - 1))
            due = (base.sequence if base is not None else header.sequence) if is_base else number
            report.last = due - 1
        ended = ended or (stop_at_damage and not one.whole)
        yield Piece("end", one.size, one.size, 0, _NONE, "")


def _broken(report: LogReport) -> bool:
    return bool(report.lost) or not all(one.whole for one in report.files)


def _apply(store: UnifiedStore, piece: Piece, *, strict: bool) -> int:
    """Apply records; return how many did not fit. Where all is whole so far, they have to."""
    if strict:
        store.replay(piece.records)
        return 0
    unfit, unmet = 0, store.unmet
    for _, start, end in each_effect(piece.records):
        try:
            store.replay(piece.records[start - HEADER.size : end])
        except ValueError:
            unfit += 1
    return unfit + store.unmet - unmet


def _names(storage: Storage, report: LogReport, shard: int, generation: int) -> tuple[list[str], Base | None]:
    """Return the names of the log's files in their order, by its manifest or, without one, by guess."""
    directory = report.directory
    try:
        manifest = read_manifest(storage, directory, shard=shard, generation=generation)
        try:
            report.unnamed = unnamed_files(storage, directory, manifest)
        except AofDamaged as error:
            if segment_name(manifest.last + 1) in storage.listdir(directory):
                raise  # there is a newer segment: the manifest is not to be believed
            report.problem = str(error)
            report.manifest = manifest
            return manifest.names(), manifest.base
    except AofDamaged as error:
        report.problem = str(error)
        return _guess(storage.listdir(directory)), None
    report.manifest = manifest
    return manifest.names(), manifest.base


def _guess(present: list[str]) -> list[str]:
    """Return which files are the log where no manifest says so.

    What a base replaces is removed only after a manifest has named the base: so the oldest base that all
    later segments follow is sure to be whole, and none is even better.
    """
    segments = sorted(int(found[1]) for name in present if (found := SEGMENT_NAME.fullmatch(name)))
    bases = sorted(int(found[1]) for name in present if (found := BASE_NAME.fullmatch(name)))
    for base in (0, *bases):
        later = [number for number in segments if number > base]
        if later and later == list(range(base + 1, later[-1] + 1)):
            break
    else:
        base = bases[-1] if bases else 0
        later = [number for number in segments if number > base]
    names = [name for name in present if (found := BASE_NAME.fullmatch(name)) and int(found[1]) == base]
    return names + [segment_name(number) for number in later]


def _header(storage: Storage, one: FileReport, is_base: bool) -> Header | None:
    """Return a file's header, as far as it can be read; note what is wrong with it."""
    fd = storage.open(one.path, os.O_RDONLY)
    try:
        return read_header(storage, fd, one.path)
    except AofDamaged as error:
        one.header = str(error)
        head = storage.read(fd, SEGMENT_HEADER.size, 0)
        if len(head) < SEGMENT_HEADER.size:
            return None
        _, _, shard, generation, seed, sequence, number, _, _ = SEGMENT_HEADER.unpack(head)
        magic = MAGIC_BASE if is_base else MAGIC
        return Header(magic, generation, shard, number, sequence, seed)  # its seed may be right all the same
    finally:
        storage.close(fd)


def empty_store() -> UnifiedStore:
    """Return a store without limits, to load into."""
    return UnifiedStore(RecordEncoder(0))
