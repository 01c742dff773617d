"""Campaign ``plants``: bugs are planted in the code, one at a time, and the other campaigns have to notice.

Each is a mistake that somebody could make, put over a part of the package for the time of its trial. A trial
is one run of the campaign that should catch it; seeds are tried until one does.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from campaigns import crashes, damage, faults, machine, reshards
from campaigns.faults import Case
from campaigns.history import Violation
from campaigns.reporting import Note, in_run, quiet
from campaigns.sim import Stopped
from imds import reshard as reshard_module
from imds.commands import lookup
from imds.datadir import DataDir
from imds.protocol import encode_request, split_request
from imds.reshard import ShardLogs
from imds.shard import aof as aof_module
from imds.shard import record, segment
from imds.shard import worker as worker_module
from imds.shard.aof import Aof
from imds.shard.links import Grant, Links
from imds.shard.record import RecordEncoder, each_record
from imds.shard.rewrite import BaseFile
from imds.shard.store import HOT, UnifiedStore
from imds.shard.worker import Worker
from imds.storage import Storage

# -- crashes ------------------------------------------------------------------------------------------


def no_sync_under_always(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aof, "sync", lambda self: None)


def reply_before_sync(patch: pytest.MonkeyPatch) -> None:
    """The replies go out, then the batch is synced."""
    plain = Worker._settle

    def settle(self: Worker) -> None:
        sync, self._aof.sync = self._aof.sync, lambda: None  # type: ignore[method-assign]
        plain(self)
        self._aof.sync = sync  # type: ignore[method-assign]
        sync()

    patch.setattr(Worker, "_settle", settle)


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
    plain = Aof._take

    def take(self: Aof, fd: int, reader: Any) -> None:
        plain(self, fd, reader)
        if reader.damage:
            _go_on_behind_it(self)

    patch.setattr(Aof, "_cut", lambda self, *arguments: None)
    patch.setattr(Aof, "_take", take)


def room_is_made_over_records(patch: pytest.MonkeyPatch) -> None:
    """Nobody notes how long the file has become, and room is made where it was thought to end."""
    plain = Aof.count

    def count(self: Aof, size: int, length: int, *, synced: bool = False) -> None:
        plain(self, size, self._length, synced=synced)

    patch.setattr(Aof, "count", count)


def base_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The base is named by the manifest before its bytes are safe."""
    plain = BaseFile.finish

    def finish(self: BaseFile, sequence: int, clock: int) -> Any:
        self._storage = _Without(self._storage, "fsync")
        return plain(self, sequence, clock)

    patch.setattr(BaseFile, "finish", finish)


def segment_switched_before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    """Records go to a segment that no manifest on the disk names."""
    plain = Aof._commit

    def commit(self: Aof, manifest: Any) -> None:
        storage, self._storage = self._storage, _Without(self._storage, "fsync_dir")
        plain(self, manifest)
        self._storage = storage

    patch.setattr(Aof, "_commit", commit)


def old_segments_go_before_the_manifest(patch: pytest.MonkeyPatch) -> None:
    """What a base replaces is removed before the manifest names the base."""
    plain = Aof.adopt

    def adopt(self: Aof, base: Any) -> None:
        for number in self._manifest.segments:
            if number <= base.number:
                self._storage.unlink(self.directory / segment.segment_name(number))
        plain(self, base)

    patch.setattr(Aof, "adopt", adopt)


def forget(patch: pytest.MonkeyPatch, keep: Callable[[list[bytes]], list[bytes]]) -> None:
    """Have a base get only what ``keep`` leaves of the effects of each piece."""
    plain = BaseFile.take

    def take(self: BaseFile) -> bytes:
        records = self.log.pending()
        self.log.rollback()
        for effect in keep([records[start:end] for _, start, end in each_record(records)]):
            self.log.add(effect)
        return plain(self)

    patch.setattr(BaseFile, "take", take)


def base_forgets_what_is_written_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """What is logged while a base is written is not added to it."""
    patch.setattr(BaseFile, "copy", lambda self, records: None)


def base_forgets_a_key(patch: pytest.MonkeyPatch) -> None:
    forget(patch, lambda effects: effects[1:])


