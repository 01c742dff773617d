"""How long a turn of an event loop goes on: with rounds of its kernel, while nothing is left to Python.

The compiled loops have the same in ``_kernel/poll.pxd``.
"""

from __future__ import annotations

import math
import time

TURN = 0.05  # seconds from the end of a turn's first round to the turn's end


class Rounds:
    """The time of one turn, which waits for ``timeout`` seconds at most (None: for ever)."""

    def __init__(self, timeout: float | None) -> None:
        self._until = math.inf if timeout is None else time.monotonic() + timeout
        self._first = True

    def left(self) -> float:
        """Return the seconds that the next round may wait; 0 or less: there is none. Call it after each."""
        now = time.monotonic()
        if self._first:
            self._first = False
            self._until = min(self._until, now + TURN)
        return self._until - now
