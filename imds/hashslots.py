"""Key to slot to shard.

``slot = xxh64(tag(key), seed) % 16384`` and ``shard = owners[slot]``. Seed and map belong to the data
directory: they are written with it, so that a key is found again by every later start. ``hash()`` is
salted per process and ``hash % N`` would move nearly every key when N changes: neither is ever used.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from xxhash import xxh64_intdigest

SLOTS = 16384
MAX_SHARDS = 128  # more processes than any one machine's cores; also what fits the router's order array


def tag(key: bytes) -> bytes:
    """Return the part of ``key`` that decides its slot.

    That is the text inside the first ``{...}`` if it is not empty, otherwise the whole key, so that
    ``{user:7}:name`` and ``{user:7}:age`` live in one shard.
    """
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            return key[start + 1 : end]
    return key


def slot(key: bytes, seed: int) -> int:
    """Return the slot of ``key``, 0 to SLOTS - 1."""
    return xxh64_intdigest(tag(key), seed) % SLOTS


class SlotMap:
    """Which shard owns each slot. ``owners`` is one byte for each slot."""

    __slots__ = ("owners", "seed", "shards")

    def __init__(self, owners: bytes, shards: int, seed: int) -> None:
        self.owners = owners
        self.shards = shards
        self.seed = seed
        self.check()

    @classmethod
    def even(cls, shards: int, seed: int) -> SlotMap:
        """Return the map that gives ``shards`` shards contiguous runs of slots, equal within one."""
        starts = [-(-shard * SLOTS // max(shards, 1)) for shard in range(shards + 1)]
        owners = [bytes([shard]) * (end - start) for shard, (start, end) in enumerate(pairwise(starts))]
        return cls(b"".join(owners), shards, seed)

    def slot_of(self, key: bytes) -> int:
        """Return the slot of ``key``."""
        return slot(key, self.seed)

    def shard_of(self, key: bytes) -> int:
        """Return the shard that owns ``key``."""
        return self.owners[slot(key, self.seed)]

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return the map as (first slot, last slot, shard) runs in slot order."""
        runs, owners, first = [], self.owners, 0
        while first < SLOTS:
            rest = owners[first:]
            following = SLOTS - len(rest.lstrip(rest[:1]))
            runs.append((first, following - 1, rest[0]))
            first = following
        return runs

    @classmethod
    def from_ranges(cls, runs: Iterable[Iterable[int]], shards: int, seed: int) -> SlotMap:
        """Return the map that :meth:`ranges` gave. Raises ValueError where slots are missing or double."""
        owners = bytearray()
        for first, last, shard in runs:
            if first != len(owners) or not first <= last < SLOTS or not 0 <= shard < shards:
                raise ValueError(f"slot run {first}-{last} to shard {shard} does not fit the map")
            owners += bytes([shard]) * (last - first + 1)
        return cls(bytes(owners), shards, seed)

    def check(self) -> None:
        """Raise ValueError unless every slot has an owner and every shard owns a slot. O(SLOTS)."""
        if not 1 <= self.shards <= MAX_SHARDS:
            raise ValueError(f"{self.shards} shards, the rule is 1 to {MAX_SHARDS}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"hash seed {self.seed} does not fit 64 bits")
        if len(self.owners) != SLOTS:
            raise ValueError(f"{len(self.owners)} slots, the rule is {SLOTS}")
        if set(self.owners) != set(range(self.shards)):
            raise ValueError(f"slots belong to shards {sorted(set(self.owners))} of {self.shards}")
