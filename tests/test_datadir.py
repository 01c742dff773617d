"""Whose directory it is, which of its files are the data, and that nothing else is ever touched."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import product

import pytest
from failing_storage import OPERATIONS, Crash, FailingStorage, FastStorage

from imds.datadir import (
    FORMAT,
    LOCK,
    MANIFEST,
    NEW_MANIFEST,
    DataDir,
    DataDirError,
    default_shards,
    encode_manifest,
    generation_name,
)
from imds.hashslots import SLOTS, SlotMap
from imds.shard.aof import segment_name

FAST = FastStorage()


def make(path, shards=3):
    """Make a data directory and close it again."""
    with DataDir.open(path, shards, FAST) as datadir:
        assert datadir.shards == shards


def picture(path):
    """Return everything under ``path``: names, contents, permission bits."""
    return {
        str(found.relative_to(path)): (
            found.stat().st_mode,
            found.read_bytes() if found.is_file() else None,
        )
        for found in path.rglob("*")
    }


def refused(path, *words, shards=3):
    """Check that ``path`` is refused in one sentence with ``words``, and that nothing in it changed."""
    before = picture(path)
    with pytest.raises(DataDirError) as caught:
        DataDir.open(path, shards, FAST, lock_wait=0)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    after = picture(path)
    after.pop(LOCK, None)
    before.pop(LOCK, None)
    assert after == before


# -- making and opening ----------------------------------------------------------------------------------


def test_made_with_layout_and_modes(tmp_path):
    path = tmp_path / "data"
    with DataDir.open(path, 3) as datadir:
        assert datadir.path == path
        assert datadir.generation == 1
        assert datadir.slots.owners == SlotMap.even(3, 0).owners
        assert datadir.shard_dir(2) == path / "gen-000001" / "shard-002"
        assert datadir.shard_dir(0, 12) == path / "gen-000012" / "shard-000"
        assert (path / LOCK).read_text() == f"{os.getpid()}\n"
        manifest = json.loads((path / MANIFEST).read_text())
        assert manifest == {
            "format": FORMAT,
            "generation": 1,
            "shards": 3,
            "seed": datadir.slots.seed,
            "slots": [list(run) for run in datadir.slots.ranges()],
            "checksum": manifest["checksum"],
        }
    for shard in range(3):
        assert (path / "gen-000001" / f"shard-{shard:03d}" / segment_name(1)).stat().st_size == 64
    for found in (path, *path.rglob("*")):
        assert found.stat().st_mode & 0o077 == 0, found


def test_opened_again_it_keeps_seed_map_and_count(tmp_path):
    path = tmp_path / "data"
    with DataDir.open(path, 3, FAST) as first:
        seed, owners = first.slots.seed, first.slots.owners
    before = picture(path)
    for shards in (None, 3, 5):
        with DataDir.open(str(path), shards, FAST) as again:
            assert (again.slots.seed, again.slots.owners, again.shards) == (seed, owners, 3)
    assert picture(path) == before


def test_each_directory_has_its_own_seed(tmp_path):
    seeds = set()
    for name in "abc":
        with DataDir.open(tmp_path / name, 1, FAST) as datadir:
            seeds.add(datadir.slots.seed)
    assert len(seeds) == 3
    assert max(seeds) >= 1 << 32


def test_default_is_one_shard_for_each_core(tmp_path):
    with DataDir.open(tmp_path / "data", None, FAST) as datadir:
        assert datadir.shards == default_shards() >= 1


@pytest.mark.parametrize("shards", [0, -1, 129, 1000])
def test_shard_count_that_cannot_be(tmp_path, shards):
    with pytest.raises(ValueError):
        DataDir.open(tmp_path / "data", shards, FAST)
    assert not (tmp_path / "data").exists()


def test_uneven_map_comes_back(tmp_path):
    path = tmp_path / "data"
    owners = bytes((slot // 7) % 3 for slot in range(SLOTS))
    with DataDir.open(path, 3, FAST) as datadir:
        datadir.commit(1, SlotMap(owners, 3, (1 << 64) - 1))
    with DataDir.open(path, None, FAST) as datadir:
        assert datadir.slots.owners == owners
        assert datadir.slots.seed == (1 << 64) - 1


def test_empty_directory_is_taken_and_closed_to_others(tmp_path, caplog):
    path = tmp_path / "data"
    path.mkdir(mode=0o755)
    (path / "lost+found").mkdir()
    make(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert "0755" in caplog.text


def test_open_mode_of_an_existing_one_is_corrected(tmp_path):
    path = tmp_path / "data"
    make(path)
    path.chmod(0o750)
    make(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_parent_must_exist_and_files_are_no_directories(tmp_path):
    with pytest.raises(DataDirError, match="No such file"):
        DataDir.open(tmp_path / "no" / "data", 1, FAST)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataDirError, match="Not a directory"):
        DataDir.open(tmp_path / "file", 1, FAST)


def test_descriptors_are_given_back(tmp_path):
    path = tmp_path / "data"
    make(path)
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    (path / "gen-000001" / "shard-001").rename(tmp_path / "kept")  # seen only after the lock is taken
    refused(path, "is missing")
    (tmp_path / "kept").rename(path / "gen-000001" / "shard-001")
    with DataDir.open(path, 3, FAST) as datadir:
        datadir.close()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# -- what is refused -------------------------------------------------------------------------------------


def test_foreign_directories(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    (path / "thesis.txt").write_text("x")
    refused(path, "thesis.txt", "empty directory")
    assert not (path / LOCK).exists()
    assert path.stat().st_mode & 0o777 == 0o755
    (path / "thesis.txt").rename(path / MANIFEST)
    refused(path, "not JSON")
    assert not (path / LOCK).exists()
    (path / MANIFEST).write_text('{"name": "web page"}')
    refused(path, "format None")


@pytest.mark.parametrize("name", ["gen-000000", "gen-1", "gen-0000001", "gen-00000x", "torn"])
def test_names_that_only_look_like_ours_are_foreign(tmp_path, name):
    path = tmp_path / "data"
    (path / name).mkdir(parents=True)
    refused(path, name, "empty directory")


def test_data_without_a_manifest(tmp_path):
    path = tmp_path / "data"
    make(path)
    segment = path / "gen-000001" / "shard-001" / segment_name(1)
    segment.write_bytes(segment.read_bytes() + b"r")
    (path / MANIFEST).unlink()
    refused(path, "gen-000001", "holds data", MANIFEST)


def test_small_foreign_files_in_what_looks_like_a_generation(tmp_path):
    path = tmp_path / "data"
    (path / "gen-000001" / "shard-000").mkdir(parents=True)
    (path / "gen-000001" / "shard-000" / "note").write_text("x")
    refused(path, "gen-000001")
    (path / "gen-000001" / "shard-000" / "note").rename(path / "gen-000001" / "note")
    refused(path, "Not a directory")


def test_newer_format(tmp_path):
    path = tmp_path / "data"
    make(path)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"format": 1', '"format": 2'))
    refused(path, MANIFEST, "format 2", "up to 1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 0),
        ("format", "1"),
        ("format", True),
        ("generation", 0),
        ("generation", 1.0),
        ("shards", 0),
        ("shards", 4),
        ("shards", 2),
        ("shards", 10**30),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", None),
        ("slots", None),
        ("slots", []),
        ("slots", 7),
        ("slots", "[[0,16383,0]]"),
        ("slots", [[0, 5461, 0], [5462, 10922, 1]]),
        ("slots", [[0, 5461, 0], [5463, 10922, 1], [10923, 16383, 2]]),
        ("slots", [[0, 5461, 0], [5462, 10922, 1], [10923, 16384, 2]]),
        ("slots", [[0, 5461, 0], [5462, 10922, 1], [10923, 16383, 3]]),
        ("slots", [[0, 5461, 0], [5462, 10922, 1], [10923, 16383]]),
        ("slots", [[0, 5461, 0], [5462, 10922, 1], [10923.0, 16383.0, 2.0]]),
    ],
)
def test_fields_that_are_wrong_or_missing(tmp_path, field, value):
    path = tmp_path / "data"
    make(path)
    fields = json.loads((path / MANIFEST).read_text())
    del fields["checksum"]
    (path / MANIFEST).write_bytes(encode_manifest(fields | {field: value}))
    refused(path, MANIFEST, " has ")  # and not that it does not match its checksum
    del fields[field]
    (path / MANIFEST).write_bytes(encode_manifest(fields))
    refused(path, MANIFEST, " has ")


def test_manifest_cut_or_flipped_at_every_byte(tmp_path):
    path = tmp_path / "data"
    make(path)
    text = (path / MANIFEST).read_bytes()
    for size in range(len(text)):
        (path / MANIFEST).write_bytes(text[:size])
        refused(path, MANIFEST)
    for byte, bit in product(range(len(text)), (0, 5)):
        flipped = bytearray(text)
        flipped[byte] ^= 1 << bit
        (path / MANIFEST).write_bytes(flipped)
        refused(path, MANIFEST)
    for garbage in (b"\xff" * 20, b"[1]", b"null", b"7", b"[" * 100_000):
        (path / MANIFEST).write_bytes(garbage)
        refused(path, MANIFEST)


@pytest.mark.parametrize("name", ["gen-000001", "gen-000001/shard-001"])
def test_missing_directories(tmp_path, name):
    path = tmp_path / "data"
    make(path)
    (path / name).rename(tmp_path / "gone")
    refused(path, f"{path / name} is missing")


# -- leftovers and crashes -------------------------------------------------------------------------------


def test_leftovers_are_removed_with_a_word(tmp_path, caplog):
    path = tmp_path / "data"
    with DataDir.open(path, 2, FAST) as datadir:
        datadir.make_generation(2, 5)
        datadir.make_generation(7, 1)
        datadir.commit(2, SlotMap.even(5, datadir.slots.seed))
        torn = datadir.shard_dir(1, 1) / "00000001.aof.torn-64"
        torn.write_bytes(b"tail")
    (path / NEW_MANIFEST).write_text("{")
    (path / "notes").write_text("mine")
    caplog.clear()
    with DataDir.open(path, None, FAST) as datadir:
        assert datadir.generation == 2
        assert datadir.shards == 5
    assert sorted(found.name for found in path.iterdir()) == [LOCK, "gen-000002", MANIFEST, "notes", "torn"]
    assert "gen-000001" in caplog.text
    assert "gen-000007" in caplog.text
    # What was cut off a log is nobody's to delete.
    assert (path / "torn" / "gen-000001-shard-001-00000001.aof.torn-64").read_bytes() == b"tail"


def test_crash_while_a_directory_is_made(tmp_path):
    """Stop before each operation: the next open makes the directory, or finds it made."""
    for at in range(1, 1000):
        path = tmp_path / str(at)
        storage = FailingStorage(at)
        try:
            DataDir.open(path, 2, storage).close()
        except Crash:
            pass
        else:
            break
        finally:
            storage.release()
        make(path, 2)
        make(path, 2)
        assert sorted(found.name for found in path.iterdir()) == [LOCK, "gen-000001", MANIFEST]
    assert at > 20


def test_any_error_of_the_disk_is_one_sentence(tmp_path):
    told = []
    for at in range(1, 1000):
        path = tmp_path / str(at)
        storage = FailingStorage(at, OSError(28, "No space left on device"))
        try:
            DataDir.open(path, 2, storage).close()
        except DataDirError as error:
            told.append(str(error).removeprefix(f"{path} "))
        except OSError:  # only close() itself lets one through
            assert storage.calls[-1] == ("close", path / LOCK)
        else:
            break
        finally:
            storage.release()
        make(path, 2)
    assert len(told) > 20
    assert set(told) == {"cannot be used as data directory: No space left on device"}


def synced_before_commit(calls, path):
    """Check, in a trace of operations, that the manifest is renamed only when all it names is durable."""
    commit = calls.index(("rename", path / NEW_MANIFEST))
    before = calls[:commit]
    last = {}
    for number, (name, where) in enumerate(before):
        last[name, where] = number
    for (name, where), number in last.items():
        if name == "write" and where.name != LOCK:
            synced = max(last.get(("fsync", where), -1), last.get(("fdatasync", where), -1))
            assert synced > number, f"{where} is not synced"
        if name == "mkdir" and where != path:
            assert last.get(("fsync_dir", where.parent), -1) > number, f"the name of {where} is not synced"
        if name == "open" and where.suffix == ".aof" and ("mkdir", where.parent) in last:
            opened = before.index(("open", where))
            assert last.get(("fsync_dir", where.parent), -1) > opened, f"the name of {where} is not synced"
    assert calls[commit + 1] == ("fsync_dir", path)


def test_everything_is_synced_before_the_commit(tmp_path):
    storage = FailingStorage(at=1 << 30)
    DataDir.open(tmp_path / "data", 2, storage).close()
    assert ("fsync_dir", tmp_path) in storage.calls
    synced_before_commit(storage.calls, tmp_path / "data")


def test_the_trace_sees_every_operation():
    assert {"open", "write", "fsync", "fsync_dir", "rename", "unlink", "lock"} < set(OPERATIONS)


# -- the lock --------------------------------------------------------------------------------------------

HOLDER = textwrap.dedent(
    """
    import subprocess, sys
    from imds.datadir import DataDir
    datadir = DataDir.open(sys.argv[1], 2)
    child = None
    if sys.argv[2:] == ["child"]:
        # cat ends with our standard input, which the test holds, not with us
        child = subprocess.Popen(["cat"], stdout=subprocess.DEVNULL, pass_fds=[datadir.lock_fd])
    print("open", flush=True)
    if child:
        child.wait()
    sys.stdin.read()
    """
)


def holder(path, *arguments):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "open\n"
    return child


def test_two_processes(tmp_path):
    path = tmp_path / "data"
    with holder(path) as child:
        refused(path, f"in use by another imds server (pid {child.pid})")
        child.stdin.close()
        assert child.wait(30) == 0
    make(path, 2)


def test_twice_in_one_process(tmp_path):
    path = tmp_path / "data"
    with DataDir.open(path, 3, FAST):
        refused(path, f"in use by another imds server (pid {os.getpid()})")
    make(path)


def test_killed_holder(tmp_path):
    path = tmp_path / "data"
    with holder(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    make(path, 2)


def test_children_of_a_killed_holder_keep_it_locked_until_they_end(tmp_path, monkeypatch):
    path = tmp_path / "data"
    with holder(path, "child") as supervisor:
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait(30)
        refused(path, "in use by what is left of an imds server", f"pid {supervisor.pid}, gone")
        # An open that waits gets it as soon as the last child has ended.
        waits = []

        def wait(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                supervisor.stdin.close()
            sleep(seconds)

        sleep = time.sleep
        monkeypatch.setattr("imds.datadir.time.sleep", wait)
        DataDir.open(path, 2, FAST, lock_wait=60).close()
        assert len(waits) >= 3


def test_lock_is_inherited_and_given_up_by_close(tmp_path):
    path = tmp_path / "data"
    datadir = DataDir.open(path, 1, FAST)
    assert os.get_inheritable(datadir.lock_fd)
    child_fd = os.dup(datadir.lock_fd)  # as a child has it
    datadir.close()
    datadir.close()
    with (path / LOCK).open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(child_fd)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_generation_names_sort_as_numbers():
    names = [generation_name(number) for number in (1, 9, 10, 999_999)]
    assert names == sorted(names)
