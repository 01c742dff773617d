"""A shard on a simulated disk that crashes or fails; and planted faults, of which none may get away."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from campaigns import crashes, faults
from campaigns.crashes import Run, Tally
from campaigns.faults import Case
from campaigns.history import Violation
from campaigns.model import COMMANDS
from campaigns.reporting import quiet
from imds.commands import COMMANDS as TABLE
from imds.commands import Spread
from imds.datadir import DataDir
from imds.shard import aof as aof_module
from imds.shard import worker as worker_module
from imds.shard.aof import POLICIES, Aof
from imds.shard.record import RecordEncoder
from imds.shard.store import UnifiedStore
from imds.shard.worker import Worker
from imds.storage import Storage


def test_the_oracle_knows_every_command_on_keys():
    assert set(COMMANDS) == {name for name, command in TABLE.items() if command.spread is Spread.KEY}


def test_campaign():
    assert "0 durable lost" in crashes.campaign(400, 1, quiet)


def test_every_policy_and_every_kind_of_operation_is_crashed():
    tally = Tally()
    for policy in POLICIES:
        for seed in range(2):
            Run(seed, tally, policy=policy).go()
    assert {"open", "write", "fsync", "fdatasync", "fsync_dir", "rename", "mkdir", "truncate"} <= set(
        tally.points
    )
    assert tally.lives >= 10


def test_the_same_seed_is_the_same_run():
    tallies = [Tally(), Tally()]
    for tally in tallies:
        Run(11, tally).go()
    assert tallies[0] == tallies[1]
    assert tallies[0].states > 20


# -- planted faults -------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def no_sync_under_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aof, "sync", lambda self: None)


def reply_before_sync(patch: pytest.MonkeyPatch) -> None:
    """The replies go out, then the batch is synced."""
    plain = Worker._serve

    def serve(self: Worker, arrived: Any) -> None:
        sync, self._aof.sync = self._aof.sync, lambda: None  # type: ignore[method-assign]
        plain(self, arrived)
        self._aof.sync = sync  # type: ignore[method-assign]
        sync()

    patch.setattr(Worker, "_serve", serve)


def reply_before_append(patch: pytest.MonkeyPatch) -> None:
    """The records of a batch are written with the next one."""
    plain = Aof.append

    def append(self: Aof, records: bytes) -> None:
        late, self.late = getattr(self, "late", b""), bytes(records)  # type: ignore[attr-defined]
        if late:
            plain(self, late)

    patch.setattr(Aof, "append", append)


def sync_counts_what_came_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """A sync is taken to cover what was appended while it ran."""
    plain = Aof._sync_now

    def sync_now(self: Aof) -> bool:
        done = plain(self)
        if done:
            self._synced, self._dirty_since = self._size, None
        return done

    patch.setattr(Aof, "_sync_now", sync_now)


def mark_before_the_sync(patch: pytest.MonkeyPatch) -> None:
    """A mark says that all is safe which is written."""
    patch.setattr(aof_module, "MARK_EVERY", 1)
    plain = Aof.append

    def append(self: Aof, records: bytes) -> None:
        self._synced = self._size
        plain(self, records)

    patch.setattr(Aof, "append", append)


def no_sync_of_the_loaded(patch: pytest.MonkeyPatch) -> None:
    """What a killed process left in the page cache is served, and never synced."""
    patch.setattr(Aof, "_write_again", lambda self, *arguments: None)
    patch.setattr(Aof, "_sync_loaded", lambda self, *arguments: None)


def everysec_waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aof, "_wait_for_sync", lambda self: None)


def missing_directory_sync(patch: pytest.MonkeyPatch) -> None:
    """The manifest is renamed, and its directory is not synced."""
    plain = DataDir.commit

    def commit(self: DataDir, *arguments: Any) -> None:
        storage, self.storage = self.storage, _Without(self.storage, "fsync_dir")
        plain(self, *arguments)
        self.storage = storage

    patch.setattr(DataDir, "commit", commit)


def manifest_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The manifest is renamed before its bytes are safe."""
    plain = DataDir.commit

    def commit(self: DataDir, *arguments: Any) -> None:
        storage, self.storage = self.storage, _Without(self.storage, "fsync")
        plain(self, *arguments)
        self.storage = storage

    patch.setattr(DataDir, "commit", commit)


def parent_directory_not_synced(patch: pytest.MonkeyPatch) -> None:
    plain = DataDir._open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, path: Path, shards: int, storage: Storage, wait: float) -> DataDir:
        return plain(cls, path, shards, _Without(storage, "fsync_dir", Path("/")), wait)

    patch.setattr(DataDir, "_open", classmethod(opened))


