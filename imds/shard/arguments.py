"""How the text of an argument becomes a number, a bound or a choice; errors are in Redis' words."""

from __future__ import annotations

import re

from imds.shard.keyspace import Refused, error

SYNTAX = "ERR syntax error"
NO_INTEGER = "ERR value is not an integer or out of range"
NO_FLOAT = "ERR value is not a valid float"

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1

_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


def parse_integer(text: bytes) -> int | None:
    """Return the 64-bit integer that ``text`` is: no sign but ``-``, no leading zero, no blank; or None."""
    if not _INTEGER.fullmatch(text):
        return None
    number = int(text)
    return number if INT_MIN <= number <= INT_MAX else None


def integer(text: bytes, message: str = NO_INTEGER) -> int:
    """Return the integer, or refuse with ``message``."""
    number = parse_integer(text)
    if number is None:
        raise error(message)
    return number


def parse_score(text: bytes) -> float | None:
    """Return the number that ``text`` is for ``float()``, without its leniencies; None if it is none.

    Refused: surrounding whitespace, underscores, NaN.
    """
    try:
        score = float(text)
    except ValueError:
        return None
    if score != score or b"_" in text or text.strip() != text:
        return None
    return score


def score(text: bytes, message: str = NO_FLOAT) -> float:
    """Return the score, -0.0 as 0.0, or refuse with ``message``."""
    number = parse_score(text)
    if number is None:
        raise error(message)
    return number + 0.0


def score_bound(text: bytes) -> tuple[float, bool]:
    """Return a bound of a range, and whether ``(`` in front of it excludes it."""
    return score(text.removeprefix(b"("), "ERR min or max is not a float"), text.startswith(b"(")


def lex_bound(text: bytes, *, low: bool) -> bytes | None:
    """Return the least member that is inside (``low``), or the least one above.

    None stands for the end of all.
    """
    if text in (b"-", b"+"):
        return b"" if text == b"-" else None
    if text[:1] not in (b"[", b"("):
        raise error("ERR min or max not valid string range item")
    return text[1:] + b"\0" if text.startswith(b"(") is low else text[1:]


def syntax() -> Refused:
    """Return the refusal of what is in no form of the command."""
    return error(SYNTAX)
