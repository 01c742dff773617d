"""How far a long job has come: a bar on a terminal, a line in the log every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from time import monotonic
from typing import TextIO

log = logging.getLogger(__name__)

_REDRAW = 0.1  # seconds between two looks of the bar
_LOG_EVERY = 5.0  # seconds between two lines in a log: a short job leaves none
_BAR = 30  # characters


def amount(size: float) -> str:
    """Return a number of bytes as a person reads it: ``3.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class Progress:
    """Reports on ``label``, a job of ``total`` bytes. Use with ``with``, call :meth:`update` at will.

    ``shown`` writes an amount, where it is not one of bytes. A ``total`` of None is not known: then there
    is no bar, but how much is done.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = monotonic,
        shown: Callable[[float], str] = amount,
    ) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._shown = shown
        self._stream = stream or sys.stderr
        self._clock = clock
        self._bar = self._stream.isatty()
        self._every = _REDRAW if self._bar else _LOG_EVERY
        self._start = clock()
        self._next = self._start + self._every
        self._width = 0  # of what the bar's line shows

    def update(self, done: int) -> None:
        """Say that ``done`` bytes of the total are done. Cheap: most calls only look at the clock."""
        self.done = done
        if self._clock() >= self._next:
            self._report()

    def advance(self, size: int) -> None:
        """Say that ``size`` bytes more are done."""
        self.update(self.done + size)

    def note(self, text: str) -> None:
        """Write a line of ``text`` to the stream, above the bar if there is one."""
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._report()
            self._stream.write("\n")
            self._stream.flush()

    def _report(self) -> None:
        now = self._clock()
        self._next = now + self._every
        rate = self.done / max(now - self._start, 1e-9)
        bar = ""
        if self.total is None:
            figures = f"{self._shown(self.done)}  {self._shown(rate)}/s"
        else:
            part = min(self.done / self.total, 1.0) if self.total else 1.0
            left = f"{max(self.total - self.done, 0) / rate:.0f} s left" if rate else "-"
            figures = f"{part:4.0%}  {self._shown(rate)}/s  {left}"
            filled = round(part * _BAR)
            bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] "
        if self._bar:
            line = f"{self.label} {bar}{figures}"
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = len(line)
        else:
            log.info("%s: %s", self.label, figures.strip())
