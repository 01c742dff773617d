"""What every client has in common, without I/O: errors, how tokens are sent, how replies are read.

A reader of replies takes a :class:`Response` and returns what a typed method returns, raises what the server
said, or ImdsError for a reply that does not answer the command.
"""

from __future__ import annotations

import json
import re
from builtins import ConnectionError as BuiltinConnectionError
from builtins import TimeoutError as BuiltinTimeoutError
from typing import Any, AnyStr, Generic, NamedTuple, TypeVar, cast

from imds.protocol import (
    ERROR,
    LIST,
    MAX_REQUEST,
    MAX_TOKENS,
    MISSING,
    OK,
    ProtocolError,
    decode_list,
    encode_request,
)

Token = str | bytes | bytearray | memoryview | int | float


class ImdsError(Exception):
    """Whatever went wrong between this client and its server."""


class ConnectionError(ImdsError, BuiltinConnectionError):
    """The server cannot be reached, went away, or answered what is no reply."""


class TimeoutError(ImdsError, BuiltinTimeoutError):
    """No whole reply came in time."""


class ServerError(ImdsError):
    """The server answered by an error: ``code`` in capitals (``"ERR"``), ``message`` whole."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = message.partition(" ")[0]


class WrongTypeError(ServerError):
    """The key holds the other kind of value (WRONGTYPE)."""


class OutOfMemoryError(ServerError):
    """The server is at its limit and may not evict (OOM)."""


class TryAgainError(ServerError):
    """Surely not carried out, and may succeed later (RETRY, SHARDDOWN, LOADING, BUSY)."""


class OutcomeUnknownError(ServerError):
    """Perhaps carried out, perhaps not (UNKNOWN, TIMEOUT)."""


class WatchError(ImdsError):
    """A watched key has changed, so the transaction was not carried out."""


_ERRORS: dict[str, type[ServerError]] = {
    "WRONGTYPE": WrongTypeError,
    "OOM": OutOfMemoryError,
    "RETRY": TryAgainError,
    "SHARDDOWN": TryAgainError,
    "LOADING": TryAgainError,
    "BUSY": TryAgainError,
    "UNKNOWN": OutcomeUnknownError,
    "TIMEOUT": OutcomeUnknownError,
}


class Response(NamedTuple):
    """A reply as it came: ``status`` is one of imds.protocol's OK, MISSING, ERROR and LIST."""

    status: int
    payload: bytes

    def error(self) -> ServerError | None:
        """Return the exception for status ERROR, otherwise None."""
        if self.status != ERROR:
            return None
        text = self.payload.decode(errors="backslashreplace")
        return _ERRORS.get(text.partition(" ")[0], ServerError)(text)

    def items(self) -> list[bytes | None]:
        """Return the elements of a LIST, None for each missing one."""
        try:
            return decode_list(self.payload)
        except ProtocolError as error:
            raise ImdsError(f"the reply is no list: {error}") from None


def to_bytes(token: Token) -> bytes:
    """Return ``token`` as it is sent: text as UTF-8, numbers as Python writes them."""
    if isinstance(token, bytes):
        return token
    if isinstance(token, str):
        return token.encode()
    if isinstance(token, bytearray | memoryview):
        return bytes(token)
    if isinstance(token, float):
        return float.__repr__(token).encode()
    if isinstance(token, int) and not isinstance(token, bool):
        return int.__repr__(token).encode()
    raise TypeError(f"{token!r} is {type(token).__name__}; send str, bytes, int or float")


def to_frame(tokens: tuple[Token, ...]) -> bytes:
    """Return the request frame of ``tokens``. Raises ValueError where no server would accept it."""
    frame = encode_request([to_bytes(token) for token in tokens])
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"a request of {len(tokens)} tokens; the limits are 1 and {MAX_TOKENS}")
    if len(frame) > MAX_REQUEST:
        raise ValueError(f"a request of {len(frame)} bytes; the limit is {MAX_REQUEST}")
    return frame


# How repr writes a float, and how a pair of a zrange reply begins: at its start or after a comma.
_PAIR = re.compile(rb"(?:\A|,)(-?(?:\d+\.\d+(?:e[+-]\d+)?|\d+e[+-]\d+|inf)):")


def parse_pairs(payload: bytes) -> list[tuple[bytes, float]]:
    """Return the (member, score) pairs of a zrange reply, ``score:member,score:member``.

    The format has no escapes. A colon or a comma in a member does no harm, but a member that contains
    something like ``,1.5:`` (a comma, a float as ``repr`` writes it, a colon) reads as two pairs, and
    nothing in the reply tells the difference. Raises ImdsError where the payload begins otherwise.
    """
    starts = list(_PAIR.finditer(payload))
    if not starts or starts[0].start(1) != 0:
        raise ImdsError(f"no zrange reply: {payload[:40]!r}")
    ends = [start.start() for start in starts[1:]] + [len(payload)]
    return [(payload[start.end() : end], float(start[1])) for start, end in zip(starts, ends, strict=True)]


def _found(reply: Response, expected: int = OK) -> bool:
    """Whether the reply is an answer (and not MISSING). Raises what the server said, or ImdsError."""
    if reply.status == expected:
        return True
    if error := reply.error():
        raise error
    if reply.status != MISSING:
        raise ImdsError(f"this command is not answered by status {reply.status}")
    return False


