"""UnifiedStore: its replies byte for byte, and random operations against a plain dict."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import OrderedDict
from math import inf
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from requests_at_random import Requests

from imds import commands, envelope
from imds.commands import COMMANDS
from imds.protocol import (
    LIST,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
    split_request,
)
from imds.shard import record, store
from imds.shard.keyspace import FUNCTIONS
from imds.shard.record import each_effect

SEED = 7
OK = (0, b"OK")
NONE = (1, b"")


def error(text):
    return (2, text.encode())


class Shard:
    """A store of either variant, driven by tokens."""

    tickets = itertools.count(2**32 - 100)

    def __init__(self, variant, **options):
        self.store = variant.pick(store.UnifiedStore, "store")(
            variant.pick(record.RecordEncoder, "record")(SEED), **options
        )

    def batch(self, *requests):
        """Execute ``requests`` in one envelope; return (status, payload) for each."""
        frames = b"".join(
            encode_request([str(t).encode() if isinstance(t, int) else t for t in r]) for r in requests
        )
        return self.frames(frames, len(requests))

    def frames(self, frames, count):
        ticket = next(self.tickets) % 2**32
        data = envelope.seal(ticket, count, frames)
        used, out = self.store.execute(data)
        assert used == len(data)
        return self.replies(out, ticket, count)

    @staticmethod
    def replies(out, ticket, count):
        assert envelope.REPLY.unpack_from(out) == (len(out) - 4, ticket, count)
        found, pos = [], envelope.REPLY.size
        while pos < len(out):
            status, payload, pos = decode_response(out, pos)
            found.append((status, payload))
        assert len(found) == count
        return found

    def __call__(self, *tokens):
        (reply,) = self.batch(tokens)
        return reply

    def effects(self):
        """The tokens of each pending effect."""
        records = self.store.log.pending()
        assert record.verify_records(records, SEED, 1)[1:] == (len(records), None) or self.store.log.sequence
        return [split_request(records[start:end])[0] for _number, start, end in each_effect(records)]

    def order(self):
        return [key for key, _value, _when in self.store.entries()]


def record_of(*requests):
    """A log's records with these effects."""
    log = record.RecordEncoder(SEED)
    for tokens in requests:
        log.add(encode_request(tokens))
    return log.pending()


@pytest.fixture
def shard(variant):
    return Shard(variant)


# ---- replies ---------------------------------------------------------------------------------------------


def test_strings(shard):
    assert shard(b"get", b"k") == NONE
    assert shard(b"set", b"k", b"v") == OK
    assert shard(b"get", b"k") == (0, b"v")
    assert shard(b"set", b"k", b"") == OK
    assert shard(b"get", b"k") == (0, b"")
    assert shard(b"set", b"", b"empty key") == OK
    assert shard(b"get", b"") == (0, b"empty key")
    assert shard(b"del", b"k") == OK
    assert shard(b"del", b"k") == NONE
    assert shard.store.keys == 1
    shard.store.check()


def test_sorted_sets(shard):
    assert shard(b"zrange", b"z", b"0", b"1") == NONE
    assert shard(b"zrank", b"z", b"a") == NONE
    assert shard(b"zrem", b"z", b"a") == NONE
    assert shard(b"zadd", b"z", b"2.5", b"b") == OK
    assert shard(b"zadd", b"z", b"1", b"a") == OK
    assert shard(b"zadd", b"z", b"1e400", b"top") == OK
    assert shard(b"zadd", b"z", b"-INF", b"bottom") == OK
    assert shard(b"zrange", b"z", b"-inf", b"Infinity") == (0, b"-inf:bottom,1.0:a,2.5:b,inf:top")
    assert shard(b"zrange", b"z", b"1", b"2.5") == (0, b"1.0:a,2.5:b")
    assert shard(b"zrange", b"z", b"2.5", b"1") == NONE
    assert shard(b"zrange", b"z", b"1.1", b"2.4") == NONE
    assert shard(b"zrank", b"z", b"bottom") == (0, b"0")
    assert shard(b"zrank", b"z", b"top") == (0, b"3")
    assert shard(b"zrank", b"z", b"c") == NONE
    assert shard(b"zadd", b"z", b"3", b"a") == OK
    assert shard(b"zrank", b"z", b"a") == (0, b"2")
    for member in (b"a", b"b", b"top", b"bottom"):
        assert shard(b"zrem", b"z", member) == OK
        assert shard(b"zrem", b"z", member) == NONE
        shard.store.check()
    assert shard.store.keys == 0
    assert shard(b"get", b"z") == NONE


def test_one_keyspace(shard):
    wrong = error(commands.WRONG_TYPE)
    shard(b"set", b"s", b"v")
    shard(b"zadd", b"z", b"1", b"m")
    assert shard(b"get", b"z") == wrong
    assert shard(b"zadd", b"s", b"1", b"m") == wrong
    assert shard(b"zrange", b"s", b"1", b"2") == wrong
    assert shard(b"zrank", b"s", b"m") == wrong
    assert shard(b"zrem", b"s", b"m") == wrong
    assert shard(b"zadd", b"s", b"nan", b"m") == error(commands.BAD_SCORE)
    assert shard(b"set", b"z", b"string now") == OK
    assert shard(b"get", b"z") == (0, b"string now")
    assert shard(b"del", b"z") == OK
    assert shard(b"zadd", b"z", b"1", b"m") == OK
    assert shard(b"del", b"z") == OK
    shard.store.check()


def test_every_command_of_the_table_is_here_and_no_other(variant):
    """Each row: its name in any case, a token too few and one too many, and whether it is a write."""
    for row in COMMANDS.values():
        shard = Shard(variant)
        tokens = [b"1"] * row.min_tokens
        here = row.in_store or row.name in FUNCTIONS
        for name in (row.name, row.name.upper(), row.name.title()):
            tokens[0] = name.encode()
            assert (shard(*tokens) != error(commands.UNKNOWN_COMMAND)) is here
            assert shard(*tokens) != error(commands.WRONG_ARITY)
        if here:
            if row.min_tokens > 1:
                assert shard(*tokens[:-1]) == error(commands.WRONG_ARITY)
            if row.max_tokens < 20:
                assert shard(*tokens, *[b"1"] * (row.max_tokens + 1 - row.min_tokens)) == error(
                    commands.WRONG_ARITY
                )
            shard.store.readonly = encode_error("READONLY disk full")
            assert (shard(*tokens) == error("READONLY disk full")) is row.write
        shard.store.check()
    here = {row.name for row in COMMANDS.values() if row.in_store}
    assert {name[4:] for name in dir(store.UnifiedStore) if name.startswith("cmd_")} == set(store.HOT)
    assert here <= set(store.HOT) | set(FUNCTIONS) <= {*here, "memory"}


