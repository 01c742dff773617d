"""The simulated disk: what it promises it keeps, what it does not promise it may lose."""

from __future__ import annotations

import errno
import inspect
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.simdisk import SECTOR, Fault, SimCrash, SimDisk
from imds.storage import Storage, write_all

D = Path("/d")
A, B = D / "a", D / "b"
WRITE = os.O_RDWR | os.O_CREAT


def test_every_operation_is_simulated():
    operations = {name for name, _ in inspect.getmembers(Storage, inspect.isfunction)}
    assert operations <= set(vars(SimDisk))


def made() -> SimDisk:
    """Return a disk with the directory D, safe."""
    disk = SimDisk()
    disk.mkdir(D)
    disk.fsync_dir(Path("/"))
    return disk


def put(disk: SimDisk, path: Path, data: bytes, *, sync: bool = True) -> None:
    fd = disk.open(path, WRITE | os.O_TRUNC)
    write_all(disk, fd, data)
    if sync:
        disk.fsync(fd)
    disk.close(fd)


def get(disk: SimDisk, path: Path) -> bytes | None:
    if path.name not in disk.listdir(path.parent):
        return None
    fd = disk.open(path, os.O_RDONLY)
    data = disk.read(fd, 1 << 30, 0)
    disk.close(fd)
    return data


def finds(disk: SimDisk, path: Path = A, crashes: int = 300) -> set[bytes | None]:
    """Return all that a file may be after a crash, as many crashes find it."""
    rng = random.Random(5)
    return {get(disk.crash(rng), path) for _ in range(crashes)}


# -- against a model ------------------------------------------------------------------------------

NAMES = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), NAMES, st.binary(min_size=1, max_size=1500)),
        st.tuples(st.just("write_at"), NAMES, st.integers(0, 2000), st.binary(min_size=1, max_size=700)),
        st.tuples(st.just("truncate"), NAMES, st.integers(0, 2500)),
        st.tuples(st.just("fsync"), NAMES),
        st.tuples(st.just("fdatasync"), NAMES),
        st.tuples(st.just("fsync_dir")),
        st.tuples(st.just("rename"), NAMES, NAMES),
        st.tuples(st.just("unlink"), NAMES),
        st.tuples(st.just("kill")),
    ),
    max_size=25,
)


