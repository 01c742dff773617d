"""The records of the append-only file, without I/O.

::

    +----------+--------+----------+-------------------------+
    | checksum | length | sequence | effect                  |
    +----------+--------+----------+-------------------------+
        u64       u32      u64       ``length`` bytes: a request frame of imds/protocol.py

All integers are big-endian and unsigned. The checksum is xxh64, seeded by a random number of the segment,
over everything after itself: a record of another segment, or of an earlier life of the same disk block,
does not pass for one of ours. Sequence numbers rise by one, over all segments of a shard.

An effect is what happened, not what was asked for: an eviction is a ``del``. Replaying effects in order
gives the same data whatever the limits, the clock and the policy are by then.

The compiled twin is ``_kernel/record.pyx``; ``tests/shard/test_record.py`` holds both to the same cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from xxhash import xxh64_digest

from imds.protocol import MAX_REQUEST, Buffer

HEADER = Struct(">QIQ")  # checksum, length, sequence
_HASHED = Struct(">IQ")  # the part of the header that the checksum covers
_CHECKSUM = 8

# An effect is at most the request that caused it, perhaps in another spelling.
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
        body = _HASHED.pack(len(effect), self.sequence) + effect
        self._parts.append(xxh64_digest(body, self.seed))
        self._parts.append(body)
        self.sequence += 1

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


def each_effect(records: Buffer) -> Iterator[tuple[int, int, int]]:
    """Yield (sequence, start, end) of each effect in ``records``, which :func:`verify_records` accepted."""
    pos, size = 0, len(records)
    while pos < size:
        _checksum, length, number = HEADER.unpack_from(records, pos)
        start = pos + HEADER.size
        pos = start + length
        yield number, start, pos