def base_forgets_deadlines(patch: pytest.MonkeyPatch) -> None:
    forget(patch, lambda effects: [one for one in effects if b"pexpireat" not in one])


def effects_of_a_command_are_several_records(patch: pytest.MonkeyPatch) -> None:
    """A crash may leave a part of what one command did."""
    store = _store(patch)
    store._log = lambda self, frame: self.log.add(frame)  # type: ignore[method-assign]


def deadlines_are_logged_as_times_to_live(patch: pytest.MonkeyPatch) -> None:
    store = _store(patch)
    plain = store._log

    def log(self: UnifiedStore, frame: bytes) -> None:
        if b"pexpireat" in frame:
            tokens, _ = split_request(frame)
            frame = encode_request((*tokens[:2], b"%d" % max(1, int(tokens[2]) - self.now)))
        plain(self, frame)

    store._log = log  # type: ignore[method-assign]


def expiry_is_not_logged(patch: pytest.MonkeyPatch) -> None:
    """What the next commands make of such a key cannot be replayed on what is still in the log."""
    _store(patch)._expire = lambda self, key: self._drop(key)  # type: ignore[method-assign]


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


# -- faults -------------------------------------------------------------------------------------------


def failed_append_is_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    """What the disk has taken of a record stays, and the next one goes behind it."""
    patch.setattr(Aof, "take_back", _go_on_behind_it)


def _go_on_behind_it(aof: Aof) -> None:
    aof._size = aof._length = aof._storage.size(aof._fd)


def failed_append_stays_in_memory(patch: pytest.MonkeyPatch) -> None:
    class Keeping(UnifiedStore):
        def rollback(self) -> None:
            self.commit()

    patch.setattr(worker_module, "UnifiedStore", Keeping)
    patch.setattr(worker_module, "RecordEncoder", RecordEncoder)


def short_write_is_taken_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aof_module, "write_all_at", lambda storage, fd, *where: storage.write_at(fd, *where))


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


# -- appends by the kernel of the links -----------------------------------------------------------


def torn_append_of_the_links_stays(patch: pytest.MonkeyPatch) -> None:
    """What the disk has taken of a record is left, and the record is appended behind it."""
    plain = Worker._count

    def count(self: Worker) -> None:
        torn, self._links.torn = self._links.torn, False
        plain(self)
        if torn:
            _go_on_behind_it(self._aof)

    patch.setattr(Worker, "_count", count)


def append_that_failed_is_taken_for_done(patch: pytest.MonkeyPatch) -> None:
    plain = Links._append

    def append(self: Links, store: Any, now: int) -> bool:
        done = plain(self, store, now)
        if not done and self.grant is not None and not self._last:
            store.commit()
            return True
        return done

    patch.setattr(Links, "_append", append)


def links_append_under_always(patch: pytest.MonkeyPatch) -> None:
    """Then nothing is synced before the reply."""
    plain = Aof.grant

    def grant(self: Aof) -> Grant | None:
        policy, self.policy = self.policy, "no"
        found = plain(self)
        self.policy = policy
        return found

    patch.setattr(Aof, "grant", grant)


def appended_bytes_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    """No sync covers what the links have appended."""
    plain = Worker._count

    def count(self: Worker) -> None:
        self._links.appended = 0
        plain(self)

    patch.setattr(Worker, "_count", count)


def appended_bytes_are_counted_a_turn_late(patch: pytest.MonkeyPatch) -> None:
    """So they go to the books of the next segment, or to none."""
    plain = Worker._count

    def count(self: Worker) -> None:
        late, self.late = getattr(self, "late", 0), self._links.appended  # type: ignore[attr-defined]
        self._links.appended = late
        plain(self)

    patch.setattr(Worker, "_count", count)


# -- damage ---------------------------------------------------------------------------------------


def checksums_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
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

    patch.setattr(segment, "verify_records", verify)


def marks_are_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aof_module, "later_marks", lambda *arguments: iter(()))


def tails_are_not_saved(patch: pytest.MonkeyPatch) -> None:
    def cut(self: Aof, path: Path, offset: int) -> None:
        fd = self._storage.open(path, os.O_RDWR)
        self._storage.truncate(fd, offset)
        self._storage.close(fd)

    patch.setattr(Aof, "_cut", cut)