class Promises:
    """What must be read now and what must survive, kept the plainest way: files by number, bytes by bytes."""

    def __init__(self):
        self.now = {}  # name: number
        self.names = {}  # as promised; a name that has changed since is not in here
        self.data = {}  # number: bytes
        self.safe = {}  # number: {offset: byte} and "length", as promised and not changed since

    def forget(self, number, start, end):
        for offset in range(start // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR):
            self.safe[number].pop(offset, None)

    def resize(self, number, size):
        data = self.data[number]
        if size != len(data):
            self.safe[number].pop("length", None)
            self.forget(number, min(size, len(data)), max(size, len(data)))
            self.data[number] = data[:size].ljust(size, b"\0")

    def write(self, number, offset, data):
        self.resize(number, max(len(self.data[number]), offset + len(data)))
        self.forget(number, offset, offset + len(data))
        old = self.data[number]
        self.data[number] = old[:offset] + data + old[offset + len(data) :]

    def sync(self, number):
        self.safe[number] = {"length": len(self.data[number]), **dict(enumerate(self.data[number]))}

    def check_now(self, disk):
        assert disk.listdir(D) == sorted(self.now)
        for name, number in self.now.items():
            assert get(disk, D / name) == self.data[number]

    def check_after(self, disk):
        found = disk.listdir(D)
        for name, number in self.names.items():
            if number is None:
                assert name not in found
                continue
            data, safe = get(disk, D / name), self.safe[number]
            assert data is not None, f"{name} is gone"
            if "length" in safe:
                assert len(data) == safe["length"]
            for offset, byte in safe.items():
                if offset != "length" and offset < len(data):
                    assert data[offset] == byte


@settings(max_examples=120, deadline=None)
@given(STEPS, st.integers(0, 1 << 30))
def test_promises_are_kept(steps, seed):
    rng = random.Random(seed)
    disk, model = made(), Promises()
    for name, *arguments in steps:
        if name == "fsync_dir":
            disk.fsync_dir(D)
            model.names = {name: model.now.get(name) for name in "abc"}
        elif name == "kill":
            disk = disk.killed()
        else:
            path = D / arguments[0]
            if arguments[0] not in model.now:
                if name in ("rename", "unlink"):
                    continue
                number = model.now[path.name] = len(model.data)
                model.data[number], model.safe[number] = b"", {}
                model.names.pop(path.name, None)
            number = model.now[path.name]
            if name == "unlink":
                disk.unlink(path)
                del model.now[path.name]
                model.names.pop(path.name, None)
            elif name == "rename":
                disk.rename(path, D / arguments[1])
                if arguments[1] != path.name:
                    model.now[arguments[1]] = model.now.pop(path.name)
                    model.names.pop(arguments[1], None)
                    model.names.pop(path.name, None)
            else:
                flags = WRITE | (os.O_APPEND if name == "write" else 0)
                fd = disk.open(path, flags)
                if name == "write":
                    model.write(number, len(model.data[number]), arguments[1])
                    disk.write(fd, arguments[1])
                elif name == "write_at":
                    model.write(number, *arguments[1:])
                    disk.write_at(fd, arguments[2], arguments[1])
                elif name == "truncate":
                    model.resize(number, arguments[1])
                    disk.truncate(fd, arguments[1])
                else:
                    model.sync(number)
                    getattr(disk, name)(fd)
                disk.close(fd)
        model.check_now(disk)
        model.check_now(disk.killed())
        for _ in range(3):
            model.check_after(disk.crash(rng))


# -- not too kind: each wrong protocol is caught, and the right one is not -------------------------

OLD, NEW = b"old" * 500, b"new" * 400


def replace(disk: SimDisk, *, sync: bool = True, sync_directory: bool = True) -> None:
    put(disk, B, NEW, sync=sync)
    disk.rename(B, A)
    if sync_directory:
        disk.fsync_dir(D)


def with_old() -> SimDisk:
    disk = made()
    put(disk, A, OLD)
    disk.fsync_dir(D)
    return disk


def test_right_replacement():
    disk = with_old()
    replace(disk)
    assert finds(disk) == {NEW}


def test_right_replacement_at_every_moment():
    found = set()
    disk = with_old()
    disk.after = lambda name, path: found.update(finds(disk, crashes=100))
    replace(disk)
    assert found == {OLD, NEW}


def test_rename_without_syncing_the_file():
    disk = with_old()
    replace(disk, sync=False)
    found = finds(disk)
    assert OLD not in found
    assert NEW in found
    assert b"" in found
    assert len(found) > 5


def test_rename_without_syncing_the_directory():
    disk = with_old()
    replace(disk, sync_directory=False)
    assert finds(disk) == {OLD, NEW}


def test_acknowledging_before_the_sync():
    disk = with_old()
    fd = disk.open(A, os.O_WRONLY | os.O_APPEND)
    disk.write(fd, b"more")
    assert finds(disk) >= {OLD, OLD + b"more"}
    disk.fdatasync(fd)
    assert finds(disk) == {OLD + b"more"}


def test_new_file_without_syncing_the_directory():
    disk = made()
    put(disk, A, NEW)
    assert finds(disk) == {None, NEW}
    disk.fsync_dir(D)
    assert finds(disk) == {NEW}


def test_new_directory_without_syncing_its_parent():
    disk = SimDisk()
    disk.mkdir(D)
    put(disk, A, NEW)
    disk.fsync_dir(D)
    rng = random.Random(1)
    assert {tuple(disk.crash(rng).listdir(Path("/"))) for _ in range(50)} == {(), ("d",)}


def test_rename_never_loses_the_file():
    """Within one directory and between two, whichever is synced."""
    for synced in (None, D, D / "e"):
        disk = made()
        disk.mkdir(D / "e")
        put(disk, A, NEW)
        disk.fsync_dir(D)
        disk.rename(A, D / "e" / "a")
        if synced:
            disk.fsync_dir(synced)
        rng = random.Random(1)
        for _ in range(100):
            found = disk.crash(rng)
            assert NEW in (get(found, A), get(found, D / "e" / "a"))


def test_sectors_are_kept_in_any_order():
    disk = with_old()
    fd = disk.open(A, os.O_WRONLY | os.O_APPEND)
    disk.write(fd, b"x" * (3 * SECTOR - len(OLD)))
    disk.fdatasync(fd)
    disk.write(fd, b"y" * 3 * SECTOR)
    holes = [data for data in finds(disk) if data and data.endswith(b"y") and b"\0" * SECTOR in data]
    assert holes, "a later sector was never kept without an earlier one"
    assert all(data.startswith(OLD) for data in holes)


def test_what_comes_during_a_sync_is_not_promised():
    disk = with_old()
    fd = disk.open(A, os.O_WRONLY | os.O_APPEND)
    disk.write(fd, b"before ")
    disk.during = lambda name, path: disk.write(fd, b"during") and None
    disk.fdatasync(fd)
    found = finds(disk)
    assert all(data.startswith(OLD + b"before ") for data in found)
    assert {OLD + b"before ", OLD + b"before during"} <= found


def test_a_failed_sync_cannot_be_retried():
    disk = with_old()
    fault = Fault(2, "EIO")
    fd = disk.open(A, os.O_WRONLY | os.O_APPEND)
    fault.attach(disk)
    disk.write(fd, b"more")
    with pytest.raises(OSError, match="Input/output"):
        disk.fdatasync(fd)
    disk.fdatasync(fd)
    assert get(disk, A) == OLD + b"more"
    assert OLD + b"\0\0\0\0" in finds(disk)
    disk = disk.killed()
    fd = disk.open(A, os.O_WRONLY)
    disk.fdatasync(fd)
    assert OLD + b"\0\0\0\0" in finds(disk)
    disk.write_at(fd, b"more", len(OLD))  # but written again it is taken again
    disk.fdatasync(fd)
    assert finds(disk) == {OLD + b"more"}


def test_truncation_may_be_undone():
    disk = with_old()
    fd = disk.open(A, os.O_WRONLY)
    disk.truncate(fd, 100)
    assert {len(data) for data in finds(disk)} >= {100, len(OLD)}
    disk.fsync(fd)
    assert finds(disk) == {OLD[:100]}


# -- stopping, failing ----------------------------------------------------------------------------


def test_crash_at_each_mutation():
    steps = with_old()
    replace(steps)
    total = steps.mutations
    disks = []
    for at in range(with_old().mutations + 1, total + 1):
        disk = with_old()
        disk.crash_at = at
        with pytest.raises(SimCrash):
            replace(disk)
        with pytest.raises(SimCrash):
            disk.listdir(D)
        assert disk.mutations == at
        disks.append(disk)
    assert len(disks) == 5  # create, write, fsync, rename, fsync_dir
    assert set().union(*(finds(disk) for disk in disks)) == {OLD, NEW}


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "EINTR"])
def test_faults(kind):
    disk = with_old()
    fd = disk.open(A, os.O_WRONLY | os.O_APPEND)
    once = Fault(1, kind)
    once.attach(disk)
    with pytest.raises(OSError) as caught:
        disk.write(fd, b"no")
    assert caught.value.errno == getattr(errno, kind)
    assert disk.write(fd, b"yes") == 3
    assert (once.hit, once.where, once.hits) == ("write", A, 1)
    forever = Fault(2, kind, forever=True)
    forever.attach(disk)
    assert disk.size(A) == len(OLD) + 3
    for _ in range(2):
        with pytest.raises(OSError):
            disk.write(fd, b"no")
    assert disk.size(A) == len(OLD) + 3
    assert forever.hits == 2
    forever.off = True
    late = Fault(1, kind, late=True)
    late.attach(disk)
    with pytest.raises(OSError):
        disk.rename(A, B)
    assert get(disk, B) == OLD + b"yes"


