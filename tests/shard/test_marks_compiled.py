"""When keys were used last: the compiled store, which has marks in the order of use, beside the twin's times.

Collected only where the compiled kernels were built, or are required.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from requests_at_random import Requests
from test_store import record_of
from test_store_compiled import kernel, pair, same

from imds.envelope import seal
from imds.protocol import encode_request

START = 1_700_000_000_000
SPARSE = 64  # as imds/_kernel/marks.pxd has it
MARK_EVERY = 4096
FEW = 64
SHARE = 128
# Answers that may differ, or come in the store's own order.
OWN = (b"object", b"keys", b"zscan", b"zrandmember")


def run(stores, *batch):
    """Execute a batch in each; return the replies' bytes, of both the same."""
    data = seal(1, len(batch), b"".join(map(encode_request, batch)))
    found = [store.execute(data) for store in stores]
    assert found.count(found[0]) == len(found), batch
    return found[0]


def close(stores, keys):
    """Assert that the marks tell the twin's times, within what they promise."""
    one, two = stores
    two.check()
    for key in keys:
        exact, found = one.idle(key), two.idle(key)
        assert found == exact or exact <= found <= exact + exact // 256, (key, exact, found)


SKIPS = [0, 0, 1, 400, 1000, 1000, 1000, 7000, 60_000, 3_600_000, 86_400_000, -1, -5000, -86_400_000]
step = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2**32)),
    st.tuples(st.just("ask"), st.integers(0, 2**32)),
    st.tuples(st.just("ask"), st.integers(0, 2**32)),
    st.tuples(st.just("stay"), st.integers(2, 300)),
    st.tuples(st.sampled_from(["commit", "rollback", "expire", "flush", "replay"]), st.just(0)),
)


@pytest.mark.parametrize("options", [{}, {"capacity": 20, "evict": True}], ids=["free", "lru"])
@given(steps=st.lists(st.tuples(step, st.sampled_from(SKIPS)), max_size=60), keys=st.integers(3, 200))
@settings(max_examples=120, deadline=None)
def test_any_requests_at_any_times(options, steps, keys):
    stores = pair(**options)
    one, two = stores
    names = [b"key%d" % number for number in range(keys)]
    now = START
    for (what, number), skip in steps:
        now = max(now + skip, 1)
        one.now = two.now = now
        requests = Requests(number, now // 1000, keys)
        if what == "ask":
            batch = [requests() for _ in range(1 + number % 20)]
            batch.append([b"pexpire", requests.key(), b"%d" % requests.dice.choice([1, 900, 10_000, 10**8])])
            run(stores, *(r for r in batch if r[0].lower() not in OWN))
        elif what == "stay":  # second after second, few keys used in each
            for _ in range(number):
                now += 1000
                one.now = two.now = now
                run(stores, [b"set", requests.key(), b"v"], [b"get", requests.key()])
        elif what == "expire":
            assert one.expire(3) == two.expire(3)
        elif what == "flush":
            run(stores, [b"flushall"])
            assert kernel.marks_of(two) == [0]
        elif what == "replay":
            one.commit()
            two.commit()
            records = record_of(*([b"set", requests.key(), b"v"] for _ in range(5)))
            assert one.replay(records) == two.replay(records)
        else:
            getattr(one, what)()
            getattr(two, what)()
        if not number % 4:
            close(stores, names)
    close(stores, names)
    same(one, two)


def use(stores, dice, keys, count, most=10_000):
    """Set keys by chance."""
    while count > 0:
        some = min(count, most)
        run(stores, *([b"set", b"key%d" % dice.randrange(keys), b"v"] for _ in range(some)))
        for store in stores:
            store.commit()
        count -= some


def test_marks_stay_few_and_walks_short_under_load():
    """Keys at random, faster than a mark a second would do; then by one command, and by a rollback."""
    dice, stores = random.Random(1), pair()[1:]
    (store,) = stores
    keys = 50_000
    store.now = START
    for _ in range(100):
        store.now += 100
        use(stores, dice, keys, 10_000, 500)
    counts = kernel.marks_of(store)
    assert sum(counts) == store.keys == keys
    assert 10 < len(counts) < FEW + keys // SHARE + 100
    assert max(counts) < MARK_EVERY + 500
    every = [b"key%d" % number for number in range(keys)]
    pairs = [word for key in every for word in (key, b"v")]
    for name, words in {b"mget": every, b"touch": every, b"mset": pairs}.items():
        run(stores, [name, *words])
        assert max(kernel.marks_of(store)) <= MARK_EVERY + 500, name
    store.commit()
    run(stores, [b"flushall"])
    assert kernel.marks_of(store) == [0]
    store.rollback()
    counts = kernel.marks_of(store)
    assert (max(counts), len(counts)) <= (MARK_EVERY, 2 + keys // MARK_EVERY)
    store.check()


def test_marks_stay_few_where_keys_are_used_seldom():
    """Four months of a few uses in each second, minute or hour, of some keys often and of others."""
    dice, stores = random.Random(2), pair()
    keys, now = 5000, START
    most = 0
    for step, count in [(1000, 10_000), (60_000, 10_000), (3_600_000, 3000), (1000, 10_000)]:
        for _ in range(count):
            now += step
            for store in stores:
                store.now = now
            use(stores, dice, keys if dice.random() < 0.1 else 20, dice.randrange(1, 4))
            most = max(most, len(kernel.marks_of(stores[1]))) if not dice.randrange(100) else most
        close(stores, [b"key%d" % number for number in range(keys)])
    assert 50 < most < 2 * keys // SPARSE + 1500
    same(*stores)


def test_one_key_that_is_used_for_ever():
    stores = pair()[1:]
    for second in range(2000):
        stores[0].now = START + second * 1000
        run(stores, [b"set", b"k", b"v"])
        assert len(kernel.marks_of(stores[0])) <= FEW + 2
    assert stores[0].idle(b"k") == 0


def test_replay_leaves_marks():
    store = pair()[1]
    store.replay(record_of(*([b"set", b"key%d" % number, b"v"] for number in range(50_000))))
    assert max(kernel.marks_of(store)) <= MARK_EVERY
    store.now = START
    run([store], [b"get", b"key1"])
    store.now += 100_000
    run([store], [b"get", b"key2"])
    assert [store.idle(b"key%d" % number) for number in range(3)] == [100, 100, 0]
    store.check()


def test_eviction_takes_the_marks_that_it_meets():
    store = pair(capacity=100, evict=True)[1]
    for number in range(5000):
        store.now = START + number * 1000
        run([store], [b"set", b"key%d" % number, b"v"])
        store.commit()
    assert len(kernel.marks_of(store)) < 110
    assert store.idle(b"key4900") == 99
    store.check()


def test_where_a_mark_cannot_be_allocated_times_are_longer():
    for n in range(1, 4):
        stores = pair()
        two = stores[1]
        for store in stores:
            store.now = START
        run(stores, [b"set", b"a", b"v"], [b"set", b"b", b"v"])
        for store in stores:
            store.now += 5000
        kernel.alloc_fails_at(n)
        try:
            run(stores, [b"get", b"a"])
        finally:
            left = kernel.alloc_fails_at(0)
        assert two.idle(b"a") == (0 if left else 5)
        two.check()
        for store in stores:
            store.now += 5000
        run(stores, [b"get", b"a"])
        close(stores, [b"a", b"b"])
        if left:
            break
    assert n == 2