# -- another number of shards ---------------------------------------------------------------------


def new_logs_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Aof, "flush", lambda self: None)


def old_logs_go_too_early(patch: pytest.MonkeyPatch) -> None:
    plain = DataDir.commit

    def commit(self: DataDir, *arguments: Any) -> None:
        if self.generation:
            old, self.generation = self.generation, 0
            self.remove_generation(old)
            self.generation = old
        plain(self, *arguments)

    patch.setattr(DataDir, "commit", commit)


def leftovers_go_before_the_manifest_is_safe(patch: pytest.MonkeyPatch) -> None:
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

    patch.setattr(DataDir, "_remove_leftovers", remove)
    patch.setattr(DataDir, "_open", classmethod(lazily))


def keys_go_to_the_wrong_shard(patch: pytest.MonkeyPatch) -> None:
    plain = ShardLogs.add
    patch.setattr(ShardLogs, "add", lambda self, key, effect: plain(self, key[1:], effect))


def effects_go_in_another_order(patch: pytest.MonkeyPatch) -> None:
    plain = reshard_module.each_effect
    patch.setattr(reshard_module, "each_effect", lambda records: reversed(list(plain(records))))


# -- the store ------------------------------------------------------------------------------------


def _store(patch: pytest.MonkeyPatch) -> type[UnifiedStore]:
    """Have every shard use a Python twin of its own, and return it."""

    class Wrong(UnifiedStore):
        pass

    patch.setattr(worker_module, "UnifiedStore", Wrong)
    patch.setattr(worker_module, "RecordEncoder", RecordEncoder)
    return Wrong


def a_member_is_removed_twice(patch: pytest.MonkeyPatch) -> None:
    plain, store = UnifiedStore.cmd_zrem, _store(patch)
    store.cmd_zrem = lambda self, *rest: (plain(self, *rest), plain(self, *rest))[1]  # type: ignore


def the_latest_is_evicted(patch: pytest.MonkeyPatch) -> None:
    plain, store = UnifiedStore._find, _store(patch)
    store._find = lambda self, key: self._table.get(key) if key == b"a" else plain(self, key)  # type: ignore


def ranks_count_from_one(patch: pytest.MonkeyPatch) -> None:
    plain, store = UnifiedStore.cmd_zrank, _store(patch)
    store.cmd_zrank = lambda self, *arguments: plain(self, *arguments).replace(b"0", b"1")  # type: ignore


def effects_are_logged_as_spelled(patch: pytest.MonkeyPatch) -> None:
    """A write in capitals goes into the log as it came, and cannot be replayed."""
    _store(patch)._answer = _as_it_came  # type: ignore[method-assign]


def _as_it_came(self: UnifiedStore, frame: bytes, tokens: list[bytes]) -> bytes:
    command = lookup(tokens[0]) if tokens else None
    _, method, _ = self._fast[command.name.encode()] if command and command.write else (None, None, None)
    if command is None or method is None or len(tokens) != HOT[command.name]:
        return UnifiedStore._answer(self, frame, tokens)
    return method(frame, *tokens[1:])


# -- which trial catches what ---------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A bug; ``trial`` makes one run that may catch it, of a seed; ``seed`` is one that does."""

    plant: Callable[[pytest.MonkeyPatch], None]
    trial: Callable[[int], object]
    seed: int = 0

    @property
    def name(self) -> str:
        """What the bug is."""
        return self.plant.__name__


def crashed(policy: str) -> Callable[[int], None]:
    return lambda seed: crashes.Run(seed, crashes.Tally(), policy=policy).go()


