"""Transactions on a simulated disk: a crash at each operation leaves all of each one, or nothing of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from campaigns.history import start, stored
from campaigns.model import KEYS
from campaigns.sim import simulate
from campaigns.simdisk import SimDisk
from imds.protocol import encode_request
from imds.shard.aof import POLICIES

TRANSACTIONS = 12


def transaction(number: int, rng: random.Random) -> tuple[bytes, ...]:
    """Return an ``_exec`` that leaves the same number in four keys, of which one is there or not by turns."""
    value = b"%d " % number + bytes(rng.choice((0, 700, 3000)))  # a power cut keeps any sectors of it
    requests = [
        *([b"set", KEYS[0], value], [b"get", KEYS[0]], [b"append", KEYS[1], b"x"]),
        *([b"zadd", KEYS[2], b"%d" % number, b"m"], [b"zadd", KEYS[0], b"1", b"fails"]),
        [b"set", KEYS[3], b""] if number % 2 else [b"del", KEYS[3]],
    ]
    return (b"_exec", b"0", b"1", b"0", *map(encode_request, requests))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_crash_at_every_operation(policy: str) -> None:
    disk, rng = SimDisk(), random.Random(policy)
    found: list[tuple[SimDisk, int]] = []  # and how many transactions must be there
    sure = 0
    with simulate(disk, rng) as sim:
        datadir, shard = start(sim, policy, rewrite=3000)

        def changed(_name: str, _path: Path) -> None:
            cuts = [(disk.crash(rng), sure if policy == "always" else 0) for _ in range(2)]
            found.extend([*cuts, (disk.killed(), sure)])

        disk.after = changed
        link = shard.link()
        for number in range(1, TRANSACTIONS + 1):
            link.ask([transaction(number, rng)])
            sure = number
        assert shard.stop() == 0
        datadir.close()
    assert len(found) > 2 * TRANSACTIONS
    seen = set()
    for left, least in found:
        with simulate(left, rng) as sim:
            datadir, shard = start(sim, policy)
            state = {key: value for key, (value, _deadline) in stored(shard)[0].items()}
            datadir.close()
        value, counter, scores = (state.get(key) for key in KEYS[:3])
        done = int(bytes(value).split()[0]) if value else 0
        assert least <= done
        assert counter == (b"x" * done or None)
        assert scores == ({b"m": done} if done else None)
        assert (KEYS[3] in state) == (done % 2 == 1)
        seen.add(done)
    assert len(seen) > TRANSACTIONS // 2, "crashes fell in between"
