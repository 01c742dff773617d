"""The records of the append-only file, without I/O.

::

    +----------+--------+----------+-------------------------+
    | checksum | length | sequence | effect                  |
    +----------+--------+----------+-------------------------+
        u64       u32      u64       ``length`` bytes: request frames of imds/protocol.py

All integers are big-endian and unsigned. The checksum is xxh64, seeded by a random number of the segment,
over everything after itself: a record of another segment, or of an earlier life of the same disk block,
does not pass for one of ours. Sequence numbers rise by one, over all segments of a shard.

An effect is what happened, not what was asked for: an eviction is a ``del``. Replaying effects in order
gives the same data whatever the limits, the clock and the policy are by then. A record has all effects of one
command, mostly one, or of one transaction: after a crash all of them are there, or none.

The compiled twin is ``_kernel/record.pyx``; ``tests/shard/test_record.py`` holds both to the same cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct
from struct import error as StructError

from xxhash import xxh64_digest

from imds.protocol import MAX_REQUEST, U32, Buffer

HEADER = Struct(">QIQ")  # checksum, length, sequence
_HASHED = Struct(">IQ")  # the part of the header that the checksum covers
_pack_hashed = _HASHED.pack
_CHECKSUM = 8

# One effect is at most what a request could have asked for, perhaps in another spelling. The effects of one
# command that are more together become several records.
MAX_EFFECT = MAX_REQUEST + 1024


class RecordEncoder:
    """Collects the records of a batch until the file has taken them.

    ``sequence`` is the number that the next record gets. A batch ends by :meth:`commit` (its records are
    in the file) or :meth:`rollback` (they are not, and their numbers are given out again).
    """

    __slots__ = ("_mark", "_parts", "seed", "sequence")

    def __init__(self, seed: int, sequence: int = 1) -> None:
        self.seed = seed
        self.sequence = sequence
        self._mark = sequence
        self._parts: list[bytes] = []

    def add(self, effect: bytes) -> None:
        """Append the record of ``effect``, a request frame."""
        sequence = self.sequence
        body = _pack_hashed(len(effect), sequence) + effect
        self._parts += (xxh64_digest(body, self.seed), body)
        self.sequence = sequence + 1

    def copy(self, records: Buffer) -> None:
        """Append records with the effects of ``records``, which are whole: their numbers become its own."""
        for _number, start, end in each_record(records):
            self.add(bytes(records[start:end]))

    def pending(self) -> bytes:
        """Return the records added since the last commit or rollback, back to back."""
        return b"".join(self._parts)

    def commit(self) -> None:
        """Forget the pending records: they are in the file."""
        self._parts.clear()
        self._mark = self.sequence

    def rollback(self) -> None:
        """Forget the pending records and take their sequence numbers back."""
        self._parts.clear()
        self.sequence = self._mark

    def place(self) -> tuple[int, int]:
        """Return where the next record begins, for :meth:`join` and :meth:`cut` in the same batch."""
        return len(self._parts), self.sequence

    def join(self, place: tuple[int, int]) -> bool:
        """Make one record of all since ``place``; return whether they fit into one: else nothing changes."""
        start, sequence = place
        if self.sequence - sequence < 2:
            return True
        effect = b"".join(body[_HASHED.size :] for body in self._parts[start + 1 :: 2])
        if len(effect) > MAX_EFFECT:
            return False
        self.cut(place)
        self.add(effect)
        return True

    def cut(self, place: tuple[int, int]) -> None:
        """Forget the records since ``place``, and take their sequence numbers back."""
        start, self.sequence = place
        del self._parts[start:]


def verify_records(buf: Buffer, seed: int, sequence: int) -> tuple[int, int, str | None]:
    """Check the records at the start of ``buf``, the first of which must have number ``sequence``.

    Returns (records, bytes, damage): how many whole and right records there are, their length, and what is
    wrong with the record after them; None if nothing is, or if it is merely cut short by the end of
    ``buf``. Never reads past ``buf``.
    """
    view = memoryview(buf)
    pos, size, count = 0, len(view), 0
    while size - pos >= HEADER.size:
        checksum, length, number = HEADER.unpack_from(view, pos)
        if length > MAX_EFFECT:
            return count, pos, f"record length {length} is over the limit of {MAX_EFFECT}"
        if number != sequence:
            return count, pos, f"record has sequence number {number}, expected {sequence}"
        end = pos + HEADER.size + length
        if end > size:
            break
        if int.from_bytes(xxh64_digest(view[pos + _CHECKSUM : end], seed)) != checksum:
            return count, pos, "record does not match its checksum"
        pos = end
        sequence += 1
        count += 1
    return count, pos, None


def each_record(records: Buffer) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, start, end) of the effects in each of ``records``.

    Which :func:`verify_records` accepted.
    """
    pos, size = 0, len(records)
    while pos < size:
        _checksum, length, number = HEADER.unpack_from(records, pos)
        start = pos + HEADER.size
        pos = start + length
        yield number, start, pos


def each_effect(records: Buffer) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, start, end) of each effect; those of one record have the same number.

    What is no request frame is yielded as if it were one, up to the record's end.
    """
    for number, start, end in each_record(records):
        while True:
            stop = _frame_end(records, start, end)
            yield number, start, stop
            start = stop
            if start >= end:
                break


def _frame_end(buf: Buffer, start: int, end: int) -> int:
    """Return where the request frame at ``start`` ends; ``end`` if there is none before that."""
    try:
        (count,) = U32.unpack_from(buf, start)
        at = start + 4
        for _ in range(min(count, end - start)):
            at += 4 + U32.unpack_from(buf, at)[0]
    except StructError:
        return end
    return min(at, end)


def split_effect(buf: Buffer, start: int, end: int) -> list[list[bytes]] | None:
    """Return the tokens of each frame between ``start`` and ``end``.

    None unless whole frames are all that is there.
    """
    effects = []
    try:
        while start < end:
            (count,) = U32.unpack_from(buf, start)
            start += 4
            tokens = []
            for _ in range(count):
                at = start + 4
                start = at + U32.unpack_from(buf, start)[0]
                tokens.append(bytes(buf[at:start]))
            effects.append(tokens)
    except StructError:
        return None
    return effects if start == end else None


def pack_effects(frames: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the frames joined, to as few records as MAX_EFFECT allows."""
    waiting: list[bytes] = []
    size = 0
    for frame in frames:
        if waiting and size + len(frame) > MAX_EFFECT:
            yield b"".join(waiting)
            waiting.clear()
            size = 0
        waiting.append(frame)
        size += len(frame)
    if waiting:
        yield b"".join(waiting)
