"""The blocking client.

::

    with imds.Client() as client:
        client.set("greeting", "hello")
        client.zadd("scores", 12.5, "anna")
        client.get("greeting")              # b"hello"

The rules that this file keeps:

* A reply can never reach the wrong request. A connection on which anything went wrong (a timeout, an
  interrupt, bytes that are no reply, a reply too many) is closed and never used again; the next call
  makes a new one. Nothing is sent twice: whether to try again is for the caller to decide.
* A connection that the server closed while it was idle is noticed before a request goes out, so a
  restarted server costs its idle clients no error.
* Sending and receiving are interleaved. However long a pipeline is, the replies are taken while requests
  are still going out, so that a server that stops reading until its replies are read is not waited for.
* Threads may share a client: each call or pipeline holds it until the replies are there, the others
  wait. A process forked from this one makes its own connection.

A timeout or a lost connection leaves open whether the request was carried out, unless the connection
could not be made at all.
"""

from __future__ import annotations

import builtins
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from math import ceil, inf
from types import TracebackType
from typing import Any, AnyStr, Generic, Self, overload
from weakref import WeakSet

from imds.protocol import DEFAULT_HOST, DEFAULT_PORT, ProtocolError, decode_response
from imds.replies import (
    ConnectionError,
    ImdsError,
    OutcomeUnknownError,
    OutOfMemoryError,
    ReplyReader,
    Response,
    ServerError,
    TimeoutError,
    Token,
    TryAgainError,
    WrongTypeError,
    parse_pairs,
    to_frame,
)

__all__ = [
    "Client",
    "ConnectionError",
    "ImdsError",
    "OutOfMemoryError",
    "OutcomeUnknownError",
    "Pipeline",
    "Response",
    "ServerError",
    "TimeoutError",
    "TryAgainError",
    "WrongTypeError",
    "parse_pairs",
]

# What one recv asks for, and one send offers: large enough that a pipeline costs few calls.
_CHUNK = 1 << 16


