"""When to look again."""

from __future__ import annotations

import time
from collections.abc import Iterator


def ticks(interval: float, duration: float | None) -> Iterator[float]:
    """Yield the seconds since the start, at once and every ``interval``, up to ``duration`` (None: for ever).

    Where the work between two takes longer than the interval, the next comes at once and none is made up for.
    """
    start = following = time.monotonic()
    while True:
        now = time.monotonic()
        yield now - start
        following = max(following + interval, time.monotonic())
        if duration is not None and following - start >= duration:
            return
        time.sleep(max(0.0, following - time.monotonic()))