def log_made_without_a_name(patch: pytest.MonkeyPatch) -> None:
    """A shard's first segment is made, and its directory is not synced."""
    plain = DataDir._open.__func__  # type: ignore[attr-defined]
    directory = Path("/data/gen-000001/shard-000")

    def opened(cls: Any, path: Path, shards: int, storage: Storage, wait: float) -> DataDir:
        return plain(cls, path, shards, _Without(storage, "fsync_dir", directory), wait)

    patch.setattr(DataDir, "_open", classmethod(opened))


def torn_tail_kept(patch: pytest.MonkeyPatch) -> None:
    """A torn tail is not cut off: new records go behind it."""
    patch.setattr(Aof, "_cut", lambda self, *arguments: None)


class _Without(Storage):
    """A disk that leaves one operation out, for one path or for all."""

    def __init__(self, disk: Storage, name: str, path: Path | None = None) -> None:
        self._disk, self._name, self._path = disk, name, path

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if name.startswith("_"):
            return get(name)
        plain = getattr(get("_disk"), name)
        if name != get("_name"):
            return plain
        path = get("_path")
        return lambda where: None if path in (None, where) else plain(where)


@pytest.mark.parametrize(
    ("policy", "plant"),
    [
        ("always", no_sync_under_always),
        ("always", reply_before_sync),
        ("no", reply_before_append),
        ("everysec", sync_counts_what_came_meanwhile),
        ("everysec", mark_before_the_sync),
        ("always", no_sync_of_the_loaded),
        ("everysec", everysec_waits_for_nothing),
        ("always", missing_directory_sync),
        ("always", manifest_not_synced),
        ("always", parent_directory_not_synced),
        ("always", log_made_without_a_name),
        ("always", torn_tail_kept),
    ],
)
def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, policy: str, plant: Plant) -> None:
    plant(monkeypatch)

    def many_runs() -> None:
        for seed in range(80):
            Run(seed, Tally(), policy=policy).go()

    with pytest.raises(Violation):
        many_runs()


# -- faults ---------------------------------------------------------------------------------------


def test_faults_campaign():
    assert "0 false acknowledgements" in faults.campaign(1, 1, quiet, step=31)


def failed_append_is_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aof, "_take_back", lambda self: None)


def failed_append_stays_in_memory(patch: pytest.MonkeyPatch) -> None:
    class Keeping(UnifiedStore):
        def rollback(self) -> None:
            self.commit()

    patch.setattr(worker_module, "UnifiedStore", Keeping)
    patch.setattr(worker_module, "RecordEncoder", RecordEncoder)


def short_write_is_taken_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aof_module, "write_all", lambda storage, fd, data: storage.write(fd, data))


def failed_sync_is_tried_again(patch: pytest.MonkeyPatch) -> None:
    def flush(self: Aof) -> None:
        while self._synced < self._size and not self._sync_now():
            self.failed = None

    patch.setattr(Aof, "flush", flush)


def failed_sync_is_ignored(patch: pytest.MonkeyPatch) -> None:
    plain = Aof._sync_now

    def sync_now(self: Aof) -> bool:
        plain(self)
        self.failed = None
        return True

    patch.setattr(Aof, "_sync_now", sync_now)


def loaded_tail_is_not_written_again(patch: pytest.MonkeyPatch) -> None:
    """Nobody remembers that the sync failed, and the data is taken for safe after the next one."""
    patch.setattr(Aof, "_write_again", lambda self, *arguments: None)
    patch.setattr(aof_module, "SUSPECT", "suspect.old")
    plain = Aof._fail_sync

    def fail_sync(self: Aof, *arguments: Any) -> None:
        plain(self, *arguments)
        self._storage.unlink(self.directory / "suspect.old")

    patch.setattr(Aof, "_fail_sync", fail_sync)


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("ENOSPC", failed_append_is_not_taken_back),
        ("ENOSPC", failed_append_stays_in_memory),
        ("short", short_write_is_taken_for_all),
        ("EIO", failed_sync_is_tried_again),
        ("EIO", failed_sync_is_ignored),
        ("EIO", loaded_tail_is_not_written_again),
    ],
)
def test_planted_mishandling_is_caught(monkeypatch: pytest.MonkeyPatch, kind: str, plant: Plant) -> None:
    plant(monkeypatch)

    def many_cases() -> None:
        for seed, at, mode in product(range(4), range(25, 60), ("once", "late")):
            faults.Run(Case("always", kind, mode, at), seed, faults.Tally()).go()

    with pytest.raises(Violation):
        many_cases()
