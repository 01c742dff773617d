"""Damage to logs, changes of the number of shards, and the dict: the short forms."""

from __future__ import annotations

from campaigns import damage, machine, reshards
from campaigns.reporting import quiet


def test_damage_campaign():
    assert "0 silently wrong" in damage.campaign(60, 1, quiet, size=6000)


def test_reshards_campaign():
    assert "all data equal" in reshards.campaign(1, 1, quiet, density=0.02)


def test_machine():
    machine.run(12, steps=50)
