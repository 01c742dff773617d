"""The log's records: whole, cut at each byte, with each bit wrong, and garbage."""

from __future__ import annotations

import random
from struct import pack

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from imds.shard import record
from imds.shard.record import HEADER, MAX_EFFECT, each_record

SEED = 0xFEDC_BA98_7654_3210


@pytest.fixture(scope="module")
def encoder(variant):
    return variant.pick(record.RecordEncoder, "record")


@pytest.fixture(scope="module")
def verify(variant):
    return variant.pick(record.verify_records, "record")


def written(encoder, effects, sequence=1, seed=SEED):
    log = encoder(seed, sequence)
    for effect in effects:
        log.add(effect)
    return log.pending()


EFFECTS = [b"", b"a", b"\0" * 7, b"effect", bytes(range(256)), b"x" * 1000]


def test_the_format_is_what_the_picture_says(encoder):
    body = pack(">IQ", 6, 9) + b"effect"
    assert written(encoder, [b"effect"], 9) == pack(">Q", xxhash.xxh64_intdigest(body, SEED)) + body


def test_every_length_around_the_hash_blocks(encoder, verify):
    """xxh64 reads blocks of 32, 8, 4 and 1 bytes."""
    effects = [bytes((size * 7 + i) % 256 for i in range(size)) for size in range(100)]
    records = written(encoder, effects)
    plain = written(record.RecordEncoder, effects)
    assert records == plain
    assert verify(records, SEED, 1) == (100, len(records), None)


