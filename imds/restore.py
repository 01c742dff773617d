"""``imds-restore``: make a data directory of a backup, all of it or up to an earlier moment.

A shard's part of a backup is a base, which cannot be divided, and the records after it, each with its number
and with a clock (imds/shard/segment.py) before it that is at most CLOCK_EVERY older than the record. So a
shard can be restored up to

* any record number, from the base on;
* a time, from the base's own on: everything that was appended before it, and at most a second more.

The data directory's manifest is written last: interrupted, what is there is refused by every start.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from imds import __version__
from imds.backup import Backup, Part, lines, make_empty, make_shard_dirs, read_backup, trial
from imds.datadir import DEFAULT_DIR, MANIFEST, DataDir, DataDirError
from imds.logtools import time_of
from imds.progress import Progress
from imds.shard.aof import AofError
from imds.shard.examine import LogReport, examine
from imds.shard.manifest import Manifest, read_manifest, write_manifest
from imds.shard.record import HEADER, each_effect
from imds.shard.segment import segment_name
from imds.storage import Storage, UntouchedStorage, copy_file, read_file, remove_tree, replace_file


@dataclass(frozen=True)
class Until:
    """How much of the backup: up to a time in microseconds since 1970, and up to numbers by shard."""

    time: int | None = None
    numbers: tuple[tuple[int, int], ...] = ()

    def number(self, shard: int) -> int | None:
        """Return the last number of a shard, None for no limit."""
        return dict(self.numbers).get(shard)

    def limits(self, shard: int) -> bool:
        """Whether anything of the shard may have to be left out."""
        return self.time is not None or self.number(shard) is not None


def restore(source: Path, target: Path, until: Until, storage: Storage | None = None) -> list[Part]:
    """Make the data directory ``target``, which must be empty or not be there, of the backup ``source``.

    Raises DataDirError, AofError, OSError: then nothing is left of it.
    """
    storage = storage or Storage()
    found = read_backup(storage, source)
    if unknown := [shard for shard, _ in until.numbers if shard >= len(found.shards)]:
        raise DataDirError(f"{source} has {len(found.shards)} shards, none with number {unknown[0]}")
    if until.time is not None and until.time > parse_time(found.made):
        raise DataDirError(f"{source} was made at {found.made}, and knows nothing of later")
    make_empty(storage, target)
    try:
        return _restore(source, target, found, until, storage)
    except BaseException:
        with suppress(OSError):
            remove_tree(storage, target)
        raise


def check(source: Path) -> list[Part]:
    """Load a backup and compare it with what it is said to hold; change nothing. Raises as restore does."""
    storage = UntouchedStorage()
    found = read_backup(storage, source)
    datadir, parts = DataDir.unlocked(source, storage), []
    with Progress(f"trying {source}", sum(part.bytes for part in found.shards)) as progress:
        for said in found.shards:
            directory = datadir.shard_dir(said.shard)
            part = trial(storage, directory, said.shard, found.generation, progress.advance)
            _compare(source, said, part)
            parts.append(part)
    return parts


def _compare(source: Path, said: Part, part: Part) -> None:
    if said != part:
        raise DataDirError(
            f"{source}: shard {said.shard} is not what it was when the backup was made: "
            f"{part.keys} keys, digest {part.digest}; it had {said.keys} keys, digest {said.digest}"
        )


def _restore(source: Path, target: Path, found: Backup, until: Until, storage: Storage) -> list[Part]:
    origin, parts = DataDir.unlocked(source, storage), []
    shards = [origin.shard_dir(shard) for shard in range(origin.shards)]
    make_shard_dirs(storage, target, origin.generation, [path.name for path in shards])
    size = sum(part.bytes for part in found.shards)
    with Progress(f"copying {source}", size) as progress:
        for shard, path in enumerate(shards):
            copy = target / path.relative_to(source)
            _copy_log(storage, path, copy, found.shards[shard], origin.generation, until, progress.advance)
    with Progress(f"trying {target}", size) as progress:
        for said, path in zip(found.shards, shards, strict=True):
            copy = target / path.relative_to(source)
            part = trial(storage, copy, said.shard, origin.generation, progress.advance)
            if not until.limits(said.shard):
                _compare(source, said, part)
            parts.append(part)
    replace_file(storage, target / MANIFEST, read_file(storage, source / MANIFEST))
    return parts


def _copy_log(
    storage: Storage,
    source: Path,
    target: Path,
    said: Part,
    generation: int,
    until: Until,
    step: Callable[[int], object],
) -> None:
    """Copy a shard's log, up to where it is limited."""
    manifest = read_manifest(storage, source, shard=said.shard, generation=generation)
    names, end = manifest.names(), None
    if until.limits(said.shard):
        cut = _find_cut(storage, source, said, generation, until)
        if cut is not None:
            names, end = names[: names.index(cut[0]) + 1], cut[1]
    for name in names:
        size = storage.size(source / name)
        copy_file(storage, source / name, target / name, end if end and name == names[-1] else size, step)
    segments = tuple(number for number in manifest.segments if segment_name(number) in names)
    write_manifest(storage, target, Manifest(said.shard, generation, manifest.base, segments))


