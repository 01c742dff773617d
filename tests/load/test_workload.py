"""What the benchmark asks: spelling, distributions, mixes, and that a seed repeats it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from random import Random

import pytest

from imds.load.workload import (
    COMMANDS,
    MIXES,
    SCORES,
    Source,
    Workload,
    fill,
    key_name,
    kinds_of,
    member_name,
    parse_mix,
    pool,
    resp_request,
    uniform,
    zeta,
    zipf,
)
from imds.protocol import decode_request

GET = (("get", 1),)


def requests(frame: bytes) -> list[list[bytes]]:
    """Return the imds requests of ``frame``."""
    found, pos = [], 0
    while pos < len(frame):
        decoded = decode_request(frame, pos)
        assert decoded is not None
        tokens, pos = decoded
        found.append(tokens)
    return found


def test_names_have_the_documented_sizes() -> None:
    assert key_name(7) == b"key:000000000007"
    assert len(key_name(10**7)) == 16
    assert member_name(999_999) == b"m:999999"


def test_resp_spelling() -> None:
    assert resp_request((b"get", b"k")) == b"*2\r\n$3\r\nget\r\n$1\r\nk\r\n"
    assert resp_request((b"zrange", b"z", b"1", b"25")) == (
        b"*5\r\n$13\r\nZRANGEBYSCORE\r\n$1\r\nz\r\n$1\r\n1\r\n$2\r\n25\r\n$10\r\nWITHSCORES\r\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_draws_requests_of_its_name_within_the_data(name: str) -> None:
    workload = Workload(((name, 1),), keys=10, value_size=5, sets=3, members=4)
    source = Source(workload, Random(1))
    strings = {key_name(i) for i in range(10)}
    sets = {b"z:0", b"z:1", b"z:2"}
    members = {member_name(i) for i in range(4)}
    seen = set()
    for _ in range(300):
        command, key, *rest = COMMANDS[name](source)
        seen.add(key)
        assert command == name.encode()
        if name == "set":
            assert rest == [b"abcde"]
        elif name == "zrange":
            assert 0 <= float(rest[0]) < float(rest[1])
        elif name == "zadd":
            assert 0 <= int(rest[0]) < SCORES
        if name in ("zadd", "zrem", "zrank"):
            assert rest[-1] in members
    assert seen == (sets if name.startswith("z") else strings)


@pytest.mark.parametrize("members", [20, 1000, 50_000])
def test_a_range_holds_about_ten_members(members: int) -> None:
    workload = Workload((("zrange", 1),), sets=1, members=members)
    scores = sorted(int(tokens[2]) for tokens in fill(workload, ("sets",)))
    source = Source(workload, Random(1))
    found = 0
    for _ in range(200):
        low, high = (int(token) for token in COMMANDS["zrange"](source)[2:])
        found += bisect_right(scores, high) - bisect_left(scores, low)
    assert 7 < found / 200 < 13


def test_zeta_is_the_sum() -> None:
    for count in (1, 2, 9_999, 10_000, 10_001, 40_000):
        exact = sum(1 / i**0.99 for i in range(1, count + 1))
        assert zeta(count, 0.99) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_zipf_draws_each_item_as_often_as_it_should(count: int) -> None:
    draw = zipf(count, Random(1))
    drawn = Counter(draw() for _ in range(20_000))
    assert set(drawn) <= set(range(count))
    for item in range(min(count, 2)):
        share = (item + 1) ** -0.99 / zeta(count, 0.99)
        assert drawn[item] / 20_000 == pytest.approx(share, abs=0.02)
    if count > 2:  # the tail of Gray's method is an approximation
        for item in range(2, min(count, 50)):
            assert drawn[item] < drawn[0]
        upper = sum(times for item, times in drawn.items() if item >= count // 2)
        share = 1 - zeta(count // 2, 0.99) / zeta(count, 0.99)
        assert upper / 20_000 == pytest.approx(share, abs=0.05)


def test_uniform_draws_all() -> None:
    draw = uniform(5, Random(1))
    drawn = Counter(draw() for _ in range(5000))
    assert set(drawn) == set(range(5))
    assert max(drawn.values()) < 1200


def test_parse_mix() -> None:
    assert parse_mix("get:90, SET:10") == (("get", 90), ("set", 10))
    assert parse_mix("zadd") == (("zadd", 1),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no command ''"),
        ("get:0", "above 0"),
        ("get:x", "above 0"),
        ("get,get:2", "twice"),
        ("foo", "foo"),
    ],
)
def test_parse_mix_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_mix(text)


def test_pool_repeats_by_seed_and_differs_by_process() -> None:
    workload = Workload(MIXES["mixed"], keys=1000)
    frames = [batch.frame for batch in pool(workload, "imds", 4, 0, 100)]
    assert frames == [batch.frame for batch in pool(workload, "imds", 4, 0, 100)]
    assert frames != [batch.frame for batch in pool(workload, "imds", 4, 1, 100)]
    assert frames != [
        batch.frame for batch in pool(Workload(workload.mix, keys=1000, seed=2), "imds", 4, 0, 100)
    ]


def test_pool_batches_say_what_they_hold() -> None:
    batches = pool(Workload((("get", 3), ("set", 1)), keys=50), "imds", 7, 0, 7000)
    assert len(batches) == 1000
    total: Counter[str] = Counter()
    for batch in batches:
        asked = [tokens[0].decode() for tokens in requests(batch.frame)]
        assert asked == list(batch.names)
        assert dict(batch.counts) == Counter(asked)
        total.update(asked)
    assert total["set"] / 7000 == pytest.approx(0.25, abs=0.03)


def test_pool_of_large_values_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imds.load.workload.POOL_BYTES", 256 << 10)
    batches = pool(Workload((("set", 1),), value_size=100 << 10), "imds", 1, 0)
    assert len(batches) == 3


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_fill_makes_every_key_and_member_once(shares: int) -> None:
    workload = Workload(GET, keys=10, sets=3, members=4)
    made = Counter(
        (tokens[1], tokens[3] if len(tokens) == 4 else b"")
        for share in range(shares)
        for tokens in fill(workload, ("sets", "strings"), share, shares)
    )
    expected = [(key_name(i), b"") for i in range(10)]
    expected += [(b"z:%d" % which, member_name(i)) for which in range(3) for i in range(4)]
    assert made == Counter(expected)


def test_kinds_of() -> None:
    assert kinds_of(GET) == ("strings",)
    assert kinds_of((("zadd", 1), ("del", 2))) == ("sets", "strings")
