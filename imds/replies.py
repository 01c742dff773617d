"""What every client has in common, without I/O: errors, how tokens are sent, how replies are read."""

from __future__ import annotations

import json
import re
from builtins import ConnectionError as BuiltinConnectionError
from builtins import TimeoutError as BuiltinTimeoutError
from typing import Any, AnyStr, Generic, NamedTuple, cast

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


class ReplyReader(Generic[AnyStr]):
    """Turns replies into what the typed methods return."""

    def __init__(self, encoding: str | None) -> None:
        self.encoding = encoding

    def text(self, payload: bytes) -> AnyStr:
        return cast(AnyStr, payload.decode(self.encoding) if self.encoding else payload)

    def value(self, reply: Response) -> AnyStr | None:
        return self.text(reply.payload) if _found(reply) else None

    def done(self, reply: Response) -> bool:
        return _found(reply)

    def rank(self, reply: Response) -> int | None:
        if not _found(reply):
            return None
        try:
            return int(reply.payload)
        except ValueError:
            raise ImdsError(f"no rank: {reply.payload[:40]!r}") from None

    def raw(self, reply: Response) -> bytes:
        return reply.payload if _found(reply) else b""

    def pairs(self, reply: Response) -> list[tuple[AnyStr, float]]:
        if not _found(reply):
            return []
        return [(self.text(member), score) for member, score in parse_pairs(reply.payload)]

    def objects(self, reply: Response) -> list[dict[str, Any]]:
        if not _found(reply, LIST):
            return []
        try:
            return [json.loads(item) if item else {} for item in reply.items()]
        except ValueError as error:
            raise ImdsError(f"no statistics: {error}") from None


def _found(reply: Response, expected: int = OK) -> bool:
    """Whether the reply is an answer (and not MISSING). Raises what the server said, or ImdsError."""
    if error := reply.error():
        raise error
    if reply.status not in (expected, MISSING):
        raise ImdsError(f"this command is not answered by status {reply.status}")
    return reply.status == expected
