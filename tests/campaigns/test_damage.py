"""Damage to logs, changes of the number of shards, and the dict: the short forms, and planted faults."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from campaigns import damage, machine, reshards
from campaigns.history import Violation
from campaigns.reporting import quiet
from campaigns.sim import Stopped
from imds import reshard as reshard_module
from imds.datadir import DataDir
from imds.reshard import ShardLogs
from imds.shard import aof as aof_module
from imds.shard import segment, worker
from imds.shard.aof import Aof
from imds.shard.record import RecordEncoder
from imds.shard.store import UnifiedStore


def caught(run: Callable[[], object]) -> None:
    with pytest.raises(Violation):
        run()


# -- damage ---------------------------------------------------------------------------------------


def test_damage_campaign():
    assert "0 silently wrong" in damage.campaign(60, 1, quiet, size=6000)


def damaged() -> str:
    return damage.campaign(60, 2, quiet, size=6000)


def test_checksums_that_are_not_looked_at(monkeypatch):
    from imds.shard import record

    def verify(buf: Any, seed: int, sequence: int) -> tuple[int, int, str | None]:
        position = count = 0
        while len(buf) - position >= record.HEADER.size:
            _, length, number = record.HEADER.unpack_from(buf, position)
            end = position + record.HEADER.size + length
            if length > record.MAX_EFFECT or number != sequence + count:
                return count, position, "wrong"
            if end > len(buf):
                break
            position, count = end, count + 1
        return count, position, None

    monkeypatch.setattr(segment, "verify_records", verify)
    caught(damaged)


def test_marks_that_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(aof_module, "later_marks", lambda *arguments: iter(()))
    caught(damaged)


def test_tails_that_are_not_saved(monkeypatch):
    def cut(self: Aof, path: Path, offset: int) -> None:
        fd = self._storage.open(path, os.O_RDWR)
        self._storage.truncate(fd, offset)
        self._storage.close(fd)

    monkeypatch.setattr(Aof, "_cut", cut)
    caught(damaged)


# -- reshards -------------------------------------------------------------------------------------


def test_reshards_campaign():
    assert "all data equal" in reshards.campaign(1, 1, quiet, density=0.02)


def resharded() -> None:
    tally, rng = reshards.Tally(), random.Random(7)
    for _ in range(4):
        for _ in reshards.crashes(rng, 2, 3, tally, 1.0):
            pass
        for _ in range(5):
            reshards.faults(rng, 2, 3, tally)


def test_new_logs_that_are_not_synced(monkeypatch):
    monkeypatch.setattr(Aof, "flush", lambda self: None)
    caught(resharded)


def test_old_logs_that_go_too_early(monkeypatch):
    plain = DataDir.commit

    def commit(self: DataDir, *arguments: Any) -> None:
        if self.generation:
            old, self.generation = self.generation, 0
            self.remove_generation(old)
            self.generation = old
        plain(self, *arguments)

    monkeypatch.setattr(DataDir, "commit", commit)
    caught(resharded)


def test_leftovers_that_go_before_the_manifest_is_safe(monkeypatch):
    """Killed between the rename and its sync: the next start believes the cached manifest."""

    class Lazy:
        def __init__(self, disk: Any) -> None:
            self._disk = disk

        def __getattr__(self, name: str) -> Any:
            return getattr(self._disk, name)

        def fsync_dir(self, path: Any) -> None:
            if path.name != "data":
                self._disk.fsync_dir(path)

    plain = DataDir._remove_leftovers

    def remove(self: DataDir) -> None:
        self.storage, real = Lazy(self.storage), self.storage  # type: ignore[assignment]
        plain(self)
        self.storage = real

    opened = DataDir._open.__func__  # type: ignore[attr-defined]

    def lazily(cls: Any, path: Any, shards: int, storage: Any, wait: float) -> DataDir:
        datadir: DataDir = opened(cls, path, shards, Lazy(storage), wait)
        datadir.storage = storage
        return datadir

    monkeypatch.setattr(DataDir, "_remove_leftovers", remove)
    monkeypatch.setattr(DataDir, "_open", classmethod(lazily))
    caught(resharded)


def test_keys_in_the_wrong_shard(monkeypatch):
    plain = ShardLogs.add
    monkeypatch.setattr(ShardLogs, "add", lambda self, key, effect: plain(self, key[1:], effect))
    caught(resharded)


def test_effects_in_another_order(monkeypatch):
    plain = reshard_module.each_effect
    monkeypatch.setattr(reshard_module, "each_effect", lambda records: reversed(list(plain(records))))
    caught(resharded)


# -- the dict -------------------------------------------------------------------------------------


def test_machine():
    machine.run(12, steps=50)


def removes_twice(store: type[UnifiedStore]) -> None:
    plain = store.cmd_zrem
    store.cmd_zrem = lambda self, *rest: (plain(self, *rest), plain(self, *rest))[1]  # type: ignore


def evicts_the_latest(store: type[UnifiedStore]) -> None:
    plain = store._find
    store._find = lambda self, key: self._table.get(key) if key == b"a" else plain(self, key)  # type: ignore


def ranks_from_one(store: type[UnifiedStore]) -> None:
    plain = store.cmd_zrank
    store.cmd_zrank = lambda self, *arguments: plain(self, *arguments).replace(b"0", b"1")  # type: ignore


def logs_the_spelling(store: type[UnifiedStore]) -> None:
    """A write in capitals goes into the log as it came, and cannot be replayed."""
    store._answer = _as_it_came  # type: ignore[method-assign]


def _as_it_came(self: UnifiedStore, frame: bytes, tokens: list[bytes]) -> bytes:
    _, method = self._fast.get(tokens[0]) or self._fast[tokens[0].lower()]
    return method(frame, *tokens[1:])


@pytest.mark.parametrize("plant", [removes_twice, evicts_the_latest, ranks_from_one, logs_the_spelling])
def test_planted_errors_of_the_store(monkeypatch, plant):
    class Wrong(UnifiedStore):
        """The Python twin, whatever is compiled."""

    plant(Wrong)
    monkeypatch.setattr(worker, "UnifiedStore", Wrong)
    monkeypatch.setattr(worker, "RecordEncoder", RecordEncoder)
    with pytest.raises((Violation, Stopped)):
        machine.run(60, steps=40, shrink=False)
