#!/usr/bin/env python3
"""What each shard of a server does and holds, and how evenly: a table, or JSON with --json.

Exit codes: 0 every shard is up; 1 a shard is not; 2 the server answered by an error; 3 it cannot be
reached; 64 wrong usage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from imds.cli import EX_CONNECTION, EX_OK, EX_SERVER, Parser, discard_output
from imds.client import Client, ImdsError, ServerError

EX_NOT_UP = 1

Row = dict[str, Any]


def number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def size(value: Any) -> str:
    """Bytes, in the unit that leaves one to four digits before the point."""
    power = min(4, (int(value).bit_length() - 1) // 10) if value else 0
    return f"{value / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(value: Any) -> str:
    minutes, seconds = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}:{seconds:02}" if days else f"{hours}:{minutes:02}:{seconds:02}"


# Heading, key in a shard's object, how its value is shown.
COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("shard", "shard", str),
    ("state", "state", str),
    ("keys", "keys", number),
    ("data", "used_bytes", size),
    ("rss", "rss_bytes", size),
    ("cpu %", "cpu_percent", number),
    ("ops", "ops", number),
    ("ops/s", "ops_per_second", number),
    ("hits", "hits", number),
    ("misses", "misses", number),
    ("evicted", "evictions", number),
    ("aof", "aof_bytes", size),
    ("torn", "aof_torn_bytes", size),
    ("pid", "pid", str),
    ("uptime", "uptime_seconds", duration),
    ("restarts", "restarts", number),
]
TOTALS = ("keys", "used_bytes", "rss_bytes", "cpu_percent", "ops", "ops_per_second", "hits", "misses",
          "evictions", "aof_bytes", "aof_torn_bytes", "restarts")  # fmt: skip
LEFT = 2  # columns that are text, and stand at the left


def add_rates(rows: list[Row], before: list[Row], seconds: float) -> None:
    """Give each shard ``ops_per_second`` since ``before``, unless it was restarted in between."""
    earlier = {(row.get("shard"), row.get("pid")): row for row in before}
    for row in rows:
        ago = earlier.get((row.get("shard"), row.get("pid")), {})
        if seconds > 0 and "ops" in row and "ops" in ago:
            row["ops_per_second"] = round((row["ops"] - ago["ops"]) / seconds, 1)


def summary(rows: list[Row]) -> Row:
    """Return the sums over shards, and imbalance: the largest share over the mean (1.0 is even)."""
    total: Row = {}
    for key in TOTALS:
        values = [row[key] for row in rows if key in row]
        if values:
            total[key] = sum(values)
    for key in ("keys", "ops"):
        values = [row[key] for row in rows if key in row]
        if any(values):
            total[f"{key}_imbalance"] = round(max(values) * len(values) / sum(values), 3)
    return total


def table(rows: list[Row]) -> str:
    """Return the table: a line for each shard, the totals, the imbalance, and why a shard is not up."""
    total = summary(rows)
    shown = [column for column in COLUMNS if column[1] != "ops_per_second" or column[1] in total]
    cells = [[heading for heading, _, _ in shown]]
    for row in [*rows, {"shard": "all", **total}]:
        cells.append([show(row[key]) if row.get(key) is not None else "-" for _, key, show in shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if n < LEFT else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    ratios = [
        f"{key} {total[f'{key}_imbalance']:.2f}" for key in ("keys", "ops") if f"{key}_imbalance" in total
    ]
    if ratios:
        lines.append(f"imbalance (largest / mean): {', '.join(ratios)}")
    for row in rows:
        notes = [row["reason"]] if row.get("reason") else []
        if row.get("readonly"):
            notes.append("takes no writes")
        lines += [f"shard {row.get('shard', '-')}: {note}" for note in notes]
    return "\n".join(line.rstrip() for line in lines)


def report(client: Client[bytes], before: list[Row], seconds: float, as_json: bool) -> list[Row]:
    """Fetch and print one sample; return its rows."""
    rows = client.stats()
    add_rates(rows, before, seconds)
    print(json.dumps({"shards": rows, "total": summary(rows)}) if as_json else table(rows), flush=True)
    return rows


def watch(client: Client[bytes], interval: float, as_json: bool) -> None:
    """Print a sample every ``interval`` seconds until Ctrl-C; a server that is away is waited for."""
    rows: list[Row] = []
    taken = 0.0
    while True:
        started = time.monotonic()
        if sys.stdout.isatty() and not as_json:
            print("\x1b[H\x1b[2J", end="")
        try:
            rows = report(client, rows, started - taken, as_json)
        except ImdsError as error:
            rows = []
            print(f"shard_stats: {error}", file=sys.stderr)
        taken = started
        time.sleep(max(0.0, started + interval - time.monotonic()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="shard_stats", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object for each sample, on one line")
    parser.add_argument(
        "--watch", metavar="SECONDS", type=float, help="again and again, with operations per second"
    )
    args = parser.parse_args(argv)
    if args.watch is not None and not 0.1 <= args.watch <= 86400:
        parser.error("--watch: must be from 0.1 to 86400 seconds")
    with parser.client(args) as client:
        try:
            client.connect()
            if args.watch is not None:
                watch(client, args.watch, args.json)
            rows = report(client, [], 0, args.json)
            return EX_OK if all(row.get("state") == "up" for row in rows) else EX_NOT_UP
        except KeyboardInterrupt:
            return EX_OK
        except BrokenPipeError:
            discard_output()
            return EX_OK
        except ImdsError as error:
            print(f"shard_stats: {error}", file=sys.stderr)
            return EX_SERVER if isinstance(error, ServerError) else EX_CONNECTION


if __name__ == "__main__":
    sys.exit(main())
