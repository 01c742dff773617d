"""Watched keys against a model that remembers each change; and what a transaction makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imds.protocol import (
    ERROR,
    LIST,
    OK,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
)
from imds.shard import record
from imds.shard.transactions import Transactions
from imds.shard.watches import FEW, Watches, touched

DONE = encode_response(OK, b"OK")


class Log:
    """A batch's effects."""

    def __init__(self) -> None:
        self.encoder = record.RecordEncoder(7)

    def add(self, *tokens: bytes) -> None:
        self.encoder.add(encode_request(tokens))

    def pending(self) -> bytes:
        return self.encoder.pending()


def records(*effects: tuple[bytes, ...]) -> bytes:
    log = Log()
    for effect in effects:
        log.add(*effect)
    return log.pending()


@pytest.mark.parametrize("more", [0, FEW])
def test_what_effects_are_about(more: int) -> None:
    """The same for few keys, which are searched for, and for many."""
    keys = [b"a", b"b", b"longer key", *[b"other %d" % number for number in range(more)]]
    assert touched(b"", keys) == set()
    assert touched(records((b"set", b"a", b"b")), keys) == {b"a"}, "a value is no key"
    assert touched(records((b"set", b"x", b"longer key")), keys) == set()
    assert touched(records((b"zadd", b"x", b"1", b"b"), (b"del", b"longer key")), keys) == {b"longer key"}
    assert touched(records((b"of another version", b"x", b"b")), keys) == {b"b"}, "better one too many"
    assert touched(records((b"set", b"x", b"1"), (b"flushall",)), keys) == set(keys)


names = st.sampled_from([b"a", b"b", b"c"])
clients = st.sampled_from([(b"0", b"1"), (b"0", b"2"), (b"1", b"1")])
actions = st.one_of(
    st.tuples(st.just("watch"), clients, st.lists(names, min_size=1)),
    st.tuples(st.just("unwatch"), clients, st.lists(names)),
    st.tuples(st.just("leave"), st.sampled_from([b"0", b"1"]), st.none()),
    st.tuples(st.just("set"), names, st.none()),
    st.tuples(st.just("look"), st.none(), st.none()),
    st.tuples(st.just("end"), st.none(), st.none()),
    st.tuples(st.just("undo"), st.none(), st.none()),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(actions, max_size=40))
def test_random_operations_match_a_list_of_changes(steps: list[tuple[str, object, object]]) -> None:
    log = Log()
    watches = Watches(log.pending)
    changes: list[bytes] = []  # every change ever
    seen: dict[tuple[tuple[bytes, bytes], bytes], tuple[bytes, int]] = {}  # version, and changes before it
    for step, who, keys in steps:
        match step:
            case "watch":
                version = watches.watch(*who, keys)
                for key in keys:
                    seen.setdefault((who, key), (version, len(changes)))
            case "unwatch":
                watches.unwatch(*who, keys)
                for key in keys:
                    seen.pop((who, key), None)
            case "leave":
                watches.leave(who)
                seen = {one: version for one, version in seen.items() if one[0][0] != who}
            case "set":
                log.add(b"set", who, b"c")
                changes.append(who)
            case "look":
                watches.look()
            case "end":
                watches.end_batch(log.pending())
                log.encoder.commit()
            case "undo":
                watches.look()
                watches.undo_batch()
                log.encoder.rollback()
        watches.check()
        watches.look()
        for (_, key), (version, before) in seen.items():
            assert watches.unchanged(key, version) == (key not in changes[before:])
        assert bool(watches) == bool(seen)


def test_versions_of_another_process_never_match() -> None:
    one, two = Watches(lambda: b""), Watches(lambda: b"")
    version = one.watch(b"0", b"1", [b"k"])
    two.watch(b"0", b"1", [b"k"])
    assert one.unchanged(b"k", version)
    assert not two.unchanged(b"k", version)


class TestTransactions:
    def make(self, answers: dict[bytes, bytes]) -> tuple[Transactions, Watches, list[bytes], Log]:
        log, ran = Log(), []

        class Store:
            def run(self, frame: bytes) -> bytes:
                if frame in answers:
                    ran.append(frame)
                return answers.get(frame, encode_response(OK, b"0"))

            def together(self, act: Callable[[], bytes]) -> bytes | None:
                reply = act()
                return None if b"too much" in ran else reply

        watches, store = Watches(log.pending), Store()
        return Transactions(lambda: store, watches), watches, ran, log

    def test_each_reply_is_whole_in_its_element(self) -> None:
        frames = [encode_request([b"get", b"%d" % number]) for number in range(3)]
        replies = [DONE, encode_error("ERR a test"), encode_response(LIST, encode_list([b"x", None]))]
        hooks, _watches, ran, _log = self.make(dict(zip(frames, replies, strict=True)))
        reply = hooks.on_exec([b"0", b"1", b"0", *frames])
        assert decode_list(reply[8:]) == [one[4:] for one in replies]
        assert ran == frames
        assert hooks.on_exec([b"0", b"1", b"0"]) == encode_response(LIST, encode_list([]))

    def test_effects_that_are_too_many(self) -> None:
        hooks, _watches, _ran, _log = self.make({b"too much": DONE})
        status, text, _ = decode_response(hooks.on_exec([b"0", b"1", b"0", b"too much"])) or (0, b"", 0)
        assert (status, text[:10]) == (ERROR, b"EXECABORT ")

    def test_a_change_keeps_it_from_running(self) -> None:
        frame = encode_request([b"get", b"k"])
        for change in (False, True):
            hooks, watches, ran, log = self.make({frame: DONE})
            version = hooks.on_watch([b"0", b"1", b"k", b"l"])[8:]
            if change:
                log.add(b"del", b"l")
            words = [b"0", b"1", b"2", b"k", version, b"l", version, frame]
            reply = hooks.on_exec(words)
            assert ran == ([] if change else [frame])
            assert reply[:8] == (b"\0\0\0\4\0\0\0\1" if change else reply[:4] + b"\0\0\0\3")
            assert not watches, "what was watched is forgotten"
            assert hooks.on_exec(words)[4:8] == b"\0\0\0\1", "a version is good for once"

    def test_unwatch(self) -> None:
        hooks, watches, _ran, _log = self.make({})
        hooks.on_watch([b"0", b"1", b"k"])
        assert hooks.on_unwatch([b"0", b"2", b"k"]) == DONE
        assert watches
        assert hooks.on_unwatch([b"0", b"1", b"k", b"no"]) == DONE
        assert not watches

    def test_long_replies_are_refused_one_by_one(self) -> None:
        frames = [encode_request([b"get", b"%d" % number]) for number in range(4)]
        long = encode_response(OK, b"v" * 600)
        hooks, _watches, ran, _log = self.make(dict(zip(frames, [long, long, DONE, long], strict=True)))
        hooks.max_response = 1000
        found = decode_list(hooks.on_exec([b"0", b"1", b"0", *frames])[8:])
        assert ran == frames
        assert (found[0], found[2]) == (long[4:], DONE[4:])
        for refused in (found[1], found[3]):
            assert refused is not None
            assert refused.startswith(b"\0\0\0\2ERR the replies to this transaction")
