"""Keys of a server, found by scans: all of them, printed, and the largest."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from imds.client import Client, ImdsError, Response, WrongTypeError
from imds.progress import Progress, amount
from imds.shell.line import quote
from imds.shell.output import Form, csv_row, dump_json, encode, heading, jsonable, say, wants_colour, write

SCAN_COUNT = 500  # keys that a shard looks at for one request: a fraction of a millisecond


@dataclass(frozen=True, slots=True)
class Selection:
    """Which keys: ``pattern`` as of ``scan``, ``kind`` string or zset; a step looks at ``count``."""

    pattern: bytes | None = None
    kind: str | None = None
    count: int | None = None

    def pages(self, client: Client[bytes]) -> Iterator[list[bytes]]:
        """Yield the keys, some at a time, some of them twice. Raises ServerError, as of a dead shard."""
        options: list[bytes | str | int] = ["count", self.count or SCAN_COUNT]
        if self.pattern is not None:
            options += ["match", self.pattern]
        if self.kind is not None:
            options += ["type", self.kind]
        cursor: bytes | None = b"0"
        while True:
            cursor, *keys = answered(client.execute("scan", cursor or b"", *options)).items()
            yield [key for key in keys if key is not None]
            if not cursor or cursor == b"0":
                return


def answered(reply: Response) -> Response:
    """Return a reply that is no error; raise the error."""
    if error := reply.error():
        raise error
    return reply


def print_keys(client: Client[bytes], selection: Selection, form: Form | None) -> int:
    """Print each key on a line: quoted at a terminal, elsewhere its bytes. Return how many there were."""
    readable = form is Form.TEXT or (form is None and sys.stdout.isatty())
    number = 0
    for keys in selection.pages(client):
        number += len(keys)
        if readable:
            lines = [quote(key).encode(sys.stdout.encoding, "backslashreplace") for key in keys]
        else:
            lines = [encode(key, form or Form.RAW) for key in keys]
        write(b"".join(line + b"\n" for line in lines))
    return number


# The largest keys.

_SIZES = {b"string": ("strlen", "bytes"), b"zset": ("zcard", "members")}


@dataclass(slots=True)
class Kind:
    """What was seen of one kind of value: sizes are bytes of strings, members of sorted sets."""

    unit: str
    top: int
    keys: int = 0
    total: int = 0
    largest: list[tuple[int, bytes]] = field(default_factory=list)  # a heap, smallest first

    def add(self, size: int, key: bytes) -> None:
        """Count a key; O(log top)."""
        self.keys += 1
        self.total += size
        if (size, key) in self.largest:  # a scan may return a key twice
            return
        (heapq.heappush if len(self.largest) < self.top else heapq.heappushpop)(self.largest, (size, key))


def largest_keys(client: Client[bytes], selection: Selection, top: int) -> dict[str, Kind]:
    """Return for each kind of value how much of it there is, and the ``top`` largest keys.

    O(keys), in steps; each key that is looked at has been used, for what the server evicts.
    """
    kinds = {name: Kind(unit, top) for name, (_, unit) in _SIZES.items()}
    total = _number(client.execute("dbsize"))
    with Progress("looking at keys", total, shown="{:,.0f} keys".format) as progress:
        for keys in selection.pages(client):
            pipe = client.pipeline()
            for key in keys:
                pipe.command("type", key)
            found = [(key, reply.payload) for key, reply in zip(keys, pipe.execute(), strict=True)]
            found = [(key, kind) for key, kind in found if kind in _SIZES]
            for key, kind in found:
                pipe.command(_SIZES[kind][0], key)
            for (key, kind), reply in zip(found, pipe.execute(), strict=True):
                try:
                    kinds[kind].add(_number(reply), key)
                except WrongTypeError:
                    continue  # it has changed in between
            progress.advance(len(keys))
    return {kind.decode(): found for kind, found in kinds.items()}


def _number(reply: Response) -> int:
    try:
        return int(answered(reply).payload)
    except ValueError:
        raise ImdsError(f"no number: {reply.payload[:40]!r}") from None


def print_largest(kinds: dict[str, Kind], form: Form) -> None:
    """Print what largest_keys has found."""
    if form is Form.JSON:
        write(dump_json({name: _summary(kind) for name, kind in kinds.items()}) + b"\n")
    elif form is not Form.TEXT:
        for name, kind in kinds.items():
            for size, key in sorted(kind.largest, reverse=True):
                row = [name.encode(), b"%d" % size, key]
                write((csv_row([*row]) if form is Form.CSV else b"\t".join(row)) + b"\n")
    else:
        colour = wants_colour(sys.stdout)
        for name, kind in kinds.items():
            say(heading(f"{name}: {_described(kind)}", colour))
            shown = [(f"{size:,}", key) for size, key in sorted(kind.largest, reverse=True)]
            width = len(shown[0][0]) if shown else 0
            for text, key in shown:
                say(f"  {text:>{width}} {kind.unit}  {quote(key)}")


def _described(kind: Kind) -> str:
    if not kind.keys:
        return "none"
    total = amount(kind.total) if kind.unit == "bytes" else f"{kind.total:,} {kind.unit}"
    return f"{kind.keys:,} keys, {total}, {kind.total / kind.keys:,.1f} {kind.unit} on average"


def _summary(kind: Kind) -> dict[str, Any]:
    largest = [{"key": jsonable(key), kind.unit: size} for size, key in sorted(kind.largest, reverse=True)]
    return {"keys": kind.keys, kind.unit: kind.total, "largest": largest}
