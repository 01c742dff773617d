"""Requests of many keys: split, run by shards that are dicts, and combined."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imds.commands import COMMANDS, Combine, Command, Spread
from imds.hashslots import SlotMap
from imds.protocol import (
    ERROR,
    LIST,
    MISSING,
    OK,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
    split_request,
)
from imds.router import fanout
from imds.router.fanout import Fanout, split

SLOTS = SlotMap.even(5, 0xFEED)


def many(name: str, combine: Combine, step: int = 1) -> Command:
    row = replace(COMMANDS["get"], name=name, min_tokens=1 + step, max_tokens=1000)
    return replace(row, spread=Spread.KEYS, last_key=-1, key_step=step, combine=combine)


MGET, MSET = many("mget", Combine.LIST), many("mset", Combine.EVERY, 2)
EXISTS, DEL = many("exists", Combine.SUM), many("del", Combine.SUM)


def shard(data: dict[bytes, bytes], frame: bytes) -> bytes:
    """Answer a part as a shard does, whose data are these."""
    (name, *words), end = split_request(frame)
    assert end == len(frame)
    if name == b"mget":
        return encode_response(LIST, encode_list([data.get(key) for key in words]))
    if name == b"mset":
        data.update(zip(words[::2], words[1::2], strict=True))
        return encode_response(OK, b"OK")
    if name == b"exists":
        return encode_response(OK, b"%d" % sum(key in data for key in words))
    gone = [data.pop(key) for key in words if key in data]
    if len(words) == 1:  # frozen
        return encode_response(OK, b"OK") if gone else encode_response(MISSING)
    return encode_response(OK, b"%d" % len(gone))


def run(command: Command, tokens: list[bytes], shards: list[dict[bytes, bytes]], order: list[int]) -> bytes:
    """Split a request, have its parts answered in some order, return the reply."""
    frame = encode_request(tokens)
    parts = split(command, tokens, frame, SLOTS)
    keys = [tokens[position] for position in command.key_positions(tokens)]
    if len(parts) == 1:
        assert next(iter(parts.values())).frame == frame
        return shard(shards[next(iter(parts))], frame)
    fan = Fanout(command, keys, parts)
    left = sorted(parts, key=order.index)
    for number in left:
        for word in split_request(parts[number].frame)[0][1 :: command.key_step]:
            assert SLOTS.shard_of(word) == number
        reply = fan.take(number, shard(shards[number], parts[number].frame))
        assert (reply is None) == (number != left[-1])
    assert reply is not None
    return reply


names = st.sampled_from([b"mget", b"mset", b"exists", b"del"])
keys = st.lists(st.sampled_from([b"%d" % number for number in range(20)] + [b"{t}1", b"{t}2"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, keys), max_size=12), st.data())
def test_as_one_dict_would(requests: list[tuple[bytes, list[bytes]]], data: st.DataObject) -> None:
    shards: list[dict[bytes, bytes]] = [{} for _ in range(SLOTS.shards)]
    model: dict[bytes, bytes] = {}
    for turn, (name, words) in enumerate(requests):
        order = data.draw(st.permutations(range(SLOTS.shards)))
        if name == b"mset":
            pairs = {key: b"%d" % (turn + at) for at, key in enumerate(words)}
            tokens = [name, *(word for pair in pairs.items() for word in pair)]
            assert run(MSET, tokens, shards, order) == encode_response(OK, b"OK")
            model |= pairs
        elif name == b"mget":
            expected = encode_list([model.get(key) for key in words])
            assert run(MGET, [name, *words], shards, order) == encode_response(LIST, expected)
        elif name == b"exists":
            count = sum(key in model for key in words)
            assert run(EXISTS, [name, *words], shards, order) == encode_response(OK, b"%d" % count)
        elif len(words) > 1:
            count = len(model.keys() & set(words))
            assert run(DEL, [name, *words], shards, order) == encode_response(OK, b"%d" % count)
            for key in words:
                model.pop(key, None)
        assert {key: value for one in shards for key, value in one.items()} == model


def failure(command: Command, replies: dict[int, bytes], words: list[bytes]) -> bytes:
    """Return the error of a request of which some shards answer these, and the others well."""
    tokens = [command.name.encode(), *words]
    parts = split(command, tokens, encode_request(tokens), SLOTS)
    fan = Fanout(command, words, parts)
    for number in parts:
        reply = fan.take(number, replies.get(number, encode_response(OK, b"OK")))
    assert reply is not None
    decoded = decode_response(reply)
    assert decoded is not None
    assert decoded[0] == ERROR
    return decoded[1]


def keys_of(number: int, count: int) -> list[bytes]:
    found = [b"key%d" % key for key in range(400) if SLOTS.shard_of(b"key%d" % key) == number]
    return found[:count]


def test_an_error_names_the_keys_that_failed_and_no_other() -> None:
    one, two, three = keys_of(0, 1), keys_of(1, 2), keys_of(2, 12)
    words = [*one, *two, *three]
    down = encode_error("SHARDDOWN shard 1 cannot be reached: a test")
    text = f"SHARDDOWN shard 1 cannot be reached: a test (keys {two[0].decode()}, {two[1].decode()})"
    assert failure(DEL, {1: down}, words) == text.encode()
    unknown = encode_error("UNKNOWN the shard died")
    both = failure(DEL, {0: down, 2: unknown}, words).decode()
    named = ", ".join(key.decode() for key in three[:10])
    assert both == (
        f"UNKNOWN the shard died (keys {named} and 2 more); "
        f"SHARDDOWN shard 1 cannot be reached: a test (key {one[0].decode()})"
    ), "what must not be tried again stands first"


def test_keys_of_any_bytes_are_shown() -> None:
    odd = [b"\xff\0\n" * 100, *keys_of(0, 1)]
    number = SLOTS.shard_of(odd[0])
    error = encode_error("SHARDDOWN down")
    if number == 0:
        odd[1] = keys_of(1, 1)[0]
    text = failure(DEL, {number: error}, odd).decode()
    assert text.startswith("SHARDDOWN down (key \\xff")
    assert len(text) < 120


def test_a_reply_that_would_be_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_RESPONSE", 1024 + 50)
    words = [*keys_of(0, 1), *keys_of(1, 1)]
    shards: list[dict[bytes, bytes]] = [{} for _ in range(SLOTS.shards)]
    for word in words:
        shards[SLOTS.shard_of(word)][word] = b"v" * 10
    reply = run(MGET, [b"mget", *words], shards, list(range(5)))
    assert decode_list(reply[8:]) == [b"v" * 10] * 2
    for word in words:
        shards[SLOTS.shard_of(word)][word] = b"v" * 30
    assert run(MGET, [b"mget", *words], shards, list(range(5))) == fanout.TOO_LONG
