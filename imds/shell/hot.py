"""The keys that are used most, by samples of the order of use.

A shard keeps its keys in the order of use, without counts; ``recent`` tells its last keys, and does
not count as use. Looked at again and again:

* ``last`` is the share of the looks at which a key was the one that its shard had used last. If one use does
  not depend on the one before, this estimates the key's share of all uses in its shard; after n looks a share
  of s is uncertain by about sqrt(s (1 - s) / n).
* ``recent`` is the share of the looks at which it was among the last DEPTH keys of its shard. It tells warm
  keys from cold ones, where none is used so often that it is seen last.

Both are of one shard: a key of a quiet shard has a larger share than one that a busy shard uses as often.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from imds.client import Client
from imds.shell.keys import answered
from imds.shell.line import quote
from imds.shell.output import Form, csv_row, dump_json, heading, jsonable, say, wants_colour, write
from imds.shell.ticks import ticks

INTERVAL = 0.02  # seconds between two looks
DURATION = 10.0  # seconds
DEPTH = 100  # keys of a shard at each look


@dataclass(slots=True)
class Looks:
    """What was seen: how many looks, in how many of them each key was its shard's last, or among its last."""

    number: int = 0
    seconds: float = 0.0
    last: Counter[bytes] = field(default_factory=Counter)
    recent: Counter[bytes] = field(default_factory=Counter)

    def add(self, last: list[bytes | None], recent: list[bytes | None]) -> None:
        """Count one look: the last key of each shard, and the last DEPTH of each."""
        self.number += 1
        self.last.update(key for key in last if key is not None)
        self.recent.update({key for key in recent if key is not None})

    def hottest(self, top: int) -> list[tuple[bytes, float, float]]:
        """Return (key, share of looks as the last, share among the last), the hottest first."""
        order = sorted(self.recent, key=lambda key: (-self.last[key], -self.recent[key], key))
        return [(key, self.last[key] / self.number, self.recent[key] / self.number) for key in order[:top]]


def look(client: Client[bytes], interval: float, duration: float) -> Looks:
    """Look for ``duration`` seconds, or until Ctrl-C. Raises ServerError, as of a shard that is down."""
    looks = Looks()
    start = time.monotonic()
    try:
        for _ in ticks(interval, duration):
            pipe = client.pipeline()
            pipe.command("recent", 1).command("recent", DEPTH)
            last, recent = (answered(reply).items() for reply in pipe.execute())
            looks.add(last, recent)
    except KeyboardInterrupt:
        pass
    looks.seconds = time.monotonic() - start
    return looks


def print_hottest(looks: Looks, top: int, form: Form) -> None:
    """Print the hottest keys."""
    found = looks.hottest(top)
    if form is Form.JSON:
        keys = [
            {"key": jsonable(key), "last": round(last, 6), "recent": round(recent, 6)}
            for key, last, recent in found
        ]
        write(dump_json({"looks": looks.number, "seconds": round(looks.seconds, 3), "keys": keys}) + b"\n")
    elif form is not Form.TEXT:
        for key, last, recent in found:
            row = [f"{last:.6f}".encode(), f"{recent:.6f}".encode(), key]
            write((csv_row([*row]) if form is Form.CSV else b"\t".join(row)) + b"\n")
    else:
        say(f"{looks.number:,} looks in {looks.seconds:.1f} s; of these each key was in its shard")
        say(heading(f"{'the last':>9} {f'of the last {DEPTH}':>15}", wants_colour(sys.stdout)))
        for key, last, recent in found:
            say(f"{last:>9.1%} {recent:>15.1%}  {quote(key)}")
