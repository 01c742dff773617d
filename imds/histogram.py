"""How often each duration was seen, in few bytes and with a known error.

A value is a whole number (nanoseconds, everywhere in this project). Below 128 every value has a bucket of
its own; above, each power of two is cut into 64 buckets of equal width::

    value     0 1 2 ... 127 | 128-129 ... 254-255 | 256-259 ... 508-511 | ...
    bucket    0 1 2 ... 127 | 128     ... 191     | 192     ... 255     | ...

A bucket is at most 1/64 of its values wide and answers with its middle, so a quantile is wrong by at most
1/128 (0.8 %). Smallest, largest and sum are exact. Two histograms merge by addition, whichever process
filled them: there is one bucket layout and no setting.
"""

from __future__ import annotations

# Values from here on share the last bucket: 2**44 ns are nearly five hours.
LIMIT = 1 << 44
ERROR = 1 / 128  # of a quantile, relative


def bucket(value: int) -> int:
    """Return the number of the bucket that holds ``value``, 0 to LIMIT - 1."""
    shift = value.bit_length() - 7
    return value if shift <= 0 else (shift << 6) + (value >> shift)


def bounds(number: int) -> tuple[int, int]:
    """Return the smallest and the largest value of bucket ``number``."""
    if number < 128:
        return number, number
    shift = (number >> 6) - 1
    low = (number - (shift << 6)) << shift
    return low, low + (1 << shift) - 1


BUCKETS = bucket(LIMIT - 1) + 1


class Histogram:
    """Counts by bucket, and the exact number, sum, smallest and largest of what was recorded."""

    __slots__ = ("counts", "high", "low", "number", "total")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.number = 0
        self.total = 0
        self.low = 0  # smallest and largest mean something only where number > 0
        self.high = 0

    def record(self, value: int, times: int = 1) -> None:
        """Count ``value`` ``times`` times. A negative value (a clock that was set) counts as 0."""
        if value < 0:
            value = 0
        if not self.number or value < self.low:
            self.low = value
        if value > self.high:
            self.high = value
        self.number += times
        self.total += value * times
        # bucket(), written out: this line runs for every reply of a benchmark
        shift = value.bit_length() - 7
        if shift <= 0:
            self.counts[value] += times
        elif value < LIMIT:
            self.counts[(shift << 6) + (value >> shift)] += times
        else:
            self.counts[-1] += times

    def merge(self, other: Histogram) -> None:
        """Add everything that ``other`` has recorded. O(BUCKETS)."""
        if not other.number:
            return
        self.low = min(self.low, other.low) if self.number else other.low
        self.high = max(self.high, other.high)
        self.number += other.number
        self.total += other.total
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]

    def quantile(self, q: float) -> int:
        """Return the value that a share ``q`` (0 to 1) of the recorded ones does not exceed; 0 if none.

        Off by at most ERROR of itself; exact for 0 and 1. O(BUCKETS).
        """
        if not self.number or q <= 0:
            return self.low
        wanted = min(self.number, max(1, -int(-q * self.number // 1)))  # ceil: the nearest-rank rule
        if wanted == self.number:
            return self.high
        seen = 0
        for number, count in enumerate(self.counts):
            seen += count
            if seen >= wanted:
                low, high = bounds(number)
                return min(max((low + high) // 2, self.low), self.high)
        raise AssertionError("number is larger than the sum of the counts")

    def mean(self) -> float:
        """Return the exact mean, 0.0 if nothing was recorded."""
        return self.total / self.number if self.number else 0.0

    def check(self) -> None:
        """Assert that counts, number, smallest and largest agree. O(BUCKETS)."""
        state = {number: count for number, count in enumerate(self.counts) if count}
        assert len(self.counts) == BUCKETS, len(self.counts)
        assert sum(state.values()) == self.number, (self.number, state)
        assert all(count > 0 for count in state.values()), state
        if self.number:
            first, last = (bucket(min(value, LIMIT - 1)) for value in (self.low, self.high))
            assert (min(state), max(state)) == (first, last), (self.low, self.high, state)
            assert self.low * self.number <= self.total <= self.high * self.number, self.total
