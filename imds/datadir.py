"""The data directory: whose it is, how many shards it has, and which files hold them.

::

    DIR/                                   mode 0700
        LOCK                               flocked while a server runs; holds the pid of its supervisor
        manifest.json                      says which generation is the data
        gen-000001/shard-000/              the log of shard 0 (imds/shard/manifest.py)
                   shard-001/
        torn/                              tails cut off logs of generations that are gone

    manifest.json   {"format": 1, "generation": 1, "shards": 2, "seed": 1234567890,
                     "slots": [[0, 8191, 0], [8192, 16383, 1]],       first slot, last slot, shard
                     "checksum": "0123456789abcdef"}                  xxh64 of the text without it

What always holds:

* The manifest is replaced in one step (write a new file, fsync, rename, fsync the directory), and only when
  every file of the generation that it names is complete and synced. So after a crash at any place the
  directory holds one whole generation; whatever else is there is not data and is removed by the next open.
* Only the holder of the lock changes anything. The lock is inherited: it ends with the last process of
  the server, not with the supervisor.
* What is not certainly ours is refused untouched: data without a manifest, a foreign directory, a newer
  format. A directory is made new only where there was nothing.
* The manifest is one exact text: a bit of it that is wrong is noticed, wherever it is. A seed or a map that
  is not the one that was written would hide keys.
* The hash seed is drawn once, when the directory is made, and stays: with the slot map it decides where every
  key is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from xxhash import xxh64_hexdigest

from imds.hashslots import MAX_SHARDS, SlotMap
from imds.shard.manifest import MANIFEST as SHARD_MANIFEST
from imds.shard.manifest import NEW_MANIFEST as NEW_SHARD_MANIFEST
from imds.shard.manifest import create_log
from imds.shard.segment import SEGMENT_HEADER, segment_name
from imds.storage import Storage, random_seed, read_file, replace_file, write_all

log = logging.getLogger(__name__)

DEFAULT_DIR = "./imds-data"
FORMAT = 1
LOCK = "LOCK"
MANIFEST = "manifest.json"
NEW_MANIFEST = "manifest.json.new"
TORN = "torn"
# What may lie in a directory without a manifest: our own beginnings, and what a mount point has.
_NO_CONTENT = {LOCK, NEW_MANIFEST, "lost+found"}
_GENERATION = re.compile(r"gen-(\d{6,})")

# Seconds that an open waits for the children of a killed supervisor to finish their work.
LOCK_WAIT = 5.0


class DataDirError(Exception):
    """The directory cannot be used. The text is one sentence: path, what, rule."""


def generation_name(generation: int) -> str:
    """Return the name of a generation's directory."""
    return f"gen-{generation:06d}"


def shard_name(shard: int) -> str:
    """Return the name of a shard's directory in its generation."""
    return f"shard-{shard:03d}"


