"""What ``imds-aof`` does with the logs of a directory that no server has: check, repair, stat, dump, digest.

Only ``repair`` changes anything, and only after it has copied what it changes. The others work on the disk
through UntouchedStorage: ``check`` is the very load that the next start would do, without its effects.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from imds.datadir import MANIFEST, DataDir, DataDirError, generation_of, shard_name
from imds.progress import Progress
from imds.protocol import U32, split_request
from imds.shard.aof import SUSPECT, Aof, AofDamaged
from imds.shard.examine import LogReport, Piece, empty_store, examine
from imds.shard.kernel import UnifiedStore
from imds.shard.manifest import Manifest, unnamed_files, write_manifest
from imds.shard.record import each_effect
from imds.shard.rewrite import write_base
from imds.shard.segment import BASE_NAME, SEGMENT_NAME, create_segment
from imds.storage import Storage, UntouchedStorage, copy_file, exists

log = logging.getLogger(__name__)

REPAIRED = "repaired"  # the directory for copies of what was repaired, in the data directory


@contextmanager
def opened(directory: Path, storage: Storage | None = None) -> Iterator[DataDir]:
    """Open a data directory that exists; without ``storage`` nothing is changed. Raises DataDirError."""
    storage = storage or UntouchedStorage()
    if not exists(storage, directory / MANIFEST):
        names = storage.listdir(directory) if exists(storage, directory) else []
        hint = "; its logs are there: see imds-aof repair" if any(map(generation_of, names)) else ""
        raise DataDirError(f"{directory} is no data directory: it has no {MANIFEST}{hint}")
    logger = logging.getLogger("imds.datadir")
    with quiet(logger), DataDir.open(directory, storage=storage) as datadir:
        yield datadir


@contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    """What is loaded here is no server's: what a start would say of it is not said."""
    old, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = old


def chosen(datadir: DataDir, shard: int | None) -> list[int]:
    """Return the shards to work on: that one, or all. Raises DataDirError if there is no such shard."""
    if shard is None:
        return list(range(datadir.shards))
    if shard >= datadir.shards:
        raise DataDirError(f"{datadir.path} has {datadir.shards} shards, from 0 to {datadir.shards - 1}")
    return [shard]


def log_bytes(datadir: DataDir, shards: list[int]) -> int:
    """Return how many bytes the logs of these shards have, roughly: of all files in their directories."""
    storage, size = datadir.storage, 0
    for directory in map(datadir.shard_dir, shards):
        for name in storage.listdir(directory):
            if name.endswith((".aof", ".base")):
                with suppress(FileNotFoundError):  # it was just replaced
                    size += storage.size(directory / name)
    return size


# -- loading without a trace -----------------------------------------------------------------------------


@dataclass
class Loaded:
    """What loading a shard's log would come to."""

    shard: int
    store: UnifiedStore
    records: int = 0
    sequence: int = 1  # of the next record
    clock: int = 0
    bytes: int = 0  # read, without room and torn tail
    torn_bytes: int = 0
    suspect: bool = False
    damage: AofDamaged | None = None
    cut: list[Path] = field(default_factory=list)  # files that would lose a torn tail


def load(datadir: DataDir, shard: int, step: Callable[[int], object]) -> Loaded:
    """Load a shard's log as a start would, and change nothing; ``step`` gets bytes as they are read."""
    storage = UntouchedStorage()
    aof = Aof(
        datadir.shard_dir(shard), shard=shard, generation=datadir.generation, policy="no", storage=storage
    )
    found = Loaded(shard, empty_store())
    try:
        with quiet(logging.getLogger("imds.shard.aof")):
            for done, _total, records in aof.load(found.store.replay):
                step(done - found.bytes)
                found.bytes, found.records = done, records
    except AofDamaged as error:
        found.damage = error
    finally:
        aof.close()
    found.sequence, found.clock = aof.sequence, aof.clock
    found.torn_bytes, found.suspect = aof.torn_bytes, aof.suspect
    found.cut = [path for what, path in storage.changes if what == "cut"]
    return found


def load_all(datadir: DataDir, shards: list[int], label: str) -> Iterator[Loaded]:
    """Load one shard after the other, with a progress bar."""
    with Progress(label, log_bytes(datadir, shards)) as progress:
        for shard in shards:
            yield load(datadir, shard, progress.advance)


