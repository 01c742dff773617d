"""The compiled store beside its twin: the same replies, records and data; and no harm where memory ends.

Collected only where the compiled kernels were built, or are required.
"""

from __future__ import annotations

import random
import struct
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import product
from math import inf

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from requests_at_random import Requests

from imds import commands
from imds.envelope import seal
from imds.protocol import decode_response, encode_error, encode_request, encode_response
from imds.shard import record as record_twin
from imds.shard import sortedset as sortedset_twin
from imds.shard import store as twin


def load(name):
    module = import_module(f"imds._kernel.{name}")
    assert str(module.__file__).endswith(tuple(EXTENSION_SUFFIXES)), module.__file__
    return module


record, sortedset, kernel = load("record"), load("sortedset"), load("store")


def pair(**options):
    """Return a store of each variant."""
    hooks = {"stats": lambda _arguments: encode_response(3, struct.pack(">I", 0))}
    return (
        twin.UnifiedStore(record_twin.RecordEncoder(9), hooks=hooks, **options),
        kernel.UnifiedStore(record.RecordEncoder(9), hooks=hooks, **options),
    )


def same(one, two, *, order=True):
    one.check()
    two.check()
    assert one.log.pending() == two.log.pending()
    assert one.digest() == two.digest()
    for name in ("keys", "ops", "hits", "misses", "evictions", "expirations", "timed", "next_deadline"):
        assert getattr(one, name) == getattr(two, name), name
    if order:
        assert list(one.entries()) == list(two.entries())


# ---- the same as the twin --------------------------------------------------------------------------------

WORDS = [
    b"get",
    b"set",
    b"del",
    b"zadd",
    b"zrange",
    b"zrank",
    b"zrem",
    b"stats",
    b"GET",
    b"SeT",
    b"ZADD",
    b"ZRem",
]
NUMBERS = [
    b"0",
    b"-0",
    b"1",
    b"1.5",
    b"-2.25",
    b"inf",
    b"-inf",
    b"1e5",
    b"0.1",
    b"3.141592653589793",
    b"1e-7",
    b"nan",
    b"x",
]


def a_request(dice, keys, members):
    """Return the tokens of a request that is seldom wrong."""
    name = dice.choice(WORDS)
    key = b"key%d" % dice.randrange(keys)
    member = b"m%d" % dice.randrange(members)
    number = dice.choice(NUMBERS) if dice.random() < 0.5 else repr(dice.uniform(-9, 9)).encode()
    rest = {
        b"set": [key, dice.randbytes(dice.choice([0, 1, 20, 64, 300]))],
        b"zadd": [key, number, member],
        b"zrange": [key, number, dice.choice(NUMBERS)],
        b"zrank": [key, member],
        b"zrem": [key, member],
        b"stats": [],
    }.get(name.lower(), [key])
    if dice.random() < 0.02:
        rest = rest[:-1] if dice.random() < 0.5 else [*rest, b"more"]
    return [dice.choice([b"", b"sett", b"\xff", b"gets"]) if dice.random() < 0.01 else name, *rest]


@pytest.mark.parametrize("keys", [3, 60, 2000])
@pytest.mark.parametrize(
    "options", [{}, {"capacity": 40, "evict": True}, {"capacity": 40}], ids=["free", "lru", "full"]
)
def test_random_batches(options, keys):
    """Replies, records, data and the order of use, byte for byte, through commits and rollbacks."""
    dice = random.Random(keys)
    one, two = pair(**options)
    for ticket in range(150):
        batch = [a_request(dice, keys, 300) for _ in range(dice.choice([1, 5, 60]))]
        frames = b"".join(map(encode_request, batch))
        if dice.random() < 0.05:
            frames = frames[: dice.randrange(len(frames))] + dice.randbytes(8)
        if len(frames) < 4 * len(batch):
            continue
        data = seal(ticket, len(batch), frames) + b"tail"
        assert one.execute(data) == two.execute(data), batch
        if dice.random() < 0.05:
            same(one, two)
        if dice.random() < 0.3:
            end = dice.choice(["commit", "commit", "rollback"])
            getattr(one, end)()
            getattr(two, end)()
            if end == "rollback":
                same(one, two)
    same(one, two)