def default_shards() -> int:
    """Return the number of shards of a new directory: one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_SHARDS)


class DataDir:
    """An open, locked data directory. Open it by :meth:`open`; close it, or use ``with``."""

    def __init__(self, path: Path, lock_fd: int, generation: int, slots: SlotMap, storage: Storage) -> None:
        self.path = path
        self.lock_fd = lock_fd  # inheritable: a child that keeps it open keeps the directory locked
        self.generation = generation
        self.slots = slots
        self.storage = storage

    @classmethod
    def open(
        cls,
        path: str | Path = DEFAULT_DIR,
        shards: int | None = None,
        storage: Storage | None = None,
        lock_wait: float = LOCK_WAIT,
    ) -> DataDir:
        """Open the data directory ``path``, or make it with ``shards`` shards (None: one for each core).

        An existing directory keeps its shard count; imds/reshard.py changes it. Waits up to ``lock_wait``
        seconds for a server whose supervisor is gone. Raises DataDirError, and ValueError for a shard
        count that cannot be.
        """
        path, storage = Path(path), storage or Storage()
        shards = default_shards() if shards is None else shards
        if not 1 <= shards <= MAX_SHARDS:
            raise ValueError(f"{shards} shards, the rule is 1 to {MAX_SHARDS}")
        try:
            return cls._open(path, shards, storage, lock_wait)
        except OSError as error:
            raise DataDirError(f"{path} cannot be used as data directory: {error.strerror}") from error

    @classmethod
    def _open(cls, path: Path, shards: int, storage: Storage, lock_wait: float) -> DataDir:
        with suppress(FileExistsError):
            storage.mkdir(path)
        _survey(path, storage)  # before the first thing is changed: is this ours at all?
        lock_fd = lock_directory(path, storage, lock_wait)
        try:
            mode = storage.mode(path)
            if mode & 0o077:
                log.warning("%s had mode %04o and is made 0700: the data is its owner's alone", path, mode)
                storage.chmod(path, 0o700)
            found = _survey(path, storage)  # again: another server may have worked here until now
            generation, slots = found or (0, SlotMap.even(shards, random_seed()))
            datadir = cls(path, lock_fd, generation, slots, storage)
            if found:
                datadir._check_generation()
                # The manifest may have been renamed by a process that was killed right then: it has to be
                # on the disk before anything that an older one names is removed, or written to.
                storage.fsync_dir(path)
            datadir._remove_leftovers()
            if not found:
                # Also where we found the directory: whoever made it may have been killed before this.
                with suppress(PermissionError):  # then it is somebody else's, and has been there for long
                    storage.fsync_dir(path.parent)
                datadir.make_generation(1, shards)
                datadir.commit(1, slots)
                log.info("%s: made with %d shards", path, shards)
            return datadir
        except BaseException:
            storage.close(lock_fd)
            raise

    @classmethod
    def unlocked(cls, path: Path, storage: Storage) -> DataDir:
        """Return a directory for who only reads: a server may be at work there. Raises as open does."""
        try:
            found = _survey(path, storage)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None:
            raise DataDirError(f"{path} is no data directory: it has no {MANIFEST}")
        datadir = cls(path, -1, *found, storage)
        datadir._check_generation()
        return datadir

    def close(self) -> None:
        """Let go of this process's share of the lock. May be called again."""
        if self.lock_fd >= 0:
            with suppress(OSError):  # it is closed all the same
                self.storage.close(self.lock_fd)
            self.lock_fd = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def shards(self) -> int:
        """How many shards the data is in."""
        return self.slots.shards

    def shard_dir(self, shard: int, generation: int | None = None) -> Path:
        """Return the directory of a shard's log, in the present generation or another."""
        name = generation_name(self.generation if generation is None else generation)
        return self.path / name / shard_name(shard)

    def make_generation(self, generation: int, shards: int) -> None:
        """Make the directories and empty logs of a generation, synced. It is not data until committed."""
        storage, top = self.storage, self.path / generation_name(generation)
        storage.mkdir(top)
        for shard in range(shards):
            directory = self.shard_dir(shard, generation)
            storage.mkdir(directory)
            create_log(storage, directory, shard=shard, generation=generation)
        storage.fsync_dir(top)
        storage.fsync_dir(self.path)

    def commit(self, generation: int, slots: SlotMap) -> None:
        """Replace the manifest: from here on ``generation`` is the data, spread by ``slots``.

        After an OSError either may be the data; only the next open can tell.
        """
        manifest = {
            "format": FORMAT,
            "generation": generation,
            "shards": slots.shards,
            "seed": slots.seed,
            "slots": slots.ranges(),
        }
        text = encode_manifest(manifest)
        replace_file(self.storage, self.path / MANIFEST, text, os.O_TRUNC)
        self.generation, self.slots = generation, slots

    def remove_generation(self, generation: int) -> None:
        """Delete a generation that the manifest does not name, but not what was cut off its logs."""
        assert generation != self.generation
        storage, top = self.storage, self.path / generation_name(generation)
        for shard in storage.listdir(top):
            for name in storage.listdir(top / shard):
                if ".torn-" in name:
                    self._keep_torn(top / shard / name, f"{top.name}-{shard}-{name}")
                else:
                    storage.unlink(top / shard / name)
            storage.rmdir(top / shard)
        storage.rmdir(top)
        storage.fsync_dir(self.path)

    def _keep_torn(self, path: Path, name: str) -> None:
        if TORN not in self.storage.listdir(self.path):
            self.storage.mkdir(self.path / TORN)
            self.storage.fsync_dir(self.path)
        self.storage.rename(path, self.path / TORN / name)
        self.storage.fsync_dir(self.path / TORN)

    def _check_generation(self) -> None:
        """Raise DataDirError unless the directories that the manifest promises are there."""
        top = self.path / generation_name(self.generation)
        for directory in (top, *(self.shard_dir(shard) for shard in range(self.shards))):
            if directory.name not in self.storage.listdir(directory.parent):
                raise DataDirError(f"{directory} is missing: {self.path / MANIFEST} says that it holds data")

    def _remove_leftovers(self) -> None:
        """Remove what an interrupted start or reshard left: files that no manifest names."""
        names = self.storage.listdir(self.path)
        if NEW_MANIFEST in names:
            self.storage.unlink(self.path / NEW_MANIFEST)
        others = [one for name in names if (one := generation_of(name)) and one != self.generation]
        for generation in others:
            name = generation_name(generation)
            log.warning("%s: removing %s, which the manifest does not name", self.path, name)
            self.remove_generation(generation)


