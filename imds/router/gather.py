"""Commands that every shard answers: one question to each, one reply for the client when all have come.

A shard that is down, or silent for as long as the command allows, is shown as that; nobody waits longer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from imds.commands import Combine, Command
from imds.protocol import (
    ERROR,
    LIST,
    MAX_RESPONSE,
    OK,
    U32,
    decode_response,
    encode_error,
    encode_list,
    encode_response,
)
from imds.router.fanout import TOO_LONG

# Seconds. A sync is waited for as long as the log itself waits for a disk, and longer.
PATIENCE = {Combine.ROWS: 1.0, Combine.EVERY: 30.0, Combine.SUM: 10.0, Combine.LIST: 10.0}
SLOW = {"digest": 120.0}  # commands that are O(data)


def join_lists(payloads: list[bytes]) -> bytes:
    """Return the payload of one list with the elements of several, one list after the other."""
    count = sum(U32.unpack_from(payload)[0] for payload in payloads)
    return b"".join([U32.pack(count), *[payload[4:] for payload in payloads]])


@dataclass(slots=True)
class ShardStatus:
    """What the supervisor has told about a shard: ``note`` is why it is down."""

    note: str = "starting"
    restarts: int = 0


@dataclass(slots=True, eq=False)
class Gather:
    """One request that waits for the shards' answers. ``done`` is to be called with its reply."""

    done: Callable[[bytes], None]
    command: Command
    combine: Combine
    waiting: set[int]
    silent: set[int]  # shards that owe an earlier answer and have not been asked
    answers: dict[int, bytes] = field(default_factory=dict)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.patience

    @property
    def patience(self) -> float:
        """How many seconds the shards may take."""
        return SLOW.get(self.command.name, PATIENCE[self.combine])

    @classmethod
    def of(
        cls, done: Callable[[bytes], None], command: Command, waiting: set[int], silent: set[int]
    ) -> Gather:
        """Return the gathering of ``command``, which the shards in ``waiting`` are to be asked."""
        assert command.combine is not None
        return cls(done, command, command.combine, waiting, silent)

    def take(self, shard: int, reply: bytes | None) -> bool:
        """Note a shard's reply, or None that there will be none; return whether all are in."""
        self.waiting.discard(shard)
        if reply is not None:
            self.answers[shard] = reply
        return not self.waiting

    def reply(self, statuses: list[ShardStatus]) -> bytes:
        """Return the reply to the client, made of what has come."""
        return self._rows(statuses) if self.combine is Combine.ROWS else self._whole(statuses)

    def _answer(self, shard: int, status: ShardStatus) -> tuple[bytes, str, str]:
        """Return a shard's payload, or else the code of its error and the rest of it."""
        decoded = decode_response(self.answers.get(shard, b""))
        if decoded is not None and decoded[0] != ERROR:
            return decoded[1], "", ""
        if decoded is not None:
            code, _, reason = decoded[1].decode(errors="replace").partition(" ")
            return b"", code, reason
        if shard in self.waiting or shard in self.silent:
            return b"", "TIMEOUT", f"no answer within {self.patience:g} s"
        return b"", "SHARDDOWN", status.note

    def _rows(self, statuses: list[ShardStatus]) -> bytes:
        states = {"TIMEOUT": "silent", "SHARDDOWN": "down"}
        rows = []
        for shard, status in enumerate(statuses):
            row: dict[str, Any] = {"shard": shard}
            payload, code, reason = self._answer(shard, status)
            if code:
                row |= {"state": states.get(code, code.lower()), "reason": reason}
            else:
                row |= json.loads(payload)
            row["restarts"] = status.restarts
            rows.append(json.dumps(row).encode())
        return encode_response(LIST, encode_list(rows))

    def _whole(self, statuses: list[ShardStatus]) -> bytes:
        """Every shard has to answer, or an error names those that do not."""
        failed, payloads = [], []
        for shard, status in enumerate(statuses):
            payload, code, reason = self._answer(shard, status)
            if code:
                failed.append((code, f"shard {shard}: {reason}"))
            else:
                payloads.append(payload)
        if failed:
            return encode_error(f"{failed[0][0]} {'; '.join(reason for _code, reason in failed)}")
        if self.combine is Combine.SUM:
            return encode_response(OK, b"%d" % sum(int(payload) for payload in payloads))
        if self.combine is Combine.LIST:
            if sum(map(len, payloads)) > MAX_RESPONSE - 1024:
                return TOO_LONG
            return encode_response(LIST, join_lists(payloads))
        return encode_response(OK, b"OK")
