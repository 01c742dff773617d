"""Another number of shards: every key moves to the log of its new shard.

::

    gen-000001   shard-000  shard-001                      read, and left as they are
                     \\     X     \\
    gen-000002   shard-000  shard-001  shard-002           written, synced, then named by the manifest

The logs are copied effect by effect. All effects of a key are in one old log and go to one new log in their
order, so replaying the new logs gives the same data. The old generation stays the data until the manifest
is replaced; killed anywhere, the next open finds one of the two whole, and removes the other.
Memory is bounded: one chunk of an old log and a buffer for each new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from imds.datadir import DataDir, DataDirError
from imds.hashslots import SlotMap
from imds.progress import Progress
from imds.protocol import U32, Buffer
from imds.shard.aof import Aof, AofError
from imds.shard.record import HEADER, RecordEncoder, each_effect

log = logging.getLogger(__name__)

_CHUNK = 1 << 20  # bytes of an old log that are read in one go
_FLUSH = 1 << 18  # bytes that wait for the write to a new log


@dataclass
class Moved:
    """What :func:`reshard` did."""

    records: int = 0
    bytes: int = 0  # of the old logs
    torn_bytes: int = 0  # cut off the old logs, see Aof


def effect_key(effect: Buffer) -> bytes:
    """Return the key of an effect frame, its second token. Raises DataDirError where there is none."""
    size = len(effect)
    if size >= 12 and U32.unpack_from(effect)[0] >= 2:
        start = 8 + U32.unpack_from(effect, 4)[0]
        if start + 4 <= size:
            end = start + 4 + U32.unpack_from(effect, start)[0]
            if end <= size:
                return bytes(effect[start + 4 : end])
    raise DataDirError(f"an effect in the log has no key: {bytes(effect[:64])!r}")


class ShardLogs:
    """The logs of one generation's shards, for bulk appends. With ``with``: on a good end all is synced."""

    def __init__(self, datadir: DataDir, generation: int, slots: SlotMap) -> None:
        self.slots = slots
        self.logs = [
            Aof(
                datadir.shard_dir(shard, generation),
                shard=shard,
                generation=generation,
                policy="no",
                storage=datadir.storage,
            )
            for shard in range(slots.shards)
        ]
        self._encoders: list[RecordEncoder] = []
        self._waiting = [0] * slots.shards  # bytes in each encoder

    def load(self, apply: Callable[[memoryview], object], progress: Callable[[int], object]) -> None:
        """Read what the logs hold. Has to come before the first :meth:`add`. Raises as Aof.load does."""
        before = 0
        for aof in self.logs:
            for done, _total, _records in aof.load(apply, _CHUNK):
                progress(before + done)
            before += done
            self._encoders.append(RecordEncoder(aof.seed, aof.sequence))

    def add(self, key: bytes, effect: bytes) -> None:
        """Append an effect to the log of the shard that owns ``key``. Raises as Aof.append does."""
        shard = self.slots.shard_of(key)
        self._encoders[shard].add(effect)
        self._waiting[shard] += HEADER.size + len(effect)
        if self._waiting[shard] >= _FLUSH:
            self._write(shard)

    def _write(self, shard: int) -> None:
        if not self._waiting[shard]:
            return
        self.logs[shard].append(self._encoders[shard].pending())
        self._encoders[shard].commit()
        self._waiting[shard] = 0

    def __enter__(self) -> ShardLogs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for shard in range(len(self.logs)):
                    self._write(shard)
                for aof in self.logs:
                    aof.flush()
        finally:
            for aof in self.logs:
                with suppress(AofError):  # flush has said so, or there was an error before it
                    aof.close()


def reshard(datadir: DataDir, shards: int) -> Moved:
    """Spread the data over ``shards`` shards, evenly. No shard may be running.

    Raises DataDirError: then the data is as it was, except that an error of the very last step, the
    commit, leaves it to the next open to tell.
    """
    try:
        return _reshard(datadir, shards)
    except (AofError, OSError) as error:
        raise DataDirError(f"{datadir.path}: cannot move the keys to {shards} shards: {error}") from error


def _reshard(datadir: DataDir, shards: int) -> Moved:
    old, slots = datadir.generation, SlotMap.even(shards, datadir.slots.seed)
    new = old + 1
    moved = Moved()
    try:
        datadir.make_generation(new, shards)
        with ShardLogs(datadir, new, slots) as target:
            target.load(lambda records: None, lambda done: None)
            _copy(datadir, target, moved)
    except BaseException:
        # Give the room back, if that can be done: the disk may be full of it.
        _try_remove(datadir, new)
        raise
    datadir.commit(new, slots)
    _try_remove(datadir, old)
    log.info("%s: %d records moved to %d shards", datadir.path, moved.records, shards)
    return moved


def _copy(datadir: DataDir, target: ShardLogs, moved: Moved) -> None:
    """Give every effect of the present generation to ``target``; count in ``moved``."""

    def copy(records: memoryview) -> None:
        for _sequence, start, end in each_effect(records):
            effect = bytes(records[start:end])
            target.add(effect_key(effect), effect)
            moved.records += 1

    with ShardLogs(datadir, datadir.generation, datadir.slots) as source:
        moved.bytes = sum(aof.disk_bytes() for aof in source.logs)
        label = f"moving keys from {datadir.shards} to {target.slots.shards} shards"
        with Progress(label, moved.bytes) as progress:
            source.load(copy, progress.update)
        moved.torn_bytes = sum(aof.torn_bytes for aof in source.logs)


def _try_remove(datadir: DataDir, generation: int) -> None:
    try:
        datadir.remove_generation(generation)
    except FileNotFoundError:
        pass  # not even begun
    except OSError as error:
        log.warning("%s: generation %d is left to the next start: %s", datadir.path, generation, error)