def failed(kind: str, policy: str = "always") -> Callable[[int], None]:
    """Every seed is another operation that fails, and every 70 of them another workload."""

    def trial(seed: int) -> None:
        workload, place = divmod(seed, 70)
        case = Case(policy, kind, ("once", "late")[place % 2], 25 + place // 2)
        faults.Run(case, workload, faults.Tally()).go()

    return trial


def damaged(seed: int) -> None:
    damage.campaign(60, seed, quiet, size=6000)


def resharded(seed: int) -> None:
    tally, rng = reshards.Tally(), random.Random(seed)
    for _ in reshards.crashes(rng, 2, 3, tally, 1.0):
        pass
    for _ in range(5):
        reshards.faults(rng, 2, 3, tally)


def compared(seed: int) -> None:
    machine.run(15, seed, steps=40, shrink=False)


PLANTED = (
    Planted(no_sync_under_always, crashed("always")),
    Planted(reply_before_sync, crashed("always")),
    Planted(reply_before_append, crashed("no")),
    Planted(sync_counts_what_came_meanwhile, crashed("everysec"), 4),
    Planted(mark_before_the_sync, crashed("everysec")),
    Planted(no_sync_of_the_loaded, crashed("everysec"), 16),
    Planted(everysec_waits_for_nothing, crashed("everysec"), 19),
    Planted(missing_directory_sync, crashed("always")),
    Planted(manifest_not_synced, crashed("always")),
    Planted(parent_directory_not_synced, crashed("always")),
    Planted(log_made_without_a_name, crashed("always"), 4),
    Planted(torn_tail_kept, crashed("always"), 14),
    Planted(room_is_made_over_records, crashed("no")),
    Planted(base_not_synced, crashed("always"), 2),
    Planted(segment_switched_before_the_manifest, crashed("always"), 2),
    Planted(old_segments_go_before_the_manifest, crashed("always"), 2),
    Planted(base_forgets_a_key, crashed("always"), 3),
    Planted(base_forgets_what_is_written_meanwhile, crashed("always"), 1_000_031),
    Planted(base_forgets_deadlines, crashed("always"), 7),
    Planted(effects_of_a_command_are_several_records, crashed("no")),
    Planted(deadlines_are_logged_as_times_to_live, crashed("always")),
    Planted(expiry_is_not_logged, crashed("always"), 2),
    Planted(failed_append_is_not_taken_back, failed("ENOSPC"), 50),
    Planted(failed_append_stays_in_memory, failed("ENOSPC"), 50),
    Planted(short_write_is_taken_for_all, failed("short"), 50),
    Planted(failed_sync_is_tried_again, failed("EIO"), 56),
    Planted(failed_sync_is_ignored, failed("EIO"), 56),
    Planted(loaded_tail_is_not_written_again, failed("EIO"), 56),
    Planted(torn_append_of_the_links_stays, failed("short", "no"), 120),
    Planted(append_that_failed_is_taken_for_done, failed("ENOSPC", "no"), 120),
    Planted(links_append_under_always, crashed("always")),
    Planted(appended_bytes_are_not_counted, crashed("everysec"), 11),
    Planted(appended_bytes_are_counted_a_turn_late, crashed("everysec"), 11),
    Planted(checksums_are_not_looked_at, damaged),
    Planted(marks_are_not_looked_for, damaged),
    Planted(tails_are_not_saved, damaged, 4),
    Planted(new_logs_are_not_synced, resharded),
    Planted(old_logs_go_too_early, resharded),
    Planted(leftovers_go_before_the_manifest_is_safe, resharded),
    Planted(keys_go_to_the_wrong_shard, resharded),
    Planted(effects_go_in_another_order, resharded, 1),
    Planted(a_member_is_removed_twice, compared, 10),
    Planted(the_latest_is_evicted, compared, 23),
    Planted(ranks_count_from_one, compared, 10),
    Planted(effects_are_logged_as_spelled, compared, 8),
)


def tries(planted: Planted, seeds: Iterator[int] | range) -> int | None:
    """Return how many trials it took to catch a bug, None if none of these did."""
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch)
        for number, seed in enumerate(seeds, 1):
            try:
                planted.trial(seed)
            except (Violation, Stopped):
                return number
    return None


def campaign(rounds: int, seed: int, note: Note) -> str:
    """Plant every bug and give it ``rounds`` trials. Raises Violation if one gets away."""
    took = []
    for number, planted in enumerate(PLANTED):
        with in_run(seed):
            first = seed * 1_000_000
            found = tries(planted, range(first, first + rounds))
            if found is None:
                raise Violation(f"{planted.name} was not caught by {rounds} trials")
            took.append(found)
            note(number + 1)
    return f"{len(took)} bugs planted, {len(took)} caught, by {max(took)} trials at most"
