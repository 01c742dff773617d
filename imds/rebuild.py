"""A data directory whose ``manifest.json`` is gone or wrong: what ``imds-aof repair`` makes of it.

The logs know their generation and shard. What only the manifest knew is the hash seed, by which keys are
spread, and which generation is the data. So:

* Where the damaged text still has a seed, and every key of every log belongs to its shard by it, the manifest
  is written anew with that seed, and nothing else changes. A wrong seed would need as many coincidences as
  there are keys.
* Otherwise a new seed is drawn, and all keys are moved, as to another number of shards (imds/reshard.py): to
  a new generation, which counts once the manifest names it.
* If several generations hold data, a move of keys was interrupted, and only a person can say which it is.

Whatever is changed is copied before. Interrupted, the directory is refused as before, or is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import randbits

from imds.datadir import (
    MANIFEST,
    DataDir,
    DataDirError,
    generation_name,
    generation_of,
    lock_directory,
    read_manifest,
    shard_name,
)
from imds.hashslots import SlotMap
from imds.logtools import copy_aside, copy_shard, log_bytes, salvaged, told
from imds.progress import Progress
from imds.reshard import ShardLogs
from imds.shard.aof import AofError
from imds.shard.examine import empty_store
from imds.shard.kernel import UnifiedStore
from imds.shard.store import effects
from imds.storage import Storage, UntouchedStorage, exists, read_file

Say = Callable[[str], object]

_SEED = re.compile(rb'"seed"\s*:\s*(\d{1,20})\b')


def problem(directory: Path) -> str | None:
    """Return what is wrong with the manifest of a data directory, None if nothing is, or it is none.

    Raises DataDirError for a manifest of a newer version: it is not damaged. OSError.
    """
    storage = Storage()
    if not exists(storage, directory) or not _numbers(directory, storage):
        return None
    if not exists(storage, directory / MANIFEST):
        return f"{directory / MANIFEST} is missing"
    try:
        read_manifest(directory / MANIFEST, storage)
    except DataDirError as error:
        if "reads formats up to" in str(error):
            raise
        return str(error)
    return None


def rebuild(directory: Path, *, generation: int | None, prefix: bool, dry_run: bool, say: Say) -> None:
    """Make the manifest anew of what the logs hold; with ``dry_run`` only say how.

    ``generation``: the one that is the data, where there are several. ``prefix``: of damaged logs only what
    is before the damage. Raises DataDirError, OSError.
    """
    storage = UntouchedStorage() if dry_run else Storage()
    with _locked(directory, storage):
        found = _generations(directory, storage)
        if not found:
            raise DataDirError(f"{directory} has no logs: there is nothing to make a manifest of")
        if generation is None and len(found) > 1:
            for number, shards in found.items():
                _describe(_view(directory, storage, number, SlotMap.even(shards, 0)), say)
            raise DataDirError(f"{directory} has generations {list(found)}: name one with --generation")
        number = max(found) if generation is None else generation
        if number not in found:
            raise DataDirError(f"{directory} has no generation {number}, there are {list(found)}")
        old = _view(directory, storage, number, SlotMap.even(found[number], 0))
        seed = _seed(old, prefix)
        if seed is not None:
            say(f"the seed of {MANIFEST} can still be read, and every key is where it belongs by it")
            if not dry_run:
                say(f"{MANIFEST} is copied to {copy_aside(old, directory / MANIFEST)}")
                old.commit(number, SlotMap.even(old.shards, seed))
                say(f"{MANIFEST} is written anew: generation {number}, {old.shards} shards")
            return
        say(f"the seed is lost: the keys of generation {number} get a new one, and move between its shards")
        if dry_run:
            _describe(old, say)
            return
        for shard in range(old.shards):
            say(f"shard {shard}: its files are copied to {copy_shard(old, shard)}")
        if exists(storage, directory / MANIFEST):
            say(f"{MANIFEST} is copied to {copy_aside(old, directory / MANIFEST)}")
        new = max(_numbers(directory, storage)) + 1
        keys = _move(old, new, SlotMap.even(old.shards, randbits(64)), prefix, say)
        say(f"{MANIFEST} is written anew: generation {new}, {old.shards} shards, {keys} keys")


@contextmanager
def _locked(directory: Path, storage: Storage) -> Iterator[None]:
    fd = lock_directory(directory, storage, 0.0)
    try:
        yield
    finally:
        storage.close(fd)


def _numbers(directory: Path, storage: Storage) -> list[int]:
    return sorted(filter(None, map(generation_of, storage.listdir(directory))))


def _generations(directory: Path, storage: Storage) -> dict[int, int]:
    """Return the number of shards of each generation that is there. Raises DataDirError if one is missing."""
    found = {}
    for number in _numbers(directory, storage):
        top = directory / generation_name(number)
        names = set(storage.listdir(top))
        if names and names != {shard_name(shard) for shard in range(len(names))}:
            raise DataDirError(f"{top} holds {sorted(names)}: a shard is missing, or something is not ours")
        if names:
            found[number] = len(names)
    return found


def _view(directory: Path, storage: Storage, generation: int, slots: SlotMap) -> DataDir:
    return DataDir(directory, -1, generation, slots, storage)


def _stores(old: DataDir, prefix: bool, say: Say) -> Iterator[tuple[int, UnifiedStore]]:
    """Yield what can be read of each shard."""
    shards = list(range(old.shards))
    with Progress(
        f"reading {old.path / generation_name(old.generation)}", log_bytes(old, shards)
    ) as progress:
        for shard in shards:
            store = empty_store()
            report = salvaged(old, shard, store, stop_at_damage=prefix, step=progress.advance)
            if report.problem or report.lost or not all(one.whole for one in report.files):
                say(f"shard {shard}: damaged")
                for line in told(report):
                    say(line)
            yield shard, store


def _describe(old: DataDir, say: Say) -> None:
    for shard, store in _stores(old, False, say):
        say(f"generation {old.generation}, shard {shard}: {store.keys} keys, digest {store.digest():016x}")


def _seed(old: DataDir, prefix: bool) -> int | None:
    """Return the seed that the damaged manifest has, if all keys are where they belong by it."""
    try:
        text = read_file(old.storage, old.path / MANIFEST)
    except FileNotFoundError:
        return None
    match = _SEED.search(text)
    if match is None or int(match[1]) >= 1 << 64:
        return None
    slots, keys = SlotMap.even(old.shards, int(match[1])), 0
    for shard, store in _stores(old, prefix, lambda line: None):
        for key, _, _ in store.entries():
            if slots.shard_of(key) != shard:
                return None
        keys += store.keys
    # With one shard every seed fits, and any is as good; otherwise a few keys prove nothing.
    enough = old.shards == 1 or old.shards ** min(keys, 64) >= 1 << 40
    return int(match[1]) if enough else None


def _move(old: DataDir, new: int, slots: SlotMap, prefix: bool, say: Say) -> int:
    """Spread what can be read over a new generation, and commit it; return the number of keys."""
    keys = 0
    try:
        old.make_generation(new, slots.shards)
        with ShardLogs(old, new, slots) as target:
            target.load(lambda records: None, lambda done: None)
            for _, store in _stores(old, prefix, say):
                keys += store.keys
                for key, value, when in store.entries():
                    for effect in effects(key, value, when):
                        target.add(key, effect)
    except (AofError, OSError) as error:
        raise DataDirError(f"{old.path}: cannot write generation {new}: {error}") from error
    old.commit(new, slots)
    return keys
