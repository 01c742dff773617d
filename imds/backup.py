"""``imds-backup``: copy a data directory while its server serves, and prove that the copy can be started.

::

    BACKUP/backup.json                      written last: without it the directory is no backup
           manifest.json                    the data directory's own: seed and slot map
           gen-000001/shard-000/            each shard's log up to one moment, cut at the end of a record

    backup.json     {"format": 1, "imds": "0.1.0", "begun": "2026-11-25T11:02:35Z", "made": "...",
                     "generation": 1, "shards": [{"shard": 0, "keys": 90, "digest": "0123456789abcdef",
                     "next_number": 4712, "last_time": 1795604555000000, "bytes": 8811}],
                     "checksum": "0123456789abcdef"}

What makes the copy of a shard consistent is that logs only grow, and that files which a rewrite replaces
can be read on by who has them open. So: open all files that the shard's manifest names; start again if it
has changed meanwhile; take their lengths, the last one's first, so that no record is left out before one
that is in; copy. The server takes no part in it and waits for nothing. Each shard has its own moment, between
``begun`` and ``made``: shards share nothing.

The trial restore is the load that a start does, on the copy, with a digest of all data at its end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from imds import __version__
from imds.datadir import DEFAULT_DIR, MANIFEST, DataDir, DataDirError, encode_manifest, generation_name
from imds.logtools import log_bytes, quiet, time_of
from imds.progress import Progress
from imds.shard.aof import Aof, AofError
from imds.shard.examine import empty_store
from imds.shard.manifest import Manifest, read_manifest, write_manifest
from imds.shard.segment import SEGMENT_NAME, end_of_records
from imds.storage import Storage, copy_file, copy_open, read_file, remove_tree, replace_file

BACKUP = "backup.json"
FORMAT = 1
_TRIES = 100  # of a shard's files, while its log is being rewritten again and again


@dataclass(frozen=True)
class Part:
    """One shard of a backup. ``last_time``: of its log, microseconds since 1970, 0 if it has none."""

    shard: int
    keys: int
    digest: str
    next_number: int
    last_time: int
    bytes: int


@dataclass(frozen=True)
class Backup:
    """What ``backup.json`` says."""

    begun: str
    made: str
    generation: int
    shards: tuple[Part, ...]

    def encode(self) -> bytes:
        """Return it as text, with a checksum."""
        fields = asdict(self) | {"shards": [asdict(part) for part in self.shards]}
        return encode_manifest({"format": FORMAT, "imds": __version__, **fields})


def read_backup(storage: Storage, path: Path) -> Backup:
    """Return what the backup at ``path`` is. Raises DataDirError unless it is whole, OSError."""
    file = path / BACKUP
    try:
        text = read_file(storage, file)
    except (FileNotFoundError, NotADirectoryError):
        raise DataDirError(f"{path} is no backup: it has no {BACKUP}, which is written last") from None
    try:
        fields = json.loads(text)
        if fields["format"] > FORMAT:
            raise DataDirError(f"{file} has format {fields['format']}, this imds reads up to {FORMAT}")
        if encode_manifest({name: fields[name] for name in fields if name != "checksum"}) != text:
            raise ValueError
        parts = tuple(Part(**part) for part in fields["shards"])
        return Backup(fields["begun"], fields["made"], fields["generation"], parts)
    except (ValueError, LookupError, TypeError) as error:
        raise DataDirError(f"{file} is not what was written there") from error


def make_empty(storage: Storage, target: Path) -> None:
    """Make the directory ``target``, if there is none, and sync its name.

    Raises DataDirError if it holds anything, OSError.
    """
    try:
        storage.mkdir(target)
    except FileExistsError:
        if storage.listdir(target):
            raise DataDirError(f"{target} is not empty: nothing is written into it") from None
    with suppress(PermissionError):  # as it was there before, in a directory that is somebody else's
        storage.fsync_dir(target.parent)


def make_shard_dirs(storage: Storage, target: Path, generation: int, names: Sequence[str]) -> None:
    """Make the directories of a generation, as far as they go, synced."""
    top = target / generation_name(generation)
    storage.mkdir(top)
    for name in names:
        storage.mkdir(top / name)
    storage.fsync_dir(top)
    storage.fsync_dir(target)


def trial(
    storage: Storage, directory: Path, shard: int, generation: int, step: Callable[[int], object]
) -> Part:
    """Load a copied log as a start does; cut what was half-written when it was copied. Raises AofError."""
    store = empty_store()
    aof = Aof(directory, shard=shard, generation=generation, policy="no", storage=storage)
    before = size = 0
    try:
        with quiet(logging.getLogger("imds.shard.aof")):  # a record that was being written is no loss
            for done, total, _ in aof.load(store.replay):
                step(done - before)
                before, size = done, total
    finally:
        aof.close()
    for name in storage.listdir(directory):
        if ".torn-" in name:
            storage.unlink(directory / name)
    storage.fsync_dir(directory)
    digest = f"{store.digest():016x}"
    return Part(shard, store.keys, digest, aof.sequence, aof.clock, size - aof.torn_bytes)


# -- making one ------------------------------------------------------------------------------------------


def backup(directory: Path, target: Path, storage: Storage | None = None) -> Backup:
    """Copy ``directory`` to ``target``, which must be empty or not be there, and try the copy.

    Raises DataDirError, AofError, OSError: then nothing is left of it.
    """
    storage = storage or Storage()
    make_empty(storage, target)
    try:
        return _backup(directory, target, storage)
    except BaseException:
        with suppress(OSError):
            remove_tree(storage, target)
        raise


def _backup(directory: Path, target: Path, storage: Storage) -> Backup:
    source = DataDir.unlocked(directory, storage)
    begun = _now()
    shards = [source.shard_dir(shard) for shard in range(source.shards)]
    make_shard_dirs(storage, target, source.generation, [path.name for path in shards])
    total = log_bytes(source, list(range(source.shards)))
    parts = []
    with Progress(f"copying {directory}", total) as progress:
        for shard, path in enumerate(shards):
            copy = target / path.relative_to(directory)
            _copy_log(storage, path, copy, shard, source.generation, progress.advance)
    with Progress(f"trying {target}", total) as progress:
        for shard, path in enumerate(shards):
            copy = target / path.relative_to(directory)
            parts.append(trial(storage, copy, shard, source.generation, progress.advance))
    copy_file(storage, directory / MANIFEST, target / MANIFEST, storage.size(directory / MANIFEST), _nothing)
    if DataDir.unlocked(target, storage).slots.ranges() != source.slots.ranges():
        raise DataDirError(f"{directory} was given another number of shards meanwhile: try again")
    made = Backup(begun, _now(), source.generation, tuple(parts))
    storage.fsync_dir(target)  # what says that all is there comes last on the disk, too
    replace_file(storage, target / BACKUP, made.encode())
    return made


def _nothing(_: int) -> None:
    pass


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _copy_log(
    storage: Storage, source: Path, target: Path, shard: int, generation: int, step: Callable[[int], object]
) -> None:
    """Copy a shard's log as it is at one moment."""
    for _ in range(_TRIES):
        with ExitStack() as opened:
            manifest = read_manifest(storage, source, shard=shard, generation=generation)
            fds = _open_all(storage, source, manifest, opened)
            if fds is None or read_manifest(storage, source, shard=shard, generation=generation) != manifest:
                continue
            files = list(zip(manifest.names(), fds, strict=True))
            sizes = {name: _bytes_to_copy(storage, source / name, fd) for name, fd in reversed(files)}
            for name, fd in files:
                copy_open(storage, fd, target / name, sizes[name], step)
            write_manifest(storage, target, manifest)
            return
    raise DataDirError(f"{source} was rewritten {_TRIES} times while it was being copied")


