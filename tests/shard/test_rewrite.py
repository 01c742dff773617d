"""Rewriting a log: the same data in the same order of use, wherever it is interrupted."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from failing_storage import Crash, FailingStorage, FastStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from imds.envelope import seal
from imds.protocol import encode_request
from imds.shard import record, rewrite, store
from imds.shard.aof import SUSPECT, Aof, AofError, AofSyncFailed
from imds.shard.manifest import MANIFEST, Base, create_log
from imds.shard.rewrite import BaseFile
from imds.shard.segment import FILL, SEGMENT_HEADER, AofDamaged, base_name, segment_name
from imds.storage import Storage

Variant = Any  # tests/conftest.py has it
FAST = FastStorage()
START = SEGMENT_HEADER.size


class Shard:
    """A store and its log, as the worker has them, without the worker."""

    def __init__(
        self,
        variant: Variant,
        directory: Path,
        storage: Storage = FAST,
        policy: str = "always",
        **limits: Any,
    ) -> None:
        self.variant = variant
        self.directory = directory
        self.base: BaseFile | None = None  # which what is logged is added to
        self.storage = storage
        if not list(directory.iterdir()):
            create_log(FAST, directory, shard=0, generation=1)
        self.aof = Aof(directory, shard=0, generation=1, policy=policy, storage=storage)
        self.store = variant.pick(store.UnifiedStore, "store")(self._encoder(0), **limits)
        try:
            for _ in self.aof.load(self.store.replay):
                pass
            if self.aof.suspect:
                for _ in self.aof.renew(self.store):
                    pass
        except BaseException:
            self.close()
            raise
        self.store.log = self._encoder(self.aof.seed, self.aof.sequence)

    def _encoder(self, seed: int, sequence: int = 1) -> Any:
        return self.variant.pick(record.RecordEncoder, "record")(seed, sequence)

    def run(self, *requests: tuple[bytes, ...]) -> None:
        frames = b"".join(encode_request(tokens) for tokens in requests)
        self.store.execute(seal(0, len(requests), frames))
        records = self.store.log.pending()
        if records:
            self.aof.append(records)
            if self.base is not None:
                self.base.copy(records)
            self.store.commit()
            self.aof.sync()

    def begin(self, piece: int = 100) -> None:
        self.aof.prepare_switch()
        self.base = self.made = self.aof.new_base()
        self.saving = self.store.save(self.base.log, piece)

    def save(self) -> bool:
        """Save a piece; return whether there is more."""
        more = next(self.saving, self) is not self
        self.made.write(self.made.take())
        return more

    def switch(self) -> None:
        """All is saved: log to the next segment from now on."""
        last, self.base = self.made.take(), None
        self.due = self.store.log.sequence, self.aof.clock
        self.aof.switch()
        self.store.log = self._encoder(self.aof.seed, self.store.log.sequence)
        self.made.write(last)

    def finish(self) -> Base:
        return self.made.finish(*self.due)

    def make(self) -> Base:
        """Do all that comes before adopting, without a write in between."""
        self.begin()
        while self.save():
            pass
        self.switch()
        self.aof.settle()
        return self.finish()

    def rewrite(self) -> Base:
        """All steps, with writes between them."""
        self.begin()
        self.run((b"set", b"key-2", b"while it is saved"), (b"rename", b"key-2", b"key-1"))
        while self.save():
            self.run((b"zadd", b"scores", b"7", b"while it is saved"), (b"append", b"key-3", b"more"))
        self.run((b"pexpireat", b"scores", b"5000000000000"))
        self.switch()
        self.run((b"set", b"after the switch", b"1"))
        self.aof.settle()
        self.run((b"zadd", b"scores", b"7", b"after settling"))
        base = self.finish()
        self.run((b"del", b"key-1"), (b"set", b"after it was made", b"1"))
        self.aof.adopt(base)
        self.run((b"set", b"after adopting", b"1"))
        return base

    def close(self) -> None:
        try:
            self.aof.close()
        except AofError:
            pass


def picture(shard: Shard) -> list[Any]:
    """Return all data, in the order of use."""
    return list(shard.store.entries())


def files(directory: Path) -> list[str]:
    """Return the names in a log's directory, the manifest last."""
    return sorted((path.name for path in directory.iterdir()), key=lambda name: (name == MANIFEST, name))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    directory = tmp_path / "log"
    directory.mkdir()
    return directory