@pytest.mark.parametrize(
    "options",
    [{}, {"capacity": 8, "evict": True}, {"capacity": 9}],
    ids=["free", "lru", "full"],
)
def test_every_command_at_random(options):
    """The same for all of them, while keys expire.

    Replies, records, data, order, commits, rollbacks, replay.
    """
    requests = Requests(len(options), 1_000)
    dice = requests.dice
    one, two = pair(**options)
    one.now = two.now = now = 1_000_000
    records = b""
    for ticket in range(400):
        batch = [requests() for _ in range(dice.choice([1, 5, 20]))]
        batch = [
            [b"zrevrank", *r[1:], b"m1"] if r[0].lower() == b"zrandmember" else r
            for r in batch
            if r[0].lower() not in (b"keys", b"zscan")  # whose order is the store's own
        ]
        batch += [[b"zadd", b"lex", b"0", requests.member()], [b"px", b"key1"]]
        batch.append([b"pexpire", requests.key(), b"%d" % dice.randrange(1, 3000)])
        data = seal(ticket, len(batch), b"".join(map(encode_request, batch)))
        found, other = one.execute(data), two.execute(data)
        assert found == other, [
            (request, *replies)
            for request, *replies in zip(batch, replies_of(found), replies_of(other), strict=True)
            if replies[0] != replies[1]
        ]
        if dice.random() < 0.3:
            assert one.expire(3) == two.expire(3)
        assert one.log.pending() == two.log.pending()
        if dice.random() < 0.1:
            same(one, two)
        if dice.random() < 0.5:
            if dice.random() < 0.7:
                records += one.log.pending()
                one.commit()
                two.commit()
            else:
                one.rollback()
                two.rollback()
                same(one, two)
        now += dice.choice([0, 1, 10, 500])
        one.now = two.now = now
        one.readonly = two.readonly = encode_error("READONLY") if dice.random() < 0.05 else None
    records += one.log.pending()
    same(one, two)
    fresh = pair()
    assert fresh[0].replay(records) == fresh[1].replay(records)
    same(*fresh)
    assert fresh[0].digest() == one.digest()
    assert one.expirations > 20
    saved = [list(saved_by(store, 100)) for store in (one, two)]
    assert b"".join(saved[0]) == b"".join(saved[1])
    assert all(100 <= len(piece) < 1000 for pieces in saved for piece in pieces[:-1])
    for store in pair():
        for piece in saved[0]:
            store.replay(piece)
        assert store.digest() == one.digest()
        assert list(store.entries()) == list(one.entries())


MANY = [b"mget", b"mset", b"del", b"exists", b"touch"]


def of_many_keys(dice, key):
    """Return the tokens of a request of up to 40 keys, some of them twice, or of one that makes data."""
    if dice.random() < 0.5:
        name = dice.choice(MANY)
        keys = [key() for _ in range(dice.choice([1, 2, 3, 15, 16, 17, 33, 40]))]
        if name == b"mset":
            return [name, *(word for each in keys for word in (each, dice.randbytes(dice.randrange(50))))]
        return [name, *keys]
    if dice.random() < 0.3:
        return [b"zadd", key(), b"%d" % dice.randrange(9), b"m%d" % dice.randrange(99)]
    return [b"set", key(), b"v", b"px", b"%d" % dice.randrange(1, 3000)]


def of_deadlines(dice, key):
    """Return the tokens of a request that gives a key a string or a deadline, or takes that."""
    value = dice.randbytes(dice.choice([8, 8, 8, 9, 40]))
    until = [b"px", b"%d" % dice.randrange(1, 30_000)]
    return dice.choice(
        [
            [b"set", key(), value, *until],
            [b"set", key(), value, *until],
            [b"set", key(), value, *until],
            [b"set", key(), value],
            [b"pexpire", key(), until[1]],
            [b"persist", key()],
            [b"append", key(), b"more"],
            [b"get", key()],
        ]
    )


@pytest.mark.parametrize("draw", [of_many_keys, of_deadlines])
@pytest.mark.parametrize(
    "options",
    [{}, {"capacity": 60, "evict": True}, {"capacity": 60}],
    ids=["free", "lru", "full"],
)
def test_random_batches_with_a_clock(options, draw):
    dice = random.Random(1)
    one, two = pair(**options)
    one.now = two.now = now = 1_000_000
    for ticket in range(250):
        batch = [draw(dice, lambda: b"key%d" % dice.randrange(80)) for _ in range(dice.choice([1, 4, 20]))]
        data = seal(ticket, len(batch), b"".join(map(encode_request, batch)))
        assert one.execute(data) == two.execute(data), batch
        if dice.random() < 0.5:
            assert one.expire(9) == two.expire(9)
        assert one.log.pending() == two.log.pending()
        end = dice.choice(["commit", "commit", "rollback"])
        getattr(one, end)()
        getattr(two, end)()
        if dice.random() < 0.2:
            same(one, two)
        now += dice.choice([0, 1, 10, 500])
        one.now = two.now = now
    same(one, two)
    assert one.expirations > 40