def _bytes_to_copy(storage: Storage, path: Path, fd: int) -> int:
    """Return the length of a file, or where its records end: behind them it changes, and is cut."""
    return end_of_records(storage, fd, path) if SEGMENT_NAME.fullmatch(path.name) else storage.size(fd)


def _open_all(storage: Storage, source: Path, manifest: Manifest, opened: ExitStack) -> list[int] | None:
    """Return descriptors of a log's files, None if one of them is gone by now."""
    fds = []
    for name in manifest.names():
        try:
            fds.append(storage.open(source / name, os.O_RDONLY))
        except FileNotFoundError:
            return None
        opened.callback(storage.close, fds[-1])
    return fds


def lines(parts: Sequence[Part]) -> list[str]:
    """Return what a person wants to know of a backup's shards."""
    return [
        f"shard {part.shard}: {part.keys} keys, {part.bytes} bytes, up to number {part.next_number - 1}, "
        f"last time {time_of(part.last_time)}, digest {part.digest}"
        for part in parts
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``imds-backup``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="imds-backup",
        description="Copy a data directory, while its server serves or not, and try the copy: every log is "
        "loaded as a start would. The server is not asked and does not wait. The copy is as of one moment "
        "for each shard; imds-restore makes a data directory of it again.",
        epilog="Exit code: 0 done, 1 could not, and nothing is left of it, 2 usage.",
    )
    parser.add_argument("--version", action="version", version=f"imds-backup {__version__}")
    parser.add_argument("target", type=Path, metavar="BACKUP", help="an empty directory, or none yet")
    parser.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="data directory (%(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    os.nice(10)  # the server comes first
    try:
        made = backup(args.dir, args.target)
    except (AofError, DataDirError, OSError) as error:
        print(f"imds-backup: {error}", file=sys.stderr)
        return 1
    keys = sum(part.keys for part in made.shards)
    print("\n".join([*lines(made.shards), f"{args.target}: {keys} keys, tried"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
