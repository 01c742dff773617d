"""Commands that every shard answers: one question to each, one reply for the client when all have come.

A shard that is down, or silent for ``PATIENCE`` seconds, is shown as that; nobody waits for it longer.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from imds.protocol import LIST, OK, decode_response, encode_list, encode_response

PATIENCE = 1.0  # seconds


@dataclass(slots=True)
class ShardStatus:
    """What the supervisor has told about a shard: ``note`` is why it is down."""

    note: str = "starting"
    restarts: int = 0


@dataclass(slots=True, eq=False)
class Gather:
    """One client request that waits for the shards' answers. ``turn`` is its place in the replies."""

    turn: Any
    waiting: set[int]
    silent: set[int]  # shards that owe an earlier answer and have not been asked
    answers: dict[int, bytes] = field(default_factory=dict)
    deadline: float = field(default_factory=lambda: time.monotonic() + PATIENCE)

    def take(self, shard: int, reply: bytes | None) -> bool:
        """Note a shard's reply, or None that there will be none; return whether all are in."""
        self.waiting.discard(shard)
        if reply is not None:
            self.answers[shard] = reply
        return not self.waiting

    def stats(self, statuses: list[ShardStatus]) -> bytes:
        """Return the reply to ``stats``: a list with one JSON object for each shard, dead or alive."""
        rows = []
        for shard, status in enumerate(statuses):
            row: dict[str, Any] = {"shard": shard}
            decoded = decode_response(self.answers.get(shard, b""))
            if decoded is not None and decoded[0] == OK:
                row |= json.loads(decoded[1])
            elif decoded is not None:
                code, _, reason = decoded[1].decode(errors="replace").partition(" ")
                row |= {"state": code.lower(), "reason": reason}
            elif shard in self.waiting or shard in self.silent:
                row |= {"state": "silent", "reason": f"no answer within {PATIENCE:g} s"}
            else:
                row |= {"state": "down", "reason": status.note}
            row["restarts"] = status.restarts
            rows.append(json.dumps(row).encode())
        return encode_response(LIST, encode_list(rows))
