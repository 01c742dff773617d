"""A shard's manifest: refused where it is not exactly what was written, or not the newest one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from failing_storage import Crash, FailingStorage, FastStorage
from hypothesis import given
from hypothesis import strategies as st

from imds.shard.aof import Aof
from imds.shard.manifest import (
    FORMAT,
    MANIFEST,
    NEW_MANIFEST,
    Base,
    Manifest,
    create_log,
    read_manifest,
    unnamed_files,
    write_manifest,
)
from imds.shard.segment import AofDamaged, base_name, create_segment, segment_name

FAST = FastStorage()
numbers = st.integers(1, 1 << 62)
bases = st.builds(Base, numbers, numbers, st.integers(0, 1 << 62), numbers)
manifests = st.builds(
    lambda base, first, count: Manifest(0, 1, base, tuple(range(first, first + count))),
    st.none() | bases,
    st.integers(1, 1 << 40),
    st.integers(1, 5),
)
SOME = Manifest(0, 1, Base(5, 4712, 90, 8811), (6, 7))


def read(directory: Path, shard: int = 0, generation: int = 1) -> Manifest:
    return read_manifest(FAST, directory, shard=shard, generation=generation)


@given(manifests)
def test_comes_back(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    directory = tmp_path_factory.mktemp("log")
    write_manifest(FAST, directory, manifest)
    assert read(directory) == manifest
    write_manifest(FAST, directory, SOME)
    assert read(directory) == SOME
    assert [path.name for path in directory.iterdir()] == [MANIFEST]


def test_the_text(tmp_path: Path) -> None:
    write_manifest(FAST, tmp_path, SOME)
    text = (tmp_path / MANIFEST).read_text()
    fields = json.loads(text)
    checksum = fields.pop("checksum")
    assert fields == {
        "format": FORMAT,
        "shard": 0,
        "generation": 1,
        "base": {"number": 5, "sequence": 4712, "records": 90, "bytes": 8811},
        "segments": [6, 7],
    }
    assert len(checksum) == 16
    assert text.endswith("}\n")
    assert SOME.names() == ["00000005.base", "00000006.aof", "00000007.aof"]


def test_every_bit_and_every_length_that_is_wrong_is_refused(tmp_path: Path) -> None:
    write_manifest(FAST, tmp_path, SOME)
    path = tmp_path / MANIFEST
    text = path.read_bytes()
    wrong = [text[:size] for size in range(len(text))]
    wrong += [
        text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]
        for at in range(len(text))
        for bit in range(8)
    ]
    wrong += [text + b" ", b"null", b"[]", b"7", b"[" * 100_000, b"\xff" * 30, text.replace(b"90", b"91")]
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(AofDamaged) as caught:
            read(tmp_path)
        assert str(path) in str(caught.value)
        assert caught.value.path == path


def test_missing_foreign_and_newer(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    with pytest.raises(AofDamaged, match=f"{path} is missing"):
        read(tmp_path)
    write_manifest(FAST, tmp_path, SOME)
    with pytest.raises(
        AofDamaged, match="belongs to shard 0 of generation 1, expected shard 2 of generation 1"
    ):
        read(tmp_path, shard=2)
    with pytest.raises(AofDamaged, match="expected shard 0 of generation 9"):
        read(tmp_path, generation=9)
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(AofDamaged, match="has format 2, this imds reads up to 1"):
        read(tmp_path)


def make(directory: Path, named: Manifest, *others: str) -> list[str]:
    """Make the files of a log, and others; return those that the manifest does not name."""
    write_manifest(FAST, directory, named)
    for name in (*named.names(), *others):
        (directory / name).write_bytes(b"x" * 64)
    return unnamed_files(FAST, directory, named)


def test_what_it_does_not_name_is_known(tmp_path: Path) -> None:
    others = [base_name(3), base_name(7), segment_name(5), segment_name(8), NEW_MANIFEST]
    kept = [segment_name(6) + ".torn-99", "notes", "5.aof", "suspect"]
    assert make(tmp_path, SOME, *others, *kept) == sorted(others)


def test_a_manifest_that_is_not_the_newest_is_refused(tmp_path: Path) -> None:
    make(tmp_path, SOME, segment_name(8))
    (tmp_path / segment_name(8)).write_bytes(b"x" * 65)
    with pytest.raises(AofDamaged, match=r"00000008.aof holds data, and .*manifest.json does not name it"):
        unnamed_files(FAST, tmp_path, SOME)
    (tmp_path / segment_name(8)).unlink()
    for name in SOME.names():
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(AofDamaged, match=f"{tmp_path / name} is missing: .*manifest.json says"):
            unnamed_files(FAST, tmp_path, SOME)
        (tmp_path / name).write_bytes(data)


def test_a_log_refuses_by_its_manifest_and_changes_nothing(tmp_path: Path) -> None:
    def loads() -> None:
        for _ in Aof(tmp_path, shard=0, generation=1, storage=FAST).load(lambda records: None):
            pass

    create_log(FAST, tmp_path, shard=0, generation=1)
    (tmp_path / segment_name(2)).write_bytes(b"x" * 65)
    (tmp_path / base_name(9)).write_bytes(b"x")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AofDamaged, match=r"00000002\.aof"):
        loads()
    (tmp_path / MANIFEST).rename(tmp_path / "gone")
    with pytest.raises(AofDamaged, match=r"manifest.json is missing"):
        loads()
    (tmp_path / "gone").rename(tmp_path / MANIFEST)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_leftovers_are_removed_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create_log(FAST, tmp_path, shard=0, generation=1)
    create_segment(FAST, tmp_path, shard=0, generation=1, number=2, sequence=0)
    (tmp_path / base_name(1)).write_bytes(b"half of a base")
    (tmp_path / NEW_MANIFEST).write_text("{")
    aof = Aof(tmp_path, shard=0, generation=1, policy="no", storage=FAST)
    list(aof.load(lambda records: None))
    aof.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [segment_name(1), MANIFEST]
    for name in (segment_name(2), base_name(1), NEW_MANIFEST):
        assert f"{tmp_path}: removing {name}, which the manifest does not name" in caplog.text


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, os.strerror(errno.EIO))])
def test_replaced_in_one_step_wherever_that_stops(tmp_path: Path, error: OSError | None) -> None:
    old, new = Manifest(0, 1, None, (1,)), Manifest(0, 1, None, (1, 2))
    for at in range(1, 100):
        write_manifest(FAST, tmp_path, old)
        storage = FailingStorage(at, error)
        try:
            write_manifest(storage, tmp_path, new)
        except (Crash, OSError):
            renamed = ("rename", tmp_path / NEW_MANIFEST) in storage.calls[:-1]
            assert read(tmp_path) == (new if renamed else old)
        else:
            break
        finally:
            storage.release()
    names = [name for name, _ in storage.calls]
    assert names[-3:] == ["close", "rename", "fsync_dir"]
    assert names.index("fsync") > names.index("write")
    assert read(tmp_path) == new