def _survey(path: Path, storage: Storage) -> tuple[int, SlotMap] | None:
    """Return what the manifest says, or None where a data directory may be made. Changes nothing."""
    names = storage.listdir(path)
    if MANIFEST in names:
        return read_manifest(path / MANIFEST, storage)
    for name in names:
        if generation_of(name):
            _refuse_data(path / name, storage)
        elif name not in _NO_CONTENT:
            raise DataDirError(
                f"{path} holds {name} and no {MANIFEST}: a data directory is made only in an empty directory"
            )
    return None


def _refuse_data(top: Path, storage: Storage) -> None:
    """Raise DataDirError unless ``top`` is a generation that was being made: empty logs, nothing else."""
    for shard in storage.listdir(top):
        for file in storage.listdir(top / shard):
            size = storage.size(top / shard / file)
            empty = file == segment_name(1) and size <= SEGMENT_HEADER.size
            if not empty and file not in (SHARD_MANIFEST, NEW_SHARD_MANIFEST):
                raise DataDirError(f"{top} holds data, but {top.parent} no {MANIFEST}: it cannot be read")


def generation_of(name: str) -> int:
    """Return the generation whose directory is called ``name``, or 0 if that is no such name."""
    found = _GENERATION.fullmatch(name)
    generation = int(found[1]) if found else 0
    return generation if name == generation_name(generation) else 0


def read_manifest(path: Path, storage: Storage) -> tuple[int, SlotMap]:
    """Return generation and slot map. Raises DataDirError for anything that this version cannot follow."""
    text = read_file(storage, path)
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataDirError(f"{path} is not JSON: {error}") from None
    form = _number(fields, "format", path)
    if form > FORMAT:
        raise DataDirError(f"{path} has format {form}, and this imds reads formats up to {FORMAT}")
    if encode_manifest({name: fields[name] for name in fields if name != "checksum"}) != text:
        raise DataDirError(f"{path} does not match its checksum: it is not what was written there")
    generation = _number(fields, "generation", path)
    try:
        slots = SlotMap.from_ranges(
            fields.get("slots"), _number(fields, "shards", path), _number(fields, "seed", path, least=0)
        )
    except (TypeError, ValueError) as error:
        raise DataDirError(f"{path} has no right slot map: {error}") from None
    return generation, slots


def encode_manifest(fields: dict[str, Any]) -> bytes:
    """Return the manifest of these fields as text, with its checksum."""
    checksum = xxh64_hexdigest(json.dumps(fields).encode())
    return json.dumps({**fields, "checksum": checksum}).encode() + b"\n"


def _number(fields: Any, name: str, path: Path, least: int = 1) -> int:
    value = fields.get(name) if isinstance(fields, dict) else None
    if type(value) is not int or value < least:
        raise DataDirError(f"{path} has {name} {value!r}, the rule is a whole number from {least} on")
    return value


def lock_directory(path: Path, storage: Storage, wait: float) -> int:
    """Take the directory's lock and write our pid into it; return its descriptor.

    Raises DataDirError if a server has it, after ``wait`` seconds if that is dying, OSError.
    """
    fd = storage.open(path / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        until = time.monotonic() + wait
        while not storage.lock(fd):
            pid = storage.read(fd, 20, 0).decode("ascii", "replace").strip()
            if _alive(pid):
                raise DataDirError(f"{path} is in use by another imds server (pid {pid})")
            if time.monotonic() >= until:
                raise DataDirError(f"{path} is in use by what is left of an imds server (pid {pid}, gone)")
            time.sleep(0.05)
        storage.truncate(fd, 0)
        write_all(storage, fd, b"%d\n" % os.getpid())
    except BaseException:
        storage.close(fd)
        raise
    return fd


def _alive(pid: str) -> bool:
    """Whether the process with that pid, as text, exists."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True
