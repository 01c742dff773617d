"""Every command on data, in the store, beside a real redis-server 7: the same but for DIFFERENCES."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from beside_redis import DIFFERENCES, ROUNDS, in_redis, plain, running, same, settled
from requests_at_random import Requests
from test_store import Shard


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with running(tmp_path_factory.mktemp("redis")) as connection:
        yield connection


def test_the_readme_has_every_difference():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert "".join(f"* {text}\n" for text in DIFFERENCES.values()) in readme


# Each on a key of its own: which of them count as use?
USES = """
    get s, setnx s v, set s v nx, set s v xx, copy s s, getrange s 0 1,
    strlen s, set s v, append s v, setrange s 0 v, getset s v, getex s, incr s, mget s,
    exists s, type s, ttl s, pttl s, persist s, expire s 100, touch s, object encoding s,
    zadd z 1 m, zrank z m, zscore z m, zcard z, zcount z 0 1, zrem z no, zincrby z 1 m, zrangebyscore z 0 1,
    zrandmember z, zscan z 0, type z, touch z, dbsize, randomkey, scan 0, keys *
"""


def test_what_counts_as_use(variant, redis):
    """It makes a key the last in the order of use, and its idle time 0."""
    lines = [line.split() for line in USES.encode().split(b",")]
    keys = [b"key%d" % number for number in range(len(lines))]
    shard = Shard(variant)
    shard.store.now = time.time_ns() // 1_000_000
    redis([b"flushall"])
    for line, key in zip(lines, keys, strict=True):
        made = [b"zadd", key, b"1", b"m"] if b"z" in line else [b"set", key, b"123456"]
        shard(*made)
        redis(made)
    time.sleep(2.2)
    shard.store.now = time.time_ns() // 1_000_000
    for line, key in zip(lines, keys, strict=True):
        tokens = [key if token in (b"s", b"z") and token != line[0] else token for token in line]
        shard(b"set", b"other", b"")
        shard(*tokens)
        redis(tokens)
        idle = redis([b"object", b"idletime", key])
        assert (shard.order()[-1] == key) == (idle < 2), line
        assert (shard.store.idle(key) < 2) == (idle < 2), line


@pytest.mark.timeout(0)
def test_the_same_as_redis(variant, redis):
    requests = Requests(ROUNDS, int(time.time()))
    shard = Shard(variant)
    redis([b"flushall"])
    done: set[bytes] = set()
    waits = 500  # of 20 ms, in all
    for step in range(ROUNDS):
        tokens = settled(requests())
        if step % 7 == 0:
            tokens = [b"zadd", b"lex", b"0", requests.member()]
        elif step % 5000 == 4999:
            tokens = [b"flushall"]
        shard.store.now = time.time_ns() // 1_000_000
        ours, theirs = plain(shard(*tokens)), redis(in_redis(tokens))
        while tokens == [b"dbsize"] and not same(tokens, ours, theirs) and (waits := waits - 1):
            time.sleep(0.02)  # keys that are over are counted until each of both has come to remove them
            shard.store.now = time.time_ns() // 1_000_000
            shard.store.expire(1000)
            ours, theirs = plain(shard(*tokens)), redis(tokens)
        assert same(tokens, ours, theirs), (step, tokens, ours, theirs)
        if tokens[0].lower() == b"incrbyfloat" and isinstance(theirs, bytes):
            redis([b"set", tokens[1], ours, b"KEEPTTL"])
        if not isinstance(ours, Exception):
            done.add(tokens[0].lower())
        if step % 500 == 0:
            shard.store.commit()
            shard.store.check()
    assert len(done) > 60 or ROUNDS < 3000
