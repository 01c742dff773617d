"""Reply frames that the router makes by itself."""

from __future__ import annotations

from collections.abc import Iterable

from imds.commands import WRONG_ARITY as _WRONG_ARITY
from imds.protocol import LIST, MISSING, OK, encode_error, encode_list, encode_response

DONE = encode_response(OK, b"OK")
NONE = encode_response(MISSING)
QUEUED = encode_response(OK, b"QUEUED")

WRONG_ARITY = encode_error(_WRONG_ARITY)
SYNTAX_ERROR = encode_error("ERR syntax error")
NOT_AN_INTEGER = encode_error("ERR value is not an integer or out of range")


def text(payload: str | bytes) -> bytes:
    """Return the reply frame of a text."""
    return encode_response(OK, payload.encode() if isinstance(payload, str) else payload)


def number(value: int) -> bytes:
    """Return the reply frame of a whole number."""
    return encode_response(OK, b"%d" % value)


def listed(items: Iterable[bytes | str | int | None]) -> bytes:
    """Return the reply frame of a list."""
    return encode_response(LIST, encode_list(_bytes(item) for item in items))


def _bytes(item: bytes | str | int | None) -> bytes | None:
    if item is None or isinstance(item, bytes):
        return item
    return item.encode() if isinstance(item, str) else b"%d" % item


def unknown_subcommand(command: str, word: bytes) -> bytes:
    """Return the error for a second word that a command does not have."""
    shown = word[:64].decode(errors="replace")
    return encode_error(f"ERR unknown subcommand '{shown}'. Try {command.upper()} HELP.")
