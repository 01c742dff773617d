"""Which files are a shard's log: a base or none, then the segments after it.

::

    shard-000/manifest.json       replaced in one step; says which files count
              00000005.base       what segments 1 to 5 amount to
              00000006.aof        closed
              00000007.aof        the one that grows
              manifest.json.new   a replacement that was not finished
              suspect             there as long as the last failed sync is not made good (imds/shard/aof.py)
              00000007.aof.torn-4711   what a crash left half-written at byte 4711, kept for a look

    {"format": 1, "shard": 0, "generation": 1,
     "base": {"number": 5, "sequence": 4712, "records": 90, "bytes": 8811}, "segments": [6, 7],
     "checksum": "0123456789abcdef"}

``sequence`` is the number of the first record after the base. ``checksum`` is xxh64 of the line without it.

What always holds:

* Writing a new file, fsync, rename, fsync of the directory replaces the manifest, and nothing else does.
  Every file that it names, name and all, was synced before. After an error only :func:`read_manifest` can
  tell which of the two is in force, and only after a further fsync of the directory is that so for good.
* A segment gets its first record only after a manifest that names it is on the disk. So a later segment with
  records that the manifest does not name means that the manifest is not the newest one: that is refused.
* The manifest is one exact text: a bit that is wrong in it is noticed, wherever it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh64_hexdigest

from imds.shard.segment import (
    BASE_NAME,
    SEGMENT_HEADER,
    SEGMENT_NAME,
    AofDamaged,
    base_name,
    create_segment,
    discard,
    segment_name,
)
from imds.storage import Storage, read_file, replace_file

MANIFEST = "manifest.json"
NEW_MANIFEST = "manifest.json.new"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Base:
    """One base: the ``records`` in its file stand for all effects numbered below ``sequence``."""

    number: int
    sequence: int
    records: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one shard's log. ``segments`` are numbers, rising by one, the growing one last."""

    shard: int
    generation: int
    base: Base | None
    segments: tuple[int, ...]

    @property
    def last(self) -> int:
        """The number of the segment that grows."""
        return self.segments[-1]

    def names(self) -> list[str]:
        """Return the names of the files, in the order in which they are read."""
        base = [base_name(self.base.number)] if self.base else []
        return base + [segment_name(number) for number in self.segments]

    def encode(self) -> bytes:
        """Return the manifest as text."""
        base = self.base and {name: getattr(self.base, name) for name in Base.__slots__}
        fields = {
            "format": FORMAT,
            "shard": self.shard,
            "generation": self.generation,
            "base": base,
            "segments": list(self.segments),
        }
        checksum = xxh64_hexdigest(json.dumps(fields).encode())
        return json.dumps({**fields, "checksum": checksum}).encode() + b"\n"


def create_log(storage: Storage, directory: Path, *, shard: int, generation: int) -> None:
    """Make the log of a new shard in its empty directory, synced. Raises OSError."""
    create_segment(storage, directory, shard=shard, generation=generation)
    write_manifest(storage, directory, Manifest(shard, generation, None, (1,)))


def write_manifest(storage: Storage, directory: Path, manifest: Manifest) -> None:
    """Replace the manifest: the commit point of whatever made its files.

    Raises OSError; then the old one or the new one is in force.
    """
    discard(storage, directory / NEW_MANIFEST)  # never written over: its pages may be what a failed sync left
    replace_file(storage, directory / MANIFEST, manifest.encode())


def read_manifest(storage: Storage, directory: Path, *, shard: int, generation: int) -> Manifest:
    """Return the manifest in force. Raises AofDamaged unless it is whole and of this shard, OSError."""
    path = directory / MANIFEST
    try:
        text = read_file(storage, path)
    except FileNotFoundError:
        raise AofDamaged(path, None, "is missing: nobody knows which files hold the data") from None
    manifest = _decode(path, text)
    if (manifest.shard, manifest.generation) != (shard, generation):
        raise AofDamaged(
            path,
            None,
            f"belongs to shard {manifest.shard} of generation {manifest.generation}, "
            f"expected shard {shard} of generation {generation}",
        )
    return manifest


def _decode(path: Path, text: bytes) -> Manifest:
    try:
        fields: Any = json.loads(text)
        if isinstance(fields, dict) and type(fields["format"]) is int and fields["format"] > FORMAT:
            raise AofDamaged(path, None, f"has format {fields['format']}, this imds reads up to {FORMAT}")
        base = fields["base"]
        manifest = Manifest(
            fields["shard"],
            fields["generation"],
            None if base is None else Base(**base),
            tuple(fields["segments"]),
        )
        if manifest.encode() != text:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise AofDamaged(path, None, "is not what was written there") from None
    return manifest


def unnamed_files(storage: Storage, directory: Path, manifest: Manifest) -> list[str]:
    """Return the names of files of ours that the manifest does not name: what a rewrite left or replaced.

    Raises AofDamaged where a file that it names is missing, and where it is not the newest manifest.
    """
    names = storage.listdir(directory)
    for name in manifest.names():
        if name not in names:
            raise AofDamaged(
                directory / name, None, f"is missing: {directory / MANIFEST} says that it holds data"
            )
    unnamed = []
    for name in names:
        segment = SEGMENT_NAME.fullmatch(name)
        if name in manifest.names() or not (segment or BASE_NAME.fullmatch(name) or name == NEW_MANIFEST):
            continue
        if segment and int(segment[1]) > manifest.last:
            size = storage.size(directory / name)
            if size > SEGMENT_HEADER.size:
                raise AofDamaged(
                    directory / name,
                    None,
                    f"holds data, and {directory / MANIFEST} does not name it: that is not the newest one",
                )
        unnamed.append(name)
    return unnamed
