"""What the blocking and the asyncio client do the same way, without I/O.

Where the server is and how to greet it (:class:`Options`), when a request is sent again, how the replies to
requests are gathered from what a connection receives (:class:`Exchange`), and queues of commands.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, AnyStr, Self, TypedDict
from urllib.parse import parse_qsl, unquote, urlsplit

from imds.methods import AllCommands, DataCommands, Queued, Request
from imds.protocol import DEFAULT_HOST, DEFAULT_PORT, OK, U32, ProtocolError, decode_response
from imds.replies import (
    ConnectionError,
    ImdsError,
    OutcomeUnknownError,
    Response,
    ServerError,
    TimeoutError,
    Token,
    TryAgainError,
    WatchError,
    to_frame,
)

if TYPE_CHECKING:
    from ssl import SSLContext

FIRST_PAUSE = 0.05  # seconds before a request is sent again, at most; doubles each time
LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """Where the server is, and how a client is to behave. Raises ValueError for what cannot be."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    unix: str | os.PathLike[str] | None = None
    timeout: float | None = 5.0
    encoding: str | None = None
    max_connections: int = 10
    retries: int = 3
    password: str | None = None
    user: str | None = None
    name: str | None = None
    ssl: SSLContext | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and self.timeout <= 0:
            raise ValueError(f"timeout of {self.timeout} s; it must be over 0, or None")
        if self.max_connections < 1:
            raise ValueError(f"max_connections of {self.max_connections}; there must be at least one")
        if self.retries < 0:
            raise ValueError(f"retries of {self.retries}; there cannot be less than none")
        if self.user is not None and self.password is None:
            raise ValueError("a user without a password")

    @property
    def address(self) -> str:
        """Where the server is, for people."""
        return os.fspath(self.unix) if self.unix is not None else f"{self.host}:{self.port}"

    def greeting(self) -> list[bytes]:
        """Return the frames that begin a connection."""
        frames = []
        if self.password is not None:
            who = [self.user] if self.user is not None else []
            frames.append(to_frame(("auth", *who, self.password)))
        if self.name is not None:
            frames.append(to_frame(("client", "setname", self.name)))
        return frames

    def pause(self, error: ImdsError, attempt: int, harmless: bool) -> float | None:
        """Return the seconds after which to send a request again, or None if it is not to be.

        ``attempt`` counts the failures before this one. ``harmless`` says that the request was not sent, or
        may be carried out twice. Waits are random, so that clients that failed together do not come back
        together: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter ("full jitter").
        """
        if attempt >= self.retries or isinstance(error, TimeoutError):
            return None
        lost = isinstance(error, ConnectionError) or (
            isinstance(error, OutcomeUnknownError) and error.code == "UNKNOWN"
        )
        if not isinstance(error, TryAgainError) and not (lost and harmless):
            return None
        return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt))


class ClientOptions(TypedDict, total=False):
    """What the constructors of clients take beside host, port and encoding; see :class:`Options`."""

    unix: str | os.PathLike[str] | None
    timeout: float | None
    max_connections: int
    retries: int
    password: str | None
    user: str | None
    name: str | None
    ssl: SSLContext | None


_URL_OPTIONS: dict[str, type] = {
    "timeout": float,
    "encoding": str,
    "max_connections": int,
    "retries": int,
    "name": str,
}


def parse_url(url: str) -> dict[str, Any]:
    """Return the options that a URL stands for. Raises ValueError.

    ``imds://[[user]:password@]host[:port]``, ``imdss://`` the same over TLS with the system's certificates,
    ``imds+unix://[[user]:password@]/path``; then ``?timeout=1.5&encoding=utf-8&max_connections=4&retries=0``.
    """
    parts = urlsplit(url)
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)):
        if name not in _URL_OPTIONS:
            raise ValueError(f"{name!r} is no option of a URL; there are {', '.join(_URL_OPTIONS)}")
        options[name] = _URL_OPTIONS[name](value)
    if parts.username:
        options["user"] = unquote(parts.username)
    if parts.password is not None:
        options["password"] = unquote(parts.password)
    if parts.scheme == "imds+unix":
        if parts.hostname or not parts.path:
            raise ValueError("imds+unix:// is followed by an absolute path: imds+unix:///run/imds.socket")
        return options | {"unix": unquote(parts.path)}
    if parts.scheme not in ("imds", "imdss"):
        raise ValueError(f"{parts.scheme or url!r} is not imds://, imdss:// or imds+unix://")
    if parts.path not in ("", "/"):
        raise ValueError(f"{parts.path!r}: there are no databases to choose from")
    options |= {"host": parts.hostname or DEFAULT_HOST, "port": parts.port or DEFAULT_PORT}
    if parts.scheme == "imdss":
        import ssl

        options["ssl"] = ssl.create_default_context()
    return options