def test_short_writes_are_completed():
    disk = made()
    fault = Fault(2, "short", forever=True)
    fault.attach(disk)
    put(disk, A, NEW)
    assert fault.hits > 5
    assert get(disk, A) == NEW


def test_errors_are_the_systems(tmp_path):
    """The same calls on the real disk raise the same errors."""
    real, disk = Storage(), made()
    put(disk, A, OLD)
    (tmp_path / "a").write_bytes(OLD)
    disk.mkdir(D / "e")
    (tmp_path / "e").mkdir()
    for call in (
        lambda storage, top: storage.open(top / "no", os.O_RDONLY),
        lambda storage, top: storage.open(top / "a", os.O_RDWR | os.O_CREAT | os.O_EXCL),
        lambda storage, top: storage.open(top / "no" / "a", WRITE),
        lambda storage, top: storage.open(top / "a" / "a", WRITE),
        lambda storage, top: storage.open(top / "e", os.O_RDWR),
        lambda storage, top: storage.mkdir(top / "e"),
        lambda storage, top: storage.mkdir(top / "no" / "e"),
        lambda storage, top: storage.unlink(top / "no"),
        lambda storage, top: storage.rmdir(top),
        lambda storage, top: storage.rename(top / "no", top / "a"),
        lambda storage, top: storage.rename(top / "a", top / "e"),
        lambda storage, top: storage.listdir(top / "no"),
        lambda storage, top: storage.listdir(top / "a"),
        lambda storage, top: storage.fsync_dir(top / "no"),
        lambda storage, top: storage.size(top / "no"),
        lambda storage, top: storage.write(storage.open(top / "a", os.O_RDONLY), b"x"),
        lambda storage, top: storage.close(12345),
    ):
        errors = []
        for storage, top in ((real, tmp_path), (disk, D)):
            with pytest.raises(OSError) as caught:
                call(storage, top)
            errors.append(caught.value.errno)
        assert errors[0] == errors[1]


def test_locks():
    disk = made()
    one, other = disk.open(A, WRITE), disk.open(A, WRITE)
    assert disk.lock(one)
    assert not disk.lock(other)
    again = disk.killed()
    assert again.lock(again.open(A, WRITE))
    disk.close(one)
    assert disk.lock(other)
