"""The shard's kernels, compiled where they are built: what the worker imports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imds._kernel import pick
from imds.shard import links, record, sortedset, store

if TYPE_CHECKING:  # the twins declare the interface
    from imds.shard.links import Link, Links
    from imds.shard.record import RecordEncoder, verify_records
    from imds.shard.sortedset import SortedSet
    from imds.shard.store import UnifiedStore
else:
    Link = pick(links.Link, "links", "Link")
    Links = pick(links.Links, "links", "Links")
    RecordEncoder = pick(record.RecordEncoder, "record", "RecordEncoder")
    verify_records = pick(record.verify_records, "record", "verify_records")
    SortedSet = pick(sortedset.SortedSet, "sortedset", "SortedSet")
    UnifiedStore = pick(store.UnifiedStore, "store", "UnifiedStore")

__all__ = ["Link", "Links", "RecordEncoder", "SortedSet", "UnifiedStore", "verify_records"]