@pytest.mark.parametrize(
    "name",
    [b"", b"\0", b"ge", b"gets", b"get\0", b"GET ", b"zran", b"zranges", b"stats", b"x" * 10_000, b"\xc7et"],
)
def test_unknown_commands(shard, name):
    assert shard(name) == shard(name, b"k") == shard(name, b"k", b"v") == error(commands.UNKNOWN_COMMAND)
    assert shard() == error(commands.UNKNOWN_COMMAND)


def test_hooks_answer_for_the_process(variant):
    calls = []

    def stats(arguments):
        assert arguments == []
        calls.append((shard.store.ops, shard.store.hits))
        return encode_response(3, b"\0\0\0\0")

    shard = Shard(variant, hooks={"stats": stats})
    shard(b"set", b"k", b"v")
    assert shard.batch([b"get", b"k"], [b"StaTs"], [b"get", b"k"]) == [(0, b"v"), (3, b"\0\0\0\0"), (0, b"v")]
    assert shard(b"stats", b"x") == error(commands.WRONG_ARITY)
    assert [hits for _ops, hits in calls] == [1]
    assert shard.store.ops == 5


def test_a_deadline_of_zero_is_past_and_not_none(variant):
    shard = Shard(variant)
    shard.store.now = 1000
    for command in (b"expireat", b"pexpireat"):
        shard(b"set", b"k", b"v")
        assert shard(command, b"k", b"0") == (0, b"1")
        assert shard(b"exists", b"k") == (0, b"0")
    shard(b"set", b"k", b"v")
    assert shard(b"pexpire", b"k", b"-1000") == (0, b"1")
    assert shard(b"exists", b"k") == (0, b"0")


def test_the_keys_that_were_used_last(variant):
    shard = Shard(variant)
    shard.store.now = 1000
    assert shard(b"recent") == (LIST, encode_list([]))
    for number in range(12):
        shard(b"set", b"%d" % number, b"v")
    shard(b"pexpire", b"10", b"5")
    shard(b"get", b"3")
    shard(b"type", b"0")  # no use
    assert shard(b"recent", b"3") == (LIST, encode_list([b"3", b"10", b"11"]))
    assert shard(b"recent", b"3") == (LIST, encode_list([b"3", b"10", b"11"]))  # nor is this
    shard.store.now = 2000
    assert shard(b"recent", b"3") == (LIST, encode_list([b"3", b"11"]))  # one of the three is over
    assert shard(b"recent", b"3") == (LIST, encode_list([b"3", b"11", b"9"]))
    assert decode_list(shard(b"recent")[1])[-1] == b"1"
    assert decode_list(shard(b"recent", b"10000")[1])[-1] == b"0"
    for count in (b"0", b"-1", b"10001"):
        assert shard(b"recent", count)[1].startswith(b"ERR value is out of range")
    assert shard(b"recent", b"x")[1] == b"ERR value is not an integer or out of range"
    shard.store.check()


def test_the_seconds_since_the_last_use(variant):
    shard = Shard(variant)

    def idle(key):
        return shard(b"object", b"IdleTime", key)

    shard.store.replay(record_of([b"set", b"old", b"v"]))
    shard.store.now = start = 1_700_000_000_500
    assert idle(b"old") == (0, b"0")  # from the load on
    shard(b"set", b"k", b"v")
    shard(b"zadd", b"z", b"1", b"m")
    shard.store.now = start + 999
    assert idle(b"k") == (0, b"0")
    shard.store.now = start + 3000
    shard(b"type", b"k")  # no use, nor was asking
    assert (idle(b"k"), idle(b"z"), idle(b"old"), idle(b"no")) == ((0, b"3"), (0, b"3"), (0, b"3"), NONE)
    shard(b"get", b"k")
    shard(b"rename", b"z", b"y")
    shard(b"copy", b"old", b"copied")
    shard.store.commit()
    shard.store.now = start + 5000
    assert [idle(key) for key in (b"k", b"y", b"old", b"copied")] == [(0, b"2")] * 4
    shard(b"del", b"k")
    assert idle(b"k") == NONE
    shard.store.now = start + 9000
    shard.store.expire(1)
    shard.store.rollback()  # what is put back is used by that
    assert (idle(b"k"), idle(b"y")) == ((0, b"0"), (0, b"6"))
    shard.store.now = start - 3_600_000  # a clock that is set back: no time has passed
    assert (idle(b"k"), idle(b"y")) == ((0, b"0"), (0, b"6"))
    shard(b"get", b"k")
    shard.store.now += 2000
    assert (idle(b"k"), idle(b"y")) == ((0, b"2"), (0, b"8"))
    shard(b"pexpire", b"k", b"1")
    shard.store.now += 1
    assert idle(b"k") == NONE
    assert shard(b"object", b"freq", b"y")[1].startswith(b"ERR An LFU maxmemory policy is not selected")
    shard.store.check()


def test_a_hook_that_fails_raises_and_the_batch_can_be_undone(variant):
    def stats(_arguments):
        raise RuntimeError("hook")

    shard = Shard(variant, hooks={"stats": stats})
    with pytest.raises(RuntimeError, match="hook"):
        shard.batch([b"set", b"k", b"v"], [b"stats"])
    shard.store.rollback()
    shard.store.check()
    assert shard.order() == []