def _find_cut(
    storage: Storage, source: Path, said: Part, generation: int, until: Until
) -> tuple[str, int] | None:
    """Return in which segment, and where in it, a log has to end; None if all of it may stay.

    Raises DataDirError where that is before what it begins with.
    """
    report, number = LogReport(source), until.number(said.shard)
    if number is not None and number >= said.next_number:
        raise DataDirError(f"shard {said.shard} ends with number {said.next_number - 1}, before {number}")
    timed = False
    for piece in examine(storage, report, said.shard, generation):
        one = report.files[-1]
        if not one.whole or report.problem:
            raise DataDirError(f"{one.path} is damaged: {report.problem or one.header or piece.reason}")
        in_base = one.path.suffix == ".base"
        if piece.kind == "clock" and until.time is not None and piece.value > until.time:
            if in_base or (generation > 1 and not timed):
                raise DataDirError(f"shard {said.shard} begins at {time_of(piece.value)}, which is later")
            return one.path.name, piece.start
        timed = timed or piece.kind == "clock"
        if piece.kind == "records" and until.time is not None and not timed:
            raise DataDirError(f"shard {said.shard} begins with records of which no time is known")
        if piece.kind == "records" and number is not None and not in_base:
            for found, start, _ in each_effect(piece.records):
                if found > number:
                    return one.path.name, piece.start + start - HEADER.size
        if piece.kind == "end" and in_base and number is not None and number < report.last:
            raise DataDirError(f"shard {said.shard} begins with number {report.last}, which is later")
    return None


# -- the command -----------------------------------------------------------------------------------------


def parse_time(text: str) -> int:
    """Return microseconds since 1970 of a time as ISO 8601; local time if it has no offset."""
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp() * 1e6)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 2026-11-25T11:02:35Z") from None


def parse_number(text: str) -> tuple[int, int]:
    """Return (shard, number) of ``SHARD=NUMBER``."""
    shard, _, number = text.partition("=")
    if not (shard.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not SHARD=NUMBER")
    return int(shard), int(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``imds-restore``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="imds-restore",
        description="Make a data directory of a backup, and try it: every log is loaded as a start would, "
        "and is compared with what the backup had when it was made. With --time or --number it ends earlier, "
        "which is possible back to the last rewrite of each log before the backup.",
        epilog="Exit code: 0 done, 1 could not, and nothing is left of it, 2 usage.",
    )
    parser.add_argument("--version", action="version", version=f"imds-restore {__version__}")
    parser.add_argument("backup", type=Path, metavar="BACKUP", help="what imds-backup has made")
    parser.add_argument("--dir", type=Path, default=Path(DEFAULT_DIR), help="new directory (%(default)s)")
    parser.add_argument("--check", action="store_true", help="only try the backup itself")
    parser.add_argument(
        "--time",
        type=parse_time,
        metavar="TIME",
        help="keep what was written before, and at most a second more; ISO 8601, local or with an offset",
    )
    parser.add_argument(
        "--number",
        type=parse_number,
        metavar="SHARD=NUMBER",
        action="append",
        default=[],
        help="the last record of a shard to keep, as imds-aof dump shows it; may be given for several",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if args.check:
            parts = check(args.backup)
        else:
            parts = restore(args.backup, args.dir, Until(args.time, tuple(args.number)))
    except (AofError, DataDirError, OSError) as error:
        print(f"imds-restore: {error}", file=sys.stderr)
        return 1
    where = args.backup if args.check else args.dir
    print("\n".join([*lines(parts), f"{where}: {sum(part.keys for part in parts)} keys, tried"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