class Exchange:
    """The replies to ``count`` requests, from what is received.

    :meth:`feed` takes what came and returns whether a whole reply was in it; then ``done`` tells whether
    it was the last. Raises ConnectionError for what is no reply, or one too many.
    """

    __slots__ = ("_count", "_inbox", "done", "replies")

    def __init__(self, count: int) -> None:
        self.replies: list[Response] = []
        self.done = count == 0
        self._count = count
        self._inbox = bytearray()

    def feed(self, chunk: bytes | bytearray | memoryview) -> bool:
        """Take what was received; O(its length)."""
        replies = self.replies
        before, pos = len(replies), 0
        buffer: bytes | bytearray | memoryview = chunk
        if self._inbox:
            self._inbox += chunk
            buffer = self._inbox
        try:
            while found := decode_response(buffer, pos):
                status, payload, pos = found
                replies.append(Response(status, payload))
        except ProtocolError as error:
            raise ConnectionError(f"the server does not speak this protocol: {error}") from None
        if self._inbox:
            del self._inbox[:pos]
        elif pos < len(chunk):
            self._inbox += memoryview(chunk)[pos:]
        if len(replies) >= self._count:
            if self._inbox or len(replies) > self._count:
                raise ConnectionError("the server sent more than the replies that were asked for")
            self.done = True
        return len(replies) > before

    def ended(self) -> ConnectionError:
        """Say how far the server came, and what it said last: an error before the end is its reason."""
        text = "the server closed the connection"
        if self._inbox:
            text += " in the middle of a reply"
        if self.replies:
            text += f" after {len(self.replies)} replies"
            if last := self.replies[-1].error():
                text += f", the last of which was: {last}"
        return ConnectionError(text)


class Queue(Queued[AnyStr]):
    """Commands that are noted, to be sent together. Begin with :meth:`_discard`."""

    def command(self, *tokens: Token) -> Self:
        """Queue any command; its result is the :class:`Response` as it comes, an error too."""
        return self._run(Request(_as_it_is, *tokens))

    def __len__(self) -> int:
        return len(self._queued)

    def _run(self, request: Request[Any]) -> Self:
        self._frames += to_frame(request.tokens)
        self._queued.append(request)
        return self

    def _discard(self) -> None:
        self._frames = bytearray()
        self._queued: list[Request[Any]] = []

    def _take(self) -> tuple[bytearray, list[Request[Any]]]:
        taken = self._frames, self._queued
        self._discard()
        return taken


class PipelineQueue(AllCommands[AnyStr], Queue[AnyStr]):
    """A queue of any commands."""


class TransactionQueue(DataCommands[AnyStr], Queue[AnyStr]):
    """A queue of commands that the server runs all at once."""

    @staticmethod
    def _frame(frames: bytearray) -> bytes:
        return to_frame(("multi",)) + frames + to_frame(("exec",))

    @staticmethod
    def _replies(replies: Sequence[Response]) -> list[Response]:
        """Return the reply to each queued command from those to multi, to each of them, and to exec."""
        for reply in replies[:-1]:
            if error := reply.error():  # not queued, so exec has refused all
                raise error
        last = replies[-1]
        if error := last.error():
            raise error
        if not last.payload:
            raise WatchError("a watched key has changed; nothing was carried out")
        found = []
        for item in last.items():
            if item is None or len(item) < 4:
                raise ImdsError("no reply of a transaction")
            found.append(Response(U32.unpack_from(item)[0], item[4:]))
        if len(found) != len(replies) - 2:
            raise ImdsError(f"{len(found)} replies of a transaction of {len(replies) - 2}")
        return found


def results(requests: Sequence[Request[Any]], replies: Sequence[Response], raise_on_error: bool) -> list[Any]:
    """Return the results in order. The first error is raised, or each stands in its place."""
    found: list[Any] = []
    first: Exception | None = None
    for request, reply in zip(requests, replies, strict=True):
        try:
            found.append(request.read(reply))
        except (ImdsError, UnicodeDecodeError) as error:
            if first is None:
                error.add_note(f"command {len(found)} of the pipeline, counted from 0")
                first = error
            found.append(error)
    if first is not None and raise_on_error:
        raise first
    return found


def greeted(replies: Sequence[Response]) -> None:
    """Raise what the server said against a greeting."""
    for reply in replies:
        if error := reply.error():
            raise error
        if reply.status != OK:
            raise ServerError(f"ERR a greeting is not answered by status {reply.status}")


def _as_it_is(reply: Response) -> Response:
    return reply
