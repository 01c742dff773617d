"""A rate limiter with a sliding window: at most so many hits in any stretch of so many seconds.

::

    limiter = RateLimiter(client, limit=100, seconds=60)
    hit = limiter.hit("203.0.113.7")
    if not hit.allowed:
        ...                     # 429, Retry-After: hit.retry_after

* The hits of the last ``seconds`` are the members of a sorted set, scored by when they were: a counter for
  each minute would let twice the limit through around the full minute.
* One transaction forgets what is too old, counts and adds, so any number of processes may share a limiter and
  never let more through than the limit. A hit that is refused is taken out again; until then, for
  about a millisecond, it can have another one refused in the moment in which a place becomes free.
* Time is the server's: clients whose clocks differ would not agree on what is too old.
* A set takes memory for ``limit`` members at most, and goes by itself ``seconds`` after the last hit. Cost:
  two round trips, and O(log limit) for each hit that comes or goes.

As a script it lets one client hit faster than it may.
"""

from __future__ import annotations

import secrets
import time
from typing import NamedTuple

import imds


class Hit(NamedTuple):
    """Whether a hit is ``allowed``, how many more are, and in how many seconds the next one will be."""

    allowed: bool
    remaining: int
    retry_after: float


class RateLimiter:
    """At most ``limit`` hits of each name in any ``seconds``; ``prefix`` keeps limiters apart."""

    def __init__(
        self, client: imds.Client[bytes], *, limit: int, seconds: float, prefix: str = "limit"
    ) -> None:
        self._client = client
        self._limit = limit
        self._window = round(seconds * 1e6)  # in microseconds, as are all scores
        self._prefix = prefix

    def hit(self, name: str) -> Hit:
        """Count a hit of ``name``, unless that is too much. An imds.ImdsError leaves open whether it did."""
        key = f"{self._prefix}:{name}"
        now = self._now()
        member = secrets.token_bytes(8)
        _, before, _, oldest, _ = (
            self._client.transaction()
            .zremrangebyscore(key, high=now - self._window)
            .zcard(key)
            .zadd(key, now, member)
            .zrangebyrank(key, 0, 0)
            .pexpire(key, self._window // 1000 + 1)
            .execute()
        )
        if before >= self._limit:
            self._client.zrem(key, member)
        remaining = max(0, self._limit - before - 1)
        free = 0.0 if remaining else (oldest[0][1] + self._window - now) / 1e6
        return Hit(before < self._limit, remaining, free)

    def forget(self, name: str) -> None:
        """Begin anew, as if ``name`` had made no hit."""
        self._client.delete(f"{self._prefix}:{name}")

    def _now(self) -> int:
        seconds, microseconds = self._client.time()
        return seconds * 1_000_000 + microseconds


def main() -> None:
    """Ten hits, of which three are allowed in each half second."""
    with imds.serve() as server, server.client() as client:
        limiter = RateLimiter(client, limit=3, seconds=0.5)
        start = time.monotonic()
        for _ in range(10):
            hit = limiter.hit("203.0.113.7")
            answer = "allowed" if hit.allowed else f"refused, again in {hit.retry_after:.2f} s"
            print(f"{time.monotonic() - start:5.2f} s  {answer}")
            time.sleep(0.1)


if __name__ == "__main__":
    main()