class Client(Generic[AnyStr]):
    """One connection to a server, made by the first call that needs it.

    ``unix`` is the path of the server's Unix socket, instead of host and port. ``timeout`` is in seconds
    (None: for ever) and bounds making the connection, and the wait for each reply: the clock starts
    again when a whole reply has arrived, so a long pipeline may take longer in all. Values and members
    come back as bytes, or as text if ``encoding`` (such as ``"utf-8"``) is given.
    """

    @overload
    def __init__(
        self: Client[bytes],
        host: str = ...,
        port: int = ...,
        *,
        unix: str | os.PathLike[str] | None = ...,
        timeout: float | None = ...,
        encoding: None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Client[str],
        host: str = ...,
        port: int = ...,
        *,
        unix: str | os.PathLike[str] | None = ...,
        timeout: float | None = ...,
        encoding: str,
    ) -> None: ...
    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        unix: str | os.PathLike[str] | None = None,
        timeout: float | None = 5.0,
        encoding: str | None = None,
    ) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout of {timeout} s; it must be over 0, or None")
        self.host = host
        self.port = port
        self.unix = os.fspath(unix) if unix is not None else None
        self.timeout = timeout
        self.connects = 0  # how many connections this client has made
        self._reader: ReplyReader[AnyStr] = ReplyReader(encoding)
        self._connection: _Connection | None = None
        self._lock = threading.Lock()
        _clients.add(self)

    # The seven commands, and statistics. Each raises ServerError, TimeoutError or ConnectionError.

    def get(self, key: Token) -> AnyStr | None:
        """Return the string that ``key`` holds, or None."""
        return self._reader.value(self.execute(b"get", key))

    def set(self, key: Token, value: Token) -> bool:
        """Make ``key`` hold a string, whatever it held before. Always True."""
        return self._reader.done(self.execute(b"set", key, value))

    def delete(self, key: Token) -> bool:
        """Remove ``key``, a string or a sorted set; return whether there was one."""
        return self._reader.done(self.execute(b"del", key))

    def zadd(self, key: Token, score: Token, member: Token) -> bool:
        """Add ``member`` to the sorted set of ``key``, or move it to ``score``. Always True."""
        return self._reader.done(self.execute(b"zadd", key, score, member))

    def zrange(self, key: Token, low: Token = -inf, high: Token = inf) -> list[tuple[AnyStr, float]]:
        """Return (member, score) with ``low <= score <= high``, ascending by score, then by member's bytes.

        The reply's format is ambiguous for odd members: see :func:`parse_pairs`.
        """
        return self._reader.pairs(self.execute(b"zrange", key, low, high))

    def zrange_raw(self, key: Token, low: Token = -inf, high: Token = inf) -> bytes:
        """Return the reply to zrange as it came, ``score:member,score:member``; empty if there is none."""
        return self._reader.raw(self.execute(b"zrange", key, low, high))

    def zrank(self, key: Token, member: Token) -> int | None:
        """Return the 0-based rank of ``member``, lowest score first, or None."""
        return self._reader.rank(self.execute(b"zrank", key, member))

    def zrem(self, key: Token, member: Token) -> bool:
        """Remove ``member`` from the sorted set of ``key``; return whether it was there."""
        return self._reader.done(self.execute(b"zrem", key, member))

    def stats(self) -> list[dict[str, Any]]:
        """Return the statistics of each shard, in the order of shards."""
        return self._reader.objects(self.execute(b"stats"))

    # Everything else.

    def execute(self, *tokens: Token) -> Response:
        """Send any command and return its reply as it came, an error too."""
        return self.exchange(to_frame(tokens), 1)[0]

    def pipeline(self) -> Pipeline[AnyStr]:
        """Return a :class:`Pipeline` that collects commands to send them together."""
        return Pipeline(self, self._reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<imds.Client of {self.address}>"

    @property
    def address(self) -> str:
        """Where the server is, for people."""
        return self.unix or f"{self.host}:{self.port}"

    def connect(self) -> None:
        """Connect now, unless there is a connection, to learn early whether the server is there."""
        with self._lock:
            self._connected()

    def close(self) -> None:
        """Close the connection. Another call would make a new one."""
        with self._lock:
            self._drop()

    def exchange(self, requests: bytes | bytearray, count: int) -> list[Response]:
        """Send ``count`` request frames and return their replies in order."""
        with self._lock:
            connection = self._connected()
            try:
                return connection.exchange(requests, count, self.timeout)
            except BaseException as error:  # an interrupt too leaves replies under way
                self._drop()
                if isinstance(error, OSError) and not isinstance(error, ImdsError):
                    raise ConnectionError(f"lost the connection to {self.address}: {error}") from error
                raise

    def _connected(self) -> _Connection:
        """Return a connection on which nothing is under way."""
        if self._connection is not None:
            if self._connection.idle():
                return self._connection
            self._drop()
        try:
            self._connection = _Connection(_connect(self.host, self.port, self.unix, self.timeout))
        except (OSError, UnicodeError) as error:
            kind = TimeoutError if isinstance(error, builtins.TimeoutError) else ConnectionError
            reason = getattr(error, "strerror", None) or error
            raise kind(f"cannot connect to {self.address}: {reason}") from error
        self.connects += 1
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _forked(self) -> None:
        """In a child process: leave the connection to the parent, and the lock to whoever holds it there."""
        self._drop()  # closes only this process's end
        self._lock = threading.Lock()


_clients: WeakSet[Client[Any]] = WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._forked()


os.register_at_fork(after_in_child=_after_fork)


class Pipeline(Generic[AnyStr]):
    """Commands that are sent together; their replies come back in order.

    ::

        with client.pipeline() as pipe:
            pipe.set("a", 1).set("b", 2)
            pipe.get("a")
            done, done, value = pipe.execute()

    The end of a ``with`` block executes what is still queued, unless the block raised. Not a transaction:
    other clients' commands may come in between, and an error does not stop the commands after it.
    A lost connection leaves open which of them were carried out.
    """

    def __init__(self, client: Client[AnyStr], reader: ReplyReader[AnyStr]) -> None:
        self._client: Client[AnyStr] = client
        self._reader: ReplyReader[AnyStr] = reader
        self._discard()

    def get(self, key: Token) -> Self:
        return self._add(self._reader.value, b"get", key)

    def set(self, key: Token, value: Token) -> Self:
        return self._add(self._reader.done, b"set", key, value)

    def delete(self, key: Token) -> Self:
        return self._add(self._reader.done, b"del", key)

    def zadd(self, key: Token, score: Token, member: Token) -> Self:
        return self._add(self._reader.done, b"zadd", key, score, member)

    def zrange(self, key: Token, low: Token = -inf, high: Token = inf) -> Self:
        return self._add(self._reader.pairs, b"zrange", key, low, high)

    def zrange_raw(self, key: Token, low: Token = -inf, high: Token = inf) -> Self:
        return self._add(self._reader.raw, b"zrange", key, low, high)

    def zrank(self, key: Token, member: Token) -> Self:
        return self._add(self._reader.rank, b"zrank", key, member)

    def zrem(self, key: Token, member: Token) -> Self:
        return self._add(self._reader.done, b"zrem", key, member)

    def command(self, *tokens: Token) -> Self:
        """Queue any command; its result is the :class:`Response` as it comes, an error too."""
        return self._add(_as_it_is, *tokens)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send what is queued and return the results in order; the queue is empty afterwards.

        All commands are carried out, whatever some of them answer. Then the first error is raised, or,
        with ``raise_on_error=False``, each error stands in the list as an exception in its place.
        """
        if not self._readers:
            return []
        requests, readers = self._requests, self._readers
        self._discard()
        results: list[Any] = []
        first: Exception | None = None
        for read, reply in zip(readers, self._client.exchange(requests, len(readers)), strict=True):
            try:
                results.append(read(reply))
            except (ImdsError, UnicodeDecodeError) as error:
                if first is None:
                    error.add_note(f"command {len(results)} of the pipeline, counted from 0")
                    first = error
                results.append(error)
        if first is not None and raise_on_error:
            raise first
        return results

    def __len__(self) -> int:
        return len(self._readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.execute()
        else:
            self._discard()

    def _add(self, read: Callable[[Response], Any], *tokens: Token) -> Self:
        self._requests += to_frame(tokens)
        self._readers.append(read)
        return self

    def _discard(self) -> None:
        self._requests = bytearray()
        self._readers: list[Callable[[Response], Any]] = []


def _as_it_is(reply: Response) -> Response:
    return reply


def _connect(host: str, port: int, unix: str | None, timeout: float | None) -> socket.socket:
    """Return a new non-blocking connection. Raises OSError."""
    if unix is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(unix)
        except BaseException:
            sock.close()
            raise
    else:
        sock = socket.create_connection((host, port), timeout)
        if sock.getsockname() == sock.getpeername():
            # Linux joins a socket to itself where nobody listens on a port that it then happens to pick
            # as the socket's own; kept, it would answer us by our requests and bar the server's return.
            sock.close()
            raise ConnectionRefusedError("Connection refused")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


class _Connection:
    """One non-blocking socket and its poll object, which waits for input unless an exchange is sending."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._half_sent = False

    def close(self) -> None:
        self._sock.close()

    def idle(self) -> bool:
        """Whether the next reply will be for the next request: nothing is under way in either direction."""
        return not self._half_sent and not self._poll.poll(0)

    def exchange(self, requests: bytes | bytearray, count: int, timeout: float | None) -> list[Response]:
        """Send ``count`` requests and return as many replies.

        Raises OSError when the connection breaks, ConnectionError for what is no reply, TimeoutError.
        """
        replies: list[Response] = []
        inbox = bytearray()
        unsent = memoryview(requests)
        deadline = _deadline(timeout)
        while len(replies) < count:
            if unsent:
                unsent = self._send_some(unsent)
            left = deadline - time.monotonic()
            events = self._poll.poll(None if left == inf else max(0, ceil(left * 1000)))
            if not events:
                raise TimeoutError(f"no reply in {timeout} s")
            if not events[0][1] & ~select.POLLOUT:
                continue
            chunk = self._sock.recv(_CHUNK)
            if not chunk:
                raise ConnectionError(_ended(replies, inbox))
            inbox += chunk
            if _take_replies(inbox, replies):
                deadline = _deadline(timeout)
        if inbox or len(replies) > count:
            raise ConnectionError("the server sent more than the replies that were asked for")
        self._half_sent = bool(unsent)
        return replies

    def _send_some(self, unsent: memoryview) -> memoryview:
        """Send what the socket takes of ``unsent`` and return the rest; poll for room if there is a rest."""
        try:
            unsent = unsent[self._sock.send(unsent[:_CHUNK]) :]
        except BlockingIOError:
            pass
        except OSError:
            unsent = unsent[:0]  # the server closed; what it said before is still to be read
        self._poll.modify(self._sock, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)
        return unsent


def _deadline(timeout: float | None) -> float:
    return inf if timeout is None else time.monotonic() + timeout


def _take_replies(inbox: bytearray, replies: list[Response]) -> int:
    """Move the whole replies at the start of ``inbox`` to ``replies``; return how many there were."""
    before, pos = len(replies), 0
    with memoryview(inbox) as view:
        try:
            while found := decode_response(view, pos):
                status, payload, pos = found
                replies.append(Response(status, payload))
        except ProtocolError as error:
            raise ConnectionError(f"the server does not speak this protocol: {error}") from None
    del inbox[:pos]
    return len(replies) - before


def _ended(replies: list[Response], inbox: bytearray) -> str:
    """Say how far the server came, and what it said last: an error before the end is its reason."""
    text = "the server closed the connection"
    if inbox:
        text += " in the middle of a reply"
    if replies:
        text += f" after {len(replies)} replies"
        if last := replies[-1].error():
            text += f", the last of which was: {last}"
    return text
