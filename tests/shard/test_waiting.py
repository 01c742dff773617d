"""Clients that wait in a shard, against a model that is one list."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from imds.commands import WRONG_TYPE
from imds.protocol import (
    LIST,
    decode_list,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
    split_request,
)
from imds.shard import record
from imds.shard.waiting import Waiting

NONE = b"\0\0\0\4\0\0\0\1"
KEYS = [b"a", b"b", b"c"]


class Shard:
    """Sorted sets as dicts, what is done to them in a batch, and who waits for them."""

    def __init__(self) -> None:
        self.data: dict[bytes, dict[bytes, float]] = {}
        self.kept: dict[bytes, dict[bytes, float]] = {}
        self.log = record.RecordEncoder(7)
        self.waiting = Waiting(self.run)

    def run(self, frame: bytes) -> bytes:
        name, key = split_request(frame)[0]
        if key == b"string":
            return encode_error(WRONG_TYPE)
        members = self.data.get(key, {})
        if not members:
            return encode_response(LIST, encode_list([]))
        pick = min if name == b"zpopmin" else max
        score, member = pick((score, member) for member, score in members.items())
        del members[member]
        self.log.add(frame)
        return encode_response(LIST, encode_list([member, b"%a" % score]))

    def add(self, key: bytes, member: bytes, score: float) -> None:
        self.data.setdefault(key, {})[member] = score
        self.log.add(encode_request([b"zadd", key, b"%a" % score, member]))

    def end_batch(self) -> list[list[bytes]]:
        """Return the notices, each with its router in front."""
        self.waiting.serve(self.log.pending())
        self.log.commit()
        self.kept = {key: dict(members) for key, members in self.data.items()}
        told = [[router, *split_request(frame)[0]] for router, frame in self.waiting.end_batch()]
        self.waiting.check()
        return told

    def fail_batch(self) -> None:
        self.waiting.serve(self.log.pending())
        self.data = {key: dict(members) for key, members in self.kept.items()}
        self.log.rollback()
        self.waiting.undo_batch()
        self.waiting.check()


def test_at_once_or_later() -> None:
    shard = Shard()
    shard.add(b"b", b"m", 1.0)
    shard.add(b"b", b"n", 2.0)
    assert shard.end_batch() == []
    found = shard.waiting.on_block([b"0", b"1", b"max", b"a", b"b"])
    assert decode_list(found[8:]) == [b"b", b"n", b"2.0"]
    assert not shard.waiting
    assert decode_list(shard.waiting.on_block([b"0", b"2", b"min", b"b"])[8:]) == [b"b", b"m", b"1.0"]
    assert shard.waiting.on_block([b"0", b"3", b"min", b"a", b"b", b"a"]) == NONE
    assert shard.end_batch() == []
    shard.add(b"a", b"x", 5.0)
    assert shard.end_batch() == [[b"0", b"popped", b"3", b"a", b"x", b"5.0"]]
    assert not shard.waiting
    assert shard.data[b"a"] == {}


def test_who_comes_later_does_not_overtake() -> None:
    """Not even in the batch that puts something there."""
    shard = Shard()
    assert shard.waiting.on_block([b"0", b"1", b"min", b"a"]) == NONE
    shard.add(b"a", b"x", 1.0)
    assert shard.waiting.on_block([b"1", b"1", b"min", b"a"]) == NONE
    assert shard.end_batch() == [[b"0", b"popped", b"1", b"a", b"x", b"1.0"]]
    shard.add(b"a", b"y", 1.0)
    assert shard.end_batch() == [[b"1", b"popped", b"1", b"a", b"y", b"1.0"]]


def test_a_key_of_the_wrong_kind() -> None:
    shard = Shard()
    assert shard.waiting.on_block([b"0", b"1", b"min", b"a", b"string"]) == encode_error(WRONG_TYPE)
    assert not shard.waiting


clients = st.tuples(st.sampled_from([b"0", b"1"]), st.integers(0, 30).map(b"%d".__mod__))
wishes = st.tuples(st.booleans(), st.lists(st.sampled_from(KEYS), min_size=1))
steps = st.one_of(
    st.tuples(
        st.just("block"), clients, st.tuples(st.booleans(), st.lists(st.sampled_from(KEYS), min_size=1))
    ),
    st.tuples(
        st.just("block"), clients, st.tuples(st.booleans(), st.lists(st.sampled_from(KEYS), min_size=1))
    ),
    st.tuples(st.just("add"), st.sampled_from(KEYS), st.integers(0, 99)),
    st.tuples(st.just("cancel"), clients, st.none()),
    st.tuples(st.just("leave"), st.sampled_from([b"0", b"1"]), st.none()),
    st.tuples(st.just("end"), st.none(), st.none()),
    st.tuples(st.just("fail"), st.none(), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=40))
def test_random_operations_match_a_list(actions: list[tuple[str, Any, Any]]) -> None:
    """Everything that was added is there, or was given once; nobody waits for a key that has something."""
    shard = Shard()
    queue: list[tuple[tuple[bytes, bytes], list[bytes]]] = []
    new: list[Any] = []  # in this batch
    added, given_out, batch_added, batch_given = 0, 0, 0, 0
    for action, who, what in [*actions, ("end", None, None)]:
        match action:
            case "block":
                if any(client == who for client, _ in queue):
                    continue
                smallest, keys = what
                reply = shard.waiting.on_block([*who, b"min" if smallest else b"max", *keys])
                if reply == NONE:
                    queue.append((who, keys))
                    new.append(queue[-1])
                else:
                    batch_given += 1
                    key = decode_list(reply[8:])[0]
                    assert not any(key in waits for _, waits in queue), "it overtook"
            case "add":
                members = shard.data.get(who, {})
                batch_added += b"%d" % what not in members
                shard.add(who, b"%d" % what, float(what))
            case "cancel":
                shard.waiting.on_cancel([*who])
                queue = [one for one in queue if one[0] != who]
            case "leave":
                shard.waiting.leave(who)
                queue = [one for one in queue if one[0][0] != who]
            case "fail":
                shard.fail_batch()
                queue = [one for one in queue if not any(one is other for other in new)]
                new = []
                batch_added = batch_given = 0
            case "end":
                new = []
                for router, name, number, key, _member, _score in shard.end_batch():
                    assert name == b"popped"
                    first = next(one for one in queue if key in one[1])
                    assert first[0] == (router, number), "it overtook"
                    queue.remove(first)
                    batch_given += 1
                added, given_out = added + batch_added, given_out + batch_given
                batch_added = batch_given = 0
                assert sum(map(len, shard.data.values())) == added - given_out
                for _, keys in queue:
                    assert not any(shard.data.get(key) for key in keys)
        assert bool(shard.waiting) == bool(queue or new)