def _payload(reply: Response) -> bytes:
    """Return the payload where there must be one."""
    if not _found(reply):
        raise ImdsError("this command is not answered by nothing")
    return reply.payload


def _items(reply: Response) -> list[bytes | None]:
    return reply.items() if _found(reply, LIST) else []


N = TypeVar("N", int, float)


def _parsed(kind: type[N], payload: bytes) -> N:
    try:
        return kind(payload)
    except ValueError:
        raise ImdsError(f"no {kind.__name__}: {payload[:40]!r}") from None


def done(reply: Response) -> bool:
    """Whether it was done: OK or nothing."""
    return _found(reply)


def integer(reply: Response) -> int:
    return _parsed(int, _payload(reply))


def flag(reply: Response) -> bool:
    """1 or 0."""
    return integer(reply) != 0


def count(reply: Response) -> int:
    """A number, or OK for one and nothing for none: how the frozen commands answer one key or member."""
    if not _found(reply):
        return 0
    return 1 if reply.payload == b"OK" else _parsed(int, reply.payload)


def number(reply: Response) -> float:
    return _parsed(float, _payload(reply))


def optional_integer(reply: Response) -> int | None:
    return _parsed(int, reply.payload) if _found(reply) else None


def optional_number(reply: Response) -> float | None:
    return _parsed(float, reply.payload) if _found(reply) else None


def numbers(reply: Response) -> list[float | None]:
    return [None if item is None else _parsed(float, item) for item in _items(reply)]


def two_integers(reply: Response) -> tuple[int, int]:
    found = _items(reply)
    if len(found) != 2:
        raise ImdsError(f"{len(found)} elements where there should be 2")
    return _parsed(int, found[0] or b""), _parsed(int, found[1] or b"")


def raw(reply: Response) -> bytes:
    """The payload as it came; empty if there is none."""
    return reply.payload if _found(reply) else b""


def json_objects(reply: Response) -> list[dict[str, Any]]:
    try:
        return [json.loads(item) if item else {} for item in _items(reply)]
    except ValueError as error:
        raise ImdsError(f"no statistics: {error}") from None


class ReplyReader(Generic[AnyStr]):
    """Readers of replies that have text: bytes, or str in an encoding."""

    def __init__(self, encoding: str | None) -> None:
        self.encoding = encoding

    def text(self, payload: bytes) -> AnyStr:
        return cast(AnyStr, payload.decode(self.encoding) if self.encoding else payload)

    def value(self, reply: Response) -> AnyStr | None:
        return self.text(reply.payload) if _found(reply) else None

    def string(self, reply: Response) -> AnyStr:
        return self.text(_payload(reply))

    def pairs(self, reply: Response) -> list[tuple[AnyStr, float]]:
        """The reply of zrange, as text."""
        if not _found(reply):
            return []
        return [(self.text(member), score) for member, score in parse_pairs(reply.payload)]

    def strings(self, reply: Response) -> list[AnyStr]:
        return self._all_there(_items(reply))

    def optionals(self, reply: Response) -> list[AnyStr | None]:
        return [None if item is None else self.text(item) for item in _items(reply)]

    def scored(self, reply: Response) -> list[tuple[AnyStr, float]]:
        """member, score, member, score ..."""
        return self._scored(_items(reply))

    def page(self, reply: Response) -> tuple[str, list[AnyStr]]:
        """The next cursor, then elements."""
        cursor, items = _cursor(reply)
        return cursor, self._all_there(items)

    def scored_page(self, reply: Response) -> tuple[str, list[tuple[AnyStr, float]]]:
        """The next cursor, then member, score ..."""
        cursor, items = _cursor(reply)
        return cursor, self._scored(items)

    def popped(self, reply: Response) -> tuple[AnyStr, AnyStr, float] | None:
        """key, member, score; or nothing."""
        items = _items(reply)
        if not items:
            return None
        if len(items) != 3:
            raise ImdsError(f"{len(items)} elements where there should be 3")
        key, member = self._all_there(items[:2])
        return key, member, _parsed(float, items[2] or b"")

    def table(self, reply: Response) -> dict[str, AnyStr]:
        """name, value, name, value ..."""
        items = self._all_there(_items(reply))
        if len(items) % 2:
            raise ImdsError("an odd number of names and values")
        names = [name if isinstance(name, str) else name.decode() for name in items[::2]]
        return dict(zip(names, items[1::2], strict=True))

    def _scored(self, items: list[bytes | None]) -> list[tuple[AnyStr, float]]:
        if len(items) % 2:
            raise ImdsError("an odd number of members and scores")
        scores = [_parsed(float, score or b"") for score in items[1::2]]
        return list(zip(self._all_there(items[::2]), scores, strict=True))

    def _all_there(self, items: list[bytes | None]) -> list[AnyStr]:
        found = [self.text(item) for item in items if item is not None]
        if len(found) != len(items):
            raise ImdsError("an element is missing where none may be")
        return found


def _cursor(reply: Response) -> tuple[str, list[bytes | None]]:
    items = _items(reply)
    if not items or not items[0]:
        raise ImdsError("a page without a cursor")
    return items[0].decode(errors="replace"), items[1:]