@given(effects=st.lists(st.binary(max_size=80)), seed=st.integers(0, 2**64 - 1), first=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read(encoder, verify, effects, seed, first):
    records = written(encoder, effects, first, seed)
    assert verify(records, seed, first) == (len(effects), len(records), None)
    found = [(number, records[start:end]) for number, start, end in each_record(records)]
    assert found == list(enumerate(effects, first))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(encoder, verify, kind):
    records = written(encoder, EFFECTS)
    assert verify(kind(records), SEED, 1) == (len(EFFECTS), len(records), None)


@given(
    before=st.lists(st.binary(max_size=40), max_size=3),
    joined=st.lists(st.binary(max_size=40), max_size=6),
    after=st.lists(st.binary(max_size=40), max_size=3),
    cut=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_records_made_one_or_none(encoder, before, joined, after, cut):
    log = encoder(SEED, 5)
    for effect in before:
        log.add(effect)
    place = log.place()
    for effect in joined:
        log.add(effect)
    if cut:
        log.cut(place)
        expected = [*before, *after]
    else:
        assert log.join(place)
        expected = [*before, *([b"".join(joined)] if joined else []), *after]
    for effect in after:
        log.add(effect)
    assert log.pending() == written(encoder, expected, 5)
    assert log.sequence == 5 + len(expected)


def test_what_is_too_large_for_one_record_stays_as_it_is(encoder, verify):
    half = bytes(MAX_EFFECT // 2)
    log = encoder(SEED)
    place = log.place()
    for effect in (half, half):
        log.add(effect)
    assert log.join(place)
    assert verify(log.pending(), SEED, 1)[0] == 1
    log.add(b"more")
    records = log.pending()
    assert not log.join(place)
    assert log.pending() == records
    log.cut(place)
    assert (log.pending(), log.sequence) == (b"", 1)


def test_cut_at_each_byte(encoder, verify):
    records = written(encoder, EFFECTS)
    ends = [0] + [end for _number, _start, end in each_record(records)]
    for cut in range(len(records)):
        whole = sum(end <= cut for end in ends) - 1
        assert verify(records[:cut], SEED, 1) == (whole, ends[whole], None)


def test_each_bit_wrong(encoder, verify):
    """No flipped bit passes: what it hits is damage, or, in a length, may look like a record to come."""
    records = written(encoder, [b"one", b"two", b"three"])
    ends = [0] + [end for _number, _start, end in each_record(records)]
    for bit in range(len(records) * 8):
        wrong = bytearray(records)
        wrong[bit // 8] ^= 1 << bit % 8
        count, size, damage = verify(wrong, SEED, 1)
        assert count == sum(end * 8 <= bit for end in ends) - 1
        assert size == ends[count]
        in_length = 8 <= bit // 8 - size < 12
        assert damage is not None or in_length


def test_a_record_of_another_place_is_damage(encoder, verify):
    records = written(encoder, [b"one", b"two"])
    assert verify(records, SEED + 1, 1) == (0, 0, "record does not match its checksum")
    assert verify(records, SEED, 2) == (0, 0, "record has sequence number 1, expected 2")
    second = len(records) // 2
    assert verify(records[:second] * 2, SEED, 1) == (
        1,
        second,
        "record has sequence number 1, expected 2",
    )


def test_an_impossible_length_is_damage_at_once(verify):
    for length in (MAX_EFFECT + 1, 2**31, 2**32 - 1):
        damage = f"record length {length} is over the limit of {MAX_EFFECT}"
        assert verify(HEADER.pack(0, length, 1), SEED, 1) == (0, 0, damage)
    assert verify(HEADER.pack(0, MAX_EFFECT, 1), SEED, 1) == (0, 0, None)


def test_garbage(verify):
    dice = random.Random(3)
    for size in [*range(64), 1000]:
        count, used, _damage = verify(dice.randbytes(size), SEED, 1)
        assert (count, used) == (0, 0)


def test_numbers_at_the_edges_of_machine_words(encoder, verify):
    for first in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 3):
        for seed in (0, 2**31, 2**63, 2**64 - 1):
            records = written(encoder, [b"a", b"b"], first, seed)
            assert records == written(record.RecordEncoder, [b"a", b"b"], first, seed)
            assert verify(records, seed, first) == (2, len(records), None)


def test_commit_keeps_the_numbers_and_rollback_takes_them_back(encoder):
    log = encoder(SEED, 5)
    assert (log.seed, log.sequence, log.pending()) == (SEED, 5, b"")
    log.add(b"a")
    log.add(b"b")
    first = log.pending()
    assert log.sequence == 7
    assert log.pending() == first
    log.rollback()
    assert (log.sequence, log.pending()) == (5, b"")
    log.add(b"a")
    log.add(b"b")
    assert log.pending() == first
    log.commit()
    assert (log.sequence, log.pending()) == (7, b"")
    log.rollback()
    assert log.sequence == 7


STEPS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from([0, 1, 19, 20, 100, 3000, 9000]), st.integers(0, 255)),
    st.tuples(st.sampled_from(["place", "cut", "join", "pending", "commit", "rollback"])),
)


@given(steps=st.lists(STEPS, max_size=40))
@settings(max_examples=200, deadline=None)
def test_whatever_is_done_to_records_they_are_what_the_twin_makes(encoder, steps):
    """When a checksum is computed is the encoder's own affair."""
    logs = [encoder(SEED, 7), record.RecordEncoder(SEED, 7)]
    places = None
    for kind, *how in [*steps, ("pending",)]:
        if kind == "add":
            size, byte = how
            for log in logs:
                log.add(bytes([byte]) * size)
        elif kind == "place":
            places = [log.place() for log in logs]
        elif kind in {"cut", "join"}:
            if places is not None:
                assert len({getattr(log, kind)(place) for log, place in zip(logs, places, strict=True)}) == 1
        elif kind == "pending":
            assert logs[0].pending() == logs[1].pending()
        else:
            for log in logs:
                getattr(log, kind)()
            places = None
        assert logs[0].sequence == logs[1].sequence


def test_what_was_taken_back_is_not_in_what_comes_after(encoder):
    log = encoder(SEED, 1)
    log.add(b"old" * 5000)
    log.add(b"old")
    log.pending()
    log.rollback()
    log.add(b"new" * 5000)
    log.add(b"new")
    assert log.pending() == written(encoder, [b"new" * 5000, b"new"])
    log.commit()
    log.add(b"newer" * 3000)
    assert log.pending() == written(encoder, [b"newer" * 3000], 3)