def saved_by(store, room):
    """Yield what a store saves, in the pieces that it makes."""
    log = type(store.log)(9)
    for _ in store.save(log, room):
        yield log.pending()
        log.commit()
    yield log.pending()


def replies_of(found):
    """The replies in the answer to one envelope."""
    out, replies, pos = found[1], [], 12
    while pos < len(out):
        status, payload, pos = decode_response(out, pos)
        replies.append((status, payload))
    return replies


def test_one_replays_what_the_other_wrote():
    dice = random.Random(8)
    one, two = pair(capacity=50, evict=True)
    records = b""
    for _ in range(40):
        frames = [encode_request(a_request(dice, 80, 20)) for _ in range(50)]
        data = seal(1, len(frames), b"".join(frames))
        assert one.execute(data) == two.execute(data)
        records += two.log.pending()
        one.commit()
        two.commit()
    fresh = pair()
    assert fresh[0].replay(records) == fresh[1].replay(records)
    same(*fresh)
    assert fresh[0].digest() == one.digest()


@pytest.mark.parametrize(
    "header", [bytes(16), struct.pack(">IIII", 12, 0, 1, 0), struct.pack(">IIII", 12, 7, 0, 9)]
)
def test_both_refuse_an_envelope_with_the_same_words(header):
    said = []
    for store in pair():
        with pytest.raises(ValueError) as caught:
            store.execute(header + b"more")
        said.append(str(caught.value))
    assert said[0] == said[1]


