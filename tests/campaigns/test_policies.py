"""Policies that change while the shard serves: a power cut at each operation takes nothing promised."""

from __future__ import annotations

import json
import random

import pytest

from campaigns.history import start, stored
from campaigns.model import KEYS
from campaigns.sim import simulate
from campaigns.simdisk import SimDisk
from imds.shard.aof import POLICIES


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_at_every_operation(seed: int) -> None:
    disk, rng = SimDisk(), random.Random(seed)
    found: list[tuple[SimDisk, int]] = []  # and the number that must be there
    policy, number, promised = rng.choice(POLICIES), 0, 0
    with simulate(disk, rng) as sim:
        datadir, shard = start(sim, policy, rewrite=rng.choice((0, 500)))
        disk.after = lambda _name, _path: found.append((disk.crash(rng), promised))
        link = shard.link()
        for _ in range(25):
            number += 1
            requests = [(b"set", KEYS[0], b"%d" % number)]
            if changes := rng.random() < 0.3:
                policy = rng.choice([one for one in POLICIES if one != policy])
                requests.append((b"_configure", json.dumps({"appendfsync": policy}).encode()))
            link.ask(requests)
            if changes or policy == "always":
                promised = number
            if rng.random() < 0.2:
                sim.schedule.sleep(rng.choice((0.3, 1.5, 3.0)))
        assert shard.stop() == 0
        datadir.close()
    for left, least in found:
        with simulate(left, rng) as sim:
            datadir, shard = start(sim, "no")
            value, _deadline = stored(shard)[0].get(KEYS[0], (b"0", 0))
            assert least <= int(bytes(value)) <= number
            datadir.close()