def test_what_a_hook_runs_belongs_to_its_batch(variant):
    """Requests run by a hook see the batch's changes, are seen by it, and are undone with it."""

    def each(frames):
        return encode_response(3, encode_list([shard.store.run(frame) for frame in frames]))

    def inner(*requests):
        return b"each", *[encode_request(tokens) for tokens in requests]

    def replies(*found):
        return 3, encode_list([encode_response(*reply) for reply in found])

    shard = Shard(variant, hooks={"each": each})
    nested = inner([b"get", b"k"], [b"SET", b"k", b"w"], [b"get", b"k"], [b"zadd", b"k", b"1", b"m"], [b"no"])
    assert shard.batch([b"set", b"k", b"v"], nested, [b"get", b"k"]) == [
        OK,
        replies((0, b"v"), OK, (0, b"w"), error(commands.WRONG_TYPE), error(commands.UNKNOWN_COMMAND)),
        (0, b"w"),
    ]
    assert shard.effects() == [[b"set", b"k", b"v"], [b"set", b"k", b"w"]]
    shard.store.check()
    assert shard(b"each", b"\0\0\0\1", b"\0\0\0\0x") == replies(*[error("ERR malformed request")] * 2)
    assert shard(*inner([b"set", b"k", b"x" * 9000], [b"get", b"k"])) == replies(OK, (0, b"x" * 9000))
    shard.store.max_response = 1000
    assert shard.store.run(encode_request([b"get", b"k"])) == encode_response(
        *error("ERR the replies to these pipelined requests are too long together")
    )
    shard.store.rollback()
    shard.store.check()
    assert shard.order() == []


GOOD_SCORES = [
    *b"0 -0 +1 1 007 1. .5 -.5 1e3 1E+3 1e-3 1e400 -1e400 1e-400 inf +inf -Infinity INFINITY 0.1".split(),
    *b"123456789012345678901234567890 0.30000000000000004 9007199254740993 2.2250738585072014e-308".split(),
    *b"5e-324 1.7976931348623157e308 100000000000000000000.5 1e0000000000000000000001 1e22 1e23".split(),
    *b"123456789012345 1234567890123456 12345678901234567 0.000001 12345.6789 1e16 1e15".split(),
    *b"4503599627370497.5 0.0001 0.00001234 -999999999999999.9 99999999999999.99 1e-5".split(),
    b"0." + b"0" * 400 + b"1",
    b"1" * 400,
]
BAD_SCORES = [
    *b"1_0 _1 nan NaN -nan 0x10 1e e1 --1 +-1 1,5 one 1.5.2 infi infinityy . + - 1e+ in 1e5.0 1d".split(),
    *b"1f nan(1) 0b1 1__0 i n -. +e1 .e1 1e- \xd9\xa1 \xc2\xa01 1\0 \0 \x001 \x1c1".split(),
    *[b"", b" ", b"1 ", b" 1", b"\t1", b"1\n", b"\x0b1", b"1\x0c", b"1\r", b"1" * 100 + b"x"],
]


@pytest.mark.parametrize("text", GOOD_SCORES, ids=range(len(GOOD_SCORES)))
def test_scores_are_what_float_says(shard, text):
    score = float(text) + 0.0
    assert shard(b"zadd", b"z", text, b"m") == OK
    assert shard(b"zrange", b"z", text, text) == (0, b"%a:m" % score)
    assert list(shard.store.entries()) == [(b"z", [(score, b"m")], 0)]
    assert shard.effects() == [[b"zadd", b"z", text, b"m"]]


@pytest.mark.parametrize("text", BAD_SCORES, ids=range(len(BAD_SCORES)))
def test_what_is_no_score(shard, text):
    bad = error(commands.BAD_SCORE)
    shard(b"set", b"s", b"v")
    for key in (b"z", b"s"):
        assert shard(b"zadd", key, text, b"m") == bad
        assert shard(b"zrange", key, text, b"1") == shard(b"zrange", key, b"1", text) == bad
    assert (shard.store.hits, shard.store.misses) == (0, 0)


texts = st.text("0123456789.eE+-_ infa", max_size=25).map(str.encode) | st.floats().map(
    lambda x: repr(x).encode()
)
decimals = st.tuples(st.integers(-(10**17), 10**17), st.integers(0, 25)).map(
    lambda pair: (b"%d." % pair[0]) + b"%0*d" % (pair[1], abs(pair[0]) % 10 ** pair[1])
)


@given(text=texts | decimals | st.binary(max_size=9))
@settings(max_examples=300, deadline=None)
def test_any_text_is_the_same_score_as_for_float(variant, text):
    shard = Shard(variant)
    try:
        score = float(text) + 0.0
        good = score == score and text.strip() == text and b"_" not in text
    except ValueError:
        good = False
    if good:
        assert shard(b"zadd", b"z", text, b"m") == OK
        assert shard(b"zrange", b"z", b"-inf", b"inf") == (0, b"%a:m" % score)
    else:
        assert shard(b"zadd", b"z", text, b"m") == error(commands.BAD_SCORE)


def test_negative_zero_is_zero(shard):
    shard(b"zadd", b"z", b"-0.0", b"b")
    shard(b"zadd", b"z", b"0", b"a")
    assert shard(b"zrange", b"z", b"-0", b"0.0") == (0, b"0.0:a,0.0:b")
    assert shard(b"zadd", b"z", b"0", b"b") == OK
    assert len(shard.effects()) == 2


def test_a_large_set_answers_like_a_small_one(shard):
    dice = random.Random(2)
    scores = {b"m%04d" % number: dice.randrange(500) / 4 for number in range(3000)}
    for member, score in scores.items():
        assert shard(b"zadd", b"z", b"%a" % score, member) == OK
    ordered = sorted((score, member) for member, score in scores.items())
    replies = shard.batch(*([b"zrank", b"z", member] for _score, member in ordered))
    assert replies == [(0, b"%d" % rank) for rank in range(len(ordered))]
    inside = b",".join(b"%a:%b" % pair for pair in ordered if 30.25 <= pair[0] <= 60.5)
    assert shard(b"zrange", b"z", b"30.25", b"60.5") == (0, inside)
    for member in dice.sample(sorted(scores), 2990):
        assert shard(b"zrem", b"z", member) == OK
    shard.store.check()
    shard.store.rollback()
    shard.store.check()
    assert shard.order() == []


# ---- envelopes -------------------------------------------------------------------------------------------


def script():
    """Requests of every kind, and what they answer."""
    return [
        ([b"set", b"a", b"1"], OK),
        ([b"GET", b"a"], (0, b"1")),
        ([b"zadd", b"z", b"1", b"m"], OK),
        ([b"Zrank", b"z", b"m"], (0, b"0")),
        ([b"nonsense"], error(commands.UNKNOWN_COMMAND)),
        ([b"get"], error(commands.WRONG_ARITY)),
        ([b"get", b"z"], error(commands.WRONG_TYPE)),
        ([b"del", b"a"], OK),
        ([b"get", b"a"], NONE),
        ([b"set", b"big", b"x" * 3000], OK),
        ([b"get", b"big"], (0, b"x" * 3000)),
    ]


