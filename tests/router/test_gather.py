"""One reply made of what every shard says, or does not say."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from imds.commands import COMMANDS, Combine, Spread
from imds.protocol import (
    ERROR,
    LIST,
    OK,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_response,
)
from imds.router.gather import PATIENCE, SLOW, Gather, ShardStatus

DONE = encode_response(OK, b"OK")


def gathered(
    name: str, answers: dict[int, bytes | None], *, silent: set[int] | None = None
) -> tuple[int, bytes]:
    """Return the reply to a command of which shards 0 to 2 were asked and gave these answers."""
    gather = Gather.of(lambda _reply: None, COMMANDS[name], {0, 1, 2} - (silent or set()), silent or set())
    for number, (shard, answer) in enumerate(answers.items(), 1):
        assert gather.take(shard, answer) == (number == 3 - len(gather.silent))
    statuses = [ShardStatus("it is being restarted", restarts=shard) for shard in range(3)]
    decoded = decode_response(gather.reply(statuses))
    assert decoded is not None
    return decoded[0], decoded[1]


@pytest.mark.parametrize("name", [row.name for row in COMMANDS.values() if row.spread is Spread.ALL])
def test_every_command_of_every_shard_says_how(name: str) -> None:
    combine = COMMANDS[name].combine
    assert combine is not None
    before = time.monotonic()
    gather = Gather.of(lambda _reply: None, COMMANDS[name], {0}, set())
    patience = SLOW.get(name, PATIENCE[combine])
    assert before + patience <= gather.deadline <= time.monotonic() + patience
    assert {row.combine for row in COMMANDS.values() if row.spread is Spread.ALL} <= set(PATIENCE)


@pytest.mark.parametrize("name", ["sync", "rewrite"])
def test_every_shard_has_to_say_ok(name: str) -> None:
    assert gathered(name, {2: DONE, 0: DONE, 1: DONE}) == (OK, b"OK")
    down = (ERROR, b"SHARDDOWN shard 1: it is being restarted")
    assert gathered(name, {0: DONE, 1: None, 2: DONE}) == down
    silent = (ERROR, b"TIMEOUT shard 1: no answer within 30 s")
    assert gathered(name, {0: DONE, 2: DONE}) == silent
    assert gathered(name, {0: DONE, 2: DONE}, silent={1}) == silent
    loading = encode_error("LOADING the shard is reading its log")
    assert gathered(name, {0: DONE, 1: DONE, 2: loading}) == (
        ERROR,
        b"LOADING shard 2: the shard is reading its log",
    )
    assert gathered(name, {0: loading, 1: None, 2: DONE}) == (
        ERROR,
        b"LOADING shard 0: the shard is reading its log; shard 1: it is being restarted",
    )


def test_numbers_are_added_and_lists_joined() -> None:
    def numbers(combine: Combine, answers: dict[int, bytes | None]) -> tuple[int, bytes]:
        gather = Gather.of(lambda _reply: None, replace(COMMANDS["sync"], combine=combine), {0, 1, 2}, set())
        assert [gather.take(shard, answer) for shard, answer in answers.items()] == [False, False, True]
        decoded = decode_response(gather.reply([ShardStatus("it is being restarted")] * 3))
        assert decoded is not None
        return decoded[0], decoded[1]

    counts = {shard: encode_response(OK, b"%d" % count) for shard, count in ((2, 7), (0, 0), (1, 35))}
    assert numbers(Combine.SUM, dict(counts)) == (OK, b"42")
    down = (ERROR, b"SHARDDOWN shard 1: it is being restarted")
    assert numbers(Combine.SUM, {**counts, 1: None}) == down
    lists = {
        shard: encode_response(LIST, encode_list(items))
        for shard, items in ((1, []), (2, [b"c", None]), (0, [b"a", b"b"]))
    }
    assert numbers(Combine.LIST, dict(lists)) == (LIST, encode_list([b"a", b"b", b"c", None]))
    assert numbers(Combine.LIST, {**lists, 1: None}) == down


def test_statistics_show_every_shard() -> None:
    def rows(answers: dict[int, bytes | None], **more: Any) -> list[dict[str, Any]]:
        status, payload = gathered("stats", answers, **more)
        assert status == LIST
        return [json.loads(row) for row in decode_list(payload) if row is not None]

    up = encode_response(OK, json.dumps({"state": "up", "keys": 7}).encode())
    found = rows({0: up, 1: None, 2: encode_error("LOADING the shard is reading its log")})
    assert found == [
        {"shard": 0, "state": "up", "keys": 7, "restarts": 0},
        {"shard": 1, "state": "down", "reason": "it is being restarted", "restarts": 1},
        {"shard": 2, "state": "loading", "reason": "the shard is reading its log", "restarts": 2},
    ]
    for found in (rows({0: up, 1: up}), rows({0: up, 1: up}, silent={2})):
        assert found[2] == {"shard": 2, "state": "silent", "reason": "no answer within 1 s", "restarts": 2}
