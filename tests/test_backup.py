"""Backups of a directory, at work or not, and what is restored from them: all of it, or an earlier moment."""

import json
import random
import shutil
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from campaigns.simdisk import SimCrash, SimDisk
from failing_storage import FastStorage
from rewriting import rewrite
from test_reshard import Model, contents, fill, random_effects

from imds import backup as backup_module
from imds import restore as restore_module
from imds.aof_tool import main as aof
from imds.backup import BACKUP, backup, read_backup
from imds.backup import main as imds_backup
from imds.datadir import DataDir, DataDirError
from imds.protocol import encode_request
from imds.reshard import ShardLogs
from imds.restore import Until, parse_time, restore
from imds.restore import main as imds_restore
from imds.shard import aof as aof_module
from imds.shard.aof import Aof, AofDamaged
from imds.shard.record import RecordEncoder
from imds.storage import exists

FAST = FastStorage()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(backup_module, "Storage", FastStorage)
    monkeypatch.setattr(restore_module, "Storage", FastStorage)
    monkeypatch.setattr(backup_module.os, "nice", lambda by: 0)


class Served:
    """One shard's log that takes effects and is rewritten, as by its server; ``effects`` is what it has."""

    def __init__(self, path):
        self.path = path
        self.datadir = DataDir.open(path, 1, FAST)
        self.directory = self.datadir.shard_dir(0)
        self.aof = Aof(self.directory, shard=0, generation=1, policy="no", storage=FAST)
        self.effects = []
        for _ in self.aof.load(lambda records: None):
            pass
        self.sequence = self.aof.sequence

    def write(self, effects):
        encoder = RecordEncoder(self.aof.seed, self.sequence)
        for effect in effects:
            encoder.add(encode_request(effect))
        self.effects += effects
        self.sequence += len(effects)
        self.aof.append(encoder.pending())

    def rewrite(self):
        rewrite(self.aof)

    def close(self):
        self.aof.close()
        self.datadir.close()


@pytest.fixture
def served(tmp_path):
    one = Served(tmp_path / "data")
    yield one
    one.close()


def data_of(effects):
    model = Model()
    for effect in effects:
        model.apply(effect)
    return model.data


def loaded(path):
    """Return the data that a start would find."""
    return contents(path)[0]


