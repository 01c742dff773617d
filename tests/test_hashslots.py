"""Key to slot to shard: known answers, since data directories outlive the code."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from imds.hashslots import MAX_SHARDS, SLOTS, SlotMap, slot, tag

SEED = 0x1234567890ABCDEF

TAGS = [
    (b"", b""),
    (b"plain", b"plain"),
    (b"{user:7}:name", b"user:7"),
    (b"name:{user:7}", b"user:7"),
    (b"{}x", b"{}x"),
    (b"{}{a}", b"{}{a}"),
    (b"{a}{b}", b"a"),
    (b"{{a}}", b"{a"),
    (b"}{a}", b"a"),
    (b"{a", b"{a"),
    (b"a}", b"a}"),
    (b"{ }", b" "),
    (b"\xff{\0}\xff", b"\0"),
]

# Computed once; a change of any of these would lose every key of every data directory.
SLOTS_OF = [
    (b"", 0, 10649),  # xxh64 0xef46db3751d8e999
    (b"a", 0, 11867),  # 0xd24ec4f1a98c6e5b
    (b"abc", 0, 2457),  # 0x44bc2cf5ad770999
    (b"abc", 1, 2312),
    (b"abc", (1 << 64) - 1, 8566),
    (b"abc", SEED, 8605),
    (b"user:7", SEED, 3122),
    (b"{user:7}:name", SEED, 3122),
    (b"\x00\xff", SEED, 3137),
    (b"x" * 100, SEED, 8556),
]


@pytest.mark.parametrize(("key", "part"), TAGS)
def test_tag(key, part):
    assert tag(key) == part


@given(st.binary(max_size=9), st.binary(min_size=1, max_size=9), st.binary(max_size=9))
def test_tag_keeps_keys_together(before, part, after):
    if b"{" not in before and b"}" not in part:
        assert tag(before + b"{" + part + b"}" + after) == part


@pytest.mark.parametrize(("key", "seed", "known"), SLOTS_OF)
def test_known_slots(key, seed, known):
    assert slot(key, seed) == known


@given(st.binary(max_size=200), st.integers(0, (1 << 64) - 1))
def test_slot_is_the_hash_of_the_tag(key, seed):
    assert slot(key, seed) == xxh64_intdigest(tag(key), seed) % 16384
    assert SlotMap.even(7, seed).shard_of(key) == SlotMap.even(7, seed).owners[slot(key, seed)]


def test_slots_do_not_depend_on_the_process():
    """``hash()`` is salted per process; nothing of it may be in a slot."""
    code = "from imds.hashslots import slot; print(slot(b'abc', 1), slot(b'{user:7}:name', 5))"
    seen = set()
    for salt in ("0", "1"):
        command = [sys.executable, "-c", code]
        seen.add(subprocess.run(command, env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
                                capture_output=True, text=True, check=True).stdout)  # fmt: skip
    assert len(seen) == 1


@pytest.mark.parametrize("shards", range(1, MAX_SHARDS + 1))
def test_even_maps(shards):
    slots = SlotMap.even(shards, SEED)
    slots.check()
    assert list(slots.owners) == sorted(slots.owners)
    sizes = [slots.owners.count(shard) for shard in range(shards)]
    assert sum(sizes) == SLOTS
    assert max(sizes) - min(sizes) <= 1
    runs = slots.ranges()
    assert [shard for _, _, shard in runs] == list(range(shards))
    again = SlotMap.from_ranges(runs, shards, SEED)
    assert (again.owners, again.shards, again.seed) == (slots.owners, shards, SEED)


def test_known_even_maps():
    assert SlotMap.even(1, 0).ranges() == [(0, 16383, 0)]
    assert SlotMap.even(4, 0).ranges() == [(0, 4095, 0), (4096, 8191, 1), (8192, 12287, 2), (12288, 16383, 3)]
    assert SlotMap.even(3, 0).ranges() == [(0, 5461, 0), (5462, 10922, 1), (10923, 16383, 2)]


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 4)), max_size=12))
def test_any_map_survives_its_ranges(shards, runs):
    owners = b"".join(bytes([shard % shards]) * size for size, shard in runs)[: SLOTS - shards]
    owners = bytes(range(shards)) + owners
    owners += bytes([shards - 1]) * (SLOTS - len(owners))
    slots = SlotMap(owners, shards, SEED)
    runs = slots.ranges()
    assert all(a[2] != b[2] and a[1] + 1 == b[0] for a, b in pairwise(runs))
    assert SlotMap.from_ranges(runs, shards, SEED).owners == owners


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([], id="nothing"),
        pytest.param([(0, 8191, 0)], id="no end"),
        pytest.param([(1, 8191, 0), (8192, 16383, 1)], id="no beginning"),
        pytest.param([(0, 8190, 0), (8192, 16383, 1)], id="gap"),
        pytest.param([(0, 8192, 0), (8192, 16383, 1)], id="overlap"),
        pytest.param([(0, 8192, 0), (8192, 16382, 1)], id="overlap that makes up for the missing end"),
        pytest.param([(0, 8190, 0), (8192, 16383, 1), (8191, 8191, 0)], id="gap that is filled later"),
        pytest.param([(0, 8190, 0), (8192, 16383, 1), (16383, 16383, 1)], id="gap that is made up for"),
        pytest.param([(8192, 16383, 1), (0, 8191, 0)], id="order"),
        pytest.param([(0, 8191, 0), (8192, 16384, 1)], id="past the last slot"),
        pytest.param([(0, 8191, 0), (8192, 8191, 1), (8192, 16383, 1)], id="backwards"),
        pytest.param([(0, 8191, 0), (8192, 16383, 2)], id="shard too high"),
        pytest.param([(0, 8191, 0), (8192, 16383, -1)], id="shard negative"),
        pytest.param([(0, 16383, 0)], id="shard without a slot"),
        pytest.param([(0, 8191, 0), (8192, 16383, 1), (16384, 16384, 1)], id="one slot more"),
    ],
)
def test_ranges_that_are_no_map(runs):
    with pytest.raises(ValueError, match=r"slots?\b"):
        SlotMap.from_ranges(runs, 2, SEED)


@pytest.mark.parametrize(
    ("owners", "shards", "seed", "message"),
    [
        (bytes(SLOTS), 0, 0, "0 shards"),
        (bytes(SLOTS), MAX_SHARDS + 1, 0, "129 shards"),
        (bytes(SLOTS), 1, -1, "seed -1"),
        (bytes(SLOTS), 1, 1 << 64, "seed 18446744073709551616"),
        (bytes(SLOTS - 1), 1, 0, "16383 slots"),
        (bytes(SLOTS + 1), 1, 0, "16385 slots"),
        (bytes(SLOTS), 2, 0, r"shards \[0\] of 2"),
        (bytes([1]) * SLOTS, 1, 0, r"shards \[1\] of 1"),
    ],
)
def test_check_names_what_is_wrong(owners, shards, seed, message):
    with pytest.raises(ValueError, match=message):
        SlotMap(owners, shards, seed)