def test_envelopes_split_at_any_byte(variant):
    data = b"".join(
        envelope.seal(ticket, 1, encode_request(r)) for ticket, (r, _reply) in enumerate(script())
    )
    data += envelope.seal(99, 0, b"")
    whole = Shard(variant).store.execute(data)
    assert whole[0] == len(data)
    for kind in (bytearray, memoryview):
        assert Shard(variant).store.execute(kind(data)) == whole
    shard = Shard(variant)
    buffer, out = b"", b""
    for byte in data:  # byte by byte
        buffer += bytes([byte])
        used, replies = shard.store.execute(buffer)
        buffer = buffer[used:]
        out += replies
    assert (buffer, out) == (b"", whole[1])
    for cut in range(0, len(data), 13):
        shard = Shard(variant)
        used, first = shard.store.execute(data[:cut])
        assert shard.store.execute(data[used:]) == (len(data) - used, whole[1][len(first) :])


def test_many_requests_in_one_envelope(shard):
    assert shard.batch(*(request for request, _reply in script())) == [reply for _request, reply in script()]


def test_malformed_frames_answer_and_leave_the_rest_alone(variant):
    """A router never passes these on; whatever they are, each request gets its reply, and nothing breaks."""
    good = encode_request([b"set", b"k", b"v"])
    bad = error("ERR malformed request")
    for cut in range(4, len(good)):
        shard = Shard(variant)
        assert shard.frames(good + good[:cut], 2) == [OK, bad]
        assert shard.frames(good[:cut] + b"\0" * 8, 3)[0][0] in (0, 2)
    shard = Shard(variant)
    for length in (2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1):
        assert shard.frames(pack(">II", 2, length) + b"get" + b"\0" * 40, 2) == [bad, bad]
        assert shard.frames(pack(">II3sI", 2, 3, b"get", length), 1) == [bad]
        assert shard.frames(pack(">II3sI", 3, 3, b"set", length) + b"\0" * 9, 1) == [bad]
        assert shard.frames(pack(">II3sIcI", 3, 3, b"set", 1, b"k", length) + b"\0" * 9, 1) == [bad]
        assert shard.frames(pack(">I", length) + b"\0" * 40, 1) == [bad]
    assert shard.frames(good + b"tail", 1) == [OK]
    # What stands behind an envelope is not its frames' business.
    data = envelope.seal(1, 1, encode_request([b"get", b"k"])[:-1]) + envelope.seal(2, 1, good)
    used, out = shard.store.execute(data)
    assert used == len(data)
    first = shard.replies(out[: 12 + len(encode_error("ERR malformed request"))], 1, 1)
    assert first == [bad]
    assert shard.store.ops == 27
    shard.store.check()


