r"""Patterns for keys, as Redis reads them.

``*`` any text, ``?`` any byte, ``[abc]`` ``[^a-z]`` one of a class, ``\x`` the byte x itself.

A pattern becomes a regular expression that never goes back behind a ``*`` once the text after it has been
found: what follows a further ``*`` cannot profit from a later place. So the cost is O(pattern x text),
whatever both are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache


def matcher(pattern: bytes) -> Callable[[bytes], object]:
    """Return a function that is true for what matches ``pattern`` as a whole."""
    return _compile(pattern).fullmatch


@lru_cache(maxsize=64)
def _compile(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(translate(pattern), re.DOTALL)


def translate(pattern: bytes) -> bytes:
    """Return the regular expression; it needs DOTALL."""
    runs = [b""]  # what stands between two *
    at, end = 0, len(pattern)
    while at < end:
        byte = pattern[at : at + 1]
        at += 1
        if byte == b"*":
            runs.append(b"")
        elif byte == b"?":
            runs[-1] += b"."
        elif byte == b"[":
            piece, at = _class(pattern, at)
            runs[-1] += piece
        else:
            if byte == b"\\" and at < end:
                byte = pattern[at : at + 1]
                at += 1
            runs[-1] += re.escape(byte)
    first, *rest = runs
    if not rest:
        return first
    *middle, last = rest
    return first + b"".join(b"(?>.*?%b)" % run for run in middle if run) + b".*" + last


def _class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """Return the class whose ``[`` stands before ``at``, and where it ends; the pattern's end ends it too."""
    end = len(pattern)
    negated = pattern[at : at + 1] == b"^"
    at += negated
    members: set[int] = set()
    while at < end and pattern[at] != ord("]"):
        if pattern[at] == ord("\\") and at + 1 < end:
            members.add(pattern[at + 1])
            at += 2
        elif at + 2 < end and pattern[at + 1] == ord("-"):
            low, high = sorted((pattern[at], pattern[at + 2]))
            members.update(range(low, high + 1))
            at += 3
        else:
            members.add(pattern[at])
            at += 1
    wanted = set(range(256)) - members if negated else members
    if not wanted:
        return b"(?!)", at + 1
    return b"[%b]" % b"".join(b"\\x%02x" % byte for byte in sorted(wanted)), at + 1
