"""Mass insertion: lines of commands from a pipe, a window of them under way at a time.

::

    input   | answered | under way | read ahead | not read yet
    lines   1 ...      ^ the line to resume from

The rules that this file keeps:

* A window of lines is sent, and answered, before the next one goes out; meanwhile the next is read.
* All lines before the one to resume from are answered, whatever ends the load: an error, a lost connection,
  an interrupt, or, by way of the state file, the death of this process. Some lines from there on may have
  been carried out: at most a window of them, or those of the last second where only the state file is left.
  Loads of ``set`` and ``zadd`` lose nothing by doing them again.
* A state file names the input by a hash of its lines, so that no other input is resumed by it.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import xxhash

from imds.client import Client, ImdsError, Response
from imds.progress import Progress
from imds.protocol import ERROR
from imds.replies import to_frame
from imds.shell.line import quote, split_line
from imds.shell.options import EX_CONNECTION, EX_INTERRUPTED, EX_MISSING, EX_OK
from imds.shell.output import Form, dump_json, say, write
from imds.shell.prompt import leaves
from imds.storage import Storage, replace_file

WINDOW = 1000  # requests under way
EX_FAILED = EX_MISSING  # a line has failed

_WINDOW_BYTES = 1 << 20  # a window ends by these, too: long lines need no long window
_SAVE_EVERY = 1.0  # seconds between two writings of the state file


# A line's number, from 1, and a hash of all lines before it.
Place = tuple[int, int]


@dataclass(slots=True)
class Window:
    """Lines that are sent together, and where each stands."""

    frames: bytearray = field(default_factory=bytearray)
    places: list[Place] = field(default_factory=list)  # of each request
    failed: list[tuple[Place, str]] = field(default_factory=list)  # lines that are no request, and why
    end: Place = (1, 0)  # of the first line behind it
    read: int = 0  # bytes up to there


class Input:
    """The lines, as windows of at most ``size``; up to the first that is no request, if it is to stop."""

    def __init__(self, stream: IO[bytes], size: int, stop: bool) -> None:
        self._lines = iter(stream)
        self._size = size
        self._stop = stop
        self._hash = xxhash.xxh64()
        self._number = 1
        self._read = 0

    @property
    def place(self) -> Place:
        """Where the next line stands."""
        return self._number, self._hash.intdigest()

    def _take(self) -> Iterator[tuple[Place, bytes]]:
        for line in self._lines:
            place = self.place
            self._hash.update(line)
            self._read += len(line)
            self._number += 1
            yield place, line

    def skip(self, number: int) -> None:
        """Take the lines before ``number``. Raises ValueError if there are not so many."""
        lines = self._take()
        while self._number < number:
            if next(lines, None) is None:
                raise ValueError(f"the input has no line {number}; its last is {self._number - 1}")

    def windows(self) -> Iterator[Window]:
        """Yield the windows up to the end of the input, or a line that leaves."""
        lines = self._take()
        going = True
        while going:
            window = Window()
            going = self._fill(window, lines)
            window.end, window.read = self.place, self._read
            yield window

    def _fill(self, window: Window, lines: Iterator[tuple[Place, bytes]]) -> bool:
        """Fill a window with lines; return whether more may follow."""
        for place, line in lines:
            try:
                tokens = split_line(line)
                if leaves(tokens):
                    return False
                if tokens:
                    window.frames += to_frame(tuple(tokens))
                    window.places.append(place)
            except ValueError as error:
                window.failed.append((place, str(error)))
                if self._stop:
                    return False
            if len(window.places) >= self._size or len(window.frames) >= _WINDOW_BYTES:
                return True
        return False


class State:
    """The file that says where to resume. Without a path it says nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._saved = time.monotonic()

    def resume(self, lines: Input) -> None:
        """Take the lines that are done. Raises ValueError where the file or the input is not what it was."""
        if self._path is None or not self._path.exists():
            return
        try:
            found = json.loads(self._path.read_bytes())
            place = int(found["line"]), int(found["digest"], 16)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._path} is no state file") from None
        lines.skip(place[0])
        if lines.place != place:
            raise ValueError(f"the input's lines before {place[0]} are not those that {self._path} is about")

    def save(self, place: Place, now: bool = False) -> None:
        """Note that all lines before ``place`` are answered; on the disk within a second, or ``now``."""
        if self._path is not None and (now or time.monotonic() >= self._saved + _SAVE_EVERY):
            found = {"line": place[0], "digest": f"{place[1]:016x}"}
            replace_file(Storage(), self._path, json.dumps(found).encode() + b"\n", os.O_TRUNC)
            self._saved = time.monotonic()

    def remove(self) -> None:
        """All lines are done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Load:
    """One load; :meth:`run` does it."""

    def __init__(
        self, client: Client[bytes], *, window: int, stop: bool, resume_from: int, state: Path | None
    ) -> None:
        self._client = client
        self._size = window
        self._stop = stop
        self._resume_from = resume_from
        self._state = State(state)
        self._under_way: tuple[Window, Future[list[Response]]] | None = None
        self._commands = 0  # that were answered
        self._failed = 0  # lines
        self._place: Place = (1, 0)  # all lines before it are answered

    def run(self, stream: IO[bytes], form: Form) -> int:
        """Load the lines of ``stream`` and return the exit code.

        Raises ValueError where it cannot be resumed, OSError of the state file.
        """
        start = time.monotonic()
        lines = Input(stream, self._size, self._stop)
        self._state.resume(lines)
        lines.skip(self._resume_from)
        self._place = lines.place
        ended, code = "", EX_OK
        with Progress("loading", _size_of(stream)) as progress, ThreadPoolExecutor(1) as sender:
            try:
                if not self._windows(lines, sender, progress):
                    ended = "stopped"
            except KeyboardInterrupt:
                ended, code = "interrupted", EX_INTERRUPTED
            except ImdsError as error:
                ended, code = str(error), EX_CONNECTION
        if ended:
            self._state.save(self._place, now=True)
            number = self._place[0]
            where = f"the lines before {number} are done, --resume-from {number} goes on there"
            print(f"imds-cli: {ended}; {where}", file=sys.stderr)
        else:
            self._state.remove()
        self._report(time.monotonic() - start, form)
        return code or (EX_FAILED if self._failed else EX_OK)

    def _windows(self, lines: Input, sender: ThreadPoolExecutor, progress: Progress) -> bool:
        """Send window after window; return whether all lines are done.

        Raises ImdsError, KeyboardInterrupt.
        """
        try:
            for window in lines.windows():
                if not self._settle(progress):
                    return False
                self._under_way = window, sender.submit(self._exchange, window)
            return self._settle(progress)
        except KeyboardInterrupt:
            self._settle(progress)  # which takes no longer than the client waits
            raise

    def _exchange(self, window: Window) -> list[Response]:
        return self._client.exchange(window.frames, len(window.places)) if window.places else []

    def _settle(self, progress: Progress) -> bool:
        """Wait for the window under way, report its failures, and return whether to go on."""
        if self._under_way is None:
            return True
        window, future = self._under_way
        replies = future.result()
        self._under_way = None
        failed = window.failed
        for place, reply in zip(window.places, replies, strict=True):
            if reply.status == ERROR:
                failed.append((place, reply.payload.decode(errors="surrogateescape")))
        failed.sort()
        self._commands += len(replies)
        self._failed += len(failed)
        for (number, _), text in failed:
            progress.note(f"imds-cli: line {number}: {quote(text.encode(errors='surrogateescape'))}")
        progress.update(window.read)
        if failed and self._stop:
            self._place = failed[0][0]
            return False
        self._place = window.end
        self._state.save(self._place)
        return True

    def _report(self, passed: float, form: Form) -> None:
        number = self._place[0]
        if form is Form.JSON:
            found = {"commands": self._commands, "failed": self._failed, "seconds": round(passed, 3)}
            write(dump_json(found | {"next_line": number}) + b"\n")
        else:
            rate = self._commands / max(passed, 1e-9)
            say(f"{self._commands:,} commands, {self._failed:,} failed lines, {passed:.1f} s, {rate:,.0f}/s")


def _size_of(stream: IO[bytes]) -> int | None:
    """Return how many bytes there are to read, or None where that cannot be known."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