# -- making one ------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path, capsys):
    effects, data = random_effects(2, 300)
    fill(tmp_path / "data", 3, effects)
    assert imds_backup([str(tmp_path / "backup"), "--dir", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert f"backup: {len(data)} keys, tried" in out
    assert imds_restore([str(tmp_path / "backup"), "--check"]) == 0
    assert imds_restore([str(tmp_path / "backup"), "--dir", str(tmp_path / "again")]) == 0
    assert loaded(tmp_path / "again") == data
    assert aof(["digest", str(tmp_path / "data"), str(tmp_path / "again")]) == 0
    assert aof(["digest", str(tmp_path / "data"), str(tmp_path / "backup")]) == 0


def test_of_a_log_at_work(served, tmp_path):
    effects, _ = random_effects(3, 60)
    for number, effect in enumerate(effects):
        served.write([effect])
        if number % 25 == 24:
            served.rewrite()
        made = backup(served.path, tmp_path / f"backup{number}")
        (part,) = made.shards
        assert part.next_number == number + 2
        restore(tmp_path / f"backup{number}", tmp_path / "again", Until())
        assert loaded(tmp_path / "again") == data_of(effects[: number + 1])
        shutil.rmtree(tmp_path / "again")


def test_under_traffic_and_rewrites_each_is_a_prefix(served, tmp_path):
    """A thread writes and rewrites all the time; what a backup has is what the log had at one moment."""
    effects, _ = random_effects(4, 60_000)
    over = threading.Event()

    def work():
        for start in range(0, len(effects), 20):
            if over.is_set():
                return
            served.write(effects[start : start + 20])
            if start % 400 == 0:
                served.rewrite()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        numbers = []
        for number in range(12):
            before = served.sequence
            while served.sequence == before and thread.is_alive():
                time.sleep(0.001)
            (part,) = backup(served.path, tmp_path / f"b{number}").shards
            numbers.append(part.next_number)
    finally:
        over.set()
        thread.join()
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 6, "no traffic"
    for number, following in enumerate(numbers):
        assert loaded(tmp_path / f"b{number}") == data_of(effects[: following - 1])


def test_a_record_that_is_being_written_is_left_out(served, tmp_path):
    served.write([[b"set", b"a", b"1"]])
    with (served.directory / "00000001.aof").open("ab") as file:
        file.write(b"\1" * 11)
    backup(served.path, tmp_path / "backup")
    assert loaded(tmp_path / "backup") == {b"a": b"1"}
    assert not list(tmp_path.glob("backup/**/*.torn*"))


def test_a_damaged_log_has_no_backup(tmp_path, capsys):
    effects, _ = random_effects(2, 300)
    fill(tmp_path / "data", 1, effects)
    path = tmp_path / "data/gen-000001/shard-000/00000001.aof"
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    assert imds_backup([str(tmp_path / "backup"), "--dir", str(tmp_path / "data")]) == 1
    assert "is damaged at byte" in capsys.readouterr().err
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("where", ["full", "file", "deep/er"])
def test_only_into_an_empty_directory(tmp_path, where, capsys):
    fill(tmp_path / "data", 1, [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").touch()
    (tmp_path / "file").touch()
    assert imds_backup([str(tmp_path / where), "--dir", str(tmp_path / "data")]) == 1
    assert capsys.readouterr().err.startswith("imds-backup: ")
    assert (tmp_path / "full/thing").exists()
    (tmp_path / "empty").mkdir()
    assert imds_backup([str(tmp_path / "empty"), "--dir", str(tmp_path / "data")]) == 0
    assert imds_backup([str(tmp_path / "other"), "--dir", str(tmp_path / "nothing")]) == 1


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    effects, _ = random_effects(2, 300)
    fill(tmp_path / "data", 2, effects)

    class Full(FastStorage):
        left = 9000

        def write(self, fd, data):
            Full.left -= len(data)
            if Full.left < 0:
                raise OSError(28, "No space left on device")
            return super().write(fd, data)

    monkeypatch.setattr(backup_module, "Storage", Full)
    with pytest.raises(OSError, match="No space"):
        backup(tmp_path / "data", tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


# -- restoring -------------------------------------------------------------------------------------------


def test_any_damage_to_a_backup_is_noticed(tmp_path):
    effects, _ = random_effects(2, 100)
    fill(tmp_path / "data", 2, effects)
    backup(tmp_path / "data", tmp_path / "backup")
    rng = random.Random(6)
    for path in sorted(one for one in (tmp_path / "backup").rglob("*") if one.is_file()):
        whole = path.read_bytes()
        for _ in range(10):
            data = bytearray(whole)
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] ^= 1 << rng.randrange(8)
            else:
                del data[at:]
            path.write_bytes(data)
            with pytest.raises((DataDirError, AofDamaged)):
                restore_module.check(tmp_path / "backup")
            with pytest.raises((DataDirError, AofDamaged)):
                restore(tmp_path / "backup", tmp_path / "again", Until())
            assert not (tmp_path / "again").exists()
        path.write_bytes(whole)
    restore_module.check(tmp_path / "backup")


def test_a_backup_that_was_not_finished_is_none(tmp_path, capsys):
    fill(tmp_path / "data", 1, [])
    backup(tmp_path / "data", tmp_path / "backup")
    (tmp_path / "backup" / BACKUP).unlink()
    assert imds_restore([str(tmp_path / "backup"), "--dir", str(tmp_path / "again")]) == 1
    assert "is no backup" in capsys.readouterr().err


def test_a_newer_format_is_refused(tmp_path):
    fill(tmp_path / "data", 1, [])
    backup(tmp_path / "data", tmp_path / "backup")
    file = tmp_path / "backup" / BACKUP
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 9}))
    with pytest.raises(DataDirError, match="has format 9"):
        read_backup(FAST, tmp_path / "backup")


def test_up_to_every_number(served, tmp_path):
    effects, _ = random_effects(5, 40)
    served.write(effects[:15])
    served.rewrite()
    for effect in effects[15:]:
        served.write([effect])
    backup(served.path, tmp_path / "backup")
    for number in range(15, 41):
        again = tmp_path / f"again{number}"
        restore(tmp_path / "backup", again, Until(numbers=((0, number),)))
        assert loaded(again) == data_of(effects[:number])
        fill(again, 1, [[b"set", b"later", b"1"]])  # it goes on from there
        assert loaded(again) == data_of(effects[:number]) | {b"later": b"1"}
    for number, why in ((14, "begins with number 15"), (41, "ends with number 40")):
        with pytest.raises(DataDirError, match=why):
            restore(tmp_path / "backup", tmp_path / "none", Until(numbers=((0, number),)))
        assert not (tmp_path / "none").exists()
    with pytest.raises(DataDirError, match="none with number 1"):
        restore(tmp_path / "backup", tmp_path / "none", Until(numbers=((1, 1),)))


def test_up_to_a_time(served, tmp_path, monkeypatch):
    """Effects at known times: what was before the time is there, what came over a second later is not."""
    now = [1_600_000_000.0]
    monkeypatch.setattr(aof_module, "time", lambda: now[0])
    rng, times = random.Random(7), []
    effects, _ = random_effects(6, 80)
    for number, effect in enumerate(effects):
        served.write([effect])
        times.append(now[0])
        now[0] += rng.choice((0.05, 0.3, 0.9, 4.0))
        if number == 30:
            served.rewrite()
    backup(served.path, tmp_path / "backup")
    states = [data_of(effects[:count]) for count in range(len(effects) + 1)]
    for trial in range(30):
        at = rng.uniform(times[31], times[-1] + 2)
        again = tmp_path / f"again{trial}"
        (part,) = restore(tmp_path / "backup", again, Until(time=int(at * 1e6)))
        count = part.next_number - 1
        assert loaded(again) == states[count]
        assert all(time > at for time in times[count:])
        assert all(time <= at + 1.0 for time in times[:count])
    with pytest.raises(DataDirError, match="begins at 2020-09-13T"):
        restore(tmp_path / "backup", tmp_path / "none", Until(time=int(times[10] * 1e6)))
    with pytest.raises(DataDirError, match="knows nothing of later"):
        restore(tmp_path / "backup", tmp_path / "none", Until(time=int(9e15)))
    assert not (tmp_path / "none").exists()


def test_times():
    assert parse_time("1970-01-01T00:00:01Z") == 1_000_000
    assert parse_time("1970-01-01T01:00:01.5+01:00") == 1_500_000


@pytest.mark.parametrize("arguments", [["--time", "noon"], ["--number", "5"], ["--number", "a=1"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        imds_restore(["backup", *arguments])
    assert caught.value.code == 2
    assert "usage: imds-restore" in capsys.readouterr().err


# -- on a disk that loses what it has not promised to keep -------------------------------------------------


def simulated(effects):
    """Return a simulated disk with these effects in a data directory of two shards."""
    disk = SimDisk()
    with DataDir.open("/data", 2, disk) as datadir, ShardLogs(datadir, 1, datadir.slots) as logs:
        logs.load(lambda records: None, lambda done: None)
        for effect in effects:
            logs.add(effect[1], encode_request(effect))
    return disk


def at_every_crash(disk, work):
    """Do ``work`` on a disk that stops at one change after the other; yield what may be found then."""
    rng = random.Random(8)
    for number in count(1):
        copy = disk.killed()
        copy.crash_at = number
        try:
            work(copy)
        except SimCrash:
            yield from (copy.crash(rng), copy.crash(rng), copy.killed())
        else:
            yield copy.crash(rng)  # it has said that it is done
            return


def digests(parts):
    return [(part.keys, part.digest, part.next_number) for part in parts]


def test_cut_off_anywhere_a_backup_is_none_or_whole():
    disk = simulated(random_effects(2, 40)[0])
    made = digests(backup(Path("/data"), Path("/copy"), disk.killed()).shards)
    states = none = 0
    for found in at_every_crash(disk, lambda one: backup(Path("/data"), Path("/copy"), one)):
        states += 1
        if not exists(found, Path("/copy/backup.json")):
            with pytest.raises(DataDirError, match="is no backup"):
                read_backup(found, Path("/copy"))
            none += 1
            continue
        assert digests(restore(Path("/copy"), Path("/again"), Until(), found)) == made
    assert 40 < none < states, "the last is whole"


def test_cut_off_anywhere_what_is_restored_is_refused_or_whole():
    effects, data = random_effects(2, 40)
    disk = simulated(effects)
    made = digests(backup(Path("/data"), Path("/copy"), disk).shards)
    states = refused = 0
    for found in at_every_crash(disk, lambda one: restore(Path("/copy"), Path("/again"), Until(), one)):
        states += 1
        if not exists(found, Path("/again/manifest.json")):
            with pytest.raises(DataDirError, match=r"is no data directory|cannot be read"):
                DataDir.unlocked(Path("/again"), found)
            refused += 1
            continue
        datadir = DataDir.unlocked(Path("/again"), found)
        parts = [
            backup_module.trial(found, datadir.shard_dir(shard), shard, 1, lambda size: None)
            for shard in (0, 1)
        ]
        assert digests(parts) == made
        assert sum(part.keys for part in parts) == len(data)
    assert 40 < refused < states, "the last is whole"
