"""Whose log is rewritten when: one shard at a time over the whole server, a failure not again at once.

What stays true: a shard waits at most once; it leaves when its rewrite has succeeded or its process is gone,
whose successor will ask again if there is need. Who has failed lets the others go first.
"""

from __future__ import annotations

FIRST_PAUSE = 5.0  # seconds from a failure to the next try; doubles with each one in succession
LONGEST_PAUSE = 300.0


class Rewrites:
    """The shards that wait. Times are the caller's, in seconds."""

    def __init__(self) -> None:
        self.running: int | None = None  # the shard whose turn it is
        self._due: dict[int, float] = {}  # in the order in which they asked
        self._failures: dict[int, int] = {}  # in succession

    def ask(self, shard: int, now: float, *, at_once: bool = False) -> None:
        """The shard wants a rewrite; ``at_once``: a person does, whatever has failed before."""
        if at_once or shard not in self._due:
            self._due[shard] = now

    def start(self, now: float, able: set[int]) -> int | None:
        """Return the shard, of those that are able, whose turn begins now; None if there is none."""
        if self.running is None:
            for shard, due in self._due.items():
                if due <= now and shard in able:
                    self.running = shard
                    return shard
        return None

    def succeeded(self) -> None:
        """The turn is over, and well."""
        assert self.running is not None
        self.forget(self.running)

    def failed(self, now: float) -> float:
        """The turn is over, in vain; return the seconds until the shard's next one."""
        assert self.running is not None
        shard, self.running = self.running, None
        failures = self._failures[shard] = self._failures.get(shard, 0) + 1
        pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
        self._due.pop(shard, None)
        self._due[shard] = now + pause
        return float(pause)

    def forget(self, shard: int) -> None:
        """The shard needs none any more, or is gone."""
        self._due.pop(shard, None)
        self._failures.pop(shard, None)
        if self.running == shard:
            self.running = None

    def wait(self, now: float) -> float | None:
        """Return the seconds until a turn may begin, None if nobody waits or one is running."""
        if self.running is not None or not self._due:
            return None
        return max(0.0, min(self._due.values()) - now)
