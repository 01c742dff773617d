"""The latency histogram: bucket layout, the promised error, merging."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from imds.histogram import BUCKETS, ERROR, LIMIT, Histogram, bounds, bucket

VALUES = st.integers(0, 200) | st.integers(0, LIMIT - 1) | st.integers(0, 43).map(lambda bit: 1 << bit)
RECORDS = st.lists(st.tuples(VALUES, st.integers(1, 5)), min_size=1, max_size=40)


def filled(records: list[tuple[int, int]]) -> Histogram:
    histogram = Histogram()
    for value, times in records:
        histogram.record(value, times)
    histogram.check()
    return histogram


def test_buckets_follow_each_other_without_gap() -> None:
    expected = 0
    for number in range(BUCKETS):
        low, high = bounds(number)
        assert low == expected
        assert bucket(low) == bucket(high) == number
        assert high - low <= low / 64
        expected = high + 1
    assert expected == LIMIT


@given(RECORDS, st.floats(0, 1))
def test_quantile_is_off_by_the_promised_error_at_most(records: list[tuple[int, int]], q: float) -> None:
    ordered = sorted(value for value, times in records for _ in range(times))
    exact = ordered[max(0, math.ceil(q * len(ordered)) - 1)]
    assert abs(filled(records).quantile(q) - exact) <= exact * ERROR


@given(RECORDS)
def test_smallest_largest_and_mean_are_exact(records: list[tuple[int, int]]) -> None:
    histogram = filled(records)
    ordered = [value for value, times in records for _ in range(times)]
    assert (histogram.quantile(0), histogram.quantile(1)) == (min(ordered), max(ordered))
    assert histogram.mean() == sum(ordered) / len(ordered)


@settings(max_examples=30)
@given(RECORDS, RECORDS)
def test_merging_is_recording_both(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    merged = filled(left)
    merged.merge(filled(right))
    merged.check()
    both = filled(left + right)
    assert {name: getattr(merged, name) for name in Histogram.__slots__} == {
        name: getattr(both, name) for name in Histogram.__slots__
    }


def test_empty_ones_are_harmless() -> None:
    empty = Histogram()
    empty.check()
    assert (empty.quantile(0.5), empty.mean()) == (0, 0.0)
    one = filled([(7, 1)])
    one.merge(empty)
    empty.merge(one)
    empty.check()
    assert (one.low, empty.low, empty.quantile(0.5)) == (7, 7, 7)


def test_values_out_of_range_count_in_the_outer_buckets() -> None:
    histogram = filled([(-5, 1), (LIMIT * 3, 2)])
    assert (histogram.low, histogram.high, histogram.number) == (0, LIMIT * 3, 3)
    assert histogram.counts[0] == 1
    assert histogram.counts[-1] == 2
