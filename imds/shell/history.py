"""The lines that were typed, in a file that is its owner's alone, and never a secret.

Kept out, of the file and of what the arrow keys bring back: ``auth`` and ``acl``, ``hello`` and ``config``
with a password, and lines that begin with a space. Kept out of the file: lines that begin with no
command's name, since one that was mistyped may be followed by a password.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from imds.commands import lookup
from imds.shell.line import split_line
from imds.storage import Storage, replace_file

LINES = 2000  # that are kept

_SECRET_COMMANDS = (b"auth", b"acl")
_MAY_HAVE_SECRETS = (b"hello", b"config")
_SECRET_WORD = re.compile(rb"auth|pass|secret|token|credential", re.IGNORECASE)


def default_path() -> Path | None:
    """Return where the history is: IMDS_HISTORY (None if that is empty), or the place for such files."""
    named = os.environ.get("IMDS_HISTORY")
    if named is not None:
        return Path(named) if named else None
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:  # who this is has no home
        return None
    return Path(state) / "imds" / "history"


def _words(line: str) -> list[bytes]:
    typed = line.encode(errors="surrogateescape")
    try:
        return split_line(typed)
    except ValueError:  # a quote that is not closed hides nothing
        return typed.replace(b"'", b" ").replace(b'"', b" ").split()


def secret(line: str) -> bool:
    """Whether a line may have a password in it, or its author wants it forgotten."""
    if line[:1].isspace():
        return True
    name, *arguments = _words(line) or [b""]
    if name.lower() in _MAY_HAVE_SECRETS:
        return any(_SECRET_WORD.search(argument) for argument in arguments)
    return name.lower() in _SECRET_COMMANDS


def _known(line: str) -> bool:
    words = _words(line)
    return bool(words) and (lookup(words[0]) is not None or words[0].lower() in (b"help", b"exit"))


class History:
    """The last lines, oldest first.

    A file that cannot be read or written does no harm: the lines are then kept for this session.
    """

    def __init__(self, path: Path | None) -> None:
        self.lines: list[str] = []
        self._path = path
        if path is None:
            return
        try:
            lines = path.read_bytes().decode(errors="surrogateescape").split("\n")[:-1]
        except OSError:
            return
        self.lines = lines[-LINES:]
        if len(lines) > 2 * LINES:
            try:
                replace_file(Storage(), path, self._bytes(self.lines), os.O_TRUNC)
            except OSError:
                pass

    def add(self, line: str) -> bool:
        """Keep a line, unless it is a secret; return whether it may be brought back. It has no newline."""
        if not line.strip() or secret(line):
            return False
        if self.lines and self.lines[-1] == line:
            return True
        self.lines.append(line)
        if self._path is not None and _known(line):
            try:
                self._append(self._path, line)
            except OSError:
                self._path = None  # once is enough to see that it does not work
        return True

    def _append(self, path: Path, line: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                os.fchmod(fd, 0o600)
            os.write(fd, self._bytes([line]))  # one call, so that several shells may share the file
        finally:
            os.close(fd)

    @staticmethod
    def _bytes(lines: list[str]) -> bytes:
        return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
