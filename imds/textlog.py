"""The older server's log, one command a line: what it holds is appended to a data directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import BinaryIO

from imds.datadir import DataDir, DataDirError
from imds.progress import Progress
from imds.protocol import MAX_REQUEST, encode_request, split_request
from imds.reshard import ShardLogs
from imds.shard.record import each_effect

# Fields after the command's name. The last one is the rest of the line, spaces and all, where the text log
# has it so; a key never holds a space.
_FIELDS = {b"set": 2, b"del": 1, b"zadd": 3, b"zrem": 2}
_USAGE = {
    b"set": "SET key value",
    b"del": "DEL key",
    b"zadd": "ZADD key score member",
    b"zrem": "ZREM key member",
}


class BadLine(ValueError):
    """A line of the text log that is no command; the text says why."""


def parse_line(line: bytes) -> list[bytes]:
    """Return the tokens of one line of a text log, the name in small letters. Raises BadLine."""
    name, *rest = line.split(b" ", 1)
    name = name.lower()
    if name not in _FIELDS:
        raise BadLine(f"unknown command {_shown(name)}")
    fields = rest[0].split(b" ", _FIELDS[name] - 1) if rest else []
    if len(fields) < _FIELDS[name]:
        raise BadLine(f"too few fields, the rule is {_USAGE[name]}")
    if name == b"del" and b" " in fields[0]:
        raise BadLine(f"too many fields, the rule is {_USAGE[name]}")
    if name == b"zadd":
        fields[1] = _score(fields[1])
    if sum(map(len, fields)) > MAX_REQUEST - 64:  # the frame's own bytes are fewer than that
        raise BadLine(f"it is too long, the limit of a request is {MAX_REQUEST} bytes")
    return [name, *fields]


def _shown(text: bytes) -> str:
    """Return the start of ``text`` in quotes, safe for any terminal."""
    return repr(text[:32])[1:]


def _score(text: bytes) -> bytes:
    """Return a score as the server writes it. Raises BadLine for what the server would not take."""
    try:
        score = float(text)
        if isnan(score) or b"_" in text or text != text.strip():
            raise ValueError
    except ValueError:
        raise BadLine(f"score {_shown(text)} is not a number") from None
    return repr(score).encode()


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (number, line without its end, whether it is whole); memory stays bounded on any file."""
    number = 0
    while line := file.readline(MAX_REQUEST + 2):
        number += 1
        whole = line.endswith(b"\n") or len(line) < MAX_REQUEST + 2
        while not line.endswith(b"\n") and (more := file.readline(MAX_REQUEST)):
            whole = False
            line = more[-1:]
        yield number, line.removesuffix(b"\n").removesuffix(b"\r"), whole


class _Strings:
    """Which keys hold strings. A sorted-set command on one is an error, so it must not get into a log."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()

    def check(self, tokens: list[bytes]) -> None:
        """Follow one command. Raises BadLine if the server would have refused it."""
        name, key = tokens[0], tokens[1]
        if name == b"set":
            self._keys.add(key)
        elif name == b"del":
            self._keys.discard(key)
        elif key in self._keys:
            raise BadLine(f"key {_shown(key)} holds a string at this place")

    def replay(self, records: memoryview) -> None:
        """Follow the effects that a log holds already."""
        for _sequence, start, end in each_effect(records):
            tokens, _end = split_request(records[start:end])
            if tokens[0] in (b"set", b"del"):
                self.check(tokens)


def import_text(source: Path, directory: Path, shards: int | None) -> tuple[int, int, int]:
    """Append the commands of the text log ``source`` to a data directory.

    Return how many were imported and skipped, and the number of shards. Skipped lines are named on stderr.

    Killed in the middle, a part is imported, in the order of the lines.
    """
    done = skipped = 0
    with source.open("rb") as file, DataDir.open(directory, shards) as datadir:
        if shards not in (None, datadir.shards):
            raise DataDirError(
                f"{directory} has {datadir.shards} shards: leave out --shards {shards}; "
                "imds-router --shards changes the number"
            )
        strings = _Strings()
        with ShardLogs(datadir, datadir.generation, datadir.slots) as logs:
            logs.load(strings.replay, lambda done: None)
            with Progress(f"importing {source}", os.fstat(file.fileno()).st_size) as progress:
                for number, line, whole in _lines(file):
                    progress.update(file.tell())
                    if whole and not line.strip():
                        continue
                    try:
                        if not whole:
                            raise BadLine(f"it is too long, the limit of a request is {MAX_REQUEST} bytes")
                        tokens = parse_line(line)
                        strings.check(tokens)
                    except BadLine as error:
                        print(f"{source}:{number}: skipped: {error}", file=sys.stderr)
                        skipped += 1
                        continue
                    logs.add(tokens[1], encode_request(tokens))
                    done += 1
        count = datadir.shards
    return done, skipped, count
