"""Functions that have a compiled form: it answers what goes well, byte for byte as the twin does."""

from __future__ import annotations

import sys
from itertools import product

import pytest
from test_store_compiled import allocations, pair, same  # noqa: F401  (a fixture)

from imds import commands
from imds.envelope import seal
from imds.protocol import decode_response, encode_error, encode_request

NOW = 1_700_000_000_000
PREPARED = [
    *(
        [b"set", b"s", b"value"],
        [b"set", b"n", b"41"],
        [b"set", b"t", b"7", b"px", b"5000"],
        [b"set", b"0", b"0"],
    ),
    *([b"zadd", b"z", b"%d" % number, b"m%02d" % number] for number in range(40)),
    *([b"zadd", b"y", b"1", b"a"], [b"pexpire", b"y", b"5000"], [b"set", b"gone", b"v", b"px", b"1"]),
]

# Each has a form, and goes well.
SMOOTH = [
    *([b"incr", b"n"], [b"DECR", b"t"], [b"incrby", b"n", b"-50"], [b"decrby", b"n", b"-5"], [b"incr", b"0"]),
    *([b"exists", b"s"], [b"exists", b"s", b"no", b"s", b"gone"], [b"strlen", b"s"], [b"strlen", b"no"]),
    *([b"ttl", b"t"], [b"ttl", b"s"], [b"pttl", b"no"], [b"pttl", b"y"], [b"TTL", b"gone"]),
    *(
        [b"expire", b"s", b"10"],
        [b"pexpire", b"z", b"10"],
        [b"expire", b"no", b"10"],
        [b"expire", b"t", b"5"],
    ),
    *([b"pexpireat", b"s", b"%d" % (NOW + 9)], [b"expire", b"y", b"5"], [b"pexpire", b"y", b"4999"]),
    *(
        [b"set", b"s", b"v", b"EX", b"10"],
        [b"set", b"z", b"v", b"px", b"10"],
        [b"set", b"new", b"", b"pX", b"1"],
    ),
    *(
        [b"setex", b"t", b"10", b"v"],
        [b"psetex", b"no", b"10", b"v"],
        [b"setnx", b"s", b"v"],
        [b"setnx", b"x", b"v"],
    ),
    *([b"setnx", b"gone", b"v"], [b"mget", b"s", b"z", b"no", b"t", b"gone", b"s"], [b"mget", b"no"]),
    *([b"mset", b"a", b"1", b"s", b"2", b"z", b"3", b"a", b"4"], [b"MSET", b"a", b""]),
    *([b"del", b"s", b"no", b"z", b"s"], [b"unlink", b"t"], [b"unlink", b"gone", b"y"]),
    *(
        [b"zadd", b"z", b"5", b"m00", b"6", b"new", b"5", b"m05", b"-0", b"zero"],
        [b"zadd", b"no", b"1", b"a", b"2", b"a"],
    ),
    *(
        [b"zincrby", b"z", b"1.5", b"m03"],
        [b"zincrby", b"z", b"-0", b"new"],
        [b"zincrby", b"no", b"inf", b"m"],
    ),
    *(
        [b"zincrby", b"z", b"0", b"m03"],
        [b"zscore", b"z", b"m03"],
        [b"zscore", b"z", b"no"],
        [b"zscore", b"no", b"m"],
    ),
    *([b"zcard", b"z"], [b"zcard", b"no"], [b"zcard", b"gone"], [b"zincrby", b"y", b"-2e-7", b"a"]),
    *(
        [b"zrevrange", b"z", b"0", b"9", b"WithScores"],
        [b"zrevrange", b"z", b"0", b"-1"],
        [b"zrevrange", b"no", b"0", b"1"],
    ),
    *([b"zrangebyrank", b"z", b"-3", b"-1", b"withscores"], [b"zrangebyrank", b"z", b"38", b"99"]),
    *(
        [b"zrangebyrank", b"z", b"5", b"4"],
        [b"zrevrange", b"z", b"-99", b"-38"],
        [b"zrangebyrank", b"z", b"-99", b"-99"],
    ),
    *([b"type", key] for key in (b"s", b"z", b"no", b"gone")),
    *([b"TOUCH", b"s", b"no", b"z", b"s", b"gone"], [b"touch", b"s"]),
    *([b"persist", key] for key in (b"s", b"t", b"y", b"no", b"gone")),
    *(
        [b"set", b"s", b"v", *words]
        for words in ([b"nx"], [b"XX"], [b"NX", b"px", b"10"], [b"ex", b"9", b"xx"])
    ),
    *([b"set", b"no", b"v", *words] for words in ([b"nx"], [b"xx"], [b"nx", b"PX", b"10"], [b"nx", b"nx"])),
    *([b"set", b"z", b"v", b"xx", b"ex", b"5"], [b"set", b"gone", b"v", b"nx", b"EX", b"5"]),
    *(
        [b"getset", b"s", b"new"],
        [b"getset", b"no", b"new"],
        [b"getset", b"t", b""],
        [b"getset", b"gone", b"v"],
    ),
    *([b"getdel", key] for key in (b"s", b"t", b"no", b"gone")),
    *(
        [b"getex", key, *words]
        for key in (b"s", b"t", b"no", b"gone")
        for words in ([], [b"ex", b"9"], [b"PX", b"1"], [b"persist"])
    ),
    *([b"append", key, b"more"] for key in (b"s", b"t", b"no", b"gone")),
    *([b"append", b"s", b""], [b"append", b"no", b""], [b"append", b"s", bytes(3000)]),
    *(
        [b"getrange", b"s", b"%d" % first, b"%d" % last]
        for first, last in (
            (0, -1),
            (1, 2),
            (-3, -2),
            (-9, 1),
            (3, 99),
            (4, 3),
            (-1, -2),
            (7, 9),
            (-9, -8),
            (0, 0),
        )
    ),
    *([b"getrange", b"no", b"0", b"-1"], [b"getrange", b"gone", b"-5", b"5"]),
    *(
        [b"zmscore", b"z", b"m03", b"no", b"m03"],
        [b"zmscore", b"no", b"m"],
        [b"zmscore", b"gone", b"a", b"b"],
    ),
    *([b"zrevrank", b"z", b"m03"], [b"zrevrank", b"z", b"no"], [b"zrevrank", b"no", b"m"]),
    *(
        [b"zrem", b"z", b"m03", b"no", b"m03", b"m39"],
        [b"zrem", b"y", b"a", b"a"],
        [b"zrem", b"no", b"a", b"b"],
    ),
    *([b"zrem", b"y", b"b", b"a", b"c", b"d"], [b"zrem", b"z", *[b"m%02d" % number for number in range(40)]]),
    *(
        [name, key, *count]
        for name in (b"zpopmin", b"ZPOPMAX")
        for key, count in product((b"z", b"y"), ([], [b"0"], [b"1"], [b"3"], [b"99"]))
    ),
    *([b"zpopmin", b"no"], [b"zpopmax", b"gone", b"2"]),
    *(
        [name, b"z", low, high]
        for name in (b"zcount", b"zremrangebyscore", b"zrangebyscore")
        for low, high in (
            *((b"-inf", b"+inf"), (b"3", b"5"), (b"(3", b"5"), (b"3", b"(5"), (b"(3", b"(3"), (b"3", b"3")),
            *(
                (b"5", b"3"),
                (b"3.5", b"3.7"),
                (b"(-inf", b"(inf"),
                (b"inf", b"inf"),
                (b"-inf", b"-inf"),
                (b"38", b"1e9"),
            ),
        )
    ),
    *(
        [name, key, b"0", b"inf"]
        for name in (b"zcount", b"zremrangebyscore")
        for key in (b"y", b"no", b"gone")
    ),
    *(
        [name, b"z", *bounds, *words]
        for name, bounds in ((b"zrangebyscore", (b"(10", b"20")), (b"zrevrangebyscore", (b"20", b"(10")))
        for words in (
            *([], [b"withscores"], [b"limit", b"0", b"3"], [b"LIMIT", b"2", b"-1", b"WITHSCORES"]),
            *([b"withscores", b"limit", b"9", b"5"], [b"limit", b"-1", b"2"], [b"limit", b"10", b"1"]),
            *([b"limit", b"0", b"0"], [b"limit", b"99", b"99"], [b"withscores", b"withscores"]),
        )
    ),
    *([b"zrevrangebyscore", b"z", b"5", b"9"], [b"zrevrangebyscore", b"no", b"inf", b"0"]),
    *(
        [b"zremrangebyrank", key, b"%d" % first, b"%d" % last]
        for key, first, last in (
            *((b"z", 0, 3), (b"z", -3, -1), (b"z", 0, -1), (b"z", 5, 4), (b"z", 39, 99), (b"z", 40, 99)),
            *((b"z", -99, 0), (b"z", -99, -99), (b"no", 0, -1), (b"y", 0, 0), (b"gone", 0, 9)),
        )
    ),
]

