"""What all campaigns do alike: say how far they are, and which of their runs failed."""

# ruff: noqa: T201

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Note = Callable[[int], None]  # takes how much has been done

EVERY = 30.0  # seconds between two lines


def quiet(done: int) -> None:
    """Say nothing."""


def aloud(name: str) -> Note:
    """Return what says on stderr, now and then, how far the campaign is."""
    started = last = time.monotonic()

    def note(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            print(f"{name}: {done} after {now - started:.0f} s", file=sys.stderr, flush=True)

    return note


@contextmanager
def in_run(seed: int) -> Iterator[None]:
    """Add the seed of the run to whatever fails in it."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the run with seed {seed}")
        raise
