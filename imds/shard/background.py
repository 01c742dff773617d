"""Slow calls of the shard's loop, made in a thread beside it, one at a time, and their ends told to it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

End = Callable[[BaseException | None], object]


class Background:
    """``fileno()`` becomes readable when the call is over; then :meth:`finish` has to be called."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._then: End | None = None
        self._error: BaseException | None = None

    def fileno(self) -> int:
        return self._read.fileno()

    def start(self, call: Callable[[], object], then: End) -> None:
        """Make the call; ``then`` gets the error that it has raised, or None, in the loop's thread."""
        assert self._then is None, "one at a time"
        self._then, self._error = then, None
        # A daemon: a disk that does not answer must not keep the process, and a kill at any time is allowed.
        Thread(target=self._run, name="background", args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._error = error
        with suppress(OSError):  # closed: nobody wants to know
            self._write.send(b"\0")

    def finish(self) -> None:
        """Tell the end to whoever waits for it, who may start the next call."""
        self._read.recv(1)
        then, self._then = self._then, None
        assert then is not None
        then(self._error)

    def close(self) -> None:
        """Give the descriptors back. A call that is being made goes on, and nobody hears of its end."""
        self._read.close()
        self._write.close()
