"""The groups, in the order of RESULTS.md: each can be measured alone, and yields finished sections."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import goals
import growth
import reports
import rewriting
from measure import Setup
from table import Section

GROUPS: dict[str, Callable[[Setup], Iterator[Section]]] = {
    "strings": goals.strings,
    "sorted-sets": goals.sorted_sets,
    "everysec": goals.everysec,
    "always": goals.always,
    "latency": goals.latency,
    "memory": goals.memory,
    "replay": goals.replay,
    "python": goals.python,
    "shards": reports.shards,
    "routers": reports.routers,
    "connections": reports.connections,
    "values": reports.values,
    "keys": reports.keys,
    "fairness": reports.fairness,
    "rewriting": rewriting.rewriting,
    "pause": growth.pause,
    "growth": growth.growth,
    "growth-keys": growth.growth_keys,
    "growth-members": growth.growth_members,
}