# These have one, which leaves them to the function.
ODD = [
    *([b"incr", key] for key in (b"no", b"s", b"z", b"gone")),
    *(
        [b"incrby", b"n", text]
        for text in (b"x", b"", b"+1", b"01", b"-0", b"1.0", b" 1", b"9" * 19, b"9" * 20)
    ),
    *([b"decrby", b"n", b"%d" % number] for number in (-(2**63), 2**63 - 1, 2**50, -(2**50), 2**63)),
    *(
        [name, b"s", text]
        for name in (b"expire", b"pexpire", b"pexpireat")
        for text in (b"0", b"-1", b"x", b"9" * 19)
    ),
    *([b"expire", b"s", b"%d" % number] for number in (2**50 // 1000, 2**53, 2**63 - 1, -(2**63))),
    *([b"set", b"s", b"v", b"ex", text] for text in (b"0", b"-1", b"x", b"", b"9" * 16, b"9" * 19)),
    *(
        [b"set", b"s", b"v", *words]
        for words in ([b"exat", b"9999999999"], [b"nx", b"get"], [b"xx", b"e"], [b"", b""])
    ),
    *([b"setex", b"s", text, b"v"] for text in (b"0", b"-5", b"1.5", b"9" * 19)),
    *([b"strlen", b"z"], [b"zcard", b"s"], [b"zscore", b"s", b"m"], [b"zincrby", b"s", b"1", b"m"]),
    *(
        [b"mset", b"a", b"1", b"b"],
        [b"mget"],
        [b"exists"],
        [b"mset"],
        [b"unlink"],
        [b"zadd", b"z", b"1", b"a", b"2"],
    ),
    *(
        [b"zadd", b"z", b"1", b"a", b"nan", b"b"],
        [b"zadd", b"z", b"nx", b"ch", b"1", b"a"],
        [b"zadd", b"s", *[b"1"] * 4],
    ),
    *(
        [b"zadd", b"z", b"1", b"a", b"", b"b"],
        [b"zincrby", b"z", b"x", b"m"],
        [b"zincrby", b"z", b"nan", b"m"],
    ),
    *(
        [b"zrevrange", b"z", b"0", b"1", b"withscore"],
        [b"zrevrange", b"z", b"x", b"1"],
        [b"zrevrange", b"s", b"0", b"1"],
    ),
    *([b"zrangebyrank", b"z", b"0", b"%d" % number] for number in (2**50, 2**63 - 1, -(2**63), 2**63)),
    *([b"zrevrange", b"z", b"%d" % number, b"-1"] for number in (2**62, -(2**62))),
    *(
        [b"set", b"s", b"v", *words]
        for words in (
            *([b"nx", b"xx"], [b"xx", b"nx"], [b"get"], [b"nx", b"ex"], [b"ex", b"1", b"px"], [b"keepttl"]),
            *([b"px", b"0", b"nx"], [b"nx", b"px", b"x"], [b"xx", b"ex", b"9" * 19], [b"nx", b"e", b"1"]),
        )
    ),
    *([b"getex", b"z"], [b"getex", b"z", b"ex", b"9"], [b"getex", b"s", b"keepttl"], [b"getex", b"s", b"ex"]),
    *([b"getex", b"s", b"exat", b"9"], [b"getex", b"s", b"px", b"0"], [b"getex", b"s", b"ex", b"x"]),
    *([b"getset", b"z", b"v"], [b"getdel", b"z"], [b"append", b"z", b"v"], [b"getrange", b"z", b"0", b"1"]),
    *(
        [b"getrange", b"s", text, b"1"]
        for text in (b"x", b"", b"01", b"9" * 19, b"%d" % 2**50, b"%d" % -(2**63))
    ),
    *([b"getrange", b"s", b"0", text] for text in (b"-0", b"%d" % (2**63 - 1), b"%d" % -(2**50))),
    *([b"zmscore", b"s", b"m"], [b"zrevrank", b"s", b"m"], [b"zrem", b"s", b"a", b"b"], [b"zpopmin", b"s"]),
    *([b"zpopmin", b"z", text] for text in (b"-1", b"x", b"1.5", b"%d" % -(2**63), b"9" * 20)),
    *([b"zpopmax", b"z", b"%d" % (2**63 - 1)], [b"zpopmin", b"z", b"1", b"2"]),
    *(
        [name, key, low, high]
        for name in (b"zcount", b"zrangebyscore", b"zrevrangebyscore", b"zremrangebyscore")
        for key, low, high in (
            *(
                (b"z", b"x", b"1"),
                (b"z", b"1", b"nan"),
                (b"z", b"((1", b"2"),
                (b"z", b"", b"1"),
                (b"z", b"(", b"1"),
            ),
            *((b"s", b"0", b"1"), (b"z", b" 1", b"2"), (b"z", b"( 1", b"2"), (b"z", b"1e400", b"-1e400")),
        )
    ),
    *(
        [b"zrangebyscore", b"z", b"0", b"9", *words]
        for words in ([b"limit", b"1"], [b"limit"], [b"limit", b"x", b"1"], [b"limit", b"1", b"x"], [b"rev"])
    ),
    *(
        [b"zrangebyscore", b"z", b"0", b"9", b"limit", b"1", b"%d" % number]
        for number in (2**63 - 1, -(2**63))
    ),
    *(
        [b"zrangebyscore", b"z", b"0", b"9", b"limit", b"%d" % number, b"1"]
        for number in (2**63 - 1, -(2**63))
    ),
    *([b"zremrangebyrank", b"z", b"x", b"1"], [b"zremrangebyrank", b"s", b"0", b"1"]),
    *([b"zremrangebyrank", b"z", b"0", b"%d" % number] for number in (2**50, 2**63 - 1, -(2**63))),
]


def execute(store, *requests):
    data = seal(1, len(requests), b"".join(map(encode_request, requests)))
    used, replies = store.execute(data)
    assert used == len(data)
    return replies


def prepared(**options):
    stores = pair(**options)
    for store in stores:
        store.now = NOW
        execute(store, *PREPARED)
        store.commit()
        store.now = NOW + 2  # so that ``gone`` is
    return stores


@pytest.mark.parametrize("tokens", SMOOTH + ODD, ids=lambda tokens: b" ".join(tokens)[:40].decode())
def test_the_same_as_the_function(tokens):
    """Reply, records, data, order, counts; again after it was undone; and where deadlines are over."""
    one, two = prepared()
    assert execute(one, tokens) == execute(two, tokens)
    same(one, two)
    one.rollback()
    two.rollback()
    same(one, two)
    one.now = two.now = NOW + 6000
    assert execute(one, tokens, tokens) == execute(two, tokens, tokens)
    same(one, two)


@pytest.mark.parametrize("tokens", SMOOTH, ids=lambda tokens: b" ".join(tokens)[:40].decode())
def test_no_python_runs(tokens):
    _one, two = prepared()
    called = []

    def note(frame, event, _argument):
        if event == "call" and "shard" in frame.f_code.co_filename and frame.f_code.co_name != "execute":
            called.append(frame.f_code.co_name)

    data = seal(1, 1, encode_request(tokens))
    sys.setprofile(note)
    try:
        two.execute(data)
    finally:
        sys.setprofile(None)
    assert not called


@pytest.mark.parametrize(
    ("options", "room"),
    [({"capacity": 8, "evict": True}, True), ({"capacity": 8}, False)],
    ids=["lru", "full"],
)
def test_at_the_limit(options, room):
    """What makes a key makes room for it, or is refused as a whole."""
    for tokens in SMOOTH:
        one, two = prepared(**options)
        for number in range(8):
            execute(one, [b"set", b"fill%d" % number, b""])
            execute(two, [b"set", b"fill%d" % number, b""])
        assert one.keys == 8
        assert execute(one, tokens, tokens) == execute(two, tokens, tokens), tokens
        same(one, two)
        assert (one.evictions > 0) is room
        one.rollback()
        two.rollback()
        same(one, two)


def test_replies_that_are_too_long():
    """As a whole: a list is not cut; what was counted stays counted."""
    many = [
        [b"mget", *[b"s"] * 60],
        [b"zrevrange", b"z", b"0", b"-1", b"withscores"],
        [b"zrangebyrank", b"z", b"0", b"-1"],
        [b"zrangebyscore", b"z", b"-inf", b"inf"],
        [b"zmscore", b"z", *[b"m03"] * 60],
        [b"zpopmax", b"z", b"40"],
        [b"getset", b"big", b"v"],
        [b"getdel", b"big"],
        [b"getex", b"big", b"px", b"9000"],
        [b"getrange", b"big", b"1", b"-1"],
    ]
    for tokens, limit in product([*many, [b"mget", b"s"]], (0, 100, 130, 300, 440, 520, 1000)):
        one, two = prepared()
        for store in (one, two):
            execute(store, [b"set", b"big", bytes(300)])
            store.max_response = limit
        assert execute(one, [b"get", b"s"], tokens) == execute(two, [b"get", b"s"], tokens), (tokens, limit)
        same(one, two)


def test_writes_are_refused_and_reads_are_not():
    for tokens in SMOOTH + ODD:
        one, two = prepared()
        one.readonly = two.readonly = encode_error("READONLY disk full")
        assert execute(one, tokens) == execute(two, tokens), tokens
        same(one, two)


@pytest.mark.parametrize("tokens", SMOOTH, ids=lambda tokens: b" ".join(tokens)[:40].decode())
def test_each_allocation_may_fail(allocations, tokens):  # noqa: F811
    """It answers OOM, or raises, and has no effect; the next try succeeds."""
    for n in range(1, 100):
        _one, two = prepared()
        before = two.digest()
        allocations.fail(n)
        try:
            reply = decode_response(execute(two, tokens), 12)[1]
        except MemoryError:
            reply = b""
        failed = allocations.fail(0)
        two.check()
        if not failed:
            break
        if reply in (b"", commands.OUT_OF_MEMORY.encode()):
            assert (two.digest(), two.log.pending()) == (before, b"")
        assert decode_response(execute(two, tokens), 12)[0] != 2
        two.check()
    assert n < 99