@given(data=st.binary(max_size=60), count=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_garbage_frames_never_raise(variant, data, count):
    shard = Shard(variant)
    count = min(count, len(data) // 4)
    assert len(shard.frames(data, count)) == count
    shard.store.check()


@pytest.mark.parametrize(
    "header",
    [
        pack(">IIII", 11, 0, 0, 0),
        pack(">IIII", 0, 0, 0, 0),
        pack(">IIII", 12, 0, 1, 0),
        pack(">IIII", 100, 0, 2**32 - 1, 0),
        pack(">IIII", 2**32 - 1, 0, 2**28, 0),
        pack(">IIII", 12, 0, 0, 1),
    ],
)
def test_an_envelope_that_no_router_makes_raises(shard, header):
    good = envelope.seal(1, 1, encode_request([b"set", b"k", b"v"]))
    used, out = shard.store.execute(good + header)
    assert (used, len(out)) == (len(good), 12 + 10)
    with pytest.raises(ValueError, match="no router sends"):
        shard.store.execute(header)
    assert shard(b"get", b"k") == (0, b"v")


def test_replies_to_one_envelope_are_bounded_together(shard):
    shard.store.max_response = 10_000
    long = error("ERR the replies to these pipelined requests are too long together")
    shard(b"set", b"k", b"x" * 3000)
    for number in range(200):
        shard(b"zadd", b"z", b"1", b"member %043d" % number)
    assert shard.batch(*[[b"get", b"k"]] * 5) == [(0, b"x" * 3000)] * 3 + [long] * 2
    assert shard(b"get", b"k") == (0, b"x" * 3000)
    assert shard(b"zrange", b"z", b"1", b"2") == long
    assert shard.batch([b"get", b"k"], [b"zrange", b"z", b"1", b"2"], [b"set", b"a", b"b"]) == [
        (0, b"x" * 3000),
        long,
        OK,
    ]
    assert shard.store.hits == 5 + 1 + 1 + 2


# ---- effects ---------------------------------------------------------------------------------------------


def test_effects_not_decisions_are_logged(shard):
    shard(b"SET", b"k", b"v")
    shard(b"get", b"k")
    shard(b"set", b"k", b"v")
    shard(b"del", b"none")
    shard(b"zAdd", b"z", b"1.50", b"m")
    shard(b"zadd", b"z", b"1.5", b"m")
    shard(b"zadd", b"z", b"2", b"m")
    shard(b"zrem", b"z", b"none")
    shard(b"zadd", b"k", b"2", b"m")
    shard(b"ZREM", b"z", b"m")
    shard(b"DEL", b"k")
    assert shard.effects() == [
        [b"set", b"k", b"v"],
        [b"set", b"k", b"v"],
        [b"zadd", b"z", b"1.50", b"m"],
        [b"zadd", b"z", b"2", b"m"],
        [b"zrem", b"z", b"m"],
        [b"del", b"k"],
    ]
    shard.store.commit()
    assert shard.effects() == []
    shard.store.rollback()
    assert shard.store.keys == 0


def test_an_eviction_is_logged_before_the_write_that_needed_it(variant):
    shard = Shard(variant, capacity=2, evict=True)
    shard(b"set", b"a", b"1")
    shard(b"zadd", b"b", b"1", b"m")
    shard(b"get", b"a")
    shard.store.commit()
    assert shard(b"set", b"c", b"3") == OK
    assert shard(b"zadd", b"d", b"1", b"m") == OK
    assert shard.effects() == [
        [b"del", b"b"],
        [b"set", b"c", b"3"],
        [b"del", b"a"],
        [b"zadd", b"d", b"1", b"m"],
    ]
    assert (shard.order(), shard.store.evictions) == ([b"c", b"d"], 2)
    shard.store.rollback()
    shard.store.check()
    assert (sorted(shard.order()), shard.store.evictions) == ([b"a", b"b"], 0)


def test_each_kind_of_effect_can_be_undone(variant):
    """One after the other and all at once: what was committed is back, byte for byte."""
    setup = [
        [b"set", b"s", b"old"],
        [b"zadd", b"z", b"1", b"a"],
        [b"zadd", b"z", b"2", b"b"],
        [b"zadd", b"one", b"1", b"a"],
    ]
    effects = [
        [b"set", b"new", b"v"],
        [b"set", b"s", b"newer"],
        [b"set", b"z", b"now a string"],
        [b"del", b"s"],
        [b"del", b"z"],
        [b"zadd", b"new", b"1", b"a"],
        [b"zadd", b"z", b"3", b"c"],
        [b"zadd", b"z", b"3", b"a"],
        [b"zrem", b"z", b"a"],
        [b"zrem", b"one", b"a"],
    ]
    shard = Shard(variant)
    shard.batch(*setup)
    shard.store.commit()
    before = sorted(shard.store.entries()), shard.store.used, shard.store.digest()
    dice = random.Random(4)
    for batch in [*([effect] for effect in effects), *(dice.choices(effects, k=12) for _ in range(100))]:
        shard.batch(*batch)
        assert shard.effects()
        shard.store.check()
        shard.store.rollback()
        shard.store.check()
        assert (sorted(shard.store.entries()), shard.store.used, shard.store.digest()) == before


def test_replay_of_something_else_raises(variant):
    writer = variant.pick(record.RecordEncoder, "record")(SEED)
    for effect in (
        encode_request([b"get", b"k"]),
        encode_request([b"SET", b"k", b"v"]),
        encode_request([b"set", b"k"]),
        encode_request([b"zadd", b"z", b"one", b"m"]),
        encode_request([b"zadd", b"a", b"1", b"m"]),
        encode_request([b"zrem", b"a", b"m"]),
        encode_request([b"stats"]),
        encode_request([b"flush"]),
        encode_request([]),
        encode_request([b"set", b"k", b"v"]) + b"\0",
        encode_request([b"set", b"k", b"v"])[:-1],
        b"\xff" * 9,
        b"",
    ):
        writer.add(encode_request([b"set", b"a", b"1"]))
        writer.add(effect)
        shard = Shard(variant)
        with pytest.raises(ValueError, match=r"record \d+ is no write of this version: b['\"]") as caught:
            shard.store.replay(writer.pending())
        assert repr(effect[:60]) in str(caught.value)
        assert shard.order() == [b"a"]
        writer.rollback()
        shard.store.rollback()
        assert shard.order() == [b"a"]
        shard.store.check()


def test_replay_knows_no_limits_and_logs_nothing(variant):
    writer = Shard(variant)
    for number in range(10):
        writer(b"set", b"k%d" % number, b"v")
    records = writer.store.log.pending()
    shard = Shard(variant, capacity=3, maxmemory=1000, evict=True)
    shard.store.readonly = encode_error("READONLY")
    assert shard.store.replay(memoryview(records)) == 10
    assert (shard.store.keys, shard.store.ops, shard.store.log.pending()) == (10, 0, b"")
    assert shard.store.readonly == encode_error("READONLY")
    shard.store.enforce_limits()
    assert shard.order() == [b"k7", b"k8", b"k9"]
    assert shard.effects() == [[b"del", b"k%d" % number] for number in range(7)]
    assert shard.store.evictions == 7
    shard.store.commit()
    calm = Shard(variant, capacity=3)
    calm.store.replay(records)
    calm.store.enforce_limits()
    assert calm.store.keys == 10


# ---- limits ----------------------------------------------------------------------------------------------


def test_capacity_without_eviction(variant):
    shard = Shard(variant, capacity=2)
    full = error(commands.OUT_OF_MEMORY)
    shard(b"set", b"a", b"1")
    shard(b"zadd", b"b", b"1", b"m")
    assert shard(b"set", b"c", b"1") == shard(b"zadd", b"c", b"1", b"m") == full
    assert shard(b"set", b"a", b"longer" * 100) == OK
    assert shard(b"zadd", b"b", b"2", b"another") == OK
    assert shard(b"get", b"a") == (0, b"longer" * 100)
    assert shard(b"del", b"a") == OK
    assert shard(b"set", b"c", b"1") == OK
    assert shard.store.evictions == 0
    shard.store.check()


def test_memory_without_eviction(variant):
    shard = Shard(variant, maxmemory=20_000)
    full = error(commands.OUT_OF_MEMORY)
    count = 0
    while shard(b"set", b"k%d" % count, b"x" * 500) == OK:
        count += 1
    assert shard(b"set", b"k%d" % count, b"x" * 500) == full
    assert 10 < count < 40
    assert shard.store.used <= 20_000
    assert shard(b"set", b"k0", b"y" * 500) == OK
    assert shard(b"set", b"k0", b"y" * 400) == OK
    assert shard(b"set", b"k0", b"x" * 4000) == full
    assert shard(b"get", b"k0") == (0, b"y" * 400)
    assert shard(b"set", b"k0", b"x" * 30_000) == error(commands.TOO_LARGE)
    assert shard(b"zadd", b"z", b"1", b"x" * 30_000) == error(commands.TOO_LARGE)
    assert shard(b"unlink", b"k1", b"k2") == (0, b"2")
    assert shard(b"zadd", b"z", b"1", b"m") == OK
    number = 0
    while (reply := shard(b"zadd", b"z", b"1", b"%d" % number)) == OK:
        number += 1
    assert reply == full
    assert shard(b"zadd", b"z", b"2", b"m") == OK
    assert shard(b"zrem", b"z", b"m") == OK
    shard.store.check()


def test_a_store_over_its_limit_takes_what_does_not_grow(variant):
    """As after a start with a lower limit than before, without eviction."""
    writer = Shard(variant)
    writer.batch(*([b"set", b"k%d" % number, b"x" * 500] for number in range(20)))
    writer.batch([b"zadd", b"z", b"1", b"a"], [b"zadd", b"z", b"1", b"b"])
    shard = Shard(variant, maxmemory=3000)
    shard.store.replay(writer.store.log.pending())
    assert shard(b"set", b"k1", b"y" * 500) == shard(b"set", b"k2", b"") == OK
    assert shard(b"set", b"k1", b"y" * 700) == shard(b"set", b"new", b"") == error(commands.OUT_OF_MEMORY)
    assert shard(b"zadd", b"z", b"2", b"a") == shard(b"zrem", b"z", b"b") == shard(b"del", b"k3") == OK
    assert shard(b"zadd", b"z", b"2", b"c") == error(commands.OUT_OF_MEMORY)
    assert shard(b"set", b"z", b"") == OK
    shard.store.check()


def test_memory_with_eviction(variant):
    shard = Shard(variant, maxmemory=20_000, evict=True)
    for number in range(100):
        assert shard(b"set", b"k%d" % number, b"x" * 500) == OK
        assert shard.store.used <= 20_000
    left = shard.order()
    assert left == [b"k%d" % number for number in range(100 - len(left), 100)]
    assert shard.store.evictions == 100 - len(left)
    shard.store.commit()
    assert shard(b"set", left[0], b"x" * 30_000) == error(commands.TOO_LARGE)
    assert shard(b"zadd", b"z", b"1", b"x" * 30_000) == error(commands.TOO_LARGE)
    assert sorted(shard.order()) == sorted(left)
    assert shard.effects() == []
    assert shard(b"set", left[0], b"x" * 15_000) == OK
    assert left[0] in shard.order()
    assert shard(b"get", left[0]) == (0, b"x" * 15_000)
    shard.store.check()
    number = 0
    while (reply := shard(b"zadd", b"z", b"1", b"%099d" % number)) == OK:
        number += 1
        assert shard.store.used <= 20_000
    assert reply == error(commands.TOO_LARGE)
    assert shard.order() == [b"z"]
    shard.store.check()


# ---- everything together ---------------------------------------------------------------------------------

keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g"])
names = st.sampled_from([b"m", b"n", b"o", b"p"])
numbers = st.sampled_from([b"0", b"1", b"-1.5", b"2", b"1e400", b"nan", b"1e2"])
values = st.sampled_from([b"", b"v", b"w" * 50, b"x" * 900])
requests = st.one_of(
    st.tuples(st.just(b"get"), keys),
    st.tuples(st.sampled_from([b"set", b"SET"]), keys, values),
    st.tuples(st.just(b"set"), keys, values),
    st.tuples(st.just(b"del"), keys),
    st.tuples(st.just(b"zadd"), keys, numbers, names),
    st.tuples(st.just(b"zadd"), keys, numbers, names),
    st.tuples(st.just(b"zrem"), keys, names),
    st.tuples(st.just(b"zrange"), keys, numbers, numbers),
    st.tuples(st.just(b"zrank"), keys, names),
)


class Model:
    """What a store does, said shortly: a dict in order of use, values are bytes or dicts."""

    def __init__(self, capacity, evict):
        self.table = OrderedDict()
        self.capacity = capacity
        self.evict = evict
        self.hits = self.misses = self.evictions = 0
        self.effects = []

    def full(self, key):
        if key in self.table or not self.capacity or len(self.table) < self.capacity:
            return False
        if not self.evict:
            return True
        victim, _value = self.table.popitem(last=False)
        self.effects.append([b"del", victim])
        self.evictions += 1
        return False

    def __call__(self, name, key, *rest):
        name = name.lower()
        try:
            numbers = [float(text) for text in rest[: {b"zadd": 1, b"zrange": 2}.get(name, 0)]]
        except ValueError:
            numbers = [float("nan")]
        if any(number != number for number in numbers):
            return error(commands.BAD_SCORE)
        value = self.table.get(key)
        if value is not None:
            self.table.move_to_end(key)
        if name in (b"get", b"zrange", b"zrank"):
            self.hits += value is not None
            self.misses += value is None
        if isinstance(value, bytes if name.startswith(b"z") else dict) and name not in (b"set", b"del"):
            return error(commands.WRONG_TYPE)
        return getattr(self, name.decode())(value, key, rest, numbers)

    def get(self, value, key, rest, numbers):
        return NONE if value is None else (0, value)

    def set(self, value, key, rest, numbers):
        if self.full(key):
            return error(commands.OUT_OF_MEMORY)
        self.table[key] = rest[0]
        self.effects.append([b"set", key, rest[0]])
        return OK

    def delete(self, value, key, rest, numbers):
        if value is None:
            return NONE
        del self.table[key]
        self.effects.append([b"del", key])
        return OK

    def zadd(self, value, key, rest, numbers):
        if value is not None and value.get(rest[1]) == numbers[0]:
            return OK
        if self.full(key):
            return error(commands.OUT_OF_MEMORY)
        self.table.setdefault(key, {})[rest[1]] = numbers[0]
        self.effects.append([b"zadd", key, *rest])
        return OK

    def zrem(self, value, key, rest, numbers):
        if value is None or value.pop(rest[0], None) is None:
            return NONE
        if not value:
            del self.table[key]
        self.effects.append([b"zrem", key, *rest])
        return OK

    def zrange(self, value, key, rest, numbers):
        pairs = [pair for pair in pairs_of(value or {}) if numbers[0] <= pair[0] <= numbers[1]]
        return (0, b",".join(b"%a:%b" % pair for pair in pairs)) if pairs else NONE

    def zrank(self, value, key, rest, numbers):
        ordered = [member for _score, member in pairs_of(value or {})]
        return (0, b"%d" % ordered.index(rest[0])) if rest[0] in ordered else NONE


setattr(Model, "del", Model.delete)


def pairs_of(scores):
    return sorted((score, member) for member, score in scores.items())


def plain(table):
    """A model's table as entries() gives it."""
    return [(key, value if isinstance(value, bytes) else pairs_of(value), 0) for key, value in table.items()]


class StoreMachine(RuleBasedStateMachine):
    """A store beside the model, committed and rolled back at any point."""

    variant = None
    options = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.shard = Shard(self.variant, **self.options)
        self.model = Model(self.options.get("capacity", 0), self.options.get("evict", False))
        self.saved = self.snapshot()
        self.records = b""

    def snapshot(self):
        return plain(self.model.table), self.model.evictions

    @rule(batch=st.lists(requests, max_size=12))
    def execute(self, batch):
        assert self.shard.batch(*batch) == [self.model(*request) for request in batch]

    @rule()
    def commit(self):
        assert self.shard.effects() == self.model.effects
        self.records += self.shard.store.log.pending()
        self.shard.store.commit()
        self.model.effects.clear()
        self.saved = self.snapshot()

    @rule()
    def rollback(self):
        """The order of use may change; the model takes over the store's."""
        assert self.shard.effects() == self.model.effects
        self.shard.store.rollback()
        self.model.effects.clear()
        table, self.model.evictions = self.saved
        assert sorted(self.shard.store.entries()) == sorted(table)
        table = {key: value for key, value, _when in table}
        self.model.table = OrderedDict(
            (key, table[key] if isinstance(table[key], bytes) else {m: s for s, m in table[key]})
            for key in self.shard.order()
        )
        self.saved = self.snapshot()

    @precondition(lambda self: not self.model.effects)
    @rule()
    def replay(self):
        """The log so far, after a restart: the same data."""
        again = Shard(self.variant)
        records = self.records
        count, size, damage = record.verify_records(records, SEED, 1)
        assert (size, damage) == (len(records), None)
        assert again.store.replay(records) == count
        again.store.check()
        assert again.store.digest() == self.shard.store.digest()
        assert sorted(again.store.entries()) == sorted(plain(self.model.table))

    @invariant()
    def same(self):
        mine = self.shard.store
        mine.check()
        assert list(mine.entries()) == plain(self.model.table)
        assert (mine.keys, mine.hits, mine.misses) == (
            len(self.model.table),
            self.model.hits,
            self.model.misses,
        )
        assert mine.evictions == self.model.evictions


@pytest.mark.parametrize(
    "options", [{}, {"capacity": 4}, {"capacity": 4, "evict": True}, {"capacity": 1, "evict": True}]
)
def test_random_operations_match_the_model(variant, options):
    machine = type("Machine", (StoreMachine,), {"variant": variant, "options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@given(
    batches=st.lists(st.tuples(st.lists(requests, max_size=20), st.booleans()), max_size=8), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_memory_limits_hold_and_the_log_tells_all(variant, batches, data):
    """With eviction by memory: never over the limit, the last write's key is never evicted, replay agrees."""
    limit = data.draw(st.integers(2500, 6000))
    shard = Shard(variant, maxmemory=limit, evict=True)
    records = b""
    for batch, keep in batches:
        before = sorted(shard.store.entries()), shard.store.used, shard.store.evictions
        for request in batch:
            reply = shard(*request)
            assert shard.store.used <= limit
            if reply == OK and request[0].lower() in (b"set", b"zadd"):
                assert shard.order()[-1] == request[1]
            shard.store.check()
        if keep:
            records += shard.store.log.pending()
            shard.store.commit()
        else:
            shard.store.rollback()
            shard.store.check()
            assert (sorted(shard.store.entries()), shard.store.used, shard.store.evictions) == before
    again = Shard(variant)
    again.store.replay(records)
    assert again.store.digest() == shard.store.digest()


# ---- the whole of the data -------------------------------------------------------------------------------


def test_the_digest_tells_data_apart_but_not_its_order(variant):
    def digest(*requests):
        shard = Shard(variant)
        shard.batch(*requests)
        return shard.store.digest()

    assert digest() == 0
    a, b = [b"set", b"a", b"1"], [b"set", b"b", b"2"]
    assert digest(a, b) == digest(b, a) == digest(b, [b"set", b"a", b"x"], a)
    zset = [b"zadd", b"z", b"1", b"m"]
    several = [
        digest(a),
        digest(b),
        digest(a, b),
        digest([b"set", b"a", b"2"], [b"set", b"b", b"1"]),
        digest([b"set", b"a", b""]),
        digest([b"set", b"", b"a"]),
        digest([b"set", b"z", b"m"]),
        digest(zset),
        digest(zset, a),
        digest([b"zadd", b"z", b"2", b"m"]),
        digest([b"zadd", b"z", b"1", b"n"]),
        digest([b"zadd", b"z", b"1", b"n"], zset),
    ]
    assert len(set(several)) == len(several)
    assert all(0 <= value < 2**64 for value in several)


def test_entries_of_a_changing_store_raise(shard):
    for number in range(10):
        shard(b"set", b"%d" % number, b"v")
    walk = shard.store.entries()
    next(walk)
    shard(b"del", b"5")
    with pytest.raises(RuntimeError):
        list(walk)
    assert inf > len(list(shard.store.entries())) == 9


def test_one_save_at_a_time(shard):
    for number in range(100):
        shard(b"set", b"%d" % number, b"v")
    log = type(shard.store.log)(SEED)
    walk = shard.store.save(log, 100)
    next(walk)
    assert len(log.pending()) >= 100
    with pytest.raises(RuntimeError):
        next(shard.store.save(log, 100))
    shard.store.check()
    walk.close()
    shard.store.check()
    log.commit()
    assert list(shard.store.save(log, 1 << 20)) == []
    assert len(list(each_effect(log.pending()))) == 100


def test_what_finds_its_key_missing_does_nothing(shard):
    """As in a base, where the key comes further on."""
    shard(b"set", b"target", b"v")
    shard(b"zadd", b"z", b"1", b"m")
    shard.store.commit()
    shard.store.replay(
        record_of([b"setrange", b"k", b"3", b"v"], [b"pexpireat", b"k", b"5"], [b"persist", b"k"])
    )
    assert (shard.store.unmet, shard.order()) == (3, [b"target", b"z"])
    shard.store.replay(record_of([b"rename", b"k", b"target"]))
    assert (shard.store.unmet, shard.order()) == (4, [b"z"]), "what it would have replaced is gone"
    shard.store.replay(record_of([b"rename", b"k", b"elsewhere"], [b"del", b"k"], [b"zrem", b"k", b"m"]))
    assert (shard.store.unmet, shard.order()) == (5, [b"z"])
    shard.store.check()
    for wrong in (
        [b"setrange", b"z", b"0", b"v"],
        [b"setrange", b"k", b"-1", b"v"],
        [b"setrange", b"k", b"x", b"v"],
        [b"pexpireat", b"k", b"0"],
        [b"pexpireat", b"k", b"x"],
        [b"rename", b"k", b"k"],
    ):
        with pytest.raises(ValueError, match="no write of this version"):
            shard.store.replay(record_of(wrong))
    assert shard.store.unmet == 5


def save_beside(shard, log, room, between):
    """Save to ``log``, with ``between`` called at each pause; return all records, and how often it was."""
    records, pauses = b"", 0
    for _ in shard.store.save(log, room):
        pauses += 1
        assert pauses < 10_000, "it has no end"
        between()
        if shard.store.log.pending():
            log.copy(shard.store.log.pending())
            shard.store.commit()
        records += log.pending()
        log.commit()
    return records + log.pending(), pauses


@pytest.mark.parametrize("seed", range(60))
def test_a_save_beside_commands_is_the_data_at_its_end(variant, seed, monkeypatch):
    dice = random.Random(seed)
    monkeypatch.setattr(store, "PART", 2)  # as few as the compiled one has in so little room
    source = Requests(seed, now=1000, keys=dice.choice([12, 60, 400]), members=dice.choice([8, 60]))
    shard = Shard(variant, capacity=dice.choice([0, 0, 30]), evict=True)
    shard.store.now = 1_000_000

    def requests(count):
        for _ in range(count):
            shard(*source())
        shard.store.now += dice.choice([0, 0, 500, 50_000])

    def between():
        if dice.random() < 0.2:  # the disk refuses these
            before = shard.store.digest()
            requests(5)
            shard.store.rollback()
            assert shard.store.digest() == before
        requests(dice.randrange(30))
        if dice.random() < 0.2:
            shard.store.check()

    requests(2000)
    shard.store.commit()
    pauses = 0
    while pauses < 20:  # several saves, one after the other
        log = type(shard.store.log)(SEED + pauses)
        records, more = save_beside(shard, log, dice.choice([20, 200, 1000]), between)
        pauses += more + 1
        shard.store.check()
        copy = Shard(variant)
        copy.store.replay(records)
        copy.store.check()
        assert copy.store.digest() == shard.store.digest()


@pytest.mark.parametrize("pauses", [1, 5, 15])
def test_a_set_that_is_replaced_by_another_while_it_is_saved_or_after(variant, pauses):
    """The other one has not been saved yet, and what it has comes before what is being saved, too."""
    shard = Shard(variant)
    for key, shift in ((b"first", 0), (b"other", -500)):
        for number in range(1000):
            shard(b"zadd", key, b"%d" % (number + shift), b"%s-%d" % (key, number))
        for number in range(200):
            shard(b"set", b"%s-%d" % (key, number), b"v" * 100)
    shard.store.commit()
    left = pauses

    def between():
        nonlocal left
        left -= 1
        if not left:
            assert shard(b"rename", b"other", b"first") == OK

    records, _ = save_beside(shard, type(shard.store.log)(SEED), 5000, between)
    assert left < 0
    copy = Shard(variant)
    copy.store.replay(records)
    assert copy.store.digest() == shard.store.digest()


def test_what_is_used_all_the_time_does_not_keep_a_save_from_its_end(variant):
    shard = Shard(variant)
    for number in range(300):
        shard(b"set", b"%d" % number, b"v" * 100)
    shard(b"zadd", b"z", *(word for number in range(3000) for word in (b"%d" % number, b"m%d" % number)))
    shard.store.commit()

    def between():
        for number in range(40):
            shard(b"get", b"%d" % number)
        shard(b"zrank", b"z", b"m5")
        shard(b"zadd", b"z", b"%d" % dice.randrange(3000), b"m%d" % dice.randrange(3000))

    dice = random.Random(1)
    records, pauses = save_beside(shard, type(shard.store.log)(SEED), 1000, between)
    assert pauses > 50
    assert len(records) < 5 * 3300 * 50
    copy = Shard(variant)
    copy.store.replay(records)
    assert copy.store.digest() == shard.store.digest()


def test_what_is_saved_is_the_data(variant):
    shard = Shard(variant)
    shard.store.now = 5
    for number in range(300):
        shard(b"set", b"%d" % number, b"v" * number)
    shard(b"zadd", b"z", *(part for number in range(300) for part in (b"%d.5" % number, b"m%d" % number)))
    shard(b"pexpireat", b"z", b"5000")
    shard(b"pexpireat", b"7", b"6000")
    for room in (1, 4096, 1 << 30):
        log = type(shard.store.log)(SEED)
        copy = Shard(variant)
        for _ in shard.store.save(log, room):
            assert len(log.pending()) >= room
            copy.store.replay(log.pending())
            log.commit()
        copy.store.replay(log.pending())
        copy.store.check()
        assert list(copy.store.entries()) == list(shard.store.entries())


def test_keys_and_values_of_every_size(shard):
    sizes = [*range(70), 127, 128, 255, 256, 4095, 4096, 65535, 65536, 1 << 20]
    for size in sizes:
        assert shard(b"set", b"k" * size, b"v" * size) == OK
        assert shard(b"zadd", b"z" * (size + 1), b"1", b"m" * size) == OK
    shard.store.check()
    for size in sizes:
        assert shard(b"get", b"k" * size) == (0, b"v" * size)
        assert shard(b"zrank", b"z" * (size + 1), b"m" * size) == (0, b"0")
        assert shard(b"del", b"k" * size) == OK
    shard.store.commit()
    shard.store.check()
    assert shard.store.keys == len(sizes)


def test_many_keys_come_and_go(shard):
    """The table grows and shrinks many times; every key is where it was put."""
    for top in (5000, 200, 7000):
        for start in range(0, top, 100):
            shard.batch(*([b"set", b"key:%d" % i, b"%d" % i] for i in range(start, start + 100)))
        shard.store.check()
        for start in range(0, top, 100):
            replies = shard.batch(*([b"get", b"key:%d" % i] for i in range(start, start + 100)))
            assert replies == [(0, b"%d" % i) for i in range(start, start + 100)]
        shard.store.commit()
        shard.batch(*([b"del", b"key:%d" % i] for i in range(top) if i % 97))
        shard.store.commit()
        shard.store.check()
        assert shard.store.keys == len(range(0, top, 97)) if top != 200 else True
    for i in range(0, 7000, 97):
        assert shard(b"get", b"key:%d" % i) == (0, b"%d" % i)


def test_the_python_twin_counts_what_it_takes():
    frames = [encode_request([b"set", b"key:%012d" % number, bytes(64)]) for number in range(20_000)]
    data = envelope.seal(1, len(frames), b"".join(frames))
    del frames
    tracemalloc.start()
    mine = store.UnifiedStore(record.RecordEncoder(1))
    mine.execute(data)
    mine.commit()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.75 < mine.used / taken < 1.33
