"""What touches a data directory does so by imds/storage.py only, so that a test can stand in for the disk."""

import ast
import mmap
from pathlib import Path

import psutil
import pytest
from failing_storage import FastStorage

import imds
from imds.storage import Storage, UntouchedStorage, exists, read_file, remove_tree

ROOT = Path(imds.__file__).parent
MODULES = [
    *("datadir", "reshard", "rebuild", "logtools", "backup", "restore"),
    *(f"shard/{name}" for name in ("aof", "segment", "record", "manifest", "rewrite", "examine")),
]
# Names of os that are no operation on a file.
HARMLESS = {"O_RDONLY", "O_RDWR", "O_WRONLY", "O_CREAT", "O_EXCL", "O_APPEND", "O_TRUNC"} | {
    *("strerror", "getpid", "kill", "cpu_count", "sched_getaffinity", "nice"),
    *("SCHED_IDLE", "sched_param"),
}
# Methods of Path that are one.
TOUCHING = {
    *("open", "read_bytes", "read_text", "write_bytes", "write_text", "mkdir", "rmdir", "unlink", "rename"),
    *("touch", "iterdir", "glob", "rglob", "exists", "is_file", "is_dir", "stat", "chmod"),
}


def operations(module):
    """Yield what a module does to files itself, as (line, text)."""
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.Name):
            wrong = text in ("open", "shutil", "mmap", "tempfile")
        elif text.startswith("os."):
            wrong = node.attr not in HARMLESS
        else:
            through = text.removesuffix(f".{node.attr}").endswith(("storage", "DataDir", "cls"))
            wrong = node.attr in TOUCHING and not through
        if wrong:
            yield node.lineno, text


@pytest.mark.parametrize("module", MODULES)
def test_no_other_way_to_a_file(module):
    assert list(operations(module)) == []


def test_the_other_ways_are_seen(tmp_path, monkeypatch):
    lines = ["open(path)", "path.unlink()", "os.replace(a, b)", "shutil.rmtree(path)", "os.strerror(5)"]
    (tmp_path / "wrong.py").write_text("\n".join(lines))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert sorted(line for line, _ in operations("wrong")) == [1, 2, 3, 4]


def test_a_tree_is_removed_with_all_that_is_in_it(tmp_path):
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(b"1")
    (top / "empty").mkdir()
    remove_tree(Storage(), top)
    assert not top.exists()
    with pytest.raises(FileNotFoundError):
        remove_tree(Storage(), top)


def descriptors():
    return len(psutil.Process().open_files())


@pytest.mark.parametrize("content", [b"", b"some bytes"])
def test_a_file_as_a_whole_and_in_place(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    before = descriptors()
    for storage in (Storage(), UntouchedStorage()):
        assert read_file(storage, path) == content
        with storage.mapped(path) as found:
            assert bytes(found) == content
            assert isinstance(found, mmap.mmap | bytes)
    assert descriptors() == before


def test_exists(tmp_path):
    (tmp_path / "file").touch()
    assert exists(Storage(), tmp_path)
    assert exists(Storage(), tmp_path / "file")
    assert not exists(Storage(), tmp_path / "none")
    assert not exists(Storage(), tmp_path / "file/none")


def test_only_the_systems_descriptors_are_written_to_without_it():
    assert Storage().direct
    assert not UntouchedStorage().direct
    assert not FastStorage().direct
