"""Real processes that are killed, or whose system calls fail: the short forms."""

import pytest

from campaigns import histories, kills, straces
from campaigns.reporting import quiet


def test_kills():
    done = kills.campaign(5, 3, quiet, roles=("shard", "rewriting", "router", "supervisor", "rewriting"))
    assert "0 acknowledged lost, 0 invented" in done


def test_histories():
    assert "none undecided" in histories.campaign(2, 4, quiet, roles=("shard", "router"))


def test_there_are_scenarios_for_every_kind_of_call():
    calls = {inject.partition(":")[0] for one in straces.SCENARIOS for inject in one.inject}
    assert {"pwrite64", "fdatasync", "fsync", "rename", "unlink", "mkdir", "openat", "flock"} <= calls
    assert len({one.name for one in straces.SCENARIOS}) == len(straces.SCENARIOS) >= 12


@pytest.mark.parametrize(
    "name",
    [
        "a sync fails under always",
        "no space",
        "killed in a write",
        "a write cannot be taken back",
        "other shards: killed at the rename",
    ],
)
def test_strace(name):
    (scenario,) = [one for one in straces.SCENARIOS if one.name == name]
    assert straces.run(scenario, 1)