def time_of(clock: int) -> str:
    """Return a log's time as text, in UTC; a dash where it has none."""
    if not clock:
        return "-"
    return datetime.fromtimestamp(clock / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- check ---------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What ``check`` says: lines to read, and whether a start would refuse, or mend something itself."""

    lines: list[str]
    damaged: bool = False
    mended: bool = False


def check(directory: Path, shard: int | None) -> Verdict:
    """Say what the next start would find. Raises DataDirError, OSError."""
    verdict = Verdict([])
    with opened(directory) as datadir:
        for found in load_all(datadir, chosen(datadir, shard), f"checking {directory}"):
            verdict.lines += _verdict(datadir, found, verdict)
    return verdict


def _verdict(datadir: DataDir, found: Loaded, verdict: Verdict) -> Iterator[str]:
    name = f"shard {found.shard}"
    if found.damage is None:
        yield (
            f"{name}: {found.records} records, {found.store.keys} keys, {found.bytes} bytes, "
            f"next number {found.sequence}, last time {time_of(found.clock)}"
        )
        if found.torn_bytes:
            verdict.mended = True
            files = ", ".join(path.name for path in reversed(found.cut)) or "its last file"
            yield f"{name}: torn tail of {found.torn_bytes} bytes: a start saves it and cuts {files}"
        if found.suspect:
            verdict.mended = True
            yield f"{name}: a sync has failed: a start writes all of its data to new files"
        return
    verdict.damaged = True
    yield f"{name}: DAMAGED, a start would refuse it: {found.damage}"
    yield from told(salvaged(datadir, found.shard, None, stop_at_damage=False))


def told(report: LogReport) -> Iterator[str]:
    """Say what is wrong with each file of a log, and what can be read around it."""
    if report.problem:
        yield f"  {report.problem}"
    for one in report.files:
        if one.missing:
            yield f"  {one.path.name}: is missing"
        if one.header:
            yield f"  {one.path.name}: {one.header}"
        for piece in one.damage:
            yield (
                f"  {one.path.name}: bytes {piece.start} to {piece.end} "
                f"({piece.end - piece.start}) cannot be read: {piece.reason}"
            )
    yield (
        f"  around that {report.records} records can be read, up to number {report.last}; at least "
        f"{report.lost} are lost, {report.unfit} do not follow without these"
    )


def _no_step(size: int) -> None:
    """Show nothing."""


def salvaged(
    datadir: DataDir,
    shard: int,
    store: UnifiedStore | None,
    *,
    stop_at_damage: bool,
    step: Callable[[int], object] = _no_step,
) -> LogReport:
    """Read all that can be read of a log."""
    report = LogReport(datadir.shard_dir(shard))
    for piece in examine(
        *(datadir.storage, report, shard, datadir.generation), store or empty_store(), stop_at_damage
    ):
        step(piece.end - piece.start)
    return report


# -- repair --------------------------------------------------------------------------------------------


def repair(
    directory: Path, shard: int | None, *, prefix: bool, dry_run: bool, say: Callable[[str], object]
) -> bool:
    """Make damaged logs loadable; return whether nothing is damaged now.

    What can be read is written to a new base; with ``prefix`` only what is before the first damage. All files
    of the shard are copied first. Interrupted, the old files or the new ones are in force, complete. Raises
    DataDirError, OSError.
    """
    with opened(directory, UntouchedStorage() if dry_run else Storage()) as datadir:
        healthy = True
        for found in list(load_all(datadir, chosen(datadir, shard), f"checking {directory}")):
            if found.damage is None:
                mends = found.torn_bytes or found.suspect
                say(f"shard {found.shard}: {'left to the next start, which mends it' if mends else 'whole'}")
                continue
            say(f"shard {found.shard}: {found.damage}")
            store = empty_store()
            size = log_bytes(datadir, [found.shard])
            with Progress(f"reading shard {found.shard}", size) as progress:
                report = salvaged(
                    *(datadir, found.shard, store),
                    stop_at_damage=prefix,
                    step=progress.advance,
                )
            for line in told(report):
                say(line)
            if prefix and any(one.path.suffix == ".base" and not one.whole for one in report.files):
                raise DataDirError(f"shard {found.shard}: its base is damaged: no earlier state can be read")
            kept = f"{store.keys} keys, " + ("as before the damage" if prefix else "of all that can be read")
            if dry_run:
                say(f"shard {found.shard}: would keep {kept}")
                healthy = False
                continue
            copy = copy_shard(datadir, found.shard)
            say(f"shard {found.shard}: its files are copied to {copy}")
            _write_anew(datadir, found.shard, store, report)
            say(f"shard {found.shard}: repaired, {kept}")
    return healthy


def _aside(datadir: DataDir, name: str) -> Path:
    """Return a new name for a copy."""
    storage, top = datadir.storage, datadir.path / REPAIRED
    if REPAIRED not in storage.listdir(datadir.path):
        storage.mkdir(top)
        storage.fsync_dir(datadir.path)
    number = 1
    while f"{name}.{number}" in storage.listdir(top):
        number += 1
    return top / f"{name}.{number}"


def copy_aside(datadir: DataDir, path: Path) -> Path:
    """Copy one file, synced; return where to."""
    storage, target = datadir.storage, _aside(datadir, path.name)
    copy_file(storage, path, target, storage.size(path), _no_step)
    storage.fsync_dir(target.parent)
    return target


def copy_shard(datadir: DataDir, shard: int) -> Path:
    """Copy all files of a shard, synced; return where to."""
    storage, source = datadir.storage, datadir.shard_dir(shard)
    target = _aside(datadir, f"{source.parent.name}-{shard_name(shard)}")
    storage.mkdir(target)
    files = [(path, storage.size(path)) for path in map(source.joinpath, storage.listdir(source))]
    with Progress(f"copying shard {shard}", sum(size for _, size in files)) as progress:
        for path, size in files:
            copy_file(
                *(storage, path, target / path.name, size),
                progress.advance,
            )
    storage.fsync_dir(target)
    storage.fsync_dir(target.parent)
    return target


def _write_anew(datadir: DataDir, shard: int, store: UnifiedStore, report: LogReport) -> None:
    """Put a new base and an empty segment in the place of a shard's log, and remove that."""
    storage, directory = datadir.storage, datadir.shard_dir(shard)
    names = storage.listdir(directory)
    found = [SEGMENT_NAME.fullmatch(name) or BASE_NAME.fullmatch(name) for name in names]
    number = max((int(one[1]) for one in found if one), default=0) + 1
    writing = write_base(
        *(storage, directory, store),
        shard=shard,
        generation=datadir.generation,
        number=number,
        sequence=report.last + 1,
        clock=report.clock,
    )
    try:
        while True:
            next(writing)
    except StopIteration as end:
        base = end.value
    create_segment(
        *(storage, directory), shard=shard, generation=datadir.generation, number=number + 1, sequence=0
    )
    manifest = Manifest(shard, datadir.generation, base, (number + 1,))
    write_manifest(storage, directory, manifest)
    for name in (*unnamed_files(storage, directory, manifest), *({SUSPECT} & set(names))):
        storage.unlink(directory / name)
    storage.fsync_dir(directory)


# -- stat and dump -------------------------------------------------------------------------------------


def stat(directory: Path, shard: int | None) -> list[dict[str, Any]]:
    """Return what the logs hold, one row for each shard. Raises DataDirError, OSError."""
    rows = []
    with opened(directory) as datadir:
        shards = chosen(datadir, shard)
        with Progress(f"reading {directory}", log_bytes(datadir, shards)) as progress:
            for index in shards:
                store, commands = empty_store(), Counter[str]()
                report = LogReport(datadir.shard_dir(index))
                for piece in examine(datadir.storage, report, index, datadir.generation, store):
                    commands.update(_names(piece))
                    progress.advance(piece.end - piece.start)
                rows.append(_row(index, report, store, commands))
    return rows


def _names(piece: Piece) -> Iterator[str]:
    for _, start, end in each_effect(piece.records):
        size = U32.unpack_from(piece.records, start + 4)[0]
        yield bytes(piece.records[start + 8 : min(end, start + 8 + size)]).decode("ascii", "replace")


def _row(shard: int, report: LogReport, store: UnifiedStore, commands: Counter[str]) -> dict[str, Any]:
    return {
        "shard": shard,
        "keys": store.keys,
        "records": report.records,
        "effects": dict(sorted(commands.items())),
        "next_number": report.last + 1,
        "lost": report.lost,
        "unnamed": report.unnamed,
        "problem": report.problem,
        "files": [
            {
                "name": one.path.name,
                "bytes": one.size,
                "records": one.records,
                "first_number": one.first,
                "last_number": one.last,
                "synced_bytes": one.marked,
                "first_time": time_of(one.times[0]) if one.times else "-",
                "last_time": time_of(one.times[-1]) if one.times else "-",
                "whole": one.whole,
            }
            for one in report.files
        ],
    }


def stat_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the same as a table."""
    for row in rows:
        effects = ", ".join(f"{name} {count}" for name, count in row["effects"].items())
        yield f"shard {row['shard']}: {row['keys']} keys of {row['records']} records ({effects or 'none'})"
        yield (
            f"  {'file':<14} {'bytes':>12} {'records':>10} {'numbers':>21} "
            f"{'first time':>20} {'last time':>20}"
        )
        for one in row["files"]:
            numbers = f"{one['first_number']} to {one['last_number']}" if one["records"] else "-"
            yield (
                f"  {one['name']:<14} {one['bytes']:>12} {one['records']:>10} {numbers:>21} "
                f"{one['first_time']:>20} {one['last_time']:>20}{'' if one['whole'] else '  DAMAGED'}"
            )
        for name in row["unnamed"]:
            yield f"  {name:<14} is not named by the manifest: a start removes it"
        if row["problem"]:
            yield f"  {row['problem']}"


def dump(directory: Path, shard: int | None, first: int, last: int | None, out: TextIO) -> bool:
    """Write every record as a line: shard, file, offset, number, command; return whether all was whole.

    Of those numbered ``first`` to ``last``; those of a base are numbered from 1 and shown in any case.
    """
    whole = True
    with opened(directory) as datadir, ExitStack() as stack:
        shards, step = chosen(datadir, shard), _no_step
        if not out.isatty():  # otherwise the lines themselves show it
            step = stack.enter_context(Progress(f"reading {directory}", log_bytes(datadir, shards))).advance
        for index in shards:
            report = LogReport(datadir.shard_dir(index))
            for piece in examine(datadir.storage, report, index, datadir.generation):
                step(piece.end - piece.start)
                one = report.files[-1]
                where = f"{index} {one.path.name}"
                if piece.kind == "records":
                    for number, start, end in each_effect(piece.records):
                        in_base = one.path.suffix == ".base"
                        if in_base or (first <= number and (last is None or number <= last)):
                            tokens, _ = split_request(piece.records[start:end])
                            shown = " ".join(map(_shown, tokens))
                            offset = piece.start + start - 20
                            out.write(f"{where} {offset} {'base' if in_base else number} {shown}\n")
                elif piece.kind == "clock":
                    out.write(f"{where} {piece.start} # {time_of(piece.value)}\n")
                elif piece.kind == "damage":
                    whole = False
                    out.write(f"{where} {piece.start} # {piece.end - piece.start} bytes: {piece.reason}\n")
                elif piece.kind == "end" and (one.missing or one.header):
                    whole = False
                    out.write(f"{where} 0 # {one.header or 'is missing'}\n")
    return whole


def _shown(token: bytes) -> str:
    """Return a token as ``imds-cli`` takes it: in quotes where that is needed, escaped."""
    text = token.decode("ascii", "replace")
    if token and text.isprintable() and token.isascii() and not set(text) & set(" \"'\\"):
        return text
    return json.dumps(token.decode("latin-1")).replace("\\u00", "\\x")


# -- digest --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """The data of one shard: how many keys, and 64 bits that are equal where the data is."""

    shard: int
    keys: int
    digest: int
    next_number: int


def digests(directory: Path) -> list[Digest]:
    """Return one for each shard of a directory. Raises DataDirError for a damaged log, OSError."""
    found = []
    with opened(directory) as datadir:
        for one in load_all(datadir, chosen(datadir, None), f"reading {directory}"):
            if one.damage is not None:
                raise DataDirError(str(one.damage))
            found.append(Digest(one.shard, one.store.keys, one.store.digest(), one.sequence))
    return found


def total(found: list[Digest]) -> tuple[int, int]:
    """Return keys and digest of all shards together: the same however the keys are spread."""
    return sum(one.keys for one in found), sum(one.digest for one in found) % (1 << 64)
