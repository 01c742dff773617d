#!/usr/bin/env python3
"""What a request costs in one shard's store as the data grows, without sockets: a line of JSON.

Run by ``benchmarks/run.py growth`` and ``pause`` in a process of its own. A store takes a batch of requests
in one call, as a shard's loop gives it; here a batch is ``--batch`` requests, and the clock runs around the
call alone: the processor time of the thread. Each figure is the least of three passes: what disturbs a pass
only makes it slower.

    alone.py keys --sizes 10000,100000        microseconds for a get and a set among so many keys
    alone.py members --sizes 1000,10000       for zrank, zrange (ten members found, and 1,000), zadd
    alone.py pause --sizes 10000000           the longest single set while a table grows, milliseconds
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator

from imds.envelope import seal
from imds.load.workload import SCORES, key_name, member_name
from imds.protocol import encode_request
from imds.shard.kernel import RecordEncoder, UnifiedStore

VALUE = b"v" * 64
PASSES = 3
REQUESTS = 200_000  # in a pass
FILL = 1000  # requests in a batch that only makes data


class Alone:
    """A store and its log, whose records are thrown away."""

    def __init__(self) -> None:
        self._log = RecordEncoder(1)
        self._store = UnifiedStore(self._log, evict=True)

    def run(self, envelope: bytes) -> int:
        """Execute one envelope; return the nanoseconds of processor time that this took."""
        started = time.thread_time_ns()
        self._store.execute(envelope)
        self._log.pending()
        self._store.commit()
        return time.thread_time_ns() - started

    def fill(self, frames: Iterator[bytes]) -> None:
        """Execute many requests."""
        batch: list[bytes] = []
        for frame in frames:
            batch.append(frame)
            if len(batch) == FILL:
                self.run(seal(0, FILL, b"".join(batch)))
                batch.clear()
        if batch:
            self.run(seal(0, len(batch), b"".join(batch)))

    def cost(self, draw: Callable[[], bytes], batch: int, requests: int) -> float:
        """Return the microseconds of one request, which ``draw`` makes."""
        count = max(1, requests // batch)
        passes = []
        for _ in range(PASSES):  # each with requests of its own: a score that is set again moves no member
            batches = [seal(0, batch, b"".join([draw() for _ in range(batch)])) for _ in range(count)]
            gc.collect()
            passes.append(sum(map(self.run, batches)))
        return min(passes) / count / batch / 1000


def _set(number: int) -> bytes:
    return encode_request([b"set", key_name(number), VALUE])


def keys(sizes: list[int], batch: int, requests: int) -> dict[str, list[float]]:
    """Return the cost of get and set at each of the rising ``sizes``."""
    alone, dice, there = Alone(), random.Random(1), 0
    draws = {
        "get": lambda: encode_request([b"get", key_name(int(dice.random() * there))]),
        "set": lambda: _set(int(dice.random() * there)),
    }
    result: dict[str, list[float]] = {name: [] for name in draws}
    for size in sizes:
        alone.fill(_set(number) for number in range(there, size))
        there = size
        for name, draw in draws.items():
            result[name].append(alone.cost(draw, batch, requests))
    return result


def members(sizes: list[int], batch: int, requests: int) -> dict[str, list[float]]:
    """Return the cost of each command at each of the rising ``sizes`` of one sorted set."""
    alone, dice, there = Alone(), random.Random(1), 0

    def score() -> int:
        return int(dice.random() * SCORES)

    def zadd(number: int) -> bytes:
        return encode_request([b"zadd", b"z", b"%d" % score(), member_name(number)])

    def zrange(found: int) -> bytes:
        width = found / there * SCORES
        low = dice.random() * max(0.0, SCORES - width)
        return encode_request([b"zrange", b"z", b"%f" % low, b"%f" % (low + width)])

    draws = {
        "zrank": lambda: encode_request([b"zrank", b"z", member_name(int(dice.random() * there))]),
        "zrange of ten": lambda: zrange(10),
        "zrange of 1,000": lambda: zrange(1000),
        "zadd": lambda: zadd(int(dice.random() * there)),
    }
    result: dict[str, list[float]] = {name: [] for name in draws}
    for size in sizes:
        alone.fill(zadd(number) for number in range(there, size))
        there = size
        for name, draw in draws.items():
            few = requests // 100 if "1,000" in name else requests
            result[name].append(alone.cost(draw, batch, few))
    return result


def pause(sizes: list[int]) -> dict[str, list[float]]:
    """Return the longest that any single set took while the store grew to each of ``sizes``, in ms.

    By the processor time of this thread, which does not count what the machine does meanwhile; and by the
    clock on the wall, which does.
    """
    alone, there = Alone(), 0
    result: dict[str, list[float]] = {"processor time": [], "wall clock": []}
    gc.disable()
    for size in sizes:
        worst, longest = 0, 0
        for first in range(there, size, FILL):
            for envelope in [seal(0, 1, _set(number)) for number in range(first, min(size, first + FILL))]:
                wall = time.perf_counter_ns()
                worst = max(worst, alone.run(envelope))
                longest = max(longest, time.perf_counter_ns() - wall)
        there = size
        result["processor time"].append(worst / 1e6)
        result["wall clock"].append(longest / 1e6)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("keys", "members", "pause"))
    parser.add_argument("--sizes", required=True, type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--batch", type=int, default=64, help="requests in one call of the store")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="in each of the passes")
    options = parser.parse_args()
    if options.what == "pause":
        found = pause(options.sizes)
    else:
        found = (keys if options.what == "keys" else members)(options.sizes, options.batch, options.requests)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
