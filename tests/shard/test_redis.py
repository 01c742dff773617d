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


@pytest.mark.timeout(0)
def test_the_same_as_redis(variant, redis):
    requests = Requests(ROUNDS, int(time.time()))
    shard = Shard(variant)
    redis([b"flushall"])
    done: set[bytes] = set()
    for step in range(ROUNDS):
        tokens = settled(requests())
        if step % 7 == 0:
            tokens = [b"zadd", b"lex", b"0", requests.member()]
        elif step % 5000 == 4999:
            tokens = [b"flushall"]
        shard.store.now = time.time_ns() // 1_000_000
        ours, theirs = plain(shard(*tokens)), redis(in_redis(tokens))
        assert same(tokens, ours, theirs), (step, tokens, ours, theirs)
        if tokens[0].lower() == b"incrbyfloat" and isinstance(theirs, bytes):
            redis([b"set", tokens[1], ours, b"KEEPTTL"])
        if not isinstance(ours, Exception):
            done.add(tokens[0].lower())
        if step % 500 == 0:
            shard.store.commit()
            shard.store.check()
    assert len(done) > 60 or ROUNDS < 3000