def fill(shard: Shard, seed: int = 1, count: int = 120) -> None:
    """Write, in batches, so that there is something that a rewrite drops."""
    rng = random.Random(seed)
    for _ in range(count // 10):
        batch: list[tuple[bytes, ...]] = []
        for _ in range(10):
            key = b"key-%d" % rng.randrange(20)
            score = rng.choice([b"1", b"-2.5", b"inf", b"-inf", b"1e300", b"0.1", b"-0"])
            batch.append(
                rng.choice(
                    [
                        (b"set", key, rng.randbytes(rng.randrange(40))),
                        (b"set", key, b""),
                        (b"del", key),
                        (b"zadd", b"z" + key, score, b"m%d" % rng.randrange(9)),
                        (b"zrem", b"z" + key, b"m%d" % rng.randrange(9)),
                    ]
                )
            )
        shard.run(*batch)


# -- what it does ------------------------------------------------------------------------------------------


def test_the_same_data_in_fewer_bytes(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    fill(shard, count=600)
    before = shard.aof.stats()["aof_bytes"]
    base = shard.rewrite()
    assert files(log) == ["00000001.base", "00000002.aof", MANIFEST]
    assert base.bytes == (log / base_name(1)).stat().st_size
    stats = shard.aof.stats()
    assert stats["aof_bytes"] < before / 3
    assert stats["aof_base_bytes"] == base.bytes == shard.aof.base_bytes
    assert stats["aof_bytes"] == sum(len(path.read_bytes().rstrip(FILL)) for path in shard.aof.segments())
    digest, sequence = shard.store.digest(), shard.store.log.sequence
    shard.close()
    again = Shard(variant, log)
    again.store.check()
    assert again.store.digest() == digest
    assert again.store.log.sequence == sequence
    assert again.aof.stats()["aof_bytes"] == again.aof.disk_bytes()
    again.rewrite()
    assert files(log) == ["00000002.base", "00000003.aof", MANIFEST]
    again.close()


def test_a_base_and_nothing_else(variant: Variant, log: Path) -> None:
    """An empty log, and one that was rewritten twice without a write in between."""
    shard = Shard(variant, log)
    for _ in range(3):
        base = shard.make()
        assert base.records == 0
        shard.aof.adopt(base)
    shard.close()
    assert picture(Shard(variant, log)) == []


def test_eviction_goes_on_in_the_same_order(variant: Variant, log: Path) -> None:
    limits = {"capacity": 5, "evict": True}
    shard = Shard(variant, log, **limits)
    for number in range(12):
        shard.run((b"set", b"key-%d" % number, b"x"))
    base = shard.make()
    assert base.records == 5
    shard.aof.adopt(base)
    shard.close()
    shard = Shard(variant, log, **limits)
    shard.run((b"set", b"new", b"x"))
    assert [key for key, _, _ in picture(shard)] == [b"key-8", b"key-9", b"key-10", b"key-11", b"new"]
    shard.close()


def test_large_records_and_many(variant: Variant, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "_SYNC_STEP", 3000)
    shard = Shard(variant, log)
    for number in range(50):
        shard.run((b"set", b"key-%d" % number, b"x" * 300 * (1 + number % 7)))
    synced: list[int] = []

    class Noting(FastStorage):
        def fdatasync(self, fd: int) -> None:
            if fd == shard.made._fd:
                synced.append(self.size(fd))

    shard.aof._storage = Noting()
    base = shard.make()
    gaps = [end - start for start, end in zip([0, *synced], [*synced, base.bytes], strict=True)]
    assert max(gaps) < 6000, "the disk is never given all of it at once"
    shard.aof.adopt(base)
    digest = shard.store.digest()
    shard.close()
    assert Shard(variant, log).store.digest() == digest


_keys = st.sampled_from([b"a", b"b", b"c"])
_members = st.sampled_from([b"", b"m", b"n"])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just(b"set"), _keys, st.binary(max_size=9)),
        st.tuples(st.just(b"del"), _keys),
        st.tuples(st.just(b"zadd"), _keys, st.sampled_from([b"1", b"-3", b"inf"]), _members),
        st.tuples(st.just(b"zrem"), _keys, _members),
        st.tuples(st.just(b"pexpireat"), _keys, st.sampled_from([b"5000000000000", b"6000000000000"])),
        st.tuples(st.just(b"persist"), _keys),
        st.tuples(st.just(b"append"), _keys, st.binary(max_size=9)),
        st.tuples(st.just(b"rename"), _keys, _keys),
        st.tuples(st.sampled_from([b"rewrite", b"rewrite", b"settle", b"restart", b"adopt"])),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(_steps)
def test_any_steps(variant: Variant, tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Whatever is done in whatever order, a restart gives what it gives where nothing is ever rewritten."""
    log = tmp_path_factory.mktemp("log")
    shard, twin = Shard(variant, log), Shard(variant, tmp_path_factory.mktemp("twin"))
    base: Base | None = None
    for step in [*steps, (b"restart",)]:
        if step == (b"rewrite",):  # each time a step of it
            if shard.base is None:
                base = None
                shard.begin(piece=1)
            elif not shard.save():
                shard.switch()
                base = shard.finish()
        elif step == (b"settle",):
            shard.aof.settle()
        elif step == (b"adopt",):
            if base is not None:
                shard.aof.adopt(base)
                base = None
        elif step == (b"restart",):
            digest, sequence = shard.store.digest(), shard.store.log.sequence
            shard.close()
            twin.close()
            shard, twin = Shard(variant, log), Shard(variant, twin.directory)
            shard.store.check()
            assert (shard.store.digest(), shard.store.log.sequence) == (digest, sequence)
            assert sorted(picture(shard)) == sorted(picture(twin))
            base = None
        else:
            shard.run(step)
            twin.run(step)
    shard.close()
    twin.close()


def test_when_it_is_due(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    shard.run((b"set", b"key", b"x" * 1000))
    size = shard.aof.stats()["aof_bytes"]
    assert shard.aof.is_grown(100, size)
    assert not shard.aof.is_grown(100, size + 1), "too small"
    assert not shard.aof.is_grown(0, size), "switched off"
    base = shard.make()
    shard.aof.adopt(base)
    assert not shard.aof.is_grown(100, 1)
    grown = 0
    while not shard.aof.is_grown(100, 1):
        shard.run((b"set", b"key", b"y" * 100))
        grown += 1
    assert len((log / segment_name(2)).read_bytes().rstrip(FILL)) >= base.bytes
    assert 7 <= grown <= 10
    assert not shard.aof.is_grown(200, 1)
    shard.close()


# -- interrupted -------------------------------------------------------------------------------------------


@pytest.fixture
def template(variant: Variant, tmp_path: Path) -> tuple[Path, Callable[[Path, Storage], Shard]]:
    """A log that was rewritten once and written to since, and how to open a copy of it."""
    source = tmp_path / "template"
    source.mkdir()
    shard = Shard(variant, source)
    fill(shard, count=40)
    shard.rewrite()
    fill(shard, seed=2, count=20)
    shard.close()
    return source, lambda directory, storage: Shard(variant, directory, storage)


def acknowledged(shard: Shard) -> Iterator[int]:
    """Rewrite and write; yield the digest of all that was acknowledged after each write."""
    yield shard.store.digest()
    shard.begin()
    for number in itertools.count():
        shard.run((b"set", b"step", b"%d" % number))
        yield shard.store.digest()
        shard.run((b"rename", b"step", b"key-1"))
        yield shard.store.digest()
        if not shard.save():
            break
    shard.switch()
    for number, step in enumerate((None, shard.aof.settle, shard.finish, None)):
        result = step() if step else None
        if isinstance(result, Base):
            shard.aof.adopt(result)
        shard.run((b"set", b"step", b"%d" % number))
        yield shard.store.digest()


def interrupted(
    template: tuple[Path, Callable[[Path, Storage], Shard]], tmp_path: Path, error: OSError | None
) -> Iterator[tuple[FailingStorage, BaseException | None]]:
    """Rewrite once for each operation that this takes, hit there; open what is left, and compare."""
    source, opened = template
    for at in range(1, 1000):
        path = tmp_path / str(at)
        shutil.copytree(source, path)
        shard = opened(path, FAST)
        storage = FailingStorage(at, error)
        storage.paths = {shard.aof._fd: path / segment_name(2)}
        shard.storage = shard.aof._storage = storage
        digests: list[int] = []
        outcome: BaseException | None = None
        try:
            digests.extend(acknowledged(shard))
        except (Crash, OSError, AofError) as caught:
            outcome = caught
        calls = len(storage.calls)
        unsure = {digests[-1]}
        if outcome is not None:
            # The write that was under way may be there, though it was not acknowledged.
            unsure.add(shard.store.digest())
        if error is not None and outcome is not None:
            yield storage, outcome
            if not shard.aof.failed:  # the shard serves on
                storage.at = 1 << 40
                shard.store.rollback()
                shard.run((b"set", b"later", b"1"))
                unsure = {shard.store.digest()}
                shard.close()
        storage.release()
        found = opened(path, FAST)
        found.store.check()
        assert found.store.digest() in unsure, f"operation {at}: {storage.calls[at - 1]}"
        left = files(path)
        assert [name for name in left if name.endswith(".base")] == [
            name for name in found.aof._manifest.names() if name.endswith(".base")
        ]
        assert [name for name in left if name.endswith(".aof")] == [
            name for name in found.aof._manifest.names() if name.endswith(".aof")
        ]
        assert not {"manifest.json.new", SUSPECT} & set(left)
        found.rewrite()  # and it can be rewritten from there
        digest = found.store.digest()
        found.close()
        last = opened(path, FAST)
        assert last.store.digest() == digest
        last.close()
        shutil.rmtree(path)
        if outcome is None and calls < at:
            return
    pytest.fail("the rewrite never came to its end")


def test_crash_at_every_operation(template: Any, tmp_path: Path) -> None:
    list(interrupted(template, tmp_path, None))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_error_at_every_operation(template: Any, tmp_path: Path, number: int) -> None:
    """The log stays as it was, the shard serves on unless a sync of its log failed, and may try again."""
    hit = set()
    for storage, outcome in interrupted(template, tmp_path, OSError(number, os.strerror(number))):
        name, path = storage.calls[storage.at - 1]
        hit.add(name)
        assert outcome is not None
        assert os.strerror(number) in str(outcome)
        if isinstance(outcome, AofSyncFailed):
            assert name == "fdatasync"
            assert path.suffix == ".aof"
    assert {"open", "write", "fsync", "fdatasync", "fsync_dir", "rename"} <= hit


def test_only_what_is_synced_is_named(variant: Variant, log: Path) -> None:
    """Before each rename of a manifest all that it names is synced, and the directory is synced after it."""
    shard = Shard(variant, log)
    fill(shard)
    storage = FailingStorage(at=1 << 30)
    storage.paths = {shard.aof._fd: log / segment_name(1)}
    shard.storage = shard.aof._storage = storage
    shard.rewrite()
    calls = storage.calls
    renames = [number for number, call in enumerate(calls) if call[0] == "rename"]
    assert len(renames) == 2
    for number, made in zip(renames, (log / segment_name(2), log / base_name(1)), strict=True):
        assert calls[number + 1] == ("fsync_dir", log)
        before = calls[:number]
        last_write = max(n for n, call in enumerate(before) if call == ("write", made))
        synced = before.index(("fsync", made), last_write)
        assert ("fsync_dir", log) in before[synced:]
    removed = [number for number, call in enumerate(calls) if call == ("unlink", log / segment_name(1))]
    assert removed
    assert min(removed) > renames[1] + 1
    shard.close()


# -- damage ------------------------------------------------------------------------------------------------


def test_a_base_with_any_wrong_byte_is_refused(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    shard.run((b"set", b"key-1", b"value"), (b"zadd", b"scores", b"1", b"m"))
    shard.rewrite()
    shard.close()
    path = log / base_name(1)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(AofDamaged) as caught:
            Shard(variant, log)
        assert caught.value.path == path
    for size in (0, 10, START, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(AofDamaged, match=r"cut short|bytes, the manifest says"):
            Shard(variant, log)
    path.write_bytes(data + b"\0")
    with pytest.raises(AofDamaged, match="the manifest says"):
        Shard(variant, log)
    path.unlink()
    with pytest.raises(AofDamaged, match="is missing"):
        Shard(variant, log)


def test_what_is_wrong_on_the_disk_is_made_good(variant: Variant, log: Path) -> None:
    """A base is made of what the shard holds, and not of what its files say."""
    shard = Shard(variant, log)
    fill(shard)
    path = log / segment_name(1)
    data = path.read_bytes()
    path.write_bytes(data[:500] + b"!" + data[501:])
    shard.rewrite()
    digest = shard.store.digest()
    shard.close()
    assert Shard(variant, log).store.digest() == digest


def test_only_the_base_that_was_made_is_adopted(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    fill(shard)
    base = shard.make()
    before = files(log)
    for wrong in (
        Base(2, base.sequence, base.records, base.bytes),
        Base(9, base.sequence, base.records, base.bytes),
        Base(1, base.sequence + 1, base.records, base.bytes),
        Base(1, base.sequence, base.records, base.bytes + 1),
    ):
        with pytest.raises(AofDamaged):
            shard.aof.adopt(wrong)
        assert files(log) == before
    shard.aof.adopt(base)
    with pytest.raises(AofDamaged):
        shard.aof.adopt(base)
    shard.close()


def test_what_was_not_finished_is_written_over_and_removed(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    fill(shard)
    (log / base_name(1)).write_bytes(b"half")
    (log / base_name(7)).write_bytes(b"half of a longer one")
    base = shard.make()
    assert base.number == 1
    shard.aof.adopt(base)
    assert files(log) == ["00000001.base", "00000002.aof", MANIFEST]
    shard.close()


def test_a_base_that_is_given_up_leaves_nothing(variant: Variant, log: Path) -> None:
    shard = Shard(variant, log)
    fill(shard)
    for pieces in (0, 1, 3):
        shard.begin()
        for _ in range(pieces):
            shard.save()
        shard.saving.close()
        shard.made.discard()
        shard.made.discard()
        assert not [name for name in files(log) if name.endswith(".base")]
    shard.rewrite()
    shard.close()


def test_a_base_that_the_disk_does_not_take_is_given_up(
    variant: Variant, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged meanwhile is held in memory, but not without end."""
    monkeypatch.setattr(rewrite, "MOST_HELD", 10_000)
    shard = Shard(variant, log)
    fill(shard)
    shard.begin()
    for number in range(5):
        for _ in range(3):
            shard.run((b"set", b"key-%d" % number, b"x" * 3000))
        assert shard.made.failed is None
        shard.save()
    for _ in range(4):
        shard.run((b"set", b"key", b"x" * 3000))
    assert shard.made.failed is None
    shard.run((b"set", b"key", b"x" * 3000))
    assert "12168 bytes wait for the disk" in str(shard.made.failed)
    held = len(shard.made.take())
    shard.run((b"set", b"key", b"x"))
    assert held > 12_000 > 100 > len(shard.made.take()), "and no more is held"
    shard.made.failed, shard.made.log = None, Mock(copy=Mock(side_effect=MemoryError))
    shard.run((b"set", b"key", b"x"))
    assert "no memory for" in str(shard.made.failed)
    shard.base = None
    shard.close()


# -- after a failed sync -----------------------------------------------------------------------------------


class SyncFails(FastStorage):
    """Fails the syncs of data; remembers what was done to which file since."""

    def __init__(self) -> None:
        self.failing = False
        self.touched: set[str] = set()
        self._names: dict[int, str] = {}

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._names[fd] = path.name
        return fd

    def fdatasync(self, fd: int) -> None:
        self.touched.add(self._names.get(fd, ""))
        if self.failing:
            raise OSError(errno.EIO, "Input/output error")

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)

    def write(self, fd: int, data: Any) -> int:
        self.touched.add(self._names.get(fd, ""))
        return super().write(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self.touched.add(self._names.get(fd, ""))
        super().truncate(fd, size)


def failed(variant: Variant, log: Path, policy: str = "always") -> Shard:
    """Return a shard whose last sync has failed."""
    storage = SyncFails()
    shard = Shard(variant, log, storage, policy)
    fill(shard)
    storage.failing = True
    try:
        shard.run((b"set", b"last", b"1"))
    except AofSyncFailed:
        pass
    with pytest.raises(AofSyncFailed):
        shard.aof.flush()
    shard.close()
    return shard


@pytest.mark.parametrize("policy", ["always", "no"])
@pytest.mark.parametrize("torn", [b"", b"torn"])
def test_after_a_failed_sync_all_is_written_to_new_files(
    variant: Variant, log: Path, policy: str, torn: bytes
) -> None:
    shard = failed(variant, log, policy)
    assert SUSPECT in files(log)
    with (log / segment_name(1)).open("ab") as file:
        file.write(torn)
    storage = SyncFails()
    again = Shard(variant, log, storage, policy)
    assert segment_name(1) not in storage.touched, "no old file is synced or written again"
    kept = [name for name in files(log) if ".torn-" in name]
    assert files(log) == [*kept, "00000001.base", "00000002.aof", MANIFEST]
    assert len(kept) == bool(torn)
    assert again.store.digest() == shard.store.digest()
    again.run((b"set", b"more", b"1"))
    digest, sequence = again.store.digest(), again.store.log.sequence
    again.close()
    third = Shard(variant, log)
    assert third.store.digest() == digest
    assert third.store.log.sequence == sequence
    third.close()


def test_crash_while_the_new_files_are_made(variant: Variant, log: Path, tmp_path: Path) -> None:
    shard = failed(variant, log)
    digest = shard.store.digest()
    for error in (None, OSError(errno.ENOSPC, "No space left on device")):
        for at in range(1, 1000):
            path = tmp_path / f"{at}"
            shutil.copytree(log, path)
            storage = FailingStorage(at, error)
            outcome = None
            try:
                Shard(variant, path, storage).close()
            except (Crash, OSError, AofError) as caught:
                outcome = caught
            calls = len(storage.calls)
            storage.release()
            again = Shard(variant, path)
            assert again.store.digest() == digest, storage.calls[at - 1]
            assert len(files(path)) == 3
            assert files(path)[-1] == MANIFEST
            again.close()
            shutil.rmtree(path)
            if outcome is None and calls < at:
                break
        else:
            pytest.fail("it never came to its end")


def test_a_suspect_log_takes_nothing_before_it_is_renewed(variant: Variant, log: Path) -> None:
    failed(variant, log)
    aof = Aof(log, shard=0, generation=1, policy="no", storage=FAST)
    list(aof.load(lambda records: None))
    assert aof.suspect
    with pytest.raises(AofError, match="a sync of the log has failed"):
        aof.append(b"x")
    aof.close()
    assert SUSPECT in files(log)
