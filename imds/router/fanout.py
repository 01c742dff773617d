"""Requests of many keys: split by shard, run in parallel, and their replies made into one.

::

    mget a b c d --split--> shard 0: mget a d      replies [1, 4]
                            shard 1: mget b c      replies [2, 3]    --combine--> [1, 2, 3, 4]

What stays true:

* A part is the same command with some of the keys, in their order, so a shard needs no other commands.
* It is not atomic: another client may see some parts done and others not. What one part cannot do, the others
  have done nevertheless; the error names the keys that failed, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from imds.commands import Combine, Command
from imds.hashslots import SlotMap
from imds.protocol import (
    ERROR,
    LIST,
    MAX_RESPONSE,
    MISSING,
    OK,
    decode_list,
    decode_response,
    encode_error,
    encode_list,
    encode_request,
    encode_response,
)

KEYS_NAMED = 10  # in an error
KEY_SHOWN = 64  # characters of each

TOO_LONG = encode_error("ERR the reply is too long")


@dataclass(slots=True)
class Part:
    """What one shard has to do: the request's frame, and which of the request's keys it has."""

    frame: bytes
    keys: list[int] = field(default_factory=list)


def split(command: Command, tokens: list[bytes], frame: bytes, slots: SlotMap) -> dict[int, Part]:
    """Return the part of each shard that a request concerns; of a single one it is the whole request."""
    positions = command.key_positions(tokens)
    parts: dict[int, Part] = {}
    for index, position in enumerate(positions):
        parts.setdefault(slots.shard_of(tokens[position]), Part(frame)).keys.append(index)
    if len(parts) > 1:
        for part in parts.values():
            words = [tokens[0]]
            for index in part.keys:
                words += tokens[positions[index] : positions[index] + command.key_step]
            part.frame = encode_request(words)
    return parts


def total(replies: list[bytes]) -> int:
    """Return the sum of what right replies say: a number; or OK for one, missing for none."""
    found = 0
    for reply in replies:
        status, payload = _decode(reply)
        if status == OK:
            found += 1 if payload == b"OK" else int(payload)
    return found


@dataclass(slots=True, eq=False)
class Fanout:
    """A request of many keys in more than one shard, and the replies that have come."""

    command: Command
    keys: list[bytes]
    parts: dict[int, Part]
    replies: dict[int, bytes] = field(default_factory=dict)

    def take(self, shard: int, reply: bytes) -> bytes | None:
        """Note a shard's reply frame; return the reply to the whole request once it is the last."""
        self.replies[shard] = reply
        return self._combine() if len(self.replies) == len(self.parts) else None

    def _combine(self) -> bytes:
        decoded = {shard: _decode(self.replies[shard]) for shard in self.parts}
        if any(status == ERROR for status, _ in decoded.values()):
            return self._failure(decoded)
        if self.command.combine is Combine.SUM:
            return encode_response(OK, b"%d" % total(list(self.replies.values())))
        if self.command.combine is Combine.EVERY:
            return encode_response(OK, b"OK")
        if sum(len(payload) for _, payload in decoded.values()) > MAX_RESPONSE - 1024:
            return TOO_LONG
        items: list[bytes | None] = [None] * len(self.keys)
        for shard, part in self.parts.items():
            for index, item in zip(part.keys, decode_list(decoded[shard][1]), strict=True):
                items[index] = item
        return encode_response(LIST, encode_list(items))

    def _failure(self, decoded: dict[int, tuple[int, bytes]]) -> bytes:
        """Return an error that says what failed for which keys; the code is the first one's.

        Only UNKNOWN goes before others, because who reads it may not simply ask again.
        """
        failures = []
        for shard, (status, payload) in decoded.items():
            if status == ERROR:
                keys = [self.keys[index] for index in self.parts[shard].keys]
                failures.append(f"{payload.decode(errors='replace')} ({_named(keys)})")
        failures.sort(key=lambda text: not text.startswith("UNKNOWN "))
        return encode_error("; ".join(failures))


def _named(keys: list[bytes]) -> str:
    shown = [key.decode(errors="backslashreplace")[:KEY_SHOWN] for key in keys[:KEYS_NAMED]]
    more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
    return f"key{'s' if len(keys) > 1 else ''} {', '.join(shown)}{more}"


def _decode(reply: bytes) -> tuple[int, bytes]:
    decoded = decode_response(reply)
    return decoded[:2] if decoded is not None else (MISSING, b"")