@given(data=st.binary(max_size=80), count=st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_garbage_gets_the_same_reply(data, count):
    one, two = pair()
    data = seal(1, min(count, len(data) // 4), data)
    assert one.execute(data) == two.execute(data)
    same(one, two)


doubles = st.one_of(
    st.floats(allow_nan=False),
    st.integers(0, 2**64 - 1)
    .map(lambda bits: struct.unpack(">d", bits.to_bytes(8))[0])
    .filter(lambda x: x == x),
    st.tuples(st.integers(-(10**17), 10**17), st.integers(0, 22)).map(lambda t: t[0] / 10 ** t[1]),
    st.integers(-(2**70), 2**70).map(float),
)


@given(scores=st.lists(doubles, min_size=50, max_size=50))
@settings(max_examples=150, deadline=None)
def test_scores_are_written_as_repr_writes_them(scores):
    _, store = pair()
    frames = [encode_request([b"zadd", b"z", repr(x).encode(), b"%d" % i]) for i, x in enumerate(scores)]
    frames.append(encode_request([b"zrange", b"z", b"-inf", b"inf"]))
    _used, out = store.execute(seal(1, len(frames), b"".join(frames)))
    ordered = sorted((x + 0.0, b"%d" % i) for i, x in enumerate(scores))
    assert decode_response(out, 12 + 10 * len(scores))[1] == b",".join(b"%a:%b" % one for one in ordered)


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_xxh64_is_the_packages(data, seed):
    assert record.xxh64(data, seed) == xxhash.xxh64_intdigest(data, seed)


# ---- memory ----------------------------------------------------------------------------------------------


class Allocations:
    """``fail(n)`` makes the n-th allocation of a module from now on fail, ``fail(0)`` none."""

    def __init__(self, module):
        self.module = module

    def fail(self, n):
        """Return whether the allocation of the last call has failed."""
        return self.module.alloc_fails_at(n) == 0


@pytest.fixture(params=[kernel, record], ids=["store", "log"])
def allocations(request):
    yield Allocations(request.param)
    request.param.alloc_fails_at(0)


def a_store(prepare, **options):
    """Return a store that has run ``prepare``, by replay: its log has no memory yet."""
    log = record_twin.RecordEncoder(9)
    for request in prepare:
        log.add(encode_request(request))
    store = kernel.UnifiedStore(record.RecordEncoder(9), **options)
    store.replay(log.pending())
    return store


ZSET = [[b"zadd", b"z", b"%d" % number, b"m%d" % number] for number in range(64)]


@pytest.mark.parametrize(
    ("prepare", "request_", "options"),
    [
        ([], [b"set", b"k", b"v"], {}),
        ([[b"set", b"k", b"v"]], [b"set", b"k", b"w"], {}),
        ([[b"set", b"k%d" % n, b"v"] for n in range(30)], [b"set", b"k", b"w" * 5000], {}),
        ([[b"set", b"k", b"v"]], [b"del", b"k"], {}),
        ([], [b"zadd", b"z", b"1", b"m"], {}),
        (ZSET[:1], [b"zadd", b"z", b"2", b"m"], {}),
        (ZSET[:1], [b"zadd", b"z", b"2", b"m0"], {}),
        (ZSET[:1], [b"zrem", b"z", b"m0"], {}),
        (ZSET[:2], [b"zrem", b"z", b"m0"], {}),
        (ZSET[:4], [b"zadd", b"z", b"2", b"one for whom there is no room"], {}),
        (ZSET[:32], [b"zadd", b"z", b"2", b"the one with whom a chunk is split"], {}),
        (ZSET[:63], [b"zadd", b"z", b"40.5", b"m0"], {}),  # the other chunk is full
        (ZSET, [b"zadd", b"z", b"2", b"the member that makes it large"], {}),
        ([[b"set", b"a", b"v"]], [b"set", b"k", b"v"], {"capacity": 1, "evict": True}),
        ([[b"set", b"a", b"v"]], [b"zadd", b"z", b"1", b"m"], {"capacity": 1, "evict": True}),
    ],
    ids=lambda value: (
        value[0].decode() if isinstance(value, list) and value and isinstance(value[0], bytes) else ""
    ),
)
def test_each_allocation_of_a_command_may_fail(allocations, prepare, request_, options):
    """It answers OOM and changes nothing but what it evicted; nothing is lost; the next try succeeds."""
    data = seal(2, 1, encode_request(request_))
    for n in range(1, 100):
        store = a_store(prepare, **options)
        before = store.digest()
        allocations.fail(n)
        try:
            _used, out = store.execute(data)
            reply = out[12:]
        except MemoryError:  # there was none for the reply, before anything was done
            reply = None
        failed = allocations.fail(0)
        store.check()
        if not failed:
            assert decode_response(reply)[0] == 0
            break
        if reply != encode_response(0, b"OK"):  # growing the table is put off without a word
            assert reply in (None, encode_error(commands.OUT_OF_MEMORY))
            if not store.evictions:
                assert (store.digest(), store.log.pending()) == (before, b"")
            _used, out = store.execute(data)
            assert decode_response(out, 12)[0] == 0
        done = store.digest()
        store.check()
        store.rollback()
        store.check()
        assert store.digest() == before
        store.execute(data)
        store.commit()
        assert store.digest() == done
    assert n > 1 or (allocations.module is kernel and request_[0] in (b"del", b"zadd", b"zrem"))


TIMED = [[b"set", b"t", b"v"], [b"pexpireat", b"t", b"5000"]]


@pytest.mark.parametrize(
    ("prepare", "tokens", "options"),
    [
        ([], [b"set", b"k", b"v", b"px", b"5000"], {}),
        (TIMED, [b"set", b"t", b"w", b"keepttl"], {}),
        (TIMED, [b"set", b"t", b"w", b"px", b"9000"], {}),
        ([*TIMED, [b"persist", b"t"]], [b"set", b"t", b"w", b"px", b"9000"], {}),
        (TIMED, [b"append", b"t", b"w" * 500], {}),
        (TIMED, [b"persist", b"t"], {}),
        (TIMED, [b"rename", b"t", b"u"], {}),
        (TIMED + ZSET, [b"rename", b"z", b"t"], {}),
        ([[b"set", b"k", b"1"]], [b"expire", b"k", b"100"], {}),
        (ZSET, [b"expire", b"z", b"100"], {}),
        ([[b"set", b"k", b"1"]], [b"incr", b"k"], {}),
        ([], [b"mset", b"a", b"1", b"b", b"2", b"c", b"3"], {}),
        (ZSET[:9], [b"zadd", b"z", b"1", b"a", b"2", b"b", b"3", b"m3"], {}),
        (ZSET, [b"copy", b"z", b"y"], {}),
        (ZSET, [b"zunionstore", b"z", b"1", b"z", b"weights", b"2"], {}),
        (ZSET, [b"zremrangebyrank", b"z", b"0", b"-2"], {}),
        (TIMED + ZSET, [b"flushall"], {}),
        ([[b"set", b"a", b"v"]], [b"mset", b"k", b"v", b"l", b"v"], {"capacity": 2, "evict": True}),
    ],
    ids=lambda value: (
        value[0].decode() if isinstance(value, list) and value and isinstance(value[0], bytes) else ""
    ),
)
def test_each_allocation_of_a_function_may_fail(allocations, prepare, tokens, options):
    """It answers OOM and has no effect at all; nothing is lost; the next try succeeds, and can be undone."""
    data = seal(2, 1, encode_request(tokens))
    for n in range(1, 400):
        store = a_store(prepare, **options)
        store.now = 1000
        before = store.digest()
        allocations.fail(n)
        try:
            status, reply = decode_response(store.execute(data)[1], 12)[:2]
        except MemoryError:
            status, reply = 2, b""
        failed = allocations.fail(0)
        store.check()
        if status:
            assert failed
            assert reply in (b"", commands.OUT_OF_MEMORY.encode())
            assert (store.digest(), store.log.pending(), store.evictions) == (before, b"", 0)
            assert decode_response(store.execute(data)[1], 12)[0] == 0
        elif not failed:
            break
        done, records = store.digest(), store.log.pending()
        store.check()
        store.rollback()
        store.check()
        assert store.digest() == before
        again = a_store(prepare)
        again.replay(records)
        assert again.digest() == done
    assert n < 399


def test_a_string_without_a_deadline_gets_one_while_the_heap_is_full():
    """It had one and has a timer still, so that it is written over; the sanitizer sees a place too many."""
    for before, behind in product(range(1, 60), range(4)):
        store = a_store([])
        timed = [[b"set", b"key%d" % i, b"v", b"px", b"5000"] for i in range(before + behind)]
        requests = [*timed[:before], [b"persist", b"key0"], *timed[before:], timed[0]]
        store.execute(seal(1, len(requests), b"".join(map(encode_request, requests))))
        assert store.timed == before + behind
        store.check()


def test_allocations_that_fail_at_random(allocations):
    """Through growth and shrinkage, with and without eviction: the store stays whole, the log agrees."""
    dice = random.Random(6)
    for options in ({}, {"maxmemory": 30_000, "evict": True}):
        store = a_store([], **options)
        records = b""
        for _ in range(600):
            batch = [a_request(dice, 400, 200) for _ in range(10)]
            data = seal(1, 10, b"".join(map(encode_request, batch)))
            allocations.fail(dice.randrange(1, 60))
            try:
                store.execute(data)
            except MemoryError:
                pass
            allocations.fail(0)
            if dice.random() < 0.2:
                store.rollback()
            else:
                records += store.log.pending()
                store.commit()
        store.check()
        again = a_store([])
        again.replay(records)
        assert again.digest() == store.digest()


def test_members_that_move_stay_within_maxmemory():
    """A move may part a chunk: others are evicted for that. Without eviction it is not refused."""
    dice = random.Random(8)
    strings = [[b"set", b"k%d" % number, bytes(100)] for number in range(200)]
    members = [[b"zadd", b"z", b"%d" % number, b"m%d" % number] for number in range(300)]
    needed = a_store(strings + members).used
    for evict in (True, False):
        store = a_store(strings + members, maxmemory=needed, evict=evict)
        most = 0
        for _ in range(3000):
            move = [b"zadd", b"z", b"%.3f" % (300 * dice.random()), b"m%d" % dice.randrange(300)]
            assert decode_response(store.execute(seal(1, 1, encode_request(move)))[1], 12)[0] == 0
            store.commit()
            most = max(most, store.used)
        store.check()
        assert (most > needed, store.evictions > 0) == (not evict, evict)
        assert store.members(b"z") == 300


def test_replay_without_memory_says_so():
    allocations = Allocations(kernel)
    store = a_store([])
    store.execute(
        seal(1, 2, encode_request([b"set", b"k", b"v"]) + encode_request([b"zadd", b"z", b"1", b"m"]))
    )
    records = store.log.pending()
    failures = 0
    for n in range(1, 20):
        again = a_store([])
        allocations.fail(n)
        try:
            again.replay(records)
        except MemoryError:
            failures += 1
        allocations.fail(0)
        again.check()
        again.replay(records)
        again.check()
        assert again.digest() == store.digest()
    assert failures > 3


def test_used_is_what_the_allocator_takes():
    """Chunks as glibc makes them: 8 bytes of its own, in steps of 16; 16 bytes for a place in the table."""
    for size in range(200):
        store = a_store([[b"set", b"k", b"v" * size]])
        assert store.used == max(32, (24 + 1 + size + 8 + 15) // 16 * 16) + 16
    store = a_store([[b"set", b"key:%012d" % number, bytes(64)] for number in range(100)])
    assert store.used == 100 * 128
    ranks = sortedset.SortedSet()
    empty = ranks.used
    for size in range(1, 5):  # members; a node counts no more than its score, a size and its name
        ranks.add(b"8 bytes%d" % size, 1.0)
        assert ranks.used - empty == 32 * size
    ranks.add(b"8 bytes.", 1.0)
    assert ranks.used - empty == 32 * 5 + 4 * 16  # and has made the chunk's room twice as large
    dice = random.Random(7)
    for score in (float, lambda _number: dice.random()):
        ranks = sortedset.SortedSet()
        for number in range(20_000):
            ranks.add(b"%08d" % number, score(number))
        assert 60 < ranks.used / 20_000 < 80
    names = [b"%08d" % number for number in range(20_000)]
    dice.shuffle(names)
    for name in names[2000:]:
        assert ranks.remove(name)
    assert ranks.used / 2000 < 130  # thin chunks have joined
    for name in names[8:2000]:
        assert ranks.remove(name)
    assert ranks.used - empty < 600  # and the last one is small


def test_a_large_set_is_freed_in_the_course_of_requests():
    """Removing it does not stop the shard; used tells at once, the memory comes back with what follows."""
    prepare = [[b"zadd", b"z", b"%d" % number, b"m%d" % number] for number in range(5000)]
    for removal in ([b"del", b"z"], [b"set", b"z", b"v"]):
        store = a_store(prepare)
        store.execute(seal(1, 1, encode_request(removal)))
        assert store.used < 300
        assert store.dying == 0
        store.rollback()
        assert store.digest() == a_store(prepare).digest()
        store.execute(seal(1, 1, encode_request(removal)))
        store.commit()
        store.check()
        asked = 0
        while store.dying:
            asked += 1
            store.execute(seal(1, 1, encode_request([b"zrank", b"z", b"m"])))
        assert 5000 / 64 < asked < 7000 / 64
    dropped = a_store(prepare)
    dropped.execute(seal(1, 1, encode_request([b"del", b"z"])))
    dropped.commit()
    assert dropped.dying == 1  # and is freed with the store


def test_random_sets_are_the_same_as_the_twins():
    dice = random.Random(12)
    one, two = sortedset_twin.SortedSet(), sortedset.SortedSet()
    for step in range(20_000):
        member = b"%d" % dice.randrange(3000)
        if dice.random() < (0.3 if step % 8000 < 5000 else 0.8):
            assert one.remove(member) is two.remove(member)
        else:
            score = dice.choice([float(dice.randrange(50)), dice.random()])
            assert one.add(member, score) is two.add(member, score)
        assert one.rank(member) == two.rank(member)
        if step % 1000 == 0:
            two.check()
            assert one.range(-inf, inf) == two.range(-inf, inf)


def test_what_is_used_while_it_is_saved_is_saved_in_the_order_of_use():
    """Beside evictions, whose victims are the place's neighbours. The twin has the order of the start."""
    dice = random.Random(1)
    store = kernel.UnifiedStore(record.RecordEncoder(9), capacity=450, evict=True)

    def run(*requests):
        store.now += 300
        store.execute(seal(1, len(requests), b"".join(map(encode_request, requests))))

    for number in range(500):
        run([b"set", b"%d" % number, b"v" * 100])
    store.commit()
    saved, log = [], record.RecordEncoder(9)
    for _ in store.save(log, 1000):
        run(*([b"get", b"%d" % dice.randrange(500)] for _ in range(20)))
        run([b"append", b"%d" % dice.randrange(500), b"more"], [b"set", b"new-%d" % len(saved), b"v"])
        store.check()
        log.copy(store.log.pending())
        store.commit()
        saved.append(log.pending())
        log.commit()
    assert len(saved) > 10
    copy = kernel.UnifiedStore(record.RecordEncoder(9))
    for records in [*saved, log.pending()]:
        copy.replay(records)
    assert list(copy.entries()) == list(store.entries())


def test_a_store_that_is_forgotten_while_it_is_saved():
    store = kernel.UnifiedStore(record.RecordEncoder(9))
    for number in range(500):
        store.execute(seal(1, 1, encode_request([b"set", b"%d" % number, b"v" * 100])))
    walk = store.save(record.RecordEncoder(9), 1000)
    next(walk)
    store.execute(seal(1, 1, encode_request([b"flushall"])))
    assert store.keys == 0
    store.check()
    del store
    assert list(walk) == []
