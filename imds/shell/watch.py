"""A row every second of what a server does, from its ``info``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from imds.client import Client, ConnectionError, TimeoutError, TryAgainError
from imds.progress import amount
from imds.shell.keys import answered
from imds.shell.options import EX_CONNECTION, EX_OK
from imds.shell.output import Form, csv_row, dump_json, heading, say, wants_colour, write
from imds.shell.ticks import ticks

INTERVAL = 1.0  # seconds between two rows
_HEADING_EVERY = 20  # rows


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server said at a moment, all over its shards; counts are since its start."""

    moment: float  # seconds since the first one
    keys: int
    memory: int  # bytes of data
    clients: int
    requests: int
    hits: int
    misses: int
    evicted: int
    shards_up: int
    shards: int


def parse_info(text: str, moment: float) -> Sample:
    """Return what the reply to ``info`` says. What it does not say is 0."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    shards = [value for name, value in fields.items() if name.startswith("shard") and name[5:].isdigit()]
    keys = fields.get("db0", "keys=0").partition("keys=")[2].split(",")[0]

    def number(name: str) -> int:
        value = fields.get(name, "0")
        return int(value) if value.isdigit() else 0

    return Sample(
        moment,
        int(keys) if keys.isdigit() else 0,
        number("used_memory"),
        number("connected_clients"),
        number("total_commands_processed"),
        number("keyspace_hits"),
        number("keyspace_misses"),
        number("evicted_keys"),
        sum("state=up" in shard.split(",") for shard in shards),
        len(shards),
    )


def row(now: Sample, before: Sample | None) -> dict[str, Any]:
    """Return what a row has: rates are those since ``before``, None where that is not known.

    The counts start anew with a restarted shard; a rate that would be negative is not known either.
    """

    def since(name: str) -> int | None:
        change = getattr(now, name) - getattr(before, name) if before else -1
        return change if change >= 0 else None

    requests, hits, misses = since("requests"), since("hits"), since("misses")
    reads = None if hits is None or misses is None else hits + misses
    passed = now.moment - before.moment if before else 0.0
    return {
        "keys": now.keys,
        "memory": now.memory,
        "clients": now.clients,
        "requests": now.requests,
        "requests_per_second": None if requests is None or not passed else round(requests / passed),
        "hit_percent": round(100 * hits / reads, 1) if reads and hits is not None else None,
        "evicted": now.evicted,
        "shards_up": now.shards_up,
        "shards": now.shards,
    }


def watch(client: Client[bytes], interval: float, duration: float | None, form: Form) -> int:
    """Print a row every ``interval`` until Ctrl-C or for ``duration`` seconds; return the exit code.

    A server that goes away is waited for, and said so; one that is not there at first is an error.
    """
    before: Sample | None = None
    first = True
    code = EX_OK
    number = 0
    try:
        for moment in ticks(interval, duration):
            try:
                text = answered(client.execute("info")).payload.decode(errors="replace")
            except (ConnectionError, TimeoutError, TryAgainError) as error:
                if first:
                    raise
                print(f"imds-cli: {error}", file=sys.stderr)
                code, before = EX_CONNECTION, None
                continue
            now = parse_info(text, moment)
            _print(row(now, before), number, form)
            before, first, code, number = now, False, EX_OK, number + 1
    except KeyboardInterrupt:
        return EX_OK
    return code


def _print(shown: dict[str, Any], number: int, form: Form) -> None:
    if form is Form.JSON:
        write(dump_json(shown) + b"\n")
    elif form is not Form.TEXT:
        cells = [b"" if value is None else str(value).encode() for value in shown.values()]
        names = [name.encode() for name in shown]
        for row in [cells] if number else [names, cells]:
            write((csv_row([*row]) if form is Form.CSV else b"\t".join(row)) + b"\n")
    else:
        if number % _HEADING_EVERY == 0:
            say(heading(_COLUMNS.format(*_NAMES), wants_colour(sys.stdout)))
        say(_COLUMNS.format(*_cells(shown)))


_NAMES = ("keys", "memory", "clients", "requests", "req/s", "hits", "evicted", "shards up")
_COLUMNS = "{:>12} {:>9} {:>8} {:>14} {:>9} {:>7} {:>10} {:>10}"


def _cells(shown: dict[str, Any]) -> list[str]:
    rate, hits = shown["requests_per_second"], shown["hit_percent"]
    return [
        f"{shown['keys']:,}",
        amount(shown["memory"]),
        f"{shown['clients']:,}",
        f"{shown['requests']:,}",
        "-" if rate is None else f"{rate:,}",
        "-" if hits is None else f"{hits:.1f} %",
        f"{shown['evicted']:,}",
        f"{shown['shards_up']}/{shown['shards']}",
    ]
