"""A shard on a simulated disk that crashes or fails; and planted faults, of which none may get away."""

from __future__ import annotations

from campaigns import crashes, faults
from campaigns.crashes import Run, Tally
from campaigns.model import COMMANDS, unknown
from campaigns.reporting import quiet
from imds.commands import COMMANDS as TABLE
from imds.shard.aof import POLICIES


def test_the_oracle_knows_every_command_on_keys():
    assert not unknown()
    assert set(COMMANDS) <= set(TABLE)


def test_campaign():
    assert "0 durable lost" in crashes.campaign(400, 1, quiet)


def test_every_policy_and_every_kind_of_operation_is_crashed():
    tally = Tally()
    for policy in POLICIES:
        for seed in range(2):
            Run(seed, tally, policy=policy).go()
    assert {
        "open",
        "write",
        "write_at",
        "fsync",
        "fdatasync",
        "fsync_dir",
        "rename",
        "mkdir",
        "truncate",
    } <= set(tally.points)
    assert tally.lives >= 10


def test_the_same_seed_is_the_same_run():
    tallies = [Tally(), Tally()]
    for tally in tallies:
        Run(2, tally).go()
    assert tallies[0] == tallies[1]
    assert tallies[0].states > 20


# -- faults ---------------------------------------------------------------------------------------


def test_an_append_by_a_grant_that_fails_although_all_of_it_was_written():
    """What is in the file must be taken back before the worker appends the same records."""
    tally = faults.Tally()
    for number in range(45, 55):
        faults.Run(faults.Case("no", "EIO", "late", number), 9101_000_000, tally).go()
    assert tally.struck == 10


def test_faults_campaign():
    assert "0 false acknowledgements" in faults.campaign(1, 1, quiet, step=31)
